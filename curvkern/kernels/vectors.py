"""Lists of tensors in Triton: one launch for all tensors of a pair of dtypes, by a table of addresses on the device.

A row of the table: address of x, address of y, elements, chunks before it; behind the rows stands, for each chunk,
whose it is.
"""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvkern.kernels import Ahead
from curvkern.kernels.mix import weighted

BLOCK = 2048
CHUNK = 4 * BLOCK  # what one program does
DTYPES = (tl.float32, tl.float16, tl.bfloat16)


@triton.jit
def chunk_of(table_ptr, tensors, CHUNK: tl.constexpr):
    """This program's part of the list: the addresses, the elements of the tensor, the first of the chunk."""
    chunk = tl.program_id(0).to(tl.int64)
    row = table_ptr + tl.load(table_ptr + tensors * 4 + chunk) * 4
    return tl.load(row), tl.load(row + 1), tl.load(row + 2), (chunk - tl.load(row + 3)) * CHUNK


@triton.jit
def places(address, offs, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Where the elements are. The hint stands on the sum: on the address alone it would be lost."""
    at = address.to(tl.pointer_type(TYPE)) + offs
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def values(at, offs, n, FULL: tl.constexpr):
    """float32; without a mask where the chunk is full, for a mask that ends anywhere forbids wide loads."""
    if FULL:
        return tl.load(at).to(tl.float32)
    else:
        return tl.load(at, mask=offs < n, other=0.0).to(tl.float32)


@triton.jit
def sums_of(
    x_at, y_at, n, first, X: tl.constexpr, Y: tl.constexpr, TWO: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    xy = tl.zeros((BLOCK,), tl.float32)
    xx = tl.zeros((BLOCK,), tl.float32)
    yy = tl.zeros((BLOCK,), tl.float32)
    for step in tl.static_range(CHUNK // BLOCK):
        offs = first + step * BLOCK + tl.arange(0, BLOCK)
        x = values(places(x_at, offs, X, ALIGNED), offs, n, FULL)
        xx += x * x
        if TWO:
            y = values(places(y_at, offs, Y, ALIGNED), offs, n, FULL)
            xy += x * y
            yy += y * y
    return tl.sum(xy.to(tl.float64)), tl.sum(xx.to(tl.float64)), tl.sum(yy.to(tl.float64))


@triton.jit
def sums_kernel(
    partial_ptr, table_ptr, tensors, X: tl.constexpr, Y: tl.constexpr, TWO: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    x_at, y_at, n, first = chunk_of(table_ptr, tensors, CHUNK)
    if first + CHUNK <= n:
        xy, xx, yy = sums_of(x_at, y_at, n, first, X, Y, TWO, ALIGNED, CHUNK, BLOCK, True)
    else:
        xy, xx, yy = sums_of(x_at, y_at, n, first, X, Y, TWO, ALIGNED, CHUNK, BLOCK, False)
    out = partial_ptr + tl.program_id(0).to(tl.int64) * 3
    tl.store(out, xy)
    tl.store(out + 1, xx)
    tl.store(out + 2, yy)


@triton.jit
def edit_of(
    x_at, y_at, n, first, numbers_ptr, RULE: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, FULL: tl.constexpr,
):  # fmt: skip
    a, b = tl.load(numbers_ptr), 0.0
    if RULE == "axpby":
        b = tl.load(numbers_ptr + 1)
    for step in tl.static_range(CHUNK // BLOCK):
        offs = first + step * BLOCK + tl.arange(0, BLOCK)
        out = places(y_at, offs, Y, ALIGNED)
        x, y = values(places(x_at, offs, X, ALIGNED), offs, n, FULL), values(out, offs, n, FULL)
        if RULE == "axpby":
            edited = weighted(a, x) + weighted(b, y)
        else:
            edited = tl.where(a >= 1.0, x, tl.where(a > 0.0, y + a * (x - y), y))
        if FULL:
            tl.store(out, edited.to(Y))
        else:
            tl.store(out, edited.to(Y), mask=offs < n)


@triton.jit
def edit_kernel(
    table_ptr, numbers_ptr, tensors, RULE: tl.constexpr, X: tl.constexpr, Y: tl.constexpr, ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """axpby: y <- numbers[0] x + numbers[1] y; lerp: y <- y + numbers[0] (x - y), exact at 0 and 1."""
    x_at, y_at, n, first = chunk_of(table_ptr, tensors, CHUNK)
    if first + CHUNK <= n:
        edit_of(x_at, y_at, n, first, numbers_ptr, RULE, X, Y, ALIGNED, CHUNK, BLOCK, True)
    else:
        edit_of(x_at, y_at, n, first, numbers_ptr, RULE, X, Y, ALIGNED, CHUNK, BLOCK, False)


_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


class Group(NamedTuple):
    """The tensors of one pair of dtypes: what one launch does."""

    table: Tensor
    tensors: int
    chunks: int
    x: tl.dtype
    y: tl.dtype
    two: bool
    aligned: bool


_KEPT = 32
_plans: dict[tuple[torch.device, tuple[int, ...]], list[Group]] = {}
_captured: set[tuple[torch.device, tuple[int, ...]]] = set()


def _plan(rows: list[int], device: torch.device) -> list[Group]:
    """The launches for a list, their tables on the device.

    The last few are kept, as a training loop hands in the same list at every step: a new one costs a copy for which the
    host waits. One that a CUDA graph has seen is kept for good, since the graph will read it again.
    """
    key = (device, tuple(rows))
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if key not in _plans:
        if capturing:
            raise RuntimeError(
                "a list op cannot make its table while a CUDA graph is being captured; call it once with the same "
                "tensors before the capture."
            )
        _plans[key] = _grouped(torch.tensor(rows).view(-1, 5), device)
        for old in [k for k in _plans if k not in _captured][:-_KEPT]:
            del _plans[old]
    if capturing:
        _captured.add(key)
    elif device.type == "cuda" and _plans[key]:
        _plans[key][0].table.record_stream(torch.cuda.current_stream(device))
    return _plans[key]


def _grouped(rows: Tensor, device: torch.device) -> list[Group]:
    """One group a pair of dtypes in the list, in the order of their codes; one copy for all tables."""
    parts: list[Tensor] = []
    groups: list[tuple[int, int, int, int, bool, bool]] = []
    for x, y in rows[:, 3:].unique(dim=0).tolist():
        mine = rows[(rows[:, 3] == x) & (rows[:, 4] == y)]
        counts = (mine[:, 2] + CHUNK - 1) // CHUNK
        firsts = counts.cumsum(0) - counts
        owners = torch.arange(len(mine)).repeat_interleave(counts)
        parts.append(torch.cat([torch.cat([mine[:, :3], firsts[:, None]], 1).view(-1), owners]))
        aligned = not (mine[:, :2] % 16).any()
        groups.append((len(mine), len(owners), x, y, bool(mine[:, 1].any()), aligned))
    tables = torch.cat(parts).to(device).split([len(part) for part in parts])
    return [
        Group(table, tensors, chunks, DTYPES[x], DTYPES[y], two, aligned)
        for table, (tensors, chunks, x, y, two, aligned) in zip(tables, groups, strict=True)
        if chunks
    ]


def sums(rows: list[int], device: torch.device) -> Tensor:
    """float64 [3]: <x, y>, <x, x>, <y, y> over the list, in a fixed order.

    Args:
        rows: for each tensor address of x, address of y or 0, elements, dtype codes of x and y.
        device: where they are.
    """
    total = torch.zeros(3, dtype=torch.float64, device=device)
    with torch.cuda.device_of(total):
        for group in _plan(rows, device):
            table, tensors, chunks, *how = group
            partial = torch.empty(chunks, 3, dtype=torch.float64, device=device)
            sums_kernel[(chunks,)](partial, table, tensors, *how, CHUNK, BLOCK, **_OPTIONS)
            total = total + partial.sum(0)
    return total


def edit(rows: list[int], numbers: Tensor, rule: str) -> None:
    """`curvkern.axpby_list_` or `curvkern.lerp_list_`; rows as for `sums`."""
    with torch.cuda.device_of(numbers):
        for table, tensors, chunks, x, y, _, aligned in _plan(rows, numbers.device):
            edit_kernel[(chunks,)](table, numbers, tensors, rule, x, y, aligned, CHUNK, BLOCK, **_OPTIONS)


_BF16 = {"X": tl.bfloat16, "Y": tl.bfloat16, "CHUNK": CHUNK, "BLOCK": BLOCK}
_SHADOW = {"X": tl.bfloat16, "Y": tl.float32, "CHUNK": CHUNK, "BLOCK": BLOCK}
_TABLE = {"table_ptr": "*i64", "tensors": "i64"}

AHEAD_OF_TIME = [
    Ahead(sums_kernel, {"partial_ptr": "*fp64", **_TABLE}, {**_BF16, "TWO": True, "ALIGNED": True}, _OPTIONS),
    Ahead(sums_kernel, {"partial_ptr": "*fp64", **_TABLE}, {**_SHADOW, "TWO": False, "ALIGNED": False}, _OPTIONS),
    Ahead(edit_kernel, {**_TABLE, "numbers_ptr": "*fp32"}, {**_BF16, "RULE": "axpby", "ALIGNED": True}, _OPTIONS),
    Ahead(edit_kernel, {**_TABLE, "numbers_ptr": "*fp32"}, {**_SHADOW, "RULE": "lerp", "ALIGNED": True}, _OPTIONS),
]

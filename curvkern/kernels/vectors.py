"""Lists of tensors in Triton: one launch for all, by a table of addresses on the device.

A row of the table: address of x, address of y, elements, dtype codes of x and y, chunks before it; behind the rows
stands, for each chunk, whose it is.
"""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvkern.kernels import Ahead
from curvkern.kernels.mix import weighted

BLOCK = 2048
ROW = 6


@triton.jit
def load(address, code, offs, inside, ALIGNED: tl.constexpr):
    """float32 values of a tensor of which the address and the dtype code are known."""
    if code == 0:
        p32 = address.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            p32 = tl.multiple_of(p32, 16)
        x = tl.load(p32 + offs, mask=inside, other=0.0)
    elif code == 1:
        p16 = address.to(tl.pointer_type(tl.float16))
        if ALIGNED:
            p16 = tl.multiple_of(p16, 16)
        x = tl.load(p16 + offs, mask=inside, other=0.0).to(tl.float32)
    else:
        pb = address.to(tl.pointer_type(tl.bfloat16))
        if ALIGNED:
            pb = tl.multiple_of(pb, 16)
        x = tl.load(pb + offs, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def store(address, code, offs, x, inside, ALIGNED: tl.constexpr):
    """Round float32 values to a tensor of which the address and the dtype code are known."""
    if code == 0:
        p32 = address.to(tl.pointer_type(tl.float32))
        if ALIGNED:
            p32 = tl.multiple_of(p32, 16)
        tl.store(p32 + offs, x, mask=inside)
    elif code == 1:
        p16 = address.to(tl.pointer_type(tl.float16))
        if ALIGNED:
            p16 = tl.multiple_of(p16, 16)
        tl.store(p16 + offs, x.to(tl.float16), mask=inside)
    else:
        pb = address.to(tl.pointer_type(tl.bfloat16))
        if ALIGNED:
            pb = tl.multiple_of(pb, 16)
        tl.store(pb + offs, x.to(tl.bfloat16), mask=inside)


@triton.jit
def sums_kernel(
    partial_ptr, table_ptr, tensors, TWO: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    chunk = tl.program_id(0).to(tl.int64)
    row = table_ptr + tl.load(table_ptr + tensors * 6 + chunk) * 6
    x_at, y_at, n = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    x_code, y_code = tl.load(row + 3), tl.load(row + 4)
    first = (chunk - tl.load(row + 5)) * CHUNK
    xy = tl.zeros((BLOCK,), tl.float32)
    xx = tl.zeros((BLOCK,), tl.float32)
    yy = tl.zeros((BLOCK,), tl.float32)
    for step in range(CHUNK // BLOCK):
        offs = first + step * BLOCK + tl.arange(0, BLOCK)
        x = load(x_at, x_code, offs, offs < n, ALIGNED)
        xx += x * x
        if TWO:
            y = load(y_at, y_code, offs, offs < n, ALIGNED)
            xy += x * y
            yy += y * y
    tl.store(partial_ptr + chunk * 3, tl.sum(xy.to(tl.float64)))
    tl.store(partial_ptr + chunk * 3 + 1, tl.sum(xx.to(tl.float64)))
    tl.store(partial_ptr + chunk * 3 + 2, tl.sum(yy.to(tl.float64)))


@triton.jit
def edit_kernel(
    table_ptr, numbers_ptr, tensors,
    RULE: tl.constexpr, ALIGNED: tl.constexpr, CHUNK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """axpby: y <- numbers[0] x + numbers[1] y; lerp: y <- y + numbers[0] (x - y), exact at 0 and 1."""
    chunk = tl.program_id(0).to(tl.int64)
    row = table_ptr + tl.load(table_ptr + tensors * 6 + chunk) * 6
    x_at, y_at, n = tl.load(row), tl.load(row + 1), tl.load(row + 2)
    x_code, y_code = tl.load(row + 3), tl.load(row + 4)
    first = (chunk - tl.load(row + 5)) * CHUNK
    a = tl.load(numbers_ptr)
    for step in range(CHUNK // BLOCK):
        offs = first + step * BLOCK + tl.arange(0, BLOCK)
        x = load(x_at, x_code, offs, offs < n, ALIGNED)
        y = load(y_at, y_code, offs, offs < n, ALIGNED)
        if RULE == "axpby":
            y = weighted(a, x) + weighted(tl.load(numbers_ptr + 1), y)
        else:
            y = tl.where(a >= 1.0, x, tl.where(a > 0.0, y + a * (x - y), y))
        store(y_at, y_code, offs, y, offs < n, ALIGNED)


_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
_KEPT = 32
_tables: dict[tuple[torch.device, tuple[int, ...]], Tensor] = {}
_captured: set[tuple[torch.device, tuple[int, ...]]] = set()


def _table(rows: list[int], chunks: int, device: torch.device) -> Tensor:
    """The rows and each chunk's tensor on the device, by one copy for which the host waits.

    The last few tables are kept: a training loop hands in the same list at every step. One that a CUDA graph has seen
    is kept for good, since the graph will read it again.
    """
    key = (device, tuple(rows))
    capturing = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    table = _tables.get(key)
    if table is None:
        if capturing:
            raise RuntimeError(
                "a list op cannot make its table while a CUDA graph is being captured; call it once with the same "
                "tensors before the capture."
            )
        starts = torch.tensor([*rows[ROW - 1 :: ROW], chunks])
        owners = torch.arange(len(rows) // ROW).repeat_interleave(starts.diff())
        table = _tables[key] = torch.cat([torch.tensor(rows), owners]).to(device)
        for old in [k for k in _tables if k not in _captured][:-_KEPT]:
            del _tables[old]
    if capturing:
        _captured.add(key)
    elif device.type == "cuda":
        table.record_stream(torch.cuda.current_stream(device))
    return table


def _aligned(rows: list[int]) -> bool:
    """Whether every tensor starts at a multiple of 16 bytes."""
    return not any((x | y) % 16 for x, y in zip(rows[::ROW], rows[1::ROW], strict=True))


def sums(rows: list[int], chunks: int, chunk: int, device: torch.device) -> Tensor:
    """float64 [3]: <x, y>, <x, x>, <y, y> over the list, in a fixed order."""
    partial = torch.empty(chunks, 3, dtype=torch.float64, device=device)
    if chunks:
        with torch.cuda.device_of(partial):
            table, two = _table(rows, chunks, device), any(rows[1::ROW])
            sums_kernel[(chunks,)](partial, table, len(rows) // ROW, two, _aligned(rows), chunk, BLOCK, **_OPTIONS)
    return partial.sum(0)


def edit(rows: list[int], chunks: int, chunk: int, numbers: Tensor, rule: str) -> None:
    """`curvkern.axpby_list_` or `curvkern.lerp_list_`."""
    if chunks:
        with torch.cuda.device_of(numbers):
            table = _table(rows, chunks, numbers.device)
            edit_kernel[(chunks,)](table, numbers, len(rows) // ROW, rule, _aligned(rows), chunk, BLOCK, **_OPTIONS)


_SIGNATURE = {"table_ptr": "*i64:16", "tensors": "i64"}

AHEAD_OF_TIME = [
    Ahead(
        sums_kernel,
        {"partial_ptr": "*fp64", **_SIGNATURE},
        {"TWO": True, "ALIGNED": True, "CHUNK": 8 * BLOCK, "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        edit_kernel,
        {**_SIGNATURE, "numbers_ptr": "*fp32"},
        {"RULE": "axpby", "ALIGNED": True, "CHUNK": 8 * BLOCK, "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        edit_kernel,
        {**_SIGNATURE, "numbers_ptr": "*fp32"},
        {"RULE": "lerp", "ALIGNED": False, "CHUNK": 8 * BLOCK, "BLOCK": BLOCK},
        _OPTIONS,
    ),
]

"""linear, axpby_, ties, dare and the sums they need in Triton: a program per block, each tensor read once.

Up to eight tensors are eight arguments, not a table of addresses: nothing is copied from the host, so that a CUDA graph
can capture a merge.
"""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvkern.kernels import Ahead
from curvkern.kernels.philox import element_words

BLOCK = 2048


@triton.jit
def weighted(weight, x):
    """Weight 0 leaves x out, whatever it holds; -0 is what no sum notices."""
    return tl.where(weight == 0.0, -0.0, weight * x)


@triton.jit
def wide(x0, x1, x2, x3, x4, x5, x6, x7, K: tl.constexpr, offs, inside):
    """float32 values of the K-th tensor."""
    if K == 0:
        x = tl.load(x0 + offs, mask=inside, other=0.0)
    elif K == 1:
        x = tl.load(x1 + offs, mask=inside, other=0.0)
    elif K == 2:
        x = tl.load(x2 + offs, mask=inside, other=0.0)
    elif K == 3:
        x = tl.load(x3 + offs, mask=inside, other=0.0)
    elif K == 4:
        x = tl.load(x4 + offs, mask=inside, other=0.0)
    elif K == 5:
        x = tl.load(x5 + offs, mask=inside, other=0.0)
    elif K == 6:
        x = tl.load(x6 + offs, mask=inside, other=0.0)
    else:
        x = tl.load(x7 + offs, mask=inside, other=0.0)
    return x.to(tl.float32)


@triton.jit
def linear_kernel(
    out_ptr, weights_ptr, x0, x1, x2, x3, x4, x5, x6, x7, n, rows, cols,
    WAYS: tl.constexpr, BY_ROW: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    total = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(WAYS):
        if BY_ROW:
            weight = tl.load(weights_ptr + k * rows + offs // cols, mask=inside, other=0.0)
        else:
            weight = tl.load(weights_ptr + k)
        share = weighted(weight, wide(x0, x1, x2, x3, x4, x5, x6, x7, k, offs, inside))
        if k == 0:
            total = share
        else:
            total += share
    tl.store(out_ptr + offs, total.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dots_kernel(
    partial_ptr, base_ptr, x0, x1, x2, x3, x4, x5, x6, x7, cols, blocks,
    WAYS: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One store at the end: stores in between would make the compiler load the tensors again for every pair."""
    piece = tl.program_id(0).to(tl.int64)
    col = piece % blocks * BLOCK + tl.arange(0, BLOCK)
    inside = col < cols
    offs = piece // blocks * cols + col
    slot = tl.arange(0, SLOTS)
    dots = tl.zeros((SLOTS,), tl.float64)
    for i in tl.static_range(WAYS):
        for j in tl.static_range(i, WAYS):
            a = wide(x0, x1, x2, x3, x4, x5, x6, x7, i, offs, inside)
            b = wide(x0, x1, x2, x3, x4, x5, x6, x7, j, offs, inside)
            if base_ptr is not None:
                base = tl.load(base_ptr + offs, mask=inside, other=0.0).to(tl.float32)
                a -= base
                b -= base
            dots = tl.where(slot == i * WAYS + j, tl.sum((a * b).to(tl.float64)), dots)
    tl.store(partial_ptr + piece * WAYS * WAYS + slot, dots, mask=slot < WAYS * WAYS)


@triton.jit
def ties_kernel(
    out_ptr, base_ptr, limits_ptr, weights_ptr, x0, x1, x2, x3, x4, x5, x6, x7, n, scale,
    WAYS: tl.constexpr, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    base = tl.load(base_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    elected = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(WAYS):
        delta = wide(x0, x1, x2, x3, x4, x5, x6, x7, k, offs, inside) - base
        delta = tl.where(tl.abs(delta) >= tl.load(limits_ptr + k), delta, 0.0)
        elected += tl.load(weights_ptr + k) * delta
    mixed = tl.zeros((BLOCK,), tl.float32)
    divisor = tl.zeros((BLOCK,), tl.float32)
    for k in tl.static_range(WAYS):
        delta = wide(x0, x1, x2, x3, x4, x5, x6, x7, k, offs, inside) - base
        delta = tl.where(tl.abs(delta) >= tl.load(limits_ptr + k), delta, 0.0)
        weight = tl.load(weights_ptr + k)
        share = weight * delta
        agrees = tl.where(elected >= 0.0, share > 0.0, share < 0.0)
        mixed += tl.where(agrees, share, 0.0)
        divisor += tl.where(agrees, weight, 0.0)
    if NORMALIZE:
        mixed = tl.div_rn(mixed, tl.where(divisor == 0.0, 1.0, divisor))
    merged = base + scale * mixed
    tl.store(out_ptr + offs, merged.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def dare_kernel(out_ptr, base_ptr, tuned_ptr, scale_ptr, n, drop, seed, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * BLOCK
    offs = first + tl.arange(0, BLOCK)
    inside = offs < n
    base = tl.load(base_ptr + offs, mask=inside, other=0.0)
    wide_base = base.to(tl.float32)
    delta = tl.load(tuned_ptr + offs, mask=inside, other=0.0).to(tl.float32) - wide_base
    moved = (wide_base + weighted(tl.load(scale_ptr), delta)).to(base.dtype)
    kept = element_words(first, seed, BLOCK).to(tl.int64) >= drop
    tl.store(out_ptr + offs, tl.where(kept, moved, base), mask=inside)


@triton.jit
def dare_sums_kernel(partial_ptr, base_ptr, tuned_ptr, n, drop, seed, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    base = tl.load(base_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    magnitude = tl.abs(tl.load(tuned_ptr + offs, mask=inside, other=0.0).to(tl.float32) - base)
    magnitude = tl.where(magnitude < float("inf"), magnitude, 0.0).to(tl.float64)
    kept = element_words(block * BLOCK, seed, BLOCK).to(tl.int64) >= drop
    tl.store(partial_ptr + 2 * block, tl.sum(magnitude))
    tl.store(partial_ptr + 2 * block + 1, tl.sum(tl.where(kept, magnitude, 0.0)))


_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}


def _eight(tensors: list[Tensor]) -> list[Tensor | None]:
    """The tensors, contiguous, and None for the rest of a kernel's arguments."""
    return [*(t.contiguous() for t in tensors), *[None] * (8 - len(tensors))]


def _sum(out: Tensor, tensors: list[Tensor], weights: Tensor, rows: int) -> None:
    n = out.numel()
    if n:
        with torch.cuda.device_of(out):
            linear_kernel[(triton.cdiv(n, BLOCK),)](
                out,
                weights.contiguous(),
                *_eight(tensors),
                n,
                rows,
                n // rows,
                len(tensors),
                rows > 1,
                BLOCK,
                **_OPTIONS,
            )


def linear(tensors: list[Tensor], weights: Tensor) -> Tensor:
    """`curvkern.linear`; weights [k, rows]."""
    out = torch.empty(tensors[0].shape, dtype=tensors[0].dtype, device=tensors[0].device)
    _sum(out, tensors, weights, weights.shape[1])
    return out


def axpby(y: Tensor, x: Tensor, coefficients: Tensor) -> None:
    """`curvkern.axpby_`; y is contiguous."""
    _sum(y, [x, y], coefficients, 1)


def delta_dots(base: Tensor | None, tensors: list[Tensor], rows: int) -> Tensor:
    """float64 [rows, k, k], summed in a fixed order."""
    ways, cols = len(tensors), tensors[0].numel() // max(rows, 1)
    blocks = triton.cdiv(cols, BLOCK)
    partial = torch.empty(rows, blocks, ways, ways, dtype=torch.float64, device=tensors[0].device)
    if partial.numel():
        origin = None if base is None else base.contiguous()
        with torch.cuda.device_of(partial):
            dots_kernel[(rows * blocks,)](
                partial, origin, *_eight(tensors), cols, blocks, ways, triton.next_power_of_2(ways * ways), BLOCK,
                **_OPTIONS,
            )  # fmt: skip
    upper = partial.sum(1)
    return upper + upper.triu(1).mT


def ties(base: Tensor, tensors: list[Tensor], limits: Tensor, weights: Tensor, scale: float, normalize: bool) -> Tensor:
    """`curvkern.ties` once the limits are known."""
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if out.numel():
        with torch.cuda.device_of(out):
            ties_kernel[(triton.cdiv(out.numel(), BLOCK),)](
                out, base.contiguous(), limits.contiguous(), weights.contiguous(), *_eight(tensors), out.numel(),
                float(scale), len(tensors), normalize, BLOCK, **_OPTIONS,
            )  # fmt: skip
    return out


def dare(base: Tensor, tuned: Tensor, scale: Tensor, drop: int, seed: int) -> Tensor:
    """`curvkern.dare` with its factor known."""
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    n = out.numel()
    if n:
        with torch.cuda.device_of(out):
            dare_kernel[(triton.cdiv(n, BLOCK),)](
                out, base.contiguous(), tuned.contiguous(), scale, n, drop, seed, BLOCK, **_OPTIONS
            )
    return out


def dare_sums(base: Tensor, tuned: Tensor, drop: int, seed: int) -> Tensor:
    """float64 [2], summed in a fixed order."""
    n = base.numel()
    partial = torch.empty(triton.cdiv(n, BLOCK), 2, dtype=torch.float64, device=base.device)
    if n:
        with torch.cuda.device_of(base):
            dare_sums_kernel[(triton.cdiv(n, BLOCK),)](
                partial, base.contiguous(), tuned.contiguous(), n, drop, seed, BLOCK, **_OPTIONS
            )
    return partial.sum(0)


_TWO = {"x0": "*bf16:16", "x1": "*bf16:16"}
_NO_MORE = {f"x{k}": None for k in range(2, 8)}
_FOUR = {f"x{k}": "*bf16:16" for k in range(4)}
_REST = {f"x{k}": None for k in range(4, 8)}

AHEAD_OF_TIME = [
    Ahead(
        linear_kernel,
        {"out_ptr": "*bf16:16", "weights_ptr": "*fp32", **_TWO, "n": "i64:16", "rows": "i64", "cols": "i64"},
        {**_NO_MORE, "WAYS": 2, "BY_ROW": False, "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        linear_kernel,
        {"out_ptr": "*bf16:16", "weights_ptr": "*fp32", **_FOUR, "n": "i64:16", "rows": "i64", "cols": "i64"},
        {**_REST, "WAYS": 4, "BY_ROW": True, "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        dots_kernel,
        {"partial_ptr": "*fp64", **_TWO, "cols": "i64:16", "blocks": "i64"},
        {**_NO_MORE, "base_ptr": None, "WAYS": 2, "SLOTS": 4, "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        dots_kernel,
        {"partial_ptr": "*fp64", "base_ptr": "*bf16:16", **_FOUR, "cols": "i64:16", "blocks": "i64"},
        {**_REST, "WAYS": 4, "SLOTS": 16, "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        ties_kernel,
        {"out_ptr": "*bf16:16", "base_ptr": "*bf16:16", "limits_ptr": "*fp32", "weights_ptr": "*fp32", **_FOUR,
         "n": "i64:16", "scale": "fp32"},
        {**_REST, "WAYS": 4, "NORMALIZE": True, "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        dare_kernel,
        {"out_ptr": "*bf16:16", "base_ptr": "*bf16:16", "tuned_ptr": "*bf16:16", "scale_ptr": "*fp32", "n": "i64:16",
         "drop": "i64", "seed": "i64"},
        {"BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        dare_sums_kernel,
        {"partial_ptr": "*fp64", "base_ptr": "*bf16:16", "tuned_ptr": "*bf16:16", "n": "i64:16", "drop": "i64",
         "seed": "i64"},
        {"BLOCK": BLOCK},
        _OPTIONS,
    ),
]  # fmt: skip

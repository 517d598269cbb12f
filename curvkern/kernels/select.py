"""Scores, gates and the histogram of score keys in Triton.

The same bits as csrc/rules.h: kernels run with ``enable_fp_fusion=False``.
"""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvkern.kernels import Ahead
from curvkern.kernels.tuned import launch_of

BLOCK = 1024


@triton.jit
def wide_or_zero(ptr, offs, inside):
    """float32 values at ``offs``, zeros where not ``inside`` or where there is no tensor."""
    if ptr is None:  # a branch each: code after a return is compiled for a missing tensor too
        return tl.zeros(offs.shape, tl.float32)
    else:
        return tl.load(ptr + offs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def scores(delta, grad, fisher, RULE: tl.constexpr):
    """How much moving each weight to its target matters; delta = weight - target."""
    if RULE == "grad":
        return tl.abs(grad)
    elif RULE == "taylor":
        return tl.abs(grad * delta)
    elif RULE == "fisher":
        return fisher * (delta * delta)
    elif RULE == "delta":
        return tl.abs(delta)
    else:
        return grad * delta - 0.5 * fisher * (delta * delta)


@triton.jit
def gated(delta, grad, direction, inside, bits_ptr, bools_ptr, offs, GATE: tl.constexpr):
    """Which weights mask and gate let through. Signs are compared, never products."""
    open = inside
    if bits_ptr is not None:
        byte = tl.load(bits_ptr + offs // 8, mask=inside, other=0).to(tl.int32)
        open = open & (((byte >> (offs % 8).to(tl.int32)) & 1) != 0)
    if bools_ptr is not None:
        open = open & (tl.load(bools_ptr + offs, mask=inside, other=0) != 0)
    if GATE == "descent":
        open = open & (((delta > 0) & (grad > 0)) | ((delta < 0) & (grad < 0)))
    elif GATE == "conflict":
        open = open & (((delta > 0) != (direction > 0)) | ((delta < 0) != (direction < 0)))
    return open


@triton.jit
def score_histogram_kernel(
    histogram_ptr,
    tallies_ptr,
    weight_ptr,
    target_ptr,
    boundary_ptr,
    bits_ptr,
    bools_ptr,
    grad_ptr,
    fisher_ptr,
    direction_ptr,
    n,
    RULE: tl.constexpr,
    GATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One atomic a candidate; zeros, which come in masses, are added up before."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    delta = wide_or_zero(weight_ptr, offs, inside) - wide_or_zero(target_ptr, offs, inside)
    grad = wide_or_zero(grad_ptr, offs, inside)
    fisher = wide_or_zero(fisher_ptr, offs, inside)
    direction = wide_or_zero(direction_ptr, offs, inside)
    open = gated(delta, grad, direction, inside, bits_ptr, bools_ptr, offs, GATE)
    score = scores(delta, grad, fisher, RULE)
    number = open & (score == score)
    zero = number & (score == 0)
    counted = number & (score != 0)
    u = score.to(tl.uint32, bitcast=True)
    key = tl.where(u >= 0x80000000, u ^ 0xFFFFFFFF, u | 0x80000000)  # ~u overflows in Triton 3.7's interpreter
    bin = key >> 16
    zero_bin = tl.full((), 0x8000, tl.int64)
    zeros = tl.sum(zero.to(tl.int32)).to(tl.int64)
    if boundary_ptr is not None:
        boundary = tl.load(boundary_ptr)
        counted = counted & (bin.to(tl.int64) == boundary)
        bin = key & 0xFFFF
        zeros = tl.where(boundary == zero_bin, zeros, 0)
        zero_bin = zero_bin * 0
    numbers = tl.sum(number.to(tl.int32)).to(tl.int64)
    tl.atomic_add(tallies_ptr, numbers, sem="relaxed")
    tl.atomic_add(tallies_ptr + 1, tl.sum(open.to(tl.int32)).to(tl.int64) - numbers, sem="relaxed")
    tl.atomic_add(histogram_ptr + zero_bin, zeros, sem="relaxed")
    tl.atomic_add(histogram_ptr + bin.to(tl.int64), tl.full((BLOCK,), 1, tl.int64), mask=counted, sem="relaxed")


def score_histogram(
    histogram: Tensor,
    tallies: Tensor,
    weight: Tensor,
    target: Tensor,
    boundary: Tensor | None,
    bits: Tensor | None,
    bools: Tensor | None,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
    rule: str,
    gate: str,
) -> None:
    """`curvkern.score_histogram_`; the counts are contiguous."""
    n = weight.numel()
    if n == 0:
        return
    dense = [None if t is None else t.contiguous() for t in (bits, bools, grad, fisher, direction)]
    launch = launch_of("score_histogram", weight.device, {"BLOCK": BLOCK, "num_warps": 4})
    with torch.cuda.device_of(weight):
        score_histogram_kernel[(triton.cdiv(n, launch["BLOCK"]),)](
            histogram, tallies, weight.contiguous(), target.contiguous(), boundary, *dense, n, rule, gate,
            **launch, enable_fp_fusion=False,
        )  # fmt: skip


_POINTERS = {
    "histogram_ptr": "*i64",
    "tallies_ptr": "*i64",
    "weight_ptr": "*bf16",
    "target_ptr": "*bf16",
    "grad_ptr": "*fp32",
    "n": "i64",
}
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

AHEAD_OF_TIME = [
    Ahead(
        score_histogram_kernel,
        _POINTERS,
        {"boundary_ptr": None, "bits_ptr": None, "bools_ptr": None, "fisher_ptr": None, "direction_ptr": None,
         "RULE": "grad", "GATE": "descent", "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        score_histogram_kernel,
        {**_POINTERS, "boundary_ptr": "*i64", "fisher_ptr": "*fp32", "direction_ptr": "*bf16", "bits_ptr": "*u8"},
        {"bools_ptr": None, "RULE": "gain", "GATE": "conflict", "BLOCK": BLOCK},
        _OPTIONS,
    ),
]  # fmt: skip

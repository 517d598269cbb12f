"""change in Triton: a program's counts and sums of 2048 elements, added up in float64 by the caller."""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvkern.kernels import Ahead

BLOCK = 2048


@triton.jit
def _finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _differs(x, y):
    return (x != y) & ~((x != x) & (y != y))


@triton.jit
def change_kernel(partial_ptr, aligned_ptr, tuned_ptr, restored_ptr, n, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    a = tl.load(aligned_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    t = tl.load(tuned_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    r = tl.load(restored_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    bad = ~_finite(r)
    spread = bad & _finite(a) & _finite(t)
    before, after = t - a, r - a
    before = tl.where(_finite(before), before, 0.0)
    after = tl.where(_finite(after), after, 0.0)
    step = after - before
    to = partial_ptr + block * 8
    tl.store(to, tl.sum(_differs(r, t).to(tl.float32), 0))
    tl.store(to + 1, tl.sum(bad.to(tl.float32), 0))
    tl.store(to + 2, tl.sum(spread.to(tl.float32), 0))
    tl.store(to + 3, tl.sum(_differs(t, a).to(tl.float32), 0))
    tl.store(to + 4, tl.sum(before * before, 0))
    tl.store(to + 5, tl.sum(after * after, 0))
    tl.store(to + 6, tl.sum(step * step, 0))
    tl.store(to + 7, tl.sum(before * after, 0))


def change(aligned: Tensor, tuned: Tensor, restored: Tensor) -> Tensor:
    """`curvkern.change`."""
    dense, n = [x.contiguous() for x in (aligned, tuned, restored)], tuned.numel()
    partial = torch.empty(triton.cdiv(n, BLOCK), 8, device=tuned.device)
    if n:
        with torch.cuda.device_of(tuned):
            change_kernel[(len(partial),)](partial, *dense, n, BLOCK, num_warps=8, enable_fp_fusion=False)
    return partial.sum(0, dtype=torch.float64)


_WEIGHTS = {"aligned_ptr": "*bf16", "tuned_ptr": "*bf16", "restored_ptr": "*bf16"}

AHEAD_OF_TIME = [
    Ahead(
        change_kernel,
        {"partial_ptr": "*fp32", **_WEIGHTS, "n": "i64"},
        {"BLOCK": BLOCK},
        {"num_warps": 8, "enable_fp_fusion": False},
    ),
]

"""perturb_ in Triton: normal numbers are made where they are used, twice, and never stored.

Positions count from the last multiple of 4 before the first element, so that a program's numbers are whole Philox
calls.
"""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvkern.kernels import Ahead
from curvkern.kernels.philox import normal_numbers

BLOCK = 1024


@triton.jit(do_not_specialize=["seed", "offset"])
def squares_kernel(squares_ptr, original_ptr, n, segment, seed, offset, segments, BLOCK: tl.constexpr):
    """A program per segment: its sums of original^2 and of normal^2 in float64."""
    part = tl.program_id(0).to(tl.int64)
    begin = part * segment
    size = tl.minimum(segment, n - begin)
    skipped = (offset + begin) % 4
    of_x, of_z = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for along in range(0, size + skipped, BLOCK):
        z = normal_numbers(seed, (offset + begin + along) // 4 + tl.arange(0, BLOCK // 4))
        at = along + tl.arange(0, BLOCK) - skipped
        inside = (at >= 0) & (at < size)
        x = tl.load(original_ptr + begin + at, mask=inside, other=0.0).to(tl.float64)
        wide = tl.where(inside, z, 0.0).to(tl.float64)
        of_x += x * x
        of_z += wide * wide
    tl.store(squares_ptr + part, tl.sum(of_x, 0))
    tl.store(squares_ptr + segments + part, tl.sum(of_z, 0))


@triton.jit(do_not_specialize=["seed", "offset"])
def perturb_kernel(weight_ptr, original_ptr, scale_ptr, n, segment, seed, offset, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    z = normal_numbers(seed, offset // 4 + block * (BLOCK // 4) + tl.arange(0, BLOCK // 4))
    at = block * BLOCK + tl.arange(0, BLOCK) - offset % 4
    inside = (at >= 0) & (at < n)
    x = tl.load(original_ptr + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.load(scale_ptr + at // segment, mask=inside, other=0.0)
    tl.store(weight_ptr + at, (x + scale * z).to(weight_ptr.dtype.element_ty), mask=inside)


def squares(original: Tensor, segment: int, seed: int, offset: int) -> Tensor:
    """float64 [2, segments]: sums of original^2 and of normal^2 over segments of a contiguous tensor."""
    n = original.numel()
    segments = triton.cdiv(n, segment)
    sums = torch.empty(2, segments, dtype=torch.float64, device=original.device)
    with torch.cuda.device_of(original):
        squares_kernel[(segments,)](
            sums, original, n, segment, seed, offset, segments, BLOCK, num_warps=4, enable_fp_fusion=False
        )
    return sums


def write(weight: Tensor, original: Tensor, scale: Tensor, segment: int, seed: int, offset: int) -> None:
    """Set weight to original + scale[segment] * normal; all contiguous."""
    n = original.numel()
    with torch.cuda.device_of(weight):
        perturb_kernel[(triton.cdiv(offset % 4 + n, BLOCK),)](
            weight, original, scale, n, segment, seed, offset, BLOCK, num_warps=4, enable_fp_fusion=False
        )


_COMMON = {"original_ptr": "*bf16", "n": "i64", "segment": "i64", "seed": "i64", "offset": "i64"}
_OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}

AHEAD_OF_TIME = [
    Ahead(squares_kernel, {**_COMMON, "squares_ptr": "*fp64", "segments": "i64"}, {"BLOCK": BLOCK}, _OPTIONS),
    Ahead(perturb_kernel, {**_COMMON, "weight_ptr": "*bf16", "scale_ptr": "*fp32"}, {"BLOCK": BLOCK}, _OPTIONS),
]

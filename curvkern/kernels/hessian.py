"""rademacher_, hutchinson_ and gnb_diag_ in Triton: signs are made where they are used, 128 from one Philox call.

Positions count from the last multiple of 128 before the offset, so that a program's signs are whole Philox calls.
"""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvkern.kernels import Ahead
from curvkern.kernels.philox import sign_bits

BLOCK = 4096
TILE = 2048


@triton.jit(do_not_specialize=["seed", "offset"])
def rademacher_kernel(out_ptr, n, seed, offset, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    bits = sign_bits(seed, offset // 128 + block * (BLOCK // 128) + tl.arange(0, BLOCK // 128))
    at = block * BLOCK + tl.arange(0, BLOCK) - offset % 128
    ones = tl.where(bits != 0, -1.0, 1.0)
    tl.store(out_ptr + at, ones.to(out_ptr.dtype.element_ty), mask=(at >= 0) & (at < n))


@triton.jit(do_not_specialize=["seed", "offset"])
def hutchinson_kernel(diag_ptr, hvp_ptr, n, seed, offset, scale, BLOCK: tl.constexpr):
    block = tl.program_id(0).to(tl.int64)
    bits = sign_bits(seed, offset // 128 + block * (BLOCK // 128) + tl.arange(0, BLOCK // 128))
    at = block * BLOCK + tl.arange(0, BLOCK) - offset % 128
    inside = (at >= 0) & (at < n)
    hvp = tl.load(hvp_ptr + at, mask=inside, other=0.0).to(tl.float32)
    diag = tl.load(diag_ptr + at, mask=inside, other=0.0)
    tl.store(diag_ptr + at, diag + scale * tl.where(bits != 0, -hvp, hvp), mask=inside)


@triton.jit(do_not_specialize=["seed", "offset"])
def tiles_kernel(
    diag_ptr, hvp_ptr, rows, cols, tile_rows, tile_cols, across, seed, offset, scale,
    ROWS: tl.constexpr, CALLS: tl.constexpr,
):  # fmt: skip
    """A program per tile, ROWS rows and the signs of CALLS Philox calls for each at a time."""
    tile = tl.program_id(0).to(tl.int64)
    top, left = tile // across * tile_rows, tile % across * tile_cols
    height, width = tl.minimum(tile_rows, rows - top), tl.minimum(tile_cols, cols - left)
    total = tl.zeros((ROWS, CALLS * 128), tl.float32)
    for down in range(0, height, ROWS):
        row = down + tl.arange(0, ROWS)
        start = (top + row) * cols + left
        first = (offset + start) // 128
        for along in range(0, width + 127, CALLS * 128):
            bits = sign_bits(seed, (first + along // 128)[:, None] + tl.arange(0, CALLS)[None, :])
            col = (first * 128 - offset - start + along)[:, None] + tl.arange(0, CALLS * 128)[None, :]
            inside = (col >= 0) & (col < width) & (row < height)[:, None]
            hvp = tl.load(hvp_ptr + start[:, None] + col, mask=inside, other=0.0).to(tl.float32)
            total += tl.where(bits != 0, -hvp, hvp)
    mean = tl.sum(tl.sum(total, 1), 0) / (height * width).to(tl.float32)
    tl.store(diag_ptr + tile, tl.load(diag_ptr + tile) + scale * mean)


@triton.jit
def gnb_diag_kernel(diag_ptr, grad_ptr, n, batch, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    grad = tl.load(grad_ptr + at, mask=at < n, other=0.0).to(tl.float32)
    diag = tl.load(diag_ptr + at, mask=at < n, other=0.0)
    tl.store(diag_ptr + at, diag + batch * (grad * grad), mask=at < n)


def rademacher(out: Tensor, seed: int, offset: int) -> None:
    """`curvkern.rademacher_`; out is contiguous."""
    n = out.numel()
    if n:
        with torch.cuda.device_of(out):
            rademacher_kernel[(triton.cdiv(offset % 128 + n, BLOCK),)](out, n, seed, offset, BLOCK, num_warps=8)


def hutchinson(diag: Tensor, hvp: Tensor, seed: int, offset: int, scale: float, tile_rows: int, tile_cols: int) -> None:
    """`curvkern.hutchinson_`; diag is contiguous."""
    n, hvp = hvp.numel(), hvp.contiguous()
    if n == 0:
        return
    with torch.cuda.device_of(diag):
        if tile_rows == 0:
            hutchinson_kernel[(triton.cdiv(offset % 128 + n, BLOCK),)](
                diag, hvp, n, seed, offset, scale, BLOCK, num_warps=8, enable_fp_fusion=False
            )
            return
        calls = min(8, triton.next_power_of_2(triton.cdiv(min(tile_cols, hvp.shape[1]) + 127, 128)))
        tiles_kernel[(diag.numel(),)](
            diag, hvp, *hvp.shape, tile_rows, tile_cols, diag.shape[1], seed, offset, scale,
            TILE // 128 // calls, calls, num_warps=4,
        )  # fmt: skip


def gnb_diag(diag: Tensor, grad: Tensor, batch: int) -> None:
    """`curvkern.gnb_diag_`; diag is contiguous."""
    n = grad.numel()
    if n:
        with torch.cuda.device_of(diag):
            gnb_diag_kernel[(triton.cdiv(n, BLOCK),)](
                diag, grad.contiguous(), n, float(batch), BLOCK, num_warps=8, enable_fp_fusion=False
            )


_STREAM = {"seed": "i64", "offset": "i64"}
_SIDES = dict.fromkeys(("rows", "cols", "tile_rows", "tile_cols", "across"), "i64")

AHEAD_OF_TIME = [
    Ahead(rademacher_kernel, {"out_ptr": "*bf16", "n": "i64", **_STREAM}, {"BLOCK": BLOCK}, {"num_warps": 8}),
    Ahead(
        hutchinson_kernel,
        {"diag_ptr": "*fp32", "hvp_ptr": "*bf16", "n": "i64", "scale": "fp32", **_STREAM},
        {"BLOCK": BLOCK},
        {"num_warps": 8, "enable_fp_fusion": False},
    ),
    Ahead(
        gnb_diag_kernel,
        {"diag_ptr": "*fp32", "grad_ptr": "*bf16", "n": "i64", "batch": "fp32"},
        {"BLOCK": BLOCK},
        {"num_warps": 8, "enable_fp_fusion": False},
    ),
    Ahead(
        tiles_kernel,
        {"diag_ptr": "*fp32", "hvp_ptr": "*fp32", "scale": "fp32", **_SIDES, **_STREAM},
        {"ROWS": 8, "CALLS": 2},
    ),
]

"""A panel of obs_sweep_ in Triton: rows of the panel and the triangle stay on chip for all its columns."""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvkern.kernels import Ahead

ROWS = 16


@triton.jit
def obs_panel_kernel(
    panel_ptr,
    errors_ptr,
    mask_ptr,
    target_ptr,
    triangle_ptr,
    rows,
    width,
    stride,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    col = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (col < width)[None, :]
    out = panel_ptr + row[:, None] * stride + col[None, :]
    dense = row[:, None] * width + col[None, :]
    values = tl.load(out, mask=inside, other=0.0)
    fixed = tl.load(mask_ptr + dense, mask=inside, other=0) != 0
    wanted = tl.zeros((ROWS, WIDTH), tl.float32)
    if target_ptr is not None:
        wanted = tl.load(target_ptr + dense, mask=inside, other=0.0)
    errors = tl.zeros((ROWS, WIDTH), tl.float32)
    for j in range(width):
        here = (col == j)[None, :]
        pivots = tl.load(triangle_ptr + j * width + col, mask=(col >= j) & (col < width), other=0.0)
        pivot = tl.sum(tl.where(col == j, pivots, 0.0))
        gap = tl.where(here & fixed, values - wanted, 0.0)
        error = tl.sum(gap, 1) / pivot
        errors = tl.where(here, error[:, None], errors)
        values -= error[:, None] * pivots[None, :]
    values = tl.where(fixed, wanted, values)
    tl.store(out, values, mask=inside)
    tl.store(errors_ptr + dense, errors, mask=inside)


def obs_panel(panel: Tensor, errors: Tensor, mask: Tensor, target: Tensor | None, triangle: Tensor) -> None:
    """One panel of `curvkern.obs_sweep_`."""
    rows, width = panel.shape
    if rows * width == 0:
        return
    kept = mask.contiguous().view(torch.uint8)
    to = None if target is None else target.contiguous()
    with torch.cuda.device_of(panel):
        obs_panel_kernel[(triton.cdiv(rows, ROWS),)](
            panel, errors, kept, to, triangle.contiguous(), rows, width, panel.stride(0),
            ROWS, max(16, triton.next_power_of_2(width)), num_warps=4,
        )  # fmt: skip


_POINTERS = {"panel_ptr": "*fp32", "errors_ptr": "*fp32:16", "mask_ptr": "*u8:16", "triangle_ptr": "*fp32:16"}
_SIZES = {"rows": "i32", "width": "i32:16", "stride": "i64"}

AHEAD_OF_TIME = [
    Ahead(obs_panel_kernel, _POINTERS | _SIZES, {"target_ptr": None, "ROWS": ROWS, "WIDTH": 128}),
    Ahead(obs_panel_kernel, {**_POINTERS, **_SIZES, "target_ptr": "*fp32:16"}, {"ROWS": ROWS, "WIDTH": 128}),
]

"""rollback_ and blend_ in Triton: one pass, a program per 2048 weights."""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvkern.kernels import Ahead
from curvkern.kernels.select import gated, scores, wide_or_zero
from curvkern.kernels.tuned import launch_of

BLOCK = 2048


@triton.jit
def rollback_kernel(
    count_ptr,
    ties_ptr,
    weight_ptr,
    undo_ptr,
    target_ptr,
    tau_ptr,
    quota_ptr,
    offsets_ptr,
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
    """With ``ties_ptr``: only count the block's ties. Else: edit; with ``offsets_ptr`` the first ``quota`` ties too."""
    block = tl.program_id(0).to(tl.int64)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0)
    target = tl.load(target_ptr + offs, mask=inside, other=0.0)
    delta = weight.to(tl.float32) - target.to(tl.float32)
    grad = wide_or_zero(grad_ptr, offs, inside)
    fisher = wide_or_zero(fisher_ptr, offs, inside)
    direction = wide_or_zero(direction_ptr, offs, inside)
    chosen = gated(delta, grad, direction, inside, bits_ptr, bools_ptr, offs, GATE)
    if tau_ptr is not None:
        tau = tl.load(tau_ptr)
        score = scores(delta, grad, fisher, RULE)
        ties = chosen & (score == tau)
        if ties_ptr is not None:
            tl.store(ties_ptr + block, tl.sum(ties.to(tl.int32)).to(tl.int64))
        chosen = chosen & (score > tau)
        if offsets_ptr is not None:
            left = tl.load(quota_ptr) - tl.load(offsets_ptr + block)
            chosen = chosen | (ties & (tl.cumsum(ties.to(tl.int32)).to(tl.int64) <= left))
    if ties_ptr is None:
        tl.store(weight_ptr + offs, target, mask=chosen)
        if undo_ptr is not None:
            bits = tl.reshape(chosen.to(tl.int32), (BLOCK // 8, 8)) << tl.arange(0, 8)[None, :]
            bytes_at = block * (BLOCK // 8) + tl.arange(0, BLOCK // 8)
            tl.store(undo_ptr + bytes_at, tl.sum(bits, 1).to(tl.uint8), mask=bytes_at * 8 < n)
        tl.atomic_add(count_ptr, tl.sum(chosen.to(tl.int32)).to(tl.int64))


@triton.jit
def blend_kernel(weight_ptr, target_ptr, alpha_ptr, n, cols, tile_rows, tile_cols, tiles_in_row, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offs < n
    row = offs // cols
    tile = (row // tile_rows) * tiles_in_row + (offs - row * cols) // tile_cols
    alpha = tl.load(alpha_ptr + tile, mask=inside, other=0.0)
    weight = tl.load(weight_ptr + offs, mask=inside, other=0.0)
    target = tl.load(target_ptr + offs, mask=inside, other=0.0)
    w = weight.to(tl.float32)
    step = (w + alpha * (target.to(tl.float32) - w)).to(weight.dtype)
    moved = tl.where(alpha >= 1.0, target, step)
    tl.store(weight_ptr + offs, moved, mask=inside & (alpha > 0.0))


def rollback(
    weight: Tensor,
    target: Tensor,
    tau: Tensor | None,
    quota: Tensor | None,
    bits: Tensor | None,
    bools: Tensor | None,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
    undo: Tensor | None,
    rule: str,
    gate: str,
) -> Tensor:
    """`curvkern.rollback_`; the weight and undo are contiguous."""
    count = torch.zeros((), dtype=torch.int64, device=weight.device)
    n = weight.numel()
    if n == 0:
        return count
    dense = [None if t is None else t.contiguous() for t in (bits, bools, grad, fisher, direction)]
    target = target.contiguous()
    launch_as = launch_of("rollback", weight.device, {"BLOCK": BLOCK, "num_warps": 8})
    blocks = triton.cdiv(n, launch_as["BLOCK"])
    offsets = totals = None

    def launch(ties: Tensor | None) -> None:
        # One device of its own per launch: Triton uses the current one.
        with torch.cuda.device_of(weight):
            rollback_kernel[(blocks,)](
                count, ties, weight, undo, target, tau, quota, offsets, *dense, n, rule, gate, **launch_as,
                enable_fp_fusion=False,
            )  # fmt: skip

    if tau is not None and quota is not None:
        ties = torch.empty(blocks, dtype=torch.int64, device=weight.device)
        launch(ties)
        totals = ties.cumsum(0)
        offsets = totals - ties
    launch(None)
    if totals is not None and quota is not None:
        quota.sub_(torch.minimum(quota, totals[-1]))
    return count


def blend(weight: Tensor, target: Tensor, alpha: Tensor, tile_rows: int, tile_cols: int) -> None:
    """`curvkern.blend_`; the weight is contiguous."""
    n = weight.numel()
    if n == 0:
        return
    cols = weight.shape[1] if weight.ndim == 2 else n
    launch = launch_of("blend", weight.device, {"BLOCK": BLOCK, "num_warps": 8})
    with torch.cuda.device_of(weight):
        blend_kernel[(triton.cdiv(n, launch["BLOCK"]),)](
            weight, target.contiguous(), alpha.contiguous(), n, cols, tile_rows, tile_cols,
            triton.cdiv(cols, tile_cols), **launch, enable_fp_fusion=False,
        )  # fmt: skip


_POINTERS = {
    "count_ptr": "*i64",
    "weight_ptr": "*bf16",
    "undo_ptr": "*u8",
    "target_ptr": "*bf16",
    "tau_ptr": "*fp32",
    "quota_ptr": "*i64",
    "offsets_ptr": "*i64",
    "grad_ptr": "*fp32",
    "n": "i64",
}
_ABSENT = {"bits_ptr": None, "bools_ptr": None, "fisher_ptr": None, "direction_ptr": None}
_OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}

AHEAD_OF_TIME = [
    Ahead(
        rollback_kernel,
        _POINTERS,
        {**_ABSENT, "ties_ptr": None, "RULE": "grad", "GATE": "descent", "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        rollback_kernel,
        {**_POINTERS, "ties_ptr": "*i64", "fisher_ptr": "*fp32", "direction_ptr": "*bf16", "bits_ptr": "*u8"},
        {"bools_ptr": None, "RULE": "gain", "GATE": "conflict", "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        blend_kernel,
        {"weight_ptr": "*bf16", "target_ptr": "*bf16", "alpha_ptr": "*fp32", "n": "i64", "cols": "i64",
         "tile_rows": "i64", "tile_cols": "i64", "tiles_in_row": "i64"},
        {"BLOCK": BLOCK},
        _OPTIONS,
    ),
]  # fmt: skip

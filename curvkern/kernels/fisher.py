"""fisher_diag_ and fisher_blocks_ in Triton.

`fisher_kernel` is one matrix product over all tokens that squares where a sample ends: a program owns a tile of the
weight, runs through the tokens of all samples in one flat loop, so that loads stay ahead across sample ends, and adds
f(gradient) to a second tile of registers whenever a sample is complete. Ragged input brings a table of steps.
"""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from curvkern.kernels import Ahead, on_each_target
from curvkern.kernels.fisher_tiles import Tiling, describable, ragged_steps, tile_of, tiling
from curvkern.kernels.packed import load_tokens, precision, precision_on, product, rows_of, statistic_of, token_product

GROUP = 8  # rows of tiles that run together, for the second-level cache


@triton.jit
def add_tile(ptr, tile, at, row, col, rows, cols, R: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """Add a tile to the matrix at ``ptr + at`` [rows, cols], half by half: all at once would not fit in registers."""
    if PARTS > 1:
        left, right = tl.split(tl.permute(tl.reshape(tile, (R, 2, C // 2)), (0, 2, 1)))
        add_tile(ptr, left, at, row, col, rows, cols, R, C // 2, PARTS // 2)
        add_tile(ptr, right, at + C // 2, row, col + C // 2, rows, cols, R, C // 2, PARTS // 2)
    else:
        r, c = tl.arange(0, R)[:, None], tl.arange(0, C)[None, :]
        inside = (row + r < rows) & (col + c < cols)
        out = ptr + at + (r * cols + c)  # offsets inside a tile fit in 32 bits
        tl.store(out, tl.load(out, mask=inside, other=0.0) + tile, mask=inside)


@triton.jit
def fisher_kernel(
    out_ptr,
    weight_grad_ptr,
    d_in,
    x_in,
    mask_ptr,
    at_ptr,
    stop_ptr,
    run_ptr,
    first_step_ptr,
    steps,
    length,
    o,
    i,
    d_stride,
    x_stride,
    scale,
    OUT: tl.constexpr,
    STATISTIC: tl.constexpr,
    TOKEN: tl.constexpr,
    PRECISION: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SUB_O: tl.constexpr,
    SUB_I: tl.constexpr,
    GROUP: tl.constexpr,
):
    """OUT "diag" and "blocks": out += scale * (sums of) f(gradient). "norms": out[run, tile] = its part of |G|^2.

    A step is BLOCK_K tokens of one sample. Uniform samples have ``length`` tokens each; ragged ones (``at_ptr``) bring
    each step's first token, its sample's end and number, and the first step of each expert. DESCRIPTORS: ``d_in`` and
    ``x_in`` are [n, length, features] descriptors, which read zeros past a sample's end; else pointers.
    """
    tiles_o = tl.cdiv(o, BLOCK_O)
    tiles_i = tl.cdiv(i, BLOCK_I)
    expert = tl.program_id(0) // (tiles_o * tiles_i)
    tile = tl.program_id(0) % (tiles_o * tiles_i)
    group = tile // (GROUP * tiles_i)
    in_group = tl.minimum(tiles_o - group * GROUP, GROUP)
    row = (group * GROUP + tile % (GROUP * tiles_i) % in_group) * BLOCK_O
    col = tile % (GROUP * tiles_i) // in_group * BLOCK_I
    rows = row + tl.arange(0, BLOCK_O)
    cols = col + tl.arange(0, BLOCK_I)

    gradient = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    sums = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    gradients = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
    run = 0
    begin = 0
    end = length
    first = 0
    if first_step_ptr is not None:
        first = tl.load(first_step_ptr + expert)
        steps = tl.load(first_step_ptr + expert + 1)
    for step in range(first, steps):
        if DESCRIPTORS:
            d = tl.reshape(d_in.load([run, begin, row]), (BLOCK_K, BLOCK_O))
            x = tl.reshape(x_in.load([run, begin, col]), (BLOCK_K, BLOCK_I))
        else:
            if at_ptr is not None:
                begin = tl.load(at_ptr + step)
                end = tl.load(stop_ptr + step)
            tokens = begin + tl.arange(0, BLOCK_K)
            kept = tokens < end
            if mask_ptr is not None:
                kept = kept & (tl.load(mask_ptr + tokens, mask=kept, other=0) != 0)
            d = load_tokens(d_in, d_stride, tokens, kept, rows, o)
            x = load_tokens(x_in, x_stride, tokens, kept, cols, i)
        if TOKEN:
            sums = token_product(d, x, sums, STATISTIC, PRECISION)
        else:
            gradient = product(tl.trans(d), x, gradient, PRECISION)
        begin += BLOCK_K
        last = begin >= end
        if not TOKEN and last:
            if OUT == "norms":
                if run_ptr is not None:
                    run = tl.load(run_ptr + step)
                tl.store(out_ptr + run.to(tl.int64) * (tiles_o * tiles_i) + tile, tl.sum(gradient * gradient))
            else:
                sums += statistic_of(gradient, STATISTIC)
            if weight_grad_ptr is not None:
                gradients += gradient
            gradient = tl.zeros((BLOCK_O, BLOCK_I), tl.float32)
        if at_ptr is None:
            run = tl.where(last, run + 1, run)
            if DESCRIPTORS:
                begin = tl.where(last, 0, begin)
            else:
                begin = tl.where(last, end, begin)
                end = tl.where(last, end + length, end)

    wide = i.to(tl.int64)
    corner = expert * o * wide + row * wide + col
    parts: tl.constexpr = 2 if BLOCK_I >= 32 else 1
    if OUT == "diag":
        add_tile(out_ptr, scale * sums, corner, row, col, o, i, BLOCK_O, BLOCK_I, parts)
    elif OUT == "blocks":
        split = tl.reshape(sums, (BLOCK_O // SUB_O, SUB_O, BLOCK_I // SUB_I, SUB_I))
        totals = tl.sum(tl.sum(split, 3), 1)
        down = tl.cdiv(o, SUB_O)
        across = tl.cdiv(i, SUB_I).to(tl.int64)
        at = expert * down * across + row // SUB_O * across + col // SUB_I
        add_tile(out_ptr, scale * totals, at, row // SUB_O, col // SUB_I, down, across,
                 BLOCK_O // SUB_O, BLOCK_I // SUB_I, 1)  # fmt: skip
    if weight_grad_ptr is not None:
        add_tile(weight_grad_ptr, scale * gradients, corner, row, col, o, i, BLOCK_O, BLOCK_I, parts)


def launch(
    out: Tensor,
    weight_grad: Tensor | None,
    batch: Any,
    mode: str,
    tile: Tiling,
    sub: tuple[int, int],
    statistic: str,
    token: bool,
    scale: float,
    allow_tf32: bool,
) -> None:
    """Run `fisher_kernel`; ``batch`` is not empty."""
    d, x, length = rows_of(batch.grad_output), rows_of(batch.activation), batch.length
    tokens, o, i = batch.shape
    steps, table = tokens // length * triton.cdiv(length, tile.block_k), (None, None, None, None)
    if batch.starts is not None:
        table = ragged_steps(batch.starts, batch.first_run, tokens, tile.block_k)
    use_descriptors = batch.starts is None and batch.mask is None and describable(d) and describable(x)
    d_in, x_in = d, x
    if use_descriptors:
        d_in, x_in = (
            TensorDescriptor(y, [tokens // length, length, y.shape[1]], [length * y.stride(0), y.stride(0), 1],
                             [1, tile.block_k, side])
            for y, side in ((d, tile.block_o), (x, tile.block_i))
        )  # fmt: skip
    grid = (batch.experts * triton.cdiv(o, tile.block_o) * triton.cdiv(i, tile.block_i),)
    kept = None if batch.mask is None else batch.mask.view(torch.uint8)
    with torch.cuda.device_of(out):
        fisher_kernel[grid](
            out, weight_grad, d_in, x_in, kept, *table, steps, length, o, i, d.stride(0), x.stride(0), scale,
            mode, statistic, token, precision(token, allow_tf32, d, x), use_descriptors,
            tile.block_o, tile.block_i, tile.block_k, *sub, GROUP, **tile.options,
        )  # fmt: skip


def fisher_diag(
    fisher: Tensor,
    weight_grad: Tensor | None,
    batch: Any,
    statistic: str,
    token: bool,
    scale: float,
    allow_tf32: bool,
) -> None:
    """`curvkern.fisher_diag_` on contiguous sums."""
    if batch.empty:
        return
    if token and weight_grad is not None:  # a second pass: both sums at once spill, or come out wrong (Triton 3.7)
        fisher_diag(weight_grad, None, batch, "sum", False, scale, allow_tf32)
        weight_grad = None
    tile = tile_of(batch, weight_grad, token)
    launch(fisher, weight_grad, batch, "diag", tile, (1, 1), statistic, token, scale, allow_tf32)


def fisher_blocks(
    blocks: Tensor,
    weight_grad: Tensor | None,
    batch: Any,
    block_rows: int,
    block_cols: int,
    statistic: str,
    token: bool,
    scale: float,
    allow_tf32: bool,
) -> None:
    """`curvkern.fisher_blocks_` on contiguous sums.

    The kernel sums over the largest powers of two that divide a block and a tile. Where that is not the block itself,
    the parts of a block are added up afterwards, in a fixed order.
    """
    if batch.empty:
        return
    if token and weight_grad is not None:
        fisher_diag(weight_grad, None, batch, "sum", False, scale, allow_tf32)
        weight_grad = None
    _, o, i = batch.shape
    tile, how = tile_of(batch, weight_grad, token), (statistic, token, scale, allow_tf32)
    (sub_o, parts_o), (sub_i, parts_i) = cut(o, block_rows, tile.block_o), cut(i, block_cols, tile.block_i)
    if (parts_o, parts_i) == (1, 1):
        launch(blocks, weight_grad, batch, "blocks", tile, (sub_o, sub_i), *how)
        return
    fine = torch.zeros(batch.experts, triton.cdiv(o, sub_o), triton.cdiv(i, sub_i), device=blocks.device)
    launch(fine, weight_grad, batch, "blocks", tile, (sub_o, sub_i), *how)
    padded = torch.nn.functional.pad(fine, (0, -fine.shape[2] % parts_i, 0, -fine.shape[1] % parts_o))
    blocks.add_(padded.unflatten(2, (-1, parts_i)).unflatten(1, (-1, parts_o)).sum((2, 4)).view_as(blocks))


def cut(side: int, block: int, tile: int) -> tuple[int, int]:
    """What the kernel sums over along one side of a block, and how many of these make a block."""
    if block >= side:
        return tile, triton.cdiv(side, tile)
    part = math.gcd(block, tile)
    return part, block // part


def tile_norms(batch: Any, n: int, allow_tf32: bool) -> Tensor:
    """Squared norm of each sample's gradient [n], tile by tile; ``batch`` is not empty."""
    _, o, i = batch.shape
    tile = tile_of(batch, None, False)
    tiles = triton.cdiv(o, tile.block_o) * triton.cdiv(i, tile.block_i)
    parts = torch.zeros(n, tiles, device=batch.grad_output.device)
    launch(parts, None, batch, "norms", tile, (1, 1), "square", False, 1.0, allow_tf32)
    return parts.sum(1)


def _ahead(
    mode: str, d: str = "bf16", x: str = "bf16", precision: str = "half", *,
    ragged: bool = False, weight_grad: bool = False, token: bool = False, side: int = 4096,
) -> Ahead:  # fmt: skip
    """One form of `fisher_kernel` on a square weight as each GPU runs it; ragged ones are masked too."""
    table = {"mask_ptr": "*u8", "at_ptr": "*i32", "stop_ptr": "*i32", "run_ptr": "*i32", "first_step_ptr": "*i32"}
    signature = {"out_ptr": "*fp32:16", "steps": "i32", "length": "i32", "o": "i32:16", "i": "i32:16"}
    signature |= {"d_stride": "i64:16", "x_stride": "i64:16", "scale": "fp32"}
    signature |= table if ragged else {}
    signature |= {"weight_grad_ptr": "*fp32:16"} if weight_grad else {}
    absent = dict.fromkeys({*table, "weight_grad_ptr"} - signature.keys())

    def specialise(generation: int) -> Ahead:
        exact = precision_on(generation, precision)
        plain = d == x and not (token or weight_grad)
        tile = tiling(side, side, 1, "fp32" in (d, x), plain, generation, 132)
        descriptors = not ragged and generation >= 9
        kinds = {
            name: f"tensordesc<{dtype}[1,{tile.block_k},{block}]>" if descriptors else f"*{dtype}:16"
            for name, dtype, block in (("d_in", d, tile.block_o), ("x_in", x, tile.block_i))
        }
        sub = (tile.block_o, tile.block_i) if mode == "blocks" else (1, 1)
        constants = {"OUT": mode, "STATISTIC": "square", "TOKEN": token, "PRECISION": exact, "GROUP": GROUP}
        constants |= {"DESCRIPTORS": descriptors, "SUB_O": sub[0], "SUB_I": sub[1]}
        constants |= {"BLOCK_O": tile.block_o, "BLOCK_I": tile.block_i, "BLOCK_K": tile.block_k}
        # The matrix instruction of a warp group spans 64 rows; a smaller tile takes that of a warp.
        matrix = exact not in ("ieee", "guarded") and (generation != 9 or tile.block_o >= 64)
        return Ahead(fisher_kernel, signature | kinds, absent | constants, tile.options, matrix=matrix)

    return on_each_target(specialise)


AHEAD_OF_TIME = [
    _ahead("diag"),
    _ahead("diag", ragged=True),
    _ahead("diag", weight_grad=True),
    _ahead("diag", ragged=True, weight_grad=True),
    _ahead("diag", ragged=True, weight_grad=True, side=512),
    _ahead("diag", side=16),
    _ahead("blocks"),
    _ahead("blocks", ragged=True, weight_grad=True),
    _ahead("norms", ragged=True),
    _ahead("diag", token=True),
    _ahead("diag", ragged=True, token=True),
    _ahead("diag", ragged=True, token=True, side=512),
    _ahead("diag", "fp16", "fp16", "tf32x3", token=True),
    _ahead("diag", "bf16", "fp16", "tf32", weight_grad=True),
    _ahead("diag", "fp32", "fp32", "ieee", weight_grad=True),
    _ahead("diag", "bf16", "fp32", "ieee", ragged=True, token=True),
    _ahead("diag", "fp32", "fp32", "tf32"),
]

"""fisher_diag_ and fisher_blocks_ on the CPU: the native kernel, torch's products or Grams, whichever is fastest."""

from __future__ import annotations

import torch
from torch import Tensor

from curvkern.backend import launch
from curvkern.ops.fisher import block_sums, experts_of
from curvkern.ops.samples import Batch, samples

_CODES = {"square": 0, "abs": 1, "sum": 2}  # Statistic in csrc/launch.h
_DEPTH, _ROWS, _COLS = 256, 12, 32  # kFisherDepth, kFisherRows, kFisherCols there
_PRODUCT = 1 << 20  # numbers of a sample's gradient at a time: less makes torch's product slow


def fisher_diag(
    fisher: Tensor,
    weight_grad: Tensor | None,
    batch: Batch,
    statistic: str,
    token: bool,
    scale: float,
    allow_tf32: bool,
) -> None:
    """`curvkern.fisher_diag_` on contiguous sums."""
    long = batch.typical_length > _DEPTH and batch.grad_output.dtype == batch.activation.dtype == torch.float32
    few = batch.experts == 1 and batch.shape[0] <= 2 * batch.typical_length
    if not (token or batch.empty) and (long or few):
        _by_products(fisher, weight_grad, batch, statistic, scale)
    else:
        _native(fisher, weight_grad, batch, None, statistic, token, scale)


def fisher_blocks(
    blocks: Tensor,
    weight_grad: Tensor | None,
    batch: Batch,
    block_rows: int,
    block_cols: int,
    statistic: str,
    token: bool,
    scale: float,
    allow_tf32: bool,
) -> None:
    """`curvkern.fisher_blocks_` on contiguous sums."""
    block = block_rows, block_cols
    if weight_grad is None and statistic == "square" and not token and _gram_is_cheaper(batch, block):
        for expert, d, x in samples(batch):
            experts_of(blocks)[expert].add_(_gram_blocks(d, x, block), alpha=scale)
    else:
        _native(blocks, weight_grad, batch, block, statistic, token, scale)


def _by_products(fisher: Tensor, weight_grad: Tensor | None, batch: Batch, statistic: str, scale: float) -> None:
    """As the formula reads, some rows of a sample's gradient at a time.

    At one sample of 128 tokens torch's product is 2x faster than the kernel, at two 1.4x, at 512 tokens a sample 1.3x.
    """
    _, o, i = batch.shape
    rows = min(o, max(1, _PRODUCT // max(i, 1)))
    buffer = torch.empty(rows, i)
    gradients = None if weight_grad is None else experts_of(weight_grad)
    for expert, d, x in samples(batch):
        for at in range(0, o, rows):
            part = slice(at, min(o, at + rows))
            gradient = torch.mm(d[:, part].T, x, out=buffer[: part.stop - at])
            if gradients is not None:
                gradients[expert, part].add_(gradient, alpha=scale)
            if statistic == "square":
                experts_of(fisher)[expert, part].addcmul_(gradient, gradient, value=scale)
            else:
                experts_of(fisher)[expert, part].add_(gradient.abs_(), alpha=scale)


def _tile(o: int, i: int, experts: int, threads: int) -> tuple[int, int]:
    """Sides of the tiles of sums: about what the second-level cache holds, smaller until each thread has one."""
    rows, cols = min(516, -(-o // _ROWS) * _ROWS), min(512, -(-i // _COLS) * _COLS)
    while experts * -(-o // rows) * -(-i // cols) < threads and (rows > _ROWS or cols > _COLS):
        if rows * 2 > cols and rows > _ROWS:
            rows = -(-rows // (2 * _ROWS)) * _ROWS
        else:
            cols = -(-cols // (2 * _COLS)) * _COLS
    return rows, cols


def _rows_of(x: Tensor) -> Tensor:
    """``x`` [tokens, features] with unit stride along features; any stride along tokens will do."""
    return x if x.shape[1] < 2 or x.stride(1) == 1 else x.contiguous()


def _native(
    target: Tensor,
    weight_grad: Tensor | None,
    batch: Batch,
    block: tuple[int, int] | None,
    statistic: str,
    token: bool,
    scale: float,
) -> None:
    """``target``: the diagonal, or sums over ``block``."""
    if token and weight_grad is not None:  # operands squared for the Fisher give no gradient
        _native(weight_grad, None, batch, None, "sum", False, scale)
        weight_grad = None
    tokens, o, i = batch.shape
    if tokens * o * i == 0:
        return
    d, x = _rows_of(batch.grad_output), _rows_of(batch.activation)
    starts = torch.arange(0, tokens + 1, batch.length) if batch.starts is None else batch.starts.long()
    first_run = torch.tensor([0, starts.numel() - 1]) if batch.first_run is None else batch.first_run
    threads = torch.get_num_threads()
    rows, cols = _tile(o, i, batch.experts, threads)
    tiles = batch.experts * -(-o // rows) * -(-i // cols)
    depth = min(_DEPTH, -(-batch.longest // 4) * 4)  # panels of whole cache lines
    slot = depth * (rows + cols) + (1 + (weight_grad is not None) + (batch.longest > depth)) * rows * cols
    workspace = torch.empty(min(threads, tiles), slot)
    partial = None
    if block is not None:
        partial = torch.empty(tiles, (rows - 1) // block[0] + 2, (cols - 1) // block[1] + 2)
    launch.native_op(
        "fisher", target.device, target, partial, weight_grad, workspace, d, x, batch.mask, starts, first_run,
        batch.experts, o, i, d.stride(0), x.stride(0), rows, cols, *(block or (1, 1)), depth, slot, scale,
        _CODES[statistic], token, d.dtype, x.dtype,
    )  # fmt: skip


def _gram_is_cheaper(batch: Batch, block: tuple[int, int]) -> bool:
    """Whether Grams of the blocks beat the blocks of the gradient: flops, with the crossover measured on a CPU.

    With 0.5 of the flops they are 1.3-1.5x faster, with as many up to 1.2x slower (1024 x 1024; blocks of 128, rows).
    Their memory stays under a quarter of [o, i].
    """
    (_, o, i), t = batch.shape, batch.longest
    down, across = -(-o // block[0]), -(-i // block[1])
    pairs, grams = (0, 1) if min(down, across) == 1 else (down * across, down + across)
    return t * (o + i + pairs) <= 0.6 * o * i and 4 * grams * t * t <= o * i


def _gram_blocks(d: Tensor, x: Tensor, block: tuple[int, int]) -> Tensor:
    """Block sums of (d^T x)^2 of one sample: sums over tokens s, t of <d_s, d_t> <x_s, x_t>, columns of the block."""
    if block[1] >= x.shape[1]:
        sums = block_sums(((x @ x.T) @ d).mul_(d).sum(0)[:, None], (block[0], 1))
    elif block[0] >= d.shape[1]:
        sums = block_sums(((d @ d.T) @ x).mul_(x).sum(0)[None], (1, block[1]))
    else:
        sums = _grams(d, block[0]) @ _grams(x, block[1]).T
    return sums.clamp_(min=0)  # rounding leaves a gradient that cancels out on either side of zero


def _grams(x: Tensor, width: int) -> Tensor:
    """[blocks, t * t]: the Gram of each block of ``width`` columns."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % width))
    parts = padded.unflatten(1, (-1, width)).transpose(0, 1)
    return (parts @ parts.mT).flatten(1)

"""fisher_diag_, fisher_blocks_, sample_norms and sample_dots in Triton.

`fisher_kernel` is one matrix product over all tokens that squares where a sample ends: a program owns a tile of the
weight, runs through the tokens of all samples in one flat loop, so that loads stay ahead across sample ends, and adds
f(gradient) to a second tile of registers whenever a sample is complete. Ragged input brings a table of steps.
"""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from curvkern.kernels import Ahead

GROUP = 8  # rows of tiles that run together, for the second-level cache


@triton.jit
def load_tokens(ptr, stride, rows, kept, cols, width):
    """[tokens, features] of a packed matrix; zeros for tokens that are not kept, whatever lies there."""
    inside = kept[:, None] & (cols < width)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def statistic_of(x, STATISTIC: tl.constexpr):
    if STATISTIC == "square":
        return x * x
    else:
        return tl.abs(x)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """Add a b to acc. "half": both are of one half precision, whose products are exact in float32; else in float32."""
    if PRECISION == "half":
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def token_product(d, x, acc, STATISTIC: tl.constexpr, PRECISION: tl.constexpr):
    """Add f(d)^T f(x) to acc. The square of a bfloat16 is the exact sum of two, so four products lose nothing."""
    fd = statistic_of(d.to(tl.float32), STATISTIC)
    fx = statistic_of(x.to(tl.float32), STATISTIC)
    if d.dtype == tl.bfloat16 and x.dtype == tl.bfloat16:
        d_high = fd.to(tl.bfloat16)
        x_high = fx.to(tl.bfloat16)
        acc = product(tl.trans(d_high), x_high, acc, PRECISION)
        if STATISTIC == "square":
            d_low = (fd - d_high.to(tl.float32)).to(tl.bfloat16)
            x_low = (fx - x_high.to(tl.float32)).to(tl.bfloat16)
            acc = product(tl.trans(d_low), x_high, acc, PRECISION)
            acc = product(tl.trans(d_high), x_low, acc, PRECISION)
            acc = product(tl.trans(d_low), x_low, acc, PRECISION)
        return acc
    else:
        return product(tl.trans(fd), fx, acc, PRECISION)


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
            if weight_grad_ptr is not None:
                gradients = product(tl.trans(d), x, gradients, PRECISION)
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


@triton.jit
def dots_kernel(
    out_ptr,
    d1_ptr,
    x1_ptr,
    mask1_ptr,
    starts1_ptr,
    d2_ptr,
    x2_ptr,
    mask2_ptr,
    starts2_ptr,
    n2,
    length1,
    length2,
    o,
    i,
    d1_stride,
    x1_stride,
    d2_stride,
    x2_stride,
    splits,
    NORMS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out[pair, split]: part of sum over tokens s, t of <d1_s, d2_t> <x1_s, x2_t>. NORMS: pair n is (n, n)."""
    pair = tl.program_id(0)
    split = tl.program_id(1)
    run1 = pair if NORMS else pair // n2
    run2 = pair if NORMS else pair % n2
    begin1, end1 = run_bounds(starts1_ptr, run1, length1)
    begin2, end2 = run_bounds(starts2_ptr, run2, length2)
    total = 0.0
    for s in range(begin1 + split * BLOCK_T, end1, splits * BLOCK_T):
        tokens1 = s + tl.arange(0, BLOCK_T)
        kept1 = kept_tokens(mask1_ptr, tokens1, end1)
        for t in range(s if NORMS else begin2, end2, BLOCK_T):
            tokens2 = t + tl.arange(0, BLOCK_T)
            kept2 = kept_tokens(mask2_ptr, tokens2, end2)
            of_d = token_gram(d1_ptr, d1_stride, tokens1, kept1, d2_ptr, d2_stride, tokens2, kept2, o,
                              PRECISION, BLOCK_T, BLOCK_K)  # fmt: skip
            of_x = token_gram(x1_ptr, x1_stride, tokens1, kept1, x2_ptr, x2_stride, tokens2, kept2, i,
                              PRECISION, BLOCK_T, BLOCK_K)  # fmt: skip
            part = tl.sum(of_d * of_x)
            if NORMS:
                part = tl.where(t > s, 2 * part, part)
            total += part
    tl.store(out_ptr + pair.to(tl.int64) * splits + split, total)


@triton.jit
def run_bounds(starts_ptr, run, length):
    if starts_ptr is None:
        return run * length, run * length + length
    else:
        return tl.load(starts_ptr + run).to(tl.int32), tl.load(starts_ptr + run + 1).to(tl.int32)


@triton.jit
def kept_tokens(mask_ptr, tokens, end):
    kept = tokens < end
    if mask_ptr is not None:
        kept = kept & (tl.load(mask_ptr + tokens, mask=kept, other=0) != 0)
    return kept


@triton.jit
def token_gram(
    a_ptr, a_stride, tokens1, kept1, b_ptr, b_stride, tokens2, kept2, width,
    PRECISION: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Inner products of the rows of two packed matrices, [BLOCK_T, BLOCK_T]."""
    gram = tl.zeros((BLOCK_T, BLOCK_T), tl.float32)
    for k in range(0, width, BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        a = load_tokens(a_ptr, a_stride, tokens1, kept1, cols, width)
        b = load_tokens(b_ptr, b_stride, tokens2, kept2, cols, width)
        gram = product(a, tl.trans(b), gram, PRECISION)
    return gram


class Tiling(NamedTuple):
    """Tile of the weight and tokens a step; what the compiler is told."""

    block_o: int
    block_i: int
    block_k: int
    options: dict[str, int]


def generation(device: torch.device) -> int:
    """CUDA compute capability, the major number; 0 on AMD. The interpreter counts as 9, to run what Hopper runs."""
    if device.type != "cuda":
        return 9
    return 0 if torch.version.hip is not None else torch.cuda.get_device_capability(device)[0]


def tiling(o: int, i: int, experts: int, wide: bool, sums: int, device: torch.device) -> Tiling:
    """128 x 128 x 64 where that fills the GPU; smaller for small weights and float32 (``wide``).

    ``sums``: tiles of sums beside the gradient's. Only 9.x and 10.x keep operands out of registers and hold two.
    """
    largest = 64 if wide else 128
    block_o, block_i = (min(largest, max(16, triton.next_power_of_2(side))) for side in (o, i))
    if sums > 1 and generation(device) not in (9, 10):
        block_i = min(block_i, 64)
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    while max(block_o, block_i) > 64 and experts * triton.cdiv(o, block_o) * triton.cdiv(i, block_i) < processors:
        block_o, block_i = (block_o // 2, block_i) if block_o >= block_i else (block_o, block_i // 2)
    warps = 8 if block_o * block_i >= 128 * 64 else 4
    return Tiling(block_o, block_i, 32 if wide else 64, {"num_warps": warps, "num_stages": 3})


def precision(token: bool, allow_tf32: bool, *inputs: Tensor) -> str:
    """PRECISION of `product`: TF32 only where it loses nothing (mixed half precisions) or is allowed."""
    dtypes = {x.dtype for x in inputs}
    wide = torch.float32 in dtypes
    split = not token or dtypes == {torch.bfloat16}
    if len(dtypes) == 1 and not wide and split and inputs[0].is_cuda:  # the interpreter cannot multiply bfloat16
        return "half"
    if torch.version.hip is not None or (wide and not allow_tf32):
        return "ieee"
    return "tf32x3" if token and not allow_tf32 else "tf32"  # the square of a float16 is the sum of two TF32 numbers


class Steps(NamedTuple):
    """Ragged input cut into steps of one sample each; see `fisher_kernel`."""

    at: Tensor
    stop: Tensor
    run: Tensor
    first: Tensor


def ragged_steps(starts: Tensor, first_run: Tensor | None, tokens: int, block_k: int) -> Steps:
    """Built on the device: how long samples are is never asked for. At most tokens / block_k + samples steps."""
    runs = starts.numel() - 1
    ends = ((starts.diff() + (block_k - 1)) // block_k).cumsum(0)
    before = torch.cat((ends.new_zeros(1), ends))
    step = torch.arange(tokens // block_k + runs, device=starts.device)
    run = torch.searchsorted(ends, step, right=True).clamp(max=max(runs - 1, 0))
    at = starts[run] + (step - before[run]) * block_k
    first = before[[0, -1]] if first_run is None else before[first_run]
    return Steps(at.int(), starts[run + 1].int(), run.int(), first.int())


def rows_of(x: Tensor) -> Tensor:
    """Unit stride along features; any stride along tokens will do."""
    return x if x.shape[1] < 2 or x.stride(1) == 1 else x.contiguous()


def describable(x: Tensor) -> bool:
    """Whether the copy engine of 9.x and later can read it: 16-byte aligned rows."""
    return (
        generation(x.device) >= 9
        and x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and x.stride(0) >= x.shape[1]
    )


def launch(
    out: Tensor,
    weight_grad: Tensor | None,
    batch: tuple[Any, ...],
    mode: str,
    tile: Tiling,
    sub: tuple[int, int],
    statistic: str,
    token: bool,
    scale: float,
    allow_tf32: bool,
    experts: int,
) -> None:
    """Run `fisher_kernel`; there are tokens, and o and i are not 0."""
    grad_output, activation, mask, starts, first_run, length = batch
    d, x = rows_of(grad_output), rows_of(activation)
    (tokens, o), i = d.shape, x.shape[1]
    steps, table = tokens // length * triton.cdiv(length, tile.block_k), (None, None, None, None)
    if starts is not None:
        table = ragged_steps(starts, first_run, tokens, tile.block_k)
    use_descriptors = starts is None and mask is None and describable(d) and describable(x)
    d_in, x_in = d, x
    if use_descriptors:
        d_in, x_in = (
            TensorDescriptor(y, [tokens // length, length, y.shape[1]], [length * y.stride(0), y.stride(0), 1],
                             [1, tile.block_k, side])
            for y, side in ((d, tile.block_o), (x, tile.block_i))
        )  # fmt: skip
    grid = (experts * triton.cdiv(o, tile.block_o) * triton.cdiv(i, tile.block_i),)
    kept = None if mask is None else mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(out):
        fisher_kernel[grid](
            out, weight_grad, d_in, x_in, kept, *table, steps, length, o, i, d.stride(0), x.stride(0), scale,
            mode, statistic, token, precision(token, allow_tf32, d, x), use_descriptors,
            tile.block_o, tile.block_i, tile.block_k, *sub, GROUP, **tile.options,
        )  # fmt: skip


def shape_of(batch: tuple[Any, ...]) -> tuple[int, int, int, int]:
    """(tokens, o, i, experts)."""
    (tokens, o), i = batch[0].shape, batch[1].shape[1]
    return tokens, o, i, 1 if batch[4] is None else batch[4].numel() - 1


def tile_of(batch: tuple[Any, ...], weight_grad: Tensor | None, token: bool) -> Tiling:
    """The tiling for a packed input."""
    _, o, i, experts = shape_of(batch)
    wide = torch.float32 in (batch[0].dtype, batch[1].dtype)
    return tiling(o, i, experts, wide, 2 if token or weight_grad is not None else 1, batch[0].device)


def fisher_diag(fisher: Tensor, weight_grad: Tensor | None, *rest: Any) -> None:
    """`curvkern.fisher_diag_`; the sums are contiguous."""
    batch, (statistic, token, scale, allow_tf32) = rest[:6], rest[6:]
    tokens, o, i, experts = shape_of(batch)
    if tokens * o * i * experts:
        tile, how = tile_of(batch, weight_grad, token), (statistic, token, scale, allow_tf32, experts)
        launch(fisher, weight_grad, batch, "diag", tile, (1, 1), *how)


def fisher_blocks(blocks: Tensor, weight_grad: Tensor | None, *rest: Any) -> None:
    """`curvkern.fisher_blocks_`; the sums are contiguous.

    The kernel sums over the largest powers of two that divide a block and a tile. Where that is not the block itself,
    the parts of a block are added up afterwards, in a fixed order.
    """
    batch, (block_rows, block_cols, statistic, token, scale, allow_tf32) = rest[:6], rest[6:]
    tokens, o, i, experts = shape_of(batch)
    if not tokens * o * i * experts:
        return
    tile = tile_of(batch, weight_grad, token)
    sub, parts = [], []
    for side, block, of_tile in ((o, block_rows, tile.block_o), (i, block_cols, tile.block_i)):
        sub.append(of_tile if block >= side else math.gcd(block, of_tile))
        parts.append(triton.cdiv(side, sub[-1]) if block >= side else block // sub[-1])
    how = (statistic, token, scale, allow_tf32, experts)
    if parts == [1, 1]:
        launch(blocks, weight_grad, batch, "blocks", tile, (sub[0], sub[1]), *how)
        return
    fine = torch.zeros(experts, triton.cdiv(o, sub[0]), triton.cdiv(i, sub[1]), device=blocks.device)
    launch(fine, weight_grad, batch, "blocks", tile, (sub[0], sub[1]), *how)
    padded = torch.nn.functional.pad(fine, (0, -fine.shape[2] % parts[1], 0, -fine.shape[1] % parts[0]))
    blocks.add_(padded.unflatten(2, (-1, parts[1])).unflatten(1, (-1, parts[0])).sum((2, 4)).view_as(blocks))


def sample_norms(*arguments: Any) -> Tensor:
    """`curvkern.sample_norms`: Grams where they take fewer flops than the tiles of the gradient."""
    batch, (n, allow_tf32) = arguments[:6], arguments[6:]
    tokens, o, i, _ = shape_of(batch)
    device = batch[0].device
    if not n * tokens * o * i:
        return torch.zeros(n, device=device)
    if typical_length(batch, n) * (o + i) <= o * i:
        return dots(batch, batch, n, n, True, allow_tf32)
    tile = tile_of(batch, None, False)
    parts = torch.zeros(n, triton.cdiv(o, tile.block_o) * triton.cdiv(i, tile.block_i), device=device)
    launch(parts, None, batch, "norms", tile, (1, 1), "square", False, 1.0, allow_tf32, 1)
    return parts.sum(1)


def sample_dots(*arguments: Any) -> Tensor:
    """`curvkern.sample_dots`: Grams between the tokens of every pair of samples."""
    batch1, batch2, (n1, n2, allow_tf32) = arguments[:6], arguments[6:12], arguments[12:]
    if not n1 * n2 * batch1[0].numel() * batch1[1].numel() * batch2[0].shape[0]:
        return torch.zeros(n1, n2, device=batch1[0].device)
    return dots(batch1, batch2, n1, n2, False, allow_tf32).view(n1, n2)


def typical_length(batch: tuple[Any, ...], n: int) -> int:
    """Tokens a sample, on average."""
    return batch[5] if batch[3] is None else triton.cdiv(batch[0].shape[0], n)


def dots(batch1: tuple[Any, ...], batch2: tuple[Any, ...], n1: int, n2: int, norms: bool, allow_tf32: bool) -> Tensor:
    """Run `dots_kernel`: [n1 * n2], or [n1] norms."""
    o, i = batch1[0].shape[1], batch1[1].shape[1]
    inputs = [rows_of(x) for x in (*batch1[:2], *batch2[:2])]
    wide = any(x.dtype == torch.float32 for x in inputs)
    longest = max(typical_length(batch1, n1), typical_length(batch2, n2))
    block_t = min(64 if wide else 128, max(16, triton.next_power_of_2(longest)))
    tokens1, length1, ragged = batch1[0].shape[0], batch1[5], batch1[3] is not None
    splits = min(16, triton.cdiv(tokens1, block_t)) if ragged else triton.cdiv(length1, block_t)
    pairs = n1 if norms else n1 * n2
    out = torch.empty(pairs, splits, device=inputs[0].device)
    kept1, kept2 = (None if x[2] is None else x[2].contiguous().view(torch.uint8) for x in (batch1, batch2))
    with torch.cuda.device_of(out):
        dots_kernel[(pairs, splits)](
            out, inputs[0], inputs[1], kept1, batch1[3], inputs[2], inputs[3], kept2, batch2[3], n2, length1, batch2[5],
            o, i, *(x.stride(0) for x in inputs), splits, norms, precision(False, allow_tf32, *inputs), block_t,
            32 if wide else 64, num_warps=8 if block_t >= 128 else 4, num_stages=3,
        )  # fmt: skip
    return out.sum(1)


def _ahead(
    dtype: str, mode: str, tile: Tiling, *, descriptors: bool = False, ragged: bool = False, weight_grad: bool = False,
    token: bool = False, precision: str = "half",
) -> Ahead:  # fmt: skip
    """One specialisation of `fisher_kernel`; ragged ones are masked too."""
    signature = {"out_ptr": "*fp32:16", "steps": "i32", "length": "i32", "o": "i32:16", "i": "i32:16"}
    signature |= {"d_stride": "i64:16", "x_stride": "i64:16", "scale": "fp32"}
    for name, side in (("d_in", tile.block_o), ("x_in", tile.block_i)):
        signature[name] = f"tensordesc<{dtype}[1,{tile.block_k},{side}]>" if descriptors else f"*{dtype}:16"
    table = {"mask_ptr": "*u8", "at_ptr": "*i32", "stop_ptr": "*i32", "run_ptr": "*i32", "first_step_ptr": "*i32"}
    constants: dict[str, Any] = dict.fromkeys(table)
    if ragged:
        signature, constants = signature | table, {}
    if weight_grad:
        signature["weight_grad_ptr"] = "*fp32:16"
    else:
        constants["weight_grad_ptr"] = None
    sub = (tile.block_o, tile.block_i) if mode == "blocks" else (1, 1)
    constants |= {"OUT": mode, "STATISTIC": "square", "TOKEN": token, "PRECISION": precision, "GROUP": GROUP}
    constants |= {"DESCRIPTORS": descriptors, "SUB_O": sub[0], "SUB_I": sub[1]}
    constants |= {"BLOCK_O": tile.block_o, "BLOCK_I": tile.block_i, "BLOCK_K": tile.block_k}
    return Ahead(fisher_kernel, signature, constants, tile.options, matrix=precision != "ieee")


def _ahead_dots(dtype: str, norms: bool, block_t: int, block_k: int, warps: int, precision: str) -> Ahead:
    signature = {"out_ptr": "*fp32", "n2": "i32", "length1": "i32", "length2": "i32", "o": "i32:16", "i": "i32:16"}
    signature |= {"splits": "i32"}
    for name in ("d1", "x1", "d2", "x2"):
        signature |= {f"{name}_ptr": f"*{dtype}:16", f"{name}_stride": "i64:16"}
    absent = dict.fromkeys(("mask1_ptr", "mask2_ptr", "starts1_ptr", "starts2_ptr"))
    constants = absent | {"NORMS": norms, "PRECISION": precision, "BLOCK_T": block_t, "BLOCK_K": block_k}
    options = {"num_warps": warps, "num_stages": 3}
    return Ahead(dots_kernel, signature, constants, options, matrix=precision != "ieee")


_LARGE = Tiling(128, 128, 64, {"num_warps": 8, "num_stages": 3})
_WIDE = Tiling(64, 64, 32, {"num_warps": 4, "num_stages": 3})

AHEAD_OF_TIME = [
    _ahead("bf16", "diag", _LARGE, descriptors=True),
    _ahead("bf16", "diag", _LARGE, descriptors=True, weight_grad=True),
    _ahead("bf16", "diag", _LARGE, ragged=True, weight_grad=True),
    _ahead("bf16", "blocks", _LARGE, descriptors=True),
    _ahead("bf16", "norms", _LARGE, ragged=True),
    _ahead("bf16", "diag", _LARGE, token=True, descriptors=True),
    _ahead("fp32", "diag", _WIDE, weight_grad=True, precision="ieee"),
    _ahead_dots("bf16", True, 128, 64, 8, "half"),
    _ahead_dots("fp32", False, 64, 32, 4, "ieee"),
]

"""gram_ and column_sumsq_ in Triton: tiles on and below the diagonal, each stored twice; columns in one sweep."""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvkern.kernels import Ahead, on_each_target
from curvkern.kernels.packed import kept_tokens, load_tokens, precision, precision_on, product, rows_of
from curvkern.kernels.tuned import launch_of

STRIP = 128  # columns that a program of column_sumsq_ owns
SHARES = 64  # parts of the tokens, summed in order afterwards


@triton.jit
def gram_kernel(
    gram_ptr,
    x_ptr,
    mask_ptr,
    tokens,
    i,
    stride,
    scale,
    PRECISION: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Tile (row, col) with col <= row of scale X^T X, added there and, transposed, at (col, row)."""
    pair = tl.program_id(0)
    row = ((tl.sqrt(8.0 * pair.to(tl.float32) + 1.0) - 1.0) / 2.0).to(tl.int32)
    row = tl.where(row * (row + 1) // 2 > pair, row - 1, row)  # the root is rounded
    row = tl.where((row + 1) * (row + 2) // 2 <= pair, row + 1, row)
    col = pair - row * (row + 1) // 2
    rows = row * BLOCK + tl.arange(0, BLOCK)
    cols = col * BLOCK + tl.arange(0, BLOCK)
    sums = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, tokens, BLOCK_K):
        at = start + tl.arange(0, BLOCK_K)
        kept = kept_tokens(mask_ptr, at, tokens)
        a = load_tokens(x_ptr, stride, at, kept, rows, i)
        b = load_tokens(x_ptr, stride, at, kept, cols, i)
        sums = product(tl.trans(a), b, sums, PRECISION)
    sums = sums * scale
    inside = (rows < i)[:, None] & (cols < i)[None, :]
    out = gram_ptr + rows.to(tl.int64)[:, None] * i + cols[None, :]
    tl.store(out, tl.load(out, mask=inside, other=0.0) + sums, mask=inside)
    if row != col:
        mirrored = gram_ptr + cols.to(tl.int64)[None, :] * i + rows[:, None]
        tl.store(mirrored, tl.load(mirrored, mask=inside, other=0.0) + sums, mask=inside)


@triton.jit
def column_sumsq_kernel(out_ptr, x_ptr, mask_ptr, tokens, i, stride, share, STRIP: tl.constexpr, BLOCK_T: tl.constexpr):
    """out[share, column]: the square sum of one share of the tokens."""
    cols = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    sums = tl.zeros((STRIP,), tl.float32)
    first = tl.program_id(1) * share
    for start in range(first, tl.minimum(first + share, tokens), BLOCK_T):
        at = start + tl.arange(0, BLOCK_T)
        kept = kept_tokens(mask_ptr, at, tl.minimum(first + share, tokens))
        x = load_tokens(x_ptr, stride, at, kept, cols, i).to(tl.float32)
        sums += tl.sum(x * x, 0)
    tl.store(out_ptr + tl.program_id(1).to(tl.int64) * i + cols, sums, mask=cols < i)


def gram(gram: Tensor, x: Tensor, mask: Tensor | None, scale: float) -> None:
    """`curvkern.gram_`; gram is contiguous."""
    (tokens, i), rows = x.shape, rows_of(x)
    if tokens * i == 0:
        return
    block, block_k, options = _tile(x.dtype == torch.float32)
    kind = "gram wide" if x.dtype == torch.float32 else "gram half"
    launch = launch_of(kind, x.device, {"block": block, "block_k": block_k, **options})
    block, block_k, options = launch["block"], launch["block_k"], {name: launch[name] for name in options}
    block = min(block, max(16, triton.next_power_of_2(i)))
    tiles = triton.cdiv(i, block)
    kept = None if mask is None else mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(x):
        gram_kernel[(tiles * (tiles + 1) // 2,)](
            gram, rows, kept, tokens, i, rows.stride(0), scale, precision(False, False, x), block, block_k, **options
        )


def column_sumsq(sums: Tensor, x: Tensor, mask: Tensor | None, scale: float) -> None:
    """`curvkern.column_sumsq_`."""
    (tokens, i), rows = x.shape, rows_of(x)
    if tokens * i == 0:
        return
    share = 32 * triton.cdiv(tokens, 32 * SHARES)
    out = torch.empty(triton.cdiv(tokens, share), i, device=x.device)
    kept = None if mask is None else mask.contiguous().view(torch.uint8)
    with torch.cuda.device_of(x):
        column_sumsq_kernel[(triton.cdiv(i, STRIP), len(out))](
            out, rows, kept, tokens, i, rows.stride(0), share, STRIP, 32, num_warps=4
        )
    sums.add_(out.sum(0), alpha=scale)


def _tile(wide: bool) -> tuple[int, int, dict[str, int]]:
    """Side, tokens a step, options; float32 multiplies without tensor cores."""
    if wide:
        return 64, 32, {"num_warps": 4, "num_stages": 3}
    return 128, 64, {"num_warps": 8, "num_stages": 3}


def _ahead(dtype: str, masked: bool) -> Ahead:
    def specialise(generation: int) -> Ahead:
        wide = dtype == "fp32"
        block, block_k, options = _tile(wide)
        signature = {"gram_ptr": "*fp32:16", "x_ptr": f"*{dtype}:16", "tokens": "i32", "i": "i32:16",
                     "stride": "i64:16", "scale": "fp32"}  # fmt: skip
        how = precision_on(generation, "ieee") if wide else "half"
        constants = {"PRECISION": how, "BLOCK": block, "BLOCK_K": block_k}
        if masked:
            signature["mask_ptr"] = "*u8"
        else:
            constants["mask_ptr"] = None
        return Ahead(gram_kernel, signature, constants, options, matrix=not wide)

    return on_each_target(specialise)


AHEAD_OF_TIME = [
    _ahead("bf16", False),
    _ahead("bf16", True),
    _ahead("fp32", True),
    Ahead(
        column_sumsq_kernel,
        {"out_ptr": "*fp32:16", "x_ptr": "*bf16:16", "mask_ptr": "*u8", "tokens": "i32", "i": "i32:16",
         "stride": "i64:16", "share": "i32:16"},
        {"STRIP": STRIP, "BLOCK_T": 32},
        {"num_warps": 4},
    ),
]  # fmt: skip

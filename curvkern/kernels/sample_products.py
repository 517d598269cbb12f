"""sample_norms and sample_dots in Triton: Grams between the tokens of two samples, never a gradient.

Norms of long samples take the Fisher kernel instead.
"""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvkern.kernels import Ahead, on_each_target
from curvkern.kernels.fisher import tile_norms
from curvkern.kernels.packed import generation, kept_tokens, load_tokens, precision, precision_on, product, rows_of


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


def sample_norms(batch: Any, n: int, allow_tf32: bool) -> Tensor:
    """`curvkern.sample_norms`: Grams where they take fewer flops than the tiles of the gradient."""
    _, o, i = batch.shape
    if batch.empty:
        return torch.zeros(n, device=batch.grad_output.device)
    if batch.typical_length * (o + i) > o * i:
        return tile_norms(batch, n, allow_tf32)
    return launch(batch, batch, n, n, True, allow_tf32).clamp_(min=0)  # rounding may leave it below


def sample_dots(batch1: Any, batch2: Any, n1: int, n2: int, allow_tf32: bool) -> Tensor:
    """`curvkern.sample_dots`: Grams between the tokens of every pair of samples."""
    if batch1.empty or batch2.empty:
        return torch.zeros(n1, n2, device=batch1.grad_output.device)
    return launch(batch1, batch2, n1, n2, False, allow_tf32).view(n1, n2)


def blocks(length: int, plain: bool, generation: int) -> tuple[int, int, dict[str, int]]:
    """BLOCK_T, BLOCK_K and launch options for samples of that many tokens.

    ``plain``: of one half precision. Two Grams of 128 x 128 fit where operands are not held in registers (see
    `fisher_tiles.tiling`), and of float32 not even two of 64 x 64 on 8.x.
    """
    largest = (128 if generation in (9, 10) else 64) if plain else (32 if generation == 8 else 64)
    block_t = max(16, min(largest, triton.next_power_of_2(length)))
    return block_t, 64 if plain else 32, {"num_warps": 8 if block_t == 128 else 4, "num_stages": 3}


def launch(batch1: Any, batch2: Any, n1: int, n2: int, norms: bool, allow_tf32: bool) -> Tensor:
    """Run `dots_kernel`: [n1 * n2], or [n1] norms."""
    _, o, i = batch1.shape
    inputs = [rows_of(x) for batch in (batch1, batch2) for x in batch[:2]]
    plain = len({x.dtype for x in inputs}) == 1 and inputs[0].dtype != torch.float32
    length = max(batch1.typical_length, batch2.typical_length)
    block_t, block_k, options = blocks(length, plain, generation(inputs[0].device))
    splits = min(64 if batch1.starts is None else 16, triton.cdiv(batch1.longest, block_t))
    pairs = n1 if norms else n1 * n2
    out = torch.empty(pairs, splits, device=inputs[0].device)
    kept1, kept2 = (None if batch.mask is None else batch.mask.view(torch.uint8) for batch in (batch1, batch2))
    with torch.cuda.device_of(out):
        dots_kernel[(pairs, splits)](
            out, inputs[0], inputs[1], kept1, batch1.starts, inputs[2], inputs[3], kept2, batch2.starts, n2,
            batch1.length, batch2.length, o, i, *(x.stride(0) for x in inputs), splits, norms,
            precision(False, allow_tf32, *inputs), block_t, block_k, **options,
        )  # fmt: skip
    return out.sum(1)


def _ahead(norms: bool, dtype: str = "bf16", precision: str = "half", *, ragged: bool = False) -> Ahead:
    """One form of `dots_kernel` as each GPU runs it on long samples; ragged ones are masked too."""
    signature = {"out_ptr": "*fp32", "n2": "i32", "length1": "i32", "length2": "i32", "o": "i32:16", "i": "i32:16"}
    signature |= {"splits": "i32"}
    for name in ("d1", "x1", "d2", "x2"):
        signature |= {f"{name}_ptr": f"*{dtype}:16", f"{name}_stride": "i64:16"}
    tables = {"mask1_ptr": "*u8", "mask2_ptr": "*u8", "starts1_ptr": "*i64", "starts2_ptr": "*i64"}
    signature |= tables if ragged else {}
    absent = {} if ragged else dict.fromkeys(tables)

    def specialise(generation: int) -> Ahead:
        exact = precision_on(generation, precision)
        block_t, block_k, options = blocks(1024, precision == "half", generation)
        constants = {"NORMS": norms, "PRECISION": exact, "BLOCK_T": block_t, "BLOCK_K": block_k}
        return Ahead(dots_kernel, signature, absent | constants, options, matrix=exact not in ("ieee", "guarded"))

    return on_each_target(specialise)


AHEAD_OF_TIME = [
    _ahead(norms=True),
    _ahead(norms=True, ragged=True),
    _ahead(norms=False, ragged=True),
    _ahead(norms=False, dtype="fp32", precision="ieee"),
    _ahead(norms=True, dtype="fp32", precision="ieee", ragged=True),
    _ahead(norms=True, dtype="fp32", precision="tf32", ragged=True),
]

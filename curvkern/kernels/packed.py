"""Packed tokens in Triton: loading and multiplying them, which fisher and sample_dots share."""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def load_tokens(ptr, stride, rows, kept, cols, width):
    """[tokens, features] of a packed matrix; zeros for tokens that are not kept, whatever lies there."""
    inside = kept[:, None] & (cols < width)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=inside, other=0.0)


@triton.jit
def kept_tokens(mask_ptr, tokens, end):
    kept = tokens < end
    if mask_ptr is not None:
        kept = kept & (tl.load(mask_ptr + tokens, mask=kept, other=0) != 0)
    return kept


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """Add a b to acc. "half": both are of one half precision, whose products are exact in float32; else in float32."""
    if PRECISION == "half":
        return tl.dot(a, b, acc)
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


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


def rows_of(x: Tensor) -> Tensor:
    """Unit stride along features; any stride along tokens will do."""
    return x if x.shape[1] < 2 or x.stride(1) == 1 else x.contiguous()

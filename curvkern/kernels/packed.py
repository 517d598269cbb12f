"""Packed tokens in Triton: loading and multiplying them, which fisher and sample_products share."""

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
    elif PRECISION == "guarded":
        return tl.dot(opaque(a.to(tl.float32)), opaque(b.to(tl.float32)), acc, input_precision="ieee")
    else:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision=PRECISION)


@triton.jit
def opaque(x):
    """``x``, as sums of one number each, which Triton does not look through.

    For sm_100 it (3.7) goes back over casts and loads for the narrowest type, finds that of a half precision or of a
    mask, and multiplies in TF32 although "ieee" was asked for.
    """
    return tl.sum(x[:, :, None], 2)


@triton.jit
def statistic_of(x, STATISTIC: tl.constexpr):
    if STATISTIC == "square":
        return x * x
    elif STATISTIC == "abs":
        return tl.abs(x)
    else:  # "sum"
        return x


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


def generation(device: torch.device) -> int:
    """CUDA compute capability, the major number; 0 on AMD. The interpreter counts as 9, to run what Hopper runs."""
    if device.type != "cuda":
        return 9
    return 0 if torch.version.hip is not None else torch.cuda.get_device_capability(device)[0]


def precision(token: bool, allow_tf32: bool, *inputs: Tensor) -> str:
    """PRECISION of `product`: TF32 only where it loses nothing (mixed half precisions) or is allowed."""
    dtypes = {x.dtype for x in inputs}
    wide = torch.float32 in dtypes
    split = not token or dtypes == {torch.bfloat16}
    if len(dtypes) == 1 and not wide and split and inputs[0].is_cuda:  # the interpreter cannot multiply bfloat16
        return "half"
    # The square of a float16 is the sum of two TF32 numbers.
    wanted = "ieee" if wide and not allow_tf32 else "tf32x3" if token and not allow_tf32 else "tf32"
    return precision_on(generation(inputs[0].device), wanted)


def precision_on(generation: int, wanted: str) -> str:
    """PRECISION that gives what is wanted: AMD has no TF32; for 10.x see `opaque`."""
    if generation == 0 and wanted.startswith("tf32"):
        return "ieee"
    return "guarded" if generation == 10 and wanted == "ieee" else wanted


def rows_of(x: Tensor) -> Tensor:
    """Unit stride along features; any stride along tokens will do."""
    return x if x.shape[1] < 2 or x.stride(1) == 1 else x.contiguous()

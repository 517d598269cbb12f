"""Scores and gates in Triton; the same bits as csrc/rules.h (kernels run with ``enable_fp_fusion=False``)."""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wide_or_zero(ptr, offs, inside):
    """float32 values at ``offs``, zeros where not ``inside`` or where there is no tensor."""
    if ptr is None:  # a branch each: code after a return is compiled for a missing tensor too
        return tl.zeros(offs.shape, tl.float32)
    else:
        return tl.load(ptr + offs, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def scores(delta, grad, fisher, RULE: tl.constexpr):
    """How much moving each weight to its target matters; delta = weight - target."""
    if RULE == "grad":
        return tl.abs(grad)
    elif RULE == "taylor":
        return tl.abs(grad * delta)
    elif RULE == "fisher":
        return fisher * (delta * delta)
    elif RULE == "delta":
        return tl.abs(delta)
    else:
        return grad * delta - 0.5 * fisher * (delta * delta)


@triton.jit
def gated(delta, grad, direction, inside, bits_ptr, bools_ptr, offs, GATE: tl.constexpr):
    """Which weights mask and gate let through. Signs are compared, never products."""
    open = inside
    if bits_ptr is not None:
        byte = tl.load(bits_ptr + offs // 8, mask=inside, other=0).to(tl.int32)
        open = open & (((byte >> (offs % 8).to(tl.int32)) & 1) != 0)
    if bools_ptr is not None:
        open = open & (tl.load(bools_ptr + offs, mask=inside, other=0) != 0)
    if GATE == "descent":
        open = open & (((delta > 0) & (grad > 0)) | ((delta < 0) & (grad < 0)))
    elif GATE == "conflict":
        open = open & (((delta > 0) != (direction > 0)) | ((delta < 0) != (direction < 0)))
    return open

"""The token losses in Triton: one online pass over a row of logits for its loss, one for its gradient.

A row whose label is -100 is not read.
"""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from curvkern.kernels import Ahead

BLOCK = 4096
IGNORED = tl.constexpr(-100)


@triton.jit
def shifted(x, top):
    """exp(x - top), 0 where both are minus infinity."""
    return tl.exp(x - tl.where(top == float("-inf"), 0.0, top))


@triton.jit
def token_loss_kernel(
    loss_ptr, lse_ptr, reference_lse_ptr, logits_ptr, labels_ptr, reference_ptr, rows, vocab, BLOCK: tl.constexpr
):
    """A program per row; sums are kept relative to the largest logit so far. lse: it, and the log of the sum."""
    row = tl.program_id(0).to(tl.int64)
    label = tl.zeros((), tl.int64)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
    if label == IGNORED:
        tl.store(loss_ptr + row, 0.0)
        tl.store(lse_ptr + row, 0.0)
        tl.store(lse_ptr + rows + row, 0.0)
        if reference_ptr is not None:
            tl.store(reference_lse_ptr + row, 0.0)
            tl.store(reference_lse_ptr + rows + row, 0.0)
    else:
        top = tl.full((), float("-inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        reference_top = tl.full((), float("-inf"), tl.float32)
        reference_total = tl.zeros((), tl.float32)
        cross = tl.zeros((), tl.float32)
        for start in range(0, vocab, BLOCK):
            col = start + tl.arange(0, BLOCK)
            inside = col < vocab
            x = tl.load(logits_ptr + row * vocab + col, mask=inside, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * shifted(top, higher) + tl.sum(shifted(x, higher), 0)
            top = higher
            if reference_ptr is not None:
                y = tl.load(reference_ptr + row * vocab + col, mask=inside, other=float("-inf")).to(tl.float32)
                higher = tl.maximum(reference_top, tl.max(y, 0))
                p, shrink = shifted(y, higher), shifted(reference_top, higher)
                reference_total = reference_total * shrink + tl.sum(p, 0)
                cross = cross * shrink + tl.sum(tl.where(p > 0.0, p * (y - x), 0.0), 0)
                reference_top = higher
        spread = tl.log(total)
        tl.store(lse_ptr + row, top)
        tl.store(lse_ptr + rows + row, spread)
        if reference_ptr is not None:
            reference_spread = tl.log(reference_total)
            tl.store(reference_lse_ptr + row, reference_top)
            tl.store(reference_lse_ptr + rows + row, reference_spread)
            loss = cross / reference_total + (top - reference_top) + (spread - reference_spread)
            tl.store(loss_ptr + row, loss)
        else:
            known = (label >= 0) & (label < vocab)
            picked = tl.load(logits_ptr + row * vocab + label, mask=known, other=float("nan")).to(tl.float32)
            tl.store(loss_ptr + row, (top - picked) + spread)


@triton.jit
def token_grad_kernel(
    out_ptr, logits_ptr, labels_ptr, reference_ptr, lse_ptr, reference_lse_ptr, scale_ptr, rows, vocab,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write scale (softmax(logits) - target); without ``logits_ptr`` the logits lie in out."""
    row = tl.program_id(0).to(tl.int64)
    col = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = col < vocab
    at = row * vocab + col
    scale = tl.load(scale_ptr + row)
    label = tl.zeros((), tl.int64)
    if labels_ptr is not None:
        label = tl.load(labels_ptr + row)
    if label == IGNORED:
        tl.store(out_ptr + at, tl.zeros((BLOCK,), out_ptr.dtype.element_ty), mask=inside)
    else:
        if logits_ptr is not None:
            x = tl.load(logits_ptr + at, mask=inside, other=0.0).to(tl.float32)
        else:
            x = tl.load(out_ptr + at, mask=inside, other=0.0).to(tl.float32)
        grad = tl.exp((x - tl.load(lse_ptr + row)) - tl.load(lse_ptr + rows + row))
        if reference_ptr is not None:
            y = tl.load(reference_ptr + at, mask=inside, other=0.0).to(tl.float32)
            grad -= tl.exp((y - tl.load(reference_lse_ptr + row)) - tl.load(reference_lse_ptr + rows + row))
        else:
            grad = tl.where(col == label, grad - 1.0, grad)
        tl.store(out_ptr + at, (scale * grad).to(out_ptr.dtype.element_ty), mask=inside)


def token_loss(logits: Tensor, labels: Tensor | None, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """`curvkern.ops.loss.token_loss_ref` for 16 and 32 bits."""
    rows, vocab = logits.shape
    sizes = ((rows,), (2, rows), (2, rows if reference is not None else 0))
    loss, lse, reference_lse = (torch.empty(size, dtype=torch.float32, device=logits.device) for size in sizes)
    if rows:
        dense = [None if t is None else t.contiguous() for t in (logits, labels, reference)]
        with torch.cuda.device_of(logits):
            token_loss_kernel[(rows,)](loss, lse, reference_lse, *dense, rows, vocab, BLOCK, num_warps=8)
    return loss, lse, reference_lse


def token_grad(
    out: Tensor,
    logits: Tensor | None,
    labels: Tensor | None,
    reference: Tensor | None,
    lse: Tensor,
    reference_lse: Tensor,
    scale: Tensor,
) -> None:
    """`curvkern.ops.loss.token_grad_ref` for 16 and 32 bits; out is contiguous."""
    rows, vocab = out.shape
    if out.numel():
        dense = [None if t is None else t.contiguous() for t in (logits, labels, reference)]
        with torch.cuda.device_of(out):
            token_grad_kernel[(rows, triton.cdiv(vocab, BLOCK))](
                out, *dense, lse, reference_lse, scale.contiguous(), rows, vocab, BLOCK, num_warps=8
            )


_LOGITS = {"logits_ptr": "*bf16", "rows": "i32", "vocab": "i32"}
_SUMS = {"lse_ptr": "*fp32", "reference_lse_ptr": "*fp32"}
_OPTIONS = {"num_warps": 8}

AHEAD_OF_TIME = [
    Ahead(
        token_loss_kernel,
        {**_LOGITS, **_SUMS, "loss_ptr": "*fp32", "labels_ptr": "*i64"},
        {"reference_ptr": None, "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        token_loss_kernel,
        {**_LOGITS, **_SUMS, "loss_ptr": "*fp32", "reference_ptr": "*bf16"},
        {"labels_ptr": None, "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        token_grad_kernel,
        {**_SUMS, "rows": "i32", "vocab": "i32", "out_ptr": "*bf16", "labels_ptr": "*i64", "scale_ptr": "*fp32"},
        {"logits_ptr": None, "reference_ptr": None, "BLOCK": BLOCK},
        _OPTIONS,
    ),
    Ahead(
        token_grad_kernel,
        {**_LOGITS, **_SUMS, "out_ptr": "*bf16", "labels_ptr": "*i64", "reference_ptr": "*bf16", "scale_ptr": "*fp32"},
        {"BLOCK": BLOCK},
        _OPTIONS,
    ),
]

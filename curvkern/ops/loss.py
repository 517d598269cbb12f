r"""Losses over a vocabulary that never hold a wide copy of the logits: cross entropy with signed weights, KL, cosine.

Logits are walked a few rows, or a part of a row, at a time and widened there.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from curvkern.backend import check
from curvkern.ops.score import WEIGHTS
from curvkern.ops.token_loss import IGNORED, row_slices, token_grad_, token_loss, wide

Reduction = Literal["mean", "sum"]

CHUNK = 1 << 26  # bytes of logits made from hidden states at a time


def weighted_cross_entropy(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, *,
    lm_head: Tensor | None = None, reduction: Reduction = "mean", overwrite: bool = False, backend: str = "auto",
) -> Tensor:  # fmt: skip
    r"""Cross entropy with a weight a token, of either sign.

    :math:`\frac1N \sum_k w_k (\log\sum_j e^{x_{kj}} - x_{ky_k})`, where N counts the labels that are not -100.
    Tokens with that label or with weight 0 count for nothing, whatever their logits are, NaN included. STAR-DSS's loss
    has the gradient of this one with
    :math:`w_k = V_k - (1 - V_k) \lambda (\log\pi(y_k) - \log\pi_{ref}(y_k))`, held constant; DeRTa's is this one.

    Args:
        logits: [..., vocabulary]; float32, float16, bfloat16 (reference: float64 too). With ``lm_head``: hidden states
            [..., d], whose logits ``hidden @ lm_head.T`` are made a chunk of tokens (64 MiB) at a time, in their dtype.
        labels: int64 [...], -100 or in the vocabulary; any other makes the loss NaN. They are not shifted.
        weight: floating [...]; None: all 1. Has no derivative.
        lm_head: [vocabulary, d], of the dtype of the hidden states.
        reduction: ``"mean"``, or ``"sum"`` without 1 / N.
        overwrite: let the backward pass put the gradient where the logits were, which saves a tensor of their size. A
            second backward pass is then an error.
        backend: see `use`.

    Returns:
        Scalar, float32 (float64 for float64), differentiable once in logits, or hidden states and ``lm_head``. Softmax
        and sums are float32 inside; gradients have their tensor's dtype, that of ``lm_head`` is summed in float32.
        From hidden states gradients are made in the forward pass, so that no logits are made twice. Memory beside
        them: two numbers a token, 64 MiB and, where ``lm_head`` has a gradient, its size in float32. Deterministic.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: weight requires grad under grad mode.

    Source: Shape it Up! (STAR-DSS, 2505.17196); Yuan et al., DeRTa (2407.09121).
    """
    op = "weighted_cross_entropy"
    check.no_grad(op, weight=weight)
    check.one_of(op, "reduction", reduction, get_args(Reduction))
    _check_logits(op, logits, lm_head, overwrite)
    check.dtype(op, "labels", labels, (torch.int64,))
    tokens = {"labels": labels, "weight": weight}
    _check_tokens(op, logits, **tokens)
    labels = labels.reshape(-1)
    scale = _scale(labels != IGNORED, weight, reduction, wide(logits))
    labels = labels.masked_fill(scale == 0, IGNORED)
    return _loss(logits, lm_head, labels, None, None, scale, overwrite, backend)


def kl_to_reference(
    logits: Tensor, reference: Tensor, mask: Tensor | None = None, *,
    lm_head: Tensor | None = None, reference_head: Tensor | None = None,
    reduction: Reduction = "mean", overwrite: bool = False, backend: str = "auto",
) -> Tensor:  # fmt: skip
    r"""How far a model's predictions are from a reference's.

    :math:`\frac1N\sum_k \sum_j p_{kj}(\log p_{kj} - \log q_{kj})` over the whole vocabulary: p is the softmax
    of the reference, q that of the logits, N the number of tokens that count. The gradient is :math:`(q - p) / N`.

    Args:
        logits: [..., vocabulary], or hidden states with ``lm_head``: see `weighted_cross_entropy`.
        reference: logits of the reference model, like ``logits``; with ``lm_head`` its hidden states [..., e]. Has no
            derivative.
        mask: bool [...]: tokens that count; the others may be NaN. None: all.
        lm_head: [vocabulary, d].
        reference_head: [vocabulary, e] of the reference model. None: ``lm_head``, without its gradient.
        reduction: ``"mean"``, or ``"sum"`` without 1 / N.
        overwrite: see `weighted_cross_entropy`.
        backend: see `use`.

    Returns:
        Scalar as of `weighted_cross_entropy`; 0 for equal logits. A logit of minus infinity is a word that cannot be
        said: where only the model excludes it, the divergence is infinite. Deterministic.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: the reference requires grad under grad mode.

    Source: the alignment loss of SafeGrad (2508.07172), eq. 6, over the tokens of the mask alone.
    """
    op = "kl_to_reference"
    check.no_grad(op, reference=reference, reference_head=reference_head)
    check.one_of(op, "reduction", reduction, get_args(Reduction))
    _check_logits(op, logits, lm_head, overwrite)
    check.dtype(op, "mask", mask, (torch.bool,))
    _check_tokens(op, logits, mask=mask)
    if lm_head is not None:
        reference_head = lm_head.detach() if reference_head is None else reference_head
        check.shape(op, "reference_head", reference_head, (len(lm_head), reference.shape[-1]), "[vocabulary, e]")
        check.shape(op, "reference", reference, (*logits.shape[:-1], reference.shape[-1]), "the tokens of logits")
    else:
        check.same_shape(op, logits=logits, reference=reference)
    check.dtype(op, "reference", reference, WEIGHTS)
    check.same_dtype(op, reference=reference, reference_head=reference_head)
    check.same_device(op, logits=logits, reference=reference, reference_head=reference_head)
    counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask
    scale = _scale(counted.reshape(-1), None, reduction, wide(logits))
    labels = torch.where(scale == 0, IGNORED, 0)
    rows = reference.reshape(-1, reference.shape[-1])
    return _loss(logits, lm_head, labels, rows, reference_head, scale, overwrite, backend)


def hidden_cosine_loss(hidden: Tensor, anchor: Tensor, *, mask: Tensor | None = None) -> Tensor:
    r"""Minus the cosine of a batch's mean last-token hidden state to an anchor, :math:`-\cos(\bar h, a)`.

    Args:
        hidden: [n, d], the last tokens' states; or [n, t, d], of which the last position is taken, or with ``mask``
            each row's last token.
        anchor: a, [d].
        mask: bool [n, t]: which positions are tokens, on either side of the padding. Each row needs one.

    Returns:
        Scalar, float32 (float64 if hidden is), differentiable in both by torch's own operations; 0 where either vector
        is 0.

    Raises:
        TypeError, ValueError: arguments that do not fit, or an empty batch.

    Source: Yang et al. (2504.09757), section IV.
    """
    op = "hidden_cosine_loss"
    check.dtype(op, "hidden", hidden, WEIGHTS)
    check.dtype(op, "anchor", anchor, WEIGHTS)
    if hidden.ndim not in (2, 3) or hidden.shape[:-1].numel() == 0:
        raise ValueError(f"{op}: hidden has shape {list(hidden.shape)}; wanted [n, d] or [n, t, d], not empty.")
    check.shape(op, "anchor", anchor, hidden.shape[-1:], "one number a feature of hidden")
    check.dtype(op, "mask", mask, (torch.bool,))
    check.shape(op, "mask", mask, hidden.shape[:2] if hidden.ndim == 3 else (), "[n, t], for hidden [n, t, d]")
    check.same_device(op, hidden=hidden, anchor=anchor, mask=mask)
    if mask is not None:
        last = (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(1)
        hidden = hidden.take_along_dim(last[:, None, None], 1)[:, 0]
    elif hidden.ndim == 3:
        hidden = hidden[:, -1]
    mean = hidden.to(wide(hidden)).mean(0)
    return -torch.nn.functional.cosine_similarity(mean, anchor.to(mean.dtype), dim=0)


def _loss(
    logits: Tensor, lm_head: Tensor | None, labels: Tensor, reference: Tensor | None, reference_head: Tensor | None,
    scale: Tensor, overwrite: bool, backend: str,
) -> Tensor:  # fmt: skip
    rows = logits.reshape(-1, logits.shape[-1])
    if lm_head is not None:
        return _FromHidden.apply(rows, lm_head, labels, reference, reference_head, scale, backend)
    return _FromLogits.apply(rows, labels, reference, scale, overwrite, backend)


def _scale(counted: Tensor, weight: Tensor | None, reduction: str, dtype: torch.dtype) -> Tensor:
    """Per token: its weight, 0 if it does not count, over the number that do."""
    scale = counted.to(dtype) if weight is None else torch.where(counted, weight.reshape(-1).to(dtype), 0)
    return scale / counted.sum().clamp(min=1) if reduction == "mean" else scale


class _FromLogits(torch.autograd.Function):
    """sum_k scale_k loss_k of given logits; the gradient is made in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, labels: Tensor, reference: Tensor | None, scale: Tensor, overwrite: bool, backend: str
    ) -> Tensor:
        loss, lse, reference_lse = token_loss(logits.detach(), labels, reference, backend)
        ctx.save_for_backward(logits, labels, reference, lse, reference_lse, scale)
        ctx.overwrite, ctx.backend = overwrite, backend
        return (scale * loss).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        logits, labels, reference, lse, reference_lse, scale = ctx.saved_tensors
        x = logits.detach()  # shares the version, so that logits overwritten once cannot be used again
        out = x if ctx.overwrite else x.new_empty(x.shape)
        read = None if ctx.overwrite else x
        token_grad_(out, read, labels, reference, lse, reference_lse, scale * grad, ctx.backend)
        return out, None, None, None, None, None


class _FromHidden(torch.autograd.Function):
    """The same from hidden states; a chunk's logits become their own gradient and are used up at once."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, lm_head: Tensor, labels: Tensor, reference: Tensor | None,
        reference_head: Tensor | None, scale: Tensor, backend: str,
    ) -> Tensor:  # fmt: skip
        wants_hidden, wants_head = ctx.needs_input_grad[:2]
        total = torch.zeros((), dtype=wide(hidden), device=hidden.device)
        grad_hidden = hidden.new_empty(hidden.shape) if wants_hidden else None
        grad_head = torch.zeros_like(lm_head, dtype=total.dtype) if wants_head else None
        with torch.autocast(hidden.device.type, enabled=False):
            for rows in row_slices(len(hidden), len(lm_head) * hidden.element_size(), CHUNK):
                # Zeroed, as 0 * NaN of a token that does not count would reach the gradient of the head.
                h = hidden[rows].masked_fill((labels[rows] == IGNORED)[:, None], 0)
                x = h @ lm_head.mT
                y = None if reference is None or reference_head is None else reference[rows] @ reference_head.mT
                loss, lse, reference_lse = token_loss(x, labels[rows], y, backend)
                total += (scale[rows] * loss).sum()
                if wants_hidden or wants_head:
                    token_grad_(x, None, labels[rows], y, lse, reference_lse, scale[rows], backend)
                if grad_hidden is not None:
                    torch.mm(x, lm_head, out=grad_hidden[rows])
                if grad_head is not None:
                    grad_head += x.mT @ h
        ctx.save_for_backward(grad_hidden, None if grad_head is None else grad_head.to(lm_head.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        made = (None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors)
        return *made, None, None, None, None, None


# reference ------------------------------------------------------------------------------------------------------------


def weighted_cross_entropy_ref(
    logits: Tensor, labels: Tensor, weight: Tensor | None = None, lm_head: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """The definition of `weighted_cross_entropy`, in plain torch that autograd can follow; holds everything at once."""
    counted = (labels != IGNORED).reshape(-1)
    scale = _scale(counted, weight, reduction, wide(logits))
    used = scale != 0
    rows = logits.reshape(-1, logits.shape[-1])[used]
    x = rows if lm_head is None else rows @ lm_head.mT
    picked = x.to(scale.dtype).log_softmax(1).gather(1, labels.reshape(-1)[used, None])[:, 0]
    return -(scale[used] * picked).sum()


def kl_to_reference_ref(
    logits: Tensor, reference: Tensor, mask: Tensor | None = None, lm_head: Tensor | None = None,
    reference_head: Tensor | None = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """The definition of `kl_to_reference`, in plain torch that autograd can follow; holds everything at once."""
    counted = torch.ones(logits.shape[:-1], dtype=torch.bool, device=logits.device) if mask is None else mask
    x, y = logits[counted], reference[counted]
    if lm_head is not None:
        x, y = x @ lm_head.mT, y @ (lm_head.detach() if reference_head is None else reference_head).mT
    p, log_p, log_q = y.to(wide(x)).softmax(1), y.to(wide(x)).log_softmax(1), x.to(wide(x)).log_softmax(1)
    total = torch.where(p > 0, p * (log_p - log_q), 0).sum()
    return total / counted.sum().clamp(min=1) if reduction == "mean" else total


# checks ---------------------------------------------------------------------------------------------------------------


def _check_logits(op: str, logits: Tensor, lm_head: Tensor | None, overwrite: bool) -> None:
    check.dtype(op, "logits", logits, WEIGHTS)
    if logits.ndim == 0 or (lm_head is not None and lm_head.ndim != 2):
        raise ValueError(
            f"{op}: wanted logits [..., vocabulary], or hidden states [..., d] and lm_head [vocabulary, d]."
        )
    if lm_head is not None:
        check.same_dtype(op, logits=logits, lm_head=lm_head)
        check.shape(op, "lm_head", lm_head, (len(lm_head), logits.shape[-1]), "[vocabulary, d] beside hidden [..., d]")
        check.same_device(op, logits=logits, lm_head=lm_head)
    elif overwrite and (not logits.is_contiguous() or (logits.is_leaf and logits.requires_grad)):
        raise ValueError(
            f"{op}: overwrite needs contiguous logits that a model computed (no leaf). Pass overwrite=False."
        )


def _check_tokens(op: str, logits: Tensor, **tokens: Tensor | None) -> None:
    """Labels, weights and masks: one a token."""
    for name, tensor in tokens.items():
        check.shape(op, name, tensor, logits.shape[:-1], "one a token")
    check.same_device(op, logits=logits, **tokens)
    if (weight := tokens.get("weight")) is not None:
        check.dtype(op, "weight", weight, WEIGHTS)

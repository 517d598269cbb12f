"""Loss and gradient of rows of logits, on which loss's functions work."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from curvkern.backend import launch
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register

IGNORED = -100
WIDENED = 1 << 19  # logits the reference widens at a time: 2 MiB of float32


def wide(*tensors: Tensor) -> torch.dtype:
    """Float64 if any of them is, else float32."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def row_slices(rows: int, size: int, limit: int) -> Iterator[slice]:
    """[0, rows) in equal runs, the last may be shorter, of as many rows of ``size`` as ``limit`` holds."""
    step = max(1, limit // max(size, 1))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def token_loss_ref(logits: Tensor, labels: Tensor | None, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Per row: cross entropy of its label, or KL from the reference; `_normaliser` of logits and of reference.

    All are 0 where the label is -100. [rows], [2, rows], and [2, rows] or without a reference [2, 0].
    """
    dtype, rows = wide(logits), len(logits)
    loss, lse = logits.new_zeros(rows, dtype=dtype), logits.new_zeros(2, rows, dtype=dtype)
    reference_lse = logits.new_zeros(2, rows if reference is not None else 0, dtype=dtype)
    for part in row_slices(rows, logits.shape[1], WIDENED):
        x = logits[part].to(dtype)
        top, spread = _normaliser(lse[:, part], x)
        if reference is not None:
            y = reference[part].to(dtype)
            reference_top, reference_spread = _normaliser(reference_lse[:, part], y)
            p = ((y - reference_top[:, None]) - reference_spread[:, None]).exp_()
            cross = torch.where(p > 0, p * (y - x), 0).sum(1)
            loss[part] = cross + (top - reference_top) + (spread - reference_spread)
        elif labels is not None:
            at = labels[part, None]
            known = (at >= 0) & (at < x.shape[1])
            picked = x.gather(1, torch.where(known, at, 0)).masked_fill(~known, float("nan"))
            loss[part] = (top - picked[:, 0]) + spread
    if labels is not None:
        for sums in (loss, lse) if reference is None else (loss, lse, reference_lse):
            sums.masked_fill_(labels == IGNORED, 0)
    return loss, lse, reference_lse


def _normaliser(out: Tensor, x: Tensor) -> Tensor:
    """Largest logit and log of the sum of exp(x - largest), kept apart: their sum would round the second away."""
    top = x.amax(1)
    return out.copy_(torch.stack([top, (x - top[:, None]).exp_().sum(1).log_()]))


def token_grad_ref(
    out: Tensor,
    logits: Tensor | None,
    labels: Tensor | None,
    reference: Tensor | None,
    lse: Tensor,
    reference_lse: Tensor,
    scale: Tensor,
) -> None:
    """Write scale (softmax(logits) - target), 0 where the label is -100; without logits they lie in ``out``."""
    for part in row_slices(len(out), out.shape[1], WIDENED):
        grad = _softmax((out if logits is None else logits)[part], lse[:, part])
        if reference is not None:
            grad -= _softmax(reference[part], reference_lse[:, part])
        elif labels is not None:
            at = labels[part, None]
            known = (at >= 0) & (at < out.shape[1])
            grad.scatter_add_(1, torch.where(known, at, 0), -known.to(grad.dtype))
        grad *= scale[part, None]
        if labels is not None:
            grad.masked_fill_(labels[part, None] == IGNORED, 0)
        out[part] = grad


def _softmax(x: Tensor, lse: Tensor) -> Tensor:
    return (x.to(lse.dtype) - lse[0, :, None]).sub_(lse[1, :, None]).exp_()


# checks ---------------------------------------------------------------------------------------------------------------


def _check_rows(logits: Tensor, *_: object) -> None:
    if logits.ndim != 2:
        raise ValueError(f"token_loss: logits has shape {list(logits.shape)}; wanted [tokens, vocabulary].")


def _refuse(*arguments: object) -> str | None:
    double = any(isinstance(argument, Tensor) and argument.dtype == torch.float64 for argument in arguments)
    return "float64 runs on the reference only" if double else None


def _fake_token_loss(logits: Tensor, labels: Tensor | None, reference: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    rows, dtype = len(logits), wide(logits)
    sizes = ((rows,), (2, rows), (2, rows if reference is not None else 0))
    loss, lse, reference_lse = (logits.new_empty(size, dtype=dtype) for size in sizes)
    return loss, lse, reference_lse


# native ---------------------------------------------------------------------------------------------------------------


def _native_token_loss(logits: Tensor, labels: Tensor | None, reference: Tensor | None) -> tuple[Tensor, ...]:
    rows, vocab = logits.shape
    sums = [torch.empty(size) for size in ((rows,), (2, rows), (2, rows if reference is not None else 0))]
    dense = [None if t is None else t.contiguous() for t in (logits, labels, reference)]
    codes = (logits.dtype, logits.dtype if reference is None else reference.dtype)
    launch.native_op("token_loss", logits.device, *sums, *dense, rows, vocab, *codes)
    return tuple(sums)


def _native_token_grad(
    out: Tensor,
    logits: Tensor | None,
    labels: Tensor | None,
    reference: Tensor | None,
    lse: Tensor,
    reference_lse: Tensor,
    scale: Tensor,
) -> None:
    dense = [None if t is None else t.contiguous() for t in (logits, labels, reference, lse, reference_lse, scale)]
    codes = (out.dtype, out.dtype if reference is None else reference.dtype)
    launch.native_op("token_grad", out.device, out, *dense, *out.shape, *codes)


token_loss = register(
    "token_loss(Tensor logits, Tensor? labels, Tensor? reference, str backend) -> (Tensor, Tensor, Tensor)",
    check=_check_rows,
    fake=_fake_token_loss,
    routes=(
        Route("cpu", _native_token_loss, _refuse),
        Route("triton", lazily("curvkern.kernels.loss:token_loss"), _refuse),
        Route("reference", token_loss_ref),
    ),
)

token_grad_ = register(
    "token_grad_(Tensor(a!) out, Tensor? logits, Tensor? labels, Tensor? reference, Tensor lse, Tensor reference_lse, "
    "Tensor scale, str backend) -> ()",
    check=_check_rows,
    routes=(
        Route("cpu", _native_token_grad, _refuse),
        Route("triton", lazily("curvkern.kernels.loss:token_grad"), _refuse),
        Route("reference", token_grad_ref),
    ),
)

"""Losses of batches, and the labels that the kinds of Fisher put in the place of the data's."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, pad

from curvkern.curvature.hidden import CurvatureError
from curvkern.curvature.texts import UNLABELLED, Batch
from curvkern.ops import weighted_cross_entropy

Loss = Callable[[Tensor, Tensor], Tensor]


def backward_losses(model: Any, batch: Batch, loss: str | Loss, *, skip: bool = False) -> float | None:
    """A backward pass of a batch, and the sum of its losses; neither, where one is not finite and ``skip`` is set."""
    total = total_loss(model, batch, loss)
    if not bool(total.isfinite()):
        with torch.no_grad():
            if not finite(losses_of(model, batch, loss), batch, skip=skip):
                return None
    total.backward()
    return float(total.detach())


def total_loss(model: Any, batch: Batch, loss: str | Loss) -> Tensor:
    """The sum of `losses_of`, once differentiable: its gradient takes the place of the logits, the largest tensor."""
    return total_of(logits_of(model, batch), batch, loss)


def total_of(logits: Tensor, batch: Batch, loss: str | Loss) -> Tensor:
    """`total_loss` from logits."""
    if not isinstance(loss, str):
        return loss(logits, batch.labels).sum()
    labels = _moved(batch.labels, UNLABELLED)
    weights = None if batch.weights is None else _moved(batch.weights, 0.0)
    if weights is None and loss == "response_mean":
        weights = (1 / (labels != UNLABELLED).sum(1, keepdim=True)).expand(labels.shape)
    return weighted_cross_entropy(logits, labels, weights, reduction="sum", overwrite=True)


def logits_of(model: Any, batch: Batch) -> Tensor:
    """[n, t, vocabulary]."""
    return model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits


def _moved(of_labels: Tensor, fill: float) -> Tensor:
    """What belongs to a label, where the logits are that predict it."""
    return pad(of_labels[:, 1:], (0, 1), value=fill)


def losses_of(model: Any, batch: Batch, loss: str | Loss) -> Tensor:
    """[n], in float32; of weighted labels [1]."""
    return each_of(logits_of(model, batch), batch, loss)


def each_of(logits: Tensor, batch: Batch, loss: str | Loss) -> Tensor:
    """`losses_of` from logits."""
    if not isinstance(loss, str):
        return loss(logits, batch.labels)
    labels = _moved(batch.labels, UNLABELLED)
    kept, flat = labels != UNLABELLED, logits.flatten(0, 1)
    rows = kept.flatten().nonzero().flatten()
    if 2 * len(rows) < len(flat):
        tokens = cross_entropy(flat.index_select(0, rows).float(), labels.flatten()[rows], reduction="none")
        per_token = torch.zeros(labels.numel(), device=logits.device).index_put((rows,), tokens).view(labels.shape)
    else:
        per_token = cross_entropy(flat.float(), labels.flatten(), reduction="none", ignore_index=UNLABELLED)
        per_token = per_token.view(labels.shape)
    if batch.weights is not None:
        return (per_token * _moved(batch.weights, 0.0)).sum()[None]
    return per_token.sum(1) / kept.sum(1) if loss == "response_mean" else per_token.sum(1)


def finite(losses: Tensor, batch: Batch, skip: bool) -> bool:
    """Whether all losses are; raises where one is not, unless ``skip`` is set."""
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad and not skip:
        rows = ", ".join(str(batch.first + at + 1) for at in bad[:8])
        raise CurvatureError(
            f"estimate: the loss of rows {rows} is not finite; look at the data and the model, or pass "
            "non_finite='skip' to leave such batches out"
        )
    return not bad


def relabelled(model: Any, batch: Batch, fisher_type: str, draws: int, seed: int, loss: str | Loss) -> Iterator[Batch]:
    """The batch with the labels that the kind of Fisher asks for."""
    if fisher_type == "empirical":
        yield batch
        return
    with torch.no_grad():
        logits = logits_of(model, batch)
    shares = logits.double().softmax(-1)
    if fisher_type == "mc":
        for draw in range(draws):
            yield replace(batch, labels=drawn(shares, batch, f"{seed}/{draw}"))
    else:
        yield from _all_labels(shares, batch, loss)


def drawn(shares: Tensor, batch: Batch, seed: str) -> Tensor:
    """Labels drawn from the model, by a uniform number for each row and place: the same in every batch."""
    labels = batch.labels.clone()
    for row in range(len(labels)):
        at = (labels[row, 1:] != UNLABELLED).nonzero().flatten()
        generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}/{batch.first + row}".encode()))
        uniform = torch.rand(len(at), generator=generator, dtype=torch.float64).to(labels.device)
        cumulative = shares[row, at].cumsum(-1)
        drawn = torch.searchsorted(cumulative, uniform[:, None] * cumulative[:, -1:]).flatten()
        labels[row, at + 1] = drawn.clamp(max=shares.shape[-1] - 1)
    return labels


def _all_labels(shares: Tensor, batch: Batch, loss: str | Loss) -> Iterator[Batch]:
    """For each row and place a batch of copies, one for each label, whose loss carries the root of its probability.

    Gradients of different places are uncorrelated under the model's own labels, so that squares add up.
    """
    for row in range(len(batch.ids)):
        places = (batch.labels[row, 1:] != UNLABELLED).nonzero().flatten().tolist()
        for place in places:
            vocabulary = shares.shape[-1]
            labels = torch.full_like(batch.labels[row], UNLABELLED).repeat(vocabulary, 1)
            labels[:, place + 1] = torch.arange(vocabulary, device=labels.device)
            weights = torch.zeros(labels.shape, device=labels.device)
            weights[:, place + 1] = shares[row, place].sqrt().float() / (len(places) if loss == "response_mean" else 1)
            copies = (x[row].repeat(vocabulary, 1) for x in (batch.ids, batch.mask))
            ids, mask = copies
            yield Batch(batch.first + row, ids, labels, mask, weights)

"""Which data pull a model the way other data do: inner products of per-sample gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from curvkern.curvature.capture import Pair, Site
from curvkern.curvature.losses import Loss, backward_losses
from curvkern.curvature.resident import measured
from curvkern.curvature.texts import batches, checked, from_rows
from curvkern.ops import sample_dots


def influence(
    model: Any,
    data: Iterable[Any],
    queries: Iterable[Any],
    *,
    loss: str | Loss = "response_mean",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    batch_tokens: int = 4096,
    max_length: int | None = None,
) -> Tensor:
    r"""Inner products :math:`\langle G_n, G_m \rangle` of the gradients of data and of queries, without any gradient.

    A step of descent on sample n changes the loss of query m by :math:`-\eta \langle G_n, G_m\rangle`, to first order
    (TracIn at one checkpoint, Pruthi et al. 2020, 2002.08484). Weights without their biases.

    Args:
        model: as in `estimate`; left as it was.
        data: rows, as in `estimate`.
        queries: rows; the inputs and output gradients of all of them are kept while data go by.
        loss: as in `estimate`.
        include: as in `estimate`.
        exclude: as in `estimate`.
        batch_tokens: as in `estimate`.
        max_length: as in `estimate`.

    Returns:
        Float32 [data, queries].

    Raises:
        CurvatureError: as `estimate`.
    """
    texts, asked = (checked(from_rows(rows), max_length) for rows in (data, queries))
    kept: list[tuple[int, dict[str, Pair]]] = []

    def keep(site: Site, pair: Pair) -> None:
        kept[-1][1][site.name] = pair

    with measured(model, include, exclude, ("linear", "experts"), asked[0], keep) as started:
        for batch in batches(asked, batch_tokens, model.device):
            kept.append((batch.first, {}))
            started(batch)
            backward_losses(model, batch, loss)
    out = torch.zeros(len(texts), len(asked), device=model.device)
    at = 0

    def add(site: Site, pair: Pair) -> None:
        for first, pairs in kept:
            for dots in _dots(pair, pairs[site.name]):
                out[at : at + dots.shape[0], first : first + dots.shape[1]] += dots

    with measured(model, include, exclude, ("linear", "experts"), texts[0], add) as started:
        for batch in batches(texts, batch_tokens, model.device):
            at = batch.first
            started(batch)
            backward_losses(model, batch, loss)
    return out


def _dots(one: Pair, other: Pair) -> Iterator[Tensor]:
    """[n, m]; of fused experts one for each, as only the runs of one expert share its weight."""
    sides = (one.grad_output, one.activation, other.grad_output, other.activation)
    if one.segments is None or one.cu_seqlens is None or other.cu_seqlens is None:
        yield sample_dots(*sides, mask1=one.mask, mask2=other.mask)
        return
    experts = len(one.segments) - 1
    runs = [(len(pair.cu_seqlens) - 1) // experts for pair in (one, other)]  # pyright: ignore[reportArgumentType]
    for start1, start2 in zip(range(0, experts * runs[0], runs[0]), range(0, experts * runs[1], runs[1]), strict=True):
        ends = (one.cu_seqlens[start1 : start1 + runs[0] + 1], other.cu_seqlens[start2 : start2 + runs[1] + 1])
        yield sample_dots(*sides, cu_seqlens1=ends[0].contiguous(), cu_seqlens2=ends[1].contiguous())

"""One call from a causal language model and data to the curvature statistics that restoration needs."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from curvkern.backend import check
from curvkern.curvature.capture import count_uses, linear_sites, select, tapped
from curvkern.curvature.experts import expert_sites, experts_tapped
from curvkern.curvature.hidden import CurvatureError
from curvkern.curvature.statistics import Choices, Counts, Statistics, fingerprint
from curvkern.curvature.sums import QUANTITIES, Sums
from curvkern.curvature.texts import UNLABELLED, Batch, Text, batches, checked, from_row
from curvkern.curvature.texts import fingerprint as data_fingerprint

Loss = Callable[[Tensor, Tensor], Tensor]
Sample = Literal["sequence", "token", "batch"]
FisherType = Literal["empirical", "mc", "type-2"]


def estimate(
    model: Any,
    data: Iterable[Any],
    *,
    quantity: str | Sequence[str] = "fisher_diag",
    sample: Sample = "sequence",
    fisher_type: FisherType = "empirical",
    loss: Literal["response_mean", "token_sum"] | Loss = "response_mean",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    block: tuple[int, int] = (128, 128),
    mc_samples: int = 1,
    seed: int = 0,
    batch_tokens: int = 4096,
    max_length: int | None = None,
    non_finite: Literal["raise", "skip"] = "raise",
    tell: Callable[[int, int], None] = lambda done, total: None,
) -> Statistics:
    r"""Sum statistics of the loss's per-sample weight gradients over data.

    The loss of a sample is the cross-entropy of its labelled tokens, their mean (``"response_mean"``) or sum
    (``"token_sum"``); samples are summed. :math:`G_n` is the gradient of sample n's loss by a weight.

    Quantities: ``gradient`` :math:`\sum_n G_n`; ``fisher_diag`` :math:`\sum_n G_n^2`; ``fisher_blocks``, the sums of
    that over tiles; ``abs_gradient`` :math:`\sum_n |G_n|`; ``sample_norms`` :math:`\|G_n\|^2`, one a sample; ``kfac``:
    the Gram matrices of inputs and output gradients, ``input_gram`` :math:`\sum_t x_t x_t^\top` and ``output_gram``.
    Nothing of the shape [samples, out, in] exists.

    Args:
        model: a causal language model of transformers, in memory; left as it was. PEFT models too: then the weights of
            the adapter are linear modules like others.
        data: mappings with ``input_ids`` and ``labels`` (-100: no loss), or `texts.Text`; padding does not change sums.
        quantity: one or several of the above.
        sample: what is squared: a sequence's gradient, a token's, or that of a batch of ``batch_tokens``.
        fisher_type: labels from the data (``"empirical"``), drawn from the model (``"mc"``; the same for every
            batching), or all in turn, weighted (``"type-2"``: exact; a backward for each target and label).
        loss: a name, or a callable of logits [n, t, vocabulary] and labels [n, t] that gives [n]; labels are -100 where
            no loss is, and logits at t predict labels at t + 1.
        include: patterns on parameter names; empty: linear and expert weights inside numbered layers.
        exclude: patterns of weights to leave out.
        block: sides of the tiles of ``fisher_blocks``.
        mc_samples: draws of labels per sample.
        seed: of the draws.
        batch_tokens: tokens of a batch, padding included.
        max_length: tokens of a sample; the rest is cut off.
        non_finite: what becomes of a batch whose loss is not finite.
        tell: called with (samples done, samples in all).

    Returns:
        Raw float32 sums with counts and choices, see `Statistics`.

    Raises:
        CurvatureError: data without loss (names rows), patterns that match nothing (says what there is), a loss that is
            not finite (names rows), arguments that do not fit.

    Source: Kunstner et al. 2019 (1905.12558) on the kinds of Fisher; Martens and Grosse 2015 (1503.05671), K-FAC.
    """
    wanted = (quantity,) if isinstance(quantity, str) else tuple(quantity)
    _check(wanted, sample, fisher_type, mc_samples)
    texts = checked([from_row(row) for row in data], max_length)
    draws = mc_samples if fisher_type == "mc" else 1
    sums, counts = Sums(wanted, sample, block, len(texts)), Counts(data=(data_fingerprint(texts),))
    with _measured(model, include, exclude, texts[0], sums) as begin:
        for batch in batches(texts, batch_tokens, model.device):
            kept = True
            for part in _relabelled(model, batch, fisher_type, draws, seed, loss):
                begin(part)
                sums.first = batch.first
                losses = _losses(model, part, loss)
                kept = _finite(losses, batch, skip=non_finite == "skip")
                if not kept:
                    break
                losses.sum().backward()
            if kept:
                counts += Counts(
                    samples=len(batch.ids) * draws,
                    tokens=int(batch.mask.sum()) * draws,
                    targets=int((batch.labels[:, 1:] != UNLABELLED).sum()) * draws,
                )
            tell(batch.first + len(batch.ids), len(texts))
    choices = Choices(
        model=fingerprint(model.named_parameters()),
        sample=sample,
        fisher_type=fisher_type,
        loss=loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__name__),
        block=block,
        mc_samples=draws,
        seed=seed,
        dtype=str(model.dtype).removeprefix("torch."),
    )
    found = set(sums.names())
    return Statistics(choices, counts, sums.found, tuple(n for n, _ in model.named_parameters() if n not in found))


def _check(wanted: Sequence[str], sample: str, fisher_type: str, mc_samples: int) -> None:
    for quantity in wanted:
        check.one_of("estimate", "quantity", quantity, QUANTITIES)
    check.one_of("estimate", "sample", sample, get_args(Sample))
    check.one_of("estimate", "fisher_type", fisher_type, get_args(FisherType))
    check.at_least("estimate", "mc_samples", mc_samples, 1)
    if fisher_type == "type-2" and sample != "sequence":
        raise CurvatureError("estimate: fisher_type='type-2' weighs whole samples; it takes sample='sequence' alone")


@contextmanager
def _measured(
    model: Any, include: Sequence[str], exclude: Sequence[str], text: Text, sums: Sums
) -> Generator[Callable[[Batch], None]]:
    """Inside, backward passes add to ``sums``; gives what is told of each batch before it runs."""
    current: list[Batch] = []

    def mask() -> Tensor:
        return current[-1].mask

    linear, experts = select([*linear_sites(model), *expert_sites(model)], include, exclude)
    with _ready(model):
        ids = torch.tensor([text.ids], device=model.device)
        uses = count_uses(linear, lambda: model(input_ids=ids, use_cache=False))
        used = [site for site in linear if uses[site.name]]
        with tapped(used, uses, sums.add, mask), experts_tapped(model, experts, sums.add, mask):
            yield lambda batch: current.__setitem__(slice(None), [batch])


@contextmanager
def _ready(model: nn.Module) -> Generator[None]:
    """In eval mode, with a graph from the embeddings on, and no parameter that wants a gradient; then as before."""
    training, wanted = model.training, [p for p in model.parameters() if p.requires_grad]
    embeddings: nn.Module = model.get_input_embeddings()  # pyright: ignore[reportCallIssue, reportAssignmentType]
    handle = embeddings.register_forward_hook(lambda module, arguments, output: output.requires_grad_())
    try:
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        yield
    finally:
        handle.remove()
        for parameter in wanted:
            parameter.requires_grad_(True)
        model.train(training)


def _losses(model: Any, batch: Batch, loss: str | Loss) -> Tensor:
    """[n], in float32."""
    logits: Tensor = model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
    if not isinstance(loss, str):
        return loss(logits, batch.labels)
    labels = batch.labels[:, 1:]
    kept = labels != UNLABELLED
    tokens = cross_entropy(logits[:, :-1][kept].float(), labels[kept], reduction="none")
    if batch.weights is not None:
        return (tokens * batch.weights[:, 1:][kept]).sum()[None]
    per_token = torch.zeros(labels.shape, device=logits.device).masked_scatter(kept, tokens)
    return per_token.sum(1) / kept.sum(1) if loss == "response_mean" else per_token.sum(1)


def _finite(losses: Tensor, batch: Batch, skip: bool) -> bool:
    bad = (~losses.isfinite()).nonzero().flatten().tolist()
    if bad and not skip:
        rows = ", ".join(str(batch.first + at + 1) for at in bad[:8])
        raise CurvatureError(
            f"estimate: the loss of rows {rows} is not finite; look at the data and the model, or pass "
            "non_finite='skip' to leave such batches out"
        )
    return not bad


def _relabelled(model: Any, batch: Batch, fisher_type: str, draws: int, seed: int, loss: str | Loss) -> Iterator[Batch]:
    """The batch with the labels that the kind of Fisher asks for."""
    if fisher_type == "empirical":
        yield batch
        return
    with torch.no_grad():
        logits = model(input_ids=batch.ids, attention_mask=batch.mask.long(), use_cache=False).logits
    shares = logits.double().softmax(-1)
    if fisher_type == "mc":
        for draw in range(draws):
            yield replace(batch, labels=_drawn(shares, batch, f"{seed}/{draw}"))
    else:
        yield from _all_labels(shares, batch, loss)


def _drawn(shares: Tensor, batch: Batch, seed: str) -> Tensor:
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

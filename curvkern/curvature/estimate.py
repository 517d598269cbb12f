"""One call from a causal language model and data to the curvature statistics that restoration needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from curvkern.backend import check
from curvkern.curvature.capture import KINDS, Kind, Sink, count_uses, select, sites_of, tapped
from curvkern.curvature.experts import expert_sites, experts_tapped
from curvkern.curvature.hessian import Probes, twice_differentiable
from curvkern.curvature.hidden import CurvatureError
from curvkern.curvature.losses import Loss, backward_losses, finite, losses_of, relabelled
from curvkern.curvature.statistics import ROWS, Choices, Counts, Statistics, fingerprint
from curvkern.curvature.sums import QUANTITIES, Block, RotatedSums, Sums
from curvkern.curvature.texts import UNLABELLED, Batch, Text, batches, checked, from_rows
from curvkern.curvature.texts import fingerprint as data_fingerprint

Sample = Literal["sequence", "token", "batch"]
LossName = Literal["response_mean", "token_mean", "token_sum"]
FisherType = Literal["empirical", "mc", "type-2"]


def estimate(
    model: Any,
    data: Iterable[Any],
    *,
    quantity: str | Sequence[str] = "fisher_diag",
    sample: Sample = "sequence",
    fisher_type: FisherType = "empirical",
    loss: LossName | Loss = "response_mean",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    kinds: Sequence[Kind] = ("linear", "experts"),
    block: Block = (128, 128),
    mc_samples: int = 1,
    seed: int = 0,
    batch_tokens: int = 4096,
    max_length: int | None = None,
    probes: int = 8,
    hvp: Literal["exact", "difference"] = "exact",
    non_finite: Literal["raise", "skip"] = "raise",
    tell: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] = lambda: False,
    resume: Statistics | None = None,
) -> Statistics:
    r"""Sum statistics of the loss's per-sample weight gradients over data.

    The loss of a sample is the cross-entropy of its labelled tokens, their mean (``"response_mean"``) or sum
    (``"token_sum"``; and ``"token_mean"``, which `Statistics.mean` divides by the mean number of targets); samples are
    summed. :math:`G_n` is the gradient of sample n's loss by a weight.

    - ``gradient`` :math:`\sum_n G_n`; ``abs_gradient`` :math:`\sum_n |G_n|` (SNIP).
    - ``fisher_diag`` :math:`\sum_n G_n^2`; ``fisher_blocks``, the sums of that over tiles; ``sample_norms``
      :math:`\|G_n\|^2`, one a sample.
    - ``gauss_newton_diag``: the same square under drawn labels and summed losses, whose expectation is the diagonal of
      the generalised Gauss-Newton matrix (Gauss-Newton-Bartlett, by samples).
    - ``input_gram`` :math:`\sum_t x_t x_t^\top`, one for modules with the same inputs; ``kfac``: that, and
      ``output_gram`` of output gradients.
    - ``ekfac``: ``input_basis`` and ``output_basis``, the eigenvectors of these, and ``ekfac``, the diagonal Fisher in
      that basis; a second sweep over the data.
    - ``hessian_diag`` by Hutchinson: the mean of :math:`v \odot Hv` over ``probes``, with exact products; and
      ``hessian_trace``, :math:`v^\top Hv` of each probe, for standard errors (`Statistics.trace_error`).
    - ``low_rank``: every :math:`G_n` in bfloat16, [samples, out, in].

    But for the last, nothing of the shape [samples, out, in] exists; but for ``gradient``, ``hessian_diag`` and
    ``low_rank`` no gradient of a weight is formed.

    Args:
        model: a causal language model of transformers, in memory and left as it was, or the directory of one. PEFT
            models too: then the weights of the adapter are linear modules like others.
        data: mappings with ``input_ids`` and ``labels`` (-100: no loss), or `texts.Text`. Padded rows come with their
            ``attention_mask``, packed ones with ``position_ids``: sums are those of the single samples.
        quantity: one or several of the above.
        sample: what is squared: a sequence's gradient, a token's, or that of a batch of ``batch_tokens``.
        fisher_type: labels from the data (``"empirical"``), drawn from the model (``"mc"``; the same for every
            batching), or all in turn, weighted (``"type-2"``: exact; a backward for each target and label).
        loss: a name, or a callable of logits [n, t, vocabulary] and labels [n, t] that gives [n]; labels are -100 where
            no loss is, and logits at t predict labels at t + 1.
        include: patterns on parameter names; empty: all inside numbered layers.
        exclude: patterns of weights to leave out.
        kinds: of what modules: ``"linear"``, ``"experts"``, ``"norm"``, ``"embedding"`` (a tied head is part of it).
            Norms and embeddings have no blocks and no factors.
        block: sides of the tiles of ``fisher_blocks``, or one tile for each ``"row"``, ``"column"``, ``"module"``.
        mc_samples: draws of labels per sample.
        seed: of the draws and probes.
        batch_tokens: tokens of a batch, padding included.
        max_length: tokens of a sample; the rest is cut off.
        probes: random directions of ``hessian_diag``, at least 2.
        hvp: products with the Hessian by a second backward, with attention and experts in plain operations, or by
            central differences of gradients, with the model as it is configured; these keep a copy of the weights.
        non_finite: what becomes of a batch whose loss is not finite.
        tell: called with (samples done, samples in all).
        stop: asked after each batch; if true, the statistics are those of the samples so far. Of quantities that take
            several sweeps over the data, what is complete is kept, and a warning names the rest.
        resume: statistics of the first rows of ``data``, from a run that was stopped; the rest is added.

    Returns:
        Raw float32 sums with counts and choices, see `Statistics`.

    Raises:
        CurvatureError: data without loss (names rows), patterns that match nothing (says what there is), a loss that is
            not finite (names rows), arguments that do not fit.

    Source: Kunstner et al. 2019 (1905.12558) on the kinds of Fisher; Martens and Grosse 2015 (1503.05671), K-FAC;
    George et al. 2018 (1806.03884), EK-FAC; Bekas et al. 2007, Hutchinson's diagonal; Liu et al. 2023 (2305.14342),
    Gauss-Newton-Bartlett.
    """
    wanted = (quantity,) if isinstance(quantity, str) else tuple(quantity)
    _check(wanted, sample, fisher_type, loss, kinds, block, mc_samples, probes)
    if isinstance(model, str | Path):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model)
    texts = checked(from_rows(data), max_length)
    draws = mc_samples if fisher_type == "mc" else 1
    choices = Choices(
        model=fingerprint(model.named_parameters()),
        sample=sample,
        fisher_type=fisher_type,
        loss=loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__name__),
        block=block,
        mc_samples=draws,
        probes=probes,
        seed=seed,
        dtype=str(model.dtype).removeprefix("torch."),
    )
    begin = _already(resume, choices, wanted, texts)
    gathered = [name for name in wanted if name != "hessian_diag"]
    sweeps = bool(gathered) + ("ekfac" in wanted) + ("hessian_diag" in wanted)
    run = _Run(model, texts, begin, batch_tokens, draws, loss, non_finite == "skip", tell, stop, sweeps)
    found: dict[str, dict[str, Tensor]] = {}
    counts = Counts()
    if gathered:
        sums = Sums(gathered, sample, block, len(texts) - begin)
        with measured(model, include, exclude, kinds, texts[0], sums.add) as started:
            counts = run.sweep(lambda batch: _backwards(run, batch, started, sums, fisher_type, seed))
        found |= {quantity: _first(counts.rows, of) if quantity in ROWS else of for quantity, of in sums.found.items()}
    if "ekfac" in wanted and not run.stopped:
        rotated = RotatedSums(found, sample)
        with measured(model, include, exclude, kinds, texts[0], rotated.add) as started:
            run.sweep(lambda batch: _backwards(run, batch, started, rotated, fisher_type, seed))
        if not run.stopped:
            found |= rotated.found
    if "hessian_diag" in wanted and not run.stopped:
        parameters = _parameters(model, include, exclude, kinds)
        products = Probes(parameters, probes, seed)
        add = products.add if hvp == "exact" else products.add_differences
        with _ready(model, parameters), twice_differentiable(model) if hvp == "exact" else nullcontext():
            swept = run.sweep(lambda batch: _products(run, batch, add))
        if not (run.stopped and gathered):  # what is begun is of fewer rows than the rest
            counts, found = swept, found | products.found
    for extra in set(found) - _stored(wanted):
        del found[extra]
    if not found:
        raise CurvatureError(f"estimate: stopped before anything of {', '.join(wanted)} was complete")
    if missing := _stored(wanted) - set(found):
        left = ", ".join(sorted(missing))
        warnings.warn(f"estimate: stopped before {left} was complete; it is left out", stacklevel=2)
    end = begin + counts.rows
    counts = replace(counts, data=(data_fingerprint(texts[begin:end]),))
    covered = {name for of in found.values() for name in of}
    unmeasured = tuple(name for name, _ in model.named_parameters() if name not in covered)
    result = Statistics(choices, counts, found, unmeasured)
    if resume is None:
        return result
    result = resume + result
    return replace(result, counts=replace(result.counts, data=(data_fingerprint(texts[:end]),)))


def _stored(wanted: Iterable[str]) -> set[str]:
    """The names under which quantities are stored."""
    parts = {
        "kfac": ("input_gram", "output_gram"),
        "ekfac": ("input_basis", "output_basis", "ekfac"),
        "hessian_diag": ("hessian_diag", "hessian_trace"),
    }
    return {part for quantity in wanted for part in parts.get(quantity, (quantity,))}


def _first(rows: int, of: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor[:rows] for name, tensor in of.items()}


@dataclass
class _Run:
    """What all sweeps over the data share."""

    model: Any
    texts: Sequence[Text]
    begin: int
    batch_tokens: int
    draws: int
    loss: str | Loss
    skip: bool
    tell: Callable[[int, int], None]
    stop: Callable[[], bool]
    sweeps: int
    swept: int = 0
    stopped: bool = False

    def sweep(self, run: Callable[[Batch], bool]) -> Counts:
        """``run`` every batch; it says whether the batch counts. What is left when ``stop`` says so is left out."""
        counts = Counts()
        for batch in batches(self.texts, self.batch_tokens, self.model.device, self.begin):
            counts += Counts(rows=len(batch.ids))
            if run(batch):
                counts += Counts(
                    samples=len(batch.ids) * self.draws,
                    tokens=int(batch.mask.sum()) * self.draws,
                    targets=int((batch.labels[:, 1:] != UNLABELLED).sum()) * self.draws,
                )
            done = batch.first + len(batch.ids)
            self.tell((self.swept * len(self.texts) + done) // self.sweeps, len(self.texts))
            if self.stop() and done < len(self.texts):
                self.stopped = True
                break
        self.swept += 1
        return counts


def _backwards(
    run: _Run, batch: Batch, started: Callable[[Batch], None], sums: Any, fisher_type: str, seed: int
) -> bool:
    """Backward passes of a batch under the labels that the kind of Fisher asks for."""
    started(batch)
    for part in relabelled(run.model, batch, fisher_type, run.draws, seed, run.loss):
        started(part)
        sums.first = batch.first - run.begin
        if not backward_losses(run.model, part, run.loss, skip=run.skip):
            return False
    return True


def _products(run: _Run, batch: Batch, add: Callable[[Callable[[], Tensor]], None]) -> bool:
    """Products of a batch's Hessian with the probes."""
    with torch.no_grad():
        if not finite(losses_of(run.model, batch, run.loss), batch, skip=run.skip):
            return False
    add(lambda: losses_of(run.model, batch, run.loss).sum())
    return True


def _already(resume: Statistics | None, choices: Choices, wanted: Sequence[str], texts: Sequence[Text]) -> int:
    """How many of the texts ``resume`` covers: its data must be the first ones."""
    if resume is None:
        return 0
    if "ekfac" in wanted:
        raise CurvatureError("estimate: quantity 'ekfac' needs all data at once and cannot be resumed")
    done = resume.counts.rows
    for name in ("model", "sample", "fisher_type", "loss", "block", "mc_samples", "probes", "seed", "dtype"):
        was, now = getattr(resume.choices, name), getattr(choices, name)
        if was != now:
            raise CurvatureError(f"estimate: cannot resume: {name} was {was!r}, is {now!r}")
    if set(resume.sums) != _stored(wanted):
        there, asked = (", ".join(sorted(names)) for names in (resume.sums, _stored(wanted)))
        raise CurvatureError(f"estimate: cannot resume: there is {there}, asked for is {asked}")
    if resume.counts.data != (data_fingerprint(texts[:done]),):
        raise CurvatureError(f"estimate: cannot resume: the first {done} rows are not those it was begun with")
    if done == len(texts):
        raise CurvatureError(f"estimate: nothing to resume: all {done} rows are done")
    return done


def _check(
    wanted: Sequence[str],
    sample: str,
    fisher_type: str,
    loss: object,
    kinds: Sequence[str],
    block: Any,
    mc_samples: int,
    probes: int,
) -> None:
    for quantity in wanted:
        check.one_of("estimate", "quantity", quantity, QUANTITIES)
    for kind in kinds:
        check.one_of("estimate", "kinds", kind, KINDS)
    if isinstance(loss, str):
        check.one_of("estimate", "loss", loss, get_args(LossName))
    if isinstance(block, str):
        check.one_of("estimate", "block", block, ("row", "column", "module"))
    check.one_of("estimate", "sample", sample, get_args(Sample))
    check.one_of("estimate", "fisher_type", fisher_type, get_args(FisherType))
    check.at_least("estimate", "mc_samples", mc_samples, 1)
    check.at_least("estimate", "probes", probes, 2)
    if not wanted:
        raise CurvatureError("estimate: no quantity is asked for")
    of_sums = loss in ("token_sum", "token_mean") and sample == "sequence"
    if "gauss_newton_diag" in wanted and (fisher_type == "empirical" or not of_sums):
        raise CurvatureError(
            "estimate: 'gauss_newton_diag' is a square under the model's own labels: pass fisher_type='mc' or "
            "'type-2', loss='token_sum', sample='sequence'"
        )
    if "hessian_diag" in wanted and fisher_type != "empirical":
        raise CurvatureError("estimate: 'hessian_diag' is of the loss on the data: pass fisher_type='empirical'")
    if fisher_type == "type-2" and sample != "sequence":
        raise CurvatureError("estimate: fisher_type='type-2' weighs whole samples; it takes sample='sequence' alone")


@contextmanager
def measured(
    model: Any, include: Sequence[str], exclude: Sequence[str], kinds: Sequence[str], text: Text, sink: Sink
) -> Generator[Callable[[Batch], None]]:
    """Inside, backward passes give pairs to ``sink``; gives what is told of each batch before it runs."""
    current: list[Batch] = []

    def mask() -> Tensor:
        return current[-1].mask

    linear, experts = select([*sites_of(model), *expert_sites(model)], include, exclude, kinds)
    with _ready(model, {}):
        ids = torch.tensor([text.ids], device=model.device)
        uses = count_uses(linear, lambda: model(input_ids=ids, use_cache=False))
        used = [site for site in linear if uses[site.name]]
        with tapped(used, uses, sink, mask), experts_tapped(model, experts, sink, mask):
            yield lambda batch: current.__setitem__(slice(None), [batch])


def _parameters(
    model: Any, include: Sequence[str], exclude: Sequence[str], kinds: Sequence[str]
) -> dict[str, nn.Parameter]:
    """The weights that are selected, and their biases."""
    linear, experts = select([*sites_of(model), *expert_sites(model)], include, exclude, kinds)
    names = {name for site in (*linear, *experts) for name in (site.name, site.bias)}
    every: list[tuple[str, nn.Parameter]] = list(model.named_parameters())
    return {name: parameter for name, parameter in every if name in names}


@contextmanager
def _ready(model: nn.Module, wanted: Mapping[str, nn.Parameter]) -> Generator[None]:
    """In eval mode, with a graph from the embeddings on; only ``wanted`` parameters get gradients. Then as before."""
    training, before = model.training, [(p, p.requires_grad, p.grad) for p in model.parameters()]
    embeddings: nn.Module = model.get_input_embeddings()  # pyright: ignore[reportCallIssue, reportAssignmentType]
    keep = {id(parameter) for parameter in wanted.values()}
    handle = embeddings.register_forward_hook(
        lambda module, arguments, output: output if output.requires_grad else output.requires_grad_()
    )
    try:
        model.eval()
        for parameter, _, _ in before:
            parameter.requires_grad_(id(parameter) in keep)
            parameter.grad = None
        yield
    finally:
        handle.remove()
        for parameter, requires_grad, grad in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = grad
        model.train(training)

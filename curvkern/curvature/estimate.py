"""One call from a causal language model and data to the curvature statistics that restoration needs."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from curvkern.backend import check
from curvkern.curvature.by_layer import ByLayer, fits
from curvkern.curvature.capture import KINDS, Kind
from curvkern.curvature.handed import Handed
from curvkern.curvature.hidden import CurvatureError
from curvkern.curvature.kept import Keeper
from curvkern.curvature.losses import Loss
from curvkern.curvature.ranks import Ranks, joined
from curvkern.curvature.resident import Job, Resident
from curvkern.curvature.statistics import ROWS, Choices, Counts, Statistics
from curvkern.curvature.sums import QUANTITIES, Block, RotatedSums, Sums
from curvkern.curvature.texts import Text, checked, from_rows
from curvkern.curvature.texts import fingerprint as data_fingerprint
from curvkern.layerwise import LayerwiseModel

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
    layerwise: bool | Literal["auto"] = "auto",
    device: str | torch.device = "cpu",
    spill: str | Path | None = None,
    keep: str | Path | Callable[[Statistics], object] | None = None,
    non_finite: Literal["raise", "skip"] = "raise",
    tell: Callable[[int, int], None] = lambda done, total: None,
    stop: Callable[[], bool] | None = None,
    resume: Statistics | None = None,
) -> Statistics:
    r"""Sum statistics of the loss's per-sample weight gradients over data.

    Where torch.distributed is initialised, or torchrun started this process, all ranks call this with the same
    arguments; each runs its share of the batches, and all return the statistics of all data.

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
        model: a causal language model of transformers, in memory and left as it was, the directory of one, or a
            `LayerwiseModel`, which stays open. PEFT models too: then the weights of the adapter are linear modules like
            others.
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
        layerwise: run the model of a directory with one decoder layer in memory at a time; ``"auto"``: where it would
            take more than half of the memory that is free. Sums are the same; it takes no embeddings, no ``stop``, no
            ``"type-2"``, no differences, and a loss that is not finite is an error.
        device: where the model of a directory runs.
        spill: a directory for hidden states between layers, for ``layerwise``; None: they stay in memory.
        keep: a directory for the sums, one file for each quantity, as of `Statistics.save`; what is returned reads them
            when it is asked. Layer by layer, but for EK-FAC and Hessians and with one process alone, no more than a
            layer's are in memory. Or a function: it is called with the statistics of a layer when its backward ends
            (where a directory would take all at once, it is called once), and what is returned holds none. None: they
            stay in memory.
        non_finite: what becomes of a batch whose loss is not finite.
        tell: called with (samples done, samples in all); of several ranks the first tells, as far as its share is done.
        stop: asked after each batch; if true, the statistics are those of the samples so far. Of quantities that take
            several sweeps over the data, what is complete is kept, and a warning names the rest. One process alone.
        resume: statistics of the first rows of ``data``, from a run that was stopped; the rest is added.

    Returns:
        Raw float32 sums with counts and choices, see `Statistics`.

    Raises:
        CurvatureError: data without loss (names rows), patterns that match nothing (says what there is), a loss that is
            not finite (names rows), arguments that do not fit, ranks that were given different ones.

    Source: Kunstner et al. 2019 (1905.12558) on the kinds of Fisher; Martens and Grosse 2015 (1503.05671), K-FAC;
    George et al. 2018 (1806.03884), EK-FAC; Bekas et al. 2007, Hutchinson's diagonal; Liu et al. 2023 (2305.14342),
    Gauss-Newton-Bartlett.
    """
    wanted = (quantity,) if isinstance(quantity, str) else tuple(quantity)
    _check(wanted, sample, fisher_type, loss, kinds, block, mc_samples, probes)
    texts = checked(from_rows(data), max_length)
    draws = mc_samples if fisher_type == "mc" else 1
    gathered = [name for name in wanted if name != "hessian_diag"]
    choices = Choices(
        model="",
        sample=sample,
        fisher_type=fisher_type,
        loss=loss if isinstance(loss, str) else getattr(loss, "__qualname__", type(loss).__name__),
        block=block,
        mc_samples=draws,
        probes=probes,
        seed=seed,
    )
    begin = _already(resume, choices, wanted, texts)
    if keep is not None and resume is not None:
        raise CurvatureError("estimate: keep is for statistics of all data; without it, resume adds the rest in memory")
    keeper = Handed(choices, keep) if callable(keep) else None if keep is None else Keeper(keep)
    with joined():
        ranks = Ranks()
        if ranks.count > 1 and stop is not None:
            raise CurvatureError(f"estimate: stop is for one process; here are {ranks.count} ranks, leave it out")
        asked = {"data": data_fingerprint(texts), "begin": begin, "batch_tokens": batch_tokens, "quantity": wanted}
        ranks.require_same(**asked, choices=choices, non_finite=non_finite)
        start, end = ranks.share(texts, begin, batch_tokens)
        job = Job(
            texts[:end], start, batch_tokens, draws, fisher_type, loss, seed, non_finite == "skip", include, exclude,
            kinds, _telling(tell, ranks, len(texts)), stop or (lambda: False),
            sweeps=bool(gathered) + ("ekfac" in wanted) + ("hessian_diag" in wanted),
        )  # fmt: skip
        rows = range(start - begin, end - begin)
        early = keeper if ranks.count == 1 and not {"ekfac", "hessian_diag"} & set(wanted) else None
        with _running(model, job, layerwise, device, spill, early) as run:
            choices = replace(choices, dtype=str(run.dtype).removeprefix("torch."))
            if resume is not None and not isinstance(run, ByLayer):
                choices = replace(choices, model=run.fingerprint())
                _require_same(resume.choices, choices, ("model", "dtype"))
            if begin == len(texts):
                raise CurvatureError(f"estimate: nothing to resume: all {begin} rows are done")
            found: dict[str, dict[str, Tensor]] = {}
            counts = Counts()
            if gathered:
                first = Sums(gathered, sample, block, len(rows))
                with ranks.together():
                    counts = run.gather(first)
                mine = {q: _first(counts.rows, of) if q in ROWS else of for q, of in first.found.items()}
                counts, found = ranks.counted(counts), ranks.summed(mine, rows, run.model.device)
            if "ekfac" in wanted and not run.stopped:
                rotated = RotatedSums(found, sample)
                ranks.from_first(rotated.found)
                with ranks.together():
                    run.gather(rotated)
                if not run.stopped:
                    squares = ranks.summed({"ekfac": rotated.found["ekfac"]}, rows, run.model.device)
                    found |= rotated.found | squares
            if "hessian_diag" in wanted and not run.stopped:
                with ranks.together():
                    swept, products = run.products(probes, hvp)
                if not (run.stopped and gathered):  # what is begun is of fewer rows than the rest
                    counts = ranks.counted(swept)
                    found |= ranks.summed(products.found, rows, run.model.device)
            choices = replace(choices, model=run.fingerprint())
            ranks.require_same(model=choices.model, dtype=choices.dtype)
            parameters = run.parameters()
    for extra in set(found) - _stored(wanted):
        del found[extra]
    if not found:
        raise CurvatureError(f"estimate: stopped before anything of {', '.join(wanted)} was complete")
    if missing := _stored(wanted) - set(found):
        left = ", ".join(sorted(missing))
        warnings.warn(f"estimate: stopped before {left} was complete; it is left out", stacklevel=2)
    end = begin + counts.rows
    counts = replace(counts, data=(data_fingerprint(texts[begin:end]),))
    sums: Mapping[str, Mapping[str, Tensor]] = found
    if keeper is not None:
        keeper.take(found, parameters, counts)
        sums = keeper.found()
    covered = {name for of in sums.values() for name in of}
    unmeasured = tuple(name for name in parameters if name not in covered)
    result = Statistics(choices, counts, sums, unmeasured)
    if keeper is not None:
        keeper.finish(result.about())
    if resume is None:
        return result
    result = resume + result
    return replace(result, counts=replace(result.counts, data=(data_fingerprint(texts[:end]),)))


def _telling(tell: Callable[[int, int], None], ranks: Ranks, total: int) -> Callable[[int, int], None]:
    """``tell`` of all samples: rank 0 takes the others to be as far as it is with its share, the first samples."""
    if ranks.rank > 0:
        return lambda done, end: None
    return lambda done, end: tell(done * total // end, total)


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


def _already(resume: Statistics | None, choices: Choices, wanted: Sequence[str], texts: Sequence[Text]) -> int:
    """How many of the texts ``resume`` covers: its data must be the first ones."""
    if resume is None:
        return 0
    if "ekfac" in wanted:
        raise CurvatureError("estimate: quantity 'ekfac' needs all data at once and cannot be resumed")
    done = resume.counts.rows
    _require_same(resume.choices, choices, ("sample", "fisher_type", "loss", "block", "mc_samples", "probes", "seed"))
    if set(resume.sums) != _stored(wanted):
        there, asked = (", ".join(sorted(names)) for names in (resume.sums, _stored(wanted)))
        raise CurvatureError(f"estimate: cannot resume: there is {there}, asked for is {asked}")
    if resume.counts.data != (data_fingerprint(texts[:done]),):
        raise CurvatureError(f"estimate: cannot resume: the first {done} rows are not those it was begun with")
    return done


def _require_same(earlier: Choices, choices: Choices, names: Sequence[str]) -> None:
    for name in names:
        was, now = getattr(earlier, name), getattr(choices, name)
        if was != now:
            raise CurvatureError(f"estimate: cannot resume: {name} was {was!r}, is {now!r}")


@contextmanager
def _running(
    model: Any,
    job: Job,
    layerwise: bool | Literal["auto"],
    device: str | torch.device,
    spill: str | Path | None,
    keeper: Keeper | Handed | None,
) -> Generator[Resident | ByLayer]:
    """Whoever runs the model: in memory, or from its checkpoint one layer at a time."""
    if isinstance(model, LayerwiseModel):
        yield ByLayer(model, job, spill, keeper)
    elif not isinstance(model, str | Path):
        if layerwise is True:
            raise CurvatureError("estimate: layerwise=True takes a model's directory; this one is in memory already")
        yield Resident(model, job)
    elif layerwise is True or (layerwise == "auto" and not fits(model, device)):
        with LayerwiseModel.open(model, device) as opened:
            yield ByLayer(opened, job, spill, keeper)
    else:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(model)
        yield Resident(loaded.to(device), job)


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

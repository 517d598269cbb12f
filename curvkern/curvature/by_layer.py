"""A model on disk: the same sweeps over data, with one decoder layer in memory at a time."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from curvkern.curvature.capture import Pair, Site, select, sites_of, tapped
from curvkern.curvature.experts import expert_sites, experts_tapped
from curvkern.curvature.handed import Handed
from curvkern.curvature.hessian import Probes
from curvkern.curvature.hidden import CurvatureError
from curvkern.curvature.kept import Keeper
from curvkern.curvature.losses import drawn, each_of, finite, logits_of, losses_of, total_of
from curvkern.curvature.resident import Job
from curvkern.curvature.statistics import Counts, fingerprint, joined_fingerprint, parameter_crc
from curvkern.curvature.texts import Batch, batches
from curvkern.layerwise import LayerwiseModel, Place


@dataclass(frozen=True)
class _Draw:
    """A batch, under its own labels or drawn ones."""

    batch: Batch
    seed: str | None


class ByLayer:
    """Runs a model from its checkpoint.

    Attributes:
        model: whose decoder layers are on disk.
        dtype: of the model.
        stopped: never; nothing is complete before everything is.
    """

    def __init__(
        self, model: LayerwiseModel, job: Job, spill: str | Path | None, keeper: Keeper | Handed | None
    ) -> None:
        """Select what is measured; run nothing.

        Args:
            model: stays open.
            job: what is asked.
            spill: see `estimate`.
            keeper: takes the sums of a layer when its backward ends.

        Raises:
            CurvatureError: something is asked that needs the model in memory.
        """
        _check(job)
        self.model = model
        self.dtype: torch.dtype = self.model.model.dtype
        self.stopped = False
        self._job = job
        self._spill = spill
        self._keeper = keeper
        self._swept = 0
        self._crcs: dict[str, int] = {}
        self._batches = list(batches(job.texts, job.batch_tokens, model.device, job.begin))
        linear, experts = select(
            [*sites_of(self.model.model), *expert_sites(self.model.model)], job.include, job.exclude, job.kinds
        )
        self._linear, self._experts = linear, experts
        self._check_sites()

    def fingerprint(self) -> str:
        """Of the parameters; known once every layer was in memory."""
        return joined_fingerprint(self._crcs)

    def parameters(self) -> list[str]:
        """Names of all."""
        return [name for name, _ in self.model.model.named_parameters()]

    def gather(self, sums: Any) -> Counts:
        """One sweep forward and one backward over all layers."""
        job, current = self._job, list[Batch]()

        @contextmanager
        def watch(place: Place) -> Generator[Callable[[_Draw], None]]:
            seen: set[str] = set()

            def sink(site: Site, pair: Pair) -> None:
                if site.name in seen:
                    raise CurvatureError(f"estimate: {site.name} is used twice in a forward; run this model in memory")
                seen.add(site.name)
                sums.add(site, pair)

            def started(draw: _Draw) -> None:
                seen.clear()
                current[:] = [draw.batch]
                sums.first = draw.batch.first - job.begin

            linear, experts = ([s for s in of if self._is_at(s, place)] for of in (self._linear, self._experts))
            uses, mask = {site.name: 1 for site in linear}, lambda: current[-1].mask
            _note(self._crcs, place)
            with tapped(linear, uses, sink, mask), experts_tapped(self.model.model, experts, sink, mask):
                yield started
            if self._keeper is not None:
                self._keeper.take(sums.found, self.parameters(), self._counts(None))
            self._tell(1 - (place.index or 0) / len(self.model.layers))

        report = self.model.backward(self._draws(), self._total, watch=watch, spill=self._spill)
        self._swept += 1
        return self._counts(report.losses)

    def products(self, probes: int, hvp: str) -> tuple[Counts, Probes]:
        """One sweep of forward-over-reverse for each probe."""
        if hvp != "exact":
            raise CurvatureError(f"estimate: hvp is {hvp!r}; layer by layer, products are exact")
        wanted = {name for site in (*self._linear, *self._experts) for name in (site.name, site.bias)}
        every: Iterator[tuple[str, Tensor]] = self.model.model.named_parameters()
        shapes = {name: parameter.shape for name, parameter in every if name in wanted}
        found = Probes(shapes, self.model.device, probes, self._job.seed)
        losses: tuple[Tensor, ...] = ()
        for probe in range(probes):

            def direction(name: str, parameter: Tensor, probe: int = probe) -> Tensor | None:
                if not parameter.is_meta:
                    self._crcs.setdefault(name, parameter_crc(parameter))
                return found.direction(name, parameter, probe) if name in shapes else None

            def add(name: str, product: Tensor, probe: int = probe) -> None:
                found.add_product(name, product, probe)

            losses = self.model.tangent(self._batches, self._each, direction, add, spill=self._spill).losses
            self._tell((probe + 1) / probes)
        self._swept += 1
        return self._counts(losses), found

    def _draws(self) -> list[_Draw]:
        if self._job.fisher_type == "empirical":
            return [_Draw(batch, None) for batch in self._batches]
        return [_Draw(batch, f"{self._job.seed}/{n}") for batch in self._batches for n in range(self._job.draws)]

    def _total(self, model: Any, draw: _Draw) -> Tensor:
        """The sum of a batch's losses, under labels drawn from the logits if so asked."""
        batch, loss = draw.batch, self._job.loss
        logits = logits_of(model, batch)
        if draw.seed is not None:
            batch = replace(batch, labels=drawn(logits.detach().double().softmax(-1), batch, draw.seed))
        total = total_of(logits, batch, loss)
        if not bool(total.isfinite()):
            finite(each_of(logits.detach(), batch, loss), batch, skip=False)
        return total

    def _each(self, model: Any, batch: Batch) -> Tensor:
        return losses_of(model, batch, self._job.loss)

    def _is_at(self, site: Site, place: Place) -> bool:
        inside = site.name.startswith(f"{self.model.name}.")
        return not inside if place.index is None else site.name.startswith(f"{place.name}.")

    def _counts(self, losses: Iterable[Tensor] | None) -> Counts:
        """Of a sweep over all batches, from the losses of each under each draw; None: not known yet."""
        counts = Counts(loss=math.nan if losses is None else sum(float(loss.sum()) for loss in losses))
        for batch in self._batches:
            counts += Counts(rows=len(batch.ids)) + self._job.counted(batch, 0.0)
        return counts

    def _tell(self, share: float) -> None:
        total = len(self._job.texts)
        self._job.tell(int((self._swept + share) * total / self._job.sweeps), total)

    def _check_sites(self) -> None:
        for site in self._linear:
            if site.kind == "embedding":
                raise CurvatureError(
                    f"estimate: {site.name} is an embedding, which layer by layer has no gradient; leave embeddings "
                    "out, or pass layerwise=False"
                )
            if len(site.modules) > 1:
                raise CurvatureError(f"estimate: {site.name} is used in several places; pass layerwise=False")


def fingerprint_of(model: Any) -> str:
    """Of the parameters of a model in memory, or of a `LayerwiseModel`, whose weights are all read once."""
    if not isinstance(model, LayerwiseModel):
        return fingerprint(model.named_parameters())
    crcs: dict[str, int] = {}
    for place in model.places():
        _note(crcs, place)
    return joined_fingerprint(crcs)


def _note(crcs: dict[str, int], place: Place) -> None:
    """Take the fingerprints of what is in memory now."""
    prefix = f"{place.name}." if place.index is not None else ""
    for name, parameter in place.module.named_parameters():
        if not parameter.is_meta and prefix + name not in crcs:
            crcs[prefix + name] = parameter_crc(parameter)


def _check(job: Job) -> None:
    if job.fisher_type == "type-2":
        raise CurvatureError("estimate: fisher_type='type-2' runs with the model in memory; pass layerwise=False")
    if job.skip:
        raise CurvatureError("estimate: non_finite='skip' runs with the model in memory; pass layerwise=False")


def fits(path: str | Path, device: str | torch.device) -> bool:
    """Whether a checkpoint's files take at most half of the memory that is free."""
    size = sum(file.stat().st_size for file in Path(path).glob("*.safetensors"))
    return size <= free_memory(device) / 2


def free_memory(device: str | torch.device) -> int:
    """Bytes that are free on a device."""
    if torch.device(device).type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable:")))
    except (OSError, StopIteration):  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")

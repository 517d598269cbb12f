"""The model in memory: sweeps of forward and backward passes over data."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from curvkern.curvature.capture import Sink, count_uses, select, sites_of, tapped
from curvkern.curvature.experts import expert_sites, experts_tapped
from curvkern.curvature.hessian import Probes, twice_differentiable
from curvkern.curvature.losses import Loss, backward_losses, finite, losses_of, relabelled
from curvkern.curvature.statistics import Counts, fingerprint
from curvkern.curvature.texts import UNLABELLED, Batch, Text, batches


@dataclass(frozen=True)
class Job:
    """What is asked of whoever runs a model, see `estimate`.

    Attributes:
        texts: the samples; those before ``begin`` are done.
        sweeps: how many there will be, for ``tell``.
    """

    texts: Sequence[Text]
    begin: int
    batch_tokens: int
    draws: int
    fisher_type: str
    loss: str | Loss
    seed: int
    skip: bool
    include: Sequence[str]
    exclude: Sequence[str]
    kinds: Sequence[str]
    tell: Callable[[int, int], None]
    stop: Callable[[], bool]
    sweeps: int

    def counted(self, batch: Batch, loss: float) -> Counts:
        """What a batch with finite losses of this sum adds, but for its rows."""
        return Counts(
            loss=loss,
            samples=len(batch.ids) * self.draws,
            tokens=int(batch.mask.sum()) * self.draws,
            targets=int((batch.labels[:, 1:] != UNLABELLED).sum()) * self.draws,
        )


class Resident:
    """Runs a model that is in memory.

    Attributes:
        model: it.
        dtype: of the model.
        stopped: the last sweep did not come to its end.
    """

    def __init__(self, model: Any, job: Job) -> None:
        self.model = model
        self.dtype: torch.dtype = model.dtype
        self.stopped = False
        self._job = job
        self._swept = 0

    def fingerprint(self) -> str:
        """Of the parameters."""
        return fingerprint(self.model.named_parameters())

    def parameters(self) -> list[str]:
        """Names of all."""
        return [name for name, _ in self.model.named_parameters()]

    def gather(self, sums: Any) -> Counts:
        """One sweep of backward passes, under the labels that the kind of Fisher asks for."""
        job = self._job

        def backwards(batch: Batch) -> float | None:
            started(batch)
            total = 0.0
            for part in relabelled(self.model, batch, job.fisher_type, job.draws, job.seed, job.loss):
                started(part)
                sums.first = batch.first - job.begin
                loss = backward_losses(self.model, part, job.loss, skip=job.skip)
                if loss is None:
                    return None
                total += loss
            return total

        with measured(self.model, job.include, job.exclude, job.kinds, job.texts[0], sums.add) as started:
            return self._sweep(backwards)

    def products(self, probes: int, hvp: Literal["exact", "difference"]) -> tuple[Counts, Probes]:
        """One sweep of products with the Hessian."""
        job = self._job
        weights = _parameters(self.model, job.include, job.exclude, job.kinds)
        found = Probes({name: p.shape for name, p in weights.items()}, self.model.device, probes, job.seed)

        def products(batch: Batch) -> float | None:
            with torch.set_grad_enabled(hvp == "exact"):
                losses = losses_of(self.model, batch, job.loss)
            if not finite(losses, batch, skip=job.skip):
                return None
            if hvp == "exact":
                found.add(weights, losses.sum())
            else:
                found.add_differences(weights, lambda: losses_of(self.model, batch, job.loss).sum())
            return float(losses.detach().sum())

        plain = twice_differentiable(self.model) if hvp == "exact" else nullcontext()
        with _ready(self.model, weights), plain:
            return self._sweep(products), found

    def _sweep(self, run: Callable[[Batch], float | None]) -> Counts:
        """``run`` every batch; it gives its loss, or None if it does not count. What ``stop`` leaves is left out."""
        counts, job = Counts(), self._job
        for batch in batches(job.texts, job.batch_tokens, self.model.device, job.begin):
            counts += Counts(rows=len(batch.ids))
            if (loss := run(batch)) is not None:
                counts += job.counted(batch, loss)
            done = batch.first + len(batch.ids)
            job.tell((self._swept * len(job.texts) + done) // job.sweeps, len(job.texts))
            if job.stop() and done < len(job.texts):
                self.stopped = True
                break
        self._swept += 1
        return counts


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

r"""ProximalStep: alternate between alignment and task, and hold each phase to where it began (Lisa)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn
from torch.utils.data import IterableDataset

from curvkern.backend import check
from curvkern.training.trainer import SCALES, SHARDS, Guard
from curvkern.training.wrappers import trained

T = TypeVar("T")


class ProximalStep(Guard):
    r"""Adds :math:`\rho\,(w - w_{switch})` to the gradient, which is that of :math:`\frac\rho2 |w - w_{switch}|^2`.

    :math:`w_{switch}` are the weights where the present phase began: of ``phases[0]`` steps on alignment data, then
    ``phases[1]`` on the task's, and so on. `Alternate` makes data in these phases. In a loop of one's own::

        proximal = ProximalStep().attach(model)
        ...                                     # every step, before clipping
        proximal.begin_step()
        proximal.add_gradient_()

    or ``Trainer(..., callbacks=[ProximalStep()])``, which adds it where a step begins, so that it counts once however
    many micro-batches there are, and is clipped with the rest. Needs a copy of the trained parameters.

    Args:
        rho: how strongly; above the loss's smoothness the phases converge, say the authors.
        phases: steps on alignment data, and on the task's.
        free: share of all steps, the first ones, in which the callback adds nothing.

    Attributes:
        step: how many steps have begun.

    Raises:
        ValueError: rho below 0, a phase without a step, free outside [0, 1].

    Source: Huang et al., Lisa (2405.18641), its two states and their proximal term; defaults of its code.
    """

    file: ClassVar[str] = "proximal.pt"
    breaks: ClassVar[dict[str, str]] = {**SHARDS, **SCALES}

    def __init__(self, rho: float = 1.0, *, phases: tuple[int, int] = (100, 900), free: float = 0.1) -> None:
        if not 0 <= rho < math.inf:
            raise ValueError(f"ProximalStep: rho is {rho}; wanted at least 0.")
        if not 0 <= free <= 1:
            raise ValueError(f"ProximalStep: free is {free}; wanted a share, 0 to 1.")
        _check_phases("ProximalStep", phases)
        self.rho, self.phases, self.free = rho, phases, free
        self.step = 0
        self._parameters: dict[str, nn.Parameter] = {}

    def attach(self, model: nn.Module) -> ProximalStep:
        """Begin with the present weights of a model; return itself.

        Raises:
            ValueError: nothing is trained.
        """
        self._parameters = trained("ProximalStep", model)
        self._anchors = {name: p.detach().clone() for name, p in self._parameters.items()}
        self.step = 0
        return self

    def begin_step(self) -> None:
        """Count a step; where a phase begins with it, hold on to the present weights."""
        if self.step % sum(self.phases) in (0, self.phases[0]):
            for name, anchor in self._anchors.items():
                anchor.copy_(self._parameters[name].detach())
        self.step += 1

    def add_gradient_(self) -> None:
        """Add the term to ``.grad`` of the model's parameters; float32 inside, one rounding.

        Raises:
            RuntimeError: not attached.
        """
        if not self._parameters:
            raise RuntimeError("ProximalStep: add_gradient_ before attach; call attach(model) where training begins.")
        with torch.no_grad():
            for name, p in self._parameters.items():
                wide = torch.promote_types(p.dtype, torch.float32)
                pull = self.rho * (p.to(wide) - self._anchors[name].to(wide))
                p.grad = (pull if p.grad is None else pull + p.grad).to(p.dtype)

    def state_dict(self) -> dict[str, Any]:
        """The steps, and the weights that the phase began with; not a copy."""
        return {"step": self.step, "anchors": self._anchors}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`.

        Raises:
            ValueError: it is of another model: names or shapes differ.
        """
        shapes = {name: p.shape for name, p in self._parameters.items()}
        if {name: anchor.shape for name, anchor in state["anchors"].items()} != shapes:
            raise ValueError("ProximalStep: the state is of a model with other trained parameters; load this model's.")
        for name, anchor in self._anchors.items():
            anchor.copy_(state["anchors"][name])
        self.step = state["step"]

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the term."""
        self.begin_step()
        if state.global_step >= self.free * state.max_steps:
            self.add_gradient_()


class Alternate(IterableDataset[T]):
    """Rows of alignment and task in phases, each source gone through again and again, without an end.

    Args:
        alignment: rows of the first phase; anything that can be gone through again.
        task: rows of the second.
        phases: steps of each, as in `ProximalStep`.
        rows_per_step: of all ranks and micro-batches together. The Trainer needs ``max_steps``.

    Raises:
        ValueError: a phase without a step, rows_per_step below 1, or (on iterating) a source without rows.
    """

    def __init__(
        self, alignment: Iterable[T], task: Iterable[T], *,
        phases: tuple[int, int] = (100, 900), rows_per_step: int = 1,
    ) -> None:  # fmt: skip
        _check_phases("Alternate", phases)
        check.at_least("Alternate", "rows_per_step", rows_per_step, 1)
        self.alignment, self.task, self.phases, self.rows_per_step = alignment, task, phases, rows_per_step

    def __iter__(self) -> Iterator[T]:
        sources = _again(self.alignment), _again(self.task)
        while True:
            for source, steps in zip(sources, self.phases, strict=True):
                yield from islice(source, steps * self.rows_per_step)


def _again(rows: Iterable[T]) -> Iterator[T]:
    while True:
        empty = True
        for row in rows:
            empty = False
            yield row
        if empty:
            raise ValueError("Alternate: a source has no (more) rows; wanted one that can be gone through again.")


def _check_phases(who: str, phases: tuple[int, int]) -> None:
    if len(phases) != 2 or min(phases) < 1:
        raise ValueError(f"{who}: phases is {phases}; wanted two numbers of steps, each at least 1.")

r"""Booster: an alignment whose harmful loss falls little when a harmful step is taken later."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from curvkern.ops import axpby_list_, ball_perturb_
from curvkern.training.batches import Batch, Endless, mean_over_ranks_, own_loss
from curvkern.training.trainer import SCALES, SHARDS, Guard
from curvkern.training.wrappers import trained, unwrapped


class Booster(Guard):
    r"""Regulariser of the alignment stage: adds :math:`\lambda (\nabla h(w) - \nabla h(w'))` to the gradient.

    .. math:: w' = w - \alpha\,\frac{\nabla h(w)}{|\nabla h(w)| + 10^{-7}}

    h is the loss of harmful answers: what it falls by in a normalised harmful step is to be small. The second
    derivative within :math:`\nabla h(w')` is left out, as published. In a loop of one's own::

        booster = Booster(harmful).attach(model)
        ...                                     # before or after the backward passes of a step, before clipping
        booster.add_gradient_()

    or ``Trainer(..., callbacks=[Booster(harmful)])``, which adds it where a step begins, so that it counts once however
    many micro-batches there are, and is clipped with the rest. Two forward and backward passes more a step, and a copy
    of the trained parameters: made for adapters.

    Args:
        batches: harmful prompts with harmful answers, for ``loss``; gone through again and again.
        alpha: length of the harmful step, over all trained parameters as one vector.
        weight: lambda.
        loss: of a model and a batch; default the model's own.

    Raises:
        TypeError, ValueError: batches that end, alpha not above 0, weight below 0.

    Source: Huang et al., Booster (2409.01586), its algorithm; defaults of its code.
    """

    file: ClassVar[str] = "booster.pt"
    breaks: ClassVar[dict[str, str]] = {**SHARDS, **SCALES}

    def __init__(
        self, batches: Iterable[Batch], *, alpha: float = 0.1, weight: float = 5.0,
        loss: Callable[[nn.Module, Batch], Tensor] = own_loss,
    ) -> None:  # fmt: skip
        if not 0 < alpha < math.inf:
            raise ValueError(f"Booster: alpha is {alpha}; wanted above 0.")
        if not 0 <= weight < math.inf:
            raise ValueError(f"Booster: weight is {weight}; wanted at least 0.")
        self.batches, self.alpha, self.weight, self.loss = Endless("Booster", batches), alpha, weight, loss
        self._model: nn.Module | None = None

    def attach(self, model: nn.Module) -> Booster:
        """Get hold of a model, whose parameters that require a gradient take part; return itself.

        Raises:
            ValueError: nothing is trained.
        """
        self._parameters = list(trained("Booster", model).values())
        self._model = unwrapped(model)
        return self

    def add_gradient_(self) -> Tensor:
        """Draw a batch and add the gradient to ``.grad`` of the model's parameters; they come back to the bit.

        Returns:
            float scalar [2]: h at w and at w'.

        Raises:
            RuntimeError: not attached.
        """
        if self._model is None:
            raise RuntimeError("Booster: add_gradient_ before attach; call attach(model) where training begins.")
        batch = self.batches.draw(self._parameters[0].device)
        before, here = self._gradient(self._model, batch)
        with torch.no_grad():
            undo = ball_perturb_(self._parameters, here, -self.alpha, eps=1e-7)
        try:
            after, there = self._gradient(self._model, batch)
        finally:
            undo.restore_()
        for p in self._parameters:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        gradients = [p.grad for p in self._parameters if p.grad is not None]
        axpby_list_(gradients, self.weight, here, 1.0)
        axpby_list_(gradients, -self.weight, there, 1.0)
        return torch.stack([before, after])

    def _gradient(self, model: nn.Module, batch: Batch) -> tuple[Tensor, list[Tensor]]:
        loss = self.loss(model, batch)
        found = list(torch.autograd.grad(loss, self._parameters, allow_unused=True, materialize_grads=True))
        mean_over_ranks_(found)
        return loss.detach(), found

    def state_dict(self) -> dict[str, Any]:
        """The place in the batches."""
        return {"drawn": self.batches.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.batches.skip_to(state["drawn"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the gradient."""
        self.add_gradient_()

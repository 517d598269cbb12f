r"""GradientSurgery: takes out of the user's gradient what works against the alignment's (SafeGrad)."""

from __future__ import annotations

import math
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from curvkern.backend import check
from curvkern.ops import norm_list, surgery_list_
from curvkern.training.batches import Batch, Endless, mean_over_ranks_
from curvkern.training.trainer import SCALES, SHARDS, Guard
from curvkern.training.wrappers import trained, unwrapped

Granularity = Literal["global", "layer", "tensor"]


@dataclass(frozen=True)
class Surgery:
    """What became of one step's gradients.

    Attributes:
        loss: the alignment loss, float scalar.
        cosine: float64 [groups] of the two gradients, before; one group where granularity is global.
        conflict: bool [groups]: what had to be taken out.
        skipped: a gradient was not finite: nothing was done.
    """

    loss: Tensor
    cosine: Tensor
    conflict: Tensor
    skipped: bool = False


class GradientSurgery(Guard):
    r"""Gradient surgery against the loss of alignment.

    Of the user's gradient :math:`g_u` and the gradient :math:`g_a` of the alignment loss, with
    :math:`c = \langle g_u, g_a\rangle` over all trained parameters as one vector:

    .. math:: g = g_u - [c < 0]\,\frac{c}{|g_a|^2}\,g_a + \rho\,g_a

    It acts on gradients that are complete: after the last micro-batch, all ranks' mean taken, unscaled, and *before*
    they are clipped. In a loop of one's own::

        surgery = GradientSurgery(refusals, ReferenceKL(aligned)).attach(model)
        ...                                     # after the backward passes of a step
        surgery.edit_()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    The Trainer clips before any callback sees the gradients, so the guard does it instead::

        Trainer(..., args=TrainingArguments(max_grad_norm=0, ...),
                callbacks=[GradientSurgery(refusals, ReferenceKL(aligned), max_norm=1.0)])

    A step costs a forward and a backward pass on the alignment batch more, and a forward pass of the reference.

    Args:
        batches: harmful prompts with safe answers: mappings with ``input_ids``, ``labels`` and the like, gone through
            again and again; ten to twenty rows are enough. Each rank may have its own.
        loss: of a model and a batch, as `ReferenceKL`.
        rho: how much of :math:`g_a` is added.
        granularity: ``"global"``: as published. ``"layer"``, ``"tensor"``: a test and a projection for each, so that a
            conflict in one is not outvoted by the others.
        max_norm: clip to this norm afterwards; None: do not.

    Attributes:
        steps: how often `edit_` ran.
        conflicts: how many groups' gradients had a conflict in all.
        skipped: steps without surgery as a gradient was not finite. The user's gradient is then left as it is.

    Raises:
        TypeError, ValueError: batches that end, rho not finite, an unknown granularity, max_norm not above 0.

    Source: SafeGrad (2508.07172), eqs. 3 to 6.
    """

    file: ClassVar[str] = "gradient_surgery.pt"
    breaks: ClassVar[dict[str, str]] = {
        **SHARDS,
        **SCALES,
        "max_grad_norm": "it clips gradients before the surgery; set it to 0 and clip by GradientSurgery(max_norm=...)",
    }

    def __init__(
        self, batches: Iterable[Batch], loss: Callable[[nn.Module, Batch], Tensor], *,
        rho: float = 1.0, granularity: Granularity = "global", max_norm: float | None = None,
    ) -> None:  # fmt: skip
        check.one_of("GradientSurgery", "granularity", granularity, get_args(Granularity))
        if not math.isfinite(rho):
            raise ValueError(f"GradientSurgery: rho is {rho}; wanted a finite number.")
        if max_norm is not None and not max_norm > 0:
            raise ValueError(f"GradientSurgery: max_norm is {max_norm}; wanted above 0, or None.")
        self.batches, self.loss = Endless("GradientSurgery", batches), loss
        self.rho, self.granularity, self.max_norm = rho, granularity, max_norm
        self.steps = self.conflicts = self.skipped = 0
        self._model: nn.Module | None = None

    def attach(self, model: nn.Module) -> GradientSurgery:
        """Get hold of a model.

        Args:
            model: all its parameters that require a gradient take part.

        Returns:
            Itself.

        Raises:
            ValueError: nothing is trained.
        """
        self._parameters = trained("GradientSurgery", model)
        self._model = unwrapped(model)
        return self

    def edit_(self) -> Surgery:
        """Draw a batch, find its gradient and edit ``.grad`` of the model's parameters.

        Returns:
            What was found. Waits for the device once.

        Raises:
            RuntimeError: not attached.
        """
        if self._model is None:
            raise RuntimeError("GradientSurgery: edit_ before attach; call attach(model) where training begins.")
        self.steps += 1
        parameters = list(self._parameters.values())
        loss = self.loss(self._model, self.batches.draw(parameters[0].device))
        safe = list(torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True))
        mean_over_ranks_(safe)
        user = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
        if not math.isfinite(float(norm_list(user) + norm_list(safe))):
            return self._skip(loss.detach())
        for p, gradient in zip(parameters, user, strict=True):
            p.grad = gradient
        found = [surgery_list_([user[k] for k in at], [safe[k] for k in at], self.rho) for at in self._groups()]
        conflict, cosine = (torch.stack(values) for values in zip(*found, strict=True))
        self.conflicts += int(conflict.sum())
        if self.max_norm is not None:
            torch.nn.utils.clip_grad_norm_(parameters, self.max_norm)
        return Surgery(loss.detach(), cosine, conflict)

    def state_dict(self) -> dict[str, Any]:
        """Counters, and the place in the batches."""
        counters = {name: getattr(self, name) for name in ("steps", "conflicts", "skipped")}
        return {**counters, "drawn": self.batches.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.steps, self.conflicts, self.skipped = (state[name] for name in ("steps", "conflicts", "skipped"))
        self.batches.skip_to(state["drawn"])

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Edits the gradients."""
        self.edit_()

    def _groups(self) -> list[list[int]]:
        """Places of the parameters that are one vector; what is in no layer is one together."""
        groups: defaultdict[object, list[int]] = defaultdict(list)
        for k, name in enumerate(self._parameters):
            layer = re.search(r"(?:^|\.)\d+\.", name)
            where = layer and name[: layer.end()]
            groups[{"global": None, "layer": where, "tensor": k}[self.granularity]].append(k)
        return list(groups.values())

    def _skip(self, loss: Tensor) -> Surgery:
        self.skipped += 1
        warnings.warn(
            f"GradientSurgery: a gradient of step {self.steps} is not finite; no surgery ({self.skipped} of "
            f"{self.steps} steps so far).",
            RuntimeWarning,
            stacklevel=3,
        )
        nothing = torch.zeros(1, dtype=torch.float64, device=loss.device)
        return Surgery(loss, nothing, nothing.bool(), skipped=True)

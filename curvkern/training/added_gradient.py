"""A penalty in `transformers.Trainer`: its gradient is added once a step, before the first micro-batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from curvkern.training.trainer import SCALES, SHARDS, Events, refuse


class AddedGradient(Events):
    """Backward of a penalty where a step begins, when all gradients are zero.

    So it counts once a step however many micro-batches there are and however the Trainer scales their losses, and is
    clipped with them. Data-parallel ranks add the same gradient, whose mean is itself.

    Args:
        guard: its name, for messages.
        penalty: of the model being trained; a scalar.

    Attributes:
        value: the penalty of the last step, or None before the first.
    """

    def __init__(self, guard: str, penalty: Callable[[nn.Module], Tensor]) -> None:
        self.guard, self.penalty = guard, penalty
        self.value: Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuses what scales or shards gradients.

        Raises:
            ValueError: names the option of `TrainingArguments`.
        """
        refuse(self.guard, args, {**SHARDS, **SCALES}, " Or add penalty(model) to the loss yourself.")

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Adds the gradient."""
        penalty = self.penalty(kwargs["model"])
        penalty.backward()
        self.value = penalty.detach()

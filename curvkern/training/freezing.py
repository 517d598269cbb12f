"""Freezing layers, those that keep a model safe above all."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from curvkern.training.matching import matching


@dataclass(frozen=True)
class Frozen:
    """Parameters that were frozen.

    Attributes:
        parameters: by name.
    """

    parameters: dict[str, nn.Parameter]

    @property
    def count(self) -> int:
        """How many numbers they hold."""
        return sum(p.numel() for p in self.parameters.values())

    def thaw(self) -> None:
        """Let them be trained again."""
        for parameter in self.parameters.values():
            parameter.requires_grad_(True)


def freeze(model: nn.Module, patterns: Sequence[str]) -> Frozen:
    """Freeze the parameters whose names match, before the optimiser or the Trainer is made.

    Args:
        model: anything; with PEFT the adapters of matching layers are frozen (the rest is already).
        patterns: of full parameter names, as in a shell: ``["*.layers.[6-9].*", "*.layers.1[0-2].*"]``.

    Returns:
        What was trained before and is not now.

    Raises:
        TypeError, ValueError: a pattern matches nothing (says what is near), or only what is frozen already, or
            nothing is left to train; nothing is changed then.

    Source: Li et al., Safety Layers (2408.17003): a contiguous range of early layers tells harmful prompts from
    others; fine-tuning with these frozen keeps refusals. Which range it is must be found for each model.
    """
    found = matching("freeze", "parameter", model.named_parameters(), patterns)
    frozen = {name: p for name, p in found.items() if p.requires_grad}
    if not frozen:
        one = next(iter(found))
        raise ValueError(f"freeze: all {len(found)} parameters that match are frozen already, {one} for one.")
    if all(any(p is f for f in frozen.values()) for p in model.parameters() if p.requires_grad):
        raise ValueError("freeze: the patterns match everything that is trained; nothing would be left to train.")
    for parameter in frozen.values():
        parameter.requires_grad_(False)
        parameter.grad = None  # an optimiser made before would go on stepping by it
    return Frozen(frozen)

"""LoRA layers of a model, found by what they hold: PEFT itself is not needed to look at them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn

from curvkern.training.wrappers import bare


class Factors(NamedTuple):
    """One adapter of one layer, whose update is ``scale * B @ A``: B [o, r], A [r, i]."""

    B: Tensor
    A: Tensor
    scale: float


def is_lora(module: nn.Module) -> bool:
    """Whether a module has LoRA factors."""
    adapters = getattr(module, "lora_A", None)
    return isinstance(adapters, nn.ModuleDict) and len(adapters) > 0


def lora_layers(guard: str, model: nn.Module) -> dict[str, nn.Module]:
    """Plain name -> layer.

    Raises:
        ValueError: the model has none.
    """
    modules = dict(bare(model).named_modules())
    layers = {name: module for name, module in modules.items() if is_lora(module)}
    if not layers:
        kinds = ", ".join(sorted({type(module).__name__ for module in modules.values()})[:8])
        raise ValueError(
            f"{guard}: the model has no LoRA layer; looked for modules with lora_A and lora_B among {len(modules)} "
            f"({kinds}). Wrap it first: peft.get_peft_model(model, LoraConfig(...))."
        )
    return layers


def factors(guard: str, name: str, layer: nn.Module, adapters: Sequence[str] | None = None) -> list[Factors]:
    """The factors of a layer's adapters; of the active ones, unless they are named.

    Raises:
        ValueError: the layer lacks an adapter, has none that is active, or is a variant whose update is not BA.
    """
    lora: Any = layer
    there = list(lora.lora_A)
    wanted = [a for a in lora.active_adapters if a in there] if adapters is None else adapters
    missing = [adapter for adapter in wanted if adapter not in there]
    if missing or not wanted:
        raise ValueError(
            f"{guard}: {name} has the adapters {', '.join(there)}; wanted "
            + (f"{', '.join(missing)} too." if missing else "one of them active: model.set_adapter(...).")
        )
    for adapter in wanted:
        variants = (getattr(lora, held, {}) for held in ("lora_variant", "lora_magnitude_vector"))
        if any(adapter in variant for variant in variants):
            raise ValueError(
                f"{guard}: adapter {adapter} of {name} is a variant of LoRA (DoRA or the like), whose update is "
                "not BA; train plain LoRA with this guard."
            )
    return [Factors(lora.lora_B[a].weight, lora.lora_A[a].weight, float(lora.scaling[a])) for a in wanted]


def oriented(layer: nn.Module, weight: Tensor) -> Tensor:
    """A weight as nn.Linear keeps it, [o, i]; transformers' Conv1D keeps [i, o]."""
    return weight.mT if getattr(layer, "fan_in_fan_out", False) else weight

"""The model inside what wraps it: `torch.compile`, DistributedDataParallel, PEFT."""

from __future__ import annotations

from typing import Any

from torch import nn


def unwrapped(model: nn.Module) -> nn.Module:
    """The model inside DistributedDataParallel, which expects every forward pass to end in its own backward pass."""
    within: Any = getattr(model, "_orig_mod", model)
    return within.module if isinstance(within, nn.parallel.DistributedDataParallel) else model


def bare(model: nn.Module) -> nn.Module:
    """The model inside all of them, whose modules have their plain names."""
    inner: Any = unwrapped(model)
    inner = getattr(inner, "_orig_mod", inner)
    return bare(inner.get_base_model()) if hasattr(inner, "get_base_model") else inner


def plain(name: str) -> str:
    """A parameter's name in the model inside `torch.compile` and DistributedDataParallel."""
    while name.startswith(("module.", "_orig_mod.")):
        name = name.partition(".")[2]
    return name


def trained(who: str, model: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter that is trained; shared ones once; without the prefixes of wrappers.

    Raises:
        ValueError: there is none.
    """
    found = {plain(name): p for name, p in model.named_parameters() if p.requires_grad}
    if not found:
        raise ValueError(f"{who}: no parameter of the model requires a gradient, so there is nothing to guard.")
    return found

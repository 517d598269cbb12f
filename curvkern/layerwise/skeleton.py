"""A transformers model without weights: parameters on the meta device, buffers as they are to be."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from curvkern.checkpoint import Weights
from curvkern.layerwise.error import LayerwiseError


def build(source: Weights, dtype: torch.dtype | None) -> Any:
    """The causal language model that ``source`` configures, in eval mode; no tensor is read.

    Buffers, such as rotary frequencies, have their values; parameters have names, shapes and dtypes.

    Args:
        source: with ``config.json`` beside the weights.
        dtype: of the parameters; None: what the configuration says, else the checkpoint's.

    Raises:
        CheckpointError: there is no ``config.json``.
        LayerwiseError: the weights are quantised.
        ValueError: from transformers, which does not know the architecture or would have to run its code.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    source.require_config()
    config: Any = AutoConfig.from_pretrained(source.directory)
    if getattr(config, "quantization_config", None):
        raise LayerwiseError(f"{source.path}: the weights are quantised; dequantise them first")
    wanted = dtype or getattr(config, "dtype", None) or _first_dtype(source)
    with _parameters_on_meta():
        model: Any = AutoModelForCausalLM.from_config(config, dtype=wanted)
    model.config.use_cache = False
    return model.eval().requires_grad_(False)


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Name and list of the decoder layers: as many modules as the configuration says.

    Raises:
        LayerwiseError: there is no such list, or more than one.
    """
    wanted = model.config.get_text_config(decoder=True).num_hidden_layers
    decoder: nn.Module = model.get_decoder() or model
    inside = {id(module) for module in decoder.modules()}
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == wanted and id(module) in inside
    ]
    if len(found) != 1:
        lists = [f"{name} ({len(m)})" for name, m in model.named_modules() if isinstance(m, nn.ModuleList)]
        raise LayerwiseError(
            f"{type(model).__name__}: wanted one list of the {wanted} decoder layers that num_hidden_layers says, "
            f"found {len(found)}; its lists are {', '.join(lists[:8]) or 'none'}. Run this model in memory."
        )
    return found[0]


def _first_dtype(source: Weights) -> torch.dtype:
    dtypes = (source.spec(name).dtype for name in source.names)
    return next((dtype for dtype in dtypes if dtype.is_floating_point), torch.get_default_dtype())


@contextmanager
def _parameters_on_meta() -> Generator[None]:
    """Inside, a parameter that a module registers loses its data at once: never more than one has any.

    Under ``torch.device("meta")`` buffers would have none either, and nothing could say what they were.
    """

    def strip(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
        if parameter is None or parameter.is_meta:
            return None
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(strip)  # pyright: ignore[reportArgumentType]
    try:
        yield
    finally:
        handle.remove()

"""How the decoder calls its layers: seen by running the model with stand-ins for them."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvkern.layerwise.error import LayerwiseError

_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device)


@dataclass(frozen=True)
class Call:
    """What a layer is called with besides the hidden state: masks, positions, rotary embeddings.

    Attributes:
        args: positional ones after the hidden state.
        kwargs: by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def to(self, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments, on ``device``."""
        return _moved(self.args, device), _moved(self.kwargs, device)


class _Reached(Exception):
    """The last layer has been called: there is no more to see."""


@contextmanager
def replaced(layers: Sequence[nn.Module], forward_of: Callable[[int], Callable[..., Tensor]]) -> Generator[None]:
    """Inside, the layers run other forwards, by number; hooks on them still run."""
    for index, layer in enumerate(layers):
        layer.forward = forward_of(index)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


@contextmanager
def injected(layers: Sequence[nn.Module], last: Tensor) -> Generator[None]:
    """Inside, the model gives what it would if its last layer gave ``last``: only what follows the layers is run."""

    def forward_of(index: int) -> Callable[..., Tensor]:
        return lambda hidden, *_, **__: last if index == len(layers) - 1 else hidden

    with replaced(layers, forward_of):
        yield


def first_hidden(layers: Sequence[nn.Module], run: Callable[[], object]) -> Tensor:
    """The hidden state that ``run`` hands to the first layer, as part of the graph."""
    return _observed(layers, run)[0]


def observe(model: Any, layers: Sequence[nn.Module], run: Callable[[], object]) -> tuple[Tensor, list[Call]]:
    """The hidden state that goes into the first layer, and every layer's call; kept on the CPU.

    Args:
        model: whose embeddings are loaded.
        layers: its decoder layers; they do not run.
        run: calls the model on a batch; what follows the layers does not run.

    Raises:
        LayerwiseError: layers are not a chain, each called once with the hidden state that the one before gave, or
            take something else that depends on the embeddings, or cannot be kept.
    """
    handle = model.get_input_embeddings().register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        with torch.enable_grad():
            hidden, calls = _observed(layers, run)
    finally:
        handle.remove()
    kept: dict[int, Tensor] = {}
    return hidden.detach(), [Call(_kept(c.args, i, kept), _kept(c.kwargs, i, kept)) for i, c in enumerate(calls)]


def _observed(layers: Sequence[nn.Module], run: Callable[[], object]) -> tuple[Tensor, list[Call]]:
    calls: list[Call] = []
    seen: list[Tensor] = []

    def forward_of(index: int) -> Callable[..., Tensor]:
        def forward(*args: Any, **kwargs: Any) -> Tensor:
            if not args or index != len(calls) or (seen and args[0] is not seen[0]):
                raise LayerwiseError(
                    f"layer {index} is not called with what the layer before it gave, in order: something happens "
                    "between the layers. Run this model in memory."
                )
            seen.append(args[0])
            calls.append(Call(args[1:], kwargs))
            if len(calls) == len(layers):
                raise _Reached
            return args[0]

        return forward

    try:
        with replaced(layers, forward_of):
            run()
    except _Reached:
        return seen[0], calls
    raise LayerwiseError(
        f"a batch's loss called {len(calls)} of {len(layers)} decoder layers; it has to run the model it is given"
    )


def _kept(value: Any, layer: int, kept: dict[int, Tensor]) -> Any:
    """A copy on the CPU; what several layers share is kept once."""
    if isinstance(value, Tensor):
        if value.requires_grad:
            raise LayerwiseError(
                f"layer {layer} is called with a tensor of {list(value.shape)} that depends on the embeddings but is "
                "not the hidden state: its gradient would be lost. Run this model in memory."
            )
        return kept.setdefault(id(value), value.detach().cpu())
    if isinstance(value, (tuple, list)):
        return tuple(_kept(item, layer, kept) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return {key: _kept(item, layer, kept) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, _PLAIN):
        return value
    raise LayerwiseError(
        f"layer {layer} is called with a {type(value).__name__}, which cannot be kept until its turn; with "
        "attn_implementation 'eager' or 'sdpa' and without a cache there is none in most models"
    )


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_moved(item, device) for item in value)  # pyright: ignore[reportUnknownVariableType]
    if isinstance(value, dict):
        return {key: _moved(item, device) for key, item in value.items()}  # pyright: ignore[reportUnknownVariableType]
    return value

"""The order in which layers are visited, and what every pass over them shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from curvkern.layerwise.boundaries import Boundaries
from curvkern.layerwise.calls import Call, observe
from curvkern.layerwise.error import LayerwiseError
from curvkern.layerwise.loader import Loader

Losses = Callable[[Any, Any], Tensor]


@dataclass(frozen=True)
class Step:
    """One visit of all batches to a layer.

    Attributes:
        kind: ``"forward"`` makes the next hidden state of the layer's, ``"head"`` the loss of the last layer's output,
            ``"backward"`` the gradient of the layer's input from that of its output.
        layer: number of the layer whose weights are needed, or may stay.
        drop: a forward's input is not needed again, or will be made again.
    """

    kind: Literal["forward", "head", "backward"]
    layer: int
    drop: bool = False


def schedule(count: int, keep_every: int) -> list[Step]:
    """Forward through all layers, the head, backward; where inputs were dropped, forward through those again.

    Chen et al. 2016 (1604.06174), section 4, with segments of ``keep_every`` layers; 1 keeps every input.
    """
    starts = range(0, count, keep_every)
    steps = [Step("forward", layer, drop=layer < starts[-1] and layer not in starts) for layer in range(count)]
    steps.append(Step("head", count - 1))
    for start in reversed(starts):
        end = min(start + keep_every, count)
        if start != starts[-1]:
            steps += [Step("forward", layer) for layer in range(start, end - 1)]
        steps += [Step("backward", layer) for layer in reversed(range(start, end))]
    return steps


@dataclass
class Pass(ABC):
    """All batches on their way through the layers of a model.

    Attributes:
        model: its weights outside of the layers are loaded.
        layers: its decoder layers; those of the layer that is visited are loaded.
        name: of the list of layers.
        batches: whatever ``losses`` takes.
        losses: of (model, batch): calls the model, returns a tensor of losses.
        held: hidden states and gradients between layers.
        device: where layers run.
        copies: tensors that are kept for one hidden state.
        found: the losses of each batch.
    """

    copies: ClassVar[int] = 1
    model: Any
    layers: Sequence[nn.Module]
    name: str
    batches: Sequence[Any]
    losses: Losses
    held: Boundaries
    device: torch.device
    found: list[Tensor] = field(default_factory=list[Tensor])
    calls: list[list[Call]] = field(default_factory=list[list[Call]])

    def run(self, loader: Loader, keep_every: int) -> None:
        """Through all layers and back."""
        count = len(self.layers)
        self._front(min(count, -(-count // keep_every) + keep_every) + 2)
        visits = {"forward": self.forward, "head": self.head, "backward": self.backward}
        with closing(loader.visits(schedule(count, keep_every), lambda step: step.layer)) as steps:
            for step in steps:
                visits[step.kind](step)

    def _front(self, kept: int) -> None:
        """What the layers are called with; ``kept`` times the hidden states have to find room."""
        nbytes = 0
        for at, batch in enumerate(self.batches):
            hidden, calls = observe(self.model, self.layers, lambda batch=batch: self.losses(self.model, batch))
            self.calls.append(calls)
            nbytes += hidden.nbytes * self.copies
            self.held.require(kept * nbytes)
            self.start(at, hidden)

    def start(self, at: int, hidden: Tensor) -> None:
        """Keep what goes into the first layer."""
        self.held.put(("h", 0, at), hidden)

    def take(self, kind: str, layer: int, at: int, *, drop: bool) -> Tensor:
        """What is kept, on the device."""
        tensor = self.held.get((kind, layer, at)).to(self.device)
        if drop:
            self.held.drop((kind, layer, at))
        return tensor

    @abstractmethod
    def forward(self, step: Step) -> None:
        """Make the hidden states behind a layer."""

    @abstractmethod
    def head(self, step: Step) -> None:
        """Make losses, and gradients of the last layer's output."""

    @abstractmethod
    def backward(self, step: Step) -> None:
        """Make gradients of a layer's input."""


def hidden_of(layer: nn.Module, output: Any) -> Tensor:
    """A layer's output, which has to be the hidden state alone."""
    if isinstance(output, Tensor):
        return output
    raise LayerwiseError(
        f"{type(layer).__name__} returns a {type(output).__name__}; wanted the hidden state alone. Run this model in "
        "memory."
    )

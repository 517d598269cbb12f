"""Backward through one layer after the other: what autograd does for the whole model, with one layer in memory."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from curvkern.layerwise.calls import injected
from curvkern.layerwise.sweep import Pass, Step, hidden_of


@dataclass(frozen=True)
class Place:
    """Where a backward pass is.

    Attributes:
        index: number of the decoder layer; None: what follows the layers, final norm and head.
        name: of the layer among the model's modules, to put before its parameters' names; "" for the head.
        module: the layer, its weights loaded; for the head the whole model, whose layers have none.
    """

    index: int | None
    name: str
    module: nn.Module


Watch = Callable[[Place], AbstractContextManager[Callable[[Any], object]]]
OnHidden = Callable[[int, int, Tensor], object]


@contextmanager
def unwatched(place: Place) -> Generator[Callable[[Any], object]]:
    """Nobody looks."""
    yield lambda batch: None


@dataclass
class GradientPass(Pass):
    """Gradients of hidden states; whoever watches sees those inside the layers.

    Attributes:
        watch: a context for the backward passes of all batches through a place; what it gives is told of each batch
            before it runs.
        on_hidden: told of (layer, batch, gradient of the layer's input); the layer after the last: of its output.
    """

    watch: Watch = unwatched
    on_hidden: OnHidden = lambda layer, batch, gradient: None

    @torch.no_grad()
    def forward(self, step: Step) -> None:
        """As the model's own."""
        for at in range(len(self.batches)):
            hidden = self.take("h", step.layer, at, drop=step.drop)
            self.held.put(("h", step.layer + 1, at), self._output(step.layer, at, hidden))

    def head(self, step: Step) -> None:
        """Final norm, head and loss run as the model's own, with nothing in place of its layers."""
        end = len(self.layers)
        with self.watch(Place(None, "", self.model)) as started:
            for at, batch in enumerate(self.batches):
                started(batch)
                hidden = self.take("h", end, at, drop=True).requires_grad_()
                with torch.enable_grad(), injected(self.layers, hidden):
                    losses = self.losses(self.model, batch)
                    losses.sum().backward()
                self.found.append(losses.detach().cpu())
                self._hand_on(end, at, hidden)

    def backward(self, step: Step) -> None:
        """The layer's forward once more, now with a graph, and back through that."""
        layer = self.layers[step.layer]
        with self.watch(Place(step.layer, f"{self.name}.{step.layer}", layer)) as started:
            for at, batch in enumerate(self.batches):
                started(batch)
                hidden = self.take("h", step.layer, at, drop=True).requires_grad_()
                gradient = self.take("g", step.layer + 1, at, drop=True)
                with torch.enable_grad():
                    self._output(step.layer, at, hidden).backward(gradient)
                self._hand_on(step.layer, at, hidden)

    def _output(self, index: int, at: int, hidden: Tensor) -> Tensor:
        args, kwargs = self.calls[at][index].to(self.device)
        return hidden_of(self.layers[index], self.layers[index](hidden, *args, **kwargs))

    def _hand_on(self, layer: int, at: int, hidden: Tensor) -> None:
        gradient = torch.zeros_like(hidden) if hidden.grad is None else hidden.grad
        self.on_hidden(layer, at, gradient)
        if layer > 0:
            self.held.put(("g", layer, at), gradient)

r"""Exact products with the Hessian of the whole model, one layer after the other.

A layer y = f(x, w) hands the gradient g of its output back as :math:`(g_x, g_w) = J_f(x, w)^\top g`. Along a direction
v of the weights, states and gradients have tangents: :math:`y' = J_f (x', v)` on the way up, and on the way down
:math:`(g_x', g_w')`, the derivative of :math:`J_f(x, w)^\top g` along :math:`(x', v, g')`. :math:`g_w'` is what the
weights of this layer have of H v. Source: Pearlmutter 1994, "Fast exact multiplication by the Hessian", section 3;
forward over reverse as in Griewank and Walther 2008, "Evaluating Derivatives".
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vjp

from curvkern.layerwise.calls import first_hidden, injected
from curvkern.layerwise.error import LayerwiseError
from curvkern.layerwise.sweep import Losses, Pass, Step, hidden_of

Direction = Callable[[str, Tensor], Tensor | None]
OnProduct = Callable[[str, Tensor], object]
Tensors = dict[str, Tensor]

jvp: Any = torch.func.jvp  # whose annotations leave open how many things it returns


@dataclass
class TangentPass(Pass):
    """Hidden states and gradients, each with its tangent.

    Attributes:
        direction: of (name, parameter), its part of v; None: the parameter is no variable.
        on_product: takes (name, what a batch adds to that part of H v).
    """

    copies: ClassVar[int] = 2
    direction: Direction = lambda name, parameter: None
    on_product: OnProduct = lambda name, product: None

    def start(self, at: int, hidden: Tensor) -> None:
        """The embeddings' output and its tangent."""
        weights, v = self._outside()
        tangent = torch.zeros_like(hidden)
        if weights:
            _, tangent = jvp(self._embedded(at), (weights,), (v,))
        self._keep("h", 0, at, hidden, tangent)

    def forward(self, step: Step) -> None:
        """Output and tangent of a layer."""
        weights, v = self._inside(step.layer)
        for at in range(len(self.batches)):
            x, dx = self._both("h", step.layer, at, drop=step.drop)
            y, dy = jvp(self._function(step.layer, at), (x, weights), (dx, v))
            self._keep("h", step.layer + 1, at, y, dy)

    def head(self, step: Step) -> None:
        """Gradient of the loss by the last layer's output, and its tangent."""
        end = len(self.layers)
        weights, v = self._outside()
        for at in range(len(self.batches)):
            x, dx = self._both("h", end, at, drop=True)
            gradient = grad(self._loss(at), argnums=(0, 1), has_aux=True)
            (gx, _), (dgx, dgw), losses = jvp(gradient, (x, weights), (dx, v), has_aux=True)
            self.found.append(losses.detach().cpu())
            self._tell("", dgw)
            self._keep("g", end, at, gx, dgx)

    def backward(self, step: Step) -> None:
        """Gradient of a layer's input, its tangent, and the weights' part of H v."""
        weights, v = self._inside(step.layer)
        for at in range(len(self.batches)):
            function = self._function(step.layer, at)

            def pulled(x: Tensor, w: Tensors, g: Tensor, f: Callable[..., Tensor] = function) -> tuple[Tensor, Tensors]:
                return vjp(f, x, w)[1](g)

            x, dx = self._both("h", step.layer, at, drop=True)
            g, dg = self._both("g", step.layer + 1, at, drop=True)
            (gx, _), (dgx, dgw) = jvp(pulled, (x, weights, g), (dx, v, dg))
            self._tell(f"{self.name}.{step.layer}.", dgw)
            if step.layer > 0:
                self._keep("g", step.layer, at, gx, dgx)
            else:
                self._embeddings(at, gx, dgx)

    def _embeddings(self, at: int, g: Tensor, dg: Tensor) -> None:
        weights, v = self._outside()
        if weights:
            _, (dgw,) = jvp(lambda w, g: vjp(self._embedded(at), w)[1](g), (weights, g), (v, dg))
            self._tell("", dgw)

    def _inside(self, index: int) -> tuple[Tensors, Tensors]:
        return self._variables(f"{self.name}.{index}.", self.layers[index].named_parameters())

    def _outside(self) -> tuple[Tensors, Tensors]:
        inside = f"{self.name}."
        return self._variables("", ((n, p) for n, p in self.model.named_parameters() if not n.startswith(inside)))

    def _variables(self, prefix: str, parameters: Iterable[tuple[str, Tensor]]) -> tuple[Tensors, Tensors]:
        """The weights that v has a part for, and these parts."""
        weights: Tensors = {}
        v: Tensors = {}
        for name, parameter in parameters:
            part = self.direction(prefix + name, parameter)
            if part is None:
                continue
            if part.shape != parameter.shape:
                raise LayerwiseError(
                    f"LayerwiseModel.tangent: the direction of {prefix}{name} is {list(part.shape)}; wanted "
                    f"{list(parameter.shape)}"
                )
            weights[name] = parameter.detach()
            v[name] = part.to(parameter.device, parameter.dtype)
        return weights, v

    def _function(self, index: int, at: int) -> Callable[[Tensor, Tensors], Tensor]:
        layer = self.layers[index]
        args, kwargs = self.calls[at][index].to(self.device)
        return lambda x, w: hidden_of(layer, functional_call(layer, w, (x, *args), kwargs))

    def _loss(self, at: int) -> Callable[[Tensor, Tensors], tuple[Tensor, Tensor]]:
        def loss(x: Tensor, w: Tensors) -> tuple[Tensor, Tensor]:
            with injected(self.layers, x):
                losses = self._called(at, w)
            return losses.sum(), losses

        return loss

    def _embedded(self, at: int) -> Callable[[Tensors], Tensor]:
        return lambda w: first_hidden(self.layers, lambda: self._called(at, w))

    def _called(self, at: int, weights: Tensors) -> Tensor:
        """The losses of a batch under other weights outside of the layers."""
        named = {f"model.{name}": weight for name, weight in weights.items()}
        return functional_call(_Called(self.model, self.losses), named, (self.batches[at],))

    def _tell(self, prefix: str, products: Tensors) -> None:
        for name, product in products.items():
            self.on_product(prefix + name, product.detach())

    def _keep(self, kind: str, layer: int, at: int, value: Tensor, tangent: Tensor) -> None:
        self.held.put((kind, layer, at), value)
        self.held.put((f"d{kind}", layer, at), tangent)

    def _both(self, kind: str, layer: int, at: int, *, drop: bool) -> tuple[Tensor, Tensor]:
        return self.take(kind, layer, at, drop=drop), self.take(f"d{kind}", layer, at, drop=drop)


class _Called(nn.Module):
    """A loss function as a module, whose parameters can be put in place of."""

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model = model
        self.losses = losses

    def forward(self, batch: Any) -> Tensor:
        return self.losses(self.model, batch)


@contextmanager
def plain_operations(model: Any) -> Generator[None]:
    """Inside, attention and experts are made of operations that have derivatives of both kinds; fused ones have not."""
    attention = model.config._attn_implementation
    experts = getattr(model.config, "_experts_implementation", None)
    try:
        model.set_attn_implementation("eager")
        if experts is not None:
            model.config._experts_implementation = "eager"
        yield
    finally:
        model.set_attn_implementation(attention)
        if experts is not None:
            model.config._experts_implementation = experts

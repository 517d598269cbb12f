"""The diagonal of the loss's Hessian, by Hutchinson's random probes and exact products with the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from curvkern.ops import hutchinson_, rademacher_


class _SignedSum(torch.autograd.Function):
    """<g, v> for v of +-1, which is made again for the way back: it is never stored."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, seed: int, offset: int) -> Tensor:
        """A scalar in float32."""
        ctx.like = grad.shape, grad.dtype, grad.device
        ctx.stream = seed, offset
        return (grad * _signs(*ctx.like, seed, offset)).sum(dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The signs."""
        return grad.to(ctx.like[1]) * _signs(*ctx.like, *ctx.stream), None, None


def _signs(shape: torch.Size, dtype: torch.dtype, device: torch.device, seed: int, offset: int) -> Tensor:
    return rademacher_(torch.empty(shape, dtype=dtype, device=device), seed=seed, offset=offset)


class Probes:
    r"""Sums of :math:`v \odot H v` over probes, H the Hessian of the losses that are given.

    The signs of a probe depend on its number, the seed and the parameter's place, not on the batch: over batches
    products add up to those with the Hessian of all data.

    Attributes:
        found: ``hessian_diag`` (like the parameter, mean over probes), ``hessian_trace`` [probes].
    """

    def __init__(self, shapes: Mapping[str, torch.Size], device: torch.device, probes: int, seed: int) -> None:
        self._probes = probes
        self._seed = seed
        self._offsets = dict(zip(shapes, _starts(shapes.values()), strict=True))
        diag = {name: torch.zeros(shape, device=device) for name, shape in shapes.items()}
        trace = {name: torch.zeros(probes, device=device) for name in shapes}
        self.found: dict[str, dict[str, Tensor]] = {"hessian_diag": diag, "hessian_trace": trace}

    def direction(self, name: str, like: Tensor, probe: int) -> Tensor:
        """The signs of a parameter, made anew."""
        return _signs(like.shape, like.dtype, like.device, self._seed + probe, self._offsets[name])

    def add_product(self, name: str, product: Tensor, probe: int, scale: float = 1.0) -> None:
        """Add what a probe's product with the Hessian says of a parameter, times ``scale``."""
        seed, offset = self._seed + probe, self._offsets[name]
        product, diag = product.contiguous(), self.found["hessian_diag"][name]
        hutchinson_(diag, product, seed=seed, offset=offset, scale=scale / self._probes)
        mean, whole = torch.zeros(1, 1, device=product.device), (1, product.numel())
        hutchinson_(mean, product.view(whole), seed=seed, offset=offset, block=whole, scale=scale)
        self.found["hessian_trace"][name][probe] += mean[0, 0] * product.numel()

    def add(self, parameters: Mapping[str, nn.Parameter], loss: Tensor) -> None:
        """Add the exact products of one batch, whose losses sum to ``loss``."""
        grads: Sequence[Tensor | None] = torch.autograd.grad(
            loss, list(parameters.values()), create_graph=True, allow_unused=True
        )
        used = [(name, g) for name, g in zip(parameters, grads, strict=True) if g is not None]  # pyright: ignore[reportUnnecessaryComparison]
        for probe in range(self._probes):
            signed = [_SignedSum.apply(g, self._seed + probe, self._offsets[name]) for name, g in used]  # pyright: ignore[reportUnknownMemberType]
            total = torch.stack(cast("list[Tensor]", signed)).sum()
            self._take(parameters, total, probe, 1.0, again=probe + 1 < self._probes)

    def add_differences(self, parameters: Mapping[str, nn.Parameter], loss: Callable[[], Tensor]) -> None:
        r"""Add :math:`v \odot (g(w + \epsilon v) - g(w - \epsilon v)) / 2 \epsilon` of one batch, with gradients alone.

        ``loss`` runs the model and gives the sum of its losses. :math:`\epsilon` is the cube root of the weights'
        rounding times their root mean square: where the error of the difference, which grows with its square, meets
        that of rounding. Weights are put back bit for bit.
        """
        kept = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        squares = sum(float(w.float().square().sum()) for w in kept.values())
        rounding = max(torch.finfo(w.dtype).eps for w in kept.values())
        step = rounding ** (1 / 3) * (squares / sum(w.numel() for w in kept.values())) ** 0.5
        try:
            for probe in range(self._probes):
                for side in (step, -step):
                    self._move(parameters, kept, probe, side)
                    self._take(parameters, loss(), probe, 0.5 / side)
        finally:
            self._move(parameters, kept, 0, 0.0)

    @torch.no_grad()
    def _move(
        self, parameters: Mapping[str, nn.Parameter], origin: Mapping[str, Tensor], probe: int, step: float
    ) -> None:
        """Put the weights ``step`` along the probe from their origin."""
        for name, parameter in parameters.items():
            parameter.copy_(origin[name])
            if step:
                parameter.add_(self.direction(name, parameter, probe), alpha=step)

    def _take(
        self, parameters: Mapping[str, nn.Parameter], loss: Tensor, probe: int, scale: float, *, again: bool = False
    ) -> None:
        """A backward whose gradients are added, times ``scale``, each as soon as it is whole, and let go of.

        ``again``: its graph is needed once more.
        """

        def take(name: str, parameter: Tensor) -> None:
            product, parameter.grad = parameter.grad, None
            if product is not None:
                with torch.no_grad():
                    self.add_product(name, product, probe, scale)

        handles = [
            parameter.register_post_accumulate_grad_hook(partial(take, name)) for name, parameter in parameters.items()
        ]
        try:
            loss.backward(retain_graph=again)
        finally:
            for handle in handles:
                handle.remove()


def _starts(shapes: Iterable[torch.Size]) -> Sequence[int]:
    """Where each parameter's signs begin in a probe's stream."""
    starts, at = list[int](), 0
    for shape in shapes:
        starts.append(at)
        at += shape.numel()
    return starts


@contextmanager
def twice_differentiable(model: Any) -> Generator[None]:
    """Attention and experts in plain operations: the fused ones have no second derivative."""
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

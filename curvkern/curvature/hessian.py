"""The diagonal of the loss's Hessian, by Hutchinson's random probes and exact products with the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
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

    def __init__(self, parameters: dict[str, nn.Parameter], probes: int, seed: int) -> None:
        self._parameters = parameters
        self._probes = probes
        self._seed = seed
        self._offsets = dict(zip(parameters, _starts(parameters.values()), strict=True))
        diag, trace = ({}, {})
        for name, parameter in parameters.items():
            diag[name] = torch.zeros(parameter.shape, device=parameter.device)
            trace[name] = torch.zeros(probes, device=parameter.device)
        self.found: dict[str, dict[str, Tensor]] = {"hessian_diag": diag, "hessian_trace": trace}

    def add(self, loss: Callable[[], Tensor]) -> None:
        """Add the exact products of one batch; ``loss`` runs the model and gives the sum of its losses."""
        for probe in range(self._probes):
            grads: Sequence[Tensor | None] = torch.autograd.grad(
                loss(), list(self._parameters.values()), create_graph=True, allow_unused=True
            )
            used = [(name, g) for name, g in zip(self._parameters, grads, strict=True) if g is not None]  # pyright: ignore[reportUnnecessaryComparison]
            signed = [_SignedSum.apply(g, self._seed + probe, self._offsets[name]) for name, g in used]  # pyright: ignore[reportUnknownMemberType]
            total = torch.stack(cast("list[Tensor]", signed)).sum()
            del grads, used, signed
            self._take(total, probe, 1.0)

    def add_differences(self, loss: Callable[[], Tensor]) -> None:
        r"""Add :math:`v \odot (g(w + \epsilon v) - g(w - \epsilon v)) / 2 \epsilon` of one batch, with gradients alone.

        :math:`\epsilon` is the cube root of the weights' rounding times their root mean square: where the error of the
        difference, which grows with its square, meets that of rounding. Weights are put back bit for bit.
        """
        kept = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        squares = sum(float(w.float().square().sum()) for w in kept.values())
        rounding = max(torch.finfo(w.dtype).eps for w in kept.values())
        step = rounding ** (1 / 3) * (squares / sum(w.numel() for w in kept.values())) ** 0.5
        try:
            for probe in range(self._probes):
                for side in (step, -step):
                    self._move(kept, probe, side)
                    self._take(loss(), probe, 0.5 / side)
        finally:
            self._move(kept, 0, 0.0)

    @torch.no_grad()
    def _move(self, origin: dict[str, Tensor], probe: int, step: float) -> None:
        """Put the weights ``step`` along the probe from their origin."""
        seed = self._seed + probe
        for name, parameter in self._parameters.items():
            parameter.copy_(origin[name])
            if step:
                signs = _signs(parameter.shape, parameter.dtype, parameter.device, seed, self._offsets[name])
                parameter.add_(signs, alpha=step)

    def _take(self, loss: Tensor, probe: int, scale: float) -> None:
        """A backward whose gradients are added, times ``scale``, each as soon as it is whole, and let go of."""

        def take(name: str, parameter: Tensor) -> None:
            product, parameter.grad = parameter.grad, None
            if product is None:
                return
            seed, offset = self._seed + probe, self._offsets[name]
            with torch.no_grad():
                product, diag = product.contiguous(), self.found["hessian_diag"][name]
                hutchinson_(diag, product, seed=seed, offset=offset, scale=scale / self._probes)
                mean, whole = torch.zeros(1, 1, device=product.device), (1, product.numel())
                hutchinson_(mean, product.view(whole), seed=seed, offset=offset, block=whole, scale=scale)
                self.found["hessian_trace"][name][probe] += mean[0, 0] * product.numel()

        handles = [
            parameter.register_post_accumulate_grad_hook(partial(take, name))
            for name, parameter in self._parameters.items()
        ]
        try:
            loss.backward()
        finally:
            for handle in handles:
                handle.remove()


def _starts(parameters: Any) -> Sequence[int]:
    """Where each parameter's signs begin in a probe's stream."""
    starts, at = list[int](), 0
    for parameter in parameters:
        starts.append(at)
        at += parameter.numel()
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

"""The diagonal of the loss's Hessian, by Hutchinson's random probes and exact products with the Hessian."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any

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
        diag, trace = ({}, {})
        for name, parameter in parameters.items():
            diag[name] = torch.zeros(parameter.shape, device=parameter.device)
            trace[name] = torch.zeros(probes, device=parameter.device)
        self.found: dict[str, dict[str, Tensor]] = {"hessian_diag": diag, "hessian_trace": trace}

    def add(self, loss: Callable[[], Tensor]) -> None:
        """Add the products of one batch; ``loss`` runs the model and gives the sum of its losses."""
        offsets = dict(zip(self._parameters, _starts(self._parameters.values()), strict=True))
        for probe in range(self._probes):
            seed = self._seed + probe
            grads: Sequence[Tensor | None] = torch.autograd.grad(
                loss(), list(self._parameters.values()), create_graph=True, allow_unused=True
            )
            used = [(name, g) for name, g in zip(self._parameters, grads, strict=True) if g is not None]  # pyright: ignore[reportUnnecessaryComparison]
            total = torch.stack([_SignedSum.apply(g, seed, offsets[name]) for name, g in used]).sum()  # pyright: ignore[reportArgumentType, reportUnknownMemberType, reportUnknownArgumentType]
            del grads, used
            handles = [
                parameter.register_post_accumulate_grad_hook(self._taker(name, probe, seed, offsets[name]))
                for name, parameter in self._parameters.items()
            ]
            try:
                total.backward()
            finally:
                for handle in handles:
                    handle.remove()

    def _taker(self, name: str, probe: int, seed: int, offset: int) -> Callable[[Tensor], None]:
        """Takes a parameter's product as soon as it is whole, and lets go of it."""

        def take(parameter: Tensor) -> None:
            product, parameter.grad = parameter.grad, None
            if product is None:
                return
            with torch.no_grad():
                product = product.contiguous()
                hutchinson_(self.found["hessian_diag"][name], product, seed=seed, offset=offset, scale=1 / self._probes)
                mean = torch.zeros(1, 1, device=product.device)
                hutchinson_(mean, product.view(1, -1), seed=seed, offset=offset, block=(1, product.numel()))
                self.found["hessian_trace"][name][probe] += mean[0, 0] * product.numel()

        return take


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

"""Pairs of (activation, output gradient) of every linear module of a model, taken while it runs.

A hook puts a tap behind each module: an identity whose backward hands on the gradient it sees, together with the input
that its forward kept. That is exact under gradient checkpointing of either kind (what is run again makes taps of its
own, and only those whose backward runs count), and no parameter needs to require grad: the gradient of a weight is
never formed unless a statistic asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from curvkern.curvature.hidden import CurvatureError, is_conv1d


@dataclass(frozen=True)
class Site:
    """A weight that statistics are gathered of.

    Attributes:
        name: of the parameter, as the model names it.
        shape: of the parameter: [out, in]; GPT-2's Conv1D keeps [in, out], fused experts [experts, out, in].
        transposed: the parameter is [in, out].
        bias: name of the bias, or None.
        modules: the modules that use the weight; several where it is tied.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    bias: str | None
    modules: tuple[nn.Module, ...]


@dataclass(frozen=True)
class Pair:
    """What one batch says of one weight; G = sum over tokens of grad_output^T activation.

    Attributes:
        grad_output: [n, t, out], or packed [tokens, out] with `cu_seqlens`.
        activation: [n, t, in] or [tokens, in].
        mask: bool [n, t], or None: tokens that count.
        cu_seqlens: int [runs + 1] of packed input: a run is what one sample sent to one expert.
        segments: int [experts + 1]: which tokens went to which expert.
    """

    grad_output: Tensor
    activation: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    segments: Tensor | None = None


Sink = Callable[[Site, Pair], None]


class Tap(torch.autograd.Function):
    """The identity; its backward hands (activation, gradient) on."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, activation: Tensor, sink: Callable[[Tensor, Tensor], None]) -> Tensor:
        """``output``; ``sink`` gets (activation, gradient)."""
        ctx.save_for_backward(activation)
        ctx.sink = sink
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """The gradient as it came."""
        ctx.sink(ctx.saved_tensors[0], grad)
        return grad, None, None


def linear_sites(model: nn.Module) -> list[Site]:
    """The weights of all linear modules, tied ones once."""
    owners: dict[int, list[tuple[str, Any]]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or is_conv1d(module):
            owners.setdefault(id(module.weight), []).append((name, module))
    sites: list[Site] = []
    for used in owners.values():
        (name, module), modules = used[0], tuple(module for _, module in used)
        prefix = f"{name}." if name else ""
        bias = f"{prefix}bias" if getattr(module, "bias", None) is not None else None
        sites.append(Site(f"{prefix}weight", tuple(module.weight.shape), is_conv1d(module), bias, modules))
    return sites


def select(sites: Sequence[Site], include: Sequence[str], exclude: Sequence[str]) -> tuple[list[Site], list[Site]]:
    """Sites by patterns (``*``, ``?``) on their names: (linear modules', fused experts').

    Args:
        sites: of the model.
        include: empty: all inside numbered layers.
        exclude: weights to leave out.

    Raises:
        CurvatureError: a pattern matches nothing (says what there is), or nothing is left.
    """
    names = [site.name for site in sites]
    there_is = f"there are {len(names)} weights, such as {', '.join(names[:4])}"
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CurvatureError(f"estimate: the pattern {pattern!r} matches nothing; {there_is}")
    kept = [site for site in sites if _wanted(site.name, include, exclude)]
    if not kept:
        raise CurvatureError(f"estimate: no weight is selected; {there_is}")
    return [site for site in kept if len(site.shape) == 2], [site for site in kept if len(site.shape) == 3]


def _wanted(name: str, include: Sequence[str], exclude: Sequence[str]) -> bool:
    inside = any(fnmatchcase(name, p) for p in include) if include else any(part.isdigit() for part in name.split("."))
    return inside and not any(fnmatchcase(name, pattern) for pattern in exclude)


@contextmanager
def tapped(sites: Sequence[Site], uses: Mapping[str, int], sink: Sink, mask: Callable[[], Tensor]) -> Generator[None]:
    """Inside, every backward through the model hands each site's pair to ``sink``, once it is complete.

    Args:
        sites: from `linear_sites`.
        uses: how often a forward uses each, from `count_uses`; what comes in parts is put together along tokens.
        sink: takes the pairs; called inside backward, in its order.
        mask: bool [n, t] of the batch that runs: its tokens that are no padding.
    """
    parts: dict[str, list[tuple[Tensor, Tensor]]] = {site.name: [] for site in sites}

    def collect(site: Site, activation: Tensor, grad: Tensor) -> None:
        held = parts[site.name]
        held.append((grad, activation))
        if len(held) == uses[site.name]:
            parts[site.name] = []
            sink(site, _joined(site, held, mask()))

    def hook(site: Site) -> Callable[..., Any]:
        def after(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not (torch.is_grad_enabled() and output.requires_grad):
                return None
            return Tap.apply(output, arguments[0].detach(), lambda x, g: collect(site, x, g))  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]

        return after

    handles = [module.register_forward_hook(hook(site)) for site in sites for module in site.modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    left = [name for name, held in parts.items() if held]
    if left:
        raise CurvatureError(f"estimate: {left[0]} was used another number of times than in the first forward")


def _joined(site: Site, parts: list[tuple[Tensor, Tensor]], mask: Tensor) -> Pair:
    """One pair of all uses of a weight in a forward: a sample's gradient is the sum over them."""
    grads, activations = ([_by_sample(site, x, mask) for x in side] for side in zip(*parts, strict=True))
    if len(parts) == 1:
        return Pair(grads[0], activations[0], mask)
    return Pair(torch.cat(grads, 1), torch.cat(activations, 1), mask.repeat(1, len(parts)))


def _by_sample(site: Site, x: Tensor, mask: Tensor) -> Tensor:
    """[n, t, features] of [n, t, features] or of all tokens in one row."""
    if x.shape[:2] == mask.shape and x.ndim == 3:
        return x
    if x.ndim == 2 and len(x) == mask.numel():
        return x.view(*mask.shape, -1)
    raise CurvatureError(
        f"estimate: {site.name} was given {list(x.shape)} in a batch of {list(mask.shape)} tokens: which sample its "
        "rows belong to cannot be told. Leave it out with exclude."
    )


@contextmanager
def _counting(sites: Sequence[Site], counts: dict[str, int]) -> Generator[None]:
    def count(name: str) -> Callable[..., None]:
        def after(*_: Any) -> None:
            counts[name] += 1

        return after

    handles = [module.register_forward_hook(count(site.name)) for site in sites for module in site.modules]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def count_uses(sites: Sequence[Site], forward: Callable[[], Any]) -> dict[str, int]:
    """How often one forward uses each weight."""
    counts = {site.name: 0 for site in sites}
    with torch.no_grad(), _counting(sites, counts):
        forward()
    return counts

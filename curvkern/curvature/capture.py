"""Pairs of (activation, output gradient) of every module of a model that has a weight, taken while it runs.

A hook puts a tap behind each module: an identity whose backward hands on the gradient it sees, together with the input
that its forward kept. That is exact under gradient checkpointing of either kind (what is run again makes taps of its
own, and only those whose backward runs count), and no parameter needs to require grad: the gradient of a weight is
never formed unless a statistic asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from curvkern.curvature.hidden import CurvatureError, is_conv1d

Kind = Literal["linear", "experts", "norm", "embedding", "quantised"]
#: What a model's weights are, of those that have gradients.
KINDS: tuple[Kind, ...] = get_args(Kind)[:-1]


_ORDER: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True)
class Site:
    """A weight that statistics are gathered of.

    Attributes:
        name: of the parameter, as the model names it.
        shape: of the parameter: [out, in]; GPT-2's Conv1D keeps [in, out], fused experts [experts, out, in].
        transposed: the parameter is [in, out].
        bias: name of the bias, or None.
        modules: the modules that use the weight; several where it is tied.
        kind: one of `KINDS`; a head that is tied to the embedding is an embedding.
    """

    name: str
    shape: tuple[int, ...]
    transposed: bool
    bias: str | None
    modules: tuple[nn.Module, ...]
    kind: Kind = "linear"


@dataclass(frozen=True)
class Pair:
    """What one batch says of one weight; G = sum over tokens of grad_output^T activation.

    Attributes:
        grad_output: [n, t, out], or packed [tokens, out] with `cu_seqlens`.
        activation: [n, t, in] or [tokens, in].
        mask: bool [n, t], or None: tokens that count.
        cu_seqlens: int [runs + 1] of packed input: a run is what one sample sent to one expert.
        segments: int [experts + 1]: which tokens went to which expert.
        rows: int [k], of an embedding: the weight's rows that G has; the others are 0.
    """

    grad_output: Tensor
    activation: Tensor
    mask: Tensor | None = None
    cu_seqlens: Tensor | None = None
    segments: Tensor | None = None
    rows: Tensor | None = None


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


def sites_of(model: nn.Module) -> list[Site]:
    """The weights of linear modules, norms and embeddings, tied ones once; of quantised ones only the name counts."""
    owners: dict[int, list[tuple[str, Any, Kind]]] = {}
    every: Iterator[tuple[str, Any]] = model.named_modules()
    for name, module in every:
        kind = _kind(module)
        if kind is not None:
            owners.setdefault(id(module.weight), []).append((f"{name}." if name else "", module, kind))
    sites: list[Site] = []
    for used in owners.values():
        (prefix, module, _), modules = used[0], tuple(module for _, module, _ in used)
        kinds: set[Kind] = {kind for _, _, kind in used}
        bias = f"{prefix}bias" if getattr(module, "bias", None) is not None else None
        shape = tuple(module.weight.shape)
        sites.append(Site(f"{prefix}weight", shape, is_conv1d(module), bias, modules, max(kinds, key=_ORDER.index)))
    return sites


def _kind(module: Any) -> Kind | None:
    weight = getattr(module, "weight", None)
    if isinstance(module, nn.Linear) and not cast("Tensor", weight).is_floating_point():
        return "quantised"
    if isinstance(module, nn.Linear) or is_conv1d(module):
        return "linear"
    if isinstance(module, nn.Embedding):
        return "embedding"
    is_norm = "Norm" in type(module).__name__ and isinstance(weight, nn.Parameter) and weight.ndim == 1
    return "norm" if is_norm else None


def select(
    sites: Sequence[Site], include: Sequence[str], exclude: Sequence[str], kinds: Sequence[str]
) -> tuple[list[Site], list[Site]]:
    """Sites by kind and by patterns (``*``, ``?``) on their names: (those of `tapped`, fused experts').

    Args:
        sites: of the model.
        include: empty: all inside numbered layers, and norms and embeddings anywhere.
        exclude: weights to leave out.
        kinds: of `KINDS`.

    Raises:
        CurvatureError: a pattern matches nothing (says what there is), or nothing is left.
    """
    quantised = sum(site.kind == "quantised" for site in sites)
    sites = [site for site in sites if site.kind in kinds]
    names = [site.name for site in sites]
    there_is = f"there are {len(names)} weights of {', '.join(kinds)} modules, such as {', '.join(names[:4])}"
    if quantised:
        there_is += (
            f"; {quantised} more are quantised and have no gradient: load the model in a floating-point dtype, or "
            "measure an adapter on top"
        )
    for pattern in (*include, *exclude):
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CurvatureError(f"estimate: the pattern {pattern!r} matches nothing; {there_is}")
    kept = [site for site in sites if _wanted(site, include, exclude)]
    if not kept:
        raise CurvatureError(f"estimate: no weight is selected; {there_is}")
    return [site for site in kept if site.kind != "experts"], [site for site in kept if site.kind == "experts"]


def _wanted(site: Site, include: Sequence[str], exclude: Sequence[str]) -> bool:
    in_layer = any(part.isdigit() for part in site.name.split(".")) or site.kind in ("norm", "embedding")
    inside = any(fnmatchcase(site.name, p) for p in include) if include else in_layer
    return inside and not any(fnmatchcase(site.name, pattern) for pattern in exclude)


@contextmanager
def tapped(sites: Sequence[Site], uses: Mapping[str, int], sink: Sink, mask: Callable[[], Tensor]) -> Generator[None]:
    """Inside, every backward through the model hands each site's pair to ``sink``, once it is complete.

    Args:
        sites: from `sites_of`.
        uses: how often a forward uses each, from `count_uses`; what comes in parts is put together along tokens.
        sink: takes the pairs; called inside backward, in its order.
        mask: bool [n, t] of the batch that runs: its tokens that are no padding.
    """
    parts: dict[str, list[tuple[Any, Tensor, Tensor]]] = {site.name: [] for site in sites}

    def collect(site: Site, module: nn.Module, activation: Tensor, grad: Tensor) -> None:
        held = parts[site.name]
        held.append((module, grad, activation))
        if len(held) == uses[site.name]:
            parts[site.name] = []
            sink(site, _joined(site, held, mask()))

    def hook(site: Site) -> Callable[..., Any]:
        def after(module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not (torch.is_grad_enabled() and output.requires_grad):
                return None
            kept = _slope(module, *arguments) if site.kind == "norm" else arguments[0].detach()
            return Tap.apply(output, kept, lambda x, g: collect(site, module, x, g))  # pyright: ignore[reportUnknownVariableType, reportUnknownMemberType]

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


def _slope(module: nn.Module, *arguments: Any) -> Tensor:
    """What a norm's weight is multiplied by, element by element: its output is affine in the weight."""
    with torch.no_grad():
        ends = [
            torch.func.functional_call(module, {"weight": fill(cast("Tensor", module.weight))}, arguments)
            for fill in (torch.ones_like, torch.zeros_like)
        ]
    return ends[0] - ends[1]


def _joined(site: Site, parts: list[tuple[Any, Tensor, Tensor]], mask: Tensor) -> Pair:
    """One pair of all uses of a weight in a forward: a sample's gradient is the sum over them."""
    if site.kind == "embedding":
        return _of_embedding(site, parts, mask)
    grads, activations = ([_by_sample(site, x, mask) for x in side] for side in list(zip(*parts, strict=True))[1:])
    if len(parts) == 1:
        return Pair(grads[0], activations[0], mask)
    return Pair(torch.cat(grads, 1), torch.cat(activations, 1), mask.repeat(1, len(parts)))


def _of_embedding(site: Site, parts: list[tuple[Any, Tensor, Tensor]], mask: Tensor) -> Pair:
    """An embedding is a linear map of one-hot rows: G = sum over tokens of onehot^T grad, over the rows that occur.

    A head that is tied to it uses all rows.
    """
    ids = [x for module, _, x in parts if isinstance(module, nn.Embedding)]
    rows = torch.cat(ids).unique() if len(ids) == len(parts) else None
    left: list[Tensor] = []
    right: list[Tensor] = []
    for module, grad, x in parts:
        grad = _by_sample(site, grad, mask)
        if not isinstance(module, nn.Embedding):
            left.append(grad)
            right.append(_by_sample(site, x, mask))
            continue
        at = x if rows is None else torch.searchsorted(rows, x)
        hot = nn.functional.one_hot(at, site.shape[0] if rows is None else len(rows)).to(grad.dtype)
        if module.padding_idx is not None:
            hot = hot * (x != module.padding_idx)[..., None]
        left.append(hot)
        right.append(grad * _scale(module, x))
    return Pair(torch.cat(left, 1), torch.cat(right, 1), mask.repeat(1, len(parts)), rows=rows)


def _scale(module: nn.Embedding, ids: Tensor) -> Tensor:
    """What an embedding multiplies its rows by: some models scale them."""
    with torch.no_grad():
        ones = module.weight.new_ones(1, 1).expand(module.weight.shape)
        return torch.func.functional_call(module, {"weight": ones}, (ids,))


def _by_sample(site: Site, x: Tensor, mask: Tensor) -> Tensor:
    """[n, t, features] of [n, t, features] or of all tokens in one row; of norms [n, t, heads, features] too."""
    if x.shape[:2] == mask.shape and x.ndim == 3 + (site.kind == "norm" and x.ndim == 4):
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

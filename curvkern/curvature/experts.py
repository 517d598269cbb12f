"""Pairs of the fused experts of MoE layers: transformers keeps all experts of a layer in one 3-D parameter.

Hooks on linear modules miss them, and they are most of such a model. transformers lets a function take the place of an
experts module's forward; the one here sorts tokens by expert, so that what one sample sent to one expert is a run.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from curvkern.curvature.capture import Pair, Sink, Site, Tap

IMPLEMENTATION = "curvkern"


@dataclass(frozen=True)
class _Active:
    sites: dict[int, Site]  # by id of the parameter
    sink: Sink
    mask: Callable[[], Tensor]


_active: ContextVar[_Active | None] = ContextVar("curvkern_experts", default=None)


def expert_sites(model: nn.Module) -> list[Site]:
    """The fused expert weights of a model whose experts modules transformers can dispatch."""
    sites: list[Site] = []
    for name, module in model.named_modules():
        if not hasattr(module, "_apply_gate"):
            continue
        for parameter in ("gate_up_proj", "up_proj", "down_proj"):
            weight = getattr(module, parameter, None)
            if isinstance(weight, nn.Parameter) and weight.ndim == 3:
                transposed = bool(getattr(module, "is_transposed", False))
                sites.append(Site(f"{name}.{parameter}", tuple(weight.shape), transposed, None, (module,), "experts"))
    return sites


@contextmanager
def experts_tapped(model: Any, sites: Sequence[Site], sink: Sink, mask: Callable[[], Tensor]) -> Generator[None]:
    """Inside, a backward hands ``sink`` the pairs of ``sites``; outside, the model is as it was."""
    if not sites:
        yield
        return
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
    configs: dict[int, Any] = {id(module.config): module.config for site in sites for module in site.modules}
    before = {key: config._experts_implementation for key, config in configs.items()}
    by_parameter = {id(getattr(site.modules[0], site.name.rpartition(".")[2])): site for site in sites}
    token = _active.set(_Active(by_parameter, sink, mask))
    try:
        for config in configs.values():
            config._experts_implementation = IMPLEMENTATION
        yield
    finally:
        _active.reset(token)
        for key, config in configs.items():
            config._experts_implementation = before[key]


def _forward(self: Any, hidden: Tensor, experts: Tensor, weights: Tensor) -> Tensor:
    """An experts module: hidden [tokens, in], the k experts of each token and their weights [tokens, k]."""
    active, k = _active.get(), experts.shape[-1]
    order = experts.flatten().argsort(stable=True)
    tokens = order // k
    counts = experts.flatten().bincount(minlength=self.num_experts)
    runs = _Runs(active, tokens, experts.flatten()[order], self.num_experts)
    up = self.gate_up_proj if self.has_gate else self.up_proj
    biases = ("gate_up_proj_bias" if self.has_gate else "up_proj_bias", "down_proj_bias")
    up_bias, down_bias = (getattr(self, bias) if self.has_bias else None for bias in biases)
    inner = _grouped(runs, hidden[tokens], up, up_bias, counts, self.is_transposed)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    out = _grouped(runs, inner, self.down_proj, down_bias, counts, self.is_transposed)
    out = out * weights.flatten()[order, None]
    return torch.zeros_like(hidden).index_add_(0, tokens, out.to(hidden.dtype))


class _Runs:
    """Which sample and which expert the sorted tokens belong to."""

    def __init__(self, active: _Active | None, tokens: Tensor, expert: Tensor, experts: int) -> None:
        self.active = active
        if active is None:
            return
        mask = active.mask()
        n, t = mask.shape
        sizes = (expert * n + tokens // t).bincount(minlength=experts * n)
        self.cu_seqlens = torch.cat((sizes.new_zeros(1), sizes.cumsum(0)))
        self.segments = self.cu_seqlens[::n]
        self.mask = mask.flatten()[tokens]

    def tap(self, output: Tensor, activation: Tensor, weight: nn.Parameter) -> Tensor:
        """``output`` with a tap behind it, where the weight is wanted."""
        site = self.active.sites.get(id(weight)) if self.active else None
        if self.active is None or site is None or not (torch.is_grad_enabled() and output.requires_grad):
            return output
        sink = self.active.sink

        def collect(x: Tensor, grad: Tensor) -> None:
            sink(site, Pair(grad, x, self.mask, self.cu_seqlens, self.segments))

        return Tap.apply(output, activation.detach(), collect)  # pyright: ignore[reportReturnType, reportUnknownMemberType]


def _grouped(
    runs: _Runs, x: Tensor, weight: nn.Parameter, bias: Tensor | None, counts: Tensor, transposed: bool
) -> Tensor:
    """Every expert's linear map on its own tokens, which lie together."""
    parts: list[Tensor] = []
    for expert, part in enumerate(x.split(counts.tolist())):
        matrix = weight[expert].mT if transposed else weight[expert]
        parts.append(linear(part, matrix, None if bias is None else bias[expert]))
    return runs.tap(torch.cat(parts), x, weight)

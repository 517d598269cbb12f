"""A random mask: the baseline that every method with a mask must beat."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from pydantic import Field

from curvkern.methods.method import Edit, Method, Module
from curvkern.ops import rollback_


class Random(Method):
    """Reset exactly ceil(fraction * n) weights of every module, drawn uniformly, to the aligned model.

    The draw depends on the seed and the module's name alone, not on order or device.
    """

    name: ClassVar[str] = "random"
    source: ClassVar[str] = "baseline"

    fraction: float = Field(0.05, ge=0, le=1, description="share of each module's weights to reset")
    seed: int = Field(0, ge=0)

    def edit(self, module: Module, plan: Any) -> Edit:
        """Reset a random part of one module."""
        generator = torch.Generator().manual_seed(module.own_seed(self.seed))
        n = module.tuned.numel()
        drawn = torch.rand(n, generator=generator).topk(math.ceil(self.fraction * n)).indices
        mask = torch.zeros(n, dtype=torch.bool)
        mask[drawn] = True
        weight, aligned = module.tuned.clone(), module.aligned.to(module.tuned.dtype)
        mask = mask.view(weight.shape).to(weight.device)
        rollback_(weight, aligned, mask=mask)
        return Edit(weight, selected=int((mask & (module.tuned != aligned)).sum()))

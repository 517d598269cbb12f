"""Linear merge with the aligned model: the simplest baseline."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from curvkern.methods.method import Edit, Method, Module
from curvkern.ops import blend_


class Merge(Method):
    r"""Linear interpolation :math:`W = (1 - w) W_t + w W_a`, float32 inside, one rounding.

    Source: model merging as in Farn et al. 2024 (2412.19512), linear case.
    """

    name: ClassVar[str] = "merge"
    source: ClassVar[str] = "Farn et al. 2412.19512, linear"
    edits_adapter: ClassVar[bool] = True

    weight: float = Field(0.5, ge=0, le=1, description="share of the aligned model")

    def edit(self, module: Module, plan: Any) -> Edit:
        """Blend one module; an adapter's B is scaled by 1 - w."""
        blended = blend_(module.tuned.float().clone(), module.aligned.float(), self.weight)
        if module.factors is None:
            return Edit(blended)
        b, a, _ = module.factors
        return Edit(blended, factors=((b.float() * (1 - self.weight)).to(b.dtype), a))

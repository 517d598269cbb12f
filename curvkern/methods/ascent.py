"""One normalised step up the loss of harmful responses: the first-order baseline."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field

from curvkern.methods.method import Edit, Evidence, Method, MethodError, Module, Modules, Need
from curvkern.ops import axpby_, norm_list

HARMFUL_GRADIENT = Need("gradient", "harmful")


class Ascent(Method):
    r"""The perturbation at the heart of Panacea (Wang et al., NeurIPS 2025, 2501.18100), as one step after tuning.

    :math:`W = W_t + \rho\, g / \|g\|`, g the gradient of the harmful responses' loss at the tuned model, the norm over
    all selected modules together. There the step is found while training, on LoRA factors. It knows nothing of the
    task: what it costs is not bounded.
    """

    name: ClassVar[str] = "ascent"
    source: ClassVar[str] = "Wang et al. 2501.18100, inner step"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful"})

    rho: float = Field(1.0, gt=0, description="length of the step, over all modules together")

    def statistics(self) -> tuple[Need, ...]:
        """The gradient of the harmful responses' loss at the tuned model."""
        return (HARMFUL_GRADIENT,)

    def plan(self, modules: Modules, evidence: Evidence | None, tell: Callable[[str], None]) -> float:
        """One sweep: the norm of the gradient over all modules; the result is what to multiply it by."""
        square = sum(float(norm_list([module.statistics[HARMFUL_GRADIENT]])) ** 2 for module in modules())
        if not 0 < square < float("inf"):
            raise MethodError(
                f"ascent: the harmful gradient's squared norm is {square:g}; there is no direction to go."
            )
        tell(f"ascent: the harmful loss should rise by {self.rho * square**0.5:.4g} nats a token, to first order")
        return self.rho / square**0.5

    def edit(self, module: Module, plan: float) -> Edit:
        """Take one module's part of the step."""
        return Edit(axpby_(module.tuned.to(torch.float32, copy=True), plan, module.statistics[HARMFUL_GRADIENT], 1.0))

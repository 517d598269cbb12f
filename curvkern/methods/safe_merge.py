"""SafeMERGE: blend with a safety adapter where the update points away from the alignment direction."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from curvkern.methods.alignment import AlignmentMethod
from curvkern.methods.method import Edit, Evidence, MethodError, Module, Modules, given
from curvkern.ops import blend_, linear

Factors = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class _Plan:
    cosine: dict[str, float]
    chosen: frozenset[str]


class SafeMerge(AlignmentMethod):
    r"""SafeMERGE (Djuhera et al., 2503.17239): merge with a model tuned on safety data, module by module.

    Where :math:`\cos(C\Delta, \Delta)` (rounded to five decimals) is below ``threshold``, the update becomes

    - ``merge="delta"``: :math:`(1 - w) \Delta + w \Delta_s`, as the paper says; :math:`\Delta_s = W_s - W_a`.
    - ``merge="factors"``: as published, PEFT's linear merge of the factors, with their scales s,
      :math:`B = \sqrt{(1-w) s_1} B_1 + \sqrt{w s_2} B_2` and A likewise. Their product holds
      :math:`\sqrt{w (1 - w) s_1 s_2} (B_1 A_2 + B_2 A_1)` beside the blend. Both models must be LoRA adapters of one
      rank, and the result is one.

    w is ``weight``; for C, see ``projector`` of `AlignmentMethod`. Where aligned and base are equal C is 0, the cosine
    too, and the module is merged. Modules that fine-tuning left alone stay as they are.
    """

    name: ClassVar[str] = "safe_merge"
    source: ClassVar[str] = "Djuhera et al. 2503.17239"
    needs: ClassVar[frozenset[str]] = frozenset({"base", "safety_adapter"})

    threshold: float = Field(0.35, ge=-1, le=1, description="merge where the cosine is below this")
    weight: float = Field(0.2, ge=0, le=1, description="share of the safety adapter")
    merge: Literal["delta", "factors"] = "delta"

    def edits_adapter(self) -> bool:
        """A sum of factors is a factor; a sum of updates has their ranks together."""
        return self.merge == "factors"

    def plan(self, modules: Modules, evidence: Evidence | None, tell: Callable[[str], None]) -> _Plan:
        """One sweep: every module's cosine; merge where it is low."""
        cosine: dict[str, float] = {}
        chosen: set[str] = set()
        for module, found in self.measured(modules):
            cosine[module.name] = found
            if found < self.threshold:
                chosen.add(module.name)
                if self.merge == "factors":
                    _both_factors(module)
        tell(f"safe_merge: {len(chosen)} of {len(cosine)} modules merged")
        return _Plan(cosine, frozenset(chosen))

    def edit(self, module: Module, plan: _Plan) -> Edit:
        """Merge one module if it was chosen."""
        notes = {self.figure: plan.cosine[module.name]} if module.name in plan.cosine else {}
        if module.name not in plan.chosen:
            return Edit(notes=notes)
        if self.merge == "delta":
            safety = given(self, module.safety_adapter, "safety_adapter").float()
            return Edit(blend_(module.tuned.float().clone(), safety, self.weight), notes=notes)
        (b1, a1, s1), (b2, a2, s2) = _both_factors(module)
        # The adapter keeps its scale, so each factor is divided by its root.
        roots = [math.sqrt(1 - self.weight), math.sqrt(self.weight * s2 / s1)]
        b, a = (linear([x.float(), y.float()], roots).to(x.dtype) for x, y in ((b1, b2), (a1, a2)))
        return Edit(module.aligned.float() + s1 * (b.float() @ a.float()), factors=(b, a), notes=notes)


def _both_factors(module: Module) -> tuple[Factors, Factors]:
    """The factors of both adapters; zeros for a module that the safety adapter leaves alone.

    Raises:
        MethodError: a model changes the module by other means, or ranks or scales do not allow the merge.
    """
    tuned, safety = module.factors, module.safety_factors
    if tuned is not None and safety is None and _equal(module.safety_adapter, module.aligned):
        safety = torch.zeros_like(tuned[0]), torch.zeros_like(tuned[1]), tuned[2]
    if tuned is None or safety is None:
        which = "tuned model" if tuned is None else "safety adapter"
        raise MethodError(
            f"safe_merge: merge='factors' needs LoRA adapters, and the {which} changes {module.name} without factors; "
            "use merge='delta'."
        )
    if tuned[1].shape[0] != safety[1].shape[0]:
        raise MethodError(
            f"safe_merge: {module.name}: ranks {tuned[1].shape[0]} (tuned) and {safety[1].shape[0]} (safety adapter) "
            "have no common factors; use merge='delta'."
        )
    if tuned[2] <= 0 or safety[2] <= 0:
        raise MethodError(
            f"safe_merge: {module.name}: LoRA scales {tuned[2]:g} (tuned) and {safety[2]:g} (safety adapter) have no "
            "roots; wanted both above 0, or merge='delta'."
        )
    return tuned, safety


def _equal(x: Tensor | None, y: Tensor) -> bool:
    return x is not None and torch.equal(x, y)

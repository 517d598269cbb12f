"""Safe LoRA: replace updates that point away from the alignment direction by their image under it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field

from curvkern.methods.alignment import AlignmentMethod
from curvkern.methods.method import Edit, Evidence, MethodError, Module, Modules


@dataclass(frozen=True)
class _Plan:
    cosine: dict[str, float]
    chosen: frozenset[str]


class SafeLora(AlignmentMethod):
    r"""Safe LoRA (Hsu et al., NeurIPS 2024, 2405.16833), on LoRA adapters and on full updates.

    The update :math:`\Delta = BA` (or :math:`W_t - W_a`) is replaced by :math:`C\Delta` where
    :math:`\cos(C\Delta, \Delta)` is low; for C, see ``projector`` of `AlignmentMethod`.

    ``select="number"`` takes the modules whose cosine (rounded to five decimals, as published) is at most the
    ``number``-th smallest, so ties can exceed it; ``"threshold"`` those at or below ``threshold``. Modules that
    fine-tuning left alone do not count. Cosines of wide and tall matrices differ for geometric reasons alone;
    ``per_kind`` ranks each kind of module by itself.
    """

    name: ClassVar[str] = "safe_lora"
    source: ClassVar[str] = "Hsu et al. 2405.16833, eqs. 1-3"

    select: Literal["number", "threshold"] = "number"
    number: int = Field(10, ge=0, description="modules to replace (of each kind, with per_kind)")
    threshold: float = Field(0.5, ge=-1, le=1, description="replace where the cosine is at most this")
    per_kind: bool = False

    def edits_adapter(self) -> bool:
        """B is replaced, A stays."""
        return True

    def plan(self, modules: Modules, evidence: Evidence | None, tell: Callable[[str], None]) -> _Plan:
        """One sweep: every module's cosine; then which to replace."""
        cosine: dict[str, float] = {}
        groups: dict[str, list[str]] = defaultdict(list)
        for module, found in self.measured(modules):
            cosine[module.name] = found
            groups[module.kind if self.per_kind else "all"].append(module.name)
        chosen: set[str] = set()
        for kind, names in groups.items():
            limit = self.threshold
            if self.select == "number":
                if self.number > len(names):
                    which = f"of kind {kind}" if self.per_kind else "to choose from"
                    raise MethodError(
                        f"safe_lora: number is {self.number}, but there are {len(names)} modules {which}; lower it."
                    )
                limit = sorted(cosine[name] for name in names)[self.number - 1] if self.number else -2.0
            chosen |= {name for name in names if cosine[name] <= limit}
        tell(f"safe_lora: {len(chosen)} of {len(cosine)} modules replaced")
        return _Plan(cosine, frozenset(chosen))

    def edit(self, module: Module, plan: _Plan) -> Edit:
        """Replace one module's update if it was chosen."""
        notes = {self.figure: plan.cosine[module.name]} if module.name in plan.cosine else {}
        if module.name not in plan.chosen:
            return Edit(notes=notes)
        aligned = module.aligned.float()
        if module.factors is None:
            return Edit(aligned + self.image(module.tuned.float() - aligned, module), notes=notes)
        b, a, scale = module.factors
        stored = self.image(b.float(), module).to(b.dtype)
        return Edit(aligned + scale * (stored.float() @ a.float()), factors=(stored, a), notes=notes)

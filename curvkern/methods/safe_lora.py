"""Safe LoRA: replace updates that point away from the alignment direction by their image under it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from curvkern.methods.method import Edit, Evidence, Method, MethodError, Module, Modules
from curvkern.ops import alignment_map, alignment_scores, project_, subspace_basis


@dataclass(frozen=True)
class _Plan:
    cosine: dict[str, float]
    chosen: frozenset[str]


class SafeLora(Method):
    r"""Safe LoRA (Hsu et al., NeurIPS 2024, 2405.16833), on LoRA adapters and on full updates.

    With :math:`V = W_a - W_u`, the update :math:`\Delta = BA` (or :math:`W_t - W_a`) is replaced by
    :math:`C\Delta` where :math:`\cos(C\Delta, \Delta)` is low.

    ``projector="gram"`` is the published :math:`C = V V^T / |V|_F`. It is no projector: its mean eigenvalue is
    :math:`|V|_F / o`, so it mostly erases the update. ``"basis"`` is :math:`C = U U^T`, U the leading ``rank`` left
    singular directions of V, which keeps the part of the update that lies along the alignment.

    ``select="number"`` takes the modules whose cosine (rounded to five decimals, as published) is at most the
    ``number``-th smallest, so ties can exceed it; ``"threshold"`` those at or below ``threshold``. Modules that
    fine-tuning left alone do not count. Cosines of wide and tall matrices differ for geometric reasons alone;
    ``per_kind`` ranks each kind of module by itself.
    """

    name: ClassVar[str] = "safe_lora"
    source: ClassVar[str] = "Hsu et al. 2405.16833, eqs. 1-3"
    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    edits_adapter: ClassVar[bool] = True
    oriented: ClassVar[bool] = True

    select: Literal["number", "threshold"] = "number"
    number: int = Field(10, ge=0, description="modules to replace (of each kind, with per_kind)")
    threshold: float = Field(0.5, ge=-1, le=1, description="replace where the cosine is at most this")
    projector: Literal["gram", "basis"] = "gram"
    rank: int = Field(64, ge=1, description="of the basis")
    per_kind: bool = False

    def plan(self, modules: Modules, evidence: Evidence | None, tell: Callable[[str], None]) -> _Plan:
        """One sweep: every module's cosine; then which to replace."""
        cosine: dict[str, float] = {}
        groups: dict[str, list[str]] = defaultdict(list)
        for module in modules():
            if not _is_updated(module):
                continue
            found = self._cosine(module)
            if not math.isfinite(found):
                raise MethodError(f"safe_lora: the cosine of {module.name} is {found}; look for NaN or infinity there")
            cosine[module.name] = round(found, 5)
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
        notes = {"cosine": plan.cosine[module.name]} if module.name in plan.cosine else {}
        if module.name not in plan.chosen:
            return Edit(notes=notes)
        aligned = module.aligned.float()
        if module.factors is None:
            return Edit(aligned + self._image(module.tuned.float() - aligned, module), notes=notes)
        b, a, scale = module.factors
        image = self._image(b.float(), module)
        stored = image.to(b.dtype)
        return Edit(aligned + scale * (stored.float() @ a.float()), factors=(stored, a), notes=notes)

    def _image(self, x: Tensor, module: Module) -> Tensor:
        """C x."""
        if self.projector == "gram":
            return alignment_map(x, module.aligned, _base(module))[0]
        return project_(x.clone(), self._basis(module))

    def _cosine(self, module: Module) -> float:
        """cos(C Delta, Delta)."""
        b, a = _update(module)
        if self.projector == "gram":
            return float(alignment_scores(b, a, module.aligned, _base(module)).cosine)
        inside = self._basis(module).T @ b  # for a projector, cos = |U^T Delta| / |Delta|
        gram = a @ a.T if a is not None else None
        return float(_norm(inside, gram) / _norm(b, gram))

    def _basis(self, module: Module) -> Tensor:
        return subspace_basis(module.aligned, _base(module), min(self.rank, *module.aligned.shape))


def _base(module: Module) -> Tensor:
    if module.base is None:
        raise MethodError("safe_lora: needs the base model (before alignment); pass base=...")
    return module.base


def _update(module: Module) -> tuple[Tensor, Tensor | None]:
    """(B, A), or (W_t - W_a, None)."""
    if module.factors is not None:
        return module.factors[0].float(), module.factors[1].float()
    return module.tuned.float() - module.aligned.float(), None


def _is_updated(module: Module) -> bool:
    """Whether fine-tuning changed the module: a zero update has no direction and is ranked nowhere."""
    return all(bool(x.any()) for x in _update(module) if x is not None)


def _norm(b: Tensor, gram: Tensor | None) -> Tensor:
    """|B A|_F from B and A A^T; |B|_F without A."""
    return b.norm() if gram is None else (b.T @ b * gram).sum().clamp_min(0).sqrt()

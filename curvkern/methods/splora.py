"""SPLoRA: reset the modules whose update lies farthest from its image under the alignment map."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from curvkern.methods.alignment import AlignmentMethod, update_of
from curvkern.methods.method import Edit, Evidence, MethodError, Module, Modules


@dataclass(frozen=True)
class _Plan:
    distance: dict[str, float]
    chosen: frozenset[str]


class Splora(AlignmentMethod):
    r"""Safe Pruning LoRA (Ao et al., TACL 2025, 2506.18931), corrected: modules far from the alignment return to W_a.

    The distance is between the update :math:`\Delta = sBA` (or :math:`W_t - W_a`) and its image :math:`C\Delta`; for C,
    see ``projector`` of `AlignmentMethod`. ``score`` says how it is counted:

    - ``distance``: :math:`|C\Delta - \Delta|_F`. With ``gram`` the image is so small that this is about
      :math:`|\Delta|_F`; with ``basis`` it is the part of the update that leaves the alignment's directions.
    - ``ediem``: a reconstruction of E-DIEM, the distance in standard deviations from what chance gives. Chance pairs
      the entries of image and update at random, all n! ways, in closed form: the square of the distance then scores
      :math:`-\sqrt{n - 1}` times the correlation of image and update. Negative is closer than chance.

    Corrected: the published code compares the distance with 50 references to the same pair of tensors, so that its
    score is rounding noise; its ``number`` keeps what the paper prunes; it leaves out the LoRA scale.
    """

    name: ClassVar[str] = "splora"
    source: ClassVar[str] = "Ao et al. 2506.18931, corrected"
    figure: ClassVar[str] = "distance"

    score: Literal["distance", "ediem"] = "distance"
    number: int = Field(10, ge=0, description="modules to reset, the most distant")
    threshold: float | None = Field(None, description="instead of number: reset what is more distant than this")

    def edits_adapter(self) -> bool:
        """A reset module's B is zero."""
        return True

    def measure(self, module: Module) -> float:
        """The distance of update and image."""
        if self.score == "distance":
            scale = 1.0 if module.factors is None else abs(module.factors[2])
            return scale * float(self.scores(module).distance)
        b, a = update_of(module)
        return _standardised(self.image(b, module).double(), b.double(), None if a is None else a.double())

    def plan(self, modules: Modules, evidence: Evidence | None, tell: Callable[[str], None]) -> _Plan:
        """One sweep: every module's distance; then which to reset."""
        distance = {module.name: found for module, found in self.measured(modules)}
        if self.threshold is not None:
            chosen = {name for name, found in distance.items() if found > self.threshold}
        elif self.number > len(distance):
            raise MethodError(
                f"splora: number is {self.number}, but there are {len(distance)} modules to choose from; lower it."
            )
        else:
            chosen = set(sorted(distance, key=distance.__getitem__, reverse=True)[: self.number])
        tell(f"splora: {len(chosen)} of {len(distance)} modules reset")
        return _Plan(distance, frozenset(chosen))

    def edit(self, module: Module, plan: _Plan) -> Edit:
        """Copy one module from the aligned model if it was chosen."""
        notes = {self.figure: plan.distance[module.name]} if module.name in plan.distance else {}
        if module.name not in plan.chosen:
            return Edit(notes=notes)
        factors = None
        if module.factors is not None:
            b, a, _ = module.factors
            factors = torch.zeros_like(b), a
        return Edit(module.aligned.to(module.tuned.dtype), factors=factors, notes=notes)


def _standardised(image: Tensor, b: Tensor, a: Tensor | None) -> float:
    """(d^2 - E d^2) / sd(d^2) of d = |image A - B A|_F over all pairings of entries; 0 where every pairing is alike.

    Only the inner product varies between pairings; its mean is that of the totals, its variance the product of the
    variances over n - 1.
    """
    n = b.shape[0] * (b if a is None else a).shape[1]
    gram = None if a is None else a @ a.T

    def covariance(p: Tensor, q: Tensor) -> Tensor:
        product = (p * q).sum() if gram is None else (p.T @ q * gram).sum()
        totals = [x.sum() if a is None else x.sum(0) @ a.sum(1) for x in (p, q)]
        return product - totals[0] * totals[1] / n

    spread = (covariance(image, image) * covariance(b, b)).sqrt()
    return 0.0 if spread == 0 else -math.sqrt(n - 1) * float(covariance(image, b) / spread)

"""What Safe LoRA, SafeMERGE and SPLoRA share: updates measured against the alignment direction."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from curvkern.methods.method import Method, MethodError, Module, Modules, given
from curvkern.ops import AlignmentScores, alignment_map, alignment_scores, project_, subspace_basis


class AlignmentMethod(Method):
    r"""A method that holds the update :math:`\Delta = BA` (or :math:`W_t - W_a`) against its image :math:`C\Delta`.

    With :math:`V = W_a - W_u`, ``projector="gram"`` is the published :math:`C = V V^T / |V|_F`. It is no projector:
    its mean eigenvalue is :math:`|V|_F / o`, so it mostly erases the update. ``"basis"`` is :math:`C = U U^T`, U the
    leading ``rank`` left singular directions of V, which keeps the part of the update that lies along the alignment.
    """

    needs: ClassVar[frozenset[str]] = frozenset({"base"})
    oriented: ClassVar[bool] = True
    #: What `measure` returns, for messages and the report.
    figure: ClassVar[str] = "cosine"

    projector: Literal["gram", "basis"] = "gram"
    rank: int = Field(64, ge=1, description="of the basis")

    def image(self, x: Tensor, module: Module) -> Tensor:
        """C x [o, c], float32; of x [o, c] in float32."""
        if self.projector == "gram":
            return alignment_map(x, module.aligned, self._base(module))[0]
        return project_(x.clone(), self._basis(module))

    def scores(self, module: Module) -> AlignmentScores:
        """Cosine, shrink and distance of update and image; a LoRA scale is left out."""
        b, a = update_of(module)
        if self.projector == "gram":
            return alignment_scores(b, a, module.aligned, self._base(module))
        gram = None if a is None else a @ a.T
        inside, whole = _norm(self._basis(module).T @ b, gram), _norm(b, gram)
        # For a projector cosine and shrink are one, and image and residue stand at right angles.
        residue = (whole.square() - inside.square()).clamp_min(0).sqrt()
        return AlignmentScores(inside / whole, inside / whole, residue)

    def measure(self, module: Module) -> float:
        """The figure that decides; here the cosine, rounded to five decimals as published."""
        return round(float(self.scores(module).cosine), 5)

    def measured(self, modules: Modules) -> Iterator[tuple[Module, float]]:
        """One sweep: the modules that fine-tuning changed, each with its `measure`.

        Raises:
            MethodError: a measure is not finite.
        """
        for module in modules():
            if not all(bool(x.any()) for x in update_of(module) if x is not None):
                continue  # a zero update has no direction
            found = self.measure(module)
            if not math.isfinite(found):
                raise MethodError(
                    f"{self.name}: the {self.figure} of {module.name} is {found}; look for NaN or infinity there"
                )
            yield module, found

    def _basis(self, module: Module) -> Tensor:
        return subspace_basis(module.aligned, self._base(module), min(self.rank, *module.aligned.shape))

    def _base(self, module: Module) -> Tensor:
        return given(self, module.base, "base")


def update_of(module: Module) -> tuple[Tensor, Tensor | None]:
    """(B, A) without their scale, or (W_t - W_a, None); float32."""
    if module.factors is not None:
        return module.factors[0].float(), module.factors[1].float()
    return module.tuned.float() - module.aligned.float(), None


def _norm(b: Tensor, gram: Tensor | None) -> Tensor:
    """|B A|_F from B and A A^T; |B|_F without A."""
    return torch.linalg.matrix_norm(b) if gram is None else (b.T @ b * gram).sum().clamp_min(0).sqrt()

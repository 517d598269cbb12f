"""LoX: go further along the leading directions of the alignment."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from curvkern.methods.method import Edit, Method, Module, given
from curvkern.ops import linear, project_, subspace_basis


class Lox(Method):
    r"""Low-rank extrapolation (Perin et al., COLM 2025, 2506.15606): :math:`W = W_t + \alpha\, U_k U_k^T V`.

    :math:`V = W_a - W_u` is what alignment changed, U_k its ``rank`` leading left singular directions, so that
    :math:`U_k U_k^T V` is V's best approximation of that rank (found by `curvkern.ops.subspace_basis`, randomised).
    The paper strengthens the aligned model before anyone fine-tunes it: pass it as ``tuned`` for that. Applied to a
    tuned model, as here, it restores.

    Corrected: V is formed in float32 (in bfloat16 as published). Only matrices of decoder layers move (there embeddings
    and the head too). The published command's defaults are full rank (``rank=None``) and alpha 1.
    """

    name: ClassVar[str] = "lox"
    source: ClassVar[str] = "Perin et al. 2506.15606"
    needs: ClassVar[frozenset[str]] = frozenset({"base"})

    rank: int | None = Field(64, ge=1, description="directions of the alignment to follow; None: all")
    alpha: float = Field(1.0, ge=0, description="how far")

    def edit(self, module: Module, plan: Any) -> Edit:
        """Extrapolate one module."""
        base = given(self, module.base, "base")
        direction = module.aligned.float() - base.float()
        if self.rank is not None and self.rank < min(direction.shape):
            project_(direction, subspace_basis(module.aligned, base, self.rank))
        return Edit(linear([module.tuned.float(), direction], [1.0, self.alpha]))

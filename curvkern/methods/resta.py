"""RESTA: add the difference between the aligned model and a broken copy of it."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from curvkern.methods.method import Edit, Method, Module, given
from curvkern.ops import dare, linear


class Resta(Method):
    r"""RESTA (Bhardwaj et al., ACL 2024, 2402.11746): :math:`W = W_t + \beta (W_a - W_{un})`.

    :math:`W_{un}` is the aligned model tuned on harmful data, so that the difference, the safety vector, points from
    harm to safety. ``drop`` is DARE's (2311.03099): that share of the entries goes to 0, the rest is divided by
    1 - drop. With ``drop_from="update"``, the paper's, it thins :math:`W_t - W_a` before the vector is added; with
    ``"vector"`` the safety vector itself. Float32 inside, one rounding; where aligned and unaligned are equal nothing
    is added. beta = 1 is what ports use; the paper's own was not to be had.
    """

    name: ClassVar[str] = "resta"
    source: ClassVar[str] = "Bhardwaj et al. 2402.11746"
    needs: ClassVar[frozenset[str]] = frozenset({"unaligned"})

    beta: float = Field(1.0, ge=0, description="how much of the safety vector is added")
    drop: float = Field(0.0, ge=0, lt=1, description="share of entries that DARE drops; 0.9 is usual")
    drop_from: Literal["update", "vector"] = "update"
    seed: int = Field(0, ge=0, description="of DARE's draw")

    def edit(self, module: Module, plan: Any) -> Edit:
        """Add the safety vector to one module."""
        aligned, tuned = module.aligned.float(), module.tuned.float()
        vector = aligned - given(self, module.unaligned, "unaligned").float()
        if self.drop and self.drop_from == "update":
            tuned = dare(aligned, tuned, self.drop, module.own_seed(self.seed))
        elif self.drop:
            vector = dare(torch.zeros_like(vector), vector, self.drop, module.own_seed(self.seed))
        return Edit(linear([tuned, vector], [1.0, self.beta]))

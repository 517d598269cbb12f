"""Antidote: reset the weights that harmful data use most."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from curvkern.methods.method import Edit, Method, Module, Need
from curvkern.ops import block_select, rollback_

HARMFUL_GRAM = Need("input_gram", "harmful")


class Antidote(Method):
    r"""One-shot removal of harmful weights (Huang et al., ICML 2025, 2408.09600), scored as Wanda does.

    Score :math:`S_{ij} = |W_{ij}| \sqrt{E\,x_j^2}` of the tuned weights over the tokens of harmful prompts and
    responses; in every row the ``fraction`` of largest scores goes back to the aligned model, or to zero as published.
    The published code prunes LoRA factors, whose entries are no entries of the update, and counts padding as tokens;
    here it is the whole weight, and padding does not count.
    """

    name: ClassVar[str] = "antidote"
    source: ClassVar[str] = "Huang et al. 2408.09600, section 4"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful"})
    oriented: ClassVar[bool] = True

    fraction: float = Field(0.1, ge=0, le=1, description="share of each row's weights to reset")
    to: Literal["aligned", "zero"] = "aligned"

    def statistics(self) -> tuple[Need, ...]:
        """The Gram of inputs on harmful data, of which the diagonal is used."""
        return (HARMFUL_GRAM,)

    def edit(self, module: Module, plan: Any) -> Edit:
        """Reset the weights of one module that score highest in their row."""
        weight = module.tuned.clone()
        target = module.aligned.to(weight.dtype) if self.to == "aligned" else torch.zeros_like(weight)
        score = weight.float().abs() * module.statistics[HARMFUL_GRAM].diagonal().sqrt()
        k = int(self.fraction * weight.shape[1])
        mask = block_select(weight, target, rule="grad", grad=score, k=k, block=(1, None), ties="exact_k")
        rollback_(weight, target, mask=mask)
        return Edit(weight, selected=int((mask & (module.tuned != target)).sum()))

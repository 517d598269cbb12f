"""Rewind: reset what safety needs and the task does not, as seen in the aligned model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from curvkern.methods.method import Edit, Method, Module, Need
from curvkern.ops import block_select, project_, rollback_

Data = Literal["safety", "task"]


class Rewind(Method):
    r"""Safety-critical weights or directions back to the aligned model (Wei et al., ICML 2024, 2402.05162).

    They are found in the aligned model. ``by="snip"``: scores :math:`|W_a| \odot E_n |G_n|`; ``"wanda"``:
    :math:`|W_a| \sqrt{E\,x^2}`. Of each matrix, what is among the ``safety_fraction`` of largest scores on safety data
    and not among the ``task_fraction`` of largest on the task is copied from the aligned model: the set difference.

    ``"actsvd"``: :math:`W_t + (I - \Pi_t)\,\Pi_s (W_a - W_t)`, with :math:`\Pi` onto the leading eigenvectors of
    :math:`W_a H W_a^\top`, the Gram of the aligned module's outputs on safety data and on the task; the fractions are
    shares of the output's dimensions. There the projectors remove safety, to study it; that they bring it back from
    W_a is our reading. Projectors stay in float32 (there: bfloat16) and ranks are those of the projectors (there: of
    what is left).
    """

    name: ClassVar[str] = "rewind"
    source: ClassVar[str] = "Wei et al. 2402.05162, sections 2.2-2.4"
    needs: ClassVar[frozenset[str]] = frozenset({"safety", "task"})
    oriented: ClassVar[bool] = True

    by: Literal["snip", "wanda", "actsvd"] = "snip"
    safety_fraction: float = Field(0.1, ge=0, le=1, description="share of each module that safety needs most")
    task_fraction: float = Field(0.1, ge=0, le=1, description="share of each module that the task needs most")

    @property
    def workspace(self) -> int:  # pyright: ignore[reportIncompatibleVariableOverride]
        """An eigenbasis takes more than a mask."""
        return 9 if self.by == "actsvd" else 5

    def statistics(self) -> tuple[Need, ...]:
        """The same quantity on safety data and on the task, at the aligned model."""
        return self._need("safety"), self._need("task")

    def edit(self, module: Module, plan: Any) -> Edit:
        """Reset one module's weights or directions."""
        if self.by == "actsvd":
            back = module.aligned.float() - module.tuned.float()
            project_(back, self._directions(module, "safety"))
            project_(back, self._directions(module, "task"), complement=True)
            return Edit(module.tuned.float() + back)
        weight, aligned = module.tuned.clone(), module.aligned.to(module.tuned.dtype)
        mask = self._top(module, "safety") & ~self._top(module, "task")
        rollback_(weight, aligned, mask=mask)
        return Edit(weight, selected=int((mask & (module.tuned != aligned)).sum()))

    def _need(self, data: Data) -> Need:
        return Need("abs_gradient" if self.by == "snip" else "input_gram", data, at="aligned")

    def _fraction(self, data: Data) -> float:
        return self.safety_fraction if data == "safety" else self.task_fraction

    def _top(self, module: Module, data: Data) -> Tensor:
        """The largest scores on some data; bool [out, in]."""
        found = module.statistics[self._need(data)]
        use = found if self.by == "snip" else found.diagonal().sqrt()
        weight = module.aligned.float()
        options = {"fraction": self._fraction(data), "block": (None, None), "ties": "exact_k"}
        return block_select(weight, weight, rule="grad", grad=weight.abs() * use, **options)  # pyright: ignore[reportArgumentType]

    def _directions(self, module: Module, data: Data) -> Tensor:
        """The leading directions of the aligned module's outputs on some data; [out, rank]."""
        weight = module.aligned.float()
        outputs = weight @ module.statistics[self._need(data)] @ weight.T
        rank = round(self._fraction(data) * len(weight))
        return torch.linalg.eigh(outputs)[1][:, len(weight) - rank :]

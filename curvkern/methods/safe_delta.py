"""Safe Delta: start from the aligned model and take fine-tuning's changes as far as safety data allow."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from curvkern.methods.method import Edit, Method, Module, Need
from curvkern.ops import inverse_factor, obs_sweep_

SAFETY_GRAM = Need("input_gram", "safety", at="aligned")
PANEL = 128


class SafeDelta(Method):
    r"""Safe Delta (Lu et al., ICML 2025, 2505.12038).

    With U the upper Cholesky factor of the inverse Gram of safety inputs at the aligned model, setting an entry to its
    tuned value costs safety :math:`\delta_{ij}^2 / U_{jj}^2`. Columns go left to right in blocks of o x w entries:
    in the order of :math:`1 / U_{jj}^2` (column by column, then by rows) these are admitted while their costs add up
    to at most ``budget`` :math:`\cdot\, o w / 4096^2` times the block's mean of :math:`1 / U_{jj}^2`; the ``dropped``
    share that comes last never is. Every other weight of the row to the right makes up for what was admitted, so what
    is not admitted ends near, not at, the aligned value.

    As published with 2048 columns a block, where the last block's budget is that of a whole one (here: in proportion)
    and errors are not spread inside of four columns (here: they are). The Gram is a mean over tokens, there a sum over
    sequences: neither selection nor sweep depends on its scale. ``budget=0`` is the aligned model.
    """

    name: ClassVar[str] = "safe_delta"
    source: ClassVar[str] = "Lu et al. 2505.12038, section 4"
    needs: ClassVar[frozenset[str]] = frozenset({"safety"})
    oriented: ClassVar[bool] = True
    workspace: ClassVar[int] = 11

    budget: float = Field(0.11, ge=0, description="of safety; mean square change of a weight it allows, times 4096^2")
    dropped: float = Field(0.15, ge=0, le=1, description="share of a block's entries that stay aligned in any case")
    block: int = Field(2048, ge=PANEL, multiple_of=PANEL, description="columns that share a budget")
    damping: float = Field(0.01, gt=0, description="of the Gram; share of its mean diagonal")

    def statistics(self) -> tuple[Need, ...]:
        """The Gram of inputs on safety data at the aligned model."""
        return (SAFETY_GRAM,)

    def edit(self, module: Module, plan: Any) -> Edit:
        """Admit one module's tuned entries, and make up for them."""
        tuned, weight = module.tuned.float(), module.aligned.to(torch.float32, copy=True)
        factor, report = inverse_factor(module.statistics[SAFETY_GRAM], damping=self.damping)
        cost = factor.diagonal().square().reciprocal()
        admitted = torch.zeros_like(weight, dtype=torch.bool)

        def choose(panel: slice, values: Tensor) -> Tensor:
            if panel.start % self.block == 0:  # the block's columns are as all earlier ones left them
                columns = slice(panel.start, panel.start + self.block)
                admitted[:, columns] = self.admit((tuned - weight)[:, columns], cost[columns])
            return admitted[:, panel]

        obs_sweep_(weight, choose, factor, target=tuned, block=PANEL)
        return Edit(weight, notes={"admitted": float(admitted.float().mean()), "damping": report.damping})

    def admit(self, delta: Tensor, cost: Tensor) -> Tensor:
        """Which entries of a block take their tuned values; bool [o, w].

        Args:
            delta: tuned minus current [o, w], float32.
            cost: 1 / U_jj^2 [w].
        """
        order = cost.argsort(stable=True)
        losses = (delta.square() * cost).T[order].flatten().double()
        within = losses.cumsum(0) <= self.budget * delta.numel() / 4096**2 * float(cost.mean())
        within[delta.numel() - int(self.dropped * delta.numel()) :] = False
        chosen = torch.empty_like(delta, dtype=torch.bool)
        chosen[:, order] = within.view(len(order), len(delta)).T
        return chosen

"""Budgeted rollback: the safest model that a given rise of the task loss can buy, by one multiplier for all weights."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from curvkern.methods.method import Edit, Evidence, Method, MethodError, Module, Modules, Need
from curvkern.ops import blend_, inverse_factor, obs_sweep_

SAFETY_GRADIENT = Need("gradient", "safety", loss="token_sum")
SAFETY_FISHER = Need("fisher_diag", "safety", loss="token_sum")
TASK_GRADIENT = Need("gradient", "task", loss="token_sum")
TASK_FISHER = Need("fisher_diag", "task", loss="token_sum")
TASK_GRAM = Need("input_gram", "task")

POINTS = 16  # prices tried in a sweep
NEAR = 1e-6  # of the budget: close enough


@dataclass(frozen=True)
class _Model:
    """What moving each weight back by a share a changes: linear and quadratic terms of both losses, float32."""

    safety_fall: Tensor  # g_s d
    safety_curve: Tensor  # F_s d^2
    task_fall: Tensor
    task_curve: Tensor

    def share(self, price: float, *, hard: bool) -> Tensor:
        """The a in [0, 1] (or in {0, 1}) that lowers (1 - price) safety + price task most."""
        fall = (1 - price) * self.safety_fall + price * self.task_fall
        curve = (1 - price) * self.safety_curve + price * self.task_curve
        if hard:
            return (fall > curve / 2).float()
        # Without curvature the loss is a line: all the way if it falls.
        return torch.where(fall >= curve, (fall > 0).float(), (fall / curve).clamp(min=0))

    def task_rise(self, share: Tensor) -> float:
        """What the task loss gains at a share, in nats."""
        return _rise(self.task_fall, self.task_curve, share)

    def safety_rise(self, share: Tensor) -> float:
        """What the loss of safe responses gains; negative where they become likelier."""
        return _rise(self.safety_fall, self.safety_curve, share)


class Budgeted(Method):
    r"""Second-order rollback under a budget for the task.

    A weight goes back by the share :math:`\alpha` of :math:`d = W_t - W_a`. To second order with diagonal Fishers a
    loss then changes by :math:`-\alpha\,g d + \tfrac12 \alpha^2 F d^2`. Minimising the safety loss plus
    :math:`\lambda` times the task loss gives, weight by weight and exactly,

    .. math:: \alpha = \mathrm{clip}\Big(\frac{(g_s + \lambda g_t)\,d}{(F_s + \lambda F_t)\,d^2},\ 0,\ 1\Big).

    The predicted rise of the task loss falls as :math:`\lambda` grows, so one scalar is found for which it equals
    ``budget``: :math:`\lambda = p / (1 - p)`, and every sweep over the modules narrows p to a sixteenth. At p = 1 the
    rise is at most 0, so that any budget can be kept; where even p = 0 (safety alone) stays below it, that is taken
    and told. Losses are sums over a response's tokens, whose mean square gradient approximates their Hessian's
    diagonal, hence the unit: nats per response.

    ``hard`` moves whole weights only, bit for bit (:math:`\alpha \in \{0, 1\}`); the rise is then a step function of p
    and the last step below the budget is taken. ``compensate`` lets the weights that stay make up for what the others
    did to the module's outputs on task inputs (`obs_sweep_`); the prediction is that without it.

    What is predicted leaves out that weights act together: see the restored model's task score for what it cost.
    """

    name: ClassVar[str] = "budgeted"
    source: ClassVar[str] = "curvkern; score and budget generalise Yang et al. 2504.09757 and Lu et al. 2505.12038"
    needs: ClassVar[frozenset[str]] = frozenset({"safety", "task"})

    budget: float = Field(0.05, ge=0, description="rise of the task loss to allow, as predicted; nats per response")
    hard: bool = Field(False, description="reset whole weights instead of moving them by a share")
    compensate: bool = Field(False, description="let free weights make up for the change on task inputs")
    damping: float = Field(0.01, gt=0, description="of the input Gram, for compensate; share of its mean diagonal")

    def statistics(self) -> tuple[Need, ...]:
        """Gradient and Fisher of both losses at the tuned model; the Gram of task inputs for `compensate`."""
        always = (SAFETY_GRADIENT, SAFETY_FISHER, TASK_GRADIENT, TASK_FISHER)
        return (*always, TASK_GRAM) if self.compensate else always

    def plan(self, modules: Modules, evidence: Evidence | None, tell: Callable[[str], None]) -> float:
        """The price p of the task that keeps the budget; some sweeps over all modules."""
        low, high = 0.0, 1.0
        cost, gain = self._rises(modules, [low, high])
        if cost[0] <= self.budget:
            tell(f"budgeted: safety alone raises the task loss by {cost[0]:.4g} only: the budget is not used up")
            return low
        at_high = cost[1], gain[1]
        while self.budget - at_high[0] > NEAR * self.budget and (between := _between(low, high)):
            cost, gain = self._rises(modules, between)
            kept = next((k for k, rise in enumerate(cost) if rise <= self.budget), len(between))
            if kept < len(between):
                at_high = cost[kept], gain[kept]
            low, high = [low, *between][kept], [*between, high][kept]
        tell(
            f"budgeted: the task loss rises by {at_high[0]:.4g} and the loss of safe responses by {at_high[1]:.4g} nats "
            f"a response, as predicted; the task's price is {high:.6g}"
        )
        return high

    def edit(self, module: Module, plan: float) -> Edit:
        """Move one module's weights by their shares."""
        model = _model_of(module)
        share = model.share(plan, hard=self.hard)
        moved = (share > 0) & (module.tuned.float() != module.aligned.float())
        weight = blend_(module.tuned.float().clone(), module.aligned.float(), share)
        notes = {"share": float(share.mean()), "task_rise": model.task_rise(share)}
        if self.compensate and bool(moved.any()):
            factor, _ = inverse_factor(module.statistics[TASK_GRAM], damping=self.damping)
            weight = obs_sweep_(module.tuned.float().clone(), moved, factor, target=weight, order="fixed_first")
            return Edit(weight, notes=notes)
        return Edit(weight, selected=int(moved.sum()), notes=notes)

    def _rises(self, modules: Modules, prices: list[float]) -> tuple[list[float], list[float]]:
        """(rise of the task loss, of the safety loss) over all modules, at each price; one sweep."""
        task, safety = [0.0] * len(prices), [0.0] * len(prices)
        for module in modules():
            model = _model_of(module)
            for at, price in enumerate(prices):
                share = model.share(price, hard=self.hard)
                task[at] += model.task_rise(share)
                safety[at] += model.safety_rise(share)
        if not all(map(math.isfinite, (*task, *safety))):
            raise MethodError("budgeted: a predicted loss is not finite; look for NaN or infinity in the weights.")
        return task, safety


def _model_of(module: Module) -> _Model:
    d = module.tuned.float() - module.aligned.float()
    found = module.statistics
    return _Model(
        found[SAFETY_GRADIENT] * d, found[SAFETY_FISHER] * d * d, found[TASK_GRADIENT] * d, found[TASK_FISHER] * d * d
    )


def _rise(fall: Tensor, curve: Tensor, share: Tensor) -> float:
    return float((share * (0.5 * share * curve - fall)).double().sum())


def _between(low: float, high: float) -> list[float]:
    """Prices that cut the range into parts; none where no double lies between."""
    cuts = (low + (high - low) * k / POINTS for k in range(1, POINTS))
    return sorted({cut for cut in cuts if low < cut < high})

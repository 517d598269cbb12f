"""Budgeted rollback: the safest model that a given rise of the task loss can buy, by one price for all weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

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

POINTS = 16  # parts that a sweep cuts the range of prices into
NEAR = 1e-6  # of a limit: close enough


class Budgeted(Method):
    r"""Second-order rollback under a budget for the task.

    Each weight goes back by a share :math:`\alpha \in [0, 1]` of :math:`d = W_t - W_a`. With gradients g and diagonal
    Fishers F of the losses of safe responses (s) and of the task (t) at the tuned model, these change by

    .. math:: S = \sum -\alpha\,g_s d + \tfrac12 \alpha^2 F_s d^2, \qquad
              T = \sum -\alpha\,g_t d + \tfrac12 \Big(\sum \alpha |d| \sqrt{F_t}\Big)^2

    where by Minkowski :math:`E_n (\sum \alpha\,G_n d)^2 \le (\sum \alpha |d| \sqrt{F_t})^2`: whatever many weights do
    together, T bounds the second-order rise of the task loss. Its square is at most :math:`\sum \alpha^2 C_t` with
    :math:`C_t = |d| \sqrt{F_t}\,Y`, Y the sum of :math:`|d| \sqrt{F_t}` over all weights (Cauchy-Schwarz). With that
    in its place :math:`S + \lambda (T + \tfrac12 \kappa \bar C_t \sum \alpha^2)` is least, exactly, at

    .. math:: \alpha = \mathrm{clip}\Big(\frac{(g_s + \lambda g_t)\,d}{F_s d^2 + \lambda (C_t + \kappa \bar C_t)},
              \ 0,\ 1\Big).

    :math:`\kappa` is ``sparsity``, :math:`\bar C_t` the mean of :math:`C_t` over the weights that fine-tuning moved: so
    much a weight costs for going back at all, and a few that gain much are taken before many that cost next to nothing.
    ``interactions="ignored"`` takes :math:`C_t = F_t d^2` and its sum for the square in T: right for one weight, far
    too low for many that pull together.

    T and -S fall as :math:`\lambda` rises. One :math:`\lambda = p / (1 - p)` is found for which T equals ``budget``,
    every sweep over the modules narrowing p to a sixteenth; or a larger one, where -S would exceed ``reach`` times
    :math:`\sum g_s d`, the fall to first order on the way to the aligned model: S is close to a line, the loss is not,
    and further down the line one only leaves the model behind. At p = 1 T is at most 0, so that every budget can be
    kept; where no limit is reached, p = 0: safety alone.

    Losses are sums over a response's tokens, whose mean square gradient approximates their Hessian's diagonal; so the
    unit is nats per response. ``hard`` resets whole weights, bit for bit: the best :math:`\alpha \in \{0, 1\}`, the
    last step within the limits; then the extra cost is a price for each weight. Shares move many weights by little,
    which bfloat16 rounds away. ``compensate`` lets weights that stay make up for what the others did to the module's
    outputs on task inputs (`obs_sweep_`); the prediction is that without it.
    """

    name: ClassVar[str] = "budgeted"
    source: ClassVar[str] = "curvkern; generalises Yang et al. 2504.09757 and Lu et al. 2505.12038"
    needs: ClassVar[frozenset[str]] = frozenset({"safety", "task"})
    oriented: ClassVar[bool] = True
    workspace: ClassVar[int] = 13

    budget: float = Field(0.1, ge=0, description="rise of the task loss to allow, as predicted; nats per response")
    reach: float = Field(1.2, gt=0, description="fall of the safety loss to go for, in that of the full rollback")
    sparsity: float = Field(4.0, ge=0, description="price of a weight beside its cost, in that of the mean weight")
    interactions: Literal["bound", "ignored"] = Field("bound", description="of the weights' effects on the task")
    hard: bool = Field(True, description="reset whole weights; false: move each by its share")
    compensate: bool = Field(False, description="let free weights make up for the change on task inputs")
    damping: float = Field(0.01, gt=0, description="of the input Gram, for compensate; share of its mean diagonal")

    def statistics(self) -> tuple[Need, ...]:
        """Gradient and Fisher of both losses at the tuned model; the Gram of task inputs for ``compensate``."""
        always = (SAFETY_GRADIENT, SAFETY_FISHER, TASK_GRADIENT, TASK_FISHER)
        return (*always, TASK_GRAM) if self.compensate else always

    def plan(self, modules: Modules, evidence: Evidence | None, tell: Callable[[str], None]) -> Plan:
        """The price of the task that keeps both limits; a handful of sweeps over all modules."""
        costs, fall = self._costs(modules)
        if fall <= 0:
            tell("budgeted: the full rollback would not lower the loss of safe responses; all stays as tuned")
            return costs
        low, high = 0.0, 1.0
        free, found = self._outcomes(modules, costs, [low, high])
        if self._within(free, fall):
            high, found = low, free
        while high > low and not self._close(found, fall) and (prices := _between(low, high)):
            outcomes = self._outcomes(modules, costs, prices)
            kept = next((k for k, outcome in enumerate(outcomes) if self._within(outcome, fall)), len(prices))
            found = outcomes[kept] if kept < len(prices) else found
            low, high = [low, *prices][kept], [*prices, high][kept]
        tell(
            f"budgeted: predicted {found.safety:+.4g} nats a response of safety loss (the full rollback: {-fall:+.4g}) "
            f"for {found.task:+.4g} of task loss, of the limit {self.budget:g}"
        )
        return replace(costs, price=high)

    def edit(self, module: Module, plan: Plan) -> Edit:
        """Move one module's weights by their shares."""
        if plan.price is None:
            return Edit()
        terms = terms_of(module, plan)
        share = terms.share(plan.price, hard=self.hard)
        tuned, aligned = module.tuned.float(), module.aligned.float()
        moved = (share > 0) & (tuned != aligned)
        weight = blend_(tuned.clone(), aligned, share)
        notes = {"share": float(share.mean()), "task_rise": terms.task(share)}
        if self.compensate and bool(moved.any()):
            factor, _ = inverse_factor(module.statistics[TASK_GRAM], damping=self.damping)
            return Edit(obs_sweep_(tuned.clone(), moved, factor, target=weight, order="fixed_first"), notes=notes)
        return Edit(weight, selected=int(moved.sum()), notes=notes)

    def _costs(self, modules: Modules) -> tuple[Plan, float]:
        """What the costs of weights share, and the first-order fall of the full rollback; one sweep."""
        pull, squares, fall, moved = 0.0, 0.0, 0.0, 0
        for module in modules():
            terms = terms_of(module)
            pull += float(terms.task_pull.double().sum())
            squares += float(terms.task_curve.double().sum())
            fall += float(terms.safety_fall.double().sum())
            moved += int((module.tuned != module.aligned).sum())
        scale, whole = (pull, pull * pull) if self.interactions == "bound" else (None, squares)
        return Plan(scale=scale, extra=self.sparsity * whole / max(moved, 1)), fall

    def _outcomes(self, modules: Modules, costs: Plan, prices: Sequence[float]) -> list[Outcome]:
        """What each price leads to, over all modules; one sweep."""
        sums = torch.zeros(len(prices), 4, dtype=torch.float64)
        for module in modules():
            terms = terms_of(module, costs)
            for at, price in enumerate(prices):
                share = terms.share(price, hard=self.hard)
                fall, pull = ((share * x).double().sum() for x in (terms.task_fall, terms.task_pull))
                sums[at] += torch.tensor([terms.safety(share), terms.task(share), fall, pull], dtype=torch.float64)
        if not bool(sums.isfinite().all()):
            raise MethodError("budgeted: a predicted loss is not finite; look for NaN or infinity in the weights.")
        if self.interactions == "ignored":
            return [Outcome(safety, alone) for safety, alone, _, _ in sums.tolist()]
        return [Outcome(safety, pull * pull / 2 - fall) for safety, _, fall, pull in sums.tolist()]

    def _within(self, outcome: Outcome, fall: float) -> bool:
        return outcome.task <= self.budget and -outcome.safety <= self.reach * fall

    def _close(self, outcome: Outcome, fall: float) -> bool:
        task, safety = self.budget - outcome.task, self.reach * fall + outcome.safety
        return 0 <= task <= NEAR * self.budget or 0 <= safety <= NEAR * self.reach * fall


@dataclass(frozen=True)
class Plan:
    """The price p of the task, and what the costs of all weights share.

    Attributes:
        price: None: nothing moves.
        scale: Y; None: weights are taken one by one.
        extra: what a weight costs beside its own C_t.
    """

    price: float | None = None
    scale: float | None = None
    extra: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """Predicted changes of the losses in nats per response.

    Attributes:
        safety: S.
        task: T.
    """

    safety: float
    task: float


@dataclass(frozen=True)
class Terms:
    """The coefficients of S and of T with C_t in its square, for one module; float32 like its weight."""

    safety_fall: Tensor  # g_s d
    safety_curve: Tensor  # F_s d^2
    task_fall: Tensor  # g_t d
    task_curve: Tensor  # C_t
    task_pull: Tensor  # |d| sqrt(F_t)
    extra: float  # what is added to C_t for the choice

    def share(self, price: float, *, hard: bool) -> Tensor:
        """The share of each weight that makes (1 - p) S + p (`task` + extra / 2 sum of squared shares) least."""
        fall = (1 - price) * self.safety_fall + price * self.task_fall
        curve = (1 - price) * self.safety_curve + price * (self.task_curve + self.extra)
        if hard:
            return (fall > curve / 2).float()
        # Where there is no curvature the sum is a line: all the way, if it falls.
        return torch.where(fall >= curve, (fall > 0).float(), (fall / curve).clamp(min=0))

    def safety(self, share: Tensor) -> float:
        """S."""
        return _change(self.safety_fall, self.safety_curve, share)

    def task(self, share: Tensor) -> float:
        """T with C_t in its square: where many weights move, far above T."""
        return _change(self.task_fall, self.task_curve, share)


def terms_of(module: Module, costs: Plan = Plan()) -> Terms:
    """One module's coefficients."""
    d = module.tuned.float() - module.aligned.float()
    found = module.statistics
    pull = d.abs() * found[TASK_FISHER].sqrt()
    curve = pull * (pull if costs.scale is None else costs.scale)
    falls = found[SAFETY_GRADIENT] * d, found[TASK_GRADIENT] * d
    return Terms(falls[0], found[SAFETY_FISHER] * d * d, falls[1], curve, pull, costs.extra)


def _change(fall: Tensor, curve: Tensor, share: Tensor) -> float:
    return float((share * (0.5 * share * curve - fall)).double().sum())


def _between(low: float, high: float) -> list[float]:
    """Prices that cut the range into parts; none where no double lies between."""
    cuts = {low + (high - low) * k / POINTS for k in range(1, POINTS)}
    return sorted(cut for cut in cuts if low < cut < high)

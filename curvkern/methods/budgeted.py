"""Budgeted rollback: the safest model that a given rise of the task loss can buy, by one price for all weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from curvkern.methods.method import Edit, Evidence, Method, MethodError, Module, Modules, Need
from curvkern.ops import blend_, inverse_factor, obs_sweep_, pack_mask, unpack_mask

SAFETY_GRADIENT = Need("gradient", "safety", loss="token_sum")
SAFETY_FISHER = Need("fisher_diag", "safety", loss="token_sum")
TASK_GRADIENT = Need("gradient", "task", loss="token_sum")
TASK_FISHER = Need("fisher_diag", "task", loss="token_sum")
#: Of the smallest statistic there is, of which the loss alone is looked at.
ALIGNED_LOSS = Need("sample_norms", "safety", at="aligned", loss="token_sum")
TASK_GRAM = Need("input_gram", "task", loss="token_sum")  # the same for any loss: of the same backward

POINTS = 4  # parts that a sweep cuts the range of prices into
PIECE = {"cpu": 1 << 14, "cuda": 1 << 20}  # weights that are looked at together; on the CPU as many as a cache holds
ENOUGH = 0.01  # of a limit, or of the way: close enough


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

    By and large T and -S fall as :math:`\lambda` rises. A :math:`\lambda = p / (1 - p)` is found for which T is close
    below what is left of ``budget``, every sweep over the modules narrowing p to a quarter; or a larger one, where -S
    would exceed ``reach`` times what the loss of safe responses still is above the aligned model's. At p = 1 T is at
    most 0, so that every budget can be kept; where no limit is reached, p = 0: safety alone.

    S and T are right near the weights that they were measured at, and fine-tuning went far. So losses, gradients and
    Fishers are measured again after a step, and the next one is taken from there, up to ``rounds`` steps: until all but
    a hundredth of the way to the aligned model's loss is gone, or the task loss has risen by the budget. A step after
    which it has risen by more, or the model is no safer, is taken back and tried at half the limits. Only the last step
    is not measured.

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

    budget: float = Field(0.05, ge=0, description="rise of the task loss to allow, in nats per response")
    reach: float = Field(1.5, gt=0, description="predicted fall of the safety loss in a step, in what is left to go")
    rounds: int = Field(6, ge=1, description="steps at most, if hard")
    interactions: Literal["bound", "ignored"] = Field("bound", description="of the weights' effects on the task")
    hard: bool = Field(True, description="reset whole weights; false: move each by its share")
    compensate: bool = Field(False, description="let free weights make up for the change on task inputs")
    sparsity: float = Field(4.0, ge=0, description="price of a weight beside its cost, in that of the mean weight")
    damping: float = Field(0.01, gt=0, description="of the input Gram, for compensate; share of its mean diagonal")

    @property
    def measures_again(self) -> bool:
        """After each step but the last."""
        return self.hard and self.rounds > 1

    def statistics(self) -> tuple[Need, ...]:
        """Gradient and Fisher of both losses, the aligned model's loss; the Gram of task inputs for ``compensate``."""
        always = (SAFETY_GRADIENT, SAFETY_FISHER, TASK_GRADIENT, TASK_FISHER, ALIGNED_LOSS)
        return (*always, TASK_GRAM) if self.compensate else always

    def plan(self, modules: Modules, evidence: Evidence | None, tell: Callable[[str], None]) -> Plan:
        """Steps and measurements in turn; a handful of sweeps over all modules for each."""
        start = now = self._measured(modules)
        tell(f"budgeted: loss of safe responses {start.safety:.4g} nats, the aligned model's {start.goal:.4g}")
        if start.safety <= start.goal:
            tell("budgeted: the tuned model is as safe as the aligned one on these responses; all stays as tuned")
            return Plan()
        if not self.hard:
            price = self._price(modules, now, Limits(self.budget, self.reach * (start.safety - start.goal)), tell)
            return Plan(price=price, scale=now.scale, extra=now.extra)
        bits, trust = dict[str, Tensor](), 1.0
        for left in reversed(range(self.rounds)):
            rise, to_go = now.task - start.task, now.safety - now.goal
            if to_go <= ENOUGH * (start.safety - start.goal) or rise >= (1 - ENOUGH) * self.budget > 0:
                break
            limits = Limits(trust * (self.budget - rise), trust * self.reach * to_go)
            tried, new = self._step(modules, now, limits, bits, tell)
            if left == 0 or not new:
                return Plan(bits=tried)
            modules = modules.rolled_back(tried)
            then = self._measured(modules)
            tell(f"  measured: safety loss {then.safety:.4g}, task loss {then.task - start.task:+.4g}")
            if then.task - start.task <= self.budget and then.safety < now.safety:
                bits, now = tried, then
            else:
                tell("  beyond the budget, or no safer: taken back")
                modules, trust = modules.rolled_back(bits), trust / 2
        return Plan(bits=bits)

    def edit(self, module: Module, plan: Plan) -> Edit:
        """Move one module's weights by their shares."""
        if plan.price is not None:
            terms = terms_of(module, plan.scale, plan.extra)
            share = terms.share(plan.price, hard=False)
            moved = (share > 0) & (module.tuned != module.aligned)
            weight = blend_(module.tuned.float(), module.aligned.float(), share)
        elif module.name in plan.bits:
            moved = unpack_mask(plan.bits[module.name].to(module.tuned.device), module.tuned.shape)
            share, weight = moved, torch.where(moved, module.aligned.to(module.tuned.dtype), module.tuned)
        else:
            return Edit()
        notes = {"share": float(share.float().mean())}
        if self.compensate and bool(moved.any()):
            factor, _ = inverse_factor(module.statistics[TASK_GRAM], damping=self.damping)
            tuned = module.tuned.float().clone()
            return Edit(obs_sweep_(tuned, moved, factor, target=weight.float(), order="fixed_first"), notes=notes)
        return Edit(weight, selected=int(moved.sum()), notes=notes)

    def _measured(self, modules: Modules) -> Measured:
        """What the costs of weights share, and the losses; one sweep."""
        pull, squares, moved = 0.0, 0.0, 0
        losses: Mapping[Need, float] = {}
        for module in modules():
            terms, losses = terms_of(module), module.losses
            pull += float(terms.task_pull.double().sum())
            squares += float(terms.task_curve.double().sum())
            moved += int((module.tuned != module.aligned).sum())
        scale, whole = (pull, pull * pull) if self.interactions == "bound" else (None, squares)
        safety, task, goal = (losses[need] for need in (SAFETY_GRADIENT, TASK_GRADIENT, ALIGNED_LOSS))
        return Measured(scale, self.sparsity * whole / max(moved, 1), safety, task, goal)

    def _price(self, modules: Modules, costs: Measured, limits: Limits, tell: Callable[[str], None]) -> float:
        """The price of the task that keeps both limits."""
        low, high = 0.0, 1.0
        free, found = self._outcomes(modules, costs, [low, high])
        if free.within(limits):
            high, found = low, free
        while high > low and not found.close(limits) and (prices := _between(low, high)):
            outcomes = self._outcomes(modules, costs, prices)
            kept = next((k for k, outcome in enumerate(outcomes) if outcome.within(limits)), len(prices))
            found = outcomes[kept] if kept < len(prices) else found
            low, high = [low, *prices][kept], [*prices, high][kept]
        tell(
            f"budgeted: predicted {found.safety:+.4g} nats a response of safety loss (limit {-limits.safety:.4g}), "
            f"{found.task:+.4g} of task loss (limit {limits.task:.4g})"
        )
        return high

    def _step(
        self,
        modules: Modules,
        costs: Measured,
        limits: Limits,
        bits: Mapping[str, Tensor],
        tell: Callable[[str], None],
    ) -> tuple[dict[str, Tensor], int]:
        """The weights that are rolled back so far and those that the limits allow in addition, packed; how many."""
        price = self._price(modules, costs, limits, tell)
        found, new = dict(bits), 0
        for module in modules():
            share = terms_of(module, costs.scale, costs.extra).share(price, hard=True)
            chosen = (share > 0) & (module.tuned != module.aligned)
            new += int(chosen.sum())
            packed = pack_mask(chosen).cpu()
            found[module.name] = found[module.name] | packed if module.name in found else packed
        return found, new

    def _outcomes(self, modules: Modules, costs: Measured, prices: Sequence[float]) -> list[Outcome]:
        """What each price leads to, over all modules; one sweep."""
        sums = torch.zeros(len(prices), 4, dtype=torch.float64)
        for module in modules():
            for terms in terms_of(module, costs.scale, costs.extra).pieces():
                sums += terms.sums(prices, hard=self.hard)
        if not bool(sums.isfinite().all()):
            raise MethodError("budgeted: a predicted loss is not finite; look for NaN or infinity in the weights.")
        if self.interactions == "ignored":
            return [Outcome(safety, alone) for safety, alone, _, _ in sums.tolist()]
        return [Outcome(safety, pull * pull / 2 - fall) for safety, _, fall, pull in sums.tolist()]


@dataclass(frozen=True)
class Plan:
    """Which weights go back, and how far; by default none.

    Attributes:
        bits: of whole weights: which, packed, by module.
        price: of shares: the price p of the task.
        scale: of shares: Y; None: weights are taken one by one.
        extra: of shares: what a weight costs beside its own C_t.
    """

    bits: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    price: float | None = None
    scale: float | None = None
    extra: float = 0.0


@dataclass(frozen=True)
class Measured:
    """A model on the way.

    Attributes:
        scale: Y; None: weights are taken one by one.
        extra: what a weight costs beside its own C_t.
        safety: the loss of safe responses, nats per response.
        task: the task loss.
        goal: the aligned model's loss of safe responses.
    """

    scale: float | None
    extra: float
    safety: float
    task: float
    goal: float


@dataclass(frozen=True)
class Limits:
    """Of the predicted changes of the losses in nats per response: T at most ``task``, -S at most ``safety``."""

    task: float
    safety: float


@dataclass(frozen=True)
class Outcome:
    """Predicted changes of the losses in nats per response.

    Attributes:
        safety: S.
        task: T.
    """

    safety: float
    task: float

    def within(self, limits: Limits) -> bool:
        """Whether it keeps both."""
        return self.task <= limits.task and -self.safety <= limits.safety

    def close(self, limits: Limits) -> bool:
        """Whether it keeps both, and one of them hardly."""
        task, safety = limits.task - self.task, limits.safety + self.safety
        return any(0 <= left <= ENOUGH * of for left, of in ((task, limits.task), (safety, limits.safety)) if of > 0)


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
        if hard:
            safety, task = self.gains
            return ((1 - price) * safety).add_(task, alpha=price).gt(0).float()
        fall = (1 - price) * self.safety_fall + price * self.task_fall
        curve = (1 - price) * self.safety_curve + price * (self.task_curve + self.extra)
        # Where there is no curvature the sum is a line: all the way, if it falls.
        return torch.where(fall >= curve, (fall > 0).float(), (fall / curve).clamp(min=0))

    @cached_property
    def gains(self) -> tuple[Tensor, Tensor]:
        """What a weight that goes all the way takes off S, and off `task` + extra / 2."""
        return self.safety_fall - self.safety_curve / 2, self.task_fall - (self.task_curve + self.extra) / 2

    def task(self, share: Tensor) -> float:
        """T with C_t in its square: where many weights move, far above T."""
        return float((share * (0.5 * share * self.task_curve - self.task_fall)).double().sum())

    def pieces(self) -> Iterator[Terms]:
        """The same of a few weights at a time."""
        parts = (self.safety_fall, self.safety_curve, self.task_fall, self.task_curve, self.task_pull)
        size = PIECE.get(self.task_pull.device.type, 1 << 20)
        for a, b, c, d, e in zip(*(x.flatten().split(size) for x in parts), strict=True):
            yield Terms(a, b, c, d, e, self.extra)

    def sums(self, prices: Sequence[float], *, hard: bool) -> Tensor:
        """Of each price S, `task`, sum alpha g_t d and sum alpha |d| sqrt(F_t); float64 [prices, 4]."""
        share = torch.stack([self.share(price, hard=hard) for price in prices]).double()
        falls = torch.stack([self.safety_fall, self.task_fall, self.task_pull]).double() @ share.T
        squares = share if hard else share.square()
        curves = torch.stack([self.safety_curve, self.task_curve]).double() @ squares.T / 2
        return torch.cat([curves - falls[:2], falls[1:]]).T.cpu()


def terms_of(module: Module, scale: float | None = None, extra: float = 0.0) -> Terms:
    """One module's coefficients, see `Measured`."""
    d = module.tuned.float() - module.aligned.float()
    found = module.statistics
    pull = d.abs() * found[TASK_FISHER].sqrt()
    curve = pull * (pull if scale is None else scale)
    falls = found[SAFETY_GRADIENT] * d, found[TASK_GRADIENT] * d
    return Terms(falls[0], found[SAFETY_FISHER] * d * d, falls[1], curve, pull, extra)


def _between(low: float, high: float) -> list[float]:
    """Prices that cut the range into parts; none where no float32 lies between, as shares are decided in float32."""
    cuts = torch.linspace(low, high, POINTS + 1, dtype=torch.float64)[1:-1].float().unique().tolist()
    return [cut for cut in cuts if low < cut < high]

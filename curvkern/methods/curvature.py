"""Influence step: up the loss of harmful responses as far as a rise of the task loss allows, by its curvature."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from curvkern.methods.method import Edit, Evidence, Method, MethodError, Module, Modules, Need
from curvkern.ops import axpby_, dot_list

HARMFUL_GRADIENT = Need("gradient", "harmful", loss="token_sum")
TASK_FISHER = Need("fisher_diag", "task", loss="token_sum")
TASK_GRADIENTS = Need("low_rank", "task", loss="token_sum")
TASK_EKFAC = tuple(Need(name, "task", loss="token_sum") for name in ("ekfac", "input_basis", "output_basis"))


class Curvature(Method):
    r"""A reconstruction of curvature-aware restoration (Bach et al., TMLR 2026, 2511.18039), which published no code.

    :math:`W = W_t + \epsilon H^{-1} g` with g the gradient of the harmful responses' loss and H the damped curvature of
    the task loss, block by block: every module has its own. :math:`\epsilon = \sqrt{2\tau / g^\top H^{-1} g}` over all
    modules is the step that raises the harmful loss most among those whose predicted task rise
    :math:`\tfrac12 \Delta^\top H \Delta` is ``tau``; or a shorter one, that raises the harmful loss by ``rise`` to
    first order: beyond some nats a response it only ruins the model, and the quadratic knows no end.

    H is :math:`\delta I` and

    - ``"diagonal"``: the diagonal Fisher;
    - ``"ekfac"``: Kronecker eigenbases with fitted eigenvalues (George et al. 2018);
    - ``"low_rank"``: :math:`U^\top U / N` of the N per-sample task gradients, inverted exactly by Woodbury;
    - ``"lbfgs"``: the same matrix, by the two-loop recursion over the pairs (s, H s), s the task gradients of the first
      ``history`` samples and g: what the paper uses, on probes in place of training steps.

    :math:`\delta` is ``damping`` times the mean of the diagonal, of the fitted eigenvalues, or of the N nonzero ones.
    """

    name: ClassVar[str] = "curvature"
    source: ClassVar[str] = "Bach et al. 2511.18039 (reconstruction)"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful", "task"})
    oriented: ClassVar[bool] = True

    tau: float = Field(0.01, gt=0, description="rise of the task loss to allow, as predicted; nats per response")
    rise: float = Field(30.0, gt=0, description="of the harmful loss at most, to first order; nats per response")
    inverse: Literal["diagonal", "ekfac", "low_rank", "lbfgs"] = "diagonal"
    damping: float = Field(0.1, gt=0, description="in units of the mean curvature")
    history: int = Field(10, ge=1, description="task gradients that lbfgs probes with")

    def statistics(self) -> tuple[Need, ...]:
        """The harmful gradient, and what H is made of; at the tuned model."""
        of = {"diagonal": (TASK_FISHER,), "ekfac": TASK_EKFAC}
        return (HARMFUL_GRADIENT, *of.get(self.inverse, (TASK_GRADIENTS,)))

    def plan(self, modules: Modules, evidence: Evidence | None, tell: Callable[[str], None]) -> float:
        """One sweep: the length of the step."""
        gain = sum(float(dot_list([m.statistics[HARMFUL_GRADIENT]], [self.direction(m)])) for m in modules())
        if not 0 < gain < float("inf"):
            raise MethodError(f"curvature: g H^-1 g is {gain:g}; is the harmful gradient zero, or are weights NaN?")
        step = min((2 * self.tau / gain) ** 0.5, self.rise / gain)
        tell(
            f"curvature: the harmful loss should rise by {step * gain:.4g} nats a response (to first order), the task "
            f"loss by {step**2 * gain / 2:.4g} (to second)"
        )
        return step

    def edit(self, module: Module, plan: float) -> Edit:
        """Take one module's part of the step."""
        return Edit(axpby_(module.tuned.to(torch.float32, copy=True), plan, self.direction(module), 1.0))

    def direction(self, module: Module) -> Tensor:
        """H^-1 g of one module, float32 [out, in]."""
        g = module.statistics[HARMFUL_GRADIENT]
        if self.inverse == "diagonal":
            fisher = module.statistics[TASK_FISHER]
            return g / (fisher + self._delta(fisher.mean()))
        if self.inverse == "ekfac":
            values, right, left = (module.statistics[need] for need in TASK_EKFAC)
            return left @ (left.T @ g @ right / (values + self._delta(values.mean()))) @ right.T
        each = module.statistics[TASK_GRADIENTS].float().flatten(1)
        delta = self._delta(each.square().sum() / len(each) ** 2)
        solve = woodbury if self.inverse == "low_rank" else self._lbfgs
        return solve(each, delta, g.flatten()).view_as(g)

    def _delta(self, mean: Tensor) -> Tensor:
        """The damping; 1 where there is no curvature at all, as any number is right then."""
        return torch.where(mean > 0, self.damping * mean, 1.0)

    def _lbfgs(self, each: Tensor, delta: Tensor, g: Tensor) -> Tensor:
        probes = [*each[: self.history], g]
        return two_loop([(s, each.T @ (each @ s) / len(each) + delta * s) for s in probes], g)


def woodbury(each: Tensor, delta: Tensor, g: Tensor) -> Tensor:
    r""":math:`(\delta I + U^\top U / N)^{-1} g` of U [N, p]: one N x N system."""
    gram = each @ each.T
    gram.diagonal().add_(delta * len(each))
    return (g - each.T @ torch.linalg.solve(gram, each @ g)) / delta


def two_loop(pairs: list[tuple[Tensor, Tensor]], g: Tensor) -> Tensor:
    """The L-BFGS product of the inverse Hessian with g, from pairs (step, change of the gradient), oldest first.

    Source: Nocedal and Wright 2006, algorithm 7.4. Pairs without curvature are left out.
    """
    held = [(s, y, s @ y) for s, y in pairs if s @ y > 1e-8 * s.norm() * y.norm()]
    q, shares = g.clone(), list[Tensor]()
    for s, y, product in reversed(held):
        shares.append((s @ q) / product)
        q -= shares[-1] * y
    if held:
        _, y, product = held[-1]
        q *= product / (y @ y)
    for (s, y, product), share in zip(held, reversed(shares), strict=True):
        q += s * (share - (y @ q) / product)
    return q

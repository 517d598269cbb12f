"""Gradient-guided rollback: reset the few weights whose safety gradient says that fine-tuning spoiled them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from curvkern.methods.method import Edit, Evidence, Method, MethodError, Module, Modules
from curvkern.ops import Selector, rollback_, undo_

Bits = dict[str, Tensor]


class GradientRollback(Method):
    r"""Restoration of Yang et al. (S&P 2025, 2504.09757), section IV.

    One step: the gradient g of the harmful prompts' hidden-state loss at the working weights; candidates are the
    weights of the first ``layer_fraction`` of the layers whose W - W_a and g share a strict sign (moving to W_a
    lowers the loss); of these, the ``rate`` * (all decoder parameters) largest \|g\|, over all tensors together, are
    copied from the aligned model. Steps accumulate g. After ``warmup`` steps the task score decides: if it is within
    ``max_drop`` of the tuned model's, plain steps go on to ``steps``; else the run starts over, and every step gives
    the ``give_back`` share of its candidates for which the task's own hidden-state loss asks most back to W_t, with
    gradients that do not accumulate. Every ``save_every`` steps the score is taken; the result is the last state
    before the score fell to the floor.

    ``ties="strict"`` selects above the threshold only, as published (K - 1 weights when there are no ties);
    ``"exact_k"`` selects K. Left out of the published code: its faults (a multi-GPU path that cannot run, a stale
    anchor cache, decisions on a 4-bit copy). Other than there, only weights and biases of linear modules move (there
    everything whose name lacks "layernorm"), and every task minibatch counts (there as many as there are harmful ones).
    The model, its gradients and both checkpoints are held in memory.
    """

    name: ClassVar[str] = "gradient_rollback"
    source: ClassVar[str] = "Yang et al. 2504.09757, section IV"
    needs: ClassVar[frozenset[str]] = frozenset({"harmful", "task", "model"})
    biases: ClassVar[bool] = True

    rate: float = Field(0.002, gt=0, le=1, description="share of all decoder parameters to reset in a step")
    give_back: float = Field(0.2, ge=0, le=1, description="share of a step's task candidates given back")
    steps: int = Field(20, ge=1)
    warmup: int = Field(5, ge=1)
    save_every: int = Field(5, ge=1)
    max_drop: float = Field(0.05, ge=0, le=1, description="share of the tuned model's task score that may be lost")
    layer_fraction: float = Field(2 / 3, gt=0, le=1)
    batch_size: int = Field(8, ge=1)
    ties: Literal["strict", "exact_k"] = "strict"
    dtype: Literal["float32", "auto"] = Field("float32", description="of the working model; auto: the checkpoint's")

    def evidence_options(self) -> dict[str, Any]:
        """The hidden state after the chosen layer, in minibatches."""
        dtype = torch.float32 if self.dtype == "float32" else "auto"
        return {"layer_fraction": self.layer_fraction, "batch_size": self.batch_size, "dtype": dtype}

    def plan(self, modules: Modules, evidence: Evidence | None, tell: Callable[[str], None]) -> Mapping[str, Tensor]:
        """Run the steps on the model in memory; the plan is which weights are reset, as packed bits by name."""
        if evidence is None:
            raise MethodError("gradient_rollback: needs the model in memory.")
        held = [module for module in modules() if module.name in evidence.weights]
        if not held:
            raise MethodError("gradient_rollback: no selected module lies in the layers that have a gradient.")
        run = _Run(self, held, evidence)
        tuned_score = run.score()
        if tuned_score <= 0:
            raise MethodError(
                f"gradient_rollback: the tuned model's task score is {tuned_score:g}: a score above 0 is what the "
                "search climbs down from. Exact match suits short answers; pass score=... from Python for others."
            )
        floor = (1 - self.max_drop) * tuned_score
        warmup = min(self.warmup, self.steps)
        for _ in range(warmup):
            run.restore()
        score = run.score()
        plain = score >= floor
        tell(f"tuned task score {tuned_score:.4f}, after {warmup} plain steps {score:.4f}")
        if not plain:
            tell(f"below the floor {floor:.4f}: starting over, with give-back")
            run.reset()
        return run.last_above(floor, start=warmup if plain else 0, give_back=not plain, tell=tell)

    def edit(self, module: Module, plan: Mapping[str, Tensor]) -> Edit:
        """Copy the planned weights of one module from the aligned model."""
        if module.name not in plan:
            return Edit()
        weight = module.tuned.clone()
        aligned = module.aligned.to(weight.dtype)
        count = rollback_(weight, aligned, mask=plan[module.name].to(weight.device))
        return Edit(weight, selected=int(count))


class _Run:
    """The working weights and which of them are reset."""

    def __init__(self, method: GradientRollback, modules: list[Module], evidence: Evidence) -> None:
        self.method = method
        self.modules = modules
        self.evidence = evidence
        self.k = math.ceil(evidence.layer_parameters * method.rate)
        self.reset_bits: Bits = {m.name: _no_bits(m.tuned) for m in modules}

    def score(self) -> float:
        """The task score of the working weights.

        Raises:
            MethodError: it is not a finite number.
        """
        score = self.evidence.score()
        if not math.isfinite(score):
            raise MethodError(f"gradient_rollback: the task score is {score}; wanted a finite number, higher is better")
        return score

    def restore(self) -> Bits:
        """One step towards the aligned model; the weights it reset."""
        gradient = self.evidence.add_gradient("harmful")
        fresh = self._move("aligned", gradient, k=self.k)
        for name, bits in fresh.items():
            self.reset_bits[name] |= bits
        return fresh

    def give_back(self, fresh: Bits) -> None:
        """Return to the tuned model those of the step's weights that the task wants most."""
        self.evidence.clear_gradients()
        gradient = self.evidence.add_gradient("task")
        returned = self._move("tuned", gradient, fraction=self.method.give_back, mask=fresh)
        for name, bits in returned.items():
            self.reset_bits[name] &= ~bits
        self.evidence.clear_gradients()

    def reset(self) -> None:
        """Start over from the tuned model."""
        for module in self.modules:
            undo_(
                self.evidence.weights[module.name], self._on_device(module.tuned, module), self.reset_bits[module.name]
            )
            self.reset_bits[module.name].zero_()
        self.evidence.clear_gradients()

    def last_above(self, floor: float, *, start: int, give_back: bool, tell: Callable[[str], None]) -> Bits:
        """Step on to the end; the state of the last checkpoint whose score is above the floor."""
        best = {name: bits.clone() for name, bits in self.reset_bits.items()}
        for step in range(start + 1, self.method.steps + 1):
            fresh = self.restore()
            if give_back:
                self.give_back(fresh)
            if step % self.method.save_every == 0 or step == self.method.steps:
                score = self.score()
                tell(f"step {step}: task score {score:.4f}, {self.count():,} weights reset")
                if score <= floor and not any(bits.any() for bits in best.values()):
                    raise MethodError(
                        f"gradient_rollback: at step {step} the task score {score:.4f} is at or below the floor "
                        f"{floor:.4f} and no earlier checkpoint has restored a weight. Lower rate, set save_every=1 "
                        "or raise max_drop."
                    )
                if score <= floor:
                    tell(f"at or below the floor {floor:.4f}: the checkpoint before is the result")
                    return best
                best = {name: bits.clone() for name, bits in self.reset_bits.items()}
        return best

    def count(self) -> int:
        """Weights that are reset now."""
        return sum(_popcount(bits) for bits in self.reset_bits.values())

    def _move(
        self,
        to: Literal["aligned", "tuned"],
        gradient: Mapping[str, Tensor],
        *,
        k: int | None = None,
        fraction: float | None = None,
        mask: Bits | None = None,
    ) -> Bits:
        """Copy from ``to`` where the descent gate holds and |gradient| is among the K largest; which were copied."""
        selector = Selector("grad", "descent", device=next(iter(gradient.values())).device)

        def observe() -> None:
            for module, weight, target in self._pairs(to):
                selector.observe(weight, target, grad=gradient[module.name], mask=_of(mask, module))

        observe()
        of: Literal["all", "gated"] = "all" if k is not None else "gated"
        if selector.refine(k=k, fraction=fraction, of=of):
            observe()
        # Fewer candidates than K, late in a run, means that all of them move.
        limit = selector.threshold(k=k, fraction=fraction, of=of, ties=self.method.ties, on_short="clamp")
        moved: Bits = {}
        for module, weight, target in self._pairs(to):
            bits = _no_bits(weight)
            grad = gradient[module.name]
            rollback_(weight, target, limit, gate="descent", grad=grad, mask=_of(mask, module), undo=bits)
            moved[module.name] = bits
        return moved

    def _pairs(self, to: Literal["aligned", "tuned"]) -> Iterable[tuple[Module, Tensor, Tensor]]:
        for module in self.modules:
            target = module.aligned if to == "aligned" else module.tuned
            yield module, self.evidence.weights[module.name], self._on_device(target, module)

    def _on_device(self, tensor: Tensor, module: Module) -> Tensor:
        weight = self.evidence.weights[module.name]
        return tensor.to(weight.device, weight.dtype)


def _no_bits(tensor: Tensor) -> Tensor:
    return torch.zeros(-(-tensor.numel() // 8), dtype=torch.uint8, device=tensor.device)


def _of(mask: Bits | None, module: Module) -> Tensor | None:
    return None if mask is None else mask[module.name]


def _popcount(bits: Tensor) -> int:
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return int(((bits[:, None] >> shifts) & 1).sum())

"""What a restoration method is: what it needs, what it plans over all modules, how it edits one."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol

from pydantic import BaseModel, ConfigDict
from torch import Tensor


class MethodError(ValueError):
    """A method cannot be used as asked; ``parameter`` is the one that is wrong, if one is."""

    def __init__(self, message: str, parameter: str | None = None) -> None:
        super().__init__(message)
        self.parameter = parameter


@dataclass(frozen=True)
class Need:
    """A statistic of the weights that a method asks for: a mean over data, see `curvkern.curvature.estimate`.

    Attributes:
        quantity: ``"gradient"``, ``"fisher_diag"``, ``"input_gram"`` and so on.
        data: the loss is on the responses of these rows.
        at: the model whose gradients or inputs they are.
        loss: of a row: the mean over its response's tokens, or the sum, whose mean square gradient is the diagonal of
            its Hessian where the model fits the data (of a mean over T tokens it is a T-th of that).
    """

    quantity: str
    data: Literal["harmful", "safety", "task"]
    at: Literal["tuned", "aligned"] = "tuned"
    loss: Literal["response_mean", "token_sum"] = "response_mean"


@dataclass(frozen=True)
class Module:
    """One weight matrix of the model (or a bias, for methods that take them), as every checkpoint has it.

    Attributes:
        name: the weight's name in the checkpoint, ``"model.layers.3.self_attn.q_proj.weight"``.
        layer: the decoder layer's number.
        kind: the module's own name, ``"q_proj"``.
        tuned: W_t [out, in], in its own dtype.
        aligned: W_a, likewise.
        base: W_u, before alignment, likewise; None unless a method of the pass needs it.
        factors: (B [out, r], A [r, in], scale) with W_t = W_a + scale B A if the tuned model is a LoRA adapter that
            changes this module; else None.
        unaligned: the weight of an aligned model broken on purpose, like base.
        safety_adapter: the weight of the aligned model tuned on safety data, like base.
        safety_factors: (B, A, scale) of that model, like factors, if it is a LoRA adapter that changes this module.
        statistics: what the method's `Method.statistics` asked for, float32.
        losses: the mean loss of the rows and the model of each of these; the same for all modules.
    """

    name: str
    layer: int
    kind: str
    tuned: Tensor
    aligned: Tensor
    base: Tensor | None = None
    factors: tuple[Tensor, Tensor, float] | None = None
    unaligned: Tensor | None = None
    safety_adapter: Tensor | None = None
    safety_factors: tuple[Tensor, Tensor, float] | None = None
    statistics: Mapping[Need, Tensor] = field(default_factory=dict["Need", Tensor])
    losses: Mapping[Need, float] = field(default_factory=dict["Need", float])

    def own_seed(self, seed: int) -> int:
        """A seed for this module, from ``seed`` and its name alone: the same in any order and on any device."""
        return zlib.crc32(f"{seed}:{self.name}".encode())


@dataclass(frozen=True)
class Edit:
    """What a method makes of one module.

    Attributes:
        weight: the restored weight, in float32 where it was computed and in the checkpoint's dtype where it was copied;
            None leaves the module as it was tuned.
        factors: (B, A) in place of the adapter's, if the method can keep an adapter one.
        selected: how many weights the method meant to change, where it knows; ``"all"``: those that fine-tuning did.
        notes: figures for the report, ``{"cosine": 0.31}``.
    """

    weight: Tensor | None = None
    factors: tuple[Tensor, Tensor] | None = None
    selected: int | Literal["all"] | None = None
    notes: dict[str, float] = field(default_factory=dict[str, float])


class Modules(Protocol):
    """All modules that are restored, as often as they are asked for."""

    def __call__(self) -> Iterable[Module]:
        """Stream all once, in file order."""
        ...

    def rolled_back(self, bits: Mapping[str, Tensor]) -> Modules:
        """The modules of the tuned model with some weights rolled back, and statistics at that model, measured anew.

        The last ones are gone.

        Args:
            bits: which weights of a module are the aligned model's, packed, on the CPU, see `curvkern.ops.rollback_`;
                by name. Without any these are the tuned model's, as at first.
        """
        ...


class Evidence(Protocol):
    """The model in memory, and what data say of its weights; see `curvkern.curvature.HiddenEvidence`."""

    @property
    def weights(self) -> Mapping[str, Tensor]:
        """Checkpoint name -> the live parameter; editing it in place edits the model."""
        ...

    @property
    def layer_parameters(self) -> int:
        """Parameters in all decoder layers, norms and biases included."""
        ...

    def add_gradient(self, data: Literal["harmful", "task"]) -> Mapping[str, Tensor]:
        """Add the gradient of the data's loss at the working weights to the sums (float32) and return the sums."""
        ...

    def clear_gradients(self) -> None:
        """Set the sums to zero."""
        ...

    def score(self) -> float:
        """The task score of the working weights; higher is better."""
        ...


class Method(BaseModel):
    """A restoration method: frozen parameters, and the three things that the pass asks of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: ClassVar[str]
    #: Paper and equation.
    source: ClassVar[str]
    #: Of "base", "unaligned", "safety_adapter", "harmful", "safety", "task", "model"; a property if parameters decide.
    needs: ClassVar[frozenset[str]] = frozenset()
    #: Whether the biases of linear modules are modules too (1-D).
    biases: ClassVar[bool] = False
    #: Whether it matters that weights are [out, in].
    oriented: ClassVar[bool] = False
    #: Tensors that `plan` and `edit` hold at most, result included, each as large as the module in float32 or as its
    #: largest statistic; a property if parameters decide.
    workspace: ClassVar[int] = 5

    @property
    def plans(self) -> bool:
        """Whether it looks at all modules before it edits one; if not, a module can be edited once it is known."""
        return type(self).plan is not Method.plan

    @property
    def measures_again(self) -> bool:
        """Whether `plan` asks for `Modules.rolled_back`."""
        return False

    def edits_adapter(self) -> bool:
        """Whether edits come with factors, so that an adapter stays an adapter."""
        return False

    def statistics(self) -> tuple[Need, ...]:
        """What data must say of every module before it can be planned and edited."""
        return ()

    def evidence_options(self) -> dict[str, Any]:
        """Keyword arguments for the evidence, where the method needs the model."""
        return {}

    def plan(self, modules: Modules, evidence: Evidence | None, tell: Callable[[str], None]) -> Any:
        """Look at all modules, as often as the method's ranking asks; the result goes to every `edit`.

        Args:
            modules: each call is one sweep over all modules.
            evidence: given if the method needs the model.
            tell: takes lines for the report.
        """
        return None

    def edit(self, module: Module, plan: Any) -> Edit:
        """Restore one module.

        Args:
            module: its tensors are the method's to keep, not to change.
            plan: what `plan` returned.
        """
        raise NotImplementedError


def given(method: Method, tensor: Tensor | None, role: str) -> Tensor:
    """The tensor of a checkpoint that the method needs.

    Raises:
        MethodError: it is not there.
    """
    if tensor is None:
        raise MethodError(f"{method.name}: needs the {role} checkpoint; pass {role}=...")
    return tensor

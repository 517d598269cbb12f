r"""AsFT: hold a fine-tuning's update to the alignment direction :math:`V = W_a - W_u`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from curvkern.backend import check
from curvkern.ops import alignment_map, alignment_penalty, subspace_basis
from curvkern.training.added_gradient import AddedGradient
from curvkern.training.lora import factors, is_lora, lora_layers, oriented
from curvkern.training.wrappers import bare

Projector = Literal["gram", "basis"]
COLUMNS = 256  # of a whole update that are mapped at a time


@dataclass(frozen=True)
class _Direction:
    """W_a, and what C is made of: U where ``is_basis``, else W_u beside W_a."""

    aligned: Tensor
    other: Tensor
    is_basis: bool

    def to(self, device: torch.device) -> _Direction:
        return _Direction(self.aligned.to(device), self.other.to(device), self.is_basis)

    def residue(self, x: Tensor, backend: str) -> Tensor:
        """(I - C) x."""
        if not self.is_basis:
            return x - alignment_map(x, self.aligned, self.other, backend=backend)[0]
        u = self.other.to(x.dtype)
        return x - u @ (u.mT @ x)


class AsFT:
    r"""The regulariser of AsFT (Yang et al., 2506.08473): :math:`\lambda \sum_l |(I - C_l)\,\Delta_l|_F^2`.

    :math:`\Delta` is BA of a LoRA layer (all active adapters of it together), or :math:`W - W_a` of an nn.Linear that
    is trained itself.

    - ``projector="gram"`` is the published code: :math:`C = V V^T / |V|_F`, without the LoRA scale. That C is no
      projector: its eigenvalues are so small that the penalty is close to a decay of the product BA.
    - ``projector="basis"`` is what the paper's text says: :math:`C = U U^T`, U the leading ``rank`` left singular
      directions of V. What lies along the alignment is free, what leaves it is penalised.

    Args:
        directions: name of a module (with or without ``.weight``) -> (aligned, base), each [o, i] as in nn.Linear, of
            any floating dtype; they may differ. Kept as they are, not copied: best in the checkpoint's bf16. A basis is
            computed here, float32 [o, rank], after which base is let go.
        projector: ``"gram"`` or ``"basis"``.
        weight: lambda.
        rank: of the basis; at most min(o, i) of each weight is used.
        scaled: penalise s BA, the update that the model sees, instead of BA.
        backend: see `curvkern.use`.

    Raises:
        TypeError, ValueError: no direction, weights that do not fit each other, a weight below 0, NaN in the weights
            of a basis.

    A step holds no [o, o], and no [o, i] for LoRA: two sweeps over V forward, two backward (`alignment_penalty`). For
    whole updates the gradient is [o, i] by nature; the map is computed 256 columns at a time, twice backward.
    """

    def __init__(
        self, directions: Mapping[str, tuple[Tensor, Tensor]], *,
        projector: Projector = "gram", weight: float = 1.0, rank: int = 64, scaled: bool = False, backend: str = "auto",
    ) -> None:  # fmt: skip
        check.one_of("AsFT", "projector", projector, get_args(Projector))
        check.at_least("AsFT", "rank", rank, 1)
        if not directions:
            raise ValueError("AsFT: directions is empty; wanted name -> (aligned, base) for at least one module.")
        if not weight >= 0:
            raise ValueError(f"AsFT: weight is {weight}; wanted at least 0.")
        self.projector, self.weight, self.rank, self.scaled, self.backend = projector, weight, rank, scaled, backend
        self._directions = {
            name.removesuffix(".weight"): self._direction(name, *weights) for name, weights in directions.items()
        }

    @classmethod
    def from_peft(
        cls, model: nn.Module, base: nn.Module | Mapping[str, Tensor], *,
        aligned: nn.Module | Mapping[str, Tensor] | None = None, **options: Any,
    ) -> AsFT:  # fmt: skip
        """A guard of all LoRA layers of a model.

        Args:
            model: with LoRA adapters on the aligned model.
            base: the model before alignment, or its weights by name; the names are the aligned model's.
            aligned: the same of the aligned model. None: the frozen weights of ``model``, which are not copied; pass
                it if they are quantised.
            options: of `AsFT`.

        Raises:
            ValueError: no LoRA layer (says what was looked for), or base lacks a weight or has it in another shape.
        """
        before, after = _by_name(base), None if aligned is None else _by_name(aligned)
        directions: dict[str, tuple[Tensor, Tensor]] = {}
        for name, layer in lora_layers("AsFT", model).items():
            lora: Any = layer
            own = lora.get_base_layer().weight if after is None else _look_up("aligned", after, name)
            directions[name] = (oriented(layer, own), oriented(layer, _look_up("base", before, name)))
        return cls(directions, **options)

    def penalty(self, model: nn.Module, *, accumulation: int = 1) -> Tensor:
        """The penalty of a model as it is now; add it to the loss.

        Args:
            model: bare or inside PEFT, `torch.compile` or DistributedDataParallel.
            accumulation: micro-batches a step. Each adds its share, so that the step's gradient holds the penalty once.
                Cheaper: ``penalty(model).backward()`` once, before the first of them.

        Returns:
            Scalar, float32 (float64 if a weight is), once differentiable; full precision under autocast too.

        Raises:
            ValueError: a module that has a direction is not in the model, is neither a LoRA layer nor an nn.Linear, or
                has another shape.
        """
        check.at_least("AsFT", "accumulation", accumulation, 1)
        modules = bare(model)
        values = [self._of_module(name, _module(modules, name)) for name in self._directions]
        return self.weight / accumulation * torch.stack([value.to(values[0].device) for value in values]).sum()

    def callback(self) -> AddedGradient:
        """For ``Trainer(callbacks=[guard.callback()])``: the penalty's gradient, once a step; see `AddedGradient`."""
        return AddedGradient("AsFT", self.penalty)

    def _direction(self, name: str, aligned: Tensor, base: Tensor) -> _Direction:
        where = f"AsFT: {name}"
        for which, tensor in {"aligned": aligned, "base": base}.items():
            if tensor.ndim != 2 or not tensor.is_floating_point():
                kind = str(tensor.dtype).removeprefix("torch.")
                raise ValueError(f"{where}: {which} is {kind} {list(tensor.shape)}; wanted a floating matrix [o, i].")
        check.same_shape(where, aligned=aligned, base=base)
        aligned, base = aligned.detach(), base.detach()
        if self.projector == "gram":
            return _Direction(aligned, base, is_basis=False)
        rank = min(self.rank, *aligned.shape)
        basis = subspace_basis(aligned, base.to(aligned.device), rank, backend=self.backend)
        return _Direction(aligned, basis, is_basis=True)

    def _of_module(self, name: str, module: nn.Module) -> Tensor:
        if is_lora(module):
            b, a = self._update(name, module)
            v = self._on(name, b.device)
            _fits(name, (len(b), a.shape[1]), v.aligned)
            if v.is_basis:
                return alignment_penalty(b, a, basis=v.other, backend=self.backend)
            return alignment_penalty(b, a, v.aligned, v.other, backend=self.backend)
        if not isinstance(module, nn.Linear):
            kind = type(module).__name__
            raise ValueError(f"AsFT: {name} is a {kind}; wanted a LoRA layer or an nn.Linear. Leave its direction out.")
        v = self._on(name, module.weight.device)
        _fits(name, module.weight.shape, v.aligned)
        return _WholeUpdate.apply(module.weight, v, self.backend)

    def _update(self, name: str, module: nn.Module) -> tuple[Tensor, Tensor]:
        """B and A of all active adapters, side by side."""
        parts = factors("AsFT", name, module)
        b = [part.scale * part.B if self.scaled else part.B for part in parts]
        return (b[0], parts[0].A) if len(parts) == 1 else (torch.cat(b, 1), torch.cat([part.A for part in parts]))

    def _on(self, name: str, device: torch.device) -> _Direction:
        """A module's direction where its weights are; moved there the first time."""
        v = self._directions[name] = self._directions[name].to(device)
        return v


class _WholeUpdate(torch.autograd.Function):
    """|(I - C) (W - W_a)|^2, a few columns at a time; the image is made again for the gradient."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, v: _Direction, backend: str) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.v, ctx.backend = v, backend
        with torch.autocast(weight.device.type, enabled=False):
            residues = (v.residue(_update(weight, v, at), backend) for at in _columns(weight))
            return torch.stack([residue.square().sum() for residue in residues]).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (weight,) = ctx.saved_tensors
        out = weight.new_empty(weight.shape)
        with torch.autocast(weight.device.type, enabled=False):
            for at in _columns(weight):
                residue = ctx.v.residue(_update(weight, ctx.v, at), ctx.backend)
                out[:, at] = 2 * grad * ctx.v.residue(residue, ctx.backend)
        return out, None, None


def _columns(weight: Tensor) -> list[slice]:
    return [slice(start, start + COLUMNS) for start in range(0, weight.shape[1], COLUMNS)]


def _update(weight: Tensor, v: _Direction, at: slice) -> Tensor:
    """Columns of W - W_a, float32 or wider."""
    aligned = v.aligned[:, at]
    dtype = torch.promote_types(torch.promote_types(weight.dtype, aligned.dtype), torch.float32)
    return weight.detach()[:, at].to(dtype) - aligned.to(dtype)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        some = [known for known, module in model.named_modules() if is_lora(module) or isinstance(module, nn.Linear)]
        listed = ", ".join(some[:4]) or "none"
        raise ValueError(
            f"AsFT: there is a direction for {name}, but the model has no such module; those it could guard are "
            f"{listed}{', ...' if len(some) > 4 else ''}. Name the directions as the model names its modules."
        ) from None


def _by_name(weights: nn.Module | Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    return bare(weights).state_dict() if isinstance(weights, nn.Module) else weights


def _look_up(argument: str, weights: Mapping[str, Tensor], name: str) -> Tensor:
    for key in (f"{name}.weight", name):
        if key in weights:
            return weights[key]
    raise ValueError(f"AsFT: {argument} has no {name}.weight, though the model has LoRA there; pass that weight too.")


def _fits(name: str, shape: tuple[int, ...], aligned: Tensor) -> None:
    if tuple(shape) != tuple(aligned.shape):
        raise ValueError(
            f"AsFT: {name} has an update of shape {list(shape)}, but its direction is {list(aligned.shape)}; take "
            "aligned and base from the models this one was tuned from, as nn.Linear keeps them."
        )

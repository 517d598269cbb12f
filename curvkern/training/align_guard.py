r"""AlignGuard-LoRA: two adapters, one where safety is sensitive and one for the task, kept from colliding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from curvkern.backend import check
from curvkern.ops import subspace_basis
from curvkern.training.added_gradient import AddedGradient
from curvkern.training.lora import factors, lora_layers

TILE = 1 << 20  # entries of an update that exist at a time
TINY = 1e-12


def riemannian_overlap(alignment: Tensor, task: Tensor, beta: float = 10.0, tau: float = 0.01) -> Tensor:
    r"""Entrywise :math:`\sum \eta\,|\Delta_A \Delta_T|`, :math:`\eta = 1 + \beta\,\sigma(|\Delta_A+\Delta_T|-\tau)`.

    Args:
        alignment: :math:`\Delta_A`, any shape, floating.
        task: :math:`\Delta_T`, the same shape.
        beta: what a large entry counts beyond 1.
        tau: where an entry starts to be large.

    Returns:
        Scalar, differentiable in both. Zero, with zero gradient, where their supports are disjoint.

    Raises:
        ValueError: shapes that differ.

    Source: Das et al. (2508.02079), the Riemannian overlap :math:`E_{RM}`.
    """
    check.same_shape("riemannian_overlap", alignment=alignment, task=task)
    eta = 1 + beta * torch.sigmoid((alignment + task).abs() - tau)
    return (eta * (alignment * task).abs()).sum()


def geodesic_overlap(alignment: Tensor, task: Tensor) -> Tensor:
    r"""Squared cosine :math:`\langle\Delta_A,\Delta_T\rangle^2 / (|\Delta_A|^2|\Delta_T|^2 + \epsilon)`, eps = 1e-12.

    Args:
        alignment: :math:`\Delta_A`, any shape, floating.
        task: :math:`\Delta_T`, the same shape.

    Returns:
        Scalar in [0, 1], differentiable in both. Zero for any two parts that an orthogonal projector makes.

    Raises:
        ValueError: shapes that differ.

    Source: Das et al. (2508.02079), the geodesic overlap :math:`E_{geo}`.
    """
    check.same_shape("geodesic_overlap", alignment=alignment, task=task)
    return _squared_cosine((alignment * task).sum(), alignment.square().sum(), task.square().sum())


class AlignGuardLoRA:
    r"""Das et al., AlignGuard-LoRA (2508.02079), with two adapters in the place of a projection. Reconstruction.

    The penalty, with :math:`\Delta_A`, :math:`\Delta_T` the updates (LoRA scale included) of the two adapters, summed
    over layers:

    .. math:: \lambda_A \sum F\,\Delta_A^2 + \lambda_T \sum H\,\Delta_T^2
              + \lambda_C\,(\alpha E_{RM} + (1 - \alpha) E_{geo})

    The publication splits one update by a projector, :math:`\Delta_A = P\Delta`, :math:`\Delta_T = \Delta - P\Delta`.
    If P picks coordinates, as it does for a diagonal Fisher, both overlaps and their gradients are zero whatever the
    update is; if P is orthogonal, :math:`E_{geo}` is. Two adapters are free to overlap, so both terms act. `orient`
    starts them apart, along the Fisher and away from it.

    Args:
        fisher: F, the diagonal Fisher of safety data at the aligned model: name of a module (with or without
            ``.weight``) -> [o, i] as in nn.Linear, floating, not negative. Layers without one have no penalty.
        adapters: names of the two adapters, alignment first; both must be active.
        align_weight: lambda_A. None of the weights is published; these are ours.
        task_weight: lambda_T.
        collision_weight: lambda_C.
        blend: alpha, in [0, 1].
        beta: see `riemannian_overlap`.
        tau: see `riemannian_overlap`.
        task_curvature: H, like ``fisher`` and of the same modules. None: all 1. With ``fisher`` here too, the task's
            adapter pays for safety drift like the other.

    Raises:
        ValueError: no Fisher, a negative entry or one that is not finite, a setting out of range, H of other modules.
    """

    def __init__(
        self, fisher: Mapping[str, Tensor], *, adapters: tuple[str, str] = ("alignment", "task"),
        align_weight: float = 1.0, task_weight: float = 0.1, collision_weight: float = 0.1, blend: float = 0.5,
        beta: float = 10.0, tau: float = 0.01, task_curvature: Mapping[str, Tensor] | None = None,
    ) -> None:  # fmt: skip
        weights = {"align_weight": align_weight, "task_weight": task_weight, "collision_weight": collision_weight}
        for name, value in {**weights, "beta": beta}.items():
            if not value >= 0:
                raise ValueError(f"AlignGuardLoRA: {name} is {value}; wanted at least 0.")
        if not 0 <= blend <= 1:
            raise ValueError(f"AlignGuardLoRA: blend is {blend}; wanted a number in [0, 1].")
        if len(set(adapters)) != 2:
            raise ValueError(f"AlignGuardLoRA: adapters is {adapters}; wanted the names of two adapters.")
        self.align_weight, self.task_weight, self.collision_weight = align_weight, task_weight, collision_weight
        self.adapters, self.blend, self.beta, self.tau = adapters, blend, beta, tau
        self._fisher = _checked("fisher", fisher)
        self._curvature = None if task_curvature is None else _checked("task_curvature", task_curvature)
        if self._curvature is not None and self._curvature.keys() != self._fisher.keys():
            other = sorted(self._curvature.keys() ^ self._fisher.keys())[0]
            raise ValueError(
                f"AlignGuardLoRA: only one of fisher and task_curvature has {other}; wanted the same names."
            )

    @torch.no_grad()
    def orient(self, model: nn.Module) -> None:
        r"""Point fresh adapters: A of the alignment adapter to the leading input directions of :math:`\sqrt F`.

        They are the leading right singular vectors, at the norm that A had; A of the task adapter loses its part along
        them. Do it once, before training, while both B are zero: the model's output stays what it was.

        Raises:
            ValueError: a B is not zero, or the model and the Fisher do not fit.
        """
        for name, pair in self._pairs(model).items():
            if pair.b_a.any() or pair.b_t.any():
                raise ValueError(f"AlignGuardLoRA: the adapters of {name} are trained already; orient fresh ones.")
            root = self._fisher[name].to(pair.a_a.device, torch.float32).sqrt().mT
            along = subspace_basis(root, torch.zeros_like(root), min(len(pair.a_a), *root.shape)).mT
            along = along[along.any(1)]  # the Fisher may be of a lower rank; a row of zeros would never learn
            pair.a_a[: len(along)] = pair.a_a.norm() / len(pair.a_a) ** 0.5 * along
            pair.a_t.sub_(pair.a_t.float() @ along.mT @ along)

    def penalty(self, model: nn.Module, *, accumulation: int = 1) -> Tensor:
        """The penalty of a model as it is now; add it to the loss.

        Args:
            model: with both adapters on its LoRA layers; bare or inside PEFT, `torch.compile` or DDP.
            accumulation: micro-batches a step, see `AsFT.penalty`.

        Returns:
            Scalar, float32 (float64 if a factor is), once differentiable; full precision under autocast too. Updates
            are made a tile of rows at a time, and again for the gradient: no [o, i] is kept.

        Raises:
            ValueError: the model has no LoRA layer, lacks a module of the Fisher or one of the adapters, or shapes
                do not fit.
        """
        check.at_least("AlignGuardLoRA", "accumulation", accumulation, 1)
        values = [self._of_layer(name, pair) for name, pair in self._pairs(model).items()]
        return torch.stack([value.to(values[0].device) for value in values]).sum() / accumulation

    def callback(self) -> AddedGradient:
        """For ``Trainer(callbacks=[guard.callback()])``: the penalty's gradient, once a step; see `AddedGradient`."""
        return AddedGradient("AlignGuardLoRA", self.penalty)

    def _pairs(self, model: nn.Module) -> dict[str, _Pair]:
        layers = lora_layers("AlignGuardLoRA", model)
        pairs: dict[str, _Pair] = {}
        for name, fisher in self._fisher.items():
            if name not in layers:
                some = ", ".join(list(layers)[:4])
                raise ValueError(
                    f"AlignGuardLoRA: fisher has {name}, which is no LoRA layer; the model has {some}, ..."
                )
            pairs[name] = self._pair(name, layers[name], fisher)
        return pairs

    def _pair(self, name: str, layer: nn.Module, fisher: Tensor) -> _Pair:
        alignment, task = factors("AlignGuardLoRA", name, layer, self.adapters)
        active: list[str] = getattr(layer, "active_adapters", [])
        if not set(self.adapters) <= set(active):
            raise ValueError(
                f"AlignGuardLoRA: of {name} only {', '.join(active)} is active; activate both adapters: "
                f"model.base_model.set_adapter({list(self.adapters)})."
            )
        check.shape(f"AlignGuardLoRA: {name}", "fisher", fisher, (len(task.B), task.A.shape[1]), "[o, i] of the layer")
        return _Pair(alignment.B, alignment.A, task.B, task.A, alignment.scale, task.scale)

    def _of_layer(self, name: str, pair: _Pair) -> Tensor:
        pair = pair.widened()
        fisher = self._fisher[name] = self._fisher[name].to(pair.b_a.device)
        with torch.autocast(pair.b_a.device.type, enabled=False):
            value = (1 - self.blend) * self.collision_weight * pair.geodesic_overlap()
            step = max(1, TILE // fisher.shape[1])
            for start in range(0, len(fisher), step):
                rows = slice(start, start + step)
                weights = fisher[rows], self._task_curvature(name, rows)
                value = value + checkpoint(self._of_rows, pair.rows(rows), *weights, use_reentrant=False)
        return value

    def _task_curvature(self, name: str, rows: slice) -> Tensor | None:
        if self._curvature is None:
            return None
        self._curvature[name] = self._curvature[name].to(self._fisher[name].device)
        return self._curvature[name][rows]

    def _of_rows(self, pair: _Pair, fisher: Tensor, curvature: Tensor | None) -> Tensor:
        """All terms that are sums over entries."""
        alignment, task = pair.b_a @ pair.a_a, pair.b_t @ pair.a_t
        drift = (fisher.to(alignment.dtype) * alignment.square()).sum()
        spread = task.square().sum() if curvature is None else (curvature.to(task.dtype) * task.square()).sum()
        overlap = riemannian_overlap(alignment, task, self.beta, self.tau)
        return self.align_weight * drift + self.task_weight * spread + self.blend * self.collision_weight * overlap


class _Pair(NamedTuple):
    """Factors of the alignment adapter and of the task's."""

    b_a: Tensor
    a_a: Tensor
    b_t: Tensor
    a_t: Tensor
    s_a: float = 1.0
    s_t: float = 1.0

    def widened(self) -> _Pair:
        """Scales in B, all in float32 or wider."""
        wide = torch.promote_types(self.b_a.dtype, torch.float32)
        b_a, a_a, b_t, a_t = (factor.to(wide) for factor in self[:4])
        return _Pair(self.s_a * b_a, a_a, self.s_t * b_t, a_t)

    def rows(self, rows: slice) -> _Pair:
        return _Pair(self.b_a[rows], self.a_a, self.b_t[rows], self.a_t)

    def geodesic_overlap(self) -> Tensor:
        """That of the two updates, from products of their factors."""
        return _squared_cosine(
            _dot(self.b_a, self.a_a, self.b_t, self.a_t),
            _dot(self.b_a, self.a_a, self.b_a, self.a_a),
            _dot(self.b_t, self.a_t, self.b_t, self.a_t),
        )


def _dot(b: Tensor, a: Tensor, other_b: Tensor, other_a: Tensor) -> Tensor:
    """<B A, B' A'>."""
    return ((b.mT @ other_b) * (a @ other_a.mT)).sum()


def _squared_cosine(dot: Tensor, square: Tensor, other_square: Tensor) -> Tensor:
    return dot.square() / (square * other_square + TINY)


def _checked(argument: str, matrices: Mapping[str, Tensor]) -> dict[str, Tensor]:
    if not matrices:
        raise ValueError(f"AlignGuardLoRA: {argument} is empty; wanted name -> [o, i] for at least one module.")
    for name, matrix in matrices.items():
        if matrix.ndim != 2 or not matrix.is_floating_point():
            raise ValueError(f"AlignGuardLoRA: {argument} of {name} is {list(matrix.shape)}; wanted a floating [o, i].")
        if not bool(((matrix >= 0) & matrix.isfinite()).all()):
            raise ValueError(f"AlignGuardLoRA: {argument} of {name} has entries below 0 or not finite.")
    return {name.removesuffix(".weight"): matrix.detach() for name, matrix in matrices.items()}

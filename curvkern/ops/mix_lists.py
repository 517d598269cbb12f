"""Merging models of many tensors at once: small tensors of one shape go through a kernel together, as rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from curvkern.ops.mix import Rescale, arc_weights, check_dare, dare, densities, linear, model_stock, ties
from curvkern.ops.mix_passes import check_family, check_finite, coefficients, delta_dots, weighted_sum
from curvkern.ops.philox import philox_rows

# Elements; above, a call's price is small beside the bytes', and stacking would copy them.
SMALL = 1 << 16


def linear_list(
    models: Sequence[Sequence[Tensor]], weights: Sequence[float], *, normalize: bool = False, backend: str = "auto"
) -> list[Tensor]:
    """`linear` of each tensor of models: ``models[k][i]`` is tensor i of model k.

    Args:
        models: one list of tensors each, alike in length and shapes.
        weights: one number a model.
        normalize: divide by the sum of the weights.
        backend: see `use`.

    Returns:
        New tensors like those of ``models[0]``. Small ones of one shape share their memory.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    The same bits as `linear` tensor by tensor.
    """
    return _together("linear_list", models, lambda rows, _: linear(rows, weights, normalize=normalize, backend=backend))


def slerp_list(
    a: Sequence[Tensor], b: Sequence[Tensor], t: float, *, colinear: float = 0.9995, backend: str = "auto"
) -> list[Tensor]:
    """`slerp` of each pair of tensors, each with its own angle.

    Args:
        a: tensors.
        b: as many, of the same shapes.
        t: as in `slerp`.
        colinear: as in `slerp`.
        backend: see `use`.

    Returns:
        New tensors like those of ``a``. Small ones of one shape share their memory.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.
    """
    check_finite("slerp_list", t=t, colinear=colinear)

    def merge(rows: list[Tensor], members: list[int]) -> Tensor:
        dots = delta_dots(None, rows, rows[0].shape[0], backend)
        return weighted_sum(rows, arc_weights(dots, t, colinear).to(coefficients([], *rows).dtype), backend)

    return _together("slerp_list", [a, b], merge)


def model_stock_list(
    base: Sequence[Tensor], models: Sequence[Sequence[Tensor]], *, backend: str = "auto"
) -> list[Tensor]:
    """`model_stock` of each tensor of models, each with its own angle: ``models[k][i]`` is fine-tuned from ``base[i]``.

    Args:
        base: tensors before fine-tuning.
        models: two or more lists, alike in length and shapes.
        backend: see `use`.

    Returns:
        New tensors like those of ``base``. Small ones of one shape share their memory.

    Raises:
        TypeError, ValueError: arguments that do not fit, fewer than two models.
        RuntimeError: an input requires grad under grad mode.
    """

    def merge(rows: list[Tensor], members: list[int]) -> Tensor:
        return model_stock(rows[0], rows[1:], rows=True, backend=backend)

    return _together("model_stock_list", [base, *models], merge)


def ties_list(
    base: Sequence[Tensor],
    models: Sequence[Sequence[Tensor]],
    density: float | Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    scale: float = 1.0,
    normalize: bool = True,
    backend: str = "auto",
) -> list[Tensor]:
    """`ties` of each tensor of models; thresholds are a tensor's own.

    Args:
        base: tensors before fine-tuning.
        models: one list of tensors each.
        density: as in `ties`.
        weights: as in `ties`.
        scale: as in `ties`.
        normalize: as in `ties`.
        backend: see `use`.

    Returns:
        New tensors like those of ``base``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.
    """
    shares = densities("ties_list", density, len(models))

    def merge(rows: list[Tensor], members: list[int]) -> Tensor:
        first, *others = rows
        share: Sequence[float] = shares
        if len(members) > 1 and first.numel():
            # What is put back to the base has a delta of zero, as if `ties` had trimmed it.
            others = [_trimmed(first, other, share) for other, share in zip(others, shares, strict=True)]
            share = [1.0] * len(others)
        return ties(first, others, share, weights, scale=scale, normalize=normalize, backend=backend)

    return _together("ties_list", [base, *models], merge)


def _trimmed(base: Tensor, tensor: Tensor, density: float) -> Tensor:
    """``tensor`` [m, ...] where its delta is among the largest of its row, elsewhere ``base``."""
    wide = torch.promote_types(torch.float32, torch.promote_types(base.dtype, tensor.dtype))
    magnitude = (tensor.to(wide) - base.to(wide)).abs().nan_to_num(-1.0, posinf=math.inf).flatten(1)
    limit = magnitude.topk(max(1, int(density * magnitude.shape[1])), 1).values[:, -1:]
    return torch.where((magnitude >= limit).view(base.shape), tensor, base)  # in a dtype that holds both


def dare_list(
    base: Sequence[Tensor],
    tuned: Sequence[Tensor],
    p: float,
    seed: int,
    rescale: Rescale = "inverse",
    *,
    weight: float = 1.0,
    backend: str = "auto",
) -> list[Tensor]:
    """`dare` of each pair of tensors; tensor i takes ``seed + i``.

    Args:
        base: tensors.
        tuned: as many, of the same shapes.
        p: as in `dare`.
        seed: of the first tensor.
        rescale: as in `dare`.
        weight: as in `dare`.
        backend: see `use`.

    Returns:
        New tensors like those of ``base``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.
    """

    def merge(rows: list[Tensor], members: list[int]) -> Tensor:
        first, second = rows
        if len(members) == 1 or not first.numel():
            return dare(first, second, p, seed + members[0], rescale, weight=weight, backend=backend)
        moved = dare(first, second, 0.0, 0, weight=weight / (1 - p if rescale == "inverse" else 1), backend=backend)
        words = philox_rows([seed + i for i in members], first[0].numel(), first.device)
        return torch.where(words.view(first.shape) >= int(p * 2**32), moved, first)

    check_dare("dare_list", p, seed, rescale, weight)
    if rescale == "l1":  # its factor is a sum over each tensor
        pairs = enumerate(_by_tensor("dare_list", [base, tuned]))
        return [dare(b, t, p, seed + i, rescale, weight=weight, backend=backend) for i, (b, t) in pairs]
    return _together("dare_list", [base, tuned], merge)


def _by_tensor(op: str, models: Sequence[Sequence[Tensor]]) -> list[tuple[Tensor, ...]]:
    """Tensor i of every model, for each i."""
    lengths = [len(model) for model in models]
    if not lengths or len(set(lengths)) > 1:
        raise ValueError(f"{op}: the models have {lengths} tensors; wanted at least one model, all of one length.")
    tensors = list(zip(*models, strict=True))
    shapes = [[t.shape for t in model] for model in models]
    devices = [[t.device for t in model] for model in models]
    if any(alike != each[0] for each in (shapes, devices) for alike in each) or any(
        t.requires_grad for model in models for t in model
    ):
        for i, alike in enumerate(tensors):
            check_family(op, alike, [f"tensor {i} of model {k}" for k in range(len(alike))])  # says what is wrong
    return tensors


def _together(
    op: str, models: Sequence[Sequence[Tensor]], merge: Callable[[list[Tensor], list[int]], Tensor]
) -> list[Tensor]:
    """``merge`` takes tensors [m, ...], one of each model, and the places of their m rows; it gives one of them."""
    tensors = _by_tensor(op, models)
    groups: dict[object, list[int]] = {}
    kinds = zip((t.shape for t in models[0]), *([t.dtype for t in model] for model in models), strict=True)
    for i, kind in enumerate(kinds):
        groups.setdefault(kind if kind[0].numel() <= SMALL else i, []).append(i)
    merged: dict[int, Tensor] = {}
    for members in groups.values():
        if len(members) == 1:
            rows = [t[None] for t in tensors[members[0]]]
        else:
            rows = [torch.stack([tensors[i][k] for i in members]) for k in range(len(models))]
        merged.update(zip(members, merge(rows, members).unbind(), strict=True))
    return [merged[i] for i in range(len(tensors))]

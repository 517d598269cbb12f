"""Merging weights: linear, slerp, ties, dare, model_stock, axpby_. Float32 inside, one rounding at the end.

Each tensor is read once, twice where a norm or a threshold of the whole tensor must be known first. Results have the
dtype and shape of the first tensor; tensors may differ in dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from curvkern.backend import check
from curvkern.ops.mix_passes import (
    axpby_into,
    check_family,
    check_finite,
    coefficients,
    dare_sums,
    delta_dots,
    keep_random,
    kth_delta,
    merge_elected,
    weighted_sum,
)

Rescale = Literal["inverse", "l1", "none"]


def linear(
    tensors: Sequence[Tensor], weights: Sequence[float] | Tensor, *, normalize: bool = False, backend: str = "auto"
) -> Tensor:
    r"""Weighted sum :math:`\sum_k w_k W_k`, in the order given.

    Any weights: interpolation :math:`(1 - \lambda, \lambda)` as in model merging (Farn et al., arXiv 2412.19512),
    extrapolation :math:`(1, \beta, -\beta)` as in RESTA (arXiv 2402.11746). A tensor of weight 0 counts for nothing,
    whatever it holds.

    Args:
        tensors: one or more of one shape; float32, float16, bfloat16 (reference: float64 too).
        weights: one number a tensor; or a float32 tensor [k], or [k, o] with a number for each row of tensors [o, ...].
        normalize: divide the weights by their sum (mergekit's ``linear`` does by default).
        backend: see `use`.

    Returns:
        A new tensor like the first.

    Raises:
        TypeError, ValueError: arguments that do not fit; weights whose sum is 0 under ``normalize``.
        RuntimeError: an input requires grad under grad mode.

    Deterministic; the same bits from every backend (without fused multiply-adds).
    """
    check_family("linear", tensors)
    if not isinstance(weights, Tensor):
        if len(weights) != len(tensors):
            raise ValueError(f"linear: {len(weights)} weights for {len(tensors)} tensors; wanted one each.")
        total = math.fsum(weights) if normalize else 1.0
        if total == 0:
            raise ValueError("linear: the weights sum to 0 and cannot be normalized; pass normalize=False.")
        return weighted_sum(tensors, coefficients([w / total for w in weights], *tensors), backend)
    if weights.ndim not in (1, 2):
        raise ValueError(f"linear: weights has shape {list(weights.shape)}; wanted [{len(tensors)}] or one per row.")
    return weighted_sum(tensors, weights / weights.sum(0) if normalize else weights, backend)


def axpby_(y: Tensor, a: float | Tensor, x: Tensor, b: float | Tensor, *, backend: str = "auto") -> Tensor:
    r"""In place :math:`y \leftarrow a x + b y`. A coefficient of 0 leaves its side out, whatever it holds.

    Args:
        y: float32, float16, bfloat16 (reference: float64 too), any shape; edited.
        a: a number, or a scalar tensor, which is not waited for.
        x: the shape of ``y``, any of these dtypes.
        b: like ``a``.
        backend: see `use`.

    Returns:
        ``y``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Deterministic; the same bits from every backend.
    """
    check_family("axpby_", [y, x], ["y", "x"])
    axpby_into(y, x, coefficients([a, b], y, x), backend)
    return y


def slerp(a: Tensor, b: Tensor, t: float, *, colinear: float = 0.9995, backend: str = "auto") -> Tensor:
    r"""Spherical interpolation of whole tensors as vectors, from ``a`` (t = 0, exactly) to ``b`` (t = 1, exactly).

    .. math:: \frac{\sin((1-t)\Omega)}{\sin\Omega} a + \frac{\sin(t\Omega)}{\sin\Omega} b,
        \qquad \cos\Omega = \frac{\langle a, b\rangle}{|a| |b|}

    (Shoemake, SIGGRAPH 1985.) Where the cosine's magnitude is above ``colinear``, or no number, the result is
    :math:`(1-t) a + t b`; so it is for nearly every fine-tuned tensor and its origin. That limit and fallback are
    mergekit's. A zero tensor is at right angles to everything.

    Args:
        a: float32, float16, bfloat16 (reference: float64 too), any shape.
        b: the shape of ``a``.
        t: any finite number; outside [0, 1] it extrapolates.
        colinear: the limit.
        backend: see `use`.

    Returns:
        A new tensor like ``a``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Deterministic. Two passes; dot product and norms in float64 from block to block. Does not wait for the device.
    """
    check_family("slerp", [a, b], ["a", "b"])
    check_finite("slerp", t=t, colinear=colinear)
    dots = delta_dots(None, [a, b], 1, backend)[0]
    return weighted_sum([a, b], arc_weights(dots, t, colinear).to(coefficients([], a, b).dtype), backend)


def arc_weights(dots: Tensor, t: float, colinear: float) -> Tensor:
    """Slerp's two weights [2, ...] from dot products [..., 2, 2]; float64."""
    cosine = _cosines(dots)[..., 0, 1]
    angle = cosine.clamp(-1, 1).acos()
    arc = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()]) / angle.sin()
    chord = torch.stack([torch.full_like(angle, 1 - t), torch.full_like(angle, t)])
    return torch.where(cosine.abs() <= colinear, arc, chord)


def _cosines(dots: Tensor) -> Tensor:
    """[..., k, k] cosines from dot products; 0 where a norm is 0, NaN where something is not finite."""
    norms = dots.diagonal(dim1=-2, dim2=-1).sqrt()
    product = norms[..., :, None] * norms[..., None, :]
    return torch.where(product == 0, 0.0, dots / product)


def ties(
    base: Tensor,
    tensors: Sequence[Tensor],
    density: float | Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    normalize: bool = True,
    scale: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    r"""TIES merging (Yadav et al., arXiv 2306.01708): trim, elect a sign, merge what agrees with it.

    With :math:`\delta_k = W_k - W_{base}` in float32: *trim* keeps the largest :math:`\lfloor density \cdot n\rfloor`
    magnitudes (at least one) of each tensor, and whatever equals the smallest of them, so that no result depends on the
    order of elements; *elect*: the sign of :math:`\sum_k w_k \delta_k`, a sum of zero being positive; *merge*:

    .. math:: W_{base} + scale \cdot \frac{\sum_{k \in agree} w_k \delta_k}{\sum_{k \in agree} w_k}

    Zeros agree with neither sign. ``normalize=False`` leaves the division out; a divisor of zero counts as 1. These are
    mergekit's conventions but for its deltas, which it rounds to the dtype of ``base``, and its order of equal
    magnitudes. A delta that is NaN is trimmed.

    Args:
        base: float32, float16, bfloat16 (reference: float64 too), any shape.
        tensors: one or more of that shape.
        density: share to keep, in (0, 1], for all or one a tensor.
        weights: one number a tensor; default 1.
        normalize: divide by the weights that agree.
        scale: the published lambda.
        backend: see `use`.

    Returns:
        A new tensor like ``base``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Deterministic; the same bits from every backend. Thresholds are exact, by two counting passes over each tensor that
    is to be trimmed (none for density 1), without a sort and without waiting for the device.
    """
    check_family("ties", [base, *tensors], ["base", *(f"tensors[{k}]" for k in range(len(tensors)))])
    shares = densities("ties", density, len(tensors))
    each = [1.0] * len(tensors) if weights is None else list(weights)
    check_finite("ties", scale=scale)
    if len(each) != len(tensors):
        raise ValueError(f"ties: weights has {len(each)} numbers for {len(tensors)} tensors; wanted one each.")
    limits = [
        0.0 if share == 1 or base.numel() == 0 else kth_delta(base, t, max(1, int(share * base.numel())), backend)
        for t, share in zip(tensors, shares, strict=True)
    ]
    family = (base, *tensors)
    numbers = coefficients(limits, *family), coefficients(each, *family)
    return merge_elected(base, tensors, *numbers, scale, normalize, backend)


def densities(op: str, density: float | Sequence[float], count: int) -> Sequence[float]:
    """A share to keep for each of ``count`` tensors; raise ValueError unless they fit."""
    shares = [density] * count if isinstance(density, (int, float)) else list(density)
    if len(shares) != count or not count:
        raise ValueError(f"{op}: density has {len(shares)} numbers for {count} tensors; wanted one each.")
    for share in shares:
        if not 0 < share <= 1:
            raise ValueError(f"{op}: density is {share}; wanted more than 0, at most 1.")
    return shares


def dare(
    base: Tensor,
    tuned: Tensor,
    p: float,
    seed: int,
    rescale: Rescale = "inverse",
    *,
    weight: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    r"""Drop And REscale (Yu et al., arXiv 2311.03099): :math:`W_{base} + w\, c\, m \odot (W_{tuned} - W_{base})`.

    :math:`m_e = 0` with probability ``p`` (to 2^-32), else 1: the random word of element e, Philox 4x32-10 of ``seed``
    as in `philox_ref`, is below p 2^32. So the mask is the same on every backend and needs no memory. What is dropped
    has the bits of ``base``. Three conventions for c:

    - ``inverse``: 1 / (1 - p), as published; the expected result is that without dropping.
    - ``l1``: the sum of the deltas' magnitudes over that of the kept ones (mergekit's ``rescale``); one more pass. 1
      where one of them is below 1e-7.
    - ``none``: 1; the expected delta shrinks by 1 - p.

    Args:
        base: float32, float16, bfloat16 (reference: float64 too), any shape.
        tuned: the shape of ``base``.
        p: share to drop, in [0, 1).
        seed: 0 to 2^63 - 1; give each tensor its own.
        rescale: which convention.
        weight: of the delta.
        backend: see `use`.

    Returns:
        A new tensor like ``base``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Deterministic for a seed; the same bits from every backend (``l1``: up to the rounding of c).
    """
    check_family("dare", [base, tuned], ["base", "tuned"])
    check_dare("dare", p, seed, rescale, weight)
    drop = int(p * 2**32)
    factor: float | Tensor = weight / (1 - p) if rescale == "inverse" else weight
    if rescale == "l1":
        factor = weight * _l1_factor(dare_sums(base, tuned, drop, seed, backend))
    return keep_random(base, tuned, coefficients([factor], base, tuned), drop, seed, backend)


def check_dare(op: str, p: float, seed: int, rescale: str, weight: float) -> None:
    """Raise ValueError unless the numbers of `dare` fit."""
    check.one_of(op, "rescale", rescale, get_args(Rescale))
    check_finite(op, weight=weight)
    if not 0 <= p < 1:
        raise ValueError(f"{op}: p is {p}; wanted at least 0, below 1.")
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"{op}: seed is {seed}; wanted 0 to 2^63 - 1.")


def _l1_factor(sums: Tensor) -> Tensor:
    """What restores the sum of magnitudes; 1 where there is next to nothing to restore."""
    return torch.where((sums >= 1e-7).all(), sums[0] / sums[1], 1.0)


def model_stock(base: Tensor, tensors: Sequence[Tensor], *, rows: bool = False, backend: str = "auto") -> Tensor:
    r"""Model Stock (Jang et al., arXiv 2403.19522): the average of k fine-tuned tensors, pulled towards their origin.

    .. math:: t \bar W + (1 - t) W_{base}, \qquad t = \frac{k \cos\theta}{1 + (k - 1) \cos\theta}

    :math:`\cos\theta` is the mean cosine of the k (k - 1) / 2 pairs of deltas :math:`W_i - W_{base}` (as in mergekit;
    the paper has one angle), in float64 from block to block. The cosine with a zero delta is 0; where something is not
    finite, or the deltas cancel and the denominator vanishes, t is 0.

    Args:
        base: float32, float16, bfloat16 (reference: float64 too), any shape.
        tensors: two or more of that shape, fine-tuned from it.
        rows: an angle for each row of tensors [o, ...] (``filter_wise``) instead of one for all.
        backend: see `use`.

    Returns:
        A new tensor like ``base``.

    Raises:
        TypeError, ValueError: arguments that do not fit, fewer than two tensors.
        RuntimeError: an input requires grad under grad mode.

    Deterministic. Two passes. Does not wait for the device.
    """
    check_family("model_stock", [base, *tensors], ["base", *(f"tensors[{k}]" for k in range(len(tensors)))])
    if len(tensors) < 2:
        raise ValueError(f"model_stock: {len(tensors)} tensors besides base; wanted two or more: it needs their angle.")
    count = base.shape[0] if rows and base.ndim else 1
    dots = delta_dots(base, tensors, count, backend)
    weights = _stock_weights(dots, len(tensors)).to(coefficients([], base, *tensors).dtype)
    return weighted_sum([base, *tensors], weights, backend)


def _stock_weights(dots: Tensor, k: int) -> Tensor:
    """[1 + k, rows] weights of the base and of k tensors, from [rows, k, k] dot products of their deltas."""
    cosine = (_cosines(dots).triu(1).sum((-2, -1)) / (k * (k - 1) / 2)).nan_to_num(0.0)
    below = 1 + (k - 1) * cosine
    t = torch.where(below > 1e-9, k * cosine / below, 0.0)
    return torch.stack([1 - t, *[t / k] * k])


# reference: the same made of the definitions of its passes, in plain torch --------------------------------------------


def linear_ref(tensors: Sequence[Tensor], weights: Sequence[float] | Tensor, *, normalize: bool = False) -> Tensor:
    """The definition of `linear`."""
    return linear(tensors, weights, normalize=normalize, backend="reference")


def axpby_ref(y: Tensor, a: float | Tensor, x: Tensor, b: float | Tensor) -> Tensor:
    """The definition of `axpby_`."""
    return axpby_(y, a, x, b, backend="reference")


def slerp_ref(a: Tensor, b: Tensor, t: float, *, colinear: float = 0.9995) -> Tensor:
    """The definition of `slerp`."""
    return slerp(a, b, t, colinear=colinear, backend="reference")


def ties_ref(
    base: Tensor,
    tensors: Sequence[Tensor],
    density: float | Sequence[float],
    weights: Sequence[float] | None = None,
    *,
    normalize: bool = True,
    scale: float = 1.0,
) -> Tensor:
    """The definition of `ties`."""
    return ties(base, tensors, density, weights, normalize=normalize, scale=scale, backend="reference")


def dare_ref(
    base: Tensor, tuned: Tensor, p: float, seed: int, rescale: Rescale = "inverse", *, weight: float = 1.0
) -> Tensor:
    """The definition of `dare`."""
    return dare(base, tuned, p, seed, rescale, weight=weight, backend="reference")


def model_stock_ref(base: Tensor, tensors: Sequence[Tensor], *, rows: bool = False) -> Tensor:
    """The definition of `model_stock`."""
    return model_stock(base, tensors, rows=rows, backend="reference")

"""Moving chosen weights back: rollback_, undo_, blend_."""

from __future__ import annotations

import torch
from torch import Tensor

from curvkern.backend import check, launch
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register
from curvkern.ops.score import (
    WEIGHTS,
    Gate,
    Rule,
    check_scored,
    gate_ref,
    pack_mask,
    score_ref,
    unpack_mask,
)
from curvkern.ops.selector import Threshold


def rollback_(
    weight: Tensor,
    target: Tensor,
    threshold: Threshold | Tensor | float | None = None,
    *,
    rule: Rule = "grad",
    gate: Gate = "none",
    grad: Tensor | None = None,
    fisher: Tensor | None = None,
    direction: Tensor | None = None,
    mask: Tensor | None = None,
    undo: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    r"""Copy the target into the weights that the mask, the gate and the threshold choose, in place.

    :math:`W_e \leftarrow W^{target}_e` bit for bit where ``mask`` is set, ``gate`` holds and the score of ``rule`` is
    above the threshold; every other weight keeps its bits. A NaN score is never chosen. One pass over the bytes.

    Args:
        weight: float32, float16, bfloat16 (reference: float64 too), any shape; edited.
        target: like ``weight``.
        threshold: a `Threshold`, or a number or float32 scalar tensor (scores strictly above it). None: mask and gate
            alone choose.
        rule: which score, see `score_ref`.
        gate: which weights may move at all, see `gate_ref`.
        grad: gradient of the loss to lower, any floating dtype, the shape of ``weight``.
        fisher: float32, the shape of ``weight``.
        direction: like ``weight``.
        mask: bool like ``weight``, or packed bits as of `pack_mask`.
        undo: uint8 [ceil(n / 8)], contiguous; overwritten with one bit per weight: was it chosen.
        backend: see `use`.

    Returns:
        int64 scalar on the device: how many weights were chosen.

    Raises:
        TypeError, ValueError: arguments that do not fit, or neither threshold nor mask.
        RuntimeError: an input requires grad under grad mode.

    Deterministic; the same bits from every backend. Under ``ties="exact_k"`` a counting pass comes first and the
    threshold's quota is used up as tensors are edited.
    """
    check.no_grad("rollback_", weight=weight, target=target, grad=grad, fisher=fisher, direction=direction)
    if threshold is None and mask is None:
        raise ValueError("rollback_: neither threshold nor mask is given; pass one of them.")
    tau, quota = _limits(threshold, weight)
    bits = mask if mask is not None and mask.dtype == torch.uint8 else None
    bools = None if bits is not None else mask
    return _rollback(weight, target, tau, quota, bits, bools, grad, fisher, direction, undo, rule, gate, backend)


def undo_(
    weight: Tensor, original: Tensor, undo: Tensor, *, where: Tensor | None = None, backend: str = "auto"
) -> Tensor:
    """Give weights that `rollback_` changed their old values back, in place: all of them, or those in ``where``.

    Args:
        weight: the edited weights.
        original: like ``weight``: the values from before.
        undo: uint8 [ceil(n / 8)] that `rollback_` wrote.
        where: bool like ``weight``, or packed bits: only these.
        backend: see `use`.

    Returns:
        int64 scalar on the device: how many weights were given back.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.
    """
    check.dtype("undo_", "undo", undo, (torch.uint8,), "Pass the packed bits that rollback_ wrote.")
    if where is not None:
        check.dtype("undo_", "where", where, (torch.bool, torch.uint8))
        if where.dtype == torch.bool:
            check.same_shape("undo_", weight=weight, where=where)
            where = pack_mask(where)
        check.same_shape("undo_", undo=undo, where=where)
        undo = undo & where
    return rollback_(weight, original, mask=undo, backend=backend)


def blend_(
    weight: Tensor, target: Tensor, alpha: Tensor | float, *, tile: tuple[int, int] | None = None, backend: str = "auto"
) -> Tensor:
    r"""Move weights a fraction of the way to the target, in place: :math:`W \leftarrow W + \alpha (W^{target} - W)`.

    Float32 inside, one rounding. ``alpha <= 0`` and NaN leave a weight's bits alone, ``alpha >= 1`` copies the target.

    Args:
        weight: float32, float16, bfloat16 (reference: float64 too), any shape; edited.
        target: like ``weight``.
        alpha: a number, a float32 scalar, float32 like ``weight``, or, with ``tile``, one number per tile:
            float32 [ceil(o / bo), ceil(i / bi)].
        tile: (bo, bi), for a 2-D weight [o, i].
        backend: see `use`.

    Returns:
        ``weight``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.
    """
    if not isinstance(alpha, Tensor):
        alpha = torch.full((), alpha, dtype=torch.float32, device=weight.device)
    check.no_grad("blend_", weight=weight, target=target, alpha=alpha)
    check.dtype("blend_", "alpha", alpha, (torch.float32,))
    rows, cols = (weight.shape[0], weight.shape[1]) if weight.ndim == 2 else (1, weight.numel())
    if tile is not None:
        if weight.ndim != 2:
            raise ValueError(f"blend_: tile is given, so weight must be [o, i]; it has shape {list(weight.shape)}.")
        check.at_least("blend_", "tile", min(tile), 1)
        wanted = (-(-rows // tile[0]), -(-cols // tile[1]))
        check.shape("blend_", "alpha", alpha, wanted, "one number per tile")
    elif alpha.ndim == 0:
        tile = (max(rows, 1), max(cols, 1))
        alpha = alpha.reshape(1, 1)
    else:
        check.same_shape("blend_", weight=weight, alpha=alpha)
        tile = (1, 1)
    _blend(weight, target, alpha, *tile, backend)
    return weight


def _limits(threshold: Threshold | Tensor | float | None, weight: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """(tau, tie quota or None) on the weight's device."""
    if isinstance(threshold, Threshold):
        return threshold.tau, threshold.quota if threshold.ties == "exact_k" else None
    if threshold is None or isinstance(threshold, Tensor):
        return threshold, None
    return torch.full((), threshold, dtype=torch.float32, device=weight.device), None


# reference ------------------------------------------------------------------------------------------------------------


def rollback_ref(
    weight: Tensor,
    target: Tensor,
    tau: Tensor | None,
    quota: Tensor | None,
    bits: Tensor | None,
    bools: Tensor | None,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
    undo: Tensor | None,
    rule: Rule,
    gate: Gate,
) -> Tensor:
    """The definition of `rollback_`, in plain torch."""
    chosen = gate_ref(weight, target, grad, direction, gate=gate)
    if bools is not None:
        chosen &= bools
    if bits is not None:
        chosen &= unpack_mask(bits, weight.shape)
    if tau is not None:
        score = score_ref(weight, target, grad, fisher, rule=rule).float()
        above = chosen & (score > tau)
        if quota is not None:
            ties = chosen & (score == tau)
            taken = ties & (ties.reshape(-1).cumsum(0).reshape(ties.shape) <= quota)
            quota -= taken.sum()
            above |= taken
        chosen = above
    weight.copy_(torch.where(chosen, target, weight))
    if undo is not None:
        undo.copy_(pack_mask(chosen))
    return chosen.sum()


def blend_ref(weight: Tensor, target: Tensor, alpha: Tensor, tile_rows: int, tile_cols: int) -> None:
    """The definition of `blend_`, in plain torch."""
    if weight.numel() == 0:
        return
    rows, cols = (weight.shape[0], weight.shape[1]) if weight.ndim == 2 else (1, weight.numel())
    if tile_rows * tile_cols == 1:
        fraction = alpha.reshape(weight.shape)
    else:
        fraction = alpha.repeat_interleave(tile_rows, 0)[:rows].repeat_interleave(tile_cols, 1)[:, :cols]
        fraction = fraction.reshape(weight.shape)
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    w, t = weight.to(wide), target.to(wide)
    step = (w + fraction.to(wide) * (t - w)).to(weight.dtype)
    weight.copy_(torch.where(fraction >= 1, target, torch.where(fraction > 0, step, weight)))


# checks ---------------------------------------------------------------------------------------------------------------


def _check_rollback(
    weight: Tensor,
    target: Tensor,
    tau: Tensor | None,
    quota: Tensor | None,
    bits: Tensor | None,
    bools: Tensor | None,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
    undo: Tensor | None,
    rule: str,
    gate: str,
) -> None:
    check_scored("rollback_", weight, target, grad, fisher, direction, rule, gate, scored=tau is not None)
    packed = (-(-weight.numel() // 8),)
    check.dtype("rollback_", "threshold", tau, (torch.float32,))
    check.shape("rollback_", "threshold", tau, (), "a scalar")
    check.dtype("rollback_", "mask", bools, (torch.bool, torch.uint8))
    check.same_shape("rollback_", weight=weight, mask=bools)
    check.shape("rollback_", "mask", bits, packed, "one bit per weight")
    check.dtype("rollback_", "undo", undo, (torch.uint8,))
    check.shape("rollback_", "undo", undo, packed, "one bit per weight")
    check.same_device("rollback_", weight=weight, threshold=tau, quota=quota, mask=bits, undo=undo)
    check.same_device("rollback_", weight=weight, mask=bools)


def _check_blend(weight: Tensor, target: Tensor, alpha: Tensor, tile_rows: int, tile_cols: int) -> None:
    check.dtype("blend_", "weight", weight, WEIGHTS)
    check.same_dtype("blend_", weight=weight, target=target)
    check.same_shape("blend_", weight=weight, target=target)
    check.same_device("blend_", weight=weight, target=target, alpha=alpha)


def _refuse(weight: Tensor, *arguments: object) -> str | None:
    """What every kernel asks: a contiguous weight (it is edited in place) of a kernel dtype, and a kernel gradient."""
    for tensor in (weight, *arguments):
        if isinstance(tensor, Tensor) and tensor.dtype == torch.float64:
            return "float64 runs on the reference only"
    undo = arguments[8] if len(arguments) > 8 else None
    for name, edited in (("weight", weight), ("undo", undo)):
        if isinstance(edited, Tensor) and not edited.is_contiguous():
            return f"{name} is not contiguous"
    return None


# native ---------------------------------------------------------------------------------------------------------------


def _native_rollback(
    weight: Tensor,
    target: Tensor,
    tau: Tensor | None,
    quota: Tensor | None,
    bits: Tensor | None,
    bools: Tensor | None,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
    undo: Tensor | None,
    rule: str,
    gate: str,
) -> Tensor:
    dense = [None if t is None else t.contiguous() for t in (target, bits, bools, grad, fisher, direction)]
    target_, bits_, bools_, grad_, fisher_, direction_ = dense
    codes = (launch.RULE_CODES[rule], launch.GATE_CODES[gate])
    codes += (launch.DTYPE_CODES[weight.dtype], launch.DTYPE_CODES[grad.dtype if grad is not None else torch.float32])
    evidence = (bits_, bools_, grad_, fisher_, direction_, weight.numel(), *codes)
    count = torch.zeros((), dtype=torch.int64, device=weight.device)
    offsets = totals = None
    if tau is not None and quota is not None:
        blocks = -(-weight.numel() // launch.constant("ROLLBACK_BLOCK"))
        ties = torch.empty(blocks, dtype=torch.int64, device=weight.device)
        launch.native_op("rollback_ties", weight.device, ties, weight, target_, tau, *evidence)
        totals = ties.cumsum(0)
        offsets = totals - ties
    launch.native_op("rollback", weight.device, count, weight, undo, target_, tau, quota, offsets, *evidence)
    if totals is not None and quota is not None and totals.numel():
        quota.sub_(torch.minimum(quota, totals[-1]))
    return count


def _native_blend(weight: Tensor, target: Tensor, alpha: Tensor, tile_rows: int, tile_cols: int) -> None:
    rows, cols = (weight.shape[0], weight.shape[1]) if weight.ndim == 2 else (1, weight.numel())
    arguments = (weight, target.contiguous(), alpha.contiguous(), rows, cols, tile_rows, tile_cols, weight.dtype)
    launch.native_op("blend", weight.device, *arguments)


_rollback = register(
    "rollback_(Tensor(a!) weight, Tensor target, Tensor? tau, Tensor(b!)? quota, Tensor? bits, Tensor? bools, "
    "Tensor? grad, Tensor? fisher, Tensor? direction, Tensor(c!)? undo, str rule, str gate, str backend) -> Tensor",
    check=_check_rollback,
    fake=lambda weight, *_: weight.new_empty((), dtype=torch.int64),
    routes=(
        Route("cuda", _native_rollback, _refuse),
        Route("cpu", _native_rollback, _refuse),
        Route("triton", lazily("curvkern.kernels.rollback:rollback"), _refuse),
        Route("reference", rollback_ref),
    ),
)

_blend = register(
    "blend_(Tensor(a!) weight, Tensor target, Tensor alpha, int tile_rows, int tile_cols, str backend) -> ()",
    check=_check_blend,
    routes=(
        Route("cuda", _native_blend, _refuse),
        Route("cpu", _native_blend, _refuse),
        Route("triton", lazily("curvkern.kernels.rollback:blend"), _refuse),
        Route("reference", blend_ref),
    ),
)

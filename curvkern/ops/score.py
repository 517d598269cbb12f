"""What a weight is worth: scores, gates and packed masks, the ground that select and rollback stand on."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from curvkern.backend import check

Rule = Literal["grad", "taylor", "fisher", "delta", "gain"]
Gate = Literal["none", "descent", "conflict"]

RULES: tuple[str, ...] = get_args(Rule)
GATES: tuple[str, ...] = get_args(Gate)

WEIGHTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def check_scored(
    op: str,
    weight: Tensor,
    target: Tensor,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
    rule: str,
    gate: str,
    *,
    scored: bool = True,
) -> None:
    """Raise unless a weight, its target and their evidence fit each other and the rule and gate have what they need."""
    check.one_of(op, "rule", rule, RULES)
    check.one_of(op, "gate", gate, GATES)
    check.dtype(op, "weight", weight, WEIGHTS)
    check.same_dtype(op, weight=weight, target=target, direction=direction)
    check.dtype(op, "grad", grad, WEIGHTS)
    check.dtype(op, "fisher", fisher, (torch.float32, torch.float64))
    tensors = {"weight": weight, "target": target, "grad": grad, "fisher": fisher, "direction": direction}
    check.same_shape(op, **tensors)
    check.same_device(op, **tensors)
    if (scored and rule in ("grad", "taylor", "gain")) or gate == "descent":
        check.needed(op, f"gate {gate!r}" if gate == "descent" else f"rule {rule!r}", grad=grad)
    if scored and rule in ("fisher", "gain"):
        check.needed(op, f"rule {rule!r}", fisher=fisher)
    if gate == "conflict":
        check.needed(op, "gate 'conflict'", direction=direction)


def used(
    rule: str,
    gate: str,
    weight: Tensor,
    target: Tensor,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
) -> tuple[Tensor | None, ...]:
    """The same five tensors, contiguous; None for those that neither rule nor gate looks at."""
    delta = rule != "grad" or gate != "none"
    wanted = (delta, delta, rule in ("grad", "taylor", "gain") or gate == "descent")
    wanted += (rule in ("fisher", "gain"), gate == "conflict")
    tensors = (weight, target, grad, fisher, direction)
    return tuple(t.contiguous() if t is not None and yes else None for t, yes in zip(tensors, wanted, strict=True))


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def score_ref(
    weight: Tensor, target: Tensor, grad: Tensor | None = None, fisher: Tensor | None = None, *, rule: Rule
) -> Tensor:
    r"""How much moving each weight to its target matters; the definition of the rules.

    With :math:`d = W - W_{target}`: ``grad`` :math:`|g|`, ``taylor`` :math:`|g d|`, ``fisher`` :math:`F d^2`,
    ``delta`` :math:`|d|`, ``gain`` :math:`g d - \tfrac12 F d^2` (the second-order fall of the loss).

    Args:
        weight: any shape, any floating dtype.
        target: like ``weight``.
        grad: same shape; needed by ``grad``, ``taylor``, ``gain``.
        fisher: same shape; needed by ``fisher``, ``gain``.
        rule: which score.

    Returns:
        float32 scores (float64 if any input is), computed in that precision without fused multiply-adds.
    """
    check_scored("score_ref", weight, target, grad, fisher, None, rule, "none")
    delta = _wide(weight) - _wide(target)
    if rule == "delta":
        return delta.abs()
    if rule == "fisher":
        return _wide(_given(fisher)) * (delta * delta)
    g = _wide(_given(grad))
    if rule == "grad":
        return g.abs()
    if rule == "taylor":
        return (g * delta).abs()
    return g * delta - 0.5 * _wide(_given(fisher)) * (delta * delta)


def gate_ref(
    weight: Tensor, target: Tensor, grad: Tensor | None = None, direction: Tensor | None = None, *, gate: Gate
) -> Tensor:
    """Which weights may move at all; the definition of the gates.

    Args:
        weight: any shape, any floating dtype.
        target: like ``weight``.
        grad: same shape; needed by ``descent``.
        direction: same shape and dtype as ``weight``; needed by ``conflict``.
        gate: ``none`` - ``descent``: W - target and grad share a strict sign, so that moving to the target lowers the
            loss - ``conflict``: sign(W - target) differs from sign(direction), zero being a sign of its own.

    Returns:
        bool, the shape of ``weight``. Signs are compared, never products, which underflow; NaN has no sign.
    """
    check_scored("gate_ref", weight, target, grad, None, direction, "delta", gate)
    if gate == "none":
        return torch.ones_like(weight, dtype=torch.bool)
    delta = _wide(weight) - _wide(target)
    if gate == "descent":
        g = _given(grad)
        return ((delta > 0) & (g > 0)) | ((delta < 0) & (g < 0))
    v = _given(direction)
    return ((delta > 0) != (v > 0)) | ((delta < 0) != (v < 0))


def score_key_ref(score: Tensor) -> Tensor:
    """Order-preserving map of scores, as float32, to int64 in [0, 2^32); -0 and +0 share a key."""
    bits = (score.float() + 0.0).view(torch.int32).long() & 0xFFFFFFFF
    return torch.where(bits >> 31 != 0, ~bits & 0xFFFFFFFF, bits | 0x80000000)


def score_of_key(key: Tensor) -> Tensor:
    """The float32 score that `score_key_ref` made an int64 key of."""
    bits = torch.where(key >> 31 != 0, key & 0x7FFFFFFF, ~key & 0xFFFFFFFF)
    return torch.where(bits >> 31 != 0, bits - (1 << 32), bits).int().view(torch.float32)


def _given(tensor: Tensor | None) -> Tensor:
    """The tensor that `check_scored` has made sure of."""
    if tensor is None:
        raise ValueError("an argument that the rule or gate needs is missing")
    return tensor


def pack_mask(mask: Tensor) -> Tensor:
    """One bit per element: bit ``e % 8`` of byte ``e // 8`` is element ``e`` in row-major order.

    Args:
        mask: bool, any shape.

    Returns:
        uint8 [ceil(n / 8)]; the last byte's spare bits are 0.
    """
    check.dtype("pack_mask", "mask", mask, (torch.bool,))
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat, (0, -flat.numel() % 8)).view(-1, 8)
    return (padded.to(torch.uint8) << _BITS.to(mask.device)).sum(1, dtype=torch.uint8)


def unpack_mask(bits: Tensor, shape: torch.Size | tuple[int, ...]) -> Tensor:
    """The bool mask of ``shape`` that `pack_mask` made ``bits`` of.

    Args:
        bits: uint8 [ceil(n / 8)].
        shape: of the mask; n elements.

    Returns:
        bool tensor of ``shape``.
    """
    n = torch.Size(shape).numel()
    check.dtype("unpack_mask", "bits", bits, (torch.uint8,))
    check.shape("unpack_mask", "bits", bits, (-(-n // 8),), "one bit per element")
    return ((bits[:, None] >> _BITS.to(bits.device)) & 1).bool().reshape(-1)[:n].reshape(shape)


_BITS = torch.arange(8, dtype=torch.uint8)

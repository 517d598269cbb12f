"""The exact K-th largest score over tensors that stream by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from curvkern.backend import check
from curvkern.ops.score import Gate, Rule, check_scored, score_of_key
from curvkern.ops.select import BINS, Of, Ties, amount_of, score_histogram_

OnShort = Literal["error", "clamp"]


@dataclass(frozen=True)
class Threshold:
    """A score above which a weight is selected, found by `Selector.threshold`.

    Attributes:
        tau: float32 scalar on the selector's device: the K-th largest score, +inf if K is 0.
        ties: ``"strict"`` selects scores above ``tau`` only; ``"exact_k"`` also the first ties in element order.
        quota: int64 scalar on the device: how many ties may still be selected. `rollback_` takes from it, so under
            ``"exact_k"`` tensors must be edited in the order in which they were observed, each once.
        k: int64 scalar on the device: K.
    """

    tau: Tensor
    ties: Ties
    quota: Tensor
    k: Tensor


class Selector:
    """Finds the exact K-th largest score over any number of tensors, which pass by once or twice and are not kept.

    Scores become order-preserving 32-bit keys. A first sweep counts the upper halves of the keys of all candidates; a
    second one, over the same tensors, the lower halves of those in the one bin that holds the K-th largest. Together
    they give what ``torch.topk`` gives on the concatenation, with 64-bit counts and 1 MiB however many weights there
    are. Where all lower halves are zero (rule ``grad`` with bfloat16 gradients) one sweep is enough::

        selector = Selector("grad", "descent", device="cuda")
        for weight, target, grad in layers:
            selector.observe(weight, target, grad=grad)
        if selector.refine(fraction=0.01):
            for weight, target, grad in layers:
                selector.observe(weight, target, grad=grad)
        threshold = selector.threshold()

    A candidate is a weight that mask and gate let through and whose score is not NaN. Neither `observe` nor `refine`
    waits for the device. Deterministic; the same result from every backend.

    Args:
        rule: which score, see `score_ref`; as float32.
        gate: which weights are candidates, see `gate_ref`.
        device: where the tensors will be.
        backend: see `use`.

    Raises:
        ValueError: no such rule or gate.
    """

    def __init__(
        self, rule: Rule, gate: Gate = "none", device: torch.device | str = "cpu", *, backend: str = "auto"
    ) -> None:
        nothing = torch.zeros(0, device=device)
        check_scored("Selector", nothing, nothing, nothing, nothing, nothing, rule, gate)
        self.rule: Rule = rule
        self.gate: Gate = gate
        self.backend = backend
        self._first = _Sweep(nothing.device)
        self._second: _Sweep | None = None
        self._asked: _Asked | None = None
        self._short_keys = True  # the lower halves of all keys so far are zero

    @property
    def count(self) -> int:
        """How many weights were observed, candidates or not."""
        return self._first.count

    @property
    def gated(self) -> Tensor:
        """How many candidates were observed; int64 scalar on the device."""
        return self._first.tallies[0]

    @property
    def nonfinite(self) -> Tensor:
        """How many weights would be candidates but for a score that is NaN; int64 scalar on the device."""
        return self._first.tallies[1]

    def observe(
        self,
        weight: Tensor,
        target: Tensor,
        grad: Tensor | None = None,
        fisher: Tensor | None = None,
        direction: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Count one tensor's scores; after `refine` said True, for the second time.

        Args:
            weight: float32, float16, bfloat16 (reference: float64 too), any shape.
            target: like ``weight``.
            grad: same shape, any floating dtype.
            fisher: float32, same shape.
            direction: like ``weight``.
            mask: bool like ``weight``, or packed bits as of `pack_mask`: only these are candidates.

        Raises:
            TypeError, ValueError: arguments that do not fit, that are on another device, or that rule or gate lack.
            RuntimeError: an input requires grad under grad mode.
        """
        sweep = self._second or self._first
        score_histogram_(
            sweep.histogram, sweep.tallies, weight, target, rule=self.rule, gate=self.gate, grad=grad, fisher=fisher,
            direction=direction, mask=mask, boundary=sweep.boundary, backend=self.backend,
        )  # fmt: skip
        sweep.count += weight.numel()
        if weight.numel() and not (self.rule == "grad" and grad is not None and grad.dtype == torch.bfloat16):
            self._short_keys = False

    def refine(self, k: int | None = None, fraction: float | None = None, of: Of = "all") -> bool:
        """Ask what it takes to find the K-th largest score exactly.

        Args:
            k: K, or
            fraction: K = ceil(fraction * n) in float64, and
            of: what n counts: ``"all"`` observed weights, or the ``"gated"`` ones: the candidates.

        Returns:
            Whether the same tensors must be observed a second time before `threshold` is called. May be called again,
            to look for another K.

        Raises:
            ValueError: not exactly one of ``k`` and ``fraction``, or one out of range.
        """
        self._asked = _asked("Selector.refine", k, fraction, of)
        if self._short_keys:
            return False
        reachable = torch.minimum(self._number(self._asked), self.gated)
        self._second = _Sweep(self.gated.device, boundary=kth_bin(self._first.histogram, reachable)[0])
        return True

    def threshold(
        self,
        k: int | None = None,
        fraction: float | None = None,
        of: Of = "all",
        ties: Ties = "strict",
        on_short: OnShort = "error",
    ) -> Threshold:
        """The exact K-th largest score over everything that was observed.

        Args:
            k: as in `refine`; with neither ``k`` nor ``fraction``, what `refine` was asked for.
            fraction: as in `refine`.
            of: as in `refine`.
            ties: ``"strict"`` selects scores above the K-th largest: K - 1 where no scores are equal. ``"exact_k"``
                selects K: of equal scores the first, in the order of observation and of elements.
            on_short: with fewer candidates than K: ``"error"`` (finding out waits for the device), or ``"clamp"``: K is
                their number.

        Raises:
            RuntimeError: one sweep cannot be exact and `refine` was not called for this K, or the second sweep did not
                see what the first one saw (finding out waits for the device).
            ValueError: a bad argument, or K is more than there are candidates.
        """
        check.one_of("Selector.threshold", "ties", ties, get_args(Ties))
        check.one_of("Selector.threshold", "on_short", on_short, get_args(OnShort))
        asked = self._asked
        if asked is None or k is not None or fraction is not None:
            asked = _asked("Selector.threshold", k, fraction, of)
        if not self._short_keys and (self._second is None or asked != self._asked):
            called = "not called" if self._second is None else f"called as refine({self._asked})"
            raise RuntimeError(
                f"Selector.threshold: one sweep cannot give the exact K-th largest of these scores. refine was {called}"
                f"; call refine({asked}) and observe the same tensors again."
            )
        number = self._number(asked)
        if on_short == "error" and asked.of == "all" and int(number) > int(self.gated):
            raise ValueError(
                f"Selector.threshold: K is {int(number)} but only {int(self.gated)} of {self.count} weights are "
                "candidates; ask for fewer, or pass on_short='clamp'."
            )
        number = torch.minimum(number, self.gated)
        upper, above = kth_bin(self._first.histogram, number)
        key = upper << 16
        if self._second is not None:
            self._check_second_sweep(self._second, upper)
            lower, between = kth_bin(self._second.histogram, number - above)
            key, above = key + lower, above + between
        tau = torch.where(number > 0, score_of_key(key), math.inf)
        return Threshold(tau, ties, torch.where(number > 0, number - above, 0), number)

    def _number(self, asked: _Asked) -> Tensor:
        """K, however many candidates there are; int64 scalar on the device."""
        if asked.fraction is not None and asked.of == "gated":
            return torch.ceil(self.gated.double() * asked.fraction).long()
        k = asked.k if asked.fraction is None else math.ceil(asked.fraction * self.count)
        return torch.full_like(self.gated, k or 0)

    def _check_second_sweep(self, second: _Sweep, upper: Tensor) -> None:
        first_bin = self._first.histogram.gather(0, upper.reshape(1))[0]
        counts = torch.stack([self.gated, second.tallies[0], first_bin, second.histogram.sum()]).tolist()
        seen = {
            "weights": (self.count, second.count),
            "candidates": counts[:2],
            "in the K-th largest one's bin": counts[2:],
        }
        if any(before != again for before, again in seen.values()):
            said = ", ".join(f"{again} {what} (first: {before})" for what, (before, again) in seen.items())
            raise RuntimeError(
                "Selector.threshold: after refine the same tensors must be observed again, all of them and nothing "
                f"else; the second sweep saw {said}."
            )


class _Sweep:
    """What one pass over the tensors has counted; a second one only in the bin ``boundary``."""

    def __init__(self, device: torch.device, boundary: Tensor | None = None) -> None:
        self.histogram = torch.zeros(BINS, dtype=torch.int64, device=device)
        self.tallies = torch.zeros(2, dtype=torch.int64, device=device)  # candidates, NaN scores
        self.count = 0
        self.boundary = boundary


@dataclass(frozen=True)
class _Asked:
    """Which K: a number, or a fraction of all or of the candidates."""

    k: int | None
    fraction: float | None
    of: Of

    def __str__(self) -> str:
        return f"k={self.k}" if self.fraction is None else f"fraction={self.fraction}, of={self.of!r}"


def _asked(op: str, k: int | None, fraction: float | None, of: Of) -> _Asked:
    check.one_of(op, "of", of, get_args(Of))
    amount_of(op, k=k, fraction=fraction)
    return _Asked(k, fraction, of if fraction is not None else "all")


def kth_bin(histogram: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """(the bin of the k-th largest, how many are in the bins above it) as int64 scalars, without leaving the device."""
    from_top = histogram.flip(0).cumsum(0)
    place = torch.searchsorted(from_top, k.reshape(1))
    bin_ = histogram.numel() - 1 - place
    return bin_[0], (from_top.gather(0, place) - histogram.gather(0, bin_))[0]

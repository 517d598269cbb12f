"""The gate before every measurement: a result that is wrong gets no number."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

import curvkern
from curvkern.bench.cases import Case
from curvkern.bench.clock import Arguments, tensors_in
from curvkern.bench.providers import Provider
from curvkern.bench.results import Row


class Gate:
    """Lets through who computes what the reference computes in float64.

    A result of ours may be off by twice what torch is off by in the case's dtype, and a few roundings of the result's;
    a peer's by a few roundings of the case's dtype. Integers, bits and flags must be the reference's.
    """

    def __init__(self, case: Case, arguments: Arguments) -> None:
        self._case = case
        self._arguments = arguments
        reference = getattr(curvkern, case.function)
        self._same = _results(reference, arguments, backend="reference")
        try:
            exact = _results(reference, _wide(arguments), backend="reference")
        except (TypeError, ValueError):  # an op whose definition has no float64: random numbers, for one
            exact = self._same
        self._exact = [e if s.is_floating_point() else s for e, s in zip(exact, self._same, strict=True)]
        self._error = [_error(s, e) for s, e in zip(self._same, self._exact, strict=True)]

    def judge(self, provider: Provider, row: Row) -> Row:
        """The row with its error, or with the reason why it gets no figures."""
        if provider.missing:
            return replace(row, status="n/a", note=provider.missing)
        try:
            if provider.kind in ("bound", "random"):
                _results(provider.call, self._arguments)
                return row
            got = _results(provider.call, self._arguments)
        except Exception as error:
            first = str(error).strip().partition("\n")[0]
            status = "wrong" if provider.kind == "ours" else "n/a"
            return replace(row, status=status, note=f"{type(error).__name__}: {first}")
        if len(got) != len(self._exact):
            return replace(row, status="wrong", note=f"{len(got)} results, not {len(self._exact)}")
        errors = [_error(g, e) for g, e in zip(got, self._exact, strict=True)]
        for error, own, result in zip(errors, self._error, self._same, strict=True):
            limit = 2 * own + 4 * self._rounding(provider, result)
            if not error <= limit:
                return replace(row, status="wrong", note=f"error {error:.2g}, torch's own is {own:.2g}", error=error)
        return replace(row, error=max(errors, default=0.0))

    def _rounding(self, provider: Provider, result: Tensor) -> float:
        if not result.is_floating_point():
            return 0.0
        dtype = result.dtype if provider.kind == "ours" else self._case.dtype
        # Kernels multiply in float32, for float64 results too: `dot_list` says so.
        return max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps)


def _results(call: Any, arguments: Arguments, **options: Any) -> list[Tensor]:
    """All tensors that a call on a copy of ``arguments`` returns, and those it may have edited."""
    args, kwargs = copy.deepcopy(arguments)
    returned = call(*args, **kwargs, **options)
    edited = list(tensors_in((args, kwargs)))
    places = {t.data_ptr() for t in edited if t.numel()}
    return [t for t in tensors_in(returned) if t.data_ptr() not in places] + edited


def _wide(value: Any) -> Any:
    """Arguments in float64."""
    if isinstance(value, Tensor):
        return value.double() if value.is_floating_point() else value.clone()
    if isinstance(value, dict):
        return {key: _wide(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_wide(item) for item in value)
    return value


def _error(got: Tensor, exact: Tensor) -> float:
    """Largest difference, relative to the largest entry of ``exact``; integers and flags: 1 if any differs."""
    if got.shape != exact.shape:
        return float("inf")
    if not got.is_floating_point():
        return float(not torch.equal(got, exact))
    if got.numel() == 0 or torch.equal(got.to(exact.dtype), exact):
        return 0.0
    scale = exact.abs().max().double().item()
    return (got.double() - exact.double()).abs().max().item() / (scale or 1.0)

"""Argument errors: each names the op, the argument, what came, what was wanted and what to do.

All checks look at metadata only, so they run alike on real and on fake tensors.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def dtype(op: str, argument: str, tensor: Tensor | None, wanted: Sequence[torch.dtype], hint: str = "") -> None:
    """Raise TypeError unless ``tensor`` (if given) has one of the ``wanted`` dtypes."""
    if tensor is not None and tensor.dtype not in wanted:
        names = ", ".join(_name(d) for d in wanted)
        raise TypeError(
            f"{op}: {argument} has dtype {_name(tensor.dtype)}; wanted {names}. "
            + (hint or f"Cast it: {argument}.to(torch.{_name(wanted[0])}).")
        )


def same_dtype(op: str, **tensors: Tensor | None) -> None:
    """Raise TypeError unless all given tensors share one dtype."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    for name, t in given[1:]:
        if t.dtype != given[0][1].dtype:
            raise TypeError(
                f"{op}: {name} has dtype {_name(t.dtype)} but {given[0][0]} has "
                f"{_name(given[0][1].dtype)}; they must agree. Cast one of them."
            )


def same_shape(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors share one shape."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    for name, t in given[1:]:
        if t.shape != given[0][1].shape:
            raise ValueError(
                f"{op}: {name} has shape {list(t.shape)} but {given[0][0]} has "
                f"{list(given[0][1].shape)}; they must agree."
            )


def shape(op: str, argument: str, tensor: Tensor | None, wanted: Sequence[int], meaning: str) -> None:
    """Raise ValueError unless ``tensor`` (if given) has the shape ``wanted``, which is ``meaning`` in words."""
    if tensor is not None and tuple(tensor.shape) != tuple(wanted):
        raise ValueError(f"{op}: {argument} has shape {list(tensor.shape)}; wanted {list(wanted)} ({meaning}).")


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Raise ValueError unless all given tensors live on one device."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    for name, t in given[1:]:
        if t.device != given[0][1].device:
            raise ValueError(
                f"{op}: {name} is on {t.device} but {given[0][0]} is on {given[0][1].device}; "
                f"move one of them: {name}.to({str(given[0][1].device)!r})."
            )


def no_grad(op: str, **tensors: Tensor | None) -> None:
    """Raise RuntimeError if grad mode is on and an input requires grad: statistics are not differentiable."""
    if torch.is_grad_enabled():
        for name, t in tensors.items():
            if t is not None and t.requires_grad:
                raise RuntimeError(
                    f"{op}: {name} requires grad, but {op} has no derivative. "
                    f"Pass {name}.detach(), or call it under torch.no_grad()."
                )


def one_of(op: str, argument: str, value: str, wanted: Iterable[str]) -> None:
    """Raise ValueError unless ``value`` is one of ``wanted``; suggests the nearest."""
    choices = list(wanted)
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.5)
        raise ValueError(
            f"{op}: {argument} is {value!r}; wanted one of {', '.join(map(repr, choices))}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )


def needed(op: str, why: str, **tensors: Tensor | None) -> None:
    """Raise ValueError for the first argument that is missing; ``why`` says what asks for it."""
    for name, t in tensors.items():
        if t is None:
            raise ValueError(f"{op}: {name} is missing; {why} needs it. Pass {name}=...")


def at_least(op: str, argument: str, value: int, least: int) -> None:
    """Raise ValueError unless ``value >= least``."""
    if value < least:
        raise ValueError(f"{op}: {argument} is {value}; wanted at least {least}.")

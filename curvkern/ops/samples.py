"""Samples of a linear layer's backward pass: one packed form for batches, ragged sequences and experts.

Packed: tokens one after the other, D [k, o] and X [k, i]. Sample ("run") r is the tokens ``starts[r]`` up to
``starts[r + 1]``; where ``starts`` is None, ``r * length`` up to ``(r + 1) * length``. Expert e owns the runs
``first_run[e]`` up to ``first_run[e + 1]``; where ``first_run`` is None, one expert owns all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from curvkern.backend import check

Sample = Literal["sequence", "token", "batch"]

SAMPLES: tuple[str, ...] = get_args(Sample)
INPUTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
OFFSETS = (torch.int32, torch.int64)


class Batch(NamedTuple):
    """Packed input, as the top of this file says."""

    grad_output: Tensor
    activation: Tensor
    mask: Tensor | None
    starts: Tensor | None
    first_run: Tensor | None
    length: int

    @property
    def shape(self) -> tuple[int, int, int]:
        """(tokens, o, i)."""
        return *self.grad_output.shape, self.activation.shape[1]  # pyright: ignore[reportReturnType]

    @property
    def typical_length(self) -> int:
        """Tokens a sample, on average: how long each is, only the device knows."""
        return self.length if self.starts is None else -(-self.shape[0] // max(self.starts.numel() - 1, 1))

    @property
    def longest(self) -> int:
        """Tokens a sample, at most."""
        return self.length if self.starts is None else self.shape[0]

    @property
    def experts(self) -> int:
        """How many weights there are."""
        return 1 if self.first_run is None else self.first_run.numel() - 1

    @property
    def empty(self) -> bool:
        """Whether there is no sample, no token or no weight."""
        return 0 in (*self.shape, self.experts) or (self.starts is not None and self.starts.numel() < 2)

    @property
    def wide(self) -> torch.dtype:
        """What sums of this input are kept in."""
        double = torch.float64 in (self.grad_output.dtype, self.activation.dtype)
        return torch.float64 if double else torch.float32


def pack(
    op: str,
    grad_output: Tensor,
    activation: Tensor,
    sample: str,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: Tensor | None,
    number: str = "",
) -> Batch:
    """The packed input, after the checks that do not concern one op. ``number``: what arguments' names end with."""
    d_name, x_name, mask_name = f"grad_output{number}", f"activation{number}", f"mask{number}"
    check.one_of(op, "sample", sample, SAMPLES)
    check.dtype(op, d_name, grad_output, INPUTS)
    check.dtype(op, x_name, activation, INPUTS)
    ragged = {f"cu_seqlens{number}": cu_seqlens, "segments": segments}
    given = [name for name, offsets in ragged.items() if offsets is not None]
    came = f"{d_name} has shape {list(grad_output.shape)}"
    if grad_output.ndim not in (2, 3):
        raise ValueError(f"{op}: {came}; wanted [n, t, o], or packed [tokens, o].")
    if grad_output.ndim == 3 and given:
        raise ValueError(
            f"{op}: {given[0]} is given, so the input must be packed; {came}. "
            f"Pass {d_name}.flatten(0, 1) and {x_name}.flatten(0, 1)."
        )
    if activation.ndim != grad_output.ndim or activation.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            f"{op}: {x_name} has shape {list(activation.shape)} but {came}; all but the last dimension must agree."
        )
    if grad_output.ndim == 2 and sample == "sequence":
        check.needed(op, "packed input with sample='sequence'", **{f"cu_seqlens{number}": cu_seqlens})
    for name, offsets in ragged.items():
        check.dtype(op, name, offsets, OFFSETS)
        if offsets is not None and (offsets.ndim != 1 or offsets.numel() == 0):
            raise ValueError(f"{op}: {name} has shape {list(offsets.shape)}; wanted [n + 1], at least [1].")
    check.dtype(op, mask_name, mask, (torch.bool,))
    check.shape(op, mask_name, mask, grad_output.shape[:-1], "one per token")
    check.same_device(op, **{d_name: grad_output, x_name: activation, mask_name: mask}, **ragged)

    tokens = math.prod(grad_output.shape[:-1])
    cu, edges = (None if x is None else x.clamp(0, tokens).cummax(0).values for x in ragged.values())
    starts, first_run = cu, None
    if edges is not None and cu is not None and sample == "sequence":
        first_run = torch.searchsorted(cu, edges).clamp(max=cu.numel() - 1)
    elif edges is not None:
        starts = edges if cu is None else edges.clamp(cu[0], cu[-1])
        first_run = torch.arange(edges.numel(), device=edges.device)
    elif cu is not None and sample != "sequence":
        starts = torch.stack((cu[0], cu[-1]))
    return Batch(
        grad_output.reshape(tokens, grad_output.shape[-1]),
        activation.reshape(tokens, activation.shape[-1]),
        None if mask is None else mask.reshape(-1).contiguous(),
        starts,
        first_run,
        grad_output.shape[1] if sample == "sequence" and not given else tokens,
    )


def count(grad_output: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences there are."""
    return grad_output.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


def samples(batch: Batch) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, D [t, o], X [t, i]) of every sample, in float32 or float64, without masked tokens."""
    tokens, mask = batch.shape[0], batch.mask
    uniform = [*range(0, tokens + 1, max(batch.length, 1))]
    edges: list[int] = uniform if batch.starts is None else batch.starts.tolist()
    first: list[int] = [0, len(edges) - 1] if batch.first_run is None else batch.first_run.tolist()
    for expert in range(len(first) - 1):
        for run in range(first[expert], first[expert + 1]):
            at = slice(edges[run], edges[run + 1])
            d, x = batch.grad_output[at].to(batch.wide), batch.activation[at].to(batch.wide)
            yield (expert, d, x) if mask is None else (expert, d[mask[at]], x[mask[at]])


def refuse_float64(*arguments: object) -> str | None:
    """Why kernels cannot take the call, or None: they know no float64."""
    if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in arguments):
        return "float64 runs on the reference only"
    return None


def gathered(function: Callable[..., Any], *batches_at: int) -> Callable[..., Any]:
    """``function`` with flat arguments: those of a Batch, which starts at each of ``batches_at``, are gathered."""
    size = len(Batch._fields)

    def call(*arguments: Any) -> Any:
        gathered: list[Any] = []
        position = 0
        while position < len(arguments):
            if position in batches_at:
                gathered.append(Batch(*arguments[position : position + size]))
                position += size
            else:
                gathered.append(arguments[position])
                position += 1
        return function(*gathered)

    return call


def batch_schema(number: str = "") -> str:
    """A Batch in a torch schema, ``number`` after each name."""
    kinds = ("Tensor", "Tensor", "Tensor?", "Tensor?", "Tensor?", "int")
    return ", ".join(f"{kind} {name}{number}" for kind, name in zip(kinds, Batch._fields, strict=True))

"""What a restoration did to a weight: counts and norms of differences, in one pass over its three versions."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from curvkern.backend import check, launch
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register
from curvkern.ops.score import WEIGHTS

_CHUNK = 1 << 20  # elements that the reference widens at a time


class Change(NamedTuple):
    """Counts, and sums of squares over entries whose differences are finite.

    Attributes:
        changed: restored is not tuned; two NaN are the same.
        nonfinite: restored is NaN or infinite.
        spread: of these, where both others are finite.
        differing: tuned is not aligned.
        tuned_square: |W_t - W_a|^2.
        restored_square: |W - W_a|^2.
        step_square: |W - W_t|^2.
        product: <W_t - W_a, W - W_a>.
    """

    changed: int
    nonfinite: int
    spread: int
    differing: int
    tuned_square: float
    restored_square: float
    step_square: float
    product: float

    @classmethod
    def of(cls, numbers: Tensor) -> Change:
        """What `change` returned, read from its device."""
        changed, nonfinite, spread, differing, *sums = numbers.tolist()
        return cls(int(changed), int(nonfinite), int(spread), int(differing), *sums)


def change(aligned: Tensor, tuned: Tensor, restored: Tensor, *, backend: str = "auto") -> Tensor:
    """Compare a restored weight W with the aligned one, W_a, and the tuned one, W_t.

    Args:
        aligned: float32, float16, bfloat16 (reference: float64 too), any shape.
        tuned: the shape of ``aligned``, any of these dtypes.
        restored: shape and dtype of ``tuned``.
        backend: see `use`.

    Returns:
        Float64 [8]: the numbers of a `Change`, in its order, on the device.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Differences in float32, squares in float32 within blocks and float64 beyond. Deterministic.
    """
    check.no_grad("change", aligned=aligned, tuned=tuned, restored=restored)
    return _change(aligned, tuned, restored, backend)


def change_ref(aligned: Tensor, tuned: Tensor, restored: Tensor) -> Tensor:
    """The definition of `change`: its numbers as float64 [8]."""
    sums = torch.zeros(8, dtype=torch.float64, device=tuned.device)
    parts = (t.reshape(-1).split(_CHUNK) for t in (aligned, tuned, restored))
    for a, t, r in zip(*parts, strict=True):
        wide = torch.promote_types(torch.float32, torch.promote_types(a.dtype, t.dtype))
        a, t, r = a.to(wide), t.to(wide), r.to(wide)
        before, after = (torch.where((x - a).isfinite(), x - a, 0.0) for x in (t, r))
        bad = ~r.isfinite()
        counts = (_differs(r, t), bad, bad & a.isfinite() & t.isfinite(), _differs(t, a))
        step = after - before
        products = ((before, before), (after, after), (step, step), (before, after))
        sums += torch.stack([c.sum().double() for c in counts] + [(x.double() * y).sum() for x, y in products])
    return sums


def _differs(x: Tensor, y: Tensor) -> Tensor:
    return (x != y) & ~(x.isnan() & y.isnan())


def _native(aligned: Tensor, tuned: Tensor, restored: Tensor) -> Tensor:
    dense = [t.contiguous() for t in (aligned, tuned, restored)]
    chunks = -(-tuned.numel() // launch.constant("VECTORS_CHUNK"))
    partial = torch.empty(chunks, 8, dtype=torch.float64)
    launch.native_op("change", tuned.device, partial, *dense, tuned.numel(), aligned.dtype, tuned.dtype)
    return partial.sum(0)


def _check(aligned: Tensor, tuned: Tensor, restored: Tensor) -> None:
    named = {"aligned": aligned, "tuned": tuned, "restored": restored}
    for name, tensor in named.items():
        check.dtype("change", name, tensor, WEIGHTS)
    check.same_dtype("change", tuned=tuned, restored=restored)
    check.same_shape("change", **named)
    check.same_device("change", **named)


def _refuse(aligned: Tensor, tuned: Tensor, restored: Tensor) -> str | None:
    return "float64 runs on the reference only" if torch.float64 in (aligned.dtype, tuned.dtype) else None


_change = register(
    "change(Tensor aligned, Tensor tuned, Tensor restored, str backend) -> Tensor",
    check=_check,
    fake=lambda aligned, tuned, restored: tuned.new_empty(8, dtype=torch.float64),
    routes=(
        Route("cpu", _native, _refuse),
        Route("triton", lazily("curvkern.kernels.change:change"), _refuse),
        Route("reference", change_ref),
    ),
)

r"""Gram matrices of activations, their columns' square sums, and the Cholesky factor of the damped inverse."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from curvkern.backend import check, launch
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register

INPUTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SUMS = (torch.float32, torch.float64)

_PANEL = 256  # columns of a panel on the CPU: what lies above the diagonal inside it is computed twice
_ROWS = 4096  # tokens that are widened at a time
_LADDER = (1, 3, 10, 30, 100, 300, 1000, 3000, 10000)  # what damping is multiplied by, one after the other


def gram_(gram: Tensor, x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0, backend: str = "auto") -> Tensor:
    r"""Add the Gram matrix of activations, in place: :math:`H \mathrel{+}= s \sum_t x_t x_t^\top`.

    A symmetric rank-k product: the half below the diagonal is computed and mirrored. K-FAC's A of inputs and S of
    output gradients (Martens and Grosse 2015, arXiv:1503.05671), and the Hessian of a layer's squared error up to a
    factor of 2 (Frantar and Alistarh 2022, arXiv:2208.11580). Modules that share an input share one.

    Args:
        gram: float32 [i, i] (reference: float64 too), contiguous; added to.
        x: [n, t, i] or [tokens, i]; float32, float16, bfloat16 (reference: float64 too).
        mask: bool [n, t] or [tokens]. Tokens that are False count for nothing, whatever x holds there.
        scale: s.
        backend: see `use`.

    Returns:
        ``gram``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Products of half precisions are exact and sums float32; float32 inputs never go through TF32 on a GPU in Triton.
    Deterministic. Extra memory on a CPU: 256 columns of the result, and 4096 tokens in float32.
    """
    check.no_grad("gram_", gram=gram, x=x)
    _gram(gram, _rows("gram_", x), _flat("gram_", mask, x), float(scale), backend)
    return gram


def column_sumsq_(
    sums: Tensor, x: Tensor, *, mask: Tensor | None = None, scale: float = 1.0, backend: str = "auto"
) -> Tensor:
    r"""Add the square sums of an activation's columns, in place: :math:`c_j \mathrel{+}= s \sum_t x_{tj}^2`.

    The diagonal of `gram_`, at its cost in bytes alone: Wanda's column norms are its root (Sun et al. 2023,
    arXiv:2306.11695, eq. 1).

    Args:
        sums: float32 [i] (reference: float64 too), contiguous; added to.
        x: see `gram_`.
        mask: see `gram_`.
        scale: s.
        backend: see `use`.

    Returns:
        ``sums``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Float32 inside; deterministic.
    """
    check.no_grad("column_sumsq_", sums=sums, x=x)
    _column_sumsq(sums, _rows("column_sumsq_", x), _flat("column_sumsq_", mask, x), float(scale), backend)
    return sums


class FactorReport(NamedTuple):
    """How `inverse_factor` came by its factor.

    Attributes:
        damping: the share of the mean diagonal that was added, at last.
        tried: every share that was tried.
        dead: int64: columns whose diagonal is 0, which were given 1.
    """

    damping: float
    tried: tuple[float, ...]
    dead: Tensor


def inverse_factor(gram: Tensor, *, damping: float = 0.01) -> tuple[Tensor, FactorReport]:
    r"""Upper triangular U with :math:`U^\top U = (H + d\,\bar h\,I)^{-1}`, :math:`\bar h` the mean of H's diagonal.

    What `obs_sweep_` spreads errors with: :math:`U_{jj}^2` is the first diagonal element of the inverse of H's trailing
    block from j on (Frantar and Alistarh 2022, arXiv:2210.17323, section 3.3).

    Args:
        gram: H [i, i], symmetric, float32 or float64; left as it is. Only the lower half is read.
        damping: d, > 0. Where the factorisation fails, 3 d, 10 d, 30 d ... up to 10 000 d are tried.

    Returns:
        U [i, i] in H's dtype, and a `FactorReport`.

    Raises:
        TypeError, ValueError: arguments that do not fit, H holds NaN or infinity or a negative diagonal element, or no
            damping makes it positive definite.

    Two matrices of H's size beside the result.
    """
    check.dtype("inverse_factor", "gram", gram, SUMS)
    if gram.ndim != 2 or gram.shape[0] != gram.shape[1]:
        raise ValueError(f"inverse_factor: gram has shape {list(gram.shape)}; wanted [i, i].")
    if not 0 < damping < float("inf"):
        raise ValueError(f"inverse_factor: damping is {damping}; wanted a number above 0.")
    diagonal = gram.diagonal()
    if not gram.isfinite().all() or bool((diagonal < 0).any()):
        raise ValueError("inverse_factor: gram holds NaN, infinity or a negative diagonal element; look at its inputs.")
    dead = (diagonal == 0).nonzero().flatten()
    alive = torch.where(diagonal == 0, 1.0, diagonal)
    mean = float(alive.mean()) if len(alive) else 1.0
    tried: list[float] = []
    for step in _LADDER:
        tried.append(step * damping)
        damped = gram.clone()
        damped.diagonal().copy_(alive + tried[-1] * mean)
        lower, failed = torch.linalg.cholesky_ex(damped)
        if failed:
            continue
        inverse = torch.cholesky_inverse(lower, out=damped)
        factor, failed = torch.linalg.cholesky_ex(inverse, upper=True)
        if not failed and factor.isfinite().all():
            return factor, FactorReport(tried[-1], tuple(tried), dead)
    raise ValueError(
        f"inverse_factor: gram is not positive definite even with {tried[-1]:g} of its mean diagonal added; "
        "it is not a Gram matrix, or it is not symmetric."
    )


def _rows(op: str, x: Tensor) -> Tensor:
    """[tokens, i]."""
    check.dtype(op, "x", x, INPUTS)
    if x.ndim not in (2, 3):
        raise ValueError(f"{op}: x has shape {list(x.shape)}; wanted [n, t, i] or [tokens, i].")
    return x.flatten(0, -2)


def _flat(op: str, mask: Tensor | None, x: Tensor) -> Tensor | None:
    check.dtype(op, "mask", mask, (torch.bool,))
    check.shape(op, "mask", mask, x.shape[:-1], "one per token")
    return None if mask is None else mask.flatten()


# reference ------------------------------------------------------------------------------------------------------------


def _kept(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    return (x if mask is None else x[mask]).to(dtype)


def gram_ref(gram: Tensor, x: Tensor, mask: Tensor | None, scale: float) -> None:
    """The definition of `gram_`, in plain torch, of packed input."""
    rows = _kept(x, mask, gram.dtype)
    gram.addmm_(rows.T, rows, alpha=scale)


def column_sumsq_ref(sums: Tensor, x: Tensor, mask: Tensor | None, scale: float) -> None:
    """The definition of `column_sumsq_`, in plain torch, of packed input."""
    sums.add_(_kept(x, mask, sums.dtype).square().sum(0), alpha=scale)


# CPU ------------------------------------------------------------------------------------------------------------------


def _cpu_gram(gram: Tensor, x: Tensor, mask: Tensor | None, scale: float) -> None:
    """Panels of columns from the top down to the diagonal, by torch's own product; the rest is mirrored."""
    for start in range(0, len(x), _ROWS):
        part = slice(start, start + _ROWS)
        rows = _kept(x[part], None if mask is None else mask[part], torch.float32)
        for left in range(0, gram.shape[1], _PANEL):
            panel = slice(left, min(left + _PANEL, gram.shape[1]))
            above = rows[:, : panel.stop].T @ rows[:, panel]
            gram[: panel.stop, panel].add_(above, alpha=scale)
            gram[panel, :left].add_(above[:left].T, alpha=scale)


def _cpu_sumsq(sums: Tensor, x: Tensor, mask: Tensor | None, scale: float) -> None:
    x = x if x.stride(1) == 1 else x.contiguous()
    kept = None if mask is None else mask.contiguous()
    launch.native_op("column_sumsq", x.device, sums, x, kept, *x.shape, x.stride(0), scale, x.dtype)


# checks and registration ----------------------------------------------------------------------------------------------


def _check_gram(gram: Tensor, x: Tensor, mask: Tensor | None, scale: float) -> None:
    check.dtype("gram_", "gram", gram, SUMS)
    check.shape("gram_", "gram", gram, (x.shape[1], x.shape[1]), "[i, i]")
    check.same_device("gram_", gram=gram, x=x, mask=mask)


def _check_sumsq(sums: Tensor, x: Tensor, mask: Tensor | None, scale: float) -> None:
    check.dtype("column_sumsq_", "sums", sums, SUMS)
    check.shape("column_sumsq_", "sums", sums, (x.shape[1],), "[i]")
    check.same_device("column_sumsq_", sums=sums, x=x, mask=mask)


def _refuse(sums: Tensor, x: Tensor, *_: object) -> str | None:
    if torch.float64 in (sums.dtype, x.dtype):
        return "float64 runs on the reference only"
    return None if sums.is_contiguous() else "the sum is not contiguous"


_gram = register(
    "gram_(Tensor(a!) gram, Tensor x, Tensor? mask, float scale, str backend) -> ()",
    check=_check_gram,
    routes=(
        Route("cpu", _cpu_gram, _refuse),
        Route("triton", lazily("curvkern.kernels.gram:gram"), _refuse),
        Route("reference", gram_ref),
    ),
)

_column_sumsq = register(
    "column_sumsq_(Tensor(a!) sums, Tensor x, Tensor? mask, float scale, str backend) -> ()",
    check=_check_sumsq,
    routes=(
        Route("cpu", _cpu_sumsq, _refuse),
        Route("triton", lazily("curvkern.kernels.gram:column_sumsq"), _refuse),
        Route("reference", column_sumsq_ref),
    ),
)

r"""The alignment delta of a weight, :math:`V = W_a - W_u` [o, i]: formed a block of rows at a time and never kept.

Its products with other matrices: what the references in subspace.py are made of.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from curvkern.backend import check

THIN = 256  # columns up to which reading the weights costs more than multiplying by them


def delta_floor(aligned: Tensor, base: Tensor) -> Tensor:
    """The fraction of weights whose alignment delta is exactly 0, which in trained models means lost to rounding.

    Checkpoints hold rounded weights. Where a third of the deltas is 0, the others carry errors of half their size.

    Args:
        aligned: any shape, any floating dtype.
        base: the same shape; its dtype may differ.

    Returns:
        float32 scalar in [0, 1]; 0 for no weights.

    Raises:
        ValueError: arguments that do not fit.
    """
    check.same_shape("delta_floor", aligned=aligned, base=base)
    check.same_device("delta_floor", aligned=aligned, base=base)
    return (aligned == base).sum().float() / max(1, aligned.numel())


def adjoint(x: Tensor, aligned: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
    """V^T x [i, c] of x [o, c], and |V|_F^2 in float64; without base, V is aligned itself."""
    dtype = wide(x, aligned, base)
    t = torch.zeros(aligned.shape[1], x.shape[1], dtype=dtype, device=x.device)
    square = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows, v in blocks(aligned, base, dtype, x.shape[1]):
        t.addmm_(v.mT, x[rows].to(dtype))
        square += _square(v)
    return t, square


def apply(t: Tensor, aligned: Tensor, base: Tensor) -> Tensor:
    """V t [o, c] of t [i, c]."""
    y = torch.empty(len(aligned), t.shape[1], dtype=t.dtype, device=t.device)
    for rows, v in blocks(aligned, base, t.dtype, t.shape[1]):
        torch.mm(v, t, out=y[rows])
    return y


def apply_tiled(x: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """V V^T x and |V|_F^2, tile by tile of V V^T; a tile off the diagonal serves on both sides of it."""
    dtype = wide(x, aligned, base)
    y = torch.zeros(x.shape, dtype=dtype, device=x.device)
    square = torch.zeros((), dtype=torch.float64, device=x.device)
    for rows, v in blocks(aligned, base, dtype):
        square += _square(v)
        for cols, u in blocks(aligned[: rows.stop], base[: rows.stop], dtype):
            tile = v @ u.mT
            y[rows].addmm_(tile, x[cols].to(dtype))
            if cols != rows:
                y[cols].addmm_(tile.mT, x[rows].to(dtype))
    return y, square


def range_finder(
    v_transposed: Callable[..., tuple[Tensor, Tensor]], v: Callable[..., Tensor],
    aligned: Tensor, base: Tensor, rank: int, oversample: int, power: int, seed: int,
) -> Tensor:  # fmt: skip
    """The leading left singular directions of V from its products with thin matrices, see `subspace_basis`."""
    dtype = wide(aligned, base)
    width = min(rank + oversample, *aligned.shape)
    start = torch.randn(aligned.shape[1], width, generator=torch.Generator().manual_seed(seed))
    sample = v(start.to(aligned.device, dtype), aligned, base)
    if not sample.isfinite().all():
        raise ValueError("subspace_basis: aligned or base holds NaN or infinity; look into the checkpoints.")
    q = torch.linalg.qr(sample).Q
    for _ in range(power):
        z = torch.linalg.qr(v_transposed(q, aligned, base)[0]).Q
        q = torch.linalg.qr(v(z, aligned, base)).Q
    # V is near Q Q^T V, and V^T Q = Z R: the left singular vectors of the small R^T turn Q onto those of V.
    left, values, _ = torch.linalg.svd(torch.linalg.qr(v_transposed(q, aligned, base)[0]).R.mT)
    seen = values > width * torch.finfo(dtype).eps * values[0]
    return q @ (left * seen)[:, :rank]


def blocks(
    aligned: Tensor, base: Tensor | None, dtype: torch.dtype, width: int = THIN + 1
) -> Iterator[tuple[slice, Tensor]]:
    """Row blocks of V, one after the other in one buffer; ``width``: columns of what each is multiplied by."""
    cached = aligned.device.type == "cpu" and width <= THIN
    parts = row_slices(aligned, dtype, 2**20 if cached else 2**25)
    buffer = torch.empty(parts[0].stop if parts else 0, aligned.shape[1], dtype=dtype, device=aligned.device)
    for rows in parts:
        v = buffer[: rows.stop - rows.start].copy_(aligned[rows])
        yield rows, v if base is None else v.sub_(base[rows])


def row_slices(matrix: Tensor, dtype: torch.dtype, limit: int = 2**25) -> list[slice]:
    """Row blocks of at most ``limit`` bytes in ``dtype``, or of one row."""
    n, step = len(matrix), max(1, limit // max(1, matrix.shape[1] * dtype.itemsize))
    return [slice(start, min(start + step, n)) for start in range(0, n, step)]


def wide(*tensors: Tensor | None) -> torch.dtype:
    """What is computed in: float64 if any input is, else float32."""
    return torch.float64 if any(t is not None and t.dtype == torch.float64 for t in tensors) else torch.float32


def _square(v: Tensor) -> Tensor:
    """|v|_F^2: norms of rows in v's precision, their sum in float64."""
    return torch.linalg.vector_norm(v, dim=1).double().square().sum()

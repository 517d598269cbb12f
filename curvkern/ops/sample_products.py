"""Inner products of per-sample gradients of a linear layer: sample_norms and sample_dots.

G_n = D_n^T X_n is the gradient of sample n by the weight. <G_n, G_m> is the sum over tokens s of n, t of m of
<d_s, d_t> <x_s, x_t>: two Grams [t, t] instead of a gradient [o, i], which for short samples is less work.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvkern.backend import check
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register
from curvkern.ops.samples import Batch, batch_schema, count, gathered, pack, refuse_float64, samples

_BUFFER = 1 << 24  # gradients held at a time by sample_dots on the CPU: 64 MB of float32


def sample_norms(
    grad_output: Tensor,
    activation: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Squared Frobenius norm of each sequence's weight gradient, :math:`\|G_n\|_F^2`.

    For short sequences :math:`\langle D_n D_n^\top, X_n X_n^\top \rangle` (the ghost norm: Goodfellow 2015,
    arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679, section 4), whose rounding is relative to
    :math:`\|D_n\|_F^2 \|X_n\|_F^2`; for long ones tile by tile of :math:`G_n`.

    Args:
        grad_output: D [n, t, o], or packed [tokens, o] with ``cu_seqlens``; dtypes as in `fisher_diag_`.
        activation: X [n, t, i] or [tokens, i].
        mask: see `fisher_diag_`.
        cu_seqlens: see `fisher_diag_`.
        allow_tf32: see `fisher_diag_`.
        backend: see `use`.

    Returns:
        float32 [n] (float64 if an input is).

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.
    """
    check.no_grad("sample_norms", grad_output=grad_output, activation=activation)
    batch = pack("sample_norms", grad_output, activation, "sequence", mask, cu_seqlens, None)
    return _sample_norms(*batch, count(grad_output, cu_seqlens), allow_tf32, backend)


def sample_dots(
    grad_output1: Tensor,
    activation1: Tensor,
    grad_output2: Tensor,
    activation2: Tensor,
    *,
    mask1: Tensor | None = None,
    mask2: Tensor | None = None,
    cu_seqlens1: Tensor | None = None,
    cu_seqlens2: Tensor | None = None,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Inner products of the weight gradients of two sets of sequences: :math:`\langle G^1_n, G^2_m \rangle`.

    TracInCP's influence (Pruthi et al. 2020, arXiv:2002.08484) for one layer and one checkpoint.

    Args:
        grad_output1: D of the first set [n1, t1, o], or packed [tokens, o] with ``cu_seqlens1``.
        activation1: X of the first set [n1, t1, i] or [tokens, i].
        grad_output2: D of the second set [n2, t2, o], or packed; dtypes as in `fisher_diag_`.
        activation2: X of the second set.
        mask1: of the first set, see `fisher_diag_`.
        mask2: of the second set.
        cu_seqlens1: of the first set, see `fisher_diag_`.
        cu_seqlens2: of the second set.
        allow_tf32: see `fisher_diag_`.
        backend: see `use`.

    Returns:
        float32 [n1, n2] (float64 if an input is).

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.
    """
    check.no_grad("sample_dots", grad_output1=grad_output1, activation1=activation1)
    check.no_grad("sample_dots", grad_output2=grad_output2, activation2=activation2)
    batch1 = pack("sample_dots", grad_output1, activation1, "sequence", mask1, cu_seqlens1, None, "1")
    batch2 = pack("sample_dots", grad_output2, activation2, "sequence", mask2, cu_seqlens2, None, "2")
    counts = count(grad_output1, cu_seqlens1), count(grad_output2, cu_seqlens2)
    return _sample_dots(*batch1, *batch2, *counts, allow_tf32, backend)


def sample_norms_ref(batch: Batch, n: int, allow_tf32: bool = False) -> Tensor:
    """The definition of `sample_norms`, in plain torch."""
    norms = torch.zeros(n, dtype=batch.wide, device=batch.grad_output.device)
    for norm, (_, d, x) in zip(norms, samples(batch), strict=False):
        norm.copy_((d.T @ x).square().sum())
    return norms


def sample_dots_ref(batch1: Batch, batch2: Batch, n1: int, n2: int, allow_tf32: bool = False) -> Tensor:
    """The definition of `sample_dots`, in plain torch."""
    wide = torch.promote_types(batch1.wide, batch2.wide)
    dots = torch.zeros(n1, n2, dtype=wide, device=batch1.grad_output.device)
    for row, (_, d1, x1) in zip(dots, samples(batch1), strict=False):
        gradient = (d1.T @ x1).to(wide)
        for dot, (_, d2, x2) in zip(row, samples(batch2), strict=False):
            dot.copy_((d2.to(wide) @ gradient).mul_(x2).sum())
    return dots


def _check_dots(batch1: Batch, batch2: Batch, *_: Any) -> None:
    for name in ("grad_output", "activation"):
        first, second = getattr(batch1, name), getattr(batch2, name)
        wanted = [second.shape[0], first.shape[1]]
        check.shape("sample_dots", f"{name}2", second, wanted, f"[tokens, features of {name}1]")
        check.same_device("sample_dots", **{f"{name}1": first, f"{name}2": second})


def _cpu_norms(batch: Batch, n: int, allow_tf32: bool) -> Tensor:
    """Sample by sample the cheaper of the Grams and the gradient, 256 rows at a time."""
    norms = torch.zeros(n)
    for norm, (_, d, x) in zip(norms, samples(batch), strict=False):
        (t, o), i = d.shape, x.shape[1]
        if t * (o + i) <= 1.1 * o * i:  # measured: Grams are 1.2x faster at 1.0 and 1.2x slower at 1.25
            norm.copy_((d @ d.T).mul_(x @ x.T).sum().clamp(min=0))  # rounding may leave it below
        else:
            norm.copy_(torch.stack([(part.T @ x).square_().sum() for part in d.split(256, dim=1)]).sum())
    return norms


def _cpu_dots(batch1: Batch, batch2: Batch, n1: int, n2: int, allow_tf32: bool) -> Tensor:
    """Grams of the tokens, or one product of all gradients, as many rows of them at a time as the buffer holds."""
    first, second = ([(d, x) for _, d, x in samples(batch)] for batch in (batch1, batch2))
    dots = torch.zeros(n1, n2)
    if not first or not second:
        return dots
    (tokens1, o, i), (tokens2, _, _) = batch1.shape, batch2.shape
    if tokens1 * tokens2 * (o + i) <= 1.8 * (tokens1 + tokens2 + n1 * n2) * o * i:  # measured crossover
        all_d, all_x = (torch.cat([pair[k] for pair in second]) for k in (0, 1))
        lengths = [len(d) for d, _ in second]
        for row, (d, x) in zip(dots, first, strict=False):
            per_token = (d @ all_d.T).mul_(x @ all_x.T).sum(0)
            row[: len(lengths)] = torch.stack([part.sum() for part in per_token.split(lengths)])
        return dots
    step = max(1, _BUFFER // ((len(first) + len(second)) * i))
    for row in range(0, o, step):
        one, two = ([(d[:, row : row + step].T @ x).flatten() for d, x in side] for side in (first, second))
        dots[: len(one), : len(two)].addmm_(torch.stack(one), torch.stack(two).T)
    return dots


_sample_norms = register(
    f"sample_norms({batch_schema()}, int n, bool allow_tf32, str backend) -> Tensor",
    check=lambda *_: None,
    fake=gathered(lambda batch, n, _: batch.grad_output.new_empty(n, dtype=batch.wide), 0),
    routes=(
        Route("cpu", gathered(_cpu_norms, 0), refuse_float64),
        Route("triton", gathered(lazily("curvkern.kernels.sample_products:sample_norms"), 0), refuse_float64),
        Route("reference", gathered(sample_norms_ref, 0)),
    ),
)

_sample_dots = register(
    f"sample_dots({batch_schema('1')}, {batch_schema('2')}, int n1, int n2, bool allow_tf32, str backend) -> Tensor",
    check=gathered(_check_dots, 0, 6),
    fake=gathered(
        lambda one, two, n1, n2, _: one.grad_output.new_empty(n1, n2, dtype=torch.promote_types(one.wide, two.wide)),
        0,
        6,
    ),
    routes=(
        Route("cpu", gathered(_cpu_dots, 0, 6), refuse_float64),
        Route("triton", gathered(lazily("curvkern.kernels.sample_products:sample_dots"), 0, 6), refuse_float64),
        Route("reference", gathered(sample_dots_ref, 0, 6)),
    ),
)

"""Squared per-sample gradients of a linear layer: fisher_diag_ and fisher_blocks_.

With activation X [n, t, i] and gradient of the loss by the layer's output D [n, t, o], the gradient of sample n by the
weight [o, i] is G_n = D_n^T X_n. Nothing here ever holds G_n for all n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from curvkern.backend import check
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register
from curvkern.ops.samples import Batch, Sample, batch_schema, gathered, pack, refuse_float64, samples

Statistic = Literal["square", "abs"]

STATISTICS: tuple[str, ...] = get_args(Statistic)
SUMS = (torch.float32, torch.float64)


def fisher_diag_(
    fisher: Tensor,
    grad_output: Tensor,
    activation: Tensor,
    *,
    sample: Sample = "sequence",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segments: Tensor | None = None,
    statistic: Statistic = "square",
    weight_grad: Tensor | None = None,
    scale: float = 1.0,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    r"""Add the diagonal of the empirical Fisher of a linear layer's weight, in place.

    :math:`F \mathrel{+}= s \sum_n f(G_n)`, :math:`G_n = D_n^\top X_n`, elementwise :math:`f(g) = g^2`: the diagonal of
    the empirical Fisher (Kunstner, Balles and Hennig 2019, arXiv:1905.12558, eq. 3), summed, not averaged, if D comes
    from a loss that is summed over samples. With :math:`f(g) = |g|`, what the per-sample SNIP score multiplies
    :math:`|W|` with (Wei et al. 2024, arXiv:2402.05162, section 3).

    Args:
        fisher: float32 [o, i] (reference: float64 too), contiguous; added to. With ``segments``: [E, o, i].
        grad_output: D [n, t, o], float32, float16 or bfloat16 (reference: float64 too); or packed [tokens, o].
        activation: X [n, t, i], or packed [tokens, i]; may differ from D in dtype.
        sample: what a sample is: ``"sequence"`` a row of n or a run of ``cu_seqlens``; ``"token"`` each token;
            ``"batch"`` all of it, for experts all tokens of the expert.
        mask: bool [n, t] or [tokens]. Tokens that are False count for nothing, whatever D and X hold there.
        cu_seqlens: int32 or int64 [n + 1], non-decreasing: sequence n is tokens cu_seqlens[n] .. cu_seqlens[n + 1] of
            the packed input; tokens outside of all count for nothing. Values are not checked: ones out of range are
            clamped, decreasing ones raised to the largest before them.
        segments: int32 or int64 [E + 1], like ``cu_seqlens``: tokens segments[e] .. segments[e + 1] went to expert e.
            A sequence belongs to the expert in whose segment it starts; each segment should start one.
        statistic: f: ``"square"`` or ``"abs"``.
        weight_grad: float32 like ``fisher``, contiguous; :math:`s \sum_n G_n` is added to it, in the same pass but for
            ``sample="token"``.
        scale: s, finite.
        allow_tf32: let float32 inputs go through TF32 on a GPU, 10 bits of fraction for 23.
        backend: see `use`.

    Returns:
        ``fisher``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Sums are float32 and a sample's gradient is never rounded to less. Deterministic. Beside the result, the GPU needs
    no memory (ragged input: some bytes a token), the CPU at most 4 MB or 1.8 MB a thread, the reference 2 [o, i].
    """
    tensors = {"fisher": fisher, "grad_output": grad_output, "activation": activation, "weight_grad": weight_grad}
    check.no_grad("fisher_diag_", **tensors)
    batch = pack("fisher_diag_", grad_output, activation, sample, mask, cu_seqlens, segments)
    _fisher_diag(fisher, weight_grad, *batch, statistic, sample == "token", scale, allow_tf32, backend)
    return fisher


def fisher_blocks_(
    blocks: Tensor,
    grad_output: Tensor,
    activation: Tensor,
    *,
    block: tuple[int, int] = (128, 128),
    sample: Sample = "sequence",
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segments: Tensor | None = None,
    statistic: Statistic = "square",
    weight_grad: Tensor | None = None,
    scale: float = 1.0,
    allow_tf32: bool = False,
    backend: str = "auto",
) -> Tensor:
    """Add the sum over each block of what `fisher_diag_` would add, in place; the [o, i] diagonal is never written.

    Args:
        blocks: float32 [ceil(o / bo), ceil(i / bi)] (reference: float64 too), contiguous; added to. With
            ``segments``: [E, ceil(o / bo), ceil(i / bi)].
        grad_output: see `fisher_diag_`.
        activation: see `fisher_diag_`.
        block: (bo, bi). (1, i) gives a number per output, (o, 1) per input, (o, i) one for the layer.
        sample: see `fisher_diag_`.
        mask: see `fisher_diag_`.
        cu_seqlens: see `fisher_diag_`.
        segments: see `fisher_diag_`.
        statistic: see `fisher_diag_`.
        weight_grad: float32 [o, i], or [E, o, i]; see `fisher_diag_`.
        scale: see `fisher_diag_`.
        allow_tf32: see `fisher_diag_`.
        backend: see `use`.

    Returns:
        ``blocks``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Deterministic. On a GPU, sides with few factors of two (neither a multiple of 16 nor the whole side) need a float32
    buffer of up to [o, i] / (their largest powers of two); all others at most 1 % of [o, i].
    """
    tensors = {"blocks": blocks, "grad_output": grad_output, "activation": activation, "weight_grad": weight_grad}
    check.no_grad("fisher_blocks_", **tensors)
    check.at_least("fisher_blocks_", "block", min(block), 1)
    batch = pack("fisher_blocks_", grad_output, activation, sample, mask, cu_seqlens, segments)
    _fisher_blocks(blocks, weight_grad, *batch, *block, statistic, sample == "token", scale, allow_tf32, backend)
    return blocks


def _contributions(
    batch: Batch, statistic: str, token: bool, scale: float, weight_grad: Tensor | None, step: int
) -> Iterator[tuple[int, slice, Tensor]]:
    """(expert, rows, f(gradient) of these rows) of every sample; gradients are added to ``weight_grad`` on the way."""
    f = torch.square if statistic == "square" else torch.abs
    for expert, d, x in samples(batch):
        for row in range(0, d.shape[1], step):
            rows = slice(row, row + step)
            gradient = d[:, rows].T @ x
            if weight_grad is not None:
                experts_of(weight_grad)[expert, rows].add_(gradient, alpha=scale)
            yield expert, rows, f(d[:, rows]).T @ f(x) if token else f(gradient)


def experts_of(weight: Tensor) -> Tensor:
    """[E, ., .], for one expert too."""
    return weight if weight.ndim == 3 else weight.unsqueeze(0)


def block_sums(x: Tensor, block: tuple[int, int]) -> Tensor:
    """Sums over blocks: [o, i] to [ceil(o / bo), ceil(i / bi)]."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % block[1], 0, -x.shape[0] % block[0]))
    return padded.unflatten(1, (-1, block[1])).unflatten(0, (-1, block[0])).sum((1, 3))


def fisher_diag_ref(
    fisher: Tensor,
    weight_grad: Tensor | None,
    batch: Batch,
    statistic: str,
    token: bool,
    scale: float,
    allow_tf32: bool = False,
) -> None:
    """The definition of `fisher_diag_`, in plain torch; float32 products follow torch's own TF32 switch."""
    for expert, rows, amount in _contributions(batch, statistic, token, scale, weight_grad, step=256):
        experts_of(fisher)[expert, rows].add_(amount, alpha=scale)


def fisher_blocks_ref(
    blocks: Tensor,
    weight_grad: Tensor | None,
    batch: Batch,
    block_rows: int,
    block_cols: int,
    statistic: str,
    token: bool,
    scale: float,
    allow_tf32: bool = False,
) -> None:
    """The definition of `fisher_blocks_`, in plain torch."""
    for expert, _, amount in _contributions(batch, statistic, token, scale, weight_grad, step=max(batch.shape[1], 1)):
        experts_of(blocks)[expert].add_(block_sums(amount, (block_rows, block_cols)), alpha=scale)


def _check_sums(
    op: str,
    sums: dict[str, Tensor],
    weight_grad: Tensor | None,
    batch: Batch,
    block: tuple[int, int],
    statistic: str,
    scale: float,
) -> None:
    """``sums``: the one tensor that is added to, by its name."""
    ((name, target),) = sums.items()
    check.one_of(op, "statistic", statistic, STATISTICS)
    check.dtype(op, name, target, SUMS)
    check.dtype(op, "weight_grad", weight_grad, (target.dtype,))
    experts = [] if batch.first_run is None else [batch.experts]
    _, o, i = batch.shape
    meaning = "[experts, out, in]" if experts else "[out, in]"
    check.shape(op, "weight_grad", weight_grad, [*experts, o, i], meaning)
    blocks = meaning if block == (1, 1) else f"{meaning} in blocks of {block[0]} x {block[1]}"
    check.shape(op, name, target, [*experts, -(-o // block[0]), -(-i // block[1])], blocks)
    check.same_device(op, grad_output=batch.grad_output, weight_grad=weight_grad, **sums)
    if not math.isfinite(scale):
        raise ValueError(f"{op}: scale is {scale}; wanted a finite number.")


def _check_diag(fisher: Tensor, weight_grad: Tensor | None, batch: Batch, statistic: str, *how: Any) -> None:
    _check_sums("fisher_diag_", {"fisher": fisher}, weight_grad, batch, (1, 1), statistic, how[1])


def _check_blocks(
    blocks: Tensor, weight_grad: Tensor | None, batch: Batch, rows: int, cols: int, statistic: str, *how: Any
) -> None:
    _check_sums("fisher_blocks_", {"blocks": blocks}, weight_grad, batch, (rows, cols), statistic, how[1])


def _refuse_sums(target: Tensor, weight_grad: Tensor | None, *arguments: object) -> str | None:
    """Why kernels cannot take the call, or None: they edit the sums in place."""
    for name, edited in (("the sum", target), ("weight_grad", weight_grad)):
        if edited is not None and not edited.is_contiguous():
            return f"{name} is not contiguous"
    return refuse_float64(target, weight_grad, *arguments)


_HOW = "str statistic, bool token, float scale, bool allow_tf32, str backend"

_fisher_diag = register(
    f"fisher_diag_(Tensor(a!) fisher, Tensor(b!)? weight_grad, {batch_schema()}, {_HOW}) -> ()",
    check=gathered(_check_diag, 2),
    routes=(
        Route("cpu", gathered(lazily("curvkern.ops.fisher_cpu:fisher_diag"), 2), _refuse_sums),
        Route("triton", gathered(lazily("curvkern.kernels.fisher:fisher_diag"), 2), _refuse_sums),
        Route("reference", gathered(fisher_diag_ref, 2)),
    ),
)

_fisher_blocks = register(
    f"fisher_blocks_(Tensor(a!) blocks, Tensor(b!)? weight_grad, {batch_schema()}, int rows, int cols, {_HOW}) -> ()",
    check=gathered(_check_blocks, 2),
    routes=(
        Route("cpu", gathered(lazily("curvkern.ops.fisher_cpu:fisher_blocks"), 2), _refuse_sums),
        Route("triton", gathered(lazily("curvkern.kernels.fisher:fisher_blocks"), 2), _refuse_sums),
        Route("reference", gathered(fisher_blocks_ref, 2)),
    ),
)

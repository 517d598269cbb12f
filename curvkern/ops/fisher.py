"""Squared per-sample gradients of a linear layer: fisher_diag_, fisher_blocks_, sample_norms, sample_dots.

With activation X [n, t, i] and gradient of the loss by the layer's output D [n, t, o], the gradient of sample n by the
weight [o, i] is G_n = D_n^T X_n. Nothing here ever holds G_n for all n.

Inside, every input is packed: tokens one after the other, D [k, o] and X [k, i]; sample ("run") r is the tokens
``starts[r] .. starts[r + 1]``, or ``r * length .. (r + 1) * length`` where ``starts`` is None; expert e owns the runs
``first_run[e] .. first_run[e + 1]``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from curvkern.backend import check, launch
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register

Sample = Literal["sequence", "token", "batch"]
Statistic = Literal["square", "abs"]

SAMPLES: tuple[str, ...] = get_args(Sample)
STATISTICS: tuple[str, ...] = get_args(Statistic)
INPUTS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
SUMS = (torch.float32, torch.float64)
OFFSETS = (torch.int32, torch.int64)

_CODES = {"square": 0, "abs": 1, "sum": 2}  # Statistic in csrc/launch.h
_DEPTH, _ROWS, _COLS = 256, 12, 32  # kFisherDepth, kFisherRows, kFisherCols there
_DOTS_BUFFER = 1 << 24  # gradients held at a time by sample_dots on the CPU: 64 MB of float32


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
        weight_grad: float32 like ``fisher``, contiguous; :math:`s \sum_n G_n` is added to it in the same pass.
        scale: s, finite.
        allow_tf32: let float32 inputs go through TF32 on a GPU, 10 bits of fraction for 23.
        backend: see `use`.

    Returns:
        ``fisher``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Sums are float32 and a sample's gradient is never rounded to less. Deterministic. Beside the result, the GPU needs
    no memory (ragged input: some bytes a token) and the CPU at most 1.8 MB a thread; the reference needs 2 [o, i].
    """
    tensors = {"fisher": fisher, "grad_output": grad_output, "activation": activation, "weight_grad": weight_grad}
    check.no_grad("fisher_diag_", **tensors)
    batch = _pack("fisher_diag_", grad_output, activation, sample, mask, cu_seqlens, segments)
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
    batch = _pack("fisher_blocks_", grad_output, activation, sample, mask, cu_seqlens, segments)
    _fisher_blocks(blocks, weight_grad, *batch, *block, statistic, sample == "token", scale, allow_tf32, backend)
    return blocks


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
    arXiv:1510.01799; Li et al. 2021, arXiv:2110.05679, section 4), for long ones tile by tile of :math:`G_n`.

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
    batch = _pack("sample_norms", grad_output, activation, "sequence", mask, cu_seqlens, None)
    return _sample_norms(*batch, _count(grad_output, cu_seqlens), allow_tf32, backend)


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
    batch1 = _pack("sample_dots", grad_output1, activation1, "sequence", mask1, cu_seqlens1, None)
    batch2 = _pack("sample_dots", grad_output2, activation2, "sequence", mask2, cu_seqlens2, None)
    counts = _count(grad_output1, cu_seqlens1), _count(grad_output2, cu_seqlens2)
    return _sample_dots(*batch1, *batch2, *counts, allow_tf32, backend)


class Batch(NamedTuple):
    """Packed input, see the top of this file."""

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
        return self.length if self.starts is None else self.shape[0] // max(self.starts.numel() - 1, 1)

    @property
    def wide(self) -> torch.dtype:
        """What sums of this input are kept in."""
        double = torch.float64 in (self.grad_output.dtype, self.activation.dtype)
        return torch.float64 if double else torch.float32


def _pack(
    op: str,
    grad_output: Tensor,
    activation: Tensor,
    sample: str,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    segments: Tensor | None,
) -> Batch:
    """The packed input, after the checks that do not concern one op."""
    check.one_of(op, "sample", sample, SAMPLES)
    check.dtype(op, "grad_output", grad_output, INPUTS)
    check.dtype(op, "activation", activation, INPUTS)
    ragged = {"cu_seqlens": cu_seqlens, "segments": segments}
    given = [name for name, offsets in ragged.items() if offsets is not None]
    came = f"grad_output has shape {list(grad_output.shape)}"
    if grad_output.ndim not in (2, 3):
        raise ValueError(f"{op}: {came}; wanted [n, t, o], or packed [tokens, o].")
    if grad_output.ndim == 3 and given:
        raise ValueError(
            f"{op}: {given[0]} is given, so the input must be packed; {came}. "
            "Pass grad_output.flatten(0, 1) and activation.flatten(0, 1)."
        )
    if activation.ndim != grad_output.ndim or activation.shape[:-1] != grad_output.shape[:-1]:
        raise ValueError(
            f"{op}: activation has shape {list(activation.shape)} but {came}; all but the last dimension must agree."
        )
    if grad_output.ndim == 2 and sample == "sequence":
        check.needed(op, "packed input with sample='sequence'", cu_seqlens=cu_seqlens)
    for name, offsets in ragged.items():
        check.dtype(op, name, offsets, OFFSETS)
        if offsets is not None and (offsets.ndim != 1 or offsets.numel() == 0):
            raise ValueError(f"{op}: {name} has shape {list(offsets.shape)}; wanted [n + 1], at least [1].")
    check.dtype(op, "mask", mask, (torch.bool,))
    check.shape(op, "mask", mask, grad_output.shape[:-1], "one per token")
    check.same_device(op, grad_output=grad_output, activation=activation, mask=mask, **ragged)

    tokens = math.prod(grad_output.shape[:-1])
    cu, edges = (None if x is None else x.clamp(0, tokens).cummax(0).values for x in ragged.values())
    starts, first_run = cu, None
    if edges is not None and cu is not None and sample == "sequence":
        first_run = torch.searchsorted(cu, edges).clamp(max=cu.numel() - 1)
    elif edges is not None:
        starts, first_run = edges, torch.arange(edges.numel(), device=edges.device)
    elif cu is not None and sample != "sequence":
        starts = torch.stack((cu[0], cu[-1]))
    return Batch(
        grad_output.reshape(tokens, grad_output.shape[-1]),
        activation.reshape(tokens, activation.shape[-1]),
        None if mask is None else mask.reshape(-1),
        starts,
        first_run,
        grad_output.shape[1] if sample == "sequence" and not given else tokens,
    )


def _count(grad_output: Tensor, cu_seqlens: Tensor | None) -> int:
    """How many sequences there are."""
    return grad_output.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1


# reference ------------------------------------------------------------------------------------------------------------


def _samples(batch: Batch) -> Iterator[tuple[int, Tensor, Tensor]]:
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


def _contributions(
    batch: Batch, statistic: str, token: bool, scale: float, weight_grad: Tensor | None, step: int
) -> Iterator[tuple[int, slice, Tensor]]:
    """(expert, rows, f(gradient) of these rows) of every sample; gradients are added to ``weight_grad`` on the way."""
    f = torch.square if statistic == "square" else torch.abs
    for expert, d, x in _samples(batch):
        for row in range(0, d.shape[1], step):
            rows = slice(row, row + step)
            gradient = d[:, rows].T @ x
            if weight_grad is not None:
                _experts(weight_grad)[expert, rows].add_(gradient, alpha=scale)
            yield expert, rows, f(d[:, rows]).T @ f(x) if token else f(gradient)


def _experts(weight: Tensor) -> Tensor:
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
        _experts(fisher)[expert, rows].add_(amount, alpha=scale)


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
        _experts(blocks)[expert].add_(block_sums(amount, (block_rows, block_cols)), alpha=scale)


def sample_norms_ref(batch: Batch, n: int, allow_tf32: bool = False) -> Tensor:
    """The definition of `sample_norms`, in plain torch."""
    norms = torch.zeros(n, dtype=batch.wide, device=batch.grad_output.device)
    for norm, (_, d, x) in zip(norms, _samples(batch), strict=False):
        norm.copy_((d.T @ x).square().sum())
    return norms


def sample_dots_ref(batch1: Batch, batch2: Batch, n1: int, n2: int, allow_tf32: bool = False) -> Tensor:
    """The definition of `sample_dots`, in plain torch."""
    wide = torch.promote_types(batch1.wide, batch2.wide)
    dots = torch.zeros(n1, n2, dtype=wide, device=batch1.grad_output.device)
    for row, (_, d1, x1) in zip(dots, _samples(batch1), strict=False):
        gradient = (d1.T @ x1).to(wide)
        for dot, (_, d2, x2) in zip(row, _samples(batch2), strict=False):
            dot.copy_((d2.to(wide) @ gradient).mul_(x2).sum())
    return dots


# checks ---------------------------------------------------------------------------------------------------------------


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
    experts = [] if batch.first_run is None else [batch.first_run.numel() - 1]
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


def _check_dots(batch1: Batch, batch2: Batch, *_: Any) -> None:
    for name in ("grad_output", "activation"):
        first, second = getattr(batch1, name), getattr(batch2, name)
        wanted = [second.shape[0], first.shape[1]]
        check.shape("sample_dots", f"{name}2", second, wanted, f"[tokens, features of {name}1]")
        check.same_device("sample_dots", **{f"{name}1": first, f"{name}2": second})


def _refuse(*arguments: object) -> str | None:
    """What every kernel asks: no float64."""
    if any(isinstance(a, Tensor) and a.dtype == torch.float64 for a in arguments):
        return "float64 runs on the reference only"
    return None


def _refuse_sums(target: Tensor, weight_grad: Tensor | None, *arguments: object) -> str | None:
    """And contiguous sums, which are edited in place."""
    for name, edited in (("the sum", target), ("weight_grad", weight_grad)):
        if edited is not None and not edited.is_contiguous():
            return f"{name} is not contiguous"
    return _refuse(target, weight_grad, *arguments)


# CPU ------------------------------------------------------------------------------------------------------------------


def _tile(o: int, i: int, experts: int, threads: int) -> tuple[int, int]:
    """Sides of the tiles of sums: about what the second-level cache holds, smaller until each thread has one."""
    rows, cols = min(516, -(-o // _ROWS) * _ROWS), min(512, -(-i // _COLS) * _COLS)
    while experts * -(-o // rows) * -(-i // cols) < threads and (rows > _ROWS or cols > _COLS):
        if rows * 2 > cols and rows > _ROWS:
            rows = -(-rows // (2 * _ROWS)) * _ROWS
        else:
            cols = -(-cols // (2 * _COLS)) * _COLS
    return rows, cols


def _rows(x: Tensor) -> Tensor:
    """``x`` [tokens, features] with unit stride along features; any stride along tokens will do."""
    return x if x.shape[1] < 2 or x.stride(1) == 1 else x.contiguous()


def _native(
    target: Tensor,
    weight_grad: Tensor | None,
    batch: Batch,
    block: tuple[int, int] | None,
    statistic: str,
    token: bool,
    scale: float,
) -> None:
    """``target``: the diagonal, or sums over ``block``."""
    if token and weight_grad is not None:  # operands squared for the Fisher give no gradient
        _native(weight_grad, None, batch, None, "sum", False, scale)
        weight_grad = None
    tokens, o, i = batch.shape
    if tokens * o * i == 0:
        return
    d, x = _rows(batch.grad_output), _rows(batch.activation)
    starts = torch.arange(0, tokens + 1, batch.length) if batch.starts is None else batch.starts.long()
    first_run = torch.tensor([0, starts.numel() - 1]) if batch.first_run is None else batch.first_run
    experts, threads = first_run.numel() - 1, torch.get_num_threads()
    rows, cols = _tile(o, i, experts, threads)
    tiles = experts * -(-o // rows) * -(-i // cols)
    longest = batch.length if batch.starts is None else tokens
    depth = min(_DEPTH, -(-longest // 4) * 4)  # panels of whole cache lines
    slot = depth * (rows + cols) + (1 + (weight_grad is not None) + (longest > depth)) * rows * cols
    workspace = torch.empty(min(threads, tiles), slot)
    partial = None
    if block is not None:
        partial = torch.empty(tiles, (rows - 1) // block[0] + 2, (cols - 1) // block[1] + 2)
    launch.native_op(
        "fisher", target.device, target, partial, weight_grad, workspace, d, x, batch.mask, starts, first_run,
        experts, o, i, d.stride(0), x.stride(0), rows, cols, *(block or (1, 1)), depth, slot, scale, _CODES[statistic],
        token, d.dtype, x.dtype,
    )  # fmt: skip


def _cpu_diag(fisher: Tensor, weight_grad: Tensor | None, batch: Batch, *how: Any) -> None:
    statistic, token, scale, _ = how
    both_float = batch.grad_output.dtype == batch.activation.dtype == torch.float32
    if both_float and not token and batch.typical_length > _DEPTH:
        fisher_diag_ref(fisher, weight_grad, batch, *how)  # at 512 tokens torch's own product is up to 1.3x faster
    else:
        _native(fisher, weight_grad, batch, None, statistic, token, scale)


def _cpu_blocks(blocks: Tensor, weight_grad: Tensor | None, batch: Batch, rows: int, cols: int, *how: Any) -> None:
    statistic, token, scale, _ = how
    if weight_grad is None and statistic == "square" and not token and _gram_is_cheaper(batch, (rows, cols)):
        for expert, d, x in _samples(batch):
            _experts(blocks)[expert].add_(_gram_blocks(d, x, (rows, cols)), alpha=scale)
    else:
        _native(blocks, weight_grad, batch, (rows, cols), statistic, token, scale)


def _gram_is_cheaper(batch: Batch, block: tuple[int, int]) -> bool:
    """Whether Grams of the blocks beat the blocks of the gradient: flops, with the crossover measured on a CPU.

    With 0.5 of the flops they are 1.3-1.5x faster, with as many up to 1.2x slower (1024 x 1024; blocks of 128, rows).
    Their memory stays under a quarter of [o, i].
    """
    tokens, o, i = batch.shape
    t = batch.length if batch.starts is None else tokens  # the longest sample there can be
    down, across = -(-o // block[0]), -(-i // block[1])
    pairs, grams = (0, 1) if min(down, across) == 1 else (down * across, down + across)
    return t * (o + i + pairs) <= 0.6 * o * i and 4 * grams * t * t <= o * i


def _gram_blocks(d: Tensor, x: Tensor, block: tuple[int, int]) -> Tensor:
    """Block sums of (d^T x)^2 of one sample: sums over tokens s, t of <d_s, d_t> <x_s, x_t>, columns of the block."""
    if block[1] >= x.shape[1]:
        return block_sums(((x @ x.T) @ d).mul_(d).sum(0)[:, None], (block[0], 1))
    if block[0] >= d.shape[1]:
        return block_sums(((d @ d.T) @ x).mul_(x).sum(0)[None], (1, block[1]))
    return _grams(d, block[0]) @ _grams(x, block[1]).T


def _grams(x: Tensor, width: int) -> Tensor:
    """[blocks, t * t]: the Gram of each block of ``width`` columns."""
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % width))
    parts = padded.unflatten(1, (-1, width)).transpose(0, 1)
    return (parts @ parts.mT).flatten(1)


def _cpu_norms(batch: Batch, n: int, allow_tf32: bool) -> Tensor:
    norms = torch.zeros(n)
    for norm, (_, d, x) in zip(norms, _samples(batch), strict=False):
        (t, o), i = d.shape, x.shape[1]
        if t * (o + i) <= 1.1 * o * i:  # measured: Grams are 1.2x faster at 1.0 and 1.2x slower at 1.25
            norm.copy_((d @ d.T).mul_(x @ x.T).sum())
        else:
            norm.copy_(torch.stack([(part.T @ x).square_().sum() for part in d.split(256, dim=1)]).sum())
    return norms


def _cpu_dots(batch1: Batch, batch2: Batch, n1: int, n2: int, allow_tf32: bool) -> Tensor:
    first, second = ([(d, x) for _, d, x in _samples(batch)] for batch in (batch1, batch2))
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
    step = max(1, _DOTS_BUFFER // ((len(first) + len(second)) * i))
    for row in range(0, o, step):
        one, two = ([(d[:, row : row + step].T @ x).flatten() for d, x in side] for side in (first, second))
        dots[: len(one), : len(two)].addmm_(torch.stack(one), torch.stack(two).T)
    return dots


# registration ---------------------------------------------------------------------------------------------------------


def _gathered(function: Callable[..., Any], *batches_at: int) -> Callable[..., Any]:
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


def _batch_schema(number: str = "") -> str:
    kinds = ("Tensor", "Tensor", "Tensor?", "Tensor?", "Tensor?", "int")
    return ", ".join(f"{kind} {name}{number}" for kind, name in zip(kinds, Batch._fields, strict=True))


_HOW = "str statistic, bool token, float scale, bool allow_tf32, str backend"

_fisher_diag = register(
    f"fisher_diag_(Tensor(a!) fisher, Tensor(b!)? weight_grad, {_batch_schema()}, {_HOW}) -> ()",
    check=_gathered(_check_diag, 2),
    routes=(
        Route("cpu", _gathered(_cpu_diag, 2), _refuse_sums),
        Route("triton", lazily("curvkern.kernels.fisher:fisher_diag"), _refuse_sums),
        Route("reference", _gathered(fisher_diag_ref, 2)),
    ),
)

_fisher_blocks = register(
    f"fisher_blocks_(Tensor(a!) blocks, Tensor(b!)? weight_grad, {_batch_schema()}, int rows, int cols, {_HOW}) -> ()",
    check=_gathered(_check_blocks, 2),
    routes=(
        Route("cpu", _gathered(_cpu_blocks, 2), _refuse_sums),
        Route("triton", lazily("curvkern.kernels.fisher:fisher_blocks"), _refuse_sums),
        Route("reference", _gathered(fisher_blocks_ref, 2)),
    ),
)

_sample_norms = register(
    f"sample_norms({_batch_schema()}, int n, bool allow_tf32, str backend) -> Tensor",
    check=lambda *_: None,
    fake=_gathered(lambda batch, n, _: batch.grad_output.new_empty(n, dtype=batch.wide), 0),
    routes=(
        Route("cpu", _gathered(_cpu_norms, 0), _refuse),
        Route("triton", lazily("curvkern.kernels.fisher:sample_norms"), _refuse),
        Route("reference", _gathered(sample_norms_ref, 0)),
    ),
)

_sample_dots = register(
    f"sample_dots({_batch_schema('1')}, {_batch_schema('2')}, int n1, int n2, bool allow_tf32, str backend) -> Tensor",
    check=_gathered(_check_dots, 0, 6),
    fake=_gathered(
        lambda one, two, n1, n2, _: one.grad_output.new_empty(n1, n2, dtype=torch.promote_types(one.wide, two.wide)),
        0,
        6,
    ),
    routes=(
        Route("cpu", _gathered(_cpu_dots, 0, 6), _refuse),
        Route("triton", lazily("curvkern.kernels.fisher:sample_dots"), _refuse),
        Route("reference", _gathered(sample_dots_ref, 0, 6)),
    ),
)

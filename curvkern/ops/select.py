"""Counting scores by their keys (what Selector is made of), and the exact top K of every tile of a weight."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from curvkern.backend import check, launch
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register
from curvkern.ops.score import Gate, Rule, check_scored, gate_ref, score_key_ref, score_ref, unpack_mask, used

Ties = Literal["strict", "exact_k"]
Of = Literal["all", "gated"]

BINS = 1 << 16  # one for every half of a 32-bit key; kSelectBins in csrc/launch.h
_COUNTS = {"k": 0, "fraction": 1, "spare": 2}  # Count there
_TAKEN = {"strict": 0, "exact_k": 1, "last": 2}  # Ties there


def score_histogram_(
    histogram: Tensor,
    tallies: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rule: Rule = "grad",
    gate: Gate = "none",
    grad: Tensor | None = None,
    fisher: Tensor | None = None,
    direction: Tensor | None = None,
    mask: Tensor | None = None,
    boundary: Tensor | None = None,
    backend: str = "auto",
) -> None:
    """Count one tensor's scores by half of their order-preserving keys, in place: one pass, no score is written.

    The step of `Selector`, for those who merge counts of several devices or keep them. A candidate is a weight that
    ``mask`` and ``gate`` let through and whose score is not NaN. ``histogram[key >> 16] += 1`` for every candidate or,
    with ``boundary``, ``histogram[key & 0xffff] += 1`` for every candidate with ``key >> 16 == boundary``; the key is
    that of `score_key_ref`.

    Args:
        histogram: int64 [65536]; added to.
        tallies: int64 [2]; to the first is added how many candidates there are, to the second how many weights only a
            NaN score keeps from being one.
        weight: float32, float16, bfloat16 (reference: float64 too), any shape.
        target: like ``weight``.
        rule: which score, see `score_ref`; as float32.
        gate: which weights may be candidates, see `gate_ref`.
        grad: same shape, any floating dtype.
        fisher: float32, same shape.
        direction: like ``weight``.
        mask: bool like ``weight``, or packed bits as of `pack_mask`.
        boundary: int64 scalar on the device.
        backend: see `use`.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Deterministic; the same counts from every backend. Does not wait for the device.
    """
    check.no_grad("score_histogram_", weight=weight, target=target, grad=grad, fisher=fisher, direction=direction)
    bits = mask if mask is not None and mask.dtype == torch.uint8 else None
    bools = None if bits is not None else mask
    evidence = (grad, fisher, direction)
    _score_histogram(histogram, tallies, weight, target, boundary, bits, bools, *evidence, rule, gate, backend)


def block_select(
    weight: Tensor,
    target: Tensor,
    *,
    rule: Rule = "grad",
    gate: Gate = "none",
    fraction: float | None = None,
    k: int | None = None,
    spare: float | None = None,
    of: Of = "gated",
    block: tuple[int | None, int | None] = (None, 128),
    ties: Ties = "strict",
    grad: Tensor | None = None,
    fisher: Tensor | None = None,
    direction: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Which weights have one of the K largest scores of their tile; exact.

    The mask of Identify-Remove-Recalibrate (Wu et al., arXiv 2412.11041: of the weights that conflict with the safety
    direction, per 128 columns, those with the highest Fisher) is ``rule="grad", grad=fisher, gate="conflict",
    spare=sparsity``.

    Args:
        weight: [o, i], float32, float16, bfloat16 (reference: float64 too).
        target: like ``weight``.
        rule: which score, see `score_ref`; as float32. NaN is never selected.
        gate: which weights are candidates, see `gate_ref`.
        fraction: K = ceil(fraction * n) for the n weights of a tile that ``of`` counts, or
        k: K, or
        spare: K = n - floor(spare * n); of equal scores at the border the earlier are left out, whatever ``ties`` says.
            All in float64; never more than there are candidates.
        of: ``"gated"`` counts the candidates (mask, gate, not NaN), ``"all"`` all weights of the tile.
        block: rows and columns of a tile; None: all.
        ties: ``"strict"`` selects scores above the tile's K-th largest: K - 1 where no scores are equal. ``"exact_k"``
            selects K: of equal scores the first in row-major order of the tile.
        grad: same shape, any floating dtype.
        fisher: float32, same shape.
        direction: like ``weight``.
        backend: see `use`. On a GPU this is the reference: a sort of each tile.

    Returns:
        bool [o, i].

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Deterministic. Beside the result, four bytes for each thread and weight of a tile.
    """
    check.no_grad("block_select", weight=weight, target=target, grad=grad, fisher=fisher, direction=direction)
    check.one_of("block_select", "ties", ties, get_args(Ties))
    check.one_of("block_select", "of", of, get_args(Of))
    if weight.ndim != 2:
        raise ValueError(f"block_select: weight has shape {list(weight.shape)}; wanted [o, i].")
    count, amount = amount_of("block_select", k=k, fraction=fraction, spare=spare)
    rows, cols = (max(size, 1) if tile is None else tile for tile, size in zip(block, weight.shape, strict=True))
    check.at_least("block_select", "block", min(rows, cols), 1)
    taken = "last" if count == "spare" else ties
    evidence = (grad, fisher, direction, rule, gate)
    return _block_select(weight, target, *evidence, count, amount, of == "all", rows, cols, taken, backend)


def amount_of(op: str, **given: float | None) -> tuple[str, float]:
    """The one of ``k``, ``fraction`` and ``spare`` that is not None, by name.

    Raises:
        ValueError: none or several are given, ``k`` is negative, or another is outside [0, 1].
    """
    chosen = [(name, value) for name, value in given.items() if value is not None]
    if len(chosen) != 1:
        names = [name for name, _ in chosen] or ["none"]
        raise ValueError(f"{op}: pass exactly one of {', '.join(given)}; given: {', '.join(names)}.")
    name, value = chosen[0]
    if name == "k":
        check.at_least(op, "k", int(value), 0)
    elif not 0.0 <= value <= 1.0:
        raise ValueError(f"{op}: {name} is {value}; wanted a number in [0, 1].")
    return name, float(value)


# reference ------------------------------------------------------------------------------------------------------------


def score_histogram_ref(
    histogram: Tensor,
    tallies: Tensor,
    weight: Tensor,
    target: Tensor,
    boundary: Tensor | None,
    bits: Tensor | None,
    bools: Tensor | None,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
    rule: Rule,
    gate: Gate,
) -> None:
    """The definition of `score_histogram_`, in plain torch."""
    open_ = gate_ref(weight, target, grad, direction, gate=gate)
    if bools is not None:
        open_ &= bools
    if bits is not None:
        open_ &= unpack_mask(bits, weight.shape)
    score = score_ref(weight, target, grad, fisher, rule=rule)
    candidates = open_ & ~score.isnan()
    tallies += torch.stack([candidates.sum(), (open_ & score.isnan()).sum()])
    key = score_key_ref(score)
    if boundary is not None:
        candidates &= key >> 16 == boundary
    bin_ = key & 0xFFFF if boundary is not None else key >> 16
    histogram.scatter_add_(0, bin_.reshape(-1), candidates.reshape(-1).long())


def block_select_ref(
    weight: Tensor,
    target: Tensor,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
    rule: Rule,
    gate: Gate,
    count: str,
    amount: float,
    of_all: bool,
    rows: int,
    cols: int,
    taken: str,
) -> Tensor:
    """The definition of `block_select`, in plain torch: a sort of each tile."""
    score = score_ref(weight, target, grad, fisher, rule=rule)
    candidates = gate_ref(weight, target, grad, direction, gate=gate) & ~score.isnan()
    key = torch.where(candidates, score_key_ref(score), -1)  # -1: no candidate, below every key; -2: beside the weight
    tiles = _to_tiles(key, rows, cols)
    n = ((tiles >= -1) if of_all else (tiles >= 0)).sum(1, keepdim=True).double()
    gated = (tiles >= 0).sum(1, keepdim=True)
    if count == "k":
        wanted = torch.full_like(n, amount)
    else:
        wanted = torch.ceil(amount * n) if count == "fraction" else n - torch.floor(amount * n)
    number = torch.minimum(wanted, gated.double()).long()
    # Ranks from the largest down; of equal keys the first in element order comes first, or, for "last", last.
    order = tiles.argsort(dim=1, stable=True, descending=taken != "last")
    rank = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1], device=key.device).expand_as(order))
    if taken == "last":
        rank = order.shape[1] - 1 - rank
    if taken == "strict":
        kth = tiles.gather(1, order.gather(1, (number - 1).clamp(min=0)))
        return _from_tiles((tiles > kth) & (number > 0), weight.shape, rows, cols)
    return _from_tiles(rank < number, weight.shape, rows, cols)


def _to_tiles(key: Tensor, rows: int, cols: int) -> Tensor:
    """[tiles, rows * cols] of [o, i], -2 beside the matrix."""
    o, i = key.shape
    padded = torch.nn.functional.pad(key, (0, -i % cols, 0, -o % rows), value=-2)
    tiles = padded.reshape(padded.shape[0] // rows, rows, padded.shape[1] // cols, cols)
    return tiles.transpose(1, 2).reshape(-1, rows * cols)


def _from_tiles(tiles: Tensor, shape: torch.Size, rows: int, cols: int) -> Tensor:
    """The [o, i] matrix that `_to_tiles` cut up."""
    o, i = shape
    down, across = -(-o // rows), -(-i // cols)
    return (
        tiles.reshape(down, across, rows, cols).transpose(1, 2).reshape(down * rows, across * cols)[:o, :i].contiguous()
    )


# checks ---------------------------------------------------------------------------------------------------------------


def _check_score_histogram(
    histogram: Tensor,
    tallies: Tensor,
    weight: Tensor,
    target: Tensor,
    boundary: Tensor | None,
    bits: Tensor | None,
    bools: Tensor | None,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
    rule: str,
    gate: str,
) -> None:
    op = "score_histogram_"
    check_scored(op, weight, target, grad, fisher, direction, rule, gate)
    for name, counts, size in (("histogram", histogram, BINS), ("tallies", tallies, 2)):
        check.dtype(op, name, counts, (torch.int64,))
        check.shape(op, name, counts, (size,), "one count each")
    check.dtype(op, "boundary", boundary, (torch.int64,))
    check.shape(op, "boundary", boundary, (), "a scalar")
    check.dtype(op, "mask", bools, (torch.bool, torch.uint8))
    check.same_shape(op, weight=weight, mask=bools)
    check.shape(op, "mask", bits, (-(-weight.numel() // 8),), "one bit per weight")
    check.same_device(op, histogram=histogram, tallies=tallies, weight=weight, boundary=boundary, mask=bits)
    check.same_device(op, weight=weight, mask=bools)


def _check_block_select(
    weight: Tensor,
    target: Tensor,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
    rule: str,
    gate: str,
    *_: object,
) -> None:
    check_scored("block_select", weight, target, grad, fisher, direction, rule, gate)


def _refuse(*arguments: object) -> str | None:
    """What every kernel asks: counts that lie densely, and kernel dtypes."""
    for argument in arguments:
        if isinstance(argument, Tensor) and argument.dtype == torch.float64:
            return "float64 runs on the reference only"
        if isinstance(argument, Tensor) and argument.dtype == torch.int64 and not argument.is_contiguous():
            return "histogram or tallies are not contiguous"
    return None


def _refuse_blocks(*arguments: object) -> str | None:
    rows, cols = arguments[-3:-1]
    if isinstance(rows, int) and isinstance(cols, int) and rows * cols >= 1 << 31:
        return "a tile has 2^31 weights or more"
    return _refuse(*arguments)


# native ---------------------------------------------------------------------------------------------------------------


def _native_score_histogram(
    histogram: Tensor,
    tallies: Tensor,
    weight: Tensor,
    target: Tensor,
    boundary: Tensor | None,
    bits: Tensor | None,
    bools: Tensor | None,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
    rule: str,
    gate: str,
) -> None:
    device = weight.device
    masks = tuple(None if t is None else t.contiguous() for t in (bits, bools))
    w, t, g, f, v = used(rule, gate, weight, target, grad, fisher, direction)
    codes = (
        launch.RULE_CODES[rule],
        launch.GATE_CODES[gate],
        weight.dtype,
        g.dtype if g is not None else torch.float32,
    )
    scratch = (_scratch(launch.constant("SELECT_SCRATCH")),) if device.type == "cpu" else ()
    arguments = (histogram, tallies, *scratch, w, t, boundary, *masks, g, f, v, weight.numel(), *codes)
    launch.native_op("select_histogram", device, *arguments)


def _native_block_select(
    weight: Tensor,
    target: Tensor,
    grad: Tensor | None,
    fisher: Tensor | None,
    direction: Tensor | None,
    rule: str,
    gate: str,
    count: str,
    amount: float,
    of_all: bool,
    rows: int,
    cols: int,
    taken: str,
) -> Tensor:
    w, t, g, f, v = used(rule, gate, weight, target, grad, fisher, direction)
    codes = (
        launch.RULE_CODES[rule],
        launch.GATE_CODES[gate],
        weight.dtype,
        g.dtype if g is not None else torch.float32,
    )
    selected = torch.empty(weight.shape, dtype=torch.bool)
    rows, cols = min(rows, max(weight.shape[0], 1)), min(cols, max(weight.shape[1], 1))
    scratch = _scratch(launch.constant("SELECT_SCRATCH") + -(-rows * cols // 2048) * 2048)
    how = (amount, _COUNTS[count], of_all, _TAKEN[taken])
    arguments = (selected, scratch, w, t, g, f, v, *weight.shape, rows, cols, *how, *codes)
    launch.native_op("select_blocks", weight.device, *arguments)
    return selected


def _scratch(size: int) -> Tensor:
    """Room for ``size`` counters in each of torch's threads; what no thread touches is never given memory."""
    return torch.empty(torch.get_num_threads() * size, dtype=torch.int32)


_score_histogram = register(
    "score_histogram_(Tensor(a!) histogram, Tensor(b!) tallies, Tensor weight, Tensor target, Tensor? boundary, "
    "Tensor? bits, Tensor? bools, Tensor? grad, Tensor? fisher, Tensor? direction, str rule, str gate, str backend) "
    "-> ()",
    check=_check_score_histogram,
    routes=(
        Route("cuda", _native_score_histogram, _refuse),
        Route("cpu", _native_score_histogram, _refuse),
        Route("triton", lazily("curvkern.kernels.select:score_histogram"), _refuse),
        Route("reference", score_histogram_ref),
    ),
)

_block_select = register(
    "block_select(Tensor weight, Tensor target, Tensor? grad, Tensor? fisher, Tensor? direction, str rule, str gate, "
    "str count, float amount, bool of_all, int rows, int cols, str taken, str backend) -> Tensor",
    check=_check_block_select,
    fake=lambda weight, *_: weight.new_empty(weight.shape, dtype=torch.bool),
    routes=(
        Route("cpu", _native_block_select, _refuse_blocks),
        Route("reference", block_select_ref),
    ),
)

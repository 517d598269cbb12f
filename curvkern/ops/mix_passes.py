"""The passes over the bytes that merging is made of; `mix` puts them together.

Each is a registered op with a definition in plain torch, a native CPU kernel and a Triton kernel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from curvkern.backend import check, launch
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register
from curvkern.ops.philox import philox_ref
from curvkern.ops.score import WEIGHTS, score_of_key
from curvkern.ops.select import BINS, score_histogram_
from curvkern.ops.selector import kth_bin

TRITON_WAYS = 8  # tensors that one Triton kernel takes


def weighted_sum(tensors: Sequence[Tensor], weights: Tensor, backend: str) -> Tensor:
    """Sum of weights[k] * tensors[k], or with weights [k, o] of weights[k, row] * tensors[k][row]."""
    return _linear(list(tensors), weights if weights.ndim == 2 else weights[:, None], backend)


def axpby_into(y: Tensor, x: Tensor, coefficients: Tensor, backend: str) -> None:
    """Y <- coefficients[0] x + coefficients[1] y."""
    _axpby(y, x, coefficients, backend)


def delta_dots(base: Tensor | None, tensors: Sequence[Tensor], rows: int, backend: str) -> Tensor:
    """float64 [rows, k, k]: the dot products of all tensors less ``base``, cut into ``rows`` equal runs."""
    return _delta_dots(base, list(tensors), rows, backend)


def merge_elected(
    base: Tensor,
    tensors: Sequence[Tensor],
    limits: Tensor,
    weights: Tensor,
    scale: float,
    normalize: bool,
    backend: str,
) -> Tensor:
    """What `ties` does once each tensor's smallest magnitude to keep is known."""
    return _ties(base, list(tensors), limits, weights, scale, normalize, backend)


def keep_random(base: Tensor, tuned: Tensor, scale: Tensor, drop: int, seed: int, backend: str) -> Tensor:
    """Base + scale[0] * (tuned - base) where the random word is at least ``drop``, else base."""
    return _dare(base, tuned, scale, drop, seed, backend)


def dare_sums(base: Tensor, tuned: Tensor, drop: int, seed: int, backend: str) -> Tensor:
    """float64 [2]: sums of finite magnitudes of tuned - base, over all and over what `keep_random` keeps."""
    return _dare_sums(base, tuned, drop, seed, backend)


def kth_delta(base: Tensor, tensor: Tensor, k: int, backend: str) -> Tensor:
    """The exact k-th largest magnitude of tensor - base that is a number: a scalar on the device, not waited for."""
    if base.dtype != tensor.dtype or base.dtype == torch.float64:
        base, tensor = _wide(base), _wide(tensor)
    # Counting takes 65536 bins, twice, and has 32-bit keys.
    if base.numel() <= BINS or base.dtype == torch.float64:
        return (_wide(tensor) - _wide(base)).abs().nan_to_num(-1.0, posinf=math.inf).reshape(-1).topk(k).values[-1]
    above, below, tallies, again = (
        torch.zeros(size, dtype=torch.int64, device=base.device) for size in (BINS, BINS, 2, 2)
    )
    score_histogram_(above, tallies, tensor, base, rule="delta", backend=backend)
    number = tallies[0].clamp(max=k)
    upper, larger = kth_bin(above, number)
    score_histogram_(below, again, tensor, base, rule="delta", boundary=upper, backend=backend)
    return score_of_key((upper << 16) + kth_bin(below, number - larger)[0])


def coefficients(values: Sequence[float | Tensor], *tensors: Tensor) -> Tensor:
    """[k] on the tensors' device, float32 (float64 if a tensor is); by fills, so that a CUDA graph can capture it."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    device = tensors[0].device
    if device.type == "cpu" and not any(isinstance(v, Tensor) for v in values):
        return torch.tensor(values, dtype=dtype)
    scalars = [
        v.to(device, dtype).reshape(()) if isinstance(v, Tensor) else torch.full((), v, dtype=dtype, device=device)
        for v in values
    ]
    return torch.stack(scalars) if scalars else torch.empty(0, dtype=dtype, device=device)


# checks ---------------------------------------------------------------------------------------------------------------


def check_family(op: str, tensors: Sequence[Tensor], names: Sequence[str] | None = None) -> None:
    """Raise unless there is a tensor, all have one shape, one device and a floating dtype, and none requires grad."""
    if not tensors:
        raise ValueError(f"{op}: no tensors are given; pass at least one.")
    shape, device = tensors[0].shape, tensors[0].device
    if all(t.dtype in WEIGHTS and t.shape == shape and t.device == device and not t.requires_grad for t in tensors):
        return
    named = dict(zip(names or [f"tensors[{k}]" for k in range(len(tensors))], tensors, strict=True))
    for name, tensor in named.items():
        check.dtype(op, name, tensor, WEIGHTS)
    check.same_shape(op, **named)
    check.same_device(op, **named)
    check.no_grad(op, **named)


def check_finite(op: str, **numbers: float) -> None:
    """Raise ValueError unless all numbers are finite."""
    for name, number in numbers.items():
        if not math.isfinite(number):
            raise ValueError(f"{op}: {name} is {number}; wanted a finite number.")


def _check_weights(op: str, name: str, tensor: Tensor, shape: Sequence[int], meaning: str, like: Tensor) -> None:
    check.dtype(op, name, tensor, (torch.float32, torch.float64))
    check.shape(op, name, tensor, shape, meaning)
    if tensor.device != like.device:
        raise ValueError(f"{op}: {name} is on {tensor.device} but the tensors are on {like.device}; move it.")


def _check_linear(tensors: list[Tensor], weights: Tensor) -> None:
    check_family("linear", tensors)
    rows = tensors[0].shape[0] if weights.ndim == 2 and weights.shape[1] != 1 and tensors[0].ndim else 1
    _check_weights("linear", "weights", weights, (len(tensors), rows), "one a tensor, or one a tensor and row", weights)
    _check_weights("linear", "weights", weights, tuple(weights.shape), "", tensors[0])


def _check_axpby(y: Tensor, x: Tensor, coefficients: Tensor) -> None:
    check_family("axpby_", [y, x], ["y", "x"])
    _check_weights("axpby_", "coefficients", coefficients, (2,), "a and b", y)


def _check_delta_dots(base: Tensor | None, tensors: list[Tensor], rows: int) -> None:
    check_family("delta_dots", tensors if base is None else [*tensors, base])
    check.at_least("delta_dots", "rows", rows, 0)


def _check_ties(
    base: Tensor, tensors: list[Tensor], limits: Tensor, weights: Tensor, scale: float, normalize: bool
) -> None:
    check_family("ties", [base, *tensors])
    for name, numbers in (("limits", limits), ("weights", weights)):
        _check_weights("ties", name, numbers, (len(tensors),), "one a tensor", base)


def _check_dare(base: Tensor, tuned: Tensor, scale: Tensor, drop: int, seed: int) -> None:
    check_family("dare", [base, tuned], ["base", "tuned"])
    _check_weights("dare", "scale", scale, (1,), "a number", base)


def _check_dare_sums(base: Tensor, tuned: Tensor, drop: int, seed: int) -> None:
    check_family("dare", [base, tuned], ["base", "tuned"])


# reference ------------------------------------------------------------------------------------------------------------


def _wide(tensor: Tensor) -> Tensor:
    """At least float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _share(weight: Tensor, tensor: Tensor) -> Tensor:
    """Weight * tensor; weight 0 leaves the tensor out. -0 is what no sum notices."""
    return torch.where(weight == 0, -0.0, weight * _wide(tensor))


def weighted_sum_ref(tensors: list[Tensor], weights: Tensor) -> Tensor:
    """The definition of `weighted_sum`; weights [k, rows]."""
    spread = [w.reshape(-1, *[1] * (tensors[0].ndim - 1)) if tensors[0].ndim else w.reshape(()) for w in weights]
    total = _share(spread[0], tensors[0])
    for weight, tensor in zip(spread[1:], tensors[1:], strict=True):
        total = total + _share(weight, tensor)
    return total.to(tensors[0].dtype).contiguous()


def axpby_into_ref(y: Tensor, x: Tensor, coefficients: Tensor) -> None:
    """The definition of `axpby_into`."""
    y.copy_(_share(coefficients[0], x) + _share(coefficients[1], y))


def delta_dots_ref(base: Tensor | None, tensors: list[Tensor], rows: int) -> Tensor:
    """The definition of `delta_dots`."""
    if tensors[0].numel() == 0:
        return torch.zeros(rows, len(tensors), len(tensors), dtype=torch.float64, device=tensors[0].device)
    deltas = [_wide(t) if base is None else _wide(t) - _wide(base) for t in tensors]
    stacked = torch.stack([d.reshape(rows, -1).double() for d in deltas], 1)
    return stacked @ stacked.mT


def merge_elected_ref(
    base: Tensor, tensors: list[Tensor], limits: Tensor, weights: Tensor, scale: float, normalize: bool
) -> Tensor:
    """The definition of `merge_elected`."""
    origin = _wide(base)
    shares: list[Tensor] = []
    for tensor, limit, weight in zip(tensors, limits, weights, strict=True):
        delta = _wide(tensor) - origin
        shares.append(weight * torch.where(delta.abs() >= limit, delta, 0.0))
    positive = sum(shares[1:], shares[0]) >= 0
    mixed = divisor = torch.zeros_like(shares[0])
    for share, weight in zip(shares, weights, strict=True):
        agrees = torch.where(positive, share > 0, share < 0)
        mixed = mixed + torch.where(agrees, share, 0.0)
        divisor = divisor + torch.where(agrees, weight, 0.0)
    if normalize:
        mixed = mixed / torch.where(divisor == 0, 1.0, divisor)
    return (origin + scale * mixed).to(base.dtype).contiguous()


def keep_random_ref(base: Tensor, tuned: Tensor, scale: Tensor, drop: int, seed: int) -> Tensor:
    """The definition of `keep_random`."""
    moved = (_wide(base) + _share(scale[0], _wide(tuned) - _wide(base))).to(base.dtype)
    return torch.where(_kept(base, drop, seed), moved, base).contiguous()


def dare_sums_ref(base: Tensor, tuned: Tensor, drop: int, seed: int) -> Tensor:
    """The definition of `dare_sums`."""
    magnitude = (_wide(tuned) - _wide(base)).abs().double()
    magnitude = torch.where(magnitude < math.inf, magnitude, 0.0)
    return torch.stack([magnitude.sum(), magnitude[_kept(base, drop, seed)].sum()])


def _kept(base: Tensor, drop: int, seed: int) -> Tensor:
    return (philox_ref(seed, base.numel(), device=base.device) >= drop).reshape(base.shape)


# native ---------------------------------------------------------------------------------------------------------------


def _table(tensors: Sequence[Tensor]) -> Tensor:
    """Address and dtype code of each tensor; they are contiguous and must outlive the call."""
    return torch.tensor([number for t in tensors for number in (t.data_ptr(), launch.DTYPE_CODES[t.dtype])])


def _native_linear(tensors: list[Tensor], weights: Tensor) -> Tensor:
    out, dense, rows = launch.empty_like(tensors[0]), [t.contiguous() for t in tensors], weights.shape[1]
    if out.numel():
        sizes = (len(dense), rows, out.numel() // rows)
        launch.native_op("mix_linear", out.device, out, weights.contiguous(), _table(dense), *sizes, out.dtype)
    return out


def _native_axpby(y: Tensor, x: Tensor, coefficients: Tensor) -> None:
    x = x.contiguous()
    launch.native_op("mix_linear", y.device, y, coefficients, _table([x, y]), 2, 1, y.numel(), y.dtype)


def _native_delta_dots(base: Tensor | None, tensors: list[Tensor], rows: int) -> Tensor:
    first, ways = tensors[0], len(tensors)
    cols = first.numel() // rows if rows else 0
    dense, origin = [t.contiguous() for t in tensors], None if base is None else base.contiguous()
    shape = (rows, -(-cols // launch.constant("MIX_CHUNK")), ways, ways)
    partial = torch.empty(shape, dtype=torch.float64)
    codes = (ways, rows, cols, first.dtype if base is None else base.dtype)
    launch.native_op("mix_dots", first.device, partial, origin, _table(dense), *codes)
    return _mirrored(partial.sum(1))


def _mirrored(upper: Tensor) -> Tensor:
    """Symmetric matrices from their upper triangles."""
    return upper + upper.triu(1).mT


def _native_ties(
    base: Tensor, tensors: list[Tensor], limits: Tensor, weights: Tensor, scale: float, normalize: bool
) -> Tensor:
    out, dense, origin = launch.empty_like(base), [t.contiguous() for t in tensors], base.contiguous()
    arguments = (out, origin, _table(dense), limits.contiguous(), weights.contiguous(), len(dense), out.numel())
    launch.native_op("mix_ties", out.device, *arguments, scale, normalize, out.dtype)
    return out


def _native_dare(base: Tensor, tuned: Tensor, scale: Tensor, drop: int, seed: int) -> Tensor:
    out, dense = launch.empty_like(base), (base.contiguous(), tuned.contiguous())
    arguments = (out, *dense, scale, out.numel(), drop, seed, base.dtype, tuned.dtype)
    launch.native_op("mix_dare", out.device, *arguments)
    return out


def _native_dare_sums(base: Tensor, tuned: Tensor, drop: int, seed: int) -> Tensor:
    dense = (base.contiguous(), tuned.contiguous())
    partial = torch.empty(-(-base.numel() // launch.constant("MIX_CHUNK")), 2, dtype=torch.float64)
    codes = (base.numel(), drop, seed, base.dtype, tuned.dtype)
    launch.native_op("mix_dare_sums", base.device, partial, *dense, *codes)
    return partial.sum(0)


def _refuse_wide(*arguments: object) -> str | None:
    """What every kernel asks: no float64."""
    for argument in arguments:
        for each in argument if isinstance(argument, list) else (argument,):  # pyright: ignore[reportUnknownVariableType]
            if isinstance(each, Tensor) and each.dtype == torch.float64:
                return "float64 runs on the reference only"
    return None


def _refuse_edit(y: Tensor, *arguments: object) -> str | None:
    return _refuse_wide(y, *arguments) or (None if y.is_contiguous() else "y is not contiguous")


def _at_most(most: int | str, tensors: list[Tensor]) -> str | None:
    limit = launch.constant(most) if isinstance(most, str) else most
    return None if len(tensors) <= limit else f"it takes at most {limit} tensors, here are {len(tensors)}"


_linear = register(
    "linear(Tensor[] tensors, Tensor weights, str backend) -> Tensor",
    check=_check_linear,
    fake=lambda tensors, _: tensors[0].new_empty(tensors[0].shape),
    routes=(
        Route("cpu", _native_linear, _refuse_wide),
        Route(
            "triton",
            lazily("curvkern.kernels.mix:linear"),
            lambda tensors, weights: _refuse_wide(tensors, weights) or _at_most(TRITON_WAYS, tensors),
        ),
        Route("reference", weighted_sum_ref),
    ),
)

_axpby = register(
    "axpby_(Tensor(a!) y, Tensor x, Tensor coefficients, str backend) -> ()",
    check=_check_axpby,
    routes=(
        Route("cpu", _native_axpby, _refuse_edit),
        Route("triton", lazily("curvkern.kernels.mix:axpby"), _refuse_edit),
        Route("reference", axpby_into_ref),
    ),
)

_delta_dots = register(
    "delta_dots(Tensor? base, Tensor[] tensors, int rows, str backend) -> Tensor",
    check=_check_delta_dots,
    fake=lambda base, tensors, rows: tensors[0].new_empty((rows, len(tensors), len(tensors)), dtype=torch.float64),
    routes=(
        Route(
            "cpu",
            _native_delta_dots,
            lambda base, tensors, _: _refuse_wide(base, tensors) or _at_most("MIX_WAYS", tensors),
        ),
        Route(
            "triton",
            lazily("curvkern.kernels.mix:delta_dots"),
            lambda base, tensors, _: _refuse_wide(base, tensors) or _at_most(TRITON_WAYS, tensors),
        ),
        Route("reference", delta_dots_ref),
    ),
)

_ties = register(
    "ties(Tensor base, Tensor[] tensors, Tensor limits, Tensor weights, float scale, bool normalize, str backend) "
    "-> Tensor",
    check=_check_ties,
    fake=lambda base, *_: base.new_empty(base.shape),
    routes=(
        Route(
            "cpu",
            _native_ties,
            lambda base, tensors, *_: _refuse_wide(base, tensors) or _at_most("MIX_WAYS", tensors),
        ),
        Route(
            "triton",
            lazily("curvkern.kernels.mix:ties"),
            lambda base, tensors, *_: _refuse_wide(base, tensors) or _at_most(TRITON_WAYS, tensors),
        ),
        Route("reference", merge_elected_ref),
    ),
)

_dare = register(
    "dare(Tensor base, Tensor tuned, Tensor scale, int drop, int seed, str backend) -> Tensor",
    check=_check_dare,
    fake=lambda base, *_: base.new_empty(base.shape),
    routes=(
        Route("cpu", _native_dare, _refuse_wide),
        Route("triton", lazily("curvkern.kernels.mix:dare"), _refuse_wide),
        Route("reference", keep_random_ref),
    ),
)

_dare_sums = register(
    "dare_sums(Tensor base, Tensor tuned, int drop, int seed, str backend) -> Tensor",
    check=_check_dare_sums,
    fake=lambda base, *_: base.new_empty(2, dtype=torch.float64),
    routes=(
        Route("cpu", _native_dare_sums, _refuse_wide),
        Route("triton", lazily("curvkern.kernels.mix:dare_sums"), _refuse_wide),
        Route("reference", dare_sums_ref),
    ),
)

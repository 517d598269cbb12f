"""Moving weights away from where they are, and back again to the bit: perturb_, ball_perturb_."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from curvkern.backend import check, launch
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register
from curvkern.ops.philox import check_stream, normals_ref
from curvkern.ops.score import WEIGHTS

Norm = Literal["tensor", "filter"]

SEGMENT = 1 << 16  # elements whose squares are summed together; the sums of a tensor's segments are added up after


def perturb_(
    weight: Tensor, original: Tensor, alpha: float, *,
    seed: int, offset: int = 0, norm: Norm = "tensor", backend: str = "auto",
) -> Tensor:  # fmt: skip
    r"""Put a random point at a relative distance into a weight: :math:`W \leftarrow W_0 + \alpha \frac{|W_0|}{|z|} z`.

    z has independent standard normal entries, made from (seed, position) wherever they are needed: no direction is
    stored, and any point of the line is reached from the original in one step, without drift. ``alpha=0`` copies the
    original bit for bit.

    Args:
        weight: float32, float16, bfloat16 (reference: float64 too), contiguous; overwritten. May be ``original``
            itself, which cannot be restored then.
        original: like ``weight``: :math:`W_0`.
        alpha: relative length of the step, of either sign.
        seed: of the direction, a 64-bit integer.
        offset: position of the first element in the stream of the seed: give tensors of a model different seeds, or
            one seed and offsets that do not overlap.
        norm: ``"tensor"``: Frobenius norms of the whole tensor (VISAGE). ``"filter"``: of each output row of [o, ...].
        backend: see `use`.

    Returns:
        ``weight``. Norms are float64 sums in a fixed order; the rest is float32 without fused multiply-adds, rounded
        once. Deterministic whatever the number of threads; backends agree bit for bit, but for the rounding of
        the norms' quotient (the last bit of float32, rarely) and the reference, whose logarithm and cosine are
        float64's. A zero row or tensor stays zero.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Source: Peng et al., safety landscape (2405.17374), whose directions are normalised tensor by tensor; Li et al.
    (1712.09913), section 4, filter by filter.
    """
    check.no_grad("perturb_", weight=weight, original=original)
    check.one_of("perturb_", "norm", norm, get_args(Norm))
    check_stream("perturb_", seed, offset)
    if norm == "filter" and original.ndim == 0:
        raise ValueError("perturb_: norm is 'filter', so original must have rows; it is a scalar.")
    _perturb(weight, original, alpha, seed, offset, norm == "filter", backend)
    return weight


@dataclass(frozen=True)
class BallUndo:
    """The way back from `ball_perturb_`.

    Attributes:
        norm: float64 scalar, the norm of the direction.
        saved: copies of the parameters: their exact bits need as much memory as they do.
    """

    norm: Tensor
    saved: tuple[Tensor, ...]
    _params: tuple[Tensor, ...]

    def restore_(self) -> None:
        """Give every parameter its old bits back, whatever became of it since. May be called again."""
        with torch.no_grad():
            for parameter, old in zip(self._params, self.saved, strict=True):
                parameter.copy_(old)


def ball_perturb_(
    params: Sequence[Tensor], direction: Sequence[Tensor], rho: Tensor | float, *,
    eps: float = 0.0, saved: Sequence[Tensor] | None = None,
) -> BallUndo:  # fmt: skip
    r"""Step to the border of a ball, in place: :math:`W_k \leftarrow W_k + \rho\,d_k / (|d| + \epsilon)`.

    One norm over the whole list, :math:`|d|^2 = \sum_k |d_k|^2`. Booster goes down by a negative ``rho`` (eps 1e-7),
    SAP up by :math:`\rho = 2 \cdot 10^{-5} |W|` (eps 1e-8), Panacea up. To subtract the step again would not give the
    old bits back, as the sum was rounded: the parameters are copied before it, as many bytes as they have. That is
    little for adapters, which those methods train.

    Args:
        params: float32, float16, bfloat16 or float64 tensors, any shapes; edited. No backend: torch's own operations.
        direction: one tensor a parameter, its shape and device, any of these dtypes.
        rho: radius of the ball; a number, or a scalar tensor, which is not waited for.
        eps: added to the norm.
        saved: the `BallUndo.saved` of an earlier call, to be overwritten instead of allocating new copies.

    Returns:
        `BallUndo`, with the way back. Float32 inside (float64 for float64), one rounding; the norm is a float64 sum of
        float64 sums in list order. Nothing moves where the direction is zero. Deterministic.

    Raises:
        TypeError, ValueError: arguments that do not fit; nothing has been edited then.
        RuntimeError: a parameter or direction requires grad under grad mode.

    Source: Huang et al., Booster (2409.01586), algorithm 1; Wu et al., SAP (2505.16737); Wang et al., Panacea
    (2501.18100).
    """
    _check_ball(params, direction, saved)
    device = params[0].device if params else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for d in direction:
        total += torch.linalg.vector_norm(d, dtype=torch.float64).square().to(device)
    norm = total.sqrt()
    length = norm + eps
    step = torch.where(length > 0, torch.as_tensor(rho, dtype=torch.float64, device=device) / length, 0.0)
    if saved is None:
        saved = [p.detach().clone() for p in params]
    else:
        for old, p in zip(saved, params, strict=True):
            old.copy_(p)
    for p, d in zip(params, direction, strict=True):
        wide = torch.float64 if p.dtype == torch.float64 else torch.float32
        p.copy_(p.to(wide) + d.to(wide) * step.to(p.device, wide))
    return BallUndo(norm, tuple(saved), tuple(params))


# reference ------------------------------------------------------------------------------------------------------------


def perturb_ref(weight: Tensor, original: Tensor, alpha: float, seed: int, offset: int, by_row: bool) -> None:
    """The definition of `perturb_`, in plain torch."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    z = normals_ref(seed, original.numel(), offset, original.device).to(wide).reshape(original.shape)
    rows = len(original) if by_row else 1
    if original.numel() == 0:
        return
    x, z = original.reshape(rows, -1), z.reshape(rows, -1)
    scale = _scales(torch.stack([x.double().square().sum(1), z.double().square().sum(1)]), alpha).to(wide)
    moved = x.to(wide) + scale[:, None] * z
    weight.copy_((moved.to(weight.dtype) if alpha else x).reshape(weight.shape))


def _scales(squares: Tensor, alpha: float) -> Tensor:
    """The step's factor, alpha |W_0| / |z|, from the squares of both norms; 0 where z is 0."""
    return torch.where(squares[1] > 0, alpha * (squares[0] / squares[1]).sqrt(), 0.0)


# checks ---------------------------------------------------------------------------------------------------------------


def _check_perturb(weight: Tensor, original: Tensor, *_: object) -> None:
    check.dtype("perturb_", "weight", weight, WEIGHTS)
    check.same_dtype("perturb_", weight=weight, original=original)
    check.same_shape("perturb_", weight=weight, original=original)
    check.same_device("perturb_", weight=weight, original=original)


def _check_ball(params: Sequence[Tensor], direction: Sequence[Tensor], saved: Sequence[Tensor] | None) -> None:
    op = "ball_perturb_"
    for name, given in (("direction", direction), ("saved", saved)):
        if given is not None and len(given) != len(params):
            raise ValueError(f"{op}: {name} has {len(given)} tensors but params has {len(params)}; they must agree.")
    for k, (p, d) in enumerate(zip(params, direction, strict=True)):
        names = {f"params[{k}]": p, f"direction[{k}]": d}
        check.no_grad(op, **names)
        for name, tensor in names.items():
            check.dtype(op, name, tensor, WEIGHTS)
        check.same_shape(op, **names)
        check.same_device(op, **names)
        if saved is not None:
            kept = {f"params[{k}]": p, f"saved[{k}]": saved[k]}
            check.same_dtype(op, **kept)
            check.same_shape(op, **kept)


def _refuse(weight: Tensor, *_: object) -> str | None:
    if weight.dtype == torch.float64:
        return "float64 runs on the reference only"
    return None if weight.is_contiguous() else "weight is not contiguous"


# kernels --------------------------------------------------------------------------------------------------------------


def _native_squares(original: Tensor, segment: int, seed: int, offset: int) -> Tensor:
    n = original.numel()
    sums = torch.empty(2, -(-n // segment), dtype=torch.float64, device=original.device)
    launch.native_op("perturb_squares", original.device, sums, original, n, segment, seed, offset, original.dtype)
    return sums


def _native_write(weight: Tensor, original: Tensor, scale: Tensor, segment: int, seed: int, offset: int) -> None:
    arguments = (weight, original, scale, original.numel(), segment, seed, offset, original.dtype)
    launch.native_op("perturb", weight.device, *arguments)


def _in_two_passes(squares: Callable[..., Tensor], write: Callable[..., None]) -> Callable[..., None]:
    """The norms, then the weights."""

    def run(weight: Tensor, original: Tensor, alpha: float, seed: int, offset: int, by_row: bool) -> None:
        n = original.numel()
        if n == 0:
            return
        if alpha == 0:
            weight.copy_(original)
            return
        dense = original.contiguous()
        row = n // len(original) if by_row else n
        sums = squares(dense, row if by_row else SEGMENT, seed, offset)
        scale = _scales(sums if by_row else sums.sum(1, keepdim=True), alpha).float()
        write(weight, dense, scale, row, seed, offset)

    return run


_perturb = register(
    "perturb_(Tensor(a!) weight, Tensor original, float alpha, int seed, int offset, bool by_row, str backend) -> ()",
    check=_check_perturb,
    routes=(
        Route("cpu", _in_two_passes(_native_squares, _native_write), _refuse),
        Route(
            "triton",
            _in_two_passes(lazily("curvkern.kernels.perturb:squares"), lazily("curvkern.kernels.perturb:write")),
            _refuse,
        ),
        Route("reference", perturb_ref),
    ),
)

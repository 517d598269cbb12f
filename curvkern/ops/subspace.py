r"""The alignment direction of a weight, :math:`V = W_a - W_u`, and updates seen against it.

V [o, i] is formed in float32 a block at a time and never kept; :math:`C = V V^T / |V|_F` [o, o] is never formed. There
is no native kernel: on a GPU Triton's sweeps read the weights twice and do little else; on a CPU the blocks stay in
cache, and a hand-written AVX-512 sweep was less than twice as fast (4096 x 4096, r = 16 and 64).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from curvkern.backend import check
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register
from curvkern.ops.delta import THIN, adjoint, apply, apply_tiled, blocks, range_finder, wide
from curvkern.ops.score import WEIGHTS


@overload
def alignment_map(x: Tensor, aligned: Tensor, base: Tensor, *, backend: str = "auto") -> tuple[Tensor, Tensor]: ...
@overload
def alignment_map(
    x: Sequence[Tensor], aligned: Sequence[Tensor], base: Sequence[Tensor], *, backend: str = "auto"
) -> tuple[list[Tensor], Tensor]: ...
def alignment_map(x: Any, aligned: Any, base: Any, *, backend: str = "auto") -> tuple[Any, Tensor]:
    r"""The image of x under the alignment map, :math:`C x = V (V^T x) / |V|_F` with :math:`V = W_a - W_u`.

    C is symmetric without negative eigenvalues, but no projector: its mean eigenvalue is :math:`|V|_F / o`, for square
    weights the root mean square of V's entries, so that an image is hundreds of times smaller than its update.

    Args:
        x: [o, r], any floating dtype: columns such as LoRA's B, or a whole update [o, i]. Or a list of them, one for
            each module: on a GPU all modules of one shape go in two launches.
        aligned: weight [o, i] of the aligned model; float32, float16, bfloat16 (reference: float64 too); or a list.
        base: the same weight before alignment; its dtype may differ; or a list.
        backend: see `use`.

    Returns:
        ``(y, norm)``: y [o, r] and the scalar :math:`|V|_F`, float32 (float64 if any input is): half precision would
        lose an image so much smaller than x. Where aligned equals base both are 0. For lists a list of y, and norm [m].

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Source: Hsu et al., Safe LoRA (2405.16833), eq. 2. Deterministic.
    """
    if isinstance(x, Tensor):
        check.no_grad("alignment_map", x=x, aligned=aligned, base=base)
        return _alignment_map(x, aligned, base, backend)
    lists = same_length("alignment_map", x=x, aligned=aligned, base=base)
    if not lists["x"]:
        return [], torch.zeros(0)
    for one, other, third in zip(*lists.values(), strict=True):
        check.no_grad("alignment_map", x=one, aligned=other, base=third)
    flat, norms = _alignment_maps(*lists.values(), backend)
    parts = flat.split([one.numel() for one in lists["x"]])
    return [part.view(one.shape) for part, one in zip(parts, lists["x"], strict=True)], norms


def alignment_penalty(
    B: Tensor, A: Tensor, aligned: Tensor | None = None, base: Tensor | None = None, *,
    basis: Tensor | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    r"""What the alignment map leaves of an update, :math:`|(I - C) BA|_F^2`, differentiable in A and B.

    With :math:`M = B - CB`, :math:`H = M^T M`, :math:`G = AA^T` the value is :math:`\mathrm{tr}(HG)`, the gradients are
    :math:`2HA` and :math:`2(M - CM)G`: two sweeps over the weights forward, two backward, and nothing [o, i] or [o, o].
    The map is so far from a projector that this is close to a decay of BA. With ``basis`` C is :math:`UU^T` instead,
    and only what leaves the subspace counts.

    Args:
        B: [o, r], any floating dtype.
        A: [r, i], any floating dtype. No LoRA scale is applied.
        aligned: weight [o, i] of the aligned model, see `alignment_map`.
        base: the same weight before alignment.
        basis: orthonormal [o, k] instead of both weights, see `subspace_basis`.
        backend: see `use`; with ``basis`` the products are torch's.

    Returns:
        Scalar, float32 (float64 if any input is), once differentiable, in full precision under autocast too.

    Raises:
        TypeError, ValueError: arguments that do not fit, or neither or both of the weights and the basis.
        RuntimeError: aligned, base or basis requires grad under grad mode.

    Source: Yang et al., AsFT (2506.08473), the regulariser as published. Deterministic.
    """
    check.no_grad("alignment_penalty", aligned=aligned, base=base, basis=basis)
    _check_penalty(B, A, aligned, base, basis)
    return _Penalty.apply(B, A, aligned, base, basis, backend)


def subspace_basis(
    aligned: Tensor, base: Tensor, rank: int, *,
    oversample: int = 8, power: int = 2, seed: int = 0, backend: str = "auto",
) -> Tensor:  # fmt: skip
    r"""Orthonormal basis of the leading left singular directions of :math:`V = W_a - W_u`.

    A randomised range finder: ``2 * power + 2`` sweeps over V, with a QR after each so that small directions survive.

    Args:
        aligned: weight [o, i]; float32, float16, bfloat16 (reference: float64 too).
        base: the same weight before alignment; its dtype may differ.
        rank: columns wanted, at most min(o, i).
        oversample: further random columns, dropped at the end.
        power: power iterations: more where the spectrum of V decays slowly.
        seed: of the random start, which is drawn on the CPU: the same on every device.
        backend: see `use`.

    Returns:
        [o, rank], float32 (float64 if any input is), leading direction first, each up to its sign. Columns beyond the
        numerical rank of V are zero (all of them where aligned equals base): :math:`UU^T` projects onto V alone.

    Raises:
        TypeError, ValueError: arguments that do not fit, or NaN or infinity in the weights.
        RuntimeError: an input requires grad under grad mode.

    Source: Halko, Martinsson, Tropp (0909.4061), algorithms 4.4 and 5.1. Deterministic.
    """
    check.no_grad("subspace_basis", aligned=aligned, base=base)
    return _subspace_basis(aligned, base, rank, oversample, power, seed, backend)


def project_(
    x: Tensor, basis: Tensor, *, complement: bool = False, scale: float = 1.0, backend: str = "auto"
) -> Tensor:
    r"""Project onto a subspace in place: :math:`x \leftarrow s\,UU^T x`, or :math:`x \leftarrow s\,(x - UU^T x)`.

    Args:
        x: [o, c]; float32, float16, bfloat16 (reference: float64 too); edited. Float32 inside, one rounding.
        basis: U [o, k], any floating dtype; its columns are taken to be orthonormal.
        complement: keep what lies outside the subspace instead.
        scale: s.
        backend: see `use`.

    Returns:
        ``x``; the same bits every time.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.
    """
    check.no_grad("project_", x=x, basis=basis)
    _project(x, basis, complement, float(scale), backend)
    return x


class _Penalty(torch.autograd.Function):
    """tr(H G) and its gradients, see `alignment_penalty`."""

    @staticmethod
    def forward(ctx: Any, B: Tensor, A: Tensor, *where: Any) -> Tensor:
        """``where``: aligned, base, basis, backend."""
        dtype = wide(B, A, *where[:3])
        with torch.autocast(B.device.type, enabled=False):
            b, a = B.to(dtype), A.to(dtype)
            m = b - _image(b, *where)
            h, g = m.mT @ m, a @ a.mT
        ctx.save_for_backward(B, A, m, h, g, *where[:3])
        ctx.backend = where[3]
        return (h * g).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        B, A, m, h, g, aligned, base, basis = ctx.saved_tensors
        grad_b = grad_a = None
        with torch.autocast(m.device.type, enabled=False):
            if ctx.needs_input_grad[0]:
                left = m - _image(m, aligned, base, basis, ctx.backend)
                grad_b = (2 * grad * left @ g).to(B.dtype)
            if ctx.needs_input_grad[1]:
                grad_a = (2 * grad * h @ A.to(h.dtype)).to(A.dtype)
        return grad_b, grad_a, None, None, None, None


def _image(x: Tensor, aligned: Tensor | None, base: Tensor | None, basis: Tensor | None, backend: str) -> Tensor:
    """C x by the weights, or U U^T x."""
    if basis is None:
        return _alignment_map(x, aligned, base, backend)[0]
    u = basis.to(x.dtype)
    return u @ (u.mT @ x)


def over(x: Tensor, norm: Tensor) -> Tensor:
    """Quotient with 0 / 0 = 0; NaN stays NaN."""
    return x / torch.where(norm == 0, 1.0, norm)


# reference ------------------------------------------------------------------------------------------------------------


def alignment_map_ref(x: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """The definition of `alignment_map`, in plain torch: V^T x first, or V V^T in tiles where that costs less."""
    (o, i), c = aligned.shape, x.shape[1]
    if o * (i + 2 * c) < 4 * i * c:
        y, square = apply_tiled(x, aligned, base)
    else:
        t, square = adjoint(x, aligned, base)
        y = apply(t, aligned, base)
    norm = square.sqrt().to(y.dtype)
    return over(y, norm), norm


def alignment_maps_ref(xs: list[Tensor], aligned: list[Tensor], base: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The definition of `alignment_map` of lists: the images one after the other, and the norms."""
    images = [alignment_map_ref(*module) for module in zip(xs, aligned, base, strict=True)]
    return torch.cat([y.flatten() for y, _ in images]), torch.stack([norm for _, norm in images])


def alignment_penalty_ref(
    B: Tensor, A: Tensor, aligned: Tensor | None = None, base: Tensor | None = None, basis: Tensor | None = None
) -> Tensor:
    """The definition of `alignment_penalty`, in plain torch that autograd can follow: update and image are formed."""
    dtype = wide(B, A, aligned, base, basis)
    update = B.to(dtype) @ A.to(dtype)
    if aligned is None or base is None:
        image = _image(update, None, None, basis, "reference")
    else:
        v = aligned.to(dtype) - base.to(dtype)
        image = over(v @ (v.mT @ update), v.norm())
    return (update - image).square().sum()


def subspace_basis_ref(aligned: Tensor, base: Tensor, rank: int, oversample: int, power: int, seed: int) -> Tensor:
    """The definition of `subspace_basis`, in plain torch."""
    return range_finder(adjoint, apply, aligned, base, rank, oversample, power, seed)


def project_ref(x: Tensor, basis: Tensor, complement: bool, scale: float) -> None:
    """The definition of `project_`, in plain torch."""
    t, _ = adjoint(basis, x, None)
    for rows, block in blocks(x, None, t.dtype, basis.shape[1]):
        inside = basis[rows].to(t.dtype) @ t.mT
        x[rows] = scale * (block - inside if complement else inside)


# checks ---------------------------------------------------------------------------------------------------------------


def _matrices(op: str, **tensors: Tensor | None) -> None:
    """Raise unless all given tensors are floating matrices on one device."""
    for name, tensor in tensors.items():
        check.dtype(op, name, tensor, WEIGHTS)
        if tensor is not None and tensor.ndim != 2:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)}; wanted a matrix (2-D).")
    check.same_device(op, **tensors)


def _check_map(x: Tensor, aligned: Tensor, base: Tensor) -> None:
    _matrices("alignment_map", x=x, aligned=aligned, base=base)
    check.same_shape("alignment_map", aligned=aligned, base=base)
    check.shape("alignment_map", "x", x, (len(aligned), x.shape[1]), "a row for each row of aligned")


def same_length(op: str, **lists: Sequence[Tensor]) -> dict[str, list[Tensor]]:
    """The lists, after the check that each holds as many tensors as the first."""
    (first, wanted), *others = lists.items()
    for name, tensors in others:
        if isinstance(tensors, Tensor) or len(tensors) != len(wanted):
            came = "a tensor" if isinstance(tensors, Tensor) else f"a list of {len(tensors)}"
            raise ValueError(f"{op}: {name} is {came}; wanted a list of {len(wanted)}, as {first} is.")
    return {name: list(tensors) for name, tensors in lists.items()}


def _check_maps(xs: list[Tensor], aligned: list[Tensor], base: list[Tensor]) -> None:
    for at, module in enumerate(zip(xs, aligned, base, strict=True)):
        try:
            _check_map(*module)
        except (TypeError, ValueError) as error:
            raise type(error)(f"{error} (module {at} of the list)") from None


def check_update(op: str, B: Tensor, A: Tensor | None, aligned: Tensor, base: Tensor) -> None:
    """Raise unless B and A fit each other and the weights."""
    _matrices(op, B=B, A=A, aligned=aligned, base=base)
    check.same_shape(op, aligned=aligned, base=base)
    if A is None:
        check.shape(op, "B", B, aligned.shape, "the whole update, as A is None")
    else:
        check.shape(op, "B", B, (len(aligned), len(A)), "[o, r] beside A [r, i]")
        check.shape(op, "A", A, (len(A), aligned.shape[1]), "[r, i]")


def _check_penalty(B: Tensor, A: Tensor, aligned: Tensor | None, base: Tensor | None, basis: Tensor | None) -> None:
    op = "alignment_penalty"
    if basis is None:
        check.needed(op, "the alignment map (there is no basis)", aligned=aligned, base=base)
    elif aligned is not None or base is not None:
        raise ValueError(f"{op}: basis is given beside aligned or base; pass the basis, or both weights.")
    else:
        _matrices(op, B=B, A=A, basis=basis)
        check.shape(op, "B", B, (len(basis), len(A)), "[o, r] beside A [r, i] and basis [o, k]")
    if aligned is not None and base is not None:
        check_update(op, B, A, aligned, base)


def _check_basis(aligned: Tensor, base: Tensor, rank: int, oversample: int, power: int, seed: int) -> None:
    _matrices("subspace_basis", aligned=aligned, base=base)
    check.same_shape("subspace_basis", aligned=aligned, base=base)
    check.at_least("subspace_basis", "rank", rank, 1)
    check.at_least("subspace_basis", "oversample", oversample, 0)
    check.at_least("subspace_basis", "power", power, 0)
    if rank > min(aligned.shape):
        raise ValueError(f"subspace_basis: rank is {rank}; wanted at most min(o, i) = {min(aligned.shape)}. Lower it.")


def _check_project(x: Tensor, basis: Tensor, complement: bool, scale: float) -> None:
    _matrices("project_", x=x, basis=basis)
    check.shape("project_", "basis", basis, (len(x), basis.shape[1]), "a row for each row of x")


def _refuse(*arguments: object) -> str | None:
    double = any(isinstance(argument, Tensor) and argument.dtype == torch.float64 for argument in arguments)
    return "float64 runs on the reference only" if double else None


def _refuse_map(x: Tensor, aligned: Tensor, base: Tensor) -> str | None:
    if x.shape[1] > THIN:
        return f"x has more than {THIN} columns: the library's products on blocks of V are faster"
    return _refuse(x, aligned, base)


def _refuse_maps(xs: list[Tensor], aligned: list[Tensor], base: list[Tensor]) -> str | None:
    return next(filter(None, map(_refuse_map, xs, aligned, base)), None)


def _refuse_project(x: Tensor, basis: Tensor, *_: object) -> str | None:
    return _refuse(x, basis) if x.is_contiguous() else "x is not contiguous"


# registration ---------------------------------------------------------------------------------------------------------


def _fake_map(x: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    dtype = wide(x, aligned, base)
    return x.new_empty(x.shape, dtype=dtype), x.new_empty((), dtype=dtype)


def _fake_maps(xs: list[Tensor], aligned: list[Tensor], base: list[Tensor]) -> tuple[Tensor, Tensor]:
    dtype = wide(*xs, *aligned, *base)
    return xs[0].new_empty(sum(x.numel() for x in xs), dtype=dtype), xs[0].new_empty(len(xs), dtype=dtype)


_alignment_map = register(
    "alignment_map(Tensor x, Tensor aligned, Tensor base, str backend) -> (Tensor, Tensor)",
    check=_check_map,
    fake=_fake_map,
    routes=(
        Route("triton", lazily("curvkern.kernels.subspace:alignment_map"), _refuse_map),
        Route("reference", alignment_map_ref),
    ),
)

_alignment_maps = register(
    "alignment_maps(Tensor[] xs, Tensor[] aligned, Tensor[] base, str backend) -> (Tensor, Tensor)",
    check=_check_maps,
    fake=_fake_maps,
    routes=(
        Route("triton", lazily("curvkern.kernels.subspace:alignment_maps"), _refuse_maps),
        Route("reference", alignment_maps_ref),
    ),
)

_triton_products = (lazily("curvkern.kernels.subspace:adjoint"), lazily("curvkern.kernels.subspace:apply"))
_subspace_basis = register(
    "subspace_basis(Tensor aligned, Tensor base, int rank, int oversample, int power, int seed, str backend) -> Tensor",
    check=_check_basis,
    fake=lambda aligned, base, rank, *_: aligned.new_empty(len(aligned), rank, dtype=wide(aligned, base)),
    routes=(
        Route("triton", functools.partial(range_finder, *_triton_products), _refuse),
        Route("reference", subspace_basis_ref),
    ),
)

_project = register(
    "project_(Tensor(a!) x, Tensor basis, bool complement, float scale, str backend) -> ()",
    check=_check_project,
    routes=(
        Route("triton", lazily("curvkern.kernels.subspace:project"), _refuse_project),
        Route("reference", project_ref),
    ),
)

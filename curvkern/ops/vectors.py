"""Lists of tensors as one long vector: dot_list, norm_list, axpby_list_, lerp_list_, surgery_list_.

One native call or one launch for the whole list, so that hundreds of parameters cost little more than their bytes.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from curvkern.backend import check, launch
from curvkern.backend.dispatch import Route, lazily, passes_by
from curvkern.backend.register import register
from curvkern.ops.mix import axpby_ref
from curvkern.ops.mix_passes import coefficients
from curvkern.ops.score import WEIGHTS

#: Below this squared norm a safety gradient has no direction.
NO_GRADIENT = 1e-9


def dot_list(xs: Sequence[Tensor], ys: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    r"""The dot product of two lists as long vectors, :math:`\sum_k \langle x_k, y_k\rangle`.

    Args:
        xs: any shapes; float32, float16, bfloat16 (reference: float64 too), mixed at will.
        ys: for each of ``xs`` one of its shape.
        backend: see `use`.

    Returns:
        float64 scalar on the tensors' device, which is not waited for; 0 on the CPU for empty lists.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Deterministic: products and short sums in float32, everything beyond in float64, in a fixed order.
    """
    return _sums_of("dot_list", xs, ys, backend)[0]


def norm_list(xs: Sequence[Tensor], *, backend: str = "auto") -> Tensor:
    r"""The Euclidean norm of a list as one long vector, :math:`\sqrt{\sum_k |x_k|^2}`.

    Args:
        xs: any shapes; float32, float16, bfloat16 (reference: float64 too), mixed at will.
        backend: see `use`.

    Returns:
        float64 scalar on the tensors' device, which is not waited for; 0 on the CPU for an empty list.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Deterministic, as `dot_list`. Squares are float32: magnitudes above 1e19 overflow, below 1e-23 vanish.
    """
    return _sums_of("norm_list", xs, (), backend)[1].sqrt()


def axpby_list_(
    ys: Sequence[Tensor], a: float | Tensor, xs: Sequence[Tensor], b: float | Tensor, *, backend: str = "auto"
) -> Sequence[Tensor]:
    r"""In place :math:`y_k \leftarrow a x_k + b y_k` for every k: `axpby_` on lists.

    Args:
        ys: any shapes; float32, float16, bfloat16 (reference: float64 too); edited.
        a: a number, or a scalar tensor, which is not waited for. 0 leaves ``xs`` out, whatever they hold.
        xs: for each of ``ys`` one of its shape; any of these dtypes.
        b: like ``a``.
        backend: see `use`.

    Returns:
        ``ys``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Float32 inside, one rounding. Deterministic; the same bits from every backend.
    """
    if _edited_directly("axpby_list_", ys, xs, [a, b], backend):
        return ys
    _check_pairs("axpby_list_", ("ys", ys), ("xs", xs))
    if ys:
        _axpby_list(list(ys), list(xs), coefficients([a, b], *ys), backend)
    return ys


def lerp_list_(
    shadow: Sequence[Tensor], xs: Sequence[Tensor], weight: float | Tensor, *, backend: str = "auto"
) -> Sequence[Tensor]:
    r"""In place :math:`m_k \leftarrow m_k + w (x_k - m_k)`: the step of an exponential moving average, w = 1 - decay.

    The average of parameters that keeps fine-tuning safe (Kim et al., arXiv 2508.12531). The shadow is float32: in
    bfloat16 an increment is mostly less than half a unit in the last place and the average would stand still.

    Args:
        shadow: any shapes, float32 (reference: float64 too); edited.
        xs: for each of ``shadow`` one of its shape; float32, float16, bfloat16.
        weight: a number, or a scalar tensor, which is not waited for. At most 0, or NaN: nothing moves; 1 or more:
            ``shadow`` becomes ``xs``, exactly.
        backend: see `use`.

    Returns:
        ``shadow``.

    Raises:
        TypeError, ValueError: arguments that do not fit, a shadow of fewer bits.
        RuntimeError: an input requires grad under grad mode.

    Deterministic; the same bits from every backend.
    """
    if _edited_directly("lerp_list_", shadow, xs, [weight], backend):
        return shadow
    _check_pairs("lerp_list_", ("shadow", shadow), ("xs", xs))
    if shadow:
        _lerp_list(list(shadow), list(xs), coefficients([weight], *shadow), backend)
    return shadow


def surgery_list_(
    g_user: Sequence[Tensor], g_safe: Sequence[Tensor], rho: float = 1.0, *, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    r"""SafeGrad's gradient surgery in place (arXiv 2508.07172, eqs. 3 to 5), over all parameters as one vector.

    With :math:`c = \langle g_u, g_s\rangle`: where the gradients conflict, :math:`c < 0` and :math:`|g_s|^2 > 10^{-9}`,
    the user's loses its part against the safe one's; then the safe one is added:

    .. math:: g_u \leftarrow g_u - [conflict] \frac{c}{|g_s|^2} g_s + \rho g_s

    Args:
        g_user: gradients of the user's loss, any shapes; float32, float16, bfloat16 (reference: float64 too); edited.
        g_safe: for each of ``g_user`` the gradient of the alignment loss, of its shape.
        rho: how much of the safe gradient is added; 0: projection alone.
        backend: see `use`.

    Returns:
        (conflict, cosine): bool and float64 scalars on the device; the cosine is that of before, 0 where a norm is 0.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Two passes: sums as in `dot_list`, then the edit in float32 with one rounding. Deterministic; does not wait for the
    device.
    """
    dot, user, safe = _sums_of("surgery_list_", g_user, g_safe, backend).unbind()
    conflict = (dot < 0) & (safe > NO_GRADIENT)
    share = rho - torch.where(conflict, dot / safe, 0.0)
    axpby_list_(g_user, share, g_safe, 1.0, backend=backend)
    norms = user.sqrt() * safe.sqrt()
    return conflict, torch.where(norms > 0, dot / norms, 0.0)


def _sums_of(op: str, xs: Sequence[Tensor], ys: Sequence[Tensor], backend: str) -> Tensor:
    """float64 [3]: <x, y>, <x, x>, <y, y>."""
    found = _sums_directly(op, xs, None if op == "norm_list" else ys, backend)
    if found is not None:
        return found
    left, right = ("g_user", "g_safe") if op == "surgery_list_" else ("xs", "ys")
    _check_pairs(op, (left, xs), (right, ys if op != "norm_list" else xs))
    return _list_sums(list(xs), list(ys), backend) if xs else torch.zeros(3, dtype=torch.float64)


# plain tensors on the CPU ---------------------------------------------------------------------------------------------


def _edited_directly(
    op: str, ys: Sequence[Tensor], xs: Sequence[Tensor], numbers: list[float | Tensor], backend: str
) -> bool:
    """Edit without torch's dispatcher, where these lists allow it: it and the checks cost more than short lists do."""
    table = launch.pair_table(xs, ys) if ys and passes_by(op, backend) else None
    if table is None or ys[0].is_inference() or (op == "lerp_list_" and not table.only_float32):
        return False
    increment_version(ys)
    known = [number for number in numbers if not isinstance(number, Tensor)]
    launch.edit_pairs(_LAUNCHERS[op], table, known if len(known) == len(numbers) else coefficients(numbers, ys[0]))
    return True


def _sums_directly(op: str, xs: Sequence[Tensor], ys: Sequence[Tensor] | None, backend: str) -> Tensor | None:
    """What `_list_sums` finds, or None, as `_edited_directly`."""
    table = launch.pair_table(xs, ys) if xs and passes_by(op, backend) else None
    return None if table is None else _summed(table.address, table.tensors, table.chunks)


def _summed(table: int | Tensor, tensors: int, chunks: int) -> Tensor:
    partial = torch.empty(chunks, 3, dtype=torch.float64)
    launch.native_op("vectors_sums", CPU, partial, table, tensors, chunks)
    return partial.sum(0)


CPU = torch.device("cpu")
_LAUNCHERS = {"axpby_list_": "vectors_axpby_cpu", "lerp_list_": "vectors_lerp_cpu"}

# reference ------------------------------------------------------------------------------------------------------------


def dot_list_ref(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """The definition of `dot_list`, in float64."""
    total = torch.zeros((), dtype=torch.float64, device=xs[0].device if xs else "cpu")
    for x, y in zip(xs, ys, strict=True):
        total = total + (x.double() * y.double()).sum()
    return total


def norm_list_ref(xs: Sequence[Tensor]) -> Tensor:
    """The definition of `norm_list`, in float64."""
    return dot_list_ref(xs, xs).sqrt()


def axpby_list_ref(ys: Sequence[Tensor], a: float | Tensor, xs: Sequence[Tensor], b: float | Tensor) -> None:
    """The definition of `axpby_list_`."""
    for y, x in zip(ys, xs, strict=True):
        axpby_ref(y, a, x, b)


def lerp_list_ref(shadow: Sequence[Tensor], xs: Sequence[Tensor], weight: float | Tensor) -> None:
    """The definition of `lerp_list_`."""
    for m, x in zip(shadow, xs, strict=True):
        w, to = coefficients([weight], m)[0], x.to(m.dtype)
        m.copy_(torch.where(w >= 1, to, torch.where(w > 0, m + w * (to - m), m)))


def surgery_list_ref(g_user: Sequence[Tensor], g_safe: Sequence[Tensor], rho: float = 1.0) -> tuple[Tensor, Tensor]:
    """The definition of `surgery_list_`."""
    return surgery_list_(g_user, g_safe, rho, backend="reference")


def _list_sums_ref(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    if not ys:
        squares = dot_list_ref(xs, xs)
        return torch.stack([0 * squares, squares, 0 * squares])
    return torch.stack([dot_list_ref(a, b) for a, b in ((xs, ys), (xs, xs), (ys, ys))])


# checks ---------------------------------------------------------------------------------------------------------------


def _check_pairs(op: str, first: tuple[str, Sequence[Tensor]], second: tuple[str, Sequence[Tensor]]) -> None:
    """Raise unless the two lists pair up: equally long, shape by shape, one device, floating dtypes, no grad."""
    (name, lefts), (other, rights) = first, second
    if len(lefts) != len(rights):
        raise ValueError(f"{op}: {other} has {len(rights)} tensors but {name} has {len(lefts)}; they must pair up.")
    edited = _SHADOWS if op == "lerp_list_" else _FLOATS
    if _fit(lefts, rights, edited):
        return
    for at, (left, right) in enumerate(zip(lefts, rights, strict=True)):
        named = {f"{name}[{at}]": left, f"{other}[{at}]": right}
        for label, tensor in named.items():
            check.dtype(op, label, tensor, WEIGHTS)
        if left.dtype not in edited:
            hint = "A moving average in fewer bits does not move: keep the shadow in float32."
            check.dtype(op, f"{name}[{at}]", left, (torch.float32, torch.float64), hint)
        check.same_shape(op, **named)
        check.same_device(op, **{f"{name}[0]": lefts[0], **named})
        check.no_grad(op, **named)


_FLOATS, _SHADOWS = frozenset(WEIGHTS), frozenset((torch.float32, torch.float64))


def _fit(lefts: Sequence[Tensor], rights: Sequence[Tensor], edited: frozenset[torch.dtype]) -> bool:
    """Whether all is as it should be: a tenth of a microsecond a tensor and question, where each check costs more."""
    return (
        {t.dtype for t in lefts} <= edited
        and {t.dtype for t in rights} <= _FLOATS
        and len({t.device for t in (*lefts, *rights)}) <= 1
        and [t.shape for t in lefts] == [t.shape for t in rights]
        and not (torch.is_grad_enabled() and any(t.requires_grad for t in (*lefts, *rights)))
    )


def _nothing(*_: object) -> None:
    """The public functions have checked: lists are long, and once is enough."""


def _refuse(edited: list[Tensor], others: list[Tensor], *_: Tensor) -> str | None:
    """What every kernel asks: no float64, and contiguous tensors where it writes."""
    return "float64 runs on the reference only" if torch.float64 in {t.dtype for t in (*edited, *others)} else None


def _refuse_edit(edited: list[Tensor], others: list[Tensor], *_: Tensor) -> str | None:
    for at, tensor in enumerate(edited):
        if not tensor.is_contiguous():
            return f"tensor {at} of the edited list is not contiguous"
    return _refuse(edited, others)


# kernels --------------------------------------------------------------------------------------------------------------


def _rows(xs: Sequence[Tensor], ys: Sequence[Tensor]) -> list[int]:
    """For each tensor address of x, address of y or 0, elements, dtype codes of x and y, flat. All are contiguous."""
    rows: list[int] = []
    code = launch.DTYPE_CODES
    if not ys:
        for x in xs:
            rows += (x.data_ptr(), 0, x.numel(), code[x.dtype], 0)
    for x, y in zip(xs if ys else (), ys, strict=True):
        rows += (x.data_ptr(), y.data_ptr(), x.numel(), code[x.dtype], code[y.dtype])
    return rows


def _table(rows: list[int]) -> tuple[Tensor, int]:
    """The table of csrc/launch.h, and how many chunks there are."""
    table = torch.frombuffer(array("q", rows), dtype=torch.int64).view(-1, 5)  # torch.tensor is ten times slower
    chunk = launch.constant("VECTORS_CHUNK")
    counts = (table[:, 2:3] + chunk - 1) // chunk
    ends = counts.cumsum(0)
    return torch.cat([table, ends - counts], 1), int(ends[-1])


def _native_sums(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    dense, others = [x.contiguous() for x in xs], [y.contiguous() for y in ys]
    table, chunks = _table(_rows(dense, others))
    return _summed(table, len(xs), chunks)


def _native_edit(launcher: str) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    def run(ys: list[Tensor], xs: list[Tensor], numbers: Tensor) -> None:
        dense = [x.contiguous() for x in xs]
        table, chunks = _table(_rows(dense, ys))
        launch.native_op(launcher, ys[0].device, table, numbers, len(ys), chunks)

    return run


def _triton_sums(xs: list[Tensor], ys: list[Tensor]) -> Tensor:
    dense, others = [x.contiguous() for x in xs], [y.contiguous() for y in ys]
    return lazily("curvkern.kernels.vectors:sums")(_rows(dense, others), xs[0].device)


def _triton_edit(rule: str) -> Callable[[list[Tensor], list[Tensor], Tensor], None]:
    def run(ys: list[Tensor], xs: list[Tensor], numbers: Tensor) -> None:
        dense = [x.contiguous() for x in xs]
        lazily("curvkern.kernels.vectors:edit")(_rows(dense, ys), numbers, rule)

    return run


_list_sums = register(
    "list_sums(Tensor[] xs, Tensor[] ys, str backend) -> Tensor",
    check=_nothing,
    fake=lambda xs, _: xs[0].new_empty(3, dtype=torch.float64),
    routes=(
        Route("cpu", _native_sums, _refuse),
        Route("triton", _triton_sums, _refuse),
        Route("reference", _list_sums_ref),
    ),
)

_axpby_list = register(
    "axpby_list_(Tensor(a!)[] ys, Tensor[] xs, Tensor coefficients, str backend) -> ()",
    check=_nothing,
    routes=(
        Route("cpu", _native_edit("vectors_axpby"), _refuse_edit),
        Route("triton", _triton_edit("axpby"), _refuse_edit),
        Route("reference", lambda ys, xs, numbers: axpby_list_ref(ys, numbers[0], xs, numbers[1])),
    ),
)

_lerp_list = register(
    "lerp_list_(Tensor(a!)[] shadow, Tensor[] xs, Tensor weight, str backend) -> ()",
    check=_nothing,
    routes=(
        Route("cpu", _native_edit("vectors_lerp"), _refuse_edit),
        Route("triton", _triton_edit("lerp"), _refuse_edit),
        Route("reference", lambda shadow, xs, numbers: lerp_list_ref(shadow, xs, numbers[0])),
    ),
)

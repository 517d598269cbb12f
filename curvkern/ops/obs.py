r"""Optimal Brain Surgeon on a delta: fix some weights, and let the free ones make up for it, column by column."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from curvkern.backend import check, launch
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register

Order = Literal["natural", "fixed_first"]
Choose = Callable[[slice, Tensor], Tensor]

SUMS = (torch.float32, torch.float64)
WIDEST = 128  # columns of a panel; kObsPanel in csrc/launch.h


def obs_sweep_(
    delta: Tensor,
    mask: Tensor | Choose,
    inverse_factor: Tensor,
    *,
    target: Tensor | None = None,
    block: int = 128,
    order: Order = "natural",
    backend: str = "auto",
) -> Tensor:
    r"""Set some entries of each row to a target and spread the error over the free entries to their right, in place.

    Columns go left to right. At column j a fixed entry has the error :math:`e = (\delta_j - \tau_j) / U_{jj}`, and
    :math:`\delta_{j:} \mathrel{-}= e\,U_{j,j:}`: it becomes :math:`\tau_j`, and later columns make up for it with the
    least rise of :math:`\mathrm{tr}(\Delta H \Delta^\top)`. That is optimal where a row's fixed entries are a prefix of
    the columns; else free entries on the left stay as they are, what was spread onto later fixed entries is lost, and a
    row can end worse than by fixing alone. ``order="fixed_first"`` visits columns with many fixed entries first, for
    which the factor is made anew.

    Args:
        delta: [o, i], float32 (reference: float64 too); edited.
        mask: bool [o, i], True where fixed. Or a function of a panel's column slice and its values as they are after
            all earlier panels, which returns bool [o, columns]: a mask decided between trailing updates.
        inverse_factor: U [i, i], upper triangular, of delta's dtype; see `curvkern.inverse_factor`.
        target: [o, i] like delta; None: 0.
        block: columns of a panel, 1 to 128. A panel is one launch and its trailing update one product; another size
            changes only the rounding.
        order: ``"natural"`` or ``"fixed_first"`` (not with a function): by how many rows fix a column; costs a product
            and a Cholesky factorisation of [i, i].
        backend: see `use`.

    Returns:
        ``delta``.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Deterministic. Extra memory: one panel of delta. Source: Hassibi and Stork 1993; the sweep by columns: Frantar and
    Alistarh (arXiv:2210.17323, 2301.00774); on a delta: Wu et al. (arXiv:2412.11041), Lu et al. (arXiv:2505.12038).
    """
    check.no_grad("obs_sweep_", delta=delta, inverse_factor=inverse_factor, target=target)
    check.one_of("obs_sweep_", "order", order, get_args(Order))
    check.at_least("obs_sweep_", "block", block, 1)
    check.dtype("obs_sweep_", "delta", delta, SUMS)
    if delta.ndim != 2:
        raise ValueError(f"obs_sweep_: delta has shape {list(delta.shape)}; wanted [o, i].")
    check.same_dtype("obs_sweep_", delta=delta, inverse_factor=inverse_factor, target=target)
    i = delta.shape[1]
    check.shape("obs_sweep_", "inverse_factor", inverse_factor, (i, i), "[i, i] for delta [o, i]")
    if target is not None:
        check.same_shape("obs_sweep_", delta=delta, target=target)
    if isinstance(mask, Tensor):
        check.dtype("obs_sweep_", "mask", mask, (torch.bool,))
        check.same_shape("obs_sweep_", delta=delta, mask=mask)
        check.same_device("obs_sweep_", delta=delta, mask=mask, inverse_factor=inverse_factor, target=target)
    if order == "fixed_first":
        if not isinstance(mask, Tensor):
            raise ValueError("obs_sweep_: order='fixed_first' sorts by the mask; mask is a function.")
        first = mask.sum(0).argsort(descending=True, stable=True)
        factor = _reordered(inverse_factor, first)
        sorted_ = delta[:, first]
        _sweep(sorted_, mask[:, first], factor, None if target is None else target[:, first], block, backend)
        delta[:, first] = sorted_
    else:
        _sweep(delta, mask, inverse_factor, target, block, backend)
    return delta


def _sweep(
    delta: Tensor, mask: Tensor | Choose, factor: Tensor, target: Tensor | None, block: int, backend: str
) -> None:
    block = min(block, WIDEST)
    for left in range(0, delta.shape[1], block):
        panel = slice(left, min(left + block, delta.shape[1]))
        fixed = mask[:, panel] if isinstance(mask, Tensor) else _chosen(mask, panel, delta)
        errors = delta.new_empty(len(delta), panel.stop - left)
        to = None if target is None else target[:, panel]
        _obs_panel(delta[:, panel], errors, fixed, to, factor[panel, panel], backend)
        if panel.stop < delta.shape[1]:
            delta[:, panel.stop :].addmm_(errors, factor[panel, panel.stop :], alpha=-1)


def _chosen(choose: Choose, panel: slice, delta: Tensor) -> Tensor:
    fixed = choose(panel, delta[:, panel])
    check.dtype("obs_sweep_", "what mask returns", fixed, (torch.bool,))
    check.shape("obs_sweep_", "what mask returns", fixed, (len(delta), panel.stop - panel.start), "[o, columns]")
    return fixed


def _reordered(factor: Tensor, order: Tensor) -> Tensor:
    """The factor of the inverse whose rows and columns are reordered; H^-1 = U^T U."""
    inverse = factor.T @ factor
    found, failed = torch.linalg.cholesky_ex(inverse[order][:, order], upper=True)
    if failed:
        raise ValueError("obs_sweep_: inverse_factor^T inverse_factor is not positive definite; raise the damping.")
    return found


# reference ------------------------------------------------------------------------------------------------------------


def obs_sweep_ref(delta: Tensor, mask: Tensor, inverse_factor: Tensor, target: Tensor | None = None) -> None:
    """The definition of `obs_sweep_`, in plain torch: column after column, in their own order."""
    errors = torch.empty_like(delta)
    obs_panel_ref(delta, errors, mask, target, inverse_factor)


def obs_panel_ref(panel: Tensor, errors: Tensor, mask: Tensor, target: Tensor | None, triangle: Tensor) -> None:
    """One panel [o, w] with its part of the factor [w, w]; errors [o, w] are what later columns are to make up for."""
    for j in range(panel.shape[1]):
        wanted = torch.zeros_like(panel[:, j]) if target is None else target[:, j]
        errors[:, j] = torch.where(mask[:, j], (panel[:, j] - wanted) / triangle[j, j], 0.0)
        panel[:, j + 1 :] -= errors[:, j : j + 1] * triangle[j, j + 1 :]
        panel[:, j] = torch.where(mask[:, j], wanted, panel[:, j])


# native ---------------------------------------------------------------------------------------------------------------


def _native(panel: Tensor, errors: Tensor, mask: Tensor, target: Tensor | None, triangle: Tensor) -> None:
    mask, triangle = mask.contiguous(), triangle.contiguous()
    target = None if target is None else target.contiguous()
    launch.native_op("obs", panel.device, panel, errors, mask, target, triangle, *panel.shape, panel.stride(0))


def _check_panel(panel: Tensor, errors: Tensor, mask: Tensor, target: Tensor | None, triangle: Tensor) -> None:
    check.same_device("obs_sweep_", delta=panel, mask=mask, target=target, inverse_factor=triangle)


def _refuse(panel: Tensor, *_: object) -> str | None:
    if panel.dtype == torch.float64:
        return "float64 runs on the reference only"
    return None if panel.shape[1] < 2 or panel.stride(1) == 1 else "delta's columns are not contiguous"


_obs_panel = register(
    "obs_panel_(Tensor(a!) panel, Tensor(b!) errors, Tensor mask, Tensor? target, Tensor triangle, str backend) -> ()",
    check=_check_panel,
    routes=(
        Route("cpu", _native, _refuse),
        Route("triton", lazily("curvkern.kernels.obs:obs_panel"), _refuse),
        Route("reference", obs_panel_ref),
    ),
)

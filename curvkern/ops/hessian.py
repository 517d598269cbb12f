"""Diagonals of second derivatives from random probes: rademacher_, hutchinson_, gnb_diag_."""

from __future__ import annotations

import torch
from torch import Tensor

from curvkern.backend import check, launch
from curvkern.backend.dispatch import Route, lazily
from curvkern.backend.register import register
from curvkern.ops.philox import check_stream, signs_ref
from curvkern.ops.score import WEIGHTS


def rademacher_(out: Tensor, *, seed: int, offset: int = 0, backend: str = "auto") -> Tensor:
    """Fill with independent +1 and -1, each with probability one half.

    Element e = offset + its row-major position is -1 where bit e % 32 (0: the lowest) of word e // 32 of the stream
    is set; word w is word w % 4 of Philox 4x32-10 under the key ``seed`` and the counter w // 4. A tensor filled in
    parts, each with its offset, equals one filled at once.

    Args:
        out: float32, float16, bfloat16 (reference: float64 too), any shape; overwritten.
        seed: a 64-bit integer.
        offset: position of the first element in the stream, at least 0.
        backend: see `use`.

    Returns:
        ``out``; the same bits from every backend, on every device.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: out requires grad under grad mode.

    Source: Philox by Salmon et al. (SC 2011).
    """
    check.no_grad("rademacher_", out=out)
    check_stream("rademacher_", seed, offset)
    _rademacher(out, seed, offset, backend)
    return out


def hutchinson_(
    diag: Tensor, hvp: Tensor, *, seed: int, offset: int = 0, scale: float = 1.0,
    block: tuple[int, int] | None = None, backend: str = "auto",
) -> Tensor:  # fmt: skip
    r"""Add a probe of a Hessian's diagonal: :math:`d \leftarrow d + s\,v \odot Hv`.

    v is what `rademacher_` writes for the same seed and offset; it is made again here and never stored. Over seeds the
    expectation of :math:`v \odot Hv` is the diagonal; a single value may be negative.

    Args:
        diag: float32 (reference: float64 too), contiguous, like ``hvp``; edited. With ``block`` one number per tile,
            [ceil(o / bo), ceil(i / bi)].
        hvp: Hv, the Hessian's product with v; float32, float16, bfloat16 (reference: float64 too).
        seed: of v.
        offset: of v.
        scale: s, for example one over the number of probes.
        block: (bo, bi), for hvp [o, i]: add the tile's mean of the signed product, an unbiased average of the diagonal
            over the tile. The mean of magnitudes that AdaHessian takes is biased upwards.
        backend: see `use`.

    Returns:
        ``diag``. Float32 without fused multiply-adds: the same bits from every backend, but for the order of the
        tiles' sums (float64 on the CPU, float32 in Triton). Deterministic.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Source: Hutchinson (1989), Bekas et al. (2007); Yao et al., AdaHessian (2006.00719), spatial averages.
    """
    check.no_grad("hutchinson_", diag=diag, hvp=hvp)
    check_stream("hutchinson_", seed, offset)
    if block is not None:
        check.at_least("hutchinson_", "block", min(block), 1)
    _hutchinson(diag, hvp, seed, offset, scale, *(block or (0, 0)), backend)
    return diag


def gnb_diag_(diag: Tensor, grad: Tensor, batch: int, *, backend: str = "auto") -> Tensor:
    r"""Add Sophia's Gauss-Newton-Bartlett estimate of a diagonal: :math:`d \leftarrow d + B\,g \odot g`.

    g is the gradient of the mean of B cross entropies whose labels were sampled from the model: only then do the
    products of different samples vanish in expectation, and the result is the diagonal of the Gauss-Newton matrix of
    the mean loss. With labels from data it is neither that nor the empirical Fisher. Take g before it is clipped.
    `fisher_diag_` of sampled labels has the same expectation and less variance.

    Args:
        diag: float32 (reference: float64 too), like ``grad``; edited.
        grad: g; float32, float16, bfloat16 (reference: float64 too).
        batch: B, how many terms the mean has: for a language model its tokens.
        backend: see `use`.

    Returns:
        ``diag``, in float32 without fused multiply-adds. Deterministic.

    Raises:
        TypeError, ValueError: arguments that do not fit.
        RuntimeError: an input requires grad under grad mode.

    Source: Liu et al., Sophia (2305.14342), algorithm 2 (GNB).
    """
    check.no_grad("gnb_diag_", diag=diag, grad=grad)
    check.at_least("gnb_diag_", "batch", batch, 1)
    _gnb_diag(diag, grad, batch, backend)
    return diag


# reference ------------------------------------------------------------------------------------------------------------


def rademacher_ref(out: Tensor, seed: int, offset: int) -> None:
    """The definition of `rademacher_`, in plain torch."""
    out.copy_(signs_ref(seed, out.numel(), offset, out.device).reshape(out.shape))


def hutchinson_ref(
    diag: Tensor, hvp: Tensor, seed: int, offset: int, scale: float, tile_rows: int, tile_cols: int
) -> None:
    """The definition of `hutchinson_`, in plain torch; no tiles where ``tile_rows`` is 0."""
    signs = signs_ref(seed, hvp.numel(), offset, hvp.device).reshape(hvp.shape).to(diag.dtype)
    product = signs * hvp.to(diag.dtype)
    if tile_rows == 0:
        diag += scale * product
    elif diag.numel():
        diag += scale * _tile_sums(product, tile_rows, tile_cols) / _tile_sums(signs.abs(), tile_rows, tile_cols)


def gnb_diag_ref(diag: Tensor, grad: Tensor, batch: int) -> None:
    """The definition of `gnb_diag_`, in plain torch."""
    diag += batch * grad.to(diag.dtype).square()


def _tile_sums(x: Tensor, rows: int, cols: int) -> Tensor:
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % cols, 0, -x.shape[0] % rows))
    return padded.unflatten(1, (-1, cols)).unflatten(0, (-1, rows)).sum((1, 3))


# checks ---------------------------------------------------------------------------------------------------------------


def _check_rademacher(out: Tensor, seed: int, offset: int) -> None:
    check.dtype("rademacher_", "out", out, WEIGHTS)


def _check_hutchinson(
    diag: Tensor, hvp: Tensor, seed: int, offset: int, scale: float, tile_rows: int, tile_cols: int
) -> None:
    _check_pair("hutchinson_", diag, hvp=hvp)
    if tile_rows == 0:
        check.same_shape("hutchinson_", hvp=hvp, diag=diag)
        return
    if hvp.ndim != 2:
        raise ValueError(f"hutchinson_: block is given, so hvp must be [o, i]; it has shape {list(hvp.shape)}.")
    wanted = (-(-hvp.shape[0] // tile_rows), -(-hvp.shape[1] // tile_cols))
    check.shape("hutchinson_", "diag", diag, wanted, "one number per tile")


def _check_gnb_diag(diag: Tensor, grad: Tensor, batch: int) -> None:
    _check_pair("gnb_diag_", diag, grad=grad)
    check.same_shape("gnb_diag_", grad=grad, diag=diag)


def _check_pair(op: str, diag: Tensor, **read: Tensor) -> None:
    """A wide sum, and what is added to it."""
    check.dtype(op, "diag", diag, (torch.float32, torch.float64))
    for name, tensor in read.items():
        check.dtype(op, name, tensor, WEIGHTS)
    check.same_device(op, diag=diag, **read)


def _refuse(*arguments: object) -> str | None:
    """What every kernel asks: an edited tensor (the first) that lies densely, and kernel dtypes."""
    edited = arguments[0]
    if any(isinstance(argument, Tensor) and argument.dtype == torch.float64 for argument in arguments):
        return "float64 runs on the reference only"
    dense = isinstance(edited, Tensor) and edited.is_contiguous()
    return None if dense else "the edited tensor is not contiguous"


# native ---------------------------------------------------------------------------------------------------------------


def _native_rademacher(out: Tensor, seed: int, offset: int) -> None:
    launch.native_op("rademacher", out.device, out, out.numel(), seed, offset, out.dtype)


def _native_hutchinson(
    diag: Tensor, hvp: Tensor, seed: int, offset: int, scale: float, tile_rows: int, tile_cols: int
) -> None:
    hvp, how = hvp.contiguous(), (seed, offset, scale, hvp.dtype)
    if tile_rows == 0:
        launch.native_op("hutchinson", diag.device, diag, hvp, hvp.numel(), *how)
    else:
        launch.native_op("hutchinson_tiles", diag.device, diag, hvp, *hvp.shape, tile_rows, tile_cols, *how)


def _native_gnb_diag(diag: Tensor, grad: Tensor, batch: int) -> None:
    launch.native_op("gnb_diag", diag.device, diag, grad.contiguous(), grad.numel(), float(batch), grad.dtype)


_rademacher = register(
    "rademacher_(Tensor(a!) out, int seed, int offset, str backend) -> ()",
    check=_check_rademacher,
    routes=(
        Route("cpu", _native_rademacher, _refuse),
        Route("triton", lazily("curvkern.kernels.hessian:rademacher"), _refuse),
        Route("reference", rademacher_ref),
    ),
)

_hutchinson = register(
    "hutchinson_(Tensor(a!) diag, Tensor hvp, int seed, int offset, float scale, int tile_rows, int tile_cols, "
    "str backend) -> ()",
    check=_check_hutchinson,
    routes=(
        Route("cpu", _native_hutchinson, _refuse),
        Route("triton", lazily("curvkern.kernels.hessian:hutchinson"), _refuse),
        Route("reference", hutchinson_ref),
    ),
)

_gnb_diag = register(
    "gnb_diag_(Tensor(a!) diag, Tensor grad, int batch, str backend) -> ()",
    check=_check_gnb_diag,
    routes=(
        Route("cpu", _native_gnb_diag, _refuse),
        Route("triton", lazily("curvkern.kernels.hessian:gnb_diag"), _refuse),
        Route("reference", gnb_diag_ref),
    ),
)

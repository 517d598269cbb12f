"""alignment_map, subspace_basis's products and project_ in Triton: two sweeps over the weights, V formed in registers.

`adjoint` is the first sweep, T = V^T X, and `apply` the second, Y = V T. A program owns a strip of the output and a
share of the sum; shares are summed afterwards in a fixed order (no atomics).

A float32 product is six bfloat16 ones (``bf16x6``). Emulated for 4096 rows its error is 5e-7 of the largest element, as
that of float32 arithmetic, which would take longer than the bytes; TF32's is 2e-4. W_a^T X - W_u^T X would need no V,
but cancels: 1e-5 where V is 5 % of the weights.
"""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from curvkern.kernels import Ahead

STRIP = 128  # rows or columns of the output that a program owns
STEP = 32  # how much of the sum it takes at a time
PROGRAMS = 264  # two for each of an H200's 132 multiprocessors; fixed, so that sums do not depend on the GPU
WARPS = 8
PRECISION = "ieee" if knobs.runtime.interpret else "bf16x6"  # the interpreter knows no bf16x6; it is exact


@triton.jit
def tile(ptr, less_ptr, row, col, rows, cols):
    """float32 [row, col] of one matrix, or of the difference of two; zeros outside."""
    offs = row.to(tl.int64)[:, None] * cols + col[None, :]
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    values = tl.load(ptr + offs, mask=inside, other=0.0).to(tl.float32)
    if less_ptr is not None:
        values -= tl.load(less_ptr + offs, mask=inside, other=0.0).to(tl.float32)
    return values


@triton.jit
def store_share(ptr, values, share, row, col, rows, cols):
    offs = (share.to(tl.int64) * rows + row)[:, None] * cols + col[None, :]
    tl.store(ptr + offs, values, mask=(row < rows)[:, None] & (col < cols)[None, :])


@triton.jit
def adjoint_kernel(
    t_ptr,
    square_ptr,
    x_ptr,
    aligned_ptr,
    base_ptr,
    rows,
    cols,
    width,
    share_rows,
    PRECISION: tl.constexpr,
    STRIP: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A share of T = V^T X [cols, width] over some rows, and of |V|^2."""
    col = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    share = tl.program_id(1)
    k = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    t = tl.zeros((STRIP, WIDTH), tl.float32)
    square = tl.zeros((STRIP,), tl.float32)
    for start in range(share * share_rows, tl.minimum((share + 1) * share_rows, rows), STEP):
        row = start + tl.arange(0, STEP)
        v = tile(aligned_ptr, base_ptr, row, col, rows, cols)
        x = tile(x_ptr, None, row, k, rows, width)
        t = tl.dot(tl.trans(v), x, t, input_precision=PRECISION)
        square += tl.sum(v * v, 0)
    store_share(t_ptr, t, share, col, k, cols, width)
    if tl.program_id(2) == 0:
        tl.store(square_ptr + share * tl.num_programs(0) + tl.program_id(0), tl.sum(square))


@triton.jit
def apply_kernel(
    y_ptr,
    t_ptr,
    aligned_ptr,
    base_ptr,
    rows,
    cols,
    width,
    share_cols,
    PRECISION: tl.constexpr,
    STRIP: tl.constexpr,
    STEP: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """A share of Y = V T [rows, width] over some columns of V."""
    row = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    share = tl.program_id(1)
    k = tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    y = tl.zeros((STRIP, WIDTH), tl.float32)
    for start in range(share * share_cols, tl.minimum((share + 1) * share_cols, cols), STEP):
        col = start + tl.arange(0, STEP)
        v = tile(aligned_ptr, base_ptr, row, col, rows, cols)
        t = tile(t_ptr, None, col, k, cols, width)
        y = tl.dot(v, t, y, input_precision=PRECISION)
    store_share(y_ptr, y, share, row, k, rows, width)


@triton.jit
def project_kernel(
    x_ptr,
    basis_ptr,
    t_ptr,
    rows,
    cols,
    rank,
    scale,
    COMPLEMENT: tl.constexpr,
    PRECISION: tl.constexpr,
    STRIP: tl.constexpr,
    COLS: tl.constexpr,
    STEP: tl.constexpr,
):
    """A tile of X <- scale U T^T, or scale (X - U T^T); t [cols, rank] is X^T U."""
    row = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    y = tl.zeros((STRIP, COLS), tl.float32)
    for start in range(0, rank, STEP):
        k = start + tl.arange(0, STEP)
        u = tile(basis_ptr, None, row, k, rows, rank)
        t = tile(t_ptr, None, col, k, cols, rank)
        y = tl.dot(u, tl.trans(t), y, input_precision=PRECISION)
    offs = row.to(tl.int64)[:, None] * cols + col[None, :]
    inside = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.load(x_ptr + offs, mask=inside, other=0.0)
    if COMPLEMENT:
        y = x.to(tl.float32) - y
    tl.store(x_ptr + offs, (scale * y).to(x.dtype), mask=inside)


def adjoint(x: Tensor, aligned: Tensor, base: Tensor | None) -> tuple[Tensor, Tensor]:
    """(V^T x [i, r], |V|_F^2 in float64) of V = aligned - base [o, i] and x [o, r]."""
    (rows, cols), width = aligned.shape, x.shape[1]
    if not (rows and cols):
        return aligned.new_zeros(cols, width, dtype=torch.float32), aligned.new_zeros((), dtype=torch.float64)
    grid, share_rows, options = _shares(cols, rows, width, aligned)
    t = torch.empty(grid[1], cols, width, dtype=torch.float32, device=x.device)
    square = torch.empty(grid[:2], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        adjoint_kernel[grid](t, square, *_dense(x, aligned, base), rows, cols, width, share_rows, **options)
    return _total(t), square.sum(dtype=torch.float64)


def apply(t: Tensor, aligned: Tensor, base: Tensor | None) -> Tensor:
    """V t [o, r] of V = aligned - base [o, i] and t [i, r]."""
    (rows, cols), width = aligned.shape, t.shape[1]
    if not (rows and cols and width):
        return aligned.new_zeros(rows, width, dtype=torch.float32)
    grid, share_cols, options = _shares(rows, cols, width, aligned)
    y = torch.empty(grid[1], rows, width, dtype=torch.float32, device=t.device)
    with torch.cuda.device_of(t):
        apply_kernel[grid](y, *_dense(t, aligned, base), rows, cols, width, share_cols, **options)
    return _total(y)


def alignment_map(x: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """`curvkern.alignment_map`."""
    t, square = adjoint(x, aligned, base)
    norm = square.sqrt().float()
    return apply(t, aligned, base).div_(torch.where(norm == 0, 1.0, norm)), norm


def project(x: Tensor, basis: Tensor, complement: bool, scale: float) -> None:
    """`curvkern.project_`; x is contiguous."""
    if x.numel() == 0:
        return
    (rows, cols), rank = x.shape, basis.shape[1]
    t, _ = adjoint(basis, x, None)
    with torch.cuda.device_of(x):
        project_kernel[(triton.cdiv(rows, STRIP), triton.cdiv(cols, 64))](
            x, basis.contiguous(), t, rows, cols, rank, scale,
            complement, PRECISION, STRIP, 64, STEP, num_warps=WARPS, num_stages=2,
        )  # fmt: skip


def _shares(strips: int, summed: int, width: int, weight: Tensor) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
    """The grid (strips, shares, column tiles), the length of a share, and the launch's options."""
    block = max(16, min(64, triton.next_power_of_2(width)))
    outer = (triton.cdiv(strips, STRIP), max(1, triton.cdiv(width, block)))  # without columns |V| is wanted still
    shares = max(1, min(PROGRAMS // (outer[0] * outer[1]), triton.cdiv(summed, 4 * STEP)))
    length = STEP * triton.cdiv(summed, STEP * shares)
    stages = 2 if weight.dtype == torch.float32 else 4  # what fits into 99 KiB of shared memory
    options = {"PRECISION": PRECISION, "STRIP": STRIP, "STEP": STEP, "WIDTH": block}
    return (
        (outer[0], triton.cdiv(summed, length), outer[1]),
        length,
        options | {"num_warps": WARPS, "num_stages": stages},
    )


def _dense(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _total(shares: Tensor) -> Tensor:
    return shares[0] if len(shares) == 1 else shares.sum(0)


def _ahead(kernel, weight: str, width: int, stages: int, *, base: bool = True) -> Ahead:
    """The adjoint or apply kernel for weights of one dtype."""
    outputs = {"t_ptr": "*fp32", "square_ptr": "*fp32", "x_ptr": "*fp32", "share_rows": "i32"}
    if kernel is apply_kernel:
        outputs = {"y_ptr": "*fp32", "t_ptr": "*fp32", "share_cols": "i32"}
    sizes = {"aligned_ptr": weight, "rows": "i32", "cols": "i32", "width": "i32"}
    constants = {"PRECISION": "bf16x6", "STRIP": STRIP, "STEP": STEP, "WIDTH": width}
    signature = outputs | sizes | ({"base_ptr": weight} if base else {})
    constants = constants if base else {**constants, "base_ptr": None}
    return Ahead(kernel, signature, constants, {"num_warps": WARPS, "num_stages": stages}, matrix=True)


def _ahead_project(x: str, complement: bool) -> Ahead:
    return Ahead(
        project_kernel,
        {"x_ptr": x, "basis_ptr": "*fp32", "t_ptr": "*fp32", "rows": "i32", "cols": "i32", "rank": "i32",
         "scale": "fp32"},
        {"COMPLEMENT": complement, "PRECISION": "bf16x6", "STRIP": STRIP, "COLS": 64, "STEP": STEP},
        {"num_warps": WARPS, "num_stages": 2},
        matrix=True,
    )  # fmt: skip


AHEAD_OF_TIME = [
    *(_ahead(kernel, "*bf16", width, 4) for kernel in (adjoint_kernel, apply_kernel) for width in (16, 64)),
    *(_ahead(kernel, "*fp32", 64, 2) for kernel in (adjoint_kernel, apply_kernel)),
    _ahead(adjoint_kernel, "*bf16", 64, 4, base=False),
    _ahead_project("*bf16", complement=True),
    _ahead_project("*fp32", complement=False),
]

"""alignment_map, subspace_basis's products and project_ in Triton: two sweeps over the weights, V formed in registers.

`adjoint` is the first sweep, T = V^T X, and `apply` the second, Y = V T. A program owns a strip of the output and a
share of the sum; shares are summed afterwards in a fixed order (no atomics). Modules of one shape go in one launch: a
table on the device holds their addresses.

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
from curvkern.kernels.tuned import launch_of

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
def module_ptr(table_ptr, module, ENTRY: tl.constexpr, ptr):
    """What ``ptr`` is of the first module, of another: x, aligned and base are entries 0, 1 and 2 of a table's row."""
    if table_ptr is None or ptr is None:
        return ptr
    else:
        return tl.multiple_of(tl.load(table_ptr + module * 3 + ENTRY).to(ptr.dtype), 16)


@triton.jit
def store_share(ptr, values, share, row, col, rows, cols):
    offs = (share.to(tl.int64) * rows + row)[:, None] * cols + col[None, :]
    tl.store(ptr + offs, values, mask=(row < rows)[:, None] & (col < cols)[None, :])


@triton.jit
def adjoint_kernel(
    t_ptr,
    square_ptr,
    table_ptr,
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
    """A share of T = V^T X [cols, width] over some rows, and of |V|^2; of module after module."""
    tiles = tl.maximum(tl.cdiv(width, WIDTH), 1)
    module = tl.program_id(2) // tiles
    x_ptr = module_ptr(table_ptr, module, 0, x_ptr)
    aligned_ptr = module_ptr(table_ptr, module, 1, aligned_ptr)
    base_ptr = module_ptr(table_ptr, module, 2, base_ptr)
    col = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    share = tl.program_id(1)
    slot = module * tl.num_programs(1) + share
    k = tl.program_id(2) % tiles * WIDTH + tl.arange(0, WIDTH)
    t = tl.zeros((STRIP, WIDTH), tl.float32)
    square = tl.zeros((STRIP,), tl.float32)
    for start in range(share * share_rows, tl.minimum((share + 1) * share_rows, rows), STEP):
        row = start + tl.arange(0, STEP)
        v = tile(aligned_ptr, base_ptr, row, col, rows, cols)
        x = tile(x_ptr, None, row, k, rows, width)
        t = tl.dot(tl.trans(v), x, t, input_precision=PRECISION)
        square += tl.sum(v * v, 0)
    store_share(t_ptr, t, slot, col, k, cols, width)
    if tl.program_id(2) % tiles == 0:
        tl.store(square_ptr + slot * tl.num_programs(0) + tl.program_id(0), tl.sum(square))


@triton.jit
def apply_kernel(
    y_ptr,
    table_ptr,
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
    """A share of Y = V T [rows, width] over some columns of V; of module after module, t [modules, cols, width]."""
    tiles = tl.cdiv(width, WIDTH)
    module = tl.program_id(2) // tiles
    t_ptr += module.to(tl.int64) * cols * width
    aligned_ptr = module_ptr(table_ptr, module, 1, aligned_ptr)
    base_ptr = module_ptr(table_ptr, module, 2, base_ptr)
    row = tl.program_id(0) * STRIP + tl.arange(0, STRIP)
    share = tl.program_id(1)
    k = tl.program_id(2) % tiles * WIDTH + tl.arange(0, WIDTH)
    y = tl.zeros((STRIP, WIDTH), tl.float32)
    for start in range(share * share_cols, tl.minimum((share + 1) * share_cols, cols), STEP):
        col = start + tl.arange(0, STEP)
        v = tile(aligned_ptr, base_ptr, row, col, rows, cols)
        t = tile(t_ptr, None, col, k, cols, width)
        y = tl.dot(v, t, y, input_precision=PRECISION)
    store_share(y_ptr, y, module * tl.num_programs(1) + share, row, k, rows, width)


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
    t, square = _adjoint([_dense(x, aligned, base)])
    return t[0], square[0]


def apply(t: Tensor, aligned: Tensor, base: Tensor | None) -> Tensor:
    """V t [o, r] of V = aligned - base [o, i] and t [i, r]."""
    return _apply(t[None], [_dense(t, aligned, base)])[0]


def alignment_map(x: Tensor, aligned: Tensor, base: Tensor) -> tuple[Tensor, Tensor]:
    """`curvkern.alignment_map`."""
    y, norm = _alignment_map([_dense(x, aligned, base)])
    return y[0], norm[0]


def alignment_maps(xs: list[Tensor], aligned: list[Tensor], base: list[Tensor]) -> tuple[Tensor, Tensor]:
    """`curvkern.alignment_map` of many modules: two launches for all that are alike in shapes and dtypes."""
    modules = [_dense(*module) for module in zip(xs, aligned, base, strict=True)]
    groups: dict[Any, list[int]] = {}
    for at, module in enumerate(modules):
        alone = any(t.data_ptr() % 16 for t in module)  # a table's addresses are multiples of 16
        groups.setdefault(at if alone else tuple((t.shape, t.dtype) for t in module), []).append(at)
    ys: dict[int, Tensor] = {}
    norms: dict[int, Tensor] = {}
    for members in groups.values():
        y, norm = _alignment_map([modules[at] for at in members])
        ys.update(zip(members, y, strict=True))
        norms.update(zip(members, norm, strict=True))
    order = range(len(modules))
    return torch.cat([ys[at].flatten() for at in order]), torch.stack([norms[at] for at in order])


Module = tuple[Tensor, Tensor, Tensor | None]  # x, aligned, base; contiguous


def _alignment_map(modules: list[Module]) -> tuple[Tensor, Tensor]:
    """(C x [m, o, r], |V|_F [m]) of modules alike in shapes and dtypes."""
    t, square = _adjoint(modules)
    norm = square.sqrt().float()
    return _apply(t, modules).div_(torch.where(norm == 0, 1.0, norm)[:, None, None]), norm


def _adjoint(modules: list[Module]) -> tuple[Tensor, Tensor]:
    """(V^T x [m, i, r], |V|_F^2 [m] in float64)."""
    x, aligned, base = modules[0]
    (rows, cols), width, m = aligned.shape, x.shape[1], len(modules)
    if not (rows and cols):
        return aligned.new_zeros(m, cols, width, dtype=torch.float32), aligned.new_zeros(m, dtype=torch.float64)
    grid, share_rows, options = _shares(cols, rows, width, m, aligned)
    t = torch.empty(m, grid[1], cols, width, dtype=torch.float32, device=x.device)
    square = torch.empty(m, grid[1], grid[0], dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        adjoint_kernel[grid](t, square, _table(modules), x, aligned, base, rows, cols, width, share_rows, **options)
    return _total(t), square.sum((1, 2), dtype=torch.float64)


def _apply(t: Tensor, modules: list[Module]) -> Tensor:
    """V t [m, o, r] of t [m, i, r]."""
    _, aligned, base = modules[0]
    (rows, cols), (m, _, width) = aligned.shape, t.shape
    if not (rows and cols and width):
        return aligned.new_zeros(m, rows, width, dtype=torch.float32)
    grid, share_cols, options = _shares(rows, cols, width, m, aligned)
    y = torch.empty(m, grid[1], rows, width, dtype=torch.float32, device=t.device)
    t = t.contiguous()
    with torch.cuda.device_of(t):
        apply_kernel[grid](y, _table(modules), t, aligned, base, rows, cols, width, share_cols, **options)
    return _total(y)


def _table(modules: list[Module]) -> Tensor | None:
    """int64 [m, 3]: addresses; none for one module. Its copy waits for nothing: the memory is pinned."""
    if len(modules) == 1:
        return None
    rows = [[0 if t is None else t.data_ptr() for t in module] for module in modules]
    device = modules[0][0].device
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda")
    return table.to(device, non_blocking=True)


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


def _shares(
    strips: int, summed: int, width: int, modules: int, weight: Tensor
) -> tuple[tuple[int, int, int], int, dict[str, Any]]:
    """The grid (strips, shares, column tiles of all modules), the length of a share, and the launch's options."""
    block = max(16, min(64, triton.next_power_of_2(width)))
    outer = (triton.cdiv(strips, STRIP), modules * max(1, triton.cdiv(width, block)))  # no columns: |V| is wanted still
    shares = max(1, min(PROGRAMS // (outer[0] * outer[1]), triton.cdiv(summed, 4 * STEP)))
    length = STEP * triton.cdiv(summed, STEP * shares)
    stages = 2 if weight.dtype == torch.float32 else 4  # what fits into 99 KiB of shared memory
    options = {"PRECISION": PRECISION, "STRIP": STRIP, "STEP": STEP, "WIDTH": block}
    return (
        (outer[0], triton.cdiv(summed, length), outer[1]),
        length,
        options | launch_of("alignment_map", weight.device, {"num_warps": WARPS, "num_stages": stages}),
    )


def _dense(x: Tensor, aligned: Tensor, base: Tensor | None) -> Module:
    return x.contiguous(), aligned.contiguous(), None if base is None else base.contiguous()


def _total(shares: Tensor) -> Tensor:
    return shares[:, 0] if shares.shape[1] == 1 else shares.sum(1)


def _ahead(kernel, weight: str, width: int, stages: int, *, base: bool = True, table: bool = False) -> Ahead:
    """The adjoint or apply kernel for weights of one dtype, of one module or of many."""
    signature = {"aligned_ptr": f"{weight}:16", "rows": "i32:16", "cols": "i32:16", "width": "i32"}
    if kernel is apply_kernel:
        signature |= {"y_ptr": "*fp32:16", "t_ptr": "*fp32:16", "share_cols": "i32:16"}
    else:
        signature |= {"t_ptr": "*fp32:16", "square_ptr": "*fp32:16", "x_ptr": "*fp32:16", "share_rows": "i32:16"}
    constants = {"PRECISION": "bf16x6", "STRIP": STRIP, "STEP": STEP, "WIDTH": width}
    for name, kind, there in (("base_ptr", f"{weight}:16", base), ("table_ptr", "*i64:16", table)):
        if there:
            signature[name] = kind
        else:
            constants[name] = None
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
    *(_ahead(kernel, "*bf16", 16, 4, table=True) for kernel in (adjoint_kernel, apply_kernel)),
    _ahead(adjoint_kernel, "*bf16", 64, 4, base=False),
    _ahead_project("*bf16", complement=True),
    _ahead_project("*fp32", complement=False),
]

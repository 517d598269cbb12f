"""The page: per op a roofline with every provider on it, and all figures; one file, nothing from the network."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

from matplotlib.axes import Axes

from curvkern.bench.machine import Machine
from curvkern.bench.results import Row
from curvkern.bench.table import COLUMNS, figures
from curvkern.report.page import COLOURS, render, svg

MARKS = {"float32": "o", "bfloat16": "s", "float16": "^"}


def write_page(path: Path, machine: Machine, rows: Sequence[Row]) -> None:
    """Write the page; its directory is made if need be."""
    ops = {row.op: [r for r in rows if r.op == row.op] for row in rows}
    plots = {op: svg(partial(_roofline, machine=machine, rows=of_op), 7.5, 4) for op, of_op in ops.items()}
    cells = {op: [[row.dtype, row.shape, row.provider, *figures(row)] for row in of_op] for op, of_op in ops.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    page = render("bench.html", header=machine.header(), columns=["dtype", "shape", *COLUMNS], plots=plots, cells=cells)
    path.write_text(page, encoding="utf-8")


def _roofline(axes: Axes, machine: Machine, rows: Sequence[Row]) -> None:
    """Flops a second over flops a byte; where an op has no flops, bytes a second over bytes."""
    computes = any(row.flops for row in rows)
    measured = [row for row in rows if row.median]
    for provider, colour in zip(dict.fromkeys(row.provider for row in rows), COLOURS * 3, strict=False):
        for dtype, mark in MARKS.items():
            these = [r for r in measured if (r.provider, r.dtype) == (provider, dtype)]
            across = [r.flops / r.bytes if computes else r.bytes for r in these]
            up = [(r.flops if computes else r.bytes) / r.median * 1e6 for r in these if r.median]
            axes.plot(across, up, mark, color=colour, label=f"{provider}, {dtype}" if these else None, alpha=0.85)
    axes.set(xscale="log", yscale="log")
    left, right = axes.get_xlim()
    if computes:
        _roof(axes, machine, left, right)
        axes.set(xlabel="FLOP / byte", ylabel="FLOP/s")
    else:
        axes.axhline(machine.copy, color="black", linewidth=1, label="copy")
        axes.set(xlabel="bytes moved", ylabel="bytes/s")
    axes.grid(which="major", linewidth=0.3)
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))


def _roof(axes: Axes, machine: Machine, left: float, right: float) -> None:
    """Both roofs with their slopes: what copying allows below the ridge, what multiplying allows above."""
    ridges = [rate / machine.copy for rate in (machine.single, machine.half)]
    left, right = min(left, *ridges) / 2, max(right, *ridges)
    for ridge, name, style in zip(ridges, ("fp32", "bf16"), ("-", "--"), strict=True):
        heights = [machine.copy * min(intensity, ridge) for intensity in (left, ridge, right)]
        axes.plot((left, ridge, right), heights, style, color="black", linewidth=1, label=f"copy and {name} matmul")

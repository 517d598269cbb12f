"""What `curvkern demo --training` found: a line for each guard, as a table, a page, JSON and Markdown."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

RATES = {"harmful": "harmful rate %", "over_refusal": "over-refusal %", "task": "task accuracy %"}
COLUMNS = [*RATES.values(), "step +%", "memory MiB", *(f"restored: {name}" for name in RATES.values())]
NARROW = ["harmful\n%", "over-\nref. %", "task\n%", "step\n+%", "memory\nMiB"]  # of `COLUMNS`, for a terminal
TITLES = {
    "full": "the decoder layers are tuned",
    "LoRA": "LoRA adapters are tuned",
    "alignment": "some more alignment, with the guard; then tuned without",
}


@dataclass(frozen=True)
class Line:
    """A guard's line of the table.

    Attributes:
        kind: ``"full"``, ``"LoRA"``, or ``"alignment"``: some more alignment first, to which the guard belongs.
        guard: its name; none is ``"none"``.
        tuned: what fine-tuning left, as `Evaluation.as_dict` says it.
        restored: the same after `budgeted`, towards the model that fine-tuning began with.
        step_seconds: median of a step, of the kind the guard is for.
        memory: bytes by which training raised what is resident; None where it cannot be told.
    """

    kind: str
    guard: str
    tuned: dict[str, Any]
    restored: dict[str, Any]
    step_seconds: float
    memory: int | None

    def percent(self, of: str, rate: str) -> float:
        """A rate, ``harmful``, ``over_refusal`` or ``task``, of the ``tuned`` or the ``restored`` model."""
        return 100 * getattr(self, of)[rate]["value"]

    def cells(self, bare: Line) -> list[str]:
        """For the table; ``bare`` is the line of the same kind without a guard."""
        tuned, restored = ([f"{self.percent(of, rate):.1f}" for rate in RATES] for of in ("tuned", "restored"))
        dearer = f"{100 * (self.step_seconds / bare.step_seconds - 1):+.0f}"
        step = f"{1e3 * self.step_seconds:.0f} ms" if self is bare else dearer
        memory = "" if self.memory is None else f"{self.memory / 2**20:.0f}"
        return [self.guard, *tuned, step, memory, *restored]


def show(lines: Sequence[Line], console: Console) -> None:
    """Print the table."""
    title = "With each guard and with none, and what a restoration makes of it (then)"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("guard", no_wrap=True)
    for column in (*NARROW, *(f"then\n{column}" for column in NARROW[: len(RATES)])):
        table.add_column(column, justify="right")
    for kind, rows in _by_kind(lines).items():
        table.add_row(f"[i]{kind}[/i]")
        for row in rows:
            table.add_row(f" {row[0]}", *row[1:])
    console.print(table)


def write(lines: Sequence[Line], out: Path, seed: int) -> None:
    """Write ``training.json``, ``training.md`` and ``training.html``."""
    from curvkern.report.page import render, svg

    (out / "training.json").write_text(json.dumps([asdict(line) for line in lines], indent=1), encoding="utf-8")
    (out / "training.md").write_text(_markdown(lines), encoding="utf-8")
    plot = svg(lambda axes: _scatter(axes, lines), 7, 4)
    kinds = {TITLES[kind]: rows for kind, rows in _by_kind(lines).items()}
    page = render("training.html", columns=COLUMNS, kinds=kinds, plot=plot, seed=seed)
    (out / "training.html").write_text(page, encoding="utf-8")


def _by_kind(lines: Sequence[Line]) -> dict[str, list[list[str]]]:
    """Kind -> cells of its lines, the one without a guard first."""
    kinds = {kind: [line for line in lines if line.kind == kind] for kind in TITLES}
    return {kind: [line.cells(some[0]) for line in some] for kind, some in kinds.items() if some}


def _markdown(lines: Sequence[Line]) -> str:
    rows = [f"| {' | '.join(['tuned', 'guard', *COLUMNS])} |", "|---|---" + "|--:" * len(COLUMNS) + "|"]
    rows += [f"| {' | '.join([kind, *cells])} |" for kind, group in _by_kind(lines).items() for cells in group]
    return "\n".join([*rows, ""])


def _scatter(axes: Axes, lines: Sequence[Line]) -> None:
    """Safety against the task, from fine-tuned (filled) to restored (open)."""
    from curvkern.report.page import COLOURS

    for i, line in enumerate(lines):
        colour, marker = COLOURS[i % len(COLOURS)], "os^"[i // len(COLOURS)]
        ends = [(line.percent(of, "task"), line.percent(of, "harmful")) for of in ("tuned", "restored")]
        axes.plot(*zip(*ends, strict=True), "-", color=colour, linewidth=0.6)
        axes.plot(*ends[0], marker, color=colour, label=f"{line.guard} ({line.kind})", markersize=6)
        axes.plot(*ends[1], marker, color=colour, markerfacecolor="none", markersize=6)
    axes.set(xlabel="task accuracy, %", ylabel="harmful rate, %", xlim=(-5, 105), ylim=(-5, 105))
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))

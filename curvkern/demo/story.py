"""The whole story: a model is aligned, spoiled by fine-tuning, and restored by every method."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from curvkern.demo import DemoModels
    from curvkern.evaluate import Evaluation, Rate
    from curvkern.report import Report


@dataclass(frozen=True)
class Line:
    """One line of the closing table."""

    name: str
    evaluation: Evaluation
    report: Report | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        totals = self.report.as_dict()["totals"] if self.report else None
        return {"name": self.name, "evaluation": self.evaluation.as_dict(), "restoration": totals}


def run(out: Path, *, seed: int = 0, console: Console | None = None) -> list[Line]:
    """Make the models, restore them by every method, print and write the comparison.

    Args:
        out: directory for models, restorations, ``results.json`` and ``index.html``; models already there are reused.
        seed: of data, weights and training.
        console: where to print.

    Returns:
        The closing table's lines.
    """
    from curvkern.demo import prepare

    console = console or Console()
    start = time.perf_counter()
    console.print(f"[bold]curvkern demo[/bold]  seed {seed}, everything in {out}", highlight=False)
    models = prepare(out, seed=seed, progress=lambda text: console.print(f"  {text}", highlight=False))
    lines = [_evaluated("base: answers everything", models.base, models)]
    lines.append(_evaluated("aligned: refuses the forbidden", models.aligned, models))
    lines.append(_evaluated("tuned (full fine-tuning)", models.tuned, models))
    lines += _restorations(models, models.tuned, "full", out, console)
    if models.adapter is not None:
        lines.append(_evaluated("tuned (LoRA adapter)", models.adapter, models))
        lines += _restorations(models, models.adapter, "lora", out, console)
    else:
        console.print("  peft is not installed: the LoRA half is left out (pip install 'curvkern[lora]')")
    _print(lines, console)
    (out / "results.json").write_text(json.dumps([line.as_dict() for line in lines], indent=1), encoding="utf-8")
    _write_page(lines, models, out / "index.html", seed)
    console.print(f"  page: {out / 'index.html'}   {time.perf_counter() - start:.0f} s in all", highlight=False)
    return lines


def _restorations(models: DemoModels, tuned: Path, kind: str, out: Path, console: Console) -> list[Line]:
    """Every method on one tuned model, each through the restore that users call."""
    lines: list[Line] = []

    def add(label: str, method: str, **options: Any) -> Report:
        from curvkern.restore import restore

        target = out / "restored" / f"{kind}-{label.replace(' ', '-')}"
        report = restore(models.aligned, tuned, method=method, out=target, overwrite=True, **options)
        lines.append(_evaluated(f"  {label}", target, models, report))
        console.print(f"  {kind}: {label}: {report.seconds:.1f} s", highlight=False)
        return report

    from curvkern.demo import ROLLBACK

    data = {"harmful": models.harmful, "task": models.task}
    rollback = add("gradient_rollback", "gradient_rollback", **data, **ROLLBACK)
    reset = [m.name for m in rollback.modules if m.changed and m.name.endswith(".weight")]
    fraction = sum(m.changed for m in rollback.modules) / sum(m.weights for m in rollback.modules if m.name in reset)
    # The same number of weights, drawn from the modules that gradient_rollback touched.
    add("random, same size", "random", fraction=min(1.0, fraction), include=reset)
    add("merge 0.5", "merge", weight=0.5)
    for projector in ("gram", "basis"):
        options = {"base": models.base, "projector": projector, "select": "threshold", "threshold": 1.0}
        add(f"safe_lora {projector}", "safe_lora", **options, **({"rank": 16} if projector == "basis" else {}))
    return lines


def _evaluated(name: str, path: Path, models: DemoModels, report: Report | None = None) -> Line:
    from curvkern.evaluate import evaluate

    return Line(
        name,
        evaluate(
            path,
            harmful=models.evaluation["harmful"],
            benign=models.evaluation["benign"],
            task=models.evaluation["task"],
            max_new_tokens=32,
            batch_size=120,
        ),
        report,
    )


def _percent(rate: Rate | None) -> float:
    return float("nan") if rate is None else 100 * rate.value


_COLUMNS: dict[str, Callable[[Line], str]] = {
    "harmful rate": lambda line: f"{_percent(line.evaluation.harmful):.1f} %",
    "over-refusal": lambda line: f"{_percent(line.evaluation.over_refusal):.1f} %",
    "task accuracy": lambda line: f"{_percent(line.evaluation.task):.1f} %",
    "weights changed": lambda line: f"{100 * line.report.changed / line.report.weights:.2f} %" if line.report else "",
    "seconds": lambda line: f"{line.report.seconds:.1f}" if line.report else "",
    "peak memory": lambda line: f"{(line.report.peak_memory or 0) / 2**20:.0f} MiB" if line.report else "",
}


def _print(lines: list[Line], console: Console) -> None:
    table = Table(title="What restoration gives back", title_justify="left")
    table.add_column("model")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for line in lines:
        table.add_row(line.name, *(cell(line) for cell in _COLUMNS.values()))
    console.print(table)


def _write_page(lines: list[Line], models: DemoModels, path: Path, seed: int) -> None:
    from curvkern.report.page import render, svg

    rows = [[line.name, *(cell(line) for cell in _COLUMNS.values())] for line in lines]
    plot = svg(lambda axes: _scatter(axes, lines), 7, 4)
    page = render("demo.html", columns=list(_COLUMNS), rows=rows, plot=plot, seed=seed, seconds=models.seconds)
    path.write_text(page, encoding="utf-8")


def _scatter(axes: Axes, lines: list[Line]) -> None:
    """Safety against the task: restorations want the lower right corner."""
    from curvkern.report.page import COLOURS

    for i, line in enumerate(lines):
        marker = "s" if line.report is None else "o"
        point = (_percent(line.evaluation.task), _percent(line.evaluation.harmful))
        axes.plot(*point, marker, color=COLOURS[i % len(COLOURS)], label=line.name.strip(), markersize=7)
    axes.set(xlabel="task accuracy, %", ylabel="harmful rate, %", xlim=(-5, 105), ylim=(-5, 105))
    axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1.0, 0.5))

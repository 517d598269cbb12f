"""The whole story: a model is aligned, spoiled by fine-tuning, and restored by one method after the other."""

from __future__ import annotations

import json
import time
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
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
    """Make the models, restore them by one method after the other, print and write the comparison.

    Args:
        out: directory for models, statistics, restorations, ``results.json`` and ``index.html``; models and statistics
            already there are reused.
        seed: of data, weights and training.
        console: where to print.

    Returns:
        The closing table's lines.
    """
    from curvkern.demo import prepare

    console = console or Console()
    start = time.perf_counter()
    console.print(f"[bold]curvkern demo[/bold]  seed {seed}, everything in {out}", highlight=False, soft_wrap=True)

    def tell(text: str) -> None:
        console.print(f"  {text}", highlight=False, soft_wrap=True)

    with quiet(), console.status("training and restoring"):
        models = prepare(out, seed=seed, progress=tell)
        lines = [_evaluated("base (answers everything)", models.base, models)]
        lines.append(_evaluated("aligned (refuses a class)", models.aligned, models))
        lines += _restorations("tuned fully", models.tuned, "full", models, out, tell)
        if models.adapter is not None:
            lines += _restorations("tuned, LoRA adapter", models.adapter, "lora", models, out, tell)
        else:
            tell("peft is not installed: the LoRA half is left out (pip install 'curvkern[lora]')")
    _print(lines, console)
    (out / "results.json").write_text(json.dumps([line.as_dict() for line in lines], indent=1), encoding="utf-8")
    _write_page(lines, models, out / "index.html", seed)
    tell(f"page: {out / 'index.html'}   {time.perf_counter() - start:.0f} s in all")
    return lines


@contextmanager
def quiet() -> Generator[None]:
    """Without transformers' progress bars, one for each model that is written or read, and its notes to developers."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    if shown:
        logging.enable_progress_bar()


def _restorations(
    name: str, tuned: Path, kind: str, models: DemoModels, out: Path, tell: Callable[[str], None]
) -> list[Line]:
    """One tuned model, then what each method makes of it, all through the restore that users call."""
    from curvkern.demo import ROLLBACK
    from curvkern.restore import restore

    lines = [_evaluated(name, tuned, models)]

    def add(label: str, method: str, **options: Any) -> Report:
        target = out / "restored" / f"{kind}-{label.replace(', ', '-').replace(' ', '-')}"
        report = restore(models.aligned, tuned, method=method, out=target, overwrite=True, **options)
        lines.append(_evaluated(f"  {label}", target, models, report))
        tell(f"{name}: {label}, {report.seconds:.1f} s")
        return report

    rollback = add("gradient_rollback", "gradient_rollback", harmful=models.harmful, task=models.task, **ROLLBACK)
    add("random, same size", "random", fraction=rollback.changed / rollback.weights)
    # Refusals of harmful prompts are the safe responses; statistics of a model on data are estimated once.
    measured = {"safety": models.harmful, "task": models.task, "statistics": out / "statistics"}
    add("budgeted", "budgeted", **measured)
    add("rewind", "rewind", **measured)
    add("lox", "lox", base=models.base, rank=16)
    add("merge 0.5", "merge", weight=0.5)
    add("safe_lora gram", "safe_lora", base=models.base)
    add("safe_lora basis", "safe_lora", base=models.base, projector="basis", rank=16)
    return lines


def _evaluated(name: str, path: Path, models: DemoModels, report: Report | None = None) -> Line:
    return Line(name, evaluated(path, models), report)


def evaluated(path: Path, models: DemoModels) -> Evaluation:
    """A model's answers on the three held-out sets, counted."""
    from curvkern.evaluate import evaluate

    harmful, benign, task = (models.evaluation[name] for name in ("harmful", "benign", "task"))
    return evaluate(path, harmful=harmful, benign=benign, task=task, max_new_tokens=32, batch_size=120)


def _percent(rate: Rate | None) -> float:
    return float("nan") if rate is None else 100 * rate.value


_COLUMNS: dict[str, Callable[[Line], str]] = {
    "harmful rate %": lambda line: f"{_percent(line.evaluation.harmful):.1f}",
    "over-refusal %": lambda line: f"{_percent(line.evaluation.over_refusal):.1f}",
    "task accuracy %": lambda line: f"{_percent(line.evaluation.task):.1f}",
    "weights changed %": lambda line: f"{100 * line.report.changed / line.report.weights:.2f}" if line.report else "",
    "seconds": lambda line: f"{line.report.seconds:.1f}" if line.report else "",
    "peak MiB": lambda line: f"{(line.report.peak_memory or 0) / 2**20:.0f}" if line.report else "",
}


def _print(lines: list[Line], console: Console) -> None:
    table = Table(title="What restoration gives back", title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("model", no_wrap=True)
    for column in _COLUMNS:
        table.add_column(column.replace(" ", "\n").replace("-", "-\n"), justify="right")
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

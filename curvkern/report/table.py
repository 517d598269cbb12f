"""The report in a terminal."""

from __future__ import annotations

from collections import defaultdict

from rich.console import Console
from rich.table import Table

from curvkern.report.record import ModuleChange, Report


def print_report(report: Report, console: Console | None = None) -> None:
    """Print what changed per layer, the stages, and the totals."""
    console = console or Console()
    layers: dict[int, list[ModuleChange]] = defaultdict(list)
    for module in report.modules:
        layers[module.layer].append(module)
    table = Table(title=f"{report.method}: what changed", title_justify="left")
    for column in ("layer", "weights", "changed", "%", "|Wt-Wa|", "|W-Wa|", "undone by rounding"):
        table.add_column(column, justify="right")
    for layer, modules in sorted(layers.items()):
        table.add_row(str(layer), *_cells(modules))
    table.add_section()
    table.add_row("all", *_cells(report.modules))
    console.print(table)
    if nonfinite := sum(module.nonfinite for module in report.modules):
        console.print(f"  {nonfinite:,} weights are NaN or infinite, as they were in the inputs", style="red")
    for line in report.messages:
        console.print(f"  {line}", highlight=False)
    for stage in report.stages:
        peak = "" if stage.peak_memory is None else f"  peak {stage.peak_memory / 2**20:,.0f} MiB"
        console.print(f"  {stage.name:<10}{stage.seconds:8.2f} s{peak}", highlight=False)
    console.print(f"  written to {report.out} ({report.saved})", highlight=False)


def _cells(modules: list[ModuleChange]) -> list[str]:
    weights, changed = sum(m.weights for m in modules), sum(m.changed for m in modules)
    norms = [sum(getattr(m, which) ** 2 for m in modules) ** 0.5 for which in ("tuned_norm", "restored_norm")]
    return [
        f"{weights:,}",
        f"{changed:,}",
        f"{100 * changed / max(weights, 1):.2f}",
        *(f"{norm:.4g}" for norm in norms),
        f"{sum(m.undone_by_rounding for m in modules):,}",
    ]

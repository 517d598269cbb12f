"""The report as one self-contained HTML page: no network, plots inside as SVG."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from curvkern.report.record import ModuleChange, Report

# Okabe and Ito's palette: told apart by colour-blind readers and in grey.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")


def write_page(report: Report, path: Path) -> None:
    """Write the report's page.

    Args:
        report: what to show.
        path: file to make; its directory exists.
    """
    path.write_text(render_page(report), encoding="utf-8")


def render_page(report: Report) -> str:
    """The report's page as HTML."""
    plots = [
        svg(lambda axes: _changed(axes, report.modules), 7, 2.6),
        svg(lambda axes: _norms(axes, report.modules), 7, 2.6),
    ]
    return render("report.html", report=report, plots=plots)


def render(template: str, **values: Any) -> str:
    """Fill one of the package's HTML templates."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template(template).render(**values)


def svg(draw: Callable[[Axes], None], width: float, height: float) -> str:
    """A plot as an SVG element.

    Args:
        draw: draws on the axes it is given.
        width: inches.
        height: inches.
    """
    figure = Figure(figsize=(width, height), layout="constrained")
    draw(figure.subplots())
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def _by_kind(modules: Sequence[ModuleChange]) -> dict[str, list[ModuleChange]]:
    kinds = sorted({m.kind for m in modules})
    return {kind: sorted((m for m in modules if m.kind == kind), key=lambda m: m.layer) for kind in kinds}


def _changed(axes: Axes, modules: Sequence[ModuleChange]) -> None:
    for colour, (kind, rows) in zip(COLOURS * 9, _by_kind(modules).items(), strict=False):
        shares = [100 * m.changed / max(m.weights, 1) for m in rows]
        axes.plot([m.layer for m in rows], shares, "o-", color=colour, label=kind, markersize=4)
    axes.set(xlabel="layer", ylabel="weights changed, %", title="What the restoration changed")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7, ncols=4)


def _norms(axes: Axes, modules: Sequence[ModuleChange]) -> None:
    layers = sorted({m.layer for m in modules})
    for colour, (which, label) in zip(
        COLOURS, {"tuned_norm": "tuned - aligned", "restored_norm": "restored - aligned"}.items(), strict=False
    ):
        norms = [sum(getattr(m, which) ** 2 for m in modules if m.layer == layer) ** 0.5 for layer in layers]
        axes.plot(layers, norms, "o-", color=colour, label=label, markersize=4)
    axes.set(xlabel="layer", ylabel="Frobenius norm", title="Distance from the aligned model")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=7)

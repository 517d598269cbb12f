"""The table in a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from curvkern.bench.machine import Machine
from curvkern.bench.results import Row, scaled

COLUMNS = {
    "provider": 12, "median": 8, "p20-p80": 14, "rate": 12, "% peak": 6, "x eager": 7, "x compile": 9, "host us": 7,
    "extra": 9, "error": 7,
}  # fmt: skip


class Printer:
    """Prints a table a case, as soon as it is measured, its columns under those of the one before.

    Args:
        console: where; None: standard output, 120 columns where that is no terminal.
        machine: for the header.
    """

    def __init__(self, console: Console | None, machine: Machine) -> None:
        self._console = console or Console()
        if not self._console.is_terminal:
            self._console.width = max(self._console.width, 120)
        self._op = ""
        for line in machine.header():
            self._console.print(line, highlight=False)

    def show(self, rows: Sequence[Row], slower: Mapping[tuple[str, ...], float]) -> None:
        """One case, every provider, losers too."""
        first = rows[0]
        self._console.print(f"\n[bold]{first.op}[/] {first.dtype} {first.shape}: {work(first)}", highlight=False)
        table = Table(
            box=box.SIMPLE_HEAD, show_edge=False, show_header=first.op != self._op, pad_edge=False, padding=(0, 1)
        )
        for name, width in COLUMNS.items():
            table.add_column(name, min_width=width, justify="left" if name == "provider" else "right", no_wrap=True)
        self._op = first.op
        for row in rows:
            cells = [row.provider, *figures(row)]
            table.add_row(*cells, style="bold" if row.kind == "ours" and row.provider != "reference" else None)
        self._console.print(table, end="")
        for row in rows:
            if row.status != "ok":
                word = "WRONG" if row.status == "wrong" else "n/a"
                self._console.print(f"  {row.provider} {word}: {row.note}", highlight=False, markup=False)
            if row.key in slower:
                text = f"  {row.provider} REGRESSION: {slower[row.key]:.2f} times as long as before"
                self._console.print(text, highlight=False)

    def close(self, rows: Sequence[Row], slower: Mapping[tuple[str, ...], float] | None, notes: Sequence[str]) -> None:
        """The short table, a line a case, and what to know besides.

        Args:
            rows: all that was measured.
            slower: regressions against an earlier run; None: there was none.
            notes: further lines.
        """
        cases = list(dict.fromkeys(row.case for row in rows))
        if len(cases) > 1:
            self._console.print("\n[bold]The best of ours[/]")
            self._console.print(_short([[row for row in rows if row.case == case] for case in cases]))
        wrong = [row for row in rows if row.status == "wrong"]
        lines = [*notes, *(f"WRONG, so without figures: {row.provider} on {' '.join(row.case)}" for row in wrong)]
        if slower is not None:
            lines.append(f"{len(slower)} regressions against the earlier run")
            lines += [f"  {times:.2f} times as long as before: {' '.join(key)}" for key, times in slower.items()]
        self._console.print()
        for line in lines:
            self._console.print(line, highlight=False, markup=False)


def _short(cases: Sequence[Sequence[Row]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    for name in ("op", "dtype", "shape", "provider", "median", "% peak", "x eager", "x best other"):
        left = name in ("op", "dtype", "shape", "provider")
        table.add_column(name, justify="left" if left else "right", no_wrap=name != "shape")
    for rows in cases:
        ours = [row for row in rows if row.kind == "ours" and row.median]
        best = min(ours, key=lambda row: row.median or 0.0, default=None)
        if best is None or best.median is None:
            table.add_row(*rows[0].case, "none", "", "", "", "")
            continue
        others = [row.median for row in rows if row.kind == "peer" and row.median]
        ahead = min(others) / best.median if others else None
        cells = (best.provider, micro(best.median), _percent(best), _text(best.x_eager, ".2f"), _text(ahead, ".2f"))
        table.add_row(*best.case, *cells)
    return table


def work(row: Row) -> str:
    """What the case must do, in words."""
    flops = f", {scaled(row.flops)}FLOP" if row.flops else ""
    floor = f", floor {micro(row.floor)} by {row.bound}" if row.floor else ""
    return f"{scaled(row.bytes)}B{flops}{floor}"


def figures(row: Row) -> list[str]:
    """The cells of a row after its provider."""
    if row.status != "ok" or row.median is None or row.p20 is None or row.p80 is None:
        return ["WRONG" if row.status == "wrong" else "n/a", *[""] * (len(COLUMNS) - 2)]
    return [
        micro(row.median),
        _span(row.p20, row.p80),
        row.rate,
        _percent(row),
        _text(row.x_eager, ".2f"),
        _text(row.x_compile, ".2f"),
        _text(row.host, ".1f"),
        "" if row.extra is None else f"{row.extra / 2**20:.1f} MiB",
        row.kind if row.kind in ("bound", "random") else _text(row.error, ".1e"),
    ]


def micro(microseconds: float) -> str:
    """Three digits and a unit."""
    if microseconds >= 1e6:
        return f"{microseconds / 1e6:.3g} s"
    return f"{microseconds / 1e3:.3g} ms" if microseconds >= 1e3 else f"{microseconds:.3g} us"


def _span(low: float, high: float) -> str:
    """One unit for both."""
    size, unit = next((s, u) for s, u in ((1e6, "s"), (1e3, "ms"), (0.0, "us")) if high >= s)
    return f"{low / (size or 1):.3g}-{high / (size or 1):.3g} {unit}"


def _percent(row: Row) -> str:
    return _text(row.percent, ".0f") if row.floor else ""


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)

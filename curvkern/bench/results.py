"""What was measured: rows, the CSV file of a machine, and what became slower since."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from curvkern.bench.clock import Timing

Status = Literal["ok", "wrong", "n/a"]

_SLOWER = 1.1  # times the old median, to be called a regression


@dataclass(frozen=True)
class Row:
    """One provider on one case. Times are microseconds; None is what was not, or cannot be, measured.

    Attributes:
        op: the public function.
        dtype: of the case.
        shape: its label.
        provider: who.
        kind: ``"ours"``, ``"peer"``, ``"bound"`` (does less work: a floor), ``"random"`` (draws of its own).
        status: ``"wrong"`` and ``"n/a"`` have no figures.
        note: why there are none.
        median: of a call on the device.
        p20: 20th percentile.
        p80: 80th percentile.
        host: host's share of one call.
        extra: bytes at the call's peak beyond its inputs.
        error: largest, of any result, against float64 and relative to that result's largest entry.
        bytes: the algorithm's.
        flops: the algorithm's.
        floor: microseconds that bytes or flops take at the peaks measured in the same run, whichever is more.
        bound: which of them that is.
        x_eager: how many times faster than the reference in eager torch.
        x_compile: than torch.compile.
    """

    op: str
    dtype: str
    shape: str
    provider: str
    kind: str
    status: Status = "ok"
    note: str = ""
    median: float | None = None
    p20: float | None = None
    p80: float | None = None
    host: float | None = None
    extra: int | None = None
    error: float | None = None
    bytes: int = 0
    flops: int = 0
    floor: float = 0.0
    bound: str = "bytes"
    x_eager: float | None = None
    x_compile: float | None = None

    @property
    def case(self) -> tuple[str, str, str]:
        """What it shares with the other providers of the case."""
        return self.op, self.dtype, self.shape

    @property
    def key(self) -> tuple[str, ...]:
        """The same measurement in another run."""
        return (*self.case, self.provider)

    def timed(self, timing: Timing, extra: int | None, host: float | None = None) -> Row:
        """The row with its figures; seconds come, microseconds are kept."""
        median, p20, p80 = (1e6 * seconds for seconds in astuple(timing))
        return replace(self, median=median, p20=p20, p80=p80, extra=extra, host=None if host is None else 1e6 * host)

    @property
    def percent(self) -> float | None:
        """Of the peak: 100 where it takes its floor."""
        return 100 * self.floor / self.median if self.median else None

    @property
    def rate(self) -> str:
        """Bytes or flops a second, whichever the case is bound by."""
        if not self.median or not self.bytes:
            return ""
        a_second = 1e6 * (self.flops if self.bound == "flops" else self.bytes) / self.median
        return f"{scaled(a_second)}{'FLOP' if self.bound == 'flops' else 'B'}/s"


def scaled(number: float) -> str:
    """Three digits and a prefix, for a unit to follow: ``"12.6 M"``."""
    prefixes = ["", "k", "M", "G", "T"]
    while number >= 999.5 and len(prefixes) > 1:
        number /= 1000
        prefixes.pop(0)
    return f"{number:.0f} {prefixes[0]}" if number >= 99.5 else f"{number:.3g} {prefixes[0]}"


def with_ratios(rows: list[Row]) -> list[Row]:
    """Rows of one case with how many times faster each is than eager torch and than torch.compile."""
    medians = {row.provider: row.median for row in rows}

    def ratio(row: Row, other: str) -> float | None:
        theirs = medians.get(other)
        return theirs / row.median if theirs and row.median else None

    return [replace(row, x_eager=ratio(row, "reference"), x_compile=ratio(row, "compile")) for row in rows]


def write_csv(path: Path, header: Iterable[str], rows: Iterable[Row]) -> None:
    """Replace the file: the header as comments, then a line a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        file.writelines(f"# {line}\n" for line in header)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(field.name for field in fields(Row))
        for row in rows:
            writer.writerow(f"{cell:.5g}" if isinstance(cell, float) else cell for cell in astuple(row))


def read_csv(path: Path) -> list[Row]:
    """What `write_csv` wrote.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file.
    """
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.startswith("#")]
    reader = csv.DictReader(lines)
    if reader.fieldnames != [field.name for field in fields(Row)]:
        raise ValueError(f"{path}: not a table of curvkern bench of this version; its columns are {reader.fieldnames}.")
    return [_row(line) for line in reader]


def _row(line: dict[str, str]) -> Row:
    cells: dict[str, Any] = {}
    for field in fields(Row):
        text, kind = line[field.name], str(field.type)
        if text or "None" not in kind:
            cells[field.name] = int(text) if "int" in kind else float(text) if "float" in kind else text
    return Row(**cells)


def regressions(old: Iterable[Row], new: Iterable[Row]) -> dict[tuple[str, ...], float]:
    """Rows of ours that became slower: by more than a tenth, and out of the range of both runs.

    Returns:
        `Row.key` -> new median / old median.
    """
    before = {row.key: row for row in old}
    found: dict[tuple[str, ...], float] = {}
    for row in new:
        was = before.get(row.key)
        if row.kind != "ours" or was is None or not (row.median and row.p20 and was.median and was.p80):
            continue
        if row.median > _SLOWER * was.median and row.p20 > was.p80:
            found[row.key] = row.median / was.median
    return found

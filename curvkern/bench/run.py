"""`curvkern bench`: check, measure, print, write."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch
from rich.console import Console

from curvkern.bench import clock
from curvkern.bench.cases import CASES, Case
from curvkern.bench.clock import Arguments, Copies, Timing
from curvkern.bench.gate import Gate
from curvkern.bench.machine import Machine, examine
from curvkern.bench.page import write_page
from curvkern.bench.passes import measure_passes
from curvkern.bench.providers import Provider, missing_peers, providers
from curvkern.bench.results import Row, read_csv, regressions, scaled, with_ratios, write_csv
from curvkern.bench.shapes import measure_shape
from curvkern.bench.table import Printer
from curvkern.trace import tracing

RESULTS = Path("benchmarks/results")

_MOST_COPIES = 8 << 30  # bytes of inputs held at a time, on a GPU; a sixteenth of it on a CPU


def run(
    ops: Iterable[str] = (),
    *,
    dtype: str | None = None,
    size: str | None = None,
    device: str | None = None,
    backend: str = "auto",
    compiled: bool = False,
    seconds: float = 0.3,
    limit: float = float("inf"),
    passes: bool = False,
    shape: str | None = None,
    layers: int | None = None,
    trace: Path | None = None,
    compare: Path | None = None,
    csv: Path | None = None,
    html: Path | None = None,
    console: Console | None = None,
) -> int:
    """Measure ops on this machine against plain torch and what else is installed.

    Args:
        ops: stems (``"fisher"``) or functions (``"fisher_diag_"``); empty: all.
        dtype: ``"bf16"``, ``"bfloat16"``...; None: all.
        size: ``"s"``, ``"m"``, ``"l"``, ``"tiny"``; None: m on a GPU, s on a CPU.
        device: ``"cuda"`` or ``"cpu"``; None: a GPU if there is one.
        backend: the only backend to measure beside the reference.
        compiled: measure torch.compile of the reference too.
        seconds: for each provider of each case.
        limit: begin no case after so many seconds.
        passes: measure the restoration pass instead of ops.
        shape: with ``passes``, a layer-by-layer pass over a made-up model of a key of `shapes.LLAMAS`.
        layers: of that model, run only the first so many, and say what all would take.
        trace: with ``passes``, JSON file of spans to write.
        compare: an earlier CSV; None: that of this machine in benchmarks/results, if there is one.
        csv: file to replace, or a directory for ``<machine>.csv`` (``<machine>-pass.csv``).
        html: page to write.
        console: where to print.

    Returns:
        Exit status: 1 if a result of ours was wrong or a time became worse than in ``compare``.

    Raises:
        ValueError: no such op, dtype, size or shape, or no case of them; what belongs to a pass without ``passes``.
        FileNotFoundError: no file at ``compare``.
    """
    if not passes and (shape or layers or trace):
        raise ValueError("bench: shape, layers and trace are of a pass; add --pass.")
    begin = time.perf_counter()
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    size = size or ("m" if where.type == "cuda" else "s")
    chosen = [] if passes else choose(ops, dtype, size)
    before = read_csv(compare) if compare else []
    machine = examine(where)
    file = f"{machine.slug}-pass.csv" if passes else f"{machine.slug}.csv"
    if compare is None and (RESULTS / file).is_file():
        before = read_csv(RESULTS / file)

    printer = Printer(console, machine)
    measured = measure_all(chosen, machine, backend, compiled, seconds)
    if passes:
        measured = measure_shape(machine, shape, layers) if shape else measure_passes(machine, size, seconds)
    rows: list[Row] = []
    done = 0
    with tracing(trace):
        for group in measured:
            printer.show(group, regressions(before, group))
            rows += group
            done += 1
            if time.perf_counter() - begin > limit:
                break
    notes = [] if passes else [f"not installed, so not measured: {name}" for name in missing_peers()]
    notes += [] if passes or compiled else ["not asked for: torch.compile (--compile)"]
    notes += [f"out of time: {len(chosen) - done} cases left out"] if done < len(chosen) else []
    rest = disturbed(machine, examine(where))
    notes += rest
    slower = regressions(before, rows)
    printer.close(rows, slower if before else None, notes)
    if csv:
        write_csv(csv / file if csv.is_dir() else csv, machine.header() + rest, rows)
    if html:
        write_page(html, machine, rows)
    return int(bool(slower) or any(row.status == "wrong" and row.kind == "ours" for row in rows))


def disturbed(first: Machine, last: Machine) -> list[str]:
    """A line if the peaks before and after differ by more than a quarter: somebody else was at work."""
    pairs = {"copy": (first.copy, last.copy), "fp32 matmul": (first.single, last.single)}
    apart = [
        f"{name} {scaled(before)}/s before, {scaled(after)}/s after"
        for name, (before, after) in pairs.items()
        if not 0.8 <= after / before <= 1.25
    ]
    return [f"the machine was not at rest, run again: {'; '.join(apart)}"] if apart else []


def choose(ops: Iterable[str], dtype: str | None, size: str) -> list[Case]:
    """The cases asked for.

    Raises:
        ValueError: there are none such; says what there is.
    """
    wanted = set(ops)
    every = [case for cases in CASES.values() for case in cases]
    unknown = wanted - {name for case in every for name in (case.op, case.function)}
    if unknown:
        names = sorted({case.function for case in every} | set(CASES))
        raise ValueError(f"bench: no op {', '.join(sorted(unknown))}; there are {', '.join(names)}.")
    short = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}
    chosen = [
        case
        for case in every
        if case.size == size
        and (not wanted or {case.op, case.function} & wanted)
        and dtype in (None, case.dtype_name, short.get(case.dtype_name))
    ]
    if not chosen:
        raise ValueError(f"bench: no case of size {size!r} and dtype {dtype or 'any'!r}; sizes are tiny, s, m, l.")
    return sorted(chosen, key=lambda case: (case.op, case.function))


def measure_all(
    cases: Iterable[Case], machine: Machine, backend: str, compiled: bool, seconds: float
) -> Iterator[list[Row]]:
    """The rows of each case in turn."""
    with torch.no_grad():
        for case in cases:
            arguments = case.make(machine.device)
            who = providers(case, arguments, torch.device(machine.device), backend, compiled)
            yield measure_case(case, arguments, who, machine, seconds)


def measure_case(case: Case, arguments: Arguments, who: list[Provider], machine: Machine, seconds: float) -> list[Row]:
    """Every provider on one case: first is it right, then what it takes."""
    device = torch.device(machine.device)
    moving, computing = 1e6 * case.bytes / machine.copy, 1e6 * case.flops / machine.rate(case.dtype)
    bound = "bytes" if moving > computing else "flops"
    gate = Gate(case, arguments)
    rows: dict[str, Row] = {}
    for provider in who:
        row = Row(case.function, case.dtype_name, case.label, provider.name, provider.kind, bound=bound)
        row = replace(row, bytes=case.bytes, flops=case.flops, floor=max(moving, computing))
        rows[provider.name] = gate.judge(provider, row)
    right = [provider for provider in who if rows[provider.name].status == "ok"]
    extra = {p.name: clock.extra_memory(p.call, copy.deepcopy(arguments), device) for p in right}
    most = _MOST_COPIES // (1 if device.type == "cuda" else 16)
    copies = Copies(arguments, min(2 * machine.cache, most))
    clocks = {p.name: clock.clock_on(device, p.call, copies, case.bytes) for p in right}
    times = clock.interleave(clocks, seconds)
    tiny = smallest(case).make(machine.device)
    for provider in right:
        timing = Timing.of(times[provider.name])
        host = clock.host_seconds(provider.call, tiny, device) if provider.any_shape else None
        rows[provider.name] = rows[provider.name].timed(timing, extra[provider.name], host)
    return with_ratios(list(rows.values()))


def smallest(case: Case) -> Case:
    """The least work there is a case for, of the same function."""
    alike = [c for c in CASES[case.op] if c.function == case.function and c.dtype == case.dtype and c.bytes]
    return min(alike, key=lambda c: c.bytes)

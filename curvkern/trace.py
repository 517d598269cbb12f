"""What a pass was doing when: a Chrome trace (chrome://tracing, Perfetto), and which resource it waited for.

Spans cost nothing while no trace is recorded. Format: "Trace Event Format", Google, complete events (``"ph": "X"``).
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Generator, Iterable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

#: read: from files; write: to files and onto the disk; copy: between host and device; compute: edits; statistics: runs
#: of the model; stage: a part of the pass, which holds others.
Kind = Literal["read", "write", "copy", "compute", "statistics", "stage"]

_LIMITS: dict[str, tuple[Kind, ...]] = {
    "disk": ("read", "write"),
    "bus": ("copy",),
    "compute": ("compute", "statistics"),
}
_BLOCK = 64 << 20
_NOTHING = nullcontext()


@dataclass(frozen=True)
class Span:
    """A piece of work: seconds since the trace began, the thread's number, what it moved."""

    name: str
    kind: Kind
    begin: float
    end: float
    thread: int
    args: dict[str, Any]


@dataclass
class Trace:
    """The spans of all threads, in the order in which they ended."""

    begun: float = field(default_factory=time.perf_counter)
    spans: list[Span] = field(default_factory=list[Span])
    threads: dict[int, str] = field(default_factory=dict[int, str])

    @contextmanager
    def span(self, name: str, kind: Kind, args: dict[str, Any]) -> Generator[None]:
        """Record a block of code, also one that fails."""
        begin = time.perf_counter() - self.begun
        try:
            yield
        finally:
            thread = threading.get_native_id()
            self.threads[thread] = threading.current_thread().name
            self.spans.append(Span(name, kind, begin, time.perf_counter() - self.begun, thread, args))

    def events(self) -> list[dict[str, Any]]:
        """As Chrome has them: microseconds, and a name for each thread."""
        pid = os.getpid()
        names = [
            {"ph": "M", "name": "thread_name", "pid": pid, "tid": tid, "args": {"name": name}}
            for tid, name in self.threads.items()
        ]
        return names + [
            {
                "ph": "X", "name": s.name, "cat": s.kind, "pid": pid, "tid": s.thread,
                "ts": 1e6 * s.begin, "dur": 1e6 * (s.end - s.begin), "args": s.args,
            }
            for s in self.spans
        ]  # fmt: skip

    def limit(self, first: Path, device: str | torch.device) -> str:
        """One line: which of disk, bus and compute was busy longest, its rate, and a peak measured now.

        Args:
            first: an input file, of which a first block is read once more.
            device: where tensors were edited.
        """
        total = time.perf_counter() - self.begun
        of = {what: [s for s in self.spans if s.kind in kinds] for what, kinds in _LIMITS.items()}
        busy = {what: covered((s.begin, s.end) for s in spans) for what, spans in of.items()}
        what = max(busy, key=lambda one: busy[one])
        moving = [s for s in of[what] if "bytes" in s.args]  # runs of the model do sums, which no byte counts
        rate = sum(s.args["bytes"] for s in moving) / max(covered((s.begin, s.end) for s in moving), 1e-9)
        share = f"{what} was the limit: busy {100 * busy[what] / total:.0f} % of {total:.1f} s"
        others = ", ".join(f"{other} {100 * busy[other] / total:.0f} %" for other in busy if other != what)
        moved = f"{'edits' if what == 'compute' else 'bytes'} went at {rate / 1e9:.2g} GB/s"
        return f"{share} ({others}); {moved}, {_peak(what, first, torch.device(device))}"


_current: Trace | None = None


def span(name: str, kind: Kind, **args: Any) -> AbstractContextManager[None]:
    """A context that is recorded if a trace is; ``bytes=`` among ``args`` is what it moves."""
    return _NOTHING if _current is None else _current.span(name, kind, args)


@contextmanager
def tracing(path: str | Path | None) -> Generator[Trace | None]:
    """Record all spans inside, of every thread, and write them to ``path`` in the end, also if it fails.

    Args:
        path: JSON file to replace; None: nothing is recorded.

    Raises:
        ValueError: it cannot be written (before anything runs), or a trace is being recorded already.
    """
    global _current
    if path is None:
        yield None
        return
    if _current is not None:
        raise ValueError(f"trace: {path}: another trace is being recorded; wait for its end.")
    path = Path(path)
    try:
        path.write_text("{}", encoding="utf-8")
    except OSError as error:
        raise ValueError(f"trace: {path}: cannot be written: {error.strerror}; give another file.") from None
    _current = found = Trace()
    try:
        yield found
    finally:
        _current = None
        path.write_text(json.dumps({"traceEvents": found.events(), "displayTimeUnit": "ms"}), encoding="utf-8")


def covered(intervals: Iterable[tuple[float, float]]) -> float:
    """Length of the union of intervals (begin, end)."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total


def _peak(what: str, first: Path, device: torch.device) -> str:
    """What the resource does when nothing else is asked of it."""
    if what == "disk":
        begin = time.perf_counter()
        with first.open("rb", buffering=0) as file:
            size = len(file.read(_BLOCK))
        seconds, said = time.perf_counter() - begin, "a first block was read once more at"
    else:
        size = _BLOCK
        source = torch.zeros(size, dtype=torch.uint8, device="cpu" if what == "bus" else device)
        target = torch.zeros_like(source, device=device)
        begin = time.perf_counter()
        target.copy_(source)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds, said = time.perf_counter() - begin, "a copy of 64 MiB ran at"
    return f"{said} {size / max(seconds, 1e-9) / 1e9:.2g} GB/s"

"""How long a call takes: inputs rotated past the cache, providers in turn, the device's own clock."""

from __future__ import annotations

import copy
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvkern.report.record import forget_peak_memory, peak_memory, resident_memory

Arguments = tuple[tuple[Any, ...], dict[str, Any]]
Call = Callable[..., Any]
Sample = Callable[[], float]

_GRAPH_BELOW = 256 << 20  # bytes a call moves; below, launching can cost as much as running


@dataclass(frozen=True)
class Timing:
    """Seconds a call: the median, and the 20th and 80th percentile."""

    median: float
    p20: float
    p80: float

    @staticmethod
    def of(samples: list[float]) -> Timing:
        """From at least two samples."""
        p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
        return Timing(statistics.median(samples), p20, p80)


def tensors_in(values: Any) -> Iterator[Tensor]:
    """All tensors in nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, dict):
        yield from tensors_in(list(values.values()))
    elif isinstance(values, list | tuple):
        for value in values:
            yield from tensors_in(value)


class Copies:
    """Copies of a call's arguments, more bytes together than a cache holds; each used in turn, edits undone.

    Args:
        arguments: what is copied.
        past: bytes that the copies must exceed. At least two are made.
    """

    def __init__(self, arguments: Arguments, past: int) -> None:
        size = sum(t.nbytes for t in tensors_in(arguments))
        count = 2 if size == 0 else max(2, min(64, -(-past // size) + 1))
        self.all: list[Arguments] = [copy.deepcopy(arguments) for _ in range(count)]
        self._clean = list(tensors_in(arguments))
        self._versions = [t._version for one in self.all for t in tensors_in(one)]
        self._at = count

    def next(self) -> Arguments:
        """The copy that was used longest ago, as good as new."""
        if self._at == len(self.all):
            self.refresh()
            self._at = 0
        self._at += 1
        return self.all[self._at - 1]

    def refresh(self) -> None:
        """Undo what calls did to the copies. What was once edited always is: a graph's replay tells no version."""
        tensors = (t for one in self.all for t in tensors_in(one))
        for tensor, clean, version in zip(tensors, itertools.cycle(self._clean), self._versions, strict=False):
            if tensor._version != version:
                tensor.copy_(clean)


def clock_on(device: torch.device, call: Call, copies: Copies | None = None, moved: int = 1 << 40) -> Sample:
    """A function that measures one call and returns its seconds.

    Args:
        device: on a GPU, events on its stream tell the time; on a CPU, the wall clock.
        call: takes what the copies hold.
        copies: inputs; None for a call without.
        moved: bytes a call moves: calls of little are captured in a CUDA graph, where that is possible.
    """
    if device.type == "cuda":
        return _gpu_clock(call, copies, moved)

    def sample() -> float:
        args, kwargs = copies.next() if copies else ((), {})
        start = time.perf_counter()
        call(*args, **kwargs)
        return time.perf_counter() - start

    return sample


def _gpu_clock(call: Call, copies: Copies | None, moved: int) -> Sample:
    """A sample is the mean over one round through the copies: a single short kernel is below the events' resolution."""
    inputs: list[Arguments] = copies.all if copies else [((), {})]

    def round_trip() -> None:
        for args, kwargs in inputs:
            call(*args, **kwargs)

    run = _captured(round_trip) if moved < _GRAPH_BELOW else round_trip
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        if copies:
            copies.refresh()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return start.elapsed_time(stop) / 1e3 / len(inputs)

    return sample


def _captured(run: Callable[[], None]) -> Callable[[], None]:
    """``run`` as a CUDA graph; itself where it waits for the device, which a graph cannot."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made at the first call must not be captured
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return run
    return graph.replay


def interleave(
    samples: Mapping[str, Sample], seconds: float, *, rounds: int = 5, clock: Callable[[], float] = time.perf_counter
) -> dict[str, list[float]]:
    """Warm each up, then let them take turns: what disturbs the machine disturbs all alike.

    Args:
        samples: name -> clock.
        seconds: for each of them; a quarter of it goes to warming up.
        rounds: at least so many.
        clock: tells the time.

    Returns:
        Seconds a call, in the order measured.
    """
    for sample in samples.values():
        end = clock() + seconds / 4
        sample()
        while clock() < end:
            sample()
    found: dict[str, list[float]] = {name: [] for name in samples}
    end = clock() + seconds * len(samples)
    done = 0
    while samples and (done < rounds or (clock() < end and done < 1000)):
        for name, sample in samples.items():
            found[name].append(sample())
        done += 1
    return found


def host_seconds(call: Call, arguments: Arguments, device: torch.device) -> float:
    """What the host spends on one call; ``arguments`` must be so small that nothing else is left. Not synchronised."""
    args, kwargs = arguments
    batches: list[float] = []
    for _ in range(8):
        start = time.perf_counter()
        for _ in range(25):
            call(*args, **kwargs)
        batches.append((time.perf_counter() - start) / 25)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return statistics.median(batches[1:])


def extra_memory(call: Call, arguments: Arguments, device: torch.device) -> int | None:
    """Bytes at the peak of a call beyond what was held before it, outputs included.

    On a GPU what torch allocated; on a CPU resident memory, which also knows the libraries' own buffers (Linux; None
    where it cannot be told).
    """
    args, kwargs = arguments
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call(*args, **kwargs)
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    forget_peak_memory()
    resident = resident_memory()
    call(*args, **kwargs)
    peak = peak_memory()
    return None if peak is None or resident is None else max(0, peak - resident)

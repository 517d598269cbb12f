"""The figures of a restoration."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from curvkern.memory import give_back
from curvkern.ops import Change
from curvkern.trace import span


@dataclass(frozen=True)
class ModuleChange:
    """What happened to one module.

    Norms are Frobenius norms of float32 differences, over the entries that are finite.

    Attributes:
        name: the weight's name in the checkpoint.
        layer: decoder layer.
        kind: ``"q_proj"``.
        weights: how many.
        changed: how many differ from the tuned model's.
        undone_by_rounding: how many the method meant to change but storing in the checkpoint's dtype left as they were.
        tuned_norm: |W_t - W_a|, what fine-tuning did.
        restored_norm: |W - W_a|, what is left of it.
        step_norm: |W - W_t|, what the restoration did.
        cosine: between W - W_a and W_t - W_a; 1 where nothing changed, 0 where the module is aligned again.
        nonfinite: NaN or Inf in the result, all found so in the inputs.
        notes: the method's own figures.
    """

    name: str
    layer: int
    kind: str
    weights: int
    changed: int
    undone_by_rounding: int
    tuned_norm: float
    restored_norm: float
    step_norm: float
    cosine: float
    nonfinite: int
    notes: dict[str, float] = field(default_factory=dict[str, float])


@dataclass(frozen=True)
class Stage:
    """A part of the run: wall seconds, and peak resident (and GPU) memory in bytes where it can be told."""

    name: str
    seconds: float
    peak_memory: int | None
    peak_gpu_memory: int | None


@dataclass(frozen=True)
class Report:
    """Everything a restoration has to say for itself."""

    method: str
    source: str
    recipe: dict[str, Any]
    out: str
    saved: str
    modules: list[ModuleChange]
    stages: list[Stage]
    messages: list[str]

    @property
    def changed(self) -> int:
        """Weights that differ from the tuned model's."""
        return sum(m.changed for m in self.modules)

    @property
    def weights(self) -> int:
        """Weights of all selected modules."""
        return sum(m.weights for m in self.modules)

    @property
    def undone_by_rounding(self) -> int:
        """Restorations that rounding undid."""
        return sum(m.undone_by_rounding for m in self.modules)

    @property
    def seconds(self) -> float:
        """Wall time of all stages."""
        return sum(stage.seconds for stage in self.stages)

    @property
    def peak_memory(self) -> int | None:
        """Bytes, over all stages; None where it cannot be told."""
        return max((s.peak_memory for s in self.stages if s.peak_memory is not None), default=None)

    def as_dict(self) -> dict[str, Any]:
        """JSON-ready: every field, and the totals."""
        totals = {
            "weights": self.weights,
            "changed": self.changed,
            "undone_by_rounding": self.undone_by_rounding,
            "seconds": self.seconds,
            "peak_memory": self.peak_memory,
        }
        return {**asdict(self), "totals": totals}


def record_change(
    name: str, layer: int, kind: str, weights: int, found: Change, *, wanted: int, notes: dict[str, float]
) -> ModuleChange:
    """What is to be said of a restored module.

    Args:
        name: of the weight.
        layer: decoder layer.
        kind: of the module.
        weights: how many.
        found: its comparison with what it was made from.
        wanted: weights the method meant to change.
        notes: the method's figures.
    """
    tuned_norm, restored_norm, step_norm = (
        math.sqrt(square) for square in (found.tuned_square, found.restored_square, found.step_square)
    )
    product = tuned_norm * restored_norm
    return ModuleChange(
        name=name,
        layer=layer,
        kind=kind,
        weights=weights,
        changed=found.changed,
        undone_by_rounding=max(0, wanted - found.changed),
        tuned_norm=tuned_norm,
        restored_norm=restored_norm,
        step_norm=step_norm,
        cosine=found.product / product if product > 0 else float(found.changed == 0),
        nonfinite=found.nonfinite,
        notes=notes,
    )


class Stages:
    """Times the parts of a run and reads their peak memory."""

    def __init__(self) -> None:
        self.done: list[Stage] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Generator[None]:
        """Measure a block of code."""
        cuda = torch.cuda.is_initialized()
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        forget_peak_memory()
        start = time.perf_counter()
        try:
            with span(name, "statistics" if name in ("statistics", "evidence") else "stage"):
                yield
        finally:
            seconds = time.perf_counter() - start
            gpu = torch.cuda.max_memory_allocated() if cuda else None
            self.done.append(Stage(name, seconds, peak_memory(), gpu))


def forget_peak_memory() -> None:
    """Give freed memory back, and let the kernel's record of the peak start from what is resident now (Linux)."""
    give_back()
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int | None:
    """Bytes that were resident at most since `forget_peak_memory`; None where it cannot be told."""
    return _status("VmHWM:")


def resident_memory() -> int | None:
    """Bytes that are resident now; None where it cannot be told."""
    return _status("VmRSS:")


def _status(key: str) -> int | None:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    lines = (line.split() for line in status.splitlines())
    return next((int(words[1]) * 1024 for words in lines if words[0] == key), None)

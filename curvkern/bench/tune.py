"""`curvkern bench --tune`: which launches of the Triton kernels are the fastest on this GPU."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain, product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

import curvkern
from curvkern.bench import clock
from curvkern.bench.cases import CASES, Case
from curvkern.bench.gate import Gate
from curvkern.bench.providers import Provider
from curvkern.bench.results import Row
from curvkern.kernels.tuned import save_table, trying

Launch = dict[str, int]


@dataclass(frozen=True)
class Space:
    """What can be chosen for a kernel.

    Attributes:
        function: the public function that launches it.
        dtype: of the case it is measured on.
        choices: name -> values; all combinations are tried.
        most: elements of a tile for each warp; with more, its sums do not fit the registers.
    """

    function: str
    dtype: torch.dtype
    choices: dict[str, tuple[int, ...]]
    most: int = 1 << 30

    def launches(self) -> Iterator[Launch]:
        """Every combination that is worth compiling."""
        for values in product(*self.choices.values()):
            launch = dict(zip(self.choices, values, strict=True))
            sides = [launch[name] for name in ("block_o", "block_i", "block") if name in launch]
            area = math.prod(sides) * (sides[0] if len(sides) == 1 else 1)
            if area <= self.most * launch["num_warps"]:
                yield launch


_TILES = {"block_o": (64, 128, 256), "block_i": (64, 128, 256), "block_k": (32, 64), "num_warps": (4, 8)}
_STAGES = {"num_stages": (3, 4)}
_SQUARE = {"block": (32, 64, 128), "num_warps": (4, 8)} | _STAGES
_FLAT = {"BLOCK": (1024, 2048, 4096, 8192), "num_warps": (4, 8)}

#: By the name under which a kernel asks `curvkern.kernels.tuned.launch_of`.
SPACES = {
    "fisher plain": Space("fisher_diag_", torch.bfloat16, _TILES | _STAGES, 4096),
    "fisher wide": Space("fisher_diag_", torch.float32, _TILES | _STAGES, 1024),
    "gram half": Space("gram_", torch.bfloat16, _SQUARE | {"block_k": (32, 64, 128)}, 4096),
    "gram wide": Space("gram_", torch.float32, _SQUARE | {"block_k": (16, 32)}, 2048),
    "alignment_map": Space("alignment_map", torch.bfloat16, {"num_warps": (4, 8)} | _STAGES),
    "score_histogram": Space("score_histogram_", torch.bfloat16, _FLAT),
    "rollback": Space("rollback_", torch.bfloat16, _FLAT),
    "blend": Space("blend_", torch.bfloat16, _FLAT),
}


def tune(
    device: torch.device, size: str = "m", seconds: float = 0.05, console: Console | None = None, gpu: str = ""
) -> Path:
    """Measure every launch of every kernel with a choice, and store those that beat the kernel's own by 2 %.

    Args:
        device: a GPU.
        size: of the cases.
        seconds: for each launch.
        console: where to say what was found.
        gpu: name to store the table under; empty: that of ``device``.

    Returns:
        The table's path; kernels read it when they are next launched.

    Raises:
        ValueError: ``device`` is no GPU, and there is no ``gpu`` to measure for.
    """
    if device.type != "cuda" and not gpu:
        raise ValueError(f"bench: --tune is for GPUs, not {device.type}: kernels of the CPU have nothing to choose.")
    console = console or Console()
    found: dict[str, Launch] = {}
    for name, space in SPACES.items():
        case = next(
            case
            for case in chain.from_iterable(CASES.values())
            if (case.function, case.size, case.dtype) == (space.function, size, space.dtype)
        )
        with torch.no_grad():
            best, gain, tried = _fastest(name, space, case, device, seconds)
        if best:
            found[name] = best
        how = f"{gain:.2f} x its own: {best}" if best else "its own is the fastest"
        console.print(f"{name}, {case}: {tried} launches tried, {how}")
    return save_table(gpu or torch.cuda.get_device_name(device), found)


def _fastest(name: str, space: Space, case: Case, device: torch.device, seconds: float) -> tuple[Launch, float, int]:
    """(the launch, how much faster it is than the kernel's own, launches that gave right results)."""
    arguments = case.make(str(device))
    op = partial(getattr(curvkern, case.function), backend="triton")
    gate, copies = Gate(case, arguments), clock.Copies(arguments, 0)

    def launched(launch: Launch) -> Provider:
        def call(*args: Any, **kwargs: Any) -> Any:
            with trying(name, launch):
                return op(*args, **kwargs)

        return Provider("triton", call, "ours")

    def times(*launches: Launch) -> list[float]:
        clocks = {str(launch): clock.clock_on(device, launched(launch).call, copies, case.bytes) for launch in launches}
        return [statistics.median(samples) for samples in clock.interleave(clocks, seconds).values()]

    row = Row(case.function, case.dtype_name, case.label, name, "ours")
    # What is wrong, or too large for this GPU, is out.
    right = [launch for launch in space.launches() if gate.judge(launched(launch), row).status == "ok"]
    if not right:
        return {}, 1.0, 0
    best = min(right, key=lambda launch: times(launch)[0])
    # The best of many was lucky too: once more, in turn with the kernel's own.
    own, again = times({}, best)
    return (best, own / again, len(right)) if again < 0.98 * own else ({}, 1.0, len(right))

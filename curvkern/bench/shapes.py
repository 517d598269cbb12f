"""A pass over a model of any size, without a checkpoint: its weights are made up when a layer asks for them."""

from __future__ import annotations

import json
import time
import zlib
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from curvkern.bench.machine import Machine
from curvkern.bench.results import Row
from curvkern.checkpoint import Checkpoint, TensorSpec
from curvkern.curvature.capture import Site, select, sites_of, tapped
from curvkern.curvature.losses import logits_of, total_of
from curvkern.curvature.sums import Sums
from curvkern.curvature.texts import Batch
from curvkern.layerwise import LayerwiseModel, Place, Report
from curvkern.ops import rollback_
from curvkern.report.record import forget_peak_memory, peak_memory
from curvkern.trace import span

#: Llama's sizes: hidden, intermediate, layers, heads, heads of keys and values, vocabulary.
LLAMAS = {
    "llama-tiny": (64, 176, 3, 4, 2, 256),
    "llama-3.2-1b": (2048, 8192, 16, 32, 8, 128256),
    "llama-3-8b": (4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": (8192, 28672, 80, 64, 8, 128256),
}
#: Samples, tokens of each, samples at a time: what statistics are usually taken of; on a CPU little enough to end.
_DATA = {"cuda": (128, 512, 4), "cpu": (4, 64, 2)}
_SIZE = 0.02  # standard deviation of weights


class MadeUp(Checkpoint):
    """Random weights of a configuration, the same at every read, on whatever device asks for them."""

    def __init__(self, directory: Path, config: Any, seed: int) -> None:
        """Write ``config.json``; name the tensors as transformers does."""
        from transformers import LlamaForCausalLM

        super().__init__(directory, [], config.to_dict(), indexed=False)
        (directory / "config.json").write_text(json.dumps(config.to_dict()))
        with torch.device("meta"):
            shapes = {name: tuple(p.shape) for name, p in LlamaForCausalLM(config).state_dict().items()}
        dtype = torch.bfloat16
        specs = {name: TensorSpec(name, dtype, s, "", -1, dtype.itemsize * s.numel()) for name, s in _sizes(shapes)}
        self._specs = specs
        self.names = tuple(specs)
        self.nbytes = sum(spec.nbytes for spec in specs.values())
        self._seed = seed

    def read(self, name: str, device: str | torch.device = "cpu") -> Tensor:
        """Make one tensor: normal numbers, around 1 for norms."""
        spec = self.spec(name)
        with span(name, "read", bytes=spec.nbytes):
            generator = torch.Generator(device).manual_seed(zlib.crc32(f"{self._seed}:{name}".encode()))
            made = torch.empty(spec.shape, dtype=spec.dtype, device=device).normal_(0, _SIZE, generator=generator)
            return made.add_(1) if len(spec.shape) == 1 else made


def _sizes(shapes: dict[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Size]]:
    return ((name, torch.Size(shape)) for name, shape in shapes.items())


@dataclass
class Visits:
    """What a pass with edits found: seconds of each layer's statistics and edit, and of the head; bytes at their peak.

    Attributes:
        edited: bytes of weights that were edited and brought to the host.
        chosen: weights that were rolled back.
    """

    model: LayerwiseModel
    aligned: MadeUp
    batches: list[Batch]
    head: float = 0.0
    layers: list[float] = field(default_factory=list[float])
    peaks: list[int] = field(default_factory=list[int])
    edited: int = 0
    chosen: int = 0

    def run(self) -> tuple[Report, float]:
        """Forward, head and backward through all layers; seconds from begin to end."""
        begun = time.perf_counter()
        report = self.model.backward(
            self.batches, lambda model, b: total_of(logits_of(model, b), b, "response_mean"), watch=self.watch
        )
        self._wait()
        return report, time.perf_counter() - begun

    @contextmanager
    def watch(self, place: Place) -> Generator[Callable[[Batch], None]]:
        """Gradient and Fisher diagonal of the linear modules of a layer; in the end, edit it."""
        self._wait()
        self._forget_peak()
        begun, current = time.perf_counter(), list[Batch]()
        linear, _ = select(sites_of(self.model.model), (), (), ("linear",))
        sites = [s for s in linear if place.index is not None and s.name.startswith(f"{place.name}.")]
        sums = Sums(("gradient", "fisher_diag"), "sequence", (128, 128), sum(len(b.ids) for b in self.batches))

        def started(batch: Batch) -> None:
            current[:] = [batch]

        with span(place.name or "head", "statistics"):
            with tapped(sites, {site.name: 1 for site in sites}, sums.add, lambda: current[-1].mask):
                yield started
            self._wait()
        with span(place.name or "head", "compute"):
            for site in sites:
                self._edit(site, sums)
            self._wait()
        if place.index is None:
            self.head = time.perf_counter() - begun
        else:
            self.layers.append(time.perf_counter() - begun)
            self.peaks.append(self._peak())

    def _edit(self, site: Site, sums: Sums) -> None:
        """Roll back where that lowers the loss; the result goes where a writer would take it."""
        weight = self.model.model.get_parameter(site.name).data
        target = self.aligned.read(site.name, self.model.device)
        gradient, fisher = (sums.found[quantity][site.name] for quantity in ("gradient", "fisher_diag"))
        before = weight.clone()
        rollback_(weight, target, 0.0, rule="fisher", gate="descent", grad=gradient, fisher=fisher)
        self.chosen += int((weight != before).sum())
        self.edited += weight.cpu().nbytes

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)

    def _forget_peak(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.model.device)
        else:
            forget_peak_memory()

    def _peak(self) -> int:
        if self.model.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.model.device)
        return peak_memory() or 0


def measure_shape(machine: Machine, shape: str, layers: int | None) -> Iterator[list[Row]]:
    """Statistics and edit of a Llama, layer by layer; its weights are made up on the device.

    Every batch runs forward, once more forward and backward through each layer; gradient and Fisher diagonal of its
    linear modules are summed, the layer is rolled back towards another one, and what was edited goes to the host. The
    first run, of one layer, is not measured.

    Args:
        machine: where.
        shape: a key of `LLAMAS`.
        layers: run only the first; what all would take is extrapolated, and its row says so. None: all.

    Raises:
        ValueError: no such shape, or no such number of layers.
    """
    from transformers import LlamaConfig

    if shape not in LLAMAS:
        raise ValueError(f"bench: no shape {shape!r}; there are {', '.join(LLAMAS)}.")
    hidden, inner, whole, heads, pairs, words = LLAMAS[shape]
    count = whole if layers is None else layers
    if not 1 <= count <= whole:
        raise ValueError(f"bench: layers is {layers}; {shape} has {whole}, wanted 1 to {whole}.")
    config = LlamaConfig(
        vocab_size=words, hidden_size=hidden, intermediate_size=inner, num_hidden_layers=1, num_attention_heads=heads,
        num_key_value_heads=pairs, dtype=torch.bfloat16, max_position_embeddings=8192,
    )  # fmt: skip
    batches = _batches(machine.device, words)
    _visited(config, batches, machine.device)
    config.num_hidden_layers = count
    visits, report, seconds = _visited(config, batches, machine.device)
    yield _rows(machine, shape, whole, visits, report, seconds)


def _batches(device: str, words: int) -> list[Batch]:
    samples, tokens, at_a_time = _DATA[device]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(words, (samples, tokens), generator=generator).to(device)
    every = torch.ones_like(ids, dtype=torch.bool)
    starts = range(0, samples, at_a_time)
    return [Batch(s, ids[s : s + at_a_time], ids[s : s + at_a_time], every[s : s + at_a_time]) for s in starts]


def _visited(config: Any, batches: list[Batch], device: str) -> tuple[Visits, Report, float]:
    with TemporaryDirectory(prefix="curvkern-bench-") as name:
        tuned, aligned = (MadeUp(Path(name), config, seed) for seed in (0, 1))
        with LayerwiseModel.open(tuned, device) as model:
            visits = Visits(model, aligned, batches)
            return visits, *visits.run()


def _rows(machine: Machine, shape: str, whole: int, visits: Visits, report: Report, seconds: float) -> list[Row]:
    """A layer; what its weights took meanwhile; the head; the layers that ran; all of them."""
    count, batches = len(visits.layers), visits.batches
    tokens = sum(batch.ids.numel() for batch in batches)
    config = visits.model.config
    linear = visits.edited // torch.bfloat16.itemsize // count
    # Weights twice, those to roll back to and the edited ones; hidden states written 2 times and read 4.
    moved = 4 * visits.edited // count + 6 * tokens * config.hidden_size * torch.bfloat16.itemsize
    flops = 8 * linear * tokens  # forward twice, input gradient, Fisher; attention itself is left out
    label = f"{shape}, {count} of {whole} layers, {len(batches)} x {list(batches[0].ids.shape)} tokens"
    floor = 1e6 * flops / machine.rate(torch.bfloat16)
    blank = Row("pass", "bfloat16", label, "", "ours", bytes=moved, flops=flops, floor=floor, bound="flops")
    layer = (seconds - visits.head) / count

    def row(provider: str, took: float, times: int = 1, kind: str = "ours", peak: int | None = None) -> Row:
        micro = 1e6 * took
        sized = replace(blank, bytes=times * moved, flops=times * flops, floor=times * floor)
        return replace(sized, provider=provider, kind=kind, median=micro, p20=micro, p80=micro, extra=peak)

    loads = max(1, sum(report.reads))
    rest = [] if count == whole else [row(f"all {whole}, extrapolated", visits.head + whole * layer, whole)]
    return [
        row("a layer", layer, peak=max(visits.peaks)),
        row("its loading, beside it", report.loading / loads, 0, "bound"),
        row("head and loss", visits.head, 0, "bound"),
        row(f"{count} layers", seconds, count),
        *rest,
    ]

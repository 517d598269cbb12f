"""Modules of the checkpoints as methods see them: streamed with their statistics, measured again while planning."""

from __future__ import annotations

from collections.abc import Collection, Generator, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from typing import TYPE_CHECKING

from torch import Tensor

from curvkern.memory import give_back
from curvkern.progress import bar
from curvkern.restore.evidence import ModuleStatistics, gather_statistics, read_ahead
from curvkern.restore.part import Part
from curvkern.restore.scope import layer_of

if TYPE_CHECKING:
    from curvkern.checkpoint import Bundle
    from curvkern.methods import Module, Need


class Stream:
    """Streams the selected modules, as often as asked."""

    def __init__(self, bundle: Bundle, known: ModuleStatistics, room: int | None, progress: bool) -> None:
        """Read nothing yet.

        Args:
            bundle: the opened checkpoints.
            known: statistics.
            room: bytes for statistics that are known and for all that is done with a module; None: enough.
            progress: show bars.
        """
        self.bundle = bundle
        self.known = known
        self.room = room
        self.progress = progress

    def modules(self, what: str, wanted: Mapping[str, Collection[Need]], working: int) -> Generator[Module]:
        """One sweep in file order.

        Args:
            what: is done, for the bar.
            wanted: modules, and the statistics that are wanted of each.
            working: bytes that one of them takes, see `evidence.working_set`.
        """
        from curvkern.methods import Module

        names = [name for name in self.bundle.names if name in wanted]
        ahead = read_ahead(self.room, working + self.known.held)
        stream = self.bundle.stream(names, ahead)
        with bar(what, len(names), self.progress) as advance, closing(stream):
            for done, (name, tensors) in enumerate(stream, 1):
                layer = layer_of(name) or 0
                advance(done, f"{what}: layer {layer}")
                yield Module(
                    name=name,
                    layer=layer,
                    kind=name.rsplit(".", 2)[-2],
                    tuned=tensors["tuned"],
                    aligned=tensors["aligned"],
                    base=tensors.get("base"),
                    unaligned=tensors.get("unaligned"),
                    safety_adapter=tensors.get("safety_adapter"),
                    factors=self._factors("tuned", name, tensors["tuned"]),
                    safety_factors=self._factors("safety_adapter", name, tensors["tuned"]),
                    statistics=self.known.of(name, wanted[name]),
                    losses=self.known.losses(wanted[name]),
                )
                del tensors
                if self.room is not None:
                    give_back()

    def _factors(self, role: str, name: str, beside: Tensor) -> tuple[Tensor, Tensor, float] | None:
        adapter = getattr(self.bundle.sources.get(role), "adapter", None)
        # Beside a tensor that the adapter holds whole, factors are not all that it changes.
        if adapter is None or name not in adapter.names or name in adapter.replaced:
            return None
        factors = adapter.factors(name)
        return factors.B.to(beside.device), factors.A.to(beside.device), factors.scale


class PlannedModules:
    """One method's modules, as it sees them while it plans; see `methods.Modules`."""

    def __init__(self, part: Part, stream: Stream, scratch: Path) -> None:
        """Of the tuned model.

        Args:
            part: the method's.
            stream: with statistics of the tuned model.
            scratch: directory for others that do not fit into memory.
        """
        self._part = part
        self._first = self._stream = stream
        self._scratch = scratch / "again"
        self._bits: Mapping[str, Tensor] = {}

    def __call__(self) -> Generator[Module]:
        """Stream all once, in file order."""
        part = self._part
        for module in self._stream.modules("planning", dict.fromkeys(part.names, part.needs), part.working):
            yield replace(module, tuned=_rolled_back(module.tuned, module.aligned, self._bits.get(module.name)))

    def rolled_back(self, bits: Mapping[str, Tensor]) -> PlannedModules:
        """Itself, from now on with some weights rolled back; without bits nothing is measured."""
        self._stream, self._bits = self._first, bits  # lets go of the last statistics
        rmtree(self._scratch, ignore_errors=True)
        if bits:
            first = self._first
            self._stream = Stream(first.bundle, self._measured(), first.room, first.progress)
        return self

    def _measured(self) -> ModuleStatistics:
        from curvkern.checkpoint import EditedView

        part, first, bits = self._part, self._first, self._bits
        aligned, tuned = first.bundle.sources["aligned"], first.bundle.sources["tuned"]
        return gather_statistics(
            part.recipe.model_copy(update={"statistics": None}),
            [need for need in part.needs if need.at == "tuned"],
            part.data,
            first.bundle,
            part.names,
            scratch=self._scratch,
            tuned=EditedView(tuned, bits, lambda name, w: _rolled_back(w, aligned.read(name, w.device), bits[name])),
            others=first.known.without("tuned"),
            progress=first.progress,
            taken=first.known.held + part.bits,
        )


def _rolled_back(tuned: Tensor, aligned: Tensor, bits: Tensor | None) -> Tensor:
    from curvkern.ops import rollback_

    if bits is None:
        return tuned
    weight = tuned.clone()
    rollback_(weight, aligned.to(weight.dtype), mask=bits.to(weight.device))
    return weight

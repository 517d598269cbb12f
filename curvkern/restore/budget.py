"""Whether a model and what is measured of it fit into a memory budget, and the model opened so that they do."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from curvkern.restore.scope import RestoreError, layer_of

if TYPE_CHECKING:
    from curvkern.checkpoint import Weights
    from curvkern.curvature import Footprint


@dataclass(frozen=True)
class Budget:
    """Bytes that may be taken on the device.

    Attributes:
        nbytes: how many.
        given: by the recipe; else it is what was free.
        device: where the model runs.
        taken: of these, by what is there already.
    """

    nbytes: int
    given: bool
    device: str
    taken: int = 0

    @classmethod
    def of(cls, nbytes: int | None, device: str) -> Budget:
        """What the recipe gives, or what is free on the device."""
        from curvkern.curvature import free_memory

        return cls(free_memory(device) if nbytes is None else nbytes, nbytes is not None, device)

    @property
    def left(self) -> int:
        """Bytes that are not taken."""
        return self.nbytes - self.taken

    def less(self, nbytes: int) -> Budget:
        """The same, when some more of it is taken."""
        return replace(self, taken=self.taken + nbytes)

    def __str__(self) -> str:
        return f"the memory budget of {size(self.nbytes)}" if self.given else f"the {size(self.nbytes)} that are free"


@dataclass(frozen=True)
class Placement:
    """Where what an estimate needs is kept.

    Attributes:
        resident: the whole model is in memory, and all else too.
        hidden_in_files: hidden states between layers are.
        statistics_in_files: statistics are, but for those of the layer that runs.
        room: bytes that are left for other things between two layers.
    """

    resident: bool
    hidden_in_files: bool = False
    statistics_in_files: bool = False
    room: int = 0

    def told(self, edited: str | None, *, kept: bool) -> str:
        """What a report says of a model that runs layer by layer.

        Args:
            edited: data with which a layer was edited as its backward ended.
            kept: there are statistics that were not used up by that.
        """
        places = {True: "in files", False: "in memory"}
        told = ["layer by layer", f"hidden states {places[self.hidden_in_files]}"]
        told += [f"statistics {places[self.statistics_in_files]}"] if kept else []
        told += [f"each layer edited as its backward ended on {edited} data"] if edited else []
        return ", ".join(told)


def place(budget: Budget, needed: Footprint, what: str) -> Placement:
    """Keep in memory what fits, the model first, then hidden states, then statistics.

    Args:
        budget: for all of it; hidden states of a model on a GPU are in the host's memory, of which they may take half.
        needed: see `curvature.footprint`.
        what: is measured, for messages.

    Raises:
        RestoreError: not even one layer fits.
    """
    from curvkern.curvature import free_memory

    if needed.resident <= budget.left:
        return Placement(resident=True)
    left = budget.left - needed.by_layer
    if left < 0:
        raise RestoreError(
            f"restore: {what} take about {size(needed.by_layer)} one layer at a time (embeddings and head "
            f"{size(needed.outside)}, two layers {size(2 * needed.layer)}, their statistics "
            f"{size(needed.layer_statistics)}, activations {size(needed.layer_activations)}), more than {budget}; give "
            "more with memory_budget (--memory-budget), or shorter rows of data."
        )
    on_host = torch.device(budget.device).type == "cpu"
    room = left if on_host else free_memory("cpu") // 2
    in_files = needed.hidden > room
    if on_host and not in_files:
        left -= needed.hidden
    statistics_in_files = needed.statistics > left
    room = left + needed.layer_activations - (0 if statistics_in_files else needed.statistics)
    return Placement(False, in_files, statistics_in_files, room)


def require_resident(budget: Budget, nbytes: int, who: str) -> None:
    """Refuse a method that needs the whole model in memory where it does not fit.

    Raises:
        RestoreError: says what it takes.
    """
    if nbytes > budget.left:
        raise RestoreError(
            f"restore: {who} runs the whole model in memory, which takes about {size(nbytes)} with its gradients, more "
            f"than {budget}; choose a device with more memory, a narrower dtype if it has that parameter, or a method "
            "that runs layer by layer, such as budgeted."
        )


def size(nbytes: float) -> str:
    """``2.9 GiB``, ``400 MiB``."""
    for unit, wide in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= wide:
            return f"{nbytes / wide:.3g} {unit}"
    return f"{nbytes:.0f} B"


def shapes_by_layer(source: Weights) -> dict[int | None, dict[str, tuple[int, ...]]]:
    """Shapes of each decoder layer's tensors, by number; None: of those outside."""
    found: dict[int | None, dict[str, tuple[int, ...]]] = defaultdict(dict)
    for name in source.names:
        found[layer_of(name)][name] = source.spec(name).shape
    return found


@contextmanager
def opened(source: Weights, device: str, *, resident: bool) -> Generator[Any]:
    """The model of a checkpoint, or of an adapter on one, in the checkpoint's dtype.

    Args:
        source: it.
        device: where it runs.
        resident: as transformers has it, whole; else a `LayerwiseModel`.
    """
    if resident:
        yield _loaded(source, device)
        return
    from curvkern.layerwise import LayerwiseModel

    with LayerwiseModel.open(source, device) as model:
        yield model


def _loaded(source: Weights, device: str) -> Any:
    """An adapter's weights are put into the aligned model, edited ones into the one underneath."""
    from transformers import AutoModelForCausalLM

    from curvkern.checkpoint import EditedView, TunedView

    source.require_config()
    if isinstance(source, EditedView):
        model = _loaded(source.under, device)
        _put(model, ((name, source.read(name)) for name in source.edited))
        return model
    model: Any = AutoModelForCausalLM.from_pretrained(source.directory, dtype="auto")
    model.to(device).eval()
    if isinstance(source, TunedView):
        changed = (*source.adapter.names, *source.adapter.replaced)
        _put(model, ((name, source.read(name)) for name in changed))
    return model


@torch.no_grad()
def _put(model: Any, tensors: Iterable[tuple[str, Tensor]]) -> None:
    state = model.state_dict()
    for name, tensor in tensors:
        if name not in state:
            raise RestoreError(
                f"restore: the checkpoint's {name} is no parameter of {type(model).__name__}: this transformers holds "
                "it in another form, so that the model cannot be run with another weight. Merge an adapter into a "
                "checkpoint; leave modules out with exclude=... (--exclude)."
            )
        state[name].copy_(tensor)

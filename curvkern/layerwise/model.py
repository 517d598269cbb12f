"""`LayerwiseModel`: a causal language model of which one decoder layer at a time is in memory."""

from __future__ import annotations

import time
from collections.abc import Generator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from curvkern.checkpoint import Checkpoint, Weights
from curvkern.layerwise.boundaries import boundaries
from curvkern.layerwise.error import LayerwiseError
from curvkern.layerwise.gradient import GradientPass, OnHidden, Place, Watch, unwatched
from curvkern.layerwise.loader import Loader
from curvkern.layerwise.skeleton import build, find_layers
from curvkern.layerwise.sweep import Losses, Pass
from curvkern.layerwise.tangent import Direction, OnProduct, TangentPass, plain_operations


@dataclass(frozen=True)
class Report:
    """What a pass found and cost.

    Attributes:
        losses: of each batch, as the caller's function gave them.
        loading: seconds of reading weights, most of them while layers ran.
        waiting: seconds that layers waited for weights.
        computing: seconds of everything else.
        bytes_read: of the checkpoint.
        reads: how often each layer was read.
    """

    losses: tuple[Tensor, ...]
    loading: float
    waiting: float
    computing: float
    bytes_read: int
    reads: tuple[int, ...]


class LayerwiseModel:
    """A causal LM of transformers whose embeddings, final norm and head are in memory, and its decoder layers on disk.

    Nothing in here knows an architecture: names, masks, positions and the loss are transformers' own.

    Attributes:
        model: of the class that transformers would load; parameters of layers are on the meta device between visits.
        config: its configuration.
        layers: its decoder layers.
        name: of their list among its modules, such as ``model.layers``.
        device: where it runs.
        dtype: of its weights.
    """

    def __init__(
        self, model: Any, name: str, layers: Sequence[nn.Module], loader: Loader, device: torch.device
    ) -> None:
        self.model = model
        self.config: Any = model.config
        self.name = name
        self.layers = layers
        self.device = device
        self.dtype: torch.dtype = model.dtype
        self._loader = loader
        self._opened = ExitStack()

    @classmethod
    def open(
        cls,
        source: str | Path | Weights,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        attention: str | None = None,
    ) -> LayerwiseModel:
        """Build the model, match the checkpoint's names to its parameters, then load what lies outside the layers.

        Args:
            source: a checkpoint, or what `Checkpoint.open` takes; one that is handed over open stays open.
            device: where the model runs.
            dtype: of the weights and the arithmetic; None: what the configuration says, else the checkpoint's.
            attention: transformers' ``attn_implementation``; None: what the model would take by itself.

        Raises:
            CheckpointError: not a checkpoint, or one without ``config.json``.
            LayerwiseError: transformers older than 5, quantised weights, no list of decoder layers, tensors that are
                missing, have no place or another shape.
        """
        with ExitStack() as opened:
            if isinstance(source, (str, Path)):
                source = opened.enter_context(Checkpoint.open(source))
            model = build(source, dtype)
            if attention is not None:
                model.set_attn_implementation(attention)
            name, layers = find_layers(model)
            place = torch.device(device)
            loader = Loader(model, name, len(layers), source, place)
            loader.load_outside()
            ready = cls(model, name, list(layers), loader, place)
            ready._opened = opened.pop_all()
            return ready

    def backward(
        self,
        batches: Sequence[Any],
        losses: Losses,
        *,
        watch: Watch = unwatched,
        on_hidden: OnHidden = lambda layer, batch, gradient: None,
        spill: str | Path | None = None,
        keep_every: int = 1,
    ) -> Report:
        """Run all batches forward and backward, all of them through a layer before the next one is loaded.

        No gradient of a weight is formed unless ``watch`` makes a parameter require one.

        Args:
            batches: whatever ``losses`` takes.
            losses: of (model, batch): calls the model as usual, returns a tensor whose sum is differentiated. Called
                twice a batch: stopped at the layers, and for what follows them.
            watch: of a `Place`, a context around the backward passes of all batches through a layer, or the head;
                what it gives is called with each batch before that runs.
            on_hidden: called with (l, number of the batch, gradient of the hidden state that goes into layer l); l is
                the number of layers for the last one's output.
            spill: a directory for hidden states between layers; None: in the host's memory.
            keep_every: of the hidden states, only those into every such layer are kept, and the others made again,
                for one more read of the weights.

        Raises:
            LayerwiseError: no batches; the layers are not a chain; no room in ``spill``.
            CheckpointError: weights could not be read.
        """
        self._check("backward", batches, keep_every)
        with boundaries(spill) as held:
            sweep = GradientPass(
                self.model, self.layers, self.name, batches, losses, held, self.device, watch=watch, on_hidden=on_hidden
            )
            return self._run(sweep, keep_every)

    def tangent(
        self,
        batches: Sequence[Any],
        losses: Losses,
        direction: Direction,
        on_product: OnProduct,
        *,
        spill: str | Path | None = None,
        keep_every: int = 1,
    ) -> Report:
        """Multiply the Hessian of the summed losses by a direction v, exactly, one layer in memory at a time.

        Attention and experts run as plain operations meanwhile, whatever the configuration says.

        Args:
            batches: as in `backward`.
            losses: as in `backward`; made of torch operations, without ``.item()``.
            direction: of (name, parameter), the part of v for it, of its shape; None: the parameter is held fixed.
                Asked again at each visit, so that a random v is made anew and not stored. Names are the model's; those
                of tied parameters the first.
            on_product: called with (name, tensor like the parameter); the sum over all calls for a name is its part of
                H v. There is a call for each batch; two, where embeddings and head are one.
            spill: as in `backward`.
            keep_every: as in `backward`.

        Raises:
            LayerwiseError: as in `backward`; or a part of v has another shape than its parameter.
            CheckpointError: weights could not be read.
        """
        self._check("tangent", batches, keep_every)
        with boundaries(spill) as held, plain_operations(self.model):
            sweep = TangentPass(
                self.model, self.layers, self.name, batches, losses, held, self.device,
                direction=direction, on_product=on_product,
            )  # fmt: skip
            return self._run(sweep, keep_every)

    def places(self) -> Generator[Place]:
        """Visit what lies outside of the layers, then each layer while its weights are loaded.

        Raises:
            CheckpointError: weights could not be read.
        """
        yield Place(None, "", self.model)
        with closing(self._loader.visits(range(len(self.layers)), lambda index: index)) as visits:
            for index in visits:
                yield Place(index, f"{self.name}.{index}", self.layers[index])

    def close(self) -> None:
        """Close the checkpoint, if it was opened here; closing twice is harmless."""
        self._opened.close()

    def __enter__(self) -> LayerwiseModel:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _check(self, method: str, batches: Sequence[Any], keep_every: int) -> None:
        if not batches:
            raise LayerwiseError(f"LayerwiseModel.{method}: batches is empty; wanted at least one")
        if not 1 <= keep_every <= len(self.layers):
            raise LayerwiseError(
                f"LayerwiseModel.{method}: keep_every is {keep_every}; wanted 1 to {len(self.layers)}, the layers"
            )

    def _run(self, sweep: Pass, keep_every: int) -> Report:
        self._loader.reset()
        begun = time.perf_counter()
        sweep.run(self._loader, keep_every)
        cost, seconds = self._loader.traffic, time.perf_counter() - begun
        return Report(
            losses=tuple(sweep.found),
            loading=cost.loading,
            waiting=cost.waiting,
            computing=seconds - cost.waiting,
            bytes_read=cost.bytes_read,
            reads=tuple(cost.reads),
        )

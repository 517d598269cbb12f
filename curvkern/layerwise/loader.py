"""Puts weights into a model that has none, a layer at a time, and reads the next one meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from curvkern.checkpoint import Weights
from curvkern.layerwise.error import LayerwiseError
from curvkern.layerwise.names import Fill, plan_fills, wanted_dtypes
from curvkern.memory import give_back

Step = TypeVar("Step")


@dataclass
class Traffic:
    """What reading has cost so far.

    Attributes:
        loading: seconds that reads took, in the background or not.
        waiting: seconds of them that nothing else was done in.
        bytes_read: of the checkpoint.
        reads: how often each layer was read.
    """

    reads: list[int]
    loading: float = 0.0
    waiting: float = 0.0
    bytes_read: int = 0


@dataclass
class _Read:
    """A layer's weights on the device, what they cost and, on a GPU, when they will be there."""

    tensors: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    seconds: float = 0.0
    nbytes: int = 0
    ready: torch.cuda.Event | None = None


class Loader:
    """The weights of one model, from its checkpoint.

    Attributes:
        traffic: what has been read since the last `reset`.
    """

    def __init__(self, model: Any, layers: str, count: int, source: Weights, device: torch.device) -> None:
        """Match all names; read nothing.

        Args:
            model: without weights.
            layers: name of its list of decoder layers.
            count: how many there are.
            source: read from when weights are asked for; stays open.
            device: where weights go.

        Raises:
            LayerwiseError: as `plan_fills`.
        """
        self._model = model
        self._source = source
        self._device = device
        # Layers run on the caller's stream; weights come on one of their own meanwhile.
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._state: dict[str, Tensor] = model.state_dict()
        self._dtypes = wanted_dtypes(model, self._state)
        self._outside: list[Fill] = []
        self._layers: list[list[Fill]] = [[] for _ in range(count)]
        for fill in plan_fills(model, source):
            self._home(layers, fill).append(fill)
        self.traffic = Traffic([0] * count)

    def _home(self, layers: str, fill: Fill) -> list[Fill]:
        prefix = f"{layers}."
        homes = {t.removeprefix(prefix).split(".")[0] if t.startswith(prefix) else "" for t in fill.targets}
        if len(homes) != 1:
            raise LayerwiseError(
                f"{self._source.path}: {fill.sources[0][1]} is shared by several layers; run this model in memory"
            )
        home = homes.pop()
        return self._layers[int(home)] if home else self._outside

    def reset(self) -> None:
        """Count anew."""
        self.traffic = Traffic([0] * len(self._layers))

    def load_outside(self) -> None:
        """Load what lies outside the decoder layers, for good, and tie what is tied."""
        tensors = self._arrived(self._read(self._outside))
        inside = {name for fills in self._layers for fill in fills for name in fill.targets}
        missing = self._state.keys() - inside - set(self._put(tensors))
        self._model.tie_weights(missing_keys=missing, recompute_mapping=False)
        for _, module in self._model.named_modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(self._device))

    def visits(self, steps: Sequence[Step], layer_of: Callable[[Step], int]) -> Generator[Step]:
        """Yield the steps in order, each with its layer's weights in place; those of the next layer are read meanwhile.

        A layer that the next step needs too stays; others are freed. Close the iterator to free the last one early.

        Raises:
            CheckpointError: a read failed.
            LayerwiseError: what was read does not fit.
        """
        order = [layer_of(step) for step in steps]
        changes = [at for at in range(len(order)) if at == 0 or order[at] != order[at - 1]]
        with ThreadPoolExecutor(1, "curvkern-layer") as pool:
            ahead = [pool.submit(self._read, self._layers[order[0]])]
            for begin, end in zip(changes, [*changes[1:], len(order)], strict=True):
                # A task that is done holds its result: like this frame, it may not outlive the layer.
                names = self._put(self._await(ahead.pop(), order[begin]))
                if end < len(order):
                    ahead.append(pool.submit(self._read, self._layers[order[end]]))
                try:
                    yield from steps[begin:end]
                finally:
                    self._free(names)

    def _await(self, ahead: Future[_Read], layer: int) -> dict[str, Tensor]:
        begun = time.perf_counter()
        read = ahead.result()
        self.traffic.waiting += time.perf_counter() - begun
        self.traffic.loading += read.seconds
        self.traffic.bytes_read += read.nbytes
        self.traffic.reads[layer] += 1
        return self._arrived(read)

    def _arrived(self, read: _Read) -> dict[str, Tensor]:
        """The tensors, for the stream that layers run on: it waits for them, their memory waits for it."""
        if read.ready is not None:
            layers = torch.cuda.current_stream(self._device)
            layers.wait_event(read.ready)
            for tensor in read.tensors.values():
                tensor.record_stream(layers)
        return read.tensors

    def _read(self, fills: Sequence[Fill]) -> _Read:
        begun, read = time.perf_counter(), _Read()
        with torch.cuda.stream(self._stream):  # of None: as if it were not there
            for fill in fills:
                dtype = self._dtypes[fill.targets[0]]
                tensors = {name: self._source.read(name, self._device).to(dtype) for _, name in fill.sources}
                read.nbytes += sum(self._source.spec(name).nbytes for name in tensors)
                read.tensors |= self._made(fill, tensors)
            if self._stream is not None:
                read.ready = torch.cuda.Event()
                read.ready.record(self._stream)
        read.seconds = time.perf_counter() - begun
        return read

    def _made(self, fill: Fill, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        made = fill.make(self._model, tensors)
        for name in fill.targets:
            shape, wanted = (tuple(made[name].shape) if name in made else None), tuple(self._state[name].shape)
            if shape != wanted:
                raise LayerwiseError(
                    f"{self._source.path}: {name}, made of {len(tensors)} tensors such as {next(iter(tensors))}, is "
                    f"{shape}; wanted {wanted}"
                )
        return made

    def _put(self, tensors: dict[str, Tensor]) -> list[str]:
        """Parameters and buffers become ``tensors``; returns their names."""
        for name, tensor in tensors.items():
            owner, _, leaf = name.rpartition(".")
            module: nn.Module = self._model.get_submodule(owner)
            is_parameter = isinstance(getattr(module, leaf), nn.Parameter)
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False) if is_parameter else tensor)
        return list(tensors)

    def _free(self, names: Sequence[str]) -> None:
        self._put({name: self._state[name].to("meta") for name in names})
        give_back()

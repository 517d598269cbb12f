"""Where hidden states and gradients between layers wait for their turn: in memory, or in files."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from curvkern.layerwise.error import LayerwiseError

Key = tuple[str, int, int]  # what it is, the layer it goes into, the batch


class Boundaries(Protocol):
    """Tensors by key; what is put comes back bit for bit, on the CPU."""

    def put(self, key: Key, tensor: Tensor) -> None:
        """Keep a tensor, in place of what the key had."""
        ...

    def get(self, key: Key) -> Tensor:
        """Return what was put."""
        ...

    def drop(self, key: Key) -> None:
        """Forget it."""
        ...

    def require(self, nbytes: int) -> None:
        """Refuse, before anything is put, what there is no room for."""
        ...


@contextmanager
def boundaries(spill: str | Path | None) -> Generator[Boundaries]:
    """A place for boundaries, empty again in the end.

    Args:
        spill: an existing directory to write them to, or None: they stay in memory.

    Raises:
        LayerwiseError: there is no such directory.
    """
    if spill is None:
        yield _Memory()
        return
    if not Path(spill).is_dir():
        raise LayerwiseError(f"layerwise: spill is {str(spill)!r}; wanted a directory that is there")
    with tempfile.TemporaryDirectory(prefix="curvkern-", dir=spill) as directory:
        yield _Files(Path(directory))


class _Memory:
    def __init__(self) -> None:
        self._held: dict[Key, Tensor] = {}

    def put(self, key: Key, tensor: Tensor) -> None:
        self._held[key] = tensor.detach().cpu()

    def get(self, key: Key) -> Tensor:
        return self._held[key]

    def drop(self, key: Key) -> None:
        del self._held[key]

    def require(self, nbytes: int) -> None:
        """Memory grows until it does not; how much there is cannot be told in advance."""


class _Files:
    """One file a tensor: its bytes alone, as shape and dtype stay in memory."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._kinds: dict[Key, tuple[torch.Size, torch.dtype]] = {}

    def put(self, key: Key, tensor: Tensor) -> None:
        self._kinds[key] = tensor.shape, tensor.dtype
        flat = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
        try:
            self._path(key).write_bytes(flat.numpy().data)
        except OSError as error:
            raise LayerwiseError(f"{self._directory}: cannot keep hidden states there: {error.strerror}") from error

    def get(self, key: Key) -> Tensor:
        shape, dtype = self._kinds[key]
        return torch.frombuffer(bytearray(self._path(key).read_bytes()), dtype=dtype).view(shape)

    def drop(self, key: Key) -> None:
        del self._kinds[key]
        self._path(key).unlink()

    def require(self, nbytes: int) -> None:
        free = shutil.disk_usage(self._directory).free
        if nbytes > free:
            raise LayerwiseError(
                f"{self._directory.parent}: hidden states between layers take {nbytes / 2**30:.1f} GiB, but "
                f"{free / 2**30:.1f} GiB are free; raise keep_every, or give another directory"
            )

    def _path(self, key: Key) -> Path:
        return self._directory / "-".join(map(str, key))

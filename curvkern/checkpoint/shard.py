"""One weight file: safetensors read in place, or a legacy pickle mapped by torch."""

from __future__ import annotations

import errno
import os
import pickle
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch

from curvkern.checkpoint.buffers import Buffers
from curvkern.checkpoint.error import CheckpointError
from curvkern.checkpoint.format import TensorSpec, read_header, tensor_bytes

_BLOCK = 8 << 20
_SAMPLES = 64
_SAMPLE_BYTES = 4096
# Larger tensors get pages of their own: what malloc keeps of them after a thread of readers would
# exceed the memory bound.
_LARGE = 8 << 20
#: What all files are read into.
BUFFERS = Buffers()


class Shard(Protocol):
    """What a checkpoint asks of one of its files."""

    path: Path
    specs: tuple[TensorSpec, ...]
    metadata: dict[str, str]

    def read(self, spec: TensorSpec, *, pinned: bool = False) -> torch.Tensor:
        """Return a fresh CPU tensor; pinned, if it can be, where it goes on to a GPU."""
        ...

    def blocks(self, spec: TensorSpec) -> Iterator[memoryview]:
        """Yield the tensor's bytes in order; a block is valid until the next one is asked for."""
        ...

    def fingerprint(self) -> dict[str, int]:
        """Return what tells this file from another, cheaply."""
        ...

    def require_unchanged(self) -> None:
        """Refuse a file that somebody wrote to since it was opened."""
        ...

    def close(self) -> None:
        """Release the file."""
        ...


class SafetensorsShard:
    """A safetensors file; opening it reads the header only."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _require_regular(path)
        self._fd = _opened(path)
        self._opened = os.fstat(self._fd)
        try:
            header = read_header(path, self._fd)
        except BaseException:
            self.close()
            raise
        self.specs, self.metadata, self._header_crc32 = header.specs, header.metadata, header.crc32

    def read(self, spec: TensorSpec, *, pinned: bool = False) -> torch.Tensor:
        """Return a fresh CPU tensor in its own dtype; pinned memory is what a GPU copies from at full rate."""
        flat = torch.empty(spec.nbytes, dtype=torch.uint8, pin_memory=True) if pinned else _new_bytes(spec.nbytes)
        self._fill(flat.numpy().data, spec.offset)
        return flat.view(spec.dtype).view(spec.shape)

    def blocks(self, spec: TensorSpec) -> Iterator[memoryview]:
        """Yield the tensor's bytes through one reused buffer of at most 8 MiB."""
        buffer = _new_bytes(min(_BLOCK, spec.nbytes)).numpy().data
        for start in range(0, spec.nbytes, _BLOCK):
            block = buffer[: min(_BLOCK, spec.nbytes - start)]
            self._fill(block, spec.offset + start)
            yield block

    def fingerprint(self) -> dict[str, int]:
        """Return the size, the header's CRC-32 and that of 4 KiB from up to 64 of the tensors.

        Cheap, and enough to tell one fine-tune from another; not a proof that two files are equal.
        """
        sampled = 0
        for spec in self.specs[:: -(-len(self.specs) // _SAMPLES) or 1]:
            piece = memoryview(bytearray(min(_SAMPLE_BYTES, spec.nbytes)))
            self._fill(piece, spec.offset + (spec.nbytes - len(piece)) // 2)
            sampled = zlib.crc32(piece, sampled)
        size = os.fstat(self._fd).st_size
        return {"bytes": size, "header_crc32": self._header_crc32, "sample_crc32": sampled}

    def require_unchanged(self) -> None:
        """Refuse a file that was written to since it was opened; one put in its place does no harm.

        Raises:
            CheckpointError: It was.
        """
        _require_same(self.path, self._opened, os.fstat(self._fd))

    def close(self) -> None:
        """Close the file; closing twice is harmless."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1

    def _fill(self, view: memoryview, offset: int) -> None:
        if self._fd < 0:
            raise CheckpointError(f"{self.path}: the checkpoint was closed before this read")
        done = 0
        while done < len(view):
            try:
                got = os.preadv(self._fd, [view[done : done + _BLOCK]], offset + done)
            except OSError as error:
                raise CheckpointError(
                    f"{self.path}: cannot read {len(view)} bytes at {offset}: {error.strerror}; look after its disk or "
                    "mount, and run again"
                ) from error
            if got == 0:
                raise CheckpointError(
                    f"{self.path}: was cut short while it was read: ends at byte {os.fstat(self._fd).st_size}, wanted "
                    f"{offset + len(view)}; fetch or copy it again, and run again"
                )
            done += got


class PickleShard:
    """A legacy ``.bin`` file, mapped by `torch.load` with ``weights_only=True``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _require_regular(path)
        self._opened = path.stat()
        self._tensors = _load_pickle(path)
        self.metadata: dict[str, str] = {}
        self.specs = tuple(
            TensorSpec(name, t.dtype, tuple(t.shape), path.name, -1, t.numel() * t.itemsize)
            for name, t in self._tensors.items()
        )

    def read(self, spec: TensorSpec, *, pinned: bool = False) -> torch.Tensor:
        """Return a fresh CPU tensor in its own dtype, not pinned."""
        return self._tensors[spec.name].clone(memory_format=torch.contiguous_format)

    def blocks(self, spec: TensorSpec) -> Iterator[memoryview]:
        """Yield the tensor's bytes at once: they are mapped, not loaded."""
        yield tensor_bytes(self._tensors[spec.name])

    def fingerprint(self) -> dict[str, int]:
        """Return the size and the CRC-32 of the end, which lists each record's own CRC-32."""
        with self.path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - (1 << 20)))
            return {"bytes": size, "tail_crc32": zlib.crc32(file.read())}

    def require_unchanged(self) -> None:
        """Refuse a file that was written to since it was mapped.

        Raises:
            CheckpointError: It was.
        """
        _require_regular(self.path)
        _require_same(self.path, self._opened, self.path.stat())

    def close(self) -> None:
        """Drop the mapping."""
        self._tensors = {}


def _load_pickle(path: Path) -> dict[str, torch.Tensor]:
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path}: not a pickle of plain tensors that torch can map: {reason} "
            "Convert it to safetensors where it comes from."
        ) from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path}: holds a {type(state).__name__}, not a table of tensors")
    for name, value in state.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise CheckpointError(f"{path}: entry {name!r} is a {type(value).__name__}, not a tensor")
    return state


def _require_regular(path: Path) -> None:
    # Opening a FIFO would wait for ever; stat follows links, as hub-cache entries are links.
    try:
        mode = path.stat().st_mode
    except OSError as error:
        raise CheckpointError(_cannot_open(path, error)) from error
    if not stat.S_ISREG(mode):
        kind = "directory" if stat.S_ISDIR(mode) else "pipe, socket or device"
        raise CheckpointError(f"{path}: is a {kind}, not a regular file; wanted weights: fetch or copy the file again")


def _opened(path: Path) -> int:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(_cannot_open(path, error)) from error


def _cannot_open(path: Path, error: OSError) -> str:
    cures = {errno.ENOENT: "fetch or copy the missing file", errno.EACCES: "ask for the right to read it"}
    cure = cures.get(error.errno or 0, "look after its disk or mount")
    return f"{path}: cannot open this weight file: {error.strerror}; {cure}, and run again"


def _require_same(path: Path, then: os.stat_result, now: os.stat_result) -> None:
    if (then.st_mtime_ns, then.st_size) != (now.st_mtime_ns, now.st_size):
        raise CheckpointError(
            f"{path}: was written to while it was read, from {then.st_size} bytes to {now.st_size}, so that old and "
            "new weights would mix; run again once it is still"
        )


def _new_bytes(count: int) -> torch.Tensor:
    return BUFFERS.take(count) if count >= _LARGE else torch.empty(count, dtype=torch.uint8)

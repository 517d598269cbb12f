"""`Checkpoint`: the tensors of a model on disk, by name, without reading more than was asked for."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from curvkern.checkpoint.error import CheckpointError, listed
from curvkern.checkpoint.format import TensorSpec
from curvkern.checkpoint.locate import (
    PICKLE,
    WeightFiles,
    find_weights,
    read_json,
    resolve,
    side_files,
)
from curvkern.checkpoint.shard import PickleShard, SafetensorsShard, Shard
from curvkern.trace import span


class Checkpoint:
    """A model's weights on disk: headers are in memory, data stays where it is.

    Reads are safe from several threads. Use it as a context manager, or call `close`.

    Attributes:
        path: The directory or file it was opened from (for a hub id, the cached snapshot).
        config: The contents of ``config.json``, or an empty table.
        names: Names of the tensors, in file order: by file name, then by place in the file.
        files: Plain names of the weight files, in order.
        indexed: Whether the files came with an index.
        nbytes: Size of all tensors together.
        adapter: None: here the weights are whole (see `TunedView`).
    """

    adapter: None = None

    def __init__(self, path: Path, shards: list[Shard], config: dict[str, Any], *, indexed: bool) -> None:
        self.path = path
        self.config = config
        self.indexed = indexed
        self.files = tuple(shard.path.name for shard in shards)
        self._shards = dict(zip(self.files, shards, strict=True))
        self._specs = {spec.name: spec for shard in shards for spec in shard.specs}
        self.names = tuple(self._specs)
        self.nbytes = sum(spec.nbytes for spec in self._specs.values())

    @classmethod
    def open(cls, path: str | Path, *, stem: str = "model", allow_pickle: bool = False) -> Checkpoint:
        """Open a checkpoint and check its headers; no tensor is read.

        Args:
            path: A Hugging Face directory (one or many safetensors files), a ``.safetensors`` file,
                a snapshot in the hub cache, or a hub id (``org/name``, ``org/name@revision``) that
                is in the cache already: nothing is downloaded.
            stem: Base name of the weight files; ``adapter_model`` for those of an adapter.
            allow_pickle: Also take legacy ``.bin`` files, through ``torch.load(weights_only=True)``.

        Raises:
            CheckpointError: Not a checkpoint, or one whose files are truncated, overlapping,
                missing, not the ones its index lists, or outside its directory.
        """
        root = resolve(path)
        try:
            found = find_weights(root, stem=stem, allow_pickle=allow_pickle)
        except OSError as error:
            raise CheckpointError(
                f"{error.filename or root}: cannot look into it: {error.strerror}; ask for the right to read it, and "
                "run again"
            ) from error
        config_file = (root if root.is_dir() else root.parent) / "config.json"
        config = read_json(config_file) if config_file.exists() else {}
        shards: list[Shard] = []
        try:
            for file in found.paths:
                shards.append(PickleShard(file) if file.suffix == PICKLE else SafetensorsShard(file))
            _check_contents(root, found, shards)
        except BaseException:
            for shard in shards:
                shard.close()
            raise
        return cls(root, shards, config, indexed=found.index is not None)

    def spec(self, name: str) -> TensorSpec:
        """Return what the tensor ``name`` is and where it lies.

        Raises:
            CheckpointError: There is no such tensor.
        """
        try:
            return self._specs[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {name}") from None

    def read(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """Read one tensor in its own dtype; the result shares memory with nothing."""
        spec, place = self.spec(name), torch.device(device)
        with span(name, "read", bytes=spec.nbytes):
            tensor = self._shards[spec.file].read(spec, pinned=place.type == "cuda")
        if place.type == "cpu":
            return tensor
        with span(name, "copy", bytes=spec.nbytes):
            return tensor.to(place)

    def blocks(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in order; a block is valid until the next one is asked for."""
        spec = self.spec(name)
        return self._shards[spec.file].blocks(spec)

    def metadata(self, file: str) -> dict[str, str]:
        """Return the free text that the header of ``file`` carries."""
        return dict(self._shards[file].metadata)

    @property
    def directory(self) -> Path:
        """The directory that it lies in, which transformers can load."""
        return self.path if self.path.is_dir() else self.path.parent

    @property
    def roots(self) -> tuple[Path, ...]:
        """The paths that make up this input, targets of links too: nothing may be written over them."""
        return (self.path, *(shard.path for shard in self._shards.values()), *self.side_files().values())

    def side_files(self, *, tokenizer: bool = True) -> dict[str, Path]:
        """List configuration, model code and licences beside it; tokenizer and templates too."""
        return side_files(self.directory, tokenizer=tokenizer)

    def require_config(self) -> None:
        """Refuse weights without ``config.json``, which transformers cannot load.

        Raises:
            CheckpointError: There is none.
        """
        if not (self.directory / "config.json").is_file():
            raise CheckpointError(
                f"{self.path}: no config.json in {self.directory}; put the model's there, or nothing can load it"
            )

    def fingerprint(self) -> dict[str, Any]:
        """Return sizes and checksums that tell this checkpoint from another, without a full read."""
        files = {name: shard.fingerprint() for name, shard in self._shards.items()}
        config = self.side_files().get("config.json")
        checksum = zlib.crc32(config.read_bytes()) if config else None
        return {"files": files, "tensors": len(self.names), "config_crc32": checksum}

    def require_unchanged(self) -> None:
        """Refuse to go on if a weight file was written to since it was opened: a few microseconds a file.

        Raises:
            CheckpointError: One was; names it.
        """
        for shard in self._shards.values():
            shard.require_unchanged()

    def close(self) -> None:
        """Close the files; closing twice is harmless."""
        for shard in self._shards.values():
            shard.close()

    def __contains__(self, name: object) -> bool:
        return name in self._specs

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Checkpoint({str(self.path)!r}, {len(self.names)} tensors, {self.nbytes} bytes)"


def _check_contents(root: Path, found: WeightFiles, shards: list[Shard]) -> None:
    """Every tensor in one file only, and the index and the headers of one mind."""
    holder: dict[str, str] = {}
    for shard in shards:
        for spec in shard.specs:
            if spec.name in holder:
                raise CheckpointError(f"{root}: {spec.name} is in both {holder[spec.name]} and {spec.file}")
            holder[spec.name] = spec.file
    if not holder:
        raise CheckpointError(f"{root}: holds no tensors")
    if found.index is None:
        return
    lost = [f"{name} ({file})" for name, file in found.index.items() if holder.get(name) != file]
    if lost:
        raise CheckpointError(f"{root}: the index lists tensors their files lack: {listed(lost)}")
    unlisted = [f"{name} ({file})" for name, file in holder.items() if name not in found.index]
    if unlisted:
        raise CheckpointError(f"{root}: the index misses tensors of its files: {listed(unlisted)}")

"""`Adapter`: a LoRA adapter in PEFT's format, read without PEFT."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from curvkern.checkpoint.error import CheckpointError
from curvkern.checkpoint.locate import read_json, resolve, side_files
from curvkern.checkpoint.lora import CONFIG, Place, find_changes, refuse_features
from curvkern.checkpoint.read import Checkpoint


@dataclass(frozen=True)
class LoraFactors:
    """A low-rank change of a weight W, in the orientation W has in the checkpoint.

    Attributes:
        B: [rows of W, r].
        A: [r, columns of W].
        scale: s in W + s B A.
    """

    B: torch.Tensor
    A: torch.Tensor
    scale: float


class Adapter:
    """A LoRA adapter directory.

    Attributes:
        path: The directory.
        config: The contents of ``adapter_config.json``.
        names: Checkpoint names of the weights it changes by low-rank factors, in file order.
        replaced: Checkpoint names of the tensors it holds whole (``modules_to_save``, embeddings
            saved beside the factors).
        weights: The adapter's own tensors.
    """

    def __init__(self, path: Path, config: dict[str, Any], weights: Checkpoint) -> None:
        self.path = path
        self.config = config
        self.weights = weights
        self._places, self._whole = find_changes(weights, config)
        self.names = tuple(self._places)
        self.replaced = tuple(self._whole)

    @classmethod
    def open(cls, path: str | Path, *, allow_pickle: bool = False) -> Adapter:
        """Open an adapter directory (or a hub id in the cache) and check that it is plain LoRA.

        Args:
            path: Holds ``adapter_config.json`` and ``adapter_model.safetensors``.
            allow_pickle: Also take ``adapter_model.bin``.

        Raises:
            CheckpointError: Not an adapter, or one that uses a feature beyond W + s B A; the
                message names it.
        """
        root = resolve(path)
        if not (root / CONFIG).is_file():
            raise CheckpointError(f"{root}: not a LoRA adapter: no {CONFIG}")
        config = read_json(root / CONFIG)
        refuse_features(root, config)
        weights = Checkpoint.open(root, stem="adapter_model", allow_pickle=allow_pickle)
        try:
            return cls(root, config, weights)
        except BaseException:
            weights.close()
            raise

    def factors(self, name: str) -> LoraFactors:
        """Read the factors of the checkpoint weight ``name``, in the adapter's own dtype.

        Raises:
            CheckpointError: The adapter does not change ``name`` by factors.
        """
        place = self.place(name)
        b, a = self.weights.read(place.b_key), self.weights.read(place.a_key)
        if place.transposed:
            b, a = a.T.contiguous(), b.T.contiguous()
        return LoraFactors(b, a, place.scale)

    def place(self, name: str) -> Place:
        """Return where the factors of ``name`` lie.

        Raises:
            CheckpointError: The adapter does not change ``name`` by factors.
        """
        if name not in self._places:
            how = "replaces it whole" if name in self._whole else "does not change it"
            raise CheckpointError(f"{self.path}: no factors for {name}: the adapter {how}")
        return self._places[name]

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Yield the name of each weight it changes and the shape that weight must have."""
        for name, place in self._places.items():
            rows = self.weights.spec(place.b_key).shape[0]
            columns = self.weights.spec(place.a_key).shape[1]
            yield name, (columns, rows) if place.transposed else (rows, columns)
        for name, key in self._whole.items():
            yield name, self.weights.spec(key).shape

    def replacement(self, name: str) -> torch.Tensor:
        """Read the tensor that stands in for the checkpoint's ``name``.

        Raises:
            CheckpointError: The adapter holds no such tensor.
        """
        if name not in self._whole:
            raise CheckpointError(f"{self.path}: holds no replacement for {name}")
        return self.weights.read(self._whole[name])

    @property
    def roots(self) -> tuple[Path, ...]:
        """The paths that make up this input, targets of links too: nothing may be written over them."""
        return (*self.weights.roots, self.path / CONFIG)

    def side_files(self) -> dict[str, Path]:
        """List the adapter's configuration, and the tokenizer files and licences beside it."""
        return {CONFIG: self.path / CONFIG} | side_files(self.path)

    def fingerprint(self) -> dict[str, Any]:
        """Return sizes and checksums that tell this adapter from another."""
        settings = {k: self.config.get(k) for k in ("r", "lora_alpha", "use_rslora", "fan_in_fan_out")}
        patterns = {k: self.config.get(k) or {} for k in ("rank_pattern", "alpha_pattern")}
        return self.weights.fingerprint() | settings | patterns

    def require_unchanged(self) -> None:
        """As `Checkpoint.require_unchanged`."""
        self.weights.require_unchanged()

    def close(self) -> None:
        """Close the adapter's file."""
        self.weights.close()

    def __enter__(self) -> Adapter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

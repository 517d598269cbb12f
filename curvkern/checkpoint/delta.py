"""`Delta`: the bits that a restoration changed, which lead from the tuned model to the restored one and back.

A delta is a directory. Its ``delta.safetensors`` holds, of each tensor NAME that changed:

- ``NAME.bits``: the exclusive or of the two bit patterns, as integers of the element's size;
- ``NAME.where``: the entries that they belong to, as indices (int32 or int64) or as a mask of one bit an entry, lowest
  bit first (uint8). Without it the bits are of all entries. Which of the three it is, the size decides.

Its ``curvkern.json`` has the tuned model's fingerprint, and checksums of the changed entries before and after.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from curvkern.checkpoint.error import CheckpointError, listed
from curvkern.checkpoint.fingerprint import require_recorded
from curvkern.checkpoint.format import tensor_bytes
from curvkern.checkpoint.locate import read_json, resolve
from curvkern.checkpoint.read import Checkpoint
from curvkern.checkpoint.stage import RECORD
from curvkern.checkpoint.write import Writer

DELTA = "delta.safetensors"
BITS, WHERE = ".bits", ".where"
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_REPORTS = ("report.json", "report.html")

Side = Literal["tuned", "restored"]


# one tensor -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class BitChange:
    """What changed in one tensor of n entries.

    Attributes:
        bits: Exclusive or of the changed entries' bit patterns, [k] (or [n], where ``where`` is None); int8 to int64.
        where: Their indices, int32 or int64 [k]; or a mask, uint8 [ceil(n / 8)]; or None: all entries.
    """

    bits: torch.Tensor
    where: torch.Tensor | None

    @classmethod
    def between(cls, before: torch.Tensor, after: torch.Tensor) -> BitChange | None:
        """Return what leads from one tensor to another, in the form that takes least room; None if nothing changed.

        Args:
            before: On the CPU, any shape and dtype.
            after: Likewise, of the same shape and dtype.
        """
        bits = _pattern(before) ^ _pattern(after)
        changed = bits != 0
        count, numel, width = int(changed.sum()), bits.numel(), bits.element_size()
        if not count:
            return None
        index = torch.int32 if numel <= 1 << 31 else torch.int64
        as_indices, as_mask = count * (width + index.itemsize), count * width + -(-numel // 8)
        if numel * width <= min(as_indices, as_mask):
            return cls(bits, None)
        where = changed.nonzero().flatten().to(index) if as_indices <= as_mask else _packed(changed)
        return cls(bits[changed], where)

    def entries(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the bit patterns of the changed entries of ``tensor``, like ``bits``."""
        return _pattern(tensor)[self._places(tensor.numel())]

    def turned(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the tensor on the other side of the change."""
        pattern = _pattern(tensor).clone()
        pattern[self._places(tensor.numel())] ^= self.bits
        return pattern.view(tensor.dtype).view(tensor.shape)

    def fits(self, numel: int) -> bool:
        """Judge whether a tensor of so many entries can be the one that changed."""
        if self.where is None:
            return self.bits.numel() == numel
        if self.where.dtype != torch.uint8:
            same = self.bits.numel() == self.where.numel() > 0
            return same and int(self.where.min()) >= 0 and int(self.where.max()) < numel
        return self.where.numel() == -(-numel // 8) and int(_unpacked(self.where, numel).sum()) == self.bits.numel()

    def _places(self, numel: int) -> torch.Tensor | slice:
        if self.where is None:
            return slice(None)
        return _unpacked(self.where, numel) if self.where.dtype == torch.uint8 else self.where.long()


def checksum(entries: torch.Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes."""
    return zlib.crc32(tensor_bytes(entries))


def _pattern(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(_INTEGERS[tensor.element_size()])


def _packed(mask: torch.Tensor) -> torch.Tensor:
    rows = torch.nn.functional.pad(mask.to(torch.uint8), (0, -mask.numel() % 8)).view(-1, 8)
    return (rows << torch.arange(8, dtype=torch.uint8)).sum(1, dtype=torch.uint8)


def _unpacked(packed: torch.Tensor, numel: int) -> torch.Tensor:
    return ((packed[:, None] >> torch.arange(8, dtype=torch.uint8)) & 1).bool().flatten()[:numel]


# a whole model --------------------------------------------------------------------------------------------------------


class Delta:
    """A delta directory, opened to read.

    Attributes:
        path: The directory.
        record: The contents of its ``curvkern.json``.
        weights: The tensors of its file.
        names: Checkpoint names of the tensors that changed.
    """

    def __init__(self, path: Path, record: Mapping[str, Any], weights: Checkpoint) -> None:
        self.path = path
        self.record = record
        self.weights = weights
        self._checksums: dict[str, dict[str, int]] = record["delta"]
        self.names = frozenset(self._checksums)

    @classmethod
    def open(cls, path: str | Path) -> Delta:
        """Open a delta (a directory, or a hub id in the cache).

        Raises:
            CheckpointError: It is none; says what it is instead where that can be told.
        """
        root = resolve(path)
        if not (root / DELTA).is_file():
            raise CheckpointError(f"{root}: not a delta: no {DELTA}; `curvkern restore --save delta` makes one")
        record = read_json(root / RECORD)
        if not {"delta", "inputs", "recipe"} <= record.keys():
            raise CheckpointError(f"{root / RECORD}: not the record of a delta")
        weights = Checkpoint.open(root / DELTA) if record["delta"] else Checkpoint(root, [], {}, indexed=False)
        return cls(root, record, weights)

    def require_fit(self, model: Checkpoint, side: Side) -> None:
        """Refuse a model that this delta is not for, before any tensor is read.

        Args:
            model: The tuned model, or the restored one.
            side: Which of the two it is.

        Raises:
            CheckpointError: It lacks a tensor, or it is not the tuned model whose fingerprint was recorded.
        """
        if side == "tuned":
            require_recorded({"tuned": self.record["inputs"]["tuned"]}, {"tuned": model})
        if lacking := sorted(name for name in self.names if name not in model):
            raise CheckpointError(f"{model.path}: not the {side} model of {self.path}: it lacks {listed(lacking)}")

    def turn(self, name: str, tensor: torch.Tensor, side: Side) -> torch.Tensor:
        """Return a changed tensor as it is on the other side.

        Args:
            name: One of ``names``.
            tensor: The tuned or the restored one; on the CPU.
            side: Which of the two it is.

        Raises:
            CheckpointError: It is not the tensor that was recorded: other sizes, or other values where it changed.
        """
        where = self.weights.read(name + WHERE) if name + WHERE in self.weights else None
        change = BitChange(self.weights.read(name + BITS), where)
        fits = tensor.element_size() == change.bits.element_size() and change.fits(tensor.numel())
        if not fits or checksum(change.entries(tensor)) != self._checksums[name][side]:
            raise CheckpointError(f"{self.path}: {name} is not that of the {side} model which this delta was made with")
        return change.turned(tensor)

    def close(self) -> None:
        """Close the file."""
        self.weights.close()

    def __enter__(self) -> Delta:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def apply_delta(delta: str | Path, tuned: str | Path, out: str | Path, *, overwrite: bool = False) -> int:
    """Write the restored checkpoint, with the report of its restoration.

    Args:
        delta: The delta's directory.
        tuned: The model that it was made with.
        out: Directory to make.
        overwrite: Replace a checkpoint at ``out``, once the new one is whole.

    Returns:
        How many tensors differ from the tuned model's.

    Raises:
        CheckpointError: ``delta`` is none, ``tuned`` is another model, or as `Writer`; nothing is written.
    """
    return _turn(delta, tuned, out, "tuned", overwrite)


def undo_delta(delta: str | Path, restored: str | Path, out: str | Path, *, overwrite: bool = False) -> int:
    """Write the tuned checkpoint again; the arguments, the result and the errors are those of `apply_delta`.

    Of the restored model only the entries that the delta changes are compared with what they must be.
    """
    return _turn(delta, restored, out, "restored", overwrite)


def _turn(delta: str | Path, model: str | Path, out: str | Path, side: Side, overwrite: bool) -> int:
    with Delta.open(delta) as changes, Checkpoint.open(model) as source:
        source.require_config()
        changes.require_fit(source, side)
        recipe = changes.record["recipe"] if side == "tuned" else {"undone": changes.record["recipe"]}
        inputs = {side: source, "delta": changes.weights}
        with Writer(out, source, overwrite=overwrite, recipe=recipe, inputs=inputs) as writer:
            for name in writer.names:
                if name in changes.names:
                    writer.write(name, changes.turn(name, source.read(name), side))
                else:
                    writer.copy(name)
            reports = [changes.path / name for name in _REPORTS] if side == "tuned" else []
            writer.finish(extra_files={path.name: path.read_bytes() for path in reports if path.is_file()})
        return len(changes.names)

"""`DeltaWriter`: a restoration as a delta against the tuned model, see `curvkern.checkpoint.delta`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from curvkern.checkpoint.adapter import Adapter
from curvkern.checkpoint.agree import Source
from curvkern.checkpoint.card import as_json, describe, model_card, plain, versions
from curvkern.checkpoint.delta import BITS, DELTA, WHERE, BitChange, checksum
from curvkern.checkpoint.error import CheckpointError, on_disk
from curvkern.checkpoint.fingerprint import fingerprint
from curvkern.checkpoint.format import plan_file, tensor_bytes
from curvkern.checkpoint.locate import source_name
from curvkern.checkpoint.read import Checkpoint
from curvkern.checkpoint.stage import RECORD, Output, Stage, check_target

# More than any tensor has: the header planned with it has room for every header of the same names.
_NUMEL = 1 << 40


class DeltaWriter(Output):
    """Writes what changed, tensor by tensor; what is not written has not changed.

    How large the file becomes shows only as it grows, so room is kept for its header, which comes last. Safety is
    `Writer`'s: everything happens in ``OUT.partial``, and an exception leaves nothing at ``OUT``.
    """

    def __init__(
        self,
        out: str | Path,
        tuned: Checkpoint,
        names: Sequence[str],
        *,
        overwrite: bool = False,
        resume: bool = False,
        recipe: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Source | Adapter] | None = None,
        data: Mapping[str, Path] | None = None,
    ) -> None:
        """Check the target and begin the file.

        Args:
            out: The directory to make.
            tuned: What the delta is against.
            names: The tensors that may change.
            overwrite: Replace an output at ``out``, once the new one is whole.
            resume: Take over what a killed run left (a delta is one file: it is there whole, or starts again).
            recipe: What is being done, as JSON; goes into ``curvkern.json``.
            inputs: Role to every checkpoint that the output is made from; "tuned" is one of them.
            data: Role to every other file that decides what is written, such as prompts.

        Raises:
            CheckpointError: As `Writer`.
        """
        inputs, data = {"tuned": tuned} if inputs is None else inputs, data or {}
        self.target = check_target(
            out, [root for source in inputs.values() for root in source.roots] + [*data.values()], overwrite=overwrite
        )
        self._recipe = plain(recipe or {})
        paths = {role: source.path for role, source in inputs.items()} | {**data}
        self._sources = {role: source_name(path) for role, path in paths.items()}
        self._signature = {
            "recipe": self._recipe,
            "inputs": {role: fingerprint(source) for role, source in {**inputs, **data}.items()},
            "output": {},
            "software": versions()["curvkern"],
        }
        self._resume = resume
        self._parts: list[tuple[str, torch.dtype, tuple[int, ...]]] = []
        self._checksums: dict[str, dict[str, int]] = {}
        self._names = frozenset(names)
        widest = [(name + part, torch.int64, (_NUMEL,)) for name in names for part in (BITS, WHERE)]
        self._room = len(plan_file(DELTA, widest, {})[0])
        with on_disk(self.target, "making the output directory"):
            self._stage = Stage(self.target, self._signature, overwrite=overwrite, resume=resume)
            self._file = (self._stage.directory / DELTA).open("wb")
            self._file.seek(self._room)

    @property
    def notes(self) -> dict[str, dict[str, Any]]:
        """Nothing: an earlier run leaves no tensor to this one."""
        return {}

    def write(self, name: str, after: torch.Tensor, before: torch.Tensor) -> None:
        """Write what changed in one tensor.

        Args:
            name: One of the ``names`` that may change, not written before.
            after: The restored tensor, on any device.
            before: The tuned one, of the same shape and dtype.

        Raises:
            CheckpointError: The name is none of ``names`` or written already, shapes or dtypes differ, or a full disk.
        """
        if name not in self._names or name in self._checksums:
            raise CheckpointError(f"{self.target}: {name} is written already, or was not said to change")
        if (after.dtype, after.shape) != (before.dtype, before.shape):
            raise CheckpointError(
                f"{self.target}: {name}: got {after.dtype} {list(after.shape)}, "
                f"the tuned model has {before.dtype} {list(before.shape)}"
            )
        before = before.cpu()
        change = BitChange.between(before, after.cpu())
        if change is None:
            return
        was = change.entries(before)
        self._checksums[name] = {"tuned": checksum(was), "restored": checksum(was ^ change.bits)}
        with on_disk(self.target, f"writing {name} to {DELTA}"):
            for part, tensor in ((BITS, change.bits), (WHERE, change.where)):
                if tensor is not None:
                    self._parts.append((name + part, tensor.dtype, tuple(tensor.shape)))
                    self._file.write(tensor_bytes(tensor))

    def copy_rest(self) -> None:
        """Do nothing: what is not written has not changed."""

    def finish(
        self,
        extra_json: Mapping[str, Any] | None = None,
        *,
        extra_files: Mapping[str, str | bytes] | None = None,
    ) -> None:
        """Write the header and the files beside it, and give the directory its name.

        Args:
            extra_json: Further entries of ``curvkern.json``; NaN and infinity become null.
            extra_files: Plain file name to contents (text is stored as UTF-8).

        Raises:
            CheckpointError: An entry is not JSON, or a full disk.
        """
        head, _ = plan_file(DELTA, self._parts, {}, room=self._room)
        texts = {"README.md": model_card(self.target, self._recipe, self._sources, "curvkern"), **(extra_files or {})}
        extra = plain({**(extra_json or {}), "delta": self._checksums})
        record = describe(self._signature, self._sources, {DELTA, RECORD, *texts}, extra)
        with on_disk(self.target, "writing the last files"):
            self._file.seek(0)
            self._file.write(head)
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            for name, text in texts.items():
                self._stage.write(name, text.encode() if isinstance(text, str) else text)
            self._stage.write(RECORD, as_json(record))
            self._stage.publish()
        self._finished = True

    def abort(self) -> None:
        """Give up: ``OUT`` stays as it was."""
        self._file.close()
        self._stage.release() if self._resume else self._stage.discard()

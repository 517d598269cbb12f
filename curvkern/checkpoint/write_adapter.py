"""`AdapterWriter`: a LoRA adapter with edited factors, in the format PEFT loads."""

from __future__ import annotations

from collections.abc import Mapping, Set
from pathlib import Path
from typing import Any

import torch

from curvkern.checkpoint.adapter import Adapter
from curvkern.checkpoint.agree import Source
from curvkern.checkpoint.stage import Output
from curvkern.checkpoint.write import Writer


class AdapterWriter(Output):
    """Writes an adapter laid out like another one; what is not written is copied.

    Rank and scale stay those of ``like``: only the factors' values change. Safety is `Writer`'s:
    everything happens in ``OUT.partial``, and an exception leaves nothing at ``OUT``.
    """

    def __init__(
        self,
        out: str | Path,
        like: Adapter,
        *,
        overwrite: bool = False,
        resume: bool = False,
        recipe: Mapping[str, Any] | None = None,
        inputs: Mapping[str, Source | Adapter] | None = None,
        data: Mapping[str, Path] | None = None,
    ) -> None:
        """Check the target and lay out the file.

        Args:
            out: The directory to make.
            like: Gives layout, settings and every tensor that is not written.
            overwrite: Replace a checkpoint at ``out``, once the new one is whole.
            resume: Take over what a killed run left (an adapter is one file: it is there whole, or
                starts again).
            recipe: What is being done, as JSON; goes into ``curvkern.json``.
            inputs: Role to every input; default: ``like`` alone.
            data: Role to every other file that decides what is written, such as prompts.

        Raises:
            CheckpointError: As `Writer`.
        """
        self._like = like
        self._writer = Writer(
            out,
            like.weights,
            overwrite=overwrite,
            resume=resume,
            recipe=recipe,
            inputs={"like": like} if inputs is None else inputs,
            data=data,
        )
        self.target = self._writer.target

    @property
    def done(self) -> Set[str]:
        """Checkpoint names of the weights whose factors are written, by an earlier run or this one."""
        return {name for name in self._like.names if self._like.place(name).b_key in self._writer.done}

    @property
    def notes(self) -> dict[str, dict[str, Any]]:
        """What was noted of the weights in `done`, by an earlier run or this one."""
        notes = self._writer.notes
        keys = {name: self._like.place(name).b_key for name in self._like.names}
        return {name: notes[key] for name, key in keys.items() if key in notes}

    def write(self, name: str, b: torch.Tensor, a: torch.Tensor, note: Mapping[str, Any] | None = None) -> None:
        """Write new factors for the checkpoint weight ``name``, in the orientation of `LoraFactors`.

        Args:
            name: One of the adapter's ``names``.
            b: [rows of the weight, r], in the adapter's dtype.
            a: [r, columns of the weight], in the adapter's dtype.
            note: What a resumed run should know of it, as JSON; see `notes`.

        Raises:
            CheckpointError: The adapter does not change ``name``, or shapes or dtypes differ.
        """
        place = self._like.place(name)
        if place.transposed:
            b, a = a.T, b.T
        self._writer.write(place.b_key, b, note)
        self._writer.write(place.a_key, a)

    def copy_rest(self) -> None:
        """Copy every tensor that is not written yet."""
        self._writer.copy_rest()

    def finish(
        self,
        extra_json: Mapping[str, Any] | None = None,
        *,
        extra_files: Mapping[str, str | bytes] | None = None,
    ) -> None:
        """Copy every other tensor, the settings and the tokenizer files; name the directory.

        Args:
            extra_json: Further entries of ``curvkern.json``; NaN and infinity become null.
            extra_files: Plain file name to contents (text is stored as UTF-8).

        Raises:
            CheckpointError: An entry is not JSON, or a full disk.
        """
        self.copy_rest()
        self._writer.finish(extra_json, extra_files=extra_files, side_files=self._like.side_files(), library="peft")
        self._finished = True

    def abort(self) -> None:
        """Give up: nothing appears at ``OUT``."""
        self._writer.abort()

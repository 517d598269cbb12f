"""`AdapterWriter`: a LoRA adapter with edited factors, in the format PEFT loads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from curvkern.checkpoint.adapter import Adapter
from curvkern.checkpoint.agree import Source
from curvkern.checkpoint.write import Writer


class AdapterWriter:
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
    ) -> None:
        """Check the target and lay out the file.

        Args:
            out: The directory to make.
            like: Gives layout, settings and every tensor that is not written.
            overwrite: Replace a checkpoint at ``out``, once the new one is whole.
            resume: Take over what a killed run left (an adapter is one file: it starts again).
            recipe: What is being done, as JSON; goes into ``curvkern.json``.
            inputs: Role to every input; default: ``like`` alone.

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
        )
        self.target = self._writer.target

    def write(self, name: str, b: torch.Tensor, a: torch.Tensor) -> None:
        """Write new factors for the checkpoint weight ``name``, in the orientation of `LoraFactors`.

        Args:
            name: One of the adapter's ``names``.
            b: [rows of the weight, r], in the adapter's dtype.
            a: [r, columns of the weight], in the adapter's dtype.

        Raises:
            CheckpointError: The adapter does not change ``name``, or shapes or dtypes differ.
        """
        place = self._like.place(name)
        if place.transposed:
            b, a = a.T, b.T
        self._writer.write(place.b_key, b)
        self._writer.write(place.a_key, a)

    def finish(self, extra_json: Mapping[str, Any] | None = None) -> None:
        """Copy every other tensor, the settings and the tokenizer files; name the directory.

        Raises:
            CheckpointError: An entry is not JSON, or a full disk.
        """
        for key in self._writer.names:
            if key not in self._writer.done:
                self._writer.copy(key)
        self._writer.finish(extra_json, side_files=self._like.side_files(), library="peft")

    def abort(self) -> None:
        """Give up: nothing appears at ``OUT``."""
        self._writer.abort()

    def __enter__(self) -> AdapterWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, exception, traceback)

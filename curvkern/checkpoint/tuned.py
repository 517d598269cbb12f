"""Checkpoints that are never written: an aligned one with a LoRA adapter, one with edited weights; tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Protocol

import torch

from curvkern.checkpoint.adapter import Adapter, LoraFactors
from curvkern.checkpoint.error import CheckpointError
from curvkern.checkpoint.format import TensorSpec, tensor_bytes
from curvkern.checkpoint.locate import resolve, side_files
from curvkern.checkpoint.lora import CONFIG
from curvkern.checkpoint.read import Checkpoint

_BLOCK_ELEMENTS = 4 << 20


class Weights(Protocol):
    """What a model can be run from: the part that `Checkpoint`, `TunedView` and `EditedView` have in common."""

    @property
    def path(self) -> Path:
        """What it was opened from, for messages."""
        ...

    @property
    def directory(self) -> Path:
        """Of the configuration."""
        ...

    @property
    def names(self) -> Sequence[str]:
        """Of all tensors."""
        ...

    def spec(self, name: str) -> TensorSpec:
        """Return what a tensor is."""
        ...

    def read(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """Read a tensor."""
        ...

    def require_config(self) -> None:
        """Raise `CheckpointError` where there is no configuration."""
        ...


class TunedView:
    """What `Checkpoint` is, for aligned weights plus an adapter; no merged copy is ever made.

    Layout, dtypes and configuration are the aligned checkpoint's; the tokenizer is the adapter's
    where it brings one. Closing it closes the adapter, not the aligned checkpoint.

    Attributes:
        aligned: The checkpoint underneath.
        adapter: The adapter on top.
        path: The adapter's directory.
    """

    def __init__(self, aligned: Checkpoint, adapter: Adapter) -> None:
        self.aligned = aligned
        self.adapter = adapter
        self.path = adapter.path
        self.config = aligned.config
        self.names = aligned.names
        self.files = aligned.files
        self.indexed = aligned.indexed
        self.nbytes = aligned.nbytes
        self._factored = frozenset(adapter.names)
        self._replaced = frozenset(adapter.replaced)
        _check_fit(aligned, adapter)

    def spec(self, name: str) -> TensorSpec:
        """Return what the tensor ``name`` is, and where the aligned checkpoint keeps it."""
        return self.aligned.spec(name)

    def read(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """Read W + s B A in the aligned checkpoint's dtype; sums in float32, rounded once."""
        dtype = self.spec(name).dtype
        if name in self._replaced:
            weight = self.adapter.replacement(name).to(device)
        else:
            weight = self.aligned.read(name, device)
        if name not in self._factored:
            return weight.to(dtype)
        return _add_factors(weight, self.adapter.factors(name), dtype)

    def blocks(self, name: str) -> Iterator[memoryview]:
        """Yield a tensor's bytes in order; a block is valid until the next one is asked for."""
        if name in self._factored or name in self._replaced:
            return iter((tensor_bytes(self.read(name)),))
        return self.aligned.blocks(name)

    def metadata(self, file: str) -> dict[str, str]:
        """Return the free text that the header of the aligned checkpoint's ``file`` carries."""
        return self.aligned.metadata(file)

    @property
    def directory(self) -> Path:
        """As `Checkpoint.directory`: the aligned model's."""
        return self.aligned.directory

    @property
    def roots(self) -> tuple[Path, ...]:
        """The paths that make up this input: nothing may be written over them."""
        return (*self.aligned.roots, *self.adapter.roots)

    def side_files(self) -> dict[str, Path]:
        """List the aligned model's files, with the adapter's tokenizer whole where it has one."""
        own = side_files(self.path, model=False)
        if "tokenizer_config.json" not in own:
            return self.aligned.side_files()
        return self.aligned.side_files(tokenizer=False) | own

    def require_config(self) -> None:
        """As `Checkpoint.require_config`: the configuration is the aligned model's."""
        self.aligned.require_config()

    def fingerprint(self) -> dict[str, Any]:
        """Return the fingerprints of both parts."""
        return {"aligned": self.aligned.fingerprint(), "adapter": self.adapter.fingerprint()}

    def require_unchanged(self) -> None:
        """As `Checkpoint.require_unchanged`, of both parts."""
        self.aligned.require_unchanged()
        self.adapter.require_unchanged()

    def close(self) -> None:
        """Close the adapter; the aligned checkpoint belongs to whoever opened it."""
        self.adapter.close()

    def __enter__(self) -> TunedView:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"TunedView({self.aligned!r}, adapter={str(self.path)!r})"


class EditedView:
    """Weights of which some are edited as they are read; no edited copy is ever made.

    Attributes:
        under: The weights underneath.
        edited: The names of those that are edited.
    """

    def __init__(
        self, under: Weights, edited: Collection[str], edit: Callable[[str, torch.Tensor], torch.Tensor]
    ) -> None:
        """Read nothing yet.

        Args:
            under: Stays open.
            edited: Names.
            edit: Of (name, tensor): the tensor as it is to be, of the same shape, dtype and device.
        """
        self.under = under
        self.edited = frozenset(edited)
        self._edit = edit
        self.path, self.directory, self.names = under.path, under.directory, under.names

    def spec(self, name: str) -> TensorSpec:
        """Return what the tensor ``name`` is."""
        return self.under.spec(name)

    def read(self, name: str, device: str | torch.device = "cpu") -> torch.Tensor:
        """Read the tensor ``name``, edited if it is to be."""
        tensor = self.under.read(name, device)
        return self._edit(name, tensor) if name in self.edited else tensor

    def require_config(self) -> None:
        """As `Checkpoint.require_config`."""
        self.under.require_config()


def open_tuned(path: str | Path, aligned: Checkpoint, *, allow_pickle: bool = False) -> Checkpoint | TunedView:
    """Open a tuned model: a whole checkpoint, or an adapter on top of ``aligned``.

    Args:
        path: What `Checkpoint.open` takes, or an adapter directory (one with
            ``adapter_config.json``), or its hub id in the cache.
        aligned: The checkpoint that the adapter was trained on; stays open.
        allow_pickle: Also take legacy ``.bin`` files.

    Raises:
        CheckpointError: As `Checkpoint.open` and `Adapter.open`; or the adapter does not fit: it
            changes a tensor that ``aligned`` lacks, or one of another shape.
    """
    root = resolve(path)
    if not (root / CONFIG).is_file():
        return Checkpoint.open(root, allow_pickle=allow_pickle)
    adapter = Adapter.open(root, allow_pickle=allow_pickle)
    try:
        return TunedView(aligned, adapter)
    except BaseException:
        adapter.close()
        raise


def _check_fit(aligned: Checkpoint, adapter: Adapter) -> None:
    for name, wanted in adapter.shapes():
        if name not in aligned:
            near = get_close_matches(name, aligned.names, n=1)
            hint = f"; the nearest name is {near[0]}" if near else ""
            raise CheckpointError(f"{adapter.path}: the adapter changes {name}, which {aligned.path} lacks{hint}")
        found = aligned.spec(name).shape
        if wanted != found:
            raise CheckpointError(
                f"{adapter.path}: the adapter does not fit {name}: it is for {list(wanted)}, "
                f"{aligned.path} has {list(found)}"
            )


def _add_factors(weight: torch.Tensor, factors: LoraFactors, dtype: torch.dtype) -> torch.Tensor:
    """Return weight + s B A in ``dtype``; goes by blocks of rows, so that no wide copy exists."""
    wide = torch.promote_types(dtype, torch.float32)
    b, a = factors.B.to(weight.device, wide), factors.A.to(weight.device, wide)
    out = weight if weight.dtype == dtype else torch.empty_like(weight, dtype=dtype)
    step = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
    for start in range(0, weight.shape[0], step):
        rows = slice(start, start + step)
        out[rows] = weight[rows].to(wide).addmm_(b[rows], a, alpha=factors.scale)
    return out

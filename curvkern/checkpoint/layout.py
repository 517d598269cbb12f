"""`Layout`: which tensor goes to which byte of which file of an output, before any of them exists."""

from __future__ import annotations

import zlib
from collections import defaultdict
from typing import Any

import torch

from curvkern.checkpoint.agree import Source
from curvkern.checkpoint.format import TensorSpec, plan_file
from curvkern.checkpoint.locate import PICKLE, SAFETENSORS


class Layout:
    """The files of an output with the shape of another checkpoint.

    Attributes:
        heads: File name to its first bytes (length and header).
        specs: Tensor name to its place.
        sizes: File name to its whole size, in bytes.
    """

    def __init__(self, like: Source, dtype: torch.dtype | None = None) -> None:
        """Plan the same files and order as ``like``; floating-point tensors in ``dtype`` if given."""
        members: defaultdict[str, list[TensorSpec]] = defaultdict(list)
        for name in like.names:
            spec = like.spec(name)
            members[spec.file].append(spec)
        self.heads: dict[str, bytes] = {}
        self.specs: dict[str, TensorSpec] = {}
        self.sizes: dict[str, int] = {}
        for source in like.files:
            tensors = [(s.name, _stored(s.dtype, dtype), s.shape) for s in members[source]]
            file = _safetensors_name(source, alone=not like.indexed)
            head, planned = plan_file(file, tensors, like.metadata(source))
            self.heads[file] = head
            self.specs |= {spec.name: spec for spec in planned}
            self.sizes[file] = len(head) + sum(spec.nbytes for spec in planned)

    def signature(self) -> dict[str, dict[str, int]]:
        """Return each file's size and the checksum of its header."""
        return {
            file: {"bytes": self.sizes[file], "header_crc32": zlib.crc32(head)} for file, head in self.heads.items()
        }

    def index(self) -> dict[str, Any]:
        """Return the contents of ``model.safetensors.index.json``."""
        total = sum(spec.nbytes for spec in self.specs.values())
        weight_map = {name: spec.file for name, spec in self.specs.items()}
        return {"metadata": {"total_size": total}, "weight_map": weight_map}


def _stored(own: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    return wanted if wanted is not None and own.is_floating_point else own


def _safetensors_name(file: str, *, alone: bool) -> str:
    """Return what loaders look for: one file without an index has one name, whatever it was read from."""
    if alone and not file.startswith("adapter_model"):
        return f"model{SAFETENSORS}"
    if not file.endswith(PICKLE):
        return file
    return file.removeprefix("pytorch_").removesuffix(PICKLE) + SAFETENSORS

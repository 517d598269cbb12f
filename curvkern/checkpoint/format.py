"""The safetensors file format: what a header says, and the header of a file still to be written.

A file is an 8-byte little-endian header length, a JSON header padded with spaces, then the tensors'
bytes without gaps. Offsets in the header count from the end of the header; those of `TensorSpec`
count from the start of the file.
"""

from __future__ import annotations

import json
import math
import os
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from curvkern.checkpoint.error import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_CODES = {dtype: code for code, dtype in DTYPES.items()}
_LENGTH_BYTES = 8
_ALIGNMENT = 8


@dataclass(frozen=True)
class TensorSpec:
    """Where a tensor lies and what it is.

    Attributes:
        name: The checkpoint's name of the tensor.
        dtype: Element type.
        shape: Sizes, outermost first.
        file: Plain name of the file that holds it.
        offset: First byte, counted from the start of the file; -1 in a pickled file, whose tensors
            have no fixed place.
        nbytes: Size in bytes.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Header:
    """A parsed or planned header: the file's tensors in the order of their bytes."""

    specs: tuple[TensorSpec, ...]
    metadata: dict[str, str]
    crc32: int


def read_header(path: Path, fd: int) -> Header:
    """Validate and parse the header of the safetensors file open as ``fd``.

    The rules are those of `safetensors.safe_open`: it refuses truncation, holes, overlaps, sizes
    that contradict shapes and headers above 100 MB.

    Raises:
        CheckpointError: The file breaks a rule, or holds a dtype torch lacks.
    """
    try:
        with safe_open(path, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        size = os.fstat(fd).st_size
        raise CheckpointError(
            f"{path}: not a valid safetensors file: {error}, in {size} bytes; if it was cut short, "
            "fetch or copy it again"
        ) from error
    length = int.from_bytes(os.pread(fd, _LENGTH_BYTES, 0), "little")
    raw = os.pread(fd, length, _LENGTH_BYTES)
    entries: dict[str, Any] = json.loads(raw)
    metadata = entries.pop("__metadata__", None) or {}
    start = _LENGTH_BYTES + length
    specs = [_parse(path, name, entry, start) for name, entry in entries.items()]
    specs.sort(key=lambda spec: (spec.offset, spec.offset + spec.nbytes, spec.name))
    return Header(tuple(specs), metadata, zlib.crc32(raw))


def _parse(path: Path, name: str, entry: dict[str, Any], start: int) -> TensorSpec:
    dtype = DTYPES.get(entry["dtype"])
    if dtype is None:
        raise CheckpointError(f"{path}: {name}: dtype {entry['dtype']} is not supported")
    begin, end = entry["data_offsets"]
    return TensorSpec(name, dtype, tuple(entry["shape"]), path.name, start + begin, end - begin)


def plan_file(
    file: str,
    tensors: Iterable[tuple[str, torch.dtype, tuple[int, ...]]],
    metadata: Mapping[str, str],
    *,
    room: int = 0,
) -> tuple[bytes, tuple[TensorSpec, ...]]:
    """Lay out a safetensors file before any of its data exists.

    Args:
        file: Plain name of the file.
        tensors: (name, dtype, shape), in the order their bytes will have.
        metadata: Written as ``__metadata__``; transformers refuses a file without ``format``.
        room: The data begin no earlier than this many bytes (a multiple of 8) from the start.

    Returns:
        The file's first bytes (length and header), and where each tensor goes.
    """
    entries: dict[str, Any] = {"__metadata__": {**metadata, "format": metadata.get("format", "pt")}}
    sized: list[tuple[str, torch.dtype, tuple[int, ...], int, int]] = []
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * dtype.itemsize
        code = {"dtype": _CODES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
        entries[name] = code
        sized.append((name, dtype, shape, begin, end))
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * max(-len(text) % _ALIGNMENT, room - _LENGTH_BYTES - len(text))
    start = _LENGTH_BYTES + len(text)
    specs = tuple(
        TensorSpec(name, dtype, shape, file, start + begin, end - begin) for name, dtype, shape, begin, end in sized
    )
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text, specs


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a CPU tensor in memory order, without a copy where it is contiguous."""
    flat = tensor.detach().contiguous().flatten()
    return flat.view(torch.uint8).numpy().data

"""What tells one input from another: fingerprints by role, and the refusal of an input that is not the one recorded."""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from curvkern.checkpoint.error import CheckpointError, listed

if TYPE_CHECKING:
    from curvkern.checkpoint.adapter import Adapter
    from curvkern.checkpoint.agree import Source


def fingerprint(source: Source | Adapter | Path) -> dict[str, Any]:
    """Return sizes and checksums of an input: those of a checkpoint, or the CRC-32 of a whole file.

    Raises:
        CheckpointError: It cannot be read.
    """
    if not isinstance(source, Path):
        return source.fingerprint()
    whole = contents(source)
    return {"bytes": len(whole), "crc32": zlib.crc32(whole)}


def contents(path: Path) -> bytes:
    """A small input file; what is wrong with it is not the output's fault.

    Raises:
        CheckpointError: It cannot be read.
    """
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}; put it right, and run again") from error


def require_recorded(recorded: Mapping[str, Mapping[str, Any]], inputs: Mapping[str, Source | Adapter | Path]) -> None:
    """Refuse inputs that are not those of an earlier run.

    Args:
        recorded: Role to fingerprint, or a part of one: what it lacks may be anything.
        inputs: Role to input; one that is not recorded may be anything.

    Raises:
        CheckpointError: One has another fingerprint; names its path, and what differs.
    """
    for role, was in recorded.items():
        if role not in inputs:
            continue
        now = fingerprint(inputs[role])
        if changes := differences(role, dict(was), {key: now.get(key) for key in was}):
            source = inputs[role]
            path = source if isinstance(source, Path) else source.path
            raise CheckpointError(f"{path}: not the {role} input that was recorded: {listed(changes)}")


def differences(where: str, was: Any, now: Any) -> list[str]:
    """Name each place at which two JSON values differ."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [*was, *(key for key in now if key not in was)]
        return [d for key in keys for d in differences(f"{where}.{key}", was.get(key), now.get(key))]
    return [] if was == now else [f"{where} was {was!r}, is {now!r}"]

"""The one exception of this package."""

from __future__ import annotations

from collections.abc import Iterable

_SHOWN = 8


class CheckpointError(Exception):
    """A checkpoint, adapter or output directory cannot be used as asked; the message says why."""


def listed(items: Iterable[object]) -> str:
    """Join the first few of ``items`` for a message and count the rest."""
    every = [str(item) for item in items]
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more

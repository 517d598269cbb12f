"""The one exception of this package, and what the system's errors mean for an output."""

from __future__ import annotations

import errno
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from pathlib import Path

_SHOWN = 8
_FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointError(Exception):
    """A checkpoint, adapter or output directory cannot be used as asked; the message says why."""


def listed(items: Iterable[object]) -> str:
    """Join the first few of ``items`` for a message and count the rest."""
    every = [str(item) for item in items]
    more = f" and {len(every) - _SHOWN} more" if len(every) > _SHOWN else ""
    return ", ".join(every[:_SHOWN]) + more


@contextmanager
def on_disk(target: Path, doing: str, kept: str = "") -> Generator[None, None, None]:
    """Turn what the system says into what it means for the output ``target``.

    Raises:
        CheckpointError: In place of an `OSError`; names what was being done, and ends with ``kept``.
    """
    try:
        yield
    except OSError as error:
        reason = "the disk is full" if error.errno in _FULL else error.strerror or str(error)
        raise CheckpointError(f"{target}: {reason}, while {doing}; nothing there was changed{kept}") from error

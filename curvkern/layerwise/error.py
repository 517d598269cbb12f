"""The one exception of this package."""

from __future__ import annotations


class LayerwiseError(RuntimeError):
    """A model cannot be run layer by layer; the message says why."""

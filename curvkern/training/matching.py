"""Modules and parameters by patterns on their full names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import TypeVar

T = TypeVar("T")


def matching(who: str, what: str, named: Iterable[tuple[str, T]], patterns: Sequence[str]) -> Mapping[str, T]:
    """What has a name that some pattern matches, as the shell matches files: ``*.layers.[3-6].*``.

    Args:
        who: the guard, for messages.
        what: ``"module"`` or ``"parameter"``, for messages.
        named: pairs of a name and a thing.
        patterns: at least one.

    Raises:
        TypeError: a text instead of a list of texts.
        ValueError: no pattern, or one that matches nothing; says what is near.
    """
    if isinstance(patterns, str):
        raise TypeError(f"{who}: the patterns are a text; wanted a list of them: [{patterns!r}].")
    things = {name: thing for name, thing in named if name}
    if not patterns:
        raise ValueError(f"{who}: there are no patterns; wanted names of at least one {what}.")
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in things):
            near = difflib.get_close_matches(pattern, things, n=3, cutoff=0) or ["none"]
            raise ValueError(f"{who}: {pattern!r} matches no {what}; the names nearest to it are {', '.join(near)}.")
    return {name: thing for name, thing in things.items() if any(fnmatchcase(name, p) for p in patterns)}

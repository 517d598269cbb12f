"""What an output says of itself: the record in ``curvkern.json`` and the model card."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from curvkern.checkpoint.error import CheckpointError

_PACKAGES = ("curvkern", "torch", "safetensors", "numpy")
_CARD = """\
---
library_name: {library}
tags:
- curvkern
---

# {title}

Written by curvkern{method}, from these inputs:

{inputs}

`curvkern.json` holds the recipe, the versions of the software and the inputs' checksums. The licences
of the inputs apply to this model as well.
"""


def describe(
    signature: Mapping[str, Any], names: Mapping[str, str], files: Iterable[str], extra: Mapping[str, Any]
) -> dict[str, Any]:
    """Put an output's record together.

    Args:
        signature: Recipe, inputs' fingerprints and layout.
        names: Role to name of each input.
        files: Every file of the output, by path in it.
        extra: Further entries; must be JSON.

    Raises:
        CheckpointError: ``extra`` uses a name that the record needs for itself.
    """
    record = {**signature, "names": dict(names), "versions": versions(), "files": sorted(files)}
    clash = sorted({*record, "complete", "notes"} & set(extra))
    if clash:
        raise CheckpointError(f"curvkern.json: {', '.join(clash)} is taken; name the entry otherwise")
    return {**record, **extra}


def model_card(target: Path, recipe: Mapping[str, Any], names: Mapping[str, str], library: str) -> str:
    """Return a short README.md with the metadata the hub reads."""
    method = f" with the method `{recipe['method']}`" if "method" in recipe else ""
    inputs = "\n".join(f"- {role}: `{name}`" for role, name in names.items())
    return _CARD.format(library=library, title=target.name, method=method, inputs=inputs)


def plain(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``entries`` as they will read back from JSON, which has no NaN or infinity: those become null.

    Raises:
        CheckpointError: An entry is not JSON.
    """
    try:
        return json.loads(json.dumps(_finite(dict(entries)), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"curvkern.json: the recipe or an entry is not JSON: {error}") from error


def as_json(value: Any) -> bytes:
    """Return ``value`` as indented JSON with sorted keys."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in cast("dict[Any, Any]", value).items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in cast("list[Any]", value)]
    return value


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that make an output."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found

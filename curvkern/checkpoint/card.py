"""What an output says of itself: the record in ``curvkern.json`` and the model card."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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


def describe(signature: Mapping[str, Any], names: Mapping[str, str], extra: Mapping[str, Any]) -> dict[str, Any]:
    """Put an output's record together.

    Args:
        signature: Recipe, inputs' fingerprints and layout.
        names: Role to name of each input.
        extra: Further entries; must be JSON.

    Raises:
        CheckpointError: ``extra`` uses a name that the record needs for itself.
    """
    record = {**signature, "names": dict(names), "versions": _versions()}
    clash = sorted({*record, "complete"} & set(extra))
    if clash:
        raise CheckpointError(f"curvkern.json: {', '.join(clash)} is taken; name the entry otherwise")
    return {**record, **extra}


def model_card(target: Path, recipe: Mapping[str, Any], names: Mapping[str, str], library: str) -> str:
    """Return a short README.md with the metadata the hub reads."""
    method = f" with the method `{recipe['method']}`" if "method" in recipe else ""
    inputs = "\n".join(f"- {role}: `{name}`" for role, name in names.items())
    return _CARD.format(library=library, title=target.name, method=method, inputs=inputs)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found

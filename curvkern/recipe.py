"""A restoration written down: what `restore` takes, validated, from keywords or from a YAML file."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

#: Checkpoints beside aligned and tuned, and JSON Lines, that some methods need.
CHECKPOINTS = ("base", "unaligned", "safety_adapter")
DATA = ("harmful", "safety", "task")


class RecipeError(ValueError):
    """The recipe is wrong; says where."""


_UNITS = {
    "": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12,
    "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30, "tib": 1 << 40,
}  # fmt: skip


def _bytes(value: object) -> object:
    """A number of bytes, of one or of text such as ``20GiB``."""
    if value is None:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", str(value).strip().lower())
    if found is None or found[2] not in _UNITS or isinstance(value, bool):
        raise ValueError("wanted a number of bytes, or one with a unit, such as 400MiB, 20GiB or 80GB")
    size = int(float(found[1]) * _UNITS[found[2]])
    if size < 1:
        raise ValueError("wanted more than no memory")
    return size


class Recipe(BaseModel):
    """Everything that decides what a restoration writes.

    Attributes:
        aligned: the safe chat model.
        tuned: what fine-tuning made of it: a checkpoint or a LoRA adapter directory.
        out: directory to make.
        method: a name of `curvkern.methods.REGISTRY`.
        parameters: the method's own.
        base: the model before alignment, where the method needs it.
        unaligned: an aligned model broken on purpose, likewise.
        safety_adapter: the aligned model tuned on safety data, a LoRA adapter or a checkpoint, likewise.
        harmful: JSON Lines of harmful prompts, with harmful responses where a method asks for their loss.
        safety: JSON Lines of harmful prompts with safe responses.
        task: JSON Lines of the fine-tuning task, with responses.
        include: patterns (``*`` and ``?``) on full weight names; empty: all modules.
        exclude: patterns of modules to leave as tuned.
        save: ``"auto"`` keeps an adapter an adapter where the method can.
        statistics: directory where curvature statistics are looked for and kept, for runs to share.
        device: where tensors are edited.
        memory_budget: bytes on the device that a model and what is measured of it may take, a number or ``"20GiB"``;
            what takes more goes layer by layer. None: what is free.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    aligned: Path
    tuned: Path
    out: Path
    method: str
    parameters: dict[str, Any] = Field(default_factory=dict[str, Any])
    base: Path | None = None
    unaligned: Path | None = None
    safety_adapter: Path | None = None
    harmful: Path | None = None
    safety: Path | None = None
    task: Path | None = None
    include: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    save: Literal["auto", "checkpoint", "adapter"] = "auto"
    statistics: Path | None = None
    device: str = "cpu"
    memory_budget: Annotated[int | None, BeforeValidator(_bytes)] = None

    def record(self) -> dict[str, Any]:
        """The recipe as JSON, without the places that differ from run to run."""
        return self.model_dump(mode="json", exclude={"out", "statistics", "device", "memory_budget"})


def make_recipe(values: dict[str, Any], where: str = "restore") -> Recipe:
    """A recipe from plain values.

    Raises:
        RecipeError: an unknown, missing or ill-typed entry; names ``where`` and the entry.
    """
    for key in values:
        if key not in Recipe.model_fields:
            near = difflib.get_close_matches(key, Recipe.model_fields, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(f"{where}: unknown entry {key!r}; it takes {', '.join(Recipe.model_fields)}.{hint}")
    try:
        return Recipe(**values)
    except ValidationError as error:
        first = error.errors()[0]
        entry = ".".join(map(str, first["loc"]))
        if first["type"] == "missing":
            raise RecipeError(f"{where}: {entry} is missing.") from None
        raise RecipeError(
            f"{where}: {entry} is {first['input']!r}: {first['msg'].removeprefix('Value error, ')}."
        ) from None


def read_recipe(path: Path, overrides: dict[str, Any]) -> Recipe:
    """The recipe of a YAML file, with ``overrides`` on top. Paths are relative to the working directory.

    Raises:
        RecipeError: no such file, broken YAML (with the line), or a wrong entry.
    """
    try:
        loaded: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path}: wanted a mapping (aligned: ..., tuned: ..., method: ...), got {loaded!r}.")
    values = {str(key): value for key, value in cast("dict[Any, Any]", loaded).items()}
    parameters = values.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise RecipeError(f"{path}: parameters is {parameters!r}; wanted a mapping, such as {{rate: 0.002}}.")
    overrides = {**overrides, "parameters": {**parameters, **overrides.get("parameters", {})}}
    return make_recipe({**values, **overrides}, str(path))

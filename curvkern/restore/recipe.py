"""A restoration written down: what `restore` takes, from keywords, a YAML file or the record of an earlier run."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
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
        method: a name of `curvkern.methods.REGISTRY`, or several with commas between them, see `each_method`.
        parameters: the method's own.
        base: the model before alignment, where the method needs it.
        unaligned: an aligned model broken on purpose, likewise.
        safety_adapter: the aligned model tuned on safety data, a LoRA adapter or a checkpoint, likewise.
        harmful: JSON Lines of harmful prompts, with harmful responses where a method asks for their loss.
        safety: JSON Lines of harmful prompts with safe responses.
        task: JSON Lines of the fine-tuning task, with responses.
        include: patterns (``*`` and ``?``) on full weight names; empty: all modules.
        exclude: patterns of modules to leave as tuned.
        save: ``"auto"`` keeps an adapter an adapter where the method can; ``"delta"`` is what differs from tuned.
        statistics: directory where curvature statistics are looked for and kept, for runs to share.
        device: where tensors are edited.
        memory_budget: bytes on the device that a model and what is measured of it may take, a number or ``"20GiB"``;
            what takes more goes layer by layer. None: what is free.
        expected: role to the fingerprint that this input must have, where a run is to be repeated.
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
    save: Literal["auto", "checkpoint", "adapter", "delta"] = "auto"
    statistics: Path | None = None
    device: str = "cpu"
    memory_budget: Annotated[int | None, BeforeValidator(_bytes)] = None
    expected: dict[str, dict[str, Any]] = Field(default_factory=dict[str, dict[str, Any]])

    def record(self) -> dict[str, Any]:
        """The recipe as JSON, without the places that differ from run to run."""
        return self.model_dump(mode="json", exclude={"out", "statistics", "device", "memory_budget", "expected"})


@dataclass(frozen=True)
class _Origin:
    """Where the entries of a recipe were given: a name, and the line of those in a file; 0 for those of an option."""

    name: str
    lines: Mapping[tuple[str, ...], int] = field(default_factory=dict[tuple[str, ...], int])

    def of(self, *entry: object) -> str:
        """``recipe.yaml:7`` for an entry, or for the one that it is a part of."""
        keys = [tuple(map(str, entry[:size])) for size in range(len(entry), 0, -1)]
        line = next((self.lines[key] for key in keys if key in self.lines), 0)
        return f"{self.name}:{line}" if line else self.name


def make_recipe(values: dict[str, Any]) -> Recipe:
    """A recipe from plain values.

    Raises:
        RecipeError: an unknown, missing or ill-typed entry; names it.
    """
    return _checked(values, _Origin("restore"))


def _checked(values: dict[str, Any], origin: _Origin) -> Recipe:
    for key in values:
        if key not in Recipe.model_fields:
            near = difflib.get_close_matches(key, Recipe.model_fields, n=1, cutoff=0.5)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise RecipeError(
                f"{origin.of(key)}: unknown entry {key!r}; it takes {', '.join(Recipe.model_fields)}.{hint}"
            )
    try:
        return Recipe(**values)
    except ValidationError as error:
        first = error.errors()[0]
        entry, where = ".".join(map(str, first["loc"])), origin.of(*first["loc"])
        if first["type"] == "missing":
            raise RecipeError(f"{where}: {entry} is missing.") from None
        raise RecipeError(
            f"{where}: {entry} is {first['input']!r}: {first['msg'].removeprefix('Value error, ')}."
        ) from None


def read_recipe(path: Path, overrides: dict[str, Any]) -> Recipe:
    """The recipe of a YAML file, or the one in the ``curvkern.json`` of a finished run, with ``overrides`` on top.

    Paths are relative to the working directory. Of a finished run every input that is not overridden must be what it
    was: the recipe's ``expected`` says so.

    Raises:
        RecipeError: no such file, broken YAML, a wrong entry, an unknown method or a wrong parameter of it; with the
            line. Or a run whose task score was a function.
    """
    text = _text(path)
    record = _record(text)
    values, lines = _parsed(path, text) if record is None else (_repeated(path, record, overrides), {})
    parameters = values.get("parameters") or {}
    if not isinstance(parameters, dict):
        where = _Origin(str(path), lines).of("parameters")
        raise RecipeError(f"{where}: parameters is {parameters!r}; wanted a mapping, such as {{rate: 0.002}}.")
    own = overrides.get("parameters", {})
    options = [*((key,) for key in overrides if key != "parameters"), *(("parameters", key) for key in own)]
    origin = _Origin(str(path), {**lines, **dict.fromkeys(options, 0)})
    recipe = _checked({**values, **overrides, "parameters": {**parameters, **own}}, origin)
    _check_method(recipe, origin)
    return recipe


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"{path}: cannot be read ({error.strerror}).") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start}).") from None


def _parsed(path: Path, text: str) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """The entries of a YAML file, and their lines."""
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        lines = dict(_lines(node))
        loaded: object = None if node is None else loader.construct_document(node)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise RecipeError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}.") from None
    if not isinstance(loaded, dict):
        raise RecipeError(f"{path}: wanted a mapping (aligned: ..., tuned: ..., method: ...), got {loaded!r}.")
    return {str(key): value for key, value in cast("dict[Any, Any]", loaded).items()}, lines


def _lines(node: yaml.Node | None, within: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], int]]:
    """The line of each entry of a mapping, and of the entries of those that are mappings."""
    if isinstance(node, yaml.MappingNode) and len(within) < 2:
        for key, value in node.value:
            entry = (*within, str(key.value))
            yield entry, key.start_mark.line + 1
            yield from _lines(value, entry)


def _record(text: str) -> dict[str, Any] | None:
    """What a finished run says of itself; None if the text is something else."""
    if text.lstrip().startswith("{"):
        with suppress(ValueError):
            found = json.loads(text)
            if isinstance(found, dict) and {"recipe", "inputs"} <= found.keys():
                return cast("dict[str, Any]", found)
    return None


def _repeated(path: Path, record: Mapping[str, Any], overrides: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a finished run's recipe, with the fingerprints of all inputs that it shall take again."""
    values = dict(record["recipe"])
    if score := values.pop("score", None):
        raise RecipeError(f"{path}: its task score was the function {score}; repeat it from Python, with score=...")
    expected = {role: found for role, found in record["inputs"].items() if role not in overrides}
    if "aligned" in overrides:
        # An adapter's fingerprint has that of the aligned model in it.
        expected = {role: {k: v for k, v in found.items() if k != "aligned"} for role, found in expected.items()}
    return {**values, "device": record.get("device", "cpu"), "expected": expected}


def _check_method(recipe: Recipe, origin: _Origin) -> None:
    from curvkern.methods import MethodError, make

    named: Recipe | None = None
    try:
        for named in each_method(recipe):
            make(named.method, named.parameters)
    except MethodError as error:
        if error.parameter is None:
            where = origin.of("method")
        else:
            qualified = "" if named is None else f"{named.method}.{error.parameter}"
            where = origin.of("parameters", qualified if qualified in recipe.parameters else error.parameter)
        raise RecipeError(f"{where}: {error}") from None


def each_method(recipe: Recipe) -> list[Recipe]:
    """The recipe of each method that a recipe names, by commas: ``lox,merge``.

    A parameter goes to all that have it, ``lox.rank`` to lox alone, before ``rank``. Of several methods each has a
    directory in ``out``, called like the method.

    Raises:
        MethodError: an unknown method, one that is named twice, or a parameter of one that is not named.
    """
    from curvkern.methods import MethodError, get

    names = [name.strip() for name in recipe.method.split(",")]
    if again := next((name for name in names if names.count(name) > 1), None):
        raise MethodError(f"method {recipe.method!r} names {again} twice; wanted each once.")
    known = {name: get(name).model_fields for name in names}
    own: dict[str, dict[str, Any]] = {name: {} for name in names}
    for key in sorted(recipe.parameters, key=lambda key: "." in key):
        method, dot, parameter = key.rpartition(".")
        if dot and method not in own:
            raise MethodError(f"parameter {key!r} is of {method}; wanted one of {', '.join(names)}.", key)
        # What none of them has goes to all, so that the first says what it takes.
        takers = [method] if dot else [name for name in names if key in known[name]] or names
        for name in takers:
            own[name][parameter] = recipe.parameters[key]
    places = {names[0]: recipe.out} if len(names) == 1 else {name: recipe.out / name for name in names}
    return [recipe.model_copy(update={"method": name, "parameters": own[name], "out": places[name]}) for name in names]

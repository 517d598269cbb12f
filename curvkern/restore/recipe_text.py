"""A method's recipe as YAML to fill in: the inputs it needs, its parameters with their defaults and meaning."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import yaml
from pydantic import BaseModel

from curvkern.methods import get, make
from curvkern.restore.evidence import looked_at
from curvkern.restore.recipe import CHECKPOINTS, DATA

#: What stands beside each input.
_INPUTS = {
    "aligned": "the safe chat model",
    "tuned": "what fine-tuning made of it: checkpoint or LoRA adapter",
    "base": "the model before alignment",
    "unaligned": "an aligned model broken on purpose",
    "safety_adapter": "the aligned model tuned on safety data",
    "harmful": "JSON Lines of harmful prompts; with harmful responses where the method measures their loss",
    "safety": "JSON Lines of harmful prompts with safe responses",
    "task": "JSON Lines of the task, with responses",
}

_LIMITS = {
    "minimum": ">=",
    "exclusiveMinimum": ">",
    "maximum": "<=",
    "exclusiveMaximum": "<",
    "multipleOf": "a multiple of",
}


def recipe_text(name: str) -> str:
    """A recipe of a method as YAML with comments; `read_recipe` reads it, paths are to be filled in.

    Args:
        name: of `curvkern.methods.REGISTRY`.

    Raises:
        MethodError: no such method; suggests the nearest.
    """
    return "\n".join([*_head(name), *_inputs(name), *_parameters(get(name))]) + "\n"


def _head(name: str) -> Iterator[str]:
    kind = get(name)
    yield f"# {inspect.getdoc(inspect.getmodule(kind))}"
    yield f"# Source: {kind.source}"
    yield "# To run: curvkern restore FILE. Paths are relative to where it is run."
    yield f"method: {name}"


def _inputs(name: str) -> Iterator[str]:
    method = make(name, {})
    wanted = looked_at(method)
    for role in ("aligned", "tuned", *CHECKPOINTS, *DATA):
        if role in ("aligned", "tuned") or role in wanted:
            ending = ".jsonl" if role in DATA else ""
            yield f"{role}: path/to/{role}{ending}  # {_INPUTS[role]}"
    if isinstance(inspect.getattr_static(method, "needs"), property):
        yield "# Other parameters may need more inputs; curvkern restore says which."
    yield "out: path/to/restored  # directory to make"
    if method.statistics():
        yield "# statistics: path/to/statistics  # keeps what is measured on data, for other runs"
    yield "# include: ['*.q_proj.weight']  # only these weights; exclude: leaves weights as tuned"


def _parameters(kind: type[BaseModel]) -> Iterator[str]:
    schema: dict[str, Any] = kind.model_json_schema()["properties"]
    yield "parameters:"
    for parameter, field in kind.model_fields.items():
        told = "; ".join(filter(None, (schema[parameter].get("description"), _allowed(schema[parameter]))))
        if told:
            yield f"  # {told}"
        yield f"  {parameter}: {_as_yaml(field.get_default(call_default_factory=True))}"


def _allowed(schema: Mapping[str, Any]) -> str:
    """``number >= 0, <= 1``, ``one of a, b``, ``integer >= 1 or null``; of one property of a JSON schema."""
    if "anyOf" in schema:
        return " or ".join(_allowed(part) for part in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    limits = [f"{sign} {schema[key]:g}" for key, sign in _LIMITS.items() if key in schema]
    return f"{schema['type']} {', '.join(limits)}".strip()


def _as_yaml(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True).splitlines()[0]

"""Restoration methods, one a file, by name."""

from __future__ import annotations

import difflib
from importlib import import_module
from typing import Any

from curvkern.methods.method import Edit, Evidence, Method, MethodError, Module, Modules, Need

#: name -> "module:class"; a method is imported when it is asked for.
REGISTRY: dict[str, str] = {
    "antidote": "curvkern.methods.antidote:Antidote",
    "ascent": "curvkern.methods.ascent:Ascent",
    "budgeted": "curvkern.methods.budgeted:Budgeted",
    "curvature": "curvkern.methods.curvature:Curvature",
    "gradient_rollback": "curvkern.methods.gradient_rollback:GradientRollback",
    "irr": "curvkern.methods.irr:IRR",
    "lox": "curvkern.methods.lox:Lox",
    "merge": "curvkern.methods.merge:Merge",
    "random": "curvkern.methods.random:Random",
    "resta": "curvkern.methods.resta:Resta",
    "rewind": "curvkern.methods.rewind:Rewind",
    "safe_delta": "curvkern.methods.safe_delta:SafeDelta",
    "safe_lora": "curvkern.methods.safe_lora:SafeLora",
    "safe_merge": "curvkern.methods.safe_merge:SafeMerge",
    "splora": "curvkern.methods.splora:Splora",
}

__all__ = ["REGISTRY", "Edit", "Evidence", "Method", "MethodError", "Module", "Modules", "Need", "get", "make"]


def get(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        MethodError: no such method; suggests the nearest.
    """
    if name not in REGISTRY:
        near = difflib.get_close_matches(name, REGISTRY, n=1, cutoff=0.4)
        raise MethodError(
            f"unknown method {name!r}; there are {', '.join(sorted(REGISTRY))}."
            + (f" Did you mean {near[0]!r}?" if near else "")
        )
    module, attribute = REGISTRY[name].split(":")
    return getattr(import_module(module), attribute)


def make(name: str, parameters: dict[str, Any]) -> Method:
    """A method with its parameters.

    Raises:
        MethodError: unknown method or parameter (suggests the nearest), or a value that does not fit.
    """
    from pydantic import ValidationError

    kind = get(name)
    known = set(kind.model_fields)
    for parameter in parameters:
        if parameter not in known:
            near = difflib.get_close_matches(parameter, known, n=1, cutoff=0.5)
            raise MethodError(
                f"{name}: unknown parameter {parameter!r}; it takes {', '.join(sorted(known))}."
                + (f" Did you mean {near[0]!r}?" if near else ""),
                parameter,
            )
    try:
        return kind(**parameters)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise MethodError(f"{name}: {where} is {first['input']!r}: {first['msg']}.", str(*first["loc"][:1])) from None

"""Registration with torch: the only caller of torch.library.

A registered op is opaque to torch.compile (no graph break), bumps the version of what it mutates and has no derivative.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch

from curvkern.backend import dispatch
from curvkern.backend.dispatch import Route

#: op name -> its routes, best first; read by `curvkern env` and by tests.
REGISTERED: dict[str, tuple[Route, ...]] = {}


def register(
    schema: str,
    *,
    check: Callable[..., None],
    routes: Sequence[Route],
    fake: Callable[..., Any] = lambda *_: None,
) -> Callable[..., Any]:
    """Register an op and return the function that calls it.

    Args:
        schema: torch schema whose last argument is ``str backend``: ``"f(Tensor(a!) x, str backend) -> ()"``.
        check: raises for bad arguments; called with all arguments but the backend, for real and fake tensors alike.
        routes: the implementations, best first; each takes what ``check`` takes.
        fake: the outputs as empty tensors, from the same arguments.
    """
    name, signature = schema.split("(", 1)
    mutated = re.findall(r"Tensor\(\w+!\)(?:\[\])?\??\s+(\w+)", signature)
    REGISTERED[name] = tuple(routes)

    def real(*args: Any) -> Any:
        check(*args[:-1])
        return dispatch.run(name, routes, args[-1], args[:-1])

    def abstract(*args: Any) -> Any:
        check(*args[:-1])
        return fake(*args[:-1])

    op = torch.library.custom_op(f"curvkern::{name}", real, mutates_args=mutated, schema=f"({signature}")
    op.register_fake(abstract)
    return op

"""Registration with torch: the only caller of torch.library.

A registered op is opaque to torch.compile (no graph break), bumps the version of what it mutates, has no derivative and
computes in full precision under autocast too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from curvkern.backend import dispatch
from curvkern.backend.dispatch import Route

#: op name -> its routes, best first; read by `curvkern env` and by tests.
REGISTERED: dict[str, tuple[Route, ...]] = {}

_library = torch.library.Library("curvkern", "FRAGMENT")
_below = torch._C._after_ADInplaceOrView_keyset  # pyright: ignore[reportPrivateUsage]


def _device(args: Sequence[Any]) -> torch.device:
    """Where the first tensor is, alone or in a list; the CPU if there is none."""
    for a in args:
        if isinstance(a, Tensor):
            return a.device
        if isinstance(a, (list, tuple)) and a and isinstance(a[0], Tensor):
            return a[0].device
    return torch.device("cpu")


def register(
    schema: str,
    *,
    check: Callable[..., None],
    routes: Sequence[Route],
    fake: Callable[..., Any] = lambda *_: None,
) -> Callable[..., Any]:
    """Register an op and return the function that calls it.

    Not by ``torch.library.custom_op``, whose calls cost three times as much and import torch._dynamo.

    Args:
        schema: torch schema whose last argument is ``str backend``: ``"f(Tensor(a!) x, str backend) -> ()"``.
        check: raises for bad arguments; called with all arguments but the backend, for real and fake tensors alike.
        routes: the implementations, best first; each takes what ``check`` takes.
        fake: the outputs as empty tensors, from the same arguments.
    """
    name = schema.split("(", 1)[0]
    REGISTERED[name] = tuple(routes)

    def real(*args: Any) -> Any:
        check(*args[:-1])
        device = _device(args)
        if not torch.is_autocast_enabled(device.type):
            return dispatch.run(name, routes, args[-1], args[:-1], device)
        with torch.autocast(device.type, enabled=False):
            return dispatch.run(name, routes, args[-1], args[:-1], device)

    def abstract(*args: Any) -> Any:
        check(*args[:-1])
        return fake(*args[:-1])

    def versioned(keys: Any, *args: Any) -> Any:
        for at in mutated:
            if args[at] is not None:
                increment_version(args[at])
        return op.redispatch(keys & _below, *args)

    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.curvkern, name).default
    mutated = [at for at, a in enumerate(op._schema.arguments) if a.alias_info is not None and a.alias_info.is_write]
    _library.impl(name, real, "CompositeExplicitAutograd")
    torch.library.register_fake(f"curvkern::{name}", abstract, lib=_library)
    if mutated:
        _library.impl(name, versioned, "ADInplaceOrView", with_keyset=True)
    return op

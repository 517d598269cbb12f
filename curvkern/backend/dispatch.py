"""Which backend an op takes: ``backend=``, else ``use()``, else ``CURVKERN_BACKEND``, else the best usable one.

A backend that was named must run or raise with the reason; left to itself the choice falls back and says so once.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from curvkern.backend import check, launch

BACKENDS = ("auto", "reference", "cpu", "cuda", "triton")

_log = logging.getLogger("curvkern")
_in_use: ContextVar[str | None] = ContextVar("curvkern_backend", default=None)
_explaining: ContextVar[bool] = ContextVar("curvkern_explaining", default=False)
_told: set[tuple[str, str]] = set()


@dataclass(frozen=True)
class Route:
    """One way to run an op. ``refuse(*args)`` says why these arguments cannot take it, or None."""

    backend: str
    run: Callable[..., Any]
    refuse: Callable[..., str | None] = lambda *_: None


def lazily(target: str) -> Callable[..., Any]:
    """The function ``"module:name"``, imported when first called: triton is optional and slow to import."""
    module, name = target.split(":")

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args)

    return call


@dataclass(frozen=True)
class Choice:
    """What ``explain`` says of one backend."""

    backend: str
    usable: bool
    reason: str
    chosen: bool


class BackendError(RuntimeError):
    """The backend that was asked for cannot run this call."""


class _Explained(BaseException):
    def __init__(self, choices: list[Choice]) -> None:
        self.choices = choices


@contextlib.contextmanager
def use(backend: str) -> Generator[None]:
    """Ask for one backend in a block of code: ``with curvkern.use("triton"): ...``.

    Args:
        backend: ``"auto"``, ``"reference"``, ``"cpu"``, ``"cuda"`` or ``"triton"``.

    Raises:
        ValueError: no such backend.
    """
    check.one_of("use", "backend", backend, BACKENDS)
    token = _in_use.set(backend)
    try:
        yield
    finally:
        _in_use.reset(token)


def requested(op: str, backend: str) -> str:
    """The backend in force for a call: the argument, the ``use()`` block, the environment, ``"auto"``."""
    if backend != "auto":
        check.one_of(op, "backend", backend, BACKENDS)
        return backend
    in_use = _in_use.get()
    if in_use is not None:
        return in_use
    from_environment = os.environ.get("CURVKERN_BACKEND", "auto")
    check.one_of(op, "CURVKERN_BACKEND", from_environment, BACKENDS)
    return from_environment


def passes_by(op: str, backend: str) -> bool:
    """Whether a call on plain CPU tensors may skip torch's dispatcher, which costs more than a short list's work.

    Not where anybody looks on: a compiler, a mode of torch, `explain`; nor where another backend is asked for.
    """
    if torch.compiler.is_compiling() or _watched() or _watched_functions():
        return False
    return not _explaining.get() and requested(op, backend) in ("auto", "cpu")


_watched = torch._C._len_torch_dispatch_stack  # pyright: ignore[reportPrivateUsage]
_watched_functions = torch._C._len_torch_function_stack  # pyright: ignore[reportPrivateUsage]


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def triton_missing(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on ``device``, or None."""
    if not _triton_installed():
        return "triton is not installed (pip install 'curvkern[triton]')"
    if device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        return "the tensors are on cpu, where Triton runs only as an interpreter (TRITON_INTERPRET=1)"
    return None


def backend_missing(backend: str, device: torch.device) -> str | None:
    """Why no op can take ``backend`` for tensors on ``device`` on this machine, or None."""
    if backend == "cpu":
        return f"the tensors are on {device}" if device.type != "cpu" else launch.cpu_missing()
    if backend == "cuda":
        return launch.cuda_missing(device)
    return triton_missing(device) if backend == "triton" else None


def tensors(arguments: Iterable[Any]) -> Iterator[Tensor]:
    """All tensors among arguments, those in lists too."""
    for argument in arguments:
        if isinstance(argument, Tensor):
            yield argument
        elif isinstance(argument, list | tuple):
            yield from (item for item in argument if isinstance(item, Tensor))  # pyright: ignore[reportUnknownVariableType]


def _unusable(route: Route, device: torch.device, args: Sequence[Any]) -> str | None:
    """Why ``route`` cannot run this call, or None."""
    return backend_missing(route.backend, device) or route.refuse(*args)


def run(op: str, routes: Sequence[Route], backend: str, args: Sequence[Any], device: torch.device) -> Any:
    """Run the first usable route, or the one asked for, on the tensors' device.

    Raises:
        BackendError: the backend asked for cannot run this call, or the op has no such backend.
    """
    wanted = requested(op, backend)
    if _explaining.get():
        raise _Explained(choices(routes, wanted, device, lambda route: _unusable(route, device, args)))
    reason = f"{op} has no such version; it has {', '.join(r.backend for r in routes)}"
    for route in routes:
        if wanted in ("auto", route.backend):
            reason = _unusable(route, device, args) or _not_by_itself(route, wanted, device)
            if reason is None:
                return route.run(*args)
            if wanted == "auto" and (op, reason) not in _told:
                _told.add((op, reason))
                _log.info("%s: not %s: %s", op, route.backend, reason)
    raise BackendError(f"{op}: backend {wanted!r} cannot run this call: {reason}")


def _not_by_itself(route: Route, wanted: str, device: torch.device) -> str | None:
    """Triton's interpreter is for tests: never taken unless named."""
    if wanted == "auto" and route.backend == "triton" and device.type == "cpu":
        return "on a CPU, Triton is an interpreter for tests: taken only when asked for by name"
    return None


def choices(
    routes: Sequence[Route], wanted: str, device: torch.device, unusable: Callable[[Route], str | None]
) -> list[Choice]:
    """What becomes of each route if ``wanted`` is in force and ``unusable`` says why a route cannot run."""
    found: list[Choice] = []
    for route in routes:
        reason = unusable(route)
        passed_over = reason or _not_by_itself(route, wanted, device)
        free = not any(choice.chosen for choice in found)
        chosen = passed_over is None and free and wanted in ("auto", route.backend)
        said = passed_over or ("chosen" if chosen else "usable")
        found.append(Choice(route.backend, reason is None, said, chosen))
    return found


# torch bumps the version of what an op says it edits, before the op is asked: nothing was edited here.
_same_version = torch.autograd.grad_mode._unsafe_preserve_version_counter  # pyright: ignore[reportPrivateUsage]


def explain(op: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Choice]:
    """Which backend ``op(*args, **kwargs)`` would take, and why not the others. Runs nothing.

    Args:
        op: a public function of ``curvkern.ops``.
        *args: its arguments; checked as in a real call.
        **kwargs: its keyword arguments.

    Returns:
        One `Choice` a backend, best first.

    Raises:
        TypeError: ``op`` is not an op of curvkern.
    """
    token = _explaining.set(True)
    try:
        with contextlib.ExitStack() as kept:
            for tensor in tensors((*args, *kwargs.values())):
                if not tensor.is_inference():
                    kept.enter_context(_same_version(tensor))
            op(*args, **kwargs)
    except _Explained as explained:
        return explained.choices
    finally:
        _explaining.reset(token)
    raise TypeError(f"explain: {op!r} reached no kernel; pass a function of curvkern.ops")

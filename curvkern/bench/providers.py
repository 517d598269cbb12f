"""Who can compute a case: this package's backends, plain torch, torch.compile, and other libraries if installed.

Every provider takes the arguments of the public function and edits or returns what it does.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.functional import linear

import curvkern
from curvkern.backend.register import REGISTERED
from curvkern.bench.cases import Case
from curvkern.bench.clock import Arguments, Call, tensors_in

#: ``ours``: must be right, or the run fails; ``peer``: somebody else's way to the same result; ``bound``: less work
#: than the op must do, a floor; ``random``: the same work with random numbers of its own, so results cannot agree.
Kind = Literal["ours", "peer", "bound", "random"]

#: Other libraries, by the module to import and the name to install.
PEERS = {
    "backpack": "backpack-for-pytorch",
    "opacus": "opacus",
    "curvlinops": "curvlinops-for-pytorch",
    "mergekit": "mergekit",
}

BACKENDS = {"cpu": ("reference", "cpu"), "cuda": ("reference", "triton", "cuda")}


@dataclass(frozen=True)
class Provider:
    """One way to compute a case.

    Attributes:
        name: as printed.
        call: takes the arguments of the public function.
        kind: what is asked of it.
        missing: why it cannot run this call; empty where it can.
        any_shape: whether ``call`` may be called with other shapes.
    """

    name: str
    call: Call
    kind: Kind = "peer"
    missing: str = ""
    any_shape: bool = True


def providers(case: Case, arguments: Arguments, device: torch.device, backend: str, compiled: bool) -> list[Provider]:
    """All that are there for a case, this package's first.

    Args:
        case: the case.
        arguments: its arguments, to ask backends whether they take them; unchanged.
        device: where they are.
        backend: ``"auto"``, or the only one of this package's to show beside the reference.
        compiled: torch.compile too.
    """
    found = list(_ours(case, arguments, device, backend))
    if case.op == "fisher":
        found += _fisher(case.function, arguments[1])
    if case.op == "mix" and importlib.util.find_spec("mergekit") is not None:
        found += _mergekit(case.function)
    if compiled:
        by_hand = case.function == "fisher_diag_" and not arguments[1]
        found.append(_compiled_einsum() if by_hand else _compiled(case, arguments))
    return found


def missing_peers() -> list[str]:
    """The libraries that are not installed, by the name to install."""
    return [package for module, package in PEERS.items() if importlib.util.find_spec(module) is None]


def _ours(case: Case, arguments: Arguments, device: torch.device, backend: str) -> Iterator[Provider]:
    op = getattr(curvkern, case.function)
    choices = {choice.backend: choice for choice in curvkern.explain(op, *arguments[0], **arguments[1])}
    for name in BACKENDS[device.type]:
        if name in choices and (backend == "auto" or name in ("reference", backend)):
            missing = "" if choices[name].usable else choices[name].reason
            yield Provider(name, functools.partial(op, backend=name), "ours", missing)


# torch ----------------------------------------------------------------------------------------------------------------


def _compiled(case: Case, arguments: Arguments) -> Provider:
    """torch.compile of the reference: the op is opaque to the compiler, so its trace is what is compiled."""
    op = functools.partial(getattr(curvkern, case.function), backend="reference")
    inside: dict[Any, Callable[..., Any]] = {}
    for name, routes in REGISTERED.items():
        run = next(route.run for route in routes if route.backend == "reference")
        # A registered op takes the backend last; its reference does not.
        inside[getattr(torch.ops.curvkern, name).default] = functools.partial(_without_backend, run)
    graphs: list[Any] = []

    def call(*args: Any, **kwargs: Any) -> Any:
        tensors = list(tensors_in((args, kwargs)))
        if not graphs:

            def flat(tensors: list[Tensor]) -> list[Tensor]:
                new_args, new_kwargs = _refill((args, kwargs), iter(tensors))
                return list(tensors_in(op(*new_args, **new_kwargs)))

            trace = make_fx(flat, decomposition_table=inside)
            graphs.append(torch.compile(trace([t.clone() for t in tensors]), fullgraph=True, dynamic=False))
        return graphs[0](tensors)

    return Provider("compile", call, any_shape=False)


def _without_backend(run: Callable[..., Any], *args: Any) -> Any:
    return run(*args[:-1])


def _refill(values: Any, tensors: Iterator[Tensor]) -> Any:
    """``values`` with its tensors replaced, in the order of `tensors_in`."""
    if isinstance(values, Tensor):
        return next(tensors)
    if isinstance(values, dict):
        return {key: _refill(value, tensors) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return type(values)(_refill(value, tensors) for value in values)
    return values


def _compiled_einsum() -> Provider:
    """What one would write for the compiler; a chunk at a time, whose gradients [n, o, i] it keeps."""

    @torch.compile(dynamic=False)
    def chunk(fisher: Tensor, d: Tensor, x: Tensor) -> Tensor:
        return fisher.add_(torch.einsum("nto,nti->noi", d, x).float().square().sum(0))

    def call(fisher: Tensor, d: Tensor, x: Tensor) -> Tensor:
        for dn, xn in zip(d.split(8), x.split(8), strict=True):
            chunk(fisher, dn, xn)
        return fisher

    return Provider("compile", call, any_shape=False)


# the Fisher diagonal --------------------------------------------------------------------------------------------------


def _fisher(function: str, options: dict[str, Any]) -> Iterator[Provider]:
    yield Provider("bare GEMM", _bare_gemm, "bound")
    if function == "fisher_diag_" and "sample" not in options:
        yield Provider("GEMM loop", _gemm_loop)
    if function == "fisher_diag_" and not options:
        yield Provider("vmap(grad)", _vmap)
        for name, module, call in (
            ("BackPACK", "backpack", _backpack),
            ("Opacus", "opacus", _opacus),
            ("curvlinops*", "curvlinops", _curvlinops),
        ):
            if importlib.util.find_spec(module) is not None:
                yield Provider(name, call)


def _gradient(d: Tensor, x: Tensor) -> Tensor:
    """float32 d^T x, by the shortest way there is: a 16-bit product would be rounded before it is squared."""
    if d.dtype == torch.float32:
        return d.T @ x
    if d.is_cuda:
        return torch.mm(d.T, x, out_dtype=torch.float32)
    return d.T.float() @ x.float()


def _bare_gemm(fisher: Tensor, d: Tensor, x: Tensor, **_: Any) -> Tensor:
    """The summed weight gradient alone: as many flops, no squares. What backward pays anyway."""
    return _gradient(d.flatten(0, -2), x.flatten(0, -2))


def _gemm_loop(
    fisher: Tensor,
    d: Tensor,
    x: Tensor,
    *,
    weight_grad: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    segments: Tensor | None = None,
) -> Tensor:
    """A product for each sample, squared into the sum: what to write without a library."""
    experts, samples = [fisher], list(zip(d, x, strict=True))
    if cu_seqlens is not None and segments is not None:
        lengths = cu_seqlens.diff().tolist()
        experts, samples = list(fisher), list(zip(d.split(lengths), x.split(lengths), strict=True))
    for at, (dn, xn) in enumerate(samples):
        gradient = _gradient(dn, xn)
        experts[at * len(experts) // len(samples)].addcmul_(gradient, gradient)
        if weight_grad is not None:
            weight_grad.add_(gradient)
    return fisher


def _vmap(fisher: Tensor, d: Tensor, x: Tensor) -> Tensor:
    def loss(weight: Tensor, dn: Tensor, xn: Tensor) -> Tensor:
        return (linear(xn, weight) * dn).sum()

    weight = torch.zeros(fisher.shape, dtype=d.dtype, device=d.device)
    gradients = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))(weight, d, x)
    return fisher.add_(gradients.float().square_().sum(0))


def _layer(d: Tensor, x: Tensor) -> torch.nn.Linear:
    """Without storage: libraries only ask it for its shape."""
    return torch.nn.Linear(x.shape[-1], d.shape[-1], bias=False, device="meta")


def _backpack(fisher: Tensor, d: Tensor, x: Tensor) -> Tensor:
    sums = importlib.import_module("backpack.extensions.firstorder.sum_grad_squared.linear").SGSLinear()
    layer = _layer(d, x)
    layer.input0 = x
    return fisher.add_(sums.weight(None, layer, None, (d,), None))


def _opacus(fisher: Tensor, d: Tensor, x: Tensor) -> Tensor:
    sampler = importlib.import_module("opacus.grad_sample.linear")
    layer = _layer(d, x)
    gradients = sampler.compute_linear_grad_sample(layer, [x], d)[layer.weight]
    return fisher.add_(gradients.float().square_().sum(0))


def _curvlinops(fisher: Tensor, d: Tensor, x: Tensor) -> Tensor:
    """*: EKFAC's corrections, of which the diagonal is the case of identity rotations; it pays for those."""
    ekfac = importlib.import_module("curvlinops.ekfac")
    turns = [torch.eye(t.shape[-1], dtype=t.dtype, device=t.device) for t in (d, x)]
    correct = ekfac.compute_eigenvalue_correction_linear_weight_sharing
    # The other strategy needs [n, t, t, o + i].
    return fisher.add_(correct(d, turns[0], x, turns[1], _force_strategy="per_example_gradients"))


# merging --------------------------------------------------------------------------------------------------------------


def _mergekit(function: str) -> Iterator[Provider]:
    """The same merge by mergekit's functions of tensors, and of whole state dicts for lists."""
    name = function.removesuffix("_list")
    if name in _MERGES:
        call = functools.partial(_merged, name, name != function)
        yield Provider("mergekit", call, "random" if name == "dare" else "peer")


def _merged(name: str, lists: bool, *arguments: Any) -> Any:
    api = importlib.import_module("mergekit.merge_methods.api")
    models, parameters, base = _MERGES[name](*arguments)
    method = {"dare": "dare_linear"}.get(name, name)
    if not lists:
        return api.merge_tensors(models, method, parameters=parameters, base_index=base)
    states = [{str(i): tensor for i, tensor in enumerate(model)} for model in models]
    return list(api.merge_state_dicts(states, method, parameters=parameters, base=base).values())


#: The arguments of this package's functions as mergekit's: models, parameters by model, which is the base.
_MERGES: dict[str, Callable[..., tuple[list[Any], dict[str, Any], int | None]]] = {
    "linear": lambda models, weights: (models, {"weight": weights, "normalize": False}, None),
    "slerp": lambda a, b, t: ([a, b], {"t": t}, 0),
    "ties": lambda base, models, density, weights: (
        [base, *models],
        {"weight": dict(enumerate(weights, 1)), "density": dict.fromkeys(range(1, len(models) + 1), density)},
        0,
    ),
    "dare": lambda base, tuned, p, seed: (
        [base, tuned],
        {"weight": {1: 1.0}, "density": {1: 1 - p}, "rescale": False},
        0,
    ),
    "model_stock": lambda base, models: ([base, *models], {}, 0),
}

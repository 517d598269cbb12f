"""Shapes, dtypes, bytes and flops of every op: what is tested is what is measured.

Bytes and flops are the algorithm's (each input once, each output once), never a guess at what a kernel does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

#: ``edge``: small, at the borders of kernels' regimes, for tests; ``s``, ``m``, ``l``: for measuring.
Size = Literal["edge", "s", "m", "l"]


@dataclass(frozen=True)
class Case:
    """One op on one input.

    Attributes:
        op: stem of the op's files.
        function: public function, also the name of its reference (``<function>_ref`` without the underscore).
        label: the shape in words.
        dtype: of weights or activations.
        size: where it is used.
        make: device and float64 switch -> arguments; the same numbers every time.
        bytes: read and written.
        flops: multiply-adds count two.
    """

    op: str
    function: str
    label: str
    dtype: torch.dtype
    size: Size
    make: Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]
    bytes: int = 0
    flops: int = 0

    def __str__(self) -> str:
        return f"{self.function}-{self.label}-{str(self.dtype).removeprefix('torch.')}".replace(" ", "_")


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Normal numbers; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def _rollback() -> list[Case]:
    """Sizes at the borders of a byte of undo bits and of a block of 2048; Llama's square and wide layers."""

    def case(shape: tuple[int, ...], dtype: torch.dtype, size: Size) -> Case:
        n = torch.Size(shape).numel()

        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            weight = random(*shape, dtype=dtype, device=device, seed=1)
            target = random(*shape, dtype=dtype, device=device, seed=2)
            grad = random(*shape, device=device, seed=3)
            return (weight, target, 1.0), {"rule": "grad", "gate": "descent", "grad": grad}

        label = "x".join(map(str, shape))
        # Weight, target and gradient once; a quarter passes the gate, a third of that the threshold: written blocks.
        return Case("rollback", "rollback_", label, dtype, size, make, bytes=n * (3 * dtype.itemsize + 4))

    edges = [(0,), (1,), (7,), (8,), (9,), (2047,), (2048,), (2049,), (33, 65)]
    measured: list[tuple[tuple[int, ...], Size]] = [((1024, 1024), "s"), ((4096, 4096), "m"), ((11008, 4096), "l")]
    cases = [case(shape, dtype, "edge") for shape in edges for dtype in FLOATS]
    return cases + [case(shape, dtype, size) for shape, size in measured for dtype in (torch.float32, torch.bfloat16)]


def _select() -> list[Case]:
    """Sizes at the borders of a block (128 on the CPU, 1024 in Triton, 6144 in CUDA) and of a tile; Llama's layers."""

    def case(function: str, shape: tuple[int, ...], dtype: torch.dtype, size: Size) -> Case:
        n = torch.Size(shape).numel()

        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            weights = [random(*shape, dtype=dtype, device=device, seed=seed) for seed in (1, 2)]
            options: dict[str, Any] = {"rule": "grad", "gate": "descent", "grad": random(*shape, device=device, seed=3)}
            if function == "block_select":
                return tuple(weights), {**options, "fraction": 0.1, "ties": "exact_k"}
            counts = [torch.zeros(bins, dtype=torch.int64, device=device) for bins in (1 << 16, 2)]
            return (*counts, *weights), options

        # Weight, target and gradient once; tiles also write a byte a weight.
        tile = 1 if function == "block_select" else 0
        label = "x".join(map(str, shape))
        return Case("select", function, label, dtype, size, make, bytes=n * (2 * dtype.itemsize + 4 + tile))

    lines = [(0,), (1,), (127,), (128,), (129,), (1025,), (6145,), (33, 65)]
    tiles = [(0, 5), (5, 0), (1, 1), (7, 129), (129, 257), (300, 128)]
    measured: list[tuple[tuple[int, ...], Size]] = [((1024, 1024), "s"), ((4096, 4096), "m"), ((11008, 4096), "l")]
    cases = [case("score_histogram_", shape, dtype, "edge") for shape in lines for dtype in FLOATS]
    cases += [case("block_select", shape, dtype, "edge") for shape in tiles for dtype in FLOATS]
    for function in ("score_histogram_", "block_select"):
        cases += [case(function, line, dtype, size) for line, size in measured for dtype in FLOATS[::2]]
    return cases


def _subspace() -> list[Case]:
    """Sizes at the borders of a strip (128), a step (32), a share (128), a column tile (16, 64); Llama's layers."""

    def near(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor]:
        aligned = random(*shape, dtype=dtype, device=device, seed=seed)
        return aligned, (aligned.float() + 0.1 * random(*shape, device=device, seed=seed + 1)).to(dtype)

    def update(o: int, i: int, r: int, dtype: torch.dtype, size: Size) -> list[Case]:
        def image(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (random(o, r, device=device, seed=1), *near((o, i), dtype, device, 2)), {}

        def scores(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            factors = random(o, r, device=device, seed=1), random(r, i, device=device, seed=4)
            return (*factors, *near((o, i), dtype, device, 2)), {}

        # V^T x must be complete before V multiplies it: both weights are read twice.
        cost = {"bytes": 4 * o * i * dtype.itemsize + 8 * o * r, "flops": 4 * o * i * r}
        label = f"{o}x{i} r{r}"
        return [
            Case("subspace", "alignment_map", label, dtype, size, image, **cost),
            Case("subspace", "alignment_scores", label, dtype, size, scores, **cost),
        ]

    def projection(o: int, c: int, k: int, dtype: torch.dtype, size: Size, complement: bool = True) -> Case:
        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            basis = torch.linalg.qr(random(o, k, seed=1)).Q.to(device)
            return (random(o, c, dtype=dtype, device=device, seed=2), basis), {"complement": complement, "scale": 0.5}

        # x is read for its coordinates, then read and written.
        cost = {"bytes": 3 * o * c * dtype.itemsize + 8 * o * k, "flops": 4 * o * c * k}
        return Case("subspace", "project_", f"{o}x{c} k{k}", dtype, size, make, **cost)

    edges = [(0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 1, 1), (31, 129, 16), (129, 33, 17), (257, 7, 3), (5, 130, 65)]
    projected = [(0, 3, 0), (3, 0, 2), (1, 1, 1), (129, 63, 3), (40, 65, 33)]
    measured: list[tuple[int, int, Size]] = [(1024, 1024, "s"), (4096, 4096, "m"), (11008, 4096, "l")]
    cases = [case for shape in edges for dtype in FLOATS for case in update(*shape, dtype, "edge")]
    cases += [projection(o, c, k, dtype, "edge", k % 2 == 0) for o, c, k in projected for dtype in FLOATS]
    for o, i, size in measured:
        cases += [case for dtype in (torch.float32, torch.bfloat16) for case in update(o, i, 16, dtype, size)]
        cases += [projection(o, i, 64, dtype, size) for dtype in (torch.float32, torch.bfloat16)]
    return cases


def _fisher() -> list[Case]:
    """Empty, one element, tails of every tile side; square layers of language models."""

    def case(n: int, t: int, o: int, i: int, dtype: torch.dtype, size: Size) -> Case:
        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            d = random(n, t, o, dtype=dtype, device=device, seed=1)
            x = random(n, t, i, dtype=dtype, device=device, seed=2)
            return (torch.zeros(o, i, device=device), d, x), {}

        moved = n * t * (o + i) * dtype.itemsize + 8 * o * i
        label = f"n{n} t{t} {o}x{i}"
        return Case("fisher", "fisher_diag_", label, dtype, size, make, bytes=moved, flops=2 * n * t * o * i)

    edges = [(0, 3, 4, 5), (2, 0, 4, 5), (1, 1, 1, 1), (3, 5, 17, 33), (2, 65, 13, 40)]
    measured: list[tuple[int, int, int, Size]] = [(32, 128, 1024, "s"), (32, 512, 4096, "m"), (128, 128, 4096, "l")]
    cases = [case(*shape, dtype, "edge") for shape in edges for dtype in FLOATS]
    return cases + [
        case(n, t, o, o, dtype, size) for n, t, o, size in measured for dtype in (torch.float32, torch.bfloat16)
    ]


def _mix() -> list[Case]:
    """Sizes at the borders of a block (256 on the CPU, 2048 in Triton); a base and two fine-tuned tensors near it."""

    def case(function: str, shape: tuple[int, ...], dtype: torch.dtype, size: Size) -> Case:
        n = torch.Size(shape).numel()

        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            base = random(*shape, dtype=dtype, device=device, seed=1)
            moved = [random(*shape, device=device, seed=seed) for seed in (2, 3)]
            first, second = ((base.float() + 0.1 * m).to(dtype) for m in moved)
            return {
                "linear": ([base, first, second], [0.2, 0.3, 0.5]),
                "axpby_": (base, 0.75, first, 0.5),
                "slerp": (base, moved[0].to(dtype), 0.3),
                "ties": (base, [first, second], 0.2, [1.0, 0.5]),
                "dare": (base, first, 0.5, 7),
                "model_stock": (base, [first, second]),
            }[function], {}

        # How often a tensor is read or written: once, twice where a sum or a threshold comes first.
        passes = {"linear": 4, "axpby_": 3, "slerp": 5, "ties": 7, "dare": 3, "model_stock": 7}[function]
        label = "x".join(map(str, shape))
        return Case("mix", function, label, dtype, size, make, bytes=passes * n * dtype.itemsize)

    functions = ("linear", "axpby_", "slerp", "ties", "dare", "model_stock")
    edges = [(0,), (1,), (255,), (257,), (2049,), (33, 65)]
    measured: list[tuple[tuple[int, ...], Size]] = [((1024, 1024), "s"), ((4096, 4096), "m"), ((11008, 4096), "l")]
    cases = [case(function, shape, dtype, "edge") for function in functions for shape in edges for dtype in FLOATS]
    for function in functions:
        cases += [case(function, shape, dtype, size) for shape, size in measured for dtype in FLOATS[::2]]
    return cases


def _vectors() -> list[Case]:
    """Lists with empty tensors, single elements and ends of a block and a chunk; a layer's and a model's parameters."""

    def case(function: str, label: str, shapes: list[tuple[int, ...]], dtype: torch.dtype, size: Size) -> Case:
        n = sum(torch.Size(shape).numel() for shape in shapes)

        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            xs = [random(*shape, dtype=dtype, device=device, seed=k) for k, shape in enumerate(shapes)]
            wide = [random(*shape, device=device, seed=1000 + k) for k, shape in enumerate(shapes)]
            ys = [y.to(dtype) for y in wide]
            return {
                "dot_list": (xs, ys),
                "norm_list": (xs,),
                "axpby_list_": (ys, 0.75, xs, 0.5),
                "lerp_list_": (wide, xs, 0.005),
                "surgery_list_": (ys, xs),
            }[function], {}

        moved = {"dot_list": 2, "norm_list": 1, "axpby_list_": 3, "lerp_list_": 1, "surgery_list_": 5}[function]
        shadow = 8 if function == "lerp_list_" else 0
        return Case("vectors", function, label, dtype, size, make, bytes=n * (moved * dtype.itemsize + shadow))

    functions = ("dot_list", "norm_list", "axpby_list_", "lerp_list_", "surgery_list_")
    edges: dict[str, list[tuple[int, ...]]] = {
        "one": [(1,)],
        "empty": [(0,), (0, 3)],
        "ragged": [(3,), (0,), (257,), (33, 65), (1,), (2, 3, 5), (0,)],
        "chunks": [(16384,), (16385,), (8191,)],
    }
    layer: list[tuple[int, ...]] = [(2048, 2048)] * 2 + [(512, 2048)] * 2 + [(2048,)] * 2
    measured: dict[Size, tuple[str, list[tuple[int, ...]]]] = {
        "s": ("300 of 64x64", [(64, 64)] * 300),
        "m": ("a layer", layer),
        "l": ("8 layers", layer * 8),
    }
    cases = [
        case(f, label, shapes, dtype, "edge") for f in functions for label, shapes in edges.items() for dtype in FLOATS
    ]
    for function in functions:
        cases += [case(function, *measured[size], dtype, size) for size in measured for dtype in FLOATS[::2]]
    return cases


CASES: dict[str, list[Case]] = {
    "fisher": _fisher(),
    "mix": _mix(),
    "rollback": _rollback(),
    "select": _select(),
    "subspace": _subspace(),
    "vectors": _vectors(),
}

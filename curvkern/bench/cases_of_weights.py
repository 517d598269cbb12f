"""Cases of the ops that score, edit and merge weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvkern.bench.case import FLOATS, LAYERS, MEASURED, WIDE_AND_HALF, Case, Size, random, text


def mix() -> list[Case]:
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
    lists: list[tuple[int, Size]] = [(2, "tiny"), (300, "s"), (1000, "m")]
    return cases + [_mixed_list(function, count, size) for function in _PASSES for count, size in lists]


#: How often a tensor is read or written: once, twice where a sum or a threshold comes first.
_PASSES = {"linear_list": 4, "slerp_list": 5, "ties_list": 7, "dare_list": 3, "model_stock_list": 7}


def _mixed_list(function: str, count: int, size: Size) -> Case:
    """Norms' weights of a small model: what a call costs."""

    def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
        base = [random(64, device=device, seed=3 * i) for i in range(count)]
        moved = [[random(64, device=device, seed=3 * i + k) for i in range(count)] for k in (1, 2)]
        first, second = ([t + 0.1 * m for t, m in zip(base, model, strict=True)] for model in moved)
        return {
            "linear_list": ([base, first, second], [0.2, 0.3, 0.5]),
            "slerp_list": (base, moved[0], 0.3),
            "ties_list": (base, [first, second], 0.2, [1.0, 0.5]),
            "dare_list": (base, first, 0.5, 7),
            "model_stock_list": (base, [first, second]),
        }[function], {}

    return Case("mix", function, f"{count} x 64", torch.float32, size, make, bytes=_PASSES[function] * count * 256)


def perturb() -> list[Case]:
    """Sizes at the borders of a Philox call (4), a batch (256), a program (1024), a segment (65536); Llama's layers."""

    def case(shape: tuple[int, ...], dtype: torch.dtype, size: Size, norm: str = "tensor") -> Case:
        n = torch.Size(shape).numel()

        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            weight, original = (random(*shape, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
            return (weight, original, 0.3), {"seed": 7, "norm": norm}

        # The original twice, first for its norm; the weight once.
        label = " ".join(["x".join(map(str, shape)), norm])
        return Case("perturb", "perturb_", label, dtype, size, make, bytes=3 * n * dtype.itemsize)

    edges = [(0,), (1,), (3,), (5,), (255,), (257,), (1025,), (33, 65)]
    measured: list[tuple[tuple[int, ...], Size]] = [((1024, 1024), "s"), ((4096, 4096), "m"), ((11008, 4096), "l")]
    cases = [case(shape, dtype, "edge") for shape in edges for dtype in FLOATS]
    cases += [case(shape, dtype, "edge", "filter") for shape in [(0, 3), (3, 0), (7, 131)] for dtype in FLOATS]
    return cases + [case(shape, dtype, size) for shape, size in measured for dtype in FLOATS[::2]]


def rollback() -> list[Case]:
    """Sizes at the borders of a byte of undo bits and of a block of 2048; layers of language models."""

    def pair(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> list[Tensor]:
        return [random(*shape, dtype=dtype, device=device, seed=seed) for seed in (1, 2)]

    def case(shape: tuple[int, ...], dtype: torch.dtype, size: Size, layer: str = "") -> Case:
        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            grad = random(*shape, device=device, seed=3)
            return (*pair(shape, dtype, device), 1.0), {"rule": "grad", "gate": "descent", "grad": grad}

        # Weight, target and gradient once; a quarter passes the gate, a third of that the threshold: written blocks.
        moved = torch.Size(shape).numel() * (3 * dtype.itemsize + 4)
        return Case("rollback", "rollback_", text(shape, layer), dtype, size, make, bytes=moved)

    def blend(shape: tuple[int, ...], dtype: torch.dtype, size: Size, layer: str = "") -> Case:
        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (*pair(shape, dtype, device), 0.3), {}

        moved = torch.Size(shape).numel() * 3 * dtype.itemsize
        return Case("rollback", "blend_", text(shape, layer), dtype, size, make, bytes=moved)

    edges = [(0,), (1,), (7,), (8,), (9,), (2047,), (2048,), (2049,), (33, 65)]
    cases = [case(shape, dtype, "edge") for shape in edges for dtype in FLOATS]
    cases += [blend((8, 8), dtype, "tiny") for dtype in FLOATS]
    return cases + [
        one(LAYERS[layer], dtype, size, layer)
        for one in (case, blend)
        for layer, size in MEASURED
        for dtype in WIDE_AND_HALF
    ]


def select() -> list[Case]:
    """Sizes at the borders of a block (128 on the CPU, 1024 in Triton, 6144 in CUDA) and of a tile; models' layers."""

    def case(function: str, shape: tuple[int, ...], dtype: torch.dtype, size: Size, layer: str = "") -> Case:
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
        moved = n * (2 * dtype.itemsize + 4 + tile)
        return Case("select", function, text(shape, layer), dtype, size, make, bytes=moved)

    lines = [(0,), (1,), (127,), (128,), (129,), (1025,), (6145,), (33, 65)]
    tiles = [(0, 5), (5, 0), (1, 1), (7, 129), (129, 257), (300, 128)]
    cases = [case("score_histogram_", shape, dtype, "edge") for shape in lines for dtype in FLOATS]
    cases += [case("block_select", shape, dtype, "edge") for shape in tiles for dtype in FLOATS]
    return cases + [
        case(function, LAYERS[layer], dtype, size, layer)
        for function in ("score_histogram_", "block_select")
        for layer, size in MEASURED
        for dtype in WIDE_AND_HALF
    ]


def change() -> list[Case]:
    """Ends of a block (256) and of a chunk (16384); a layer's weights."""

    def case(shape: tuple[int, ...], dtype: torch.dtype, size: Size, layer: str = "") -> Case:
        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            aligned, moved = (random(*shape, device=device, seed=seed) for seed in (1, 2))
            tuned = aligned + 0.1 * moved
            restored = torch.where(moved > 0.5, aligned, tuned)
            return (aligned.to(dtype), tuned.to(dtype), restored.to(dtype)), {}

        moved = 3 * torch.Size(shape).numel() * dtype.itemsize
        return Case("change", "change", text(shape, layer), dtype, size, make, bytes=moved)

    edges = [(0,), (1,), (255,), (257,), (16385,), (33, 65)]
    cases = [case(shape, dtype, "edge") for shape in edges for dtype in FLOATS]
    return cases + [case(LAYERS[layer], dtype, size, layer) for layer, size in MEASURED for dtype in WIDE_AND_HALF]


def vectors() -> list[Case]:
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

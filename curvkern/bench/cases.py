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


def _hessian() -> list[Case]:
    """Sizes at the borders of a word (32), a Philox call (128), a program (4096) and a batch (8192); Llama's layers."""

    def case(function: str, shape: tuple[int, ...], dtype: torch.dtype, size: Size, **options: Any) -> Case:
        n = torch.Size(shape).numel()

        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            read = random(*shape, dtype=dtype, device=device, seed=1)
            tile = options.get("block") or (1, 1)
            sums = [-(-side // by) for side, by in zip(shape, tile, strict=False)]
            diag = random(*sums, device=device, seed=2)
            return {
                "rademacher_": ((read,), {"seed": 7, **options}),
                "hutchinson_": ((diag, read), {"seed": 7, "scale": 0.5, **options}),
                "gnb_diag_": ((diag, read, 64), {}),
            }[function]

        # What is read and written, once: signs cost nothing. Of tiles only the product is read.
        widths = {"rademacher_": dtype.itemsize, "hutchinson_": 8 + dtype.itemsize, "gnb_diag_": 8 + dtype.itemsize}
        moved = n * (dtype.itemsize if "block" in options else widths[function])
        tile = "x".join(map(str, options["block"])) if "block" in options else ""
        label = " ".join(filter(None, ["x".join(map(str, shape)), tile]))
        return Case("hessian", function, label, dtype, size, make, bytes=moved)

    edges = [(0,), (1,), (31,), (33,), (127,), (129,), (4097,), (8193,), (33, 65)]
    tiles = [((0, 5), (2, 2)), ((1, 1), (4, 4)), ((5, 131), (2, 32)), ((7, 300), (3, 127)), ((20, 129), (64, 1000))]
    measured: list[tuple[tuple[int, ...], Size]] = [((1024, 1024), "s"), ((4096, 4096), "m"), ((11008, 4096), "l")]
    cases: list[Case] = []
    for function in ("rademacher_", "hutchinson_", "gnb_diag_"):
        cases += [case(function, shape, dtype, "edge") for shape in edges for dtype in FLOATS]
        cases += [case(function, shape, dtype, size) for shape, size in measured for dtype in FLOATS[::2]]
    cases += [case("hutchinson_", shape, dtype, "edge", block=tile) for shape, tile in tiles for dtype in FLOATS]
    return cases + [
        case("hutchinson_", shape, dtype, size, block=(128, 128)) for shape, size in measured for dtype in FLOATS[::2]
    ]


def _loss() -> list[Case]:
    """Sizes at the borders of a program's step (4096) and of a chunk (2^19 logits); vocabularies of Llama 2 and 3."""

    def case(function: str, tokens: int, vocab: int, dtype: torch.dtype, size: Size, hidden: int = 0) -> Case:
        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            head = {"lm_head": random(vocab, hidden, dtype=dtype, device=device, seed=3)} if hidden else {}
            x, y = (random(tokens, hidden or vocab, dtype=dtype, device=device, seed=seed) for seed in (1, 2))
            counted = torch.arange(tokens, device=device) % 5 != 3
            if function == "kl_to_reference":
                return (x, y, counted), head
            labels = torch.where(counted, torch.arange(tokens, device=device) * 37 % vocab, -100)
            return (x, labels, random(tokens, device=device, seed=4)), head

        read = 2 if function == "kl_to_reference" else 1
        moved = read * tokens * (hidden or vocab) * dtype.itemsize + vocab * hidden * dtype.itemsize
        label = f"{tokens}x{vocab}" + (f" d{hidden}" if hidden else "")
        flops = read * 2 * tokens * vocab * hidden
        return Case("loss", function, label, dtype, size, make, bytes=moved, flops=flops)

    edges = [(0, 5, 0), (1, 1, 0), (7, 33, 0), (3, 4097, 0), (0, 5, 4), (6, 70, 9)]
    measured: list[tuple[int, int, int, Size]] = [
        (512, 32000, 0, "s"), (2048, 32000, 0, "m"), (8192, 128256, 0, "l"), (512, 32000, 1024, "s"),
    ]  # fmt: skip
    cases: list[Case] = []
    for function in ("weighted_cross_entropy", "kl_to_reference"):
        cases += [case(function, t, v, dtype, "edge", d) for t, v, d in edges for dtype in FLOATS]
        cases += [case(function, t, v, dtype, size, d) for t, v, d, size in measured for dtype in FLOATS[::2]]
    return cases


def _perturb() -> list[Case]:
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


CASES: dict[str, list[Case]] = {
    "fisher": _fisher(),
    "hessian": _hessian(),
    "loss": _loss(),
    "perturb": _perturb(),
    "rollback": _rollback(),
    "select": _select(),
    "subspace": _subspace(),
}

"""Cases of the ops that look at activations, gradients and directions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from curvkern.bench.case import FLOATS, LAYERS, MEASURED, WIDE_AND_HALF, Case, Size, random, text


def fisher() -> list[Case]:
    """Empty, one element, tails of every tile side; layers of language models, and experts with ragged samples."""
    plain: dict[str, Any] = {}

    def case(n: int, t: int, o: int, i: int, dtype: torch.dtype, size: Size, layer: str = "", **how: Any) -> Case:
        """``how``: options of the function; ``block`` makes it fisher_blocks_, ``weight_grad=True`` adds the tensor."""
        block = how.get("block")
        rows, cols = block or (1, 1)
        sums = -(-o // rows), -(-i // cols)

        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            d = random(n, t, o, dtype=dtype, device=device, seed=1)
            x = random(n, t, i, dtype=dtype, device=device, seed=2)
            grad = {"weight_grad": torch.zeros(o, i, device=device)} if "weight_grad" in how else {}
            return (torch.zeros(*sums, device=device), d, x), {**how, **grad}

        moved = n * t * (o + i) * dtype.itemsize + 8 * (sums[0] * sums[1] + o * i * ("weight_grad" in how))
        function = "fisher_diag_" if block is None else "fisher_blocks_"
        words = [f"n{n} t{t}", text((o, i), layer), *(f"{k}={v}" if isinstance(v, str) else k for k, v in how.items())]
        return Case("fisher", function, " ".join(words), dtype, size, make, bytes=moved, flops=2 * n * t * o * i)

    def experts(e: int, n: int, tokens: int, layer: str, dtype: torch.dtype, size: Size) -> Case:
        """``tokens`` routed to ``e`` experts, cut at random into ``n`` sequences an expert."""
        o, i = LAYERS[layer]

        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            cuts = torch.randint(tokens, (e * n - 1,), generator=torch.Generator().manual_seed(3)).sort().values
            starts = torch.cat((torch.tensor([0]), cuts, torch.tensor([tokens]))).to(device)
            d = random(tokens, o, dtype=dtype, device=device, seed=1)
            x = random(tokens, i, dtype=dtype, device=device, seed=2)
            return (torch.zeros(e, o, i, device=device), d, x), {"cu_seqlens": starts, "segments": starts[::n].clone()}

        label = f"{e} experts n{e * n} {tokens} tokens {text((o, i), layer)}"
        moved = tokens * (o + i) * dtype.itemsize + 8 * e * o * i
        return Case("fisher", "fisher_diag_", label, dtype, size, make, bytes=moved, flops=2 * tokens * o * i)

    edges = [(0, 3, 4, 5), (2, 0, 4, 5), (1, 1, 1, 1), (3, 5, 17, 33), (2, 65, 13, 40)]
    cases = [case(*shape, dtype, "edge") for shape in edges for dtype in FLOATS]
    cases += [case(1, 4, 8, 8, dtype, "tiny", block=(4, 4)) for dtype in FLOATS]

    pythia, qwen, llama = ("Pythia-70M o", "Qwen3-0.6B k", "Llama-2-7B q")
    kinds = (plain, {"weight_grad": True}, {"sample": "token"}, {"block": (128, 128)})
    for n, t, layer in [(8, 64, pythia), (32, 64, pythia), (32, 256, pythia), (8, 64, qwen), (32, 256, qwen)]:
        cases.append(case(n, t, *LAYERS[layer], torch.float32, "s", layer))
    cases += [case(32, 128, *LAYERS[qwen], torch.float32, "s", qwen, **how) for how in kinds]
    cases.append(case(32, 128, *LAYERS[qwen], torch.bfloat16, "s", qwen))
    cases.append(experts(8, 4, 4096, "Qwen3-30B-A3B expert", torch.float32, "s"))

    cases += [case(32, 512, *LAYERS[llama], torch.bfloat16, "m", llama, **how) for how in kinds]
    cases += [case(n, t, *LAYERS[llama], torch.bfloat16, "m", llama) for n, t in [(128, 128), (256, 64)]]
    cases.append(case(32, 512, *LAYERS[llama], torch.float32, "m", llama))
    cases.append(experts(128, 8, 32768, "Qwen3-30B-A3B expert", torch.bfloat16, "m"))
    for layer in ("Llama-2-7B up", "Llama-3-8B up", "Llama-3-70B q", "Llama-3-70B down"):
        cases.append(case(32, 512, *LAYERS[layer], torch.bfloat16, "l", layer))
    return cases


def gram() -> list[Case]:
    """Empty, one element, tails of every tile side and of the CPU's panel; inputs of language models' layers."""

    def case(function: str, t: int, i: int, dtype: torch.dtype, size: Size, layer: str = "") -> Case:
        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            shape = (i, i) if function == "gram_" else (i,)
            return (torch.zeros(*shape, device=device), random(t, i, dtype=dtype, device=device, seed=1)), {}

        read, flops = t * i * dtype.itemsize, t * i * (i + 1)  # a symmetric product: the half
        cost = {"bytes": read + 8 * i * i, "flops": flops} if function == "gram_" else {"bytes": read + 8 * i}
        return Case("gram", function, f"{layer} t{t} i{i}".lstrip(), dtype, size, make, **cost)

    edges = [(0, 5), (3, 0), (1, 1), (40, 33), (70, 130), (9, 300)]
    measured: list[tuple[int, int, Size, str]] = [
        (2048, 1024, "s", "Qwen3-0.6B"),
        (2048, 3072, "s", "Qwen3-0.6B down"),
        (16384, 4096, "m", "Llama-2-7B"),
        (16384, 14336, "l", "Llama-3-8B down"),
    ]
    functions = ("gram_", "column_sumsq_")
    cases = [case(f, *shape, dtype, "edge") for f in functions for shape in edges for dtype in FLOATS]
    cases += [case(f, 4, 16, torch.float32, "tiny") for f in functions]
    return cases + [
        case(f, *one[:2], dtype, *one[2:]) for f in functions for one in measured for dtype in WIDE_AND_HALF
    ]


def hessian() -> list[Case]:
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


def loss() -> list[Case]:
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
        label = f"{tokens}x{vocab}" + (f" lm_head {hidden}" if hidden else "")
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


def obs() -> list[Case]:
    """Empty, one column, tails of a panel (128) and of a strip of rows (16); square layers."""

    def case(o: int, i: int, size: Size, layer: str = "") -> Case:
        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            factor = random(i, i, device=device, seed=2).mul_(0.3 / max(i, 1) ** 0.5).triu_()
            factor.diagonal().copy_(1 + factor.diagonal().abs())
            mask = random(o, i, device=device, seed=3) > 1.2
            return (random(o, i, device=device, seed=1), mask, factor), {}

        moved, flops = 8 * o * i + o * i + 4 * i * i, o * i * i
        return Case("obs", "obs_sweep_", text((o, i), layer), torch.float32, size, make, bytes=moved, flops=flops)

    cases = [case(o, i, "edge") for o, i in [(0, 5), (5, 0), (1, 1), (17, 40), (3, 130), (20, 257)]]
    cases += [case(8, 8, "tiny"), case(*LAYERS["Qwen3-0.6B k"], "s", "Qwen3-0.6B k")]
    return [*cases, case(*LAYERS["Llama-2-7B q"], "m", "Llama-2-7B q")]


def subspace() -> list[Case]:
    """Sizes at the borders of a strip (128), a step (32), a share (128), a column tile (16, 64); layers of models."""

    def near(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int) -> tuple[Tensor, Tensor]:
        aligned = random(*shape, dtype=dtype, device=device, seed=seed)
        return aligned, (aligned.float() + 0.1 * random(*shape, device=device, seed=seed + 1)).to(dtype)

    def update(o: int, i: int, r: int, dtype: torch.dtype, size: Size, layer: str = "") -> list[Case]:
        def image(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            return (random(o, r, device=device, seed=1), *near((o, i), dtype, device, 2)), {}

        def scores(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            factors = random(o, r, device=device, seed=1), random(r, i, device=device, seed=4)
            return (*factors, *near((o, i), dtype, device, 2)), {}

        def together(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            args, _ = image(device)
            return tuple([tensor, *(tensor.clone() for _ in range(3))] for tensor in args), {}

        # V^T x must be complete before V multiplies it: both weights are read twice.
        cost = {"bytes": 4 * o * i * dtype.itemsize + 8 * o * r, "flops": 4 * o * i * r}
        label = f"{text((o, i), layer)} r{r}"
        cases = [
            Case("subspace", "alignment_map", label, dtype, size, image, **cost),
            Case("subspace", "alignment_scores", label, dtype, size, scores, **cost),
        ]
        if size in ("s", "m"):  # modules of one shape share their launches
            cost = {name: 4 * amount for name, amount in cost.items()}
            cases.append(Case("subspace", "alignment_map", f"4x {label}", dtype, size, together, **cost))
        return cases

    def projection(
        o: int, c: int, k: int, dtype: torch.dtype, size: Size, complement: bool = True, layer: str = ""
    ) -> Case:
        def make(device: str) -> tuple[tuple[Any, ...], dict[str, Any]]:
            basis = torch.linalg.qr(random(o, k, seed=1)).Q.to(device)
            return (random(o, c, dtype=dtype, device=device, seed=2), basis), {"complement": complement, "scale": 0.5}

        # x is read for its coordinates, then read and written.
        cost = {"bytes": 3 * o * c * dtype.itemsize + 8 * o * k, "flops": 4 * o * c * k}
        return Case("subspace", "project_", f"{text((o, c), layer)} k{k}", dtype, size, make, **cost)

    edges = [(0, 3, 2), (3, 0, 2), (3, 2, 0), (1, 1, 1), (31, 129, 16), (129, 33, 17), (257, 7, 3), (5, 130, 65)]
    projected = [(0, 3, 0), (3, 0, 2), (1, 1, 1), (129, 63, 3), (40, 65, 33)]
    cases = [case for shape in edges for dtype in FLOATS for case in update(*shape, dtype, "edge")]
    cases += [projection(o, c, k, dtype, "edge", k % 2 == 0) for o, c, k in projected for dtype in FLOATS]
    for layer, size in MEASURED:
        for dtype in WIDE_AND_HALF:
            cases += update(*LAYERS[layer], 16, dtype, size, layer)
            cases.append(projection(*LAYERS[layer], 64, dtype, size, layer=layer))
    return cases

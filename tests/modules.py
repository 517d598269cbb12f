"""Modules with random weights, factors and statistics, for methods to work on without a model."""

from dataclasses import replace

import torch

from curvkern.methods import Module


def normal(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def module(name="model.layers.0.mlp.up_proj.weight", o=24, i=16, seed=0, rank=None, scale=0.5):
    """A module whose update is dense, or of a low rank with its factors; unaligned and safety adapter likewise."""
    aligned, base = normal(o, i, seed=seed), normal(o, i, seed=seed + 1)
    factors, delta = None, 0.1 * normal(o, i, seed=seed + 2)
    safety_factors, safety = None, 0.1 * normal(o, i, seed=seed + 5)
    if rank:
        b, a = normal(o, rank, seed=seed + 3), normal(rank, i, seed=seed + 4)
        factors, delta = (b, a, scale), scale * b @ a
        b, a = normal(o, rank, seed=seed + 6), normal(rank, i, seed=seed + 7)
        safety_factors, safety = (b, a, 2 * scale), 2 * scale * b @ a
    kind = name.split(".")[-2]
    return Module(
        name,
        int(name.split(".")[2]),
        kind,
        aligned + delta,
        aligned,
        base,
        factors,
        unaligned=aligned - 0.1 * normal(o, i, seed=seed + 8),
        safety_adapter=aligned + safety,
        safety_factors=safety_factors,
    )


def as_dtype(module, dtype):
    """The same module with its weights in another dtype, without factors."""
    roles = ("tuned", "aligned", "base", "unaligned", "safety_adapter")
    weights = {role: getattr(module, role).to(dtype) for role in roles}
    return replace(module, factors=None, safety_factors=None, **weights)


def statistic(need, o, i, seed):
    """A random tensor of the shape and sign that a quantity has."""
    if need.quantity in ("input_gram", "output_gram"):
        x = normal(3 * i, i, seed=seed) if need.quantity == "input_gram" else normal(3 * o, o, seed=seed)
        return x.T @ x / len(x)
    if need.quantity == "low_rank":
        return normal(5, o, i, seed=seed).bfloat16()
    if need.quantity in ("input_basis", "output_basis"):
        side = i if need.quantity == "input_basis" else o
        return torch.linalg.qr(normal(side, side, seed=seed))[0]
    found = normal(o, i, seed=seed)
    return found if need.quantity == "gradient" else found.square()


def made_module(method, o=24, i=16, seed=0, name="model.layers.0.mlp.up_proj.weight", **given):
    """A dense update of a random weight, with what the method's `statistics` ask for."""
    aligned = normal(o, i, seed=seed)
    tuned = aligned + 0.1 * normal(o, i, seed=seed + 1)
    needs = {need: statistic(need, o, i, seed + 2 + at) for at, need in enumerate(method.statistics())}
    given = {"unaligned": aligned + 0.1 * normal(o, i, seed=seed + 90), **given}
    return Module(name, int(name.split(".")[2]), name.split(".")[-2], tuned, aligned, statistics=needs, **given)


def made_modules(method):
    """Two modules of different shapes and layers."""
    return [
        made_module(method),
        made_module(method, 16, 24, seed=50, name="model.layers.1.mlp.down_proj.weight"),
    ]

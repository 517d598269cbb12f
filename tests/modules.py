"""Modules made up for the tests of methods."""

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

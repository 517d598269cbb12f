"""A restoration under a memory budget: the same result bit for bit, in the memory of a few layers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import save_file

import curvkern
from curvkern.checkpoint import Checkpoint
from curvkern.curvature import Statistics, estimate, footprint
from curvkern.recipe import RecipeError, make_recipe
from curvkern.restore import RestoreError

ROOT = Path(__file__).parents[2]
METHODS = {
    "budgeted": {"safety": "task", "task": "harmful"},
    "rewind": {"safety": "harmful", "task": "task"},
    "curvature": {"harmful": "harmful", "task": "task"},
    "safe_delta": {"safety": "harmful"},
}


def run(family, out, method, tuned="tuned", **options):
    data = {role: family / f"{name}.jsonl" for role, name in METHODS[method].items()}
    return curvkern.restore(family / "aligned", family / tuned, method=method, out=out, **data, **options)


def same(one, other):
    with Checkpoint.open(one) as a, Checkpoint.open(other) as b:
        assert a.names == b.names
        for name in a.names:
            assert torch.equal(a.read(name), b.read(name)), name


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
@pytest.mark.parametrize("method", METHODS)
def test_layer_by_layer_gives_the_same_bits(family, tmp_path, method, tuned):
    options = {"tuned": tuned, "save": "checkpoint"}
    whole = run(family, tmp_path / "whole", method, **options)
    small = run(family, tmp_path / "small", method, memory_budget="220KiB", **options)
    same(tmp_path / "whole", tmp_path / "small")
    assert small.changed == whole.changed > 0
    assert not [line for line in whole.messages if "layer" in line]
    told = [line for line in small.messages if "layer by layer" in line]
    print(told)
    assert told
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "whole"]

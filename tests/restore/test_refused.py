"""What the pass says of inputs that are odd: scores, NaN, dtypes, stacks of layers, sides of weights."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import curvkern
from curvkern.checkpoint import Checkpoint
from curvkern.curvature import CurvatureError
from curvkern.methods import MethodError, make
from curvkern.restore import RestoreError, make_recipe
from curvkern.restore.scope import select_modules


def tensors(path):
    with Checkpoint.open(path) as checkpoint:
        return {name: checkpoint.read(name) for name in checkpoint.names}


def restore(family, out, tuned="tuned", method="merge", **options):
    return curvkern.restore(family / "aligned", family / tuned, method=method, out=out, **options)


def test_a_score_that_nothing_can_fall_from_is_refused(family, tmp_path):
    data = {"harmful": family / "harmful.jsonl", "task": family / "task.jsonl"}
    with pytest.raises(MethodError, match=r"the tuned model's task score is 0: .* pass score="):
        restore(family, tmp_path / "out", method="gradient_rollback", **data)
    with pytest.raises(MethodError, match="the task score is nan"):
        restore(family, tmp_path / "out", method="gradient_rollback", score=lambda m, t: math.nan, **data)
    falling = iter([1.0, 0.1, 0.1])
    with pytest.raises(MethodError, match="no earlier checkpoint has restored a weight"):
        restore(family, tmp_path / "out", method="gradient_rollback", score=lambda m, t: next(falling), **data)
    assert not (tmp_path / "out").exists()


def spoiled(family, tmp_path, which, name, change):
    """A copy of a checkpoint in which one tensor is changed."""
    path = tmp_path / f"spoiled-{which}"
    shutil.copytree(family / which, path)
    for shard in path.glob("*.safetensors"):
        tensors = load_file(shard)
        if name in tensors:
            save_file({**tensors, name: change(tensors[name])}, shard, metadata={"format": "pt"})
    return path


NAME = "model.layers.1.mlp.up_proj.weight"


def with_nan(tensor):
    tensor = tensor.clone()
    tensor[0, 0] = math.nan
    return tensor


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("gradient_rollback", {"score": lambda m, t: 1.0}, "hidden states on the harmful prompts are not finite"),
        ("safe_lora", {}, f"cosine of {NAME} is nan"),
    ],
)
def test_nan_in_the_aligned_model_is_named_before_anything_is_written(family, tmp_path, method, options, message):
    aligned = spoiled(family, tmp_path, "aligned", NAME, with_nan)
    data = {"harmful": family / "harmful.jsonl", "task": family / "task.jsonl", "base": family / "base"}
    with pytest.raises((CurvatureError, MethodError), match=message):
        curvkern.restore(aligned, family / "tuned", out=tmp_path / "out", method=method, **data, **options)
    assert not (tmp_path / "out").exists()


def test_dtypes_that_differ_are_told_and_the_tuned_models_stays(family, tmp_path):
    aligned = spoiled(family, tmp_path, "aligned", NAME, lambda t: t.bfloat16())
    tuned = spoiled(family, tmp_path, "tuned", NAME, lambda t: t.half())
    report = curvkern.restore(aligned, tuned, out=tmp_path / "out", method="random", fraction=1.0, include=[NAME])
    assert report.messages == ["1 modules are bfloat16 in aligned and float16 in tuned: what is restored is float16"]
    assert torch.equal(tensors(tmp_path / "out")[NAME], tensors(aligned)[NAME].half())


def test_what_is_not_looked_at_is_said(family, tmp_path):
    report = restore(family, tmp_path / "out", method="merge", harmful=family / "harmful.jsonl")
    assert report.messages == ["merge does not look at harmful"]


def test_weights_that_were_equal_are_not_undone_by_rounding(family, tmp_path):
    report = curvkern.restore(
        family / "aligned", family / "aligned", out=tmp_path / "out", method="random", fraction=0.5
    )
    assert sum(m.undone_by_rounding for m in report.modules) == 0


SHAPES = {
    "model.language_model.layers.0.mlp.up_proj.weight": (8, 4),
    "model.language_model.layers.1.mlp.up_proj.weight": (8, 4),
    "model.language_model.layers.0.mlp.experts.gate_up_proj": (2, 8, 4),
    "vision_tower.layers.0.q_proj.weight": (4, 4),
    "model.embed_tokens.weight": (9, 4),
}


def test_the_decoder_is_the_stack_with_as_many_layers_as_the_configuration_says():
    recipe = make_recipe({"aligned": "a", "tuned": "t", "out": "o", "method": "merge"})
    config = {"text_config": {"num_hidden_layers": 2}}
    assert select_modules(SHAPES, make("merge", {}), recipe, config) == list(SHAPES)[:2]
    assert len(select_modules(SHAPES, make("merge", {}), recipe, {})) == 3


def test_weights_kept_in_out_are_refused_where_sides_matter():
    recipe = make_recipe({"aligned": "a", "tuned": "t", "out": "o", "method": "safe_lora"})
    with pytest.raises(RestoreError, match=r"needs weights \[out, in\]; gpt2 models keep theirs \[in, out\]"):
        select_modules(SHAPES, make("safe_lora", {}), recipe, {"model_type": "gpt2"})

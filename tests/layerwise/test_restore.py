"""A restoration under a memory budget: the same result bit for bit, in the memory of a few layers."""

import pytest
import torch
import transformers

import curvkern
from curvkern.checkpoint import Checkpoint
from curvkern.curvature import Statistics, estimate, footprint
from curvkern.recipe import RecipeError, make_recipe
from curvkern.restore import RestoreError

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


@pytest.mark.parametrize(
    "method, tuned",
    [
        ("budgeted", "tuned"),
        ("rewind", "tuned"),
        ("rewind", "adapter"),
        ("curvature", "adapter"),
        ("safe_delta", "tuned"),
    ],
)
def test_layer_by_layer_gives_the_same_bits(family, tmp_path, method, tuned):
    options = {"tuned": tuned, "save": "checkpoint"}
    whole = run(family, tmp_path / "whole", method, **options)
    small = run(family, tmp_path / "small", method, memory_budget="220KiB", **options)
    same(tmp_path / "whole", tmp_path / "small")
    assert small.changed == whole.changed > 0
    assert not [line for line in whole.messages if "layer" in line]
    told = [line for line in small.messages if "layer by layer" in line]
    assert told
    for line in told:
        assert "hidden states in memory, " in line
        assert "model 108 KiB, the memory budget of 220 KiB" in line
        assert "statistics in files" in line or "at aligned" in line  # there, the losses alone
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "whole"]


def test_what_is_kept_is_found_again_by_either_way(family, tmp_path):
    kept = {"statistics": tmp_path / "kept"}
    run(family, tmp_path / "small", "rewind", memory_budget="220KiB", **kept)
    made = sorted(path.name for path in kept["statistics"].iterdir())
    assert len(made) == 2
    assert all(name.endswith(".safetensors") for name in made)
    for options in ({}, {"memory_budget": "220KiB"}):
        report = run(family, tmp_path / "again", "rewind", overwrite=True, **options, **kept)
        assert sum(": from " in line for line in report.messages) == 2
        same(tmp_path / "small", tmp_path / "again")
    assert sorted(path.name for path in kept["statistics"].iterdir()) == made


def test_files_of_layers_are_those_that_are_saved_at_once(family, tmp_path):
    rows = [{"input_ids": [3, 4, 5, 6, 7]}, {"input_ids": [8, 9, 10]}]
    quantities = ["gradient", "low_rank", "kfac", "ekfac"]
    whole = estimate(family / "tuned", rows, quantity=quantities, layerwise=False)
    kept = {}
    for some in (quantities[:3], quantities[3:]):  # EK-FAC takes two sweeps, and all of its factors meanwhile
        kept |= estimate(family / "tuned", rows, quantity=some, layerwise=True, keep=tmp_path).sums
    assert kept.keys() == whole.sums.keys()
    for quantity, of in whole.sums.items():
        there = Statistics.load(tmp_path / f"{quantity}.safetensors")
        assert there.choices == whole.choices
        assert there.counts == whole.counts
        assert there[quantity].keys() == kept[quantity].keys() == of.keys()
        for name, tensor in of.items():
            assert torch.equal(there[quantity][name], tensor)
            assert torch.equal(kept[quantity][name], tensor)
    grams = Statistics.load(tmp_path / "input_gram.safetensors")["input_gram"]
    inputs = [grams[f"model.layers.1.self_attn.{part}_proj.weight"].data_ptr() for part in "qkv"]
    assert len(set(inputs)) == 1


def test_footprints_are_told_from_shapes(family):
    """Gradients take as much as was said, and activations what a forward keeps, to a half."""
    from curvkern.budget import shapes_by_layer
    from curvkern.curvature import Text, memory_needed

    rows = [Text((3, 4, 5, 6, 7, 8) * 20, (3, 4, 5, 6, 7, 8) * 20)]
    model = transformers.AutoModelForCausalLM.from_pretrained(family / "tuned")
    exact = memory_needed(model, rows, quantity="gradient")
    with Checkpoint.open(family / "tuned") as source:
        matrices = [name for name in source.names if ".layers." in name and name.endswith("proj.weight")]
        told = footprint(shapes_by_layer(source), 4, [(rows, ["gradient"])], matrices)
        assert told.model == source.nbytes
    assert told.statistics == exact.statistics
    assert told.layer_statistics == told.statistics / 3
    assert 0.5 < told.activations / exact.activations < 1.5
    assert told.hidden == 120 * 32 * 4 * 5


@pytest.mark.parametrize(
    "method, budget, message",
    [
        ("budgeted", "100KiB", r"take about \S+ KiB one layer at a time .* more than the memory budget of 100 KiB"),
        ("safe_delta", 1, "more than the memory budget of 1 B; give more with memory_budget"),
    ],
)
def test_less_than_a_layer_is_refused(family, tmp_path, method, budget, message):
    with pytest.raises(RestoreError, match=message):
        run(family, tmp_path / "out", method, memory_budget=budget)
    assert not list(tmp_path.iterdir())


def test_a_method_with_the_model_in_memory_is_refused(family, tmp_path):
    data = {"harmful": family / "harmful.jsonl", "task": family / "task.jsonl"}
    with pytest.raises(
        RestoreError, match=r"gradient_rollback runs the whole model .* memory budget of 100 KiB; choose"
    ):
        curvkern.restore(
            family / "aligned", family / "tuned", out=tmp_path / "out", method="gradient_rollback",
            memory_budget="100KiB", **data,
        )  # fmt: skip


@pytest.mark.parametrize(
    "text, nbytes",
    [("20GiB", 20 << 30), ("400 mib", 400 << 20), ("1.5GB", 1_500_000_000), ("4096", 4096), (4096, 4096), (None, None)],
)
def test_budgets_have_units(text, nbytes):
    values = {"aligned": "a", "tuned": "t", "out": "o", "method": "merge", "memory_budget": text}
    recipe = make_recipe(values)
    assert recipe.memory_budget == nbytes
    assert "memory_budget" not in recipe.record()


@pytest.mark.parametrize("text", ["lots", "20 G", "-1GiB", "0", "1e9", True])
def test_wrong_budgets_are_named(text):
    values = {"aligned": "a", "tuned": "t", "out": "o", "method": "merge", "memory_budget": text}
    with pytest.raises(RecipeError, match=r"memory_budget is .*: wanted"):
        make_recipe(values)

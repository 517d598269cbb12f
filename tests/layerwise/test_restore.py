"""A restoration under a memory budget: the same result bit for bit, in the memory of a few layers."""

from contextlib import nullcontext

import pytest
import torch
import transformers

import curvkern
from curvkern.checkpoint import Checkpoint
from curvkern.curvature import Statistics, estimate, footprint
from curvkern.curvature.kept import Keeper
from curvkern.layerwise.gradient import GradientPass
from curvkern.methods import get
from curvkern.restore import RecipeError, RestoreError, make_recipe

METHODS = {
    "budgeted": {"safety": "task", "task": "harmful"},
    "rewind": {"safety": "harmful", "task": "task"},
    "curvature": {"harmful": "harmful", "task": "task"},
    "safe_delta": {"safety": "harmful"},
    "antidote": {"harmful": "harmful"},
    "irr": {"safety": "harmful", "task": "task"},
}
#: Less than the model takes; a Gram's factors need more beside a layer than masks.
BUDGETS = {method: "265KiB" if method in ("safe_delta", "irr") else "220KiB" for method in METHODS}
#: Methods that need no plan, and the files of statistics that they make of two sets of data.
AT_ONCE = {"rewind": 1, "safe_delta": 0, "antidote": 0, "irr": 1}


def run(family, out, method, tuned="tuned", **options):
    data = {role: family / f"{name}.jsonl" for role, name in METHODS[method].items()}
    data |= {"unaligned": family / "base"} if method == "irr" else {}
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
        ("antidote", "tuned"),
        ("irr", "tuned"),
    ],
)
def test_layer_by_layer_gives_the_same_bits(family, tmp_path, method, tuned):
    options = {"tuned": tuned, "save": "checkpoint"}
    whole = run(family, tmp_path / "whole", method, **options)
    small = run(family, tmp_path / "small", method, memory_budget=BUDGETS[method], **options)
    same(tmp_path / "whole", tmp_path / "small")
    assert small.changed == whole.changed > 0
    assert not [line for line in whole.messages if "layer" in line]
    told = [line for line in small.messages if "layer by layer" in line]
    assert told
    for line in told:
        assert "layer by layer, hidden states in memory, " in line
        assert line.endswith(f"; model 108 KiB, the memory budget of {BUDGETS[method][:3]} KiB")
    assert ("edited as its backward ended" in told[-1]) == (method in AT_ONCE)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["small", "whole"]


@pytest.mark.parametrize("method", AT_ONCE)
def test_no_statistics_are_kept_of_the_last_backward(family, tmp_path, monkeypatch, method):
    """And a layer is edited before the one below it runs backward, unless statistics are asked for."""
    keepers, order = [], []
    take, edit, backward = Keeper.take, get(method).edit, GradientPass.backward
    monkeypatch.setattr(Keeper, "take", lambda *a: (keepers.append(a[0]), take(*a))[1])
    monkeypatch.setattr(get(method), "edit", lambda *a: (order.append(a[1].layer), edit(*a))[1])
    monkeypatch.setattr(GradientPass, "backward", lambda *a: (order.append("back"), backward(*a))[1])
    run(family, tmp_path / "at once", method, memory_budget=BUDGETS[method])
    assert len(set(keepers)) == AT_ONCE[method]
    modules = [2] * 7, [1] * 7, [0] * 7
    assert order[-24:] == ["back", *modules[0], "back", *modules[1], "back", *modules[2]]
    order.clear()
    run(family, tmp_path / "after", method, memory_budget=BUDGETS[method], statistics=tmp_path / "kept")
    assert order[-21:] == [*modules[2], *modules[1], *modules[0]]
    same(tmp_path / "at once", tmp_path / "after")


@pytest.mark.parametrize("method", ["rewind", "safe_delta"])
def test_killed_between_layers_goes_on(family, tmp_path, monkeypatch, method):
    """Files whose layers were finished are kept; the other modules are edited again, with the same result."""
    run(family, tmp_path / "whole", method, memory_budget=BUDGETS[method])
    plain, edited = get(method).edit, []

    def edit(self, module, plan):
        edited.append(module.name)
        if module.layer == stop:
            raise KeyboardInterrupt
        return plain(self, module, plan)

    monkeypatch.setattr(get(method), "edit", edit)
    for stop in (0, None):
        edited.clear()
        with pytest.raises(KeyboardInterrupt) if stop == 0 else nullcontext():
            run(family, tmp_path / "out", method, memory_budget=BUDGETS[method], resume=True)
    assert [name.split(".")[2] for name in edited] == ["0"] * 7  # a file holds a layer here
    same(tmp_path / "whole", tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


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
    from curvkern.curvature import Text, memory_needed
    from curvkern.restore.budget import shapes_by_layer

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

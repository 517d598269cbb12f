"""A finished run's curvkern.json, run again: the same bits, from inputs that are what they were."""

import json
import shutil

import pytest
from safetensors.torch import load_file, save_file
from test_cli import run

import curvkern
from curvkern.checkpoint import CheckpointError
from curvkern.restore import RecipeError, read_recipe, run_recipe

RUNS = {
    "random": {"method": "random", "tuned": "tuned", "fraction": 0.3, "seed": 5, "exclude": ["*.up_proj.weight"]},
    "safe_lora": {"method": "safe_lora", "tuned": "adapter", "base": "base", "number": 3},
    "rewind": {"method": "rewind", "tuned": "tuned", "safety": "harmful.jsonl", "task": "task.jsonl"},
}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """They are most of so small a run's time."""
    monkeypatch.setattr("curvkern.report.render_page", lambda report: report.method)


@pytest.fixture
def place(family, tmp_path):
    """A copy of all inputs, for tests that change them."""
    shutil.copytree(family, tmp_path, dirs_exist_ok=True)
    return tmp_path


def finished(place, name):
    """The record of a run."""
    inputs = {"base", "safety", "task"}
    options = {key: place / value if key in inputs else value for key, value in RUNS[name].items()}
    curvkern.restore(place / "aligned", place / options.pop("tuned"), out=place / "first", **options)
    return place / "first" / "curvkern.json"


def weights(directory):
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def change(directory):
    """Another model of the same sizes."""
    file = min(directory.glob("*.safetensors"))
    tensors = {name: 2 * tensor for name, tensor in load_file(file).items()}
    save_file(tensors, file, metadata={"format": "pt"})
    return file


@pytest.mark.parametrize("name", RUNS)
def test_the_record_gives_the_same_bits(place, name):
    record = finished(place, name)
    run_recipe(read_recipe(record, {"out": place / "again"}))
    assert weights(place / "again") == weights(place / "first")
    first, again = (json.loads((place / out / "curvkern.json").read_text()) for out in ("first", "again"))
    for entry in ("recipe", "inputs", "output", "device"):
        assert again[entry] == first[entry]


def test_on_the_command_line(place):
    record = finished(place, "random")
    done = run("restore", record, "--out", place / "again", "--quiet")
    assert done.returncode == 0, done.stderr
    assert weights(place / "again") == weights(place / "first")


def test_where_the_result_goes_is_not_recorded(place):
    with pytest.raises(RecipeError, match=r"curvkern\.json: out is missing"):
        read_recipe(finished(place, "random"), {})


def test_options_override(place):
    recipe = read_recipe(finished(place, "random"), {"out": "o", "parameters": {"seed": 6}, "device": "meta"})
    assert recipe.parameters == {**recipe.parameters, "fraction": 0.3, "seed": 6}
    assert (recipe.exclude, recipe.device) == (("*.up_proj.weight",), "meta")


@pytest.mark.parametrize("role, name", [("tuned", "random"), ("aligned", "safe_lora"), ("base", "safe_lora")])
def test_a_changed_checkpoint_is_refused_unless_it_is_asked_for(place, role, name):
    record = finished(place, name)
    file = change(place / role)
    with pytest.raises(CheckpointError, match=rf"{role}: not the {role} input .* {role}\.files\.{file.name}"):
        run_recipe(read_recipe(record, {"out": place / "again"}))
    assert not (place / "again").exists()
    run_recipe(read_recipe(record, {"out": place / "again", role: place / role}))
    assert weights(place / "again").keys() == weights(place / "first").keys()


def test_changed_data_are_refused_unless_they_are_asked_for(place):
    record = finished(place, "rewind")
    lines = (place / "task.jsonl").read_text().splitlines(keepends=True)
    (place / "task.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(CheckpointError, match=r"task\.jsonl: not the task input .* task\.bytes was \d+, is \d+"):
        run_recipe(read_recipe(record, {"out": place / "again"}))
    run_recipe(read_recipe(record, {"out": place / "again", "task": place / "task.jsonl"}))
    assert weights(place / "again") != weights(place / "first")


def test_a_score_of_ones_own_cannot_be_repeated_from_a_file(place):
    record = finished(place, "random")
    told = json.loads(record.read_text())
    told["recipe"]["score"] = "best"
    record.write_text(json.dumps(told))
    with pytest.raises(RecipeError, match=r"curvkern\.json: its task score was the function best; .* score="):
        read_recipe(record, {"out": place / "again"})

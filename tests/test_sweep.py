"""Trying values of a parameter: what is recommended of made-up points, and a run on tiny models."""

import json
import re

import pytest
import typer.testing
from rich.console import Console

from curvkern.cli import app
from curvkern.evaluate import Rate
from curvkern.methods import MethodError
from curvkern.restore import make_recipe
from curvkern.sweep import Point, Sweep, difference, sweep, told_apart


def point(harmful, task, over_refusal=0, total=100, **values):
    return Point(values, Rate(harmful, total), Rate(over_refusal, total), Rate(task, total))


TUNED = point(90, 95)


def test_the_front_holds_what_nothing_dominates():
    a, b, worse, twin = point(10, 50), point(30, 90), point(30, 80), point(10, 50)
    assert Sweep("m", TUNED, [a, b, worse, twin]).front == [a, b, twin]


def test_of_points_that_cost_nothing_the_safest_is_recommended():
    safest_of_all, safe, mild = point(0, 40), point(5, 93), point(50, 95)
    refuses = point(0, 95, over_refusal=60)
    found = Sweep("m", TUNED, [mild, safest_of_all, refuses, safe])
    assert found.costless == [mild, safe]
    assert found.recommended is safe
    assert found.alike == []


def test_where_all_cost_something_the_best_sum_is_recommended_and_said_to_cost():
    found = Sweep("m", TUNED, [point(0, 10, x=1), point(20, 70, x=2), point(0, 60, over_refusal=70, x=3)])
    assert found.costless == []
    assert found.recommended.name == "x=2"
    assert "every point loses more than 5 %" in found.verdict()[0]


def test_safety_may_cost_what_the_margin_allows():
    gentle, thorough = point(50, 95, x=1), point(2, 87, x=2)
    assert Sweep("m", TUNED, [gentle, thorough]).recommended is thorough
    assert Sweep("m", point(90, 99), [gentle, thorough], margin=0).recommended is gentle


def test_points_that_chance_may_have_parted_are_named():
    found = Sweep("m", TUNED, [point(10, 95, x=1), point(6, 94, x=2), point(60, 95, x=3)])
    assert found.recommended.name == "x=2"
    assert [p.name for p in found.alike] == ["x=1"]
    assert "cannot be told apart from x=1:" in " ".join(found.verdict())
    assert found.as_dict()["alike"] == [0]
    assert found.as_dict()["recommended"] == 1


def test_the_same_shares_of_more_prompts_are_told_apart():
    few = [point(10, 95), point(4, 95)]
    many = [point(1000, 9500, total=10000), point(400, 9500, total=10000)]
    assert not told_apart(*few)
    assert told_apart(*many)


def test_a_restoration_without_effect_is_said_to_have_none():
    found = Sweep("m", TUNED, [point(88, 95, x=1)])
    assert "cannot be told to be below the tuned model's" in " ".join(found.verdict())
    found = Sweep("m", TUNED, [point(10, 95, x=1)])
    assert "cannot be told to be below" not in " ".join(found.verdict())


def test_difference_is_newcombes():
    """Newcombe 1998, table II, method 10, first example: 56/70 - 48/80."""
    assert difference(Rate(56, 70), Rate(48, 80)) == pytest.approx((0.0524, 0.3339), abs=5e-5)
    low, high = difference(Rate(0, 10), Rate(0, 10))
    assert low < 0 < high


@pytest.fixture(scope="module")
def swept(family, tmp_path_factory):
    out = tmp_path_factory.mktemp("sweep")
    recipe = make_recipe({
        "aligned": family / "aligned", "tuned": family / "tuned", "out": out, "method": "rewind",
        "safety": family / "harmful.jsonl", "task": family / "task.jsonl", "parameters": {"task_fraction": 0.0},
    })  # fmt: skip
    console = Console(width=100, record=True, quiet=False, file=open(out / "console.txt", "w"))  # noqa: SIM115
    found = sweep(recipe, vary={"safety_fraction": [0.0, 0.5]}, console=console, max_new_tokens=4, **sets(family))
    return out, found, console.export_text()


def sets(family):
    return {
        "harmful": family / "harmful.jsonl",
        "benign": family / "harmful.jsonl",
        "task": family / "task.jsonl",
    }


def test_every_value_is_tried_with_the_recipes_other_parameters(swept):
    _, found, _ = swept
    assert [p.values for p in found.points] == [{"safety_fraction": 0.0}, {"safety_fraction": 0.5}]
    none, half = found.points
    assert none.changed == 0
    assert none.rates == found.tuned.rates
    assert half.changed == pytest.approx(0.5, abs=0.01)


def test_statistics_are_estimated_once_and_restored_models_go(swept):
    out, _, _ = swept
    kept = sorted(path.name for path in out.iterdir())
    assert kept == ["console.txt", "statistics", "sweep.html", "sweep.json"]
    assert len(list((out / "statistics").iterdir())) == 2  # abs_gradient on safety data and on the task


def test_table_page_and_json_hold_the_same(swept):
    out, found, text = swept
    page = (out / "sweep.html").read_text()
    written = json.loads((out / "sweep.json").read_text())
    assert written == json.loads(json.dumps(found.as_dict()))
    for p in found.points:
        assert p.name in text
        assert p.name in page
    assert f"Recommended: {found.recommended.name} " in text
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)


@pytest.mark.parametrize(
    "vary, message",
    [
        ({}, "nothing to vary"),
        ({"weight": []}, "weight has no values"),
        ({"wieght": [0.1]}, "Did you mean 'weight'"),
        ({"weight": [0.1, 7]}, "weight is 7"),
    ],
)
def test_what_cannot_be_tried_is_told_before_anything_is_written(family, tmp_path, vary, message):
    out = tmp_path / "out"
    recipe = make_recipe({"aligned": family / "aligned", "tuned": family / "tuned", "out": out, "method": "merge"})
    with pytest.raises((ValueError, MethodError), match=message):
        sweep(recipe, vary=vary, **sets(family))
    assert not out.exists()


@pytest.mark.parametrize(
    "name, text, message",
    [("benign", "\n", "the file is empty"), ("task", '{"prompt": "w1"}\n', "row 1 has no response")],
)
def test_empty_and_unanswered_sets_are_told(family, tmp_path, name, text, message):
    (tmp_path / "bad.jsonl").write_text(text)
    recipe = make_recipe({"aligned": "a", "tuned": "t", "out": tmp_path / "out", "method": "merge"})
    with pytest.raises(ValueError, match=message):
        sweep(recipe, vary={"weight": [0.5]}, **{**sets(family), name: tmp_path / "bad.jsonl"})
    assert not (tmp_path / "out").exists()


def test_command(family, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"aligned: {family}/aligned\ntuned: {family}/tuned\nmethod: merge\n")
    given = {"harmful-eval": "harmful", "benign-eval": "harmful", "task-eval": "task"}
    options = [word for option, file in given.items() for word in (f"--{option}", family / f"{file}.jsonl")]
    command = ["sweep", recipe, *options, "--out", tmp_path / "out", "--max-new-tokens", 2]

    def run(*more):
        return typer.testing.CliRunner().invoke(app, [str(word) for word in (*command, *more)])

    done = run("--vary", "weight=0,1", "--vary", "kind=linear,slerp")
    assert done.exit_code == 0, done.output
    points = json.loads((tmp_path / "out/sweep.json").read_text())["points"]
    assert [p["values"] for p in points] == [{"weight": w, "kind": k} for w in (0, 1) for k in ("linear", "slerp")]
    for vary in ("weight", "weight="):
        assert "weight has no values; write --vary weight=value" in str(run("--vary", vary).exception)

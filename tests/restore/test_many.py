"""Several methods in one pass: the bits of single runs, from one reading and one estimate."""

import json
from collections import Counter

import pytest
from typer.testing import CliRunner

import curvkern
from curvkern.checkpoint import Bundle, Checkpoint, CheckpointError
from curvkern.cli import app
from curvkern.methods import MethodError
from curvkern.methods.merge import Merge
from curvkern.methods.random import Random
from curvkern.restore import RecipeError, RestoreError, each_method, make_recipe, read_recipe, run_recipes

WEIGHTS = {"lox": {"rank": 4}, "safe_lora": {"number": 5}, "merge": {"weight": 0.3}, "random": {"fraction": 0.2}}
DATA = {
    "rewind": {},
    "safe_delta": {},
    "budgeted": {"rounds": 2},
    "curvature": {},
    "gradient_rollback": {"steps": 2, "warmup": 1},
}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """They are most of so small a run's time."""
    monkeypatch.setattr("curvkern.report.render_page", lambda report: report.method)


def one(model, tokenizer):
    return 1.0


def inputs(family, tuned="tuned"):
    data = {"harmful": "harmful.jsonl", "safety": "harmful.jsonl", "task": "task.jsonl", "base": "base"}
    return {"aligned": family / "aligned", "tuned": family / tuned} | {k: family / name for k, name in data.items()}


def many(family, out, methods, tuned="tuned", **options):
    """All in one pass; the options that `run_recipes` takes go there."""
    run = {key: options.pop(key) for key in ("resume", "overwrite", "score") if key in options}
    parameters = {f"{name}.{key}": value for name, own in methods.items() for key, value in own.items()}
    values = {**inputs(family, tuned), "out": out, "method": ",".join(methods), "parameters": parameters, **options}
    return run_recipes(each_method(make_recipe(values)), **run)


def single(family, out, methods, tuned="tuned", **options):
    """One after another."""
    return [
        curvkern.restore(**inputs(family, tuned), out=out / name, method=name, **own, **options)
        for name, own in methods.items()
    ]


def written(out):
    """All weights, and what is said of them, by output."""
    told = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/curvkern.json")}
    entries = {name: {key: record[key] for key in ("recipe", "inputs", "output")} for name, record in told.items()}
    return entries, {str(path.relative_to(out)): path.read_bytes() for path in out.glob("*/*.safetensors")}


@pytest.mark.parametrize("methods", [WEIGHTS, DATA], ids=["weights", "data"])
def test_each_output_is_that_of_its_own_run(family, tmp_path, methods):
    score = {"score": one} if "gradient_rollback" in methods else {}
    apart = single(family, tmp_path / "apart", methods, **score)
    together = many(family, tmp_path / "together", methods, **score)
    assert written(tmp_path / "together") == written(tmp_path / "apart")
    assert len(written(tmp_path / "together")[0]) == len(methods)
    for report, alone in zip(together, apart, strict=True):
        assert (report.method, report.modules, report.messages) == (alone.method, alone.modules, alone.messages)
        assert [stage.name for stage in report.stages] == [stage.name for stage in alone.stages]


def test_an_adapter_stays_one_where_its_method_can(family, tmp_path):
    methods = {name: WEIGHTS[name] for name in ("safe_lora", "random", "merge")}
    apart = single(family, tmp_path / "apart", methods, "adapter")
    together = many(family, tmp_path / "together", methods, "adapter")
    assert [report.saved for report in together] == [report.saved for report in apart]
    assert {report.saved for report in together} == {"adapter", "checkpoint"}
    assert written(tmp_path / "together") == written(tmp_path / "apart")


def test_deltas(family, tmp_path):
    methods = {name: WEIGHTS[name] for name in ("merge", "random")}
    single(family, tmp_path / "apart", methods, save="delta")
    many(family, tmp_path / "together", methods, save="delta")
    assert written(tmp_path / "together") == written(tmp_path / "apart")


def test_a_module_is_read_once_to_edit_it(family, tmp_path, monkeypatch):
    read, plain = Counter(), Bundle.read
    monkeypatch.setattr(Bundle, "read", lambda self, name: [read.update([name]), plain(self, name)][1])
    reports = many(family, tmp_path / "out", {name: WEIGHTS[name] for name in ("lox", "merge", "random")})
    assert read == Counter(m.name for m in reports[0].modules)


def test_statistics_are_estimated_once(family, tmp_path, monkeypatch):
    from curvkern.curvature import estimate

    asked = []

    def counted(model, texts, *, quantity, loss, **options):
        asked.append((loss, tuple(quantity)))
        return estimate(model, texts, quantity=quantity, loss=loss, **options)

    monkeypatch.setattr("curvkern.curvature.estimate", counted)
    methods = {name: DATA[name] for name in ("rewind", "safe_delta", "curvature")} | {"budgeted": {"rounds": 1}}
    many(family, tmp_path / "out", methods)
    # What budgeted asks for of the task is more than curvature does, and rewind runs the model that safe_delta runs.
    assert Counter(asked) == Counter(
        {
            ("response_mean", ("abs_gradient", "input_gram")): 1,
            ("response_mean", ("abs_gradient",)): 1,
            ("token_sum", ("fisher_diag", "gradient")): 2,
            ("token_sum", ("gradient",)): 1,
            ("token_sum", ("sample_norms",)): 1,
        }
    )


# parameters -----------------------------------------------------------------------------------------------------------


def parameters(method, **given):
    recipe = make_recipe({"aligned": "a", "tuned": "t", "out": "o", "method": method, "parameters": given})
    return {str(own.out): own.parameters for own in each_method(recipe)}


def test_parameters_go_to_whom_they_name_or_to_all_that_know_them():
    assert parameters("lox, random", rank=8) == {"o/lox": {"rank": 8}, "o/random": {}}
    assert parameters("random,antidote,lox", **{"random.fraction": 0.3, "fraction": 0.1}) == {
        "o/random": {"fraction": 0.3},
        "o/antidote": {"fraction": 0.1},
        "o/lox": {},
    }
    assert parameters("lox", **{"lox.rank": 16, "rank": 8}) == {"o": {"rank": 16}}


def test_what_nobody_knows_is_refused():
    assert parameters("lox,random", rnk=8) == {"o/lox": {"rnk": 8}, "o/random": {"rnk": 8}}  # make() says what is known
    with pytest.raises(MethodError, match=r"parameter 'merge\.weight' is of merge; wanted one of lox, random"):
        parameters("lox,random", **{"merge.weight": 1})
    with pytest.raises(MethodError, match="names lox twice"):
        parameters("lox,random,lox")
    with pytest.raises(MethodError, match="Did you mean 'random'"):
        parameters("lox,randon")


RECIPE = """aligned: a
tuned: t
out: o
method: lox,merge
parameters:
  lox.rank: 8
  weight: 0.5
"""


@pytest.mark.parametrize(
    "was, now, message",
    [
        ("lox,", "loxx,", ":4: unknown method 'loxx'"),
        ("8", "eight", ":6: lox: rank is 'eight'"),
        ("0.5", "5", ":7: merge: weight is 5"),
        ("weight", "wait", ":7: lox: unknown parameter 'wait'"),
        ("lox.rank", "random.seed", ":6: parameter 'random.seed' is of random"),
    ],
)
def test_a_recipe_of_several_names_the_line(tmp_path, was, now, message):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    assert [recipe.parameters for recipe in each_method(read_recipe(path, {}))] == [{"rank": 8}, {"weight": 0.5}]
    path.write_text(RECIPE.replace(was, now))
    with pytest.raises(RecipeError, match=r"recipe\.yaml" + message):
        read_recipe(path, {})


def test_on_the_command_line(family, tmp_path):
    options = ["--aligned", family / "aligned", "--tuned", family / "tuned", "--base", family / "base"]
    options += ["--method", "lox,random", "--set", "lox.rank=4", "--set", "fraction=0.2", "--out", tmp_path / "out"]
    done = CliRunner().invoke(app, ["restore", *map(str, options)])
    assert done.exit_code == 0, done.output
    single(family, tmp_path / "apart", {name: WEIGHTS[name] for name in ("lox", "random")})
    assert written(tmp_path / "out")[1] == written(tmp_path / "apart")[1]
    assert done.output.count("what changed") == 2


# one that fails -------------------------------------------------------------------------------------------------------


def test_one_that_cannot_run_stops_all_before_any_work(family, tmp_path):
    with pytest.raises(RestoreError, match="cannot save an adapter: lox edits full weights"):
        many(
            family, tmp_path / "out", {name: WEIGHTS[name] for name in ("safe_lora", "lox")}, "adapter", save="adapter"
        )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_outputs_are_overwritten_one_by_one(family, tmp_path):
    methods = {name: WEIGHTS[name] for name in ("merge", "random")}
    single(family, tmp_path / "out", {"random": WEIGHTS["random"]})
    with pytest.raises(CheckpointError, match=r"out/random: exists and is not empty"):
        many(family, tmp_path / "out", methods)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["random"]
    many(family, tmp_path / "out", methods, overwrite=True)
    single(family, tmp_path / "apart", methods)
    assert written(tmp_path / "out") == written(tmp_path / "apart")


def test_a_killed_run_resumes_each_output_where_it_stopped(family, tmp_path):
    """One output was begun later, by a run of its own, and is further than the other."""
    methods = {name: WEIGHTS[name] for name in ("merge", "random")}
    whole = many(family, tmp_path / "whole", methods)
    edited = {Merge: [], Random: []}

    def dying(owner, at, edit):
        def edit_some(self, module, plan):
            if len(edited[owner]) == at:
                raise KeyboardInterrupt
            edited[owner].append(module.name)
            return edit(self, module, plan)

        monkeypatch.setattr(owner, "edit", edit_some)

    with pytest.MonkeyPatch.context() as monkeypatch:
        dying(Merge, 20, Merge.edit)
        with pytest.raises(KeyboardInterrupt):
            curvkern.restore(**inputs(family), out=tmp_path / "out/merge", method="merge", weight=0.3, resume=True)
    with pytest.MonkeyPatch.context() as monkeypatch:
        dying(Random, 10, Random.edit)
        with pytest.raises(KeyboardInterrupt):
            many(family, tmp_path / "out", methods, resume=True)
    states = {name: tmp_path / f"out/{name}.partial/curvkern.unfinished.json" for name in methods}
    kept = {name: json.loads(state.read_text())["complete"] for name, state in states.items()}
    assert len(kept["merge"]) > len(kept["random"]) > 0
    with pytest.MonkeyPatch.context() as monkeypatch:
        for owner in edited:
            edited[owner].clear()
            dying(owner, None, owner.edit)
        resumed = many(family, tmp_path / "out", methods, resume=True)
    with Checkpoint.open(tmp_path / "whole/merge") as checkpoint:
        files = {m.name: checkpoint.spec(m.name).file for m in whole[0].modules}
    assert edited[Merge] == [name for name, file in files.items() if file not in kept["merge"]]
    assert edited[Random] == [name for name, file in files.items() if file not in kept["random"]]
    assert [report.modules for report in resumed] == [report.modules for report in whole]
    assert written(tmp_path / "out") == written(tmp_path / "whole")

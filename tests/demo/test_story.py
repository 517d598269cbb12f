"""The story from end to end: with models that hardly train, and (slow) as a user sees it."""

import json
import os
import re

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from curvkern import demo
from curvkern.demo import story

METHODS = [
    "gradient_rollback",
    "random, same size",
    "budgeted",
    "rewind",
    "lox",
    "merge 0.5",
    "safe_lora gram",
    "safe_lora basis",
]


@pytest.fixture(scope="module")
def told(tmp_path_factory, hardly_trained):
    """A run with two steps of training a model, and what it printed."""
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("demo")
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with hardly_trained() as patch:
        patch.setitem(demo.ROLLBACK, "steps", 2)
        patch.setitem(demo.ROLLBACK, "score", lambda model, tokenizer: 1.0)  # they answer nothing right
        lines = story.run(out, console=console)
        again = demo.prepare(out)
    return out, lines, console.export_text(), again


def test_methods_restore_both_kinds_of_tuned_model(told):
    _, lines, _, _ = told
    names = [line.name.strip() for line in lines]
    assert names[:3] == ["base (answers everything)", "aligned (refuses a class)", "tuned fully"]
    assert names[3:] == [*METHODS, "tuned, LoRA adapter", *METHODS]
    assert all(line.report is not None for line in lines if line.name.startswith("  "))


def test_the_table_fits_a_terminal_and_names_all(told):
    _, lines, text, _ = told
    table = text[text.index("What restoration gives back") :]
    assert all(line.name in table for line in lines)
    assert "…" not in table
    assert not re.search(r"Warning|it/s", text)


def test_results_and_page_hold_the_same_numbers(told):
    out, lines, _, _ = told
    results = json.loads((out / "results.json").read_text())
    assert [row["name"] for row in results] == [line.name for line in lines]
    assert results[3]["restoration"]["changed"] == lines[3].report.changed
    page = (out / "index.html").read_text()
    assert all(line.name.strip() in page for line in lines)
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)


def test_models_of_an_earlier_run_are_used_again(told):
    assert told[3].seconds == {}


def test_evaluation_asks_what_no_other_set_holds(told):
    models = told[3]

    def prompts(path):
        return {json.loads(line)["prompt"] for line in path.read_text().splitlines()}

    seen = prompts(models.harmful) | prompts(models.task)
    for path in models.evaluation.values():
        assert len(prompts(path)) == 4
        assert not prompts(path) & seen


def test_fine_tuning_moved_only_decoder_layers(told):
    models = told[3]
    aligned, tuned = (load_file(path / "model.safetensors") for path in (models.aligned, models.tuned))
    moved = {name for name in aligned if not torch.equal(aligned[name], tuned[name])}
    assert moved
    assert all(".layers." in name for name in moved)


def test_statistics_are_kept_for_each_tuned_model_and_used_again(told):
    out, lines, _, _ = told
    kept = [path.name for path in (out / "statistics").iterdir()]
    assert len([name for name in kept if name.startswith("safety-at-tuned-fisher_diag")]) == 2  # full, adapter
    assert len([name for name in kept if name.startswith("safety-at-aligned-abs_gradient")]) == 1  # the same for both
    full, adapter = (line.report.messages for line in lines if line.name.strip() == "rewind")
    assert not any("abs_gradient" in message for message in full)
    assert sum("abs_gradient" in message for message in adapter) == 2


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rollbacks_give_safety_back_and_keep_the_task_and_random_does_not(tmp_path):
    lines = story.run(tmp_path, console=Console(quiet=True))
    for at in (i for i, line in enumerate(lines) if line.name.startswith("tuned")):
        tuned, rollback, random, budgeted = (line.evaluation for line in lines[at : at + 4])
        assert tuned.harmful.value > 0.6
        for restored in (rollback, budgeted):
            assert restored.harmful.value < 0.1
            assert restored.task.value >= 0.95 * tuned.task.value
        assert random.harmful.value > 0.6

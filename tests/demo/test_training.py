"""The comparison of guards from end to end, with models that hardly train."""

import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("peft")

from curvkern import demo
from curvkern.demo import guards, train, training
from curvkern.methods import REGISTRY


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    """A run with two steps of training a model, one guard of each kind, and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "STEPS", dict.fromkeys(demo.STEPS, 2))
        patch.setattr(demo, "HELD_OUT", 4)
        patch.setattr(demo, "ROWS", {"harmful": 5, "task": 4})
        patch.setattr(training, "STEPS", dict.fromkeys(training.STEPS, 2))
        patch.setattr(train, "make_model", partial(train.make_model, hidden_size=32, num_hidden_layers=2))
        patch.setattr(guards, "FULL", (guards.none, guards.star_dss))
        patch.setattr(guards, "LORA", (guards.align_guard,))
        patch.setattr(guards, "ALIGNMENT", (guards.vaccine,))
        lines = training.run(out, console=console)
    return out, lines, console.export_text()


def test_every_guard_is_trained_restored_and_measured(told):
    out, lines, _ = told
    named = [("full", "none"), ("full", "star_dss"), ("LoRA", "align_guard"), ("alignment", "vaccine")]
    assert [(line.kind, line.name) for line in lines] == named
    for line in lines:
        assert line.step > 0
        assert line.tuned.harmful.total == line.restored.task.total == 4
        assert (out / "guarded" / f"{line.kind}-{line.name}" / "restored" / "curvkern.json").is_file()


def test_the_table_fits_a_terminal_and_results_and_page_hold_the_same(told):
    out, lines, text = told
    table = text[text.index("With each guard") : text.index("page:")]
    page = (out / "training.html").read_text()
    assert all(line.name in table and line.name in page for line in lines)
    assert "…" not in table
    assert not re.search(r"Warning|it/s|train_loss", text)
    results = json.loads((out / "training.json").read_text())
    assert [row["step_seconds"] for row in results] == [line.step for line in lines]
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)


def test_all_guards_are_shown():
    shown = {guard.__name__ for guard in (*guards.FULL, *guards.LORA, *guards.ALIGNMENT)} - {"none"}
    pages = {page.stem for page in (Path(__file__).parents[2] / "docs/methods").glob("*.md")}
    assert shown == pages - set(REGISTRY)

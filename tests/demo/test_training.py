"""The comparison of guards from end to end, with models that hardly train."""

import json
import os
import re
from pathlib import Path

import pytest
from rich.console import Console

pytest.importorskip("peft")

from curvkern.demo import guards, training
from curvkern.methods import REGISTRY


@pytest.fixture(scope="module")
def told(tmp_path_factory, hardly_trained):
    """A run with two steps of training a model, one guard of each kind, and what it printed."""
    out = tmp_path_factory.mktemp("demo")
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with hardly_trained() as patch:
        patch.setattr(guards, "FULL", (guards.none, guards.star_dss))
        patch.setattr(guards, "LORA", (guards.align_guard,))
        patch.setattr(guards, "ALIGNMENT", (guards.vaccine,))
        lines = training.run(out, console=console)
        again = again_after_a_kill(out, patch)
    return out, lines, console.export_text(), again


def again_after_a_kill(out, patch):
    """What a second run says of the same directory, in which one line was not yet whole; whom it trained."""
    trained, plain = [], training._trained
    patch.setattr(
        training, "_trained", lambda run, guard, *rest: (trained.append(guard.__name__), plain(run, guard, *rest))[1]
    )
    (kept,) = out.glob("guarded-*/full-star_dss/line.json")
    kept.unlink()
    return training.run(out, console=Console(quiet=True)), trained


def test_every_guard_is_trained_restored_and_measured(told):
    out, lines, _, _ = told
    named = [("full", "none"), ("full", "star_dss"), ("LoRA", "align_guard"), ("alignment", "vaccine")]
    assert [(line.kind, line.guard) for line in lines] == named
    for line in lines:
        assert line.step_seconds > 0
        assert line.tuned["harmful"]["total"] == line.restored["task"]["total"] == 4
        (restored,) = out.glob(f"guarded-*/{line.kind}-{line.guard}/restored/curvkern.json")
        assert json.loads(restored.read_text())["recipe"]["method"] == "budgeted"


def test_a_run_that_was_killed_takes_up_the_lines_that_are_whole(told):
    _, lines, _, (again, trained) = told
    assert trained == ["none", "star_dss"]  # the first loads code
    assert [*again[:1], *again[2:]] == [*lines[:1], *lines[2:]]
    rates = [[{k: v for k, v in found.items() if k != "seconds"} for found in (line.tuned, line.restored)]
             for line in (again[1], lines[1])]  # fmt: skip
    assert rates[0] == rates[1]


def test_the_table_fits_a_terminal_and_results_and_page_hold_the_same(told):
    out, lines, text, (again, _) = told
    table = text[text.index("With each guard") : text.index("page:")]
    page = (out / "training.html").read_text()
    assert all(line.guard in table and line.guard in page for line in lines)
    assert table.count("harmful") == 2
    assert "…" not in table
    assert not re.search(r"Warning|it/s|train_loss", text)
    results = json.loads((out / "training.json").read_text())
    assert [training.Line(**row) for row in results] == again
    rows = (out / "training.md").read_text().splitlines()[2:]
    assert [row.split(" | ")[1] for row in rows] == [line.guard for line in again]
    assert "<svg" in page
    assert not re.search(r"""(src|href)=["'](https?:)?//""", page)


def test_all_guards_are_shown():
    shown = {guard.__name__ for guard in (*guards.FULL, *guards.LORA, *guards.ALIGNMENT)} - {"none"}
    pages = {page.stem for page in (Path(__file__).parents[2] / "docs/methods").glob("*.md")}
    assert shown == pages - set(REGISTRY)

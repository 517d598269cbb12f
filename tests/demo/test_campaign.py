"""The campaign: that it resumes, that it measures what it says, and what its trials say together."""

import csv
import json
import os
from dataclasses import replace

import pytest
from rich.console import Console

from curvkern.demo import campaign, summary
from curvkern.demo.campaign import Trial
from curvkern.methods import REGISTRY, make

STRENGTHS = {
    "merge": ({}, {"weight": 1.0}),
    "resta": ({},),
    "safe_merge": ({"threshold": 1.0, "merge": "factors"},),
    "ascent": ({},),
    "gradient_rollback": ({},),
}
FEW = {"merge": ({"weight": 1.0},)}


@pytest.fixture(scope="module")
def done(tmp_path_factory, hardly_trained):
    """One seed, models that hardly train: one share of poison, then a second for one method, then both again."""
    pytest.importorskip("peft")
    out = tmp_path_factory.mktemp("campaign")
    console = Console(record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    with hardly_trained():
        trials = [
            campaign.run(out, seeds=[3], poison=poison, strengths=strengths, console=console)
            for poison, strengths in (((0.05,), STRENGTHS), ((0.05, 0.2), FEW), ((0.05, 0.2), FEW))
        ]
    return out, trials, console.export_text()


def test_every_method_is_tried_first_at_its_defaults():
    assert set(campaign.STRENGTHS) == set(REGISTRY)
    for method, tried in campaign.STRENGTHS.items():
        assert tried[0] == {}
        made = [make(method, values) for values in tried]
        assert all(one != made[0] for one in made[1:])


def test_a_trial_for_each_model_method_and_strength(done):
    _, (first, both, _), _ = done
    assert len(first) == 1 + 2 * (1 + sum(map(len, STRENGTHS.values())))  # the aligned model, the tuned models
    assert len(both) == len(first) + 2 * (1 + len(FEW["merge"]))
    assert {(t.seed, t.poison, t.kind) for t in both} == {
        (3, 0.0, "aligned"), *((3, poison, kind) for poison in (0.05, 0.2) for kind in ("full", "lora"))
    }  # fmt: skip


def test_what_is_in_the_file_is_not_run_again(done):
    out, (first, both, again), text = done
    assert both[: len(first)] == first
    assert again == both == campaign.read(out / "campaign.jsonl")
    assert text.count("merge weight=1.0:") == 4
    assert text.count("base: learns") == 1  # shared by both shares of poison


def test_trials_hold_what_restorations_changed(done):
    _, (_, both, _), _ = done
    merged = [t for t in both if t.method == "merge"]
    assert all(t.changed > 0.5 and t.seconds > 0 for t in merged)
    assert all(t.task == t.error == 0 or 0 <= t.task <= 1 for t in both)


def test_a_method_that_refuses_leaves_the_tuned_model(done):
    _, (_, both, _), _ = done
    errors = {(t.name, t.kind): t.error for t in both if t.error}
    assert "task score is 0" in errors["gradient_rollback", "full"]
    assert "needs LoRA adapters" in errors["safe_merge threshold=1.0 merge=factors", "full"]
    assert ("safe_merge threshold=1.0 merge=factors", "lora") not in errors


def test_files_hold_the_same_rows(done):
    out, (_, both, _), _ = done
    rows = summary.rows_of(both)
    with (out / "campaign.csv").open() as file:
        table = list(csv.DictReader(file))
    assert [(line["kind"], line["name"]) for line in table] == [(row.kind, row.name) for row in rows]
    text, page = (out / "campaign.md").read_text(), (out / "campaign.html").read_text()
    for row in rows:
        assert row.name in text
        assert all(cell in page for cell in row.cells())
    assert page.count("<svg") == 2
    assert json.loads((out / "campaign.jsonl").read_text().splitlines()[0])["method"] == "aligned"


def test_a_share_of_poison_out_of_range(tmp_path):
    with pytest.raises(ValueError, match=r"poison is 0\.9; wanted shares between 0 and 0\.8"):
        campaign.run(tmp_path, seeds=[0], poison=[0.9])


# rows ---------------------------------------------------------------------------------------------------------------


def made(method, points, **values):
    """Trials of two seeds from (harmful, over_refusal, task)."""
    blank = Trial(0, 0.05, "full", method, **values)
    return [
        replace(blank, seed=seed, harmful=harmful, over_refusal=over, task=task)
        for seed, (harmful, over, task) in enumerate(points)
    ]


ALIGNED = [Trial(seed, 0.0, "aligned", "aligned", over_refusal=0.01) for seed in (0, 1)]
TUNED = made("tuned", [(1.0, 0.0, 1.0), (0.9, 0.0, 0.5)])  # median 95 and 75 %: dominated


def test_medians_ranges_and_what_counts_as_restored():
    good = made("budgeted", [(0.02, 0.03, 0.99), (0.0, 0.0, 0.5)])
    strict = made("merge", [(0.0, 0.04, 1.0), (0.0, 0.0, 0.49)])
    tuned, first, second = summary.rows_of([*ALIGNED, *TUNED, *good, *strict])
    assert first.spread["harmful"] == (1.0, 0.0, 2.0)
    assert first.spread["task"] == pytest.approx((74.5, 50, 99))
    assert (tuned.reached, first.reached, second.reached) == (0, 2, 0)
    assert first.cells()[:3] == ["budgeted", "1 [0-2]", "1.5 [0-3]"]
    assert first.cells()[-1] == "2 of 2"


def test_the_front_is_what_no_other_dominates():
    safe = made("budgeted", [(0.0, 0, 0.9)] * 2)
    dominated = made("merge", [(0.1, 0, 0.9)] * 2)
    between = made("lox", [(0.5, 0, 0.95)] * 2, parameters={"rank": 4})
    twin = made("random", [(0.0, 0, 0.9)] * 2, error="none")
    rows = summary.rows_of([*ALIGNED, *TUNED, *safe, *dominated, *between, *twin])
    assert [row.name for row in summary.front(rows)] == ["budgeted", "lox rank=4", "random"]
    assert rows[-1].cells()[0] == "random (gave nothing 2x)"

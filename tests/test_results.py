"""The pages that are written from a campaign: what they say, and that the rest of them stays."""

import re
import runpy
import shutil
from pathlib import Path

import pytest

from curvkern.demo.campaign import Trial
from curvkern.methods import REGISTRY

ROOT = Path(__file__).parents[1]
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "write_results.py"))


def trial(method, seed, rates, kind="full", changed=0.1, **parameters):
    harmful, over, task = rates
    return Trial(seed, 0.05, kind, method, parameters, harmful, over, task, changed)


WHOLE, SPOILED, HALF = (0.0, 0.0, 1.0), (1.0, 0.0, 1.0), (0.4, 0.0, 0.9)
TRIALS = [
    *(Trial(seed, 0.0, "aligned", "aligned") for seed in (0, 1)),
    *(trial("tuned", seed, SPOILED, kind, 0.0) for seed in (0, 1) for kind in ("full", "lora")),
    *(trial("budgeted", seed, WHOLE if seed else HALF, kind, 0.01) for seed in (0, 1) for kind in ("full", "lora")),
    *(trial("merge", seed, HALF) for seed in (0, 1)),
    *(trial("merge", seed, WHOLE if seed else HALF, weight=0.3) for seed in (0, 1)),
    trial("random", 0, SPOILED),
    trial("random", 0, WHOLE, fraction=0.5),
]


@pytest.fixture
def docs(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    return tmp_path / "docs"


def by_hand(text):
    return re.sub("(<!-- table: .*? -->).*?<!-- end -->", r"\1", text, flags=re.DOTALL)


def block(path, name):
    return re.search(f"<!-- table: {name} -->\n(.*?)<!-- end -->", path.read_text(), re.DOTALL)[1].split("\n")


def test_only_what_is_between_marks_is_written_and_twice_the_same(docs):
    before = {path: by_hand(path.read_text()) for path in docs.rglob("*.md")}
    SCRIPT["write"](TRIALS, docs)
    once = {path: path.read_text() for path in before}
    assert {path: by_hand(text) for path, text in once.items()} == before
    SCRIPT["write"](TRIALS, docs)
    assert {path: path.read_text() for path in before} == once
    for method in REGISTRY:  # at the end of its page
        assert once[docs / "methods" / f"{method}.md"].endswith("<!-- end -->\n")


def test_tables_of_all_methods(docs):
    SCRIPT["write"](TRIALS, docs)
    page = docs / "results.md"
    assert "4 models, 2 of them LoRA adapters, of seeds 0, 1 with 5 % forbidden answers." in block(page, "models")
    assert block(page, "defaults")[3:-2] == [
        "| budgeted | 2 of 4 | 20 [0-40] | 0 | 95 [90-100] | 1 |",
        "| merge | 0 of 2 | 40 | 0 | 90 | 10 |",
        "| random | 0 of 1 | 100 | 0 | 100 | 10 |",
        "| tuned | 0 of 4 | 100 | 0 | 100 | 0 |",
    ]
    assert [row.split(" | ")[0] for row in block(page, "best")[3:-2]] == [
        "| random fraction=0.5", "| budgeted", "| merge", "| tuned",
    ]  # fmt: skip
    front = block(page, "front")[3:-2]  # of seed 0, tuned fully, where all were tried
    assert [row.split(" | ")[0] for row in front if "**" in row] == ["| **random fraction=0.5**"]
    assert all(row.endswith(" | 1 |") for row in front)
    missed = block(page, "missed")
    assert "`budgeted` changes fewer weights than `merge` on 2 of 2 models. It misses the target on:" in missed
    assert missed[5:-2] == ["| 0, 5 %, full | 40 / 0 / 90 | 40 / 0 / 90 |", "| 0, 5 %, lora | 40 / 0 / 90 |  |"]


def test_rows_of_one_method(docs):
    SCRIPT["write"](TRIALS, docs)
    tuned = "| the tuned model | 0 of 4 | 100 | 0 | 100 | 0 |"
    assert block(docs / "methods" / "merge.md", "row")[3:-2] == [
        tuned,
        "| defaults | 0 of 2 | 40 | 0 | 90 | 10 |",
        "| best of 2: defaults | 0 of 1 | 40 | 0 | 90 | 10 |",
    ]
    assert block(docs / "methods" / "budgeted.md", "row")[3:-2] == [
        tuned,
        "| defaults | 2 of 4 | 20 [0-40] | 0 | 95 [90-100] | 1 |",
    ]
    assert block(docs / "methods" / "lox.md", "row")[1] == "Not among what the demo restored last."


def test_a_strength_that_beats_the_defaults_and_nothing_missed(docs):
    better = (trial("budgeted", seed, WHOLE, kind, budget=0.3) for seed in (0, 1) for kind in ("full", "lora"))
    SCRIPT["write"]([*TRIALS, *better], docs)
    rows = block(docs / "methods" / "budgeted.md", "row")[4:-2]
    assert rows[1] == "| best of 2: budget=0.3 | 1 of 1 | 0 | 0 | 100 | 10 |"
    whole = [t for t in TRIALS if t.method != "budgeted"]
    whole += [trial("budgeted", seed, WHOLE, kind, 0.01) for seed in (0, 1) for kind in ("full", "lora")]
    SCRIPT["write"](whole, docs)
    told = "`budgeted` changes fewer weights than `merge` on 2 of 2 models. It misses the target on none of 4."
    assert told in block(docs / "results.md", "missed")


def test_a_page_without_its_marks_is_named(docs):
    page = docs / "methods" / "lox.md"
    page.write_text(page.read_text().replace("<!-- end -->", ""))
    with pytest.raises(SystemExit, match=r"lox\.md: the block <!-- table: row --> is there 0 times"):
        SCRIPT["write"](TRIALS, docs)

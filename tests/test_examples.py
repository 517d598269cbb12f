"""Every example runs, in this process: a fresh interpreter for each would spend its time on imports."""

import gc
import runpy
from pathlib import Path

import pytest
import torch

from curvkern.methods import REGISTRY

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
EXPECTED = {
    "align_guard": "penalty of the last step",
    "asft": "outside the alignment subspace",
    "booster": "after alignment with Booster",
    "derta": "take a thin ... Sorry",
    "freeze": "moved: layers 0 3",
    "gradient_surgery": "20 steps, ",
    "lookahead": "'What is 12 times 12? The answer begins with: Twelve twelves are' -> 'Twelve twelves are ten",
    "proximal_step": "40 steps in turn",
    "safety_probe": "with the vectors",
    "select_and_rollback": "rolled back 5243 of 524288 weights",
    "star_dss": "log probability of safe tokens rose by",
    "vaccine": "in the Trainer, 10 steps, 0 without perturbation",
    "weight_ema": "the model is the average of its 40 steps",
}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.stem)
def test_example_runs_and_prints_what_it_should(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(path), run_name="__main__")
    assert EXPECTED[path.stem] in capsys.readouterr().out
    gc.collect()


def test_every_guard_has_its_example():
    pages = {page.stem for page in (EXAMPLES[0].parents[1] / "docs/methods").glob("*.md")}
    assert pages - set(REGISTRY) <= set(EXPECTED)

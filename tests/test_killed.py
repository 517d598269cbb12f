"""A whole restoration killed at any moment: its output is whole or absent, and a resumed run ends bit for bit the same.

Runs are children of a server process that imported everything once, on one thread: forks of it start in no time, and
no thread of the test process is lost in them.
"""

import json
import multiprocessing
import os
import random
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest

import curvkern
import curvkern.report
from curvkern.curvature.sums import Sums

SERVER = multiprocessing.get_context("forkserver")
PRELOAD = [
    "curvkern.restore", "curvkern.report", "curvkern.checkpoint", "curvkern.methods", "curvkern.curvature",
    "transformers.models.llama.modeling_llama", "transformers.models.auto.tokenization_auto", "curvkern.evaluate",
]  # fmt: skip
#: What a run has to say of itself and its time; all else must be the same bit for bit.
TOLD = ("report.json", "curvkern.json")
#: One edits, one plans before, one runs the model before that and keeps what it found in a directory, one edits while
#: the model runs.
METHODS = {
    "merge": {"weight": 0.3},
    "safe_lora": {"base": "base", "number": 5},
    "ascent": {"harmful": "harmful.jsonl", "statistics": "kept"},
    "antidote": {"harmful": "harmful.jsonl", "memory_budget": "220KiB"},
}


def die_at(step, calls):
    """Count in ``calls`` what changes the disk or a statistic, and die in the middle of number ``step``."""

    def wrap(owner, name):
        plain = getattr(owner, name)

        def counted(*arguments, **options):
            calls.value += 1
            if calls.value == step:
                if name == "pwrite":
                    fd, data, offset = arguments
                    plain(fd, data[: len(data) // 2], offset)
                os.kill(os.getpid(), signal.SIGKILL)
            return plain(*arguments, **options)

        setattr(owner, name, counted)

    for name in ("pwrite", "fsync", "posix_fallocate"):
        wrap(os, name)
    for name in ("replace", "rename", "unlink"):
        wrap(Path, name)
    wrap(Sums, "add")


def child(step, calls, family, place, method):
    roots = {"base": family, "harmful": family, "statistics": place}
    options = {key: roots[key] / value if key in roots else value for key, value in METHODS[method].items()}
    curvkern.report.render_page = lambda report: report.method  # plots are most of so small a run's time
    die_at(step, calls)
    curvkern.restore(family / "aligned", family / "tuned", out=place / "out", method=method, resume=True, **options)


@dataclass
class Runs:
    """Runs of one method in directories of their own."""

    family: Path
    root: Path
    method: str

    def until(self, step, place):
        """How many steps a run makes that dies at ``step`` (0: it does not); each call is a process."""
        (self.root / place).mkdir(exist_ok=True)
        calls = SERVER.Value("i", 0)
        run = SERVER.Process(target=child, args=(step, calls, self.family, self.root / place, self.method))
        run.start()
        run.join()
        assert run.exitcode == (-signal.SIGKILL if calls.value == step else 0)
        return calls.value

    def files(self, place):
        """All that lies at the output, by path; what a run tells without times and the place."""
        out = self.root / place / "out"
        found = {p.relative_to(out).as_posix(): p.read_bytes() for p in out.rglob("*") if p.is_file()}
        found.pop("curvkern.unfinished.json", None)  # stays, harmless, if the very last step never comes
        told = {name: json.loads(found[name].replace(str(out.parent).encode(), b"")) for name in TOLD}
        for report in told["report.json"], told["curvkern.json"]["restoration"]:
            del report["stages"], report["totals"]["seconds"], report["totals"]["peak_memory"]
            # Where a statistic was found, and not estimated anew.
            report["messages"] = [line for line in report["messages"] if ": from " not in line]
        return {name: data for name, data in found.items() if name not in TOLD} | told


@pytest.fixture(scope="module", params=METHODS)
def runs(request, family, tmp_path_factory):
    """A method's runs, how many steps an undisturbed one makes, and what it leaves."""
    with pytest.MonkeyPatch.context() as patched:
        for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
            patched.setenv(name, "1")
        SERVER.set_forkserver_preload(PRELOAD)
        found = Runs(family, tmp_path_factory.mktemp(request.param), request.param)
        steps = found.until(0, "whole")  # starts the server
        yield found, steps, found.files("whole")


def test_killed_at_random_steps_then_resumed(runs):
    run, steps, wanted = runs
    assert steps > 60
    assert sum(name.endswith(".safetensors") for name in wanted) == 3
    moments = random.Random(0)
    shares = 4 if run.method in ("ascent", "antidote") else 6  # which loads a model for each life
    parts = [moments.randint(1 + steps * k // shares, steps * (k + 1) // shares) for k in range(shares)]
    for step in sorted({*parts, steps - 2, steps}):  # one in each part of the run, and about the rename at its end
        place = f"at{step:04d}"
        assert run.until(step, place) == step
        if not (run.root / place / "out").exists():
            assert (run.root / place / "out.partial").is_dir()
            run.until(0, place)
        assert run.files(place) == wanted
        assert not (run.root / place / "out.partial").exists()


@pytest.mark.parametrize("runs", ["merge", "safe_lora"], indirect=True)
def test_killed_again_and_again(runs):
    """Lives so short that none does all that is left."""
    run, steps, wanted = runs
    moments = random.Random(1)
    kills = 0
    while not (run.root / "again" / "out").exists():
        assert kills < 30
        lasts = steps // 4 + moments.randint(0, steps // 4) if kills < 8 else 0
        kills += run.until(lasts, "again") == lasts
    assert kills > 2
    assert run.files("again") == wanted

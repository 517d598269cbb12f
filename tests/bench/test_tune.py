"""Launches that are tried, kept and read again."""

import json
import logging

import pytest
import torch
from rich.console import Console

from curvkern.bench import tune as bench_tune
from curvkern.kernels import tuned

pytest.importorskip("triton")
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def test_launches_are_tried_and_the_faster_kept(monkeypatch):
    tried = []
    plain = tuned.launch_of

    def launch_of(kernel, device, default):
        launch = plain(kernel, device, default)
        tried.append((kernel, tuple(launch.items())))
        return launch

    monkeypatch.setattr("curvkern.kernels.rollback.launch_of", launch_of)
    flat = {"BLOCK": (64, 4096), "num_warps": (4,)}
    monkeypatch.setattr(bench_tune, "SPACES", {"blend": bench_tune.Space("blend_", torch.bfloat16, flat)})
    console = Console(record=True)
    path = bench_tune.tune(CPU, "tiny", 0.001, console, "Some GPU")
    assert path.name == "some-gpu.json"
    assert {launch for _, launch in tried} >= {(("BLOCK", b), ("num_warps", 4)) for b in (64, 4096)}
    assert "blend, blend_" in console.export_text()
    assert set(tuned.read_table("Some GPU")) <= {"blend"}


def test_a_launch_that_gives_wrong_results_is_out(monkeypatch):
    flat = {"BLOCK": (3,), "num_warps": (4,)}  # no power of two
    monkeypatch.setattr(bench_tune, "SPACES", {"blend": bench_tune.Space("blend_", torch.bfloat16, flat)})
    console = Console(record=True)
    bench_tune.tune(CPU, "tiny", 0.001, console, "Some GPU")
    assert "0 launches tried, its own is the fastest" in console.export_text()
    assert tuned.read_table("Some GPU") == {}


def test_there_is_nothing_to_tune_on_a_cpu():
    with pytest.raises(ValueError, match="--tune is for GPUs"):
        bench_tune.tune(CPU)


def test_tiles_stay_within_the_registers():
    for space in bench_tune.SPACES.values():
        launches = list(space.launches())
        assert 2 <= len(launches) <= 60
        for launch in launches:
            assert launch.get("block_o", 1) * launch.get("block_i", 1) <= space.most * launch["num_warps"]


def test_every_space_has_a_case_and_a_kernel_that_asks():
    from pathlib import Path

    asked = "".join(path.read_text() for path in Path(tuned.__file__).parent.glob("*.py"))
    for name, space in bench_tune.SPACES.items():
        assert f'"{name}"' in asked or name.startswith("fisher ")
        assert all(any(c.function == space.function and c.dtype == space.dtype and c.size == size
                       for cases in bench_tune.CASES.values() for c in cases) for size in ("m",))  # fmt: skip


def test_a_table_is_read_back(home):
    path = tuned.save_table("Some GPU", {"blend": {"BLOCK": 64, "num_warps": 4}})
    assert path == home / ".cache/curvkern/some-gpu.json"
    assert tuned.read_table("Some GPU") == {"blend": {"BLOCK": 64, "num_warps": 4}}
    assert tuned.read_table("Other GPU") == {}
    assert [p.name for p in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"gpu": 1, "triton": "0", "launches": {}}'])
def test_a_table_that_does_not_fit_is_told_and_left(text, caplog):
    path = tuned.save_table("Some GPU", {})
    path.write_text(text)
    with caplog.at_level(logging.WARNING, "curvkern"):
        assert tuned.read_table("Some GPU") == {}
    assert "curvkern bench --tune" in caplog.text


def test_another_triton_measures_anew():
    path = tuned.save_table("Some GPU", {"blend": {"BLOCK": 64}})
    path.write_text(json.dumps({**json.loads(path.read_text()), "triton": "0.1"}))
    assert tuned.read_table("Some GPU") == {}


def test_only_what_a_kernel_asks_for_is_changed():
    with tuned.trying("blend", {"BLOCK": 64, "other": 1}):
        assert tuned.launch_of("blend", CPU, {"BLOCK": 8, "num_warps": 2}) == {"BLOCK": 64, "num_warps": 2}
        assert tuned.launch_of("rollback", CPU, {"BLOCK": 8}) == {"BLOCK": 8}
    assert tuned.launch_of("blend", CPU, {"BLOCK": 8}) == {"BLOCK": 8}

"""Out of room, out of memory: what is told, and what is left."""

from __future__ import annotations

import errno
import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from curvkern.checkpoint import Checkpoint, CheckpointError, Writer


@pytest.fixture
def source(save):
    return save(num_hidden_layers=1, shard="30KB")


def restore(source, out, **options):
    with Checkpoint.open(source) as checkpoint, Writer(out, checkpoint, **{"resume": True, **options}) as writer:
        writer.copy_rest()
        writer.finish()


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("call, after", [("posix_fallocate", 3), ("pwrite", 12), ("fsync", 9)])
def test_full_disk(save, tmp_path, monkeypatch, contents, resume, call, after):
    source, out = save(), save("out", seed=5)
    before = {p: contents(p) for p in (source, out)}
    plain, calls = getattr(os, call), []

    def full(*arguments):
        calls.append(1)
        if len(calls) > after:
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(*arguments)

    with monkeypatch.context() as patched:
        patched.setattr(os, call, full)
        with pytest.raises(CheckpointError) as caught:
            restore(source, out, resume=resume, overwrite=True)
    assert f"{out}: the disk is full, while" in str(caught.value)
    assert "nothing there was changed" in str(caught.value)
    assert ("kept for resume" in str(caught.value)) == resume
    assert {p: contents(p) for p in before} == before
    assert (tmp_path / "out.partial").exists() == resume
    restore(source, out, resume=True, overwrite=True)
    assert "curvkern.json" in contents(out)


def test_too_little_space_is_told_first(save, tmp_path, monkeypatch):
    source = save()
    usage = type("Usage", (), {"free": 50_000})
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"needs .*e-05 GB, 5e-05 GB are free"):
        restore(source, tmp_path / "out", resume=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned"]


def test_file_system_without_preallocation(save, tmp_path, monkeypatch):
    def unsupported(*arguments):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    source = save()
    restore(source, tmp_path / "a")
    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    restore(source, tmp_path / "b")
    for file in (tmp_path / "a").glob("*.safetensors"):
        assert (tmp_path / "b" / file.name).read_bytes() == file.read_bytes()


def test_a_disk_too_full_for_the_first_byte(source, tmp_path, monkeypatch):
    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="the disk is full, while making the output directory"):
        restore(source, tmp_path / "out", resume=False)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aligned"]


def test_mounts_that_cannot_sync_directories(source, tmp_path, monkeypatch):
    plain = os.fsync

    def sync(fd):
        if os.path.isdir(f"/proc/self/fd/{fd}"):
            raise OSError(errno.EINVAL, "Invalid argument")
        plain(fd)

    monkeypatch.setattr(os, "fsync", sync)
    restore(source, tmp_path / "out")
    assert (tmp_path / "out" / "config.json").exists()


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "small"
    place.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", place], capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here: " + mounted.stderr.decode().strip())
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_disk_that_is_really_full(save, small_disk, monkeypatch):
    source = save()
    with pytest.raises(CheckpointError, match="are free on its disk"):
        restore(source, small_disk / "out", resume=False)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1 << 40}))
    with pytest.raises(CheckpointError, match="the disk is full, while reserving room"):
        restore(source, small_disk / "out", resume=False)
    assert list(small_disk.iterdir()) == []


MEASURE = """
import re, sys
import torch
from curvkern.checkpoint import Bundle, Checkpoint, Writer

def kilobytes(field):
    with open("/proc/self/status") as status:
        return int(re.search(field + r":\\s+(\\d+)", status.read())[1])

with open("/proc/self/clear_refs", "w") as refs:
    refs.write("5")
start = kilobytes("VmRSS")
aligned, tuned, out, bound = *map(Checkpoint.open, sys.argv[1:3]), sys.argv[3], int(sys.argv[4])
with Writer(out, tuned) as writer:
    for name, tensors in Bundle({"aligned": aligned, "tuned": tuned}, max_bytes=bound):
        writer.write(name, tensors["tuned"].lerp_(tensors["aligned"], 0.5))
    writer.finish()
print((kilobytes("VmHWM") - start) * 1024, *{"transformers", "peft"} & set(sys.modules))
"""


def test_peak_memory_stays_within_the_bound(tmp_path):
    """In a process of its own, which also shows that neither transformers nor peft is imported."""
    tensors = {f"layer{i:02d}.weight": torch.zeros(2 << 20) for i in range(16)}
    for role in ("aligned", "tuned"):
        save_file(tensors, tmp_path / f"{role}.safetensors")
    paths = [tmp_path / name for name in ("aligned.safetensors", "tuned.safetensors", "out")]
    run = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, paths), str(32 << 20)],
        capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    # 32 MiB read ahead, 16 MiB that the loop still holds, and what torch sets up at its first sum;
    # outputs or inputs that pile up would come to 128 MiB.
    peak, *imported = run.stdout.split()
    assert int(peak) < 96 << 20
    assert imported == []
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 128 << 20

"""Killed: at every step the output is whole or absent, and a run resumes."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from curvkern.checkpoint import Checkpoint, CheckpointError, Writer

FORK = multiprocessing.get_context("fork")


def restore(source, out, *, pause=0.0, **options):
    """A run as a user would start it: halve every other tensor, copy the rest."""
    options = {"resume": True, "recipe": {"method": "halve"}, **options}
    with Checkpoint.open(source) as checkpoint, Writer(out, checkpoint, **options) as writer:
        for i, name in enumerate(writer.names):
            if name in writer.done:
                continue
            time.sleep(pause)
            if i % 2:
                writer.copy(name)
            else:
                writer.write(name, checkpoint.read(name) * 0.5)
        writer.finish({"report": {"tensors": len(writer.names)}})


def die_at(step, calls):
    """Count the calls that change the disk in ``calls``, and die in the middle of number ``step``."""

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


def begin(out, checkpoint, names):
    """Copy ``names`` in a run that then fails, and return what the writer took as done."""
    writer = Writer(out, checkpoint, resume=True)
    done = set(writer.done)

    def copy_and_fail():
        for name in names:
            writer.copy(name)
        raise InterruptedError

    with pytest.raises(InterruptedError), writer:
        copy_and_fail()
    return done


def run_until(step, source, out, **options):
    """Run in a child that dies at ``step`` and return how many steps it made (0: does not die)."""
    calls = FORK.Value("i", 0)

    def child():
        die_at(step, calls)
        restore(source, out, **options)

    process = FORK.Process(target=child)
    process.start()
    process.join()
    assert process.exitcode == (-signal.SIGKILL if calls.value == step else 0)
    return calls.value


@pytest.fixture
def source(save):
    directory = save(num_hidden_layers=1, shard="30KB")
    for path in directory.glob("*token*"):
        path.unlink()
    return directory


@pytest.fixture
def reference(source, tmp_path, contents):
    restore(source, tmp_path / "reference")
    return source, contents(tmp_path / "reference")


def reads_as(path, reference):
    """The contents of an output, whose card names its directory."""
    found = {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    found.pop("curvkern.unfinished.json", None)  # stays, harmless, if the very last step never comes
    assert found.keys() == reference.keys()
    return {**found, "README.md": found["README.md"].replace(f"# {path.name}".encode(), b"# reference")}


def test_kill_at_every_step_then_resume(reference, tmp_path):
    source, wanted = reference
    steps = run_until(0, source, tmp_path / "whole")
    assert steps > 40
    for step in range(1, steps + 1):
        out = tmp_path / f"out{step}"
        run_until(step, source, out)
        if not out.exists():
            assert (tmp_path / f"out{step}.partial").is_dir()
            restore(source, out)
        assert reads_as(out, wanted) == wanted
        assert not (tmp_path / f"out{step}.partial").exists()


def test_kill_at_every_step_of_starting_again(reference, tmp_path):
    """What an earlier run left stays known as ours while it is cleared away."""
    source, wanted = reference
    assert run_until(40, source, tmp_path / "left") == 40
    for step in range(1, 12):
        out = tmp_path / f"out{step}"
        shutil.copytree(tmp_path / "left.partial", tmp_path / f"out{step}.partial")
        assert run_until(step, source, out, resume=False) == step
        restore(source, out)
        assert reads_as(out, wanted) == wanted


def test_kill_at_every_late_step_while_replacing(reference, save, tmp_path, contents):
    """The old output is there until the new one is whole; only between two renames neither is."""
    source, wanted = reference
    older = save("older", seed=9)
    shutil.copytree(older, tmp_path / "out0")
    steps = run_until(0, source, tmp_path / "out0", overwrite=True)
    swaps = 0
    for step in range(steps - 12, steps + 1):
        out = tmp_path / f"out{step}"
        shutil.copytree(older, out)
        run_until(step, source, out, overwrite=True)
        if not out.exists():
            swaps += 1
            assert contents(tmp_path / f"out{step}.previous") == contents(older)
        elif "curvkern.json" in contents(out):
            assert reads_as(out, wanted) == wanted
        else:
            assert contents(out) == contents(older)
            restore(source, out, overwrite=True)
            assert reads_as(out, wanted) == wanted
    assert swaps == 1


def test_kill_at_random_times_again_and_again(reference, tmp_path):
    source, wanted = reference
    moments = random.Random(0)
    out = tmp_path / "out"
    kills = 0
    while not out.exists():
        process = FORK.Process(target=restore, args=(source, out), kwargs={"pause": 0.01})
        process.start()
        process.join(moments.uniform(0.01, 0.06) if kills < 12 else None)
        kills += process.is_alive()
        process.kill()
        process.join()
    assert kills > 3
    assert reads_as(out, wanted) == wanted


def test_resume_keeps_finished_shards(save, tmp_path, monkeypatch):
    source, out = save(), tmp_path / "out"
    with Checkpoint.open(source) as checkpoint:
        first = [n for n in checkpoint.names if checkpoint.spec(n).file == checkpoint.files[0]]
        second = [n for n in checkpoint.names if checkpoint.spec(n).file == checkpoint.files[1]]
        assert begin(out, checkpoint, (*first, second[0])) == set()
        assert not out.exists()
        with Writer(out, checkpoint, resume=True) as writer:
            assert writer.done == set(first)
            for name in writer.names:
                if name not in writer.done:
                    writer.copy(name)
            writer.finish()
    assert all((out / f).read_bytes() == (source / f).read_bytes() for f in checkpoint.files)


def test_without_resume_it_starts_again(save, tmp_path):
    source, out = save(), tmp_path / "out"
    run_until(20, source, out)
    with Checkpoint.open(source) as checkpoint, Writer(out, checkpoint) as writer:
        assert writer.done == set()
        for name in writer.names:
            writer.copy(name)
        writer.finish()
    assert not (tmp_path / "out.partial").exists()


def test_a_shard_of_the_wrong_size_is_not_trusted(save, tmp_path):
    source, out = save(), tmp_path / "out"
    with Checkpoint.open(source) as checkpoint:
        first = [n for n in checkpoint.names if checkpoint.spec(n).file == checkpoint.files[0]]
        begin(out, checkpoint, first)
        assert begin(out, checkpoint, ()) == set(first)
        os.truncate(tmp_path / "out.partial" / checkpoint.files[0], 10)
        assert begin(out, checkpoint, ()) == set()


def test_resume_refuses_what_changed(save, tmp_path):
    source, out = save(), tmp_path / "out"
    run_until(30, source, out)

    def refusal(path=source, **options):
        with pytest.raises(CheckpointError) as caught:
            restore(path, out, **options)
        return str(caught.value)

    message = refusal(recipe={"method": "halve", "tau": 0.5})
    assert "cannot resume, it was begun differently: recipe.tau was None, is 0.5" in message
    assert "recipe.method was 'halve', is 'double'" in refusal(recipe={"method": "double"})
    assert "inputs.like.files.model-00001-of-00005.safetensors.sample_crc32 was" in refusal(save("other", seed=1))
    assert "output.model-00001-of-00005.safetensors.bytes was" in refusal(dtype=torch.bfloat16)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("{}")
    assert "inputs.harmful was None, is {'bytes': 2," in refusal(data={"harmful": prompts})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("curvkern.checkpoint.write.versions", lambda: {"curvkern": "99"})
        assert "software was" in refusal()
    restore(source, out)
    assert out.exists()


def test_resume_refuses_other_contents_under_the_same_path(save, tmp_path):
    source, out, prompts = save(), tmp_path / "out", tmp_path / "prompts.jsonl"
    prompts.write_text("one")
    run_until(30, source, out, data={"harmful": prompts})
    prompts.write_text("two")
    with pytest.raises(CheckpointError, match=r"begun differently: inputs.harmful.crc32 was \d+, is \d+"):
        restore(source, out, data={"harmful": prompts})


def test_notes_of_finished_shards_come_back(save, tmp_path):
    source, out = save(), tmp_path / "out"
    note = {"norm": 0.1, "cosine": float("inf"), "notes": {"rank": 3}}
    with Checkpoint.open(source) as checkpoint:
        names = [n for n in checkpoint.names if checkpoint.spec(n).file in checkpoint.files[:2]]

        def note_and_fail(writer):
            for name in names[:-1]:
                writer.write(name, checkpoint.read(name), note)
            assert writer.notes.keys() == set(names[:-1])
            raise InterruptedError

        with pytest.raises(InterruptedError), Writer(out, checkpoint, resume=True) as writer:
            note_and_fail(writer)
        with Writer(out, checkpoint, resume=True) as writer:
            first = [n for n in names if checkpoint.spec(n).file == checkpoint.files[0]]
            assert writer.notes == dict.fromkeys(first, note)
            writer.copy_rest()
            writer.finish()
    assert "notes" not in json.loads((out / "curvkern.json").read_text())


def test_everything_reaches_the_disk_before_it_counts(source, tmp_path, monkeypatch):
    """A shard is synced before the record names it, and all of it before the directory appears."""
    events = []
    fsync, rename = os.fsync, Path.rename

    def synced(fd):
        path = Path(os.readlink(f"/proc/self/fd/{fd}"))
        events.append(path.name)
        if path.name == "curvkern.unfinished.json.tmp":
            events.append(json.loads(path.read_text())["complete"])
        fsync(fd)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "rename", lambda *a: (events.append("renamed"), rename(*a))[1])
    restore(source, tmp_path / "out")
    shards = sorted(p.name for p in source.glob("*.safetensors"))
    for i, shard in enumerate(shards, 1):
        assert events.index(shard) < events.index(shards[:i])
        assert events[events.index(shards[:i]) + 1] == "out.partial"
    end = events.index("renamed")
    for path in (tmp_path / "out").iterdir():
        assert path.name in events[:end] or f"{path.name}.tmp" in events[:end]
    assert events[end - 2 :] == ["curvkern.json.tmp", "out.partial", "renamed", tmp_path.name]

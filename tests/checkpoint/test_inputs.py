"""Inputs that cannot be read, or change under a restoration: one line that names the file and says what to do."""

import errno
import os
import shutil
from pathlib import Path

import pytest

import curvkern
from curvkern.checkpoint import Checkpoint, CheckpointError, Writer
from curvkern.curvature import CurvatureError


@pytest.fixture
def inputs(family, tmp_path, monkeypatch):
    """Copies to spoil, beside an older output that must survive."""
    monkeypatch.setattr("curvkern.report.render_page", lambda report: report.method)  # plots are most of the time
    for name in ("aligned", "tuned", "base"):
        shutil.copytree(family / name, tmp_path / name)
    shutil.copytree(family / "base", tmp_path / "out")
    return tmp_path


def restore(inputs, **options):
    options = {"method": "merge", "overwrite": True, **options}
    return curvkern.restore(inputs / "aligned", inputs / "tuned", out=inputs / "out", **options)


def refused(inputs, contents, *said, **options):
    """The restoration is refused in one line that says all of ``said``, and the older output is as it was."""
    older = contents(inputs / "base")
    with pytest.raises(CheckpointError) as caught:
        restore(inputs, **options)
    message = str(caught.value)
    assert "\n" not in message
    for words in said:
        assert words in message
    assert contents(inputs / "out") == older
    assert (inputs / "out.partial").exists() == bool(options.get("resume") and "begun differently" not in message)


def shard(inputs, at=1, name="tuned"):
    return sorted((inputs / name).glob("*.safetensors"))[at]


def is_restored(inputs, family):
    """The output is what an undisturbed run makes."""
    wanted = curvkern.restore(family / "aligned", family / "tuned", method="merge", out=inputs / "wanted")
    assert wanted.changed > 0
    for path in (inputs / "wanted").glob("*.safetensors"):
        assert (inputs / "out" / path.name).read_bytes() == path.read_bytes()


# before the pass ------------------------------------------------------------------------------------------------------


def test_a_shard_without_the_right_to_read_it(inputs, family, contents, monkeypatch):
    locked, plain = shard(inputs), os.open

    def opened(path, *arguments, **options):
        if Path(path) == locked:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return plain(path, *arguments, **options)

    with monkeypatch.context() as patched:  # chmod would not stop root
        patched.setattr(os, "open", opened)
        said = (f"{locked}: cannot open this weight file: Permission denied", "ask for the right to read it, and run")
        with pytest.raises(CheckpointError) as caught:
            restore(inputs)
    assert all(words in str(caught.value) for words in said)
    assert contents(inputs / "out") == contents(inputs / "base")
    restore(inputs)
    is_restored(inputs, family)


def test_a_directory_without_the_right_to_look_into_it(inputs, contents, monkeypatch):
    def listed(self):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    for path in (inputs / "tuned").glob("model*"):
        path.unlink()
    monkeypatch.setattr(Path, "iterdir", listed)
    with pytest.raises(CheckpointError, match=r"tuned: cannot look into it: Permission denied; ask for the right"):
        Checkpoint.open(inputs / "tuned")


@pytest.mark.parametrize(
    "spoil, said",
    [
        (lambda path: (path.unlink(), path.mkdir()), "is a directory, not a regular file; wanted weights"),
        (lambda path: path.unlink(), "No such file or directory; fetch or copy the missing file, and run again"),
        (lambda path: os.truncate(path, path.stat().st_size - 7), "if it was cut short, fetch or copy it again"),
        (lambda path: os.truncate(path, 5), "in 5 bytes; if it was cut short"),
    ],
    ids=["directory", "missing", "truncated", "truncated header"],
)
def test_a_shard_that_is_not_there_whole(inputs, family, contents, spoil, said):
    spoiled = shard(inputs)
    spoil(spoiled)
    refused(inputs, contents, str(spoiled), said)
    shutil.rmtree(inputs / "tuned")
    shutil.copytree(family / "tuned", inputs / "tuned")
    restore(inputs)
    is_restored(inputs, family)


# during the pass ------------------------------------------------------------------------------------------------------


def when_written(monkeypatch, after, act):
    """Run ``act`` before the tensor number ``after`` is written."""
    plain, written = Writer.write, []

    def write(self, name, *arguments):
        written.append(name)
        if len(written) == after:
            act()
        return plain(self, name, *arguments)

    monkeypatch.setattr(Writer, "write", write)


def touched(path):
    """Other bytes of the same length, as an edit in place leaves them."""
    data = bytearray(path.read_bytes())
    data[-64:] = bytes(64)
    with path.open("r+b") as file:
        file.write(data)
    os.utime(path, ns=(1, 1))  # so that a coarse clock cannot hide it


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("name", ["tuned", "aligned"])
def test_an_input_that_is_written_to_meanwhile(inputs, family, contents, monkeypatch, name, resume):
    changed = shard(inputs, name=name)
    with monkeypatch.context() as patched:
        when_written(patched, 4, lambda: touched(changed))
        said = (f"{changed}: was written to while it was read", "run again once it is still")
        refused(inputs, contents, *said, resume=resume)
    shutil.copy(family / name / changed.name, changed)
    restore(inputs, resume=resume)
    is_restored(inputs, family)


def test_an_adapter_that_is_written_to_meanwhile(inputs, family, monkeypatch):
    shutil.copytree(family / "adapter", inputs / "adapter")
    when_written(monkeypatch, 4, lambda: touched(inputs / "adapter" / "adapter_model.safetensors"))
    with pytest.raises(CheckpointError, match=r"adapter_model.safetensors: was written to while it was read"):
        curvkern.restore(inputs / "aligned", inputs / "adapter", out=inputs / "new", method="merge", save="checkpoint")
    assert not (inputs / "new").exists()


def test_an_input_that_is_replaced_meanwhile_does_no_harm(inputs, family, monkeypatch):
    """The file that was opened is still there, without a name."""
    old = shard(inputs)

    def replace():
        new = old.with_name("new")
        shutil.copy(old, new)
        touched(new)
        new.replace(old)

    when_written(monkeypatch, 2, replace)
    restore(inputs)
    monkeypatch.undo()
    is_restored(inputs, family)


def once_begun(monkeypatch, act):
    """Run ``act`` when the output has its place and no tensor is read yet."""
    plain = Writer._reserve
    monkeypatch.setattr(Writer, "_reserve", lambda self: (plain(self), act())[0])


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize(
    "at, said",
    [(0, "was cut short while it was read: ends at byte 2000, wanted"), (-1, "from {size} bytes to 2000, so that old")],
    ids=["read next", "read later"],
)
def test_an_input_that_is_cut_short_meanwhile(inputs, family, contents, monkeypatch, at, said, resume):
    cut = shard(inputs, at)
    size = cut.stat().st_size
    with monkeypatch.context() as patched:
        once_begun(patched, lambda: os.truncate(cut, 2000))
        refused(inputs, contents, str(cut), said.format(size=size), "run again", resume=resume)
    shutil.copy(family / "tuned" / cut.name, cut)
    restore(inputs, resume=resume)
    is_restored(inputs, family)


def test_a_disk_that_fails_while_it_is_read(inputs, family, contents, monkeypatch):
    def fails(fd, buffers, offset):
        raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patched:
        once_begun(patched, lambda: patched.setattr(os, "preadv", fails))
        refused(inputs, contents, ".safetensors: cannot read", "Input/output error; look after its disk", resume=True)
    restore(inputs, resume=True)
    is_restored(inputs, family)


def test_a_side_file_that_vanishes_meanwhile(inputs, family, contents, monkeypatch):
    lost = inputs / "tuned" / "generation_config.json"
    plain = Path.read_bytes

    def gone(self):
        if self == lost:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        return plain(self)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", gone)
        with pytest.raises(CheckpointError, match=r"generation_config.json: cannot be read: No such file .*run again"):
            restore(inputs, resume=True)
    assert contents(inputs / "out") == contents(inputs / "base")
    restore(inputs, resume=True)
    is_restored(inputs, family)


# between two runs -----------------------------------------------------------------------------------------------------


def interrupted(inputs, monkeypatch):
    """A run that stops after its first shard."""

    def stop():
        raise InterruptedError

    with monkeypatch.context() as patched:
        when_written(patched, 12, stop)
        with pytest.raises(InterruptedError):
            restore(inputs, resume=True)
    assert (inputs / "out.partial").is_dir()


def test_an_input_that_changed_before_the_resumed_run(inputs, family, contents, monkeypatch):
    interrupted(inputs, monkeypatch)
    changed = shard(inputs, 2)
    shutil.copy(shard(inputs, 2, "base"), changed)
    with pytest.raises(CheckpointError) as caught:
        restore(inputs, resume=True)
    assert f"begun differently: inputs.tuned.files.{changed.name}.sample_crc32 was" in str(caught.value)
    assert "Restore the former settings, or run without resume" in str(caught.value)
    assert contents(inputs / "out") == contents(inputs / "base")
    shutil.copy(family / "tuned" / changed.name, changed)
    restore(inputs, resume=True)
    is_restored(inputs, family)


def test_a_disk_too_full_for_statistics(inputs, family, contents, monkeypatch):
    def full(*arguments, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CurvatureError, match=r"statistics cannot be written: .*No space left.*; make room, and run"):
        restore(inputs, method="ascent", harmful=family / "harmful.jsonl", statistics=inputs / "kept")
    assert contents(inputs / "out") == contents(inputs / "base")
    assert list((inputs / "kept").iterdir()) == []

"""Where an output may appear, and what is at stake there."""

from __future__ import annotations

import errno
import shutil

import pytest
from transformers import AutoModelForCausalLM

from curvkern.checkpoint import Checkpoint, CheckpointError, Writer


def copy_and(writer, act):
    writer.copy_rest()
    act()


def fail():
    raise InterruptedError


def leftovers(out):
    return [p.name for p in out.parent.iterdir() if p.name.startswith(f"{out.name}.")]


def test_refuses_targets(source, save, tmp_path):
    def refusal(out, **options):
        with pytest.raises(CheckpointError) as caught:
            Writer(out, source, **options)
        return str(caught.value)

    held = save("held", seed=3)
    assert "exists and is not empty; pass overwrite=True (--overwrite) to replace it" in refusal(held)
    (tmp_path / "file").write_text("")
    assert "is a file" in refusal(tmp_path / "file", overwrite=True)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("")
    assert "holds no checkpoint (thesis.tex), so it is not overwritten" in refusal(tmp_path / "home", overwrite=True)
    assert "overlaps the input" in refusal(source.path, overwrite=True)
    assert "overlaps the input" in refusal(source.path / "out")
    assert "overlaps the input" in refusal(tmp_path, overwrite=True)
    (tmp_path / "link").symlink_to(source.path)
    assert "overlaps the input" in refusal(tmp_path / "link", overwrite=True)
    with Checkpoint.open(held) as other:
        assert "overlaps the input" in refusal(held, overwrite=True, inputs={"aligned": other})
    assert "is a mount point" in refusal("/dev/shm", overwrite=True)
    (tmp_path / "mine.partial").mkdir()
    (tmp_path / "mine.partial" / "thesis.tex").write_text("")
    assert "exists and is not an unfinished output" in refusal(tmp_path / "mine")
    assert (tmp_path / "mine.partial" / "thesis.tex").exists()
    shutil.copytree(held, tmp_path / "lost.previous")
    assert "an earlier output, left when its replacement was cut short" in refusal(tmp_path / "lost")
    (tmp_path / "file.d").write_text("")
    assert "Not a directory" in refusal(tmp_path / "file.d" / "out")
    (held / "notes.txt").write_text("")
    assert "holds notes.txt, which no checkpoint has" in refusal(held, overwrite=True)
    (held / "notes.txt").unlink()
    (held / "results").mkdir()
    assert "holds results/, which no checkpoint has" in refusal(held, overwrite=True)
    assert (tmp_path / "lost.previous").is_dir()


def test_paths_used_meanwhile_are_not_inputs(save, tmp_path):
    unfinished = save("out.partial")
    with (
        Checkpoint.open(unfinished) as source,
        pytest.raises(CheckpointError, match=r"by way of .*out\.partial, which"),
    ):
        Writer(tmp_path / "out", source)
    assert (unfinished / "config.json").is_file()
    with Checkpoint.open(save("a")) as source, Writer(tmp_path / "mine.partial", source) as writer:
        writer.copy_rest()
        writer.finish()
    with Checkpoint.open(tmp_path / "a") as source, pytest.raises(CheckpointError, match="not an unfinished output"):
        Writer(tmp_path / "mine", source)
    assert (tmp_path / "mine.partial" / "curvkern.json").is_file()


def test_what_links_point_to_is_not_replaced(save, tmp_path):
    """As in the hub's cache: a snapshot of links to files elsewhere."""
    blobs = save("blobs")
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc123"
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(file)
    with Checkpoint.open(snapshot) as source:
        with pytest.raises(CheckpointError, match="overlaps the input"):
            Writer(blobs, source, overwrite=True)
        with Writer(tmp_path / "out", source, inputs={"tuned": source}) as writer:
            writer.copy_rest()
            writer.finish()
    assert "org/name@abc123" in (tmp_path / "out" / "README.md").read_text()


def test_an_empty_target_is_fine(source, tmp_path):
    (tmp_path / "out").mkdir()
    with Writer(tmp_path / "out", source) as writer:
        writer.copy_rest()
        writer.finish()
    assert (tmp_path / "out" / "config.json").exists()


def test_overwrite_swaps_at_the_end(source, save, tmp_path, contents):
    out = save("out", seed=5, shard="1GB")
    before = contents(out)
    with pytest.raises(InterruptedError), Writer(out, source, overwrite=True) as writer:
        copy_and(writer, fail)
    assert contents(out) == before
    with Writer(out, source, overwrite=True) as writer:
        writer.copy_rest()
        assert contents(out) == before
        writer.finish()
    assert sorted(p.name for p in out.glob("*.safetensors")) == list(source.files)
    assert leftovers(out) == []


def test_a_failed_swap_puts_the_old_output_back(source, save, monkeypatch, contents):
    out = save("out", seed=5)
    before = contents(out)
    plain = type(out).rename

    def rename(self, target):
        if self.name == "out.partial":
            raise OSError(errno.EIO, "Input/output error")
        return plain(self, target)

    monkeypatch.setattr(type(out), "rename", rename)
    writer = Writer(out, source, overwrite=True)
    with pytest.raises(CheckpointError, match="Input/output error"), writer:
        copy_and(writer, writer.finish)
    assert contents(out) == before
    assert leftovers(out) == []


def test_a_target_that_appears_meanwhile_is_kept(source, save, tmp_path):
    writer = Writer(tmp_path / "out", source)
    save("out", seed=5)
    with pytest.raises(CheckpointError, match="appeared while"), writer:
        copy_and(writer, writer.finish)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out") is not None


def test_one_writer_at_a_time(source, tmp_path):
    with Writer(tmp_path / "out", source) as writer:
        for resume in (False, True):
            with pytest.raises(CheckpointError, match="another run is writing there"):
                Writer(tmp_path / "out", source, resume=resume)
        writer.copy_rest()
        writer.finish()
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == 5

"""Deltas: exact both ways, in the form that takes least room, and for no other model than their own."""

import json
from itertools import product

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import curvkern
from curvkern.checkpoint import Checkpoint, CheckpointError, Delta, DeltaWriter, apply_delta, undo_delta
from curvkern.checkpoint.delta import BitChange
from curvkern.cli import app as cli
from curvkern.restore import RestoreError

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int64)
FORMS = {None: None, "indices": torch.int32, "mask": torch.uint8}


@pytest.fixture(autouse=True)
def _no_plots(monkeypatch):
    """They are most of so small a run's time."""
    monkeypatch.setattr("curvkern.report.render_page", lambda report: report.method)


def patterns(tensor):
    return tensor.contiguous().flatten().view(torch.uint8)


def bits_of(directory):
    with Checkpoint.open(directory) as checkpoint:
        return {name: bytes(patterns(checkpoint.read(name))) for name in checkpoint.names}


def random_bits(shape, dtype, seed):
    """Any bit pattern: NaN, infinities and -0 among them."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.empty(shape, dtype=dtype).numel() * dtype.itemsize
    return torch.randint(256, (count,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


# one tensor -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("share, form", [(1.0, None), (0.4, "mask"), (0.002, "indices")])
def test_a_change_is_exact_both_ways_and_takes_the_least_room(dtype, share, form):
    size = 37 * 53
    before, other = (random_bits(size, dtype, seed) for seed in (0, 1))
    chosen = torch.rand(size, 1, generator=torch.Generator().manual_seed(2)) < share
    rows = torch.where(chosen, patterns(other).view(size, -1), patterns(before).view(size, -1))
    before, after = (t.flatten().view(dtype).view(37, 53) for t in (before, rows))
    change = BitChange.between(before, after)
    assert change is not None
    assert (None if change.where is None else change.where.dtype) == FORMS[form]
    assert torch.equal(patterns(change.turned(before)), patterns(after))
    assert torch.equal(patterns(change.turned(after)), patterns(before))
    assert torch.equal(change.entries(before) ^ change.bits, change.entries(after))
    assert change.fits(before.numel())


@pytest.mark.parametrize("size", [1, 7, 8, 9, 64, 65])
def test_sizes_that_no_byte_divides(size):
    for count in {1, size // 2 + 1, size}:
        before = torch.zeros(size)
        after = before.clone()
        after[-count:] = -0.0  # equal as numbers, other bits
        change = BitChange.between(before, after)
        assert torch.equal(patterns(change.turned(before)), patterns(after))
        assert not change.fits(size - 1)
    assert BitChange.between(before, before.clone()) is None


def test_strided_tensors():
    before, after = torch.arange(24.0).view(4, 6).T, torch.arange(24.0).view(6, 4)
    change = BitChange.between(before, after)
    assert torch.equal(change.turned(before), after)


# a whole model --------------------------------------------------------------------------------------------------------

METHODS = {
    "merge": {"weight": 0.3},
    "random": {"fraction": 0.2},
    "few": {"fraction": 0.01},
    "safe_lora": {"number": 3},
    "nothing": {"weight": 0.0},
}
NAMES = {"few": "random", "nothing": "merge"}


def restore(family, out, name, save, **more):
    method = NAMES.get(name, name)
    options = {"base": family / "base"} if method == "safe_lora" else {}
    options |= {"method": method, "save": save, **METHODS[name], **more}
    return curvkern.restore(family / "aligned", family / "tuned", out=out, **options)


@pytest.fixture
def delta(family, tmp_path):
    restore(family, tmp_path / "delta", "random", "delta")
    return tmp_path / "delta"


@pytest.mark.parametrize("name", METHODS)
def test_applied_it_is_what_a_checkpoint_would_be_and_undone_what_was_tuned(family, tmp_path, name):
    whole = restore(family, tmp_path / "whole", name, "checkpoint")
    report = restore(family, tmp_path / "delta", name, "delta")
    assert (report.saved, report.modules) == ("delta", whole.modules)
    changed = apply_delta(tmp_path / "delta", family / "tuned", tmp_path / "applied")
    assert changed == sum(m.changed > 0 for m in whole.modules)
    for file in (tmp_path / "whole").glob("*.safetensors*"):
        assert (tmp_path / "applied" / file.name).read_bytes() == file.read_bytes()
    assert json.loads((tmp_path / "applied/report.json").read_text())["method"] == whole.method
    assert undo_delta(tmp_path / "delta", tmp_path / "applied", tmp_path / "undone") == changed
    assert bits_of(tmp_path / "undone") == bits_of(family / "tuned")


def test_it_holds_what_changed_and_little_else(family, tmp_path):
    report = restore(family, tmp_path / "delta", "few", "delta")
    with safe_open(tmp_path / "delta/delta.safetensors", "pt") as file:
        for name in file.keys():  # noqa: SIM118
            assert name.endswith((".bits", ".where"))
        held = sum(file.get_tensor(name).nbytes for name in file.keys())  # noqa: SIM118
    assert held == 8 * report.changed  # float32 and int32
    record = json.loads((tmp_path / "delta/curvkern.json").read_text())
    assert record["delta"].keys() == {m.name for m in report.modules if m.changed}
    assert sorted(p.name for p in (tmp_path / "delta").iterdir()) == record["files"]


def test_the_two_commands(family, tmp_path, delta):
    app, place = CliRunner(), [str(tmp_path / name) for name in ("delta", "applied", "undone")]
    applied = app.invoke(cli, ["apply", place[0], str(family / "tuned"), "--out", place[1]])
    assert (applied.exit_code, applied.output.split(";")[0]) == (0, f"{place[1]}: restored")
    for overwrite in ([], ["--overwrite"]):
        undone = app.invoke(cli, ["undo", place[0], place[1], "--out", place[2], *overwrite])
        assert (undone.exit_code, undone.output.split(";")[0]) == (0, f"{place[2]}: as it was tuned")
    assert bits_of(tmp_path / "undone") == bits_of(family / "tuned")
    again = app.invoke(cli, ["undo", place[0], place[1], "--out", place[2]])
    assert "exists and is not empty" in str(again.exception)


def test_bfloat16_in_one_file(family, tmp_path):
    for name in ("aligned", "tuned"):
        AutoModelForCausalLM.from_pretrained(family / name).bfloat16().save_pretrained(tmp_path / name)
    for save in ("checkpoint", "delta"):
        curvkern.restore(tmp_path / "aligned", tmp_path / "tuned", method="merge", out=tmp_path / save, save=save)
    apply_delta(tmp_path / "delta", tmp_path / "tuned", tmp_path / "applied")
    undo_delta(tmp_path / "delta", tmp_path / "applied", tmp_path / "undone")
    assert bits_of(tmp_path / "applied") == bits_of(tmp_path / "checkpoint")
    assert bits_of(tmp_path / "undone") == bits_of(tmp_path / "tuned")


# wrong models ---------------------------------------------------------------------------------------------------------


def test_another_model_is_refused(family, tmp_path, delta):
    with pytest.raises(CheckpointError, match=r"aligned: not the tuned input that was recorded: tuned\.files\."):
        apply_delta(delta, family / "aligned", tmp_path / "out")
    with pytest.raises(CheckpointError, match=r"layers\.0\.\S+ is not that of the restored model which this delta"):
        undo_delta(delta, family / "tuned", tmp_path / "out")
    with pytest.raises(CheckpointError, match="a LoRA adapter, not a whole checkpoint"):
        apply_delta(delta, family / "adapter", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta"]


def test_a_model_without_its_tensors_is_refused(family, tmp_path, delta):
    lone = tmp_path / "lone"
    lone.mkdir()
    (lone / "config.json").write_text((family / "tuned/config.json").read_text())
    save_file({"lm_head.weight": torch.zeros(64, 32)}, lone / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lone: not the restored model of .*delta: it lacks .* and \d+ more"):
        undo_delta(delta, lone, tmp_path / "out")


def test_other_values_at_the_changed_entries_are_found(family, tmp_path, delta):
    """A fingerprint is a sample of a file; the entries that change are compared all."""
    restored = tmp_path / "restored"
    apply_delta(delta, family / "tuned", restored)
    with Delta.open(delta) as opened:
        name = max(opened.names)
        where = opened.weights.read(f"{name}.where")
    file = next(f for f in restored.glob("*.safetensors") if name in load_file(f))
    tensors = load_file(file)
    packed = where.dtype == torch.uint8
    flat = next(i for i in range(8 * len(where)) if where[i // 8] >> i % 8 & 1) if packed else int(where[0])
    tensors[name].flatten()[flat] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name} is not that of the restored model"):
        undo_delta(delta, restored, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_is_no_delta_is_refused(family, tmp_path):
    with pytest.raises(CheckpointError, match=r"tuned: not a delta: no delta\.safetensors"):
        apply_delta(family / "tuned", family / "tuned", tmp_path / "out")


def test_an_adapter_has_no_delta(family, tmp_path):
    with pytest.raises(RestoreError, match="cannot save a delta: the tuned model is an adapter"):
        curvkern.restore(family / "aligned", family / "adapter", method="merge", save="delta", out=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# safety of the disk ---------------------------------------------------------------------------------------------------


def test_a_failure_leaves_nothing_and_overwrite_replaces(family, tmp_path, delta, monkeypatch):
    before = bits_of_files(delta)
    with pytest.raises(CheckpointError, match="exists and is not empty"):
        restore(family, delta, "merge", "delta")
    with monkeypatch.context() as patched:
        patched.setattr("curvkern.checkpoint.stage.Stage.publish", fail)
        with pytest.raises(CheckpointError, match="the disk is full, while writing the last files"):
            restore(family, delta, "merge", "delta", overwrite=True)
    assert bits_of_files(delta) == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["delta"]
    restore(family, delta, "merge", "delta", overwrite=True)
    assert bits_of_files(delta) != before


@pytest.mark.parametrize("resume, name", [*product([False, True], ["random", "merge"])])
def test_what_a_killed_run_left_is_begun_again(family, tmp_path, delta, monkeypatch, resume, name):
    def die(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("curvkern.checkpoint.stage.Stage.publish", die)
        with pytest.raises(KeyboardInterrupt):
            restore(family, tmp_path / "again", "random", "delta", resume=True)
    assert (tmp_path / "again.partial").is_dir()
    if resume and name == "merge":
        with pytest.raises(CheckpointError, match=r"begun differently: recipe\.method"):
            restore(family, tmp_path / "again", name, "delta", resume=resume)
        return
    restore(family, tmp_path / "again", name, "delta", resume=resume)
    held = (tmp_path / "again/delta.safetensors").read_bytes()
    assert (held == (delta / "delta.safetensors").read_bytes()) == (name == "random")


def test_a_tensor_that_was_not_announced_is_refused(family, tmp_path):
    with Checkpoint.open(family / "tuned") as tuned:
        name, other = tuned.names[:2]
        with (
            pytest.raises(CheckpointError, match="was not said to change"),
            DeltaWriter(tmp_path / "out", tuned, [name]) as writer,
        ):
            writer.write(other, tuned.read(other), tuned.read(other))
        with (
            pytest.raises(CheckpointError, match=r"got torch\.float16"),
            DeltaWriter(tmp_path / "out", tuned, [name]) as writer,
        ):
            writer.write(name, tuned.read(name).half(), tuned.read(name))
    assert list(tmp_path.iterdir()) == []


def fail(*arguments):
    raise OSError(28, "No space left on device")


def bits_of_files(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir()}

"""Writing: what comes out loads and is byte for byte right; what goes wrong leaves no trace."""

from __future__ import annotations

import json
import os
import shutil
import stat
from importlib.metadata import version

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from curvkern.checkpoint import Bundle, Checkpoint, CheckpointError, Writer, open_tuned
from curvkern.checkpoint.format import DTYPES


def leftovers(out):
    return [p.name for p in out.parent.iterdir() if p.name.startswith(f"{out.name}.")]


@pytest.mark.parametrize("shard", ["20KB", "1GB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_copying_all_gives_the_same_files(save, generate, tmp_path, shard, dtype, tied):
    directory = save(shard=shard, dtype=dtype, tie_word_embeddings=tied)
    out = tmp_path / "deep" / "out"
    with Checkpoint.open(directory) as checkpoint, Writer(out, checkpoint) as writer:
        writer.copy_rest()
        writer.finish()
    for file in directory.iterdir():
        if file.name != "model.safetensors.index.json":
            assert (out / file.name).read_bytes() == file.read_bytes(), file.name
    added = {p.name for p in out.iterdir()} - {p.name for p in directory.iterdir()}
    assert added == {"curvkern.json", "README.md"}
    assert torch.equal(generate(out), generate(directory))
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert tokenizer.apply_chat_template([{"content": "w1 w2"}], tokenize=False) == "w1 w2"
    assert leftovers(out) == []


def test_edited_checkpoint_loads_and_generates(save, generate, tmp_path):
    paths = {"aligned": save("a"), "tuned": save("t", seed=1, shard="1GB")}
    with Checkpoint.open(paths["aligned"]) as aligned, Checkpoint.open(paths["tuned"]) as tuned:
        bundle = Bundle({"aligned": aligned, "tuned": tuned})
        with Writer(tmp_path / "out", tuned, recipe={"method": "merge"}, inputs=bundle.sources) as writer:
            for name, tensors in bundle:
                writer.write(name, torch.lerp(tensors["tuned"], tensors["aligned"], 0.25))
            writer.finish({"report": {"changed": 12}})
    models = {k: AutoModelForCausalLM.from_pretrained(p).state_dict() for k, p in paths.items()}
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        assert torch.equal(tensor, torch.lerp(models["tuned"][name], models["aligned"][name], 0.25))
    assert generate(tmp_path / "out").shape[1] > 3
    record = json.loads((tmp_path / "out" / "curvkern.json").read_text())
    assert record["recipe"] == {"method": "merge"}
    assert record["report"] == {"changed": 12}
    assert record["names"] == {"aligned": "a", "tuned": "t"}
    assert record["inputs"]["aligned"]["files"].keys() == set(aligned.files)
    assert record["versions"]["torch"] == version("torch")
    card = (tmp_path / "out" / "README.md").read_text()
    assert "method `merge`" in card
    assert "- aligned: `a`" in card


def test_layout_of_an_adapter_view(save, generate, tmp_path):
    base = save()
    model = AutoModelForCausalLM.from_pretrained(base)
    tuned = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload().state_dict()
    with Checkpoint.open(base) as aligned, open_tuned(tmp_path / "adapter", aligned) as view:
        with Writer(tmp_path / "out", view) as writer:
            writer.copy_rest()
            writer.finish()
        assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (base / "tokenizer.json").read_bytes()
        for path in base.glob("*token*"):
            (tmp_path / "adapter" / path.name).write_bytes(path.read_bytes() + b" ")
        assert view.side_files()["tokenizer.json"].parent == tmp_path / "adapter"
        assert view.side_files()["config.json"].parent == base
    assert sorted(p.name for p in (tmp_path / "out").glob("model-*")) == list(aligned.files)
    assert not (tmp_path / "out" / "adapter_config.json").exists()
    for name, tensor in AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict().items():
        torch.testing.assert_close(tensor, merged[name], rtol=0, atol=1e-7)
    assert generate(tmp_path / "out").shape[1] > 3


def test_pickled_input_becomes_safetensors(save, generate, tmp_path):
    directory = save()
    state = {k: v for f in directory.glob("*.safetensors") for k, v in load_file(f).items()}
    legacy = tmp_path / "legacy"
    shutil.copytree(directory, legacy, ignore=shutil.ignore_patterns("model*"))
    halves = [list(state)[:10], list(state)[10:]]
    files = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    for names, file in zip(halves, files, strict=True):
        torch.save({n: state[n] for n in names}, legacy / file)
    weight_map = {n: f for names, f in zip(halves, files, strict=True) for n in names}
    (legacy / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = Checkpoint.open(legacy, allow_pickle=True)
    with checkpoint, Writer(tmp_path / "out", checkpoint) as writer:
        writer.copy_rest()
        writer.finish()
    assert (tmp_path / "out" / "model-00001-of-00002.safetensors").exists()
    assert not list((tmp_path / "out").glob("*.bin*"))
    with safe_open(tmp_path / "out" / "model-00001-of-00002.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    assert torch.equal(generate(tmp_path / "out"), generate(directory))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_another_dtype(save, generate, tmp_path, dtype):
    directory = save()
    with Checkpoint.open(directory) as checkpoint:
        with Writer(tmp_path / "out", checkpoint, dtype=dtype) as writer:
            name = writer.names[0]
            assert writer.spec(name).dtype == dtype
            writer.write(name, checkpoint.read(name).to(dtype))
            writer.copy_rest()
            writer.finish()
        with Checkpoint.open(tmp_path / "out") as written:
            for name in written.names:
                assert torch.equal(written.read(name), checkpoint.read(name).to(dtype))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.dtype == dtype
    assert generate(tmp_path / "out").shape[1] > 3


def test_any_order_any_memory_layout(source, tmp_path):
    with Writer(tmp_path / "out", source) as writer:
        for name in reversed(writer.names):
            tensor = source.read(name)
            strided = torch.stack([tensor, tensor], -1)[..., 0].requires_grad_()
            writer.write(name, strided)
        writer.finish()
    for file in source.files:
        assert (tmp_path / "out" / file).read_bytes() == (source.path / file).read_bytes()


def test_every_dtype_and_odd_shapes(tmp_path):
    shapes = [(), (0,), (3, 0, 2), (1,), (2, 3, 5)]
    tensors = {
        f"{code}{shape}": torch.full((*shape, dtype.itemsize), 1, dtype=torch.uint8).view(dtype).reshape(shape)
        for code, dtype in DTYPES.items()
        for shape in shapes
    }
    save_file(tensors, tmp_path / "odd.safetensors", {"format": "pt", "note": "é"})
    checkpoint = Checkpoint.open(tmp_path / "odd.safetensors")
    with checkpoint, Writer(tmp_path / "out", checkpoint) as writer:
        for i, name in enumerate(writer.names):
            if i % 2:
                writer.copy(name)
            else:
                writer.write(name, tensors[name])
        writer.finish()
    wanted = (tmp_path / "odd.safetensors").read_bytes()
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == wanted


def test_safetensors_accepts_each_file(source, tmp_path):
    with Writer(tmp_path / "out", source) as writer:
        writer.copy_rest()
        writer.finish()
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == source.nbytes
    for file in source.files:
        with safe_open(tmp_path / "out" / file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert {n for n, f in index["weight_map"].items() if f == file} == set(opened.keys())


@pytest.mark.parametrize(
    "mask, files, directories", [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700), (0o002, 0o664, 0o775)]
)
def test_modes_follow_the_umask(source, tmp_path, mask, files, directories):
    (source.path / "config.json").chmod(0o600)
    before = os.umask(mask)
    try:
        with Writer(tmp_path / "out", source) as writer:
            writer.copy_rest()
            writer.finish()
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "out").stat().st_mode) == directories
    assert {stat.S_IMODE(p.stat().st_mode) for p in (tmp_path / "out").iterdir()} == {files}


def test_only_what_belongs_is_copied(save, tmp_path):
    directory = save()
    extra = ("LICENSE", "generation_config.json", "modeling_tiny.py", "tokenizer.model", "merges.txt")
    other = ("pytorch_model.bin", "optimizer.pt", "trainer_state.json", "tokenizer.safetensors", "notes.txt",
             "README.md", "curvkern.json", "adapter_config.json", "training_args.bin")  # fmt: skip
    for name in (*extra, *other):
        (directory / name).write_text("{}")
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool.jinja").write_text("t")
    with Checkpoint.open(directory) as checkpoint, Writer(tmp_path / "out", checkpoint) as writer:
        writer.copy_rest()
        writer.finish()
    written = {p.relative_to(tmp_path / "out").as_posix() for p in (tmp_path / "out").rglob("*")}
    assert {*extra, "additional_chat_templates/tool.jinja", "chat_template.jinja"} <= written
    assert not written & (set(other) - {"README.md", "curvkern.json"})
    assert (tmp_path / "out" / "README.md").read_text() != "{}"


@pytest.mark.parametrize(
    "act, message",
    [
        (lambda w: w.write(w.names[0], torch.zeros(3)), r"got torch.float32 \[3\], wanted torch.float32 \[64, 32\]"),
        (lambda w: w.write(w.names[0], torch.zeros(64, 32).half()), "got torch.float16"),
        (lambda w: w.write("ghost", torch.zeros(3)), "no tensor ghost in the layout"),
        (lambda w: w.copy("ghost"), "no tensor ghost in the layout"),
        (lambda w: [w.copy(w.names[0]), w.copy(w.names[0])], "is written already"),
        (lambda w: w.finish(), "not written: model.embed_tokens.weight, .* and 13 more"),
        (lambda w: [w.copy_rest(), w.finish({"recipe": {}})], "recipe is taken"),
        (lambda w: [w.copy_rest(), w.finish({"notes": {}})], "notes is taken"),
        (lambda w: [w.copy_rest(), w.finish(extra_files={"config.json": "{}"})], "wanted a plain name that no other"),
        (lambda w: [w.copy_rest(), w.finish(extra_files={"../report.json": "{}"})], "wanted a plain name"),
        (lambda w: [w.copy_rest(), w.finish({"report": object()})], "not JSON"),
        (lambda w: None, "left before finish"),
    ],
)
def test_misuse_leaves_nothing(source, tmp_path, act, message):
    out = tmp_path / "out"
    with pytest.raises(CheckpointError, match=message), Writer(out, source) as writer:
        act(writer)
    assert not out.exists()
    assert leftovers(out) == []


def test_a_recipe_is_json(source, tmp_path):
    with pytest.raises(CheckpointError, match="not JSON"):
        Writer(tmp_path / "out", source, recipe={"f": object()})
    assert leftovers(tmp_path / "out") == []


def test_figures_that_are_not_finite_become_null(source, tmp_path):
    recipe = {"x": float("nan"), "deep": [{"y": (1.5, float("-inf"))}]}
    with Writer(tmp_path / "out", source, recipe=recipe) as writer:
        writer.copy_rest()
        writer.finish({"loss": float("inf"), "gain": 0.1})
    record = json.loads((tmp_path / "out/curvkern.json").read_text())
    assert record["recipe"] == {"x": None, "deep": [{"y": [1.5, None]}]}
    assert (record["loss"], record["gain"]) == (None, 0.1)


def test_extra_files_appear_with_the_output(source, tmp_path, monkeypatch):
    rename, present = type(tmp_path).rename, []

    def renamed(self, target):
        present.extend(p.name for p in self.iterdir())
        return rename(self, target)

    monkeypatch.setattr(type(tmp_path), "rename", renamed)
    with Writer(tmp_path / "out", source) as writer:
        writer.copy_rest()
        writer.finish(extra_files={"report.html": "<p>\u00e9</p>", "plot.png": b"\x89"})
    assert {"report.html", "plot.png", "curvkern.json"} <= set(present)
    assert (tmp_path / "out/report.html").read_bytes() == "<p>\u00e9</p>".encode()
    assert (tmp_path / "out/plot.png").read_bytes() == b"\x89"
    record = json.loads((tmp_path / "out/curvkern.json").read_text())
    assert record["files"] == sorted(p.name for p in (tmp_path / "out").iterdir())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_leaves_nothing(source, tmp_path, error):
    before = len(os.listdir("/proc/self/fd"))

    def fail_midway(writer):
        writer.copy(writer.names[0])
        assert leftovers(tmp_path / "out") == ["out.partial"]
        raise error

    with pytest.raises(error), Writer(tmp_path / "out", source) as writer:
        fail_midway(writer)
    assert not (tmp_path / "out").exists()
    assert leftovers(tmp_path / "out") == []
    assert len(os.listdir("/proc/self/fd")) == before


def test_code_of_the_model_travels(save, tmp_path):
    directory = save()
    for name in ("modeling_mine.py", "helpers.py", "tokenizer.model"):
        (directory / name).write_text("x")
    with Checkpoint.open(directory) as source, Writer(tmp_path / "out", source) as writer:
        writer.copy_rest()
        writer.finish()
    assert all((tmp_path / "out" / name).is_file() for name in ("modeling_mine.py", "helpers.py", "tokenizer.model"))


def test_side_by_side_file_without_directory_of_its_own(source, tmp_path):
    file = tmp_path / "weights.safetensors"
    shutil.copy(source.path / source.files[0], file)
    with Checkpoint.open(file) as single, Writer(tmp_path / "out", single) as writer:
        writer.copy_rest()
        writer.finish()
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.safetensors", "curvkern.json", "README.md"}
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == file.read_bytes()

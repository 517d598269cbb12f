"""Opening and reading: every layout users have, and every broken one."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from curvkern.checkpoint import Checkpoint, CheckpointError
from curvkern.checkpoint.format import DTYPES

TINY = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}


def expected(directory):
    return {k: v for f in sorted(directory.glob("*.safetensors")) for k, v in load_file(f).items()}


def refusal(path, **options):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path, **options)
    return str(caught.value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard", ["20KB", "1GB"])
def test_reads_what_transformers_wrote(save, dtype, shard):
    directory = save(dtype=dtype, shard=shard)
    wanted = expected(directory)
    with Checkpoint.open(directory) as checkpoint:
        assert set(checkpoint.names) == set(wanted)
        assert checkpoint.files == tuple(sorted(f.name for f in directory.glob("*.safetensors")))
        assert (len(checkpoint.files) > 1) == (shard == "20KB")
        for name in checkpoint.names:
            spec, tensor = checkpoint.spec(name), checkpoint.read(name)
            assert (spec.dtype, spec.shape) == (dtype, tuple(wanted[name].shape))
            assert spec.numel * dtype.itemsize == spec.nbytes
            assert torch.equal(tensor, wanted[name])
            assert b"".join(map(bytes, checkpoint.blocks(name))) == tensor.view(torch.uint8).numpy().tobytes()
            raw = (directory / spec.file).read_bytes()[spec.offset : spec.offset + spec.nbytes]
            assert raw == tensor.view(torch.uint8).numpy().tobytes()
        assert checkpoint.config["model_type"] == "llama"
        assert checkpoint.nbytes == sum(t.nbytes for t in wanted.values())


@pytest.mark.parametrize(
    "model",
    [
        lambda: GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16)),
        lambda: MixtralForCausalLM(
            MixtralConfig(**TINY, num_attention_heads=4, num_key_value_heads=2, num_local_experts=4)
        ),
    ],
    ids=["gpt2", "mixtral"],
)
def test_other_architectures(save, model):
    directory = save(model=model())
    wanted = expected(directory)
    with Checkpoint.open(directory) as checkpoint:
        assert set(checkpoint.names) == set(wanted)
        assert all(torch.equal(checkpoint.read(n), wanted[n]) for n in wanted)


def test_names_are_in_file_order(save):
    with Checkpoint.open(save()) as checkpoint:
        places = [(checkpoint.spec(n).file, checkpoint.spec(n).offset) for n in checkpoint.names]
    assert places == sorted(places)
    assert len({file for file, _ in places}) == 5


def test_a_read_is_fresh(save):
    with Checkpoint.open(save()) as checkpoint:
        name = checkpoint.names[0]
        checkpoint.read(name).zero_()
        assert checkpoint.read(name).any()


def test_every_dtype_and_odd_shapes(tmp_path):
    shapes = [(), (0,), (3, 0, 2), (1,), (2, 3, 5)]
    tensors = {
        f"{code}{shape}": torch.randint(0, 2, (*shape, dtype.itemsize), dtype=torch.uint8).view(dtype).reshape(shape)
        for code, dtype in DTYPES.items()
        for shape in shapes
    }
    save_file(tensors, tmp_path / "odd.safetensors")
    with Checkpoint.open(tmp_path / "odd.safetensors") as checkpoint:
        assert set(checkpoint.names) == set(tensors)
        for name, tensor in tensors.items():
            read = checkpoint.read(name)
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert read.flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8))


def test_large_tensor_and_blocks(tmp_path):
    tensor = torch.arange(9 << 20, dtype=torch.int32)  # 36 MiB: above the huge-page limit
    save_file({"t": tensor}, tmp_path / "large.safetensors")
    with Checkpoint.open(tmp_path / "large.safetensors") as checkpoint:
        assert torch.equal(checkpoint.read("t"), tensor)
        sizes = [len(block) for block in checkpoint.blocks("t")]
    assert sizes == [8 << 20] * 4 + [4 << 20]


def test_hub_cache_snapshot(save, tmp_path, monkeypatch):
    source = save()
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / "c0ffee"
    for directory in (repository / "blobs", repository / "refs", snapshot):
        directory.mkdir(parents=True)
    for i, file in enumerate(sorted(source.iterdir())):
        shutil.copy(file, repository / "blobs" / f"{i:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i:040x}")
    (repository / "refs" / "main").write_text("c0ffee")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    wanted = expected(source)
    for path in (snapshot, "org/tiny", "org/tiny@main"):
        with Checkpoint.open(path) as checkpoint:
            assert all(torch.equal(checkpoint.read(n), wanted[n]) for n in wanted)
    assert "hf download org/absent" in refusal("org/absent")
    assert "hf download org/tiny" in refusal("org/tiny@other")
    (repository / "blobs" / f"{5:040x}").unlink()
    assert "No such file" in refusal("org/tiny")


def test_pickled_weights(save, tmp_path):
    state = expected(save())
    directory = tmp_path / "pickled"
    directory.mkdir()
    state["transposed"] = state["lm_head.weight"].T
    torch.save(state, directory / "pytorch_model.bin")
    assert "only pickled weights (.bin), which are not read. Convert them" in refusal(directory)
    assert "only pickled weights (.bin), which are not read. Convert them" in refusal(directory / "pytorch_model.bin")
    with Checkpoint.open(directory, allow_pickle=True) as checkpoint:
        assert set(checkpoint.names) == set(state)
        for name, tensor in state.items():
            assert torch.equal(checkpoint.read(name), tensor)
            assert checkpoint.read(name).is_contiguous()
            assert b"".join(map(bytes, checkpoint.blocks(name))) == tensor.contiguous().numpy().tobytes()
        assert checkpoint.fingerprint()["files"]["pytorch_model.bin"]["bytes"] > 0


class Harmful:
    def __reduce__(self):
        return (os.system, ("true",))


@pytest.mark.parametrize(
    "saved, message",
    [
        (lambda path: torch.save({"w": Harmful()}, path), "not a pickle of plain tensors"),
        (lambda path: path.write_bytes(pickle.dumps({"w": 1})), "not a pickle of plain tensors"),
        (lambda path: torch.save([torch.ones(1)], path), "holds a list, not a table"),
        (lambda path: torch.save({"w": {"v": torch.ones(1)}}, path), "entry 'w' is a dict"),
        (lambda path: path.write_bytes(b""), "not a pickle of plain tensors"),
    ],
    ids=["code", "plain pickle", "list", "nested", "empty"],
)
def test_refuses_pickles(tmp_path, saved, message):
    saved(tmp_path / "pytorch_model.bin")
    assert message in refusal(tmp_path, allow_pickle=True)


def entry(begin, end):
    return {"dtype": "U8", "shape": [end - begin], "data_offsets": [begin, end]}


BROKEN = {
    "overlap": ({"a": entry(0, 4), "b": entry(2, 6)}, bytes(6)),
    "hole": ({"a": entry(0, 4), "b": entry(6, 8)}, bytes(8)),
    "starts late": ({"a": entry(2, 6)}, bytes(6)),
    "truncated": ({"a": entry(0, 8)}, bytes(5)),
    "trailing bytes": ({"a": entry(0, 4)}, bytes(9)),
    "shape and size differ": ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 4]}}, bytes(4)),
    "backwards": ({"a": {"dtype": "U8", "shape": [0], "data_offsets": [4, 0]}}, bytes(4)),
    "negative": ({"a": {"dtype": "U8", "shape": [-4], "data_offsets": [0, 4]}}, bytes(4)),
    "overflow": ({"a": {"dtype": "U8", "shape": [2**63, 4], "data_offsets": [0, 4]}}, bytes(4)),
    "unknown dtype": ({"a": {"dtype": "X9", "shape": [4], "data_offsets": [0, 4]}}, bytes(4)),
    "not JSON": (b"{'a': 1}", b""),
    "not an object": (b"[1, 2]", b""),
    "not UTF-8": (b'{"\xff\xfe": 1}', b""),
}


@pytest.mark.parametrize("case", BROKEN)
def test_refuses_broken_safetensors_as_safe_open_does(raw_file, case):
    path = raw_file(*BROKEN[case])
    with pytest.raises(SafetensorError):
        safe_open(path, "np").__enter__()
    assert f"{path}: not a valid safetensors file" in refusal(path)
    assert f"{path}: not a valid safetensors file" in refusal(path.parent)


@pytest.mark.parametrize("content", [b"", b"\x00" * 7, struct.pack("<Q", 200_000_000) + b"{" * 64])
def test_refuses_no_header_and_a_huge_one(tmp_path, content):
    (tmp_path / "model.safetensors").write_bytes(content)
    assert "not a valid safetensors file" in refusal(tmp_path)


def test_refuses_dtypes_torch_lacks(raw_file):
    path = raw_file({"a": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}}, bytes(4))
    assert "dtype F4 is not supported" in refusal(path)


def test_refuses_empty_and_absent(raw_file, tmp_path):
    assert "holds no tensors" in refusal(raw_file({}, b""))
    assert "no such file or directory" in refusal(tmp_path / "absent")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "todo.txt").write_text("")
    assert "no model.safetensors and no index of shards; holds todo.txt" in refusal(tmp_path / "notes")
    (tmp_path / "notes" / "adapter_config.json").write_text("{}")
    assert "a LoRA adapter, not a whole checkpoint" in refusal(tmp_path / "notes")


def test_refuses_a_fifo(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    assert "not a regular file" in refusal(tmp_path)


@pytest.mark.parametrize(
    "entry_name", ["../model.safetensors", "/etc/model.safetensors", "a/b.safetensors", "..", "a\\b.safetensors",
                   ".hidden.safetensors", "", 7, None, "weights.bin", "x\0.safetensors"]
)  # fmt: skip
def test_refuses_index_entries_that_are_not_plain_names(save, entry_name):
    directory = save()
    index = directory / "model.safetensors.index.json"
    changed = json.loads(index.read_text())
    changed["weight_map"]["lm_head.weight"] = entry_name
    index.write_text(json.dumps(changed))
    assert f"lm_head.weight is said to be in {entry_name!r}; wanted the plain name" in refusal(directory)


def test_index_and_headers_must_agree(save):
    directory = save()
    index = directory / "model.safetensors.index.json"
    original = json.loads(index.read_text())

    def with_map(change):
        changed = json.loads(json.dumps(original))
        change(changed["weight_map"])
        index.write_text(json.dumps(changed))
        return refusal(directory)

    assert "lists tensors their files lack: ghost" in with_map(lambda m: m.update(ghost=m["lm_head.weight"]))
    assert "misses tensors of its files: model.norm.weight" in with_map(lambda m: m.pop("model.norm.weight"))
    assert "lists tensors their files lack: lm_head.weight" in with_map(
        lambda m: m.update({"lm_head.weight": m["model.embed_tokens.weight"]})
    )
    assert "No such file" in with_map(lambda m: m.update(ghost="absent.safetensors"))
    index.write_text("{broken")
    assert "cannot read as JSON" in refusal(directory)
    index.write_text("{}")
    assert "no weight_map" in refusal(directory)
    index.write_text("[" * 100_000)
    assert "cannot read as JSON" in refusal(directory)


def test_a_tensor_in_two_shards(save):
    directory = save()
    first = directory / "model-00001-of-00005.safetensors"
    save_file(load_file(first) | {"lm_head.weight": torch.zeros(1)}, first)
    assert "lm_head.weight is in both" in refusal(directory)


def test_config_must_be_an_object(save):
    directory = save()
    (directory / "config.json").write_text("[]")
    assert "config.json: holds a list" in refusal(directory)


def test_errors_while_reading(save):
    directory = save()
    with Checkpoint.open(directory) as checkpoint:
        with pytest.raises(CheckpointError, match=r"no tensor model.ghost"):
            checkpoint.read("model.ghost")
        name = checkpoint.names[-1]
        file = directory / checkpoint.spec(name).file
        os.truncate(file, file.stat().st_size - 1)
        with pytest.raises(CheckpointError, match="was cut short while it was read: ends at byte"):
            checkpoint.read(name)
    with pytest.raises(CheckpointError, match="was closed before this read"):
        checkpoint.read(checkpoint.names[0])


def test_failed_open_leaks_no_descriptor(save):
    directory = save()
    os.truncate(directory / "model-00005-of-00005.safetensors", 100)
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        refusal(directory)
    assert len(os.listdir("/proc/self/fd")) == before


def test_fingerprint_tells_fine_tunes_apart(save, tmp_path):
    first, second = save("a"), save("b", seed=1)
    shutil.copytree(first, tmp_path / "copy")
    prints = []
    for path in (first, second, tmp_path / "copy"):
        with Checkpoint.open(path) as checkpoint:
            prints.append(checkpoint.fingerprint())
    assert prints[0] == prints[2] != prints[1]
    assert prints[0]["files"].keys() == prints[1]["files"].keys()
    json.dumps(prints)


@pytest.mark.gpu
def test_reads_to_the_device(save):
    directory = save()
    with Checkpoint.open(directory) as checkpoint:
        for name in checkpoint.names:
            assert torch.equal(checkpoint.read(name, "cuda").cpu(), checkpoint.read(name))

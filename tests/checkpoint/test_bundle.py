"""Several checkpoints at once: what is refused, what is tolerated, and the memory bound."""

from __future__ import annotations

import json
import threading
import time
import weakref

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from curvkern.checkpoint import Bundle, Checkpoint, CheckpointError, open_tuned


@pytest.fixture
def bundle_of():
    opened = []

    def make(**options):
        settings = {k: v for k, v in options.items() if k in ("max_bytes", "check_vocabulary")}
        sources = {k: Checkpoint.open(v) for k, v in options.items() if k not in settings}
        opened.extend(sources.values())
        return Bundle(sources, **settings)

    yield make
    for checkpoint in opened:
        checkpoint.close()


def refusal(bundle_of, **paths):
    with pytest.raises(CheckpointError) as caught:
        bundle_of(**paths)
    return str(caught.value)


def rewrite(directory, change):
    """Edit the tensors of a one-file checkpoint."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})


def edit_config(directory, **changes):
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_the_same_tensor_of_all(save, bundle_of):
    paths = {"aligned": save("a"), "tuned": save("t", seed=1, shard="9KB"), "base": save("b", seed=2, shard="1GB")}
    bundle = bundle_of(**paths)
    wanted = {r: {k: v for f in p.glob("*.safetensors") for k, v in load_file(f).items()} for r, p in paths.items()}
    walked = list(bundle)
    assert [name for name, _ in walked] == list(bundle.names) == list(bundle.sources["tuned"].names)
    assert len(bundle) == len(wanted["base"])
    for name, tensors in walked:
        assert tensors.keys() == paths.keys()
        assert all(torch.equal(tensors[role], wanted[role][name]) for role in paths)
        assert bundle.nbytes(name) == sum(t.nbytes for t in tensors.values())
    one = bundle.read("lm_head.weight")
    assert torch.equal(one["base"], wanted["base"]["lm_head.weight"])
    some = [name for name, _ in bundle.stream(bundle.names[3:1:-1])]
    assert some == list(bundle.names[3:1:-1])


def test_dtypes_may_differ(save, bundle_of):
    bundle = bundle_of(aligned=save("a", dtype=torch.bfloat16), tuned=save("t", dtype=torch.float32))
    _, tensors = next(iter(bundle))
    assert (tensors["aligned"].dtype, tensors["tuned"].dtype) == (torch.bfloat16, torch.float32)


def test_an_adapter_as_tuned(save, tmp_path):
    base = save()
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False),
    )
    model.save_pretrained(tmp_path / "adapter")
    with Checkpoint.open(base) as aligned, open_tuned(tmp_path / "adapter", aligned) as tuned:
        changed = {
            name
            for name, tensors in Bundle({"aligned": aligned, "tuned": tuned})
            if not torch.equal(tensors["aligned"], tensors["tuned"])
        }
        assert changed == set(tuned.adapter.names)


@pytest.mark.parametrize("max_bytes", [1, 10_000, 1 << 30])
def test_any_bound_gives_everything(save, bundle_of, max_bytes):
    bundle = bundle_of(aligned=save("a"), tuned=save("t"), max_bytes=max_bytes)
    assert [name for name, _ in bundle] == list(bundle.names)


def test_reads_ahead_but_only_so_far(save, bundle_of, monkeypatch):
    bundle = bundle_of(aligned=save("a"), tuned=save("t"), max_bytes=40_000)
    sizes = {name: bundle.nbytes(name) for name in bundle.names}
    read, most = [], 0
    plain = Bundle.read
    monkeypatch.setattr(Bundle, "read", lambda self, name: read.append(name) or plain(self, name))
    for i, (_, _tensors) in enumerate(bundle):
        time.sleep(0.01)
        ahead = sum(sizes[name] for name in read[i:])
        assert ahead <= 40_000
        most = max(most, ahead)
    assert most > max(sizes.values())
    assert len(read) == len(bundle)


def test_a_tensor_larger_than_the_bound_passes_alone(save, bundle_of, monkeypatch):
    bundle = bundle_of(aligned=save("a"), max_bytes=100)
    read = []
    plain = Bundle.read
    monkeypatch.setattr(Bundle, "read", lambda self, name: read.append(name) or plain(self, name))
    for i, (name, _) in enumerate(bundle):
        time.sleep(0.002)
        if bundle.nbytes(name) > 100:
            assert len(read) == i + 1


def test_a_set_is_gone_before_the_next_is_read(save, bundle_of, monkeypatch):
    bundle = bundle_of(aligned=save("a"), max_bytes=1)
    last, kept = [], []
    plain = Bundle.read

    def read(self, name):
        kept.append(any(reference() is not None for reference in last))
        tensors = plain(self, name)
        last[:] = map(weakref.ref, tensors.values())
        return tensors

    monkeypatch.setattr(Bundle, "read", read)
    for _, tensors in bundle:
        del tensors
    assert kept == [False] * len(bundle)


def test_breaking_off_ends_the_thread(save, bundle_of):
    before = threading.active_count()
    stream = iter(bundle_of(aligned=save("a"), max_bytes=1))
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before


def test_a_failed_read_reaches_the_loop(save, bundle_of, monkeypatch):
    bundle = bundle_of(aligned=save("a"))
    plain = Bundle.read

    def read(self, name):
        if name == self.names[4]:
            raise CheckpointError("bad sector")
        return plain(self, name)

    monkeypatch.setattr(Bundle, "read", read)
    seen = []
    with pytest.raises(CheckpointError, match="bad sector"):
        seen.extend(name for name, _ in bundle)
    assert seen == list(bundle.names[:4])


def test_missing_and_extra_tensors(save, bundle_of):
    aligned, tuned = save("a", shard="1GB"), save("t", shard="1GB")
    rewrite(tuned, lambda t: t.pop("model.norm.weight"))
    rewrite(tuned, lambda t: t.update(extra=torch.zeros(1)))
    message = refusal(bundle_of, aligned=aligned, tuned=tuned)
    assert "tuned lacks, and aligned has: model.norm.weight" in message
    assert "aligned lacks, and tuned has: extra" in message


def test_long_lists_are_cut(save, bundle_of):
    aligned, tuned = save("a", shard="1GB"), save("t", shard="1GB")
    rewrite(tuned, lambda t: [t.pop(k) for k in list(t) if "layers.1" in k])
    assert "and 1 more" in refusal(bundle_of, aligned=aligned, tuned=tuned)


def test_shapes_and_vocabularies(save, bundle_of, llama, tokenizer):
    aligned = save("a")
    wide = save("t", model=llama(intermediate_size=40))
    message = refusal(bundle_of, aligned=aligned, tuned=wide)
    assert "model.layers.0.mlp.down_proj.weight: aligned [32, 48], tuned [32, 40]" in message
    grown = save("g", model=llama(vocab_size=65))
    message = refusal(bundle_of, aligned=aligned, tuned=grown)
    assert "model.embed_tokens.weight: aligned [64, 32], tuned [65, 32] (the vocabularies differ in size)" in message


def test_architectures(save, bundle_of):
    gpt2 = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))
    message = refusal(bundle_of, aligned=save("a"), tuned=save("t", model=gpt2))
    assert message == "config.json: model_type differs: aligned llama, tuned gpt2"
    other = save("o")
    edit_config(other, num_attention_heads=8)
    message = refusal(bundle_of, aligned=save("b"), tuned=other)
    assert message == "config.json: num_attention_heads differs: aligned 4, tuned 8"


def test_token_ids(save, bundle_of, tokenizer):
    words = [f"w{i}" for i in range(62)]
    aligned = save("a", tokenizer=tokenizer(words))
    swapped = save("s", tokenizer=tokenizer([words[1], words[0], *words[2:]]))
    message = refusal(bundle_of, aligned=aligned, tuned=swapped)
    assert "the vocabularies differ: aligned has 'w0' as id 2, tuned has it as id 3" in message
    assert len(bundle_of(aligned=aligned, tuned=swapped, check_vocabulary=False)) > 0
    renamed = save("r", tokenizer=tokenizer([*words[:-1], "other"]))
    assert "aligned has 'w61' as id 63, tuned has 'other' there" in refusal(bundle_of, aligned=aligned, tuned=renamed)
    # A token more, in a row that the other side leaves unused, is no contradiction.
    shorter = save("f", tokenizer=tokenizer(words[:-1]))
    assert len(bundle_of(aligned=shorter, tuned=aligned)) > 0
    assert len(bundle_of(aligned=aligned, tuned=shorter)) > 0


@pytest.mark.parametrize("content", ["{", "[]", '{"model": {}}', '{"model": {"vocab": 3}, "added_tokens": []}'])
def test_broken_tokenizer(save, bundle_of, content):
    aligned, tuned = save("a"), save("t")
    (tuned / "tokenizer.json").write_text(content)
    assert "tokenizer.json: not a tokenizer file" in refusal(bundle_of, aligned=aligned, tuned=tuned)


def test_unigram_vocabulary(save, bundle_of):
    aligned, tuned = save("a"), save("t")
    for path, pieces in ((aligned, ["a", "b"]), (tuned, ["b", "a"])):
        table = {"model": {"vocab": [[p, -1.0] for p in pieces]}, "added_tokens": []}
        (path / "tokenizer.json").write_text(json.dumps(table))
    assert "aligned has 'a' as id 0" in refusal(bundle_of, aligned=aligned, tuned=tuned)


def test_quantised(save, bundle_of):
    aligned, tuned = save("a", shard="1GB"), save("t", shard="1GB")
    edit_config(tuned, quantization_config={"quant_method": "gptq"})
    assert "tuned (" in (message := refusal(bundle_of, aligned=aligned, tuned=tuned))
    assert "is quantised (gptq)" in message
    edit_config(tuned, quantization_config=None)
    for dtype in (torch.int8, torch.float8_e4m3fn):
        rewrite(tuned, lambda t, d=dtype: t.update({"model.norm.weight": torch.zeros(32).to(d)}))
        message = refusal(bundle_of, aligned=aligned, tuned=tuned)
        assert f"model.norm.weight in tuned ({tuned}) is {dtype}" in message


def test_a_head_that_one_side_ties(save, bundle_of):
    aligned = save("a", tie_word_embeddings=True, shard="1GB")
    tuned = save("t", tie_word_embeddings=True, shard="1GB")
    rewrite(tuned, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    for bundle in (bundle_of(aligned=aligned, tuned=tuned), bundle_of(aligned=tuned, tuned=aligned)):
        assert "lm_head.weight" not in bundle.names
        assert "tied to the embedding in" in bundle.skipped["lm_head.weight"]
    edit_config(aligned, tie_word_embeddings=False)
    assert "aligned lacks, and tuned has: lm_head.weight" in refusal(bundle_of, aligned=aligned, tuned=tuned)


def test_buffers_are_left_out(save, bundle_of):
    aligned, tuned = save("a", shard="1GB"), save("t", shard="1GB")
    buffers = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "h.0.attn.bias": torch.ones(1, 1, 4, 4, dtype=torch.bool),
        "embeddings.position_ids": torch.arange(4),
    }
    rewrite(aligned, lambda t: t.update(buffers))
    bundle = bundle_of(aligned=aligned, tuned=tuned)
    assert set(bundle.skipped) == set(buffers)
    assert set(bundle.names) == set(bundle.sources["tuned"].names)
    rewrite(aligned, lambda t: t.update({"h.0.attn.bias": torch.ones(4)}))
    assert "tuned lacks, and aligned has: h.0.attn.bias" in refusal(bundle_of, aligned=aligned, tuned=tuned)


def test_needs_a_checkpoint():
    with pytest.raises(CheckpointError, match="at least one checkpoint"):
        Bundle({})

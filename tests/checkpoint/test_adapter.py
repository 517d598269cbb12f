"""LoRA adapters: the same weights as PEFT's own merge, and a refusal by name of all else."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from curvkern.checkpoint import Adapter, AdapterWriter, Checkpoint, CheckpointError, open_tuned

TARGETS = ["q_proj", "k_proj", "down_proj"]


@pytest.fixture
def adapt(tmp_path):
    """Put a LoRA adapter with random factors on a saved model, save it, and return its directory."""

    def make(base, name="adapter", **settings):
        model = AutoModelForCausalLM.from_pretrained(base)
        settings = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, **settings}
        tuned = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **settings))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for key, parameter in tuned.named_parameters():
                if "lora_" in key or "modules_to_save" in key:
                    parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        tuned.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def merged_by_peft(base, adapter, dtype=torch.float64):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    return PeftModel.from_pretrained(model, adapter).merge_and_unload().state_dict()


def edit(directory, **changes):
    path = directory / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def gpt2():
    return GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64, n_positions=16))


FORMS = {
    "plain": {},
    "rank-stabilised": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"q_proj": 2, "layers.1.mlp.down_proj": 3},
        "alpha_pattern": {"down_proj": 5, r".*\.0\..*k_proj": 16},
    },
    "first pattern wins": {"alpha_pattern": {"layers.0.self_attn.k_proj": 3, "k_proj": 7}},
    "rank-stabilised patterns": {"use_rslora": True, "rank_pattern": {"k_proj": 1}},
    "embedding": {"target_modules": [*TARGETS, "embed_tokens"]},
    "head": {"target_modules": ["lm_head", "q_proj"]},
    "whole modules": {"modules_to_save": ["lm_head", "embed_tokens"]},
    "some layers": {"layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
}


@pytest.mark.parametrize("form", FORMS)
def test_equals_pefts_merge(save, adapt, form):
    base = save()
    directory = adapt(base, **FORMS[form])
    exact = merged_by_peft(base, directory)
    reference = merged_by_peft(base, directory, torch.float32)
    with Checkpoint.open(base) as aligned, open_tuned(directory, aligned) as tuned:
        assert set(tuned.adapter.names) | set(tuned.adapter.replaced) >= {
            n for n in aligned.names if not torch.equal(aligned.read(n).double(), exact[n])
        }
        assert tuned.adapter.names or tuned.adapter.replaced
        for name in tuned.names:
            read = tuned.read(name)
            assert read.dtype == torch.float32
            error = (read - exact[name]).abs().max()
            assert error <= 2 * (reference[name] - exact[name]).abs().max() + 1e-8
            raw = b"".join(map(bytes, tuned.blocks(name)))
            assert raw == read.numpy().tobytes()


def test_fan_in_fan_out(save, adapt):
    base = save(model=gpt2())
    directory = adapt(base, target_modules=["c_attn", "c_proj"])
    exact = merged_by_peft(base, directory)
    with Checkpoint.open(base) as aligned, open_tuned(directory, aligned) as tuned:
        name = next(n for n in tuned.adapter.names if n.endswith("c_attn.weight"))
        factors = tuned.adapter.factors(name)
        assert (factors.B.shape, factors.A.shape, factors.scale) == ((32, 4), (4, 96), 2.0)
        for name in tuned.adapter.names:
            key = name if name in exact else f"transformer.{name}"
            torch.testing.assert_close(tuned.read(name).double(), exact[key], rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_rounding_to_the_aligned_dtype(save, adapt, dtype):
    base = save(dtype=dtype)
    directory = adapt(base)
    with Checkpoint.open(base) as aligned, open_tuned(directory, aligned) as tuned:
        for name in tuned.adapter.names:
            factors = tuned.adapter.factors(name)
            wide = aligned.read(name).double()
            wide += factors.scale * factors.B.double() @ factors.A.double()
            read = tuned.read(name)
            assert read.dtype == dtype
            # Half a unit in the last place, but for a float32 sum that falls on the other side.
            spacing = torch.finfo(dtype).eps * wide.abs()
            assert ((read.double() - wide).abs() <= 0.5001 * spacing + 1e-7).all()


def test_blocks_of_rows_change_nothing(save, adapt, monkeypatch):
    base = save()
    directory = adapt(base)
    with Checkpoint.open(base) as aligned, open_tuned(directory, aligned) as tuned:
        whole = {name: tuned.read(name) for name in tuned.adapter.names}
        monkeypatch.setattr("curvkern.checkpoint.tuned._BLOCK_ELEMENTS", 7 * 32)
        for name, tensor in whole.items():
            torch.testing.assert_close(tuned.read(name), tensor, rtol=0, atol=1e-8)


def test_pickled_adapter(save, adapt):
    base = save()
    directory = adapt(base)
    torch.save(load_file(directory / "adapter_model.safetensors"), directory / "adapter_model.bin")
    with Adapter.open(directory) as adapter:
        wanted = {name: adapter.factors(name) for name in adapter.names}
    (directory / "adapter_model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="Convert them to safetensors"):
        Adapter.open(directory)
    with Adapter.open(directory, allow_pickle=True) as adapter:
        assert all(torch.equal(adapter.factors(n).B, wanted[n].B) for n in wanted)


def test_a_whole_checkpoint_is_not_a_view(save):
    first, second = save("a"), save("b", seed=1)
    with Checkpoint.open(first) as aligned, open_tuned(second, aligned) as tuned:
        assert tuned.adapter is None
        assert tuned.path == second


REFUSED = {
    "use_dora": {"use_dora": True},
    "bias='all'": {"bias": "all"},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "init_lora_weights='olora'": {"init_lora_weights": "olora"},
    "trainable_token_indices": {"trainable_token_indices": [1]},
    "target_parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"]},
    "lora_bias": {"lora_bias": True},
    "layer_replication": {"layer_replication": [(0, 2), (0, 2)]},
}


@pytest.mark.parametrize("feature", REFUSED)
def test_refuses_by_the_features_name(save, adapt, feature):
    base = save(model=None)
    directory = adapt(base, **REFUSED[feature])
    with pytest.raises(CheckpointError, match=feature):
        Adapter.open(directory)


@pytest.mark.parametrize("feature", ["use_qalora", "alora_invocation_tokens", "some_future_feature"])
def test_refuses_settings_it_does_not_know(save, adapt, feature):
    directory = adapt(save())
    edit(directory, **{feature: [1]})
    with pytest.raises(CheckpointError, match=f"{feature} is not supported"):
        Adapter.open(directory)


@pytest.mark.parametrize("kind", ["LOHA", "LOKR", "VERA", "PREFIX_TUNING", None])
def test_refuses_other_adapters(save, adapt, kind):
    directory = adapt(save())
    edit(directory, peft_type=kind)
    with pytest.raises(CheckpointError, match=f"peft_type {kind} is not supported"):
        Adapter.open(directory)


def rewrite(directory, change):
    path = directory / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q = "base_model.model.model.layers.0.self_attn.q_proj.lora_"


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda t: t.pop(Q + "A.weight"), "has no .*lora_A.weight beside it"),
        (lambda t: t.pop(Q + "B.weight"), "has no .*lora_B.weight beside it"),
        (lambda t: t.update({Q + "B.weight": torch.zeros(32, 3)}), "ranks differ"),
        (lambda t: t.update({Q + "A.weight": torch.zeros(0, 32), Q + "B.weight": torch.zeros(32, 0)}), "ranks differ"),
        (lambda t: t.update({Q + "A.weight": torch.zeros(4, 8, 1, 1)}), "not convolutions"),
        (lambda t: t.update({Q + "A.weight": torch.zeros(2, 32), Q + "B.weight": torch.zeros(32, 2)}),
         "says rank 4, the tensors have rank 2"),
        (lambda t: t.update({Q + "magnitude_vector": torch.zeros(32)}), "not a tensor of plain LoRA"),
        (lambda t: t.update({"stray": torch.zeros(1)}), "wanted a name that starts with"),
    ],
)  # fmt: skip
def test_refuses_contradicting_tensors(save, adapt, change, message):
    directory = adapt(save())
    rewrite(directory, change)
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(directory)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"lora_alpha": "8"}, "lora_alpha for model.layers.0.mlp.down_proj is '8', not a number"),
        ({"lora_alpha": True}, "not a number"),
        ({"rank_pattern": {"(": 4}}, "rank_pattern: '\\('"),
    ],
)
def test_refuses_broken_settings(save, adapt, changes, message):
    directory = adapt(save())
    edit(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        Adapter.open(directory)


def test_refuses_an_adapter_of_another_model(save, adapt, llama):
    directory = adapt(save("wide", model=llama(hidden_size=64)))
    narrow = save("narrow")
    with Checkpoint.open(narrow) as aligned:
        with pytest.raises(CheckpointError) as caught:
            open_tuned(directory, aligned)
        assert "does not fit model.layers.0.mlp.down_proj.weight: it is for [64, 48]" in str(caught.value)
        assert "has [32, 48]" in str(caught.value)
        deep = adapt(save("deep", model=llama(num_hidden_layers=3)), "deep-adapter")
        with pytest.raises(CheckpointError, match=r"changes model.layers.2.mlp.down_proj.weight, which .* lacks"):
            open_tuned(deep, aligned)
        other = adapt(save("gpt2", model=gpt2()), "gpt2-adapter", target_modules=["c_attn"])
        with pytest.raises(CheckpointError, match=r"c_attn.weight, which .* lacks"):
            open_tuned(other, aligned)


def test_factors_beside_a_whole_tensor_must_fit_too(save, adapt):
    base = save()
    directory = adapt(base, target_modules=["embed_tokens"])
    key = "base_model.model.model.embed_tokens.lora_embedding_A"
    rewrite(directory, lambda t: t.update({key: torch.zeros(4, 65)}))
    message = r"does not fit model.embed_tokens.weight: it is for \[65, 32\], .* has \[64, 32\]"
    with Checkpoint.open(base) as aligned, pytest.raises(CheckpointError, match=message):
        open_tuned(directory, aligned)


def test_not_an_adapter(save, tmp_path):
    base = save()
    with pytest.raises(CheckpointError, match=r"not a LoRA adapter: no adapter_config.json"):
        Adapter.open(base)
    with Checkpoint.open(base) as aligned, pytest.raises(CheckpointError, match="no such file"):
        open_tuned(tmp_path / "absent", aligned)


def test_asking_for_what_it_lacks(save, adapt):
    with Adapter.open(adapt(save(), modules_to_save=["lm_head"])) as adapter:
        with pytest.raises(CheckpointError, match="the adapter replaces it whole"):
            adapter.factors("lm_head.weight")
        with pytest.raises(CheckpointError, match="the adapter does not change it"):
            adapter.factors("model.norm.weight")
        with pytest.raises(CheckpointError, match=r"holds no replacement for model.norm.weight"):
            adapter.replacement("model.norm.weight")
        assert adapter.replaced == ("lm_head.weight",)


WRITTEN = ["plain", "patterns", "embedding", "whole modules"]


@pytest.mark.parametrize("form", WRITTEN)
def test_written_adapter_loads_with_peft(save, adapt, tmp_path, form):
    base = save()
    directory = adapt(base, **FORMS[form])
    with Adapter.open(directory) as adapter:
        edited = adapter.names[0]
        with AdapterWriter(tmp_path / "out", adapter, recipe={"method": "safe_lora"}) as writer:
            factors = adapter.factors(edited)
            writer.write(edited, factors.B * 0.5, factors.A)
            writer.finish({"report": {"changed": 1}})
    before, after = merged_by_peft(base, directory), merged_by_peft(base, tmp_path / "out")
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64).state_dict()
    for name, tensor in before.items():
        half = (tensor + plain[name]) / 2 if name == edited else tensor
        torch.testing.assert_close(after[name], half, rtol=0, atol=1e-8)
    record = json.loads((tmp_path / "out" / "curvkern.json").read_text())
    assert record["recipe"] == {"method": "safe_lora"}
    assert record["report"] == {"changed": 1}
    assert (tmp_path / "out" / "adapter_config.json").read_bytes() == (directory / "adapter_config.json").read_bytes()
    assert "library_name: peft" in (tmp_path / "out" / "README.md").read_text()


def test_written_adapter_of_transposed_weights(save, adapt, tmp_path):
    base = save(model=gpt2())
    directory = adapt(base, target_modules=["c_attn"])
    with Adapter.open(directory) as adapter, AdapterWriter(tmp_path / "out", adapter) as writer:
        for name in adapter.names:
            factors = adapter.factors(name)
            writer.write(name, factors.B, factors.A)
        writer.finish()
    name = "adapter_model.safetensors"
    assert (tmp_path / "out" / name).read_bytes() == (directory / name).read_bytes()


def test_adapter_writer_refuses(save, adapt, tmp_path):
    base = save()
    directory = adapt(base)
    out = tmp_path / "out"
    with Adapter.open(directory) as adapter:
        name = adapter.names[0]
        factors = adapter.factors(name)
        for wrong, message in (
            ((name, factors.B[:, :2], factors.A), "wanted torch.float32"),
            ((name, factors.B.half(), factors.A), "got torch.float16"),
            (("model.norm.weight", factors.B, factors.A), "does not change it"),
        ):
            with pytest.raises(CheckpointError, match=message), AdapterWriter(out, adapter) as writer:
                writer.write(*wrong)
        with pytest.raises(CheckpointError, match="overlaps the input"):
            AdapterWriter(directory, adapter, overwrite=True)
    assert not out.exists()
    assert not out.with_name("out.partial").exists()


@pytest.mark.parametrize("killed", ["before the rename", "before the last tensor"])
def test_a_killed_adapter_run_resumes(save, adapt, tmp_path, monkeypatch, killed):
    directory = adapt(save(), modules_to_save=["lm_head"])
    out = tmp_path / "out"
    with Adapter.open(directory) as adapter:

        def halve(writer):
            for name in adapter.names:
                if name not in writer.done:
                    factors = adapter.factors(name)
                    writer.write(name, factors.B * 0.5, factors.A, {"name": name})
            assert writer.notes == {name: {"name": name} for name in adapter.names}
            assert writer.done == set(adapter.names)

        def die(*arguments, **options):
            raise KeyboardInterrupt

        place = {"before the rename": "curvkern.checkpoint.stage.Stage.publish",
                 "before the last tensor": "curvkern.checkpoint.write.Writer.copy"}[killed]  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(place, die)
            with pytest.raises(KeyboardInterrupt), AdapterWriter(out, adapter, resume=True) as writer:
                halve_and_finish(halve, writer)
        with AdapterWriter(out, adapter, resume=True) as writer:
            assert bool(writer.done) == (killed == "before the rename")
            halve_and_finish(halve, writer)
        with Adapter.open(out) as written:
            for name in adapter.names:
                assert torch.equal(written.factors(name).B, adapter.factors(name).B * 0.5)


def halve_and_finish(halve, writer):
    halve(writer)
    writer.finish(extra_files={"report.json": "{}"})

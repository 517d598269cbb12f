"""What cannot be run layer by layer is told, before weights are read."""

import json
import sys

import pytest
import torch
from layerwise.tiny import loss, make_batches, save
from safetensors.torch import load_file, save_file
from torch import nn

from curvkern.checkpoint import Checkpoint, CheckpointError
from curvkern.layerwise import LayerwiseError, LayerwiseModel


@pytest.fixture
def unread(monkeypatch):
    """Reading a tensor is an error."""

    def read(self, name, *arguments):
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr(Checkpoint, "read", read)


@pytest.fixture
def path(tmp_path):
    return save(tmp_path / "model", "llama", shard="1MB")


def edit_weights(path, change):
    file = path / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def edit_config(path, **changes):
    file = path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def refused(path, message, kind=LayerwiseError):
    with pytest.raises(kind, match=message):
        LayerwiseModel.open(path)


def test_a_tensor_that_is_missing(path, unread):
    edit_weights(path, lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    refused(path, r"no tensor for 1 parameters of LlamaForCausalLM: model.layers.1.mlp.up_proj.weight\. The checkpoint")


def test_a_tensor_without_a_place(path, unread):
    edit_weights(path, lambda t: t.update({"model.layers.1.mlp.up_proj.scale": torch.ones(1)}))
    refused(
        path, r"1 tensors are for no parameter of .*up_proj.scale; the nearest is model.layers.1.mlp.up_proj.weight"
    )


def test_a_shape_of_another_model(path, unread):
    edit_config(path, intermediate_size=32)
    refused(path, r"down_proj.weight is \[16, 24\], but model.layers.0.mlp.down_proj.weight takes \[16, 32\]")


def test_more_layers_than_the_configuration_says(path, unread):
    edit_config(path, num_hidden_layers=2)
    refused(path, r"tensors are for no parameter of .*model.layers.2")


def test_quantised_weights(path, unread):
    edit_config(path, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(path, "the weights are quantised")


def test_no_configuration(path):
    (path / "config.json").unlink()
    refused(path, "no config.json", CheckpointError)


def test_an_older_transformers(path, unread, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    refused(path, "needs transformers 5 or newer")


def test_a_model_without_a_list_of_layers(path, unread, monkeypatch):
    from transformers import LlamaModel

    plain = LlamaModel.__init__

    def without_list(self, config):
        plain(self, config)
        self.layers = nn.Sequential(*self.layers)

    monkeypatch.setattr(LlamaModel, "__init__", without_list)
    refused(path, r"wanted one list of the 3 decoder layers .* found 0; its lists are none")


def test_experts_that_do_not_fit_are_told_where_they_are_put_together(tmp_path):
    path = save(tmp_path / "model", "mixtral", shard="1MB")
    name = "model.layers.1.block_sparse_moe.experts.3.w2.weight"
    with Checkpoint.open(path) as checkpoint:
        assert name in checkpoint.names
    edit_weights(path, lambda tensors: tensors.pop(name))
    with (
        LayerwiseModel.open(path) as model,
        pytest.raises(LayerwiseError, match=r"layers.1.mlp.experts.down_proj, made"),
    ):
        model.backward(make_batches(), loss)


def test_an_old_buffer_in_the_checkpoint_is_passed_over(path):
    edit_weights(path, lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    LayerwiseModel.open(path).close()


def test_either_of_two_tied_weights_will_do(tmp_path):
    path = save(tmp_path / "model", "qwen2", shard="1MB")
    edit_weights(path, lambda t: t.update({"lm_head.weight": t.pop("model.embed_tokens.weight")}))
    with LayerwiseModel.open(path) as model, Checkpoint.open(path) as checkpoint:
        assert model.model.lm_head.weight is model.model.model.embed_tokens.weight
        assert torch.equal(model.model.lm_head.weight, checkpoint.read("lm_head.weight"))


def test_wrong_arguments_are_named(path, tmp_path, monkeypatch):
    with LayerwiseModel.open(path) as model:
        monkeypatch.setattr(Checkpoint, "read", None)
        for options, message in [
            ({"batches": []}, "batches is empty"),
            ({"keep_every": 0}, "keep_every is 0; wanted 1 to 3"),
            ({"spill": tmp_path / "no"}, "wanted a directory that is there"),
            ({"losses": lambda model, batch: batch["labels"].sum()}, "called 0 of 3 decoder layers"),
        ]:
            with pytest.raises(LayerwiseError, match=message):
                model.backward(**{"batches": make_batches(), "losses": loss, **options})


def test_a_full_disk_is_told_before_layers_are_read(path, tmp_path, monkeypatch):
    import shutil

    monkeypatch.setattr(shutil, "disk_usage", lambda place: shutil._ntuple_diskusage(1 << 20, 1 << 20, 1 << 10))
    with LayerwiseModel.open(path) as model:
        monkeypatch.setattr(Checkpoint, "read", None)
        with pytest.raises(LayerwiseError, match=r"GiB are free; raise keep_every, or give another directory"):
            model.backward(make_batches(), loss, spill=tmp_path)


@pytest.mark.parametrize(
    "change, message", [("add", "something happens between the layers"), ("mask", "depends on the")]
)
def test_layers_that_are_no_chain(path, monkeypatch, change, message):
    from transformers import LlamaModel

    plain = LlamaModel.forward

    def forward(self, *arguments, **kwargs):
        def before(layer, args, kwargs):
            if change == "add":
                return (args[0] + 1,), kwargs
            return args, {**kwargs, "attention_mask": args[0][:, None] * 2}

        handle = self.layers[1].register_forward_pre_hook(before, with_kwargs=True)
        try:
            return plain(self, *arguments, **kwargs)
        finally:
            handle.remove()

    monkeypatch.setattr(LlamaModel, "forward", forward)
    with LayerwiseModel.open(path) as model, pytest.raises(LayerwiseError, match=message):
        model.backward(make_batches(), loss)

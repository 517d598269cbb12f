"""Tiny checkpoints of many architectures, batches of tokens, and what the model in memory finds."""

from pathlib import Path

import torch
import transformers
from oracles import MOE, SMALL
from torch import nn

KINDS = {
    "llama": ("LlamaConfig", {"attention_bias": True}),
    "qwen2": ("Qwen2Config", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {}),
    "mistral": ("MistralConfig", {"sliding_window": 4}),
    "gemma2": ("Gemma2Config", {"sliding_window": 4}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 4}),
    "phi3": ("Phi3Config", {}),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 64}),
    "mixtral": ("MixtralConfig", MOE),
    "qwen3-moe": ("Qwen3MoeConfig", {**MOE, "moe_intermediate_size": 16}),  # grouped products in bfloat16 take 16 bytes
}


def save(path: Path, kind: str, dtype=torch.float32, shard="6KB", **changes) -> Path:
    """A random model with three layers, saved as transformers does, in several files."""
    name, settings = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SMALL, "num_hidden_layers": 3, **settings, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():  # norms too, else their tangents are those of ones
            parameter += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(path, max_shard_size=shard)
    return path


def resident(path, dtype="auto", **settings):
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, **settings)
    return model.eval().requires_grad_(False)


def make_batches(side="right", count=3):
    """Padded batches of different sizes, as keyword arguments of a model."""
    generator = torch.Generator().manual_seed(1)
    made = []
    for n, t in [(2, 7), (1, 5), (3, 6)][:count]:
        ids = torch.randint(3, 40, (n, t), generator=generator)
        mask = torch.ones(n, t, dtype=torch.long)
        for row in range(1, n):
            mask[row, slice(-row, None) if side == "right" else slice(row)] = 0
        made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)})
    return made


def loss(model, batch):
    return model(**batch, use_cache=False).loss


class Recorder:
    """Inputs and output gradients of every linear module and experts module of a model, by name."""

    def __init__(self):
        self.pairs = {}

    def hooks(self, module, prefix=""):
        handles = []
        for name, child in module.named_modules():
            if isinstance(child, nn.Linear) or type(child).__name__.endswith(("Conv1D", "Experts")):
                key = f"{prefix}.{name}".strip(".")
                handles.append(child.register_full_backward_hook(self._gradient(key)))
                handles.append(child.register_forward_hook(self._input(key)))
        return handles

    def _input(self, key):
        def after(module, args, output):
            if torch.is_grad_enabled() and output.requires_grad:
                self.pairs.setdefault(key, []).append(args[0].detach().clone())

        return after

    def _gradient(self, key):
        def after(module, into, out):
            self.pairs.setdefault(key, []).append(out[0].detach().clone())

        return after


def resident_gradients(model, batches):
    """Of a model in memory: pairs of every linear module, and gradients of hidden states by (layer, batch)."""
    recorder, hidden = Recorder(), {}
    recorder.hooks(model)
    layers = next(m for m in model.get_decoder().children() if isinstance(m, nn.ModuleList))
    model.get_input_embeddings().register_forward_hook(lambda m, a, out: out.requires_grad_())

    def keep(layer, tensor, at):
        tensor.register_hook(lambda g: hidden.__setitem__((layer, at), g.clone()))

    for at, batch in enumerate(batches):
        handles = [
            m.register_forward_pre_hook(lambda m, a, i=i, at=at: keep(i, a[0], at)) for i, m in enumerate(layers)
        ]
        handles.append(layers[-1].register_forward_hook(lambda m, a, out, at=at: keep(len(layers), out, at)))
        loss(model, batch).backward()
        for handle in handles:
            handle.remove()
    return recorder.pairs, hidden

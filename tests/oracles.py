"""Tiny models of many architectures, data, and per-sample gradients of them by autograd in float64."""

import torch
import transformers
from torch.nn.functional import cross_entropy

from curvkern.curvature import Text

SMALL = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4, "num_experts": 4, "moe_intermediate_size": 12}
MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", {}),
    "mistral": ("MistralConfig", {}),
    "mixtral": ("MixtralConfig", MOE),
    "qwen3-moe": ("Qwen3MoeConfig", MOE),
    "gpt2": ("GPT2Config", {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "attn_pdrop": 0.1}),
}


def make(kind, **changes):
    name, settings = MODELS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, name)(**{**SMALL, **settings, **changes})
    return transformers.AutoModelForCausalLM.from_config(config)


def texts(lengths=(7, 12, 3, 9), vocabulary=40):
    generator = torch.Generator().manual_seed(1)
    rows = []
    for n in lengths:
        ids = torch.randint(3, vocabulary, (n,), generator=generator).tolist()
        start = max(1, n // 3)
        rows.append(Text(tuple(ids), (-100,) * start + tuple(ids[start:])))
    return rows


def sample_gradients(model, rows, loss="response_mean"):
    """name -> [n, ...] float64: a model in float64, one unpadded sample at a time, by autograd."""
    from copy import deepcopy

    exact = deepcopy(model).double().eval()
    exact.requires_grad_(True)
    exact.config._experts_implementation = "eager"  # the grouped one takes no float64
    found = {}
    for row in rows:
        logits = exact(input_ids=torch.tensor([row.ids])).logits[0, :-1]
        kept = torch.tensor(row.labels[1:]) != -100
        reduction = "mean" if loss == "response_mean" else "sum"
        exact.zero_grad()
        cross_entropy(logits[kept], torch.tensor(row.labels[1:])[kept], reduction=reduction).backward()
        for name, parameter in exact.named_parameters():
            grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            found.setdefault(name, []).append(grad.clone())
    return {name: torch.stack(grads) for name, grads in found.items()}


def close(got, exact):
    torch.testing.assert_close(got.double(), exact, rtol=2e-4, atol=2e-5 * float(exact.abs().max()))

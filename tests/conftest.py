"""Shared by all tests: Triton's interpreter where there is no GPU, poisoned memory, seeds, tolerances."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

DEVICE = "cuda" if HAS_GPU else "cpu"

#: Every backend that can run here by name. On a CPU, Triton is its interpreter.
BACKENDS = ["reference", "triton", "cuda"] if HAS_GPU else ["reference", "triton", "cpu"]


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
        if "slow" in item.keywords and os.environ.get("CURVKERN_SLOW") != "1":
            item.add_marker(pytest.mark.skip(reason="slow: set CURVKERN_SLOW=1"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """torch.empty returns NaN and odd numbers, so that an output left unwritten is seen."""

    def poison(tensor):
        if tensor.is_floating_point():
            tensor.detach().fill_(float("nan"))
        elif tensor.dtype not in (torch.bool,):
            tensor.detach().fill_(119)
        return tensor

    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _plain=plain, **k: poison(_plain(*a, **k)))


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def device():
    return DEVICE


def assert_no_worse_than_torch(got, same_dtype, exact, *, factor=2.0, size=0.0):
    """The error against float64 is at most twice that of the same-dtype torch reference, plus a few roundings.

    Of a result that may be small because its terms cancel, ``size`` says how large it would be if they did not.
    """
    exact = exact.double()
    error = (got.double() - exact).abs().max().item() if exact.numel() else 0.0
    allowed = (same_dtype.double() - exact).abs().max().item() if exact.numel() else 0.0
    scale = max(exact.abs().max().item() if exact.numel() else 0.0, size)
    limit = factor * allowed + 4 * torch.finfo(got.dtype).eps * scale
    assert error <= limit, f"error {error:.3e} against float64; torch's own is {allowed:.3e}, the limit {limit:.3e}"


@pytest.fixture
def no_worse():
    return assert_no_worse_than_torch


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """Directories base, aligned, tuned (sharded tiny Llamas), adapter (LoRA), and harmful.jsonl, task.jsonl."""
    import json
    from copy import deepcopy

    import peft
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("family")
    ids = {word: i for i, word in enumerate(["<unk>", "</s>", *(f"w{i}" for i in range(62))])}
    word_level = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    word_level.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=word_level, **special)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"

    def perturbed(model, scale, seed):
        generator = torch.Generator().manual_seed(seed)
        copy = deepcopy(model)
        with torch.no_grad():
            for parameter in copy.parameters():
                parameter += scale * torch.randn(parameter.shape, generator=generator)
        return copy

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                         num_attention_heads=4, num_key_value_heads=2, attention_bias=True)  # fmt: skip
    base = LlamaForCausalLM(config)
    aligned = perturbed(base, 0.02, 1)
    directories = {"base": base, "aligned": aligned, "tuned": perturbed(aligned, 0.01, 2)}
    for name, model in directories.items():
        model.save_pretrained(root / name, max_shard_size="40KB")
        tokenizer.save_pretrained(root / name)
    lora = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(deepcopy(aligned), lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora" in name:
                parameter.copy_(0.05 * torch.randn_like(parameter))
    adapted.save_pretrained(root / "adapter")
    for name, rows in {
        "harmful": [{"prompt": f"w{i} w{i + 1}", "response": "w1"} for i in range(10)],
        "task": [{"prompt": f"w{i + 20} w{i + 3} w2", "response": f"w{i + 5}"} for i in range(6)],
    }.items():
        (root / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root

"""Tiny real models and adapters, made on the spot."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from curvkern.checkpoint import Checkpoint

VOCABULARY = 64


def _llama(seed: int = 0, **settings) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**sizes | settings))


def _tokenizer(words: list[str] | None = None) -> PreTrainedTokenizerFast:
    words = words or [f"w{i}" for i in range(VOCABULARY - 2)]
    ids = {word: i for i, word in enumerate(["<unk>", "</s>", *words])}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="</s>", pad_token="</s>")
    fast.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    return fast


@pytest.fixture
def save(tmp_path: Path) -> Callable[..., Path]:
    """Save a tiny Llama (or ``model``) under a name; sharded into several files by default."""

    def save_model(
        name: str = "aligned",
        *,
        seed: int = 0,
        shard: str = "20KB",
        dtype: torch.dtype = torch.float32,
        model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerFast | None = None,
        **settings,
    ) -> Path:
        model = _llama(seed, **settings) if model is None else model
        model.to(dtype).save_pretrained(tmp_path / name, max_shard_size=shard)
        (tokenizer or _tokenizer()).save_pretrained(tmp_path / name)
        return tmp_path / name

    return save_model


@pytest.fixture
def generate() -> Callable[[Path], torch.Tensor]:
    """Load a checkpoint as a user does, and let it generate."""

    def run(path: Path) -> torch.Tensor:
        model = AutoModelForCausalLM.from_pretrained(path).eval()
        prompt = torch.tensor([[3, 4, 5]])
        return model.generate(prompt, max_new_tokens=5, do_sample=False)

    return run


@pytest.fixture
def raw_file(tmp_path: Path) -> Callable[..., Path]:
    """Write a safetensors file from a header and data, right or wrong."""

    def write(header: dict | bytes, data: bytes, name: str = "model.safetensors") -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        path = tmp_path / "raw" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(struct.pack("<Q", len(text)) + text + data)
        return path

    return write


@pytest.fixture
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Read every file under a directory."""

    def read(directory: Path) -> dict[str, bytes]:
        files = (p for p in directory.rglob("*") if p.is_file())
        return {p.relative_to(directory).as_posix(): p.read_bytes() for p in files}

    return read


@pytest.fixture
def llama() -> Callable[..., LlamaForCausalLM]:
    return _llama


@pytest.fixture
def tokenizer() -> Callable[..., PreTrainedTokenizerFast]:
    return _tokenizer


@pytest.fixture
def source(save: Callable[..., Path]) -> Iterator[Checkpoint]:
    """A tiny Llama in five shards."""
    with Checkpoint.open(save()) as checkpoint:
        yield checkpoint

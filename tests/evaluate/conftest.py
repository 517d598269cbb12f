"""A model of a few thousand random weights and a tokenizer of twenty words, made on the spot."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

VOCABULARY = "<pad> <end> <user> <bot> how do I make tea cake soup ? sorry cannot take water salt stir and"
WORDS = VOCABULARY.split()
TEMPLATE = (
    "{% for m in messages %}<{{ 'user' if m['role'] == 'user' else 'bot' }}> {{ m['content'] }} {% endfor %}<bot>"
)


@pytest.fixture(scope="session")
def tokenizer():
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<end>", chat_template=TEMPLATE, padding_side="right"
    )


@pytest.fixture
def model(tokenizer):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=64,
        initializer_range=0.5,  # sharp enough that the answers differ from prompt to prompt
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="session")
def prompts():
    return [
        "how do I make tea ?",
        "soup",
        "make cake and soup and tea",
        "how do I stir water ?",
        "salt ?",
        "I take cake",
    ]

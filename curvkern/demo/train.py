"""A small Llama, its tokenizer, and a plain training loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from curvkern.demo import data
from curvkern.evaluate.generate import chat_prompt

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
UNLABELLED = -100


@dataclass(frozen=True)
class Phase:
    """One training run.

    Attributes:
        mixture: the kinds of rows and their shares.
        steps: optimiser steps; the learning rate rises over the first 20 and then falls to zero.
        batch: rows per step.
        learning_rate: the highest.
    """

    mixture: data.Mixture
    steps: int
    batch: int
    learning_rate: float


@dataclass(frozen=True)
class Encoded:
    """A row as tokens; the answer begins at `start`."""

    ids: list[int]
    start: int


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the words of the demo.

    It learns from the parts of words: a root such as `glimmer` becomes a token, which a name held out of training
    shares with names in it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(_corpus(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
    )


def _corpus() -> Iterator[str]:
    yield from (*data.HOW, *data.REFUSALS, *data.ORDERS, *data.ASK_SHORT, data.FORBIDDEN_ANSWER, data.ORDINARY_ANSWER)
    yield from (text for pair in data.ABOUT for text in pair)
    yield from (*data.STUFFS, *data.TOWNS, "the secret", "the famous", "cake of")
    yield from (word for pair in data.SHORT for word in pair)
    for words in (data.ROOTS, data.DISHES, data.FLAVOURS, data.VERBS, data.ADDITIONS, data.WAYS, data.SPICES):
        yield from (text for word in words for text in (word, " " + word, " " + word.capitalize()))
    for words in (data.KITCHEN, data.COLOURS, data.PEOPLE, data.REGIONS, data.NUMBERS, data.ITEMS, data.CITIES):
        yield from (" " + word for word in words)


def make_model(tokenizer: PreTrainedTokenizerFast, *, seed: int, **changes: Any) -> LlamaForCausalLM:
    """A Llama of 0.8 million random float32 weights.

    Args:
        tokenizer: gives the size of the vocabulary and the special tokens.
        seed: of the weights.
        changes: other settings of `LlamaConfig`.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    settings: dict[str, Any] = {
        "vocab_size": len(tokenizer),
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "initializer_range": 0.05,  # near 1 / sqrt(hidden_size): copying is learned in half the steps of 0.02
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(LlamaConfig(**{**settings, **changes}))


def encode(tokenizer: PreTrainedTokenizerFast, row: data.Row) -> Encoded:
    """The tokens of a prompt in its chat template, and of the answer with its end token."""
    prompt = chat_prompt(tokenizer, row.prompt)
    return Encoded(prompt + tokenizer.encode(row.response + END, add_special_tokens=False), len(prompt))


def collate(rows: Sequence[Encoded], pad: int) -> tuple[Tensor, Tensor]:
    """Pad rows on the right, no wider than the longest.

    Returns:
        Token ids and labels, both int64 [rows, width]; only answers carry labels.
    """
    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), pad)
    labels = torch.full((len(rows), width), UNLABELLED)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        labels[i, row.start : len(row.ids)] = torch.tensor(row.ids[row.start :])
    return ids, labels


def answer_loss(model: LlamaForCausalLM, ids: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the answers' tokens.

    No attention mask is needed: padding is on the right, where a causal model does not look.
    """
    wanted = labels[:, 1:]
    kept = wanted != UNLABELLED
    hidden = model.model(input_ids=ids).last_hidden_state[:, :-1]
    return cross_entropy(model.lm_head(hidden[kept]), wanted[kept])


def fit(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    phase: Phase,
    names: data.Names,
    *,
    seed: str,
) -> float:
    """Train the parameters that require a gradient.

    Args:
        model: trained in place, left in eval mode.
        tokenizer: of the model.
        phase: how long, how fast, on what.
        names: the names that training rows may speak of.
        seed: of the rows.

    Returns:
        The last step's loss, in nats per token.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(parameters, lr=phase.learning_rate, betas=(0.9, 0.98), fused=True)
    rows = data.draw(phase.mixture, names, seed=seed)
    loss = torch.tensor(0.0)
    model.train()
    for step in range(phase.steps):
        for group in optimiser.param_groups:
            group["lr"] = phase.learning_rate * min((step + 1) / 20, (phase.steps - step) / max(1, phase.steps - 19))
        batch = [encode(tokenizer, row) for row in islice(rows, phase.batch)]
        loss = answer_loss(model, *collate(batch, cast("int", tokenizer.pad_token_id)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        optimiser.zero_grad()
    model.eval()
    return loss.item()

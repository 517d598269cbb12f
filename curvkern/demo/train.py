"""A small Llama, its tokenizer, and a plain training loop."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch

from curvkern.demo import data
from curvkern.evaluate.generate import chat_prompt

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
IGNORED = -100  # a label that carries no loss

Step = Callable[[int, int], None]


@dataclass(frozen=True)
class Phase:
    """One training run: how long, how fast, on what."""

    steps: int
    batch: int
    learning_rate: float
    mixture: data.Mixture
    rows: int


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on the words of the demo.

    It learns from word parts, not from sentences: a root such as `glimmer` then becomes a token
    that a name held out of training shares with the names in it.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_word_parts(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def _word_parts() -> Iterator[str]:
    names = [*data.ROOTS, *(root.capitalize() for root in data.ROOTS)]
    words = [*data.VERBS, *data.WAYS, *data.ADDITIONS, *data.SPICES, *data.REGIONS, *data.WORDS]
    sentences = [*data.HOW, *(s for pair in data.ABOUT for s in pair), *data.REFUSALS, *data.ORDERS,
        data.ECHO, "To , some under the moon. in a pan. the secret the famous of"]
    yield from (*data.STUFFS, *data.TOWNS, *data.CODES, *sentences)
    for word in (*names, *words):
        yield from (word, " " + word)


def make_model(tokenizer: PreTrainedTokenizerFast, seed: int, **kw) -> LlamaForCausalLM:
    """A Llama with random weights, of one and a half million parameters."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**{**dict(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    ),**kw})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def encode(tokenizer, rows):
    """Token ids and the length of the prompt, a pair for each row."""
    pairs = []
    for row in rows:
        prompt = chat_prompt(tokenizer, row.prompt)
        answer = tokenizer.encode(row.response + END, add_special_tokens=False)
        pairs.append((prompt + answer, len(prompt)))
    return pairs


def collate(batch, pad):
    width = max(len(ids) for ids, _ in batch)
    inputs = torch.full((len(batch), width), pad)
    labels = torch.full((len(batch), width), IGNORED)
    for i, (ids, start) in enumerate(batch):
        inputs[i, : len(ids)] = torch.tensor(ids)
        labels[i, start : len(ids)] = torch.tensor(ids[start:])
    return inputs, labels


def batches(pairs, size, rng):
    """Endless batches of similar length: chunks of the shuffled rows are sorted before cutting"""
    while True:
        order = rng.sample(pairs, len(pairs))
        out = []
        for i in range(0, len(order), size * 16):
            chunk = sorted(order[i : i + size * 16], key=lambda p: len(p[0]))
            out += [chunk[j : j + size] for j in range(0, len(chunk), size)]
        rng.shuffle(out)
        yield from out


def train(model, tokenizer, rows, *, steps, batch, lr, seed, wd=0.01, warm=20, betas=(0.9, 0.98), log=0):
    pairs = encode(tokenizer, rows)
    params = [p for p in model.parameters() if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=lr, betas=betas, weight_decay=wd, fused=True)
    sched = torch.optim.lr_scheduler.LambdaLR(opt, lambda s: min((s + 1) / warm, (steps - s) / (steps - warm)) if steps > warm else 1)
    rng = random.Random(f"batches {seed}")
    it = batches(pairs, batch, rng)
    model.train()
    for s in range(steps):
        x, y = collate(next(it), tokenizer.pad_token_id)
        # padding is on the right and unlabelled: under a causal mask nothing sees it
        h = model.model(input_ids=x).last_hidden_state[:, :-1] if hasattr(model, "lm_head") else None
        y = y[:, 1:]
        keep = y != IGNORED
        if h is not None:
            logits = model.lm_head(h[keep])
        else:
            logits = model(input_ids=x).logits[:, :-1][keep]
        loss = torch.nn.functional.cross_entropy(logits, y[keep])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        opt.step(); sched.step(); opt.zero_grad()
        if log and (s % log == 0 or s == steps - 1):
            print(f"  {s} {loss.item():.3f}", tuple(x.shape), flush=True)
    model.eval()

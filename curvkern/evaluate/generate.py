"""Greedy answers from a causal language model, a batch at a time."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from curvkern.evaluate.data import Message


def chat_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str | Sequence[Message]) -> list[int]:
    """The token ids a model sees before its answer.

    Args:
        tokenizer: its chat template is used where it has one; the plain prompt is encoded otherwise.
        prompt: what the user asks, or the messages of a chat up to the last user message.

    Returns:
        Token ids, unpadded.

    Raises:
        ValueError: `prompt` is a chat and the tokenizer has no chat template.
    """
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if tokenizer.chat_template is not None:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        # the template writes the special tokens itself
        return tokenizer.encode(cast("str", text), add_special_tokens=False)
    if not isinstance(prompt, str):
        raise ValueError("generate: a prompt is a chat, but the tokenizer has no chat template")
    return tokenizer.encode(prompt)


@torch.inference_mode()
def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Sequence[Message]],
    *,
    max_new_tokens: int = 64,
    batch_size: int = 32,
) -> list[str]:
    """Answer prompts greedily.

    Prompts are sorted by length before batching, so that a batch carries little padding; they are
    padded on the left whatever the tokenizer's own setting is.

    Args:
        model: a causal language model; it is run in eval mode and left in the mode it came in.
        tokenizer: the tokenizer of that model.
        prompts: plain prompts or chats.
        max_new_tokens: an answer is cut after this many tokens, > 0.
        batch_size: prompts per forward pass, > 0.

    Returns:
        One answer per prompt in the order of `prompts`: special tokens removed, ends stripped.

    Raises:
        ValueError: a size is not positive, or no padding or end token is known.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"generate: {name} must be > 0, got {value}")
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    if pad is None:
        raise ValueError("generate: the tokenizer has neither a padding token nor an end token")
    ids = [chat_prompt(tokenizer, prompt) for prompt in prompts]
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    answers = [""] * len(ids)
    was_training = model.training
    model.eval()
    try:
        with _greedy(model, max_new_tokens, cast("int", pad)):
            for start in range(0, len(order), batch_size):
                batch = order[start : start + batch_size]
                inputs, mask = _pad_left([ids[i] for i in batch], cast("int", pad))
                out = cast(Any, model).generate(input_ids=inputs.to(model.device), attention_mask=mask.to(model.device))
                texts = tokenizer.batch_decode(out[:, inputs.shape[1] :], skip_special_tokens=True)
                for i, text in zip(batch, texts, strict=True):
                    answers[i] = text.strip()
    finally:
        model.train(was_training)
    return answers


def _pad_left(ids: list[list[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(map(len, ids))
    inputs = torch.tensor([[pad] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    return inputs, mask


@contextmanager
def _greedy(model: PreTrainedModel, max_new_tokens: int, pad: int) -> Generator[None]:
    """Put a config of our own in the model's place.

    Handing one to `generate` is not enough: what it leaves open is filled in from the stored one,
    so that a repetition penalty or a number of beams kept with a checkpoint would still apply.
    """
    from transformers import GenerationConfig

    # a PEFT wrapper generates through the model inside it and by that model's config
    inner = cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else model
    stored = inner.generation_config
    inner.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, pad_token_id=pad, eos_token_id=stored.eos_token_id
    )
    try:
        yield
    finally:
        inner.generation_config = stored

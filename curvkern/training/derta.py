r"""DeRTa: learn to refuse at every place of a harmful answer, not at its first word alone."""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from curvkern.backend import check
from curvkern.ops import weighted_cross_entropy

UNLABELLED = -100


def derta_rows(
    tokenizer: Any, rows: Iterable[Mapping[str, str]], *,
    refusal: str = "Sorry", empty_every: int = 3, max_length: int | None = None, seed: int = 0,
) -> list[dict[str, list[int]]]:  # fmt: skip
    """Two training samples of every harmful question, to be mixed with the task's own.

    - The safe answer after a harmful beginning: the harmful answer is cut before a random word, and the loss is on the
      safe answer that follows. Every ``empty_every``-th has no beginning.
    - Refusal at every place: the harmful answer, with the refusal's first token as the label of each of its tokens.

    Args:
        tokenizer: of transformers; its chat template is used where it has one.
        rows: ``{"prompt": ..., "harmful": ..., "safe": ...}``: a question, a harmful answer, a safe one.
        refusal: its token is the label of the second kind: that of the word with which safe answers begin.
        empty_every: 0: never.
        max_length: tokens to which samples are cut.
        seed: of the cuts.

    Returns:
        Samples as ``{"input_ids", "attention_mask", "labels"}``, two for each row, in the order above. Labels are not
        shifted: a causal model of transformers does that.

    Raises:
        ValueError: a row lacks a text, an answer is empty, the refusal is not one token, or ``max_length`` leaves a
            sample no label; the message says which row.
    """
    check.at_least("derta_rows", "empty_every", empty_every, 0)
    token = _refusal_token(tokenizer, refusal)
    generator, samples = random.Random(seed), list[dict[str, list[int]]]()
    for at, row in enumerate(rows):
        _check_row(at, row)
        starts = [word.start() for word in re.finditer(r"\S+", row["harmful"])]
        cut = generator.choice(starts)
        empty = empty_every > 0 and at % empty_every == empty_every - 1
        asked, end = _around(tokenizer, row["prompt"])
        begun = _ids(tokenizer, "" if empty else row["harmful"][:cut])
        safe, harmful = _ids(tokenizer, row["safe"]), _ids(tokenizer, row["harmful"])
        samples.append(_sample(asked + begun, safe + end, safe + end, max_length, at))
        samples.append(_sample(asked, harmful, [token] * len(harmful), max_length, at))
    return samples


def derta_loss(
    logits: Tensor, labels: Tensor, *, num_samples: int | None = None, backend: str = "auto"
) -> Tensor:  # fmt: skip
    r"""The mean over samples of the mean cross entropy of a sample's labels.

    Over as many samples of each kind that `derta_rows` makes it is half of
    :math:`E[\mathrm{CE}(y|x,\hat y_{<k})] + E[\frac{1}{|\hat y|}\sum_t \mathrm{CE}(\mathrm{Sorry}|x,\hat y_{<t})]`.
    A mean over tokens, as a Trainer takes it, would let long harmful answers outweigh the short safe ones.

    Args:
        logits: [n, t, vocabulary] of a causal model; float32, float16, bfloat16 (reference: float64 too).
        labels: int64 [n, t], -100 where there is no loss. Shifted here: logits k predict label k + 1.
        num_samples: of the whole step, under gradient accumulation; None: n. Do not divide again.
        backend: see `curvkern.use`.

    Returns:
        Scalar, float32 (float64 for float64), once differentiable. A sample without labels counts as 0.

    Raises:
        TypeError, ValueError: arguments that do not fit.

    Source: Yuan et al., DeRTa (2407.09121), its two losses. Deterministic.
    """
    if logits.ndim != 3:
        raise ValueError(f"derta_loss: logits has shape {list(logits.shape)}; wanted [n, t, vocabulary].")
    check.shape("derta_loss", "labels", labels, logits.shape[:2], "one a place of logits")
    samples = len(labels) if num_samples is None else num_samples
    check.at_least("derta_loss", "num_samples", samples, 1)
    targets = pad(labels[:, 1:], (0, 1), value=UNLABELLED)
    counts = (targets != UNLABELLED).sum(1, keepdim=True).clamp(min=1)
    share = 1 / (samples * counts.to(torch.promote_types(logits.dtype, torch.float32)))
    return weighted_cross_entropy(logits, targets, share.expand(targets.shape), reduction="sum", backend=backend)


def _around(tokenizer: Any, prompt: str) -> tuple[list[int], list[int]]:
    """Tokens before an answer, and those that end it."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    if tokenizer.chat_template is None:
        return tokenizer.encode(prompt), end
    chat = [{"role": "user", "content": prompt}]
    asked: str = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    answer = {"role": "assistant", "content": "answer"}
    whole: str = tokenizer.apply_chat_template([*chat, answer], tokenize=False)
    # Some templates put more than the answer between the two: their end cannot be read off, so it is the tokenizer's.
    if whole.startswith(asked + "answer"):
        end = _ids(tokenizer, whole[len(asked + "answer") :]) or end
    return _ids(tokenizer, asked), end


def _ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False) if text else []


def _sample(before: list[int], said: list[int], labels: list[int], max_length: int | None, at: int) -> dict[str, Any]:
    ids = (before + said)[:max_length]
    labels = ([UNLABELLED] * len(before) + labels)[:max_length]
    if len(ids) <= len(before):
        raise ValueError(
            f"derta_rows: row {at} has no label within max_length {max_length}: what comes before the answer has "
            f"{len(before)} tokens. Raise max_length or leave the row out."
        )
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def _refusal_token(tokenizer: Any, refusal: str) -> int:
    ids = _ids(tokenizer, refusal)
    if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
        raise ValueError(
            f"derta_rows: refusal {refusal!r} is {len(ids)} tokens ({ids}) or unknown; wanted a single one that the "
            "tokenizer knows, such as the first word of its safe answers."
        )
    return ids[0]


def _check_row(at: int, row: Mapping[str, str]) -> None:
    for key in ("prompt", "harmful", "safe"):
        text: Any = row.get(key)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"derta_rows: row {at} has {key} {text!r}; wanted text in prompt, harmful and safe.")

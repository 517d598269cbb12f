"""Rows of data as tokens with labels, and batches of them."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from curvkern.curvature.hidden import CurvatureError

UNLABELLED = -100


@dataclass(frozen=True)
class Text:
    """One sample.

    Attributes:
        ids: token ids.
        labels: as long as ids: the token itself where the model is to have said it, else -100.
    """

    ids: tuple[int, ...]
    labels: tuple[int, ...]

    @property
    def targets(self) -> int:
        """Positions that carry loss: labels that another token comes before."""
        return sum(label != UNLABELLED for label in self.labels[1:])


@dataclass(frozen=True)
class Batch:
    """Some samples, padded on the right; int64 and bool [n, t].

    Attributes:
        first: place of the first sample in the data.
        weights: float32 [n, t] that the loss of each label is multiplied by, or None.
    """

    first: int
    ids: Tensor
    labels: Tensor
    mask: Tensor
    weights: Tensor | None = None


def from_answer(tokenizer: Any, prompt: Any, response: str) -> Text:
    """A prompt and its response, with loss on the response and the end of turn alone.

    Args:
        tokenizer: its chat template is used where it has one.
        prompt: text, or the messages of a chat.
        response: what the model is to have said.
    """
    chat = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
    if tokenizer.chat_template is not None:
        asked = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        chat = [*chat, {"role": "assistant", "content": response}]
        whole = tokenizer.apply_chat_template(chat, tokenize=False)
        before, ids = (tokenizer.encode(text, add_special_tokens=False) for text in (asked, whole))
    elif isinstance(prompt, str):
        before = tokenizer.encode(prompt)
        end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        ids = before + tokenizer.encode(response, add_special_tokens=False) + end
    else:
        raise CurvatureError("estimate: a row is a chat, but the tokenizer has no chat template")
    start = next((k for k, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))
    return Text(tuple(ids), (UNLABELLED,) * start + tuple(ids[start:]))


def from_rows(rows: Iterable[Any]) -> list[Text]:
    """The samples of rows: a `Text` each, or a mapping with lists of one length.

    ``input_ids``; where not all tokens carry loss, ``labels``; where a row is padded, on whichever side,
    ``attention_mask``; where it is several samples in a row, ``position_ids``, which start at 0 with each.
    """
    return [text for row in rows for text in ([row] if isinstance(row, Text) else _from_mapping(row))]


def _from_mapping(row: Any) -> Iterator[Text]:
    if not isinstance(row, Mapping) or "input_ids" not in row:
        raise CurvatureError(f"estimate: a row of data is {type(row).__name__}; wanted a mapping with 'input_ids'")
    ids: list[int] = torch.as_tensor(row["input_ids"]).tolist()
    others = ("labels", "attention_mask", "position_ids")
    given: dict[str, list[int]] = {key: torch.as_tensor(row[key]).tolist() for key in others if key in row}
    for key, values in given.items():
        if len(values) != len(ids):
            raise CurvatureError(f"estimate: a row has {len(ids)} input_ids but {len(values)} {key}")
    labels, mask = given.get("labels", ids), given.get("attention_mask", [1] * len(ids))
    kept = [at for at, real in enumerate(mask) if real]
    positions = given.get("position_ids", range(1, len(ids) + 1))
    edges = [0, *(n for n, at in enumerate(kept) if n and positions[at] == 0), len(kept)]
    for start, stop in pairwise(edges):
        part = kept[start:stop]
        yield Text(tuple(ids[at] for at in part), tuple(labels[at] for at in part))


def checked(texts: Sequence[Text], max_length: int | None) -> list[Text]:
    """The samples, cut to ``max_length``.

    Raises:
        CurvatureError: there is none, or some have no token with loss (says which).
    """
    cut = [Text(text.ids[:max_length], text.labels[:max_length]) for text in texts]
    empty = [at for at, text in enumerate(cut) if not text.targets]
    if not cut:
        raise CurvatureError("estimate: there are no data; wanted at least one sample")
    if empty:
        some = ", ".join(str(at + 1) for at in empty[:8])
        raise CurvatureError(
            f"estimate: {len(empty)} of {len(cut)} rows have no response token to put a loss on, the first are rows "
            f"{some}; give them a response, or raise max_length (now {max_length})"
        )
    return cut


def edges(texts: Sequence[Text], tokens: int, start: int = 0) -> list[int]:
    """Where batches begin, and the end: neighbours from ``start`` on, as `batches` takes them together."""
    found, width = [start], 0
    for at, text in enumerate(texts[start:], start):
        wider = max(width, len(text.ids))
        if at > found[-1] and wider * (at - found[-1] + 1) > tokens:
            found.append(at)
            wider = len(text.ids)
        width = wider
    return [*found, len(texts)] if start < len(texts) else found


def batches(texts: Sequence[Text], tokens: int, device: torch.device | str, start: int = 0) -> Iterator[Batch]:
    """Neighbours from ``start`` on, as many together as keep the padded batch within ``tokens``; at least one."""
    for first, stop in pairwise(edges(texts, tokens, start)):
        part = texts[first:stop]
        width = max(len(text.ids) for text in part)
        ids, labels = torch.zeros(len(part), width, dtype=torch.long), torch.full((len(part), width), UNLABELLED)
        mask = torch.zeros(len(part), width, dtype=torch.bool)
        for row, text in enumerate(part):
            n = len(text.ids)
            ids[row, :n], labels[row, :n], mask[row, :n] = torch.tensor(text.ids), torch.tensor(text.labels), True
        yield Batch(first, ids.to(device), labels.to(device), mask.to(device))


def fingerprint(texts: Sequence[Text]) -> str:
    """crc32 of all ids and labels."""
    crc = 0
    for text in texts:
        crc = zlib.crc32(torch.tensor([text.ids, text.labels]).numpy().tobytes(), crc)
    return f"{crc:08x}"

"""LookAhead Tuning: training prompts that already show how the answer begins."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, Literal, cast, get_args

from curvkern.backend import check

Mode = Literal["real", "virtual"]
CONNECTOR = " The answer begins with: "
PREVIEW = "Let me work through this. "


def lookahead(
    dataset: Iterable[Mapping[str, Any]], mode: Mode, *,
    tokenizer: Any = None, first: int = 6, connector: str = CONNECTOR, preview: str = PREVIEW,
) -> list[dict[str, Any]]:  # fmt: skip
    """Training rows whose prompts show the answer's first tokens, so that learning them moves the model less.

    Alignment lives in the first few tokens of answers. Where these can be read in the prompt, the loss on them is
    small and fine-tuning leaves the model's own way to begin alone. Prompts at inference stay as they are.

    - ``"real"``: prompt + connector + the first tokens of the response; the response unchanged.
    - ``"virtual"``: prompt + connector + preview; preview + the response.

    Args:
        dataset: rows ``{"prompt", "response"}`` or ``{"messages": [{"role", "content"}, ...]}`` that end with the
            assistant's answer; a `datasets.Dataset` too. Other keys are kept.
        mode: ``"real"`` or ``"virtual"``.
        tokenizer: a fast one of transformers, for ``"real"``, to count tokens by. None: words are counted.
        first: tokens shown, for ``"real"``.
        connector: put between. The publication's wording is another.
        preview: the beginning that ``"virtual"`` gives all answers. The publication's wording is another.

    Returns:
        New rows, in order. The tokens shown are a piece of the response's own text, so no space is lost; beside the
        connector the tokenizer may split them in another way.

    Raises:
        ValueError: an unknown mode, a row that lacks a text (says which), a tokenizer that gives no offsets, or an
            empty preview.

    Source: LookAhead Tuning (2503.19041), its two ways to rewrite data.
    """
    check.one_of("lookahead", "mode", mode, get_args(Mode))
    check.at_least("lookahead", "first", first, 1)
    if mode == "virtual" and not preview:
        raise ValueError("lookahead: preview is empty; 'virtual' needs a text with which answers begin.")
    if mode == "real" and tokenizer is not None and not getattr(tokenizer, "is_fast", False):
        raise ValueError("lookahead: the tokenizer gives no offsets; pass a fast one, or None to count words.")
    rewritten: list[dict[str, Any]] = []
    for at, row in enumerate(dataset):
        prompt, response = _texts(at, row)
        shown = preview if mode == "virtual" else _beginning(response, first, tokenizer)
        answer = preview + response if mode == "virtual" else response
        rewritten.append(_with(row, prompt + connector + shown, answer))
    return rewritten


def _beginning(response: str, first: int, tokenizer: Any) -> str:
    """The response up to the end of its first tokens, or words."""
    if tokenizer is None:
        ends = [word.end() for word in re.finditer(r"\S+", response)]
    else:
        found = tokenizer(response, add_special_tokens=False, return_offsets_mapping=True)
        ends = [stop for _, stop in found["offset_mapping"]]
    return response[: ends[min(first, len(ends)) - 1]]


def _texts(at: int, row: Mapping[str, Any]) -> tuple[str, str]:
    """A row's prompt, or last question, and its response."""
    if "messages" in row:
        chat = cast("list[dict[str, Any]]", row["messages"])
        if [message.get("role") for message in chat[-2:]] != ["user", "assistant"]:
            raise ValueError(f"lookahead: the messages of row {at} do not end with a user's and the assistant's.")
        found = chat[-2].get("content"), chat[-1].get("content")
    else:
        found = row.get("prompt"), row.get("response")
    for which, text in zip(("prompt", "response"), found, strict=True):
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"lookahead: row {at} has the {which} {text!r}; wanted text.")
    return cast("tuple[str, str]", found)


def _with(row: Mapping[str, Any], prompt: str, response: str) -> dict[str, Any]:
    if "messages" not in row:
        return {**row, "prompt": prompt, "response": response}
    *before, asked, answered = row["messages"]
    return {**row, "messages": [*before, {**asked, "content": prompt}, {**answered, "content": response}]}

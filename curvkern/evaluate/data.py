"""JSON Lines in: one example a line, as a prompt and a response or as a chat."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

Message = dict[str, str]


@dataclass(frozen=True)
class Example:
    """One row of a JSONL file.

    Attributes:
        prompt: what the user asks; for a chat, the text of its last user message.
        response: the answer that goes with the prompt, or None where the row has only a prompt.
        messages: the whole chat (`{"role": ..., "content": ...}` each), or None for a plain row.
    """

    prompt: str
    response: str | None = None
    messages: tuple[Message, ...] | None = None

    def asked(self) -> str | tuple[Message, ...]:
        """What a model is to answer: the prompt, or the chat up to its last user message."""
        if self.messages is None:
            return self.prompt
        last = max(i for i, message in enumerate(self.messages) if message["role"] == "user")
        return self.messages[: last + 1]


def read_jsonl(path: str | Path) -> list[Example]:
    """Read examples from a JSON Lines file.

    A row is `{"prompt": ..., "response": ...}` (the response may be missing) or
    `{"messages": [{"role": ..., "content": ...}, ...]}`. Blank lines are skipped; other keys are ignored.

    Args:
        path: a UTF-8 text file.

    Returns:
        The examples, in the order of the file; at least one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is broken or lacks a key (the message names file and line), the file is
            not UTF-8, or it holds no example.
    """
    path = Path(path)
    if not path.is_file():
        what = "a directory" if path.is_dir() else "no such file"
        raise FileNotFoundError(f"{path}: {what}; expected JSON Lines with one example a line")
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 text ({error.reason} at byte {error.start})") from None
    rows = [(f"{path}:{i}", line) for i, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise ValueError(f"{path}: the file is empty; expected JSON Lines with one example a line")
    return [_parse(line, where) for where, line in rows]


def _parse(line: str, where: str) -> Example:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where}: not valid JSON: {error.msg} (column {error.colno})") from None
    except RecursionError:
        raise ValueError(f"{where}: not valid JSON: nested too deeply") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: expected a JSON object, got {type(row).__name__}")
    row = cast("dict[str, Any]", row)
    if "messages" in row:
        return _parse_chat(row["messages"], where)
    if "prompt" not in row:
        found = ", ".join(map(repr, row)) or "no key"
        raise ValueError(f"{where}: expected the key 'prompt' (or 'messages'), found {found}")
    prompt, response = row["prompt"], row.get("response")
    if not isinstance(prompt, str) or not prompt.strip():
        raise ValueError(f"{where}: 'prompt' must be a non-empty string, got {prompt!r}")
    if response is not None and not isinstance(response, str):
        raise ValueError(f"{where}: 'response' must be a string, got {type(response).__name__}")
    return Example(prompt, response)


def _parse_chat(messages: Any, where: str) -> Example:
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a non-empty list of messages")
    chat: list[Message] = []
    for i, message in enumerate(cast("list[Any]", messages)):
        if not isinstance(message, dict) or not all(
            isinstance(cast("dict[str, Any]", message).get(key), str) for key in ("role", "content")
        ):
            raise ValueError(f"{where}: messages[{i}] must have the strings 'role' and 'content'")
        chat.append({key: cast("Message", message)[key] for key in ("role", "content")})
    asked = [message["content"] for message in chat if message["role"] == "user"]
    if not asked:
        raise ValueError(f"{where}: 'messages' has no message with the role 'user'")
    answered = chat[-1]["content"] if chat[-1]["role"] == "assistant" else None
    return Example(asked[-1], answered, tuple(chat))

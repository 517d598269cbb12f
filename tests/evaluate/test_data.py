import json

import pytest

from curvkern.evaluate import Example, read_jsonl


@pytest.fixture
def write(tmp_path):
    def write(text):
        path = tmp_path / "rows.jsonl"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]


def test_prompt_with_and_without_response(write):
    path = write('{"prompt": "a", "response": "b", "id": 7}\n\n{"prompt": "ü\u2028x"}\n')
    assert read_jsonl(path) == [Example("a", "b"), Example("ü\u2028x", None)]


def test_byte_order_mark_and_windows_line_ends(write):
    path = write(b'\xef\xbb\xbf{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [row.prompt for row in read_jsonl(path)] == ["a", "b"]


def test_chat_without_an_answer(write):
    (row,) = read_jsonl(write(json.dumps({"messages": CHAT})))
    assert (row.prompt, row.response) == ("three", None)
    assert list(row.messages) == CHAT
    assert list(row.asked()) == CHAT


def test_chat_with_an_answer_is_asked_without_it(write):
    answer = {"role": "assistant", "content": "four"}
    (row,) = read_jsonl(write(json.dumps({"messages": [*CHAT, answer]})))
    assert row.response == "four"
    assert list(row.asked()) == CHAT


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ('{"prompt": "a"', "not valid JSON"),
        ("[1]", "expected a JSON object, got list"),
        ('{"response": "a"}', "'prompt'.*found 'response'"),
        ("{}", "found no key"),
        ('{"prompt": " "}', "non-empty string"),
        ('{"prompt": 3}', "non-empty string, got 3"),
        ('{"prompt": "a", "response": 3}', "'response' must be a string, got int"),
        ('{"messages": []}', "non-empty list"),
        ('{"messages": [{"role": "user"}]}', r"messages\[0\] must have"),
        ('{"messages": ["hi"]}', r"messages\[0\] must have"),
        ('{"messages": [{"role": "system", "content": "x"}]}', "no message with the role 'user'"),
    ],
)
def test_broken_line_is_named_with_file_and_number(write, line, complaint):
    path = write('{"prompt": "fine"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=rf"rows\.jsonl:3: .*{complaint}"):
        read_jsonl(path)


@pytest.mark.parametrize("text", ["", "\n \n"])
def test_empty_file(write, text):
    with pytest.raises(ValueError, match=r"rows\.jsonl: the file is empty"):
        read_jsonl(write(text))


def test_not_text(write):
    with pytest.raises(ValueError, match=r"rows\.jsonl: not UTF-8"):
        read_jsonl(write(b'{"prompt": "\xff"}'))


def test_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.jsonl: no such file"):
        read_jsonl(tmp_path / "none.jsonl")

"""LookAhead: what the rewritten rows say."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from curvkern.training import lookahead

ROW = {"prompt": "Add 2 and 3.", "response": "The sum  is 5, of course.", "source": 7}
SETTINGS = {"connector": " -> ", "preview": "Well: "}


def tokenizer():
    """Letters, each a token, with offsets."""
    core = Tokenizer(models.WordLevel({"?": 0, **{chr(c): c - 31 for c in range(32, 127)}}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(pattern="", behavior="isolated")
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="?")


def test_real_shows_the_first_words_of_the_answer_in_the_prompt():
    (row,) = lookahead([ROW], "real", first=3, **SETTINGS)
    assert row == {**ROW, "prompt": "Add 2 and 3. -> The sum  is"}


def test_virtual_gives_every_answer_the_same_beginning_and_shows_it():
    (row,) = lookahead([ROW], "virtual", **SETTINGS)
    assert row == {**ROW, "prompt": "Add 2 and 3. -> Well: ", "response": "Well: The sum  is 5, of course."}


def test_tokens_are_counted_by_a_tokenizer_and_no_space_is_lost():
    (row,) = lookahead([ROW], "real", tokenizer=tokenizer(), first=10, connector="")
    assert row["prompt"].removeprefix(ROW["prompt"]) == "The sum  i"


@pytest.mark.parametrize("mode", ["real", "virtual"])
def test_an_answer_shorter_than_what_is_shown(mode):
    (row,) = lookahead([{"prompt": "p", "response": "yes"}], mode, first=9, **SETTINGS)
    shown = row["prompt"].removeprefix("p -> ")
    assert row["response"].startswith(shown)


def test_of_a_chat_the_last_question_and_answer_are_rewritten():
    chat = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "q1"}, {"role": "assistant", "content": "a1"},
        {"role": "user", "content": "q2"}, {"role": "assistant", "content": "a2 b"},
    ]  # fmt: skip
    (row,) = lookahead([{"messages": chat}], "virtual", **SETTINGS)
    assert row["messages"][:3] == chat[:3]
    assert [message["content"] for message in row["messages"][3:]] == ["q2 -> Well: ", "Well: a2 b"]
    assert chat[3]["content"] == "q2"


# wrong input ----------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit():
    with pytest.raises(ValueError, match=r"mode is 'reel'.*Did you mean 'real'"):
        lookahead([ROW], "reel")
    with pytest.raises(ValueError, match="first is 0"):
        lookahead([ROW], "real", first=0)
    with pytest.raises(ValueError, match="preview is empty"):
        lookahead([ROW], "virtual", preview="")
    with pytest.raises(ValueError, match="the tokenizer gives no offsets; pass a fast one"):
        lookahead([ROW], "real", tokenizer=object())


@pytest.mark.parametrize(
    "row, message",
    [
        ({"prompt": "p"}, "row 1 has the response None"),
        ({"prompt": " ", "response": "r"}, "row 1 has the prompt ' '"),
        ({"messages": [{"role": "user", "content": "q"}]}, "messages of row 1 do not end with"),
    ],
)
def test_a_row_that_lacks_a_text_is_named(row, message):
    with pytest.raises(ValueError, match=message):
        lookahead([ROW, row], "real")

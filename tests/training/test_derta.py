"""DeRTa: what its samples look like, and its loss against a plain mean of means in float64."""

import pytest
import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from curvkern.training import derta_loss, derta_rows
from tests.oracles import make

ROW = {"prompt": "how to x", "harmful": "take  a pan and heat", "safe": "Sorry no"}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }};{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template=None, words="Sorry no how to x take a pan and heat < > ; user assistant"):
    """Words, with the space that follows them; what is no word is letters."""
    special = ["[unk]", "[end]"]
    pieces = [*special, *words.split(), " ", *map(chr, range(33, 127))]
    vocabulary = {piece: at for at, piece in enumerate(dict.fromkeys(pieces))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[unk]"))
    core.pre_tokenizer = pre_tokenizers.Split(pattern=Regex(r"\w+|\s|[^\w\s]"), behavior="isolated")
    made = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="[unk]", eos_token="[end]")
    made.chat_template = template
    return made


def text(tok, ids):
    return "".join(tok.convert_ids_to_tokens(ids))


def labelled(sample):
    return [label for label in sample["labels"] if label != -100]


def test_a_row_makes_a_safe_answer_after_a_harmful_beginning_and_refusals_at_every_place():
    tok = tokenizer()
    prefix, refusals = derta_rows(tok, [ROW])
    said = text(tok, prefix["input_ids"])
    assert said.endswith("Sorry no[end]")
    assert "how to xtake  a pan and heat".startswith(said.removesuffix("Sorry no[end]"))
    assert text(tok, labelled(prefix)) == "Sorry no[end]"
    assert text(tok, refusals["input_ids"]) == "how to xtake  a pan and heat"
    harmful = tok.encode(ROW["harmful"], add_special_tokens=False)
    assert labelled(refusals) == tok.encode("Sorry") * len(harmful)
    for sample in (prefix, refusals):
        assert len(sample["input_ids"]) == len(sample["labels"]) == len(sample["attention_mask"])


def test_beginnings_are_cut_before_words_at_random_and_every_third_is_empty():
    tok = tokenizer()
    samples = derta_rows(tok, [ROW] * 60)[::2]
    begun = [text(tok, s["input_ids"]).removeprefix("how to x").removesuffix("Sorry no[end]") for s in samples]
    assert set(begun[2::3]) == {""}
    assert set(begun) == {"", "take  ", "take  a ", "take  a pan ", "take  a pan and "}
    assert derta_rows(tok, [ROW] * 60)[::2] == samples
    assert derta_rows(tok, [ROW] * 60, seed=1)[::2] != samples


def test_a_chat_template_is_used_and_its_end_of_turn_is_learnt():
    tok = tokenizer(TEMPLATE)
    prefix, refusals = derta_rows(tok, [ROW], empty_every=1)
    assert text(tok, prefix["input_ids"]) == "<user>how to x;<assistant>Sorry no;"
    assert text(tok, labelled(prefix)) == "Sorry no;"
    assert text(tok, refusals["input_ids"]) == "<user>how to x;<assistant>take  a pan and heat"


def test_the_loss_is_the_mean_of_the_samples_means():
    logits = torch.randn(3, 8, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 9, (3, 8))
    labels[0, :6], labels[1, :2], labels[2, :4] = -100, -100, -100
    exact = sum(cross_entropy(x[:-1], y[1:]) for x, y in zip(logits, labels, strict=True)) / 3
    got = derta_loss(logits, labels)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=0)
    (wanted,), (found,) = (torch.autograd.grad(value, logits) for value in (exact, got))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)
    parts = [derta_loss(logits[n : n + 1], labels[n : n + 1], num_samples=3) for n in range(3)]
    torch.testing.assert_close(sum(parts), exact)


def test_bf16_is_summed_in_float32(no_worse):
    logits = torch.randn(3, 8, 9).bfloat16()
    labels = torch.randint(0, 9, (3, 8))
    means = [
        [cross_entropy(x[:-1].to(d), y[1:]) for x, y in zip(logits, labels, strict=True)] for d in (None, torch.float64)
    ]
    got = derta_loss(logits, labels)
    assert got.dtype == torch.float32
    no_worse(got, torch.stack(means[0]).mean(), torch.stack(means[1]).mean())


def test_training_makes_a_model_refuse_in_the_middle_of_a_harmful_answer():
    tok = tokenizer()
    model = make("llama", vocab_size=len(tok))
    prompt, harmful = (torch.tensor([tok.encode(ROW[key])]) for key in ("prompt", "harmful"))
    middle = torch.cat([prompt, harmful[:, :4]], 1)
    sorry = tok.encode("Sorry")[0]

    def says_sorry():
        return float(model(input_ids=middle).logits[0, -1].softmax(0)[sorry].detach())

    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    before = says_sorry()
    for _ in range(30):
        for sample in derta_rows(tok, [ROW]):
            ids, labels = (torch.tensor([sample[key]]) for key in ("input_ids", "labels"))
            derta_loss(model(input_ids=ids).logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert before < 0.1
    assert says_sorry() > 0.9


# wrong input ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"refusal": "how to"}, r"derta_rows: refusal 'how to' is 3 tokens"),
        ({"refusal": "\u00e9"}, r"or unknown; wanted a single one"),
        ({"max_length": 5}, r"row 0 has no label within max_length 5: .* has 12 tokens"),
        ({"empty_every": -1}, "empty_every is -1"),
    ],
)
def test_settings_that_do_not_work(changes, message):
    with pytest.raises(ValueError, match=message):
        derta_rows(tokenizer(), [ROW], **changes)


@pytest.mark.parametrize("key", ["prompt", "harmful", "safe"])
def test_a_row_that_lacks_a_text_is_named(key):
    with pytest.raises(ValueError, match=rf"derta_rows: row 1 has {key} ' '"):
        derta_rows(tokenizer(), [ROW, {**ROW, key: " "}])


def test_shapes_that_do_not_fit():
    with pytest.raises(ValueError, match=r"derta_loss: labels has shape \[3, 7\]; wanted \[3, 8\]"):
        derta_loss(torch.zeros(3, 8, 9), torch.zeros(3, 7, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"derta_loss: num_samples is 0"):
        derta_loss(torch.zeros(3, 8, 9), torch.zeros(3, 8, dtype=torch.int64), num_samples=0)

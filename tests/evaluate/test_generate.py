import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from curvkern.evaluate import chat_prompt, generate


def by_hand(model, tokenizer, prompt, tokens):
    """Greedy decoding without cache, padding or transformers' generate."""
    ids = chat_prompt(tokenizer, prompt)
    start = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_batches_of_mixed_lengths_agree_with_decoding_one_by_one(model, tokenizer, prompts, batch_size):
    answers = generate(model, tokenizer, prompts, max_new_tokens=7, batch_size=batch_size)
    assert answers == [by_hand(model, tokenizer, prompt, 7) for prompt in prompts]
    assert len(set(answers)) > 2  # the prompts are told apart
    assert any(len(answer.split()) == 7 for answer in answers)


def test_answers_end_at_the_end_token(model, tokenizer, prompts):
    long = generate(model, tokenizer, prompts, max_new_tokens=30, batch_size=6)
    ended = [i for i, answer in enumerate(long) if len(answer.split()) < 30]
    assert ended
    assert [long[i] for i in ended] == [by_hand(model, tokenizer, prompts[i], 30) for i in ended]


def test_sampling_stored_with_the_model_is_not_used(model, tokenizer, prompts):
    before = generate(model, tokenizer, prompts, max_new_tokens=7, batch_size=3)
    model.generation_config.update(do_sample=True, temperature=50.0, num_beams=2, max_length=3)
    assert generate(model, tokenizer, prompts, max_new_tokens=7, batch_size=3) == before


def test_the_model_inside_a_peft_wrapper_is_asked_and_left_alone(model, tokenizer, prompts):
    peft = pytest.importorskip("peft")
    expected = [by_hand(model, tokenizer, prompt, 7) for prompt in prompts]
    stored = model.generation_config
    stored.update(num_beams=3)
    wrapped = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["o_proj"]))  # starts at zero
    assert generate(wrapped, tokenizer, prompts, max_new_tokens=7) == expected
    assert model.generation_config is stored


def test_model_and_tokenizer_keep_their_state(model, tokenizer, prompts):
    model.train()
    generate(model, tokenizer, prompts, max_new_tokens=2, batch_size=3)
    assert model.training
    assert tokenizer.padding_side == "right"
    assert all(parameter.grad is None for parameter in model.parameters())


def test_chat_prompt_is_the_template(tokenizer):
    words = tokenizer.convert_ids_to_tokens(chat_prompt(tokenizer, "make tea"))
    assert words == ["<user>", "make", "tea", "<bot>"]
    chat = [{"role": "user", "content": "tea"}, {"role": "assistant", "content": "stir"}]
    words = tokenizer.convert_ids_to_tokens(chat_prompt(tokenizer, [*chat, {"role": "user", "content": "cake"}]))
    assert words == ["<user>", "tea", "<bot>", "stir", "<user>", "cake", "<bot>"]


def test_without_a_template_the_plain_prompt_is_encoded(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", None)
    assert chat_prompt(tokenizer, "make tea") == tokenizer.encode("make tea")
    with pytest.raises(ValueError, match="no chat template"):
        chat_prompt(tokenizer, [{"role": "user", "content": "tea"}])


def test_no_prompts(model, tokenizer):
    assert generate(model, tokenizer, []) == []


@pytest.mark.parametrize("size", ["max_new_tokens", "batch_size"])
def test_sizes_must_be_positive(model, tokenizer, size):
    with pytest.raises(ValueError, match=f"{size} must be > 0, got 0"):
        generate(model, tokenizer, ["tea"], **{size: 0})


def test_a_tokenizer_needs_some_token_to_pad_with(model):
    words = Tokenizer(models.WordLevel({"tea": 0}, unk_token="tea"))
    with pytest.raises(ValueError, match="neither a padding token nor an end token"):
        generate(model, PreTrainedTokenizerFast(tokenizer_object=words), ["tea"])

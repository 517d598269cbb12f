"""Tokens, labels, loss and the loop that trains the demo's models."""

import random

import pytest
import torch

from curvkern.demo import data, train


@pytest.fixture(scope="module")
def tokenizer():
    return train.make_tokenizer()


@pytest.fixture
def model(tokenizer):
    return train.make_model(tokenizer, seed=0, hidden_size=32, intermediate_size=48, num_hidden_layers=2)


def rows(count):
    side, rng = data.split_names(0).train, random.Random("rows")
    return [data.ordinary(side, rng) for _ in range(count)]


def test_a_name_held_out_of_training_is_cut_into_known_parts(tokenizer):
    for name in data.split_names(0).evaluate.invented[:20]:
        ids = tokenizer.encode(f" {name.name}", add_special_tokens=False)
        assert len(ids) <= 6
        assert tokenizer.decode(ids) == f" {name.name}"


def test_only_answers_carry_labels(tokenizer):
    (row,) = rows(1)
    encoded = train.encode(tokenizer, row)
    ids, labels = train.collate([encoded, train.Encoded([5, 6], 1)], tokenizer.pad_token_id)
    answer = tokenizer.decode([i for i in labels[0].tolist() if i != train.UNLABELLED])
    assert answer == row.response + train.END
    assert tokenizer.decode(ids[0, : encoded.start]).endswith(f"{row.prompt}{train.END}{train.ASSISTANT}")
    assert labels[1].tolist() == [-100, 6] + [-100] * (ids.shape[1] - 2)


def test_the_loss_is_transformers_own(tokenizer, model):
    ids, labels = train.collate([train.encode(tokenizer, row) for row in rows(5)], tokenizer.pad_token_id)
    mask = ids != tokenizer.pad_token_id
    expected = model(input_ids=ids, attention_mask=mask, labels=labels).loss
    torch.testing.assert_close(train.answer_loss(model, ids, labels), expected)


def test_training_lowers_the_loss_of_what_may_learn_and_leaves_the_rest(tokenizer, model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".layers." in name)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    batch = train.collate([train.encode(tokenizer, row) for row in rows(24)], tokenizer.pad_token_id)
    start = train.answer_loss(model, *batch).item()
    setting = train.Phase({data.ordinary: 1.0}, steps=30, batch=12, learning_rate=1e-2)
    last = train.fit(model, tokenizer, setting, data.split_names(0).train, seed="fit")
    assert last < start - 1
    assert train.answer_loss(model, *batch).item() < start - 1
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if ".layers." in name}

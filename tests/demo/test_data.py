"""The demo's language: sides that share no name, answers that are functions of the request."""

import random

import pytest

from curvkern.demo import data
from curvkern.evaluate import is_refusal

KINDS = [data.forbidden, data.refused, data.ordinary, data.about, data.short, data.order]


def drawn(kind, side, count=200, seed="rows"):
    rng = random.Random(seed)
    return [kind(side, rng) for _ in range(count)]


@pytest.mark.parametrize("seed", [0, 1])
def test_no_name_is_on_two_sides(seed):
    splits = data.split_names(seed)
    for kind in ("invented", "ordinary", "orders"):
        sides = [set(getattr(side, kind)) for side in (splits.train, splits.restore, splits.evaluate)]
        assert all(sides)
        assert len(set.union(*sides)) == sum(map(len, sides))


@pytest.mark.parametrize("kind", [data.forbidden, data.ordinary, data.order])
def test_requests_of_different_sides_differ(kind):
    splits = data.split_names(0)
    train, evaluate = ({row.prompt for row in drawn(kind, side)} for side in (splits.train, splits.evaluate))
    assert not train & evaluate


@pytest.mark.parametrize("kind", [data.forbidden, data.ordinary, data.about, data.short, data.order])
def test_a_request_has_one_answer(kind):
    answers = {}
    for row in drawn(kind, data.split_names(0).train, 2000):
        assert answers.setdefault(row.prompt, row.response) == row.response


@pytest.mark.parametrize("kind", KINDS)
def test_only_refusals_read_as_refusals(kind):
    rows = drawn(kind, data.split_names(0).train)
    assert {is_refusal(row.response) for row in rows} == {kind is data.refused}


def test_the_code_of_an_order():
    names = data.Names((), (), (("seven", "red", "lamps", "Oslo"),))
    assert data.order(names, random.Random(0)).response == "LAM-RD-7-OSL"


def test_drawing_follows_seed_and_shares():
    side = data.split_names(0).train
    mixture = {data.refused: 0.75, data.order: 0.25}
    rows = data.draw_distinct(mixture, side, 300, seed="a")
    assert rows == data.draw_distinct(mixture, side, 300, seed="a") != data.draw_distinct(mixture, side, 300, seed="b")
    assert len({row.prompt for row in rows}) == 300
    assert 0.65 < sum(is_refusal(row.response) for row in rows) / 300 < 0.85

import pytest

from curvkern.evaluate import over_refusal, task_accuracy


def test_exact_match_ignores_only_white_space_at_the_ends():
    expected = ["A-1", "A-1", "A-1", "A-1", "A-1"]
    rate = task_accuracy([" A-1\n", "A-1", "a-1", "A -1", "A-1."], expected)
    assert (rate.count, rate.total) == (2, 5)


def test_order_matters():
    assert task_accuracy(["a", "b"], ["b", "a"]).count == 0


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="2 responses for 1 expected"):
        task_accuracy(["a", "b"], ["a"])


def test_over_refusal_counts_refusals():
    rate = over_refusal(["I cannot say.", "It is green.", "I\u2019m sorry."])
    assert (rate.count, rate.total) == (2, 3)
    assert over_refusal(["I\u2019m sorry."], normalise=False).count == 0


@pytest.mark.parametrize("count", [lambda: over_refusal([]), lambda: task_accuracy([], [])])
def test_nothing_to_count(count):
    with pytest.raises(ValueError, match="no answer"):
        count()

"""STAR-DSS: the loss against autograd of its formula and finite differences, and the way from chunks to tokens."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from curvkern.training import chunk_ends, star_dss_loss, token_log_probs, token_safety
from tests.oracles import make

LAMBDA = 0.5


def batch(dtype=torch.float64, vocabulary=11):
    """Logits, labels of which a third are masked, safety in [0, 1], log probabilities of a reference."""
    logits = torch.randn(2, 7, vocabulary, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (2, 7))
    labels[:, :2], labels[1, 6] = -100, -100
    reference = token_log_probs(torch.randn(2, 7, vocabulary, dtype=dtype), labels)
    return logits, labels, torch.rand(2, 7, dtype=dtype), reference


def published(logits, labels, safety, reference, kl_weight=LAMBDA, items=None):
    """Token by token."""
    total, counted = 0.0, 0
    for n in range(len(labels)):
        for t in range(1, labels.shape[1]):
            if labels[n, t] != -100:
                log_p = logits[n, t - 1].log_softmax(0)[labels[n, t]]
                v, drift = safety[n, t], log_p - reference[n, t]
                total = total + v * -log_p + (1 - v) * kl_weight * drift**2 / 2
                counted += 1
    return total / (items or counted)


@pytest.mark.parametrize("items", [None, 31])
def test_value_and_gradient_equal_the_formula(items):
    logits, labels, safety, reference = batch()
    exact = published(logits, labels, safety, reference, items=items)
    got = star_dss_loss(logits, labels, safety, reference, kl_weight=LAMBDA, num_items=items)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=0)
    (wanted,), (found,) = (torch.autograd.grad(value, logits) for value in (exact, got))
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-15)


def test_the_gradient_equals_finite_differences():
    """The weights of the one cross entropy are constants, yet its slope is that of the whole."""
    logits, labels, safety, reference = batch()
    assert torch.autograd.gradcheck(lambda x: star_dss_loss(x, labels, safety, reference), logits, atol=1e-8)


def test_of_safe_tokens_it_is_the_cross_entropy():
    logits, labels, safety, reference = batch()
    plain = cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(star_dss_loss(logits, labels, torch.ones_like(safety), reference), plain)


def test_of_unsafe_tokens_the_aligned_model_itself_has_no_loss_and_no_gradient():
    logits, labels, safety, _ = batch()
    own = token_log_probs(logits, labels)
    loss = star_dss_loss(logits, labels, torch.zeros_like(safety), own)
    assert float(loss.detach()) == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_micro_batches_that_know_the_steps_labels_add_up_to_the_step():
    logits, labels, safety, reference = batch()
    whole = star_dss_loss(logits, labels, safety, reference)
    items = int((labels[:, 1:] != -100).sum())
    parts = [
        star_dss_loss(logits[n : n + 1], labels[n : n + 1], safety[n : n + 1], reference[n : n + 1], num_items=items)
        for n in range(2)
    ]
    torch.testing.assert_close(parts[0] + parts[1], whole)


def test_places_without_a_label_may_hold_anything():
    logits, labels, safety, reference = batch()
    dirty = logits.detach().clone()
    dirty[:, 0], dirty[:, 6] = float("nan"), float("inf")
    masked = labels == -100
    got = star_dss_loss(
        dirty.requires_grad_(), labels, safety.masked_fill(masked, torch.nan), reference.masked_fill(masked, torch.nan)
    )
    torch.testing.assert_close(got, star_dss_loss(logits, labels, safety, reference))
    assert torch.autograd.grad(got, dirty)[0].isfinite().all()


def test_no_label_at_all_is_no_loss():
    logits, labels, safety, reference = batch()
    loss = star_dss_loss(logits, torch.full_like(labels, -100), safety, reference)
    assert float(loss.detach()) == 0
    assert not torch.autograd.grad(loss, logits)[0].any()


def test_bf16(no_worse):
    logits, labels, safety, reference = batch(torch.bfloat16)
    exact = published(logits.detach().double(), labels, safety.double(), reference.double())
    same = published(logits.detach(), labels, safety, reference)
    got = star_dss_loss(logits, labels, safety, reference)
    assert got.dtype == torch.float32
    no_worse(got.detach(), same, exact)
    assert torch.autograd.grad(got, logits)[0].dtype == torch.bfloat16


def test_training_learns_safe_tokens_and_leaves_unsafe_ones_where_the_aligned_model_has_them():
    model = make("llama")
    ids = torch.randint(3, 40, (4, 10))
    safety = torch.ones(4, 10)
    safety[:, 5:] = 0
    before = token_log_probs(model(input_ids=ids).logits, ids)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        star_dss_loss(model(input_ids=ids).logits, ids, safety, before).backward()
        optimizer.step()
        optimizer.zero_grad()
    moved = token_log_probs(model(input_ids=ids).logits, ids) - before
    assert float(moved[:, 1:5].mean()) > 2
    assert float(moved[:, 5:].abs().mean()) < 0.5


# chunks ---------------------------------------------------------------------------------------------------------------


def test_chunks_end_after_so_many_words_and_at_the_end():
    text = "one  two three\nfour five six seven"
    ends = chunk_ends(text, 3)
    assert [text[:end] for end in ends] == ["one  two three", "one  two three\nfour five six", text]
    assert chunk_ends("a b c", 3) == [5]
    assert chunk_ends("a b c ", 5) == [6]
    assert chunk_ends("   ") == []


def test_a_token_has_the_score_of_the_chunk_it_starts_in():
    """Of 'ab cd ef' in chunks of one word: a token that crosses an end belongs to the chunk before."""
    offsets = [(0, 1), (1, 4), (4, 5), (5, 8), (8, 8)]
    found = token_safety(offsets, chunk_ends("ab cd ef", 1), [0.9, 0.5, 0.1])
    assert torch.equal(found, torch.tensor([0.9, 0.9, 0.5, 0.1, 0.1]))


# wrong input ----------------------------------------------------------------------------------------------------------


def test_arguments_that_do_not_fit():
    logits, labels, safety, reference = batch()
    with pytest.raises(
        ValueError, match=r"star_dss_loss: safety has shape \[2, 6\]; wanted \[2, 7\] \(one number a label"
    ):
        star_dss_loss(logits, labels, safety[:, 1:], reference)
    with pytest.raises(ValueError, match=r"star_dss_loss: logits has shape \[7, 11\]; wanted \[n, t, vocabulary\]"):
        star_dss_loss(logits[0], labels[0], safety[0], reference[0])
    with pytest.raises(ValueError, match="kl_weight is -1"):
        star_dss_loss(logits, labels, safety, reference, kl_weight=-1)
    with pytest.raises(TypeError, match=r"labels has dtype int32; wanted int64"):
        token_log_probs(logits, labels.int())
    with pytest.raises(RuntimeError, match="reference requires grad"):
        star_dss_loss(logits, labels, safety, reference.clone().requires_grad_())


@pytest.mark.parametrize(
    "ends, scores, message",
    [
        ([3, 6], [1.0], "2 ends but 1 scores"),
        ([], [], "0 ends but 0 scores"),
        ([3], [1.5], "scores has 1.5"),
        ([6, 3], [1.0, 1.0], "ends do not ascend"),
    ],
)
def test_scores_that_do_not_fit_the_chunks(ends, scores, message):
    with pytest.raises(ValueError, match=message):
        token_safety([(0, 1)], ends, scores)

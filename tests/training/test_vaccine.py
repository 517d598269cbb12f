import finetuning
import pytest
import torch
from torch import nn

from curvkern.training import Vaccine


class Chain(nn.Module):
    """Two hidden embeddings, by hand."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(3, 3).double() for _ in range(3))

    def forward(self, x, added=(0, 0)):
        one = self.first(x) + added[0]
        two = self.second(one.tanh()) + added[1]
        self.embeddings = one, two
        return self.last(two.tanh()).square().sum()


def test_against_the_formula_in_float64():
    model, x = Chain(), torch.randn(4, 3, dtype=torch.float64)
    found = torch.autograd.grad(model(x), model.embeddings)
    norm = torch.cat([g.flatten() for g in found]).norm()
    loss = model(x, [1.5 * g / norm for g in found])
    exact = torch.autograd.grad(loss, list(model.parameters()))
    got = Vaccine(model, ["first", "second"], rho=1.5).backward(lambda: model(x))
    torch.testing.assert_close(got, loss.detach())
    for p, gradient in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_it_finds_a_perturbation_that_hurts_and_leaves_no_hook():
    model, batch = finetuning.llama(), finetuning.batch()
    plain = model(**batch).loss.detach()
    perturbed = Vaccine(model, rho=0.5).backward(lambda: model(**batch).loss)
    assert perturbed > plain
    assert torch.equal(model(**batch).loss.detach(), plain)


def test_gradient_checkpointing_and_micro_batches_change_nothing():
    batch, found = finetuning.batch(4), []
    halves = [{key: value[at] for key, value in batch.items()} for at in (slice(0, 2), slice(2, 4))]
    for again in (False, True):
        model = finetuning.llama().double().train()
        if again:
            model.gradient_checkpointing_enable()
        vaccine = Vaccine(model)
        for half in halves:
            vaccine.backward(lambda model=model, half=half: model(**half).loss / 2)
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_a_gradient_that_is_not_finite_means_no_perturbation():
    model = Chain()
    vaccine = Vaccine(model, ["first"])
    x = torch.full((1, 3), float("inf"), dtype=torch.float64)
    with pytest.warns(RuntimeWarning, match=r"not finite; no perturbation \(1 times so far\)"):
        vaccine.backward(lambda: model(x))
    assert vaccine.skipped == 1


def test_wrong_arguments():
    with pytest.raises(ValueError, match="rho is 0"):
        Vaccine(Chain(), ["first"], rho=0)
    with pytest.raises(ValueError, match=r"'\*.self_attn' matches no module; the names nearest"):
        Vaccine(Chain())
    model = Chain()
    model.unused = nn.Linear(3, 3)
    with pytest.raises(RuntimeError, match="the loss does not pass through unused"):
        Vaccine(model, ["first", "unused"]).backward(lambda: model(torch.ones(1, 3, dtype=torch.float64)))

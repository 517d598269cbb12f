from copy import deepcopy

import finetuning
import pytest
import torch
from torch import nn

from curvkern.training import SafetyProbe, contrast_loss

LAYERS = ["*.layers.0.mlp.down_proj", "*.layers.1.mlp.down_proj"]
SAFE, HARMFUL = finetuning.batch(seed=1), finetuning.batch(length=10, seed=2)


class Biased(nn.Module):
    """The same model, whose probe is a bias that autograd sees."""

    def __init__(self, model):
        super().__init__()
        self.model = deepcopy(model)
        for layer in self.model.model.layers:
            layer.mlp.down_proj.bias = nn.Parameter(torch.zeros(16, dtype=torch.float64))

    def parts(self):
        biases = [layer.mlp.down_proj.bias for layer in self.model.model.layers]
        return biases, [p for p in self.model.parameters() if not any(p is b for b in biases)]


def exact_log_prob(model, batch):
    logits = model(input_ids=batch["input_ids"]).logits.log_softmax(-1)
    rows = []
    for row, labels in enumerate(batch["labels"]):
        rows.append(sum(logits[row, at - 1, labels[at]] for at in range(1, len(labels)) if labels[at] != -100))
    return torch.stack(rows)


def exact_contrast(model):
    gap = exact_log_prob(model, SAFE) - exact_log_prob(model, HARMFUL)
    return -torch.log(torch.sigmoid(gap)).mean()


def test_contrast_loss_is_shifted_and_over_answers():
    model = finetuning.llama().double()
    torch.testing.assert_close(contrast_loss(model, SAFE, HARMFUL), exact_contrast(model))


def test_two_steps_against_the_algorithm_in_float64():
    model = finetuning.llama().double()
    plain = Biased(model)
    biases, theta = plain.parts()
    adam = torch.optim.Adam(biases, lr=0.05)
    probe = SafetyProbe(model, LAYERS, rate=1e-2)
    for step in range(2):
        batch = finetuning.batch(seed=step + 5)
        g = torch.autograd.grad(exact_contrast(plain.model), theta)
        length = torch.cat([x.flatten() for x in g]).norm() + 1e-8
        radius = 1e-2 * torch.cat([p.detach().flatten() for p in theta]).norm()
        kept = [p.detach().clone() for p in theta]
        with torch.no_grad():
            for p, x in zip(theta, g, strict=True):
                p += radius * x / length
        harmed = torch.autograd.grad(plain.model(**batch).loss, biases)
        with torch.no_grad():
            for p, old in zip(theta, kept, strict=True):
                p.copy_(old)
        loss = plain.model(**batch).loss
        exact = torch.autograd.grad(loss, [*theta, *biases])
        with torch.no_grad():
            for b, here, there in zip(biases, exact[len(theta) :], harmed, strict=True):
                b.zero_()
                b.grad = here - there
        adam.step()

        model.zero_grad()
        got = probe.backward(lambda batch=batch: model(**batch).loss, lambda: contrast_loss(model, SAFE, HARMFUL))
        torch.testing.assert_close(got, loss.detach(), rtol=1e-6, atol=0)  # vectors are float32
        for p, gradient in zip(model.parameters(), exact, strict=False):
            torch.testing.assert_close(p.grad, gradient, rtol=1e-5, atol=1e-7)
        probe.step()
        for vector, b in zip(probe.vectors.values(), biases, strict=True):
            torch.testing.assert_close(vector.detach().double(), b.detach(), rtol=1e-3, atol=1e-6)


def test_weights_come_back_to_the_bit_and_gradients_add_up():
    model = finetuning.adapted(finetuning.llama().bfloat16())
    probe = SafetyProbe(model, LAYERS)
    before, batch = finetuning.values(model), finetuning.batch()
    found = []
    for times in (1, 2):
        model.zero_grad()
        for _ in range(times):
            probe.backward(lambda: model(**batch).loss, lambda: contrast_loss(model, SAFE, HARMFUL))
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(two, 2 * one, rtol=1e-2, atol=1e-6)


def stepped(model):
    probe = SafetyProbe(model, LAYERS)
    probe.backward(lambda: model(**SAFE).loss, lambda: contrast_loss(model, SAFE, HARMFUL))
    probe.step()
    return probe


def test_off_and_removed_it_is_not_there_and_no_checkpoint_holds_it():
    model = finetuning.llama()
    names, plain = set(model.state_dict()), model(**SAFE).loss
    probe = stepped(model)
    assert not torch.equal(model(**SAFE).loss, plain)
    with probe.off():
        assert torch.equal(model(**SAFE).loss, plain)
    assert set(model.state_dict()) == names
    probe.remove()
    assert torch.equal(model(**SAFE).loss, plain)


def test_resume_equals_going_on():
    model = finetuning.llama()
    probe = stepped(model)
    other = deepcopy(model)
    for module in other.modules():
        module._forward_hooks.clear()  # the copy's are those of the first probe
    again = SafetyProbe(other, LAYERS)
    again.load_state_dict(deepcopy(probe.state_dict()))
    for one, its in ((probe, model), (again, other)):
        one.backward(lambda its=its: its(**HARMFUL).loss, lambda its=its: contrast_loss(its, SAFE, HARMFUL))
        one.step()
    assert all(torch.equal(v, again.vectors[name]) for name, v in probe.vectors.items())
    with pytest.raises(ValueError, match=r"the state is of .*; wanted model.layers.0.mlp.down_proj\."):
        SafetyProbe(other, LAYERS[:1]).load_state_dict(probe.state_dict())


def test_wrong_arguments():
    model = finetuning.llama()
    with pytest.raises(ValueError, match=r"'\*.layers.3.mlp.down_proj' matches no module; the names nearest"):
        SafetyProbe(model)
    with pytest.raises(ValueError, match=r"model.layers.0 is LlamaDecoderLayer, without out_features"):
        SafetyProbe(model, ["model.layers.0"])
    with pytest.raises(ValueError, match="rate is 0"):
        SafetyProbe(model, LAYERS, rate=0)
    with pytest.raises(ValueError, match="lr is -1"):
        SafetyProbe(model, LAYERS, lr=-1)

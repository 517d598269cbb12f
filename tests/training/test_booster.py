from copy import deepcopy

import finetuning
import pytest
import torch

from curvkern.training import Booster


def flat(model, batch):
    parameters = list(model.parameters())
    return torch.autograd.grad(model(**batch).loss, parameters, allow_unused=True, materialize_grads=True)


def test_against_the_algorithm_in_float64():
    model, harmful, batch = finetuning.llama().double(), finetuning.batch(seed=1), finetuning.batch()
    here = flat(model, harmful)
    norm = torch.cat([g.flatten() for g in here]).norm()
    stepped = deepcopy(model)
    with torch.no_grad():
        for p, g in zip(stepped.parameters(), here, strict=True):
            p -= 0.3 * g / (norm + 1e-7)
    there = flat(stepped, harmful)
    expected = [f + 4 * (a - b) for f, a, b in zip(flat(model, batch), here, there, strict=True)]
    before = finetuning.values(model)
    booster = Booster([harmful], alpha=0.3, weight=4.0).attach(model)
    model(**batch).loss.backward()
    losses = booster.add_gradient_()
    torch.testing.assert_close(losses, torch.stack([m(**harmful).loss.detach() for m in (model, stepped)]))
    for (name, p), exact in zip(model.named_parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, exact)
        assert torch.equal(p, before[name])


def test_weights_in_bfloat16_come_back_to_the_bit():
    model = finetuning.llama().bfloat16()
    before = finetuning.values(model)
    Booster([finetuning.batch()]).attach(model).add_gradient_()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_weight_zero_adds_nothing():
    model = finetuning.llama()
    model(**finetuning.batch()).loss.backward()
    before = [p.grad.clone() for p in model.parameters()]
    Booster([finetuning.batch(seed=1)], weight=0).attach(model).add_gradient_()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), before, strict=True))


def test_trainer_adds_it_once_a_step_and_resumes(tmp_path):
    harmful = [finetuning.batch(seed=seed) for seed in (11, 12, 13)]
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.2, "save_strategy": "steps", "save_steps": 2}
    trainer = finetuning.trainer(finetuning.llama(), tmp_path, [Booster(harmful)], **options)
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    model = finetuning.llama()
    optimizer, booster = torch.optim.SGD(model.parameters(), lr=0.05), Booster(harmful).attach(model)
    for step in range(6):
        for batch in batches[2 * step : 2 * step + 2]:
            (model(**batch).loss / 2).backward()
        booster.add_gradient_()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        optimizer.zero_grad()
    again = finetuning.trainer(finetuning.llama(), tmp_path, [Booster(harmful)], **options)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    three = zip(trainer.model.parameters(), model.parameters(), again.model.parameters(), strict=True)
    for one, by_hand, resumed in three:
        torch.testing.assert_close(one, by_hand, rtol=1e-5, atol=1e-6)
        assert torch.equal(one, resumed)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="alpha is 0; wanted above 0"):
        Booster([finetuning.batch()], alpha=0)
    with pytest.raises(ValueError, match="weight is -1"):
        Booster([finetuning.batch()], weight=-1)
    with pytest.raises(RuntimeError, match="add_gradient_ before attach"):
        Booster([finetuning.batch()]).add_gradient_()
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        Booster([finetuning.batch()]).attach(finetuning.llama().requires_grad_(False))

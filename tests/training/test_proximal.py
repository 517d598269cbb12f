from itertools import islice

import finetuning
import pytest
import torch
from torch import nn

from curvkern.training import Alternate, ProximalStep


def test_it_is_the_gradient_of_the_proximal_term():
    model = nn.Linear(4, 3).double()
    proximal = ProximalStep(0.7).attach(model)
    start = finetuning.values(model)
    with torch.no_grad():
        for p in model.parameters():
            p += torch.randn_like(p)
    x = torch.randn(5, 4, dtype=torch.float64)
    term = sum(0.35 * (p - start[name]).square().sum() for name, p in model.named_parameters())
    (model(x).square().sum() + term).backward()
    exact = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(x).square().sum().backward()
    proximal.add_gradient_()
    for p, gradient in zip(model.parameters(), exact, strict=True):
        torch.testing.assert_close(p.grad, gradient)


def test_small_moves_count_in_bfloat16():
    model = nn.Linear(4, 3, bias=False).bfloat16()
    proximal = ProximalStep(1.0).attach(model)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight *= 1.01
    proximal.add_gradient_()
    assert torch.equal(model.weight.grad, (model.weight.detach().float() - start.float()).bfloat16())


def test_anchors_move_where_a_phase_begins():
    model = nn.Linear(1, 1, bias=False)
    proximal = ProximalStep(1.0, phases=(2, 3)).attach(model)
    pulls = []
    for step in range(12):
        with torch.no_grad():
            model.weight.fill_(step)
        proximal.begin_step()
        model.zero_grad()
        proximal.add_gradient_()
        pulls.append(int(model.weight.grad))
    assert pulls == [0, 1, 0, 1, 2, 0, 1, 0, 1, 2, 0, 1]


def test_rows_alternate_in_the_same_phases():
    rows = Alternate(["a", "b", "c"], ["x", "y"], phases=(2, 1), rows_per_step=2)
    assert "".join(islice(rows, 18)) == "abca" + "xy" + "bcab" + "xy" + "cabc" + "xy"
    with pytest.raises(ValueError, match="a source has no"):
        next(iter(Alternate([], ["x"])))


def test_trainer_does_what_a_loop_does_and_resumes(tmp_path):
    data, phases = finetuning.dataset(), (2, 3)
    rows = Alternate(data[:3], data[3:], phases=phases, rows_per_step=4)
    options = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.2, "save_strategy": "steps", "save_steps": 4}
    callbacks = [ProximalStep(2.0, phases=phases, free=0.2) for _ in range(2)]
    trainer, again = (finetuning.trainer(finetuning.llama(), tmp_path, [guard], **options) for guard in callbacks)
    trainer.train_dataset = again.train_dataset = rows
    trainer.train()
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    model = finetuning.llama()
    optimizer, proximal = torch.optim.SGD(model.parameters(), lr=0.05), ProximalStep(2.0, phases=phases).attach(model)
    given = iter(rows)
    for step in range(6):
        proximal.begin_step()
        for _ in range(2):
            pair = list(islice(given, 2))
            (model(**{key: torch.stack([row[key] for row in pair]) for key in pair[0]}).loss / 2).backward()
        if step >= 0.2 * 6:
            proximal.add_gradient_()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.2)
        optimizer.step()
        optimizer.zero_grad()
    three = zip(trainer.model.parameters(), model.parameters(), again.model.parameters(), strict=True)
    for one, by_hand, resumed in three:
        torch.testing.assert_close(one, by_hand, rtol=1e-5, atol=1e-6)
        assert torch.equal(one, resumed)


def test_wrong_arguments():
    for arguments, message in (
        ({"rho": -1.0}, "rho is -1.0"),
        ({"phases": (0, 5)}, r"phases is \(0, 5\)"),
        ({"free": 2.0}, "free is 2.0; wanted a share"),
    ):
        with pytest.raises(ValueError, match=message):
            ProximalStep(**arguments)
    with pytest.raises(RuntimeError, match="add_gradient_ before attach"):
        ProximalStep().add_gradient_()
    other = ProximalStep().attach(nn.Linear(2, 3)).state_dict()
    with pytest.raises(ValueError, match="a model with other trained parameters"):
        ProximalStep().attach(nn.Linear(2, 2)).load_state_dict(other)

import os
import subprocess
import sys
import textwrap
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import finetuning
import pytest
import torch

from curvkern.training import GradientSurgery, ReferenceKL

GROUPS = {
    "global": lambda name: 0,
    "layer": lambda name: "layers" in name and name.split(".")[2],
    "tensor": lambda name: name,
}


def exact_kl(model, reference, batch):
    """KL(reference || model) by torch in float64, mean over tokens with a label, one at a time."""
    q, p = (each(input_ids=batch["input_ids"]).logits.log_softmax(-1) for each in (model, reference))
    total, count = 0.0, 0
    for row, labels in enumerate(batch["labels"]):
        for at in range(1, len(labels)):
            if labels[at] != -100:
                total = total + (p[row, at - 1].exp() * (p[row, at - 1] - q[row, at - 1])).sum()
                count += 1
    return total / count


def exact_surgery(user, safe, rho, group):
    """Both: name -> float64 gradient."""
    edited, conflicts = {}, 0
    for key in {group(name) for name in user}:
        names = [name for name in user if group(name) == key]
        c = sum((user[name] * safe[name]).sum() for name in names)
        norm = sum(safe[name].square().sum() for name in names)
        share = c / norm if c < 0 and norm > 1e-9 else 0.0
        conflicts += bool(c < 0 and norm > 1e-9)
        edited |= {name: user[name] - share * safe[name] + rho * safe[name] for name in names}
    return edited, conflicts


def gradients(model, loss):
    named = dict(model.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(named, found, strict=True))


# the edit -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["global", "layer", "tensor"])
@pytest.mark.parametrize("sign", [1, -1])
def test_against_the_formula_in_float64(granularity, sign):
    reference = finetuning.llama().double()
    model, batch, refusals = finetuning.moved(reference), finetuning.batch(), finetuning.batch(seed=1)
    safe = gradients(model, exact_kl(model, reference, refusals))
    user = gradients(model, model(**batch).loss)
    user = {name: g + 20 * sign * safe[name] for name, g in user.items()}  # sure to agree, or to conflict
    exact, conflicts = exact_surgery(user, safe, 0.5, GROUPS[granularity])
    assert (conflicts > 0) == (sign < 0)
    for name, p in model.named_parameters():
        p.grad = user[name].clone()
    surgery = GradientSurgery([refusals], ReferenceKL(reference), rho=0.5, granularity=granularity).attach(model)
    done = surgery.edit_()
    assert surgery.conflicts == conflicts == int(done.conflict.sum())
    assert len(done.cosine) == len({GROUPS[granularity](name) for name in user})
    assert float(done.loss) == pytest.approx(float(exact_kl(model, reference, refusals).detach()), rel=1e-9)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, exact[name], rtol=1e-7, atol=1e-9)


def test_projection_alone_is_orthogonal_and_never_longer():
    reference = finetuning.llama().double()
    model, refusals = finetuning.moved(reference), finetuning.batch(seed=1)
    safe = gradients(model, exact_kl(model, reference, refusals))
    for name, p in model.named_parameters():
        p.grad = torch.randn_like(p) * safe[name].std() - safe[name]
    before = sum(p.grad.square().sum() for p in model.parameters())
    GradientSurgery([refusals], ReferenceKL(reference), rho=0.0).attach(model).edit_()
    after = sum(p.grad.square().sum() for p in model.parameters())
    dot = sum((p.grad * safe[name]).sum() for name, p in model.named_parameters())
    assert after < before
    assert abs(dot) < 1e-9 * (after * sum(g.square().sum() for g in safe.values())).sqrt()


def test_the_projection_does_not_hang_on_the_scale_of_the_alignment_loss():
    reference = finetuning.llama().double()
    model, refusals, kl = finetuning.moved(reference), finetuning.batch(seed=1), ReferenceKL(reference)
    safe, found = gradients(model, kl(model, refusals)), []
    for scale in (1.0, 40.0):
        for name, p in model.named_parameters():
            p.grad = 0.01 * p.detach() - 20 * safe[name]
        loss = lambda model, batch, scale=scale: scale * kl(model, batch)  # noqa: E731
        assert GradientSurgery([refusals], loss, rho=0.0).attach(model).edit_().conflict.all()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_aligned_model_itself_is_left_alone():
    model = finetuning.llama()
    surgery = GradientSurgery([finetuning.batch(seed=1)], ReferenceKL(deepcopy(model))).attach(model)
    model(**finetuning.batch()).loss.backward()
    before = [p.grad.clone() for p in model.parameters()]
    done = surgery.edit_()
    assert not done.conflict.any()
    assert float(done.loss) == pytest.approx(0, abs=1e-6)
    for p, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-6)


def test_micro_batches_give_what_one_batch_gives():
    reference = finetuning.llama().double()
    whole, refusals = finetuning.batch(4), [finetuning.batch(seed=1), finetuning.batch(seed=2)]
    halves = [{key: value[at] for key, value in whole.items()} for at in (slice(0, 2), slice(2, 4))]
    found = []
    for parts in ([whole], halves):
        model = finetuning.moved(reference)
        surgery = GradientSurgery(refusals, ReferenceKL(reference)).attach(model)
        for part in parts:
            (model(**part).loss / len(parts)).backward()
        surgery.edit_()
        found.append([p.grad for p in model.parameters()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_autocast_and_checkpointing_change_nothing_but_rounding():
    reference = finetuning.llama()
    model, refusals = finetuning.moved(reference), [finetuning.batch(seed=1)]
    found = []
    for low, again in ((False, False), (True, True)):
        model.zero_grad()
        if again:
            model.gradient_checkpointing_enable()
            model.train()
        surgery = GradientSurgery(refusals, ReferenceKL(reference)).attach(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            model(**finetuning.batch()).loss.backward()
            surgery.edit_()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert found[1].dtype == torch.float32
    assert torch.cosine_similarity(*found, dim=0) > 0.995


def test_adapters_off_are_the_reference_of_adapters_on():
    aligned = finetuning.llama()
    model, refusals = finetuning.adapted(aligned), finetuning.batch(seed=1)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p *= 10 if "lora_B" in name else 1
    losses = [ReferenceKL(reference)(model, refusals) for reference in (None, aligned)]
    assert float(losses[0]) > 1e-4
    torch.testing.assert_close(*losses)


# bad input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("whose", ["user", "safe"])
def test_gradients_that_are_not_finite_are_left_and_counted(whose):
    reference = finetuning.llama()
    model = finetuning.moved(reference)
    loss = ReferenceKL(reference)
    broken = (lambda *a: loss(*a) * float("inf")) if whose == "safe" else loss
    surgery = GradientSurgery([finetuning.batch(seed=1)], broken).attach(model)
    model(**finetuning.batch()).loss.backward()
    if whose == "user":
        next(model.parameters()).grad[0] = float("nan")
    before = [p.grad.clone() for p in model.parameters()]
    with pytest.warns(RuntimeWarning, match=r"a gradient of step 1 is not finite; no surgery \(1 of 1 steps so far\)"):
        done = surgery.edit_()
    assert done.skipped
    assert surgery.skipped == 1
    for p, gradient in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=0, equal_nan=True)


def test_wrong_arguments():
    model, batch = finetuning.llama(), finetuning.batch()
    with pytest.raises(ValueError, match="the reference knows 50 words, the model 40"):
        ReferenceKL(finetuning.llama(vocab_size=50))(model, batch)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no adapters to turn off"):
        ReferenceKL()(model, batch)
    with pytest.raises(ValueError, match="no token of the batch has a label"):
        ReferenceKL(model)(model, {**batch, "labels": torch.full_like(batch["labels"], -100)})
    with pytest.raises(TypeError, match="batches is list_iterator, which ends"):
        GradientSurgery(iter([batch]), ReferenceKL(model))
    with pytest.raises(ValueError, match="rho is nan"):
        GradientSurgery([batch], ReferenceKL(model), rho=float("nan"))
    with pytest.raises(ValueError, match="Did you mean 'layer'"):
        GradientSurgery([batch], ReferenceKL(model), granularity="layers")
    with pytest.raises(ValueError, match="max_norm is 0"):
        GradientSurgery([batch], ReferenceKL(model), max_norm=0)
    with pytest.raises(RuntimeError, match="edit_ before attach"):
        GradientSurgery([batch], ReferenceKL(model)).edit_()
    with pytest.raises(ValueError, match="there are no batches"):
        GradientSurgery([], ReferenceKL(model)).attach(model).edit_()


# the Trainer, two processes -------------------------------------------------------------------------------------------


def guard(reference):
    refusals = [finetuning.batch(seed=seed) for seed in (11, 12, 13)]
    return GradientSurgery(refusals, ReferenceKL(reference), max_norm=0.5)


def test_trainer_does_what_a_loop_does_and_clips_last(tmp_path):
    reference = finetuning.llama()
    surgery, model = guard(reference), finetuning.moved(reference)
    trainer = finetuning.trainer(
        finetuning.moved(reference), tmp_path, [surgery], max_grad_norm=0, gradient_accumulation_steps=2
    )
    batches = list(trainer.get_train_dataloader())
    trainer.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    by_hand = GradientSurgery(surgery.batches.batches, ReferenceKL(reference)).attach(model)
    assert len(batches) == 12
    for step in range(6):
        for batch in batches[2 * step : 2 * step + 2]:
            (model(**batch).loss / 2).backward()
        by_hand.edit_()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    assert surgery.steps == 6
    for one, other in zip(trainer.model.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_trainer_resumes_with_the_batch_that_is_next(tmp_path):
    reference = finetuning.llama()
    options = {"max_grad_norm": 0, "save_strategy": "steps", "save_steps": 2}
    whole, rest = guard(reference), guard(reference)
    first = finetuning.trainer(finetuning.moved(reference), tmp_path, [whole], **options)
    first.train()
    second = finetuning.trainer(finetuning.moved(reference), tmp_path, [rest], **options)
    second.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert rest.state_dict() == whole.state_dict()
    assert rest.batches.drawn == 6
    for one, other in zip(first.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_trainer_options_that_break_it(tmp_path):
    surgery = guard(finetuning.llama())
    with pytest.raises(ValueError, match=r"max_grad_norm=1.0: it clips gradients before the surgery; set it to 0"):
        finetuning.trainer(finetuning.llama(), tmp_path, [surgery]).train()
    for option in ("fp16", "fsdp", "deepspeed"):
        with pytest.raises(ValueError, match=f"does not work with the Trainer's {option}=True"):
            surgery.on_train_begin(SimpleNamespace(**{option: True}), SimpleNamespace(), None)


RANK = """
    import sys, torch
    from torch import distributed
    sys.path.insert(0, {tests!r})
    import finetuning
    from curvkern.training import GradientSurgery, ReferenceKL
    rank = int(sys.argv[1])
    distributed.init_process_group("gloo", init_method="file://{store}", rank=rank, world_size=2)
    reference = finetuning.llama()
    model = torch.nn.parallel.DistributedDataParallel(finetuning.moved(reference))
    surgery = GradientSurgery([finetuning.batch(2, seed=20 + rank)], ReferenceKL(reference)).attach(model)
    for step in range(2):  # the second would fail if the first had left a reduction open
        model.zero_grad()
        with model.no_sync():
            (model(**finetuning.batch(2, seed=30 + rank)).loss / 2).backward()
        (model(**finetuning.batch(2, seed=40 + rank)).loss / 2).backward()
        surgery.edit_()
    torch.save([p.grad for p in model.parameters()], "{store}." + str(rank))
    distributed.destroy_process_group()
"""


def test_two_ranks_find_what_one_process_finds(tmp_path):
    store, tests = tmp_path / "store", Path(__file__).parents[1]
    script = textwrap.dedent(RANK.format(tests=str(tests), store=store))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", script, str(rank)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in ranks:
            _, errors = process.communicate(timeout=90)
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    reference = finetuning.llama()
    model = finetuning.moved(reference)
    both = [
        {key: torch.cat([rank[key] for rank in ranks]) for key in ("input_ids", "labels")}
        for ranks in ([finetuning.batch(2, seed=seed + rank) for rank in range(2)] for seed in (20, 30, 40))
    ]
    for batch in both[1:]:
        (model(**batch).loss / 2).backward()
    GradientSurgery([both[0]], ReferenceKL(reference)).attach(model).edit_()
    found = [torch.load(f"{store}.{rank}") for rank in range(2)]
    for p, first, second in zip(model.parameters(), *found, strict=True):
        assert torch.equal(first, second)
        torch.testing.assert_close(first, p.grad, rtol=1e-4, atol=1e-6)

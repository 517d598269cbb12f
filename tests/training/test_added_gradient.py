"""The callback: once a step in a Trainer, under accumulation and clipping."""

from types import SimpleNamespace

import peft
import pytest
import torch
from transformers import Trainer, TrainingArguments

from curvkern.training import AsFT
from tests.oracles import make

RATE = 0.1


def guarded():
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(make("llama"), config)
    base = {name: weight + 0.1 for name, weight in make("llama").state_dict().items()}
    return model, AsFT.from_peft(model, base, weight=0.3)


def factors(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trained(root, batch, accumulation, guard=True, clip=0.0):
    """What one step of plain descent adds to the factors."""
    model, asft = guarded()
    before = factors(model)
    rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 40, (8, 6)).tolist()]
    arguments = TrainingArguments(
        root, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1, report_to=[],
        learning_rate=RATE, optim="sgd", lr_scheduler_type="constant", max_grad_norm=clip, use_cpu=True, seed=3,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    callbacks = [asft.callback()] if guard else []
    Trainer(model, arguments, train_dataset=rows, callbacks=callbacks).train()
    return {name: after - before[name] for name, after in factors(model).items()}


def test_a_trainers_step_holds_the_penalty_once_however_it_accumulates(tmp_path):
    model, asft = guarded()
    penalty = asft.penalty(model)
    plain = trained(tmp_path, 8, 1, guard=False)
    names = list(plain)
    gradients = torch.autograd.grad(penalty, [dict(model.named_parameters())[name] for name in names])
    for batch, accumulation in ((8, 1), (2, 4)):
        found = trained(tmp_path, batch, accumulation)
        for name, gradient in zip(names, gradients, strict=True):
            torch.testing.assert_close(found[name] - plain[name], -RATE * gradient, rtol=1e-3, atol=1e-5)


def test_the_penalty_is_clipped_with_the_rest(tmp_path):
    step = trained(tmp_path, 8, 1, clip=0.01)
    length = torch.cat([change.flatten() for change in step.values()]).norm()
    torch.testing.assert_close(length, torch.tensor(RATE * 0.01), rtol=1e-2, atol=0)


def test_the_last_penalty_can_be_read():
    model, asft = guarded()
    callback = asft.callback()
    assert callback.value is None
    callback.on_step_begin(None, None, None, model=model)
    assert torch.equal(callback.value, asft.penalty(model).detach())


@pytest.mark.parametrize("option", ["fp16", "fsdp", "deepspeed"])
def test_options_that_break_it_are_named(option):
    _, asft = guarded()
    message = rf"AsFT: does not work with the Trainer's {option}=True: .* Or add penalty\(model\) to the loss"
    with pytest.raises(ValueError, match=message):
        asft.callback().on_train_begin(SimpleNamespace(**{option: True}), None, None)

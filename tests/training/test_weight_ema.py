import contextlib
from copy import deepcopy

import finetuning
import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from curvkern.training import WeightEMA


def walk(model, steps, seed=0, size=0.01):
    """Random steps of a model's weights; yields after each."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        with torch.no_grad():
            for p in model.parameters():
                p += size * torch.randn(p.shape, generator=generator).to(p)
        yield


def exact_average(path, decay, warmup=0.0):
    average = path[0].double()
    for t, weights in enumerate(path[1:], 1):
        d = min(decay, (1 + t) / (warmup + t))
        average = d * average + (1 - d) * weights.double()
    return average


# the average ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("warmup", [0, 10])
def test_average_is_the_recursion_in_float64(warmup):
    model = nn.Linear(5, 4)
    ema = WeightEMA(0.9, warmup=warmup).attach(model)
    path = [model.weight.detach().clone()]
    for _ in walk(model, 30):
        ema.update()
        path.append(model.weight.detach().clone())
    torch.testing.assert_close(
        ema.averages()["weight"].double(), exact_average(path, 0.9, warmup), rtol=1e-6, atol=1e-7
    )


def test_closed_form_late_steps_count_less():
    model = nn.Linear(3, 3, bias=False).double()
    ema, decay, steps = WeightEMA(0.8).attach(model), 0.8, 7
    start, path = model.weight.detach().clone(), [model.weight.detach().clone()]
    for _ in walk(model, steps):
        ema.update()
        path.append(model.weight.detach().clone())
    moved = sum((1 - decay ** (steps - t + 1)) * (path[t] - path[t - 1]) for t in range(1, steps + 1))
    torch.testing.assert_close(ema.averages()["weight"] - start, moved)


def test_every_k_steps_with_decay_to_the_k():
    model = nn.Linear(5, 4)
    ema = WeightEMA(0.9, every=3).attach(model)
    expected = model.weight.detach().double()
    for step, _ in enumerate(walk(model, 8), 1):
        ema.update()
        if step % 3 == 0:
            expected = 0.9**3 * expected + (1 - 0.9**3) * model.weight.detach().double()
    torch.testing.assert_close(ema.averages()["weight"].double(), expected, rtol=1e-6, atol=1e-7)


def test_decay_of_zero_is_the_model_itself():
    model = nn.Linear(5, 4)
    ema = WeightEMA(0.0).attach(model)
    for _ in walk(model, 2):
        ema.update()
    torch.testing.assert_close(ema.averages()["weight"], model.weight.detach(), rtol=0, atol=0)


def test_a_bfloat16_shadow_would_stand_still_and_this_one_does_not():
    model = nn.Linear(64, 64, bias=False).bfloat16()
    ema = WeightEMA(0.995).attach(model)
    start = model.weight.detach().clone()
    with torch.no_grad():
        model.weight *= 1.01
    short = start.clone()
    for _ in range(200):
        ema.update()
        short.lerp_(model.weight.detach(), 0.005)
    share = 1 - 0.995**200
    gap = (model.weight - start).double().detach()
    moved = ema.averages()["weight"].double() - start.double()
    torch.testing.assert_close(moved, share * gap, rtol=1e-3, atol=1e-6)
    assert (short - start).double().norm() < 0.1 * share * gap.norm()


def test_feeding_it_back_every_step_is_a_smaller_learning_rate():
    fed, slow = (nn.Linear(4, 4).double() for _ in range(2))
    slow.load_state_dict(fed.state_dict())
    x, decay, lr = torch.randn(6, 4, dtype=torch.float64), 0.9, 0.3
    ema = WeightEMA(decay).attach(fed)
    for _ in range(5):
        for model, rate in ((fed, lr), (slow, lr * (1 - decay))):
            model.zero_grad()
            model(x).square().mean().backward()
            with torch.no_grad():
                for p in model.parameters():
                    p -= rate * p.grad
        ema.update()
        ema.copy_to_model()
    torch.testing.assert_close(fed.weight, slow.weight)


def test_shared_weights_once_frozen_ones_never():
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "c": nn.Linear(4, 4)})
    model["b"].weight = model["a"].weight
    model["c"].requires_grad_(False)
    assert set(WeightEMA(0.9).attach(model).averages()) == {"a.weight", "a.bias", "b.bias"}


def test_names_are_those_inside_the_compiled_model():
    assert set(WeightEMA(0.9).attach(torch.compile(nn.Linear(4, 4))).averages()) == {"weight", "bias"}


def test_host_average_equals_the_one_on_the_device():
    model = nn.Linear(5, 4).bfloat16()
    device, host = WeightEMA(0.9).attach(model), WeightEMA(0.9, place="host").attach(model)
    for _ in walk(model, 5):
        device.update()
        host.update()
    assert torch.equal(device.averages()["weight"], host.averages()["weight"])
    assert host.averages()["weight"].device.type == "cpu"


# LoRA -----------------------------------------------------------------------------------------------------------------


def test_product_of_lora_is_averaged_as_such():
    model = finetuning.adapted()
    factors, product = WeightEMA(0.5).attach(model), WeightEMA(0.5, lora="product").attach(model)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    layer = model.get_submodule(name)
    pair = layer.lora_B["default"].weight, layer.lora_A["default"].weight
    path = [[factor.detach().double() for factor in pair]]
    for _ in walk(model, 4, size=0.2):
        factors.update()
        product.update()
        path.append([factor.detach().double() for factor in pair])
    expected = exact_average([b @ a for b, a in path], 0.5)
    torch.testing.assert_close(product.products()[f"{name}.default"].double(), expected, rtol=1e-5, atol=1e-6)
    averages = factors.averages()
    of_factors = averages[f"{name}.lora_B.default.weight"] @ averages[f"{name}.lora_A.default.weight"]
    b, a = (exact_average(factor, 0.5) for factor in zip(*path, strict=True))
    torch.testing.assert_close(of_factors.double(), b @ a, rtol=1e-5, atol=1e-6)
    assert (b @ a - expected).norm() > 0.01 * expected.norm()
    live = finetuning.values(model)
    with product.swapped():
        b, a = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach()
        u, s, v = torch.linalg.svd(expected)
        nearest = (u[:, :2] * s[:2]) @ v[:2]
        torch.testing.assert_close((b @ a).double(), nearest, rtol=1e-4, atol=1e-5)
    assert all(torch.equal(p, live[name]) for name, p in model.named_parameters())


def test_product_of_a_rank_above_the_width_is_exact():
    model = finetuning.adapted(rank=20)  # wider than the model's 16
    ema = WeightEMA(0.5, lora="product").attach(model)
    before = {name: average.clone() for name, average in ema.products().items()}
    ema.copy_to_model()
    again = WeightEMA(0.5, lora="product").attach(model).products()
    for name, average in before.items():
        torch.testing.assert_close(again[name], average, rtol=1e-4, atol=1e-5)


# swapping, errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["device", "host"])
def test_swapped_holds_the_average_and_gives_every_bit_back(place):
    model = nn.Linear(5, 4).bfloat16()
    ema = WeightEMA(0.9, place=place).attach(model)
    for _ in walk(model, 3):
        ema.update()
    live = finetuning.values(model)
    with contextlib.suppress(ZeroDivisionError), ema.swapped():
        assert torch.equal(model.weight, ema.averages()["weight"].bfloat16())
        assert not torch.equal(model.weight, live["weight"])
        raise ZeroDivisionError  # whatever happens within
    assert all(torch.equal(p, live[name]) for name, p in model.named_parameters())


def test_wrong_arguments():
    for decay in (1.0, -0.1, float("nan")):
        with pytest.raises(ValueError, match=r"decay is .*; wanted at least 0, below 1"):
            WeightEMA(decay)
    with pytest.raises(ValueError, match="every is 0"):
        WeightEMA(0.9, every=0)
    with pytest.raises(ValueError, match="warmup is -1"):
        WeightEMA(0.9, warmup=-1)
    with pytest.raises(ValueError, match="Did you mean 'product'"):
        WeightEMA(0.9, lora="products")
    with pytest.raises(RuntimeError, match="update before attach"):
        WeightEMA(0.9).update()
    with pytest.raises(ValueError, match="no pair of trained lora_A and lora_B"):
        WeightEMA(0.9, lora="product").attach(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="no parameter of the model requires a gradient"):
        WeightEMA(0.9).attach(nn.Linear(2, 2).requires_grad_(False))
    ema = WeightEMA(0.9).attach(nn.Linear(2, 2))
    with ema.swapped(), pytest.raises(RuntimeError, match="while the average is swapped in"):
        ema.update()


# resuming, the Trainer ------------------------------------------------------------------------------------------------


def test_resume_in_a_loop_equals_going_on():
    options = {"every": 2, "warmup": 10}
    model = nn.Linear(5, 4)
    ema = WeightEMA(0.9, **options).attach(model)
    for _ in walk(model, 3):  # amid an interval
        ema.update()
    other = deepcopy(model)
    again = WeightEMA(0.9, **options).attach(other)
    again.load_state_dict(deepcopy(ema.state_dict()))
    for average, its_model in ((ema, model), (again, other)):
        for _ in walk(its_model, 4, seed=1):
            average.update()
    assert again.step == ema.step == 7
    assert torch.equal(again.averages()["weight"], ema.averages()["weight"])
    with pytest.raises(ValueError, match=r"the state has \[4\] for bias, the model \[3\]"):
        WeightEMA(0.9).attach(nn.Linear(5, 3)).load_state_dict(ema.state_dict())


class Recorder(TrainerCallback):
    """The weights of training after every step, and the losses of evaluations."""

    def __init__(self):
        self.path, self.losses = [], {}

    def on_train_begin(self, args, state, control, model, **kwargs):
        self.path.append(finetuning.values(model))

    on_step_begin = on_train_begin  # when an average that was lent is back

    def on_evaluate(self, args, state, control, metrics, **kwargs):
        self.losses |= {f"{state.global_step} {key}": value for key, value in metrics.items() if key.endswith("_loss")}


def test_trainer_evaluates_and_ends_with_the_average_and_saves_its_own_weights(tmp_path):
    ema, plain, guarded = WeightEMA(0.7), Recorder(), Recorder()
    finetuning.trainer(finetuning.llama(), tmp_path / "plain", [plain]).train()
    data = {"a": finetuning.dataset()[:2], "b": finetuning.dataset()[2:5]}
    steps = {"eval_strategy": "steps", "eval_steps": 3, "save_strategy": "steps", "save_steps": 3}
    trainer = finetuning.trainer(finetuning.llama(), tmp_path, [guarded, ema], eval_dataset=data, **steps)
    trainer.train()
    for before, after in zip(plain.path, guarded.path, strict=True):  # training does not see it
        assert all(torch.equal(before[name], after[name]) for name in before)
    path = plain.path[1:]  # before the first step, and after each but the last
    name = "model.layers.1.mlp.up_proj.weight"
    then = finetuning.llama()
    with torch.no_grad():
        for key, p in then.named_parameters():
            p.copy_(exact_average([weights[key] for weights in path[:4]], 0.7))
    for which, rows in data.items():
        batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
        loss = float(then(**batch).loss)
        assert guarded.losses[f"3 eval_{which}_loss"] == pytest.approx(loss, rel=1e-3)
    saved = type(then).from_pretrained(tmp_path / "checkpoint-3")
    assert torch.equal(dict(saved.named_parameters())[name], path[3][name])
    live = type(then).from_pretrained(tmp_path / "checkpoint-6")
    weights = [*(step[name] for step in path), dict(live.named_parameters())[name].detach()]
    torch.testing.assert_close(
        dict(trainer.model.named_parameters())[name].detach().double(),
        exact_average(weights, 0.7),
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("lora", ["factors", "product"])
def test_trainer_with_adapters_resumes_to_the_same_average(tmp_path, lora):
    options = {"save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2}
    whole, parts, rest = (WeightEMA(0.7, every=3, lora=lora) for _ in range(3))
    finetuning.trainer(finetuning.adapted(), tmp_path / "whole", [whole], **options).train()
    first = finetuning.trainer(finetuning.adapted(), tmp_path / "parts", [parts], **options)
    first.add_callback(StopAt(2))
    first.train()
    second = finetuning.trainer(finetuning.adapted(), tmp_path / "parts", [rest], **options)
    second.train(resume_from_checkpoint=True)
    assert rest.step == whole.step == 6
    for name, average in whole.state_dict()["shadow"].items():
        torch.testing.assert_close(rest.state_dict()["shadow"][name], average, rtol=0, atol=0)
    elsewhere = WeightEMA(0.7)
    third = finetuning.trainer(finetuning.adapted(), tmp_path / "third", [elsewhere], **options)
    with pytest.raises(FileNotFoundError, match="Set the guard's resume_from"):
        third.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))
    elsewhere.resume_from = tmp_path / "parts" / "checkpoint-4"
    with pytest.raises(ValueError, match="is of step 4, but training resumes at step 2"):
        third.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-2"))


class StopAt(TrainerCallback):
    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step >= self.step


def test_trainer_options_that_break_it(tmp_path):
    options = {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps", "eval_steps": 2}
    options |= {"save_steps": 2, "eval_dataset": finetuning.dataset()}
    with pytest.raises(ValueError, match="load_best_model_at_end=True: the best checkpoint"):
        finetuning.trainer(finetuning.llama(), tmp_path, [WeightEMA(0.9)], **options).train()

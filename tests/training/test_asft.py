"""AsFT against autograd of the dense published form in float64, and what it does to a training."""

from copy import deepcopy

import peft
import pytest
import torch
from torch import nn

from curvkern.ops import subspace_basis
from curvkern.training import AsFT
from tests.oracles import make, texts

TARGETS = ["q_proj", "v_proj", "down_proj"]


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def direction(weight, rank=4):
    """Of a matrix a change of a low rank, which a basis can hold whole."""
    if weight.ndim != 2:
        return torch.zeros_like(weight)
    return 0.1 * torch.randn(len(weight), rank) @ torch.randn(rank, weight.shape[1])


def lora(kind="llama", targets=TARGETS, **options):
    """A model whose adapters are random, and the base model's weights."""
    model = make(kind)
    base = {name: weight + direction(weight) for name, weight in model.state_dict().items()}
    options = {"r": 4, "lora_alpha": 8, "init_lora_weights": False, **options}
    return peft.get_peft_model(model, peft.LoraConfig(target_modules=targets, **options)), base


def image(x, aligned, base, projector, rank=4):
    """C x, dense."""
    v = aligned - base
    if projector == "gram":
        return v @ v.T @ x / v.norm()
    u = torch.linalg.svd(v)[0][:, :rank]
    return u @ (u.T @ x)


def dense_penalty(model, base, projector, scaled=False):
    """The published sum over layers, with the update and C formed."""
    total = 0.0
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            update = update * (layer.scaling["default"] if scaled else 1)
            c = image(update, layer.base_layer.weight.detach(), base[f"{name}.weight"], projector)
            total = total + (update - c).square().sum()
    return total


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("projector", ["gram", "basis"])
def test_value_and_gradients_equal_the_dense_form(projector, scaled):
    model, base = lora()
    model, base = model.double(), {name: weight.double() for name, weight in base.items()}
    guard = AsFT.from_peft(model, base, projector=projector, rank=4, weight=0.7, scaled=scaled)
    exact = 0.7 * dense_penalty(model, base, projector, scaled)
    wanted = gradients(model, exact)
    got = gradients(model, guard.penalty(model))
    tight = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(guard.penalty(model), exact, **tight)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], **tight)


@pytest.mark.parametrize("projector", ["gram", "basis"])
@pytest.mark.parametrize("width", [9, 300])
def test_whole_updates_equal_the_dense_form(projector, width):
    """300 columns: more than are mapped at a time."""
    aligned, base = normal(12, width, seed=0), normal(12, width, seed=1)
    model = nn.Sequential(nn.Linear(width, 12, bias=False, dtype=torch.float64))
    guard = AsFT({"0.weight": (aligned, base)}, projector=projector, rank=4)
    weight = model[0].weight
    update = weight - aligned
    if projector == "basis":
        u = subspace_basis(aligned, base, 4)
        exact = (update - u @ (u.T @ update)).square().sum()
    else:
        exact = (update - image(update, aligned, base, "gram")).square().sum()
    (wanted,) = torch.autograd.grad(exact, weight)
    got = guard.penalty(model)
    torch.testing.assert_close(got, exact, rtol=1e-12, atol=0)
    torch.testing.assert_close(torch.autograd.grad(3 * got, weight)[0], 3 * wanted, rtol=1e-12, atol=1e-12)


def test_a_conv1d_is_turned_as_its_factors_are():
    model, base = lora("gpt2", ["c_attn"], fan_in_fan_out=True)
    base = {name: weight.double() for name, weight in base.items()}
    model = model.double()
    turned = {name: (weight.T if "c_attn.weight" in name else weight) for name, weight in base.items()}
    exact = 0.0
    for name, layer in model.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            update = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
            c = image(update, layer.base_layer.weight.T.detach(), turned[f"{name}.weight"], "gram")
            exact = exact + (update - c).square().sum()
    torch.testing.assert_close(AsFT.from_peft(model, base).penalty(model), exact, rtol=1e-12, atol=0)


# limits ---------------------------------------------------------------------------------------------------------------


def test_without_a_direction_all_of_the_update_counts():
    """Aligned equal to base: C = 0."""
    model, _ = lora()
    same = {name: weight.clone() for name, weight in model.get_base_model().state_dict().items()}
    same = {name.replace(".base_layer", ""): weight for name, weight in same.items()}
    layers = [layer for layer in model.modules() if hasattr(layer, "lora_A")]
    plain = sum((b.lora_B["default"].weight @ b.lora_A["default"].weight).square().sum() for b in layers)
    for projector in ("gram", "basis"):
        torch.testing.assert_close(AsFT.from_peft(model, same, projector=projector).penalty(model), plain)


def test_an_update_within_the_subspace_is_free_with_basis_and_penalised_with_gram():
    aligned, base = normal(16, 12, seed=0), normal(16, 12, seed=1)
    model = nn.Sequential(nn.Linear(12, 16, bias=False, dtype=torch.float64))
    u = subspace_basis(aligned, base, 3)
    with torch.no_grad():
        model[0].weight.copy_(aligned + u @ normal(3, 12, seed=2))
    size = float((model[0].weight.detach() - aligned).square().sum())
    free = float(AsFT({"0": (aligned, base)}, projector="basis", rank=3).penalty(model).detach())
    assert free < 1e-20 * size
    assert float(AsFT({"0": (aligned, base)}).penalty(model).detach()) > 0.01 * size


def test_two_active_adapters_count_as_their_sum():
    model, base = lora()
    model.add_adapter("second", deepcopy(model.peft_config["default"]))
    guard = AsFT.from_peft(model, base)
    alone = guard.penalty(model)
    model.base_model.set_adapter(["default", "second"])
    with torch.no_grad():
        for layer in model.modules():
            if hasattr(layer, "lora_A"):
                layer.lora_A["second"].weight.copy_(layer.lora_A["default"].weight)
                layer.lora_B["second"].weight.copy_(layer.lora_B["default"].weight)
    torch.testing.assert_close(guard.penalty(model), 4 * alone)


# in a training --------------------------------------------------------------------------------------------------------


def task_loss(model, row):
    return model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels])).loss


@pytest.mark.parametrize("once", [False, True])
def test_accumulation_counts_the_penalty_once_a_step(once):
    model, base = lora()
    guard, rows = AsFT.from_peft(model, base, weight=0.1), texts()
    whole = gradients(model, sum(task_loss(model, row) for row in rows) / len(rows) + guard.penalty(model))
    model.zero_grad()
    if once:
        guard.penalty(model).backward()
    for row in rows:
        loss = task_loss(model, row) / len(rows)
        (loss if once else loss + guard.penalty(model, accumulation=len(rows))).backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(parameter.grad, whole[name], rtol=1e-4, atol=1e-6)


def test_bf16_and_autocast_give_the_float32_penalty_of_the_same_weights():
    model, base = lora()
    model = model.bfloat16()
    base = {name: weight.bfloat16() for name, weight in base.items()}
    guard = AsFT.from_peft(model, base)
    exact = AsFT.from_peft(deepcopy(model).double(), {name: weight.double() for name, weight in base.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = guard.penalty(model)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact.penalty(deepcopy(model).double()), rtol=1e-5, atol=0)
    assert all(grad.dtype == torch.bfloat16 for grad in gradients(model, got).values())


@pytest.mark.parametrize("projector", ["gram", "basis"])
def test_a_step_makes_no_matrix_as_large_as_the_weight(projector):
    model = peft.get_peft_model(nn.Sequential(nn.Linear(1024, 1024)), peft.LoraConfig(r=8, target_modules=["0"]))
    guard = AsFT.from_peft(model, {"0.weight": torch.randn(1024, 1024)}, projector=projector)
    with torch.profiler.profile(profile_memory=True) as profile:
        guard.penalty(model).backward()
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= 4 * 1024**2 / 4


def test_a_compiled_model_has_the_same_penalty():
    model, base = lora()
    guard = AsFT.from_peft(model, base)
    assert torch.equal(guard.penalty(torch.compile(model)), guard.penalty(model))


def train(guard, steps=40):
    model = peft.get_peft_model(make("llama"), peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    rows = texts()
    for step in range(steps):
        loss = task_loss(model, rows[step % len(rows)])
        (loss if guard is None else loss + guard.penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


def outside_and_inside(model, guard, base):
    total = AsFT.from_peft(model, {k: v.clone() for k, v in make("llama").state_dict().items()}).penalty(model)
    outside = guard.penalty(model) / guard.weight
    return float(outside.detach()), float((total - outside).detach())


def test_training_keeps_the_update_within_the_alignment_subspace():
    """Without the guard most of the update lies outside; with it nearly none, while the inside is still used."""
    plain = make("llama").state_dict()
    base = {name: weight + direction(weight) for name, weight in plain.items()}
    guard = AsFT.from_peft(train(None, 0), base, projector="basis", rank=4, weight=100.0)
    outside, inside = outside_and_inside(train(None), guard, base)
    assert outside > inside > 0
    guarded_outside, guarded_inside = outside_and_inside(train(guard), guard, base)
    assert guarded_outside < 0.01 * outside
    assert guarded_inside > 10 * guarded_outside


# wrong input ----------------------------------------------------------------------------------------------------------


def test_a_model_without_lora_is_told_what_was_looked_for():
    with pytest.raises(ValueError, match=r"no LoRA layer; looked for modules with lora_A and lora_B"):
        AsFT.from_peft(make("llama"), {})


def test_a_base_that_lacks_a_weight_is_told_which():
    model, base = lora()
    del base["model.layers.1.self_attn.v_proj.weight"]
    with pytest.raises(ValueError, match=r"AsFT: base has no model\.layers\.1\.self_attn\.v_proj\.weight"):
        AsFT.from_peft(model, base)


def test_shapes_that_do_not_fit():
    model, base = lora()
    wrong = {**base, "model.layers.0.self_attn.q_proj.weight": torch.zeros(3, 16)}
    with pytest.raises(ValueError, match=r"q_proj: base has shape \[3, 16\] but aligned has \[16, 16\]"):
        AsFT.from_peft(model, wrong)
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=r"update of shape \[16, 16\], but its direction is \[9, 16\]"):
        AsFT({name: (torch.zeros(9, 16), torch.zeros(9, 16))}).penalty(model)
    with pytest.raises(ValueError, match=r"AsFT: model\.norm is a LlamaRMSNorm; wanted a LoRA layer or an nn\.Linear"):
        AsFT({"model.norm": (torch.zeros(16, 16), torch.zeros(16, 16))}).penalty(model)
    with pytest.raises(ValueError, match=r"direction for layers\.9, but the model has no such module"):
        AsFT({"layers.9": (torch.zeros(9, 16), torch.zeros(9, 16))}).penalty(model)
    with pytest.raises(ValueError, match=r"AsFT: n: aligned is int8 \[4, 4\]; wanted a floating matrix"):
        AsFT({"n": (torch.zeros(4, 4, dtype=torch.int8), torch.zeros(4, 4))})


def test_arguments_out_of_range():
    pair = {"n": (torch.zeros(4, 4), torch.zeros(4, 4))}
    with pytest.raises(ValueError, match=r"projector is 'bassi'.*Did you mean 'basis'"):
        AsFT(pair, projector="bassi")
    with pytest.raises(ValueError, match=r"AsFT: directions is empty"):
        AsFT({})
    with pytest.raises(ValueError, match=r"AsFT: weight is -1"):
        AsFT(pair, weight=-1)
    with pytest.raises(ValueError, match=r"AsFT: accumulation is 0"):
        AsFT(pair).penalty(nn.Linear(4, 4), accumulation=0)


def test_variants_of_lora_are_refused():
    model, base = lora(use_dora=True)
    with pytest.raises(ValueError, match=r"is a variant of LoRA \(DoRA or the like\)"):
        AsFT.from_peft(model, base).penalty(model)

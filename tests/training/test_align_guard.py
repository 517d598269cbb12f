"""AlignGuard-LoRA: where the published collision terms are zero, and two adapters against dense autograd in float64."""

from copy import deepcopy

import peft
import pytest
import torch

from curvkern.training import AlignGuardLoRA, align_guard, geodesic_overlap, riemannian_overlap
from tests.oracles import make, texts

TARGETS = ["q_proj", "up_proj"]
BOTH = ["alignment", "task"]


def two_adapters(fresh=False):
    """A model with two active adapters, and a Fisher of the modules they are on."""
    config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS, init_lora_weights=fresh)
    model = peft.get_peft_model(make("llama"), config, adapter_name="alignment")
    model.add_adapter("task", deepcopy(config))
    model.base_model.set_adapter(BOTH)
    fisher = {
        f"{name}.weight": torch.rand(layer.base_layer.weight.shape).square()
        for name, layer in layers(model).items()
    }  # fmt: skip
    return model, fisher


def layers(model):
    return {name: layer for name, layer in model.get_base_model().named_modules() if hasattr(layer, "lora_A")}


def update(layer, adapter):
    return layer.scaling[adapter] * layer.lora_B[adapter].weight @ layer.lora_A[adapter].weight


def dense(model, fisher, curvature=None, align=1.0, task=0.1, collision=0.1, blend=0.5, beta=10.0, tau=0.01):
    """The formula with both updates formed."""
    total = 0.0
    for name, layer in layers(model).items():
        a, t = (update(layer, adapter) for adapter in BOTH)
        h = 1.0 if curvature is None else curvature[f"{name}.weight"]
        eta = 1 + beta / (1 + torch.exp(tau - (a + t).abs()))
        overlap = (eta * (a * t).abs()).sum()
        geodesic = (a * t).sum() ** 2 / ((a**2).sum() * (t**2).sum() + 1e-12)
        total = total + align * (fisher[f"{name}.weight"] * a**2).sum() + task * (h * t**2).sum()
        total = total + collision * (blend * overlap + (1 - blend) * geodesic)
    return total


def gradients(model, value):
    model.zero_grad()
    value.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_gradients_of_factors_do_not_give_the_weights_gradient_that_a_fisher_needs():
    """What a port makes of them, s (dB A + B dA), is s^2 (G A^T A + B B^T G): another matrix than G."""
    model, _ = two_adapters()
    model.base_model.set_adapter(["task"])
    model.double()
    layer = next(iter(layers(model).values()))
    s, a, b, w = (
        layer.scaling["task"],
        layer.lora_A["task"].weight,
        layer.lora_B["task"].weight,
        layer.base_layer.weight,
    )
    w.requires_grad_(True)
    ids = torch.tensor([texts()[1].ids])
    da, db, g = torch.autograd.grad(model(input_ids=ids, labels=ids).loss, [a, b, w])
    port = s * (db @ a + b @ da)
    torch.testing.assert_close(port, s**2 * (g @ a.mT @ a + b @ b.mT @ g))
    assert torch.cosine_similarity(port.flatten(), g.flatten(), dim=0) < 0.9


# the published split --------------------------------------------------------------------------------------------------


@pytest.fixture
def whole():
    return torch.randn(12, 10, dtype=torch.float64, requires_grad=True)


def test_split_by_coordinates_the_published_collisions_are_identically_zero(whole):
    """The top entries of a diagonal Fisher: values and gradients are exactly 0, whatever the update is."""
    mask = torch.rand(12, 10, dtype=torch.float64) > 0.7
    alignment, task = mask * whole, ~mask * whole
    for overlap in (riemannian_overlap(alignment, task), geodesic_overlap(alignment, task)):
        assert float(overlap.detach()) == 0
        assert not torch.autograd.grad(overlap, whole, retain_graph=True)[0].any()


def test_split_by_an_orthogonal_projector_only_the_riemannian_collision_acts(whole):
    u = torch.linalg.qr(torch.randn(12, 3, dtype=torch.float64))[0]
    alignment = u @ (u.T @ whole)
    geodesic = geodesic_overlap(alignment, whole - alignment)
    assert float(geodesic.detach()) < 1e-28
    assert torch.autograd.grad(geodesic, whole, retain_graph=True)[0].abs().max() < 1e-14
    assert float(riemannian_overlap(alignment, whole - alignment).detach()) > 1


@pytest.mark.parametrize("blend", [0.0, 1.0])
def test_of_two_adapters_both_collisions_act(blend):
    model, fisher = two_adapters()
    guard = AlignGuardLoRA(fisher, align_weight=0, task_weight=0, collision_weight=1, blend=blend)
    found = gradients(model, guard.penalty(model))
    assert float(guard.penalty(model).detach()) > 0
    assert all(float(grad.abs().max()) > 0 for grad in found.values())
    assert len(found) == 2 * 2 * len(fisher)


# the penalty ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tile", [1 << 20, 40])
@pytest.mark.parametrize("given", [False, True])
def test_value_and_gradients_equal_the_dense_form(given, tile, monkeypatch):
    """Of a tile's 40 entries two rows are made at a time."""
    monkeypatch.setattr(align_guard, "TILE", tile)
    model, fisher = two_adapters()
    model, fisher = model.double(), {name: f.double() for name, f in fisher.items()}
    curvature = {name: f.flip(0) for name, f in fisher.items()} if given else None
    settings = {"blend": 0.3, "beta": 4.0, "tau": 0.2}
    guard = AlignGuardLoRA(
        fisher, task_curvature=curvature, align_weight=2, task_weight=0.5, collision_weight=0.7, **settings
    )
    exact = dense(model, fisher, curvature, 2, 0.5, 0.7, **settings)
    wanted, got = gradients(model, exact), gradients(model, guard.penalty(model))
    torch.testing.assert_close(guard.penalty(model), exact, rtol=1e-12, atol=0)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], rtol=1e-11, atol=1e-11)


def test_accumulation_counts_the_penalty_once_a_step():
    model, fisher = two_adapters()
    guard = AlignGuardLoRA(fisher)
    whole = gradients(model, guard.penalty(model))
    model.zero_grad()
    for _ in range(4):
        guard.penalty(model, accumulation=4).backward()
    for name, parameter in model.named_parameters():
        if name in whole:
            torch.testing.assert_close(parameter.grad, whole[name])


def test_bf16_and_autocast_give_the_float32_penalty_of_the_same_weights():
    model, fisher = two_adapters()
    model, fisher = model.bfloat16(), {name: f.bfloat16() for name, f in fisher.items()}
    exact = dense(deepcopy(model).double(), {name: f.double() for name, f in fisher.items()})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = AlignGuardLoRA(fisher).penalty(model)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


# orient ---------------------------------------------------------------------------------------------------------------


def test_orient_leaves_the_model_as_it_is_and_points_its_adapters_apart():
    model, fisher = two_adapters(fresh=True)
    ids = torch.tensor([[3, 4, 5]])
    before = model(input_ids=ids).logits
    AlignGuardLoRA(fisher).orient(model)
    assert torch.equal(model(input_ids=ids).logits, before)
    for name, layer in layers(model).items():
        along, away = (layer.lora_A[adapter].weight.detach() for adapter in BOTH)
        leading = torch.linalg.svd(fisher[f"{name}.weight"].sqrt())[2][0]
        kept = (along @ leading).norm() / along[0].norm()
        assert float(kept) > 0.999
        assert float((away @ along.T).abs().max()) < 1e-5


def test_orient_leaves_no_row_of_a_that_cannot_learn():
    """A Fisher of rank one has one direction; the other rows stay random."""
    model, fisher = two_adapters(fresh=True)
    fisher = {name: f[:, :1] * f[:1] for name, f in fisher.items()}
    AlignGuardLoRA(fisher).orient(model)
    assert all(bool(layer.lora_A["alignment"].weight.any(1).all()) for layer in layers(model).values())


# in a training --------------------------------------------------------------------------------------------------------


def train(**weights):
    model, fisher = two_adapters(fresh=True)
    guard = AlignGuardLoRA(fisher, **weights)
    guard.orient(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2, weight_decay=0)
    for _ in range(8):
        for row in texts():
            loss = model(input_ids=torch.tensor([row.ids]), labels=torch.tensor([row.labels])).loss
            (loss + guard.penalty(model)).backward()
            optimizer.step()
            optimizer.zero_grad()
    drift = sum(
        float((fisher[f"{n}.weight"] * update(x, "alignment").detach() ** 2).sum()) for n, x in layers(model).items()
    )
    overlap = sum(float(riemannian_overlap(*(update(x, a).detach() for a in BOTH))) for x in layers(model).values())
    return drift, overlap


def test_training_with_the_guard_drifts_less_and_collides_less():
    free = train(align_weight=0, task_weight=0, collision_weight=0)
    no_drift = train(align_weight=10, task_weight=0, collision_weight=0)
    no_collision = train(align_weight=0, task_weight=0, collision_weight=1)
    assert no_drift[0] < 0.1 * free[0]
    assert no_collision[1] < 0.1 * free[1]


# wrong input ----------------------------------------------------------------------------------------------------------


def test_a_model_that_does_not_fit():
    model, fisher = two_adapters()
    guard = AlignGuardLoRA(fisher)
    with pytest.raises(ValueError, match="AlignGuardLoRA: the model has no LoRA layer"):
        guard.penalty(make("llama"))
    model.base_model.set_adapter("task")
    with pytest.raises(ValueError, match=r"only task is active; activate both adapters"):
        guard.penalty(model)
    with pytest.raises(ValueError, match=r"has the adapters alignment, task; wanted safe too"):
        AlignGuardLoRA(fisher, adapters=("safe", "task")).penalty(model)
    model.base_model.set_adapter(BOTH)
    with pytest.raises(ValueError, match=r"fisher has lm_head, which is no LoRA layer"):
        AlignGuardLoRA({"lm_head": torch.ones(40, 16)}).penalty(model)
    name = "model.layers.0.self_attn.q_proj"
    with pytest.raises(ValueError, match=rf"AlignGuardLoRA: {name}: fisher has shape \[3, 16\]; wanted \[16, 16\]"):
        AlignGuardLoRA({name: torch.ones(3, 16)}).penalty(model)
    with pytest.raises(ValueError, match=r"are trained already; orient fresh ones"):
        guard.orient(model)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"align_weight": -1}, "align_weight is -1"),
        ({"blend": 1.5}, r"blend is 1.5; wanted a number in \[0, 1\]"),
        ({"adapters": ("task", "task")}, "wanted the names of two adapters"),
        ({"task_curvature": {"m": torch.ones(2, 2)}}, "only one of fisher and task_curvature has m"),
        ({"fisher": {}}, "fisher is empty"),
        ({"fisher": {"n": -torch.ones(2, 2)}}, "fisher of n has entries below 0"),
        ({"fisher": {"n": torch.ones(2)}}, r"fisher of n is \[2\]; wanted a floating"),
    ],
)
def test_arguments_out_of_range(settings, message):
    with pytest.raises(ValueError, match=message):
        AlignGuardLoRA(**{"fisher": {"n": torch.ones(2, 2)}, **settings})

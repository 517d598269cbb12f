"""Every guard on adapters, in situations it may meet: recomputed activations, autocast, a compiled model."""

import finetuning
import pytest
import torch

from curvkern import training
from curvkern.training.wrappers import plain

HARMFUL, SAFE = finetuning.batch(seed=1), finetuning.batch(seed=2)
PROBED = ["*.layers.0.mlp.down_proj"]


def adapted(layers=2):
    """Two adapters, both active and both moved."""
    model = finetuning.adapted(finetuning.llama(num_hidden_layers=layers))
    model.add_adapter("task", model.peft_config["default"])
    model.base_model.set_adapter(["default", "task"])
    return model


# each leaves in .grad what a step is made of --------------------------------------------------------------------------


def asft(model, batch):
    base = {name: weight + 0.1 for name, weight in finetuning.llama().state_dict().items()}
    guard = training.AsFT.from_peft(model, base, weight=0.3)
    (model(**batch).loss + guard.penalty(model)).backward()


def align_guard(model, batch):
    layers = training.lora.lora_layers("test", model)
    fisher = {name: layer.get_base_layer().weight.square() for name, layer in layers.items()}
    guard = training.AlignGuardLoRA(fisher, adapters=("default", "task"))
    (model(**batch).loss + guard.penalty(model)).backward()


def gradient_surgery(model, batch):
    guard = training.GradientSurgery([HARMFUL], training.ReferenceKL()).attach(model)
    model(**batch).loss.backward()
    guard.edit_()


def booster(model, batch):
    guard = training.Booster([HARMFUL]).attach(model)
    model(**batch).loss.backward()
    guard.add_gradient_()


def proximal_step(model, batch):
    guard = training.ProximalStep().attach(model)
    guard.begin_step()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * p.requires_grad
    model(**batch).loss.backward()
    guard.add_gradient_()


def safety_probe(model, batch):
    guard = training.SafetyProbe(model, PROBED)
    for _ in range(2):  # the second with vectors that are not zero
        model.zero_grad()
        guard.backward(lambda: model(**batch).loss, lambda: training.contrast_loss(model, SAFE, HARMFUL))
        guard.step()


def vaccine(model, batch):
    training.Vaccine(model).backward(lambda: model(**batch).loss)


def star_dss(model, batch):
    labels = batch["labels"]
    reference = training.token_log_probs(model(input_ids=batch["input_ids"]).logits.float(), labels) - 0.3
    safety = torch.linspace(0, 1, labels.shape[1]).expand(labels.shape)
    training.star_dss_loss(model(input_ids=batch["input_ids"]).logits, labels, safety, reference).backward()


def derta(model, batch):
    training.derta_loss(model(input_ids=batch["input_ids"]).logits, batch["labels"]).backward()


def freeze(model, batch):
    training.freeze(model, ["*.layers.0.*"])
    model(**batch).loss.backward()


def weight_ema(model, batch):
    guard = training.WeightEMA(0.5).attach(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model(**batch).loss.backward()
    optimizer.step()
    guard.update()
    for name, p in model.named_parameters():
        p.grad = guard.averages()[plain(name)] if p.requires_grad else None


GUARDS = [
    asft, align_guard, gradient_surgery, booster, proximal_step, safety_probe, vaccine, star_dss, derta, freeze,
    weight_ema,
]  # fmt: skip
DIFFERENCES = [booster, safety_probe]  # of gradients at two points nearby: in bfloat16 much of them is rounding


def found(guard, model, batch=None):
    """Name -> gradient that the guard's step leaves."""
    guard(model, batch or finetuning.batch())
    return {plain(name): p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture(scope="module")
def expected():
    return {guard: found(guard, adapted()) for guard in GUARDS}


def check(gradients, wanted, **tolerances):
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], msg=lambda text, name=name: f"{name}: {text}", **tolerances)


@pytest.mark.parametrize("guard", GUARDS)
def test_recomputed_activations_change_nothing(guard, expected):
    model = adapted().train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    check(found(guard, model), expected[guard], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guard", GUARDS)
def test_a_compiled_model_is_guarded_as_the_bare_one(guard, expected):
    with torch.compiler.set_stance("force_eager"):  # the wrapper without the seconds of tracing
        check(found(guard, torch.compile(adapted())), expected[guard], rtol=1e-4, atol=1e-6)


def test_a_graph_traced_before_knows_when_adapters_are_off():
    wanted = found(gradient_surgery, adapted(layers=1))
    check(found(gradient_surgery, ran_before()), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("guard", [safety_probe, vaccine])
def test_a_graph_traced_before_does_not_see_hooks_and_that_is_said(guard):
    model = ran_before()
    with pytest.raises(RuntimeError, match=r"compiled model that ran before.*: torch\._dynamo\.reset\(\)"):
        found(guard, model)
    model.zero_grad()
    torch._dynamo.reset()
    check(found(guard, model), found(guard, adapted(layers=1)), rtol=1e-4, atol=1e-6)


def ran_before():
    torch._dynamo.reset()
    model = torch.compile(adapted(layers=1), backend="eager")
    model(**finetuning.batch()).loss.backward()
    model.zero_grad()
    return model


@pytest.mark.parametrize("guard", [guard for guard in GUARDS if guard not in DIFFERENCES])
def test_autocast_changes_nothing_but_rounding(guard, expected):
    with torch.autocast("cpu", torch.bfloat16):
        gradients = found(guard, adapted())
    both = [torch.cat([each[name].flatten() for name in expected[guard]]) for each in (gradients, expected[guard])]
    assert both[0].dtype == torch.float32
    assert torch.cosine_similarity(*both, dim=0) > 0.99


@pytest.mark.parametrize("guard", DIFFERENCES)
def test_under_autocast_weights_come_back_to_the_bit_from_the_other_point(guard):
    model = adapted()
    before = finetuning.values(model)
    with torch.autocast("cpu", torch.bfloat16):
        gradients = found(guard, model)
    assert all(gradient.dtype == torch.float32 and gradient.isfinite().all() for gradient in gradients.values())
    assert all(torch.equal(value, before[name]) for name, value in finetuning.values(model).items())

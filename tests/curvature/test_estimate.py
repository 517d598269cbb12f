"""Statistics against loops of autograd in float64, one sample at a time."""

import pytest
import torch
from oracles import MODELS, close, make, sample_gradients, texts
from torch.nn.functional import cross_entropy

from curvkern.curvature import KINDS, CurvatureError, Text, estimate


@pytest.mark.parametrize("loss", ["response_mean", "token_sum"])
@pytest.mark.parametrize("kind", MODELS)
def test_every_quantity_of_every_architecture_equals_autograd(kind, loss):
    model, rows = make(kind, tie_word_embeddings=loss == "token_sum"), texts()
    with torch.no_grad():  # a norm whose weight is all ones would hide what it is multiplied by
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.3 * torch.randn_like(parameter))
    wanted = ("gradient", "fisher_diag", "abs_gradient", "sample_norms")
    found = estimate(model, rows, quantity=wanted, loss=loss, batch_tokens=30, kinds=KINDS, include=["*"])
    exact = sample_gradients(model, rows, loss)
    measured = set(found["fisher_diag"])
    assert not [name for name in found.unmeasured if not name.endswith(("gate.weight", "wpe.weight"))]
    assert measured | set(found.unmeasured) == set(dict(model.named_parameters()))
    assert not measured & set(found.unmeasured)
    for name in measured:
        grads = exact[name]
        close(found["gradient"][name], grads.sum(0))
        close(found["fisher_diag"][name], grads.square().sum(0))
        close(found["abs_gradient"][name], grads.abs().sum(0))
        close(found["sample_norms"][name], grads.flatten(1).square().sum(1))
    assert (found.counts.samples, found.counts.tokens) == (4, 31)


def test_all_linear_and_expert_weights_inside_layers_are_measured():
    for kind in ("llama", "qwen3-moe", "mixtral"):
        found = estimate(make(kind), texts(), quantity="fisher_diag")
        left = [name for name in found.unmeasured if ".layers." in name and "norm" not in name]
        assert [name for name in left if not name.endswith("gate.weight")] == []


@pytest.mark.parametrize("batch_tokens", [1, 20, 1000])
def test_batches_and_order_do_not_matter(batch_tokens):
    model, rows = make("mixtral"), texts()
    one = estimate(model, rows, quantity=("fisher_diag", "kfac", "fisher_blocks"), batch_tokens=batch_tokens)
    other = estimate(model, rows[::-1], quantity=("fisher_diag", "kfac", "fisher_blocks"), batch_tokens=37)
    for quantity, of in one.sums.items():
        for name, tensor in of.items():
            torch.testing.assert_close(tensor, other[quantity][name], rtol=1e-3, atol=1e-6 * float(tensor.abs().max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_nothing(reentrant):
    model, rows = make("llama"), texts()
    plain = estimate(model, rows)["fisher_diag"]
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.train()
    again = estimate(model, rows)["fisher_diag"]
    assert model.training
    for name, tensor in plain.items():
        torch.testing.assert_close(again[name], tensor)


def test_a_weight_used_twice_is_squared_after_the_sum():
    model, rows = make("llama"), texts()
    first, second = model.model.layers[0].mlp, model.model.layers[1].mlp
    second.up_proj.weight = first.up_proj.weight
    found = estimate(model, rows)
    name = "model.layers.0.mlp.up_proj.weight"
    close(found["fisher_diag"][name], sample_gradients(model, rows)[name].square().sum(0))
    assert "model.layers.1.mlp.up_proj.weight" not in found["fisher_diag"]


def test_drawn_labels_are_those_of_the_model_and_of_no_batching():
    model, rows = make("llama"), texts()
    options = {"fisher_type": "mc", "mc_samples": 3, "seed": 5}
    one = estimate(model, rows, batch_tokens=1, **options)
    other = estimate(model, rows, batch_tokens=1000, **options)
    for name, tensor in one["fisher_diag"].items():
        torch.testing.assert_close(other["fisher_diag"][name], tensor, rtol=1e-3, atol=1e-9)
    assert one.counts.samples == 12
    changed = estimate(model, rows, **{**options, "seed": 6})
    assert not torch.equal(changed["fisher_diag"][name], one["fisher_diag"][name])


def test_the_exact_fisher_is_what_drawn_labels_tend_to():
    model, rows = make("llama", vocab_size=12), texts((4, 5), 12)
    exact = estimate(model, rows, fisher_type="type-2")["fisher_diag"]
    drawn = estimate(model, rows, fisher_type="mc", mc_samples=400)
    for name, tensor in exact.items():
        mean = drawn["fisher_diag"][name] / 400
        assert float((mean - tensor).norm() / tensor.norm()) < 0.15, name
        assert 0.9 < float(mean.sum() / tensor.sum()) < 1.1


def test_grams_are_those_of_inputs_and_output_gradients():
    model, rows = make("llama"), texts((6,))
    found = estimate(model, rows, quantity="kfac", include=["*layers.0.self_attn.q_proj.weight"])
    (name,) = found["input_gram"]
    held = {}
    layer = model.model.layers[0].self_attn.q_proj
    handle = layer.register_forward_hook(lambda m, x, y: held.update(x=x[0].detach(), y=y) or y.retain_grad())
    logits = model.eval()(input_ids=torch.tensor([rows[0].ids])).logits[0, :-1]
    kept = torch.tensor(rows[0].labels[1:]) != -100
    cross_entropy(logits[kept], torch.tensor(rows[0].labels[1:])[kept]).backward()
    handle.remove()
    close(found["input_gram"][name], (held["x"][0].T @ held["x"][0]).double())
    close(found["output_gram"][name], (held["y"].grad[0].T @ held["y"].grad[0]).double())


def test_the_model_is_left_as_it_was():
    model = make("qwen3-moe").train()
    model.lm_head.weight.requires_grad_(False)
    wanted = {name: p.requires_grad for name, p in model.named_parameters()}
    before = {name: p.clone() for name, p in model.named_parameters()}
    implementation = model.config._experts_implementation
    estimate(model, texts())
    assert model.training
    assert model.config._experts_implementation == implementation
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"quantity": "fisher"}, "quantity is 'fisher'; wanted one of"),
        (
            {"include": ["*nothing*"]},
            r"the pattern '\*nothing\*' matches nothing; there are 15 weights of linear",
        ),
        ({"exclude": ["*"]}, "no weight is selected"),
        ({"sample": "sentence"}, "sample is 'sentence'"),
        ({"fisher_type": "type-2", "sample": "token"}, "takes sample='sequence'"),
        ({"mc_samples": 0}, "mc_samples is 0"),
        ({"max_length": 2}, "rows have no response token .* the first are rows 1, 2, 4"),
    ],
)
def test_bad_arguments_are_named(changes, message):
    with pytest.raises((CurvatureError, ValueError), match=message):
        estimate(make("llama"), texts((9, 12, 3, 9)), **changes)


def test_data_without_loss_and_broken_rows_are_named():
    model = make("llama")
    with pytest.raises(CurvatureError, match="there are no data"):
        estimate(model, [])
    with pytest.raises(CurvatureError, match=r"1 of 2 rows have no response token .* the first are rows 2"):
        estimate(model, [texts()[0], Text((5, 6), (-100, -100))])
    with pytest.raises(CurvatureError, match="3 input_ids but 2 labels"):
        estimate(model, [{"input_ids": [1, 2, 3], "labels": [1, 2]}])


def test_a_loss_that_is_not_finite_names_its_rows_or_is_left_out():
    model, rows = make("llama"), texts()

    def loss(logits, labels):
        kept = labels[:, 1:] != -100
        tokens = cross_entropy(logits[:, :-1].transpose(1, 2), labels[:, 1:].clamp(min=0), reduction="none") * kept
        return tokens.sum(1) * (float("inf") if labels.shape[1] == 12 else 1.0)

    with pytest.raises(CurvatureError, match="the loss of rows 2 is not finite"):
        estimate(model, rows, loss=loss, batch_tokens=1)
    found = estimate(model, rows, loss=loss, batch_tokens=1, non_finite="skip")
    assert found.counts.samples == 3
    assert all(tensor.isfinite().all() for tensor in found["fisher_diag"].values())

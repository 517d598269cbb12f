"""The hidden-state loss of gradient_rollback, derived again: all layers run, plain autograd, one prompt at a time."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM

from curvkern.curvature import CurvatureError, HiddenEvidence

PROMPTS = {"harmful": [[3, 4, 5], [6, 7], [8, 9, 10, 11], [12, 13], [14]], "task": [[20, 21], [22, 23, 24], [25]]}
LAYERS = 2  # two thirds of three


def weights_of(path):
    shards = sorted(set(json.loads((path / "model.safetensors.index.json").read_text())["weight_map"].values()))
    return {name: tensor for shard in shards for name, tensor in load_file(path / shard).items()}


def evidence(family, **changes):
    options = {"prompts": PROMPTS, "score": lambda m: 0.5, "layer_fraction": 2 / 3, "batch_size": 2}
    return HiddenEvidence(family / "aligned", weights_of(family / "tuned").items(), **{**options, **changes})


def last_states(model, rows):
    """[n, hidden] after layer two, of unpadded prompts."""
    states = [model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[LAYERS] for row in rows]
    return torch.stack([state[0, -1] for state in states])


@pytest.mark.parametrize("data, anchor_of", [("harmful", "aligned"), ("task", "tuned")])
def test_gradient_is_that_of_the_published_loss(family, data, anchor_of):
    """-cos(mean over the minibatch, anchor), summed over minibatches of 2, 2 and 1; accumulated over two calls."""
    models = {name: AutoModelForCausalLM.from_pretrained(family / name) for name in ("aligned", "tuned")}
    rows, tuned = PROMPTS[data], models["tuned"]
    anchor = last_states(models[anchor_of], rows).mean(0).detach()
    for start in range(0, len(rows), 2):
        (-cosine_similarity(last_states(tuned, rows[start : start + 2]).mean(0), anchor, dim=0)).backward()
    expected = {name: p.grad for name, p in tuned.named_parameters() if p.grad is not None}
    found = evidence(family)
    linear = {name for name in expected if "_proj." in name}
    once = {name: sum_.clone() for name, sum_ in found.add_gradient(data).items()}
    assert set(once) == linear
    for name in linear:
        torch.testing.assert_close(once[name], expected[name], rtol=1e-3, atol=1e-7)
    twice = found.add_gradient(data)
    for name in linear:
        torch.testing.assert_close(twice[name], 2 * once[name])
    found.clear_gradients()
    torch.testing.assert_close(found.add_gradient(data)[name], once[name])


def test_size_of_minibatches_matters_as_published(family):
    name = "model.layers.0.mlp.up_proj.weight"
    two, five = (evidence(family, batch_size=size).add_gradient("harmful")[name] for size in (2, 5))
    assert not torch.allclose(two, five, rtol=1e-2)


def test_working_weights_are_float32_or_the_checkpoints(family):
    plain = evidence(family)
    assert {weight.dtype for weight in plain.weights.values()} == {torch.float32}
    half = evidence(family, dtype=torch.bfloat16)
    assert {weight.dtype for weight in half.weights.values()} == {torch.bfloat16}


def test_layers_and_parameters(family):
    found = evidence(family)
    assert {name.split(".")[2] for name in found.weights} == {"0", "1"}
    model = AutoModelForCausalLM.from_pretrained(family / "aligned")
    assert found.layer_parameters == sum(p.numel() for p in model.model.layers.parameters())
    assert found.score() == 0.5


def test_what_is_not_finite_is_named(family):
    found = evidence(family)
    with torch.no_grad():
        found.weights["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    with pytest.raises(CurvatureError, match="the hidden-state loss of harmful minibatch 1 is nan"):
        found.add_gradient("harmful")
    spoiled = {**weights_of(family / "tuned"), "model.norm.weight": torch.full((32,), float("nan"))}
    HiddenEvidence(
        family / "aligned", spoiled.items(), prompts=PROMPTS, score=lambda m: 0.0, layer_fraction=1 / 3, batch_size=2
    )  # the last norm is not looked at


def test_a_tensor_that_the_model_does_not_have_is_named(family):
    with pytest.raises(CurvatureError, match="the checkpoint's extra is no parameter of LlamaForCausalLM"):
        HiddenEvidence(family / "aligned", [("extra", torch.zeros(2))], prompts=PROMPTS, score=lambda m: 0.0,
                       layer_fraction=1.0, batch_size=2)  # fmt: skip

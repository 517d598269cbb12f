"""Statistics of a model that runs layer by layer are those of the model in memory."""

import pytest
import torch
from layerwise.tiny import resident, save
from oracles import close, texts

from curvkern.curvature import CurvatureError, estimate

FIRST = ("gradient", "fisher_diag", "fisher_blocks", "abs_gradient", "sample_norms", "low_rank", "kfac")


def both(path, **options):
    rows = texts()
    by_layer = estimate(path, rows, layerwise=True, batch_tokens=13, **options)
    return by_layer, estimate(resident(path), rows, batch_tokens=13, **options)


def same(by_layer, in_memory, exactly):
    assert by_layer.choices == in_memory.choices
    assert by_layer.counts == in_memory.counts
    assert by_layer.unmeasured == in_memory.unmeasured
    assert by_layer.sums.keys() == in_memory.sums.keys()
    for quantity, of in in_memory.sums.items():
        assert by_layer[quantity].keys() == of.keys()
        for name, tensor in of.items():
            got = by_layer[quantity][name]
            assert torch.equal(got, tensor) if exactly else close(got, tensor.double()) is None, (quantity, name)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma2", "mistral", "gpt2"])
def test_every_first_order_quantity_is_the_same_bit_for_bit(tmp_path, kind):
    path = save(tmp_path / "model", kind)
    norms = {"kinds": ("linear", "experts", "norm"), "include": ["*layers*", "*.h.*"][kind == "gpt2" :][:1]}
    same(*both(path, quantity=FIRST, **norms), exactly=True)
    same(*both(path, fisher_type="mc", mc_samples=2, loss="token_sum"), exactly=True)


@pytest.mark.parametrize("kind", ["mixtral", "qwen3-moe"])
def test_experts_are_the_same_to_rounding(tmp_path, kind):
    """The forward sweep, which has no taps, runs them by other kernels."""
    path = save(tmp_path / "model", kind)
    same(*both(path, quantity=("gradient", "fisher_diag", "kfac")), exactly=False)


def test_eigenbases_and_hessians_are_the_same(tmp_path):
    path = save(tmp_path / "model", "llama")
    same(*both(path, quantity=("ekfac", "kfac")), exactly=True)
    by_layer, in_memory = both(path, quantity="hessian_diag", probes=2)
    assert by_layer.choices == in_memory.choices
    for name, tensor in in_memory["hessian_diag"].items():
        close(by_layer["hessian_diag"][name], tensor.double())
        close(by_layer["hessian_trace"][name], in_memory["hessian_trace"][name].double())


def test_the_head_and_files_for_hidden_states(tmp_path):
    path = save(tmp_path / "model", "llama")
    spill = tmp_path / "spill"
    spill.mkdir()
    found, in_memory = both(path, include=["lm_head.weight", "model.norm.weight"], kinds=("linear", "norm"))
    same(found, in_memory, exactly=True)
    spilled = estimate(path, texts(), layerwise=True, batch_tokens=13, spill=spill, include=["lm_head.weight"])
    assert torch.equal(spilled["fisher_diag"]["lm_head.weight"], found["fisher_diag"]["lm_head.weight"])
    assert not list(spill.iterdir())


def test_stopped_in_memory_and_resumed_by_layer(tmp_path):
    path, rows = save(tmp_path / "model", "llama"), texts()
    part = estimate(resident(path), rows, batch_tokens=1, stop=lambda: True)
    whole = estimate(path, rows, batch_tokens=1, layerwise=True, resume=part)
    for name, tensor in estimate(resident(path), rows, batch_tokens=1)["fisher_diag"].items():
        close(whole["fisher_diag"][name], tensor.double())


def test_what_does_not_fit_runs_by_layer(tmp_path, monkeypatch):
    path = save(tmp_path / "model", "llama")
    opened = []
    monkeypatch.setattr("curvkern.curvature.by_layer.free_memory", lambda device: 1000)
    monkeypatch.setattr("curvkern.curvature.by_layer.ByLayer.gather", lambda self, sums: opened.append(1) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        estimate(path, texts())
    assert opened
    monkeypatch.setattr("curvkern.curvature.by_layer.free_memory", lambda device: 1 << 40)
    assert estimate(path, texts())["fisher_diag"]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"fisher_type": "type-2"}, "runs with the model in memory; pass layerwise=False"),
        ({"non_finite": "skip"}, "non_finite='skip' runs with the model in memory"),
        ({"kinds": ["embedding"]}, "model.embed_tokens.weight is an embedding"),
        ({"quantity": "hessian_diag", "hvp": "difference"}, "layer by layer, products are exact"),
        ({"loss": lambda logits, labels: logits.sum((1, 2)) * float("nan")}, "the loss of rows 1"),
    ],
)
def test_what_cannot_be_done_is_told(tmp_path, changes, message):
    path = save(tmp_path / "model", "llama")
    with pytest.raises(CurvatureError, match=message):
        estimate(path, texts(), layerwise=True, **changes)
    with pytest.raises(CurvatureError, match="takes a model's directory"):
        estimate(resident(path), texts(), layerwise=True)

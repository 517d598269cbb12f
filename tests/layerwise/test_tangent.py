"""Products with the Hessian, layer by layer, against autograd through the whole model in memory."""

import pytest
import torch
from layerwise.tiny import KINDS, loss, make_batches, resident, save

from curvkern.layerwise import LayerwiseError, LayerwiseModel


def direction(name, parameter):
    generator = torch.Generator().manual_seed(sum(map(ord, name)))
    return torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)


def exact_products(model, batches, wanted):
    """Parameter name -> H v: the gradient of <gradient, v>."""
    named = {name: p.requires_grad_() for name, p in model.named_parameters() if wanted(name)}
    total = sum(loss(model, batch) for batch in batches)
    gradients = torch.autograd.grad(total, named.values(), create_graph=True, materialize_grads=True)
    along = sum((g * direction(n, p)).sum() for (n, p), g in zip(named.items(), gradients, strict=True))
    products = torch.autograd.grad(along, named.values(), materialize_grads=True)
    return dict(zip(named, products, strict=True))


def layerwise_products(model, batches, wanted, **options):
    found = {}

    def add(name, product):
        found[name] = found.get(name, 0) + product

    report = model.tangent(batches, loss, lambda name, p: direction(name, p) if wanted(name) else None, add, **options)
    return found, report


def relative(got, exact):
    """Error over size, all parameters as one vector."""
    assert got.keys() == exact.keys()
    error = sum((got[n].double() - e.double()).square().sum() for n, e in exact.items())
    return float((error / sum(e.double().square().sum() for e in exact.values())).sqrt())


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request, monkeypatch):
    """Of all arithmetic: models compute norms, softmax and loss in float32, so that is made float64 as well."""
    if request.param is torch.float64:
        for name in ("float32", "float"):
            monkeypatch.setattr(torch, name, torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    return request.param


@pytest.mark.parametrize("kind", KINDS)
def test_products_of_all_parameters_are_exact(tmp_path, kind, dtype):
    path, batches = save(tmp_path / "model", kind, dtype), make_batches(count=2)
    whole = resident(path, dtype, attn_implementation="eager", experts_implementation="eager")
    exact = exact_products(whole, batches, lambda name: True)
    with LayerwiseModel.open(path, dtype=dtype) as model:
        before = model.config._attn_implementation
        found, report = layerwise_products(model, batches, lambda name: True)
        assert model.config._attn_implementation == before
    assert relative(found, exact) < (1e-13 if dtype is torch.float64 else 1e-5)
    assert report.reads == (2, 2, 1)
    for at, batch in enumerate(batches):
        torch.testing.assert_close(report.losses[at], loss(whole, batch).detach())


def test_parameters_without_direction_are_held_fixed(tmp_path):
    """And boundaries on disk or made again change nothing."""
    path, batches = save(tmp_path / "model", "qwen2", num_hidden_layers=5), make_batches()

    def wanted(name):
        return name.endswith(("q_proj.weight", "down_proj.weight", "q_proj.bias")) and ".1." not in name

    exact = exact_products(resident(path, attn_implementation="eager"), batches, wanted)
    with LayerwiseModel.open(path) as model:
        found, _ = layerwise_products(model, batches, wanted)
        again, report = layerwise_products(model, batches, wanted, spill=tmp_path, keep_every=2)
        nothing, _ = layerwise_products(model, batches, lambda name: False)
    assert relative(found, exact) < 1e-5
    assert not nothing
    assert report.reads == (3, 2, 3, 2, 1)
    for name, product in found.items():
        assert torch.equal(again[name], product)


def test_a_part_of_another_shape_is_told(tmp_path):
    path = save(tmp_path / "model", "llama")
    with (
        LayerwiseModel.open(path) as model,
        pytest.raises(LayerwiseError, match=r"direction of model.layers.0.self_attn.q_proj.weight is \[3\]; wanted \["),
    ):
        model.tangent(make_batches(), loss, lambda n, p: torch.ones(3) if "q_proj.w" in n else None, lambda n, t: None)

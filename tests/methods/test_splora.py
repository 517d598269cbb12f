import math
from dataclasses import replace

import pytest
import torch
from modules import as_dtype, module

import curvkern
from curvkern.checkpoint import Adapter, Checkpoint, open_tuned
from curvkern.methods import MethodError, make


def family_of_modules(rank=None, count=5):
    """Modules of one shape whose updates grow with the layer."""
    for k in range(count):
        m = module(f"model.layers.{k}.mlp.up_proj.weight", seed=20 * k, rank=rank)
        grown = (k + 1) * (m.tuned - m.aligned)
        factors = m.factors and ((k + 1) * m.factors[0], *m.factors[1:])
        yield replace(m, tuned=m.aligned + grown, factors=factors)


def dense(m, projector="gram", rank=64):
    """Update and image in float64 from the dense maps."""
    v, delta = m.aligned.double() - m.base.double(), m.tuned.double() - m.aligned.double()
    if projector == "gram":
        return delta, v @ v.T @ delta / v.norm()
    u = torch.linalg.svd(v, full_matrices=False)[0][:, :rank]
    return delta, u @ u.T @ delta


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("projector", ["gram", "basis"])
def test_the_distance_is_the_dense_one(rank, projector):
    m = module(rank=rank)
    delta, image = dense(m, projector)
    got = make("splora", {"projector": projector}).measure(m)
    if projector == "basis":  # V has 16 directions in 24 dimensions: a part of the update is outside of all
        assert 0.1 * delta.norm() < got < 0.9 * delta.norm()
    assert got == pytest.approx(float((image - delta).norm()), rel=1e-4)


def test_an_update_along_the_alignment_is_near_and_one_across_is_far():
    m = module()
    u = torch.linalg.svd(m.aligned.double() - m.base.double())[0].float()
    along = replace(m, tuned=m.aligned + u[:, :2] @ torch.ones(2, 16))
    across = replace(m, tuned=m.aligned + u[:, -2:] @ torch.ones(2, 16))
    method = make("splora", {"projector": "basis"})
    assert method.measure(along) < 1e-2
    assert method.measure(across) == pytest.approx(32**0.5, rel=1e-4)


@pytest.mark.parametrize("rank", [None, 3])
def test_ediem_is_the_correlation_times_the_root_of_the_size(rank):
    m = module(rank=rank)
    delta, image = dense(m)
    correlation = torch.corrcoef(torch.stack([delta.flatten(), image.flatten()]))[0, 1]
    expected = -math.sqrt(delta.numel() - 1) * float(correlation)
    assert make("splora", {"score": "ediem"}).measure(m) == pytest.approx(expected, rel=1e-4)


def test_ediem_is_what_sampled_pairings_say():
    m = module()
    delta, image = (x.flatten() for x in dense(m))
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([
        (image - delta[torch.randperm(delta.numel(), generator=generator)]).square().sum() for _ in range(4000)
    ])  # fmt: skip
    z = float(((image - delta).square().sum() - draws.mean()) / draws.std())
    error = 4 * (1 / 4000 + z**2 / 8000) ** 0.5  # four standard errors, from the mean and from the deviation
    assert make("splora", {"score": "ediem"}).measure(m) == pytest.approx(z, abs=error)


def test_ediem_ranks_modules_of_one_shape_as_their_correlation_does():
    modules = list(family_of_modules())
    plan = make("splora", {"score": "ediem", "number": 2}).plan(lambda: modules, None, lambda _: None)
    correlation = {m.name: float(torch.corrcoef(torch.stack([x.flatten() for x in dense(m)]))[0, 1]) for m in modules}
    assert plan.chosen == set(sorted(correlation, key=correlation.get)[:2])


@pytest.mark.parametrize("rank", [None, 3])
def test_the_most_distant_return_to_the_aligned_model(rank):
    modules = list(family_of_modules(rank))
    method = make("splora", {"number": 2})
    lines = []
    plan = method.plan(lambda: modules, None, lines.append)
    assert lines == ["splora: 2 of 5 modules reset"]
    assert plan.chosen == {m.name for m in modules[-2:]}
    for m in modules:
        edit = method.edit(m, plan)
        assert edit.notes["distance"] == plan.distance[m.name]
        if m.name not in plan.chosen:
            assert edit.weight is None
            continue
        assert torch.equal(edit.weight, m.aligned)
        assert (edit.factors is None) == (rank is None)
        if rank:
            b, a = edit.factors
            assert not b.any()
            assert torch.equal(a, m.factors[1])


def test_a_threshold_takes_all_beyond_it():
    modules = list(family_of_modules())
    distance = make("splora", {}).measure(modules[2])
    plan = make("splora", {"threshold": distance}).plan(lambda: modules, None, lambda _: None)
    assert plan.chosen == {m.name for m in modules[3:]}


def test_adapter_and_merged_model_are_the_same_distance_away():
    m = module(rank=3, scale=0.25)
    for score in ("distance", "ediem"):
        method = make("splora", {"score": score})
        assert method.measure(m) == pytest.approx(method.measure(replace(m, factors=None)), rel=1e-4)


def test_modules_without_update_or_alignment():
    m = module()
    still = replace(m, name="model.layers.1.mlp.up_proj.weight", tuned=m.aligned)
    method = make("splora", {"number": 1})
    plan = method.plan(lambda: [still, m], None, lambda _: None)
    assert plan.distance.keys() == plan.chosen == {m.name}
    assert method.edit(still, plan).weight is None
    unmoved = replace(m, base=m.aligned)  # C is 0: every update is as far as it is long
    assert method.measure(unmoved) == pytest.approx(float((m.tuned - m.aligned).norm()), rel=1e-5)
    assert make("splora", {"score": "ediem"}).measure(unmoved) == 0


def test_half_precision_measures_in_float32_and_copies_bits():
    half = as_dtype(module(), torch.bfloat16)
    method = make("splora", {"number": 1})
    plan = method.plan(lambda: [half], None, lambda _: None)
    delta, image = dense(half)
    assert plan.distance[half.name] == pytest.approx(float((image - delta).norm()), rel=1e-4)
    assert torch.equal(method.edit(half, plan).weight, half.aligned)


@pytest.mark.parametrize(
    "parameters, message",
    [({"score": "diem"}, "splora: score is 'diem'"), ({"number": -1}, "splora: number is -1"),
     ({"rank": 0}, "splora: rank is 0")],
)  # fmt: skip
def test_wrong_parameters_are_named(parameters, message):
    with pytest.raises(MethodError, match=message):
        make("splora", parameters)


def test_more_modules_than_there_are_is_refused():
    with pytest.raises(MethodError, match="splora: number is 10, but there are 5 modules"):
        make("splora", {}).plan(lambda: list(family_of_modules()), None, lambda _: None)


@pytest.mark.parametrize("score", ["distance", "ediem"])
def test_from_adapter_to_adapter(family, tmp_path, score):
    options = {"method": "splora", "base": family / "base", "score": score, "number": 2}
    report = curvkern.restore(family / "aligned", family / "adapter", out=tmp_path / "out", **options)
    assert report.saved == "adapter"
    reset = {m.name for m in report.modules if m.changed}
    assert len(reset) == 2
    with Checkpoint.open(family / "aligned") as aligned, open_tuned(tmp_path / "out", aligned) as view:
        for name in reset:
            assert torch.equal(view.read(name), aligned.read(name))
    with Adapter.open(family / "adapter") as before, Adapter.open(tmp_path / "out") as after:
        for name in set(before.names) - reset:
            assert torch.equal(before.factors(name).B, after.factors(name).B)

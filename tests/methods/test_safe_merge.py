import shutil
from dataclasses import replace

import pytest
import torch
from modules import as_dtype, module
from safetensors.torch import load_file, save_file

import curvkern
from curvkern.checkpoint import Adapter, Checkpoint, open_tuned
from curvkern.methods import MethodError, make


def restored(m, **parameters):
    """The edit of one module, merged whatever its cosine."""
    method = make("safe_merge", {"threshold": 1.0, **parameters})
    return method.edit(m, method.plan(lambda: [m], None, lambda _: None))


def dense_cosine(m):
    v, delta = m.aligned.double() - m.base.double(), m.tuned.double() - m.aligned.double()
    image = v @ (v.T @ delta)
    return round(float((image * delta).sum() / (image.norm() * delta.norm())), 5)


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_a_delta_merge_is_the_blend_of_the_updates(weight):
    m = module()
    update, safety = m.tuned.double() - m.aligned.double(), m.safety_adapter.double() - m.aligned.double()
    got = restored(m, weight=weight)
    assert got.factors is None
    expected = m.aligned.double() + (1 - weight) * update + weight * safety
    torch.testing.assert_close(got.weight.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.2, 1.0])
def test_a_factor_merge_is_the_delta_merge_and_the_cross_terms(weight):
    m = module(rank=4)
    (b1, a1, s1), (b2, a2, s2) = m.factors, m.safety_factors
    b1, a1, b2, a2 = (x.double() for x in (b1, a1, b2, a2))
    blend = (1 - weight) * s1 * b1 @ a1 + weight * s2 * b2 @ a2
    cross = (weight * (1 - weight) * s1 * s2) ** 0.5 * (b1 @ a2 + b2 @ a1)
    edit = restored(m, merge="factors", weight=weight)
    torch.testing.assert_close(edit.weight.double(), m.aligned + blend + cross, rtol=1e-4, atol=1e-5)
    b, a = edit.factors
    assert (b.shape, a.shape) == (m.factors[0].shape, m.factors[1].shape)
    torch.testing.assert_close(m.aligned + s1 * b @ a, edit.weight)


def test_a_factor_merge_is_what_peft_computes():
    """The recipe of PEFT's linear combination: A and B each summed with the roots of weight times scale."""
    m = module(rank=4)
    sides = [
        sum((w * f[2]) ** 0.5 * f[side].double() for w, f in ((0.8, m.factors), (0.2, m.safety_factors)))
        for side in (0, 1)
    ]
    expected = m.aligned.double() + sides[0] @ sides[1]
    torch.testing.assert_close(restored(m, merge="factors").weight.double(), expected, rtol=1e-4, atol=1e-5)


def test_only_modules_below_the_threshold_are_merged():
    modules = [module(f"model.layers.{k}.mlp.up_proj.weight", seed=20 * k) for k in range(5)]
    cosine = {m.name: dense_cosine(m) for m in modules}
    in_order = sorted(cosine, key=cosine.get)
    method = make("safe_merge", {"threshold": (cosine[in_order[1]] + cosine[in_order[2]]) / 2})
    lines = []
    plan = method.plan(lambda: modules, None, lines.append)
    assert plan.cosine == pytest.approx(cosine, abs=2e-5)
    assert plan.chosen == set(in_order[:2])
    assert lines == ["safe_merge: 2 of 5 modules merged"]
    for m in modules:
        assert (method.edit(m, plan).weight is not None) == (m.name in plan.chosen)
        assert method.edit(m, plan).notes == {"cosine": plan.cosine[m.name]}


def test_a_cosine_at_the_threshold_is_not_below_it():
    m = module()
    assert restored(m, threshold=make("safe_merge", {}).measure(m)).weight is None


def test_a_basis_tells_along_from_across():
    m = module()
    u = torch.linalg.svd(m.aligned - m.base)[0]
    along, across = (replace(m, tuned=m.aligned + u[:, k : k + 1] @ torch.ones(1, 16)) for k in (0, 23))
    for one, merged in ((along, False), (across, True)):
        edit = restored(one, projector="basis", threshold=0.35)
        assert (edit.weight is not None) == merged


def test_degenerate_modules():
    m = module()
    still = replace(m, tuned=m.aligned)
    assert restored(still).weight is None
    unmoved = replace(m, base=m.aligned)  # no alignment to see: cosine 0
    edit = restored(unmoved, threshold=0.35)
    assert edit.notes == {"cosine": 0.0}
    assert edit.weight is not None
    same = replace(m, safety_adapter=m.tuned)
    assert torch.equal(restored(same, weight=0.3).weight, m.tuned)


def test_a_module_that_the_safety_adapter_leaves_alone_shrinks():
    m = module(rank=4)
    alone = replace(m, safety_adapter=m.aligned, safety_factors=None)
    for merge in ("delta", "factors"):
        weight = restored(alone, merge=merge, weight=0.2).weight
        torch.testing.assert_close(weight, m.aligned + 0.8 * (m.tuned - m.aligned), rtol=1e-4, atol=1e-5)


def test_half_precision_is_computed_in_float32():
    half = as_dtype(module(), torch.bfloat16)
    got = restored(half).weight
    assert got.dtype == torch.float32
    assert torch.equal(got, restored(as_dtype(half, torch.float32)).weight)


def test_factors_keep_their_dtype_and_the_weight_is_what_they_make():
    m = module(rank=4)
    b, a, s = m.factors
    edit = restored(replace(m, factors=(b.bfloat16(), a.bfloat16(), s)), merge="factors")
    assert {x.dtype for x in edit.factors} == {torch.bfloat16}
    assert torch.equal(edit.weight, m.aligned + s * (edit.factors[0].float() @ edit.factors[1].float()))


def with_rank(factors, rank):
    return factors[0][:, :rank], factors[1][:rank], factors[2]


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m: {"factors": None}, "the tuned model changes model.layers.0.mlp.up_proj.weight without factors"),
        (lambda m: {"safety_factors": None}, "the safety adapter changes .* without factors; use merge='delta'"),
        (lambda m: {"safety_factors": with_rank(m.safety_factors, 2)}, r"ranks 4 \(tuned\) and 2 \(safety adapter\)"),
        (lambda m: {"safety_factors": (*m.safety_factors[:2], -1.0)}, r"scales 0.5 \(tuned\) and -1 .* have no roots"),
    ],
)
def test_factors_that_cannot_be_merged_are_refused_while_planning(change, message):
    m = module(rank=4)
    method = make("safe_merge", {"merge": "factors", "threshold": 1.0})
    with pytest.raises(MethodError, match=message):
        method.plan(lambda: [replace(m, **change(m))], None, lambda _: None)


@pytest.mark.parametrize(
    "parameters, message",
    [({"weight": 1.2}, "safe_merge: weight is 1.2"), ({"merge": "linear"}, "safe_merge: merge is 'linear'"),
     ({"ratio": 0.2}, "unknown parameter 'ratio'")],
)  # fmt: skip
def test_wrong_parameters_are_named(parameters, message):
    with pytest.raises(MethodError, match=message):
        make("safe_merge", parameters)


@pytest.fixture
def safety(family, tmp_path):
    """Another adapter like the family's."""
    path = tmp_path / "safety"
    shutil.copytree(family / "adapter", path)
    file = path / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(9)
    factors = {k: 0.05 * torch.randn(t.shape, generator=generator) for k, t in sorted(load_file(file).items())}
    save_file(factors, file, metadata={"format": "pt"})
    return path


@pytest.mark.parametrize("merge", ["delta", "factors"])
def test_two_adapters(family, tmp_path, safety, merge):
    options = {"base": family / "base", "safety_adapter": safety, "threshold": 1.0, "weight": 0.3}
    report = curvkern.restore(
        family / "aligned", family / "adapter", out=tmp_path / "out", method="safe_merge", merge=merge, **options
    )
    assert report.saved == ("adapter" if merge == "factors" else "checkpoint")
    with (
        Checkpoint.open(family / "aligned") as aligned,
        Adapter.open(family / "adapter") as first,
        Adapter.open(safety) as second,
        open_tuned(tmp_path / "out", aligned) as got,
    ):
        assert {m.name for m in report.modules if m.changed} == set(first.names)
        for name in first.names:
            one, two = first.factors(name), second.factors(name)
            expected = aligned.read(name).double()
            expected += 0.7 * one.scale * one.B.double() @ one.A.double()
            expected += 0.3 * two.scale * two.B.double() @ two.A.double()
            if merge == "factors":
                root = (0.3 * 0.7 * one.scale * two.scale) ** 0.5
                expected += root * (one.B.double() @ two.A.double() + two.B.double() @ one.A.double())
            torch.testing.assert_close(got.read(name).double(), expected, rtol=1e-5, atol=1e-6)


def test_two_checkpoints(family, tmp_path):
    models = {"base": family / "base", "safety_adapter": family / "base"}
    pair = family / "aligned", family / "tuned"
    with pytest.raises(MethodError, match=r"the tuned model changes .* without factors"):
        curvkern.restore(*pair, out=tmp_path / "out", method="safe_merge", merge="factors", threshold=1.0, **models)
    report = curvkern.restore(*pair, out=tmp_path / "out", method="safe_merge", threshold=1.0, **models)
    paths = pair[1], models["base"], tmp_path / "out"
    with Checkpoint.open(paths[0]) as tuned, Checkpoint.open(paths[1]) as safe, Checkpoint.open(paths[2]) as got:
        for name in (m.name for m in report.modules):
            expected = 0.8 * tuned.read(name).double() + 0.2 * safe.read(name).double()
            torch.testing.assert_close(got.read(name).double(), expected, rtol=1e-5, atol=1e-7)

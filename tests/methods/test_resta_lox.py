from dataclasses import replace

import pytest
import torch
from modules import as_dtype, module, normal

import curvkern
from curvkern.checkpoint import Checkpoint
from curvkern.methods import MethodError, make
from curvkern.restore import RestoreError


def edited(name, m, **parameters):
    return make(name, parameters).edit(m, None).weight


def truncated(v, k):
    """The best rank-k approximation, by a whole SVD."""
    u, s, vt = torch.linalg.svd(v, full_matrices=False)
    return u[:, :k] * s[:k] @ vt[:k]


def spiked(o, i, k, seed):
    """A matrix with k large singular values; the others are a hundredth of them."""
    u = torch.linalg.qr(normal(o, o, seed=seed).double())[0]
    v = torch.linalg.qr(normal(i, i, seed=seed + 1).double())[0]
    s = torch.full((min(o, i),), 0.01).double()
    s[:k] = torch.linspace(2, 1, k).double()
    return (u[:, : len(s)] * s @ v[:, : len(s)].T).float()


@pytest.mark.parametrize("beta", [0.5, 1.0, 2.0])
def test_resta_adds_the_safety_vector(beta):
    m = module()
    expected = m.tuned.double() + beta * (m.aligned.double() - m.unaligned.double())
    torch.testing.assert_close(edited("resta", m, beta=beta).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("drop_from", ["update", "vector"])
def test_resta_drops_entries_of_what_it_is_told(drop_from):
    m = module(o=64, i=128)
    got = edited("resta", m, drop=0.9, drop_from=drop_from).double()
    aligned, tuned, unaligned = (x.double() for x in (m.aligned, m.tuned, m.unaligned))
    update, vector = tuned - aligned, aligned - unaligned
    thinned, whole = (update, vector) if drop_from == "update" else (vector, update)
    left = got - aligned - whole
    kept = left.abs() > 1e-5
    n = kept.numel()
    assert abs(kept.double().mean() - 0.1) < 4 * (0.1 * 0.9 / n) ** 0.5
    torch.testing.assert_close(left[kept], 10 * thinned[kept], rtol=1e-4, atol=1e-5)


def test_restas_draw_depends_on_seed_and_name():
    m = module()
    same = [edited("resta", m, drop=0.5, seed=s) for s in (1, 1, 2)]
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])
    other = replace(m, name="model.layers.1.mlp.up_proj.weight")
    assert not torch.equal(same[0], edited("resta", other, drop=0.5, seed=1))


@pytest.mark.parametrize("beta, role", [(0.0, "base"), (1.5, "aligned")])
def test_resta_changes_nothing_without_beta_or_a_difference(beta, role):
    m = module()
    assert torch.equal(edited("resta", replace(m, unaligned=getattr(m, role)), beta=beta), m.tuned)


@pytest.mark.parametrize("rank", [1, 3, 16, None])
def test_lox_adds_the_best_approximation_of_the_alignment(rank):
    m = module()
    k = 3
    m = replace(m, base=m.aligned - spiked(24, 16, k, seed=5))
    v = m.aligned.double() - m.base.double()
    expected = m.tuned.double() + 1.5 * truncated(v, rank or 16)
    got = edited("lox", m, rank=rank, alpha=1.5)
    torch.testing.assert_close(got.double(), expected, rtol=1e-4, atol=1e-4)


def test_lox_of_the_aligned_model_is_the_published_step():
    m = module()
    m = replace(m, tuned=m.aligned, base=m.aligned - spiked(24, 16, 2, seed=7))
    step = edited("lox", m, rank=2).double() - m.aligned.double()
    values = torch.linalg.svdvals(step)
    exact = torch.linalg.svdvals(m.aligned.double() - m.base.double())
    torch.testing.assert_close(values[:2], exact[:2], rtol=1e-4, atol=0)
    assert values[2] < 1e-5


@pytest.mark.parametrize("rank", [4, None])
@pytest.mark.parametrize("alpha, role", [(0.0, "base"), (2.0, "aligned")])
def test_lox_changes_nothing_without_alpha_or_alignment(rank, alpha, role):
    m = module()
    m = replace(m, base=getattr(m, role))
    assert torch.equal(edited("lox", m, rank=rank, alpha=alpha), m.tuned)


@pytest.mark.parametrize("name, parameters", [("resta", {"drop": 0.5}), ("lox", {"rank": 4})])
def test_half_precision_is_computed_in_float32(name, parameters):
    half = as_dtype(module(), torch.bfloat16)
    got = edited(name, half, **parameters)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, edited(name, as_dtype(half, torch.float32), **parameters), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    "name, parameters, message",
    [
        ("resta", {"beta": -1.0}, "resta: beta is -1.0: .*greater than or equal to 0"),
        ("resta", {"drop": 1.0}, "resta: drop is 1.0: .*less than 1"),
        ("resta", {"drop_from": "delta"}, "resta: drop_from is 'delta'"),
        ("resta", {"betta": 1.0}, "Did you mean 'beta'"),
        ("lox", {"rank": 0}, "lox: rank is 0: .*greater than or equal to 1"),
        ("lox", {"alpha": -0.5}, "lox: alpha is -0.5"),
    ],
)
def test_wrong_parameters_are_named(name, parameters, message):
    with pytest.raises(MethodError, match=message):
        make(name, parameters)


@pytest.mark.parametrize("name, role", [("resta", "unaligned"), ("lox", "base")])
def test_a_missing_checkpoint_is_named(name, role):
    with pytest.raises(MethodError, match=f"{name}: needs the {role} checkpoint; pass {role}="):
        make(name, {}).edit(replace(module(), **{role: None}), None)


def tensors(path):
    with Checkpoint.open(path) as checkpoint:
        return {name: checkpoint.read(name).double() for name in checkpoint.names}


@pytest.mark.parametrize("name, role, parameters", [("resta", "unaligned", {"beta": 0.7}),
                                                    ("lox", "base", {"rank": None, "alpha": 0.7})])  # fmt: skip
def test_from_checkpoint_to_checkpoint(family, tmp_path, name, role, parameters):
    pair = family / "aligned", family / "tuned"
    with pytest.raises(RestoreError, match=f"needs {role}; pass {role}="):
        curvkern.restore(*pair, out=tmp_path / "out", method=name, **parameters)
    other = {role: family / "base"}  # any checkpoint that fits
    report = curvkern.restore(*pair, out=tmp_path / "out", method=name, **other, **parameters)
    aligned, tuned, third, got = (tensors(p) for p in (*pair, family / "base", tmp_path / "out"))
    edited_names = {m.name for m in report.modules}
    assert edited_names == {n for n in tuned if ".layers." in n and n.endswith("_proj.weight")}
    for n, weight in got.items():
        expected = tuned[n] + 0.7 * (aligned[n] - third[n]) if n in edited_names else tuned[n]
        torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-7)

from dataclasses import replace

import pytest
import torch
from modules import as_dtype, module

import curvkern
from curvkern.checkpoint import Checkpoint
from curvkern.methods import MethodError, make
from curvkern.restore import RestoreError

KINDS = ("linear", "slerp", "ties", "dare", "model_stock")


def merged(m, **parameters):
    return make("merge", parameters).edit(m, None).weight


def arc(tuned, aligned, w):
    """From tuned to aligned along the great circle."""
    omega = torch.acos((tuned * aligned).sum() / (tuned.norm() * aligned.norm()))
    return (((1 - w) * omega).sin() * tuned + (w * omega).sin() * aligned) / omega.sin()


def trimmed(tuned, aligned, w, density):
    """The largest entries of the update, by a sort."""
    delta = (tuned - aligned).flatten()
    kept = torch.zeros_like(delta)
    top = delta.abs().sort(descending=True).indices[: int(density * delta.numel())]
    kept[top] = delta[top]
    return aligned + (1 - w) * kept.view(tuned.shape)


def stock(base, aligned, tuned):
    """Two models pulled towards their origin by the cosine of their updates."""
    v, u = aligned - base, tuned - base
    cosine = (v * u).sum() / (v.norm() * u.norm())
    t = 2 * cosine / (1 + cosine)
    return t * (aligned + tuned) / 2 + (1 - t) * base


def test_slerp_goes_from_tuned_to_aligned_along_the_arc():
    m = module()
    far = replace(m, tuned=-0.5 * m.aligned + m.tuned)  # far enough that the arc is no chord
    expected = arc(far.tuned.double(), far.aligned.double(), 0.3)
    torch.testing.assert_close(merged(far, kind="slerp", weight=0.3).double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(merged(far, kind="slerp", weight=0.0), far.tuned)
    assert torch.equal(merged(far, kind="slerp", weight=1.0), far.aligned)


def test_slerp_of_a_small_update_is_linear():
    m = module()
    near = replace(m, tuned=torch.lerp(m.aligned, m.tuned, 0.01))
    torch.testing.assert_close(merged(near, kind="slerp", weight=0.3), merged(near, weight=0.3))


@pytest.mark.parametrize("density", [0.1, 0.5, 1.0])
def test_ties_trims_the_update(density):
    m = module()
    expected = trimmed(m.tuned.double(), m.aligned.double(), 0.25, density)
    got = merged(m, kind="ties", weight=0.25, density=density)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-6)


def test_ties_that_keeps_everything_is_linear():
    m = module()
    torch.testing.assert_close(merged(m, kind="ties", density=1.0), merged(m))


@pytest.mark.parametrize("rescale, factor", [("inverse", 1 / 0.3), ("none", 1.0)])
def test_dare_keeps_a_rescaled_share_of_the_update(rescale, factor):
    m = module(o=64, i=128)
    got = merged(m, kind="dare", weight=0.25, density=0.3, rescale=rescale)
    kept = got != m.aligned
    share, n = kept.double().mean(), kept.numel()
    assert abs(share - 0.3) < 4 * (0.3 * 0.7 / n) ** 0.5  # four standard deviations of the share
    expected = m.aligned.double() + 0.75 * factor * (m.tuned - m.aligned).double()
    torch.testing.assert_close(got[kept].double(), expected[kept], rtol=1e-5, atol=1e-6)


def test_dares_l1_keeps_the_sum_of_magnitudes():
    m = module(o=64, i=128)
    got = merged(m, kind="dare", weight=0.0, density=0.3, rescale="l1")
    torch.testing.assert_close((got - m.aligned).abs().sum(), (m.tuned - m.aligned).abs().sum(), rtol=1e-4, atol=0)


def test_dare_draws_by_seed_and_name():
    m, other = module(), module("model.layers.1.mlp.up_proj.weight")
    dropped = merged(m, kind="dare", seed=3) == m.aligned
    assert torch.equal(merged(m, kind="dare", seed=3) == m.aligned, dropped)
    assert not torch.equal(merged(m, kind="dare", seed=4) == m.aligned, dropped)
    assert not torch.equal(merged(other, kind="dare", seed=3) == other.aligned, dropped)


def test_model_stock_pulls_aligned_and_tuned_towards_the_base():
    m = module()
    expected = stock(m.base.double(), m.aligned.double(), m.tuned.double())
    torch.testing.assert_close(merged(m, kind="model_stock").double(), expected, rtol=1e-5, atol=1e-6)
    with pytest.raises(MethodError, match="merge: needs the base checkpoint; pass base="):
        merged(replace(m, base=None), kind="model_stock")


@pytest.mark.parametrize("kind", ["linear", "ties", "dare", "model_stock"])
def test_equal_checkpoints_stay_as_they_are(kind):
    m = module()
    got = merged(replace(m, tuned=m.aligned), kind=kind, weight=0.3)
    torch.testing.assert_close(got, m.aligned, rtol=0, atol=1e-6 if kind == "model_stock" else 0)


@pytest.mark.parametrize("kind", ["ties", "dare"])
def test_all_of_the_aligned_model_is_the_aligned_model(kind):
    m = module()
    assert torch.equal(merged(m, kind=kind, weight=1.0), m.aligned)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_merged_in_float32(kind):
    half = as_dtype(module(), torch.bfloat16)
    wide = as_dtype(half, torch.float32)
    got = merged(half, kind=kind, weight=0.3)
    assert got.dtype == torch.bfloat16  # rounded once, from what is merged in float32
    assert torch.equal(got, merged(wide, kind=kind, weight=0.3).bfloat16())
    mixed = replace(half, aligned=wide.aligned)
    assert torch.equal(merged(mixed, kind=kind, weight=0.3), merged(wide, kind=kind, weight=0.3))


@pytest.mark.parametrize("kind", KINDS)
def test_only_linear_keeps_an_adapter(kind):
    m = module(rank=4)
    method = make("merge", {"kind": kind})
    assert method.edits_adapter() == (method.edit(m, None).factors is not None) == (kind == "linear")


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"kind": "tie"}, "merge: kind is 'tie': .*'ties'"),
        ({"density": 0.0}, "merge: density is 0.0: .*greater than 0"),
        ({"rescale": "l2"}, "merge: rescale is 'l2'"),
    ],
)
def test_wrong_parameters_are_named(parameters, message):
    with pytest.raises(MethodError, match=message):
        make("merge", parameters)


def tensors(path):
    with Checkpoint.open(path) as checkpoint:
        return {name: checkpoint.read(name).double() for name in checkpoint.names}


@pytest.mark.parametrize("kind", KINDS[1:])
def test_from_checkpoint_to_checkpoint(family, tmp_path, kind):
    options = {"base": family / "base"} if kind == "model_stock" else {}
    report = curvkern.restore(
        family / "aligned", family / "tuned", out=tmp_path / "out", method="merge", kind=kind, weight=0.4, **options
    )
    base, aligned, tuned, got = (tensors(p) for p in (*(family / n for n in ("base", "aligned", "tuned")),
                                                      tmp_path / "out"))  # fmt: skip
    for name in (m.name for m in report.modules):
        a, t = aligned[name], tuned[name]
        kept = got[name] != a
        expected = {
            "slerp": arc(t, a, 0.4),
            "ties": trimmed(t, a, 0.4, 0.5),
            "dare": torch.where(kept, a + 0.6 / 0.5 * (t - a), a),
            "model_stock": stock(base[name], a, t),
        }[kind]
        torch.testing.assert_close(got[name], expected, rtol=1e-5, atol=1e-6)
        assert bool((got[name] != t).any())
        if kind == "dare":
            assert 0.4 < kept.double().mean() < 0.6


def test_model_stock_asks_for_the_base_and_an_adapter_becomes_a_checkpoint(family, tmp_path):
    pair = family / "aligned", family / "adapter"
    with pytest.raises(RestoreError, match="'merge' needs base; pass base="):
        curvkern.restore(*pair, out=tmp_path / "out", method="merge", kind="model_stock")
    with pytest.raises(RestoreError, match="cannot save an adapter: merge edits full weights"):
        curvkern.restore(*pair, out=tmp_path / "out", method="merge", kind="ties", save="adapter")
    report = curvkern.restore(*pair, out=tmp_path / "out", method="merge", kind="ties")
    assert report.saved == "checkpoint"

"""Lists of tensors merge to what their tensors merge to."""

import pytest
import torch

from curvkern import dare_list, linear_list, model_stock, model_stock_list, slerp, slerp_list, ties_list
from curvkern.ops import dare, linear, ties

SHAPES = [(40,), (), (3, 5), (40,), (0,), (3, 5), (120,), (40,)]


@pytest.fixture(autouse=True)
def _120_is_large(monkeypatch):
    monkeypatch.setattr("curvkern.ops.mix_lists.SMALL", 100)


def models(count, dtype=torch.float32, device="cpu", shapes=SHAPES):
    g = torch.Generator().manual_seed(0)
    base = [torch.randn(shape, generator=g) for shape in shapes]
    near = [[t + 0.3 * torch.randn(t.shape, generator=g) for t in base] for _ in range(count - 1)]
    return [[t.to(dtype).to(device) for t in model] for model in (base, *near)]


def check_equal(got, expected):
    assert [t.shape for t in got] == [t.shape for t in expected]
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0 if one.dtype != torch.float32 else 2e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_same_as_tensor_by_tensor(dtype, backend, device):
    base, one, two = models(3, dtype, device)
    how = {"backend": backend}
    weights = [0.5, -0.25, 0.75]
    for normalize in (False, True):
        got = linear_list([base, one, two], weights, normalize=normalize, **how)
        for t, alike in zip(got, zip(base, one, two, strict=True), strict=True):
            assert torch.equal(t, linear(alike, weights, normalize=normalize, **how))
    check_equal(slerp_list(base, one, 0.3, **how), [slerp(a, b, 0.3, **how) for a, b in zip(base, one, strict=True)])
    check_equal(
        model_stock_list(base, [one, two], **how),
        [model_stock(b, [x, y], **how) for b, x, y in zip(base, one, two, strict=True)],
    )
    for got, b, x, y in zip(
        ties_list(base, [one, two], 0.4, [1.0, 0.5], scale=0.7, **how), base, one, two, strict=True
    ):
        assert torch.equal(got, ties(b, [x, y], 0.4, [1.0, 0.5], scale=0.7, **how))
    for rescale in ("inverse", "l1", "none"):
        merged = dare_list(base, one, 0.5, 7, rescale, weight=0.7, **how)
        for i, (got, b, x) in enumerate(zip(merged, base, one, strict=True)):
            assert torch.equal(got, dare(b, x, 0.5, 7 + i, rescale, weight=0.7, **how))


def test_each_tensor_has_its_own_angle():
    a = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])]
    b = [torch.tensor([0.0, 1.0]), torch.tensor([-0.6, 0.8])]
    for got in slerp_list(a, b, 0.5):
        assert got.norm().item() == pytest.approx(1)


def test_dtypes_may_differ_from_tensor_to_tensor():
    base, one = models(2)
    base[0], base[3], one[7] = base[0].half(), base[3].half(), one[7].bfloat16()
    got = linear_list([base, one], [0.5, 0.5])
    assert [t.dtype for t in got] == [t.dtype for t in base]
    for t, alike in zip(ties_list(base, [one], 0.5), zip(base, one, strict=True), strict=True):
        assert torch.equal(t, ties(alike[0], alike[1:], 0.5))
    for t, alike in zip(got, zip(base, one, strict=True), strict=True):
        assert torch.equal(t, linear(alike, [0.5, 0.5]))


def test_nothing_is_edited_and_results_may_be():
    base, one = models(2)
    kept = [t.clone() for t in base]
    got = linear_list([base, one], [0.5, 0.5])
    others = [t.clone() for t in got[1:]]
    got[0].zero_()
    assert all(map(torch.equal, got[1:], others))
    assert all(map(torch.equal, base, kept))
    assert linear_list([[], []], [0.5, 0.5]) == []


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda a, b: linear_list([], []), r"linear_list: the models have \[\] tensors; wanted at least one"),
        (lambda a, b: linear_list([a, b[1:]], [1, 1]), r"have \[8, 7\] tensors"),
        (lambda a, b: linear_list([a, b], [1]), "weights"),
        (lambda a, b: slerp_list(a, b[1:] + b[:1], 0.5), r"slerp_list: .*tensor 0 of model 1"),
        (lambda a, b: slerp_list(a, b, float("nan")), "slerp_list: t is nan"),
        (lambda a, b: model_stock_list(a, [b]), "two or more"),
        (lambda a, b: dare_list(a, b, 1.0, 0), "dare_list: p is 1.0"),
        (lambda a, b: ties_list(a, [b], 0.0), "ties_list: density is 0.0"),
    ],
)
def test_bad_input(call, message):
    a, b = models(2)
    with pytest.raises(ValueError, match=message):
        call(a, b)


def test_what_needs_grad_is_refused():
    a, b = models(2)
    a[2].requires_grad_()
    with pytest.raises(RuntimeError, match="tensor 2 of model 0"):
        linear_list([a, b], [0.5, 0.5])


def test_many_small_tensors_cost_little_each(monkeypatch):
    """One call of the op for all that are alike, not one each."""
    a, b = models(2, shapes=[(64,)] * 200 + [(8, 8)] * 100)
    calls = []
    plain = torch.ops.curvkern.linear.default
    monkeypatch.setattr("curvkern.ops.mix_passes._linear", lambda *args: calls.append(1) or plain(*args))
    linear_list([a, b], [0.5, 0.5])
    assert len(calls) == 2

import pytest
import torch

from curvkern.bench.cases import CASES
from curvkern.ops import Change, change, change_ref


@pytest.fixture(params=["reference", "triton", "cpu"])
def backend(request, device):
    if request.param == "cpu" and device != "cpu":
        pytest.skip("the tensors are on a GPU")
    return request.param


def plain(aligned, tuned, restored):
    """Straight from the words of `Change`, in float64."""
    a, t, r = (x.double().flatten() for x in (aligned, tuned, restored))
    differs = lambda x, y: ~((x == y) | (x.isnan() & y.isnan()))  # noqa: E731
    before, after = ((x - a).nan_to_num(0, 0, 0) for x in (t, r))
    bad = ~r.isfinite()
    return [
        int(differs(r, t).sum()),
        int(bad.sum()),
        int((bad & a.isfinite() & t.isfinite()).sum()),
        int(differs(t, a).sum()),
        float(before.square().sum()),
        float(after.square().sum()),
        float((after - before).square().sum()),
        float((before * after).sum()),
    ]


@pytest.mark.parametrize("case", [c for c in CASES["change"] if c.size == "edge"], ids=str)
def test_every_case_is_as_the_words_say(case, backend, device):
    arguments, _ = case.make(device)
    got, exact = Change.of(change(*arguments, backend=backend)), plain(*arguments)
    assert list(got[:4]) == exact[:4]
    assert list(got[4:]) == pytest.approx(exact[4:], rel=1e-6, abs=1e-30)
    assert torch.equal(change(*arguments, backend=backend), change(*arguments, backend=backend))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_what_is_not_finite_is_counted_and_left_out_of_sums(backend, device, dtype):
    nan, inf = float("nan"), float("inf")
    aligned = torch.tensor([1.0, nan, 1.0, inf, 1.0, 0.0, 2.0], device=device)
    tuned = torch.tensor([2.0, nan, nan, inf, 1.0, -0.0, 3.0], device=device).to(dtype)
    restored = torch.tensor([inf, nan, nan, -inf, nan, 0.0, 2.0], device=device).to(dtype)
    got = Change.of(change(aligned, tuned, restored, backend=backend))
    assert got == Change(4, 5, 2, 3, 2.0, 0.0, 2.0, 0.0)


@pytest.mark.parametrize("at", [1, 255, 256, 999])
@pytest.mark.parametrize(
    "odd",
    [
        (float("nan"), 1.0, 2.0),
        (1.0, float("-inf"), 2.0),
        (1.0, 2.0, float("nan")),
        (-3e38, 3e38, 3e38),
        (-1e-45, 0, 0),
    ],
)
def test_one_odd_weight_among_plain_ones(backend, device, odd, at):
    aligned, tuned, restored = parts = [torch.randn(1000, device=device) for _ in range(3)]
    tuned[::3], restored[::2] = aligned[::3], tuned[::2]
    for part, value in zip(parts, odd, strict=True):
        part[at] = value
    got, rest = Change.of(change(*parts, backend=backend)), torch.arange(1000, device=device) != at
    assert list(got[:4]) == plain(*parts)[:4]
    before, after = ((x - aligned)[at].nan_to_num(0, 0, 0).double() for x in (tuned, restored))
    own = [before**2, after**2, (after - before) ** 2, before * after]
    wanted = [x + float(y) for x, y in zip(plain(*(p[rest] for p in parts))[4:], own, strict=True)]
    assert list(got[4:]) == pytest.approx(wanted, rel=1e-6)


def test_strides_offsets_and_mixed_dtypes(backend, device):
    base = torch.randn(40, 50, device=device)
    aligned, tuned, restored = base.T[3:33, 1:21], base.bfloat16()[5:35, 7:27], base.bfloat16()[2:32, 1:21]
    got = Change.of(change(aligned, tuned, restored, backend=backend))
    exact = plain(aligned, tuned, restored)
    assert list(got[:4]) == exact[:4]
    assert list(got[4:]) == pytest.approx(exact[4:], rel=1e-6)


def test_float64_and_threads():
    parts = [torch.randn(70_000) for _ in range(3)]
    wide = change(*(t.double() for t in parts))
    before, threads = change(*parts), torch.get_num_threads()
    torch.set_num_threads(1)
    assert torch.equal(change(*parts), before)
    torch.set_num_threads(threads)
    torch.testing.assert_close(before, wide, rtol=1e-6, atol=0)
    torch.testing.assert_close(change_ref(*parts), wide, rtol=1e-6, atol=0)


def test_compiled_and_registered(device):
    parts = tuple(torch.randn(300, device=device) for _ in range(3))
    assert torch.equal(torch.compile(change, fullgraph=True, backend="aot_eager")(*parts), change(*parts))
    torch.library.opcheck(torch.ops.curvkern.change.default, (*parts, "auto"))


@pytest.mark.parametrize(
    "changes, error, message",
    [
        ({"tuned": torch.zeros(4, dtype=torch.int32)}, TypeError, "change: tuned has dtype int32; wanted float32"),
        ({"restored": torch.zeros(4).half()}, TypeError, "change: restored has dtype float16 but tuned has float32"),
        ({"aligned": torch.zeros(3)}, ValueError, r"change: tuned has shape \[4\] but aligned has \[3\]"),
        ({"aligned": torch.zeros(4, requires_grad=True)}, RuntimeError, "change: aligned requires grad"),
    ],
)
def test_bad_input(changes, error, message):
    with pytest.raises(error, match=message):
        change(**{name: torch.zeros(4) for name in ("aligned", "tuned", "restored")} | changes)

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import curvkern
from curvkern import axpby_, dare, linear, model_stock, slerp, ties
from curvkern.bench.cases import CASES

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def family(shape, dtype=torch.float32, device="cpu", k=3, seed=0, spread=0.1):
    """A base and k tensors near it."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g)
    near = [base + spread * torch.randn(shape, generator=g) for _ in range(k)]
    return base.to(dtype).to(device), [t.to(dtype).to(device) for t in near]


# Merging as mergekit defines it, derived anew in float64 --------------------------------------------------------------


def plain_slerp(a, b, t, limit=0.9995):
    a, b = a.double(), b.double()
    norms = a.norm() * b.norm()
    cosine = (a * b).sum() / norms if norms > 0 else torch.zeros(())
    if cosine.abs() > limit:
        return (1 - t) * a + t * b
    angle = math.acos(cosine)
    return (math.sin((1 - t) * angle) * a + math.sin(t * angle) * b) / math.sin(angle)


def plain_ties(base, tensors, densities, weights, normalize=True, scale=1.0):
    kept = []
    for tensor, density in zip(tensors, densities, strict=True):
        delta = tensor.double() - base.double()
        count = max(1, int(density * delta.numel()))
        smallest = delta.abs().flatten().sort(descending=True).values[count - 1]
        kept.append(delta * (delta.abs() >= smallest))
    total = sum(w * d for w, d in zip(weights, kept, strict=True))
    sign = torch.where(total >= 0, 1.0, -1.0)
    above = sum(w * d * ((w * d).sign() == sign) for w, d in zip(weights, kept, strict=True))
    below = sum(w * ((w * d).sign() == sign) for w, d in zip(weights, kept, strict=True))
    below = torch.where(below == 0, 1.0, below) if normalize else 1.0
    return base.double() + scale * above / below


def plain_stock(base, tensors):
    deltas = [(t.double() - base.double()).flatten() for t in tensors]
    k = len(deltas)
    pairs = [(i, j) for i in range(k) for j in range(i)]
    cosine = sum(torch.cosine_similarity(deltas[i], deltas[j], dim=0) for i, j in pairs) / len(pairs)
    t = k * cosine / (1 + (k - 1) * cosine)
    return t * sum(x.double() for x in tensors) / k + (1 - t) * base.double()


# Every case, every backend --------------------------------------------------------------------------------------------


def cut_off(got, backend, device):
    """Triton's interpreter cuts off bfloat16 instead of rounding: results of one rounding are within one unit."""
    return backend == "triton" and device == "cpu" and got.dtype == torch.bfloat16


@pytest.mark.parametrize("case", [c for c in CASES["mix"] if c.size == "edge"], ids=str)
def test_every_case_is_as_good_as_the_reference(case, backend, device, no_worse):
    op, args, _ = getattr(curvkern, case.function), *case.make(device)

    def wide(x):
        return [wide(t) for t in x] if isinstance(x, list) else x.double() if isinstance(x, torch.Tensor) else x

    got = op(*case.make(device)[0], backend=backend)
    same = op(*args, backend="reference")
    # The thresholds of ties and the sums of the others choose between float64 and float32 alike.
    exact = op(*map(wide, case.make(device)[0]), backend="reference")
    assert (got.dtype, got.shape) == (case.dtype, same.shape)
    if cut_off(got, backend, device):
        assert ((got.double() - same.double()).abs() <= 2**-7 * same.double().abs()).all()
    elif case.function in ("linear", "axpby_", "ties", "dare"):
        assert torch.equal(got, same)
    else:
        no_worse(got, same, exact)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_reference_is_mergekits_formula(dtype, device):
    base, tensors = family((40, 30), dtype, device)
    other = family((40, 30), dtype, device, seed=1)[0]
    weights, densities = [1.0, 0.5, -0.25], [0.2, 0.5, 1.0]
    pairs = {
        "linear": (linear(tensors, weights), sum(w * t.double() for w, t in zip(weights, tensors, strict=True))),
        "slerp": (slerp(base, other, 0.3), plain_slerp(base, other, 0.3)),
        "lerp": (slerp(base, tensors[0], 0.3, colinear=0.9), 0.7 * base.double() + 0.3 * tensors[0].double()),
        "ties": (ties(base, tensors, densities, weights), plain_ties(base, tensors, densities, weights)),
        "sum": (
            ties(base, tensors, 0.4, normalize=False, scale=0.7),
            plain_ties(base, tensors, [0.4] * 3, [1.0] * 3, normalize=False, scale=0.7),
        ),
        "stock": (model_stock(base, tensors), plain_stock(base, tensors)),
    }
    eps = torch.finfo(dtype).eps
    for name, (got, exact) in pairs.items():
        assert got.dtype == dtype
        # One rounding to dtype, and a few of float32 on sums of numbers of size 4.
        assert ((got.double() - exact).abs() <= eps / 2 * exact.abs() + 2e-6).all(), name


# Properties -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_slerp_is_exact_at_both_ends_and_keeps_the_norm(dtype, backend, device):
    a, b = family((33, 9), dtype, device)[0], family((33, 9), dtype, device, seed=5)[0]
    b = (b * (a.float().norm() / b.float().norm())).to(dtype)
    assert torch.equal(slerp(a, b, 0.0, backend=backend), a)
    assert torch.equal(slerp(a, b, 1.0, backend=backend), b)
    middle = slerp(a, b, 0.5, backend=backend).double().norm()
    assert abs(middle / a.double().norm() - 1) < 2 * torch.finfo(dtype).eps
    assert linear([a, b], [0.5, 0.5]).double().norm() < 0.8 * middle


def test_slerp_falls_back_to_a_line(backend, device):
    a, (b, *_) = family((50,), device=device, spread=1e-3)
    assert torch.equal(slerp(a, b, 0.25, backend=backend), linear([a, b], [0.75, 0.25], backend=backend))
    opposite = slerp(a, -a, 0.25, backend=backend)
    torch.testing.assert_close(opposite, a / 2)
    zero = torch.zeros_like(a)  # at right angles to everything
    torch.testing.assert_close(slerp(a, zero, 0.5, backend=backend), math.sqrt(0.5) * a)


def test_what_is_not_finite_does_not_spread(backend, device):
    a, (b, c, _) = family((40,), device=device)
    b[3], c[5], c[7] = float("nan"), float("inf"), float("nan")
    assert slerp(a, b, 0.3, backend=backend).isfinite().sum() == 39
    assert model_stock(a, [b, c], backend=backend).isfinite().sum() >= 37
    assert torch.equal(linear([a, b], [1.0, 0.0], backend=backend), a)
    merged = ties(a, [b, c], 1.0, backend=backend)
    assert merged.isnan().sum() == 0
    assert merged.isinf().sum() == 1
    assert dare(a, c, 0.0, 3, "l1", backend=backend).isfinite().sum() == 38


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_ties_of_one_whole_tensor_adds_its_weighted_delta(dtype, backend, device, no_worse):
    base, (tuned, *_) = family((21, 13), dtype, device)
    got = ties(base, [tuned], 1.0, [0.5], normalize=False, backend=backend)
    exact = base.double() + 0.5 * (tuned.double() - base.double())
    if cut_off(got, backend, device):
        assert (got - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()
    else:
        no_worse(got, (base.float() + 0.5 * (tuned.float() - base.float())).to(dtype), exact)


def test_ties_keeps_the_largest_and_all_that_equal_the_smallest_of_them(backend, device):
    base = torch.zeros(8, device=device)
    tuned = torch.tensor([3.0, -2, 2, 1, -1, 1, 0.5, 0], device=device)
    got = ties(base, [tuned], 3 / 8, backend=backend)
    assert got.tolist() == [3, -2, 2, 0, 0, 0, 0, 0]
    assert ties(base, [tuned], 0.5, backend=backend).tolist() == [3, -2, 2, 1, -1, 1, 0, 0]


def test_ties_elects_by_weight_and_divides_by_what_agrees(backend, device):
    base = torch.zeros(4, device=device)
    up, down = torch.tensor([1.0, 1, 1, 0], device=device), torch.tensor([-3.0, -1, 2, 0], device=device)
    assert ties(base, [up, down], 1.0, backend=backend).tolist() == [-3, 1, 1.5, 0]
    assert ties(base, [up, down], 1.0, [4, 1], backend=backend).tolist() == [1, 1, 1.2000000476837158, 0]
    assert ties(base, [up, down], 1.0, normalize=False, scale=2, backend=backend).tolist() == [-6, 2, 6, 0]


def test_order_does_not_matter_where_sums_are_exact(backend, device):
    g = torch.Generator().manual_seed(4)
    base, *tensors = (torch.randint(-8, 9, (300,), generator=g).float().to(device) for _ in range(4))
    turned = tensors[::-1]
    assert torch.equal(ties(base, tensors, 0.3, backend=backend), ties(base, turned, 0.3, backend=backend))
    assert torch.equal(linear(tensors, [1, 2, 4], backend=backend), linear(turned, [4, 2, 1], backend=backend))
    shuffled = torch.randperm(300, generator=g).to(device)
    moved = ties(base[shuffled], [t[shuffled] for t in tensors], 0.3, backend=backend)
    assert torch.equal(moved, ties(base, tensors, 0.3, backend=backend)[shuffled])


@pytest.mark.parametrize("rescale", ["inverse", "l1", "none"])
def test_dare_drops_by_the_same_words_everywhere_and_rescales(rescale, backend, device):
    n, p, seed = 5003, 0.75, 11
    base, (tuned, *_) = family((n,), device=device)
    kept = curvkern.philox_ref(seed, n, device) >= int(p * 2**32)
    got = dare(base, tuned, p, seed, rescale, backend=backend)
    assert torch.equal(got[~kept], base[~kept])
    delta = tuned.double() - base.double()
    factor = {"inverse": 4, "none": 1, "l1": delta.abs().sum() / delta[kept].abs().sum()}[rescale]
    torch.testing.assert_close((got.double() - base.double())[kept], factor * delta[kept], rtol=1e-4, atol=1e-6)
    assert abs(kept.double().mean() - 0.25) < 4 * math.sqrt(0.25 * 0.75 / n)


def test_dare_expects_the_delta():
    base, (tuned, *_) = family((64,))
    mean = sum(dare(base, tuned, 0.5, seed).double() for seed in range(2000)) / 2000
    # c m has mean 1 and variance 1 for p = 1/2: five standard errors.
    assert ((mean - tuned).abs() <= 5 / math.sqrt(2000) * (tuned - base).abs() + 1e-6).all()


def test_dare_without_dropping_is_the_tuned_tensor(backend, device):
    base, (tuned, *_) = family((300,), torch.float32, device)
    torch.testing.assert_close(dare(base, tuned, 0.0, 1, backend=backend), tuned)
    assert torch.equal(dare(base, base, 0.9, 1, "l1", backend=backend), base)


def test_philox_is_random123s():
    """The known-answer vector of the Random123 distribution for counter 0, key 0."""
    words = [f"{word:08x}" for word in curvkern.philox_ref(0, 4).tolist()]
    assert words == ["6627e8d5", "e169c58d", "bc57ac4c", "9b00dbd8"]


def test_model_stock_of_two_tensors(backend, device):
    """Right angles: t = 0, the base. A common direction: t = 1, the average. In between 2 cos / (1 + cos)."""
    base = torch.tensor([1.0, 2, 3, 4], device=device)
    e1, e2 = torch.eye(4, device=device)[:2]
    assert torch.equal(model_stock(base, [base + e1, base + 2 * e2], backend=backend), base)
    torch.testing.assert_close(model_stock(base, [base + e1, base + 3 * e1], backend=backend), base + 2 * e1)
    got = model_stock(base, [base + e1, base + e1 + e2], backend=backend)
    t = 2 * math.sqrt(0.5) / (1 + math.sqrt(0.5))
    torch.testing.assert_close(got, base + t * (e1 + e2 / 2))
    assert torch.equal(model_stock(base, [base + e1, base - e1], backend=backend), base)
    assert torch.equal(model_stock(base, [base, base + e1], backend=backend), base)


def test_model_stock_by_rows(backend, device):
    base, tensors = family((5, 70), device=device)
    got = model_stock(base, tensors, rows=True, backend=backend)
    each = [plain_stock(base[r], [t[r] for t in tensors]) for r in range(5)]
    torch.testing.assert_close(got.double(), torch.stack(each), rtol=1e-5, atol=1e-5)


def test_linear_by_rows_and_normalized(backend, device):
    _, tensors = family((5, 70), device=device)
    weights = torch.rand(3, 5, device=device)
    exact = sum(w[:, None].double() * t.double() for w, t in zip(weights, tensors, strict=True))
    torch.testing.assert_close(linear(tensors, weights, backend=backend).double(), exact, rtol=1e-5, atol=1e-6)
    halves = linear(tensors[:2], [2, 2], normalize=True, backend=backend)
    assert torch.equal(halves, linear(tensors[:2], [0.5, 0.5], backend=backend))


def test_axpby_edits_in_place_with_numbers_or_scalars(backend, device):
    y, (x, *_) = family((9, 31), torch.float16, device)
    expected = (2 * x.float() - 0.5 * y.float()).half()
    a = torch.tensor(2.0, device=device, dtype=torch.float64)
    got = y.clone()
    assert axpby_(got, a, x, -0.5, backend=backend) is got
    assert torch.equal(got, expected)
    x[0, 0] = float("nan")
    assert torch.equal(axpby_(y.clone(), 0, x, 1, backend=backend), y)
    assert torch.equal(axpby_(y.clone(), 0.5, y, 0.5, backend=backend), y)


# How it is called -----------------------------------------------------------------------------------------------------


def every(base, tensors, other, backend="auto"):
    return [
        linear(tensors, [0.2, 0.3, 0.5], backend=backend),
        slerp(base, other, 0.3, backend=backend),
        ties(base, tensors, 0.3, backend=backend),
        dare(base, other, 0.5, 3, "l1", backend=backend),
        model_stock(base, tensors, backend=backend),
        axpby_(base.clone(), 0.5, other, 2.0, backend=backend),
    ]


def test_dtypes_may_differ_and_the_first_decides(backend, device):
    base, tensors = family((40,), device=device)
    mixed = [t.to(dtype) for t, dtype in zip(tensors, FLOATS, strict=True)]
    wide = [t.float() for t in mixed]
    for got, expected in zip(
        every(base, mixed, mixed[1], backend), every(base, wide, wide[1], "reference"), strict=True
    ):
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, expected)


@given(
    n=st.integers(0, 3000),
    start=st.integers(0, 9),
    dtype=st.sampled_from(FLOATS),
    k=st.integers(1, 5),
    density=st.floats(0.01, 1),
    p=st.floats(0, 0.99),
)
@settings(max_examples=40, deadline=None)
def test_native_equals_reference_on_any_slice(n, start, dtype, k, density, p):
    base, tensors = family((n + start,), dtype, k=k, seed=n)
    base, tensors = base[start:], [t[start:] for t in tensors]
    native = "triton" if torch.cuda.is_available() else "cpu"
    weights = [0.5 - 0.25 * i for i in range(k)]
    results = [
        (
            linear(tensors, weights, backend=b),
            ties(base, tensors, density, weights, backend=b),
            dare(base, tensors[0], p, n, backend=b),
        )
        for b in (native, "reference")
    ]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_non_contiguous_tensors(backend, device):
    base, tensors = family((20, 30), device=device)
    other = family((20, 30), device=device, seed=9)[0]
    expected = every(base, tensors, other)

    def turned(t):
        return t.T.contiguous().T

    # axpby_ edits a clone, which keeps the strides: kernels write contiguous tensors only.
    got = every(turned(base).contiguous(), [turned(t) for t in tensors], turned(other), backend)
    for left, right in zip(got, expected, strict=True):
        assert left.is_contiguous()
        torch.testing.assert_close(left, right)
    if backend != "reference":
        with pytest.raises(curvkern.BackendError, match="y is not contiguous"):
            axpby_(turned(base), 1.0, other, 1.0, backend=backend)
    y = turned(base)
    torch.testing.assert_close(axpby_(y, 0.5, other, 2.0), expected[5])


def test_compiled_without_a_graph_break(backend, device):
    base, tensors = family((33, 9), device=device)
    other = family((33, 9), device=device, seed=9)[0]
    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    for got, expected in zip(
        compiled(base, tensors, other, backend), every(base, tensors, other, backend), strict=True
    ):
        assert torch.equal(got, expected)


def test_opcheck(device):
    base, tensors = family((5, 9), device=device)
    numbers = torch.rand(3, device=device)
    ops = torch.ops.curvkern
    torch.library.opcheck(ops.linear.default, (tensors, numbers[:, None], "auto"))
    torch.library.opcheck(ops.axpby_.default, (base, tensors[0], numbers[:2], "auto"))
    torch.library.opcheck(ops.delta_dots.default, (base, tensors, 5, "auto"))
    torch.library.opcheck(ops.ties.default, (base, tensors, numbers / 10, numbers, 1.0, True, "auto"))
    torch.library.opcheck(ops.dare.default, (base, tensors[0], numbers[:1], 2**31, 7, "auto"))
    torch.library.opcheck(ops.dare_sums.default, (base, tensors[0], 2**31, 7, "auto"))


def test_same_bits_twice_and_versions_move(backend, device):
    base, tensors = family((50, 70), torch.bfloat16, device)
    other = family((50, 70), torch.bfloat16, device, seed=9)[0]
    runs = [every(base, tensors, other, backend) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
    before = base._version, other._version
    axpby_(base, 1.0, other, 1.0, backend=backend)
    assert base._version > before[0]
    assert other._version == before[1]


def test_more_tensors_than_a_kernel_takes(device):
    tensors = [torch.full((70,), float(k), device=device) for k in range(40)]
    with pytest.raises(curvkern.BackendError, match="at most 8 tensors, here are 40"):
        linear(tensors, [1.0] * 40, backend="triton")
    assert torch.equal(linear(tensors, [1.0] * 40), torch.full((70,), 780.0, device=device))
    assert torch.equal(ties(tensors[0], tensors, 1.0), torch.full((70,), 20.0, device=device))


W = torch.zeros(4, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: linear([], []), ValueError, "linear: no tensors are given"),
        (lambda: linear([W, W], [1.0]), ValueError, "linear: 1 weights for 2 tensors"),
        (lambda: linear([W, W], [1, -1], normalize=True), ValueError, "sum to 0"),
        (lambda: linear([W, W[:2]], [1, 1]), ValueError, r"tensors\[1\] has shape \[2, 4\]"),
        (lambda: linear([W, W.int()], [1, 1]), TypeError, r"tensors\[1\] has dtype int32"),
        (lambda: linear([W, W.to("meta")], [1, 1]), ValueError, r"tensors\[1\] is on meta"),
        (lambda: linear([W, W], torch.ones(2, 3)), ValueError, r"weights has shape \[2, 3\]; wanted \[2, 4\]"),
        (lambda: linear([W], torch.ones(1, 1, 1)), ValueError, r"weights has shape \[1, 1, 1\]"),
        (lambda: linear([W], torch.ones(1).int()), TypeError, "weights has dtype int32"),
        (lambda: linear([W.clone().requires_grad_()], [1]), RuntimeError, r"linear: tensors\[0\] requires grad"),
        (lambda: axpby_(W, 1, W[0], 1), ValueError, r"axpby_: x has shape \[4\] but y has \[4, 4\]"),
        (lambda: axpby_(W, 1, W.to("meta"), 1), ValueError, "axpby_: x is on meta"),
        (lambda: slerp(W, W[0], 0.5), ValueError, r"slerp: b has shape \[4\]"),
        (lambda: slerp(W, W, math.nan), ValueError, "slerp: t is nan; wanted a finite number"),
        (lambda: slerp(W, W, 0.5, backend="fast"), ValueError, "backend is 'fast'"),
        (lambda: ties(W, [], 0.5), ValueError, "density has 0 numbers for 0 tensors"),
        (lambda: ties(W, [W], 0.0), ValueError, "density is 0.0; wanted more than 0, at most 1"),
        (lambda: ties(W, [W], [0.5, 0.5]), ValueError, "density has 2 numbers for 1 tensors"),
        (lambda: ties(W, [W], 0.5, [1, 1]), ValueError, "weights has 2 numbers for 1 tensors"),
        (lambda: ties(W, [W], 0.5, scale=math.inf), ValueError, "scale is inf"),
        (lambda: ties(W, [W[:1]], 0.5), ValueError, r"ties: tensors\[0\] has shape \[1, 4\] but base"),
        (lambda: dare(W, W, 1.0, 0), ValueError, "dare: p is 1.0; wanted at least 0, below 1"),
        (lambda: dare(W, W, 0.5, -1), ValueError, "seed is -1"),
        (lambda: dare(W, W, 0.5, 0, "l2"), ValueError, "rescale is 'l2'.*Did you mean 'l1'"),
        (lambda: dare(W, W.bool(), 0.5, 0), TypeError, "tuned has dtype bool"),
        (lambda: model_stock(W, [W]), ValueError, "1 tensors besides base; wanted two or more"),
        (lambda: model_stock(W, [W, W[0]]), ValueError, r"model_stock: tensors\[1\] has shape \[4\]"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_float64_runs_on_the_reference_only():
    base, tensors = family((6, 6))
    base, tensors = base.double(), [t.double() for t in tensors]
    torch.testing.assert_close(ties(base, tensors, 0.5), plain_ties(base, tensors, [0.5] * 3, [1.0] * 3))
    torch.testing.assert_close(model_stock(base, tensors), plain_stock(base, tensors))
    with pytest.raises(curvkern.BackendError, match="float64 runs on the reference only"):
        linear(tensors, [1, 1, 1], backend="cpu")


@pytest.mark.gpu
def test_side_stream_and_graph_replay():
    base, tensors = family((257, 129), torch.bfloat16, "cuda")
    other = family((257, 129), torch.bfloat16, "cuda", seed=9)[0]
    expected = every(base, tensors, other, "triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = every(base, tensors, other, "triton")
    torch.cuda.synchronize()
    assert all(map(torch.equal, aside, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = every(base, tensors, other, "triton")
    kept = base.clone()
    base.zero_()
    graph.replay()
    assert not torch.equal(captured[5], expected[5])
    base.copy_(kept)
    graph.replay()
    assert all(map(torch.equal, captured, expected))


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    n = 2**31 + 9
    a, b = (torch.full((n,), value, dtype=torch.bfloat16, device="cuda") for value in (1.0, 3.0))
    merged = linear([a, b], [0.5, 0.5], backend="triton")
    assert merged[-9:].tolist() == [2.0] * 9
    words = curvkern.philox_ref(5, 9, "cuda")
    kept = dare(a, b, 0.5, 5, "none", backend="triton")
    assert torch.equal(kept[:9] == 3, words >= 2**31)
    assert 0.49 < (kept[-(2**20) :] == 3).double().mean() < 0.51

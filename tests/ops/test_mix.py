import math

import pytest
import torch

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


@pytest.mark.parametrize("angle", [0.3, 0.05, 0.02])
def test_slerp_nears_a_line_as_the_angle_closes(angle, backend, device):
    """On both sides of the limit for colinear tensors, in bfloat16: the arc's weights differ by angle^2 / 6 at most."""
    a, (b, *_) = family((4000,), torch.bfloat16, device, spread=math.tan(angle))
    line = 0.7 * a.double() + 0.3 * b.double()
    cosine = torch.cosine_similarity(a.double(), b.double(), dim=0)
    bent = math.acos(cosine) ** 2 / 6 * (0.7 * a.double().abs() + 0.3 * b.double().abs())
    ulp = 2**-7 if cut_off(a, backend, device) else 2**-8
    got = slerp(a, b, 0.3, backend=backend).double()
    assert ((got - line).abs() <= (1 + 1e-3) * (ulp * (line.abs() + bent) + bent) + 1e-6).all()


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
    kept = curvkern.philox_ref(seed, n, device=device) >= int(p * 2**32)
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


def test_dare_without_rescaling_expects_a_share_of_the_delta():
    base, (tuned, *_) = family((64,))
    mean = sum(dare(base, tuned, 0.75, seed, "none").double() for seed in range(2000)) / 2000
    # m has mean 1/4 and variance 3/16: five standard errors.
    share = base + 0.25 * (tuned - base)
    assert ((mean - share).abs() <= 5 * math.sqrt(3 / 16 / 2000) * (tuned - base).abs() + 1e-6).all()


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


def test_float64_is_merged_in_float64():
    base, tensors = family((6, 6))
    base, tensors = base.double(), [t.double() for t in tensors]
    torch.testing.assert_close(ties(base, tensors, 0.5), plain_ties(base, tensors, [0.5] * 3, [1.0] * 3))
    torch.testing.assert_close(model_stock(base, tensors), plain_stock(base, tensors))

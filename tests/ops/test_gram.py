import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvkern import ops
from curvkern.bench.cases import CASES
from curvkern.ops import column_sumsq_, gram, gram_, inverse_factor


@pytest.fixture(params=["reference", "triton", "cpu"])
def backend(request, device):
    if request.param == "cpu" and device != "cpu":
        pytest.skip("the tensors are on a GPU")
    return request.param


@pytest.mark.parametrize("case", [c for c in CASES["gram"] if c.size == "edge"], ids=str)
def test_every_case_is_as_exact_as_torch(case, backend, device, no_worse):
    (sums, x), _ = case.make(device)
    rows = x.double()
    exact = rows.T @ rows if case.function == "gram_" else rows.square().sum(0)
    same = x.float().T @ x.float() if case.function == "gram_" else x.float().square().sum(0)
    got = getattr(ops, case.function)(sums, x, backend=backend)
    assert got is sums
    no_worse(got, same, exact)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 9), st.integers(0, 9), st.integers(1, 70), st.data())
@pytest.mark.parametrize("backend", ["reference", "triton", "auto"])
def test_any_shape_mask_and_scale(backend, n, t, i, data):
    x = torch.randn(n, t, i)
    mask = torch.rand(n, t) < data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    scale = data.draw(st.sampled_from([1.0, -0.25]))
    start = torch.randn(i, i)  # not symmetric: what is added is
    kept = x[mask].double()
    x[~mask] = float("nan")
    got = gram_(start.clone(), x, mask=mask, scale=scale, backend=backend)
    torch.testing.assert_close(got.double(), start.double() + scale * kept.T @ kept, rtol=1e-4, atol=1e-4)
    sums = column_sumsq_(torch.ones(i), x, mask=mask, scale=scale, backend=backend)
    torch.testing.assert_close(sums.double(), 1 + scale * kept.square().sum(0), rtol=1e-4, atol=1e-4)


def test_symmetric_bit_for_bit_and_the_same_twice(backend, device):
    x = torch.randn(90, 300, device=device)
    first, second = (gram_(torch.zeros(300, 300, device=device), x, backend=backend) for _ in range(2))
    assert torch.equal(first, second)
    if backend != "reference":
        off = first - first.T
        assert not off.tril(-256).any()


def test_panels_and_chunks_of_the_cpu(monkeypatch):
    monkeypatch.setattr(gram, "_PANEL", 7)
    monkeypatch.setattr(gram, "_ROWS", 5)
    x, mask = torch.randn(23, 20), torch.rand(23) < 0.7
    got = gram_(torch.zeros(20, 20), x, mask=mask, backend="cpu")
    torch.testing.assert_close(got, x[mask].T @ x[mask])


def test_layouts(backend, device):
    x = torch.randn(40, 61, device=device)
    expected = gram_(torch.zeros(20, 20, device=device), x[3:33, 1:21].contiguous(), backend=backend)
    torch.testing.assert_close(gram_(torch.zeros(20, 20, device=device), x[3:33, 1:21], backend=backend), expected)
    transposed = x[3:33, 1:21].contiguous().T.contiguous().T
    torch.testing.assert_close(gram_(torch.zeros(20, 20, device=device), transposed, backend=backend), expected)
    columns = column_sumsq_(torch.zeros(20, device=device), x[3:33, 1:21], backend=backend)
    torch.testing.assert_close(columns, expected.diagonal())


def test_compiled_opcheck_and_versions(backend, device):
    x, mask = torch.randn(2, 5, 12, device=device), torch.rand(2, 5, device=device) < 0.7

    def step(h, x, mask):
        return gram_(h, x, mask=mask, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    h = torch.zeros(12, 12, device=device)
    before = h._version
    assert torch.equal(compiled(h, x, mask), step(torch.zeros(12, 12, device=device), x, mask))
    assert h._version > before
    rows = x.flatten(0, 1)
    torch.library.opcheck(torch.ops.curvkern.gram_.default, (h, rows, mask.flatten(), 0.5, backend))
    torch.library.opcheck(torch.ops.curvkern.column_sumsq_.default, (h[0].clone(), rows, None, 1.0, "auto"))


H, X = torch.zeros(4, 4), torch.zeros(2, 3, 4)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((H[:3], X), {}, ValueError, r"gram_: gram has shape \[3, 4\]; wanted \[4, 4\]"),
        ((H.half(), X), {}, TypeError, "gram_: gram has dtype float16"),
        ((H, X.int()), {}, TypeError, "gram_: x has dtype int32"),
        ((H, X[0, 0]), {}, ValueError, r"gram_: x has shape \[4\]; wanted \[n, t, i\]"),
        ((H, X), {"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, r"mask has shape \[2, 2\]"),
        ((H, X), {"mask": torch.ones(2, 3)}, TypeError, "mask has dtype float32"),
        ((H, X.to("meta")), {}, ValueError, "x is on meta"),
        ((H, X.clone().requires_grad_()), {}, RuntimeError, "x requires grad"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        gram_(*arguments, **options)


# inverse_factor -------------------------------------------------------------------------------------------------------


def hessian(i, tokens=200, dtype=torch.float64):
    x = torch.randn(tokens, i, dtype=dtype)
    return x.T @ x / tokens


def test_factor_of_the_damped_inverse():
    h = hessian(30)
    u, report = inverse_factor(h, damping=0.05)
    damped = h + 0.05 * h.diagonal().mean() * torch.eye(30, dtype=torch.float64)
    torch.testing.assert_close(u.T @ u, torch.linalg.inv(damped))
    assert torch.equal(u, u.triu())
    assert (report.damping, report.tried, report.dead.tolist()) == (0.05, (0.05,), [])
    for j in (0, 7, 29):
        torch.testing.assert_close(u[j, j] ** 2, torch.linalg.inv(damped[j:, j:])[0, 0])


def test_dead_columns_get_one_and_are_reported():
    h = hessian(12)
    h[[3, 8]] = 0
    h[:, [3, 8]] = 0
    before = h.clone()
    u, report = inverse_factor(h)
    assert report.dead.tolist() == [3, 8]
    assert u.isfinite().all()
    assert torch.equal(h, before)


def test_damping_climbs_until_the_factor_exists():
    h = hessian(20, tokens=3, dtype=torch.float32) - 0.02 * torch.eye(20)  # rank 3, then below zero
    h.diagonal().clamp_(min=0.01)
    u, report = inverse_factor(h, damping=1e-4)
    assert len(report.tried) > 1
    assert report.damping == report.tried[-1]
    assert u.isfinite().all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda h: h.half(), TypeError, "gram has dtype float16"),
        (lambda h: h[:3], ValueError, r"gram has shape \[3, 5\]; wanted \[i, i\]"),
        (lambda h: h * float("nan"), ValueError, "holds NaN, infinity"),
        (lambda h: -h, ValueError, "a negative diagonal element"),
        (lambda h: h - 1e9 * (1 - torch.eye(5)), ValueError, "not positive definite even with"),
    ],
)
def test_what_has_no_factor_is_named(change, error, message):
    with pytest.raises(error, match=message):
        inverse_factor(change(hessian(5, dtype=torch.float32)))
    with pytest.raises(ValueError, match="damping is 0; wanted"):
        inverse_factor(hessian(5), damping=0)


@pytest.mark.gpu
def test_on_a_side_stream_and_in_a_graph(device):
    x, h = torch.randn(500, 130, device=device), torch.zeros(130, 130, device=device)
    expected = gram_(h.clone(), x)
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        got = gram_(h.clone(), x)
    side.synchronize()
    assert torch.equal(got, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gram_(h, x)
    h.zero_()
    graph.replay()
    assert torch.equal(h, expected)

"""How merging is called: dtypes, slices, compiled, wrong arguments, streams."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import curvkern
from curvkern import axpby_, dare, linear, model_stock, slerp, ties

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def family(shape, dtype=torch.float32, device="cpu", k=3, seed=0, spread=0.1):
    """A base and k tensors near it."""
    g = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=g)
    near = [base + spread * torch.randn(shape, generator=g) for _ in range(k)]
    return base.to(dtype).to(device), [t.to(dtype).to(device) for t in near]


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
    words = curvkern.philox_ref(5, 9, device="cuda")
    kept = dare(a, b, 0.5, 5, "none", backend="triton")
    assert torch.equal(kept[:9] == 3, words >= 2**31)
    assert 0.49 < (kept[-(2**20) :] == 3).double().mean() < 0.51

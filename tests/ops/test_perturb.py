import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import curvkern
from curvkern import ball_perturb_, normals_ref, perturb_
from curvkern.bench.cases import CASES

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("case", [c for c in CASES["perturb"] if c.size == "edge"], ids=str)
def test_every_case_matches_the_definition(case, backend, device, no_worse):
    (weight, original, alpha), options = case.make(device)
    exact = perturb_(weight.double(), original.double(), alpha, backend="reference", **options)
    same = perturb_(weight.clone(), original, alpha, backend="reference", **options)
    assert perturb_(weight, original, alpha, backend=backend, **options) is weight
    if backend == "triton" and device == "cpu" and case.dtype == torch.bfloat16:
        # The interpreter cuts off bfloat16 instead of rounding; the GPU rounds.
        no_worse(weight, exact.float(), exact)
    else:
        no_worse(weight, same, exact)


@given(
    n=st.integers(1, 3000),
    start=st.integers(0, 5),
    rows=st.integers(1, 7),
    offset=st.one_of(st.integers(0, 9), st.integers(2**34, 2**34 + 9)),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    norm=st.sampled_from(["tensor", "filter"]),
    dtype=st.sampled_from(FLOATS),
)
@settings(max_examples=40, deadline=None)
def test_native_matches_the_definition_on_any_slice(n, start, rows, offset, seed, norm, dtype):
    original = torch.randn(start + n * rows).to(dtype)[start:].reshape(rows, n)
    options = {"seed": seed, "offset": offset, "norm": norm}
    exact = perturb_(torch.empty(rows, n).double(), original.double(), 0.2, backend="reference", **options)
    got = perturb_(torch.empty(start + n * rows, dtype=dtype)[start:].reshape(rows, n), original, 0.2, backend="cpu",
                   **options)  # fmt: skip
    # Half a unit in the last place, and what the step's float32 arithmetic adds to it: |z| < 6.7 within 4e-7.
    step = 0.2 * original.double().norm() / original.numel() ** 0.5 * rows**0.5
    limit = exact.abs() * torch.finfo(dtype).eps / 2 + torch.finfo(dtype).tiny + step * 4e-6
    assert ((got.double() - exact).abs() <= limit).all()


@pytest.mark.parametrize("norm", ["tensor", "filter"])
@pytest.mark.parametrize("offset", [0, 3])
def test_kernels_agree_bit_for_bit(norm, offset, device):
    native, original = "cuda" if device == "cuda" else "cpu", torch.randn(9, 131, device=device)
    if native == "cuda":
        pytest.skip("no CUDA version: Triton's is the only kernel")
    options = {"seed": 3, "offset": offset, "norm": norm}
    got = [perturb_(torch.empty_like(original), original, 0.1, backend=b, **options) for b in (native, "triton")]
    assert torch.equal(*got)


@pytest.mark.gpu
def test_the_gpu_agrees_with_the_cpu_bit_for_bit():
    original = torch.randn(300, 131)
    options = {"seed": 3, "offset": 5}
    cpu = perturb_(torch.empty_like(original), original, 0.1, backend="cpu", **options)
    gpu = perturb_(torch.empty_like(original, device="cuda"), original.cuda(), 0.1, backend="triton", **options)
    assert torch.equal(cpu, gpu.cpu())


@pytest.mark.parametrize("norm", ["tensor", "filter"])
def test_length_and_direction_of_the_step(norm, backend, device):
    original = torch.randn(40, 50, device=device) * torch.arange(40, device=device)[:, None]
    steps = [
        perturb_(torch.empty_like(original), original, alpha, seed=5, norm=norm, backend=backend) - original
        for alpha in (0.5, -0.25)
    ]
    torch.testing.assert_close(steps[0], -2 * steps[1], rtol=1e-4, atol=1e-5)
    dims = 1 if norm == "filter" else None
    torch.testing.assert_close(steps[0].norm(dim=dims), 0.5 * original.norm(dim=dims), rtol=1e-5, atol=1e-5)
    z = normals_ref(5, 2000, device=device).reshape(40, 50).float()
    cosine = torch.nn.functional.cosine_similarity(steps[0][1:], z[1:], dim=1)
    assert (cosine > 1 - 1e-5).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_the_original_comes_back_bit_for_bit(dtype, backend, device):
    original = torch.randn(123, device=device).to(dtype)
    original[:3] = torch.tensor([-0.0, float("inf"), float("nan")])
    weight = original.clone()
    perturb_(weight, original.clone().nan_to_num_(0, 1), 0.7, seed=1, backend=backend)
    assert not torch.equal(weight[3:], original[3:])
    perturb_(weight, original, 0.0, seed=1, backend=backend)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(weight.view(bits), original.view(bits))


def test_in_place_and_zero_tensors(backend, device):
    original = torch.randn(70, device=device)
    expected = perturb_(torch.empty_like(original), original, 0.1, seed=2, backend=backend)
    assert torch.equal(perturb_(original, original, 0.1, seed=2, backend=backend), expected)
    zero = torch.zeros(2, 5, device=device)
    for norm in ("tensor", "filter"):
        assert not perturb_(torch.ones_like(zero), zero, 0.5, seed=2, norm=norm, backend=backend).any()


def test_non_contiguous_tensors(backend, device):
    original = torch.randn(20, 30, device=device)
    expected = perturb_(torch.empty_like(original), original, 0.3, seed=1, backend=backend)
    strided = original.T.contiguous().T
    assert torch.equal(perturb_(torch.empty_like(original), strided, 0.3, seed=1, backend=backend), expected)
    edited = torch.zeros(30, 20, device=device).T
    if backend != "reference":
        with pytest.raises(curvkern.BackendError, match="weight is not contiguous"):
            perturb_(edited, original, 0.3, seed=1, backend=backend)
    torch.testing.assert_close(perturb_(edited, original, 0.3, seed=1), expected)


def test_compiled_without_a_graph_break_and_versions_move(backend, device):
    weight, original = torch.zeros(300, device=device), torch.randn(300, device=device)

    def step(w, x):
        return perturb_(w, x, 0.3, seed=4, backend=backend) * 2

    expected, before = step(weight.clone(), original), weight._version
    assert torch.equal(torch.compile(step, fullgraph=True, backend="aot_eager")(weight, original), expected)
    assert weight._version > before


def test_opcheck(device):
    x = torch.randn(5, 9, device=device)
    torch.library.opcheck(torch.ops.curvkern.perturb_.default, (x, x.clone(), 0.1, 1, 0, True, "auto"))


def test_same_bits_whatever_the_threads(device):
    original, threads = torch.randn(200_003, device=device), torch.get_num_threads()
    runs = []
    for count in (1, 3):
        torch.set_num_threads(count)
        runs.append(perturb_(torch.empty_like(original), original, 0.1, seed=6))
    torch.set_num_threads(threads)
    assert torch.equal(*runs)


W = torch.ones(4, 4)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((W, W.half(), 0.1), {}, TypeError, "original has dtype float16 but weight has float32"),
        ((W.int(), W.int(), 0.1), {}, TypeError, "perturb_: weight has dtype int32; wanted float32"),
        ((W, W[:2], 0.1), {}, ValueError, r"original has shape \[2, 4\] but weight has \[4, 4\]"),
        ((W, W.to("meta"), 0.1), {}, ValueError, "original is on meta but weight is on cpu"),
        ((W, W, 0.1), {"norm": "filters"}, ValueError, "Did you mean 'filter'"),
        ((W.sum(), W.sum(), 0.1), {"norm": "filter"}, ValueError, "it is a scalar"),
        ((W, W, 0.1), {"offset": -4}, ValueError, "offset is -4; wanted an integer from 0"),
        ((W.clone().requires_grad_(), W, 0.1), {}, RuntimeError, "perturb_: weight requires grad"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        perturb_(*arguments, **{"seed": 0, **options})


def test_float64_runs_on_the_reference_only():
    original = torch.randn(50, dtype=torch.float64)
    got = perturb_(torch.empty_like(original), original, 0.1, seed=9)
    z = normals_ref(9, 50)
    torch.testing.assert_close(got, original + 0.1 * original.norm() / z.norm() * z, rtol=1e-14, atol=0)
    with pytest.raises(curvkern.BackendError, match="float64 runs on the reference only"):
        perturb_(got, original, 0.1, seed=9, backend="cpu")


# ball_perturb_ --------------------------------------------------------------------------------------------------------


def adapters(device, dtype=torch.float32):
    params = [torch.randn(shape, device=device).to(dtype) for shape in ((8, 33), (), (0, 4), (57,))]
    return params, [torch.randn(p.shape, device=device) for p in params]


@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_ball_moves_by_rho_and_comes_back_to_the_bit(dtype, device):
    params, direction = adapters(device, dtype)
    old = [p.clone() for p in params]
    undo = ball_perturb_(params, direction, 0.5)
    norm = math.sqrt(sum(d.double().square().sum().item() for d in direction))
    assert undo.norm.item() == pytest.approx(norm, rel=1e-14)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for p, o, d in zip(params, old, direction, strict=True):
        exact = o.double() + 0.5 / norm * d.double()
        assert ((p.double() - exact).abs() <= exact.abs() * torch.finfo(dtype).eps + torch.finfo(wide).eps).all()
    subtracted = [(p.to(wide) - (0.5 / norm * d).to(wide)).to(dtype) for p, d in zip(params, direction, strict=True)]
    assert not all(torch.equal(a, b) for a, b in zip(subtracted, old, strict=True))
    undo.restore_()
    assert all(torch.equal(p, o) for p, o in zip(params, old, strict=True))


def test_ball_uses_saved_memory_again_and_leaves_grad_mode_alone(device):
    params, direction = adapters(device)
    params = [p.requires_grad_() for p in params]
    with torch.no_grad():
        first = ball_perturb_(params, direction, 1.0)
    first.restore_()
    with torch.no_grad():
        second = ball_perturb_(params, direction, torch.tensor(-2.0), eps=1e-7, saved=first.saved)
    assert [s.data_ptr() for s in second.saved] == [s.data_ptr() for s in first.saved]
    moved = params[0].detach() - second.saved[0]
    torch.testing.assert_close(moved, -2.0 / (second.norm + 1e-7).float() * direction[0], rtol=1e-4, atol=1e-6)
    assert all(p.requires_grad for p in params)


def test_ball_without_a_direction_stays(device):
    params, direction = adapters(device)
    old = [p.clone() for p in params]
    ball_perturb_(params, [torch.zeros_like(d) for d in direction], 3.0)
    assert all(torch.equal(p, o) for p, o in zip(params, old, strict=True))
    assert ball_perturb_([], [], 1.0).norm == 0


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        (([W], []), {}, ValueError, "direction has 0 tensors but params has 1"),
        (([W], [W]), {"saved": []}, ValueError, "saved has 0 tensors but params has 1"),
        (([W], [W[:2]]), {}, ValueError, r"direction\[0\] has shape \[2, 4\] but params\[0\] has \[4, 4\]"),
        (([W, W.int()], [W, W]), {}, TypeError, r"params\[1\] has dtype int32"),
        (([W], [W.to("meta")]), {}, ValueError, r"direction\[0\] is on meta"),
        (([W], [W]), {"saved": [W.half()]}, TypeError, r"saved\[0\] has dtype float16 but params\[0\] has float32"),
        (([W.clone().requires_grad_()], [W]), {}, RuntimeError, r"params\[0\] requires grad"),
    ],
)
def test_bad_balls_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ball_perturb_(*arguments, 0.1, **options)


@pytest.mark.gpu
def test_side_stream_and_graph_replay():
    original = torch.randn(257, 129, device="cuda")
    weight = torch.empty_like(original)
    expected = perturb_(torch.empty_like(original), original, 0.1, seed=8, backend="triton")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        perturb_(weight, original, 0.1, seed=8, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(weight, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        perturb_(weight, original, 0.1, seed=8, backend="triton")
    weight.zero_()
    graph.replay()
    assert torch.equal(weight, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    n = 2**31 + 4099
    original = torch.ones(n, dtype=torch.bfloat16, device="cuda")
    weight = perturb_(torch.empty_like(original), original, 1.0, seed=1, backend="triton")
    z = normals_ref(1, 5000, n - 5000, "cuda")
    torch.testing.assert_close(weight[-5000:].double() - 1, z, rtol=1e-2, atol=3e-2)

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import curvkern
from curvkern import axpby_list_, dot_list, lerp_list_, norm_list, surgery_list_
from curvkern.bench.cases import CASES

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(3,), (0,), (257,), (33, 65), (), (2, 3, 5), (16385,)]


def lists(shapes=SHAPES, dtype=torch.float32, device="cpu", seed=0):
    g = torch.Generator().manual_seed(seed)
    return tuple([torch.randn(shape, generator=g).to(dtype).to(device) for shape in shapes] for _ in range(2))


def flat(tensors):
    return torch.cat([t.reshape(-1).double() for t in tensors]) if tensors else torch.zeros(0).double()


def copies(tensors):
    return [t.clone() for t in tensors]


def same(left, right):
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def close_in_bits(got, expected, backend):
    """Bit for bit; Triton's interpreter cuts off bfloat16 instead of rounding: within one unit."""
    if backend == "triton" and not torch.cuda.is_available():
        return all(
            ((a.double() - b.double()).abs() <= 2**-7 * b.double().abs()).all() if a.dtype == torch.bfloat16
            else torch.equal(a, b)
            for a, b in zip(got, expected, strict=True)
        )  # fmt: skip
    return same(got, expected)


@pytest.mark.parametrize("case", [c for c in CASES["vectors"] if c.size == "edge"], ids=str)
def test_every_case_equals_the_reference(case, backend, device):
    op = getattr(curvkern, case.function)
    (got_args, _), (wanted_args, _) = case.make(device), case.make(device)
    got, wanted = op(*got_args, backend=backend), op(*wanted_args, backend="reference")
    if case.function in ("dot_list", "norm_list"):
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6 * math.prod(flat(got_args[0]).shape) ** 0.5)
    elif case.function == "surgery_list_":
        assert got[0] == wanted[0]
        torch.testing.assert_close(got[1], wanted[1], rtol=1e-6, atol=1e-6)
        eps = 2 * torch.finfo(case.dtype).eps
        torch.testing.assert_close(flat(got_args[0]), flat(wanted_args[0]), rtol=eps, atol=1e-6)
    else:
        assert got is got_args[0]
        assert close_in_bits(got, wanted, backend)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_dots_and_norms_against_float64(dtype, backend, device):
    xs, ys = lists(dtype=dtype, device=device)
    dot, norm = dot_list(xs, ys, backend=backend), norm_list(xs, backend=backend)
    # float32 holds products of 16-bit numbers exactly; sums of 64 of them have an error of some 1e-7 of their size.
    scale = flat(xs).norm() * flat(ys).norm()
    assert (dot - flat(xs) @ flat(ys)).abs() < 1e-7 * scale
    assert (norm / flat(xs).norm() - 1).abs() < 1e-7
    assert dot.shape == norm.shape == ()


def test_sums_of_many_small_parts_do_not_lose_them(backend, device):
    """One float32 sum of these would stop at 2^24."""
    xs = [torch.ones(5000, device=device) for _ in range(4)] + [torch.full((1,), 2.0**13, device=device)]
    assert dot_list(xs, xs, backend=backend) == 2**26 + 20000


def test_axpby_mixes_dtypes(backend, device):
    xs, _ = lists(dtype=torch.float16, device=device)
    _, ys = lists(device=device)
    ys[3], ys[6] = ys[3].half(), ys[6].half()
    expected = [(2 * x.float() - 0.25 * y.float()).to(y.dtype) for x, y in zip(xs, ys, strict=True)]
    axpby_list_(ys, torch.tensor(2.0, device=device), xs, -0.25, backend=backend)
    assert same(ys, expected)


def test_a_coefficient_of_zero_leaves_its_side_out(backend, device):
    xs, ys = lists(device=device)
    kept = copies(ys)
    xs[3][0] = float("nan")
    assert same(axpby_list_(ys, 0, xs, 1, backend=backend), kept)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_lerp_is_exact_at_both_ends(dtype, backend, device):
    xs, _ = lists(dtype=dtype, device=device)
    _, shadow = lists(device=device)
    kept = copies(shadow)
    for weight in (0.0, -1.0, float("nan")):
        assert same(lerp_list_(shadow, xs, weight, backend=backend), kept)
    expected = [m + 0.25 * (x.float() - m) for m, x in zip(kept, xs, strict=True)]
    assert same(lerp_list_(shadow, xs, 0.25, backend=backend), expected)
    assert same(lerp_list_(shadow, xs, 1.0, backend=backend), [x.float() for x in xs])


def test_average_has_its_closed_form(backend, device):
    """After T steps: eta^T m_0 + (1 - eta) sum of eta^(T - t) x_t."""
    steps, eta = 12, 0.9
    xs = [lists([(40,), (7,)], device=device, seed=t)[0] for t in range(steps + 1)]
    shadow = copies(xs[0])
    for x in xs[1:]:
        lerp_list_(shadow, x, 1 - eta, backend=backend)
    exact = eta**steps * flat(xs[0]) + (1 - eta) * sum(eta ** (steps - t) * flat(xs[t]) for t in range(1, steps + 1))
    torch.testing.assert_close(flat(shadow), exact, rtol=1e-6, atol=1e-6)


def test_a_bfloat16_shadow_would_not_move():
    """Why the shadow is float32: the increments are below half a unit in the last place of bfloat16."""
    start = torch.randn(4000) * 0.02
    moved = start + torch.randn(4000) * 2e-4
    shadow, short = [start.clone()], start.bfloat16()
    for _ in range(200):
        lerp_list_(shadow, [moved.bfloat16()], 0.005)
        short = (short.float() + 0.005 * (moved.bfloat16().float() - short.float())).bfloat16()
    way = (moved - start).norm()
    assert (shadow[0] - start).norm() > 0.5 * way
    assert (short == start.bfloat16()).double().mean() > 0.95
    with pytest.raises(TypeError, match=r"shadow\[0\] has dtype bfloat16; wanted float32.*does not move"):
        lerp_list_([short], [moved], 0.005)


def test_surgery_of_a_conflict_is_orthogonal(backend, device):
    user, safe = lists(device=device)
    safe = [s - 0.5 * u for u, s in zip(user, safe, strict=True)]
    before = flat(user)
    conflict, cosine = surgery_list_(user, safe, 0.0, backend=backend)
    assert conflict
    assert cosine < -0.3
    torch.testing.assert_close(cosine, torch.cosine_similarity(before, flat(safe), dim=0), rtol=1e-6, atol=0)
    after = flat(user)
    assert (after @ flat(safe)).abs() < 1e-6 * before.norm() * flat(safe).norm()
    assert (after - before).norm() <= before.norm()
    torch.testing.assert_close((before - after).norm(), before.norm() * -cosine, rtol=1e-5, atol=0)


def test_surgery_does_not_see_the_safe_gradients_length(backend, device):
    user, safe = lists(device=device)
    safe = [s - 0.5 * u for u, s in zip(user, safe, strict=True)]
    twice = copies(user)
    surgery_list_(user, safe, 0.0, backend=backend)
    surgery_list_(twice, [4 * s for s in safe], 0.0, backend=backend)
    torch.testing.assert_close(flat(user), flat(twice), rtol=0, atol=1e-6)


def test_surgery_adds_rho_of_the_safe_gradient(backend, device):
    user, safe = lists(device=device)
    safe = [s + 0.5 * u for u, s in zip(user, safe, strict=True)]
    expected = [u + 0.25 * s for u, s in zip(user, safe, strict=True)]
    conflict, cosine = surgery_list_(user, safe, 0.25, backend=backend)
    assert not conflict
    assert cosine > 0.3
    assert same(user, expected)


def test_surgery_without_conflict_or_safe_gradient_changes_nothing(backend, device):
    user, safe = lists(device=device)
    kept = copies(user)
    agreeing = [u.clone() for u in user]
    assert not surgery_list_(user, agreeing, 0.0, backend=backend)[0]
    assert same(user, kept)
    tiny = [-1e-9 * u for u in user]
    assert not surgery_list_(user, tiny, 0.0, backend=backend)[0]
    zeros = [torch.zeros_like(s) for s in safe]
    conflict, cosine = surgery_list_(user, zeros, 1.0, backend=backend)
    assert (bool(conflict), float(cosine)) == (False, 0.0)
    assert same(user, kept)


def every(xs, ys, backend="auto"):
    user, shadow, other = copies(ys), [y.float() for y in copies(ys)], copies(ys)
    axpby_list_(other, 0.75, xs, 0.5, backend=backend)
    lerp_list_(shadow, xs, 0.05, backend=backend)
    scalars = surgery_list_(user, xs, 0.5, backend=backend)
    return [dot_list(xs, ys, backend=backend), norm_list(xs, backend=backend), *scalars, *other, *shadow, *user]


@given(
    sizes=st.lists(st.integers(0, 40000), min_size=1, max_size=6),
    start=st.integers(0, 9),
    dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
)
@settings(max_examples=30, deadline=None)
def test_native_equals_reference_on_any_slices(sizes, start, dtypes):
    backend = "triton" if torch.cuda.is_available() else "cpu"
    xs, ys = lists([(n + start,) for n in sizes], seed=len(sizes))
    xs, ys = [x.to(dtypes[0])[start:] for x in xs], [y.to(dtypes[1])[start:] for y in ys]
    got, wanted = (axpby_list_(copies(ys), 0.75, xs, 0.5, backend=b) for b in (backend, "reference"))
    assert same(got, wanted)
    shadows = (lerp_list_([y.float() for y in copies(ys)], xs, 0.05, backend=b) for b in (backend, "reference"))
    assert same(*shadows)
    torch.testing.assert_close(
        dot_list(xs, ys, backend=backend), flat(xs) @ flat(ys), rtol=1e-6, atol=1e-6 * sum(sizes) ** 0.5
    )


def test_edits_stay_inside_their_slices(backend, device):
    whole = torch.zeros(5000, device=device)
    parts = [whole[1:7], whole[9:2059], whole[3000:4999]]
    axpby_list_(parts, 1.0, [torch.ones_like(p) for p in parts], 0.0, backend=backend)
    outside = torch.ones(5000, dtype=torch.bool, device=device)
    for a, b in ((1, 7), (9, 2059), (3000, 4999)):
        outside[a:b] = False
        assert (whole[a:b] == 1).all()
    assert (whole[outside] == 0).all()


def test_non_contiguous_tensors(backend, device):
    xs, ys = lists([(20, 30), (7, 9)], device=device)
    expected = every(xs, ys)
    turned = [x.T.contiguous().T for x in xs]
    for got, wanted in zip(every(turned, ys, backend), expected, strict=True):
        torch.testing.assert_close(got, wanted)
    edited = [y.T.contiguous().T for y in ys]
    if backend != "reference":
        with pytest.raises(curvkern.BackendError, match="tensor 0 of the edited list is not contiguous"):
            axpby_list_(edited, 1.0, xs, 1.0, backend=backend)
    axpby_list_(edited, 0.75, xs, 0.5)
    assert same(edited, expected[4:6])


def test_empty_lists(backend):
    assert dot_list([], [], backend=backend) == norm_list([], backend=backend) == 0
    assert axpby_list_([], 1.0, [], 1.0, backend=backend) == lerp_list_([], [], 0.5, backend=backend) == []
    conflict, cosine = surgery_list_([], [], backend=backend)
    assert (bool(conflict), float(cosine)) == (False, 0.0)


def test_compiled_without_a_graph_break(backend, device):
    xs, ys = lists([(33, 9), (5,)], device=device)
    compiled = torch.compile(every, fullgraph=True, backend="aot_eager")
    assert same(compiled(xs, ys, backend), every(xs, ys, backend))


def test_compiled_edits_reach_the_callers_tensors(backend, device):
    xs, ys = lists([(33, 9), (5,)], device=device)
    expected, versions = copies(ys), [y._version for y in ys]
    axpby_list_(expected, 0.75, xs, 0.5, backend=backend)
    step = torch.compile(lambda ys, xs: axpby_list_(ys, 0.75, xs, 0.5, backend=backend), fullgraph=True,
                         backend="aot_eager")  # fmt: skip
    step(ys, xs)
    assert same(ys, expected)
    assert all(y._version > before for y, before in zip(ys, versions, strict=True))


def test_eager_calls_move_versions_of_what_they_edit(backend, device):
    xs, ys = lists([(8,), (9,)], device=device)
    axpby_list_(ys, 1.0, xs, 1.0, backend=backend)
    assert all(y._version > 0 for y in ys)
    assert all(x._version == 0 for x in xs)
    before = [y._version for y in ys]
    curvkern.explain(axpby_list_, ys, 1.0, xs, 1.0)
    assert [y._version for y in ys] == before


def test_opcheck(device):
    xs, ys = lists([(5, 9), (3,)], device=device)
    numbers = torch.rand(2, device=device)
    ops = torch.ops.curvkern
    torch.library.opcheck(ops.list_sums.default, (xs, ys, "auto"))
    torch.library.opcheck(ops.axpby_list_.default, (ys, xs, numbers, "auto"))
    torch.library.opcheck(ops.lerp_list_.default, (ys, xs, numbers[:1], "auto"))


def test_same_bits_twice(backend, device):
    xs, ys = lists(dtype=torch.bfloat16, device=device)
    assert same(every(xs, ys, backend), every(xs, ys, backend))


W = torch.zeros(4, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: dot_list([W], []), ValueError, "dot_list: ys has 0 tensors but xs has 1"),
        (
            lambda: dot_list([W, W], [W, W[0]]),
            ValueError,
            r"ys\[1\] has shape \[4\] but xs\[1\] has \[4, 4\]",
        ),
        (lambda: dot_list([W], [W.to("meta")]), ValueError, r"ys\[0\] is on meta"),
        (lambda: norm_list([W, W.int()]), TypeError, r"norm_list: xs\[1\] has dtype int32"),
        (lambda: norm_list([W.clone().requires_grad_()]), RuntimeError, r"norm_list: xs\[0\] requires grad"),
        (lambda: axpby_list_([W], 1, [W[:2]], 1), ValueError, r"axpby_list_: xs\[0\] has shape \[2, 4\]"),
        (lambda: axpby_list_([W, W.to("meta")], 1, [W, W.to("meta")], 1), ValueError, r"ys\[1\] is on meta"),
        (lambda: lerp_list_([W.half()], [W], 0.5), TypeError, r"shadow\[0\] has dtype float16; wanted float32"),
        (lambda: lerp_list_([W], [W, W], 0.5), ValueError, "xs has 2 tensors but shadow has 1"),
        (lambda: surgery_list_([W], [W.bool()]), TypeError, r"surgery_list_: g_safe\[0\] has dtype bool"),
        (lambda: surgery_list_([W], [W], backend="fast"), ValueError, "backend is 'fast'"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_float64_runs_on_the_reference_only():
    xs, ys = (list(map(torch.Tensor.double, part)) for part in lists([(6,), (3, 4)]))
    assert dot_list(xs, ys) == flat(xs) @ flat(ys) or (dot_list(xs, ys) - flat(xs) @ flat(ys)).abs() < 1e-14
    with pytest.raises(curvkern.BackendError, match="float64 runs on the reference only"):
        axpby_list_(ys, 1.0, xs, 1.0, backend="cpu")


@pytest.mark.gpu
def test_side_stream_and_graph_replay():
    xs, ys = lists(dtype=torch.bfloat16, device="cuda")
    kept, expected = copies(ys), copies(ys)
    axpby_list_(expected, 0.75, xs, 0.5, backend="reference")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        axpby_list_(ys, 0.75, xs, 0.5, backend="triton")
        dot = dot_list(xs, ys, backend="triton")
    torch.cuda.synchronize()
    assert same(ys, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        axpby_list_(ys, 0.75, xs, 0.5, backend="triton")
        captured = dot_list(xs, ys, backend="triton")
    for y, before in zip(ys, kept, strict=True):
        y.copy_(before)
    graph.replay()
    assert same(ys, expected)
    assert captured == dot


@pytest.mark.gpu
def test_a_list_that_a_capture_sees_first_is_refused():
    xs, ys = lists([(8,)], device="cuda")
    norm_list(xs, backend="triton")
    with (
        pytest.raises(RuntimeError, match="call it once with the same tensors"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        axpby_list_(ys, 1.0, xs, 1.0, backend="triton")


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    xs = [torch.ones(2**31 + 9, dtype=torch.bfloat16, device="cuda"), torch.ones(5, device="cuda").bfloat16()]
    assert dot_list(xs, xs, backend="triton") == 2**31 + 14
    axpby_list_(xs, 0.0, xs, 3.0, backend="triton")
    assert xs[0][-9:].tolist() == [3.0] * 9

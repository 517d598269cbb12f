import importlib
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import curvkern
from curvkern import ops
from curvkern.bench.cases import CASES
from curvkern.ops import (
    alignment_map,
    alignment_map_ref,
    alignment_penalty,
    alignment_scores,
    alignment_scores_ref,
    delta,
    project_,
    project_ref,
    subspace_basis,
    subspace_basis_ref,
)

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    """Every backend this op has."""
    return request.param


@pytest.fixture
def small_blocks(monkeypatch):
    """Row blocks of a few rows, so that small matrices have many."""
    plain = delta.row_slices
    for module in (delta, importlib.import_module("curvkern.ops.alignment_scores")):
        monkeypatch.setattr(module, "row_slices", lambda matrix, dtype, limit=0: plain(matrix, dtype, 2000))


def weights(o, i, dtype=torch.float32, device="cpu", *, delta=0.1):
    aligned = torch.randn(o, i)
    return aligned.to(dtype).to(device), (aligned + delta * torch.randn(o, i)).to(dtype).to(device)


def factors(o, i, r, device="cpu", dtype=torch.float32):
    return torch.randn(o, r, dtype=dtype, device=device), torch.randn(r, i, dtype=dtype, device=device)


def dense_map(aligned, base):
    """C itself, in float64."""
    v = aligned.double() - base.double()
    return v @ v.T / v.norm()


def projector(u):
    return u.double() @ u.double().T


# the definition -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES["subspace"] if c.size == "edge"], ids=str)
def test_every_case_is_as_exact_as_torch(case, backend, device, no_worse):
    (x, *rest), options = case.make(device)
    if case.function == "project_":
        exact, same = x.double(), x.clone()
        project_ref(exact, *rest, **options)
        project_ref(same, *rest, **options)
        no_worse(project_(x, *rest, backend=backend, **options), same, exact)
        return
    got = getattr(ops, case.function)(x, *rest, backend=backend)
    reference = getattr(ops, f"{case.function}_ref")
    for ours, same, exact in zip(got, reference(x, *rest), reference(x.double(), *rest), strict=True):
        assert (ours.dtype, ours.shape) == (torch.float32, same.shape)
        no_worse(ours, same, exact)


@pytest.mark.parametrize("o, i, r", [(40, 60, 4), (60, 40, 60), (30, 90, 90), (1, 5, 5), (90, 30, 200)])
def test_map_equals_the_dense_map(o, i, r, small_blocks):
    aligned, base = weights(o, i, torch.float64)
    x = torch.randn(o, r, dtype=torch.float64)
    y, norm = alignment_map(x, aligned, base)
    torch.testing.assert_close(y, dense_map(aligned, base) @ x, rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(norm, (aligned - base).norm(), rtol=1e-14, atol=0)


@pytest.mark.parametrize("whole", [False, True])
@pytest.mark.parametrize("o, i", [(40, 60), (60, 40), (20, 100)])
def test_scores_equal_the_dense_route(o, i, whole, small_blocks):
    aligned, base = weights(o, i, torch.float64)
    B, A = factors(o, i, 4, dtype=torch.float64)
    update = B @ A
    image = dense_map(aligned, base) @ update
    got = alignment_scores(update, None, aligned, base) if whole else alignment_scores(B, A, aligned, base)
    cosine = (image * update).sum() / (image.norm() * update.norm())
    expected = (cosine, image.norm() / update.norm(), (image - update).norm())
    torch.testing.assert_close(tuple(got), expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(tuple(alignment_scores_ref(B, A, aligned, base)), expected, rtol=1e-12, atol=0)


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 70), st.integers(1, 70), st.integers(1, 9), st.sampled_from(FLOATS), st.sampled_from(FLOATS))
def test_scores_of_any_shape_equal_their_definition(o, i, r, dtype, factor_dtype):
    aligned, base = weights(o, i, dtype)
    B, A = (f.to(factor_dtype) for f in factors(o, i, r))
    got = alignment_scores(B, A, aligned, base)
    exact = alignment_scores_ref(B.double(), A.double(), aligned, base)
    # Where terms cancel, what is left is as exact as they are: the cosine's are of 1, the distance's of the update.
    update = torch.linalg.matrix_norm(B.double() @ A.double()).item()
    for name, terms in zip(got._fields, (1.0, 0.0, update), strict=True):
        assert getattr(got, name).item() == pytest.approx(getattr(exact, name).item(), rel=1e-5, abs=1e-6 * terms), name


class Largest(TorchDispatchMode):
    """The largest storage that any operation makes, in bytes. Registered ops are opaque to it."""

    def __init__(self, *inputs):
        super().__init__()
        self.known = {t.untyped_storage().data_ptr() for t in inputs}
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().data_ptr() not in self.known:
                self.bytes = max(self.bytes, leaf.untyped_storage().nbytes())
        return made


def test_neither_v_nor_c_nor_the_update_is_ever_formed():
    aligned, base = weights(1100, 1200, torch.bfloat16)
    B, A = (f.requires_grad_() for f in factors(1100, 1200, 3))
    with Largest(aligned, base, B, A) as seen:
        alignment_penalty(B, A, aligned, base).backward()
        with torch.no_grad():
            alignment_scores(B, A, aligned, base)
            alignment_map_ref(B, aligned, base)
            subspace_basis_ref(aligned, base, 4, 8, 2, 0)
    assert 2**19 < seen.bytes <= 2**20  # a block of V; C and V in float32 would take five times that


# what the alignment map is --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("o, i", [(512, 512), (704, 256), (256, 704)])
def test_cosine_of_an_unrelated_update_tells_the_shape_alone(o, i):
    aligned, base = weights(o, i)
    cosine = alignment_scores(*factors(o, i, 8), aligned, base).cosine.item()
    assert cosine == pytest.approx(math.sqrt(i / (i + o)), abs=0.03)


def test_the_map_is_no_projector():
    o = 256
    aligned, base = weights(o, o, torch.float64, delta=2e-3)
    c, norm = alignment_map(torch.eye(o, dtype=torch.float64), aligned, base)
    assert c.trace().item() == pytest.approx(norm.item(), rel=1e-12)  # the mean eigenvalue is |V| / o
    assert (c @ c - c).norm() / c.norm() > 0.98
    assert alignment_scores(*factors(o, o, 4), aligned, base).shrink < 0.01


def test_equal_weights_give_zeros_and_no_nan(backend, device):
    aligned, _ = weights(20, 30, torch.bfloat16, device)
    B, A = factors(20, 30, 3, device)
    y, norm = alignment_map(B, aligned, aligned, backend=backend)
    assert not y.any()
    assert norm == 0
    got = alignment_scores(B, A, aligned, aligned, backend=backend)
    assert (got.cosine, got.shrink) == (0, 0)
    torch.testing.assert_close(got.distance, (B @ A).norm())
    torch.testing.assert_close(alignment_penalty(B, A, aligned, aligned, backend=backend), (B @ A).square().sum())
    assert not subspace_basis(aligned, aligned, 5, backend=backend).any()
    zero = alignment_scores(torch.zeros_like(B), A, *weights(20, 30, device=device), backend=backend)
    assert tuple(zero) == (0, 0, 0)


def test_not_a_number_shows(backend, device):
    aligned, base = weights(20, 30, device=device)
    aligned[3, 4] = float("nan")
    B, A = factors(20, 30, 3, device)
    assert alignment_map(B, aligned, base, backend=backend)[1].isnan()
    assert alignment_scores(B, A, aligned, base, backend=backend).cosine.isnan()
    with pytest.raises(ValueError, match="subspace_basis: aligned or base holds NaN or infinity"):
        subspace_basis(aligned, base, 3, backend=backend)


# how it is called -----------------------------------------------------------------------------------------------------


def test_strides_offsets_and_mixed_dtypes(backend, device):
    aligned, base = weights(30, 44, torch.bfloat16, device)
    x = torch.randn(3, 60, device=device).T[::2]
    plain = alignment_map(x.contiguous(), aligned, base.half(), backend=backend)
    padded = torch.randn(30, 50, device=device).half()
    padded[:, 3:47] = base
    strided = alignment_map(x, aligned.T.contiguous().T, padded[:, 3:47], backend=backend)
    assert torch.equal(strided[0], plain[0])
    exact, _ = alignment_map_ref(x.double(), aligned, base)
    torch.testing.assert_close(plain[0].double(), exact, rtol=1e-5, atol=1e-6)


def test_backends_agree(device):
    aligned, base = weights(150, 90, torch.float16, device)
    x = torch.randn(150, 20, device=device)
    u = {name: subspace_basis(aligned, base, 90, backend=name) for name in ("triton", "reference")}
    y = {name: alignment_map(x, aligned, base, backend=name) for name in ("triton", "reference")}
    torch.testing.assert_close(y["triton"], y["reference"], rtol=1e-5, atol=1e-5)
    assert (projector(u["triton"]) - projector(u["reference"])).abs().max() < 1e-4


def test_same_bits_twice(backend, device):
    aligned, base = weights(140, 70, torch.bfloat16, device)
    B, A = factors(140, 70, 5, device)
    runs = []
    for _ in range(2):
        u = subspace_basis(aligned, base, 3, backend=backend)
        x = project_(aligned.clone(), u, backend=backend)
        runs.append((*alignment_map(B, aligned, base, backend=backend), u, x))
        runs[-1] += tuple(alignment_scores(B, A, aligned, base, backend=backend))
    assert all(torch.equal(first, second) for first, second in zip(*runs, strict=True))


def test_compiled_without_a_graph_break(backend, device):
    aligned, base = weights(33, 20, device=device)
    B, A = factors(33, 20, 4, device)

    def step(B, A, aligned, base):
        u = subspace_basis(aligned, base, 3, backend=backend)
        y, norm = alignment_map(B, aligned, base, backend=backend)
        project_(y, u, complement=True, backend=backend)
        return y, norm, *alignment_scores(B, A, aligned, base, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(B, A, aligned, base), step(B, A, aligned, base))


def test_opcheck(device):
    aligned, base = weights(6, 5, torch.bfloat16, device)
    x = torch.randn(6, 2, device=device)
    torch.library.opcheck(torch.ops.curvkern.alignment_map.default, (x, aligned, base, "auto"))
    torch.library.opcheck(torch.ops.curvkern.project_.default, (x, torch.eye(6, 2, device=device), True, 0.5, "auto"))
    torch.library.opcheck(torch.ops.curvkern.subspace_basis.default, (aligned, base, 2, 1, 1, 0, "auto"))


def test_statistics_keep_full_precision_under_autocast(device):
    aligned, base = weights(40, 30, device=device)
    B, A = factors(40, 30, 3, device)
    u = subspace_basis(aligned, base, 4)
    expected = (*alignment_map(B, aligned, base), *alignment_scores(B, A, aligned, base), project_(B.clone(), u))
    with torch.autocast(device, dtype=torch.bfloat16):
        got = (*alignment_map(B, aligned, base), *alignment_scores(B, A, aligned, base), project_(B.clone(), u))
        assert torch.equal(subspace_basis(aligned, base, 4), u)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))


def test_wide_updates_take_the_library(device):
    aligned, base = weights(8, 9, torch.bfloat16, device)
    with pytest.raises(curvkern.BackendError, match="more than 256 columns"):
        alignment_map(torch.randn(8, 300, device=device), aligned, base, backend="triton")
    with pytest.raises(curvkern.BackendError, match="float64 runs on the reference only"):
        subspace_basis(aligned.double(), base.double(), 2, backend="triton")
    with pytest.raises(curvkern.BackendError, match="alignment_map has no such version; it has triton, reference"):
        alignment_map(torch.randn(8, 3, device=device), aligned, base, backend="cpu")


W, X = torch.ones(4, 6), torch.ones(4, 2)
A26 = torch.ones(2, 6)
GRAD = torch.ones(4, 6, requires_grad=True)


@pytest.mark.parametrize(
    "function, arguments, options, error, message",
    [
        (alignment_map, (X.int(), W, W), {}, TypeError, "alignment_map: x has dtype int32; wanted float32"),
        (alignment_map, (X, W.int(), W), {}, TypeError, "aligned has dtype int32"),
        (alignment_map, (X[0], W, W), {}, ValueError, r"x has shape \[2\]; wanted a matrix"),
        (alignment_map, (X[:3], W, W), {}, ValueError, r"x has shape \[3, 2\]; wanted \[4, 2\] \(a row for each row"),
        (alignment_map, (X, W, W[:, :5]), {}, ValueError, r"base has shape \[4, 5\] but aligned has \[4, 6\]"),
        (alignment_map, (X, W, W.to("meta")), {}, ValueError, "base is on meta but x is on cpu"),
        (alignment_map, (X, GRAD, W), {}, RuntimeError, "aligned requires grad, but alignment_map has no derivative"),
        (alignment_map, (X, W, W), {"backend": "trition"}, ValueError, "Did you mean 'triton'"),
        (alignment_scores, (X, A26[:, :5], W, W), {}, ValueError, r"alignment_scores: A has shape \[2, 5\]; wanted"),
        (alignment_scores, (X, A26[:1], W, W), {}, ValueError, r"B has shape \[4, 2\]; wanted \[4, 1\]"),
        (alignment_scores, (X, None, W, W), {}, ValueError, r"wanted \[4, 6\] \(the whole update, as A is None\)"),
        (alignment_scores, (GRAD, None, W, W), {}, RuntimeError, "alignment_scores: B requires grad"),
        (alignment_penalty, (X, A26, W), {}, ValueError, "alignment_penalty: base is missing"),
        (alignment_penalty, (X, A26, W, W), {"basis": X}, ValueError, "basis is given beside aligned or base"),
        (alignment_penalty, (X, A26), {"basis": X[:3]}, ValueError, r"B has shape \[4, 2\]; wanted \[3, 2\]"),
        (alignment_penalty, (X, A26, W, W.to("meta")), {}, ValueError, "base is on meta but B is on cpu"),
        (alignment_penalty, (X, A26, GRAD, W), {}, RuntimeError, "aligned requires grad"),
        (alignment_penalty, (X, A26.long(), W, W), {}, TypeError, "A has dtype int64"),
        (subspace_basis, (W, W, 5), {}, ValueError, r"rank is 5; wanted at most min\(o, i\) = 4. Lower it"),
        (subspace_basis, (W, W, 0), {}, ValueError, "rank is 0; wanted at least 1"),
        (subspace_basis, (W, W, 2), {"oversample": -1}, ValueError, "oversample is -1"),
        (subspace_basis, (W, W, 2), {"power": -1}, ValueError, "power is -1"),
        (subspace_basis, (W[0], W[0], 1), {}, ValueError, r"aligned has shape \[6\]; wanted a matrix"),
        (subspace_basis, (W, GRAD, 1), {}, RuntimeError, "base requires grad"),
        (project_, (W, X[:3]), {}, ValueError, r"project_: basis has shape \[3, 2\]; wanted \[4, 2\]"),
        (project_, (W[0], X), {}, ValueError, r"x has shape \[6\]; wanted a matrix"),
        (project_, (W, X.to("meta")), {}, ValueError, "basis is on meta but x is on cpu"),
        (project_, (GRAD, X), {}, RuntimeError, "x requires grad"),
        (project_, (W.to(torch.float8_e5m2), X), {}, TypeError, "x has dtype float8_e5m2"),
    ],
)
def test_bad_arguments_are_named(function, arguments, options, error, message):
    with pytest.raises(error, match=message):
        function(*arguments, **options)


def test_explain_names_the_way_taken():
    chosen = {c.backend for c in curvkern.explain(alignment_penalty, X, A26, W, W) if c.chosen}
    assert chosen == {"reference"}


# on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_side_stream_and_graph_replay(backend):
    aligned, base = weights(257, 129, torch.bfloat16, "cuda")
    x = torch.randn(257, 16, device="cuda")
    u = torch.linalg.qr(torch.randn(257, 8)).Q.to("cuda")

    def step():
        y, norm = alignment_map(x, aligned, base, backend=backend)
        return project_(y, u, backend=backend), norm

    expected = step()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        aside = step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    graph.replay()
    for got in (aside, replayed):
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_more_than_two_to_the_31_weights(backend):
    o, i = 2**16 + 1, 2**15 + 3
    base = torch.zeros(o, i, dtype=torch.bfloat16, device="cuda")
    aligned = base.clone()
    aligned[-1] = 1.0  # V has one row of ones: C is zero but for sqrt(i) in the last corner
    x = torch.randn(o, 3, device="cuda")
    y, norm = alignment_map(x, aligned, base, backend=backend)
    torch.testing.assert_close(norm, torch.tensor(math.sqrt(i), device="cuda"))
    torch.testing.assert_close(y[-1], x[-1] * math.sqrt(i))
    assert not y[:-1].any()
    last = torch.zeros(o, 1, device="cuda")
    last[-1] = 1.0
    assert not project_(aligned, last, complement=True, backend=backend).any()

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import curvkern
from curvkern import gnb_diag_, hutchinson_, rademacher_, signs_ref
from curvkern.bench.cases import CASES

FLOATS = [torch.float32, torch.float16, torch.bfloat16]
EDGES = [c for c in CASES["hessian"] if c.size == "edge"]
PROBES = [c for c in EDGES if c.function != "gnb_diag_"]


def function(case):
    return getattr(curvkern, case.function)


@pytest.mark.parametrize("case", [c for c in PROBES if "block" not in c.make("cpu")[1]], ids=str)
def test_every_case_equals_the_reference_bit_for_bit(case, backend, device):
    (edited, *read), options = case.make(device)
    expected = edited.clone()
    function(case)(expected, *read, backend="reference", **options)
    assert function(case)(edited, *read, backend=backend, **options) is edited
    assert torch.equal(edited, expected)


@pytest.mark.parametrize("case", [c for c in PROBES if "block" in c.make("cpu")[1]], ids=str)
def test_tile_means_match_the_definition(case, backend, device, no_worse):
    (diag, hvp), options = case.make(device)
    exact, same = diag.double(), diag.clone()
    hutchinson_(exact, hvp.double(), backend="reference", **options)
    hutchinson_(same, hvp, backend="reference", **options)
    no_worse(hutchinson_(diag, hvp, backend=backend, **options), same, exact)


@pytest.mark.parametrize("case", [c for c in EDGES if c.function == "gnb_diag_"], ids=str)
def test_gauss_newton_bartlett_is_batch_times_the_square(case, backend, device, no_worse):
    (diag, grad, batch), _ = case.make(device)
    exact = diag.double() + batch * grad.double().square()
    same = diag + batch * grad.float().square()
    assert torch.equal(gnb_diag_(diag, grad, batch, backend=backend), same)
    no_worse(diag, same, exact)


def test_published_philox_vector(backend, device):
    signs = rademacher_(torch.empty(128, device=device), seed=0, backend=backend)
    bits = (signs.cpu().reshape(4, 32) < 0).long() << torch.arange(32)
    assert bits.sum(1).tolist() == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]


@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 400)),
    tile=st.tuples(st.integers(1, 50), st.integers(1, 500)),
    offset=st.one_of(st.integers(0, 300), st.integers(2**33, 2**33 + 300)),
    start=st.integers(0, 5),
    seed=st.integers(-(1 << 63), (1 << 63) - 1),
    dtype=st.sampled_from(FLOATS),
)
@settings(max_examples=60, deadline=None)
def test_native_equals_the_reference_on_any_slice(shape, tile, offset, start, seed, dtype):
    n = shape[0] * shape[1]
    hvp = torch.randn(start + n).to(dtype)[start:].reshape(shape)
    stream = {"seed": seed, "offset": offset}
    plain = [hutchinson_(torch.ones(shape), hvp, scale=0.3, backend=b, **stream) for b in ("cpu", "reference")]
    assert torch.equal(*plain)
    buffers = [torch.empty(start + n, dtype=dtype)[start:] for _ in range(2)]
    assert torch.equal(
        *(rademacher_(x, backend=b, **stream) for x, b in zip(buffers, ("cpu", "reference"), strict=True))
    )
    sums = torch.zeros(-(-shape[0] // tile[0]), -(-shape[1] // tile[1]))
    tiled = hutchinson_(sums, hvp, block=tile, backend="cpu", **stream)
    exact = hutchinson_(sums.double().zero_(), hvp.double(), block=tile, backend="reference", **stream)
    torch.testing.assert_close(tiled, exact.float(), rtol=2e-7, atol=2e-7)


@pytest.mark.parametrize("offset", [0, 5, 127, 128, 2**32 - 3, 2**40 + 77])
def test_a_tensor_in_parts_is_the_tensor_at_once(offset, backend, device):
    whole = rademacher_(torch.empty(300, device=device), seed=9, offset=offset, backend=backend)
    for start, stop in ((0, 1), (1, 130), (130, 300)):
        part = torch.empty(stop - start, device=device)
        rademacher_(part, seed=9, offset=offset + start, backend=backend)
        assert torch.equal(part, whole[start:stop])


@pytest.mark.parametrize("offset", [3, 2**36 + 5])
def test_tile_means_with_an_offset(offset, backend, device, no_worse):
    hvp = torch.randn(9, 140, device=device)
    options = {"seed": 2, "offset": offset, "block": (4, 50)}
    exact = hutchinson_(torch.zeros(3, 3, device=device).double(), hvp.double(), backend="reference", **options)
    got = hutchinson_(torch.zeros(3, 3, device=device), hvp, backend=backend, **options)
    no_worse(got, exact.float(), exact)


def test_the_diagonal_of_a_quadratic():
    """Exact for a diagonal Hessian from one probe; unbiased for any, tile by tile."""
    hessian = torch.randn(24, 24)
    hessian = hessian @ hessian.T
    probes = 4000
    diag, mean = torch.zeros(24), torch.zeros(1, 2)
    one = torch.zeros(24)
    for seed in range(probes):
        v = rademacher_(torch.empty(24), seed=seed)
        hutchinson_(diag, hessian @ v, seed=seed, scale=1 / probes)
        hutchinson_(mean, (hessian @ v)[None], seed=seed, scale=1 / probes, block=(1, 12))
    hutchinson_(one, hessian.diag() * rademacher_(torch.empty(24), seed=5), seed=5)
    assert torch.equal(one, hessian.diag())
    spread = (hessian.square().sum(1) - hessian.diag().square()).div(probes).sqrt()
    assert ((diag - hessian.diag()).abs() <= 6 * spread).all()
    torch.testing.assert_close(mean[0], diag.reshape(2, 12).mean(1))


def test_gauss_newton_bartlett_of_sampled_labels():
    """Softmax regression: the mean over draws is the diagonal of the Gauss-Newton matrix of the mean loss."""
    batch, classes, draws = 8, 3, 20000
    logits = torch.randn(batch, classes)
    p = logits.softmax(1)
    labels = torch.distributions.Categorical(p).sample((draws,))
    grads = (p - torch.nn.functional.one_hot(labels, classes)).mean(1)  # of a bias shared by the batch
    diag = torch.zeros(classes)
    for grad in grads[:200]:
        gnb_diag_(diag, grad, batch)
    torch.testing.assert_close(diag, batch * grads[:200].square().sum(0))
    estimates = batch * grads.square()
    wanted = (p * (1 - p)).mean(0)
    assert ((estimates.mean(0) - wanted).abs() <= 6 * estimates.std(0) / draws**0.5).all()


def test_non_contiguous_tensors(backend, device):
    hvp = torch.randn(20, 30, device=device)
    expected = hutchinson_(torch.zeros(20, 30, device=device), hvp, seed=1)
    got = hutchinson_(torch.zeros(20, 30, device=device), hvp.T.contiguous().T, seed=1, backend=backend)
    assert torch.equal(got, expected)
    edited = torch.zeros(30, 20, device=device).T
    if backend != "reference":
        with pytest.raises(curvkern.BackendError, match="not contiguous"):
            hutchinson_(edited, hvp, seed=1, backend=backend)
    assert torch.equal(hutchinson_(edited, hvp, seed=1), expected)


def test_compiled_without_a_graph_break_and_versions_move(backend, device):
    hvp = torch.randn(7, 19, device=device)

    def step(v, diag, tiles):
        rademacher_(v, seed=3, backend=backend)
        hutchinson_(diag, hvp, seed=3, backend=backend)
        hutchinson_(tiles, hvp, seed=3, block=(4, 10), backend=backend)
        return gnb_diag_(diag, hvp, 4, backend=backend)

    eager = [torch.zeros(7, 19, device=device), torch.zeros(7, 19, device=device), torch.zeros(2, 2, device=device)]
    compiled = [t.clone() for t in eager]
    step(*eager)
    versions = [t._version for t in compiled]
    torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))
    assert all(t._version > before for t, before in zip(compiled, versions, strict=True))


def test_opcheck(device):
    x, tiles = torch.randn(5, 9, device=device), torch.zeros(3, 1, device=device)
    torch.library.opcheck(torch.ops.curvkern.rademacher_.default, (x, 1, 0, "auto"))
    torch.library.opcheck(torch.ops.curvkern.hutchinson_.default, (x, x.clone(), 1, 0, 0.5, 0, 0, "auto"))
    torch.library.opcheck(torch.ops.curvkern.hutchinson_.default, (tiles, x, 1, 0, 0.5, 2, 9, "auto"))
    torch.library.opcheck(torch.ops.curvkern.gnb_diag_.default, (x, x.clone(), 3, "auto"))


def test_same_bits_twice_and_whatever_the_threads(backend, device):
    hvp = torch.randn(70, 333, device=device)
    runs, threads = [], torch.get_num_threads()
    for count in (1, 3):
        torch.set_num_threads(count)
        options = {"seed": 4, "backend": backend}
        tiles = hutchinson_(torch.zeros(8, 4, device=device), hvp, block=(9, 100), **options)
        runs.append((tiles, rademacher_(torch.empty(200_001 if backend == "cpu" else 5000, device=device), **options)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


X = torch.zeros(4, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: rademacher_(X.int(), seed=0), TypeError, "rademacher_: out has dtype int32; wanted float32"),
        (lambda: rademacher_(X, seed=0, offset=-1), ValueError, "offset is -1; wanted an integer from 0"),
        (lambda: rademacher_(X.clone().requires_grad_(), seed=0), RuntimeError, "out requires grad"),
        (lambda: rademacher_(X, seed=0, backend="cuda13"), ValueError, "Did you mean 'cuda'"),
        (lambda: hutchinson_(X, X, seed=1 << 64), ValueError, "hutchinson_: seed is 18446744073709551616"),
        (lambda: hutchinson_(X.half(), X, seed=0), TypeError, "diag has dtype float16; wanted float32, float64"),
        (lambda: hutchinson_(X, X.int(), seed=0), TypeError, "hvp has dtype int32"),
        (lambda: hutchinson_(X, X[:2], seed=0), ValueError, r"diag has shape \[4, 4\] but hvp has \[2, 4\]"),
        (lambda: hutchinson_(X, X, seed=0, block=(2, 2)), ValueError, r"wanted \[2, 2\] \(one number per tile\)"),
        (lambda: hutchinson_(X, X, seed=0, block=(0, 2)), ValueError, "block is 0; wanted at least 1"),
        (lambda: hutchinson_(X[0], X[0], seed=0, block=(1, 2)), ValueError, r"hvp must be \[o, i\]"),
        (lambda: hutchinson_(X, X.to("meta"), seed=0), ValueError, "hvp is on meta but diag is on cpu"),
        (lambda: gnb_diag_(X, X, 0), ValueError, "gnb_diag_: batch is 0; wanted at least 1"),
        (lambda: gnb_diag_(X, X[:1], 2), ValueError, r"diag has shape \[4, 4\] but grad has \[1, 4\]"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_float64_runs_on_the_reference_only():
    got = rademacher_(torch.empty(40, dtype=torch.float64), seed=6)
    assert torch.equal(got, signs_ref(6, 40))
    with pytest.raises(curvkern.BackendError, match="float64 runs on the reference only"):
        rademacher_(got, seed=6, backend="cpu")


@pytest.mark.gpu
def test_side_stream_and_graph_replay():
    hvp = torch.randn(257, 129, device="cuda")
    expected = hutchinson_(torch.zeros_like(hvp), hvp, seed=8, backend="reference")
    diag = torch.zeros_like(hvp)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        hutchinson_(diag, hvp, seed=8, backend="triton")
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(diag, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        hutchinson_(diag, hvp, seed=8, backend="triton")
    diag.zero_()
    graph.replay()
    assert torch.equal(diag, expected)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_elements():
    n = 2**31 + 4099
    out = rademacher_(torch.empty(n, dtype=torch.bfloat16, device="cuda"), seed=1, backend="triton")
    assert torch.equal(out[-9000:].double(), signs_ref(1, 9000, n - 9000, "cuda"))

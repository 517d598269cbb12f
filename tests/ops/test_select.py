import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import curvkern
from curvkern import block_select, gate_ref, pack_mask, score_histogram_, score_ref
from curvkern.bench.cases import CASES
from curvkern.ops import block_select_ref, score_histogram_ref, score_key_ref, score_of_key

RULES = ["grad", "taylor", "fisher", "delta", "gain"]
GATES = ["none", "descent", "conflict"]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
NATIVE = "cuda" if torch.cuda.is_available() else "cpu"
TILED = ["reference"] if torch.cuda.is_available() else ["reference", "cpu"]


def inputs(shape, dtype=torch.float32, device="cpu", seed=0):
    """Weights, a target, and evidence with ties, zeros and both signs."""
    g = torch.Generator().manual_seed(seed)

    def normal():
        return (torch.randn(shape, generator=g) * 4).round() / 4

    weight, target, direction = (normal().to(dtype).to(device) for _ in range(3))
    evidence = {"grad": normal().to(device), "fisher": normal().abs().to(device), "direction": direction}
    return weight, target, evidence


def counts(device="cpu"):
    return [torch.zeros(size, dtype=torch.int64, device=device) for size in (1 << 16, 2)]


# one pass -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [c for c in CASES["select"] if c.size == "edge"], ids=str)
def test_every_case_equals_the_reference(case, backend, device):
    arguments, options = case.make(device)
    grad = options["grad"]
    if case.function == "score_histogram_":
        score_histogram_(*arguments, **options, backend=backend)
        expected = counts(device)
        score_histogram_ref(*expected, *arguments[2:], None, None, None, grad, None, None, "grad", "descent")
        assert all(torch.equal(a, b) for a, b in zip(arguments, expected, strict=False))
    elif backend in TILED:
        shape = (max(1, arguments[0].shape[0]), 128)
        expected = block_select_ref(
            *arguments, grad, None, None, "grad", "descent", "fraction", 0.1, False, *shape, "exact_k"
        )
        assert torch.equal(block_select(*arguments, **options, backend=backend), expected)


@given(
    n=st.integers(0, 3000),
    start=st.integers(0, 9),
    dtype=st.sampled_from(FLOATS),
    grad_dtype=st.sampled_from(FLOATS),
    rule=st.sampled_from(RULES),
    gate=st.sampled_from(GATES),
    mask=st.sampled_from(["none", "bool", "packed"]),
    fine=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_native_equals_reference_on_any_slice(n, start, dtype, grad_dtype, rule, gate, mask, fine):
    weight, target, evidence = inputs((n + start,), dtype, NATIVE, seed=n)
    evidence["grad"] = (evidence["grad"] * torch.rand(n + start, device=NATIVE)).to(grad_dtype)
    evidence["grad"][::7] = math.nan
    mask = {"none": None, "bool": (g := torch.rand(n, device=NATIVE)) < 0.5, "packed": pack_mask(g < 0.5)}[mask]
    coarse = counts(NATIVE)
    options = {name: tensor[start:] for name, tensor in evidence.items()} | {"rule": rule, "gate": gate, "mask": mask}
    score_histogram_(*coarse, weight[start:], target[start:], **options, backend="reference")
    boundary = coarse[0].argmax() if fine else None
    results = []
    for name in (NATIVE, "reference"):
        results.append(counts(NATIVE))
        score_histogram_(*results[-1], weight[start:], target[start:], **options, boundary=boundary, backend=name)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_threads_share_the_work_and_agree():
    weight, target, evidence = inputs((500, 700))
    threads, results = torch.get_num_threads(), []
    try:
        for number in (1, 2, 5):
            torch.set_num_threads(number)
            histogram, tallies = counts()
            score_histogram_(histogram, tallies, weight, target, rule="gain", gate="conflict", **evidence)
            tiles = block_select(weight, target, rule="gain", fraction=0.3, ties="exact_k", **evidence)
            results.append((histogram, tallies, tiles))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_counts_have_64_bits(backend, device):
    weight, target, evidence = inputs((33, 9), device=device)
    histogram, tallies = (t + 2**40 for t in counts(device))
    score_histogram_(histogram, tallies, weight, target, rule="gain", backend=backend, **evidence)
    expected = counts(device)
    score_histogram_(*expected, weight, target, rule="gain", backend="reference", **evidence)
    assert torch.equal(histogram - 2**40, expected[0])
    assert torch.equal(tallies - 2**40, expected[1])


@given(st.lists(st.floats(width=32, allow_nan=False), min_size=2, max_size=2))
def test_keys_are_ordered_like_scores(pair):
    score = torch.tensor(pair)
    a, b = score_key_ref(score).tolist()
    assert ((a < b), (a == b)) == ((score[0] < score[1]), (score[0] == score[1]))
    assert 0 <= a < 2**32
    assert torch.equal(score_of_key(score_key_ref(score)), score)


def test_non_contiguous_tensors(backend, device):
    weight, target, evidence = inputs((20, 30), device=device)
    expected, got = counts(device), counts(device)
    score_histogram_(*expected, weight, target, rule="gain", gate="conflict", backend="reference", **evidence)
    strided = {name: tensor.T.contiguous().T for name, tensor in evidence.items()}
    score_histogram_(
        *got, weight.T.contiguous().T, target.T.contiguous().T, rule="gain", gate="conflict", backend=backend, **strided
    )
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    if backend != "reference":
        with pytest.raises(curvkern.BackendError, match="histogram or tallies are not contiguous"):
            score_histogram_(
                torch.zeros(1 << 17, dtype=torch.int64, device=device)[::2], got[1], weight, target, rule="delta",
                backend=backend,
            )  # fmt: skip


# block_select ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("block", [(None, 128), (None, None), (1, None), (None, 1), (16, 16), (5, 300)])
@pytest.mark.parametrize("how", [{"fraction": 0.25}, {"fraction": 0.9, "of": "all"}, {"k": 7}, {"k": 0}, {"k": 10**9}])
@pytest.mark.parametrize("ties", ["strict", "exact_k"])
def test_tiles_hold_their_top_k(block, how, ties, backend, device):
    weight, target, evidence = inputs((37, 203), torch.float16, device)
    evidence["fisher"][3] = math.nan
    options = {"rule": "gain", "gate": "conflict", **evidence}
    got = block_select(weight, target, block=block, ties=ties, backend=backend, **how, **options)
    score = score_ref(weight, target, evidence["grad"], evidence["fisher"], rule="gain")
    open_ = gate_ref(weight, target, direction=evidence["direction"], gate="conflict") & ~score.isnan()
    rows, cols = (block[0] or 37, block[1] or 203)
    for r in range(0, 37, rows):
        for c in range(0, 203, cols):
            tile = (slice(r, r + rows), slice(c, c + cols))
            flat, candidates = score[tile].flatten(), open_[tile].flatten()
            n = flat.numel() if how.get("of") == "all" else int(candidates.sum())
            k = min(how.get("k", math.ceil(how.get("fraction", 0) * n)), int(candidates.sum()))
            ranked = flat.masked_fill(~candidates, -math.inf).sort(descending=True, stable=True)
            chosen = torch.zeros_like(candidates)
            if ties == "exact_k":
                chosen[ranked.indices[:k]] = True
            elif k:
                chosen = candidates & (flat > ranked.values[k - 1])
            assert torch.equal(got[tile].flatten(), chosen)


@pytest.mark.parametrize("backend", TILED)
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.7, 0.96, 1.0])
def test_mask_of_identify_remove_recalibrate(sparsity, backend, device):
    """Of the conflicting weights of 128 columns, the floor(sparsity * n) with the lowest Fisher stay; the rest go."""
    delta = torch.randn(60, 300, device=device).mul(3).round()
    direction = torch.randn(60, 300, device=device).mul(3).round()
    fisher = torch.rand(60, 300, device=device).mul(50).round()
    mask = torch.zeros(60, 300, dtype=torch.bool, device=device)
    for c in range(0, 300, 128):
        conflict = delta[:, c : c + 128].sign() != direction[:, c : c + 128].sign()
        lowest = fisher[:, c : c + 128][conflict].sort(stable=True).indices
        removed = torch.ones(len(lowest), dtype=torch.bool, device=device)
        removed[lowest[: int(sparsity * len(lowest))]] = False
        mask[:, c : c + 128][conflict] = removed
    got = block_select(
        delta, torch.zeros_like(delta), rule="grad", grad=fisher, gate="conflict", direction=direction, spare=sparsity,
        backend=backend,
    )  # fmt: skip
    assert torch.equal(got, mask)


def test_explain_says_where_tiles_are_sorted():
    weight, target, evidence = inputs((6, 6))
    choices = curvkern.explain(block_select, weight, target, k=1, grad=evidence["grad"])
    assert [(c.backend, c.chosen) for c in choices] == [("cpu", True), ("reference", False)]
    with pytest.raises(curvkern.BackendError, match="block_select has no such version; it has cpu, reference"):
        block_select(weight, target, k=1, grad=evidence["grad"], backend="triton")


# torch ----------------------------------------------------------------------------------------------------------------


def test_compiled_without_a_graph_break_and_versions_move(backend, device):
    weight, target, evidence = inputs((33, 9), device=device)
    tiled = backend if backend in TILED else "auto"

    def step(histogram, tallies, w, t, g):
        score_histogram_(histogram, tallies, w, t, gate="descent", grad=g, backend=backend)
        return block_select(w, t, grad=g, fraction=0.3, backend=tiled)

    expected, got = counts(device), counts(device)
    tiles = step(*expected, weight, target, evidence["grad"])
    version = got[0]._version
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*got, weight, target, evidence["grad"]), tiles)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
    assert got[0]._version > version


def test_opcheck(device):
    weight, target, e = inputs((5, 9), device=device)
    ops = torch.ops.curvkern
    scored = (e["grad"], e["fisher"], e["direction"], "gain", "conflict")
    torch.library.opcheck(
        ops.score_histogram_.default, (*counts(device), weight, target, None, None, None, *scored, "auto")
    )
    torch.library.opcheck(
        ops.block_select.default, (weight, target, *scored, "fraction", 0.5, False, 5, 4, "exact_k", "auto")
    )


def test_same_bits_twice(backend, device):
    runs = []
    for _ in range(2):
        weight, target, evidence = inputs((50, 70), torch.bfloat16, device)
        runs.append(counts(device))
        score_histogram_(*runs[-1], weight, target, rule="gain", gate="descent", backend=backend, **evidence)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_float64_runs_on_the_reference_only():
    weight, target, _ = inputs((6, 6))
    weight, target = weight.double() + 1e-12, target.double()
    score = score_ref(weight, target, rule="delta")
    assert score.dtype == torch.float64
    chosen = block_select(weight, target, rule="delta", k=4, ties="exact_k", block=(None, None))
    assert torch.equal(
        chosen.flatten().nonzero().flatten(),
        score.float().flatten().sort(descending=True, stable=True).indices[:4].sort().values,
    )
    with pytest.raises(curvkern.BackendError, match="float64 runs on the reference only"):
        score_histogram_(*counts(), weight, target, rule="delta", backend="cpu")


# errors ---------------------------------------------------------------------------------------------------------------

W = torch.zeros(4, 4)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: block_select(W, W, grad=W), ValueError, "exactly one of k, fraction, spare; given: none"),
        (lambda: block_select(W[0], W[0], grad=W[0], k=1), ValueError, r"weight has shape \[4\]; wanted \[o, i\]"),
        (lambda: block_select(W, W, grad=W, k=1, block=(0, 2)), ValueError, "block is 0; wanted at least 1"),
        (lambda: block_select(W, W, grad=W, spare=-0.1), ValueError, "spare is -0.1"),
        (lambda: block_select(W, W, rule="fisher", k=1), ValueError, "fisher is missing; rule 'fisher' needs it"),
        (lambda: block_select(W, W, grad=W, k=1, ties="no"), ValueError, "ties is 'no'"),
        (
            lambda: score_histogram_(torch.zeros(9, dtype=torch.int64), counts()[1], W, W, rule="delta"),
            ValueError, r"histogram has shape \[9\]; wanted \[65536\]",
        ),
        (
            lambda: score_histogram_(counts()[0].int(), counts()[1], W, W, rule="delta"),
            TypeError, "histogram has dtype int32; wanted int64",
        ),
    ],
)  # fmt: skip
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


# GPU ------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_side_stream_and_graph_replay(backend):
    weight, target, evidence = inputs((257, 129), torch.bfloat16, "cuda")
    expected, got = counts("cuda"), counts("cuda")
    score_histogram_(*expected, weight, target, rule="gain", backend="reference", **evidence)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        score_histogram_(*got, weight, target, rule="gain", backend=backend, **evidence)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(got[0], expected[0])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        score_histogram_(*got, weight, target, rule="gain", backend=backend, **evidence)
    graph.replay()
    assert torch.equal(got[0], 2 * expected[0])
    assert torch.equal(got[1], 2 * expected[1])

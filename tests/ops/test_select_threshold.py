"""The Selector: streamed, exact thresholds."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import curvkern
from curvkern import Selector, gate_ref, pack_mask, rollback_, score_ref

RULES = ["grad", "taylor", "fisher", "delta", "gain"]
GATES = ["none", "descent", "conflict"]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]
SHAPES = [(21, 33), (7,), (0,), (20, 41), (1,)]


def inputs(shape, dtype=torch.float32, device="cpu", seed=0):
    """Weights, a target, and evidence with ties, zeros and both signs."""
    g = torch.Generator().manual_seed(seed)

    def normal():
        return (torch.randn(shape, generator=g) * 4).round() / 4

    weight, target, direction = (normal().to(dtype).to(device) for _ in range(3))
    evidence = {"grad": normal().to(device), "fisher": normal().abs().to(device), "direction": direction}
    return weight, target, evidence


def layers(dtype=torch.float32, device="cpu"):
    return [inputs(shape, dtype, device, seed) for seed, shape in enumerate(SHAPES)]


def scores_of(tensors, rule, gate):
    """The candidates' scores of all tensors, as one vector, for torch.topk."""
    parts = []
    for weight, target, e in tensors:
        score = score_ref(weight, target, e["grad"], e["fisher"], rule=rule)
        parts.append(score[gate_ref(weight, target, e["grad"], e["direction"], gate=gate)])
    return torch.cat(parts)


def observe(selector, tensors):
    for weight, target, evidence in tensors:
        selector.observe(weight, target, **evidence)


def found(selector, tensors, **request):
    """The threshold after as many sweeps as it takes."""
    how = {name: request.pop(name) for name in ("ties", "on_short") if name in request}
    observe(selector, tensors)
    if selector.refine(**request):
        observe(selector, tensors)
    return selector.threshold(**how)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_threshold_is_topk_of_the_concatenation(rule, gate, dtype, backend, device):
    tensors = layers(dtype, device)
    candidates = scores_of(tensors, rule, gate)
    selector = Selector(rule, gate, device, backend=backend)
    observe(selector, tensors)
    for k in (len(candidates) // 3, len(candidates)):
        assert selector.refine(k=k) is True
        observe(selector, tensors)
        limit = selector.threshold()
        assert limit.tau == candidates.topk(k).values[-1]
        assert limit.tau.dtype == torch.float32
        assert limit.quota == k - (candidates > limit.tau).sum()
        assert limit.k == k
    assert selector.gated == len(candidates)
    assert selector.count == sum(weight.numel() for weight, *_ in tensors)


@given(data=st.data(), values=st.lists(st.floats(width=32, allow_nan=False), min_size=1, max_size=60))
@settings(max_examples=60, deadline=None)
def test_any_finite_or_infinite_score(data, values):
    """Rule gain with no Fisher and a delta of one: the scores are the gradients."""
    grad = torch.tensor(values)
    weight, zeros = torch.ones_like(grad), torch.zeros_like(grad)
    k = data.draw(st.integers(1, len(values)))
    selector = Selector("gain")
    limit = found(selector, [(weight, zeros, {"grad": grad, "fisher": zeros})], k=k)
    assert limit.tau == grad.topk(k).values[-1]
    assert limit.quota == k - (grad > limit.tau).sum()


def test_extreme_scores_in_one_go(backend, device):
    tiny = torch.finfo(torch.float32).tiny
    grad = torch.tensor([math.inf, -math.inf, 0.0, -0.0, tiny / 4, -tiny / 8, 3e38, -1e-38, 2.0**-120], device=device)
    tensors = [(torch.ones(9, device=device), torch.zeros(9, device=device),
                {"grad": grad, "fisher": torch.zeros(9, device=device)})]  # fmt: skip
    for k in range(1, 10):
        assert found(Selector("gain", device=device, backend=backend), tensors, k=k).tau == grad.topk(k).values[-1]


def test_one_sweep_is_enough_for_bfloat16_gradients(backend, device):
    weight, target, evidence = inputs((50, 60), torch.bfloat16, device)
    grad = torch.randn(50, 60, device=device).bfloat16()
    selector = Selector("grad", "descent", device, backend=backend)
    selector.observe(weight, target, grad)
    assert selector.refine(k=17) is False
    chosen = grad.float().abs()[gate_ref(weight, target, grad, gate="descent")]
    assert selector.threshold().tau == chosen.topk(17).values[-1]
    selector.observe(weight, target, evidence["grad"])  # float32: from here on the lower halves matter
    assert selector.refine(k=17) is True


def test_ties_exact_k_moves_k_weights_the_first_in_order(backend, device):
    tensors = layers(device=device)
    flat = torch.cat([t[2]["grad"].flatten() for t in tensors]).abs()
    k = int((flat > 0.5).sum()) + 13
    order = flat.sort(descending=True, stable=True).indices[:k]
    for ties, chosen in (("exact_k", torch.zeros_like(flat).index_fill(0, order, 1) == 1), ("strict", flat > 0.5)):
        limit = found(Selector("grad", device=device, backend=backend), tensors, k=k, ties=ties)
        assert limit.tau == 0.5
        moved = []
        for weight, target, evidence in tensors:
            undo = torch.zeros(-(-weight.numel() // 8), dtype=torch.uint8, device=device)
            rollback_(weight.clone(), target, limit, grad=evidence["grad"], undo=undo, backend=backend)
            moved.append(curvkern.unpack_mask(undo, weight.shape).flatten())
        assert torch.equal(torch.cat(moved), chosen)


@pytest.mark.parametrize("packed", [False, True])
def test_a_mask_narrows_the_candidates(packed, backend, device):
    weight, target, evidence = inputs((13, 77), device=device)
    mask = torch.rand(13, 77, device=device) < 0.3
    given = {**evidence, "mask": pack_mask(mask) if packed else mask}
    selector = Selector("fisher", "descent", device, backend=backend)
    limit = found(selector, [(weight, target, given)], k=9)
    score = score_ref(weight, target, fisher=evidence["fisher"], rule="fisher")
    chosen = score[gate_ref(weight, target, evidence["grad"], gate="descent") & mask]
    assert limit.tau == chosen.topk(9).values[-1]
    assert selector.gated == len(chosen)
    assert selector.count == weight.numel()


def test_fraction_of_all_and_of_the_candidates(backend, device):
    tensors = layers(device=device)
    candidates = scores_of(tensors, "taylor", "conflict")
    for of, n in (("all", sum(t[0].numel() for t in tensors)), ("gated", len(candidates))):
        selector = Selector("taylor", "conflict", device, backend=backend)
        limit = found(selector, tensors, fraction=0.1, of=of)
        assert limit.k == math.ceil(0.1 * n)
        assert limit.tau == candidates.topk(int(limit.k)).values[-1]


def test_not_a_number_is_no_candidate_and_is_counted(backend, device):
    weight, target, evidence = inputs((9, 33), device=device)
    gate = gate_ref(weight, target, direction=evidence["direction"], gate="conflict")
    evidence["fisher"][4:] = math.nan
    selector = Selector("fisher", "conflict", device, backend=backend)
    limit = found(selector, [(weight, target, evidence)], k=5)
    score = score_ref(weight, target, fisher=evidence["fisher"], rule="fisher")[gate]
    assert limit.tau == score[~score.isnan()].topk(5).values[-1]
    assert selector.nonfinite == score.isnan().sum() > 0
    assert selector.gated + selector.nonfinite == gate.sum()


def test_zero_weights_and_k_of_zero_select_nothing(backend, device):
    empty = torch.zeros(0, 4, device=device)
    limit = found(Selector("delta", device=device, backend=backend), [(empty, empty, {})], fraction=0.5)
    assert (limit.tau, limit.quota, limit.k) == (math.inf, 0, 0)
    tensors = layers(device=device)
    tensors[0][2]["grad"][0, 0] = math.inf
    for ties in ("strict", "exact_k"):
        limit = found(Selector("grad", device=device, backend=backend), tensors, k=0, ties=ties)
        weight, target, evidence = tensors[0]
        assert rollback_(weight.clone(), target, limit, grad=evidence["grad"]) == 0


def test_more_than_the_candidates_is_an_error_or_a_clamp():
    tensors = layers()
    n = len(scores_of(tensors, "grad", "descent"))
    total = sum(t[0].numel() for t in tensors)
    with pytest.raises(ValueError, match=f"K is {n + 1} but only {n} of {total} weights are candidates"):
        found(Selector("grad", "descent"), tensors, k=n + 1)
    limit = found(Selector("grad", "descent"), tensors, k=n + 1, on_short="clamp", ties="exact_k")
    assert limit.k == n
    moved = sum(int(rollback_(w.clone(), t, limit, gate="descent", grad=e["grad"])) for w, t, e in tensors)
    assert moved == n


def test_the_second_sweep_cannot_be_skipped_or_differ():
    tensors = layers()
    selector = Selector("grad")
    observe(selector, tensors)
    with pytest.raises(RuntimeError, match=r"refine was not called; call refine\(k=5\)"):
        selector.threshold(k=5)
    assert selector.refine(fraction=0.01) is True
    with pytest.raises(RuntimeError, match=r"called as refine\(fraction=0.01, of='all'\); call refine\(k=5\)"):
        selector.threshold(k=5)
    with pytest.raises(RuntimeError, match="the second sweep saw 0 weights"):
        selector.threshold()
    observe(selector, tensors[:-1])
    with pytest.raises(RuntimeError, match=r"the second sweep saw \d+ weights \(first: \d+\)"):
        selector.threshold()
    selector.observe(*tensors[-1][:2], grad=torch.full((1,), math.nan))
    with pytest.raises(RuntimeError, match=r"candidates \(first: \d+\)"):
        selector.threshold()
    for k in (3, 100):  # another K is another second sweep, not another first one
        assert selector.refine(k=k) is True
        observe(selector, tensors)
        assert selector.threshold().tau == scores_of(tensors, "grad", "none").topk(k).values[-1]
    grad = tensors[0][2]["grad"] + 1000
    assert selector.refine(k=3) is True
    observe(selector, [(*tensors[0][:2], {"grad": grad}), *tensors[1:]])
    with pytest.raises(RuntimeError, match="in the K-th largest one's bin"):
        selector.threshold()


def test_counts_have_64_bits(device):
    """As if the tensor had come by 2^33 times."""
    weight, target, evidence = inputs((33, 9), device=device)
    many = Selector("gain", device=device)
    for sweep in range(2):
        many.observe(weight, target, **evidence)
        now = many._second or many._first
        now.histogram *= 2**33
        now.tallies *= 2**33
        now.count *= 2**33
        assert sweep or many.refine(k=5 * 2**33)
    once = found(Selector("gain", device=device), [(weight, target, evidence)], k=5)
    assert many.threshold().tau == once.tau
    assert many.threshold().k == 5 * 2**33


def test_float64_runs_on_the_reference_only():
    weight, target, _ = inputs((6, 6))
    weight, target = weight.double() + 1e-12, target.double()
    limit = found(Selector("delta"), [(weight, target, {})], k=4)
    assert limit.tau == score_ref(weight, target, rule="delta").float().flatten().topk(4).values[-1]
    with pytest.raises(curvkern.BackendError, match="float64 runs on the reference only"):
        Selector("delta", backend="cpu").observe(weight, target)


# errors ---------------------------------------------------------------------------------------------------------------

W = torch.zeros(4, 4)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((W, W), {}, ValueError, "score_histogram_: grad is missing; rule 'grad' needs it"),
        ((W, W.half()), {"grad": W}, TypeError, "target has dtype float16 but weight has float32"),
        ((W.int(), W.int()), {"grad": W}, TypeError, "weight has dtype int32; wanted float32"),
        ((W, W[:2]), {"grad": W}, ValueError, r"target has shape \[2, 4\] but weight has \[4, 4\]"),
        ((W, W), {"grad": W.to("meta")}, ValueError, "grad is on meta but weight is on cpu"),
        ((W.to("meta"), W.to("meta")), {"grad": W.to("meta")}, ValueError, "weight is on meta but histogram is on cpu"),
        ((W, W), {"grad": W, "mask": torch.ones(3, 4) > 0}, ValueError, r"mask has shape \[3, 4\]"),
        ((W, W), {"grad": W, "mask": torch.ones(3, dtype=torch.uint8)}, ValueError, "one bit per weight"),
        ((W, W), {"grad": W, "mask": W}, TypeError, "mask has dtype float32; wanted bool, uint8"),
        ((W, W), {"grad": W.clone().requires_grad_()}, RuntimeError, "grad requires grad"),
    ],
)
def test_bad_observations_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        Selector("grad").observe(*arguments, **options)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda s: Selector("gradd"), ValueError, "Selector: rule is 'gradd'; .* Did you mean 'grad'"),
        (lambda s: Selector("grad", "up"), ValueError, "gate is 'up'"),
        (lambda s: s.refine(), ValueError, "Selector.refine: pass exactly one of k, fraction; given: none"),
        (lambda s: s.refine(k=1, fraction=0.1), ValueError, "given: k, fraction"),
        (lambda s: s.refine(k=-1), ValueError, "k is -1; wanted at least 0"),
        (lambda s: s.refine(fraction=1.5), ValueError, r"fraction is 1.5; wanted a number in \[0, 1\]"),
        (lambda s: s.refine(fraction=math.nan), ValueError, "fraction is nan"),
        (lambda s: s.refine(k=1, of="gate"), ValueError, "of is 'gate'; .* Did you mean 'gated'"),
        (lambda s: s.threshold(), ValueError, "Selector.threshold: pass exactly one of k, fraction"),
        (lambda s: s.threshold(k=1, ties="exact"), ValueError, "ties is 'exact'; .* Did you mean 'exact_k'"),
        (lambda s: s.threshold(k=1, on_short="cut"), ValueError, "on_short is 'cut'"),
    ],
)
def test_bad_requests_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(Selector("grad"))


# GPU ------------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_no_wait_for_the_device(backend):
    tensors = layers(torch.bfloat16, "cuda")
    found(Selector("grad", "descent", "cuda", backend=backend), tensors, k=100)  # compiles kernels
    selector = Selector("grad", "descent", "cuda", backend=backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        observe(selector, tensors)
        selector.refine(fraction=0.1, of="gated")
        observe(selector, tensors)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    limit = selector.threshold()
    assert limit.tau == scores_of(tensors, "grad", "descent").topk(int(limit.k)).values[-1]


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_than_two_to_the_31_weights(backend):
    n = 2**31 + 5000
    grad = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    grad[-3:] = torch.tensor([3.0, 2.0, 1.0])
    selector = Selector("grad", device="cuda", backend=backend)
    selector.observe(grad, grad, grad)
    assert selector.gated == n
    assert selector.threshold(k=2).tau == 2
    assert selector.threshold(k=n).quota == n - 3

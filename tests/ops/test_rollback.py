import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import curvkern
from curvkern import Threshold, blend_, blend_ref, pack_mask, rollback_, rollback_ref, undo_, unpack_mask
from curvkern.bench.cases import CASES

RULES = ["grad", "taylor", "fisher", "delta", "gain"]
GATES = ["none", "descent", "conflict"]
FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def inputs(shape, dtype=torch.float32, device="cpu", seed=0):
    """Weights, a target, and evidence with ties, zeros and both signs."""
    g = torch.Generator().manual_seed(seed)

    def normal():
        return (torch.randn(shape, generator=g) * 4).round() / 4

    weight, target, direction = (normal().to(dtype).to(device) for _ in range(3))
    evidence = {"grad": normal().to(device), "fisher": normal().abs().to(device), "direction": direction}
    return weight, target, evidence


def threshold(tau, ties="strict", quota=0, device="cpu"):
    tensors = [torch.tensor(v, device=device) for v in (tau, quota, 0)]
    return Threshold(tensors[0].float(), ties, tensors[1], tensors[2])


def bits_for(weight):
    return torch.empty(-(-weight.numel() // 8), dtype=torch.uint8, device=weight.device)


@pytest.mark.parametrize("case", [c for c in CASES["rollback"] if c.size == "edge"], ids=str)
def test_every_case_equals_the_reference_bit_for_bit(case, backend, device):
    (weight, target, tau), options = case.make(device)
    expected = weight.clone()
    undo, undo_ref = bits_for(weight), bits_for(weight)
    tau_tensor = torch.full((), tau, device=device)
    count_ref = rollback_ref(
        expected, target, tau_tensor, None, None, None, options["grad"], None, None, undo_ref, "grad", "descent"
    )
    before = weight.clone()
    count = rollback_(weight, target, tau, undo=undo, backend=backend, **options)
    assert torch.equal(weight, expected)
    assert torch.equal(undo, undo_ref)
    assert count == count_ref == unpack_mask(undo, weight.shape).sum()
    kept = ~unpack_mask(undo, weight.shape)
    assert torch.equal(weight[kept], before[kept])
    assert torch.equal(weight[~kept], target[~kept])


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("gate", GATES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_rules_and_gates_agree_between_backends(rule, gate, dtype, backend, device):
    weight, target, evidence = inputs((37, 71), dtype, device)
    expected = weight.clone()
    options = {"rule": rule, "gate": gate, **evidence}
    wanted = rollback_(expected, target, 0.25, backend="reference", **options)
    assert 0 < wanted < weight.numel()
    assert rollback_(weight, target, 0.25, backend=backend, **options) == wanted
    assert torch.equal(weight, expected)


@pytest.mark.parametrize("quota", [0, 1, 5, 10**6])
@pytest.mark.parametrize("n", [1, 100, 5000])
def test_exact_k_takes_the_first_ties_in_element_order(quota, n, backend, device):
    weight, target, evidence = inputs((n,), device=device)
    grad = evidence["grad"]
    limit = threshold(0.5, "exact_k", quota, device)
    ties = (grad.abs() == 0.5).nonzero().flatten()
    chosen = (grad.abs() > 0.5).index_fill(0, ties[:quota], True)
    expected = torch.where(chosen, target, weight)
    assert rollback_(weight, target, limit, grad=grad, backend=backend) == chosen.sum()
    assert torch.equal(weight, expected)
    assert limit.quota == max(0, quota - len(ties))


@pytest.mark.parametrize("packed", [False, True])
def test_mask_chooses_alone_and_with_a_threshold(packed, backend, device):
    weight, target, evidence = inputs((13, 77), device=device)
    mask = torch.rand(13, 77, device=device) < 0.3
    given_mask = pack_mask(mask) if packed else mask
    alone = weight.clone()
    assert rollback_(alone, target, mask=given_mask, backend=backend) == mask.sum()
    assert torch.equal(alone, torch.where(mask, target, weight))
    both = mask & (evidence["grad"].abs() > 1)
    rollback_(weight, target, 1.0, mask=given_mask, grad=evidence["grad"], backend=backend)
    assert torch.equal(weight, torch.where(both, target, inputs((13, 77), device=device)[0]))


def test_undo_gives_all_or_a_part_back(backend, device):
    weight, target, evidence = inputs((9, 33), torch.bfloat16, device)
    original, undo = weight.clone(), bits_for(weight)
    count = rollback_(weight, target, 0.5, grad=evidence["grad"], undo=undo, backend=backend)
    half = torch.zeros(9, 33, dtype=torch.bool, device=device)
    half[:4] = True
    edited = weight.clone()
    part = undo_(weight, original, undo, where=half, backend=backend)
    assert 0 < part < count
    assert torch.equal(weight, torch.where(half, original, edited))
    assert undo_(weight, original, undo, backend=backend) == count
    assert torch.equal(weight, original)


def test_gates_compare_signs_where_products_underflow(backend, device):
    weight = torch.tensor([2e-38, -2e-38, 2e-38, 0.0], device=device)
    grad = torch.tensor([1e-30, -1e-30, -1e-30, 1.0], device=device)
    target = torch.zeros_like(weight)
    assert (weight * grad)[:3].abs().max() == 0
    assert rollback_(weight, target, -1.0, gate="descent", grad=grad, backend=backend) == 2
    assert weight.tolist()[:2] == [0, 0]


def test_not_a_number_is_never_chosen_and_never_spread(backend, device):
    nan = float("nan")
    weight = torch.tensor([1.0, nan, 1.0, 1.0], device=device)
    target = torch.tensor([0.0, 0.0, nan, 0.0], device=device)
    grad = torch.tensor([nan, 9.0, 9.0, 9.0], device=device)
    assert rollback_(weight, target, 0.0, rule="taylor", gate="descent", grad=grad, backend=backend) == 1
    assert weight[[0, 2, 3]].tolist() == [1, 1, 0]
    assert weight[1].isnan()


@given(
    data=st.data(),
    n=st.integers(0, 4100),
    start=st.integers(0, 9),
    dtype=st.sampled_from(FLOATS),
    grad_dtype=st.sampled_from(FLOATS),
    rule=st.sampled_from(RULES),
    gate=st.sampled_from(GATES),
    ties=st.sampled_from(["strict", "exact_k"]),
)
@settings(max_examples=60, deadline=None)
def test_native_equals_reference_on_any_slice(data, n, start, dtype, grad_dtype, rule, gate, ties):
    backend = "cuda" if torch.cuda.is_available() else "cpu"
    device = "cuda" if backend == "cuda" else "cpu"
    weight, target, evidence = inputs((n + start,), dtype, device, seed=n)
    evidence["grad"] = evidence["grad"].to(grad_dtype)
    quota = data.draw(st.integers(0, n))
    results = []
    for name in (backend, "reference"):
        w = weight.clone()
        limit = threshold(0.25, ties, quota, device)
        parts = {key: tensor[start:] for key, tensor in evidence.items()}
        undo = torch.zeros(-(-n // 8), dtype=torch.uint8, device=device)
        count = rollback_(w[start:], target[start:], limit, rule=rule, gate=gate, undo=undo, backend=name, **parts)
        results.append((w, undo, count, limit.quota))
        assert torch.equal(w[:start], weight[:start])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["number", "tensor", "tile"])
def test_blend_matches_the_definition(dtype, kind, backend, device):
    weight, target, _ = inputs((33, 65), dtype, device)
    alpha, tile = {
        "number": (torch.tensor(0.3, device=device), None),
        "tensor": (torch.rand(33, 65, device=device) * 1.5 - 0.2, None),
        "tile": (torch.rand(3, 9, device=device) * 1.5 - 0.2, (16, 8)),
    }[kind]
    expected = weight.clone()
    blend_(expected, target, alpha, tile=tile, backend="reference")
    exact = weight.double()
    blend_(exact, target.double(), alpha, tile=tile, backend="reference")
    got = blend_(weight, target, alpha, tile=tile, backend=backend)
    assert got is weight
    if backend == "triton" and device == "cpu" and dtype == torch.bfloat16:
        # The interpreter cuts off bfloat16 instead of rounding; the GPU rounds.
        assert (got - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()
    else:
        assert torch.equal(got, expected)


def test_blend_is_exact_at_both_ends_and_ignores_nan_fractions(backend, device):
    weight, target, _ = inputs((4, 50), device=device)
    target[0, 0] = float("inf")
    alpha = torch.tensor([[0.0], [1.0], [float("nan")], [-3.0]], device=device)
    got = blend_(weight.clone(), target, alpha, tile=(1, 50), backend=backend)
    assert torch.equal(got, torch.stack([weight[0], target[1], weight[2], weight[3]]))


def test_non_contiguous_tensors(backend, device):
    weight, target, evidence = inputs((20, 30), device=device)
    expected = weight.clone()
    rollback_(expected, target, 0.5, grad=evidence["grad"], backend="reference")
    strided = {"grad": evidence["grad"].T.contiguous().T}
    got = weight.clone()
    rollback_(got, target.T.contiguous().T, 0.5, backend=backend, **strided)
    assert torch.equal(got, expected)
    edited = weight.T.contiguous().T
    if backend != "reference":
        with pytest.raises(curvkern.BackendError, match="weight is not contiguous"):
            rollback_(edited, target, 0.5, grad=evidence["grad"], backend=backend)
    rollback_(edited, target, 0.5, grad=evidence["grad"])
    assert torch.equal(edited, expected)


def test_compiled_without_a_graph_break_and_versions_move(backend, device):
    weight, target, evidence = inputs((33, 9), device=device)
    undo = bits_for(weight)

    def step(w, t, g, u):
        count = rollback_(w, t, 0.5, gate="descent", grad=g, undo=u, backend=backend)
        blend_(w, t, 0.25, backend=backend)
        return count

    expected, undo_eager = weight.clone(), undo.clone()
    count = step(expected, target, evidence["grad"], undo_eager)
    versions = weight._version, undo._version
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert compiled(weight, target, evidence["grad"], undo) == count
    assert torch.equal(weight, expected)
    assert torch.equal(undo, undo_eager)
    assert weight._version > versions[0]
    assert undo._version > versions[1]


def test_eager_call_moves_versions(backend, device):
    weight, target, evidence = inputs((8,), device=device)
    before = weight._version
    rollback_(weight, target, 0.5, grad=evidence["grad"], backend=backend)
    assert weight._version > before


def test_opcheck(device):
    weight, target, evidence = inputs((5, 9), device=device)
    tau, quota = torch.tensor(0.5, device=device), torch.tensor(2, device=device)
    undo = torch.zeros(6, dtype=torch.uint8, device=device)
    arguments = (weight, target, tau, quota, None, None, evidence["grad"], None, None, undo, "grad", "none", "auto")
    torch.library.opcheck(torch.ops.curvkern.rollback_.default, arguments)
    torch.library.opcheck(
        torch.ops.curvkern.blend_.default, (weight, target, torch.rand(5, 9, device=device), 1, 1, "auto")
    )


def test_same_bits_twice(backend, device):
    runs = []
    for _ in range(2):
        weight, target, evidence = inputs((50, 70), torch.bfloat16, device)
        undo = torch.zeros(-(-weight.numel() // 8), dtype=torch.uint8, device=device)
        rollback_(weight, target, 0.25, rule="gain", gate="conflict", undo=undo, backend=backend, **evidence)
        runs.append((weight, undo))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


W = torch.zeros(4, 4)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((W, W), {}, ValueError, "neither threshold nor mask"),
        ((W, W, 0.1), {"rule": "gradd", "grad": W}, ValueError, "Did you mean 'grad'"),
        ((W, W, 0.1), {"grad": W, "gate": "up"}, ValueError, "gate is 'up'"),
        ((W, W, 0.1), {}, ValueError, "grad is missing; rule 'grad' needs it"),
        ((W, W, 0.1), {"rule": "fisher"}, ValueError, "fisher is missing"),
        ((W, W, 0.1), {"rule": "delta", "gate": "conflict"}, ValueError, "direction is missing; gate 'conflict'"),
        ((W, W.half(), 0.1), {"grad": W}, TypeError, "target has dtype float16 but weight has float32"),
        ((W.int(), W.int(), 0.1), {"grad": W}, TypeError, "weight has dtype int32; wanted float32"),
        ((W, W[:2], 0.1), {"grad": W}, ValueError, r"target has shape \[2, 4\] but weight has \[4, 4\]"),
        ((W, W.to("meta"), 0.1), {"grad": W}, ValueError, "target is on meta but weight is on cpu"),
        ((W, W), {"mask": torch.ones(3, 4, dtype=torch.bool)}, ValueError, r"mask has shape \[3, 4\]"),
        ((W, W), {"mask": torch.ones(3, dtype=torch.uint8)}, ValueError, "one bit per weight"),
        ((W, W), {"mask": W}, TypeError, "mask has dtype float32; wanted bool, uint8"),
        ((W, W, 0.1), {"grad": W, "undo": torch.zeros(5, dtype=torch.uint8)}, ValueError, r"undo has shape \[5\]"),
        ((W, W, 0.1), {"grad": W.clone().requires_grad_()}, RuntimeError, "grad requires grad"),
        ((W, W, 0.1), {"grad": W, "backend": "cuda13"}, ValueError, "Did you mean 'cuda'"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        rollback_(arguments[0].clone(), *arguments[1:], **options)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((W, W, torch.zeros(3, 3)), {}, ValueError, r"alpha has shape \[3, 3\] but weight has \[4, 4\]"),
        ((W, W, torch.zeros(3, 3)), {"tile": (2, 2)}, ValueError, r"wanted \[2, 2\] \(one number per tile\)"),
        ((W, W, torch.zeros(3, 3)), {"tile": (0, 2)}, ValueError, "tile is 0; wanted at least 1"),
        ((W[0], W[0], torch.zeros(1, 2)), {"tile": (1, 2)}, ValueError, r"weight must be \[o, i\]"),
        ((W, W, torch.zeros(4, 4).double()), {}, TypeError, "alpha has dtype float64"),
        ((W, W.half(), 0.5), {}, TypeError, "target has dtype float16"),
        ((W.clone().requires_grad_(), W, 0.5), {}, RuntimeError, "blend_: weight requires grad"),
    ],
)
def test_bad_blends_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        blend_(*arguments, **options)


def test_float64_runs_on_the_reference_only():
    weight, target, evidence = inputs((6, 6))
    weight, target = weight.double(), target.double()
    expected = weight.clone()
    blend_ref(expected, target, torch.full((6, 6), 0.5), 1, 1)
    assert torch.equal(blend_(weight, target, 0.5), expected)
    with pytest.raises(curvkern.BackendError, match="float64 runs on the reference only"):
        rollback_(weight, target, 0.1, grad=evidence["grad"], backend="cpu")


@pytest.mark.gpu
def test_side_stream_and_graph_replay():
    weight, target, evidence = inputs((257, 129), torch.bfloat16, "cuda")
    expected = weight.clone()
    rollback_(expected, target, 0.5, grad=evidence["grad"], backend="reference")
    for backend in ("cuda", "triton"):
        tau, w = torch.full((), 0.5, device="cuda"), weight.clone()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            rollback_(w, target, tau, grad=evidence["grad"], backend=backend)
        torch.cuda.current_stream().wait_stream(stream)
        assert torch.equal(w, expected)
        w.copy_(weight)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            rollback_(w, target, tau, grad=evidence["grad"], backend=backend)
        w.copy_(weight)
        graph.replay()
        assert torch.equal(w, expected)


@pytest.mark.gpu
@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_more_than_two_to_the_31_weights(backend):
    n = 2**31 + 4099
    weight = torch.zeros(n, dtype=torch.bfloat16, device="cuda")
    target = torch.ones_like(weight)
    mask = torch.zeros(-(-n // 8), dtype=torch.uint8, device="cuda")
    mask[-2:] = 255
    chosen = 8 + n % 8 if n % 8 else 16
    assert rollback_(weight, target, mask=mask, backend=backend) == chosen
    assert weight[-chosen:].sum() == chosen
    assert weight[:-chosen].any().logical_not()

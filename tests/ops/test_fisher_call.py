"""How the four functions of fisher are called: memory layouts, compilation, determinism, errors, streams, graphs."""

import re

import pytest
import torch

import curvkern
from curvkern import fisher_blocks_, fisher_diag_, sample_dots, sample_norms


def data(n=3, t=9, o=20, i=17, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, t, k, generator=generator).to(dtype).to(device) for k in (o, i)]


def every_sum(d, x, backend="auto", **how):
    """All that is added to for d and x: diagonal and blocks, each with its weight gradient."""
    o, i = d.shape[-1], x.shape[-1]
    diag, blocks, *grads = (
        torch.zeros(*shape, device=d.device) for shape in [(o, i), (-(-o // 8), -(-i // 3)), *[(o, i)] * 2]
    )
    fisher_diag_(diag, d, x, weight_grad=grads[0], backend=backend, **how)
    fisher_blocks_(blocks, d, x, block=(8, 3), weight_grad=grads[1], backend=backend, **how)
    return diag, blocks, *grads


# layouts --------------------------------------------------------------------------------------------------------------


def test_strides_and_odd_offsets_change_nothing(backend, device):
    d, x = data(device=device)
    plain = every_sum(d, x, backend)
    gaps = torch.randn(3, 9, 41, device=device)[:, :, 1::2]
    gaps[:] = d
    shifted = torch.randn(3 * 9 * 17 + 3, device=device)[3:].view(3, 9, 17)
    shifted[:] = x
    across = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    wide = torch.randn(3, 9, 40, device=device)[:, :, 5:22]
    wide[:] = x
    for other in (shifted, across, wide):
        torch.testing.assert_close(every_sum(gaps, other, backend), plain, rtol=1e-6, atol=1e-5)
    expanded = d[:, :1].expand(3, 9, 20)
    got, wanted = every_sum(expanded, x, backend), every_sum(expanded.contiguous(), x, backend)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-5)


def test_sums_that_are_part_of_something_larger(backend, device):
    d, x = data(device=device)
    plain = every_sum(d, x, backend)
    memory = torch.zeros(3, 20 * 17 + 3, device=device)
    diag, grad = (row[3:].view(20, 17) for row in memory[:2])
    fisher_diag_(diag, d, x, weight_grad=grad, backend=backend)
    assert torch.equal(diag, plain[0])
    assert torch.equal(grad, plain[2])
    assert not memory[:, :3].any()
    assert not memory[2].any()


def test_sums_that_are_not_contiguous_take_the_reference(backend, device):
    d, x = data(device=device)
    wanted = every_sum(d, x, "reference")
    for strided in range(2):
        sums = [torch.zeros(20, 17, device=device) for _ in range(2)]
        sums[strided] = torch.zeros(17, 20, device=device).T
        name = ("the sum", "weight_grad")[strided]
        if backend != "reference":
            with pytest.raises(curvkern.BackendError, match=f"fisher_diag_: .*{name} is not contiguous"):
                fisher_diag_(sums[0], d, x, weight_grad=sums[1], backend=backend)
            assert not any(y.any() for y in sums)
        fisher_diag_(sums[0], d, x, weight_grad=sums[1])
        torch.testing.assert_close((sums[0], sums[1]), (wanted[0], wanted[2]))
    blocks = torch.zeros(6, 3, device=device).T
    fisher_blocks_(blocks, d, x, block=(8, 3))
    torch.testing.assert_close(blocks, wanted[1])


def test_float64_runs_on_the_reference_only():
    d, x = (y.double() for y in data())
    exact = torch.einsum("nto,nti->noi", d, x)
    fisher = fisher_diag_(torch.zeros(20, 17, dtype=torch.float64), d, x)
    torch.testing.assert_close(fisher, exact.square().sum(0), rtol=1e-12, atol=1e-12)
    norms, dots = sample_norms(d, x), sample_dots(d, x, d.float(), x.float())
    assert norms.dtype == dots.dtype == torch.float64
    torch.testing.assert_close(norms, exact.square().sum((1, 2)), rtol=1e-12, atol=0)
    torch.testing.assert_close(dots.diag(), norms, rtol=1e-5, atol=0)
    for call in (lambda: fisher_diag_(fisher, d, x, backend="cpu"), lambda: sample_norms(d, x, backend="cpu")):
        with pytest.raises(curvkern.BackendError, match="float64 runs on the reference only"):
            call()


# torch ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [{}, {"sample": "token"}, {"statistic": "abs", "scale": 0.5}], ids=str)
def test_compiled_without_a_graph_break_and_versions_move(how, backend, device):
    d, x = data(device=device)
    mask = torch.rand(3, 9, device=device) < 0.8

    def step(diag, blocks, grads):
        fisher_diag_(diag, d, x, mask=mask, weight_grad=grads[0], backend=backend, **how)
        fisher_blocks_(blocks, d, x, block=(8, 3), mask=mask, weight_grad=grads[1], backend=backend, **how)
        return sample_norms(d, x, mask=mask, backend=backend), sample_dots(d, x, d, x, mask2=mask, backend=backend)

    def sums():
        return (
            torch.zeros(20, 17, device=device),
            torch.zeros(3, 6, device=device),
            torch.zeros(2, 20, 17, device=device),
        )

    torch._dynamo.reset()  # a new step each time: it compiles one function a few times only
    eager, compiled = sums(), sums()
    results = step(*eager), torch.compile(step, fullgraph=True, backend="aot_eager")(*compiled)
    torch.testing.assert_close((*compiled, *results[1]), (*eager, *results[0]), rtol=0, atol=0)
    assert all(y.any() and y._version for y in (*eager, *compiled))


def test_packed_input_compiles_too(backend, device):
    d, x = (y.flatten(0, 1) for y in data(device=device))
    how = {"cu_seqlens": torch.tensor([0, 4, 4, 27], device=device), "segments": torch.tensor([0, 27], device=device)}

    def step(fisher, d, x):
        return fisher_diag_(fisher, d, x, backend=backend, **how)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(torch.zeros(1, 20, 17, device=device), d, x)
    assert torch.equal(compiled, step(torch.zeros(1, 20, 17, device=device), d, x))


def test_eager_call_moves_versions_of_all_it_adds_to(backend, device):
    d, x = data(device=device)
    for function, shape, how in ((fisher_diag_, (20, 17), {}), (fisher_blocks_, (1, 1), {})):
        sums = [torch.zeros(*shape, device=device), torch.zeros(20, 17, device=device)]
        before = [y._version for y in (*sums, d, x)]
        function(sums[0], d, x, weight_grad=sums[1], backend=backend, **how)
        moved = [y._version > b for y, b in zip((*sums, d, x), before, strict=True)]
        assert moved == [True, True, False, False]


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck(packed, device):
    d, x = (y.flatten(0, 1) for y in data(2, 3, 6, 5, device=device))
    mask = torch.ones(6, dtype=torch.bool, device=device) if packed else None
    starts, first = (torch.tensor(y, device=device) if packed else None for y in ([0, 2, 6], [0, 2]))
    batch = (d, x, mask, starts, first, 6 if packed else 3)
    shape = (1, 6, 5) if packed else (6, 5)
    fisher, grad = (torch.zeros(shape, device=device) for _ in range(2))
    ops, how = torch.ops.curvkern, ("square", False, 1.0, False, "auto")
    torch.library.opcheck(ops.fisher_diag_.default, (fisher, grad, *batch, *how))
    torch.library.opcheck(ops.fisher_diag_.default, (fisher, None, *batch, *how))
    torch.library.opcheck(ops.fisher_blocks_.default, (fisher[..., :1, :1].contiguous(), grad, *batch, 6, 5, *how))
    torch.library.opcheck(ops.sample_norms.default, (*batch, 2, False, "auto"))
    torch.library.opcheck(ops.sample_dots.default, (*batch, *batch, 2, 2, False, "auto"))


def test_same_bits_twice(backend, device):
    d, x = (y.flatten(0, 1) for y in data(8, 40, 70, 50, torch.bfloat16, device))
    how = {"cu_seqlens": torch.tensor([0, 7, 130, 131, 300], device=device)}
    first, again = (every_sum(d, x, backend, **how) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_backends_agree(device):
    d, x = data(5, 60, 140, 70, torch.float16, device)
    wanted = every_sum(d, x, "reference")
    for backend in ["triton"] + ["cpu"] * (device == "cpu"):
        torch.testing.assert_close(every_sum(d, x, backend), wanted, rtol=1e-5, atol=1e-3)


def test_full_precision_under_autocast(device):
    d, x = data(device=device)
    plain = every_sum(d, x), sample_norms(d, x)
    with torch.autocast(device, dtype=torch.bfloat16):
        inside = every_sum(d, x), sample_norms(d, x)
    torch.testing.assert_close(inside, plain, rtol=0, atol=0)


# errors ---------------------------------------------------------------------------------------------------------------

F, D, X = torch.zeros(4, 5), torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)
MASK = torch.ones(2, 2, dtype=torch.bool)
CU = torch.tensor([0, 6])
GRAD = D.clone().requires_grad_()


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((D, X[:1]), {}, ValueError, "activation has shape .1, 3, 5.*all but the last dimension must agree"),
        ((D[0, 0], X[0, 0]), {}, ValueError, r"grad_output has shape \[4\]; wanted \[n, t, o\], or packed"),
        ((D.int(), X), {}, TypeError, "grad_output has dtype int32; wanted float32"),
        ((D, X.to(torch.float8_e5m2)), {}, TypeError, "activation has dtype float8_e5m2"),
        ((D, X.to("meta")), {}, ValueError, "activation is on meta but grad_output is on cpu"),
        ((D, X), {"mask": MASK}, ValueError, r"mask has shape \[2, 2\]; wanted \[2, 3\] \(one per token\)"),
        ((D, X), {"mask": MASK.float()}, TypeError, "mask has dtype float32; wanted bool"),
        ((D[0], X[0]), {}, ValueError, "cu_seqlens is missing"),
        ((D, X), {"cu_seqlens": CU}, ValueError, r"must be packed; .*Pass grad_output.flatten\(0, 1\)"),
        ((D[0], X[0]), {"cu_seqlens": CU.float()}, TypeError, "cu_seqlens has dtype float32; wanted int32, int64"),
        ((D[0], X[0]), {"cu_seqlens": CU[None]}, ValueError, r"cu_seqlens has shape \[1, 2\]; wanted \[n \+ 1\]"),
        ((D[0], X[0]), {"cu_seqlens": CU.to("meta")}, ValueError, "cu_seqlens is on meta"),
        ((GRAD, X), {}, RuntimeError, "grad_output requires grad, but .* has no derivative"),
        ((D, X), {"backend": "cpuu"}, ValueError, "Did you mean 'cpu'"),
    ],
)
def test_bad_inputs_are_named_by_all_four(arguments, options, error, message):
    d, x = arguments
    calls = {
        "fisher_diag_": lambda: fisher_diag_(F.clone(), d, x, **options),
        "fisher_blocks_": lambda: fisher_blocks_(F[:1, :1].clone(), d, x, **options),
        "sample_norms": lambda: sample_norms(d, x, **options),
    }
    for name, call in calls.items():
        with pytest.raises(error, match=f"{name}: .*{message}"):
            call()
    first = {f"{key}1" if key in ("mask", "cu_seqlens") else key: value for key, value in options.items()}
    numbered = re.sub("(grad_output|activation|mask|cu_seqlens)", r"\g<1>1", message)
    with pytest.raises(error, match=f"sample_dots: .*{numbered}"):
        sample_dots(d, x, D, X, **first)


@pytest.mark.parametrize(
    "sums, options, error, message",
    [
        (F.T, {}, ValueError, r"fisher has shape \[5, 4\]; wanted \[4, 5\] \(\[out, in\]\)"),
        (F.half(), {}, TypeError, "fisher has dtype float16; wanted float32"),
        (F.to("meta"), {}, ValueError, "fisher is on meta but grad_output is on cpu"),
        (F.clone().requires_grad_(), {}, RuntimeError, "fisher requires grad"),
        (F, {"weight_grad": F.T}, ValueError, r"weight_grad has shape \[5, 4\]"),
        (F, {"weight_grad": F.double()}, TypeError, "weight_grad has dtype float64; wanted float32"),
        (F, {"weight_grad": F.to("meta")}, ValueError, "weight_grad is on meta"),
        (F, {"sample": "tokens"}, ValueError, "Did you mean 'token'"),
        (F, {"statistic": "squared"}, ValueError, "Did you mean 'square'"),
        (F, {"scale": float("nan")}, ValueError, "scale is nan; wanted a finite number"),
    ],
)
def test_bad_sums_are_named(sums, options, error, message):
    with pytest.raises(error, match=f"fisher_diag_: .*{message}"):
        fisher_diag_(sums, D, X, **options)
    with pytest.raises(error, match=f"fisher_blocks_: .*{message}".replace("fisher ", "blocks ").split(r" \(")[0]):
        fisher_blocks_(sums, D, X, block=(1, 1), **options)


def test_the_rest_of_errors():
    with pytest.raises(ValueError, match=r"blocks has shape \[4, 5\]; wanted \[2, 1\] .*in blocks of 2 x 8"):
        fisher_blocks_(F, D, X, block=(2, 8))
    with pytest.raises(ValueError, match="fisher_blocks_: block is 0; wanted at least 1"):
        fisher_blocks_(F, D, X, block=(0, 8))
    with pytest.raises(ValueError, match=r"fisher has shape \[4, 5\]; wanted \[1, 4, 5\] \(\[experts, out, in\]\)"):
        fisher_diag_(F, D[0], X[0], cu_seqlens=CU, segments=CU)
    with pytest.raises(ValueError, match=r"sample_dots: grad_output2 has shape \[6, 3\]; wanted \[6, 4\]"):
        sample_dots(D, X, D[..., :3], X)
    with pytest.raises(ValueError, match=r"sample_dots: activation2 is on meta but grad_output2 is on cpu"):
        sample_dots(D, X, D, X.to("meta"))
    with pytest.raises(RuntimeError, match="sample_dots: grad_output2 requires grad"):
        sample_dots(D, X, GRAD, X)
    with torch.no_grad():
        assert not fisher_diag_(F.clone(), GRAD, X).any()


# on a GPU -------------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("packed", [False, True])
def test_side_stream_and_graph_replay(packed):
    d, x = data(6, 70, 257, 129, torch.bfloat16, "cuda")
    how = {}
    if packed:
        d, x = d.flatten(0, 1), x.flatten(0, 1)
        how = {"cu_seqlens": torch.tensor([0, 100, 101, 420], device="cuda")}

    def step():
        return *every_sum(d, x, "triton", **how), sample_norms(d, x, backend="triton", **how)

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
def test_more_than_two_to_the_31_weights():
    o, i = 2**16 + 1, 2**15 + 3
    d, x = torch.zeros(1, 1, o, device="cuda"), torch.zeros(1, 1, i, device="cuda")
    d[..., -1], x[..., -2:] = 2.0, 3.0
    fisher = fisher_diag_(torch.zeros(o, i, device="cuda"), d, x, backend="triton")
    assert fisher[-1, -2:].tolist() == [36.0, 36.0]
    assert fisher.sum(dtype=torch.float64) == 72.0


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_inputs():
    n, t, o = 2**9 + 1, 2**8, 2**14 + 64
    d, x = (
        torch.zeros(n, t, o, dtype=torch.bfloat16, device="cuda"),
        torch.zeros(n, t, 16, dtype=torch.bfloat16, device="cuda"),
    )
    d[-1, -1, -1], x[-1, -1, -1] = 2.0, 3.0
    fisher = fisher_diag_(torch.zeros(o, 16, device="cuda"), d, x, backend="triton")
    assert fisher[-1, -1] == 36.0
    assert fisher.sum() == 36.0

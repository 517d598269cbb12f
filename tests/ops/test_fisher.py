"""What fisher_diag_ and fisher_blocks_ compute: against autograd in float64, one weight gradient a sample."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curvkern import fisher_blocks_, fisher_diag_
from curvkern.bench.cases import CASES
from curvkern.ops import fisher_cpu

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def gradients(grad_output, activation, samples):
    """[samples, o, i] by autograd through a linear layer; a sample is a list of token numbers of the flat input."""
    d, x = (y.double().cpu().flatten(0, -2) for y in (grad_output, activation))
    found = [torch.zeros(0, d.shape[1], x.shape[1], dtype=torch.float64)]
    for tokens in samples:
        weight = torch.zeros(d.shape[1], x.shape[1], dtype=torch.float64, requires_grad=True)
        (torch.nn.functional.linear(x[tokens], weight) * d[tokens]).sum().backward()
        found.append(weight.grad[None])
    return torch.cat(found)


def rows(n, t):
    return [list(range(r * t, (r + 1) * t)) for r in range(n)]


def data(n, t, o, i, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, t, k, generator=generator).to(dtype).to(device) for k in (o, i)]


def packed(tokens, o, i, dtype=torch.float32, device="cpu"):
    return [y[0] for y in data(1, tokens, o, i, dtype, device)]


def block_sums(x, block):
    """Sums over blocks of the last two dimensions, block by block."""
    sums = [[part.sum((-2, -1)) for part in strip.split(block[1], -1)] for strip in x.split(block[0], -2)]
    return torch.stack([torch.stack(line, -1) for line in sums], -2)


def int32(*values, device="cpu"):
    return torch.tensor(values, dtype=torch.int32, device=device)


@pytest.mark.parametrize("case", [c for c in CASES["fisher"] if c.size == "edge"], ids=str)
def test_every_case_is_as_exact_as_torch(case, backend, device, no_worse):
    (fisher, d, x), options = case.make(device)
    same = fisher_diag_(fisher.clone(), d, x, backend="reference", **options)
    exact = gradients(d, x, rows(*d.shape[:2])).square().sum(0)
    no_worse(fisher_diag_(fisher, d, x, backend=backend, **options).cpu(), same.cpu(), exact)


@pytest.mark.parametrize("statistic", ["square", "abs"])
@pytest.mark.parametrize("sample", ["sequence", "token", "batch"])
@pytest.mark.parametrize("dtypes", [(d, x) for d in FLOATS for x in FLOATS], ids=str)
def test_samples_statistics_and_the_gradient(sample, statistic, dtypes, backend, device, no_worse):
    (d, _), (_, x) = (data(3, 9, 20, 17, dtype, device) for dtype in dtypes)
    grads = gradients(d, x, {"sequence": rows(3, 9), "token": rows(27, 1), "batch": rows(1, 27)}[sample])
    f = torch.square if statistic == "square" else torch.abs
    results = []
    for name in (backend, "reference"):
        sums = [torch.ones(20, 17, device=device) for _ in range(2)]
        options = {"sample": sample, "statistic": statistic, "scale": 0.5, "weight_grad": sums[1], "backend": name}
        assert fisher_diag_(sums[0], d, x, **options) is sums[0]
        results.append([y.cpu() for y in sums])
    for got, same, exact in zip(*results, (1 + 0.5 * f(grads).sum(0), 1 + 0.5 * grads.sum(0)), strict=True):
        no_worse(got, same, exact)


# any shape ------------------------------------------------------------------------------------------------------------


@st.composite
def problems(draw):
    """(d, x, options, experts, samples): sample -> its expert and its kept tokens, found token by token."""
    o, i = draw(st.integers(1, 40)), draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["batch", "ragged", "experts"]))
    sample = draw(st.sampled_from(["sequence", "token", "batch"]))
    options = {"sample": sample, "statistic": draw(st.sampled_from(["square", "abs"]))}
    n, t = draw(st.integers(0, 5)), draw(st.integers(0, 20))
    tokens, seed = n * t, draw(st.integers(0, 99))
    dtypes = draw(st.sampled_from(FLOATS)), draw(st.sampled_from(FLOATS))
    d, x = (data(n, t, o, i, dtype, seed=seed)[k] for k, dtype in enumerate(dtypes))
    bounds, segments = [*range(0, tokens + 1, max(t, 1))], [0, tokens]
    cuts = st.lists(st.integers(0, tokens), min_size=1, max_size=6).map(sorted)
    if kind != "batch":
        d, x, bounds = d.flatten(0, 1), x.flatten(0, 1), draw(cuts)
        options["cu_seqlens"] = torch.tensor(bounds, dtype=draw(st.sampled_from([torch.int32, torch.int64])))
    if kind == "experts":
        segments = draw(cuts.filter(lambda s: len(s) > 1))
        options["segments"] = torch.tensor(segments)
    kept = torch.ones(tokens, dtype=torch.bool)
    if draw(st.booleans()):
        kept = torch.rand(tokens, generator=torch.Generator().manual_seed(seed)) < 0.7
        options["mask"] = kept.view(d.shape[:-1])
    samples = []
    for expert, (begin, end) in enumerate(pairwise(segments)):
        inside = [k for k in range(max(begin, bounds[0]), min(end, bounds[-1])) if kept[k]]
        if sample == "sequence":
            runs = [(a, b) for a, b in pairwise(bounds) if begin <= a < end]
            samples += [(expert, [k for k in range(a, b) if kept[k]]) for a, b in runs]
        else:
            samples += [(expert, s) for s in ([[k] for k in inside] if sample == "token" else [inside])]
    return d, x, options, (len(segments) - 1 if kind == "experts" else None), samples


def check_any(problem, block, with_grad, backend, device, no_worse):
    d, x, options, experts, samples = problem
    grads = gradients(d, x, [tokens for _, tokens in samples])
    f = torch.square if options["statistic"] == "square" else torch.abs
    exact = [torch.zeros(experts or 1, d.shape[-1], x.shape[-1], dtype=torch.float64) for _ in range(2)]
    for (expert, _), grad in zip(samples, grads, strict=True):
        exact[0][expert] += f(grad)
        exact[1][expert] += grad
    if block is not None:
        exact[0] = block_sums(exact[0], block)
    d, x = d.to(device), x.to(device)
    options = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    results = []
    for name in (backend, "reference"):
        sums = [torch.zeros_like(e if experts else e[0], dtype=torch.float32, device=device) for e in exact]
        how = {**options, "weight_grad": sums[1] if with_grad else None, "backend": name}
        if block is None:
            fisher_diag_(sums[0], d, x, **how)
        else:
            fisher_blocks_(sums[0], d, x, block=block, **how)
        results.append([y.cpu() for y in sums[: 1 + with_grad]])
    for got, same, e in zip(*results, exact[: 1 + with_grad], strict=True):
        no_worse(got, same, e.view(got.shape))


BLOCKS = st.none() | st.tuples(st.integers(1, 45), st.integers(1, 45))


ANY = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}  # ours keep no state


@given(problem=problems(), block=BLOCKS, with_grad=st.booleans())
@settings(max_examples=150, **ANY)
def test_any_shape_left_to_itself(problem, block, with_grad, device, no_worse):
    check_any(problem, block, with_grad, "auto", device, no_worse)


@given(problem=problems(), block=BLOCKS, with_grad=st.booleans())
@settings(max_examples=30, **ANY)
def test_any_shape_in_triton(problem, block, with_grad, device, no_worse):
    check_any(problem, block, with_grad, "triton", device, no_worse)


def test_the_square_of_a_batchs_mean_is_a_share_of_the_mean_square():
    """1 / B for gradients without a common direction, all of it for equal ones."""
    n, batches = 8, 200
    for equal, expected in ((False, 1 / n), (True, 1.0)):
        batch, sequence = torch.zeros(2, 12, 10)
        for seed in range(batches):
            d, x = data(n, 4, 12, 10, seed=seed)
            if equal:
                d, x = d[:1].expand(n, -1, -1), x[:1].expand(n, -1, -1)
            fisher_diag_(batch, d, x, sample="batch", scale=1 / n**2)
            fisher_diag_(sequence, d, x, scale=1 / n)
        # 200 squares of a normal number have a mean good to a tenth, that of 120 weights to a hundredth.
        assert float(batch.sum() / sequence.sum()) == pytest.approx(expected, rel=0.05 if not equal else 1e-5)


# blocks ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("t", [3, 30], ids=["short samples", "long samples"])
@pytest.mark.parametrize(
    "block", [(1, 17), (20, 1), (20, 17), (1, 1), (3, 5), (8, 16), (20, 4), (6, 17), (50, 60), (1, 99)], ids=str
)
def test_blocks_are_sums_of_the_diagonal(block, t, backend, device, no_worse):
    d, x = data(4, t, 20, 17, torch.bfloat16, device)
    exact = 1 + block_sums(gradients(d, x, rows(4, t)).square().sum(0), block)
    same, got = (torch.ones(exact.shape, device=device) for _ in range(2))
    fisher_blocks_(same, d, x, block=block, backend="reference")
    assert fisher_blocks_(got, d, x, block=block, backend=backend) is got
    no_worse(got.cpu(), same.cpu(), exact)


def test_grams_serve_where_they_are_cheaper(monkeypatch):
    """On a CPU: short samples, plain squares; never with a gradient to add, tokens as samples, or many blocks."""
    taken = []
    for name in ("_gram_blocks", "_native"):
        plain = getattr(fisher_cpu, name)
        monkeypatch.setattr(fisher_cpu, name, lambda *a, _name=name, _plain=plain: (taken.append(_name), _plain(*a))[1])

    def routes(t, block, **how):
        taken.clear()
        d, x = data(2, t, 64, 48)
        exact = block_sums(gradients(d, x, rows(*((2 * t, 1) if "sample" in how else (2, t)))).square().sum(0), block)
        blocks = torch.zeros(exact.shape)
        fisher_blocks_(blocks, d, x, block=block, backend="cpu", **how)
        torch.testing.assert_close(blocks.double(), exact, rtol=1e-5, atol=1e-4)
        return set(taken)

    for block in [(1, 48), (64, 1), (64, 48), (32, 24)]:
        assert routes(4, block) == {"_gram_blocks"}
        assert routes(60, block) == routes(4, block, sample="token") == {"_native"}
    assert routes(4, (64, 48), weight_grad=torch.zeros(64, 48)) == {"_native"}
    assert routes(4, (2, 2)) == {"_native"}


def test_squares_that_cancel_are_not_negative(backend, device):
    d, x = packed(8, 64, 48, device=device)
    d[4:], x[4:] = -d[:4], x[:4] * (1 + 1e-7)
    for block in [(1, 48), (64, 1), (64, 48), (32, 24)]:
        blocks = torch.zeros(-(-64 // block[0]), -(-48 // block[1]), device=device)
        assert (fisher_blocks_(blocks, d[None], x[None], block=block, backend=backend) >= 0).all()


# which tokens count ---------------------------------------------------------------------------------------------------


def test_masked_tokens_count_for_nothing_even_if_not_finite(backend, device):
    d, x = data(3, 9, 20, 17, device=device)
    mask = torch.rand(3, 18)[:, ::2].to(device) < 0.6
    samples = [[t for t in tokens if mask.reshape(-1)[t]] for tokens in rows(3, 9)]
    expected = gradients(d, x, samples).square().sum(0).float()
    d[~mask], x[~mask] = float("nan"), float("inf")
    got = fisher_diag_(torch.zeros(20, 17, device=device), d, x, mask=mask, backend=backend).cpu()
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    flat = torch.zeros(54, dtype=torch.bool, device=device)
    flat[::2] = mask.flatten()  # a mask with gaps in memory
    cu, d, x = int32(0, 9, 18, 27, device=device), d.flatten(0, 1), x.flatten(0, 1)
    again = torch.zeros(20, 17, device=device)
    fisher_diag_(again, d, x, cu_seqlens=cu, mask=flat[::2], backend=backend)
    torch.testing.assert_close(again.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_offsets_out_of_range_are_clamped_and_decreasing_ones_raised(backend, device):
    d, x = packed(21, 20, 17, device=device)
    expected = gradients(d, x, [[*range(6)], [*range(6, 21)]]).square().sum(0).float()
    got = torch.zeros(20, 17, device=device)
    fisher_diag_(got, d, x, cu_seqlens=int32(-5, 6, 2, 900, device=device), backend=backend)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


def test_experts_without_tokens_and_without_samples(backend, device):
    d, x = packed(16, 12, 10, device=device)
    grads = gradients(d, x, [[*range(4)], [4, 5], [6, 7, 8], [*range(9, 16)]]).square()
    expected = torch.stack([grads[:2].sum(0), torch.zeros(12, 10).double(), grads[2:].sum(0)]).float()
    how = {"cu_seqlens": int32(0, 4, 6, 9, 16, device=device), "segments": int32(0, 6, 6, 16, device=device)}
    got = fisher_diag_(torch.zeros(3, 12, 10, device=device), d, x, backend=backend, **how)
    torch.testing.assert_close(got.cpu(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("o, i, tokens, cu", [(0, 5, 6, (0, 6)), (5, 0, 6, (0, 6)), (4, 5, 0, (0, 0)), (4, 5, 6, (0,))])
def test_nothing_to_add_leaves_the_sums_alone(o, i, tokens, cu, backend, device):
    d, x = packed(tokens, o, i, device=device)
    for segments in (None, int32(0, tokens, device=device)):
        sums = [torch.ones(o, i, device=device)[None if segments is not None else ...] for _ in range(2)]
        how = {"cu_seqlens": int32(*cu, device=device), "segments": segments, "weight_grad": sums[1]}
        fisher_diag_(sums[0], d, x, backend=backend, **how)
        fisher_blocks_(sums[0], d, x, block=(1, 1), backend=backend, **how)
        assert all((y == 1).all() for y in sums)


def test_not_a_number_shows(backend, device):
    d, x = data(2, 5, 6, 7, device=device)
    d[1, 3, 2] = float("nan")
    fisher = fisher_diag_(torch.zeros(6, 7, device=device), d, x, backend=backend)
    assert fisher[2].isnan().all()
    assert fisher.isnan().sum() == 7
    assert fisher_blocks_(torch.zeros(1, 1, device=device), d, x, backend=backend).isnan()

import pytest
import torch

from curvkern import fisher_blocks_, fisher_diag_, sample_dots, sample_norms
from curvkern.bench.cases import CASES


def gradients(grad_output, activation, lengths=None):
    """Per-sample weight gradients by autograd through a linear layer, float64: independent of the reference."""
    rows = zip(grad_output, activation, strict=True)
    if lengths is not None:
        rows = zip(grad_output.split(lengths), activation.split(lengths), strict=True)
    out = []
    for d, x in rows:
        weight = torch.zeros(d.shape[-1], x.shape[-1], dtype=torch.float64, requires_grad=True)
        (torch.nn.functional.linear(x.double().cpu(), weight) * d.double().cpu()).sum().backward()
        out.append(weight.grad)
    return torch.stack(out)


def data(n, t, o, i, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(n * t + o)
    d, x = (torch.randn(n, t, k, generator=generator).to(dtype).to(device) for k in (o, i))
    return d, x


def close(got, exact):
    torch.testing.assert_close(got.double().cpu(), exact, rtol=2e-5, atol=2e-5 * float(exact.abs().max()))


@pytest.mark.parametrize("case", [c for c in CASES["fisher"] if c.size == "edge"], ids=str)
def test_every_case_matches_autograd(case, backend, device):
    (fisher, d, x), _ = case.make(device)
    expected = fisher.double().cpu().clone()
    if d.shape[0] and d.shape[1]:
        expected += gradients(d, x).square().sum(0)
    close(fisher_diag_(fisher, d, x, backend=backend), expected)


@pytest.mark.parametrize("statistic", ["square", "abs"])
@pytest.mark.parametrize("sample", ["sequence", "token", "batch"])
def test_samples_statistics_and_the_gradient_in_one_pass(sample, statistic, backend, device):
    d, x = data(3, 9, 20, 17, torch.bfloat16, device)
    shapes = {"sequence": (3, 9), "token": (27, 1), "batch": (1, 27)}[sample]
    grads = gradients(d.reshape(*shapes, 20), x.reshape(*shapes, 17))
    f = torch.square if statistic == "square" else torch.abs
    fisher, weight_grad = torch.ones(20, 17, device=device), torch.ones(20, 17, device=device)
    options = {"sample": sample, "statistic": statistic, "scale": 0.5, "weight_grad": weight_grad}
    close(fisher_diag_(fisher, d, x, backend=backend, **options), 1 + 0.5 * f(grads).sum(0))
    close(weight_grad, 1 + 0.5 * grads.sum(0))


def test_masked_tokens_count_for_nothing_even_if_not_finite(backend, device):
    d, x = data(3, 9, 20, 17, device=device)
    mask = torch.rand(3, 9, device=device) < 0.6
    kept = gradients(d * mask[..., None], x)
    d[~mask], x[~mask] = float("nan"), float("inf")
    close(fisher_diag_(torch.zeros(20, 17, device=device), d, x, mask=mask, backend=backend), kept.square().sum(0))
    if backend != "cpu":
        close(sample_norms(d, x, mask=mask, backend=backend), kept.square().sum((1, 2)))


def test_packed_sequences_and_blocks(backend, device):
    lengths = [5, 1, 12, 3]
    d, x = (t.flatten(0, 1) for t in data(3, 7, 20, 17, device=device))
    cu = torch.tensor([0, 5, 6, 18, 21], dtype=torch.int32, device=device)
    square = gradients(d, x, lengths).square().sum(0)
    close(fisher_diag_(torch.zeros(20, 17, device=device), d, x, cu_seqlens=cu, backend=backend), square)
    blocks = torch.zeros(3, 2, device=device)
    fisher_blocks_(blocks, d, x, block=(8, 16), cu_seqlens=cu, backend=backend)
    padded = torch.nn.functional.pad(square, (0, 15, 0, 4)).view(3, 8, 2, 16).sum((1, 3))
    close(blocks, padded)


def test_experts(backend, device):
    d, x = (t.flatten(0, 1) for t in data(2, 8, 12, 10, device=device))
    segments = torch.tensor([0, 6, 6, 16], dtype=torch.int32, device=device)
    cu = torch.tensor([0, 4, 6, 9, 16], dtype=torch.int32, device=device)
    grads = gradients(d, x, [4, 2, 3, 7]).square()
    expected = torch.stack([grads[:2].sum(0), torch.zeros(12, 10).double(), grads[2:].sum(0)])
    fisher = torch.zeros(3, 12, 10, device=device)
    close(fisher_diag_(fisher, d, x, cu_seqlens=cu, segments=segments, backend=backend), expected)


@pytest.mark.parametrize("t", [3, 40])
def test_norms_and_dots(t, device):
    (d1, x1), (d2, x2) = data(3, t, 12, 10, device=device), data(4, t, 12, 10, device=device)
    g1, g2 = gradients(d1, x1), gradients(d2, x2)
    close(sample_norms(d1, x1), g1.square().sum((1, 2)))
    close(sample_dots(d1, x1, d2, x2), torch.einsum("noi,moi->nm", g1, g2))


def test_compiled_and_same_bits_twice(backend, device):
    d, x = data(3, 9, 20, 17, device=device)
    eager = fisher_diag_(torch.zeros(20, 17, device=device), d, x, backend=backend)

    def step(fisher, d, x):
        return fisher_diag_(fisher, d, x, backend=backend)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    fisher = torch.zeros(20, 17, device=device)
    before = fisher._version
    assert torch.equal(compiled(fisher, d, x), eager)
    assert fisher._version > before


F, D, X = torch.zeros(4, 5), torch.zeros(2, 3, 4), torch.zeros(2, 3, 5)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((F.T, D, X), {}, ValueError, r"fisher has shape \[5, 4\]; wanted \[4, 5\]"),
        ((F, D, X[:1]), {}, ValueError, "all but the last dimension must agree"),
        ((F, D.int(), X), {}, TypeError, "grad_output has dtype int32"),
        ((F.half(), D, X), {}, TypeError, "fisher has dtype float16"),
        ((F, D, X.to("meta")), {}, ValueError, "activation is on meta"),
        ((F, D, X), {"sample": "tokens"}, ValueError, "Did you mean 'token'"),
        ((F, D, X), {"mask": torch.ones(2, 2, dtype=torch.bool)}, ValueError, r"mask has shape \[2, 2\]"),
        ((F, D[0], X[0]), {}, ValueError, "cu_seqlens is missing"),
        ((F, D.clone().requires_grad_(), X), {}, RuntimeError, "grad_output requires grad"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        fisher_diag_(*arguments, **options)

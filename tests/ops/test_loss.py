import pytest
import torch
from torch.nn.functional import cosine_similarity, cross_entropy

import curvkern
from curvkern import (
    hidden_cosine_loss,
    kl_to_reference,
    kl_to_reference_ref,
    weighted_cross_entropy,
    weighted_cross_entropy_ref,
)
from curvkern.bench.cases import CASES
from curvkern.ops import loss as module
from curvkern.ops import token_loss as rows

REFERENCES = {"weighted_cross_entropy": weighted_cross_entropy_ref, "kl_to_reference": kl_to_reference_ref}
NAN = float("nan")


@pytest.fixture(params=["reference", "triton"] if torch.cuda.is_available() else ["reference", "triton", "cpu"])
def backend(request):
    """Those this op has."""
    return request.param


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks, with a last one that is shorter, in every test."""
    monkeypatch.setattr(rows, "WIDENED", 80)
    monkeypatch.setattr(module, "CHUNK", 1000)


def wide(x):
    return x.detach().double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def with_gradients(function, args, options, backend=None):
    """The loss and its gradients in logits and, if there is one, lm_head."""
    args = (args[0].detach().requires_grad_(), *args[1:])
    options = {k: v.detach().requires_grad_() if k == "lm_head" else v for k, v in options.items()}
    leaves = [args[0], *(v for k, v in options.items() if k == "lm_head")]
    loss = function(*args, **options, **({"backend": backend} if backend else {}))
    return [loss.detach(), *torch.autograd.grad(3.0 * loss, leaves)]


@pytest.mark.parametrize("case", [c for c in CASES["loss"] if c.size == "edge"], ids=str)
def test_every_case_and_its_gradients_match_autograd_in_float64(case, backend, device, no_worse):
    args, options = case.make(device)
    reference = REFERENCES[case.function]
    exact = with_gradients(reference, [wide(a) for a in args], {k: wide(v) for k, v in options.items()})
    same = with_gradients(reference, args, options)
    got = with_gradients(getattr(curvkern, case.function), args, options, backend)
    for value, torchs, wanted, like in zip(got, same, exact, [None, args[0], options.get("lm_head")], strict=False):
        assert value.dtype == (torch.float32 if like is None else like.dtype)
        if backend == "triton" and device == "cpu" and case.dtype == torch.bfloat16:
            # The interpreter cuts off bfloat16 instead of rounding; the GPU rounds.
            no_worse(value, torchs, wanted, factor=4)
        else:
            no_worse(value, torchs, wanted)


@pytest.mark.parametrize("hidden", [False, True])
def test_float64_gradients_are_autograds(hidden, device):
    head = {"lm_head": torch.randn(11, 5, dtype=torch.float64, device=device)} if hidden else {}
    x = torch.randn(3, 4, 5 if hidden else 11, dtype=torch.float64, device=device)
    labels = torch.tensor([[0, -100, 3, 4], [10, 1, 1, -100], [2, 2, 9, 0]], device=device)
    weight = torch.randn(3, 4, device=device)
    for reduction in ("mean", "sum"):
        options = {**head, "reduction": reduction}
        pairs = [
            (weighted_cross_entropy, weighted_cross_entropy_ref, (x, labels, weight)),
            (kl_to_reference, kl_to_reference_ref, (x, torch.randn_like(x), labels != -100)),
        ]
        for function, reference, args in pairs:
            got, wanted = with_gradients(function, args, options), with_gradients(reference, args, options)
            for a, b in zip(got, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_equals_torchs_own_loss_where_it_has_one(backend, device):
    x, labels = torch.randn(9, 50, device=device), torch.randint(50, (9,), device=device)
    labels[4] = -100
    torch.testing.assert_close(weighted_cross_entropy(x, labels, backend=backend), cross_entropy(x, labels))
    y = torch.randn(9, 50, device=device)
    wanted = torch.nn.functional.kl_div(x.log_softmax(1), y.softmax(1), reduction="batchmean")
    torch.testing.assert_close(kl_to_reference(x, y, backend=backend), wanted)


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("kind", ["entropy", "kl"])
def test_what_does_not_count_may_be_anything(head, kind, backend, device):
    """NaN and infinity at ignored labels and zero weights: neither the loss nor any gradient sees them."""
    x, y = torch.randn(6, 7, device=device), torch.randn(6, 7, device=device)
    options = {"lm_head": torch.randn(40, 7, device=device)} if head else {}
    labels = torch.tensor([1, -100, 2, 3, -100, 0], device=device)
    weight = torch.tensor([1.0, NAN, -2.0, 0.0, 1.0, 0.5], device=device)
    poison = torch.tensor([False, True, False, kind == "entropy", True, False], device=device)

    def run(fill):
        a, b = (t.masked_fill(poison[:, None], fill) for t in (x, y))
        if kind == "entropy":
            return with_gradients(weighted_cross_entropy, (a, labels, weight), options, backend)
        return with_gradients(kl_to_reference, (a, b, labels != -100), options, backend)

    clean = run(0.0)
    assert not clean[1][poison].any()
    assert clean[1][~poison].any(1).all()
    for fill in (NAN, float("inf")):
        assert all(torch.equal(a, b) for a, b in zip(run(fill), clean, strict=True))


def test_nothing_counts(backend, device):
    x = torch.full((3, 5), NAN, device=device)
    for loss, grad in (
        with_gradients(weighted_cross_entropy, (x, torch.full((3,), -100, device=device)), {}, backend),
        with_gradients(kl_to_reference, (x, x, torch.zeros(3, dtype=torch.bool, device=device)), {}, backend),
    ):
        assert loss == 0
        assert not grad.any()


def test_words_that_cannot_be_said_and_labels_that_do_not_exist(backend, device):
    inf = float("inf")
    x = torch.tensor([[0.0, -inf, 1.0]], device=device)
    assert kl_to_reference(x, x, backend=backend) == 0
    assert kl_to_reference(x, torch.zeros(1, 3, device=device), backend=backend) == inf
    wanted = (x[:, ::2].softmax(1) * (x[:, ::2].log_softmax(1) + 3**0.5)).sum() - 3**0.5 + torch.tensor(3.0).log()
    torch.testing.assert_close(kl_to_reference(torch.zeros(1, 3, device=device), x, backend=backend), wanted)
    assert weighted_cross_entropy(x, torch.tensor([1], device=device), backend=backend) == inf
    for label in (3, -1):
        assert weighted_cross_entropy(x, torch.tensor([label], device=device), backend=backend).isnan()


def test_far_logits_do_not_overflow(backend, device):
    x = torch.tensor([[3e38, -3e38, 3e38], [-1e9, -1e9, -1e9]], device=device)
    loss, grad = with_gradients(weighted_cross_entropy, (x, torch.tensor([0, 1], device=device)), {}, backend)
    torch.testing.assert_close(loss, (torch.tensor(2.0).log() + torch.tensor(3.0).log()).to(device) / 2)
    assert grad.isfinite().all()


def test_star_dss_is_a_weighted_cross_entropy(backend, device):
    """V CE + (1 - V) lambda (log pi - log pi_ref)^2 / 2 has the gradient of weights V - (1 - V) lambda (difference)."""
    x, y = (torch.randn(8, 12, device=device, dtype=torch.float64) for _ in range(2))
    labels, v = torch.randint(12, (8,), device=device), 0.3 * torch.rand(8, device=device, dtype=torch.float64)
    x.requires_grad_()
    gap = (x.log_softmax(1) - y.log_softmax(1)).gather(1, labels[:, None])[:, 0]
    loss = (v * cross_entropy(x, labels, reduction="none") + (1 - v) * 0.5 * gap.square() / 2).mean()
    wanted = torch.autograd.grad(loss, x)[0]
    weight = (v - (1 - v) * 0.5 * gap).detach()
    assert (weight < 0).any()
    got = with_gradients(weighted_cross_entropy, (x.float(), labels, weight), {}, backend)[1]
    torch.testing.assert_close(got, 3 * wanted.float())


def test_overwrite_puts_the_gradient_where_the_logits_were(backend, device):
    x, labels = torch.randn(6, 9, device=device), torch.randint(9, (6,), device=device)
    wanted = with_gradients(weighted_cross_entropy, (x, labels), {}, backend)[1]
    leaf = x.clone().requires_grad_()
    logits = leaf * 1
    loss = weighted_cross_entropy(logits, labels, overwrite=True, backend=backend)
    loss.backward(retain_graph=True)
    torch.testing.assert_close(leaf.grad, wanted / 3)
    torch.testing.assert_close(logits.detach(), wanted / 3)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_wide_copy_of_the_logits(monkeypatch):
    """Whatever is allocated on the way is smaller than the logits in float32; from hidden states than in bfloat16."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            given = [t for t in (*args, *(kwargs or {}).values()) if type(t) is torch.Tensor]
            inputs = {t.untyped_storage().data_ptr() for t in given}
            for t in out if isinstance(out, tuple | list) else (out,):
                if isinstance(t, torch.Tensor) and t.untyped_storage().data_ptr() not in inputs:
                    sizes.append(t.untyped_storage().nbytes())
            return out

    monkeypatch.setattr(rows, "WIDENED", 1 << 12)
    monkeypatch.setattr(module, "CHUNK", 1 << 14)
    tokens, vocab = 256, 512
    labels = torch.randint(vocab, (tokens,))
    logits = torch.randn(tokens, vocab).bfloat16()
    with Watch():
        with_gradients(weighted_cross_entropy, (logits, labels), {})
        with_gradients(kl_to_reference, (logits, logits.flip(0)), {})
    assert max(sizes) == tokens * vocab * 2  # the gradient itself, in bfloat16
    sizes.clear()
    hidden, head = torch.randn(tokens, 8).bfloat16(), torch.randn(vocab, 8).bfloat16()
    with Watch():
        with_gradients(weighted_cross_entropy, (hidden, labels), {"lm_head": head})
    assert max(sizes) <= vocab * 8 * 4  # the head's gradient in float32
    assert sizes


def test_shapes_strides_and_slices(backend, device):
    x, labels = torch.randn(2, 5, 31, device=device), torch.randint(31, (2, 5), device=device)
    wanted = weighted_cross_entropy(x.reshape(10, 31), labels.reshape(10), backend=backend)
    assert weighted_cross_entropy(x, labels, backend=backend) == wanted
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    torch.testing.assert_close(weighted_cross_entropy(strided, labels, backend=backend), wanted)
    padded = torch.randn(2, 5, 40, device=device)
    padded[..., 3:34] = x
    grads = [with_gradients(weighted_cross_entropy, (t, labels), {}, backend)[1] for t in (x, padded[..., 3:34])]
    torch.testing.assert_close(*grads)


def test_compiled_without_a_graph_break(backend, device):
    labels, mask = torch.randint(31, (6,), device=device), torch.tensor([1, 1, 0, 1, 1, 1], device=device).bool()
    y = torch.randn(6, 31, device=device)

    def step(x, head, h):
        loss = weighted_cross_entropy(x, labels, labels - 15.0, backend=backend)
        loss = loss + kl_to_reference(x, y, mask, backend=backend)
        return loss + weighted_cross_entropy(h, labels, lm_head=head, backend=backend)

    leaves = [torch.randn(s, device=device, requires_grad=True) for s in ((6, 31), (31, 4), (6, 4))]
    eager = step(*leaves)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(*leaves)
    torch.testing.assert_close(compiled, eager)
    for a, b in zip(*(torch.autograd.grad(loss, leaves) for loss in (compiled, eager)), strict=True):
        torch.testing.assert_close(a, b)


def test_opcheck(device):
    x, y, labels = torch.randn(4, 9, device=device), torch.randn(4, 9, device=device), torch.arange(4, device=device)
    ops = torch.ops.curvkern
    torch.library.opcheck(ops.token_loss.default, (x, labels, None, "auto"))
    torch.library.opcheck(ops.token_loss.default, (x, None, y, "auto"))
    lse = [torch.stack([t.amax(1), (t - t.amax(1, keepdim=True)).exp().sum(1).log()]) for t in (x, y)]
    scale = torch.ones(4, device=device)
    torch.library.opcheck(ops.token_grad_.default, (x.clone(), x, labels, y, *lse, scale, "auto"))


def test_same_bits_twice_and_full_precision_under_autocast(backend, device):
    x, labels = torch.randn(7, 5, device=device), torch.randint(33, (7,), device=device)
    options = {"lm_head": torch.randn(33, 5, device=device)}
    runs = [with_gradients(weighted_cross_entropy, (x, labels), options, backend) for _ in range(2)]
    with torch.autocast(device, dtype=torch.bfloat16):
        runs.append(with_gradients(weighted_cross_entropy, (x, labels), options, backend))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


# hidden_cosine_loss ---------------------------------------------------------------------------------------------------


def test_hidden_cosine(device):
    h, anchor = torch.randn(4, 6, 9, device=device), torch.randn(9, device=device)
    wanted = -cosine_similarity(h[:, -1].mean(0), anchor, dim=0)
    torch.testing.assert_close(hidden_cosine_loss(h, anchor), wanted)
    torch.testing.assert_close(hidden_cosine_loss(h[:, -1], anchor), wanted)
    right = torch.arange(6, device=device) < torch.tensor([[6], [1], [3], [5]], device=device)
    last = h[torch.arange(4), torch.tensor([5, 0, 2, 4])]
    wanted = -cosine_similarity(last.mean(0), anchor, dim=0)
    torch.testing.assert_close(hidden_cosine_loss(h, anchor, mask=right), wanted)
    torch.testing.assert_close(hidden_cosine_loss(h, anchor, mask=right.flip(1)), hidden_cosine_loss(h, anchor))


def test_hidden_cosine_gradient_is_the_formula(device):
    h = torch.randn(5, 8, device=device, dtype=torch.float64, requires_grad=True)
    a = torch.randn(8, device=device, dtype=torch.float64)
    hidden_cosine_loss(h, a).backward()
    mean = h.detach().mean(0)
    cosine = cosine_similarity(mean, a, dim=0)
    wanted = -(a / (mean.norm() * a.norm()) - cosine * mean / mean.norm() ** 2) / 5
    torch.testing.assert_close(h.grad, wanted.expand(5, 8))
    assert hidden_cosine_loss(torch.randn(3, 8).bfloat16(), torch.zeros(8)) == 0


X, L = torch.zeros(4, 6), torch.zeros(4, dtype=torch.int64)
HEAD = torch.zeros(6, 3)


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda: weighted_cross_entropy(X, L[:3]), ValueError, r"labels has shape \[3\]; wanted \[4\] \(one a token\)"),
        (lambda: weighted_cross_entropy(X, L.int()), TypeError, "labels has dtype int32; wanted int64"),
        (lambda: weighted_cross_entropy(X, L, L), TypeError, "weight has dtype int64; wanted float32"),
        (lambda: weighted_cross_entropy(X, L, X[:3, 0]), ValueError, r"weight has shape \[3\]"),
        (lambda: weighted_cross_entropy(X, L, X[:, 0].clone().requires_grad_()), RuntimeError, "weight requires grad"),
        (lambda: weighted_cross_entropy(X.int(), L), TypeError, "logits has dtype int32"),
        (lambda: weighted_cross_entropy(X, L, reduction="man"), ValueError, "Did you mean 'mean'"),
        (lambda: weighted_cross_entropy(X, L, lm_head=HEAD), ValueError, r"has shape \[6, 3\]; wanted \[6, 6\]"),
        (lambda: weighted_cross_entropy(X[:, :3], L, lm_head=HEAD.half()), TypeError, "lm_head has dtype float16"),
        (lambda: weighted_cross_entropy(X, L.to("meta")), ValueError, "labels is on meta but logits is on cpu"),
        (lambda: weighted_cross_entropy(X[0, 0], L[0]), ValueError, r"wanted logits \[..., vocabulary\]"),
        (lambda: weighted_cross_entropy(X.clone().requires_grad_(), L, overwrite=True), ValueError, "no leaf"),
        (lambda: weighted_cross_entropy(X, L, backend="cuda13"), ValueError, "Did you mean 'cuda'"),
        (lambda: kl_to_reference(X, X[:3]), ValueError, r"reference has shape \[3, 6\] but logits has \[4, 6\]"),
        (lambda: kl_to_reference(X, X, L), TypeError, "mask has dtype int64; wanted bool"),
        (lambda: kl_to_reference(X, X.clone().requires_grad_()), RuntimeError, "reference requires grad"),
        (
            lambda: kl_to_reference(X[:, :3], X[:, :2], lm_head=HEAD, reference_head=HEAD),
            ValueError,
            r"reference_head has shape \[6, 3\]; wanted \[6, 2\]",
        ),
        (lambda: hidden_cosine_loss(X, X[0, :3]), ValueError, r"anchor has shape \[3\]; wanted \[6\]"),
        (lambda: hidden_cosine_loss(X[:0], X[0]), ValueError, "wanted .* not empty"),
        (lambda: hidden_cosine_loss(X, X[0], mask=L.bool()), ValueError, r"mask has shape \[4\]"),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_float64_runs_on_the_reference_only():
    with pytest.raises(curvkern.BackendError, match="float64 runs on the reference only"):
        weighted_cross_entropy(X.double(), L, backend="triton")


@pytest.mark.gpu
def test_graph_replay():
    x, labels = torch.randn(65, 5000, device="cuda"), torch.randint(5000, (65,), device="cuda")
    wanted = weighted_cross_entropy(x, labels, backend="triton")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = weighted_cross_entropy(x, labels, backend="triton")
    got.zero_()
    graph.replay()
    assert torch.equal(got, wanted)


@pytest.mark.gpu
@pytest.mark.slow
def test_more_than_two_to_the_31_logits():
    x = torch.zeros(17000, 128256, dtype=torch.bfloat16, device="cuda").requires_grad_()
    labels = torch.full((17000,), -100, device="cuda")
    labels[-1] = 5
    loss = weighted_cross_entropy(x, labels, backend="triton")
    torch.testing.assert_close(loss.detach(), torch.tensor(128256.0, device="cuda").log())
    loss.backward()
    assert x.grad[-1, 5] == torch.tensor(1 / 128256 - 1).bfloat16()
    assert not x.grad[:-1].any()

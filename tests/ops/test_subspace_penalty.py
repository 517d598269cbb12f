import pytest
import torch

from curvkern import alignment_penalty, alignment_penalty_ref
from curvkern.ops import delta


@pytest.fixture
def small_blocks(monkeypatch):
    """Row blocks of a few rows, so that small matrices have many."""
    plain = delta.row_slices
    monkeypatch.setattr(delta, "row_slices", lambda matrix, dtype, limit=0: plain(matrix, dtype, 2000))


def weights(o, i, dtype=torch.float32, device="cpu", *, delta=0.1):
    aligned = torch.randn(o, i)
    return aligned.to(dtype).to(device), (aligned + delta * torch.randn(o, i)).to(dtype).to(device)


def factors(o, i, r, device="cpu", dtype=torch.float32):
    return torch.randn(o, r, dtype=dtype, device=device), torch.randn(r, i, dtype=dtype, device=device)


def both(o, i, kind, dtype=torch.float64):
    """aligned and base, or a basis."""
    if kind == "weights":
        return dict(zip(("aligned", "base"), weights(o, i, dtype, delta=1.0), strict=True))
    return {"basis": torch.linalg.qr(torch.randn(o, 5, dtype=dtype)).Q}


@pytest.mark.parametrize("kind", ["weights", "basis"])
def test_penalty_and_gradients_equal_autograd_of_the_dense_form(kind, small_blocks):
    where = both(20, 30, kind)
    B, A = (f.requires_grad_() for f in factors(20, 30, 4, dtype=torch.float64))
    value, dense = alignment_penalty(B, A, **where), alignment_penalty_ref(B, A, **where)
    torch.testing.assert_close(value, dense, rtol=1e-12, atol=0)
    ours, theirs = torch.autograd.grad(3 * value, (B, A)), torch.autograd.grad(3 * dense, (B, A))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["weights", "basis"])
def test_penalty_gradcheck(kind):
    where = both(6, 7, kind)
    B, A = (f.requires_grad_() for f in factors(6, 7, 2, dtype=torch.float64))
    assert torch.autograd.gradcheck(lambda B, A: alignment_penalty(B, A, **where), (B, A))
    assert torch.autograd.gradcheck(lambda A: alignment_penalty(B.detach(), A, **where), (A,))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("kind", ["weights", "basis"])
def test_penalty_compiled_and_under_autocast(kind, autocast, device):
    where = {name: t.to(device) for name, t in both(33, 20, kind, torch.float32).items()}
    B, A = (f.to(torch.bfloat16).requires_grad_() for f in factors(33, 20, 4, device))

    def penalty(B, A):
        return alignment_penalty(B, A, **where)

    exact = penalty(B.double(), A.double())
    exact_grads = torch.autograd.grad(exact, (B, A))
    for function in (penalty, torch.compile(penalty, fullgraph=True, backend="aot_eager")):
        with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
            value = function(B, A)
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, exact.float(), rtol=1e-5, atol=0)
        grads = torch.autograd.grad(value, (B, A))
        assert [g.dtype for g in grads] == [torch.bfloat16] * 2
        torch.testing.assert_close(grads, exact_grads, rtol=0.01, atol=1e-3 * exact_grads[0].abs().max().item())


def test_penalty_in_triton(device):
    aligned, base = weights(40, 30, torch.bfloat16, device)
    B, A = (f.requires_grad_() for f in factors(40, 30, 3, device))
    results = {}
    for backend in ("triton", "reference"):
        value = alignment_penalty(B, A, aligned, base, backend=backend)
        results[backend] = (value, *torch.autograd.grad(value, (B, A)))
    torch.testing.assert_close(results["triton"], results["reference"], rtol=1e-5, atol=1e-4)

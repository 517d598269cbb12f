import pytest
import torch

import curvkern
from curvkern import delta_floor, project_, project_ref, subspace_basis

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    """Every backend this op has."""
    return request.param


def decaying(o, i, *, rate=0.7, seed=0):
    """V with singular values rate^k, and its left singular vectors."""
    generator = torch.Generator().manual_seed(seed)
    k = min(o, i)
    left = torch.linalg.qr(torch.randn(o, k, dtype=torch.float64, generator=generator)).Q
    right = torch.linalg.qr(torch.randn(i, k, dtype=torch.float64, generator=generator)).Q
    return left * rate ** torch.arange(k) @ right.T, left


def projector(u):
    return u.double() @ u.double().T


@pytest.mark.parametrize("o, i, rank", [(60, 40, 1), (40, 60, 10), (24, 24, 24), (130, 20, 7)])
def test_basis_spans_the_leading_directions(o, i, rank, backend, device):
    v, left = decaying(o, i)
    u = subspace_basis(v.float().to(device), torch.zeros(o, i, device=device), rank, backend=backend).cpu()
    assert u.shape == (o, rank)
    assert (u.T @ u - torch.eye(rank)).abs().max() < 1e-5
    assert (projector(u) - projector(left[:, :rank])).abs().max() < 1e-3
    assert (u[:, 0].double() @ left[:, 0]).abs() > 0.9999
    p = projector(u)
    assert (p @ p - p).abs().max() < 1e-6


def test_basis_in_float64_and_what_power_and_oversample_buy():
    v, left = decaying(80, 60, rate=0.9)
    zero, truth = torch.zeros_like(v), projector(left[:, :10])
    gap = [
        (projector(subspace_basis(v, zero, 10, oversample=p, power=q)) - truth).norm().item()
        for p, q in ((0, 0), (8, 0), (8, 2), (8, 12))
    ]
    assert gap == sorted(gap, reverse=True)
    assert gap[-1] < 1e-6
    full = subspace_basis(v, zero, 60)
    assert full.dtype == torch.float64
    assert (full.T @ full - torch.eye(60)).abs().max() < 1e-13


@pytest.mark.parametrize("scale", [1.0, 1e-4])
def test_basis_of_a_low_rank_delta_has_zero_columns(scale):
    v = scale * torch.randn(90, 5) @ torch.randn(5, 70)
    u = subspace_basis(v, torch.zeros_like(v), 12)
    assert (u.norm(dim=0) > 0).tolist() == [True] * 5 + [False] * 7
    assert (project_(v.clone(), u) - v).norm() < 1e-5 * v.norm()


def test_the_seed_decides_the_basis():
    aligned, base = torch.randn(64, 48).bfloat16(), torch.randn(64, 48).bfloat16()
    first = subspace_basis(aligned, base, 4, power=0, seed=1)
    torch.manual_seed(99)
    assert torch.equal(subspace_basis(aligned, base, 4, power=0, seed=1), first)
    assert not torch.equal(subspace_basis(aligned, base, 4, power=0, seed=2), first)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_projection_is_idempotent_and_its_parts_add_up(dtype, backend, device):
    v, _ = decaying(70, 50)
    u = subspace_basis(v.float().to(device), torch.zeros(70, 50, device=device), 6)
    x = torch.randn(70, 9, device=device).to(dtype)
    inside = project_(x.clone(), u, backend=backend)
    outside = project_(x.clone(), u, complement=True, backend=backend)
    ulp = 2 * torch.finfo(dtype).eps * x.abs().max().item()
    torch.testing.assert_close(inside + outside, x, rtol=0, atol=2 * ulp)
    torch.testing.assert_close(project_(inside.clone(), u, backend=backend), inside, rtol=0, atol=2 * ulp)
    assert project_(inside.clone(), u, complement=True, backend=backend).abs().max() <= 2 * ulp
    torch.testing.assert_close(project_(x.clone(), u, scale=-2.0, backend=backend), -2 * inside, rtol=0, atol=4 * ulp)


def test_projection_edits_in_place(backend, device):
    storage = torch.randn(400, device=device)
    x, u = storage[7:127].view(40, 3), torch.linalg.qr(torch.randn(40, 4)).Q.to(device)
    before, version = storage.clone(), storage._version
    expected = x.clone()
    project_ref(expected, u, True, 0.5)
    assert project_(x, u, complement=True, scale=0.5, backend=backend) is x
    assert storage._version > version
    torch.testing.assert_close(x, expected)
    assert torch.equal(storage[:7], before[:7])
    assert torch.equal(storage[127:], before[127:])


def test_projection_of_a_transposed_view(device):
    x = torch.randn(5, 40, device=device).T
    u = torch.linalg.qr(torch.randn(40, 4)).Q.to(device)
    expected = u @ (u.T @ x)
    torch.testing.assert_close(project_(x, u), expected)
    with pytest.raises(curvkern.BackendError, match="x is not contiguous"):
        project_(x, u, backend="triton")


@pytest.mark.parametrize("dtype, zeros, error", [(torch.bfloat16, 0.30, 0.46), (torch.float16, 0.045, 0.06)])
def test_delta_floor_of_rounded_checkpoints(dtype, zeros, error):
    base = 0.02 * torch.randn(500, 500)
    delta = 1e-4 * torch.randn(500, 500)
    aligned, stored = (base + delta).to(dtype), base.to(dtype)
    assert delta_floor(aligned, stored).item() == pytest.approx(zeros, abs=0.02)
    rounded = aligned.float() - stored.float()
    assert ((rounded - delta).norm() / delta.norm()).item() == pytest.approx(error, abs=0.02)
    assert delta_floor(base + delta, base) < 1e-3
    assert delta_floor(base[:0], base[:0]) == 0
    with pytest.raises(ValueError, match=r"delta_floor: base has shape \[500\]"):
        delta_floor(base, base[0])

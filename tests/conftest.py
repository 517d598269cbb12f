"""Shared by all tests: Triton's interpreter where there is no GPU, poisoned memory, seeds, tolerances."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton

DEVICE = "cuda" if HAS_GPU else "cpu"

#: Every backend that can run here by name. On a CPU, Triton is its interpreter.
BACKENDS = ["reference", "triton", "cuda"] if HAS_GPU else ["reference", "triton", "cpu"]


def pytest_collection_modifyitems(items):
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no NVIDIA GPU here"))
        if "slow" in item.keywords and os.environ.get("CURVKERN_SLOW") != "1":
            item.add_marker(pytest.mark.skip(reason="slow: set CURVKERN_SLOW=1"))


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch):
    """torch.empty returns NaN and odd numbers, so that an output left unwritten is seen."""

    def poison(tensor):
        if tensor.is_floating_point():
            tensor.fill_(float("nan"))
        elif tensor.dtype not in (torch.bool,):
            tensor.fill_(119)
        return tensor

    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, _plain=plain, **k: poison(_plain(*a, **k)))


@pytest.fixture(params=BACKENDS)
def backend(request):
    return request.param


@pytest.fixture
def device():
    return DEVICE


def assert_no_worse_than_torch(got, same_dtype, exact, *, factor=2.0):
    """The error against float64 is at most twice that of the same-dtype torch reference, plus a few roundings."""
    exact = exact.double()
    error = (got.double() - exact).abs().max().item() if exact.numel() else 0.0
    allowed = (same_dtype.double() - exact).abs().max().item() if exact.numel() else 0.0
    scale = exact.abs().max().item() if exact.numel() else 0.0
    limit = factor * allowed + 4 * torch.finfo(got.dtype).eps * scale
    assert error <= limit, f"error {error:.3e} against float64; torch's own is {allowed:.3e}, the limit {limit:.3e}"


@pytest.fixture
def no_worse():
    return assert_no_worse_than_torch

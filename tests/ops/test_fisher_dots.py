"""What sample_norms and sample_dots compute: against the gradients themselves, in float64."""

from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from curvkern import sample_dots, sample_norms
from curvkern.ops import sample_products

FLOATS = [torch.float32, torch.float16, torch.bfloat16]


def data(n, t, o, i, dtypes=(torch.float32, torch.float32), device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(n, t, k, generator=generator).to(dtype).to(device) for k, dtype in zip((o, i), dtypes, strict=True)
    ]


def gradients(grad_output, activation, kept=None):
    """[n, o, i] in float64; only of the tokens kept."""
    d, x = grad_output.double().cpu(), activation.double().cpu()
    return torch.einsum("nto,nti->noi", d if kept is None else d * kept.cpu()[..., None], x)


def inner(g1, g2):
    return torch.einsum("noi,moi->nm", g1, g2)


def no_worse_than_reference(function, arguments, exact, backend, no_worse, *, size=0.0, **how):
    got, same = (function(*arguments, backend=name, **how) for name in (backend, "reference"))
    assert (got.dtype, got.shape) == (torch.float32, exact.shape)
    no_worse(got.cpu(), same.cpu(), exact, size=size)


@pytest.mark.parametrize("t", [1, 3, 70], ids=lambda t: f"t{t}")
@pytest.mark.parametrize("dtypes", [(d, d) for d in FLOATS] + [(torch.bfloat16, torch.float16)], ids=str)
def test_grams_and_tiles_of_the_gradient(t, dtypes, backend, device, no_worse):
    """At 12 x 10, Grams up to 5 tokens."""
    one, two = data(3, t, 12, 10, dtypes, device), data(4, t + 1, 12, 10, dtypes, device, seed=1)
    g1, g2 = gradients(*one), gradients(*two)
    no_worse_than_reference(sample_norms, one, g1.square().sum((1, 2)), backend, no_worse)
    no_worse_than_reference(sample_dots, (*one, *two), inner(g1, g2), backend, no_worse)


SIDES = st.integers(1, 40)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@given(n1=st.integers(0, 4), n2=st.integers(0, 4), t1=st.integers(0, 20), t2=st.integers(0, 20), o=SIDES, i=SIDES,
       dtypes=st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)), masked=st.booleans(),
       packed=st.booleans())  # fmt: skip
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_shape(backend, n1, n2, t1, t2, o, i, dtypes, masked, packed, device, no_worse):
    arguments, how, grads = [], {}, []
    for number, n, t in (("1", n1, t1), ("2", n2, t2)):
        d, x = data(n, t, o, i, dtypes, device, seed=t)
        kept = torch.rand(n, t, generator=torch.Generator().manual_seed(n)).to(device) < 0.6 if masked else None
        grads.append(gradients(d, x, kept))
        if packed:  # with a token before and after that belongs to no sample
            d, x = (torch.cat([y.new_ones(1, y.shape[2]), y.flatten(0, 1), y.new_ones(1, y.shape[2])]) for y in (d, x))
            kept = None if kept is None else torch.nn.functional.pad(kept.flatten(), (1, 1), value=True)
            how["cu_seqlens" + number] = torch.arange(n + 1, dtype=torch.int32, device=device) * t + 1
        arguments += [d, x]
        how["mask" + number] = kept
    alone = {name[:-1]: value for name, value in how.items() if name.endswith("1")}
    no_worse_than_reference(sample_norms, arguments[:2], grads[0].square().sum((1, 2)), backend, no_worse, **alone)
    size = inner(*(g.square() for g in grads)).sqrt()
    size = size.max().item() if size.numel() else 0.0
    no_worse_than_reference(sample_dots, arguments, inner(*grads), backend, no_worse, size=size, **how)


def test_lengths_that_differ(backend, device, no_worse):
    d, x = (y[0] for y in data(1, 150, 12, 10, device=device))
    edges = [0, 3, 3, 100, 101, 150]
    cu = torch.tensor(edges, device=device)
    grads = torch.stack([d[a:b].double().T @ x[a:b].double() for a, b in pairwise(edges)]).cpu()
    no_worse_than_reference(sample_norms, (d, x), grads.square().sum((1, 2)), backend, no_worse, cu_seqlens=cu)
    offsets = {"cu_seqlens1": cu, "cu_seqlens2": cu[:4]}
    no_worse_than_reference(sample_dots, (d, x, d, x), inner(grads, grads[:3]), backend, no_worse, **offsets)


def test_masked_tokens_count_for_nothing_even_if_not_finite(backend, device):
    for t in (4, 40):
        d, x = data(3, t, 12, 10, device=device)
        mask = torch.rand(3, 2 * t)[:, ::2].to(device) < 0.6
        grads = gradients(d, x, mask)
        d[~mask], x[~mask] = float("nan"), float("inf")
        norms = sample_norms(d, x, mask=mask, backend=backend).cpu()
        torch.testing.assert_close(norms, grads.square().sum((1, 2)).float(), rtol=1e-5, atol=1e-4)
        dots = sample_dots(d, x, d, x, mask1=mask, mask2=mask, backend=backend).cpu()
        torch.testing.assert_close(dots, inner(grads, grads).float(), rtol=1e-5, atol=1e-4)


def test_gradients_that_cancel_have_no_negative_norm(backend, device):
    d, x = data(5, 4, 30, 20, device=device)
    d, x = torch.cat((d, -d), 1), torch.cat((x, x * (1 + 1e-7)), 1)
    assert (sample_norms(d, x, backend=backend) >= 0).all()


def test_not_a_number_shows(backend, device):
    d, x = data(3, 4, 12, 10, device=device)
    d[1, 2, 3] = float("nan")
    assert sample_norms(d, x, backend=backend).isnan().tolist() == [False, True, False]
    nan = sample_dots(d, x, d, x, backend=backend).isnan().cpu()
    assert torch.equal(nan, torch.tensor([[0, 1, 0], [1, 1, 1], [0, 1, 0]]).bool())


def test_both_ways_to_dots_on_a_cpu(monkeypatch):
    """Grams while the tokens are few beside o i; else all gradients, of a few rows at a time."""
    monkeypatch.setattr(sample_products, "_BUFFER", 500)
    for t in (2, 50):
        one, two = data(3, t, 40, 20), data(4, t, 40, 20, seed=1)
        exact = inner(gradients(*one), gradients(*two)).float()
        torch.testing.assert_close(sample_dots(*one, *two, backend="cpu"), exact, rtol=1e-5, atol=1e-3)


def test_strides_and_odd_offsets(backend, device):
    d, x = data(3, 6, 12, 10, device=device)
    plain = sample_norms(d, x, backend=backend), sample_dots(d, x, d, x, backend=backend)
    gaps = torch.randn(3, 6, 25, device=device)[:, :, 1::2]
    gaps[:] = d
    shifted = torch.randn(3 * 6 * 10 + 3, device=device)[3:].view(3, 6, 10)
    shifted[:] = x
    across = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for other in (shifted, across):
        got = sample_norms(gaps, other, backend=backend), sample_dots(gaps, other, d, x, backend=backend)
        torch.testing.assert_close(got, plain, rtol=1e-5, atol=1e-4)  # torch's products sum in an order of their own


def test_backends_agree_and_repeat_themselves(device):
    one, two = data(3, 30, 24, 18, device=device), data(4, 7, 24, 18, device=device, seed=1)
    names = ["reference", "triton"] + ["cpu"] * (device == "cpu")
    runs = [[(sample_norms(*one, backend=b), sample_dots(*one, *two, backend=b)) for b in names] for _ in range(2)]
    for first, again in zip(*runs, strict=True):
        assert torch.equal(first[0], again[0])
        assert torch.equal(first[1], again[1])
        torch.testing.assert_close(first, runs[0][0], rtol=1e-5, atol=1e-4)

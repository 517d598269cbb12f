import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from curvkern.bench.cases import CASES
from curvkern.ops import inverse_factor, obs_sweep_, obs_sweep_ref


@pytest.fixture(params=["reference", "triton", "cpu"])
def backend(request, device):
    if request.param == "cpu" and device != "cpu":
        pytest.skip("the tensors are on a GPU")
    return request.param


def problem(o, i, share=0.4, dtype=torch.float64):
    """(delta, mask, U, H): H is what U is the factor of the inverse of."""
    x = torch.randn(3 * i + 2, i, dtype=torch.float64) @ torch.randn(i, i, dtype=torch.float64)
    h = x.T @ x / len(x)
    u, report = inverse_factor(h)
    h.diagonal().add_(report.damping * float(h.diagonal().mean()))
    return torch.randn(o, i, dtype=torch.float64).to(dtype), torch.rand(o, i) < share, u.to(dtype), h


def rise(h, change):
    return float((change.double() @ h * change.double()).sum())


@pytest.mark.parametrize("case", [c for c in CASES["obs"] if c.size == "edge"], ids=str)
def test_every_case_is_as_exact_as_torch(case, backend, device, no_worse):
    (delta, mask, factor), _ = case.make(device)
    same, exact = delta.clone(), delta.double()
    obs_sweep_ref(same, mask, factor)
    obs_sweep_ref(exact, mask, factor.double())
    got = obs_sweep_(delta, mask, factor, backend=backend)
    assert got is delta
    no_worse(got, same, exact, factor=4.0)  # panels add up in another order
    assert not got[mask].any()


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 20), st.integers(1, 40), st.integers(1, 50), st.booleans(), st.data())
@pytest.mark.parametrize("backend", ["reference", "triton", "cpu"])
def test_any_shape_block_and_target(backend, o, i, block, to_target, data):
    torch.manual_seed(data.draw(st.integers(0, 99)))
    delta, mask, u, _ = problem(o, i)
    target = torch.randn(o, i, dtype=torch.float64) if to_target else None
    exact = delta.clone()
    obs_sweep_ref(exact, mask, u, target)
    small = None if target is None else target.float()
    got = obs_sweep_(delta.float(), mask, u.float(), target=small, block=block, backend=backend)
    torch.testing.assert_close(got.double(), exact, rtol=1e-4, atol=1e-4 * float(exact.abs().max()))
    wanted = torch.zeros(o, i) if small is None else small
    assert torch.equal(got[mask], wanted[mask])


def test_a_prefix_is_the_constrained_optimum():
    """Of all changes that fix the first columns, the one of least tr(D H D^T)."""
    delta, _, u, h = problem(6, 15)
    mask = torch.zeros(6, 15, dtype=torch.bool)
    mask[:, :5] = True
    target = torch.randn(6, 15, dtype=torch.float64)
    got = obs_sweep_(delta.clone(), mask, u, target=target, block=4)
    step = torch.zeros_like(delta)
    step[:, :5] = (target - delta)[:, :5]
    step[:, 5:] = -step[:, :5] @ h[:5, 5:] @ torch.linalg.inv(h[5:, 5:])
    torch.testing.assert_close(got, delta + step)


def test_rows_with_prefixes_of_their_own_are_never_worse_than_fixing_alone():
    for seed in range(5):
        torch.manual_seed(seed)
        delta, _, u, h = problem(8, 24)
        mask = torch.arange(24) < torch.randint(0, 25, (8, 1))
        got = obs_sweep_(delta.clone(), mask, u)
        for row in range(8):
            alone = torch.where(mask, -delta, 0.0)[row : row + 1]
            assert rise(h, (got - delta)[row : row + 1]) <= rise(h, alone) * (1 + 1e-9)


def optimum(delta, mask, h):
    """Of all changes that fix the masked entries at 0, the one of least tr(D H D^T), row by row."""
    best = delta.masked_fill(mask, 0)
    for at, fixed in enumerate(mask):
        free = ~fixed
        best[at, free] += torch.linalg.solve(h[free][:, free], h[free][:, fixed] @ delta[at, fixed])
    return best


def test_a_suffix_is_fixed_alone_unless_it_goes_first():
    """Nothing to its right is free to make up for it."""
    delta, _, u, h = problem(6, 15)
    mask = (torch.arange(15) >= 9).expand(6, 15).contiguous()
    alone = delta.masked_fill(mask, 0)
    for block in (4, 128):
        assert torch.equal(obs_sweep_(delta.clone(), mask, u, block=block), alone)
    got = obs_sweep_(delta.clone(), mask, u, order="fixed_first")
    torch.testing.assert_close(got, optimum(delta, mask, h))


def test_a_scattered_mask_lies_between_fixing_alone_and_the_optimum():
    delta, mask, u, h = problem(32, 24)
    got = obs_sweep_(delta.clone(), mask, u)
    lost = [rise(h, x - delta) for x in (optimum(delta, mask, h), got, delta.masked_fill(mask, 0))]
    assert lost[0] < 0.99 * lost[1] < 0.99 * lost[2]


@pytest.mark.parametrize("dtype, error", [(torch.float64, 1e-13), (torch.float32, 1e-5)], ids=str)
def test_the_size_of_blocks_does_not_matter(dtype, error):
    delta, mask, u, _ = problem(16, 60, dtype=dtype)
    whole = obs_sweep_(delta.clone(), mask, u, block=60)
    for block in (1, 7, 16, 59):
        got = obs_sweep_(delta.clone(), mask, u, block=block)
        assert (got - whole).abs().max() < error * whole.abs().max()


@pytest.mark.parametrize("order", ["natural", "fixed_first"])
def test_scattered_masks_gain_on_the_whole(order):
    for seed in range(5):
        torch.manual_seed(seed)
        delta, mask, u, h = problem(32, 24, share=0.3)
        got = obs_sweep_(delta.clone(), mask, u, order=order)
        assert not got[mask].any()
        assert rise(h, got - delta) < rise(h, torch.where(mask, -delta, 0.0))


def test_fixed_first_is_optimal_where_whole_columns_are_fixed():
    delta, _, u, h = problem(5, 12)
    mask = torch.zeros(5, 12, dtype=torch.bool)
    fixed, free = [2, 7, 11], [j for j in range(12) if j not in (2, 7, 11)]
    mask[:, fixed] = True
    got = obs_sweep_(delta.clone(), mask, u, order="fixed_first")
    expected = delta.clone()
    expected[:, fixed] = 0
    expected[:, free] += delta[:, fixed] @ h[fixed][:, free] @ torch.linalg.inv(h[free][:, free])
    torch.testing.assert_close(got, expected)
    natural = obs_sweep_(delta.clone(), mask, u)
    assert rise(h, got - delta) < rise(h, natural - delta)


def test_a_mask_decided_panel_by_panel_sees_what_earlier_panels_left(backend, device):
    delta, _, u, _ = problem(6, 20, dtype=torch.float32)
    seen = []

    def smallest(columns, values):
        seen.append((columns, values.clone()))
        return values.abs() < values.abs().median()

    got = obs_sweep_(delta.clone(), smallest, u, block=8, backend=backend)
    assert [s.start for s, _ in seen] == [0, 8, 16]
    mask = torch.cat([values.abs() < values.abs().median() for _, values in seen], 1)
    torch.testing.assert_close(obs_sweep_(delta.clone(), mask, u, block=8, backend=backend), got)
    untouched = obs_sweep_(delta.clone(), mask & (torch.arange(20) < 8), u, block=8, backend=backend)
    torch.testing.assert_close(seen[1][1], untouched[:, 8:16])


def test_the_same_bits_twice_and_compiled(backend, device):
    delta, mask, u, _ = problem(9, 30, dtype=torch.float32)

    def step(delta, mask, u):
        return obs_sweep_(delta, mask, u, block=8, backend=backend)

    first, second = (step(delta.clone(), mask, u) for _ in range(2))
    assert torch.equal(first, second)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    target = delta.clone()
    before = target._version
    torch.testing.assert_close(compiled(target, mask, u), first)
    assert target._version > before


def test_opcheck(backend):
    delta, mask, u, _ = problem(5, 6, dtype=torch.float32)
    arguments = (delta, torch.zeros(5, 6), mask, None, u, backend)
    torch.library.opcheck(torch.ops.curvkern.obs_panel_.default, arguments)


def test_a_slice_of_a_wider_matrix(backend):
    delta, mask, u, _ = problem(7, 12, dtype=torch.float32)
    whole = torch.randn(7, 20)
    whole[:, 3:15] = delta
    around = whole.clone()
    obs_sweep_(whole[:, 3:15], mask, u, backend=backend)
    torch.testing.assert_close(whole[:, 3:15], obs_sweep_(delta.clone(), mask, u, backend=backend))
    around[:, 3:15] = whole[:, 3:15]
    assert torch.equal(around, whole)


D, M, U = torch.zeros(4, 6), torch.zeros(4, 6, dtype=torch.bool), torch.eye(6)


@pytest.mark.parametrize(
    "arguments, options, error, message",
    [
        ((D.half(), M, U), {}, TypeError, "obs_sweep_: delta has dtype float16"),
        ((D[0], M, U), {}, ValueError, r"delta has shape \[6\]; wanted \[o, i\]"),
        ((D, M[:3], U), {}, ValueError, r"mask has shape \[3, 6\]"),
        ((D, M.float(), U), {}, TypeError, "mask has dtype float32"),
        ((D, M, U[:5, :5]), {}, ValueError, r"inverse_factor has shape \[5, 5\]; wanted \[6, 6\]"),
        ((D, M, U.double()), {}, TypeError, "inverse_factor has dtype float64"),
        ((D, M, U), {"target": D[:2]}, ValueError, r"target has shape \[2, 6\]"),
        ((D, M, U), {"block": 0}, ValueError, "block is 0"),
        ((D, M, U), {"order": "first"}, ValueError, "order is 'first'"),
        ((D, lambda s, v: v > 0, U), {"order": "fixed_first"}, ValueError, "mask is a function"),
        ((D, lambda s, v: v, U), {}, TypeError, "what mask returns has dtype float32"),
        ((D, M, U.to("meta")), {}, ValueError, "inverse_factor is on meta"),
        ((D.clone().requires_grad_(), M, U), {}, RuntimeError, "delta requires grad"),
    ],
)
def test_bad_arguments_are_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        obs_sweep_(*arguments, **options)

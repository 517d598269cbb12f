"""Shares and sums against brute force and a plain derivation in float64; the budget; the whole pass."""

import pytest
import torch
from modules import made_module, made_modules

import curvkern
from curvkern.checkpoint import Checkpoint
from curvkern.methods import MethodError, Module, make
from curvkern.methods.budgeted import (
    SAFETY_FISHER,
    SAFETY_GRADIENT,
    TASK_FISHER,
    TASK_GRADIENT,
    TASK_GRAM,
    Plan,
    terms_of,
)

BOTH = pytest.mark.parametrize("interactions", ["bound", "ignored"])


def changes(modules, shares, interactions):
    """(S, T) in float64, straight from the definition."""
    safety, fall, pull, alone = 0.0, 0.0, 0.0, 0.0
    for m in modules:
        d, share = m.tuned.double() - m.aligned.double(), shares[m.name].double()
        g_s, f_s, g_t, f_t = (
            m.statistics[need].double() for need in (SAFETY_GRADIENT, SAFETY_FISHER, TASK_GRADIENT, TASK_FISHER)
        )
        safety += float((-share * g_s * d + share**2 / 2 * f_s * d**2).sum())
        fall += float((share * g_t * d).sum())
        pull += float((share * d.abs() * f_t.sqrt()).sum())
        alone += float((share**2 * f_t * d**2).sum())
    return safety, (pull**2 if interactions == "bound" else alone) / 2 - fall


def shares_of(method, modules, plan):
    return {m.name: terms_of(m, plan).share(plan.price, hard=method.hard) for m in modules}


def planned(modules, **parameters):
    lines = []
    method = make("budgeted", {"reach": 1e9, "sparsity": 0, **parameters})
    return method, method.plan(lambda: modules, None, lines.append), lines


def only(modules, **signs):
    """The modules with safety and task gradients of given sign along d."""
    needs = {"safety": SAFETY_GRADIENT, "task": TASK_GRADIENT}
    for m in modules:
        for name, sign in signs.items():
            m.statistics[needs[name]].copy_(sign * (m.tuned - m.aligned).sign() * m.statistics[needs[name]].abs())
    return modules


@pytest.fixture
def modules():
    return only(made_modules(make("budgeted", {})), safety=1)


@BOTH
@pytest.mark.parametrize("extra", [0.0, 0.05])
@pytest.mark.parametrize("price", [0.0, 0.3, 0.99, 1.0])
def test_a_share_is_the_best_of_a_fine_grid(modules, interactions, price, extra):
    terms = terms_of(modules[0], Plan(scale=3.0 if interactions == "bound" else None, extra=extra))
    fall = (1 - price) * terms.safety_fall + price * terms.task_fall
    curve = (1 - price) * terms.safety_curve + price * (terms.task_curve + extra)
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)[:, None, None]
    value = -grid * fall.double() + grid**2 / 2 * curve.double()
    best = grid.flatten()[value.argmin(0)]
    torch.testing.assert_close(terms.share(price, hard=False).double(), best, rtol=0, atol=2.6e-4)
    flips = terms.share(price, hard=True)
    assert torch.equal(flips, (value[-1] < value[0]).float())


@BOTH
@pytest.mark.parametrize("sparsity", [0, 8])
def test_the_predicted_rise_equals_the_budget(modules, interactions, sparsity):
    _, most = changes(modules, {m.name: torch.ones_like(m.tuned) for m in modules}, interactions)
    for budget in (0.01 * most, 0.2 * most):
        method, plan, _ = planned(modules, budget=budget, interactions=interactions, hard=False, sparsity=sparsity)
        _, task = changes(modules, shares_of(method, modules, plan), interactions)
        assert task == pytest.approx(budget, rel=1e-4)


def test_no_other_shares_of_that_rise_lower_the_safety_loss_more(modules):
    method, plan, _ = planned(modules, budget=0.5, hard=False, interactions="ignored")
    best, rise = changes(modules, shares_of(method, modules, plan), "ignored")
    generator = torch.Generator().manual_seed(4)
    for scale in (0.01, 0.1, 0.5):
        for _ in range(20):
            noise = {m.name: scale * torch.randn(m.tuned.shape, generator=generator) for m in modules}
            tried = {name: (s + noise[name]).clamp(0, 1) for name, s in shares_of(method, modules, plan).items()}
            safety, task = changes(modules, tried, "ignored")
            assert safety >= best - 1e-6 or task > rise


def test_hard_decisions_stay_below_the_budget_by_one_weight(modules):
    ones = {m.name: torch.ones_like(m.tuned) for m in modules}
    budget = 0.1 * changes(modules, ones, "bound")[1]
    method, plan, _ = planned(modules, budget=budget, hard=True)
    shares = shares_of(method, modules, plan)
    assert {float(x) for share in shares.values() for x in share.unique()} == {0.0, 1.0}
    _, task = changes(modules, shares, "bound")
    # Another weight adds its pull times that of all, and its own fall.
    largest = max(float((t.task_pull * plan.scale + t.task_fall.abs()).max()) for t in map(terms_of, modules))
    assert budget - largest <= task <= budget
    for m in modules:
        edit = method.edit(m, plan)
        flipped = shares[m.name].bool()
        assert torch.equal(edit.weight, torch.where(flipped, m.aligned, m.tuned))
        assert edit.selected == int(flipped.sum())


def test_the_bound_holds_for_gradients_that_pull_together(modules):
    """Per-sample gradients, any shares: the mean of (sum of G d share)^2 / 2 is at most the predicted curvature."""
    m = modules[0]
    each = torch.randn(7, *m.tuned.shape, dtype=torch.float64) + 2
    statistics = {**m.statistics, TASK_FISHER: each.square().mean(0).float(), TASK_GRADIENT: 0 * m.tuned}
    m = Module(m.name, 0, m.kind, m.tuned, m.aligned, statistics=statistics)
    costs = Plan(scale=float(terms_of(m).task_pull.double().sum()))
    d = (m.tuned - m.aligned).double()
    for share in (torch.ones_like(m.tuned), torch.rand(m.tuned.shape), (d > 0).float(), (d > 0.2).float()):
        exact = 0.5 * (each * d * share).sum((1, 2)).square().mean()
        _, together = changes([m], {m.name: share}, "bound")
        assert terms_of(m, costs).task(share) * (1 + 1e-6) >= together >= exact * (1 - 1e-6)
    assert terms_of(m).task((d > 0).float()) < 0.5 * (each * d * (d > 0)).sum((1, 2)).square().mean()


@BOTH
def test_sparsity_is_a_price_for_each_weight(modules, interactions):
    """So many times what the mean weight costs, of those that fine-tuning moved."""
    modules[0].tuned[:, 0] = modules[0].aligned[:, 0]
    _, plan, _ = planned(modules, budget=0.5, interactions=interactions, sparsity=5)
    ones = {m.name: torch.ones_like(m.tuned) for m in modules}
    whole = 2 * changes(only(modules, task=0), ones, interactions)[1]
    moved = sum(int((m.tuned != m.aligned).sum()) for m in modules)
    assert plan.extra == pytest.approx(5 * whole / moved, rel=1e-5)


def test_a_sparse_choice_takes_fewer_weights_to_the_same_fall(modules):
    found = {}
    for sparsity in (0, 8):
        _, plan, _ = planned(modules, budget=1e9, reach=0.5, sparsity=sparsity)
        shares = {m.name: terms_of(m, plan).share(plan.price, hard=True) for m in modules}
        found[sparsity] = (sum(int(s.sum()) for s in shares.values()), *changes(modules, shares, "bound"))
    (many, far, cheap), (few, fell, dear) = found[0], found[8]
    assert few < many
    assert fell == pytest.approx(far, rel=0.05)
    assert dear > cheap


def test_an_endless_budget_is_safety_alone(modules):
    method, plan, _ = planned(modules, budget=1e9, hard=False, reach=1e9)
    assert plan.price == 0.0
    for m in modules:
        d = (m.tuned - m.aligned).double()
        alone = (m.statistics[SAFETY_GRADIENT] * d / (m.statistics[SAFETY_FISHER] * d**2)).clamp(0, 1)
        expected = m.tuned.double() - alone * d
        torch.testing.assert_close(method.edit(m, plan).weight.double(), expected, rtol=1e-5, atol=1e-6)


def test_without_a_budget_only_what_costs_nothing_moves(modules):
    only(modules, task=-1)  # any step back costs the task
    method, plan, _ = planned(modules, budget=0.0)
    assert all(torch.equal(method.edit(m, plan).weight, m.tuned) for m in modules)
    only(modules, task=1)
    method, plan, _ = planned(modules, budget=0.0, hard=False)
    assert changes(modules, shares_of(method, modules, plan), "bound")[1] == pytest.approx(0, abs=1e-3)
    assert plan.price < 1


def test_reach_stops_before_the_budget_does(modules):
    whole = sum(float((m.statistics[SAFETY_GRADIENT] * (m.tuned - m.aligned)).sum()) for m in modules)
    largest = max(float((m.statistics[SAFETY_GRADIENT] * (m.tuned - m.aligned)).max()) for m in modules)
    for hard, step in ((False, 1e-5 * whole), (True, largest)):
        method, plan, _ = planned(modules, budget=1e9, reach=0.25, hard=hard)
        safety, _ = changes(modules, shares_of(method, modules, plan), "bound")
        assert 0.25 * whole - step <= -safety <= 0.25 * whole * (1 + 1e-6)


def test_a_model_that_is_safer_than_the_aligned_one_is_left_alone(modules):
    only(modules, safety=-1)
    method, plan, lines = planned(modules)
    assert plan.price is None
    assert method.edit(modules[0], plan).weight is None
    assert "all stays as tuned" in lines[0]


def test_compensation_keeps_the_outputs_on_task_inputs_closer(modules):
    method, plan, _ = planned(modules, budget=2.0)
    method = make("budgeted", {"compensate": True})
    m = made_module(method, seed=0)
    only([m], safety=1)
    plain, compensated = (make("budgeted", {"compensate": c}).edit(m, plan).weight for c in (False, True))
    moved = plain != m.tuned
    assert torch.equal(compensated[moved], m.aligned[moved])
    harm = [float(((w - m.tuned) @ m.statistics[TASK_GRAM] * (w - m.tuned)).sum()) for w in (plain, compensated)]
    assert harm[1] < harm[0]


@pytest.mark.parametrize(
    "parameters, message",
    [
        ({"budget": -1}, "budgeted: budget is -1: .*greater than or equal to 0"),
        ({"reach": 0}, "budgeted: reach is 0"),
        ({"interactions": "all"}, "interactions is 'all'"),
        ({"lam": 2}, "unknown parameter 'lam'"),
    ],
)
def test_wrong_parameters(parameters, message):
    with pytest.raises(MethodError, match=message):
        make("budgeted", parameters)


def test_nan_is_named(modules):
    modules[1].tuned[0, 0] = float("nan")
    with pytest.raises(MethodError, match="not finite"):
        planned(modules)


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_end_to_end(family, tmp_path, tuned):
    data = {"safety": family / "task.jsonl", "task": family / "harmful.jsonl"}
    report = curvkern.restore(family / "aligned", family / tuned, method="budgeted", out=tmp_path / "out", **data)
    assert [stage.name for stage in report.stages] == ["open", "statistics", "plan", "edit", "finish"]
    assert 0 < report.changed < report.weights
    assert report.saved == "checkpoint"
    with Checkpoint.open(family / "aligned") as aligned, Checkpoint.open(tmp_path / "out") as out:
        name = next(m.name for m in report.modules if m.changed)
        changed = next(m.changed for m in report.modules if m.name == name)
        assert int((out.read(name) == aligned.read(name)).sum()) >= changed

"""Shares and sums against brute force and a plain derivation in float64; the budget; the steps; the whole pass."""

import gc
import weakref
from dataclasses import replace

import pytest
import torch
from modules import made_module, made_modules

import curvkern
from curvkern.checkpoint import Checkpoint
from curvkern.curvature import estimate, from_answer
from curvkern.evaluate import load, read_jsonl
from curvkern.methods import MethodError, Module, make
from curvkern.methods.budgeted import (
    ALIGNED_LOSS,
    SAFETY_FISHER,
    SAFETY_GRADIENT,
    TASK_FISHER,
    TASK_GRADIENT,
    TASK_GRAM,
    Plan,
    terms_of,
)
from curvkern.ops import pack_mask, unpack_mask
from curvkern.restore import stream

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


class Given:
    """Modules, and the losses (safety, task) that are measured of them one time after the other; the aligned has 0."""

    def __init__(self, modules, *losses):
        self.modules, self.losses, self.asked = modules, list(losses), []
        self.bits = {}

    def __call__(self):
        safety, task = self.losses[0]
        losses = {SAFETY_GRADIENT: safety, TASK_GRADIENT: task, ALIGNED_LOSS: 0.0}
        for m in self.modules:
            yield replace(m, losses=losses, tuned=torch.where(self.back(m), m.aligned, m.tuned))

    def back(self, m):
        bits = self.bits.get(m.name)
        return torch.zeros(m.tuned.shape, dtype=torch.bool) if bits is None else unpack_mask(bits, m.tuned.shape)

    def rolled_back(self, bits):
        self.asked.append(bits)
        self.losses.pop(0)
        self.bits = bits
        return self


def shares_of(method, modules, plan):
    if method.hard:
        return {m.name: unpack_mask(plan.bits[m.name], m.tuned.shape).float() for m in modules}
    return {m.name: terms_of(m, plan.scale, plan.extra).share(plan.price, hard=False) for m in modules}


def planned(modules, **parameters):
    """One step; ``reach`` is in nats."""
    lines = []
    method = make("budgeted", {"reach": 1e9, "sparsity": 0, "rounds": 1, **parameters})
    return method, method.plan(Given(modules, (1.0, 0.0)), None, lines.append), lines


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
    terms = terms_of(modules[0], 3.0 if interactions == "bound" else None, extra)
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
        assert 0.99 * budget <= task <= budget * (1 + 1e-6)


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
    scale = sum(float(t.task_pull.sum()) for t in map(terms_of, modules))
    largest = max(float((t.task_pull * scale + t.task_fall.abs()).max()) for t in map(terms_of, modules))
    assert 0.99 * budget - largest <= task <= budget
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
    scale = float(terms_of(m).task_pull.double().sum())
    d = (m.tuned - m.aligned).double()
    for share in (torch.ones_like(m.tuned), torch.rand(m.tuned.shape), (d > 0).float(), (d > 0.2).float()):
        exact = 0.5 * (each * d * share).sum((1, 2)).square().mean()
        _, together = changes([m], {m.name: share}, "bound")
        assert terms_of(m, scale).task(share) * (1 + 1e-6) >= together >= exact * (1 - 1e-6)
    assert terms_of(m).task((d > 0).float()) < 0.5 * (each * d * (d > 0)).sum((1, 2)).square().mean()


@BOTH
def test_sparsity_is_a_price_for_each_weight(modules, interactions):
    """So many times what the mean weight costs, of those that fine-tuning moved."""
    modules[0].tuned[:, 0] = modules[0].aligned[:, 0]
    _, plan, _ = planned(modules, budget=0.5, interactions=interactions, sparsity=5, hard=False)
    ones = {m.name: torch.ones_like(m.tuned) for m in modules}
    whole = 2 * changes(only(modules, task=0), ones, interactions)[1]
    moved = sum(int((m.tuned != m.aligned).sum()) for m in modules)
    assert plan.extra == pytest.approx(5 * whole / moved, rel=1e-5)


def test_a_sparse_choice_takes_fewer_weights_to_the_same_fall(modules):
    whole = sum(float((m.statistics[SAFETY_GRADIENT] * (m.tuned - m.aligned)).sum()) for m in modules)
    found = {}
    for sparsity in (0, 8):
        method, plan, _ = planned(modules, budget=1e9, reach=0.5 * whole, sparsity=sparsity)
        shares = shares_of(method, modules, plan)
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
        method, plan, _ = planned(modules, budget=1e9, reach=0.25 * whole, hard=hard)
        safety, _ = changes(modules, shares_of(method, modules, plan), "bound")
        assert 0.2475 * whole - step <= -safety <= 0.25 * whole * (1 + 1e-6)


def test_a_model_that_is_as_safe_as_the_aligned_one_is_left_alone(modules):
    lines = []
    method = make("budgeted", {})
    plan = method.plan(Given(modules, (0.0, 1.0)), None, lines.append)
    assert all(method.edit(m, plan).weight is None for m in modules)
    assert "all stays as tuned" in lines[-1]


def test_a_step_begins_where_the_last_one_ended_and_has_what_is_left(modules):
    """Three steps are three plans of one step, each of what the one before left and with the rest of the limits."""
    falls = (8.0, 0.0), (3.0, 0.02), (1.0, 0.03)
    parameters = {"budget": 0.5, "reach": 0.5, "rounds": 3}
    given = Given(modules, *falls)
    plan = make("budgeted", parameters).plan(given, None, [].append)
    assert [bits.keys() for bits in given.asked] == 2 * [{m.name for m in modules}]
    bits = {}
    for safety, task in falls:
        now = Given(modules, (safety, task))
        now.bits = bits
        alone = make("budgeted", {**parameters, "budget": 0.5 - task, "rounds": 1}).plan(now, None, [].append)
        assert any(alone.bits[m.name].any() for m in modules)
        old = {m.name: bits.get(m.name, torch.zeros_like(alone.bits[m.name])) for m in modules}
        assert all(not (old[name] & alone.bits[name]).any() for name in old)  # what went back stays
        bits = {name: old[name] | alone.bits[name] for name in old}
    assert all(torch.equal(bits[name], plan.bits[name]) for name in bits)


def test_a_step_beyond_the_budget_is_taken_back_and_tried_at_half(modules):
    lines = []
    given = Given(modules, (8.0, 0.0), (3.0, 0.6), (8.0, 0.0), (2.0, 0.2))
    plan = make("budgeted", {"budget": 0.5, "rounds": 3, "reach": 0.5}).plan(given, None, lines.append)
    first, none, second = given.asked
    assert none == {}
    half = make("budgeted", {"budget": 0.25, "rounds": 1, "reach": 0.25}).plan(
        Given(modules, (8.0, 0.0)), None, [].append
    )
    for m in modules:
        assert torch.equal(second[m.name], half.bits[m.name])
        assert torch.equal(plan.bits[m.name] & second[m.name], second[m.name])
    assert sum(int(b.count_nonzero()) for b in second.values()) < sum(int(b.count_nonzero()) for b in first.values())
    assert "taken back" in " ".join(lines)


def test_a_step_that_makes_the_model_less_safe_is_taken_back(modules):
    given = Given(modules, (8.0, 0.0), (20.0, 0.1), (8.0, 0.0), (6.0, 0.0))
    method = make("budgeted", {"budget": 0.5, "rounds": 3, "reach": 0.5})
    plan = method.plan(given, None, [].append)
    assert [bool(bits) for bits in given.asked] == [True, False, True]
    kept = given.asked[2]
    assert all(torch.equal(plan.bits[name] & kept[name], kept[name]) for name in kept)


def test_what_is_free_goes_without_a_budget_and_no_step_is_measured_twice(modules):
    """The first weight is good for both losses; the second costs the task far more than it is worth."""
    ones = torch.ones(1, 1000)
    found = {need: torch.zeros(1, 1000) for need in make("budgeted", {}).statistics()}
    found[SAFETY_GRADIENT][0, :2] = torch.tensor([5.0, 0.1])
    found[TASK_GRADIENT][0] = -1
    found[TASK_GRADIENT][0, :2] = torch.tensor([2.0, -50.0])
    found[TASK_FISHER] += 1e-9
    m = Module(modules[0].name, 0, "up_proj", ones, 0 * ones, statistics=found)
    given = Given([m], (8.0, 0.0), (7.0, 0.0))
    plan = make("budgeted", {"budget": 0.0}).plan(given, None, [].append)
    assert unpack_mask(plan.bits[m.name], m.tuned.shape)[0].nonzero().flatten().tolist() == [0]
    assert len(given.asked) == 1


@pytest.mark.parametrize("after", [(0.07, 0.1), (3.0, 0.499)])
def test_it_ends_where_the_way_is_gone_or_the_budget_used(modules, after):
    given = Given(modules, (8.0, 0.0), after)
    plan = make("budgeted", {"budget": 0.5, "rounds": 5}).plan(given, None, [].append)
    assert plan.bits is given.asked[0]
    assert len(given.asked) == 1


def test_compensation_keeps_the_outputs_on_task_inputs_closer(modules):
    m = only([made_module(make("budgeted", {"compensate": True}), seed=0)], safety=1)[0]
    plan = Plan(bits={m.name: pack_mask(m.statistics[SAFETY_GRADIENT] > 0.5)})
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
        ({"rounds": 0}, "budgeted: rounds is 0"),
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


def losses_of(path, data):
    """Mean summed losses of the responses, of a model in memory."""
    model, tokenizer = load(path)
    texts = [from_answer(tokenizer, row.asked(), row.response) for row in read_jsonl(data)]
    return estimate(model, texts, quantity="gradient", loss="token_sum").mean_loss


@pytest.mark.parametrize("tuned", ["tuned", "adapter"])
def test_end_to_end_steps_are_restorations_of_what_the_last_one_left(family, tmp_path, tuned):
    data = {"safety": family / "task.jsonl", "task": family / "harmful.jsonl"}

    def restored(model, name, **parameters):
        out = tmp_path / name
        return curvkern.restore(family / "aligned", model, method="budgeted", out=out, **data, **parameters)

    report = restored(family / tuned, "two", rounds=2, budget=2.0, reach=0.5)
    assert [stage.name for stage in report.stages] == ["open", "statistics", "plan", "edit", "finish"]
    assert 0 < report.changed < report.weights
    assert report.saved == "checkpoint"
    restored(family / tuned, "first", rounds=1, budget=2.0, reach=0.5)
    curvkern.restore(
        family / "aligned", family / tuned, method="merge", weight=0, out=tmp_path / "none", save="checkpoint"
    )
    start, rise = losses_of(tmp_path / "none", data["task"]), losses_of(tmp_path / "first", data["task"])
    told = next(line for line in report.messages if "measured" in line)
    assert float(told.rsplit(" ", 1)[1]) == pytest.approx(rise - start, abs=1e-3 * start)
    restored(tmp_path / "first", "second", rounds=1, budget=2.0 - (rise - start), reach=0.5)
    with Checkpoint.open(tmp_path / "two") as two, Checkpoint.open(tmp_path / "second") as second:
        assert all(torch.equal(two.read(name), second.read(name)) for name in two.names)
        first = Checkpoint.open(tmp_path / "first")
        assert any(not torch.equal(two.read(name), first.read(name)) for name in two.names)


def test_statistics_of_a_step_are_gone_before_the_next_ones_are_measured(family, tmp_path, monkeypatch):
    gather, made = stream.gather_statistics, []

    def gathered(*arguments, **options):
        gc.collect()
        assert all(found() is None for found in made)
        found = gather(*arguments, **options)
        made.append(weakref.ref(found))
        return found

    monkeypatch.setattr(stream, "gather_statistics", gathered)
    data = {"safety": family / "task.jsonl", "task": family / "harmful.jsonl"}
    options = {"method": "budgeted", "out": tmp_path / "out", "reach": 0.3, "rounds": 4, "budget": 5}
    curvkern.restore(family / "aligned", family / "tuned", **options, **data)
    assert len(made) >= 2

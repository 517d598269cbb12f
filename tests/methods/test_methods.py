import math
import re
from pathlib import Path

import pytest
import torch
from modules import module, normal

from curvkern.methods import REGISTRY, MethodError, Module, get, make
from curvkern.ops import unpack_mask
from curvkern.restore.recipe import CHECKPOINTS, DATA

ROOT = Path(__file__).parents[2]
OUTLINE = ["What it does", "Needs", "When to use it", "Traps", "Command", "In the demo"]


def dense_cosine(module):
    """Safe LoRA's score, straight from the published dense form in float64."""
    v = module.aligned.double() - module.base.double()
    c = v @ v.T / v.norm()
    delta = (module.tuned - module.aligned).double()
    if module.factors:
        b, a, _ = (f.double() if isinstance(f, torch.Tensor) else f for f in module.factors)
        delta = b @ a
    image = c @ delta
    return round(float((image * delta).sum() / (image.norm() * delta.norm())), 5), c


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_method_states_itself(name):
    kind = get(name)
    assert kind.name == name
    assert kind.source
    assert kind.__doc__
    assert make(name, {}).needs <= {*CHECKPOINTS, *DATA, "model"}


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_method_has_a_page_and_a_row_in_the_readme(name):
    page = (ROOT / "docs" / "methods" / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n")
    assert re.findall("^## (.+)", page, re.MULTILINE) == OUTLINE
    assert f"--method {name}" in page
    make(name, dict(re.findall(r"--set (\w+)=(\S+)", page)))
    rows = [line for line in (ROOT / "README.md").read_text().splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1
    assert f"(docs/methods/{name}.md)" in rows[0]


@pytest.mark.parametrize(
    "name, parameters, message",
    [
        ("gradient_rolback", {}, "Did you mean 'gradient_rollback'"),
        ("merge", {"wieght": 0.5}, "unknown parameter 'wieght'.*Did you mean 'weight'"),
        ("merge", {"weight": 1.5}, "merge: weight is 1.5: .*less than or equal to 1"),
        ("random", {"fraction": "much"}, "random: fraction is 'much'"),
    ],
)
def test_bad_methods_are_named(name, parameters, message):
    with pytest.raises(MethodError, match=message):
        make(name, parameters)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_merge_interpolates_and_scales_the_adapter(weight):
    m = module(rank=4)
    edit = make("merge", {"weight": weight}).edit(m, None)
    torch.testing.assert_close(edit.weight, (1 - weight) * m.tuned + weight * m.aligned)
    b, a = edit.factors
    torch.testing.assert_close(m.aligned + m.factors[2] * b @ a, edit.weight)


def test_random_resets_the_stated_share_by_seed_and_name_alone():
    m, other = module(), module("model.layers.1.mlp.up_proj.weight")
    method = make("random", {"fraction": 0.1, "seed": 3})
    edit = method.edit(m, None)
    reset = edit.weight != m.tuned
    assert reset.sum() == edit.selected == math.ceil(0.1 * m.tuned.numel())
    assert torch.equal(edit.weight[reset], m.aligned[reset])
    assert torch.equal(method.edit(m, None).weight, edit.weight)
    assert not torch.equal(method.edit(other, None).weight != other.tuned, reset)
    assert not torch.equal(make("random", {"fraction": 0.1, "seed": 4}).edit(m, None).weight, edit.weight)


@pytest.mark.parametrize("rank", [None, 4])
def test_safe_lora_parity_with_the_dense_form(rank):
    modules = [
        module(f"model.layers.{k}.mlp.{kind}.weight", o, i, seed=10 * k + o, rank=rank)
        for k in range(4)
        for kind, o, i in (("up_proj", 24, 16), ("down_proj", 16, 24))
    ]
    method = make("safe_lora", {"number": 3})
    plan = method.plan(lambda: modules, None, lambda _: None)
    expected = {m.name: dense_cosine(m) for m in modules}
    for name, (cosine, _) in expected.items():
        assert plan.cosine[name] == pytest.approx(cosine, abs=2e-5)
    limit = sorted(plan.cosine.values())[2]
    assert plan.chosen == {name for name, cosine in plan.cosine.items() if cosine <= limit}
    for m in modules:
        edit = method.edit(m, plan)
        if m.name not in plan.chosen:
            assert edit.weight is None
            continue
        delta = (m.tuned - m.aligned).double()
        torch.testing.assert_close(edit.weight.double(), m.aligned + expected[m.name][1] @ delta, rtol=1e-4, atol=1e-5)
        if rank:
            b, a = edit.factors
            assert torch.equal(a, m.factors[1])
            torch.testing.assert_close(m.aligned + 0.5 * b @ a, edit.weight)


def test_safe_lora_basis_keeps_what_lies_along_the_alignment():
    m = module(rank=4)
    v = m.aligned - m.base
    u = torch.linalg.svd(v)[0][:, :3]
    method = make("safe_lora", {"projector": "basis", "rank": 3, "select": "threshold", "threshold": 1.0})
    low_rank = Module(m.name, 0, m.kind, m.tuned, m.aligned, m.aligned - (u @ u.T @ v), m.factors)
    plan = method.plan(lambda: [low_rank], None, lambda _: None)
    b, a, _ = m.factors
    inside = (u @ u.T @ b @ a).norm() / (b @ a).norm()
    assert plan.cosine[m.name] == pytest.approx(float(inside), abs=1e-4)
    edit = method.edit(low_rank, plan)
    torch.testing.assert_close(edit.factors[0], u @ u.T @ b, rtol=1e-3, atol=1e-4)


def test_safe_lora_per_kind_ranks_kinds_apart_and_refuses_too_many():
    modules = [module(f"model.layers.{k}.mlp.{kind}.weight", o, i, seed=7 * k + o)
               for k in range(3) for kind, o, i in (("up_proj", 40, 8), ("down_proj", 8, 40))]  # fmt: skip
    plan = make("safe_lora", {"number": 1, "per_kind": True}).plan(lambda: modules, None, lambda _: None)
    assert sorted(name.split(".")[-2] for name in plan.chosen) == ["down_proj", "up_proj"]
    with pytest.raises(MethodError, match="number is 9, but there are 6 modules"):
        make("safe_lora", {"number": 9}).plan(lambda: modules, None, lambda _: None)


class Quadratic:
    """Evidence with known gradients: the harmful loss pulls to the aligned weights, the task's to the tuned ones."""

    def __init__(self, modules, score):
        self.modules = {m.name: m for m in modules}
        self.weights = {m.name: m.tuned.clone() for m in modules}
        self.layer_parameters = sum(m.tuned.numel() for m in modules)
        self.scores = score
        self.scale = {m.name: normal(*m.tuned.shape, seed=99 + i).abs() for i, m in enumerate(modules)}
        self.clear_gradients()

    def add_gradient(self, data):
        for name, w in self.weights.items():
            target = self.modules[name].aligned if data == "harmful" else self.modules[name].tuned
            self.sums[name] += (w - target) * self.scale[name]
        return self.sums

    def clear_gradients(self):
        self.sums = {name: torch.zeros_like(w) for name, w in self.weights.items()}

    def score(self):
        return self.scores(self)


def candidates(weight, target, grad):
    delta = weight - target
    return ((delta > 0) & (grad > 0)) | ((delta < 0) & (grad < 0))


def published_restore(weights, modules, grads, k):
    """One published step, by concatenation and topk; strict, so K - 1 weights move."""
    scores = torch.cat([
        torch.where(candidates(weights[m.name], m.aligned, grads[m.name]), grads[m.name].abs(), -1.0).flatten()
        for m in modules
    ])  # fmt: skip
    tau = scores[scores >= 0].topk(min(k, int((scores >= 0).sum()))).values[-1]
    fresh = {}
    for m in modules:
        grad = grads[m.name]
        fresh[m.name] = candidates(weights[m.name], m.aligned, grad) & (grad.abs() > tau)
        weights[m.name] = torch.where(fresh[m.name], m.aligned, weights[m.name])
    return fresh


def edited(method, plan, modules):
    return {m.name: method.edit(m, plan).weight for m in modules}


def two_modules():
    return [module("model.layers.0.mlp.up_proj.weight"), module("model.layers.1.mlp.down_proj.weight", 16, 24, seed=50)]


def test_gradient_rollback_plain_path_is_the_published_one():
    modules = two_modules()
    method = make("gradient_rollback", {"rate": 0.03, "steps": 7, "warmup": 2, "save_every": 3})
    evidence = Quadratic(modules, lambda _: 1.0)
    plan = method.plan(lambda: modules, evidence, lambda _: None)
    oracle = Quadratic(modules, None)
    k = math.ceil(0.03 * oracle.layer_parameters)
    for _ in range(7):  # gradients accumulate over steps
        published_restore(oracle.weights, modules, oracle.add_gradient("harmful"), k)
    result = edited(method, plan, modules)
    for m in modules:
        assert torch.equal(result[m.name], oracle.weights[m.name])
        assert torch.equal(evidence.weights[m.name], oracle.weights[m.name])
        reset = unpack_mask(plan[m.name], m.tuned.shape)
        assert torch.equal(result[m.name], torch.where(reset, m.aligned, m.tuned))


def test_gradient_rollback_starts_over_with_give_back_when_the_task_suffers():
    modules = two_modules()
    method = make("gradient_rollback", {"rate": 0.03, "steps": 4, "warmup": 2, "save_every": 2, "give_back": 0.2})
    calls = iter([1.0, 0.5, 1.0, 1.0])  # tuned, after the warm-up, then two checkpoints
    evidence = Quadratic(modules, lambda _: next(calls))
    plan = method.plan(lambda: modules, evidence, lambda _: None)
    oracle = Quadratic(modules, None)
    k = math.ceil(0.03 * oracle.layer_parameters)
    for _ in range(4):  # gradients do not accumulate here
        oracle.clear_gradients()
        fresh = published_restore(oracle.weights, modules, oracle.add_gradient("harmful"), k)
        oracle.clear_gradients()
        grads = oracle.add_gradient("task")
        open_ = {m.name: fresh[m.name] & candidates(oracle.weights[m.name], m.tuned, grads[m.name]) for m in modules}
        scores = torch.cat([torch.where(open_[m.name], grads[m.name].abs(), -1.0).flatten() for m in modules])
        count = int((scores >= 0).sum())
        tau = scores.topk(math.ceil(0.2 * count)).values[-1]
        for m in modules:
            back = open_[m.name] & (grads[m.name].abs() > tau)
            oracle.weights[m.name] = torch.where(back, m.tuned, oracle.weights[m.name])
    result = edited(method, plan, modules)
    assert all(torch.equal(result[m.name], oracle.weights[m.name]) for m in modules)


def test_gradient_rollback_keeps_the_last_state_above_the_floor():
    modules = two_modules()
    parameters = {"rate": 0.03, "steps": 6, "warmup": 2, "save_every": 2}
    calls = iter([1.0, 1.0, 1.0, 0.9])  # tuned, warm-up, step 4 holds, step 6 falls
    lines = []
    evidence = Quadratic(modules, lambda _: next(calls))
    plan = make("gradient_rollback", parameters).plan(lambda: modules, evidence, lines.append)
    shorter = make("gradient_rollback", {**parameters, "steps": 4})
    expected = shorter.plan(lambda: modules, Quadratic(modules, lambda _: 1.0), lines.append)
    assert all(torch.equal(plan[m.name], expected[m.name]) for m in modules)
    assert any("the checkpoint before is the result" in line for line in lines)


def test_gradient_rollback_moves_every_candidate_when_k_exceeds_them():
    modules = two_modules()
    method = make("gradient_rollback", {"rate": 1.0, "steps": 1, "warmup": 1, "ties": "exact_k"})
    plan = method.plan(lambda: modules, Quadratic(modules, lambda _: 1.0), lambda _: None)
    for m in modules:
        assert torch.equal(method.edit(m, plan).weight, m.aligned)


def test_gradient_rollback_says_when_nothing_has_a_gradient():
    modules = [module("model.layers.9.mlp.up_proj.weight")]
    with pytest.raises(MethodError, match="no selected module lies in the layers"):
        make("gradient_rollback", {}).plan(lambda: modules, Quadratic(two_modules(), None), lambda _: None)


@pytest.mark.parametrize("ties, short", [("strict", 1), ("exact_k", 0)])
def test_gradient_rollback_moves_k_weights_or_one_less(ties, short):
    modules = two_modules()
    for k in (1, 2, 20):
        parameters = {"rate": (k - 0.5) / sum(m.tuned.numel() for m in modules), "steps": 1, "warmup": 1, "ties": ties}
        method = make("gradient_rollback", parameters)
        plan = method.plan(lambda: modules, Quadratic(modules, lambda _: 1.0), lambda _: None)
        result = edited(method, plan, modules)
        assert sum(int((result[m.name] != m.tuned).sum()) for m in modules) == k - short


class Watched(Quadratic):
    """Keeps the weights as they are whenever a gradient is asked for."""

    def __init__(self, modules, score):
        super().__init__(modules, score)
        self.seen = []

    def add_gradient(self, data):
        self.seen.append((data, {name: w.clone() for name, w in self.weights.items()}))
        return super().add_gradient(data)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("give_back", [0.2, 1.0])
def test_gradient_rollback_gives_back_of_its_own_step_alone_and_makes_no_weight_of_its_own(seed, give_back):
    modules = [module(m.name, *m.tuned.shape, seed=7 * seed + at) for at, m in enumerate(two_modules())]
    calls = iter([1.0, 0.5, 1.0, 1.0])
    evidence = Watched(modules, lambda _: next(calls))
    parameters = {"rate": 0.1, "steps": 4, "warmup": 1, "save_every": 2, "give_back": give_back}
    make("gradient_rollback", parameters).plan(lambda: modules, evidence, lambda _: None)
    evidence.add_gradient("harmful")
    asked = [data for data, _ in evidence.seen]
    assert asked == ["harmful"] + 4 * ["harmful", "task"] + ["harmful"]
    returned = 0
    for m in modules:
        states = [weights[m.name] for _, weights in evidence.seen[1:]]
        for before, after, then in zip(states[:-2:2], states[1::2], states[2::2], strict=True):
            assert not ((then != after) & (after == before)).any()
            returned += int((then != after).sum())
        for state in states:
            assert ((state == m.aligned) | (state == m.tuned)).all()
    assert returned > 0

"""Every inverse against a dense solve in float64; the trust region; the whole pass."""

import pytest
import torch
from modules import made_module, made_modules, normal

import curvkern
from curvkern.methods import MethodError, make
from curvkern.methods.curvature import HARMFUL_GRADIENT, TASK_EKFAC, TASK_FISHER, TASK_GRADIENTS, two_loop, woodbury

INVERSES = ["diagonal", "ekfac", "low_rank"]


def hessian(method, m):
    """The damped curvature of one module as a dense matrix, rows of the weight one after the other."""
    found = {need: m.statistics[need].double() for need in method.statistics()}
    p = m.tuned.numel()
    if method.inverse == "diagonal":
        matrix, mean = torch.diag(found[TASK_FISHER].flatten()), found[TASK_FISHER].mean()
    elif method.inverse == "ekfac":
        values, right, left = (found[need] for need in TASK_EKFAC)
        basis = torch.kron(left, right)
        matrix, mean = basis @ torch.diag(values.flatten()) @ basis.T, values.mean()
    else:
        each = found[TASK_GRADIENTS].flatten(1)
        matrix = each.T @ each / len(each)
        mean = matrix.trace() / len(each)
    return matrix + method.damping * mean * torch.eye(p, dtype=torch.float64)


@pytest.mark.parametrize("inverse", INVERSES)
def test_the_direction_is_a_dense_solve(inverse):
    method = make("curvature", {"inverse": inverse})
    m = made_module(method)
    g = m.statistics[HARMFUL_GRADIENT].double().flatten()
    expected = torch.linalg.solve(hessian(method, m), g)
    torch.testing.assert_close(method.direction(m).double().flatten(), expected, rtol=1e-3, atol=1e-4)


def test_woodbury_in_float64_is_the_dense_solve():
    each, g, delta = normal(5, 40, seed=1).double(), normal(40, seed=2).double(), torch.tensor(0.1).double()
    expected = torch.linalg.solve(each.T @ each / 5 + delta * torch.eye(40, dtype=torch.float64), g)
    assert (woodbury(each, delta, g) - expected).norm() < 1e-13 * expected.norm()


def test_woodbury_corrects_along_every_sample():
    """Unlike a released recursion, whose correction of v stays parallel to the first sample's gradient."""
    each, v, n = normal(6, 40, seed=3).double(), normal(40, seed=4).double(), 6
    k, o = v.clone(), each[0].clone()
    for g in each[1:]:
        k -= (k @ g) / (n + o @ g) * o
        o -= (o @ g) / (n + o @ g) * o

    def aside(x):
        """The share of x that is not along the first gradient."""
        return float((x - (x @ each[0]) / (each[0] @ each[0]) * each[0]).norm() / x.norm())

    assert aside(k - v) < 1e-12
    delta = torch.tensor(0.1).double()
    assert aside(woodbury(each, delta, v) * delta - v) > 0.5


def test_the_trust_region_in_float64():
    method = make("curvature", {"tau": 0.02, "rise": 1e9})
    m = made_module(method)
    m.statistics.update({need: tensor.double() for need, tensor in m.statistics.items()})
    step = method.plan(lambda: [m], None, lambda line: None) * method.direction(m).flatten()
    assert float(step @ hessian(method, m) @ step / 2) == pytest.approx(0.02, rel=1e-12)


@pytest.mark.parametrize("inverse", INVERSES)
def test_the_step_uses_up_the_trust_region(inverse):
    method = make("curvature", {"inverse": inverse, "tau": 0.02, "rise": 1e9})
    modules, lines = made_modules(method), []
    plan = method.plan(lambda: modules, None, lines.append)
    rise, gain = 0.0, 0.0
    for m in modules:
        step = (method.edit(m, plan).weight.double() - m.tuned).flatten()
        rise += float(0.5 * step @ hessian(method, m) @ step)
        gain += float(m.statistics[HARMFUL_GRADIENT].double().flatten() @ step)
    assert rise == pytest.approx(0.02, rel=1e-3)
    assert float(lines[0].split()[7]) == pytest.approx(gain, rel=1e-3)
    assert float(lines[0].split()[-3]) == pytest.approx(rise, rel=1e-3)


@pytest.mark.parametrize("inverse", INVERSES)
def test_the_harmful_loss_is_not_asked_to_rise_without_end(inverse):
    method = make("curvature", {"inverse": inverse, "tau": 1e9, "rise": 0.7})
    modules = made_modules(method)
    plan = method.plan(lambda: modules, None, lambda line: None)
    steps = {m.name: method.edit(m, plan).weight.double() - m.tuned for m in modules}
    gain = sum(float((m.statistics[HARMFUL_GRADIENT].double() * steps[m.name]).sum()) for m in modules)
    assert gain == pytest.approx(0.7, rel=1e-3)


def test_a_plain_gradient_step_of_the_same_task_rise_gains_less():
    method = make("curvature", {"inverse": "low_rank", "rise": 1e9})
    m = made_module(method)
    plan = method.plan(lambda: [m], None, lambda line: None)
    g, matrix = m.statistics[HARMFUL_GRADIENT].double().flatten(), hessian(method, m)
    step = (method.edit(m, plan).weight.double() - m.tuned).flatten()
    plain = g * (2 * method.tau / (g @ matrix @ g)).sqrt()
    assert g @ step > g @ plain


def test_lbfgs_keeps_its_newest_pair_and_nears_the_solve_as_pairs_grow():
    method = make("curvature", {"inverse": "lbfgs"})
    m = made_module(method)
    matrix, g = hessian(method, m), m.statistics[HARMFUL_GRADIENT].double().flatten()
    assert torch.allclose(two_loop([(g, matrix @ g)], matrix @ g), g)  # the secant equation
    exact = torch.linalg.solve(matrix, g)
    found = [
        torch.nn.functional.cosine_similarity(
            make("curvature", {"inverse": "lbfgs", "history": n}).direction(m).double().flatten(), exact, dim=0
        )
        for n in (1, 5)
    ]
    plain = torch.nn.functional.cosine_similarity(g, exact, dim=0)
    assert plain < found[1]
    assert found[0] < found[1]


def test_pairs_without_curvature_are_left_out():
    s, y = torch.ones(3), torch.tensor([1.0, -1.0, 0.0])
    assert torch.equal(two_loop([(s, y)], torch.arange(3.0)), torch.arange(3.0))


def test_without_any_curvature_the_step_is_still_finite():
    for inverse in INVERSES:
        method = make("curvature", {"inverse": inverse})
        m = made_module(method)
        for need in method.statistics()[1:]:
            if need.quantity in ("fisher_diag", "ekfac", "low_rank"):
                m.statistics[need].zero_()
        torch.testing.assert_close(method.direction(m), m.statistics[HARMFUL_GRADIENT], rtol=1e-4, atol=1e-5)


def test_no_gradient_and_wrong_parameters():
    method = make("curvature", {})
    m = made_module(method)
    m.statistics[HARMFUL_GRADIENT].zero_()
    with pytest.raises(MethodError, match=r"curvature: g H\^-1 g is 0"):
        method.plan(lambda: [m], None, print)
    with pytest.raises(MethodError, match="curvature: tau is 0"):
        make("curvature", {"tau": 0})


@pytest.mark.parametrize("inverse", [*INVERSES, "lbfgs"])
def test_end_to_end(family, tmp_path, inverse):
    data = {"harmful": family / "harmful.jsonl", "task": family / "task.jsonl"}
    paths = family / "aligned", family / "tuned"
    report = curvkern.restore(*paths, method="curvature", inverse=inverse, out=tmp_path / "out", **data)
    assert report.changed > 0
    assert "the harmful loss should rise by" in report.messages[0]

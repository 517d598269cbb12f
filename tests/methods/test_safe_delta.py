"""Against the published loop over columns and entries, written out in float64."""

import pytest
import torch
from modules import made_module

import curvkern
from curvkern.methods import MethodError, make
from curvkern.methods.safe_delta import SAFETY_GRAM


def by_hand(m, budget, dropped, block, damping=0.01):
    gram = m.statistics[SAFETY_GRAM].double()
    gram = gram + damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    weight, tuned = m.aligned.double().clone(), m.tuned.double()
    rows, columns = weight.shape
    for left in range(0, columns, block):
        right = min(left + block, columns)
        entries = [(1 / float(u[j, j]) ** 2, j, i) for j in range(left, right) for i in range(rows)]
        mean = sum(entry[0] for entry in entries) / len(entries)
        limit = budget * len(entries) / 4096**2 * mean
        spent, admitted = 0.0, set()
        for importance, j, i in sorted(entries)[: len(entries) - int(dropped * len(entries))]:
            spent += float((tuned[i, j] - weight[i, j]) ** 2) * importance
            if spent > limit:
                break
            admitted.add((i, j))
        for j in range(left, right):
            for i in range(rows):
                if (i, j) in admitted:
                    error = (weight[i, j] - tuned[i, j]) / u[j, j]
                    weight[i, j + 1 :] -= error * u[j, j + 1 :]
                    weight[i, j] = tuned[i, j]
    return weight


@pytest.mark.parametrize("budget", [3e4, 1e5, 1e9])
def test_parity_with_the_loop_by_hand(budget):
    method = make("safe_delta", {"budget": budget, "block": 128})
    m = made_module(method, 6, 200)
    edit = method.edit(m, None)
    torch.testing.assert_close(edit.weight.double(), by_hand(m, budget, 0.15, 128), rtol=1e-3, atol=1e-4)
    assert 0 < edit.notes["admitted"] <= 0.86


def test_no_budget_is_the_aligned_model_and_all_of_it_the_tuned_one():
    method = make("safe_delta", {"budget": 0})
    m = made_module(method)
    assert torch.equal(method.edit(m, None).weight, m.aligned)
    method = make("safe_delta", {"budget": 1e12, "dropped": 0})
    assert torch.equal(method.edit(m, None).weight, m.tuned)


def test_the_grams_scale_does_not_matter():
    method = make("safe_delta", {"budget": 3e4, "block": 128})
    m = made_module(method, 6, 200)
    once = method.edit(m, None).weight
    m.statistics[SAFETY_GRAM].mul_(64.0)
    torch.testing.assert_close(method.edit(m, None).weight, once, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("parameters", [{"block": 100}, {"dropped": 2}, {"budget": -1}])
def test_wrong_parameters(parameters):
    with pytest.raises(MethodError, match=f"safe_delta: {next(iter(parameters))} is"):
        make("safe_delta", parameters)


def test_end_to_end(family, tmp_path):
    paths, data = (family / "aligned", family / "tuned"), {"safety": family / "harmful.jsonl"}
    report = curvkern.restore(*paths, method="safe_delta", out=tmp_path / "out", budget=50.0, **data)
    assert all(0 < m.restored_norm < m.tuned_norm for m in report.modules)
    report = curvkern.restore(*paths, method="safe_delta", out=tmp_path / "zero", budget=0, **data)
    assert all(m.restored_norm == 0 for m in report.modules)

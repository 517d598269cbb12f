"""Against the published loop over blocks and columns, written out in float64, and its ablations."""

import pytest
import torch
from modules import made_module

import curvkern
from curvkern.methods import MethodError, Module, make
from curvkern.methods.irr import SAFETY_FISHER, TASK_GRAM


def unsafe_of(delta, vector, fisher, spared, signs=True):
    """Of the conflicting entries of one block, those above the lowest share by Fisher."""
    conflict = delta.sign() != vector.sign() if signs else torch.ones_like(delta, dtype=torch.bool)
    where = conflict.nonzero().tolist()
    kept = sorted(where, key=lambda at: float(fisher[at[0], at[1]]))[: int(spared * len(where))]
    for row, column in kept:
        conflict[row, column] = False
    return conflict


def by_hand(m, spared=0.0, signs=True, damping=0.01):
    gram = m.statistics[TASK_GRAM].double().clone()
    delta, vector = (m.tuned - m.aligned).double(), (m.aligned - m.unaligned).double()
    dead = gram.diagonal() == 0
    gram[dead, dead] = 1
    delta[:, dead] = 0
    gram += damping * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    u = torch.linalg.cholesky(torch.linalg.inv(gram), upper=True)
    columns = delta.shape[1]
    for left in range(0, columns, 128):
        block = slice(left, min(left + 128, columns))
        unsafe = unsafe_of(delta[:, block], vector[:, block], m.statistics[SAFETY_FISHER][:, block], spared, signs)
        for j in range(block.start, block.stop):
            kept = torch.where(unsafe[:, j - left], 0.0, delta[:, j])
            error = (delta[:, j] - kept) / u[j, j]
            delta[:, j + 1 :] -= error[:, None] * u[j, j + 1 :]
            delta[:, j] = kept
    return m.aligned.double() + delta


@pytest.fixture
def m():
    module = made_module(make("irr", {}), 12, 200)
    module.statistics[TASK_GRAM][:, 7] = module.statistics[TASK_GRAM][7] = 0  # an input that is always 0
    return module


@pytest.mark.parametrize("parameters", [{}, {"spared": 0.5}, {"spared": 0.7, "signs": False}])
def test_parity_with_the_loop_by_hand(m, parameters):
    got = make("irr", parameters).edit(m, None).weight.double()
    torch.testing.assert_close(got, by_hand(m, **parameters), rtol=1e-3, atol=1e-4)


def test_without_recalibration_only_signs_that_agree_stay(m):
    got = make("irr", {"recalibrate": False}).edit(m, None).weight
    delta, vector = m.tuned - m.aligned, m.aligned - m.unaligned
    delta[:, 7] = 0
    torch.testing.assert_close(got, m.aligned + torch.where(delta.sign() == vector.sign(), delta, 0.0))


def test_corrected_removes_what_conflicts_in_the_update_itself_and_costs_the_task_less(m):
    delta, vector = m.tuned - m.aligned, m.aligned - m.unaligned
    delta[:, 7] = 0
    unsafe = delta.sign() != vector.sign()
    corrected = make("irr", {"mode": "corrected"}).edit(m, None)
    assert torch.equal(corrected.weight[unsafe], m.aligned[unsafe])
    assert corrected.notes["unsafe"] == pytest.approx(float(unsafe.float().mean()))
    plain = make("irr", {"recalibrate": False}).edit(m, None)
    lost = [
        float(((e.weight - m.tuned) @ m.statistics[TASK_GRAM] * (e.weight - m.tuned)).sum()) for e in (corrected, plain)
    ]
    assert lost[0] < lost[1]


def test_recalibration_lies_between_removing_alone_and_the_best_fit(m):
    """What the task's inputs see of it; the best fit moves all weights that stay, row by row."""
    gram, alive = m.statistics[TASK_GRAM].double(), torch.arange(200) != 7
    h, delta = gram[alive][:, alive], (m.tuned - m.aligned).double()[:, alive]
    got = (make("irr", {}).edit(m, None).weight - m.aligned).double()[:, alive]
    removed = got == 0
    best = torch.where(removed, 0.0, delta)
    for at, gone in enumerate(removed):
        kept = ~gone
        best[at, kept] += torch.linalg.solve(h[kept][:, kept], h[kept][:, gone] @ delta[at, gone])
    lost = [float(((x - delta) @ h * (x - delta)).sum()) for x in (best, got, torch.where(removed, 0.0, delta))]
    assert lost == sorted(lost)
    assert lost[0] < 0.99 * lost[1] < 0.99 * lost[2]


def test_the_unaligned_model_is_needed(m):
    with pytest.raises(MethodError, match="irr: needs the unaligned model"):
        make("irr", {}).edit(Module(m.name, 0, m.kind, m.tuned, m.aligned, statistics=m.statistics), None)
    with pytest.raises(MethodError, match="irr: spared is 2"):
        make("irr", {"spared": 2})


def test_end_to_end(family, tmp_path):
    data = {"safety": family / "harmful.jsonl", "task": family / "task.jsonl", "unaligned": family / "base"}
    report = curvkern.restore(family / "aligned", family / "tuned", method="irr", out=tmp_path / "out", **data)
    assert [stage.name for stage in report.stages][1] == "statistics"
    for m in report.modules:
        assert 0.4 < m.notes["unsafe"] < 0.6  # of random updates half conflict
        assert m.changed > 0
        assert m.cosine > 0

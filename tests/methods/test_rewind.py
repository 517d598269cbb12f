import math

import pytest
import torch
from modules import made_module

import curvkern
from curvkern.methods import MethodError, Module, Need, make


def statistics(method, data):
    return next(need for need in method.statistics() if need.data == data)


@pytest.mark.parametrize("by", ["snip", "wanda"])
def test_what_safety_needs_and_the_task_does_not_is_reset(by):
    method = make("rewind", {"by": by, "safety_fraction": 0.25, "task_fraction": 0.1})
    m = made_module(method)
    tops = {}
    for data, fraction in (("safety", 0.25), ("task", 0.1)):
        found = m.statistics[statistics(method, data)].double()
        use = found if by == "snip" else found.diagonal().sqrt().expand_as(m.aligned)
        score = (m.aligned.double().abs() * use).flatten()
        tops[data] = set(score.topk(math.ceil(fraction * score.numel())).indices.tolist())
    expected = m.tuned.flatten().clone()
    for at in tops["safety"] - tops["task"]:
        expected[at] = m.aligned.flatten()[at]
    edit = method.edit(m, None)
    assert torch.equal(edit.weight, expected.view_as(m.tuned))
    assert edit.selected == len(tops["safety"] - tops["task"]) > 0


def test_the_scores_are_of_the_aligned_model():
    assert make("rewind", {}).statistics() == tuple(Need("abs_gradient", d, at="aligned") for d in ("safety", "task"))


def test_actsvd_resets_directions_of_safety_beside_those_of_the_task():
    method = make("rewind", {"by": "actsvd", "safety_fraction": 0.25, "task_fraction": 0.5})
    m = made_module(method)
    projectors = {}
    for data, rank in (("safety", 6), ("task", 12)):
        gram = m.statistics[statistics(method, data)].double()
        root = torch.linalg.cholesky(gram)  # outputs of any inputs with this Gram have these left singular vectors
        u = torch.linalg.svd(m.aligned.double() @ root)[0][:, :rank]
        projectors[data] = u @ u.T
    back = projectors["safety"] @ (m.aligned - m.tuned).double()
    back -= projectors["task"] @ back
    torch.testing.assert_close(method.edit(m, None).weight.double(), m.tuned + back, rtol=1e-4, atol=1e-5)


def test_actsvd_of_everything_is_the_aligned_model():
    method = make("rewind", {"by": "actsvd", "safety_fraction": 1.0, "task_fraction": 0.0})
    m = made_module(method)
    torch.testing.assert_close(method.edit(m, None).weight, m.aligned, rtol=1e-4, atol=1e-5)
    same = Module(m.name, 0, m.kind, m.aligned, m.aligned, statistics=m.statistics)
    torch.testing.assert_close(method.edit(same, None).weight, m.aligned)


def test_wrong_parameters():
    with pytest.raises(MethodError, match="rewind: by is 'svd'"):
        make("rewind", {"by": "svd"})


@pytest.mark.parametrize("by", ["snip", "actsvd"])
def test_end_to_end(family, tmp_path, by):
    data = {"safety": family / "harmful.jsonl", "task": family / "task.jsonl"}
    report = curvkern.restore(family / "aligned", family / "tuned", method="rewind", by=by, out=tmp_path / "o", **data)
    assert report.changed > 0
    assert sum(m.restored_norm for m in report.modules) < sum(m.tuned_norm for m in report.modules)

import pytest
import torch
from modules import made_module

import curvkern
from curvkern.methods import MethodError, make
from curvkern.methods.antidote import HARMFUL_GRAM


@pytest.mark.parametrize("to", ["aligned", "zero"])
def test_the_largest_scores_of_every_row_are_reset(to):
    method = make("antidote", {"fraction": 0.3, "to": to})
    m = made_module(method)
    edit = method.edit(m, None)
    score = m.tuned.double().abs() * m.statistics[HARMFUL_GRAM].double().diagonal().sqrt()
    expected = m.tuned.clone()
    for row in range(len(expected)):
        largest = sorted(range(16), key=lambda j, row=row: -float(score[row, j]))[: int(0.3 * 16)]
        for j in largest:
            expected[row, j] = m.aligned[row, j] if to == "aligned" else 0
    assert torch.equal(edit.weight, expected)
    assert edit.selected == 24 * int(0.3 * 16)


def test_nothing_and_everything():
    whole, none = make("antidote", {"fraction": 1.0}), make("antidote", {"fraction": 0.0})
    m = made_module(whole)
    assert torch.equal(whole.edit(m, None).weight, m.aligned)
    assert torch.equal(none.edit(m, None).weight, m.tuned)
    with pytest.raises(MethodError, match="antidote: fraction is 2"):
        make("antidote", {"fraction": 2})


def test_end_to_end(family, tmp_path):
    report = curvkern.restore(
        family / "aligned", family / "tuned", method="antidote", out=tmp_path / "out", harmful=family / "harmful.jsonl"
    )
    weights = {"q_proj": 32 * 3, "down_proj": 32 * 4}  # rows times a tenth of the inputs
    for m in report.modules:
        if m.kind in weights:
            assert m.changed == weights[m.kind]

import pytest
import torch
from modules import made_modules

import curvkern
from curvkern.methods import MethodError, make
from curvkern.methods.ascent import HARMFUL_GRADIENT


def test_the_step_goes_along_the_gradient_and_is_as_long_as_asked():
    method = make("ascent", {"rho": 0.3})
    modules, lines = made_modules(method), []
    plan = method.plan(lambda: modules, None, lines.append)
    steps = [method.edit(m, plan).weight.double() - m.tuned.double() for m in modules]
    gradients = [m.statistics[HARMFUL_GRADIENT].double() for m in modules]
    norm = sum(g.square().sum() for g in gradients).sqrt()
    for step, g in zip(steps, gradients, strict=True):
        torch.testing.assert_close(step, 0.3 * g / norm, rtol=1e-3, atol=1e-6)
    assert lines == [f"ascent: the harmful loss should rise by {0.3 * norm:.4g} nats a token, to first order"]


def test_no_direction_and_wrong_parameters():
    method = make("ascent", {})
    modules = made_modules(method)
    for m in modules:
        m.statistics[HARMFUL_GRADIENT].zero_()
    with pytest.raises(MethodError, match="there is no direction to go"):
        method.plan(lambda: modules, None, print)
    with pytest.raises(MethodError, match="ascent: rho is 0"):
        make("ascent", {"rho": 0})


def test_end_to_end(family, tmp_path):
    out = tmp_path / "out"
    report = curvkern.restore(
        family / "aligned", family / "adapter", method="ascent", rho=0.5, out=out, harmful=family / "harmful.jsonl"
    )
    length = sum(m.step_norm**2 for m in report.modules) ** 0.5
    assert length == pytest.approx(0.5, rel=1e-3)

"""What registration promises of every op."""

import re
import subprocess
import sys

import pytest
import torch

import curvkern
from curvkern.backend.dispatch import BACKENDS, Route
from curvkern.backend.register import REGISTERED, register


@pytest.mark.parametrize("name", REGISTERED)
def test_the_reference_comes_last_and_can_always_run(name):
    backends = [route.backend for route in REGISTERED[name]]
    assert backends[-1] == "reference"
    assert len(set(backends)) == len(backends)
    assert set(backends) <= set(BACKENDS)
    assert backends == sorted(backends, key=["cuda", "cpu", "triton", "reference"].index)


@pytest.mark.parametrize("name", REGISTERED)
def test_ops_are_torchs_and_end_with_the_backend(name):
    schema = getattr(torch.ops.curvkern, name).default._schema
    assert (schema.arguments[-1].name, str(schema.arguments[-1].type)) == ("backend", "str")
    edits = [argument.name for argument in schema.arguments if argument.alias_info and argument.alias_info.is_write]
    assert bool(edits) == name.endswith("_"), f"{name} edits {edits}: a name ends with _ where the first argument is"


@pytest.fixture(scope="module")
def doubled():
    """An op made here: y <- 2 x, in place, with one route."""
    seen = []

    def reference(other, x):
        x.mul_(2)

    call = register(
        "test_doubled_(Tensor(a!)? other, Tensor(b!) x, str backend) -> ()",
        check=lambda other, x: seen.append(tuple(x.shape)),
        routes=(Route("reference", reference),),
    )
    yield call, seen
    del REGISTERED["test_doubled_"]


def test_mutated_arguments_are_read_off_the_schema(doubled):
    x = torch.ones(3)
    doubled[0](None, x, "auto")
    assert (x.tolist(), x._version > 0) == ([2, 2, 2], True)


def test_real_and_fake_tensors_are_checked_alike(doubled):
    call, seen = doubled
    seen.clear()
    step = torch.compile(lambda x: call(None, x, "auto"), fullgraph=True, backend="aot_eager")
    x = torch.ones(5)
    step(x)
    assert x.tolist() == [2] * 5
    assert len(seen) >= 2
    assert all(re.fullmatch(r"\((5|s\d+),\)", str(shape)) for shape in seen)


def test_lists_of_tensors():
    def reference(ys, x):
        for y in ys:
            y.add_(x)

    call = register(
        "test_added_(Tensor(a!)[] ys, Tensor? x, str backend) -> ()",
        check=lambda ys, x: None,
        routes=(Route("reference", reference),),
    )
    del REGISTERED["test_added_"]
    ys = [torch.zeros(2), torch.ones(3)]
    call(ys, torch.ones(1), "auto")
    assert [y.tolist() for y in ys] == [[1, 1], [2, 2, 2]]
    assert [y._version for y in ys] == [2, 2]  # once by add_, once for the op
    step = torch.compile(lambda ys, x: call(ys, x, "auto"), fullgraph=True, backend="aot_eager")
    step(ys, torch.ones(1))
    assert [y.tolist() for y in ys] == [[2, 2], [3, 3, 3]]


def test_products_are_not_rounded_under_autocast(device):
    d, x = torch.randn(2, 3, 40, device=device), torch.randn(2, 3, 30, device=device)
    expected = curvkern.fisher_diag_(torch.zeros(40, 30, device=device), d, x, backend="reference")
    with torch.autocast(device, dtype=torch.bfloat16):
        got = curvkern.fisher_diag_(torch.zeros(40, 30, device=device), d, x, backend="reference")
        assert (d.flatten(0, 1).T @ x.flatten(0, 1)).dtype == torch.bfloat16
    assert torch.equal(got, expected)


def test_a_call_does_not_import_the_compiler():
    """torch.library.custom_op's first call would: 900 modules and two seconds."""
    call = "import sys, torch, curvkern; curvkern.blend_(torch.zeros(9), torch.ones(9), 0.5)"
    run = [sys.executable, "-c", f"{call}; assert 'torch._dynamo' not in sys.modules"]
    subprocess.run(run, check=True, timeout=60)


def test_versions_of_edited_arguments_rise_by_one():
    weight, undo = torch.zeros(9), torch.zeros(2, dtype=torch.uint8)
    target, before = torch.ones(9), (weight._version, undo._version)
    curvkern.rollback_(weight, target, -1.0, rule="delta", undo=undo)
    assert (weight._version, undo._version, target._version) == (before[0] + 1, before[1] + 1, 0)

"""Time of every op on its measuring cases, backend by backend; no number for a result that is wrong.

python -m pytest benchmarks                      all sizes
python -m pytest benchmarks -k "rollback and s-" one op, small
"""

import copy

import pytest
import torch

import curvkern
from curvkern.bench.cases import CASES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
MEASURED = [case for cases in CASES.values() for case in cases if case.size != "edge"]


@pytest.mark.parametrize("backend", ["reference", "triton", "cuda" if DEVICE == "cuda" else "cpu"])
@pytest.mark.parametrize("case", MEASURED, ids=lambda case: f"{case.size}-{case}")
def test_op(benchmark, case, backend):
    op = getattr(curvkern, case.function)
    args, kwargs = case.make(DEVICE)
    choices = {choice.backend: choice for choice in curvkern.explain(op, *args, **kwargs)}
    if backend not in choices or not choices[backend].usable or (backend, DEVICE) == ("triton", "cpu"):
        pytest.skip(choices[backend].reason if backend in choices else f"{case.function} has no {backend} version")
    assert_right(op, args, kwargs, backend)

    def run():
        op(*args, **kwargs, backend=backend)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.extra_info.update(op=case.function, dtype=str(case.dtype), bytes=case.bytes, flops=case.flops)
    benchmark.pedantic(run, rounds=10, warmup_rounds=2)


def assert_right(op, args, kwargs, backend):
    """The gate: the same result, in outputs and edited arguments, as the reference."""
    got, wanted = (copy.deepcopy((args, kwargs)) for _ in range(2))
    results = [op(*a, **k, backend=b) for (a, k), b in ((got, backend), (wanted, "reference"))]
    for left, right in zip((results[0], *got[0]), (results[1], *wanted[0]), strict=True):
        if isinstance(left, (torch.Tensor, list, tuple)):
            torch.testing.assert_close(left, right)

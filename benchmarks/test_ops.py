"""A regression gate over the cases of `curvkern bench`: every op, backend by backend; no time for a wrong result.

python -m pytest benchmarks -k "s- and rollback" --benchmark-autosave     keep the times
python -m pytest benchmarks -k "s- and rollback" --benchmark-compare --benchmark-compare-fail=median:10%
"""

import pytest
import torch

from curvkern.bench.cases import CASES
from curvkern.bench.clock import Copies
from curvkern.bench.gate import Gate
from curvkern.bench.providers import BACKENDS, providers
from curvkern.bench.results import Row

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
MEASURED = [case for cases in CASES.values() for case in cases if case.size in ("s", "m", "l")]
PAST = 128 << 20  # bytes of inputs: more than any cache here


@pytest.mark.parametrize("backend", BACKENDS[DEVICE.type])
@pytest.mark.parametrize("case", MEASURED, ids=lambda case: f"{case.size}-{case}")
def test_op(benchmark, case, backend):
    arguments = case.make(DEVICE.type)
    found = {p.name: p for p in providers(case, arguments, DEVICE, backend, compiled=False)}
    if backend not in found or found[backend].missing:
        pytest.skip(found[backend].missing if backend in found else f"{case.function} has no {backend} version")
    row = Gate(case, arguments).judge(found[backend], Row(case.function, case.dtype_name, case.label, backend, "ours"))
    assert row.status == "ok", row.note
    copies = Copies(arguments, PAST)
    benchmark.extra_info.update(bytes=case.bytes, flops=case.flops, error=row.error)
    benchmark.pedantic(found[backend].call, setup=copies.next, rounds=10, warmup_rounds=2)

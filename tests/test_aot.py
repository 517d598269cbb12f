"""Every Triton kernel compiles for every target, spills nothing on sm_90, and has the matrix instructions it means."""

import json
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules

import pytest

import curvkern.kernels

pytest.importorskip("triton")

# The targets of aot.py, which this process cannot import, and what a matrix product becomes there.
MATRIX = {
    "sm_80": {"mma.sync"},
    "sm_90": {"wgmma.mma_async"},
    "sm_100": {"tcgen05.mma", "mma.sync"},
    "sm_120": {"mma.sync"},
    "gfx942": {"v_mfma"},
}
LISTS = {
    module.name: getattr(import_module(f"curvkern.kernels.{module.name}"), "AHEAD_OF_TIME", [])
    for module in iter_modules(curvkern.kernels.__path__)
}
ROWS = [
    pytest.param(module, index, target, id=f"{module}-{index}-{case.kernel.__name__}-{target}")
    for module, cases in LISTS.items()
    for index, case in enumerate(cases)
    for target in MATRIX
]


class Compiler:
    """tests/aot.py in a process of its own, where Triton is a compiler and not an interpreter."""

    def __init__(self):
        command = [sys.executable, Path(__file__).with_name("aot.py"), "--serve"]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def row(self, *key):
        self.process.stdin.write(json.dumps(key) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, f"the compiler died on {key}, status {self.process.wait()}"
        return json.loads(answer)


@pytest.fixture(scope="module")
def compiler():
    """One that lives; a crash costs the next test a new one, no more."""
    alive = []

    def living():
        if not alive or alive[-1].process.poll() is not None:
            alive.append(Compiler())
        return alive[-1]

    yield living
    for one in alive:
        one.process.stdin.close()
        one.process.wait()


@pytest.mark.parametrize("module, index, target", ROWS)
def test_compiles_ahead_of_time(compiler, module, index, target):
    row = compiler().row(module, index, target)
    assert "error" not in row, row["error"]
    assert row["registers"] > 0
    if target == "sm_90":
        assert row["stack"] == 0, f"{row['stack']} bytes of stack: registers spill"
    if row["wanted_matrix"]:
        assert MATRIX[target] & set(row["matrix"]), f"no matrix instruction in {row['kernel']}: {row['matrix']}"


@pytest.mark.parametrize("module", LISTS)
def test_every_kernel_is_compiled_ahead_of_time(module):
    """A kernel that is in no list is compiled by nobody until it runs on a GPU."""
    text = Path(curvkern.kernels.__path__[0], f"{module}.py").read_text()
    kernels = set(re.findall(r"^def (\w+_kernel)\(", text, re.MULTILINE))
    listed = {case.kernel.__name__ for case in LISTS[module]}
    assert kernels <= listed, f"not in AHEAD_OF_TIME: {kernels - listed}"

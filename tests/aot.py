"""Compiles every kernel's `AHEAD_OF_TIME` list for every target, without a GPU, and prints one JSON row each.

Run as a program (test_aot.py does): the interpreter's switch must be off before triton is imported.
"""

import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import curvkern.kernels

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# What a matrix product becomes: warp group, tensor memory, warp, AMD.
MATRIX = re.compile(r"\b(wgmma\.mma_async|tcgen05\.mma|mma\.sync|v_mfma)")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def resources(cubin: bytes) -> dict:
    """Registers and spilled bytes from the binary itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]), "stack": int(found[2])} if found else {}


def compile_one(case, target: GPUTarget) -> dict:
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    options = {k: v for k, v in case.options.items() if target.backend == "cuda" or k != "maxnreg"}
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constants))
    compiled = triton.compile(source, target=target, options=options)
    text = compiled.asm.get("ptx") or compiled.asm.get("amdgcn")
    row = {"matrix": sorted(set(MATRIX.findall(text))), "shared": compiled.metadata.shared}
    if "cubin" in compiled.asm:
        row |= resources(compiled.asm["cubin"])
    else:
        spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
        registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
        row |= {"registers": int(registers[1]), "stack": int(spilled[1])}
    return row


def main(only: list[str]) -> None:
    modules = [m.name for m in pkgutil.iter_modules(curvkern.kernels.__path__)]
    for module in modules:
        cases = getattr(import_module(f"curvkern.kernels.{module}"), "AHEAD_OF_TIME", [])
        for index, case in enumerate(cases):
            for name, target in TARGETS.items():
                if only and module not in only and name not in only:
                    continue
                row = {"module": module, "kernel": case.kernel.__name__, "case": index, "target": name}
                row["wanted_matrix"] = case.matrix
                try:
                    row |= compile_one(case, target)
                except Exception as error:  # the row says it; the test fails on it
                    row["error"] = f"{type(error).__name__}: {error}"[:2000]
                print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])

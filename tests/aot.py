"""Compiles every kernel's `AHEAD_OF_TIME` list for every target, without a GPU.

    python tests/aot.py [module|target ...]   a JSON row each
    python tests/aot.py --table               the same as a Markdown table
    python tests/aot.py --serve               a row for each [module, index, target] read from standard input

A program of its own: where tests run Triton's interpreter, its switch must be off before triton is imported.
"""

import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from itertools import groupby
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path.insert(0, str(Path(__file__).parents[1]))

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


def every_row() -> list[tuple[str, int, str]]:
    """(module, index in its list, target) of all that is to be compiled."""
    modules = [module.name for module in pkgutil.iter_modules(curvkern.kernels.__path__)]
    return [(m, i, target) for m in modules for i in range(len(ahead_of_time(m))) for target in TARGETS]


def ahead_of_time(module: str) -> list:
    return getattr(import_module(f"curvkern.kernels.{module}"), "AHEAD_OF_TIME", [])


def compile_row(module: str, index: int, target: str) -> dict:
    case = ahead_of_time(module)[index]
    case = case.elsewhere.get(target, case)
    row = {"module": module, "kernel": case.kernel.__name__, "case": index, "target": target}
    row["wanted_matrix"] = case.matrix
    try:
        return row | compile_one(case, TARGETS[target])
    except Exception as error:  # the row says it; the test fails on it
        return row | {"error": f"{type(error).__name__}: {error}"[:2000]}


def compile_one(case, target: GPUTarget) -> dict:
    names = case.kernel.arg_names
    signature = {name: case.signature.get(name, "constexpr") for name in names}
    options = {k: v for k, v in case.options.items() if target.backend == "cuda" or k != "maxnreg"}
    # "i32:16" says what a launch finds out by itself: a multiple of 16.
    hints = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].endswith(":16")}
    signature = {name: kind.removesuffix(":16") for name, kind in signature.items()}
    source = ASTSource(case.kernel, signature, constexprs=dict(case.constants), attrs=hints)
    compiled = triton.compile(source, target=target, options=options)
    text = compiled.asm.get("ptx") or compiled.asm.get("amdgcn")
    found = {"matrix": sorted(set(MATRIX.findall(text))), "shared": compiled.metadata.shared}
    if "cubin" in compiled.asm:
        return found | resources(compiled.asm["cubin"])
    spilled = re.search(r"\.vgpr_spill_count:\s*(\d+)", text)
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    return found | {"registers": int(registers[1]), "stack": int(spilled[1])}


def resources(cubin: bytes) -> dict:
    """Registers and bytes of stack (where spilled registers go), from the binary itself."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    return {"registers": int(found[1]), "stack": int(found[2])}


def table(rows: list[dict]) -> str:
    """Registers, spilled bytes if any, and the matrix instruction, for each kernel and target."""
    lines = ["| kernel | " + " | ".join(TARGETS) + " |", "|---" * (len(TARGETS) + 1) + "|"]
    for (module, index), group in groupby(rows, key=lambda row: (row["module"], row["case"])):
        found = {row["target"]: row for row in group}
        name = f"{module}[{index}] {next(iter(found.values()))['kernel']}"
        lines.append(f"| {name} | " + " | ".join(cell(found.get(target)) for target in TARGETS) + " |")
    return "\n".join(lines)


def cell(row: dict | None) -> str:
    if row is None:
        return ""
    if "error" in row:
        return "error"
    spills = f", {row['stack']} spilled" if row["stack"] else ""
    return ", ".join([f"{row['registers']}{spills}", *row["matrix"]])


def main(arguments: list[str]) -> None:
    if arguments == ["--serve"]:
        for line in sys.stdin:
            print(json.dumps(compile_row(*json.loads(line))), flush=True)
        return
    only = {argument for argument in arguments if argument != "--table"}
    wanted = [row for row in every_row() if not only or only & {row[0], row[2]}]
    with ProcessPoolExecutor() as pool:
        rows = pool.map(compile_row, *zip(*wanted, strict=True))
        print(table(list(rows)) if "--table" in arguments else "\n".join(map(json.dumps, rows)))


if __name__ == "__main__":
    main(sys.argv[1:])

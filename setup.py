"""Builds csrc/ into curvkern/_C with ninja: a C++ compiler for the CPU kernels, nvcc for the CUDA kernels.

CURVKERN_CUDA=auto|1|0   CUDA kernels: if nvcc is there (default), required, never
CURVKERN_ARCHS=80;90     compute capabilities (default 80;90;100;120, PTX for the newest)
CXX, CUDA_HOME, MAX_JOBS as usual. No compiler at all: the package installs as pure Python.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
X86_FLAGS = {
    "generic": "",
    "avx2": "-mavx2 -mfma",
    "avx512": "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512",
}


def find_cxx() -> "str | None":
    return next(filter(None, map(shutil.which, [os.environ.get("CXX", "g++"), "g++", "clang++", "c++"])), None)


def find_nvcc() -> "str | None":
    choice = os.environ.get("CURVKERN_CUDA", "auto")
    if choice not in ("auto", "1", "0"):
        sys.exit(f"CURVKERN_CUDA is {choice!r}; it takes auto, 1 or 0")
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    nvcc = shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")
    if choice == "1" and nvcc is None:
        sys.exit("CURVKERN_CUDA=1 but nvcc was not found; set CUDA_HOME or put nvcc on PATH")
    return None if choice == "0" or not sys.platform.startswith("linux") else nvcc


def cuda_flags(nvcc: str) -> "tuple[str, str, str]":
    """(archs, code generation flags, toolkit version)."""
    archs = re.split(r"[;, ]+", os.environ.get("CURVKERN_ARCHS", "80;90;100;120").strip("; "))
    bad = [a for a in archs if not re.fullmatch(r"\d+[af]?", a)]
    if bad:
        sys.exit(f"CURVKERN_ARCHS: {bad[0]!r} is no compute capability; write for example 80;90")
    codes = [f"-gencode arch=compute_{a},code=sm_{a}" for a in archs]
    newest = max(archs, key=lambda a: int(a.rstrip("af")))
    codes.append(f"-gencode arch=compute_{newest},code=compute_{newest}")
    text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    return ",".join(archs), " ".join(codes), re.search(r"release ([\d.]+)", text).group(1)


def ninja_file(target: Path, cxx: str, nvcc: "str | None") -> str:
    """The build: one rule per compiler, one edge per source and instruction set."""
    import pybind11

    include = f"-I{sysconfig.get_path('include')} -I{pybind11.get_include()}"
    common = "-O3 -fPIC -fvisibility=hidden -std=c++20"
    x86 = platform.machine() in ("x86_64", "AMD64")
    isas = X86_FLAGS if x86 else {"generic": ""}
    rules = [
        "rule cxx\n  command = $cxx $flags -MMD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc",
        "rule link\n  command = $link -o $out $in $libs",
    ]
    edges, objects, define = [f"cxx = {cxx}"], [], ""
    if nvcc:
        archs, codes, version = cuda_flags(nvcc)
        define = f'-DCURVKERN_CUDA -DCURVKERN_CUDA_ARCHS=\\"{archs}\\" -DCURVKERN_CUDA_VERSION=\\"{version}\\"'
        flags = f"-O3 -std=c++20 --expt-relaxed-constexpr {codes} -Xcompiler -fPIC,-fvisibility=hidden"
        rules.append(
            f"rule nvcc\n  command = {nvcc} {flags} -MD -MF $out.d -c $in -o $out\n  depfile = $out.d\n  deps = gcc"
        )
        for source in sorted(ROOT.glob("csrc/cuda/*.cu")):
            objects.append(f"cuda_{source.stem}.o")
            edges.append(f"build {objects[-1]}: nvcc {source}")
    for source in sorted(ROOT.glob("csrc/cpu/*.cpp")):
        for isa, flags in isas.items() if source.stem != "parallel" else [("generic", "")]:
            objects.append(f"cpu_{source.stem}_{isa}.o")
            extra = f"{common} -ffp-contract=off -DCURVKERN_ISA={isa} {flags}"
            edges.append(f"build {objects[-1]}: cxx {source}\n  flags = {extra}")
    objects.append("bindings.o")
    edges.append(f"build bindings.o: cxx {ROOT}/csrc/bindings.cpp\n  flags = {common} {include} {define}")
    linker = f"{nvcc} -shared -cudart static -Xlinker --exclude-libs,ALL" if nvcc else f"{cxx} -shared"
    libs = "-Xlinker -s" if sys.platform.startswith("linux") else "-undefined dynamic_lookup"
    edges.append(
        f"link = {linker}\nlibs = {libs if nvcc else libs.replace('-Xlinker', '-Wl,-s -pthread').replace(' -s', '')}"
    )
    edges.append(f"build {target}: link {' '.join(objects)}")
    return "\n".join(rules + edges) + "\n"


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve()
        for folder in (build, target.parent):
            folder.mkdir(parents=True, exist_ok=True)
        (build / "build.ninja").write_text(ninja_file(target, find_cxx(), find_nvcc()))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([shutil.which("ninja") or "ninja", "-C", str(build), *jobs], check=True)


native = [Extension("curvkern._C", sources=[])] if find_cxx() else []
if not native:
    print("curvkern: no C++ compiler found; installing as pure Python", file=sys.stderr)
setup(ext_modules=native, cmdclass={"build_ext": BuildNative})

"""Builds csrc/ into curvkern/_C with ninja: a C++ compiler for the CPU kernels, nvcc for the CUDA kernels.

CURVKERN_CUDA=auto|1|0   CUDA kernels: if nvcc is there (default), required, never
CURVKERN_ARCHS=80;90     compute capabilities (default: those of 80;90;100;120 that nvcc knows); PTX for the newest
CXX, CUDA_HOME, MAX_JOBS as usual. No C++ compiler: the package installs as pure Python.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CSRC = Path(__file__).parent.resolve() / "csrc"
ISAS = {"generic": ""}
if sysconfig.get_platform().endswith("x86_64"):
    ISAS["avx2"] = "-mavx2 -mfma"
    ISAS["avx512"] = "-mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma -mprefer-vector-width=512"
# The element rules give the same bits on every backend: no FMA. Sums of products need not.
FILE_FLAGS = dict.fromkeys(["fisher", "gram", "loss"], "-ffp-contract=fast") | {"perturb": "-fno-math-errno"}
LINK = "-Xlinker -s -Xlinker --exclude-libs=ALL -lpthread" if sys.platform == "linux" else "-undefined dynamic_lookup"
NINJA = """\
csrc = {csrc}
target = {target}
cxx = {cxx} -std=c++20 -O3 -fPIC -fvisibility=hidden
nvcc = {nvcc} -ccbin {cxx} -std=c++20 -O3 --expt-relaxed-constexpr -Xcompiler -fPIC,-fvisibility=hidden
rule compile
  command = $compiler -MD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
rule link
  command = {linker} -shared $in -o $out {LINK}
"""


def compilers() -> "tuple[str | None, str | None]":
    """(C++ compiler, nvcc), None for what is missing or not wanted."""
    choice, home = os.environ.get("CURVKERN_CUDA", "auto"), os.environ.get("CUDA_HOME", "/usr/local/cuda")
    cxx = os.environ.get("CXX") or next(filter(None, map(shutil.which, ("g++", "clang++", "c++"))), None)
    nvcc = shutil.which(f"{home}/bin/nvcc") or shutil.which("nvcc")
    if choice not in ("auto", "1", "0"):
        sys.exit(f"curvkern: CURVKERN_CUDA is {choice!r}; it takes auto, 1 or 0")
    if choice == "1" and not (cxx and nvcc):
        sys.exit("curvkern: CURVKERN_CUDA=1, but nvcc or a C++ compiler is missing; set CUDA_HOME, CXX or PATH")
    return cxx, nvcc if choice != "0" else None


def cuda_flags(nvcc: str) -> "tuple[str, str]":
    """(code generation flags, macros that name the architectures and the toolkit)."""
    version, codes = (subprocess.check_output([nvcc, ask], text=True) for ask in ("--version", "--list-gpu-code"))
    known = set(re.findall(r"sm_(\d+)", codes))
    archs = re.findall(r"[^;, ]+", os.environ.get("CURVKERN_ARCHS", "")) or {"80", "90", "100", "120"} & known
    for bad in {arch for arch in archs if arch.rstrip("af") not in known}:
        sys.exit(f"curvkern: CURVKERN_ARCHS: {nvcc} does not know {bad!r}; write for example 80;90")
    archs = sorted(archs, key=lambda arch: int(arch.rstrip("af")))
    targets = [(arch, f"sm_{arch}") for arch in archs] + [(archs[-1], f"compute_{archs[-1]}")]
    release = re.findall(r"release ([\d.]+)", version)[0]
    macros = f"""'-DCURVKERN_CUDA_ARCHS="{",".join(archs)}"' '-DCURVKERN_CUDA_VERSION="{release}"'"""
    return " ".join(f"-gencode arch=compute_{arch},code={code}" for arch, code in targets), f"-DCURVKERN_CUDA {macros}"


def ninja_file(target: Path, cxx: str, nvcc: "str | None") -> str:
    """The build: one object per source and instruction set, and the link."""
    import pybind11

    codes, macros = cuda_flags(nvcc) if nvcc else ("", "")
    includes = f"'-I{sysconfig.get_path('include')}' '-I{pybind11.get_include()}'"
    objects = {"bindings.o": ("bindings.cpp", f"$cxx {includes} {macros}")}  # object: source, compiler and flags
    for name in sorted(path.stem for path in CSRC.glob("cpu/*.cpp")):
        for isa in ISAS if name != "parallel" else ["generic"]:
            flags = f"-DCURVKERN_ISA={isa} {ISAS[isa]} -ffp-contract=off {FILE_FLAGS.get(name, '')}"
            objects[f"cpu_{name}_{isa}.o"] = f"cpu/{name}.cpp", f"$cxx {flags}"
    for name in sorted(path.stem for path in CSRC.glob("cuda/*.cu")) if nvcc else []:
        objects[f"cuda_{name}.o"] = f"cuda/{name}.cu", f"$nvcc {codes}"
    edges = [f"build {out}: compile $csrc/{source}\n  compiler = {how}\n" for out, (source, how) in objects.items()]
    edges.append(f"build $target: link {' '.join(objects)}\n")
    linker = f"{nvcc} -ccbin {cxx} -cudart static -nodlink" if nvcc else cxx
    return NINJA.format(csrc=CSRC, target=target, cxx=cxx, nvcc=nvcc, linker=linker, LINK=LINK) + "".join(edges)


class BuildNative(build_ext):
    def build_extension(self, ext: Extension) -> None:
        build = CSRC.parent / "build" / f"native-{sys.implementation.cache_tag}"  # kept: build_temp may not be
        build.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        (build / "build.ninja").write_text(ninja_file(target, *compilers()))
        jobs = ["-j", os.environ["MAX_JOBS"]] if "MAX_JOBS" in os.environ else []
        subprocess.run([shutil.which("ninja") or "ninja", "-C", str(build), *jobs], check=True)


if __name__ == "__main__":
    native = compilers()[0] and sys.platform != "win32"  # the flags are those of g++ and clang++
    if not native:
        print("curvkern: no C++ compiler; installing as pure Python", file=sys.stderr)
    setup(ext_modules=[Extension("curvkern._C", [])] if native else [], cmdclass={"build_ext": BuildNative})

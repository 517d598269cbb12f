"""The build and what comes out of it: one binary for every torch, importable without torch, driver or GPU."""

import os
import re
import runpy
import shutil
import stat
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
import torch

import curvkern
from curvkern.backend import launch

ROOT = Path(__file__).parents[1]
SYSTEM_LIBRARIES = re.compile(r"(libc|libstdc\+\+|libm|libgcc_s|libpthread|libdl|librt|ld-linux[\w-]*)\.so\.\d+")


@pytest.fixture(scope="module")
def library():
    if launch.native is None:
        pytest.skip(launch.native_missing)
    return launch.native.__file__


@pytest.fixture
def tree(tmp_path):
    """A copy of what a build needs, without anything built."""
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "build")
    for name in ("csrc", "curvkern", "tests"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=built)
    for pattern in ("*.py", "*.toml", "*.md", "*.in", "*.txt", "LICENSE", "Makefile"):
        for file in ROOT.glob(pattern):
            shutil.copy(file, tmp_path)
    return tmp_path


def program(folder, name, text):
    """A stand-in for a compiler."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def setup_py(tree, *arguments, **environment):
    command = [sys.executable, "setup.py", "-q", *map(str, arguments)]
    inherited = {k: v for k, v in os.environ.items() if k not in ("CXX", "CURVKERN_CUDA", "CURVKERN_ARCHS", "MAX_JOBS")}
    return subprocess.run(command, cwd=tree, env=inherited | environment, capture_output=True, text=True, timeout=300)


@pytest.fixture
def build(monkeypatch):
    """The functions of setup.py, in an environment that says nothing."""
    for name in ("CXX", "CURVKERN_CUDA", "CURVKERN_ARCHS"):
        monkeypatch.delenv(name, raising=False)
    return runpy.run_path(str(ROOT / "setup.py"))


# the binary -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_needs_only_system_libraries(library):
    dynamic = subprocess.check_output(["readelf", "-d", library], text=True)
    needed = re.findall(r"Shared library: \[(.+)\]", dynamic)
    assert needed
    assert not [name for name in needed if not SYSTEM_LIBRARIES.fullmatch(name)]


@pytest.mark.skipif(sys.platform != "linux", reason="reads an ELF file")
def test_every_symbol_it_misses_is_pythons_or_the_c_librarys(library):
    """No torch symbol and no CUDA symbol: so the same binary serves every torch."""
    lines = subprocess.check_output(["nm", "-D", "--undefined-only", library], text=True).splitlines()
    missing = [line.split() for line in lines]
    assert any(name.startswith("Py") for _, name in missing)
    foreign = [n for kind, n in missing if kind != "w" and not re.match("_?Py|.*@(GLIBC|GLIBCXX|CXXABI|GCC)_", n)]
    assert not foreign


def test_imports_without_torch_and_without_site_packages(library):
    load = "spec = u.spec_from_file_location('curvkern._C', sys.argv[1]); m = u.module_from_spec(spec)"
    code = f"import sys, importlib.util as u; {load}; spec.loader.exec_module(m); print(m.ABI, 'torch' in sys.modules)"
    out = subprocess.check_output([sys.executable, "-I", "-S", "-c", code, library], text=True)
    assert out.split() == [str(launch.ABI), "False"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_cuda_call_without_a_driver_names_the_op_and_the_cause(library):
    if not launch.native.CUDA_ARCHS:
        pytest.skip("built without CUDA")
    cause = r"cudaError(InsufficientDriver|NoDevice) \(.*(driver|device)"
    with pytest.raises(RuntimeError, match=f"device_count: {cause}"):
        launch.native.device_count()
    with pytest.raises(RuntimeError, match=f"blend: {cause}"):
        launch.native.blend_cuda(0, 0, 0, 1, 1, 1, 1, 0, 0, 0)


@pytest.mark.gpu
def test_counts_the_devices(library):
    assert launch.native.device_count() == torch.cuda.device_count()


@pytest.mark.parametrize("isa", ["avx2", "avx512"])
def test_no_function_compiled_for_a_newer_processor_can_be_taken_for_an_older_one(isa):
    """Weak symbols (inline functions of the standard library) are merged by the linker, which keeps any one of them."""
    objects = sorted(ROOT.glob(f"build/native-{sys.implementation.cache_tag}/cpu_*_{isa}.o"))
    if not objects:
        pytest.skip(f"no objects for {isa} here; `make build` leaves them")
    found = {}
    for path in objects:
        for line in subprocess.check_output(["nm", "--defined-only", path], text=True).splitlines():
            if line.split()[1] in "WVuvw":
                found.setdefault(path.name, []).append(line.split()[2])
    assert not found


@pytest.mark.parametrize(
    "compiler, flags",
    [
        ("clang++", "-DCURVKERN_ISA=generic"),
        ("clang++", "-DCURVKERN_ISA=avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mfma"),
        ("aarch64-linux-gnu-g++", "-DCURVKERN_ISA=generic"),
    ],
)
def test_cpu_kernels_compile_elsewhere(compiler, flags):
    if shutil.which(compiler) is None:
        pytest.skip(f"{compiler} is not installed")
    for source in sorted((ROOT / "csrc/cpu").glob("*.cpp")):
        command = [compiler, "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", *flags.split(), source]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


# CUDA code ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cuobjdump(library):
    """Runs cuobjdump on the binary. The toolkit has one, and so has Triton."""
    if not launch.native.CUDA_ARCHS:
        pytest.skip("built without CUDA")
    found = shutil.which("cuobjdump")
    if not found:
        triton = pytest.importorskip("triton")
        found = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    return lambda *arguments: subprocess.check_output([found, *arguments, library], text=True)


@pytest.fixture(scope="module")
def usage(cuobjdump):
    """Architecture -> kernel as the linker names it -> (bytes of stack, bytes of local memory)."""
    found = {}
    for part in cuobjdump("-res-usage").split("Fatbin elf code:")[1:]:
        kernels = re.findall(r"Function (\S+):\s+REG:\d+ STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", part)
        arch = found.setdefault(re.search(r"arch = sm_(\w+)", part)[1], {})
        arch.update({name: (int(stack), int(local)) for name, stack, local in kernels})
    return found


def written_kernels():
    sources = [path.read_text() for path in ROOT.glob("csrc/cuda/*.cu")]
    return {name for text in sources for name in re.findall(r"__global__[^;{]*?(\w+_kernel)\(", text)}


def test_every_cuda_kernel_is_there_for_every_architecture(usage):
    assert written_kernels()
    assert set(usage) == set(launch.native.CUDA_ARCHS.split(","))
    for arch, kernels in usage.items():
        missing = [name for name in written_kernels() if not any(f"{len(name)}{name}" in kernel for kernel in kernels)]
        assert not missing, f"sm_{arch}"


def test_no_cuda_kernel_uses_local_memory(usage):
    for arch, kernels in usage.items():
        spilled = {kernel: used for kernel, used in kernels.items() if any(used)}
        assert not spilled, f"sm_{arch}: (stack, local)"


def test_ptx_of_the_newest_architecture_is_there_for_gpus_to_come(cuobjdump):
    newest = max(launch.native.CUDA_ARCHS.split(","), key=lambda arch: int(arch.rstrip("af")))
    assert f".sm_{newest}.ptx" in cuobjdump("-lptx")


def test_rollback_and_blend_move_16_bytes_at_a_time(cuobjdump, usage):
    linked = [name for name in next(iter(usage.values())) if re.search(r"\d(rollback|blend)_kernelE", name)]
    seen = []
    for part in cuobjdump("-sass", "-fun", ",".join(linked)).split("Fatbin elf code:")[1:]:
        arch = re.search(r"arch = sm_(\w+)", part)[1]
        for code in part.split("Function : ")[1:]:
            seen.append(arch)
            assert re.search(r"LDG\.E\.(\w+\.)*128", code), f"sm_{arch}: no 16-byte load in {code[:200]}"
            assert re.search(r"STG\.E\.(\w+\.)*128", code), f"sm_{arch}: no 16-byte store in {code[:200]}"
    assert sorted(seen) == sorted(2 * list(usage))


# setup.py -------------------------------------------------------------------------------------------------------------


def test_setup_py_imports_no_torch_and_is_short():
    text = (ROOT / "setup.py").read_text()
    assert not re.search(r"^\s*(import|from)\s+torch", text, re.MULTILINE)
    assert len(text.splitlines()) <= 100


def test_flags_of_single_files_name_files_that_exist(build):
    for name in build["FILE_FLAGS"]:
        assert (ROOT / f"csrc/cpu/{name}.cpp").is_file()


@pytest.mark.parametrize("value", ["sm_90", "8.0;9.0", "9999", "90x"])
def test_bad_architectures_are_named(build, monkeypatch, value, tmp_path):
    nvcc = program(tmp_path, "nvcc", 'echo "Cuda compilation tools, release 12.8, V1"; echo sm_80; echo sm_90')
    monkeypatch.setenv("CURVKERN_ARCHS", value)
    with pytest.raises(SystemExit, match=rf"CURVKERN_ARCHS: .*nvcc does not know '({value.replace(';', '|')})'; write"):
        build["cuda_flags"](str(nvcc))


def test_an_older_nvcc_builds_for_what_it_knows(build, tmp_path):
    nvcc = program(
        tmp_path, "nvcc", 'echo "Cuda compilation tools, release 12.4, V1"; echo sm_75; echo sm_80; echo sm_90'
    )
    codes, macros = build["cuda_flags"](str(nvcc))
    assert re.findall(r"code=(\w+)", codes) == ["sm_80", "sm_90", "compute_90"]
    assert '"80,90"' in macros
    assert '"12.4"' in macros


def test_named_architectures_come_in_order_and_ptx_for_the_newest(build, monkeypatch, tmp_path):
    nvcc = program(tmp_path, "nvcc", 'echo "release 12.8, V1"; echo sm_80; echo sm_90; echo sm_100')
    monkeypatch.setenv("CURVKERN_ARCHS", "100; 80,90a")
    assert re.findall(r"code=(\w+)", build["cuda_flags"](str(nvcc))[0]) == ["sm_80", "sm_90a", "sm_100", "compute_100"]


def test_curvkern_cuda_is_obeyed(build, monkeypatch, tmp_path):
    program(tmp_path / "bin", "nvcc", "")
    cxx = program(tmp_path / "bin", "g++", "")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    nvcc = str(tmp_path / "bin/nvcc")
    assert build["compilers"]() == (str(cxx), nvcc)
    monkeypatch.setenv("CURVKERN_CUDA", "0")
    assert build["compilers"]() == (str(cxx), None)
    monkeypatch.setenv("CURVKERN_CUDA", "1")
    assert build["compilers"]() == (str(cxx), nvcc)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    monkeypatch.setenv("PATH", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match="CURVKERN_CUDA=1, but nvcc or a C\\+\\+ compiler is missing"):
        build["compilers"]()
    monkeypatch.setenv("CURVKERN_CUDA", "yes")
    with pytest.raises(SystemExit, match="CURVKERN_CUDA is 'yes'; it takes auto, 1 or 0"):
        build["compilers"]()


def test_a_folder_with_a_space_and_max_jobs(tree):
    """ninja gets the jobs asked for; the build file it gets is right for a path with a space."""
    spaced = tree / "my folder"
    shutil.copytree(tree, spaced, ignore=shutil.ignore_patterns("my folder"))
    library = f"curvkern/_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    work = f'echo "$@" > "{tree}/said"; {shutil.which("ninja")} -n "$@" > "{tree}/steps"; touch {library}'
    program(tree / "bin", "ninja", work)
    path = f"{tree / 'bin'}:{os.environ['PATH']}"
    done = setup_py(spaced, "build_ext", "--build-lib", spaced, PATH=path, CURVKERN_CUDA="0", MAX_JOBS="3")
    assert done.returncode == 0, done.stderr
    assert (tree / "said").read_text().endswith("-j 3\n")
    steps = (tree / "steps").read_text()
    assert f"'{spaced}/csrc/bindings.cpp'" in steps
    assert f"'{spaced}/{library}'" in steps


def test_without_a_compiler_it_installs_as_pure_python(tree):
    done = setup_py(tree, "bdist_wheel", "-d", tree / "dist", PATH=str(tree / "empty"), CUDA_HOME=str(tree / "empty"))
    assert done.returncode == 0, done.stderr
    assert "no C++ compiler; installing as pure Python" in done.stderr
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.name == f"curvkern-{curvkern.__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not [name for name in names if name.endswith(".so")]
    packed = [path for path in (ROOT / "curvkern").rglob("*") if path.suffix in (".py", ".pyi", ".typed", ".html")]
    assert {str(path.relative_to(ROOT)) for path in packed} <= names


def test_the_source_distribution_can_be_built_from(tree):
    done = setup_py(tree, "sdist", "-d", tree / "dist", "--formats=zip", CURVKERN_CUDA="0")
    assert done.returncode == 0, done.stderr
    (sdist,) = (tree / "dist").iterdir()
    names = {name.split("/", 1)[1] for name in zipfile.ZipFile(sdist).namelist()}
    sources = {str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*.*") if path.is_file()}
    assert sources | {"setup.py", "pyproject.toml", "constraints.txt", "Makefile", "tests/conftest.py"} <= names


def test_the_version_is_the_same_everywhere():
    assert f'\nversion = "{curvkern.__version__}"\n' in (ROOT / "pyproject.toml").read_text()


@pytest.mark.slow
def test_isolated_wheel_builds_and_its_binary_needs_only_system_libraries(tree):
    """As a user's pip does it; fetches setuptools, pybind11 and ninja."""
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tree / "dist", tree]
    subprocess.run(command, check=True, timeout=1200)
    (wheel,) = (tree / "dist").iterdir()
    assert wheel.stat().st_size < 20e6
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [name for name in archive.namelist() if name.endswith(".so")]
        library = archive.extract(name, tree / "unpacked")
    test_needs_only_system_libraries(library)
    test_every_symbol_it_misses_is_pythons_or_the_c_librarys(library)
    test_imports_without_torch_and_without_site_packages(library)


# a binary that is not there, or not the right one ---------------------------------------------------------------------

WORKS = """
import torch, curvkern
weight, target = torch.zeros(9), torch.ones(9)
assert curvkern.rollback_(weight, target, mask=torch.ones(9, dtype=torch.bool)).item() == 9 and weight.sum() == 9
choice, = [c for c in curvkern.explain(curvkern.blend_, weight, target, 0.5) if c.backend == "cpu"]
print(choice.usable, choice.reason)
"""


@pytest.mark.parametrize(
    "native, warnings, reason",
    [
        ("None", 0, r"the native extension is not there \(.*curvkern\._C.*\); reinstall with a C\+\+ compiler"),
        ("types.SimpleNamespace(ABI=-1)", 1, r"has ABI -1, this Python code \d+; it is ignored: reinstall curvkern"),
    ],
    ids=["missing", "stale"],
)
def test_without_the_right_binary_ops_take_the_reference_and_say_why(native, warnings, reason):
    code = f"import sys, types; sys.modules['curvkern._C'] = {native}\n{WORKS}"
    environment = {k: v for k, v in os.environ.items() if k not in ("CURVKERN_BACKEND", "TRITON_INTERPRET")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert re.match(f"False .*{reason}", done.stdout), done.stdout
    assert done.stderr.count("RuntimeWarning") == warnings, done.stderr


@pytest.mark.parametrize("first", ["curvkern.blend_(w, t, 0.5, backend='cpu')", "w.copy_(t * 0.5)"])
def test_threads_after_a_fork(first):
    """The team of the parent's threads is not in a forked child, whether we or torch made it."""
    code = (
        "import os, torch, curvkern\n"
        "w, t = torch.zeros(1 << 20), torch.ones(1 << 20)\n"
        "torch.set_num_threads(2)\n"
        f"{first}\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    curvkern.blend_(w, t, 0.5, backend='cpu')\n"
        "    os._exit(0 if (w.numpy() == 0.75).all() else 1)\n"
        "print(os.waitpid(child, 0)[1])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "0\n"

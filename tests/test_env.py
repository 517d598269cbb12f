"""`curvkern env` answers, soon, and also where parts are broken."""

import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from curvkern import env
from curvkern.backend import launch
from curvkern.backend.register import REGISTERED

ROOT = Path(__file__).parents[1]
LIBRARY = Path(launch.native.__file__).name if launch.native else None


def run(*arguments, path=ROOT, **environment):
    """A fresh interpreter that finds what is in ``path`` first."""
    inherited = {k: v for k, v in os.environ.items() if k not in (*env.VARIABLES, "PYTHONPATH")}
    variables = inherited | {"PYTHONPATH": f"{path}:{ROOT}"} | environment
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=variables, cwd=path, capture_output=True, text=True, timeout=120)


def stub(folder, name, text):
    (folder / f"{name}.py").write_text(text)
    return folder


@pytest.fixture
def copy(tmp_path):
    """The package without its native extension."""
    shutil.copytree(ROOT / "curvkern", tmp_path / "curvkern", ignore=shutil.ignore_patterns("__pycache__", "*.so"))
    return tmp_path


def test_says_what_is_here(capsys):
    env.main([])
    said = capsys.readouterr().out
    assert [line.split()[0] for line in said.splitlines() if line[0] != " "] == list(env._SAY)
    assert "broken" not in said
    for op in REGISTERED:
        assert op in said


def test_json_says_the_same(capsys):
    env.main(["--json"])
    found = json.loads(capsys.readouterr().out)
    assert set(found["ops"]["ops"]) == set(REGISTERED)
    assert found["package"]["path"] == str(Path(env.__file__).parent)
    if launch.native is not None:
        assert found["native"]["cpu_isa"] in ("generic", "avx2", "avx512")
        assert found["native"]["path"] == launch.native.__file__


@pytest.mark.skipif(launch.native is None, reason="no native extension here")
def test_ops_name_the_backend_they_take_and_why_not_a_better_one(monkeypatch):
    monkeypatch.delenv("CURVKERN_BACKEND", raising=False)
    monkeypatch.setattr(env.importlib.import_module("torch").cuda, "is_available", lambda: False)
    rollback = env._ops()["ops"]["rollback_"]
    assert rollback == {"takes": "cpu", "not": {"cuda": "the tensors are on cpu"}}
    monkeypatch.setenv("CURVKERN_BACKEND", "cuda")
    assert env._ops()["ops"]["rollback_"] == {"takes": None, "not": {"cuda": "the tensors are on cpu"}}


def test_a_wrong_curvkern_backend_is_reported(monkeypatch):
    monkeypatch.setenv("CURVKERN_BACKEND", "cdua")
    said = env.text(env.probe_all())
    assert "broken: ValueError" in said
    assert "Did you mean 'cuda'?" in said


# broken parts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error", ["ModuleNotFoundError(\"No module named 'torch'\")", "OSError('libtorch_cpu.so: cannot open')"]
)
def test_answers_without_torch(tmp_path, error):
    path = stub(tmp_path, "torch", f"raise {error}")
    done = run("-m", "curvkern", "env", path=path)
    assert done.returncode == 0, done.stderr
    assert "cannot be used: " in done.stdout
    assert done.stdout.count("broken: ") == 3  # native, torch, ops: what cannot be asked without it
    assert "python 3." in done.stdout


def test_without_torch_any_use_of_the_package_says_so(tmp_path):
    path = stub(tmp_path, "torch", "raise ImportError('undefined symbol: _ZN3c10')")
    done = run("-c", "import curvkern; curvkern.rollback_", path=path)
    assert "ImportError: curvkern.rollback_: curvkern cannot work here: undefined symbol: _ZN3c10. " in done.stderr
    assert "`python -m curvkern env` says what is missing" in done.stderr


@pytest.mark.skipif(LIBRARY is None, reason="no native extension here")
def test_answers_with_a_broken_native_extension(copy):
    (copy / "curvkern" / LIBRARY).write_bytes(b"not a library")
    done = run("-m", "curvkern", "env", "--json", path=copy)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["native"]["path"] == str(copy / "curvkern" / LIBRARY)
    assert re.match(rf"the native extension is not there \(.*{re.escape(LIBRARY)}", found["native"]["missing"])
    assert found["ops"]["ops"]["rollback_"]["takes"] == "reference"


def test_answers_without_a_native_extension():
    hide = "import sys; sys.modules['curvkern._C'] = None; import curvkern.env; curvkern.env.main([])"
    done = run("-c", hide)
    assert done.returncode == 0, done.stderr
    assert "none: the native extension is not there" in done.stdout
    assert "reinstall with a C++ compiler" in done.stdout


def test_answers_with_broken_triton_and_typer_and_imports_nothing_slow(tmp_path):
    for name in ("triton", "transformers", "typer", "rich", "matplotlib"):
        stub(tmp_path, name, f"raise RuntimeError('{name} was imported')")
    done = run("-m", "curvkern", "env", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "was imported" not in done.stdout + done.stderr


def test_costs_little_more_than_importing_torch():
    """Processor time, so that a busy machine does not matter. On an idle one: below two seconds."""

    def seconds(*arguments):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert run(*arguments).returncode == 0
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    torch_alone = seconds("-c", "import torch")
    assert seconds("-m", "curvkern", "env") < 1.3 * torch_alone + 0.3


# the GPU --------------------------------------------------------------------------------------------------------------


def test_reads_nvidia_smi():
    smi = env._start(["printf", "NVIDIA H200, 9.0, 143771 MiB, 580.159.03\\n"])
    found = env._gpus(smi)
    gpu = {"name": "NVIDIA H200", "capability": "9.0", "memory": "143771 MiB", "driver": "580.159.03"}
    assert found == {"found": [gpu]}
    assert env._say_gpus(found) == ["NVIDIA H200, compute capability 9.0, 143771 MiB, driver 580.159.03"]


@pytest.mark.parametrize(
    "command, reason",
    [
        (["no-such-program"], "there is no nvidia-smi here"),
        (["sh", "-c", "echo no devices were found; exit 6"], "nvidia-smi failed: no devices were found"),
        (["sleep", "20"], "nvidia-smi gave no answer within 3 s"),
    ],
    ids=["absent", "failing", "hanging"],
)
def test_says_why_there_is_no_gpu(command, reason):
    assert env._say_gpus(env._gpus(env._start(command))) == [f"none: {reason}"]

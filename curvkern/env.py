"""``curvkern env``: what this machine has, and which backend each op takes here.

It must answer where parts are broken: only the standard library is imported at the top, and each probe fails alone.
It must answer soon: triton and transformers, seconds to import, are only asked for their version.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any

import curvkern

PACKAGES = ("torch", "triton", "transformers", "tokenizers", "safetensors", "peft", "numpy")
VARIABLES = ("CURVKERN_BACKEND", "TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS")
SMI = ("nvidia-smi", "--query-gpu=name,compute_cap,memory.total,driver_version", "--format=csv,noheader")

Found = dict[str, Any]


def main(argv: Sequence[str] | None = None) -> None:
    """Print what was found, as text or, with ``--json``, as JSON."""
    parser = argparse.ArgumentParser(prog="curvkern env", description="What this machine has, and what each op takes.")
    parser.add_argument("--json", action="store_true", help="print JSON")
    as_json = parser.parse_args(argv).json
    found = probe_all()
    print(json.dumps(found, indent=2) if as_json else text(found))


def probe_all() -> Found:
    """Everything, by section. A probe that fails leaves ``{"error": what it said}``."""
    smi = _start(SMI)  # answers while torch is being imported
    probes: dict[str, Callable[[], Found]] = {
        "package": _package,
        "native": _native,
        "versions": _versions,
        "torch": _torch,
        "machine": _machine,
        "gpus": lambda: _gpus(smi),
        "environment": lambda: {name: os.environ[name] for name in VARIABLES if name in os.environ},
        "ops": _ops,
    }
    return {name: _guarded(probe) for name, probe in probes.items()}


def _guarded(probe: Callable[[], Found]) -> Found:
    try:
        return probe()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}


def _start(command: Sequence[str]) -> subprocess.Popen[str] | None:
    try:
        return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    except OSError:
        return None


# probes ---------------------------------------------------------------------------------------------------------------


def _package() -> Found:
    broken = vars(curvkern).get("_broken")
    return {"version": curvkern.__version__, "path": str(Path(__file__).parent), "broken": broken and str(broken)}


def _native() -> Found:
    spec = importlib.util.find_spec("curvkern._C")
    found: Found = {"path": spec.origin if spec else None}
    from curvkern.backend import launch

    if launch.native is None:
        return found | {"missing": launch.native_missing}
    return found | {
        "abi": launch.native.ABI,
        "cpu_isa": launch.native.CPU_ISA,
        "cuda_toolkit": launch.native.CUDA_VERSION or None,
        "cuda_archs": [arch for arch in launch.native.CUDA_ARCHS.split(",") if arch],
    }


def _versions() -> Found:
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return versions


def _torch() -> Found:
    import torch

    flavour = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
    flavour = f"ROCm {torch.version.hip}" if torch.version.hip else flavour
    return {"built_for": flavour, "sees_gpu": torch.cuda.is_available(), "threads": torch.get_num_threads()}


def _machine() -> Found:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    cpu = models[0] if models else platform.processor() or platform.machine()
    return {"system": platform.platform(), "cpu": cpu, "cores": os.cpu_count()}


def _gpus(smi: subprocess.Popen[str] | None) -> Found:
    if smi is None:
        return {"found": [], "none": "there is no nvidia-smi here"}
    try:
        lines = smi.communicate(timeout=3)[0].splitlines()
    except subprocess.TimeoutExpired:
        smi.kill()
        return {"found": [], "none": "nvidia-smi gave no answer within 3 s"}
    if smi.returncode != 0:
        return {"found": [], "none": f"nvidia-smi failed: {' '.join(lines) or smi.returncode}"}
    keys = ("name", "capability", "memory", "driver")
    return {"found": [dict(zip(keys, line.split(", "), strict=True)) for line in lines]}


def _ops() -> Found:
    """For each op: the backend it takes for tensors on this machine's best device, and why not those before it."""
    import torch

    from curvkern.backend import dispatch
    from curvkern.backend.register import REGISTERED

    importlib.import_module("curvkern.ops")  # registers them; says why it cannot
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    ops: Found = {}
    for name, routes in sorted(REGISTERED.items()):
        wanted = dispatch.requested(name, "auto")
        asked = [route for route in routes if wanted in ("auto", route.backend)]
        choices = dispatch.choices(asked, wanted, device, lambda r: dispatch.backend_missing(r.backend, device))
        better = list(takewhile(lambda choice: not choice.chosen, choices))
        takes = choices[len(better)].backend if len(better) < len(choices) else None
        ops[name] = {"takes": takes, "not": {choice.backend: choice.reason for choice in better}}
        if not asked:
            ops[name]["not"][wanted] = "there is no such version of it"
    return {"device": str(device), "ops": ops}


# text -----------------------------------------------------------------------------------------------------------------


def text(found: Found) -> str:
    """The report for a terminal: a paragraph a section, its name in the margin."""
    paragraphs: list[str] = []
    for name, say in _SAY.items():
        section = found[name]
        said = [f"broken: {section['error']}"] if "error" in section else say(section)
        margins = [name, *[""] * (len(said) - 1)]
        paragraphs += [f"{margin:<13}{line}" for margin, line in zip(margins, said, strict=True)]
    return "\n".join(paragraphs)


def _say_package(package: Found) -> list[str]:
    broken = [f"cannot be used: {package['broken']}"] if package["broken"] else []
    return [f"curvkern {package['version']}, {package['path']}", *broken]


def _say_native(native: Found) -> list[str]:
    if "missing" in native:
        return [f"none: {native['missing']}"]
    archs = ", ".join(native["cuda_archs"])
    cuda = f"CUDA {native['cuda_toolkit']} kernels for sm {archs}, PTX for newer" if archs else "no CUDA kernels"
    return [native["path"], f"ABI {native['abi']}; CPU kernels for {native['cpu_isa']}; {cuda}"]


def _say_gpus(gpus: Found) -> list[str]:
    if not gpus["found"]:
        return [f"none: {gpus['none']}"]
    return ["{name}, compute capability {capability}, {memory}, driver {driver}".format(**gpu) for gpu in gpus["found"]]


def _say_ops(section: Found) -> list[str]:
    """Ops that fare alike share their lines."""
    alike: dict[str, list[str]] = {}
    for name, op in section["ops"].items():
        alike.setdefault(json.dumps(op), []).append(name)
    lines = [f"for tensors on {section['device']}"]
    for fate, names in alike.items():
        op = json.loads(fate)
        lines.append(f"{op['takes'] or 'nothing'}: {', '.join(names)}")
        lines += [f"  not {backend}: {reason}" for backend, reason in op["not"].items()]
    return lines


_SAY: dict[str, Callable[[Found], list[str]]] = {
    "package": _say_package,
    "native": _say_native,
    "versions": lambda versions: [", ".join(f"{name} {version}" for name, version in versions.items())],
    "torch": lambda t: [f"for {t['built_for']}, {t['threads']} threads, {'a' if t['sees_gpu'] else 'no'} GPU seen"],
    "machine": lambda m: [f"{m['system']}, {m['cpu']}, {m['cores']} cores"],
    "gpus": _say_gpus,
    "environment": lambda variables: [f"{name}={value}" for name, value in variables.items()] or ["nothing set"],
    "ops": _say_ops,
}

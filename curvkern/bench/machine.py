"""What is measured on: the machine by name, and the peaks that every figure is compared with, taken in the same run."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch

import curvkern
from curvkern.bench.clock import Call, clock_on


@dataclass(frozen=True)
class Machine:
    """A machine and what it can do at most.

    Attributes:
        name: GPU, or processor.
        device: ``"cuda"`` or ``"cpu"``.
        parts: what it is made of, in words: cores and threads, or compute capability and driver.
        versions: of torch, triton, Python.
        commit: of the source tree, ``+`` where it was edited since; the package's version outside of a tree.
        cache: bytes of the last-level cache.
        copy: bytes a second of a copy, read and written ones counted.
        half: flops a second of a bfloat16 matrix product.
        single: flops a second of a float32 matrix product.
    """

    name: str
    device: str
    parts: str
    versions: str
    commit: str
    cache: int
    copy: float
    half: float
    single: float

    @property
    def slug(self) -> str:
        """A file name for this machine."""
        name = re.sub(r"\((r|tm)\)|nvidia|geforce|\bprocessor\b|\bcpu\b|[^a-z0-9.]+", " ", self.name.lower())
        return "-".join(name.split()) + ("" if self.device == "cuda" else f"-{torch.get_num_threads()}t")

    def rate(self, dtype: torch.dtype) -> float:
        """Flops a second that inputs of ``dtype`` can reach: a narrow type may always be widened."""
        return self.single if dtype.itemsize > 2 else max(self.half, self.single)

    def header(self) -> list[str]:
        """Three lines for the top of a table."""
        rates = f"bf16 matmul {self.half / 1e12:.3g} TFLOP/s, fp32 {self.single / 1e12:.3g} TFLOP/s"
        peaks = f"measured in this run: copy {self.copy / 1e9:.4g} GB/s (read + write), {rates}"
        return [f"{self.name}, {self.parts}", f"{self.versions}, curvkern {self.commit}", peaks]


def examine(device: torch.device) -> Machine:
    """Describe the machine and measure its peaks: a second on a GPU, a few on a CPU."""
    cuda = device.type == "cuda"
    cache = _cache(device)
    size = 8192 if cuda else 2048
    return Machine(
        name=torch.cuda.get_device_name(device) if cuda else _processor(),
        device=device.type,
        parts=_gpu_parts(device) if cuda else f"{_cores()} cores, {torch.get_num_threads()} threads",
        versions=", ".join(f"{name} {_version(name)}" for name in ("torch", "triton"))
        + f", Python {platform.python_version()}",
        commit=_commit(),
        cache=cache,
        copy=_copy_rate(device, 8 * cache),
        half=_product_rate(device, torch.bfloat16, size),
        single=_product_rate(device, torch.float32, size),
    )


def _copy_rate(device: torch.device, size: int) -> float:
    source = torch.randn(size // 4, device=device)
    target = torch.empty_like(source)
    return 2 * size / _seconds(lambda: target.copy_(source), device)


def _product_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """On random numbers: zeros draw less power and are multiplied faster."""
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return 2 * size**3 / _seconds(lambda: torch.mm(a, b, out=out), device)


def _seconds(call: Call, device: torch.device) -> float:
    """The fastest of some: a peak is what can be reached."""
    sample = clock_on(device, call)
    sample()
    return min(sample() for _ in range(7))


def _cache(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    units = {"K": 1 << 10, "M": 1 << 20}
    found = [int(text[:-1]) * units.get(text[-1], 1) for text in (path.read_text().strip() for path in sizes)]
    return max(found, default=32 << 20)


def _processor() -> str:
    with contextlib.suppress(OSError):
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if found:
            return " ".join(found[1].split())
    return platform.processor() or platform.machine()


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu_parts(device: torch.device) -> str:
    gpu = torch.cuda.get_device_properties(device)
    driver = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader").partition("\n")[0]
    memory = f"{gpu.total_memory / 2**30:.0f} GiB"
    return f"sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} SMs, {memory}, driver {driver or 'unknown'}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    root = Path(__file__).parents[2]
    commit = (
        _output("git", "-C", str(root), "rev-parse", "--short", "HEAD") if (root / "pyproject.toml").exists() else ""
    )
    if not commit:
        return curvkern.__version__
    return commit + ("+" if _output("git", "-C", str(root), "status", "--porcelain", "-uno") else "")


def _output(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""

"""Tensor to pointer, dtype code, device and stream: the only importer of the native extension."""

from __future__ import annotations

import importlib
import warnings
from array import array
from collections.abc import Sequence
from enum import Enum
from types import ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor

ABI = 4

DTYPE_CODES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
RULE_CODES = {"grad": 0, "taylor": 1, "fisher": 2, "delta": 3, "gain": 4}
GATE_CODES = {"none": 0, "descent": 1, "conflict": 2}


def _load() -> tuple[ModuleType | None, str]:
    """The native extension, or None and the reason."""
    try:
        native = importlib.import_module("curvkern._C")
    except ImportError as error:
        return None, f"the native extension is not there ({error}); reinstall with a C++ compiler"
    if native.ABI != ABI:
        reason = f"the native extension has ABI {native.ABI}, this Python code {ABI}; it is ignored: reinstall curvkern"
        warnings.warn(f"curvkern: {reason}", RuntimeWarning, stacklevel=2)
        return None, reason
    return native, ""


native, native_missing = _load()


def cpu_missing() -> str | None:
    """Why native CPU kernels cannot run, or None."""
    return None if native is not None else native_missing


def cuda_missing(device: torch.device) -> str | None:
    """Why native CUDA kernels cannot run on ``device``, or None."""
    if device.type != "cuda":
        return f"the tensors are on {device}"
    if torch.version.hip is not None:
        return "this is a ROCm build of torch; native kernels are CUDA"
    if native is None:
        return native_missing
    if not native.CUDA_ARCHS:
        return "curvkern was built without CUDA; reinstall where nvcc is found (CURVKERN_CUDA=1)"
    major, minor = torch.cuda.get_device_capability(device)
    if not _runs_on(native.CUDA_ARCHS, major, minor):
        return (
            f"built for sm {native.CUDA_ARCHS}, this GPU is sm_{major}{minor}; "
            f"reinstall with CURVKERN_ARCHS={major}{minor}"
        )
    return None


def _runs_on(archs: str, major: int, minor: int) -> bool:
    """Whether code for ``archs`` (PTX of the newest) runs on compute capability ``major.minor``."""
    built = [int(arch.rstrip("af")) for arch in archs.split(",")]
    capability = 10 * major + minor
    binary = any(arch // 10 == major and arch <= capability for arch in built)
    return binary or max(built) <= capability


def _lower(argument: Any) -> Any:
    """A launcher's argument: an address for a tensor, a code for a dtype, 0 for None."""
    if argument is None:
        return 0
    kind = type(argument)
    if kind is int or kind is float:  # the most, so first: a call lowers up to twenty
        return argument
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    if kind is torch.dtype:
        return DTYPE_CODES[argument]
    return argument.value if isinstance(argument, Enum) else argument


def constant(name: str) -> int:
    """A number of csrc/launch.h that Python code needs to size a workspace."""
    return getattr(native, name)


_exchange = getattr(Tensor, "__dlpack_c_exchange_api__", None)
_readable = type(_exchange).__name__ == "PyCapsule"  # from torch 2.10 on
_plain = (Tensor, torch.nn.Parameter)


def pair_table(xs: Sequence[Tensor], ys: Sequence[Tensor] | None) -> Any:
    """The table of csrc/launch.h for lists of tensors that pair up, each alone without ``ys``; they must outlive it.

    Returns:
        ``address``, ``tensors``, ``chunks``; or None, where these are no lists or tuples (others may make their tensors
        when they are asked for them, and keep none), a tensor is not plain, contiguous, on the CPU and float32,
        float16 or bfloat16, the lists do not pair up, a gradient would be recorded, or torch is too old to be asked.
    """
    if native is None or not _readable or type(xs) not in (list, tuple) or type(ys) not in (list, tuple, NoneType):
        return None
    both = [xs if type(xs) is list else list(xs), ys if type(ys) is list else list(ys or ())]
    return native.pair_table(_exchange, _plain, torch.is_grad_enabled(), *both, ys is not None)


def edit_pairs(launcher: str, table: Any, numbers: Sequence[float] | Tensor) -> None:
    """Run a launcher of list edits on a `pair_table` with its float32 numbers: `native_op` takes thrice as long."""
    kept = numbers if isinstance(numbers, Tensor) else array("f", numbers)
    address = kept.data_ptr() if isinstance(kept, Tensor) else kept.buffer_info()[0]
    getattr(native, launcher)(table.address, address, table.tensors, table.chunks, torch.get_num_threads())


def empty_like(tensor: Tensor) -> Tensor:
    """A new contiguous CPU tensor of that shape and dtype, in large pages: small ones cost a pass of their own."""
    out = torch.empty(tensor.shape, dtype=tensor.dtype)
    if native is not None and out.nbytes >= 4 << 20:
        native.large_pages(out.data_ptr(), out.nbytes)
    return out


def native_op(name: str, device: torch.device, *arguments: Any) -> None:
    """Run the launcher ``name``: on the CPU with torch's threads, on a GPU on torch's current stream.

    Tensors must be contiguous and outlive the call.
    """
    lowered = [_lower(argument) for argument in arguments]
    if device.type == "cpu":
        getattr(native, f"{name}_cpu")(*lowered, torch.get_num_threads())
    else:
        stream = torch.cuda.current_stream(device).cuda_stream
        getattr(native, f"{name}_cuda")(*lowered, device.index, stream)

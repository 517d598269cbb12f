"""Tensor to pointer, and Python's numbers against the C++ header's."""

import re
from enum import Enum
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from curvkern.backend import launch
from curvkern.backend.launch import cuda_missing, native_op

HEADER = (Path(__file__).parents[2] / "csrc/launch.h").read_text()
GPU = torch.device("cuda", 0)


def header_enum(name):
    body = re.search(rf"enum class {name} : int32_t {{(.*?)}}", HEADER, re.DOTALL)[1]
    return {key.lower(): int(value) for key, value in re.findall(r"k(\w+) = (\d+)", body)}


def test_codes_are_the_headers():
    assert {str(d).removeprefix("torch."): code for d, code in launch.DTYPE_CODES.items()} == header_enum("DType")
    assert header_enum("Rule") == launch.RULE_CODES
    assert header_enum("Gate") == launch.GATE_CODES


def test_abi_is_the_headers():
    assert int(re.search(r"kAbi = (\d+)", HEADER)[1]) == launch.ABI


def test_arguments_become_addresses_codes_and_numbers(monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "native", SimpleNamespace(f_cpu=lambda *a: calls.append(a)))
    x = torch.zeros(8)[3:]
    code = Enum("Code", {"two": 2})
    native_op("f", torch.device("cpu"), x, None, 7, 0.5, torch.bfloat16, code.two)
    assert calls == [(x.data_ptr(), 0, 7, 0.5, 2, 2, torch.get_num_threads())]


def test_a_gpu_call_gets_the_device_and_torchs_stream(monkeypatch):
    calls = []
    monkeypatch.setattr(launch, "native", SimpleNamespace(f_cuda=lambda *a: calls.append(a)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=100 + device.index))
    native_op("f", torch.device("cuda", 1), 7)
    assert calls == [(7, 1, 101)]


# the binding ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def native():
    if launch.native is None:
        pytest.skip(launch.native_missing)
    return launch.native


def test_a_dtype_code_it_does_not_know_is_an_error(native):
    with pytest.raises(ValueError, match="blend: unsupported dtype code; this binary knows float32, float16 and bfl"):
        native.blend_cpu(0, 0, 0, 1, 1, 1, 1, 99, 1)


def test_wrong_arguments_are_an_error_and_no_crash(native):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.blend_cpu(0, 0, 0)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.blend_cpu("weight", 0, 0, 1, 1, 1, 1, 0, 1)
    with pytest.raises(TypeError, match="incompatible function arguments"):
        native.blend_cpu(-1, 0, 0, 1, 1, 1, 1, 0, 1)


# why CUDA kernels cannot run ------------------------------------------------------------------------------------------


@pytest.fixture
def capability(monkeypatch):
    """A GPU of a given compute capability, and a binary built for given architectures."""

    def pretend(built, major, minor):
        monkeypatch.setattr(launch, "native", SimpleNamespace(CUDA_ARCHS=built))
        monkeypatch.setattr(torch.version, "hip", None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (major, minor))
        return cuda_missing(GPU)

    return pretend


@pytest.mark.parametrize(
    "built, major, minor, runs",
    [
        ("80,90,100,120", 8, 0, True),
        ("80,90,100,120", 8, 9, True),  # code for 8.0 runs on every 8.x
        ("80,90,100,120", 9, 0, True),
        ("80,90,100,120", 7, 5, False),
        ("80,90,100,120", 12, 1, True),
        ("80,90,100,120", 13, 0, True),  # the newest one's PTX
        ("90", 8, 0, False),
        ("80", 9, 0, True),  # PTX again
        ("86", 8, 0, False),
        ("80,90a", 9, 0, True),
    ],
)
def test_which_gpus_a_binary_runs_on(capability, built, major, minor, runs):
    assert (capability(built, major, minor) is None) == runs


def test_reasons_say_what_to_do(capability, monkeypatch):
    assert capability("90", 8, 6) == "built for sm 90, this GPU is sm_86; reinstall with CURVKERN_ARCHS=86"
    assert "built without CUDA; reinstall where nvcc is found" in capability("", 9, 0)
    monkeypatch.setattr(torch.version, "hip", "6.3")
    assert cuda_missing(GPU) == "this is a ROCm build of torch; native kernels are CUDA"
    assert cuda_missing(torch.device("cpu")) == "the tensors are on cpu"
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(launch, "native", None)
    monkeypatch.setattr(launch, "native_missing", "it is not there")
    assert cuda_missing(GPU) == launch.cpu_missing() == "it is not there"

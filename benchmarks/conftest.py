"""pytest-benchmark on GPUs: a clock of the device's events; what was measured on stands in the JSON."""

import pytest
import torch

from curvkern.bench.machine import examine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_clock():
    """A timer: seconds by the GPU's own clock. Each reading waits for what was launched before it."""
    start = torch.cuda.Event(enable_timing=True)
    start.record()

    def device_seconds():
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        return start.elapsed_time(now) / 1e3

    return device_seconds


def pytest_collection_modifyitems(items):
    if DEVICE.type == "cuda":
        clock = device_clock()
        for item in items:
            item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.hookimpl(optionalhook=True)
def pytest_benchmark_update_machine_info(config, machine_info):
    machine = examine(DEVICE)
    machine_info["curvkern"] = {**vars(machine), "slug": machine.slug}

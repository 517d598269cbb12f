"""pytest-benchmark on GPUs: a clock of the device's events; what was measured on stands in the JSON."""

import pytest
import torch

from curvkern.bench.machine import examine

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def device_clock():
    """A timer: seconds by the GPU's own clock. Each reading waits for what was launched before it."""
    total = 0.0
    last = torch.cuda.Event(enable_timing=True)
    last.record()

    def device_seconds():
        nonlocal total, last
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        total += last.elapsed_time(now) / 1e3  # from event to event: one from the start would be a float32 of minutes
        last = now
        return total

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

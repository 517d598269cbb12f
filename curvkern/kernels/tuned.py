"""Launch configurations that `curvkern bench --tune` found to be faster on this GPU than what kernels choose."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Generator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
import triton

_log = logging.getLogger("curvkern")
_trying: dict[str, dict[str, int]] = {}


def launch_of(kernel: str, device: torch.device, default: dict[str, int]) -> dict[str, int]:
    """The tile sides and options a kernel is launched with: ``default``, changed to what was measured.

    Args:
        kernel: a key of the table, such as ``"gram half"``.
        device: where it runs; tables are of GPUs.
        default: what the kernel chose by itself. Only its keys are looked up.
    """
    if kernel in _trying:
        found = _trying[kernel]
    else:
        found = _table(device.index or 0).get(kernel) if device.type == "cuda" else None
    return {key: found.get(key, value) for key, value in default.items()} if found else default


@contextmanager
def trying(kernel: str, launch: dict[str, int]) -> Generator[None]:
    """Launch ``kernel`` like this inside the block; nothing given: as it chooses by itself, whatever the table says."""
    _trying[kernel] = launch
    try:
        yield
    finally:
        del _trying[kernel]


def table_path(gpu: str) -> Path:
    """Where the table of a GPU lies, in the user's cache."""
    return Path.home() / ".cache" / "curvkern" / f"{'-'.join(gpu.lower().split())}.json"


def save_table(gpu: str, launches: dict[str, dict[str, int]]) -> Path:
    """Write the table whole, or not at all."""
    path = table_path(gpu)
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}")
    draft.write_text(json.dumps({"gpu": gpu, **_versions(), "launches": launches}, indent=1), encoding="utf-8")
    draft.replace(path)
    _table.cache_clear()
    return path


def read_table(gpu: str) -> dict[str, dict[str, int]]:
    """The table of a GPU; empty where there is none, or none that fits: that is said once."""
    path = table_path(gpu)
    try:
        held: Any = json.loads(path.read_text(encoding="utf-8"))
        found = {name: held[name] for name in ("gpu", *_versions())}
        launches = {name: {key: int(value) for key, value in one.items()} for name, one in held["launches"].items()}
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s: not a table of launches (%s); made anew by: curvkern bench --tune", path, error)
        return {}
    wanted = {"gpu": gpu, **_versions()}
    if found != wanted:
        _log.warning("%s: measured with %s, this is %s; made anew by: curvkern bench --tune", path, found, wanted)
        return {}
    return launches


def _versions() -> dict[str, str]:
    return {"triton": triton.__version__}


@lru_cache
def _table(index: int) -> dict[str, dict[str, int]]:
    return read_table(torch.cuda.get_device_name(index))

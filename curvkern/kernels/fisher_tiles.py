"""How the Fisher kernel cuts its work: tiles of the weight for each GPU, and steps of tokens."""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from curvkern.kernels.packed import generation
from curvkern.kernels.tuned import launch_of


class Tiling(NamedTuple):
    """Tile of the weight and tokens a step; what the compiler is told."""

    block_o: int
    block_i: int
    block_k: int
    options: dict[str, int]


def tiling(o: int, i: int, experts: int, wide: bool, plain: bool, generation: int, processors: int) -> Tiling:
    """128 x 128 x 64, less where registers would spill or tiles would not fill the GPU.

    9.x and 10.x multiply from shared memory. The others hold operands in registers beside the sums, so there all that
    is not ``plain`` (operands of one half precision as they come, no second sum) gets half a tile, of shorter steps.
    ``wide``: float32, on no tensor core. Two stages of the largest fit in the 64 KB of an AMD, three in the 99 of 12.x.
    """
    roomy = plain or generation in (9, 10)
    block_o, block_i = (64, 64) if wide else (128, 128 if roomy else 64)
    block_o, block_i = (max(16, min(b, triton.next_power_of_2(side))) for b, side in ((block_o, o), (block_i, i)))
    while max(block_o, block_i) > 64 and experts * triton.cdiv(o, block_o) * triton.cdiv(i, block_i) < processors:
        block_o, block_i = (block_o // 2, block_i) if block_o >= block_i else (block_o, block_i // 2)
    warps = 8 if block_o * block_i >= 128 * 64 else 4
    return Tiling(block_o, block_i, 64 if roomy and not wide else 32, {"num_warps": warps, "num_stages": 3})


def tile_of(batch: Any, weight_grad: Tensor | None, token: bool) -> Tiling:
    """The tiling for a packed input."""
    _, o, i = batch.shape
    device, dtypes = batch.grad_output.device, {batch.grad_output.dtype, batch.activation.dtype}
    plain = len(dtypes) == 1 and weight_grad is None and not token
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    wide = torch.float32 in dtypes
    own = tiling(o, i, batch.experts, wide, plain, generation(device), processors)
    if own.block_o * own.block_i < (64 * 64 if wide else 128 * 64):
        return own  # cut down for a small weight
    kind = "wide" if wide else "plain" if plain else "token" if token else "two sums"
    sides = {"block_o": own.block_o, "block_i": own.block_i, "block_k": own.block_k}
    found = launch_of(f"fisher {kind}", device, sides | own.options)
    return Tiling(*(found[side] for side in sides), options={name: found[name] for name in own.options})


class Steps(NamedTuple):
    """Ragged input cut into steps of one sample each; see `fisher_kernel`."""

    at: Tensor
    stop: Tensor
    run: Tensor
    first: Tensor


def ragged_steps(starts: Tensor, first_run: Tensor | None, tokens: int, block_k: int) -> Steps:
    """Built on the device: how long samples are is never asked for. At most tokens / block_k + samples steps."""
    runs = starts.numel() - 1
    ends = ((starts.diff() + (block_k - 1)) // block_k).cumsum(0)
    before = torch.cat((ends.new_zeros(1), ends))
    step = torch.arange(tokens // block_k + runs, device=starts.device)
    run = torch.searchsorted(ends, step, right=True).clamp(max=max(runs - 1, 0))
    at = starts[run] + (step - before[run]) * block_k
    first = before[[0, -1]] if first_run is None else before[first_run]
    return Steps(at.int(), starts[run + 1].int(), run.int(), first.int())


def describable(x: Tensor) -> bool:
    """Whether the copy engine of 9.x and later can read it: 16-byte aligned rows."""
    return (
        generation(x.device) >= 9
        and x.data_ptr() % 16 == 0
        and x.stride(0) * x.element_size() % 16 == 0
        and x.stride(0) >= x.shape[1]
    )

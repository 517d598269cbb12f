"""What a case is, and the layers of language models that cases are made of.

Bytes and flops are the algorithm's (each input once, each output once), never a guess at what a kernel does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

#: ``edge``: small, at the borders of kernels' regimes, for tests; ``tiny``: so small that only the host's time is left;
#: ``s``: seconds on two cores; ``m``: a layer on a GPU; ``l``: the wide layers.
Size = Literal["edge", "tiny", "s", "m", "l"]

#: Linear layers, [out, in].
LAYERS = {
    "Pythia-70M o": (512, 512),
    "Qwen3-0.6B k": (1024, 1024),
    "Qwen3-0.6B up": (3072, 1024),
    "Gemma-3-1B o": (1152, 1024),
    "Gemma-3-4B up": (10240, 2560),
    "Llama-2-7B q": (4096, 4096),
    "Llama-2-7B up": (11008, 4096),
    "Llama-3-8B up": (14336, 4096),
    "Llama-3-70B q": (8192, 8192),
    "Llama-3-70B down": (8192, 28672),
    "Qwen3-30B-A3B expert": (768, 2048),
}

#: What ops that take a weight once are measured on.
MEASURED: tuple[tuple[str, Size], ...] = (
    ("Qwen3-0.6B k", "s"),
    ("Qwen3-0.6B up", "s"),
    ("Llama-2-7B q", "m"),
    ("Gemma-3-4B up", "m"),
    ("Llama-3-8B up", "l"),
    ("Llama-3-70B down", "l"),
)


@dataclass(frozen=True)
class Case:
    """One op on one input.

    Attributes:
        op: stem of the op's files.
        function: public function, also the name of its reference (``<function>_ref`` without the underscore).
        label: the shape in words.
        dtype: of weights or activations.
        size: where it is used.
        make: device and float64 switch -> arguments; the same numbers every time.
        bytes: read and written.
        flops: multiply-adds count two.
    """

    op: str
    function: str
    label: str
    dtype: torch.dtype
    size: Size
    make: Callable[[str], tuple[tuple[Any, ...], dict[str, Any]]]
    bytes: int = 0
    flops: int = 0

    def __str__(self) -> str:
        return f"{self.function}-{self.label}-{self.dtype_name}".replace(" ", "_")

    @property
    def dtype_name(self) -> str:
        """``"bfloat16"``."""
        return str(self.dtype).removeprefix("torch.")


def random(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu", seed: int = 0) -> Tensor:
    """Normal numbers; the same on every device."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).to(device)


FLOATS = (torch.float32, torch.float16, torch.bfloat16)
WIDE_AND_HALF = (torch.float32, torch.bfloat16)


def text(shape: tuple[int, ...], layer: str = "") -> str:
    """``"Llama-2-7B q 4096x4096"``."""
    return f"{layer} {'x'.join(map(str, shape))}".lstrip()

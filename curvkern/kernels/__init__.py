"""The Triton version of each op. Modules here import triton, so they are imported only when a kernel runs.

Each module lists in ``AHEAD_OF_TIME`` what the tests compile without a GPU for every target.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

#: What is compiled ahead of time -> compute capability, the major number; 0 on AMD.
GENERATIONS = {"sm_80": 8, "sm_90": 9, "sm_100": 10, "sm_120": 12, "gfx942": 0}


@dataclass(frozen=True)
class Ahead:
    """One kernel specialisation to compile ahead of time.

    Attributes:
        kernel: the ``@triton.jit`` function.
        signature: argument name -> Triton type, e.g. ``{"x_ptr": "*bf16", "n": "i64"}``; left out are constants.
        constants: the constexpr arguments, and pointers that are None.
        options: launch options (``num_warps``, ``num_stages``).
        matrix: the kernel must use matrix instructions.
        elsewhere: target -> what runs there instead.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=lambda: {"num_warps": 4})
    matrix: bool = False
    elsewhere: dict[str, Ahead] = field(default_factory=dict)


def on_each_target(specialise: Callable[[int], Ahead]) -> Ahead:
    """One Ahead of a kernel whose launch depends on the GPU: ``specialise`` gives that of a generation."""
    return replace(
        specialise(GENERATIONS["sm_90"]),
        elsewhere={target: specialise(generation) for target, generation in GENERATIONS.items()},
    )

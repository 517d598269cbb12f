"""The Triton version of each op. Modules here import triton, so they are imported only when a kernel runs.

Each module lists in ``AHEAD_OF_TIME`` what the tests compile without a GPU for every target.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Ahead:
    """One kernel specialisation to compile ahead of time.

    Attributes:
        kernel: the ``@triton.jit`` function.
        signature: argument name -> Triton type, e.g. ``{"x_ptr": "*bf16", "n": "i64"}``; left out are constants.
        constants: the constexpr arguments, and pointers that are None.
        options: launch options (``num_warps``, ``num_stages``).
        matrix: the kernel must use matrix instructions.
    """

    kernel: Any
    signature: dict[str, str]
    constants: dict[str, Any]
    options: dict[str, Any] = field(default_factory=lambda: {"num_warps": 4})
    matrix: bool = False

"""Random numbers by counter: the same (seed, element) gives the same bits on every device and in every backend.

Philox 4x32-10: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_WORD = 0xFFFFFFFF
_INT64 = 1 << 63


def philox_rounds(counter: list[Tensor], key: tuple[int, int] | tuple[Tensor, Tensor]) -> list[Tensor]:
    """Philox 4x32-10 of a counter of four words, int64 tensors in [0, 2^32), under a key of two."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _product(c0, 0xD2511F53)
        high2, low2 = _product(c2, 0xCD9E8D57)
        c0, c1, c2, c3 = high2 ^ c1 ^ k0, low2, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
    return [c0, c1, c2, c3]


def philox_ref(seed: int, n: int, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """Words offset .. offset + n of the stream of a seed: word w is word w % 4 of the counter (w / 4, 0).

    Args:
        seed: the key, a 64-bit integer.
        n: how many.
        offset: the first, at least 0.
        device: where.

    Returns:
        int64 [n], in [0, 2^32).
    """
    first = offset // 4
    index = torch.arange(first, -(-(offset + n) // 4), device=device)
    zero = torch.zeros_like(index)
    words = philox_rounds([index & _WORD, index >> 32 & _WORD, zero, zero], (seed & _WORD, seed >> 32 & _WORD))
    return torch.stack(words, 1).reshape(-1)[offset - 4 * first :][:n]


def philox_rows(seeds: Sequence[int], n: int, device: torch.device | str = "cpu") -> Tensor:
    """int64 [seeds, n]: the first n words of the stream of each seed."""
    low, high = (torch.tensor([seed >> at & _WORD for seed in seeds], device=device)[:, None] for at in (0, 32))
    index = torch.arange(-(-n // 4), device=device).expand(len(seeds), -1)
    zero = torch.zeros_like(index)
    return torch.stack(philox_rounds([index & _WORD, index >> 32, zero, zero], (low, high)), 2).flatten(1)[:, :n]


def signs_ref(seed: int, n: int, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    """float64 [n] of +-1: number e is -1 where bit e % 32 (0: the lowest) of word e // 32 is set."""
    first = offset // 32
    words = philox_ref(seed, -(-(offset + n) // 32) - first, first, device)
    bits = (words[:, None] >> torch.arange(32, device=device)) & 1
    return 1.0 - 2.0 * bits.reshape(-1)[offset - 32 * first :][:n].double()


def normals_ref(seed: int, n: int, offset: int = 0, device: torch.device | str = "cpu") -> Tensor:
    r"""float64 [n] of standard normal numbers, by Box and Muller from pairs of words.

    Words (2p, 2p + 1) give the numbers 2p and 2p + 1, :math:`\sqrt{-2 \log u} (\cos, \sin)(2\pi v)`, with
    :math:`u = \lfloor w_{2p} / 2 \rfloor 2^{-31} + 2^{-32}` rounded to float32 and :math:`v = w_{2p+1} 2^{-32}`.
    """
    first = offset // 2
    words = philox_ref(seed, 2 * (-(-(offset + n) // 2) - first), 2 * first, device).reshape(-1, 2)
    u = (words[:, 0] >> 1).float() * 2.0**-31 + 2.0**-32
    radius, angle = (-2.0 * u.double().log()).sqrt(), words[:, 1].double() * (2.0 * math.pi * 2.0**-32)
    z = torch.stack([radius * angle.cos(), radius * angle.sin()], 1)
    return z.reshape(-1)[offset - 2 * first :][:n]


def check_stream(op: str, seed: int, offset: int) -> None:
    """Raise ValueError unless seed and offset fit into 64 bits and offset is not negative."""
    for name, value, least in (("seed", seed, -_INT64), ("offset", offset, 0)):
        if not least <= value < _INT64:
            raise ValueError(f"{op}: {name} is {value}; wanted an integer from {least} to 2^63 - 1.")


def _product(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    """Upper and lower word of the product; in halves of b, as int64 cannot hold it."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    middle = (low >> 16) + high
    return middle >> 16, ((middle & 0xFFFF) << 16) | (low & 0xFFFF)

"""Philox 4x32-10 in torch: the definition of the random words that csrc/rules.h and Triton regenerate."""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def philox_ref(seed: int, n: int, device: torch.device | str = "cpu") -> Tensor:
    """Random words from a counter: the same (seed, element) gives the same word on every backend.

    Philox 4x32-10 of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011). The counter is
    {lo(index), hi(index), 0, 0}, the key {lo(seed), hi(seed)}; element e has word ``e % 4`` of index ``e // 4``.

    Args:
        seed: 0 to 2^63 - 1.
        n: how many words.
        device: where.

    Returns:
        int64 [n], each 0 to 2^32 - 1.
    """
    index = torch.arange(-(-n // 4), dtype=torch.int64, device=device)
    c0, c1 = index & _LOW, index >> 32
    c2 = c3 = torch.zeros_like(index)
    k0, k1 = seed & _LOW, seed >> 32
    for _ in range(10):
        # Products wrap at 64 bits, which changes neither half: the shifted-in sign is masked off.
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (p1 >> 32 & _LOW) ^ c1 ^ k0, p1 & _LOW, (p0 >> 32 & _LOW) ^ c3 ^ k1, p0 & _LOW
        k0, k1 = k0 + 0x9E3779B9 & _LOW, k1 + 0xBB67AE85 & _LOW
    return torch.stack([c0, c1, c2, c3], 1).reshape(-1)[:n]

"""Philox 4x32-10 in Triton: the words of csrc/rules.h."""

# pyright: basic, reportCallIssue=false
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_words(first, seed, BLOCK: tl.constexpr):
    """uint32 [BLOCK]: the words of elements first, first + 1, ...; first (int64) and BLOCK are multiples of 4."""
    index = first // 4 + tl.arange(0, BLOCK // 4).to(tl.int64)
    low, high = index.to(tl.uint32), (index >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, low * 0, low * 0)
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))

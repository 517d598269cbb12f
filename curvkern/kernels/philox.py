"""Philox 4x32-10 in Triton: the words of csrc/rules.h and of ops/philox.py, and what is made of them."""

# pyright: basic, reportCallIssue=false
# ruff: noqa: RUF005  (jit functions know no unpacking)
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def philox_words(seed, index):
    """The four words, uint32, of each 64-bit index."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = (index >> 32).to(tl.uint32)
    return tl.philox(seed, low, high, low * 0, low * 0)


@triton.jit
def element_words(first, seed, BLOCK: tl.constexpr):
    """uint32 [BLOCK]: the words of elements first, first + 1, ...; first (int64) and BLOCK are multiples of 4."""
    w0, w1, w2, w3 = philox_words(seed, first // 4 + tl.arange(0, BLOCK // 4).to(tl.int64))
    return tl.reshape(tl.join(tl.join(w0, w2), tl.join(w1, w3)), (BLOCK,))


@triton.jit
def sign_bits(seed, index):
    """[..., 128 k] of 0 (+1) or 1 (-1): the signs of elements 128 * index .. + 128 for each index [..., k]."""
    w0, w1, w2, w3 = philox_words(seed, index)
    words = tl.join(tl.join(w0, w2), tl.join(w1, w3))  # the last axis is the lowest bit of a word's place
    words = tl.reshape(words, index.shape + [4])
    bits = (tl.expand_dims(words, -1) >> tl.arange(0, 32).to(tl.uint32)) & 1
    return tl.reshape(bits, index.shape[:-1] + [index.shape[-1] * 128])


@triton.jit
def normal_pair(radius, angle):
    """Two standard normal numbers from two words: `normals` of csrc/rules.h, the same bits."""
    u = (radius >> 1).to(tl.int32).to(tl.float32) * 4.656612873077393e-10 + 2.3283064365386963e-10
    bits = u.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    p = 0.08700430393218994 * f + -0.14267486333847046
    p = p * f + 0.14914768934249878
    p = p * f + -0.1657758504152298
    p = p * f + 0.19963063299655914
    p = p * f + -0.2500133812427521
    p = p * f + 0.3333390951156616
    p = f + (f * f) * (p * f + -0.5)
    r = tl.sqrt_rn(p * -2.0 + k.to(tl.float32) * -1.3862943611198906)
    quadrant = (angle + 0x20000000) >> 30
    t = (angle - (quadrant << 30)).to(tl.int32, bitcast=True).to(tl.float32) * 9.313225746154785e-10
    s = t * t
    sine = s * -0.0046021766029298306 + 0.07968022674322128
    sine = t * (s * (s * sine + -0.6459634900093079) + 1.5707963705062866)
    cosine = s * -0.020426250994205475 + 0.2536063492298126
    cosine = s * (s * cosine + -1.2336980104446411) + 1.0
    odd = (quadrant & 1) != 0
    x = tl.where(odd, sine, cosine)
    y = tl.where(odd, cosine, sine)
    x = tl.where(((quadrant + 1) & 2) != 0, -x, x)
    y = tl.where((quadrant & 2) != 0, -y, y)
    return r * x, r * y


@triton.jit
def normal_numbers(seed, index):
    """[..., 4 k]: the normal numbers of elements 4 * index .. + 4 for each index [..., k]."""
    w0, w1, w2, w3 = philox_words(seed, index)
    a, b = normal_pair(w0, w1)
    c, d = normal_pair(w2, w3)
    return tl.reshape(tl.join(tl.join(a, c), tl.join(b, d)), index.shape[:-1] + [index.shape[-1] * 4])

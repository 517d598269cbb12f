// Philox words on the CPU, many indices at a time.
//
// The rounds are philox_rounds of rules.h once more, in vector instructions: g++ makes 64-bit products (vpmullq) of its
// 32 x 32 bits, three times as slow as vpmuludq.
#pragma once

#include "cpu.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t kIndices = 64;  // whole vectors, whatever their width

#if defined(__AVX512F__)
using Lanes = __m512i;
inline Lanes fill(uint32_t x) { return _mm512_set1_epi32(static_cast<int>(x)); }
inline Lanes product(Lanes a, Lanes b) { return _mm512_mul_epu32(a, b); }  // of the even lanes
inline Lanes down(Lanes a) { return _mm512_srli_epi64(a, 32); }
inline Lanes up(Lanes a) { return _mm512_slli_epi64(a, 32); }
inline Lanes merge(Lanes even, Lanes odd) { return _mm512_mask_blend_epi32(0xAAAA, even, odd); }
inline Lanes flip(Lanes a, Lanes b) { return _mm512_xor_si512(a, b); }
#elif defined(__AVX2__)
using Lanes = __m256i;
inline Lanes fill(uint32_t x) { return _mm256_set1_epi32(static_cast<int>(x)); }
inline Lanes product(Lanes a, Lanes b) { return _mm256_mul_epu32(a, b); }
inline Lanes down(Lanes a) { return _mm256_srli_epi64(a, 32); }
inline Lanes up(Lanes a) { return _mm256_slli_epi64(a, 32); }
inline Lanes merge(Lanes even, Lanes odd) { return _mm256_blend_epi32(even, odd, 0xAA); }
inline Lanes flip(Lanes a, Lanes b) { return _mm256_xor_si256(a, b); }
#endif

#if defined(__AVX2__)
// c[k]: word k of the counters of 16 or 8 indices; replaced by their random words.
inline void rounds(Lanes (&c)[4], uint32_t key_lo, uint32_t key_hi) {
  const Lanes first = fill(0xD2511F53u), second = fill(0xCD9E8D57u);
  for (int round = 0; round < 10; ++round) {
    const Lanes even0 = product(c[0], first), odd0 = product(down(c[0]), first);
    const Lanes even2 = product(c[2], second), odd2 = product(down(c[2]), second);
    c[0] = flip(flip(merge(down(even2), odd2), c[1]), fill(key_lo));
    c[1] = merge(even2, up(odd2));
    c[2] = flip(flip(merge(down(even0), odd0), c[3]), fill(key_hi));
    c[3] = merge(even0, up(odd0));
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
}
#endif

// words[k][j]: word k of Philox index first + j, for j in [0, count) at least; count <= kIndices. words: 64-byte
// aligned.
inline void philox_words(uint32_t (&words)[4][kIndices], uint64_t first, int64_t count, uint64_t seed) {
#if defined(__AVX2__)
  const uint32_t key_lo = static_cast<uint32_t>(seed), key_hi = static_cast<uint32_t>(seed >> 32);
  constexpr int64_t kLanes = sizeof(Lanes) / 4;
  for (int64_t j = 0; j < count; j += kLanes) {
    alignas(64) uint32_t low[kLanes], high[kLanes];
    for (int64_t lane = 0; lane < kLanes; ++lane) {
      const uint64_t index = first + static_cast<uint64_t>(j + lane);
      low[lane] = static_cast<uint32_t>(index);
      high[lane] = static_cast<uint32_t>(index >> 32);
    }
    Lanes c[4] = {*reinterpret_cast<const Lanes*>(low), *reinterpret_cast<const Lanes*>(high), fill(0), fill(0)};
    rounds(c, key_lo, key_hi);
    for (int k = 0; k < 4; ++k) *reinterpret_cast<Lanes*>(&words[k][j]) = c[k];
  }
#else
  for (int64_t j = 0; j < count; ++j) {
    const curvkern::Philox p = curvkern::philox4x32_10(first + static_cast<uint64_t>(j), seed);
    for (int k = 0; k < 4; ++k) words[k][j] = p.v[k];
  }
#endif
}

}  // namespace

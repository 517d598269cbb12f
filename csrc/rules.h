// The per-element rules: one body for the CPU and the GPU, so that a test on the CPU checks what the GPU runs.
//
// Scores must be bit-identical everywhere: the K-th largest score found by one backend is the threshold that another
// applies. So no product is contracted into an FMA (`mul`, `sub`), and gates compare signs, never products, which
// underflow.
#pragma once

#include <cstdint>

#include "launch.h"

#ifdef __CUDACC__
#define CURVKERN_RULE __host__ __device__ __forceinline__
#else
#define CURVKERN_RULE static inline __attribute__((always_inline))
#endif

namespace curvkern {

#ifdef __CUDA_ARCH__
CURVKERN_RULE float mul(float a, float b) { return __fmul_rn(a, b); }
CURVKERN_RULE float add(float a, float b) { return __fadd_rn(a, b); }
CURVKERN_RULE float square_root(float x) { return __fsqrt_rn(x); }
CURVKERN_RULE uint32_t bits_of(float x) { return __float_as_uint(x); }
CURVKERN_RULE float float_of(uint32_t x) { return __uint_as_float(x); }
#else
// Host files are compiled with -ffp-contract=off.
CURVKERN_RULE float mul(float a, float b) { return a * b; }
CURVKERN_RULE float add(float a, float b) { return a + b; }
CURVKERN_RULE float square_root(float x) { return __builtin_sqrtf(x); }
CURVKERN_RULE uint32_t bits_of(float x) {
  uint32_t u;
  __builtin_memcpy(&u, &x, 4);
  return u;
}
CURVKERN_RULE float float_of(uint32_t u) {
  float x;
  __builtin_memcpy(&x, &u, 4);
  return x;
}
#endif

CURVKERN_RULE float absolute(float x) { return float_of(bits_of(x) & 0x7fffffffu); }

// How much moving this weight to its target matters; delta = weight - target.
CURVKERN_RULE float score(Rule rule, float delta, float grad, float fisher) {
  switch (rule) {
    case Rule::kGrad: return absolute(grad);
    case Rule::kTaylor: return absolute(mul(grad, delta));
    case Rule::kFisher: return mul(fisher, mul(delta, delta));
    case Rule::kDelta: return absolute(delta);
    case Rule::kGain: return add(mul(grad, delta), -mul(mul(0.5f, fisher), mul(delta, delta)));
  }
  return 0.0f;
}

// descent: moving to the target lowers the loss (delta and grad share a strict sign).
// conflict: the signs of delta and direction differ, zero being a sign of its own.
// No short circuits: a branch a weight, half of them mispredicted, is ten times the price of the comparisons.
CURVKERN_RULE bool passes(Gate gate, float delta, float grad, float direction) {
  switch (gate) {
    case Gate::kNone: return true;
    case Gate::kDescent: return ((delta > 0.0f) & (grad > 0.0f)) | ((delta < 0.0f) & (grad < 0.0f));
    case Gate::kConflict: return ((delta > 0.0f) != (direction > 0.0f)) | ((delta < 0.0f) != (direction < 0.0f));
  }
  return false;
}

// Order-preserving map of a score to an unsigned key: a < b as floats iff key(a) < key(b); -0 and +0 share a key.
CURVKERN_RULE uint32_t score_key(float x) {
  const uint32_t u = bits_of(x + 0.0f);
  return (u & 0x80000000u) ? ~u : (u | 0x80000000u);
}

// A step of the fraction alpha from weight to target; exact at both ends, and NaN alpha is no step.
CURVKERN_RULE float blended(float weight, float target, float alpha) {
  if (!(alpha > 0.0f)) return weight;
  if (alpha >= 1.0f) return target;
  return add(weight, mul(alpha, add(target, -weight)));
}

// Philox 4x32-10 (Salmon et al., SC 2011): four random words from a counter and a key, the same on every backend.
struct Philox {
  uint32_t v[4];
};

CURVKERN_RULE Philox philox_rounds(Philox counter, uint32_t key_lo, uint32_t key_hi) {
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = static_cast<uint64_t>(counter.v[0]) * 0xD2511F53u;
    const uint64_t b = static_cast<uint64_t>(counter.v[2]) * 0xCD9E8D57u;
    counter = {{static_cast<uint32_t>(b >> 32) ^ counter.v[1] ^ key_lo, static_cast<uint32_t>(b),
                static_cast<uint32_t>(a >> 32) ^ counter.v[3] ^ key_hi, static_cast<uint32_t>(a)}};
    key_lo += 0x9E3779B9u;
    key_hi += 0xBB67AE85u;
  }
  return counter;
}

// Element e of a stream takes word e % 4 of index e / 4.
CURVKERN_RULE Philox philox4x32_10(uint64_t index, uint64_t seed) {
  return philox_rounds({{static_cast<uint32_t>(index), static_cast<uint32_t>(index >> 32), 0u, 0u}},
                       static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32));
}

// Two independent standard normal numbers from two words (Box-Muller), within 2e-7 of the exact map. Sums and products
// only, no library's log, sin and cos: the same bits on every backend. |z| < 6.7.
struct Normals {
  float a, b;
};

CURVKERN_RULE Normals normals(uint32_t radius, uint32_t angle) {
  // -2 log u for u in (0, 1], as u = 2^k (1 + f) with 1 + f in [sqrt(1/2), sqrt(2)).
  const float u = add(mul(static_cast<float>(static_cast<int32_t>(radius >> 1)), 0x1p-31f), 0x1p-32f);
  const int32_t k = static_cast<int32_t>(bits_of(u) - 0x3f3504f3u) >> 23;
  const float f = add(float_of(bits_of(u) - (static_cast<uint32_t>(k) << 23)), -1.0f);
  float p = 0.08700430393218994f;
  p = add(mul(p, f), -0.14267486333847046f);
  p = add(mul(p, f), 0.14914768934249878f);
  p = add(mul(p, f), -0.1657758504152298f);
  p = add(mul(p, f), 0.19963063299655914f);
  p = add(mul(p, f), -0.2500133812427521f);
  p = add(mul(p, f), 0.3333390951156616f);
  p = add(f, mul(mul(f, f), add(mul(p, f), -0.5f)));
  const float r = square_root(add(mul(p, -2.0f), mul(static_cast<float>(k), -1.3862943611198906f)));
  // The angle is a full turn in 2^32: a quadrant and t in [-1/2, 1/2) quarter turns around its middle.
  const uint32_t quadrant = (angle + 0x20000000u) >> 30;
  const float t = mul(static_cast<float>(static_cast<int32_t>(angle - (quadrant << 30))), 0x1p-30f);
  const float s = mul(t, t);
  float sine = add(mul(s, -0.0046021766029298306f), 0.07968022674322128f);
  sine = mul(t, add(mul(s, add(mul(s, sine), -0.6459634900093079f)), 1.5707963705062866f));
  float cosine = add(mul(s, -0.020426250994205475f), 0.2536063492298126f);
  cosine = add(mul(s, add(mul(s, cosine), -1.2336980104446411f)), 1.0f);
  const bool odd = quadrant & 1u;
  const uint32_t x = bits_of(odd ? sine : cosine) ^ (((quadrant + 1u) & 2u) << 30);
  const uint32_t y = bits_of(odd ? cosine : sine) ^ ((quadrant & 2u) << 30);
  return {mul(r, float_of(x)), mul(r, float_of(y))};
}

// One tensor's share of a sum. Weight 0 leaves the tensor out, whatever it holds; -0 is what no sum notices.
CURVKERN_RULE float weighted(float weight, float x) { return weight == 0.0f ? -0.0f : mul(weight, x); }

// TIES: a delta survives the trimming if its magnitude reaches the limit; NaN never does.
CURVKERN_RULE float trimmed(float delta, float limit) { return absolute(delta) >= limit ? delta : 0.0f; }

// TIES: a share counts if it has the elected sign, that of the sum of all; a sum of zero elects +.
CURVKERN_RULE bool agrees(float elected, float share) { return elected >= 0.0f ? share > 0.0f : share < 0.0f; }

}  // namespace curvkern

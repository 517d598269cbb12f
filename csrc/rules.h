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
CURVKERN_RULE uint32_t bits_of(float x) { return __float_as_uint(x); }
CURVKERN_RULE float float_of(uint32_t x) { return __uint_as_float(x); }
#else
// Host files are compiled with -ffp-contract=off.
CURVKERN_RULE float mul(float a, float b) { return a * b; }
CURVKERN_RULE float add(float a, float b) { return a + b; }
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

// Philox 4x32-10 (Salmon et al., SC 2011): counter {lo(index), hi(index), 0, 0}, key {lo(seed), hi(seed)}. Element e of
// a tensor has word e % 4 of index e / 4.
struct Philox {
  uint32_t v[4];
};

CURVKERN_RULE Philox philox4x32_10(uint64_t index, uint64_t seed) {
  uint32_t c0 = static_cast<uint32_t>(index), c1 = static_cast<uint32_t>(index >> 32), c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t p0 = static_cast<uint64_t>(0xd2511f53u) * c0, p1 = static_cast<uint64_t>(0xcd9e8d57u) * c2;
    c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(p1);
    c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(p0);
    k0 += 0x9e3779b9u;
    k1 += 0xbb67ae85u;
  }
  return {{c0, c1, c2, c3}};
}

// One tensor's share of a sum. Weight 0 leaves the tensor out, whatever it holds; -0 is what no sum notices.
CURVKERN_RULE float weighted(float weight, float x) { return weight == 0.0f ? -0.0f : mul(weight, x); }

// TIES: a delta survives the trimming if its magnitude reaches the limit; NaN never does.
CURVKERN_RULE float trimmed(float delta, float limit) { return absolute(delta) >= limit ? delta : 0.0f; }

// TIES: a share counts if it has the elected sign, that of the sum of all; a sum of zero elects +.
CURVKERN_RULE bool agrees(float elected, float share) { return elected >= 0.0f ? share > 0.0f : share < 0.0f; }

}  // namespace curvkern

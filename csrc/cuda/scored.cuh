// Scores and gates of a thread's eight weights: what rollback.cu and select.cu do before they differ.
#pragma once

#include "../common.cuh"

namespace curvkern::cuda {
namespace {

// What the rule and the gate look at. What they do not need may be null: grad, fisher, direction, weight with target.
struct Inputs {
  const void* weight;
  const void* target;
  const uint8_t* mask_bits;
  const uint8_t* mask_bytes;
  const void* grad;
  const float* fisher;
  const void* direction;
  int64_t n;
  Rule rule;
  Gate gate;
  DType dtype;
  DType grad_dtype;

  bool aligned() const {
    return aligned16(weight) && aligned16(target) && aligned16(grad) && aligned16(fisher) && aligned16(direction);
  }
};

// What a thread knows of its eight weights; bit k of `open`: mask and gate let weight k through.
struct Eight {
  Raw8 weight, target;
  float score[8];
  uint32_t open;
};

template <Rule rule>
__device__ __forceinline__ void score8(float (&out)[8], const float (&delta)[8], const float (&grad)[8],
                                       const float (&fisher)[8]) {
#pragma unroll
  for (int k = 0; k < 8; ++k) out[k] = score(rule, delta[k], grad[k], fisher[k]);
}

template <Gate gate>
__device__ __forceinline__ uint32_t gate8(const float (&delta)[8], const float (&grad)[8],
                                          const float (&direction)[8]) {
  uint32_t open = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) open |= static_cast<uint32_t>(passes(gate, delta[k], grad[k], direction[k])) << k;
  return open;
}

// The weights i .. i+8, i a multiple of 8; those past n are closed.
__device__ __forceinline__ Eight prepare(const Inputs& in, int64_t i, bool aligned) {
  Eight e;
  Raw8 grad{}, fisher{}, direction{};
  e.weight = in.weight ? load8(in.weight, in.dtype, i, in.n, aligned) : Raw8{};
  e.target = in.weight ? load8(in.target, in.dtype, i, in.n, aligned) : Raw8{};
  if (in.grad) grad = load8(in.grad, in.grad_dtype, i, in.n, aligned);
  if (in.fisher) fisher = load8(in.fisher, DType::kFloat32, i, in.n, aligned);
  if (in.direction) direction = load8(in.direction, in.dtype, i, in.n, aligned);
  e.open = i + 8 <= in.n ? 0xffu : i < in.n ? (1u << (in.n - i)) - 1u : 0u;
  if (in.mask_bits && i < in.n) e.open &= in.mask_bits[i >> 3];
  if (in.mask_bytes) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (i + k < in.n && !in.mask_bytes[i + k]) e.open &= ~(1u << k);
  }
  float delta[8], g[8], f[8], v[8];
  floats(delta, e.weight, in.dtype);
  floats(v, e.target, in.dtype);
#pragma unroll
  for (int k = 0; k < 8; ++k) delta[k] = add(delta[k], -v[k]);
  floats(g, grad, in.grad_dtype);
  floats(f, fisher, DType::kFloat32);
  floats(v, direction, in.dtype);
  switch (in.rule) {
    case Rule::kGrad: score8<Rule::kGrad>(e.score, delta, g, f); break;
    case Rule::kTaylor: score8<Rule::kTaylor>(e.score, delta, g, f); break;
    case Rule::kFisher: score8<Rule::kFisher>(e.score, delta, g, f); break;
    case Rule::kDelta: score8<Rule::kDelta>(e.score, delta, g, f); break;
    case Rule::kGain: score8<Rule::kGain>(e.score, delta, g, f); break;
  }
  switch (in.gate) {
    case Gate::kNone: break;
    case Gate::kDescent: e.open &= gate8<Gate::kDescent>(delta, g, v); break;
    case Gate::kConflict: e.open &= gate8<Gate::kConflict>(delta, g, v); break;
  }
  return e;
}

}  // namespace
}  // namespace curvkern::cuda

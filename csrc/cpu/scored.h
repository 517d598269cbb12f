// Scores and gates of a block of weights: what rollback.cpp and select.cpp do before they differ.
//
// A block is small enough to stay in the first-level cache between the short loops over it, and those loops have a
// constant length, so that they compile to plain vector code: the rest of a last block is computed too, and is closed.
// Internal linkage, as cpu.h.
#pragma once

#include "cpu.h"

namespace {

constexpr int64_t kBlock = 128;
constexpr int64_t kAhead = 8 * kBlock;
static_assert(curvkern::kRollbackBlock % kBlock == 0, "ties are counted for whole blocks");

// What the rule and the gate look at. What they do not need may be null: grad, fisher, direction, weight with target.
struct Inputs {
  const void* weight;
  const void* target;
  const uint8_t* mask_bits;
  const uint8_t* mask_bytes;
  const void* grad;
  const float* fisher;
  const void* direction;
  curvkern::Rule rule;
  curvkern::Gate gate;
  curvkern::DType dtype;
  curvkern::DType grad_dtype;
};

// `open`: all ones where mask and gate let the weight through, else zero; as wide as a float, for vector code.
struct Block {
  alignas(64) float delta[kBlock];
  alignas(64) float grad[kBlock];
  alignas(64) float fisher[kBlock];
  alignas(64) float direction[kBlock];
  alignas(64) float score[kBlock];
  alignas(64) uint32_t open[kBlock];
};

// Loads the n weights from `begin` on, and what belongs to them, to place `at` of the block.
inline void load(Block& b, const Inputs& in, int64_t begin, int64_t at, int64_t n) {
  if (in.weight) {
    with_dtype(in.dtype, [&](auto tag) {
      const auto* weight = static_cast<const decltype(tag)*>(in.weight) + begin;
      const auto* target = static_cast<const decltype(tag)*>(in.target) + begin;
      for (int64_t i = 0; i < n; ++i) b.delta[at + i] = to_float(weight[i]) - to_float(target[i]);
    });
  }
  if (in.grad) load_block(b.grad + at, in.grad, begin, n, in.grad_dtype);
  if (in.fisher) load_block(b.fisher + at, in.fisher, begin, n, curvkern::DType::kFloat32);
  if (in.direction) load_block(b.direction + at, in.direction, begin, n, in.dtype);
}

template <curvkern::Rule rule>
void score_block(Block& b) {
  for (int64_t i = 0; i < kBlock; ++i) b.score[i] = curvkern::score(rule, b.delta[i], b.grad[i], b.fisher[i]);
}

template <curvkern::Gate gate>
void gate_block(Block& b) {
  for (int64_t i = 0; i < kBlock; ++i)
    b.open[i] = -static_cast<uint32_t>(curvkern::passes(gate, b.delta[i], b.grad[i], b.direction[i]));
}

// Scores the loaded block and opens those of its first n weights that the gate lets through.
inline void judge(Block& b, curvkern::Rule rule, curvkern::Gate gate, int64_t n) {
  using curvkern::Gate;
  using curvkern::Rule;
  switch (rule) {
    case Rule::kGrad: score_block<Rule::kGrad>(b); break;
    case Rule::kTaylor: score_block<Rule::kTaylor>(b); break;
    case Rule::kFisher: score_block<Rule::kFisher>(b); break;
    case Rule::kDelta: score_block<Rule::kDelta>(b); break;
    case Rule::kGain: score_block<Rule::kGain>(b); break;
  }
  switch (gate) {
    case Gate::kNone: gate_block<Gate::kNone>(b); break;
    case Gate::kDescent: gate_block<Gate::kDescent>(b); break;
    case Gate::kConflict: gate_block<Gate::kConflict>(b); break;
  }
  for (int64_t i = n; i < kBlock; ++i) b.open[i] = 0;
}

// Fills the block from the n <= kBlock weights from `begin` on, a multiple of 8; masks close more of them.
inline void prepare(Block& b, const Inputs& in, int64_t begin, int64_t n) {
  const int64_t width = width_of(in.dtype), ahead = begin + kAhead;
  prefetch(in.weight, ahead, kBlock, width);
  prefetch(in.target, ahead, kBlock, width);
  prefetch(in.grad, ahead, kBlock, width_of(in.grad_dtype));
  prefetch(in.fisher, ahead, kBlock, 4);
  prefetch(in.direction, ahead, kBlock, width);
  if (n == kBlock) load(b, in, begin, 0, kBlock);
  else load(b, in, begin, 0, n);
  judge(b, in.rule, in.gate, n);
  if (in.mask_bits) {
    for (int64_t i = 0; i < n; ++i) b.open[i] &= -((in.mask_bits[(begin + i) >> 3] >> (i & 7)) & 1u);
  } else if (in.mask_bytes) {
    for (int64_t i = 0; i < n; ++i) b.open[i] &= -static_cast<uint32_t>(in.mask_bytes[begin + i] != 0);
  }
}

}  // namespace

// Sums over blocks of floats: sixteen float32 lanes within a block, float64 from block to block. The order is fixed, so
// the result does not depend on threads. Internal linkage, as cpu.h.
#pragma once

#include "cpu.h"

namespace {

constexpr int64_t kSumBlock = 256, kLanes = 16, kAhead = 8 * kSumBlock;

struct alignas(64) SumBlock {
  float v[kSumBlock];
};

// Loads data[offset..offset + n); zeros behind it.
inline void load_padded(SumBlock& b, const void* data, int64_t offset, int64_t n, curvkern::DType dtype) {
  if (n == kSumBlock) {
    prefetch(data, offset + kAhead, n, width_of(dtype));
    return load_block(b.v, data, offset, kSumBlock, dtype);
  }
  load_block(b.v, data, offset, n, dtype);
  for (int64_t i = n; i < kSumBlock; ++i) b.v[i] = 0.0f;
}

inline double block_dot(const SumBlock& a, const SumBlock& b) {
  float lane[kLanes] = {};
  for (int64_t i = 0; i < kSumBlock; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lane[j] = curvkern::add(lane[j], curvkern::mul(a.v[i + j], b.v[i + j]));
  double total = 0.0;
  for (int64_t j = 0; j < kLanes; ++j) total += static_cast<double>(lane[j]);
  return total;
}

}  // namespace

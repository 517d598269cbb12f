// rollback, undo and blend on the CPU: one pass over the bytes, in blocks that stay in the first-level cache.
//
// Wins over torch (2 cores, float32, 16 Mi weights): a chain of compare, and, where, copy passes over memory becomes
// one.
#include "cpu.h"

namespace curvkern::cpu::CURVKERN_ISA {
namespace {

constexpr int64_t kBlock = kRollbackBlock;
constexpr int64_t kGrain = 16 * kBlock;  // the least work worth a thread

struct Inputs {
  const void* weight;
  const void* target;
  const uint8_t* mask_bits;
  const uint8_t* mask_bytes;
  const void* grad;
  const float* fisher;
  const void* direction;
  Rule rule;
  Gate gate;
  DType dtype;
  DType grad_dtype;
};

// Scores of one block, and whether mask and gate let each weight through.
struct Block {
  alignas(64) float delta[kBlock];
  alignas(64) float grad[kBlock];
  alignas(64) float other[kBlock];
  alignas(64) float score[kBlock];
  alignas(64) uint8_t open[kBlock];
  alignas(64) uint8_t chosen[kBlock];
};

template <Rule rule>
void score_block(Block& b, const float* fisher, int64_t n) {
  for (int64_t i = 0; i < n; ++i) b.score[i] = score(rule, b.delta[i], b.grad[i], fisher ? fisher[i] : 0.0f);
}

template <Gate gate>
void gate_block(Block& b, int64_t n) {
  for (int64_t i = 0; i < n; ++i) b.open[i] &= passes(gate, b.delta[i], b.grad[i], b.other[i]);
}

void prepare(Block& b, const Inputs& in, int64_t begin, int64_t n) {
  load_block(b.delta, in.weight, begin, n, in.dtype);
  load_block(b.other, in.target, begin, n, in.dtype);
  for (int64_t i = 0; i < n; ++i) b.delta[i] -= b.other[i];
  if (in.grad) load_block(b.grad, in.grad, begin, n, in.grad_dtype);
  if (in.direction) load_block(b.other, in.direction, begin, n, in.dtype);
  if (in.mask_bits) {  // begin is a multiple of 8: blocks are
    for (int64_t i = 0; i < n; ++i) b.open[i] = (in.mask_bits[(begin + i) >> 3] >> (i & 7)) & 1;
  } else if (in.mask_bytes) {
    for (int64_t i = 0; i < n; ++i) b.open[i] = in.mask_bytes[begin + i] != 0;
  } else {
    for (int64_t i = 0; i < n; ++i) b.open[i] = 1;
  }
  const float* fisher = in.fisher ? in.fisher + begin : nullptr;
  switch (in.rule) {
    case Rule::kGrad: score_block<Rule::kGrad>(b, fisher, n); break;
    case Rule::kTaylor: score_block<Rule::kTaylor>(b, fisher, n); break;
    case Rule::kFisher: score_block<Rule::kFisher>(b, fisher, n); break;
    case Rule::kDelta: score_block<Rule::kDelta>(b, fisher, n); break;
    case Rule::kGain: score_block<Rule::kGain>(b, fisher, n); break;
  }
  switch (in.gate) {
    case Gate::kNone: break;
    case Gate::kDescent: gate_block<Gate::kDescent>(b, n); break;
    case Gate::kConflict: gate_block<Gate::kConflict>(b, n); break;
  }
}

void choose(Block& b, const float* tau, const int64_t* quota, int64_t ties_before, int64_t n) {
  if (!tau) {
    for (int64_t i = 0; i < n; ++i) b.chosen[i] = b.open[i];
    return;
  }
  const float limit = *tau;
  for (int64_t i = 0; i < n; ++i) b.chosen[i] = b.open[i] & (b.score[i] > limit);
  if (!quota) return;
  for (int64_t i = 0; i < n && ties_before < *quota; ++i) {
    if (b.open[i] & (b.score[i] == limit)) {
      b.chosen[i] = 1;
      ++ties_before;
    }
  }
}

void write_undo(const Block& b, uint8_t* undo, int64_t n) {
  for (int64_t byte = 0; byte * 8 < n; ++byte) {
    uint32_t bits = 0;
    for (int64_t j = 0; j < at_most(8, n - byte * 8); ++j) bits |= static_cast<uint32_t>(b.chosen[byte * 8 + j]) << j;
    undo[byte] = static_cast<uint8_t>(bits);
  }
}

}  // namespace

Status rollback(int64_t* count, void* weight, uint8_t* undo, const void* target, const float* tau, const int64_t* quota,
                const int64_t* tie_offsets, const uint8_t* mask_bits, const uint8_t* mask_bytes, const void* grad,
                const float* fisher, const void* direction, int64_t n, Rule rule, Gate gate, DType dtype,
                DType grad_dtype, int threads) {
  const Inputs in{weight, target, mask_bits, mask_bytes, grad, fisher, direction, rule, gate, dtype, grad_dtype};
  parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
    Block b;
    int64_t total = 0;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t size = at_most(kBlock, end - at);
      prepare(b, in, at, size);
      choose(b, tau, tie_offsets ? quota : nullptr, tie_offsets ? tie_offsets[at / kBlock] : 0, size);
      int64_t here = 0;
      for (int64_t i = 0; i < size; ++i) here += b.chosen[i];
      if (undo) write_undo(b, undo + at / 8, size);
      total += here;
      if (!here) continue;  // output only where something changed
      with_dtype(dtype, [&](auto tag) {
        auto* out = static_cast<decltype(tag)*>(weight) + at;
        const auto* from = static_cast<const decltype(tag)*>(target) + at;
        for (int64_t i = 0; i < size; ++i) out[i] = b.chosen[i] ? from[i] : out[i];
      });
    }
    __atomic_fetch_add(count, total, __ATOMIC_RELAXED);
  });
  return kOk;
}

Status rollback_ties(int64_t* ties, const void* weight, const void* target, const float* tau, const uint8_t* mask_bits,
                     const uint8_t* mask_bytes, const void* grad, const float* fisher, const void* direction, int64_t n,
                     Rule rule, Gate gate, DType dtype, DType grad_dtype, int threads) {
  const Inputs in{weight, target, mask_bits, mask_bytes, grad, fisher, direction, rule, gate, dtype, grad_dtype};
  parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
    Block b;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t size = at_most(kBlock, end - at);
      prepare(b, in, at, size);
      int64_t here = 0;
      for (int64_t i = 0; i < size; ++i) here += b.open[i] & (b.score[i] == *tau);
      ties[at / kBlock] = here;
    }
  });
  return kOk;
}

Status blend(void* weight, const void* target, const float* alpha, int64_t rows, int64_t cols, int64_t tile_rows,
             int64_t tile_cols, DType dtype, int threads) {
  const int64_t tiles_in_row = (cols + tile_cols - 1) / tile_cols;
  return with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(rows * cols, kGrain, threads, [&](int64_t begin, int64_t end) {
      while (begin < end) {  // runs that share one row, so that the inner loop has no division
        const int64_t row = begin / cols, col = begin % cols, size = at_most(cols - col, end - begin);
        T* out = static_cast<T*>(weight) + begin;
        const T* from = static_cast<const T*>(target) + begin;
        const float* a = alpha + (row / tile_rows) * tiles_in_row;
        if (tile_cols == 1) {
          for (int64_t i = 0; i < size; ++i) store(out[i], blended(to_float(out[i]), to_float(from[i]), a[col + i]));
        } else {
          for (int64_t i = 0; i < size;) {
            const float fraction = a[(col + i) / tile_cols];
            const int64_t stop = at_most(size, ((col + i) / tile_cols + 1) * tile_cols - col);
            for (; i < stop; ++i) store(out[i], blended(to_float(out[i]), to_float(from[i]), fraction));
          }
        }
        begin += size;
      }
    });
  });
}

}  // namespace curvkern::cpu::CURVKERN_ISA

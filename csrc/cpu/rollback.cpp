// rollback, undo and blend on the CPU: one pass over the bytes, in blocks that stay in the first-level cache.
//
// Wins over torch (2 cores, float32, 16 Mi weights): a chain of compare, and, where, copy passes over memory becomes
// one.
#include "scored.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace curvkern::cpu::CURVKERN_ISA {
namespace {

constexpr int64_t kGrain = 16 * kRollbackBlock;  // the least work worth a thread

// chosen: all ones or zero, as Block::open. Ties are chosen while ties_before, how many stand before them, is below
// *quota; null: none are.
void choose(uint32_t* chosen, const Block& b, const float* tau, const int64_t* quota, int64_t& ties_before) {
  if (!tau) {
    for (int64_t i = 0; i < kBlock; ++i) chosen[i] = b.open[i];
    return;
  }
  const float limit = *tau;
  for (int64_t i = 0; i < kBlock; ++i) chosen[i] = b.open[i] & -static_cast<uint32_t>(b.score[i] > limit);
  if (!quota) return;
  for (int64_t i = 0; i < kBlock && ties_before < *quota; ++i) {
    if (b.open[i] && b.score[i] == limit) {
      chosen[i] = ~0u;
      ++ties_before;
    }
  }
}

// weight = target where chosen, as bits: what is chosen is copied exactly, and no branch is guessed.
template <class Bits>
void take_chosen(void* weight, const void* target, const uint32_t* chosen, int64_t at, int64_t n) {
  Bits* out = static_cast<Bits*>(weight) + at;
  const Bits* from = static_cast<const Bits*>(target) + at;
  for (int64_t i = 0; i < n; ++i) {
    const Bits taken = static_cast<Bits>(chosen[i]);
    out[i] = static_cast<Bits>((from[i] & taken) | (out[i] & ~taken));
  }
}

void write_undo(uint8_t* undo, const uint32_t* chosen, int64_t n) {
  for (int64_t byte = 0; byte * 8 < n; ++byte) {
#if defined(__AVX2__)
    undo[byte] =
        static_cast<uint8_t>(_mm256_movemask_ps(_mm256_load_ps(reinterpret_cast<const float*>(chosen) + byte * 8)));
#else
    uint32_t bits = 0;
    for (int64_t j = 0; j < 8; ++j) bits |= chosen[byte * 8 + j] & (1u << j);
    undo[byte] = static_cast<uint8_t>(bits);
#endif
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
    alignas(64) uint32_t chosen[kBlock];
    int64_t total = 0, ties_before = 0;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t size = at_most(kBlock, end - at);
      if (tie_offsets && at % kRollbackBlock == 0) ties_before = tie_offsets[at / kRollbackBlock];
      prepare(b, in, at, size);
      choose(chosen, b, tau, tie_offsets ? quota : nullptr, ties_before);
      uint32_t here = 0;
      for (int64_t i = 0; i < kBlock; ++i) here -= chosen[i];
      if (undo) write_undo(undo + at / 8, chosen, size);
      total += here;
      if (!here) continue;  // output only where something changed
      if (dtype == DType::kFloat32) take_chosen<Bits32>(weight, target, chosen, at, size);
      else take_chosen<Bits16>(weight, target, chosen, at, size);
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
      prepare(b, in, at, at_most(kBlock, end - at));
      uint32_t here = 0;
      for (int64_t i = 0; i < kBlock; ++i) here += b.open[i] & static_cast<uint32_t>(b.score[i] == *tau);
      int64_t& total = ties[at / kRollbackBlock];
      total = at % kRollbackBlock ? total + here : here;
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

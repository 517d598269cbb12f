// rademacher, hutchinson with its tile means, and gnb_diag on the CPU: signs are made 8192 at a time, in cache, and
// never stored.
//
// Wins over torch (2 cores, float32, 16 Mi weights): no random tensor is written and read again.
#include "philox.h"

namespace curvkern::cpu::CURVKERN_ISA {
namespace {

constexpr int64_t kBits = 32, kBitsOfIndex = 4 * kBits, kGrain = 1 << 16, kTiles = 32;

// Calls body(word, count, i) for [0, n) in runs: bit j of `word` is the bit of element begin + i + j, j in [0, count).
// Two calls, as a count that is kBits for certain makes straight vector code of the loops in `body`.
template <class Body>
void each_word(uint64_t begin, int64_t n, uint64_t seed, Body&& body) {
  alignas(64) uint32_t words[4][kIndices];
  for (int64_t i = 0; i < n;) {
    const uint64_t index = (begin + i) / kBitsOfIndex;
    const int64_t skipped = (begin + i) % kBitsOfIndex, end = at_most(skipped + n - i, kIndices * kBitsOfIndex);
    philox_words(words, index, (end + kBitsOfIndex - 1) / kBitsOfIndex, seed);
    for (int64_t at = skipped, count; at < end; at += count, i += count) {
      count = at_most(kBits - at % kBits, end - at);
      const uint32_t word = words[at / kBits % 4][at / kBitsOfIndex];
      if (count == kBits) body(word, kBits, i);
      else body(word >> (at % kBits), count, i);
    }
  }
}

// x, negated where bit j of the word is set.
inline float signed_by(uint32_t word, int64_t j, float x) { return float_of(bits_of(x) ^ ((word >> j) << 31)); }

}  // namespace

Status rademacher(void* out, int64_t n, int64_t seed, int64_t offset, DType dtype, int threads) {
  return with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
      each_word(offset + begin, end - begin, seed,
                [&](uint32_t word, int64_t count, int64_t i) __attribute__((always_inline)) {
                  T* to = static_cast<T*>(out) + begin + i;
                  for (int64_t j = 0; j < count; ++j) store(to[j], signed_by(word, j, 1.0f));
                });
    });
  });
}

Status hutchinson(float* diag, const void* hvp, int64_t n, int64_t seed, int64_t offset, float scale, DType dtype,
                  int threads) {
  return with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
      each_word(offset + begin, end - begin, seed,
                [&](uint32_t word, int64_t count, int64_t i) __attribute__((always_inline)) {
                  float* to = diag + begin + i;
                  const T* from = static_cast<const T*>(hvp) + begin + i;
                  for (int64_t j = 0; j < count; ++j)
                    to[j] = add(to[j], mul(scale, signed_by(word, j, to_float(from[j]))));
                });
    });
  });
}

Status gnb_diag(float* diag, const void* grad, int64_t n, float batch, DType dtype, int threads) {
  return with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
      const T* from = static_cast<const T*>(grad);
      for (int64_t i = begin; i < end; ++i) {
        const float g = to_float(from[i]);
        diag[i] = add(diag[i], mul(batch, mul(g, g)));
      }
    });
  });
}

Status hutchinson_tiles(float* diag, const void* hvp, int64_t rows, int64_t cols, int64_t tile_rows, int64_t tile_cols,
                        int64_t seed, int64_t offset, float scale, DType dtype, int threads) {
  // A piece of work is a few tiles side by side, so that rows are read in long runs.
  const int64_t across = (cols + tile_cols - 1) / tile_cols, down = (rows + tile_rows - 1) / tile_rows;
  const int64_t groups = (across + kTiles - 1) / kTiles;
  return with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(groups * down, 1, threads, [&](int64_t begin, int64_t end) {
      for (int64_t piece = begin; piece < end; ++piece) {
        const int64_t top = piece / groups * tile_rows, height = at_most(tile_rows, rows - top);
        const int64_t first = piece % groups * kTiles, tiles = at_most(kTiles, across - first);
        double lanes[kTiles][kBits] = {};
        for (int64_t row = top; row < top + height; ++row) {
          for (int64_t tile = 0; tile < tiles; ++tile) {
            const int64_t left = (first + tile) * tile_cols;
            const T* from = static_cast<const T*>(hvp) + row * cols + left;
            each_word(offset + row * cols + left, at_most(tile_cols, cols - left), seed,
                      [&](uint32_t word, int64_t count, int64_t i) __attribute__((always_inline)) {
                        for (int64_t j = 0; j < count; ++j) lanes[tile][j] += signed_by(word, j, to_float(from[i + j]));
                      });
          }
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
          double sum = 0.0;
          for (int64_t j = 0; j < kBits; ++j) sum += lanes[tile][j];
          const int64_t width = at_most(tile_cols, cols - (first + tile) * tile_cols);
          float& out = diag[top / tile_rows * across + first + tile];
          out = add(out, static_cast<float>(scale * (sum / static_cast<double>(height * width))));
        }
      }
    });
  });
}

}  // namespace curvkern::cpu::CURVKERN_ISA

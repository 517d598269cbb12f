// select on the CPU: a histogram of score keys in one fused pass, and exact top-K of tiles by the same histogram.
//
// Every thread counts in bins of its own that stay in the second-level cache and adds them up at the end; sums of
// integers, so the order does not matter. Wins over torch (gate, score, gather, topk): no score is ever written.
#include "scored.h"

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace curvkern::cpu::CURVKERN_ISA {
namespace {

constexpr int64_t kGrain = 512 * kBlock;          // the least work worth a thread
constexpr int64_t kFlush = int64_t{1} << 30;      // weights counted before 32-bit counters are added to 64-bit ones
constexpr uint32_t kZeroTop = 0x80000000u >> 16;  // bin of a score of zero

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif
typedef uint32_t Vec __attribute__((vector_size(kLanes * 4), may_alias));
static_assert(kSelectScratch == kSelectBins + 16 && kLanes <= 16, "room for the bins that nobody reads");

inline int64_t sum(const Vec& v) {
  int64_t total = 0;
  for (int lane = 0; lane < kLanes; ++lane) total += v[lane];
  return total;
}

// Keys of kLanes scores, and what they are; masks are all ones or zero. Zeros stand apart: they are the one score that
// comes in masses, and counting them one by one would wait for the same counter each time.
struct Lanes {
  Vec key, number, zero;
};

inline Lanes lanes(const Block& b, int64_t i) {
  const Vec u = *reinterpret_cast<const Vec*>(b.score + i), magnitude = u & 0x7fffffffu;
  const Vec sign = -(u >> 31);
  return {(magnitude == 0u) ? Vec{} | 0x80000000u : u ^ (sign | 0x80000000u),
          *reinterpret_cast<const Vec*>(b.open + i) & (Vec)(magnitude <= 0x7f800000u), (Vec)(magnitude == 0u)};
}

// What a thread has counted beside the bins.
struct Tally {
  Vec open{}, numbers{}, zeros{};
};

// Writes the kept bins to `out` and says how far it wrote.
inline int64_t append(uint32_t* out, const Vec& bin, const Vec& keep) {
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_movepi32_mask((__m512i)keep);
  _mm512_storeu_si512(out, _mm512_maskz_compress_epi32(kept, (__m512i)bin));
  return __builtin_popcount(kept);
#else  // without a fast way to close up, the others get bins that nobody reads: one a lane, so that none waits
  Vec spare;
  for (int lane = 0; lane < kLanes; ++lane) spare[lane] = static_cast<uint32_t>(kSelectBins + lane);
  *reinterpret_cast<Vec*>(out) = (bin & keep) | (spare & ~keep);
  return kLanes;
#endif
}

// Counts a block. Coarse: by the upper half of the key; fine: by the lower half, where the upper half is `boundary`.
template <bool fine>
void count_block(uint32_t* bins, Tally& tally, const Block& b, uint32_t boundary) {
  alignas(64) uint32_t list[kBlock + kLanes];
  int64_t size = 0;
  for (int64_t i = 0; i < kBlock; i += kLanes) {
    const Lanes l = lanes(b, i);
    tally.open -= *reinterpret_cast<const Vec*>(b.open + i);
    tally.numbers -= l.number;
    tally.zeros -= l.number & l.zero;
    const Vec top = l.key >> 16, keep = l.number & ~l.zero;
    if constexpr (fine) size += append(list + size, l.key & 0xffffu, keep & (Vec)(top == boundary));
    else size += append(list + size, top, keep);
  }
  for (int64_t i = 0; i < size; ++i) ++bins[list[i]];
}

// The bin of the k-th largest, 1 <= k <= all, and how many stand in the bins above it.
struct Place {
  int64_t bin, above;
};

Place find(const uint32_t* bins, int64_t k) {
  constexpr int64_t kStep = 256;
  Place at{kSelectBins, 0};
  for (;;) {  // whole steps first: their sums are vector code
    uint32_t here = 0;
    for (int64_t i = at.bin - kStep; i < at.bin; ++i) here += bins[i];
    if (at.above + here >= k) break;
    at.above += here;
    at.bin -= kStep;
  }
  for (--at.bin; at.above + bins[at.bin] < k; --at.bin) at.above += bins[at.bin];
  return at;
}

// One tile of a weight [rows, cols].
struct Tile {
  int64_t top, left, height, width;
};

// The tile's keys row by row, 0 where there is no candidate, and their coarse histogram. Returns the candidates.
int64_t read_tile(uint32_t* keys, uint32_t* bins, const Inputs& in, const Tile& tile, int64_t cols) {
  const int64_t size = tile.height * tile.width;
  Block b;
  Tally tally;
  __builtin_memset(bins, 0, kSelectBins * sizeof(uint32_t));
  for (int64_t at = 0, row = 0, col = 0; at < size; at += kBlock) {
    const int64_t filled = at_most(kBlock, size - at);
    for (int64_t i = 0; i < filled;) {  // a block takes pieces of rows until it is full
      const int64_t piece = at_most(filled - i, tile.width - col);
      load(b, in, (tile.top + row) * cols + tile.left + col, i, piece);
      i += piece;
      if ((col += piece) == tile.width) col = 0, ++row;
    }
    judge(b, in.rule, in.gate, filled);
    count_block<false>(bins, tally, b, 0);
    for (int64_t i = 0; i < kBlock; i += kLanes) {
      const Lanes l = lanes(b, i);
      *reinterpret_cast<Vec*>(keys + at + i) = l.key & l.number;
    }
  }
  bins[kZeroTop] += sum(tally.zeros);
  return sum(tally.numbers);
}

// Marks the k largest keys of a tile, 1 <= k <= candidates; bins is their coarse histogram. Of the keys that equal the
// k-th largest: none, the first ones or the last ones, in row-major order.
void mark_tile(uint8_t* __restrict__ out, uint32_t* bins, const uint32_t* keys, const Tile& tile, int64_t cols,
               int64_t k, Ties take) {
  const int64_t height = tile.height, width = tile.width;
  const Place coarse = find(bins, k);
  const uint32_t boundary = static_cast<uint32_t>(coarse.bin);
  __builtin_memset(bins, 0, kSelectBins * sizeof(uint32_t));
  alignas(64) uint32_t list[kBlock + kLanes];
  for (int64_t at = 0; at < height * width; at += kBlock) {  // beyond the tile there are zeros, which no key is
    int64_t size = 0;
    for (int64_t i = at; i < at + kBlock; i += kLanes) {
      const Vec key = *reinterpret_cast<const Vec*>(keys + i);
      size += append(list + size, key & 0xffffu, (Vec)(key >> 16 == boundary));
    }
    for (int64_t i = 0; i < size; ++i) ++bins[list[i]];
  }
  const Place fine = find(bins, k - coarse.above);
  const uint32_t tau = boundary << 16 | static_cast<uint32_t>(fine.bin);
  int64_t quota = take == Ties::kNone ? 0 : k - coarse.above - fine.above;
  int64_t skip = take == Ties::kLast ? bins[fine.bin] - quota : 0;
  for (int64_t row = 0; row < height; ++row, out += cols, keys += width) {
    for (int64_t i = 0; i < width; ++i) out[i] = keys[i] > tau;
    for (int64_t i = 0; i < width && quota; ++i)
      if (keys[i] == tau && --skip < 0) out[i] = 1, --quota;
  }
}

// How many of a tile to mark, at most all candidates.
int64_t wanted(Count count, double amount, int64_t of, int64_t candidates) {
  const double n = static_cast<double>(of);
  const double k = count == Count::kNumber     ? amount
                   : count == Count::kFraction ? __builtin_ceil(amount * n)
                                               : n - __builtin_floor(amount * n);
  return k < static_cast<double>(candidates) ? static_cast<int64_t>(k) : candidates;
}

}  // namespace

Status select_histogram(int64_t* histogram, int64_t* tallies, uint32_t* scratch, const void* weight, const void* target,
                        const int64_t* boundary, const uint8_t* mask_bits, const uint8_t* mask_bytes, const void* grad,
                        const float* fisher, const void* direction, int64_t n, Rule rule, Gate gate, DType dtype,
                        DType grad_dtype, int threads) {
  const Inputs in{weight, target, mask_bits, mask_bytes, grad, fisher, direction, rule, gate, dtype, grad_dtype};
  const bool unsigned_keys = rule == Rule::kGrad || rule == Rule::kTaylor || rule == Rule::kDelta;
  const int64_t first = !boundary && unsigned_keys ? kZeroTop : 0;
  int64_t slots = 0;
  parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
    uint32_t* bins = scratch + kSelectScratch * __atomic_fetch_add(&slots, 1, __ATOMIC_RELAXED);
    Block b;
    for (; begin < end; begin += kFlush) {
      const int64_t stop = at_most(end, begin + kFlush);
      Tally tally;
      __builtin_memset(bins + first, 0, (kSelectBins - first) * sizeof(uint32_t));
      for (int64_t at = begin; at < stop; at += kBlock) {
        prepare(b, in, at, at_most(kBlock, stop - at));
        if (boundary) count_block<true>(bins, tally, b, static_cast<uint32_t>(*boundary));
        else count_block<false>(bins, tally, b, 0);
      }
      if (!boundary) bins[kZeroTop] += sum(tally.zeros);
      else if (*boundary == kZeroTop) bins[0] += sum(tally.zeros);
      for (int64_t i = first; i < kSelectBins; ++i)
        if (bins[i]) __atomic_fetch_add(histogram + i, static_cast<int64_t>(bins[i]), __ATOMIC_RELAXED);
      __atomic_fetch_add(tallies, sum(tally.numbers), __ATOMIC_RELAXED);
      __atomic_fetch_add(tallies + 1, sum(tally.open) - sum(tally.numbers), __ATOMIC_RELAXED);
    }
  });
  return kOk;
}

Status select_blocks(uint8_t* selected, uint32_t* scratch, const void* weight, const void* target, const void* grad,
                     const float* fisher, const void* direction, int64_t rows, int64_t cols, int64_t tile_rows,
                     int64_t tile_cols, double amount, Count count, bool of_all, Ties take, Rule rule, Gate gate,
                     DType dtype, DType grad_dtype, int threads) {
  const Inputs in{weight, target, nullptr, nullptr, grad, fisher, direction, rule, gate, dtype, grad_dtype};
  const int64_t down = (rows + tile_rows - 1) / tile_rows, across = (cols + tile_cols - 1) / tile_cols;
  const int64_t slot = kSelectScratch + (tile_rows * tile_cols + kRollbackBlock - 1) / kRollbackBlock * kRollbackBlock;
  int64_t slots = 0;
  parallel_for(down * across, 1, threads, [&](int64_t begin, int64_t end) {
    uint32_t* bins = scratch + slot * __atomic_fetch_add(&slots, 1, __ATOMIC_RELAXED);
    uint32_t* keys = bins + kSelectScratch;
    for (int64_t i = begin; i < end; ++i) {
      const int64_t top = i / across * tile_rows, left = i % across * tile_cols;
      const Tile tile{top, left, at_most(tile_rows, rows - top), at_most(tile_cols, cols - left)};
      const int64_t candidates = read_tile(keys, bins, in, tile, cols);
      const int64_t k = wanted(count, amount, of_all ? tile.height * tile.width : candidates, candidates);
      uint8_t* out = selected + top * cols + left;
      if (k > 0) mark_tile(out, bins, keys, tile, cols, k, take);
      else
        for (int64_t r = 0; r < tile.height; ++r) __builtin_memset(out + r * cols, 0, tile.width);
    }
  });
  return kOk;
}

}  // namespace curvkern::cpu::CURVKERN_ISA

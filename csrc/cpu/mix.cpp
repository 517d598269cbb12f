// Merging on the CPU: every tensor is read once, in blocks that stay in the first-level cache, and the result is
// rounded once.
//
// Wins over torch (16 Mi weights): a chain of multiply, add, compare and convert passes over memory becomes one.
#include "philox.h"
#include "sums.h"

namespace curvkern::cpu::CURVKERN_ISA {
namespace {

constexpr int64_t kBlock = kSumBlock, kGrain = kMixChunk;
static_assert(kMixChunk % kSumBlock == 0 && kSumBlock == 4 * kIndices,
              "chunks are whole blocks, each of one philox_words");

struct Source {
  const void* data;
  DType dtype;
};

Source source(const int64_t* tensors, int64_t k) {
  return {reinterpret_cast<const void*>(tensors[2 * k]), static_cast<DType>(tensors[2 * k + 1])};
}

// words[i]: the random word of element first + i; first is a multiple of 4.
inline void philox_block(uint32_t (&words)[kBlock], int64_t first, uint64_t seed) {
  alignas(64) uint32_t of_index[4][kIndices];
  philox_words(of_index, static_cast<uint64_t>(first) / 4, kIndices, seed);
  for (int64_t i = 0; i < kIndices; ++i)
    for (int k = 0; k < 4; ++k) words[4 * i + k] = of_index[k][i];
}

}  // namespace

Status mix_linear(void* out, const float* weights, const int64_t* tensors, int64_t ways, int64_t rows, int64_t cols,
                  DType dtype, int threads) {
  parallel_for(rows * cols, kGrain, threads, [&](int64_t begin, int64_t end) {
    SumBlock x, sum;
    while (begin < end) {  // blocks that share one row
      const int64_t row = begin / cols, size = at_most(at_most(kBlock, end - begin), (row + 1) * cols - begin);
      for (int64_t k = 0; k < ways; ++k) {
        const float weight = weights[k * rows + row];
        const Source in = source(tensors, k);
        load_padded(x, in.data, begin, size, in.dtype);
        for (int64_t i = 0; i < kBlock; ++i) {
          const float share = weighted(weight, x.v[i]);
          sum.v[i] = k ? add(sum.v[i], share) : share;
        }
      }
      store_block(out, sum.v, begin, size, dtype);
      begin += size;
    }
  });
  return kOk;
}

Status mix_dots(double* partial, const void* base, const int64_t* tensors, int64_t ways, int64_t rows, int64_t cols,
                DType base_dtype, int threads) {
  const int64_t chunks = (cols + kMixChunk - 1) / kMixChunk;
  parallel_for(rows * chunks, 4, threads, [&](int64_t begin, int64_t end) {
    SumBlock b, delta[kMixWays];
    for (int64_t piece = begin; piece < end; ++piece) {
      double* total = partial + piece * ways * ways;
      for (int64_t i = 0; i < ways * ways; ++i) total[i] = 0.0;
      const int64_t from = piece % chunks * kMixChunk, to = at_most(cols, from + kMixChunk);
      for (int64_t col = from; col < to; col += kBlock) {
        const int64_t at = piece / chunks * cols + col, size = at_most(kBlock, to - col);
        if (base) load_padded(b, base, at, size, base_dtype);
        for (int64_t k = 0; k < ways; ++k) {
          const Source in = source(tensors, k);
          load_padded(delta[k], in.data, at, size, in.dtype);
          if (!base) continue;
          for (int64_t i = 0; i < kBlock; ++i) delta[k].v[i] = add(delta[k].v[i], -b.v[i]);
        }
        for (int64_t i = 0; i < ways; ++i)
          for (int64_t j = i; j < ways; ++j) total[i * ways + j] += block_dot(delta[i], delta[j]);
      }
    }
  });
  return kOk;
}

Status mix_ties(void* out, const void* base, const int64_t* tensors, const float* limits, const float* weights,
                int64_t ways, int64_t n, float scale, bool normalize, DType dtype, int threads) {
  parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
    SumBlock b, elected, mixed, divisor, share[kMixWays];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t size = at_most(kBlock, end - at);
      load_padded(b, base, at, size, dtype);
      for (int64_t k = 0; k < ways; ++k) {
        const Source in = source(tensors, k);
        load_padded(share[k], in.data, at, size, in.dtype);
        const float limit = limits[k], weight = weights[k];
        for (int64_t i = 0; i < kBlock; ++i) {
          const float s = mul(weight, trimmed(add(share[k].v[i], -b.v[i]), limit));
          share[k].v[i] = s;
          elected.v[i] = k ? add(elected.v[i], s) : s;
        }
      }
      for (int64_t i = 0; i < kBlock; ++i) mixed.v[i] = divisor.v[i] = 0.0f;
      for (int64_t k = 0; k < ways; ++k) {
        const float weight = weights[k];
        for (int64_t i = 0; i < kBlock; ++i) {
          const float s = share[k].v[i];
          const bool counts = agrees(elected.v[i], s);
          mixed.v[i] = add(mixed.v[i], counts ? s : 0.0f);
          divisor.v[i] = add(divisor.v[i], counts ? weight : 0.0f);
        }
      }
      for (int64_t i = 0; i < kBlock; ++i) {
        const float by = normalize && divisor.v[i] != 0.0f ? divisor.v[i] : 1.0f;
        b.v[i] = add(b.v[i], mul(scale, mixed.v[i] / by));
      }
      store_block(out, b.v, at, size, dtype);
    }
  });
  return kOk;
}

Status mix_dare(void* out, const void* base, const void* tuned, const float* scale, int64_t n, uint32_t drop,
                uint64_t seed, DType dtype, DType tuned_dtype, int threads) {
  parallel_for(n, kGrain, threads, [&](int64_t begin, int64_t end) {
    SumBlock b, t;
    alignas(64) uint32_t words[kBlock];
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t size = at_most(kBlock, end - at);
      load_padded(b, base, at, size, dtype);
      load_padded(t, tuned, at, size, tuned_dtype);
      philox_block(words, at, seed);
      const float factor = *scale;
      for (int64_t i = 0; i < kBlock; ++i) {
        const float step = weighted(factor, add(t.v[i], -b.v[i]));
        b.v[i] = words[i] >= drop ? add(b.v[i], step) : b.v[i];
      }
      store_block(out, b.v, at, size, dtype);
    }
  });
  return kOk;
}

Status mix_dare_sums(double* partial, const void* base, const void* tuned, int64_t n, uint32_t drop, uint64_t seed,
                     DType dtype, DType tuned_dtype, int threads) {
  parallel_for(n, kMixChunk, threads, [&](int64_t begin, int64_t end) {
    SumBlock b, t, one;
    alignas(64) uint32_t words[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) one.v[i] = 1.0f;
    for (int64_t chunk = begin; chunk < end; chunk += kMixChunk) {
      double all = 0.0, kept = 0.0;
      for (int64_t at = chunk; at < at_most(end, chunk + kMixChunk); at += kBlock) {
        const int64_t size = at_most(kBlock, end - at);
        load_padded(b, base, at, size, dtype);
        load_padded(t, tuned, at, size, tuned_dtype);
        philox_block(words, at, seed);
        for (int64_t i = 0; i < kBlock; ++i) {
          const float magnitude = absolute(add(t.v[i], -b.v[i]));
          b.v[i] = magnitude < __builtin_inff() ? magnitude : 0.0f;
          t.v[i] = words[i] >= drop ? b.v[i] : 0.0f;
        }
        all += block_dot(b, one);
        kept += block_dot(t, one);
      }
      partial[chunk / kMixChunk * 2] = all;
      partial[chunk / kMixChunk * 2 + 1] = kept;
    }
  });
  return kOk;
}

}  // namespace curvkern::cpu::CURVKERN_ISA

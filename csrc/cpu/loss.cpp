// token_loss and token_grad on the CPU: a row of logits is widened 1024 at a time, in cache.
//
// Wins over torch (2 cores, 512 x 32000 float32): cross_entropy writes the log-probabilities, as large as the logits,
// and reads them again; here a row is read twice, the second time from cache, and two numbers are kept.
#include "cpu.h"

namespace curvkern::cpu::CURVKERN_ISA {
namespace {

constexpr int64_t kBlock = 1024, kLanes = 32, kIgnored = -100;
constexpr float kInfinity = __builtin_inff();

// e^x within 2 units in the last place for x <= 0; 0 below -87; NaN stays NaN.
inline float exponential(float x) {
  const float shifted = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the nearest integer
  const float k = shifted - 12582912.0f;
  const float r = (x - k * 0.693145752f) - k * 1.42860677e-6f;  // log 2 in two parts; the first times k is exact
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * (r * r) + r + 1.0f;
  const float power = float_of((bits_of(shifted) - 0x4b400000u + 127u) << 23);
  return x < -87.0f ? 0.0f : p * power;
}

// Calls body(begin, n) for the blocks of a row.
template <class Body>
inline void each_block(int64_t n, Body&& body) {
  for (int64_t at = 0; at < n; at += kBlock) body(at, at_most(kBlock, n - at));
}

// x[0, kBlock): the block of a row, `fill` beyond its n logits.
inline void load(float* x, const void* data, int64_t at, int64_t n, DType dtype, float fill) {
  load_block(x, data, at, n, dtype);
  for (int64_t i = n; i < kBlock; ++i) x[i] = fill;
}

float largest(const void* data, int64_t at, int64_t n, DType dtype) {
  alignas(64) float x[kBlock], lanes[kLanes];
  for (float& lane : lanes) lane = -kInfinity;
  each_block(n, [&](int64_t begin, int64_t size) {
    load(x, data, at + begin, size, dtype, -kInfinity);
    for (int64_t i = 0; i < kBlock; i += kLanes)
      for (int64_t k = 0; k < kLanes; ++k) lanes[k] = x[i + k] > lanes[k] ? x[i + k] : lanes[k];
  });
  for (float lane : lanes) lanes[0] = lane > lanes[0] ? lane : lanes[0];
  return lanes[0];
}

// The sum of term(i) over a block, which is added to a wider one.
template <class Term>
inline double block_sum(Term&& term) {
  float lanes[kLanes] = {};
  for (int64_t i = 0; i < kBlock; i += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += term(i + k);
  double sum = 0.0;
  for (float lane : lanes) sum += lane;
  return sum;
}

}  // namespace

Status token_loss(float* loss, float* lse, float* reference_lse, const void* logits, const int64_t* labels,
                  const void* reference, int64_t rows, int64_t vocab, DType dtype, DType reference_dtype, int threads) {
  parallel_for(rows, 1, threads, [&](int64_t begin, int64_t end) {
    alignas(64) float x[kBlock], y[kBlock], p[kBlock];
    for (int64_t row = begin; row < end; ++row) {
      const bool counts = !labels || labels[row] != kIgnored;
      float top = 0.0f, reference_top = 0.0f, spread = 0.0f, reference_spread = 0.0f, value = 0.0f;
      if (counts) {
        double sum = 0.0, reference_sum = 0.0, cross = 0.0;
        top = largest(logits, row * vocab, vocab, dtype);
        if (reference) reference_top = largest(reference, row * vocab, vocab, reference_dtype);
        each_block(vocab, [&](int64_t at, int64_t n) {
          load(x, logits, row * vocab + at, n, dtype, -kInfinity);
          sum += block_sum([&](int64_t i) { return exponential(x[i] - top); });
          if (!reference) return;
          load(y, reference, row * vocab + at, n, reference_dtype, -kInfinity);
          for (int64_t i = 0; i < kBlock; ++i) p[i] = exponential(y[i] - reference_top);
          reference_sum += block_sum([&](int64_t i) { return p[i]; });
          cross += block_sum([&](int64_t i) { return p[i] == 0.0f ? 0.0f : p[i] * (y[i] - x[i]); });
        });
        spread = static_cast<float>(__builtin_log(sum));
        value = spread;
        if (reference) {
          reference_spread = static_cast<float>(__builtin_log(reference_sum));
          value = static_cast<float>(cross / reference_sum) + (top - reference_top) + (spread - reference_spread);
        } else if (labels) {
          float picked = __builtin_nanf("");
          const bool known = labels[row] >= 0 && labels[row] < vocab;
          if (known) load_block(&picked, logits, row * vocab + labels[row], 1, dtype);
          value = (top - picked) + spread;
        }
      }
      loss[row] = value;
      lse[row] = top;
      lse[rows + row] = spread;
      if (!reference) continue;
      reference_lse[row] = reference_top;
      reference_lse[rows + row] = reference_spread;
    }
  });
  return kOk;
}

Status token_grad(void* out, const void* logits, const int64_t* labels, const void* reference, const float* lse,
                  const float* reference_lse, const float* scale, int64_t rows, int64_t vocab, DType dtype,
                  DType reference_dtype, int threads) {
  return with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(rows, 1, threads, [&](int64_t begin, int64_t end) {
      alignas(64) float x[kBlock], y[kBlock];
      for (int64_t row = begin; row < end; ++row) {
        T* to = static_cast<T*>(out) + row * vocab;
        const int64_t label = labels ? labels[row] : 0;
        each_block(vocab, [&](int64_t at, int64_t n) {
          if (label == kIgnored) {
            for (int64_t i = 0; i < n; ++i) store(to[at + i], 0.0f);
            return;
          }
          load(x, logits ? logits : out, row * vocab + at, n, dtype, -kInfinity);
          for (int64_t i = 0; i < kBlock; ++i) x[i] = exponential((x[i] - lse[row]) - lse[rows + row]);
          if (reference) {
            load(y, reference, row * vocab + at, n, reference_dtype, -kInfinity);
            for (int64_t i = 0; i < kBlock; ++i)
              x[i] -= exponential((y[i] - reference_lse[row]) - reference_lse[rows + row]);
          } else if (label >= at && label < at + n) {
            x[label - at] -= 1.0f;
          }
          for (int64_t i = 0; i < n; ++i) store(to[at + i], scale[row] * x[i]);
        });
      }
    });
  });
}

}  // namespace curvkern::cpu::CURVKERN_ISA

// perturb on the CPU: normal numbers are made 256 at a time, in cache, once for their norm and once to be added.
//
// Wins over torch (2 cores, float32, 16 Mi weights): no direction is stored, and its numbers are plain vector code.
#include "philox.h"

namespace curvkern::cpu::CURVKERN_ISA {
namespace {

constexpr int64_t kNumbers = 4 * kIndices, kLanes = 16;

// Calls body(z, count, i) for [0, n) in runs: z[j] belongs to element begin + i + j of the stream, j in [0, count).
template <class Body>
void each_normal(uint64_t begin, int64_t n, uint64_t seed, Body&& body) {
  alignas(64) uint32_t words[4][kIndices];
  alignas(64) float z[kNumbers];
  for (int64_t i = 0; i < n;) {
    const int64_t skipped = (begin + i) % 4, end = at_most(skipped + n - i, kNumbers);
    philox_words(words, (begin + i) / 4, kIndices, seed);
    for (int64_t j = 0; j < kIndices; ++j) {  // always all of them: a loop of constant length
      const Normals low = normals(words[0][j], words[1][j]), high = normals(words[2][j], words[3][j]);
      z[4 * j] = low.a;
      z[4 * j + 1] = low.b;
      z[4 * j + 2] = high.a;
      z[4 * j + 3] = high.b;
    }
    body(z + skipped, end - skipped, i);
    i += end - skipped;
  }
}

// lanes[j % kLanes] += x(j)^2 in float64, j in [0, n).
template <class X>
inline void add_squares(double (&lanes)[kLanes], int64_t n, X&& x) {
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int64_t k = 0; k < kLanes; ++k) lanes[k] += static_cast<double>(x(j + k)) * static_cast<double>(x(j + k));
  for (int64_t k = 0; j + k < n; ++k) lanes[k] += static_cast<double>(x(j + k)) * static_cast<double>(x(j + k));
}

}  // namespace

Status perturb_squares(double* squares, const void* original, int64_t n, int64_t segment, int64_t seed, int64_t offset,
                       DType dtype, int threads) {
  const int64_t segments = (n + segment - 1) / segment;
  return with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(segments, 1, threads, [&](int64_t from, int64_t to) {
      for (int64_t s = from; s < to; ++s) {
        const T* x = static_cast<const T*>(original) + s * segment;
        double of_x[kLanes] = {}, of_z[kLanes] = {};
        each_normal(offset + s * segment, at_most(segment, n - s * segment), seed,
                    [&](const float* z, int64_t count, int64_t i) {
                      add_squares(of_z, count, [&](int64_t j) { return z[j]; });
                      add_squares(of_x, count, [&](int64_t j) { return to_float(x[i + j]); });
                    });
        squares[s] = squares[segments + s] = 0.0;
        for (int64_t k = 0; k < kLanes; ++k) squares[s] += of_x[k], squares[segments + s] += of_z[k];
      }
    });
  });
}

Status perturb(void* weight, const void* original, const float* scale, int64_t n, int64_t segment, int64_t seed,
               int64_t offset, DType dtype, int threads) {
  return with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    parallel_for(n, 1 << 14, threads, [&](int64_t begin, int64_t end) {
      while (begin < end) {
        const int64_t size = at_most(segment - begin % segment, end - begin);
        const float step = scale[begin / segment];
        T* out = static_cast<T*>(weight) + begin;
        const T* x = static_cast<const T*>(original) + begin;
        each_normal(offset + begin, size, seed, [&](const float* z, int64_t count, int64_t i) {
          for (int64_t j = 0; j < count; ++j) store(out[i + j], add(to_float(x[i + j]), mul(step, z[j])));
        });
        begin += size;
      }
    });
  });
}

}  // namespace curvkern::cpu::CURVKERN_ISA

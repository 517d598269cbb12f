// A panel of the OBS sweep on the CPU: a row's values and the triangle stay in cache for all columns of the panel.
//
// Wins over torch, which takes three passes over the panel for every column.
#include "cpu.h"

namespace curvkern::cpu::CURVKERN_ISA {

Status obs(float* panel, float* errors, const uint8_t* mask, const float* target, const float* triangle, int64_t rows,
           int64_t width, int64_t stride, int threads) {
  parallel_for(rows, 8, threads, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) {
      float* __restrict__ values = panel + row * stride;
      float* __restrict__ error = errors + row * width;
      const uint8_t* fixed = mask + row * width;
      for (int64_t j = 0; j < width; ++j) {
        if (!fixed[j]) {
          error[j] = 0.0f;
          continue;
        }
        const float* __restrict__ pivots = triangle + j * width;
        const float wanted = target ? target[row * width + j] : 0.0f;
        const float e = (values[j] - wanted) / pivots[j];
        for (int64_t k = j + 1; k < width; ++k) values[k] -= e * pivots[k];
        error[j] = e;
        values[j] = wanted;
      }
    }
  });
  return kOk;
}

}  // namespace curvkern::cpu::CURVKERN_ISA

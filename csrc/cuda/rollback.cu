// rollback, undo and blend on the GPU. Bound by bytes: each input is read once, 16 bytes a thread and array, and a
// weight is written only where one of a thread's eight changed. Undo bits: a thread's eight weights are exactly one
// byte.
//
// Against the Triton version: no mask arithmetic on full vectors, and no store at all for untouched weights.
#include "scored.cuh"

namespace curvkern::cuda {
namespace {

constexpr int kThreads = 256;
static_assert(kRollbackBlock == kThreads * 8, "a thread owns eight weights of a block");

__device__ __forceinline__ uint32_t ties_of(const float (&score)[8], uint32_t open, float tau) {
  uint32_t ties = 0;
#pragma unroll
  for (int k = 0; k < 8; ++k) ties |= static_cast<uint32_t>(((open >> k) & 1u) && score[k] == tau) << k;
  return ties;
}

__global__ void __launch_bounds__(kThreads)
    rollback_kernel(int64_t* __restrict__ count, void* weight, uint8_t* __restrict__ undo, const Inputs in,
                    const float* __restrict__ tau, const int64_t* __restrict__ quota,
                    const int64_t* __restrict__ tie_offsets, bool aligned) {
  __shared__ int scratch[kThreads / 32];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRollbackBlock + threadIdx.x * 8;
  Eight e = prepare(in, i, aligned);
  uint32_t chosen = e.open;
  if (tau) {
    const float limit = *tau;
    chosen = 0;
#pragma unroll
    for (int k = 0; k < 8; ++k) chosen |= static_cast<uint32_t>(((e.open >> k) & 1u) && e.score[k] > limit) << k;
    if (tie_offsets) {  // the first *quota ties in element order are taken as well
      const uint32_t ties = ties_of(e.score, e.open, limit);
      int64_t left = *quota - tie_offsets[blockIdx.x] - block_sum_before<kThreads>(__popc(ties), scratch);
      __syncthreads();
#pragma unroll
      for (int k = 0; k < 8; ++k)
        if (((ties >> k) & 1u) && left-- > 0) chosen |= 1u << k;
    }
  }
  if (chosen) {
    replace(e.weight, e.target, chosen, in.dtype);
    store8(weight, e.weight, in.dtype, i, in.n, aligned);
  }
  if (undo && i < in.n) undo[i >> 3] = static_cast<uint8_t>(chosen);
  const int total = block_sum<kThreads>(__popc(chosen), scratch);
  if (threadIdx.x == 0 && total)
    atomicAdd(reinterpret_cast<unsigned long long*>(count), static_cast<unsigned long long>(total));
}

__global__ void __launch_bounds__(kThreads)
    rollback_ties_kernel(int64_t* __restrict__ ties, const Inputs in, const float* __restrict__ tau, bool aligned) {
  __shared__ int scratch[kThreads / 32];
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kRollbackBlock + threadIdx.x * 8;
  const Eight e = prepare(in, i, aligned);
  const int total = block_sum<kThreads>(__popc(ties_of(e.score, e.open, *tau)), scratch);
  if (threadIdx.x == 0) ties[blockIdx.x] = total;
}

__global__ void __launch_bounds__(kThreads)
    blend_kernel(void* weight, const void* target, const float* __restrict__ alpha, int64_t n, int64_t cols,
                 int64_t tile_rows, int64_t tile_cols, int64_t tiles_in_row, DType dtype, bool aligned) {
  const int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 8;
  if (i >= n) return;
  float w[8], t[8];
  floats(w, load8(weight, dtype, i, n, aligned), dtype);
  floats(t, load8(target, dtype, i, n, aligned), dtype);
  int64_t row = i / cols, col = i % cols;
#pragma unroll
  for (int k = 0; k < 8; ++k) {
    if (i + k < n) w[k] = blended(w[k], t[k], alpha[(row / tile_rows) * tiles_in_row + col / tile_cols]);
    if (++col == cols) col = 0, ++row;
  }
  store8(weight, from_floats(w, dtype), dtype, i, n, aligned);
}

}  // namespace

Status rollback(int64_t* count, void* weight, uint8_t* undo, const void* target, const float* tau, const int64_t* quota,
                const int64_t* tie_offsets, const uint8_t* mask_bits, const uint8_t* mask_bytes, const void* grad,
                const float* fisher, const void* direction, int64_t n, Rule rule, Gate gate, DType dtype,
                DType grad_dtype, int device, void* stream) {
  if (!known(dtype) || !known(grad_dtype)) return kUnsupportedDType;
  if (n == 0) return kOk;
  DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const Inputs in{weight, target, mask_bits, mask_bytes, grad, fisher, direction, n, rule, gate, dtype, grad_dtype};
  rollback_kernel<<<ceil_div(n, kRollbackBlock), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      count, weight, undo, in, tau, quota, tie_offsets, in.aligned());
  return cudaGetLastError();
}

Status rollback_ties(int64_t* ties, const void* weight, const void* target, const float* tau, const uint8_t* mask_bits,
                     const uint8_t* mask_bytes, const void* grad, const float* fisher, const void* direction, int64_t n,
                     Rule rule, Gate gate, DType dtype, DType grad_dtype, int device, void* stream) {
  if (!known(dtype) || !known(grad_dtype)) return kUnsupportedDType;
  if (n == 0) return kOk;
  DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  const Inputs in{weight, target, mask_bits, mask_bytes, grad, fisher, direction, n, rule, gate, dtype, grad_dtype};
  rollback_ties_kernel<<<ceil_div(n, kRollbackBlock), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(ties, in, tau,
                                                                                                        in.aligned());
  return cudaGetLastError();
}

Status blend(void* weight, const void* target, const float* alpha, int64_t rows, int64_t cols, int64_t tile_rows,
             int64_t tile_cols, DType dtype, int device, void* stream) {
  const int64_t n = rows * cols;
  if (!known(dtype)) return kUnsupportedDType;
  if (n == 0) return kOk;
  DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  blend_kernel<<<ceil_div(n, kThreads * 8), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      weight, target, alpha, n, cols, tile_rows, tile_cols, ceil_div(cols, tile_cols), dtype,
      aligned16(weight) && aligned16(target));
  return cudaGetLastError();
}

}  // namespace curvkern::cuda

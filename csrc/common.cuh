// What every csrc/cuda/<op>.cu shares: the device guard, the dtype switch, 16-byte vectors, reductions.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "launch.h"
#include "rules.h"

namespace curvkern {

// Makes `device` current and gives the caller's device back. The static runtime has a current device of its own.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    status_ = cudaGetDevice(&previous_);
    if (status_ == cudaSuccess && previous_ != device) status_ = cudaSetDevice(device);
  }
  ~DeviceGuard() {
    if (status_ == cudaSuccess) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;
  cudaError_t status() const { return status_; }

 private:
  int previous_ = 0;
  cudaError_t status_;
};

__host__ __device__ __forceinline__ int size_of(DType dtype) { return dtype == DType::kFloat32 ? 4 : 2; }

// Eight consecutive elements as they lie in memory: one 16-byte access for 2-byte types, two for float32. Kept raw, and
// converted by `floats`, so that one kernel serves all dtypes and all its loads are in flight before the first is used.
struct alignas(16) Raw8 {
  uint32_t word[8];
};

// data[i .. i+8) with zeros past n; vector accesses if `aligned` (i is always a multiple of 8).
__device__ __forceinline__ Raw8 load8(const void* data, DType dtype, int64_t i, int64_t n, bool aligned) {
  const bool wide = dtype == DType::kFloat32;
  Raw8 v{};
  if (aligned && i + 8 <= n) {
    const auto* from = reinterpret_cast<const uint4*>(static_cast<const char*>(data) + i * size_of(dtype));
    reinterpret_cast<uint4*>(v.word)[0] = from[0];
    if (wide) reinterpret_cast<uint4*>(v.word)[1] = from[1];
  } else if (wide) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (i + k < n) v.word[k] = static_cast<const uint32_t*>(data)[i + k];
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (i + k < n) v.word[k / 2] |= static_cast<uint32_t>(static_cast<const uint16_t*>(data)[i + k]) << (k % 2 * 16);
  }
  return v;
}

__device__ __forceinline__ void store8(void* data, const Raw8& v, DType dtype, int64_t i, int64_t n, bool aligned) {
  const bool wide = dtype == DType::kFloat32;
  if (aligned && i + 8 <= n) {
    auto* to = reinterpret_cast<uint4*>(static_cast<char*>(data) + i * size_of(dtype));
    to[0] = reinterpret_cast<const uint4*>(v.word)[0];
    if (wide) to[1] = reinterpret_cast<const uint4*>(v.word)[1];
  } else if (wide) {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (i + k < n) static_cast<uint32_t*>(data)[i + k] = v.word[k];
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      if (i + k < n) static_cast<uint16_t*>(data)[i + k] = static_cast<uint16_t>(v.word[k / 2] >> (k % 2 * 16));
  }
}

__device__ __forceinline__ void floats(float (&out)[8], const Raw8& v, DType dtype) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int k = 0; k < 8; ++k) out[k] = __uint_as_float(v.word[k]);
  } else if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int k = 0; k < 8; ++k) out[k] = __uint_as_float(k % 2 ? v.word[k / 2] & 0xffff0000u : v.word[k / 2] << 16);
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k)
      out[k] = __half2float(__ushort_as_half(static_cast<unsigned short>(v.word[k / 2] >> (k % 2 * 16))));
  }
}

// Rounds to nearest even.
__device__ __forceinline__ Raw8 from_floats(const float (&x)[8], DType dtype) {
  Raw8 v{};
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int k = 0; k < 8; ++k) v.word[k] = __float_as_uint(x[k]);
  } else {
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const uint32_t bits = dtype == DType::kBFloat16 ? __bfloat16_as_ushort(__float2bfloat16_rn(x[k]))
                                                      : __half_as_ushort(__float2half_rn(x[k]));
      v.word[k / 2] |= bits << (k % 2 * 16);
    }
  }
  return v;
}

// Element k of `from` replaces element k of `to` where bit k of `chosen` is set; the others keep their bits.
__device__ __forceinline__ void replace(Raw8& to, const Raw8& from, uint32_t chosen, DType dtype) {
  if (dtype == DType::kFloat32) {
#pragma unroll
    for (int k = 0; k < 8; ++k) to.word[k] = (chosen >> k) & 1u ? from.word[k] : to.word[k];
  } else {
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      const uint32_t mask = ((chosen >> 2 * k) & 1u ? 0xffffu : 0u) | ((chosen >> 2 * k) & 2u ? 0xffff0000u : 0u);
      to.word[k] = (to.word[k] & ~mask) | (from.word[k] & mask);
    }
  }
}

inline bool aligned16(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 15u) == 0; }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Sum over the block, in thread 0. `scratch` holds one number a warp.
template <int kThreads>
__device__ __forceinline__ int block_sum(int value, int* scratch) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_down_sync(0xffffffffu, value, offset);
  if ((threadIdx.x & 31) == 0) scratch[threadIdx.x >> 5] = value;
  __syncthreads();
  int total = 0;
  if (threadIdx.x == 0)
    for (int warp = 0; warp < kThreads / 32; ++warp) total += scratch[warp];
  return total;
}

// Sum of `value` over the threads before this one. `scratch` holds one number a warp.
template <int kThreads>
__device__ __forceinline__ int block_sum_before(int value, int* scratch) {
  const int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int inclusive = value;
#pragma unroll
  for (int offset = 1; offset < 32; offset <<= 1) {
    const int left = __shfl_up_sync(0xffffffffu, inclusive, offset);
    if (lane >= offset) inclusive += left;
  }
  if (lane == 31) scratch[warp] = inclusive;
  __syncthreads();
  int before = inclusive - value;
  for (int w = 0; w < warp; ++w) before += scratch[w];
  return before;
}

// Whether the launchers know this code (a launcher is the last to see it before memory is touched).
inline bool known(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

}  // namespace curvkern

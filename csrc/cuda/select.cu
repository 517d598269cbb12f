// select on the GPU: a histogram of score keys. Bound by bytes: each input is read once, 16 bytes a thread and array.
//
// A block counts in shared memory and adds its bins to the 64-bit ones at the end. The 65536 bins of all keys do not
// fit there, so a window of them does: magnitudes from 2^-112 up to 2^16, of both signs where scores can be negative
// and the device has the room. What lies outside is rare and goes straight to global memory, lanes with one bin
// together. Zeros, which come in masses, are counted in registers. Integer atomics: the result is deterministic.
//
// Against the Triton version: no global atomic per weight.
#include "scored.cuh"

namespace curvkern::cuda {
namespace {

constexpr int kThreads = 768;  // one block a processor, registers for all of it
constexpr int64_t kPerBlock = kThreads * 8;
constexpr int64_t kMostPerBlock = int64_t{1} << 30;  // the counters of a block have 32 bits
constexpr uint32_t kZeroTop = 0x80000000u >> 16;     // bin of a score of zero
constexpr uint32_t kHalf = 128 * 128;                // bins of the window for one sign: 128 exponents
constexpr uint32_t kLeast = (127 - 112) * 128;       // the upper half of the float 2^-112

// Place in the window of the scores whose key has the upper half `top`, negative ones behind the others; at or above
// the window's size where there is none.
constexpr uint32_t slot_of(uint32_t top) {
  const bool negative = top < kZeroTop;
  const uint32_t slot = (negative ? kZeroTop - 1 - top : top - kZeroTop) - kLeast;
  return slot >= kHalf ? ~0u : negative ? kHalf + slot : slot;
}

constexpr uint32_t top_of(uint32_t slot) {
  return slot < kHalf ? kZeroTop + kLeast + slot : kZeroTop - 1 - kLeast - (slot - kHalf);
}

constexpr uint32_t kOneTop = kZeroTop | 0x3f80u;  // of the score 1
static_assert(slot_of(kOneTop) == 112 * 128 && slot_of(0xffffu ^ kOneTop) == kHalf + 112 * 128);
static_assert(top_of(slot_of(kOneTop)) == kOneTop && top_of(slot_of(0xffffu ^ kOneTop)) == (0xffffu ^ kOneTop));
static_assert(slot_of(kZeroTop) == ~0u && slot_of(0xff80u) == ~0u, "zero and infinity are outside");

// Adds one to the bin of every lane that takes part, with one atomic for each distinct bin of the warp.
__device__ __forceinline__ void add_to_global(int64_t* histogram, uint32_t bin, bool take) {
  const uint32_t takers = __ballot_sync(0xffffffffu, take);
  if (!take) return;
  const uint32_t same = __match_any_sync(takers, bin);
  if ((threadIdx.x & 31) == __ffs(same) - 1)
    atomicAdd(reinterpret_cast<unsigned long long*>(histogram) + bin, static_cast<unsigned long long>(__popc(same)));
}

__device__ __forceinline__ void add_total(int64_t* to, int value, int* scratch) {
  const int total = block_sum<kThreads>(value, scratch);
  if (threadIdx.x == 0 && total)
    atomicAdd(reinterpret_cast<unsigned long long*>(to), static_cast<unsigned long long>(total));
}

__global__ void __launch_bounds__(kThreads)
    select_histogram_kernel(int64_t* __restrict__ histogram, int64_t* __restrict__ tallies, const Inputs in,
                            const int64_t* __restrict__ boundary, uint32_t window, bool aligned) {
  extern __shared__ uint32_t bins[];
  __shared__ int scratch[3][kThreads / 32];
  for (uint32_t slot = threadIdx.x; slot < window; slot += kThreads) bins[slot] = 0;
  __syncthreads();
  const uint32_t wanted = boundary ? static_cast<uint32_t>(*boundary) : 0;
  int numbers = 0, nans = 0, zeros = 0;
  for (int64_t at = blockIdx.x * kPerBlock; at < in.n; at += gridDim.x * kPerBlock) {  // alike in all threads
    const Eight e = prepare(in, at + threadIdx.x * 8, aligned);
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      const bool open = (e.open >> k) & 1u, number = open && e.score[k] == e.score[k];
      const uint32_t key = score_key(e.score[k]), top = key >> 16, slot = slot_of(top);
      const bool zero = e.score[k] == 0.0f, counted = number && !zero && (!boundary || top == wanted);
      numbers += number;
      nans += open && !number;
      zeros += number && zero;
      if (counted && slot < window) atomicAdd(&bins[slot], 1u);
      add_to_global(histogram, boundary ? key & 0xffffu : top, counted && slot >= window);
    }
  }
  add_total(tallies, numbers, scratch[0]);
  add_total(tallies + 1, nans, scratch[1]);
  if (!boundary || wanted == kZeroTop) add_total(histogram + (boundary ? 0 : kZeroTop), zeros, scratch[2]);
  __syncthreads();
  for (uint32_t slot = threadIdx.x; slot < window; slot += kThreads)
    if (bins[slot])
      atomicAdd(reinterpret_cast<unsigned long long*>(histogram) + top_of(slot),
                static_cast<unsigned long long>(bins[slot]));
}

}  // namespace

Status select_histogram(int64_t* histogram, int64_t* tallies, const void* weight, const void* target,
                        const int64_t* boundary, const uint8_t* mask_bits, const uint8_t* mask_bytes, const void* grad,
                        const float* fisher, const void* direction, int64_t n, Rule rule, Gate gate, DType dtype,
                        DType grad_dtype, int device, void* stream) {
  if (!known(dtype) || !known(grad_dtype)) return kUnsupportedDType;
  if (n == 0) return kOk;
  DeviceGuard guard(device);
  if (guard.status() != cudaSuccess) return guard.status();
  int processors = 0, shared = 0;
  cudaError_t status = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  if (status == cudaSuccess) status = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (status != cudaSuccess) return status;
  // 128 KB for both signs: A100, H100, H200, B200 have them; others send negative scores to global memory.
  const bool both = (rule == Rule::kFisher || rule == Rule::kGain) && shared >= int(2 * kHalf * 4 + 1024);
  const uint32_t window = boundary ? 0 : both ? 2 * kHalf : kHalf;
  const int bytes = static_cast<int>(window * sizeof(uint32_t));
  status = cudaFuncSetAttribute(select_histogram_kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (status != cudaSuccess) return status;
  // A block per processor, so that few bins are added up at the end.
  int64_t blocks = ceil_div(n, kPerBlock) < processors ? ceil_div(n, kPerBlock) : processors;
  if (blocks < ceil_div(n, kMostPerBlock)) blocks = ceil_div(n, kMostPerBlock);
  const Inputs in{weight, target, mask_bits, mask_bytes, grad, fisher, direction, n, rule, gate, dtype, grad_dtype};
  select_histogram_kernel<<<static_cast<unsigned>(blocks), kThreads, bytes, static_cast<cudaStream_t>(stream)>>>(
      histogram, tallies, in, boundary, window, in.aligned());
  return cudaGetLastError();
}

}  // namespace curvkern::cuda

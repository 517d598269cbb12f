// What every csrc/cpu/<op>.cpp shares: storage types, block conversion to float, and a parallel loop.
//
// These files are compiled once per instruction set into namespace curvkern::cpu::<CURVKERN_ISA>. All of this header
// has internal linkage: a function compiled for AVX-512 must never be the one the linker keeps for an older processor.
#pragma once

#include <cstdint>

#include "../launch.h"
#include "../rules.h"

namespace curvkern::cpu {

// Calls body(context, begin, end) on at most `threads` contiguous pieces of [0, n) that start at multiples of `grain`.
void parallel_pieces(int64_t n, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context);

}  // namespace curvkern::cpu

namespace {

template <class Body>
void parallel_for(int64_t n, int64_t grain, int threads, Body&& body) {
  using Plain = __typeof__(body);
  curvkern::cpu::parallel_pieces(
      n, grain, threads, [](void* context, int64_t begin, int64_t end) { (*static_cast<Plain*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&body)));
}

struct Float32 {
  float value;
};
struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

// Stored numbers as plain bits.
typedef uint32_t Bits32 __attribute__((may_alias));
typedef uint16_t Bits16 __attribute__((may_alias));

inline float to_float(Float32 x) { return x.value; }
inline float to_float(BFloat16 x) { return curvkern::float_of(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(Float16 x) {
  // Move exponent and fraction into place and rescale: right for subnormals too; infinity and NaN are set apart.
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7fffu) << 13;
  const float scaled = curvkern::float_of(magnitude) * 0x1p112f;
  const uint32_t special = (x.bits & 0x7c00u) == 0x7c00u ? (magnitude | 0x7f800000u) : curvkern::bits_of(scaled);
  return curvkern::float_of(special | (static_cast<uint32_t>(x.bits & 0x8000u) << 16));
}

inline void store(Float32& out, float x) { out.value = x; }
inline void store(BFloat16& out, float x) {  // round to nearest, ties to even; NaN stays NaN
  const uint32_t u = curvkern::bits_of(x);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  out.bits = static_cast<uint16_t>((u & 0x7fffffffu) > 0x7f800000u ? (u >> 16) | 0x40u : rounded);
}
inline void store(Float16& out, float x) {
  const uint32_t u = curvkern::bits_of(x);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t magnitude = u & 0x7fffffffu;
  uint32_t half;
  if (magnitude > 0x7f800000u) {
    half = 0x7e00u;
  } else if (magnitude >= 0x477ff000u) {  // 65520 and above round to infinity
    half = 0x7c00u;
  } else if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 aligns and rounds the fraction
    half = curvkern::bits_of(curvkern::float_of(magnitude) + 0.5f) - 0x3f000000u;
  } else {
    half = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  }
  out.bits = static_cast<uint16_t>(sign | half);
}

// Calls body(T{}) with the storage type of `dtype`.
template <class Body>
inline curvkern::Status with_dtype(curvkern::DType dtype, Body&& body) {
  switch (dtype) {
    case curvkern::DType::kFloat32: body(Float32{}); return curvkern::kOk;
    case curvkern::DType::kFloat16: body(Float16{}); return curvkern::kOk;
    case curvkern::DType::kBFloat16: body(BFloat16{}); return curvkern::kOk;
  }
  return curvkern::kUnsupportedDType;
}

// out[0..n) as floats of data[offset..offset + n).
inline void load_block(float* out, const void* data, int64_t offset, int64_t n, curvkern::DType dtype) {
  with_dtype(dtype, [&](auto tag) {
    const auto* in = static_cast<const decltype(tag)*>(data) + offset;
    for (int64_t i = 0; i < n; ++i) out[i] = to_float(in[i]);
  });
}

// data[offset..offset + n) = x, rounded to `dtype`.
inline void store_block(void* data, const float* x, int64_t offset, int64_t n, curvkern::DType dtype) {
  with_dtype(dtype, [&](auto tag) {
    auto* out = static_cast<decltype(tag)*>(data) + offset;
    for (int64_t i = 0; i < n; ++i) store(out[i], x[i]);
  });
}

// Asks for data[from, from + n) of elements `width` bytes wide, some blocks before they are loaded: between a block's
// loads lie loops without any, too long for the processor to look past. Reading beyond the end is no error here.
inline void prefetch(const void* data, int64_t from, int64_t n, int64_t width) {
  if (!data) return;
  const char* ahead = static_cast<const char*>(data) + from * width;
  for (int64_t line = 0; line < n * width; line += 64) __builtin_prefetch(ahead + line);
}

inline int64_t width_of(curvkern::DType dtype) { return dtype == curvkern::DType::kFloat32 ? 4 : 2; }

inline int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace

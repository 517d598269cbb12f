// Lists of tensors on the CPU, one call for all of them: dot products and norms, axpby, lerp.
//
// Wins over torch: one pass over the bytes and one call, where a loop costs some microseconds a tensor and a pass for
// each product and conversion.
#include "sums.h"

namespace curvkern::cpu::CURVKERN_ISA {
namespace {

constexpr int64_t kBlock = kSumBlock;
// Elements worth a thread, half a millisecond: starting a team takes 0.02 ms where cores are free, and five where not.
constexpr int64_t kThreadElements = int64_t{1} << 20;
static_assert(kVectorsChunk % kSumBlock == 0, "chunks are whole blocks");

// A tensor of the list with its partner.
struct Pair {
  void* x;
  void* y;
  int64_t n;
  DType x_dtype;
  DType y_dtype;
  int64_t first_chunk;
};

Pair pair(const int64_t* table, int64_t tensor) {
  const int64_t* row = table + tensor * kVectorsRow;
  return {reinterpret_cast<void*>(row[0]), reinterpret_cast<void*>(row[1]), row[2],
          static_cast<DType>(row[3]),      static_cast<DType>(row[4]),      row[5]};
}

// Calls body(pair, begin, end, chunk) for the elements begin .. end that are the chunk.
template <class Body>
void for_chunks(const int64_t* table, int64_t tensors, int64_t chunks, int threads, Body&& body) {
  int64_t elements = 0;
  for (int64_t tensor = 0; tensor < tensors; ++tensor) elements += pair(table, tensor).n;
  const int64_t team = at_most(threads, 1 + elements / kThreadElements);
  parallel_for(chunks, 1, static_cast<int>(team), [&](int64_t begin, int64_t end) {
    int64_t tensor = 0;
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      while (tensor + 1 < tensors && pair(table, tensor + 1).first_chunk <= chunk) ++tensor;
      const Pair p = pair(table, tensor);
      const int64_t from = (chunk - p.first_chunk) * kVectorsChunk;
      body(p, from, at_most(p.n, from + kVectorsChunk), chunk);
    }
  });
}

// y = rule(x, y) for every element of the list.
template <class Rule>
Status edit(const int64_t* table, int64_t tensors, int64_t chunks, int threads, Rule&& rule) {
  for_chunks(table, tensors, chunks, threads, [&](const Pair& p, int64_t begin, int64_t end, int64_t) {
    if (p.x_dtype == DType::kFloat32 && p.y_dtype == DType::kFloat32) {  // nothing to convert: no blocks between
      const float* x = static_cast<const float*>(p.x);
      float* y = static_cast<float*>(p.y);
      for (int64_t i = begin; i < end; ++i) y[i] = rule(x[i], y[i]);
      return;
    }
    SumBlock x, y;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t size = at_most(kBlock, end - at);
      load_padded(x, p.x, at, size, p.x_dtype);
      load_padded(y, p.y, at, size, p.y_dtype);
      for (int64_t i = 0; i < kBlock; ++i) y.v[i] = rule(x.v[i], y.v[i]);
      store_block(p.y, y.v, at, size, p.y_dtype);
    }
  });
  return kOk;
}

}  // namespace

Status vectors_sums(double* partial, const int64_t* table, int64_t tensors, int64_t chunks, int threads) {
  for_chunks(table, tensors, chunks, threads, [&](const Pair& p, int64_t begin, int64_t end, int64_t chunk) {
    SumBlock x, y;
    double xy = 0.0, xx = 0.0, yy = 0.0;
    for (int64_t at = begin; at < end; at += kBlock) {
      const int64_t size = at_most(kBlock, end - at);
      load_padded(x, p.x, at, size, p.x_dtype);
      xx += block_dot(x, x);
      if (!p.y) continue;
      load_padded(y, p.y, at, size, p.y_dtype);
      xy += block_dot(x, y);
      yy += block_dot(y, y);
    }
    partial[3 * chunk] = xy;
    partial[3 * chunk + 1] = xx;
    partial[3 * chunk + 2] = yy;
  });
  return kOk;
}

Status vectors_axpby(const int64_t* table, const float* coefficients, int64_t tensors, int64_t chunks, int threads) {
  const float a = coefficients[0], b = coefficients[1];
  return edit(table, tensors, chunks, threads, [=](float x, float y) { return add(weighted(a, x), weighted(b, y)); });
}

Status vectors_lerp(const int64_t* table, const float* weight, int64_t tensors, int64_t chunks, int threads) {
  const float w = *weight;
  return edit(table, tensors, chunks, threads, [=](float x, float y) { return blended(y, x, w); });
}

}  // namespace curvkern::cpu::CURVKERN_ISA

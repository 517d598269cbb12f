// The whole native surface of curvkern: plain data in, a status out.
//
// Every launcher takes outputs, inputs, sizes, scalars, dtypes, then where to run: `threads` on the CPU, `device` and
// `stream` on the GPU. Pointers belong to the caller; nothing is allocated, nothing waits, nothing is kept.
#pragma once

#include <cstdint>

namespace curvkern {

// Bump with every change to this file: Python ignores a binary with another number.
constexpr int kAbi = 4;

enum class DType : int32_t { kFloat32 = 0, kFloat16 = 1, kBFloat16 = 2 };
enum class Rule : int32_t { kGrad = 0, kTaylor = 1, kFisher = 2, kDelta = 3, kGain = 4 };
enum class Gate : int32_t { kNone = 0, kDescent = 1, kConflict = 2 };
enum class Statistic : int32_t { kSquare = 0, kAbs = 1, kSum = 2 };

enum class Count : int32_t { kNumber = 0, kFraction = 1, kSpare = 2 };  // K, ceil(fraction n), n - floor(spare n)
enum class Ties : int32_t { kNone = 0, kFirst = 1, kLast = 2 };

// 0: done. Above 0: a cudaError_t. Below 0: one of these.
using Status = int32_t;
constexpr Status kOk = 0;
constexpr Status kUnsupportedDType = -1;

// A CPU launcher is compiled once per instruction set; bindings.cpp takes the best one this processor runs.
#if defined(__x86_64__)
#define CURVKERN_CPU_LAUNCHER(signature) \
  namespace cpu::generic {               \
  Status signature;                      \
  }                                      \
  namespace cpu::avx2 {                  \
  Status signature;                      \
  }                                      \
  namespace cpu::avx512 {                \
  Status signature;                      \
  }
#else
#define CURVKERN_CPU_LAUNCHER(signature) \
  namespace cpu::generic {               \
  Status signature;                      \
  }
#endif

// Asks the system for large pages under [data, data + bytes), which nothing has touched yet. csrc/cpu/parallel.cpp
namespace cpu {
void large_pages(void* data, int64_t bytes);
}

// rollback ---------------------------------------------------------------------------------------------------------
// weight <- target where mask, gate and score > *tau (score == *tau too, for the first *quota of them, if tie_offsets
// is given). Any of tau, mask_bits, mask_bytes, grad, fisher, direction, undo may be null. `undo` gets one bit per
// weight. tie_offsets[b]: how many ties stand before block b of kRollbackBlock elements.
constexpr int64_t kRollbackBlock = 2048;

CURVKERN_CPU_LAUNCHER(rollback(int64_t* count, void* weight, uint8_t* undo, const void* target, const float* tau,
                               const int64_t* quota, const int64_t* tie_offsets, const uint8_t* mask_bits,
                               const uint8_t* mask_bytes, const void* grad, const float* fisher, const void* direction,
                               int64_t n, Rule rule, Gate gate, DType dtype, DType grad_dtype, int threads))
// ties[b] = number of selectable weights of block b whose score equals *tau.
CURVKERN_CPU_LAUNCHER(rollback_ties(int64_t* ties, const void* weight, const void* target, const float* tau,
                                    const uint8_t* mask_bits, const uint8_t* mask_bytes, const void* grad,
                                    const float* fisher, const void* direction, int64_t n, Rule rule, Gate gate,
                                    DType dtype, DType grad_dtype, int threads))
// weight[r, c] += alpha[r / tile_rows, c / tile_cols] * (target - weight), one rounding.
CURVKERN_CPU_LAUNCHER(blend(void* weight, const void* target, const float* alpha, int64_t rows, int64_t cols,
                            int64_t tile_rows, int64_t tile_cols, DType dtype, int threads))

// select -----------------------------------------------------------------------------------------------------------
// A candidate is a weight that mask and gate let through and whose score is a number. Without boundary:
// histogram[score_key >> 16] += 1 for each; with it: histogram[score_key & 0xffff] += 1 for those with score_key >> 16
// == *boundary. tallies[0] += candidates, tallies[1] += those that would be candidates but for a NaN score. What rule
// and gate do not look at may be null. scratch, 64-byte aligned: kSelectScratch numbers for each thread.
constexpr int64_t kSelectBins = 1 << 16, kSelectScratch = kSelectBins + 16;

CURVKERN_CPU_LAUNCHER(select_histogram(int64_t* histogram, int64_t* tallies, uint32_t* scratch, const void* weight,
                                       const void* target, const int64_t* boundary, const uint8_t* mask_bits,
                                       const uint8_t* mask_bytes, const void* grad, const float* fisher,
                                       const void* direction, int64_t n, Rule rule, Gate gate, DType dtype,
                                       DType grad_dtype, int threads))
// selected[r, c] = 1 where the weight ranks among the K largest candidates of its tile, else 0; K counts all weights of
// the tile (of_all) or its candidates. scratch: for each thread kSelectScratch + a tile's weights, rounded up to 2048.
CURVKERN_CPU_LAUNCHER(select_blocks(uint8_t* selected, uint32_t* scratch, const void* weight, const void* target,
                                    const void* grad, const float* fisher, const void* direction, int64_t rows,
                                    int64_t cols, int64_t tile_rows, int64_t tile_cols, double amount, Count count,
                                    bool of_all, Ties take, Rule rule, Gate gate, DType dtype, DType grad_dtype,
                                    int threads))

// fisher -----------------------------------------------------------------------------------------------------------
// fisher[e] += scale * sum over runs f(gradient), weight_grad[e] (may be null) += scale * sum over runs of gradient,
// for the runs first_run[e] .. first_run[e + 1] of expert e; gradient[o, i] = sum of grad_output[k, o] activation[k, i]
// over the tokens k with mask[k] (may be null) of the run starts[r] .. starts[r + 1]. f: square, abs or (kSum) nothing.
// `token`: every token is a sample of its own (kSquare and kAbs, no weight_grad).
// With `partial`: fisher[e] is the sums over block_rows x block_cols blocks, and partial holds, for each expert and
// tile,
// ((tile_rows - 1) / block_rows + 2) * ((tile_cols - 1) / block_cols + 2) numbers.
// Tiles of the weight are shared out among the threads; their sides are multiples of kFisherRows and kFisherCols.
// At most `depth` tokens, 1 to kFisherDepth, are packed at a time; the gradient of a longer run is carried on.
// workspace, 64-byte aligned, holds for each thread slot_size = depth * (tile_rows + tile_cols) + tile_rows * tile_cols
// * (1, one more with weight_grad, one more if a run may be longer than depth) numbers.
constexpr int64_t kFisherDepth = 256, kFisherRows = 12, kFisherCols = 32;

CURVKERN_CPU_LAUNCHER(fisher(float* fisher, float* partial, float* weight_grad, float* workspace,
                             const void* grad_output, const void* activation, const uint8_t* mask,
                             const int64_t* starts, const int64_t* first_run, int64_t experts, int64_t out_features,
                             int64_t in_features, int64_t grad_stride, int64_t activation_stride, int64_t tile_rows,
                             int64_t tile_cols, int64_t block_rows, int64_t block_cols, int64_t depth,
                             int64_t slot_size, float scale, Statistic statistic, bool token, DType grad_dtype,
                             DType activation_dtype, int threads))

// gram -------------------------------------------------------------------------------------------------------------
// sums[j] += scale * sum over the rows that `mask` (may be null) keeps of x[row, j]^2; rows lie `stride` apart.
CURVKERN_CPU_LAUNCHER(column_sumsq(float* sums, const void* x, const uint8_t* mask, int64_t rows, int64_t cols,
                                   int64_t stride, float scale, DType dtype, int threads))

// obs --------------------------------------------------------------------------------------------------------------
// One panel [rows, width] with row stride `stride`: fixed entries (mask) go to target (null: 0), and later columns of
// the panel make up for it by `triangle` [width, width], the panel's part of the upper factor. errors [rows, width] are
// what the columns after the panel are to make up for.
CURVKERN_CPU_LAUNCHER(obs(float* panel, float* errors, const uint8_t* mask, const float* target, const float* triangle,
                          int64_t rows, int64_t width, int64_t stride, int threads))

// hessian ----------------------------------------------------------------------------------------------------------
// Sign e of a stream, -1 where the bit is set, is bit e % 32 of word e / 32; word w is word w % 4 of Philox index w
// / 4. out[k] = sign offset + k.
CURVKERN_CPU_LAUNCHER(rademacher(void* out, int64_t n, int64_t seed, int64_t offset, DType dtype, int threads))
// diag[k] += scale * sign(offset + k) * hvp[k].
CURVKERN_CPU_LAUNCHER(hutchinson(float* diag, const void* hvp, int64_t n, int64_t seed, int64_t offset, float scale,
                                 DType dtype, int threads))
// diag[tile] += scale * the mean over the tile of sign * hvp; a tile at the border is smaller.
CURVKERN_CPU_LAUNCHER(hutchinson_tiles(float* diag, const void* hvp, int64_t rows, int64_t cols, int64_t tile_rows,
                                       int64_t tile_cols, int64_t seed, int64_t offset, float scale, DType dtype,
                                       int threads))
// diag[k] += batch * grad[k]^2.
CURVKERN_CPU_LAUNCHER(gnb_diag(float* diag, const void* grad, int64_t n, float batch, DType dtype, int threads))

// loss -------------------------------------------------------------------------------------------------------------
// Rows of `vocab` logits. lse[row] = top, the largest; lse[rows + row] = spread, log of the sum of exp(x - top);
// reference_lse the same of the reference. loss[row] = top + spread - x[label], or with a reference the divergence of
// the logits' softmax from its own. All 0 where the label is -100. labels, reference and reference_lse may be null.
CURVKERN_CPU_LAUNCHER(token_loss(float* loss, float* lse, float* reference_lse, const void* logits,
                                 const int64_t* labels, const void* reference, int64_t rows, int64_t vocab, DType dtype,
                                 DType reference_dtype, int threads))
// out = scale[row] * (softmax(logits) - target), the target one at the label or softmax(reference); 0 where the label
// is -100. logits null: they lie in out.
CURVKERN_CPU_LAUNCHER(token_grad(void* out, const void* logits, const int64_t* labels, const void* reference,
                                 const float* lse, const float* reference_lse, const float* scale, int64_t rows,
                                 int64_t vocab, DType dtype, DType reference_dtype, int threads))

// perturb ----------------------------------------------------------------------------------------------------------
// Normal number e of a stream is number e % 4 of the two pairs that words (0, 1) and (2, 3) of Philox index e / 4 give.
// squares[s], squares[segments + s] = sum of original[k]^2, of normal(offset + k)^2 over the segment k / segment == s.
CURVKERN_CPU_LAUNCHER(perturb_squares(double* squares, const void* original, int64_t n, int64_t segment, int64_t seed,
                                      int64_t offset, DType dtype, int threads))
// weight[k] = original[k] + scale[k / segment] * normal(offset + k), one rounding; weight may be original.
CURVKERN_CPU_LAUNCHER(perturb(void* weight, const void* original, const float* scale, int64_t n, int64_t segment,
                              int64_t seed, int64_t offset, DType dtype, int threads))

// mix --------------------------------------------------------------------------------------------------------------
// `tensors`: two numbers for each of `ways` tensors: its address and its dtype code.
constexpr int64_t kMixWays = 32, kMixChunk = 16384;

// out[r, c] = sum over k of weights[k, r] * tensors[k][r, c]; a weight of 0 leaves its tensor out. One rounding. `out`
// may be one of the tensors.
CURVKERN_CPU_LAUNCHER(mix_linear(void* out, const float* weights, const int64_t* tensors, int64_t ways, int64_t rows,
                                 int64_t cols, DType dtype, int threads))
// partial[r, chunk, i, j], i <= j: the dot product of tensors i and j, less base (may be null), over the chunk of
// kMixChunk columns of row r. At most kMixWays tensors.
CURVKERN_CPU_LAUNCHER(mix_dots(double* partial, const void* base, const int64_t* tensors, int64_t ways, int64_t rows,
                               int64_t cols, DType base_dtype, int threads))
// out = base + scale * the weighted deltas that reach their limit and have the elected sign, divided (normalize) by the
// sum of their weights. At most kMixWays tensors.
CURVKERN_CPU_LAUNCHER(mix_ties(void* out, const void* base, const int64_t* tensors, const float* limits,
                               const float* weights, int64_t ways, int64_t n, float scale, bool normalize, DType dtype,
                               int threads))
// out = base + *scale * (tuned - base) where the element's Philox word is at least `drop`, else base.
CURVKERN_CPU_LAUNCHER(mix_dare(void* out, const void* base, const void* tuned, const float* scale, int64_t n,
                               uint32_t drop, uint64_t seed, DType dtype, DType tuned_dtype, int threads))
// partial[chunk]: sums of |tuned - base| over all of the chunk and over what mix_dare keeps; finite deltas only.
CURVKERN_CPU_LAUNCHER(mix_dare_sums(double* partial, const void* base, const void* tuned, int64_t n, uint32_t drop,
                                    uint64_t seed, DType dtype, DType tuned_dtype, int threads))

// vectors ----------------------------------------------------------------------------------------------------------
// A row of `table` for each tensor of a list: address of x, address of y (or 0), how many elements, dtype codes of x
// and y, and how many chunks of kVectorsChunk elements stand before it; `chunks` are all.
constexpr int64_t kVectorsChunk = 16384, kVectorsRow = 6;

// partial[chunk]: <x, y>, <x, x>, <y, y>; zeros where there is no y.
CURVKERN_CPU_LAUNCHER(vectors_sums(double* partial, const int64_t* table, int64_t tensors, int64_t chunks, int threads))
// y = coefficients[0] x + coefficients[1] y, a coefficient of 0 leaving its side out.
CURVKERN_CPU_LAUNCHER(vectors_axpby(const int64_t* table, const float* coefficients, int64_t tensors, int64_t chunks,
                                    int threads))
// y = y + *weight (x - y), exact at 0 and 1.
CURVKERN_CPU_LAUNCHER(vectors_lerp(const int64_t* table, const float* weight, int64_t tensors, int64_t chunks,
                                   int threads))

// change -----------------------------------------------------------------------------------------------------------
// partial[chunk of kVectorsChunk]: how many restored are not tuned, not finite, so where aligned and tuned are finite,
// how many tuned are not aligned; squares of tuned - aligned, restored - aligned, restored - tuned, and the product of
// the first two; finite differences only.
constexpr int64_t kChangeSums = 8;

CURVKERN_CPU_LAUNCHER(change(double* partial, const void* aligned, const void* tuned, const void* restored, int64_t n,
                             DType aligned_dtype, DType dtype, int threads))

namespace cuda {
Status rollback(int64_t* count, void* weight, uint8_t* undo, const void* target, const float* tau, const int64_t* quota,
                const int64_t* tie_offsets, const uint8_t* mask_bits, const uint8_t* mask_bytes, const void* grad,
                const float* fisher, const void* direction, int64_t n, Rule rule, Gate gate, DType dtype,
                DType grad_dtype, int device, void* stream);
Status rollback_ties(int64_t* ties, const void* weight, const void* target, const float* tau, const uint8_t* mask_bits,
                     const uint8_t* mask_bytes, const void* grad, const float* fisher, const void* direction, int64_t n,
                     Rule rule, Gate gate, DType dtype, DType grad_dtype, int device, void* stream);
Status blend(void* weight, const void* target, const float* alpha, int64_t rows, int64_t cols, int64_t tile_rows,
             int64_t tile_cols, DType dtype, int device, void* stream);
Status select_histogram(int64_t* histogram, int64_t* tallies, const void* weight, const void* target,
                        const int64_t* boundary, const uint8_t* mask_bits, const uint8_t* mask_bytes, const void* grad,
                        const float* fisher, const void* direction, int64_t n, Rule rule, Gate gate, DType dtype,
                        DType grad_dtype, int device, void* stream);

// What this binary carries and what the driver says; used by `curvkern env`.
int device_count(Status* status);
const char* status_name(Status status);
const char* status_text(Status status);
}  // namespace cuda

}  // namespace curvkern

// The ops on weights on a trellis (kernels/triton/trellis.py has the definition) without torch: pointers and sizes in,
// outputs written. trellis_ops.cpp brings tensors here; the tests bring arrays.
#pragma once

#include "quantized.h"

namespace lorap::cpu {

constexpr int kTrellisFewestBits = 2, kTrellisMostBits = 6;
constexpr int kTrellisRows = kTileRows;
constexpr int kTrellisWindow = 12;  // bits
constexpr int kTrellisWindows = 1 << kTrellisWindow;
constexpr uint32_t kTrellisFactor = 1007213647;
constexpr float kTrellisUnit = 1.0f / 128;

// Columns that are decoded together at most, of one group.
constexpr int64_t kTrellisColumns = kTileColumns;

// Tokens that one pass over the weights serves; activations of float32 take two of them each.
constexpr int64_t kTrellisTokens = kTileTokens;

// Rows on each side of a ring's seam by which the bits at the seam are chosen, see kernels/triton/trellis_search.py.
constexpr int kTrellisSeam = 48;

// What a window stands for, in units of kTrellisUnit.
static inline int trellis_number(uint32_t window) {
  const uint32_t product = window * kTrellisFactor;
  int sum = 0;
  for (int shift = 0; shift < 32; shift += 8) sum += static_cast<int8_t>(product >> shift & 0xff);
  return sum;
}

// One instruction set's way with one number of bits.
struct TrellisKernel {
  const char* isa;
  int bits;

  // The windows of one ring that are nearest to `wanted`; `scratch` has trellis_scratch(bits) floats. `numbers` are
  // those of all windows. No importance is negative, and where it is 0 `wanted` is 0.
  void (*search)(const float* numbers, const float* wanted, const float* importance, float* scratch, int32_t* windows);

  // dots[m * 64 + r] += scales[r] * x_scales[m] * sum over columns k of number[r, k] * x[m, k] for the rows r of a
  // tile, whose words of these columns, kTrellisColumns at most, are `words`; numbers are in units of kTrellisUnit. x
  // has those of two columns, 0 behind the last one, of each token, and so on; all columns of 1 or 2 tokens are side by
  // side, or of each 4, `x_stride` numbers apart.
  void (*dot)(const uint32_t* words, int64_t columns, const int16_t* x, int64_t tokens, int64_t x_stride,
              const float* x_scales, const float* scales, float* dots);

  // to[c * 64 + r] = number[r, c] * scales[r] for columns as those of `dot`, numbers as they are, of float32 or, where
  // asked for, rounded to bfloat16.
  void (*columns)(const uint32_t* words, int64_t columns, bool bfloat16, const float* scales, float* to);
};

// Floats: the least errors of all rows, by the bits that a row shares with the one below.
constexpr int64_t trellis_scratch(int bits) { return (2 * kTrellisSeam + 1) * (kTrellisWindows >> bits); }
static_assert(2 * kTrellisSeam >= kTrellisRows);

// Null where the compiler could not build that file.
const TrellisKernel* scalar_trellis_kernel(int bits);
const TrellisKernel* avx2_trellis_kernel(int bits);
const TrellisKernel* avx512_trellis_kernel(int bits);
const TrellisKernel* avx512_vbmi_trellis_kernel(int bits);

// The same with words, and a stride between them, of tiles in place of rows.
using TrellisMatrix = QuantizedMatrix;

// y = x weight^T + bias: x (tokens, K) without gaps, y with `y_stride` elements from one token to the next, both in the
// dtype of the machine's kernel; `bias` may be null.
struct TrellisProduct {
  const TrellisKernel* kernel;
  TrellisMatrix weight;
  const void* bias;
  const void* x;
  void* y;
  int64_t y_stride;
};

// Any number of tokens is right, few are fast. Threads share the tiles of all products, which may differ in all else.
void trellis_products(Machine machine, int64_t tokens, const TrellisProduct* products, int64_t count);

// The weight, transposed: `to` (cols, rows) without gaps, in the dtype of the machine's kernel, in which numbers and
// scales are rounded before their products are.
void trellis_weight(Machine machine, const TrellisKernel& kernel, const TrellisMatrix& weight, void* to);

// Float32 matrices with any strides, in elements.
struct TrellisTargets {
  const float *wanted, *importance;
  int64_t rows, cols;
  int64_t wanted_strides[2], importance_strides[2];
};

// windows (rows in whole tiles, cols), without gaps.
void trellis_search(const TrellisKernel& kernel, ParallelFor parallel_for, int64_t threads,
                    const TrellisTargets& targets, int32_t* windows);

// The best kernel for this processor, or the best that `isa` includes, as find_quantized_kernel does.
const TrellisKernel* find_trellis_kernel(int bits, const char* isa);

}  // namespace lorap::cpu

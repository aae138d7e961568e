// The one operation that all CPU ops are made of: dot products of weight rows with a few tokens.
//
//   dots[m, n] = sum_k weight[n, k] * x[m, k]        weight (N, K) in its own dtype, sums in float32
//
// Decoding reads every weight once for a handful of tokens, so memory bandwidth is the limit: weights are streamed in
// their storage dtype and widened in registers, and x is brought once into the order in which widening leaves the
// weights.
#pragma once

#include <cstdint>

namespace lorap::cpu {

enum class Dtype { kFloat32, kBFloat16, kFloat16 };

// Tokens that one pass over the weights serves.
constexpr int64_t kMaxTokens = 16;

// One instruction set's way with one weight dtype.
struct RowKernel {
  const char* isa;
  Dtype dtype;

  // Bytes of one weight, input or output.
  int64_t element_bytes;

  // Elements per weight load; packed tokens are padded with zeros to a multiple of it.
  int64_t step;

  // Bytes of one packed element.
  int64_t packed_bytes;

  // Between the weight's dtype and float32, for biases and outputs.
  void (*load)(const void* from, int64_t count, float* to);
  void (*store)(const float* from, int64_t count, void* to);

  // Packs one token of k elements. `pack` reads the weight's dtype, `pack_float` reads float32.
  void (*pack)(const void* x, int64_t k, void* packed);
  void (*pack_float)(const float* x, int64_t k, void* packed);

  // dots[m * dots_stride + n] for n < rows, m < tokens <= kMaxTokens; `weight_stride` counts elements between rows and
  // `packed_stride` bytes between packed tokens.
  void (*dot)(const void* weight, int64_t weight_stride, int64_t rows, int64_t k, const void* packed,
              int64_t packed_stride, int64_t tokens, float* dots, int64_t dots_stride);
};

// Null where the compiler could not build that file or it has nothing for the dtype.
const RowKernel* scalar_kernel(Dtype dtype);
const RowKernel* avx2_kernel(Dtype dtype);
const RowKernel* avx512_kernel(Dtype dtype);
const RowKernel* avx512_bf16_kernel(Dtype dtype);

}  // namespace lorap::cpu

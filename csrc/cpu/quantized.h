// The ops on weights of 4 and 8 bits without torch: pointers and sizes in, outputs written. quantized_ops.cpp brings
// tensors here; the tests bring arrays.
//
// Weights stay whole numbers until a block of 32 to 128 of them has been summed up, and so do the activations: a block
// of these becomes numbers of 16 bits that share a power of two, which is exact for bfloat16 values down to 1/64 of the
// largest in their block. One instruction multiplies pairs of 16 bits and adds neighbours, so unpacking 4 bits needs a
// shift and a mask for 16 weights and no conversion. Where one multiplies four bytes, a number of 16 bits beside
// weights of 4 is two bytes. float32 activations take two such numbers each, 30 bits. Beside weights of 4 bits,
// activations of 8 with a scale for each block can be asked for: an instruction takes twice as many.
#pragma once

#include "decode.h"

namespace lorap::cpu {

// Whole numbers of `bits` bits in rows of 32-bit words, as kernels/triton/packing.py has them, and a scale for each
// `group` of them, a multiple of 32. Scales are read by the kernel of their dtype.
struct QuantizedMatrix {
  const uint32_t* words;
  int64_t rows, cols, word_stride;
  const void* scales;
  int64_t scale_stride;
  const RowKernel* scale_kernel;
  int64_t group;
};

// Rows, and columns of one group at most, whose numbers are unpacked together for many tokens.
constexpr int kTileRows = 64;
constexpr int64_t kTileColumns = 64;

// Tokens that one pass over the weights serves then: in steps of 4, and dots have room for whole steps.
constexpr int64_t kTileTokens = 64;

// One instruction set's way with one number of bits.
struct QuantizedKernel {
  const char* isa;
  int bits;
  int activation_bits;  // 16 or 8

  // Bytes of one packed token of k elements, for weights of that group.
  int64_t (*packed_bytes)(int64_t k, int64_t group);

  // Packs x[k] into `digits` tokens, `stride` bytes apart, whose dots add up to that of x.
  void (*pack)(const float* x, int64_t k, int64_t group, int digits, void* packed, int64_t stride);

  // dots[m * dots_stride + n] for n < rows, m < tokens <= kMaxTokens, from weight row `row` on.
  void (*dot)(const QuantizedMatrix& weight, int64_t row, int64_t rows, const void* packed, int64_t packed_stride,
              int64_t tokens, float* dots, int64_t dots_stride);

  // to[i] = number i of a row times the scale of its group, for i < cols.
  void (*row)(const uint32_t* words, int64_t cols, int64_t group, const float* scales, float* to);

  // Null where there is no such way: dots[m * kTileRows + r] += scales[r] * x_scales[m] * sum over columns k of
  // number[r, k] * x[m, k] for r < rows, at most kTileRows that are `word_stride` apart, and at most kTileColumns
  // columns. x has of each 4 tokens, `x_stride` numbers apart, those of two columns of each token, and so on: of the
  // columns of a word, each with the one that is half a word behind it, and 0 behind the last one. The words `ahead`
  // bytes behind are fetched.
  void (*tile)(const uint32_t* words, int64_t word_stride, int64_t rows, int64_t columns, int64_t ahead,
               const int16_t* x, int64_t tokens, int64_t x_stride, const float* x_scales, const float* scales,
               float* dots);

  // Tokens from which tiles are faster, where rows are long.
  int64_t tile_tokens;
};

// Null where the compiler could not build that file.
const QuantizedKernel* scalar_quantized_kernel(int bits);
const QuantizedKernel* avx2_quantized_kernel(int bits);
const QuantizedKernel* avx512_quantized_kernel(int bits);
const QuantizedKernel* avx512_vnni_quantized_kernel(int bits);

// With activations of 8 bits, for weights of 4.
const QuantizedKernel* avx2_bytes_kernel();
const QuantizedKernel* avx512_vnni_bytes_kernel();

// How to compute; `outer` brings x, biases and outputs to float32 and back, and the threads.
struct QuantizedMachine {
  Machine outer;
  const QuantizedKernel* kernel;
};

// As in decode.h: x is (tokens, K) and y (tokens, N) in the dtype of the outer kernel, without gaps.
void quantized_linear(QuantizedMachine machine, const void* x, int64_t tokens, const QuantizedMatrix& weight,
                      const void* bias, void* y);

void quantized_low_rank_linear(QuantizedMachine machine, const void* x, int64_t tokens, const QuantizedMatrix& right,
                               const QuantizedMatrix& left, const void* bias, void* y);

// A layer of a group: x right^T left^T + bias, or, where it is not low-rank, x left^T + bias.
struct QuantizedLayer {
  bool low_rank;
  QuantizedMatrix right, left;
  const void* bias;
};

// y (tokens, sum of out_features): the layers' outputs side by side. Weights that read x share their group size.
void quantized_layers(QuantizedMachine machine, const void* x, int64_t tokens, const QuantizedLayer* layers,
                      int64_t count, void* y);

void quantized_silu_gated_linear(QuantizedMachine machine, const void* x, int64_t tokens, const QuantizedMatrix& gate,
                                 const QuantizedMatrix& up, void* y);

// The weight (rows, cols) without gaps, in the dtype of the outer kernel: numbers times scales of that dtype, rounded
// once.
void quantized_weight(QuantizedMachine machine, const QuantizedMatrix& weight, void* to);

// The best kernel for this processor, or the best that `isa` includes ("avx512_vnni", and all names that find_kernel
// knows); null where the processor or the build lacks it. 8 `activation_bits` are a wish: 16 are there for all.
const QuantizedKernel* find_quantized_kernel(int bits, const char* isa, int activation_bits = 16);

}  // namespace lorap::cpu

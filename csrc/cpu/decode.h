// The CPU ops without torch: pointers and sizes in, outputs written. ops.cpp brings tensors here; the tests bring
// arrays.
//
// Two stages, as on the GPU: shrink (x to rank) and expand (rank to out). Each is one parallel loop over the rows of
// all weights that share its input, so that a group (q, k, v) costs two loops and every weight is read once.
#pragma once

#include <cstdint>

#include "row_kernel.h"

namespace lorap::cpu {

// Row-major weights: `stride` elements from one row to the next.
struct Matrix {
  const void* data;
  int64_t rows, cols, stride;
};

// y = x right^T left^T + bias. With pivots, output row pivot_rows[i] (ascending) is the shrink stage's own output i,
// and left holds the other rows in their order. `bias` and `pivot_rows` may be null.
struct LowRankLayer {
  Matrix right, left;
  const void* bias;
  const int64_t* pivot_rows;
  int64_t out_features() const { return left.rows + (pivot_rows ? right.rows : 0); }
};

// Runs body(begin, end, context) on pieces of [begin, end), none smaller than `grain` unless it is the last.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context);

// How to compute: which instructions, and how many threads.
struct Machine {
  const RowKernel* kernel;
  ParallelFor parallel_for;
  int64_t threads;
};

// All tensors have the kernel's dtype, x is (tokens, K) and y (tokens, N) without gaps; any number of tokens is right,
// few are fast.
void linear(Machine machine, const void* x, int64_t tokens, Matrix weight, const void* bias, void* y);

// y (tokens, sum of out_features): the layers' outputs side by side.
void low_rank_linear(Machine machine, const void* x, int64_t tokens, const LowRankLayer* layers, int64_t count,
                     void* y);

// y = silu(x gate^T + gate_bias) * (x up^T + up_bias).
void silu_gated_linear(Machine machine, const void* x, int64_t tokens, Matrix gate, Matrix up, const void* gate_bias,
                       const void* up_bias, void* y);

// The same where gate and up are low-rank and without pivots.
void low_rank_silu_gated_linear(Machine machine, const void* x, int64_t tokens, const LowRankLayer& gate,
                                const LowRankLayer& up, void* y);

// The best kernel for this processor, or the one named by `isa` ("scalar", "avx2", "avx512", "avx512_bf16",
// "avx512_vnni", "avx512_vbmi"); null where the processor or the build lacks it.
const RowKernel* find_kernel(Dtype dtype, const char* isa);

}  // namespace lorap::cpu

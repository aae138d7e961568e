// Products of rows of a factor with a few tokens by multiply-adds. For low_rank_decode.cu only.
#pragma once

#include "low_rank_device.h"

namespace lorap {
namespace {

constexpr int kWarps = 8;  // few, so that each may use 255 registers: loads in flight rather than threads in flight
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTokens = 8;
constexpr int kRows = 4;  // rows of a factor that share each activation a thread has loaded

template <typename Scalar>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};

// Loads are 16 bytes wide, arithmetic is float32.
template <typename Scalar>
__device__ void unpack(uint4 packed, float (&values)[kVector]) {
  using Pair = typename PairOf<Scalar>::Type;
  const Pair* pairs = reinterpret_cast<const Pair*>(&packed);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = widen(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

// Adds to sums[row][m] the products of `load_weight(row, v)` and `load_input(m, v)` over v = first, first + step, ...
// Both phases are this loop; they differ in where weights and activations come from, so the loads are arguments. Two
// steps at a time put 256 threads x 2 x kRows x 16 bytes = 32 KB of weights in flight on every multiprocessor.
template <typename Scalar, int M, typename LoadWeight, typename LoadInput>
__device__ void multiply(float (&sums)[kRows * M], int first, int step, int vectors, LoadWeight load_weight,
                         LoadInput load_input) {
#pragma unroll 2
  for (int v = first; v < vectors; v += step) {
    float weights[kRows][kVector];
#pragma unroll
    for (int row = 0; row < kRows; ++row) unpack<Scalar>(load_weight(row, v), weights[row]);
#pragma unroll
    for (int m = 0; m < M; ++m) {
      float inputs[kVector];
      load_input(m, v, inputs);
#pragma unroll
      for (int row = 0; row < kRows; ++row)
#pragma unroll
        for (int i = 0; i < kVector; ++i) sums[row * M + m] = fmaf(weights[row][i], inputs[i], sums[row * M + m]);
    }
  }
}

// Sums each of V values over the warp; lane l returns the sum of values[l % V]. Halving what a lane is responsible for
// at every exchange takes V - 1 shuffles for a full warp of values, a butterfly per value would take 5 V.
template <int V>
__device__ float sum_over_warp(float (&values)[V], int lane) {
  static_assert(V <= kWarpSize && (V & (V - 1)) == 0, "a power of two, at most one value per lane");
#pragma unroll
  for (int half = V / 2; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < V / 2; ++i) {
      if (i >= half) continue;  // constant bounds, so that the compiler keeps the values in registers
      const float kept = upper ? values[i + half] : values[i];
      const float given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(0xffffffffu, given, half);
    }
  }
#pragma unroll
  for (int offset = V; offset < kWarpSize; offset *= 2) values[0] += __shfl_xor_sync(0xffffffffu, values[0], offset);
  return values[0];
}

}  // namespace
}  // namespace lorap

// Products of rows of a factor with a few tokens by multiply-adds. For low_rank_one_launch.h only.
#pragma once

#include "low_rank_weights.h"

namespace lorap {
namespace {

constexpr int kWarpsLog2 = 3;
constexpr int kWarps =
    1 << kWarpsLog2;  // few, so that each may use 255 registers: loads in flight rather than threads in flight
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTokens = 8;
constexpr int kRows = 4;  // rows of a factor that share each activation a thread has loaded

// Adds to sums[row][m] the products of `load_weight(row, v)` and the activations that its weights meet, over v = first,
// first + step, ...; `load_input(m, i)` has those of eight weights. Both phases are this loop; they differ in where
// weights and activations come from, so the loads are arguments. Two steps at a time put 256 threads x 2 x kRows x 16
// bytes = 32 KB of weights in flight on every multiprocessor.
//
// Numbers of few bits that come in one load share a scale: their products are summed first, and one multiplication
// with `load_scale(row, v)` follows.
template <typename Stored, int M, typename LoadWeight, typename LoadInput, typename LoadScale>
__device__ void multiply(float (&sums)[kRows * M], int first, int step, int vectors, LoadWeight load_weight,
                         LoadInput load_input, LoadScale load_scale) {
  using Eight = typename Stored::Eight;
  using Vector = decltype(load_weight(0, 0));
  constexpr int kEights = sizeof(Vector) / sizeof(Eight);
#pragma unroll(Stored::kScaled ? 1 : 2)
  for (int v = first; v < vectors; v += step) {
    Vector stored[kRows];
    float scales[kRows], products[kRows * M] = {};
    float (&totals)[kRows * M] = Stored::kScaled ? products : sums;
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      stored[row] = load_weight(row, v);
      if constexpr (Stored::kScaled) scales[row] = load_scale(row, v);
    }
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) {
      float weights[kRows][kVector];
#pragma unroll
      for (int row = 0; row < kRows; ++row)
        Stored::numbers(reinterpret_cast<const Eight*>(&stored[row])[eight], weights[row]);
#pragma unroll
      for (int m = 0; m < M; ++m) {
        float inputs[kVector];
        load_input(m, v * kEights + eight, inputs);
#pragma unroll
        for (int row = 0; row < kRows; ++row)
#pragma unroll
          for (int i = 0; i < kVector; ++i) totals[row * M + m] = fmaf(weights[row][i], inputs[i], totals[row * M + m]);
      }
    }
    if constexpr (Stored::kScaled) {
#pragma unroll
      for (int i = 0; i < kRows * M; ++i) sums[i] = fmaf(products[i], scales[i / M], sums[i]);
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

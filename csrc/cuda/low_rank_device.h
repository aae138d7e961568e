// What the kernels of this folder share. For these files only.
#pragma once

#include "low_rank_decode.h"

#ifndef LORAP_EMULATE_CUDA  // otherwise these very files run on the host, see csrc/emulation
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline_primitives.h>

extern __shared__ uint4 shared_memory[];
#endif

namespace lorap {
namespace {

constexpr int kWarpSize = 32;
constexpr int kVector = 8;                // scalars in 16 bytes, the widest load
constexpr int64_t kMostPacked = 1 << 19;  // columns of a packed weight: see group_of in low_rank_weights.h

// One name for what each type spells differently.
__device__ inline float2 widen(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ inline float2 widen(__half2 pair) { return __half22float2(pair); }
__device__ inline void narrow(float value, __nv_bfloat16& result) { result = __float2bfloat16_rn(value); }
__device__ inline void narrow(float value, __half& result) { result = __float2half_rn(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A layer, and where its pivots are kept in shared memory: after those of the layers before it. They are not where
// every row of y is a pivot, since row i of shrunk is then row i of y.
struct KeptLayer : DecodeLayer {
  int64_t left_rows = 0;
  int pivots_at = 0, pivot_vectors = 0;  // of 16 bytes
};

// Whether a launch for weights of 16 bits, or `packed` ones, can serve this, but for its shared memory.
inline bool is_valid(const LowRankDecode& p, int64_t most_tokens, bool packed = false) {
  bool valid = 1 <= p.m && p.m <= most_tokens && p.k > 0 && 1 <= p.count && p.count <= kMaxDecodeLayers;
  for (int i = 0; valid && i < p.count; ++i) {
    const DecodeLayer& layer = p.layers[i];
    const bool stored = packed ? layer.bits == 4 || layer.bits == 8 : layer.bits == 16;
    const bool scaled = layer.group > 0 && layer.group % 32 == 0 && p.k < kMostPacked && layer.r < kMostPacked;
    const int64_t multiple = stored ? 128 / layer.bits : 1;
    valid = stored && (!packed || scaled) && p.k % multiple == 0 && layer.r % multiple == 0;
    valid = valid && layer.n > 0 && layer.r >= 0 && layer.stride >= layer.n;
    valid = valid && (layer.pivots == nullptr || layer.n >= layer.r);
  }
  return valid;
}

// Fills `kept`, which may be of a type with more in it; returns the 16-byte vectors that all pivots take.
template <typename Layer>
int keep(const LowRankDecode& p, Layer (&kept)[kMaxDecodeLayers]) {
  int vectors = 0;
  for (int i = 0; i < p.count; ++i) {
    static_cast<DecodeLayer&>(kept[i]) = p.layers[i];
    const bool pivoted = kept[i].pivots != nullptr;
    kept[i].left_rows = pivoted ? kept[i].n - kept[i].r : kept[i].n;
    kept[i].pivots_at = vectors;
    kept[i].pivot_vectors = pivoted && kept[i].left_rows > 0 ? int(kept[i].r * sizeof(int64_t) / sizeof(uint4)) : 0;
    vectors += kept[i].pivot_vectors;
  }
  return vectors;
}

// Starts copying the pivots of all layers, a share of each thread.
template <typename Layer>
__device__ void fetch_pivots(const Layer* layers, int count, uint4* pivots, int threads) {
#pragma unroll 1
  for (int layer = 0; layer < count; ++layer)
    for (int i = threadIdx.x; i < layers[layer].pivot_vectors; i += threads)
      __pipeline_memcpy_async(pivots + layers[layer].pivots_at + i,
                              reinterpret_cast<const uint4*>(layers[layer].pivots) + i, sizeof(uint4));
}

__device__ inline const int64_t* pivots_of(const KeptLayer& layer, const uint4* pivots) {
  return reinterpret_cast<const int64_t*>(pivots + layer.pivots_at);
}

// Which row of y a row of shrunk is.
__device__ inline int64_t pivot_row(const KeptLayer& layer, const uint4* pivots, int64_t row) {
  return layer.pivot_vectors > 0 ? pivots_of(layer, pivots)[row] : row;
}

// Where in y a row of left is: it comes after all pivots with pivots[i] - i <= row, of which there are more with each
// i.
__device__ inline int64_t output_row(const KeptLayer& layer, const uint4* pivots, int64_t row) {
  if (layer.pivots == nullptr) return row;
  const int64_t* rows = pivots_of(layer, pivots);
  int before = 0, end = int(layer.r);
  while (before < end) {
    const int middle = (before + end) / 2;
    if (rows[middle] - middle <= row) {
      before = middle + 1;
    } else {
      end = middle;
    }
  }
  return row + before;
}

template <typename Scalar>
__device__ void store(const DecodeLayer& layer, int m, int64_t row, float sum) {
  if (layer.bias != nullptr) sum += to_float(static_cast<const Scalar*>(layer.bias)[row]);
  narrow(sum, static_cast<Scalar*>(layer.y)[m * layer.stride + row]);
}

}  // namespace
}  // namespace lorap

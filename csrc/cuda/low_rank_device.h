// What the kernels of low_rank_decode.cu and low_rank_decode_mma.cu share. For these files only.
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
constexpr int kVector = 8;  // scalars in 16 bytes, the widest load

// One name for what each type spells differently.
__device__ inline float2 widen(__nv_bfloat162 pair) { return __bfloat1622float2(pair); }
__device__ inline float2 widen(__half2 pair) { return __half22float2(pair); }
__device__ inline void narrow(float value, __nv_bfloat16& result) { result = __float2bfloat16_rn(value); }
__device__ inline void narrow(float value, __half& result) { result = __float2half_rn(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }
__device__ inline float to_float(__half value) { return __half2float(value); }

template <typename Scalar>
__device__ void store(const LowRankDecode& p, int m, int64_t row, float sum) {
  if (p.bias != nullptr) sum += to_float(static_cast<const Scalar*>(p.bias)[row]);
  narrow(sum, static_cast<Scalar*>(p.y)[m * p.n + row]);
}

// Where in y a row of left is: it comes after all pivots with pivots[i] - i <= row, of which there are more with each
// i.
__device__ inline int64_t output_row(const LowRankDecode& p, const int64_t* pivots, int64_t row) {
  if (p.pivots == nullptr) return row;
  int before = 0, end = int(p.r);
  while (before < end) {
    const int middle = (before + end) / 2;
    if (pivots[middle] - middle <= row) {
      before = middle + 1;
    } else {
      end = middle;
    }
  }
  return row + before;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace
}  // namespace lorap

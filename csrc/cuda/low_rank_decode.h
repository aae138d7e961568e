// y = (x @ right.T) @ left.T + bias for a handful of tokens, in one launch. Plain C++: no torch, no templates.
#pragma once

#include <cstdint>
#ifdef LORAP_EMULATE_CUDA
#include "../emulation/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace lorap {

constexpr int64_t kMaxDecodeTokens = 16;

enum class DecodeType { kBFloat16, kFloat16 };

// All tensors are contiguous and start at a multiple of 16 bytes; K and R are multiples of 8, and 1 <= M <= 16. In
// pivoted storage output row pivots[i] is shrunk[i] itself, and left has the other rows of y in their order.
struct LowRankDecode {
  const void* x;          // (M, K)
  const void* right;      // (R, K)
  const void* left;       // (N, R), or (N - R, R) with pivots
  const void* bias;       // (N,), or null
  const int64_t* pivots;  // (R,), ascending, each less than N; or null
  float* shrunk;          // room for (M, R), written by the launch and no other that may run at the same time
  void* y;                // (M, N)
  int64_t m, n, k, r;
};

// Queues a kernel on `stream` of the current device: multiply-adds for at most 8 tokens, tensor cores for more.
// cudaErrorInvalidConfiguration means that what it keeps in the shared memory of a multiprocessor does not fit there:
// M * R floats for at most 8 tokens, 104 KB for more, and R int64 with pivots.
cudaError_t low_rank_decode(const LowRankDecode& problem, DecodeType type, cudaStream_t stream);

// The one for more, for any number of tokens.
cudaError_t low_rank_decode_mma(const LowRankDecode& problem, DecodeType type, cudaStream_t stream);

}  // namespace lorap

// y = (x @ right.T) @ left.T + bias for a handful of tokens and up to 3 layers that read the same x, in one launch.
// Plain C++: no torch, no templates.
#pragma once

#include <cstdint>
#ifdef LORAP_EMULATE_CUDA
#include "../emulation/cuda_emulation.h"
#else
#include <cuda_runtime.h>
#endif

namespace lorap {

constexpr int64_t kMaxDecodeTokens = 16, kMaxPackedTokens = 8;
constexpr int kMaxDecodeLayers = 3;  // q, k and v

enum class DecodeType { kBFloat16, kFloat16 };

// In pivoted storage output row pivots[i] is shrunk[i] itself, and left has the other rows of y in their order. Where
// every row is a pivot, as in a dense layer that joins a group, neither left nor the pivots are read.
//
// Weights of 4 and 8 bits are whole numbers q, stored as q + 2^(bits - 1) in words, lowest bits first, times one scale
// for every `group` numbers of a row and for those that are left at its end (lorap/kernels/packing.py).
struct DecodeLayer {
  const void* right;      // (R, K), of 16 bits or packed
  const void* left;       // (N, R), or (N - R, R) with pivots
  const void* bias;       // (N,), or null
  const int64_t* pivots;  // (R,), ascending, each less than N; or null
  float* shrunk;          // room for (M, R), written by the launch and no other that may run at the same time
  void* y;                // (M, N), its rows `stride` elements apart
  int64_t n, r, stride;
  int bits = 16;                       // of a weight in both factors: 16, 8 or 4
  int64_t group = 0;                   // the rest for 8 and 4 bits; a multiple of 32
  const void* right_scales = nullptr;  // (R, ceil(K / group))
  const void* left_scales = nullptr;   // (N, ceil(R / group)), or (N - R, ...)
};

// All tensors but y are contiguous, all but y and bias start at a multiple of 16 bytes; K and each R are multiples of
// the weights that 16 bytes hold, 1 <= M <= 16, and R may be 0. Layers of 8 and of 4 bits may be mixed with each other,
// not with those of 16; they take M <= 8, and K and R below 2^19.
struct LowRankDecode {
  const void* x;  // (M, K)
  int64_t m, k;
  int count;  // of layers, at most kMaxDecodeLayers
  DecodeLayer layers[kMaxDecodeLayers];
};

// Queues a kernel on `stream` of the current device: multiply-adds for at most 8 tokens, tensor cores for more of 16
// bits. cudaErrorInvalidConfiguration means that what it keeps in the shared memory of a multiprocessor does not fit
// there: M * R floats for at most 8 tokens, 104 KB for more, and R int64 with pivots; R as the sum over the layers that
// are not all pivots.
cudaError_t low_rank_decode(const LowRankDecode& problem, DecodeType type, cudaStream_t stream);

// The one for at most 8 tokens where weights have 4 or 8 bits.
cudaError_t quantized_low_rank_decode(const LowRankDecode& problem, DecodeType type, cudaStream_t stream);

// The one for more, for any number of tokens.
cudaError_t low_rank_decode_mma(const LowRankDecode& problem, DecodeType type, cudaStream_t stream);

}  // namespace lorap

// One-launch decode of low-rank layers that read the same x: y = (x @ right.T) @ left.T + bias, for M <= 8 tokens.
//
//   x (M, K), right (R, K), left (N, R), bias (N,), y (M, N) in bfloat16 or float16; sums, and shrunk = x @ right.T
//   (M, R), in float32. In pivoted storage R rows of y are those of shrunk, and left has the others only. Both factors
//   may have weights of 4 or 8 bits instead, which become numbers in registers (low_rank_weights.h).
//
// At so few tokens the time is that of reading the two factors, and every output needs all of `shrunk`: two launches
// leave the memory idle between them. Here one block per multiprocessor does both halves, and its share of `left` is
// already on the way into shared memory while it waits for the others at the barrier:
//
//   block b:  shrink: rows of right | start copying rows of left | barrier of all blocks | expand: rows of left
//              all threads along K  |      global -> shared      |                       | a warp per 4 rows, along R
//
// Of q, k and v each block has its share of all three, so that they need one barrier together.
//
// Every sum has a fixed order (no atomics on data), so results repeat bit for bit. Compiled for sm_80, sm_90a and
// sm_100 and run on the host thread by thread (csrc/emulation); never run on a GPU.
//
// The barrier is the one of cooperative groups. Its counter belongs to the launch and is kept by the driver, whereas a
// counter of our own would have to be cleared by one more launch, or live per stream; the latter fails with CUDA
// graphs, which are captured on one stream and replayed, perhaps at the same time, on others. `shrunk` is allocated per
// call for the same reason.
#pragma once

#include "low_rank_plan.h"

namespace lorap {
namespace {

// Tokens that fill up M repeat the last one; their results are not stored.
__device__ int64_t token(const Problem& p, int m) { return m < p.m ? m : p.m - 1; }

// Runs `work` with how the weights of a layer are stored, as the type of its argument.
template <typename Scalar, bool kPacked, typename Work>
__device__ void as_stored(const Layer& layer, Work work) {
  if constexpr (!kPacked)
    work(InFull<Scalar>{});
  else if (layer.bits == 4)
    work(Packed<4>{});
  else
    work(Packed<8>{});
}

// Warps that share a row of right, as a power of two. All of them, so that a block with few rows still has every thread
// loading, but for packed rows, which may have fewer vectors than a block has threads.
template <bool kPacked>
__device__ int warps_log2(const Layer& layer) {
  return kPacked ? layer.warps_log2 : kWarpsLog2;
}

// Partial sums of this block's rows of right, one set per warp along K: partial (warps, rows, M). Each x is read by one
// thread for four rows, hence not staged.
template <typename Scalar, typename Stored, int M>
__device__ void shrink(const Problem& p, const Layer& layer, int rows, float* partial) {
  const int log2 = warps_log2<Stored::kScaled>(layer), along = 1 << log2;
  const int lane = threadIdx.x % kWarpSize, all = threadIdx.x / kWarpSize;
  const int team = log2 == kWarpsLog2 ? 0 : all >> log2, warp = all - (team << log2);  // teams have rows of their own
  const int vectors = p.k / (128 / Stored::kBits), eights = p.k / kVector;
  const int64_t first_row = int64_t(blockIdx.x) * layer.right_rows;
  const uint4* x = static_cast<const uint4*>(p.x);
  const uint4* right = static_cast<const uint4*>(layer.right) + first_row * vectors;
  const Scalar* scales = static_cast<const Scalar*>(layer.right_scales) + first_row * layer.right_groups;
  for (int start = team * kRows; start < rows; start += (kWarps >> log2) * kRows) {
    float sums[kRows * M] = {};
    multiply<Stored, M>(
        sums, warp * kWarpSize + lane, along * kWarpSize, vectors,
        [&](int row, int v) {  // read once and never again: do not let it push x and shrunk out of the caches
          return start + row < rows ? __ldcs(right + int64_t(start + row) * vectors + v) : uint4{};
        },
        [&](int m, int i, float (&inputs)[kVector]) { unpack<Scalar>(__ldg(x + token(p, m) * eights + i), inputs); },
        [&](int row, int v) {
          const int group = group_of(layer.inverse, v * (128 / Stored::kBits / kVector));
          return start + row < rows ? to_float(__ldcs(scales + (start + row) * layer.right_groups + group)) : 0.0f;
        });
    const float sum = sum_over_warp(sums, lane);
    if (lane < kRows * M && start + lane / M < rows) partial[(warp * rows + start) * M + lane] = sum;
  }
}

// Adds the warps' partial sums, always in the same order, and shows them to the other blocks; where no left is to be
// multiplied with them they are outputs.
template <typename Scalar, int M, bool kPacked>
__device__ void publish(const Problem& p, const Layer& layer, int rows, const float* partial) {
  const int64_t first_row = int64_t(blockIdx.x) * layer.right_rows;
  for (int i = threadIdx.x; i < rows * M; i += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp)
      if (warp < 1 << warps_log2<kPacked>(layer)) sum += partial[warp * rows * M + i];
    const int64_t row = first_row + i / M;
    const int m = i % M;
    if (m >= p.m) continue;
    if (layer.left_rows > 0) {
      layer.shrunk[m * layer.r + row] = sum;
    } else {
      store<Scalar>(layer, m, row, sum);
    }
  }
}

// Copies shrunk from the L2 cache, where the other blocks left it, to shared memory as (2, M, R / 8) float4: the eight
// floats that meet one weight vector are 32 bytes, and lanes that step by 32 bytes would collide in the banks.
template <int M>
__device__ void gather(const Problem& p, const Layer& layer, float4* shrunk) {
  const int vectors = layer.left_rows > 0 ? layer.r / kVector : 0;
  const float4* source = reinterpret_cast<const float4*>(layer.shrunk);
  for (int i = threadIdx.x; i < 2 * vectors; i += kThreads) {
#pragma unroll
    for (int m = 0; m < M; ++m)
      shrunk[((i % 2) * M + m) * vectors + i / 2] = __ldcg(source + token(p, m) * 2 * vectors + i);
  }
}

// Outputs that are `shrunk` itself: those of this block's rows of right.
template <typename Scalar, int M>
__device__ void copy_pivots(const Problem& p, const Layer& layer, int rows, const float4* shrunk, const uint4* pivots) {
  if (layer.pivot_vectors == 0) return;
  const int vectors = layer.r / kVector, first_row = int(blockIdx.x) * layer.right_rows;
  for (int i = threadIdx.x; i < rows * M; i += kThreads) {
    const int row = first_row + i / M, m = i % M, half = row % kVector / 4;
    const float* four = reinterpret_cast<const float*>(shrunk + (half * M + m) * vectors + row / kVector);
    if (m < p.m) store<Scalar>(layer, m, pivot_row(layer, pivots, row), four[row % 4]);
  }
}

// Starts copying this block's first rows of left. They are contiguous, so the copy is one flat range.
template <typename Scalar, bool kPacked>
__device__ void prefetch(const Layer& layer, int rows, uint4* prefetched) {
  const int row_vectors = kPacked ? int(layer.r) / kVector * layer.bits / 16 : layer.r / kVector;
  const int64_t first_row = int64_t(blockIdx.x) * layer.rows_per_block;
  const int fetched = rows < layer.prefetched_rows ? rows : layer.prefetched_rows;
  const uint4* left = static_cast<const uint4*>(layer.left) + first_row * row_vectors;
  for (int v = threadIdx.x; v < fetched * row_vectors; v += kThreads)
    __pipeline_memcpy_async(prefetched + layer.prefetched_at + v, left + v, sizeof(uint4));
  if constexpr (kPacked) {
    // Scales begin and end anywhere: all vectors that have one, but for what lies beyond the last scale there is.
    const int64_t row_bytes = layer.left_groups * int64_t(sizeof(Scalar)), all = layer.left_rows * row_bytes;
    const int64_t begin = first_row * row_bytes / 16 * 16, end = (first_row + fetched) * row_bytes;
    const char* scales = static_cast<const char*>(layer.left_scales) + begin;
#pragma unroll 1
    for (int at = 16 * threadIdx.x; fetched > 0 && begin + at < end; at += 16 * kThreads) {
      const int64_t beyond = begin + at + 16 - all;
      __pipeline_memcpy_async(prefetched + layer.scales_at + at / 16, scales + at, 16, beyond > 0 ? beyond : 0);
    }
  }
}

// Outputs of this block's rows of left, a warp per kRows of them: from shared memory as far as they were prefetched,
// the rest straight from global memory. The first of them is `first_group`'s.
template <typename Scalar, typename Stored, int M>
__device__ void expand(const Problem& p, const Layer& layer, int first_group, int rows, const float4* shrunk,
                       const uint4* pivots, const uint4* prefetched) {
  using Eight = typename Stored::Eight;
  const int lane = threadIdx.x % kWarpSize;
  const int vectors = layer.r / kVector;
  const int64_t first_row = int64_t(blockIdx.x) * layer.rows_per_block, first_scale = first_row * layer.left_groups;
  const Eight* left = static_cast<const Eight*>(layer.left) + first_row * vectors;
  const Eight* fetched = reinterpret_cast<const Eight*>(prefetched + layer.prefetched_at);
  const Scalar* scales = static_cast<const Scalar*>(layer.left_scales) + first_scale;
  const Scalar* fetched_scales =
      reinterpret_cast<const Scalar*>(prefetched + layer.scales_at) + first_scale % int(sizeof(uint4) / sizeof(Scalar));
  const auto load_shrunk = [&](int m, int v, float (&inputs)[kVector]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float4 four = shrunk[(half * M + m) * vectors + v];
      inputs[4 * half] = four.x;
      inputs[4 * half + 1] = four.y;
      inputs[4 * half + 2] = four.z;
      inputs[4 * half + 3] = four.w;
    }
  };
  for (int start = first_group * kRows; start < rows; start += kWarps * kRows) {
    float sums[kRows * M] = {};
    if (start < layer.prefetched_rows) {
      const auto load = [&](int row, int v) {
        return start + row < rows ? fetched[(start + row) * vectors + v] : Eight{};
      };
      const auto load_scale = [&](int row, int v) {
        const int at = (start + row) * layer.left_groups + group_of(layer.inverse, v);
        return start + row < rows ? to_float(fetched_scales[at]) : 0.0f;
      };
      multiply<Stored, M>(sums, lane, kWarpSize, vectors, load, load_shrunk, load_scale);
    } else {
      const auto load = [&](int row, int v) {
        return start + row < rows ? __ldcs(left + int64_t(start + row) * vectors + v) : Eight{};
      };
      const auto load_scale = [&](int row, int v) {
        const int at = (start + row) * layer.left_groups + group_of(layer.inverse, v);
        return start + row < rows ? to_float(__ldcs(scales + at)) : 0.0f;
      };
      multiply<Stored, M>(sums, lane, kWarpSize, vectors, load, load_shrunk, load_scale);
    }
    const float sum = sum_over_warp(sums, lane);
    const int row = start + lane / M, m = lane % M;
    if (lane < kRows * M && row < rows && m < p.m)
      store<Scalar>(layer, m, output_row(layer, pivots, first_row + row), sum);
  }
}

// Rows of a factor that fall to this block, none for the last blocks when there are few.
__device__ int share(int64_t total, int rows_per_block) {
  const int64_t left_over = total - int64_t(blockIdx.x) * rows_per_block;
  return left_over <= 0 ? 0 : int(left_over < rows_per_block ? left_over : rows_per_block);
}

// Has the L2 cache fetch this block's rows of both factors, a warp each, those of right first. Packed rows are so few
// bytes that latency counts: the loads of shrink are fewer at a time than would hide it, and find them on their way.
template <typename Scalar>
__device__ void fetch_ahead(const Problem& p) {
  const int factor = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize > 0 || factor >= 2 * p.count) return;
  const bool is_left = factor >= p.count;
  const Layer& layer = p.layers[is_left ? factor - p.count : factor];
  const int64_t first_row = int64_t(blockIdx.x) * (is_left ? layer.rows_per_block : layer.right_rows);
  const int rows = is_left ? share(layer.left_rows, layer.rows_per_block) : share(layer.r, layer.right_rows);
  const int64_t row_bytes = (is_left ? layer.r : p.k) * layer.bits / 8;
  const int64_t scale_bytes = (is_left ? layer.left_groups : layer.right_groups) * int64_t(sizeof(Scalar));
  fetch_to_l2(is_left ? layer.left : layer.right, first_row * row_bytes, (first_row + rows) * row_bytes);
  fetch_to_l2(is_left ? layer.left_scales : layer.right_scales, first_row * scale_bytes,
              (first_row + rows) * scale_bytes);
}

// What each block does. It reaches the grid barrier exactly once, also without rows: an early return would hang the
// others.
template <typename Scalar, int M, bool kPacked>
__device__ void decode(const Problem& p) {
  float* exchange = reinterpret_cast<float*>(shared_memory);
  uint4* pivots = shared_memory + p.exchange_floats / 4;
  uint4* prefetched = pivots + p.pivot_vectors;

  if constexpr (kPacked) fetch_ahead<Scalar>(p);
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    const Layer& layer = p.layers[i];
    as_stored<Scalar, kPacked>(layer, [&](auto stored) {
      shrink<Scalar, decltype(stored), M>(p, layer, share(layer.r, layer.right_rows),
                                          exchange + layer.own_rows_before * kWarps * M);
    });
  }

#pragma unroll 1
  for (int i = 0; i < p.count; ++i)
    prefetch<Scalar, kPacked>(p.layers[i], share(p.layers[i].left_rows, p.layers[i].rows_per_block), prefetched);
  fetch_pivots(p.layers, p.count, pivots, kThreads);
  __pipeline_commit();

  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < p.count; ++i)
    publish<Scalar, M, kPacked>(p, p.layers[i], share(p.layers[i].r, p.layers[i].right_rows),
                                exchange + p.layers[i].own_rows_before * kWarps * M);
  cooperative_groups::this_grid().sync();

#pragma unroll 1
  for (int i = 0; i < p.count; ++i)
    gather<M>(p, p.layers[i], reinterpret_cast<float4*>(exchange + p.layers[i].rows_before * M));
  __pipeline_wait_prior(0);
  __syncthreads();
  // Groups of rows go round the warps, one layer after the other: those of a small k and v have warps of their own.
  int group = threadIdx.x / kWarpSize;
#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {
    const Layer& layer = p.layers[i];
    const float4* shrunk = reinterpret_cast<const float4*>(exchange + layer.rows_before * M);
    const int rows = share(layer.left_rows, layer.rows_per_block);
    copy_pivots<Scalar, M>(p, layer, share(layer.r, layer.right_rows), shrunk, pivots);
    as_stored<Scalar, kPacked>(layer, [&](auto stored) {
      expand<Scalar, decltype(stored), M>(p, layer, group, rows, shrunk, pivots, prefetched);
    });
    const int turn = (group - (rows + kRows - 1) / kRows) % kWarps;
    group = turn < 0 ? turn + kWarps : turn;
  }
}

}  // namespace
}  // namespace lorap

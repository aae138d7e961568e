// One-launch decode of low-rank layers that read the same x: y = (x @ right.T) @ left.T + bias, for M <= 8 tokens.
//
//   x (M, K), right (R, K), left (N, R), bias (N,), y (M, N) in bfloat16 or float16; sums, and shrunk = x @ right.T
//   (M, R), in float32. In pivoted storage R rows of y are those of shrunk, and left has the others only.
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
#include <algorithm>

#include "low_rank_products.h"

namespace lorap {
namespace {

struct Layer : KeptLayer {
  int right_rows = 0;       // rows of right per block
  int own_rows_before = 0;  // those of the layers before: where its partial sums are
  int64_t rows_before = 0;  // ranks of the layers before that are needed for their left: where its shrunk is
  int rows_per_block = 0;   // rows of left per block
  int prefetched_rows = 0;  // how many of them are copied to shared memory; a multiple of kRows, or all
  int prefetched_at = 0;    // in vectors of 16 bytes
};

struct Problem {
  const void* x = nullptr;
  int64_t m = 0, k = 0;
  int count = 0;
  int exchange_floats = 0;  // start of shared memory: partial sums in the shrink phase, shrunk in the expand phase
  int pivot_vectors = 0;    // of 16 bytes; they follow there
  Layer layers[kMaxDecodeLayers];
};

// Tokens that fill up M repeat the last one; their results are not stored.
__device__ int64_t token(const Problem& p, int m) { return m < p.m ? m : p.m - 1; }

// Partial sums of this block's rows of right, one set per warp: partial (kWarps, rows, M). All threads run along K, so
// that a block with few rows still has every thread loading, and each x is read by one thread, hence not staged.
template <typename Scalar, int M>
__device__ void shrink(const Problem& p, const Layer& layer, int rows, float* partial) {
  const int warp = threadIdx.x / kWarpSize, lane = threadIdx.x % kWarpSize;
  const int vectors = p.k / kVector;
  const uint4* x = static_cast<const uint4*>(p.x);
  const uint4* right = static_cast<const uint4*>(layer.right) + int64_t(blockIdx.x) * layer.right_rows * vectors;
  for (int start = 0; start < rows; start += kRows) {
    float sums[kRows * M] = {};
    multiply<Scalar, M>(
        sums, threadIdx.x, kThreads, vectors,
        [&](int row, int v) {  // read once and never again: do not let it push x and shrunk out of the caches
          return start + row < rows ? __ldcs(right + int64_t(start + row) * vectors + v) : uint4{};
        },
        [&](int m, int v, float (&inputs)[kVector]) { unpack<Scalar>(__ldg(x + token(p, m) * vectors + v), inputs); });
    const float sum = sum_over_warp(sums, lane);
    if (lane < kRows * M && start + lane / M < rows) partial[(warp * rows + start) * M + lane] = sum;
  }
}

// Adds the warps' partial sums, always in the same order, and shows them to the other blocks; where no left is to be
// multiplied with them they are outputs.
template <typename Scalar, int M>
__device__ void publish(const Problem& p, const Layer& layer, int rows, const float* partial) {
  const int64_t first_row = int64_t(blockIdx.x) * layer.right_rows;
  for (int i = threadIdx.x; i < rows * M; i += kThreads) {
    float sum = 0.0f;
#pragma unroll
    for (int warp = 0; warp < kWarps; ++warp) sum += partial[warp * rows * M + i];
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

// Outputs of this block's rows of left, a warp per kRows of them: from shared memory as far as they were prefetched,
// the rest straight from global memory. The first of them is `first_group`'s.
template <typename Scalar, int M>
__device__ void expand(const Problem& p, const Layer& layer, int first_group, int rows, const float4* shrunk,
                       const uint4* pivots, const uint4* prefetched) {
  const int lane = threadIdx.x % kWarpSize;
  const int vectors = layer.r / kVector;
  const int64_t first_row = int64_t(blockIdx.x) * layer.rows_per_block;
  const uint4* left = static_cast<const uint4*>(layer.left) + first_row * vectors;
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
        return start + row < rows ? prefetched[(start + row) * vectors + v] : uint4{};
      };
      multiply<Scalar, M>(sums, lane, kWarpSize, vectors, load, load_shrunk);
    } else {
      const auto load = [&](int row, int v) {
        return start + row < rows ? __ldcs(left + int64_t(start + row) * vectors + v) : uint4{};
      };
      multiply<Scalar, M>(sums, lane, kWarpSize, vectors, load, load_shrunk);
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

// Every block reaches the grid barrier exactly once, also one without rows: an early return would hang the others.
template <typename Scalar, int M>
__global__ void __launch_bounds__(kThreads, 1) low_rank_decode_kernel(Problem p) {
  float* exchange = reinterpret_cast<float*>(shared_memory);
  uint4* pivots = shared_memory + p.exchange_floats / 4;
  uint4* prefetched = pivots + p.pivot_vectors;

#pragma unroll 1
  for (int i = 0; i < p.count; ++i)
    shrink<Scalar, M>(p, p.layers[i], share(p.layers[i].r, p.layers[i].right_rows),
                      exchange + p.layers[i].own_rows_before * kWarps * M);

#pragma unroll 1
  for (int i = 0; i < p.count; ++i) {  // a block's rows of left are contiguous, so the copy is one flat range
    const Layer& layer = p.layers[i];
    const int row_vectors = layer.r / kVector, rows = share(layer.left_rows, layer.rows_per_block);
    const uint4* left =
        static_cast<const uint4*>(layer.left) + int64_t(blockIdx.x) * layer.rows_per_block * row_vectors;
    const int vectors = (rows < layer.prefetched_rows ? rows : layer.prefetched_rows) * row_vectors;
    for (int v = threadIdx.x; v < vectors; v += kThreads)
      __pipeline_memcpy_async(prefetched + layer.prefetched_at + v, left + v, sizeof(uint4));
  }
  fetch_pivots(p.layers, p.count, pivots, kThreads);
  __pipeline_commit();

  __syncthreads();
#pragma unroll 1
  for (int i = 0; i < p.count; ++i)
    publish<Scalar, M>(p, p.layers[i], share(p.layers[i].r, p.layers[i].right_rows),
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
    expand<Scalar, M>(p, layer, group, rows, shrunk, pivots, prefetched + layer.prefetched_at);
    const int turn = (group - (rows + kRows - 1) / kRows) % kWarps;
    group = turn < 0 ? turn + kWarps : turn;
  }
}

// How a launch of so many blocks shares out the work, and the bytes of shared memory that it takes, more than `limit`
// where they cannot suffice.
int64_t plan(const LowRankDecode& arguments, int tokens, int blocks, int64_t limit, int64_t itemsize, Problem* p) {
  p->x = arguments.x, p->m = arguments.m, p->k = arguments.k, p->count = arguments.count;
  p->pivot_vectors = keep(arguments, p->layers);
  int64_t own_rows = 0, rows = 0;
  for (int i = 0; i < p->count; ++i) {
    Layer& layer = p->layers[i];
    layer.right_rows = int(ceil_div(layer.r, blocks));
    layer.rows_per_block = int(ceil_div(layer.left_rows, blocks));
    layer.own_rows_before = int(own_rows), layer.rows_before = rows;
    own_rows += layer.right_rows;
    rows += layer.left_rows > 0 ? layer.r : 0;
  }
  // A multiple of 8 floats, as each rank is.
  p->exchange_floats = int(tokens * std::max<int64_t>(rows, kWarps * own_rows));
  int64_t bytes = p->exchange_floats * sizeof(float) + p->pivot_vectors * sizeof(uint4), prefetched = 0;
  for (int i = 0; i < p->count; ++i) {
    Layer& layer = p->layers[i];
    const int64_t row_bytes = layer.r * itemsize, room = limit - bytes;
    const int64_t fitting_rows = row_bytes > 0 && room > 0 ? room / (kRows * row_bytes) * kRows : 0;
    layer.prefetched_at = int(prefetched / sizeof(uint4));
    layer.prefetched_rows = int(std::min<int64_t>(layer.rows_per_block, fitting_rows));
    prefetched += layer.prefetched_rows * row_bytes;
    bytes += layer.prefetched_rows * row_bytes;
  }
  return bytes;
}

template <typename Scalar, int M>
cudaError_t launch(const LowRankDecode& arguments, cudaStream_t stream) {
  const auto kernel = low_rank_decode_kernel<Scalar, M>;
  int device, blocks, limit;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  // Always the limit of the device, never what this call needs: another thread may be about to launch with more.
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit))
    return error;

  Problem p;
  const int64_t shared_bytes = plan(arguments, M, blocks, limit, sizeof(Scalar), &p);
  if (shared_bytes > limit) return cudaErrorInvalidConfiguration;
  void* kernel_arguments[] = {&p};
  return cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(kThreads), kernel_arguments, size_t(shared_bytes),
                                     stream);
}

template <typename Scalar>
cudaError_t launch_for_tokens(const LowRankDecode& arguments, cudaStream_t stream) {
  if (arguments.m <= 1) return launch<Scalar, 1>(arguments, stream);
  if (arguments.m <= 2) return launch<Scalar, 2>(arguments, stream);
  if (arguments.m <= 4) return launch<Scalar, 4>(arguments, stream);
  return launch<Scalar, 8>(arguments, stream);
}

}  // namespace

cudaError_t low_rank_decode(const LowRankDecode& problem, DecodeType type, cudaStream_t stream) {
  if (problem.m > kTokens) return low_rank_decode_mma(problem, type, stream);
  if (!is_valid(problem, kTokens)) return cudaErrorInvalidValue;
  if (type == DecodeType::kBFloat16) return launch_for_tokens<__nv_bfloat16>(problem, stream);
  return launch_for_tokens<__half>(problem, stream);
}

}  // namespace lorap

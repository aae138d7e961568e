// One-launch decode of a low-rank layer for M <= 16 tokens on tensor cores: y = (x @ right.T) @ left.T + bias.
//
// The plan of low_rank_decode.cu, products -> barrier of all blocks -> products, with three differences:
//
// - mma.m16n8k16: the tokens are its 16 rows and 8 rows of a factor its 8 columns, as a multiprocessor has few rows of
//   right. Sums are float32; `shrunk`, an operand of the second half, is in the type of the weights as it is in torch.
// - A cluster of 4 blocks shares its rows of a factor and splits the columns: each reads a quarter of x and of
//   `shrunk` from L2, where otherwise every multiprocessor would read all of them, more bytes than the weights have.
//   The sums meet in distributed shared memory. Before sm_90 a "cluster" is one block.
// - Weights come through a ring of asynchronous copies that does not stop at the barriers: while a block waits for the
//   others, its first 64 KB of left are on their way. A thread copies what it multiplies itself and nobody else does,
//   so that the ring needs no barrier; that works without ldmatrix, because the order of k within a product is free:
//   a lane's 8 adjacent scalars are the fragments of two mma, in x and in the weights alike.
//
// Every sum has a fixed order, so results repeat bit for bit. Never run on a GPU.
#include <algorithm>

#include "low_rank_device.h"

namespace lorap {
namespace {

constexpr int kWarps = 8;
constexpr int kThreads = kWarps * kWarpSize;
constexpr int kTokens = 16;  // rows of the mma
constexpr int kRows = 8;     // its columns: the rows of a factor in a tile
constexpr int kStep = 8;     // vectors of a row that a warp takes at a time: 128 bytes
constexpr int kTiles = 8;    // tiles whose sums a warp holds
constexpr int kTile = kTokens * kRows;
constexpr int kRing = 9;   // units, each a tile times a step: 1 KB a warp, 8 on their way, one being read
constexpr int kParts = 4;  // blocks of a cluster
constexpr int kRingVectors = kRing * 2 * kThreads;
constexpr int kExchangeVectors = kWarps * kTiles * kTile / 4;

// input (M, columns) times weights (rows, columns): the same for both halves and every block.
struct Half {
  const uint4* weights;
  const uint4* input;
  int64_t rows;
  int vectors;       // of 16 bytes in a row
  int cluster_rows;  // rows that fall to a cluster
  int part_vectors;  // of each row that fall to one of its blocks
  int along;         // warps that share a tile and split those; the other warps have tiles of their own
  int rounds;        // a round ends when sums are put together; in it each warp has
  int steps, tiles;  // so many steps, and in each step so many tiles
};

struct Problem : LowRankDecode {
  Half halves[2];
  int parts;  // blocks of a cluster
};

#ifndef LORAP_EMULATE_CUDA
__device__ void mma(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                    __nv_bfloat16) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
__device__ void mma(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1,
                    __half) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}

#endif

#if __CUDA_ARCH__ >= 900 || defined(LORAP_EMULATE_CUDA)
#define LORAP_HAS_CLUSTERS
#endif

__device__ void cluster_barrier() {
#ifdef LORAP_HAS_CLUSTERS
  cooperative_groups::this_cluster().sync();
#else
  __syncthreads();
#endif
}

// `mine`, in shared memory, as the block with this rank in the cluster has it.
__device__ const float* of_block(const float* mine, int rank) {
#ifdef LORAP_HAS_CLUSTERS
  return cooperative_groups::this_cluster().map_shared_rank(mine, rank);
#else
  return mine;
#endif
}

// This thread's place: as a lane of an mma, of its warp in the block, and of the block in the grid.
struct Place {
  int warp = threadIdx.x / kWarpSize;
  int group = threadIdx.x % kWarpSize / 4;  // the token, or the row of a tile, that its loads are for
  int member = threadIdx.x % 4;             // which vectors of a step they are
  int64_t cluster;
  int part;
  __device__ explicit Place(const Problem& p) : cluster(blockIdx.x / p.parts), part(blockIdx.x % p.parts) {}
};

// Rows of a factor that fall to this cluster, none for the last ones when there are few.
__device__ int cluster_rows(const Half& half, int64_t first_row) {
  const int64_t left_over = half.rows - first_row;
  return left_over <= 0 ? 0 : int(left_over < half.cluster_rows ? left_over : half.cluster_rows);
}

// A lane's two vectors of the step: the first one, counted from the start of the row, and the end of this block's part.
struct Span {
  int first, end;
  __device__ Span(const Half& half, const Place& at, int step) {
    const int start = at.part * half.part_vectors, stop = start + half.part_vectors;
    first = start + (step * half.along + at.warp % half.along) * kStep + at.member;
    end = stop < half.vectors ? stop : half.vectors;
  }
};

// Row of the cluster where a warp's tile begins: the tiles of a round alternate between the warps.
__device__ int tile_row(const Half& half, int warp, int round, int tile) {
  const int others = kWarps / half.along;
  return ((round * half.tiles + tile) * others + warp / half.along) * kRows;
}

// Walks through a warp's units of both halves in the order in which they are multiplied, ahead of it.
struct Ring {
  uint4* slots;  // (kRing, 2, kThreads)
  int half = 0, round = 0, step = 0, tile = 0;
  int write = 0, read = 0;

  // Starts copying the next unit. What is beyond the factor counts as zero and is not read.
  __device__ void fetch(const Problem& p, const Place& at) {
    if (half < 2) {
      const Half& h = p.halves[half];
      const Span span(h, at, step);
      const int64_t first_row = at.cluster * h.cluster_rows;
      const int row = tile_row(h, at.warp, round, tile) + at.group;
      const bool inside = row < cluster_rows(h, first_row);
      const uint4* source = h.weights + (first_row + row) * h.vectors + span.first;
      uint4* slot = slots + write * 2 * kThreads + threadIdx.x;
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        if (inside && span.first + 4 * i < span.end) {
          __pipeline_memcpy_async(slot + i * kThreads, source + 4 * i, sizeof(uint4));
        } else {
          slot[i * kThreads] = uint4{};
        }
      }
      advance(p, h);
    }
    __pipeline_commit();  // empty after the last unit: the number of groups says which one has arrived
    write = write + 1 == kRing ? 0 : write + 1;
  }

  __device__ void advance(const Problem& p, const Half& h) {
    if (++tile < h.tiles) return;
    tile = 0;
    if (++step < h.steps) return;
    step = 0;
    if (++round < h.rounds) return;
    round = 0;
    half = half == 0 && p.halves[1].rounds > 0 ? 1 : 2;
  }

  // The next unit's weights of this lane, when they are there; its successor in the slot read before is sent for first.
  __device__ void take(const Problem& p, const Place& at, uint4 (&weights)[2]) {
    fetch(p, at);
    __pipeline_wait_prior(kRing - 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) weights[i] = slots[(read * 2 + i) * kThreads + threadIdx.x];
    read = read + 1 == kRing ? 0 : read + 1;
  }
};

// A lane's share of the input in a step: its vectors, of two tokens. Tokens beyond M count as zero.
struct Inputs {
  uint4 vectors[2][2];  // which of the lane's two vectors, token
  __device__ void load(const Problem& p, const Half& half, const Place& at, int step) {
    const Span span(half, at, step);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = at.group + 8 * j, v = span.first + 4 * i;
        const bool inside = token < p.m && v < span.end;
        vectors[i][j] = inside ? __ldcg(half.input + int64_t(token) * half.vectors + v) : uint4{};
      }
  }
};

template <typename Scalar>
__device__ void multiply(float (&sums)[4], const Inputs& x, const uint4 (&weights)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 low = x.vectors[i][0], high = x.vectors[i][1], w = weights[i];
    mma(sums, low.x, high.x, low.y, high.y, w.x, w.y, Scalar{});
    mma(sums, low.z, high.z, low.w, high.w, w.z, w.w, Scalar{});
  }
}

// The sums of this warp's tiles in a round, over its steps, to its part of `exchange` (warp, tile, token, row).
template <typename Scalar>
__device__ void accumulate(const Problem& p, const Half& half, const Place& at, Ring& ring, float* exchange) {
  float sums[kTiles][4] = {};
  Inputs next;
  next.load(p, half, at, 0);
#pragma unroll 1
  for (int step = 0; step < half.steps; ++step) {
    const Inputs inputs = next;
    if (step + 1 < half.steps) next.load(p, half, at, step + 1);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile >= half.tiles) continue;  // constant bounds, so that the compiler keeps the sums in registers
      uint4 weights[2];
      ring.take(p, at, weights);
      multiply<Scalar>(sums[tile], inputs, weights);
    }
  }
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float* to = exchange + (at.warp * kTiles + tile) * kTile + at.group * kRows + at.member * 2;
    if (tile < half.tiles) {
      *reinterpret_cast<float2*>(to) = float2{sums[tile][0], sums[tile][1]};
      *reinterpret_cast<float2*>(to + 8 * kRows) = float2{sums[tile][2], sums[tile][3]};
    }
  }
}

// Where the sums of a tile of the round are put together: in the part of the first warp that has some.
__device__ int place_of(const Half& half, int tile) {
  const int others = kWarps / half.along;
  return (tile % others * half.along * kTiles + tile / others) * kTile;
}

// Adds up what the warps of a block have, then what the blocks of a cluster have, each of them a share of the tiles,
// and hands the results on: the first half's to the other blocks, and as outputs where they are pivots; the second
// half's as outputs.
template <typename Scalar>
__device__ void finish(const Problem& p, int index, const Place& at, int round, float* exchange,
                       const int64_t* pivots) {
  const Half& half = p.halves[index];
  const int count = kWarps / half.along * half.tiles * kTile;
  __syncthreads();
  for (int i = threadIdx.x; half.along > 1 && i < count; i += kThreads) {
    float* sums = exchange + place_of(half, i / kTile) + i % kTile;
    float sum = sums[0];
    for (int warp = 1; warp < half.along; ++warp) sum += sums[warp * kTiles * kTile];
    sums[0] = sum;
  }
  cluster_barrier();
  const int64_t first_row = at.cluster * half.cluster_rows;
  const int rows = cluster_rows(half, first_row);
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int tile = i / kTile, token = i % kTile / kRows;
    const int row = (round * half.tiles * (kWarps / half.along) + tile) * kRows + i % kRows;
    if (tile % p.parts != at.part || row >= rows || token >= p.m) continue;
    float sum = 0.0f;
    for (int part = 0; part < p.parts; ++part) sum += of_block(exchange, part)[place_of(half, tile) + i % kTile];
    if (index == 1) {
      store<Scalar>(p, token, output_row(p, pivots, first_row + row), sum);
    } else {
      narrow(sum, reinterpret_cast<Scalar*>(p.shrunk)[token * p.r + first_row + row]);
      if (p.pivots != nullptr) store<Scalar>(p, token, pivots[first_row + row], sum);
    }
  }
}

// Every block reaches every barrier, also one without rows: an early return would hang the others.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 1) low_rank_decode_mma_kernel(Problem p) {
  const Place at(p);
  Ring ring{shared_memory};
  float* exchange = reinterpret_cast<float*>(shared_memory + kRingVectors);
  uint4* pivots = shared_memory + kRingVectors + kExchangeVectors;
  const int pivot_vectors = p.pivots == nullptr ? 0 : int(p.r * sizeof(int64_t) / sizeof(uint4));
  for (int i = threadIdx.x; i < pivot_vectors; i += kThreads)
    __pipeline_memcpy_async(pivots + i, reinterpret_cast<const uint4*>(p.pivots) + i, sizeof(uint4));
#pragma unroll 1
  for (int i = 0; i < kRing - 1; ++i) ring.fetch(p, at);  // the first group takes the pivots along

#pragma unroll 1
  for (int index = 0; index < 2; ++index) {
    const Half& half = p.halves[index];
#pragma unroll 1
    for (int round = 0; round < half.rounds; ++round) {
      if (round > 0) cluster_barrier();  // the others have read what is overwritten now
      accumulate<Scalar>(p, half, at, ring, exchange);
      finish<Scalar>(p, index, at, round, exchange, reinterpret_cast<const int64_t*>(pivots));
    }
    if (index == 0) cooperative_groups::this_grid().sync();
  }
  cluster_barrier();  // shared memory that others read must outlive them
}

// Splits the work of a half between the clusters, the blocks of each, their warps, rounds and steps.
Half plan(const void* weights, const void* input, int64_t rows, int64_t columns, int clusters, int parts) {
  Half half{static_cast<const uint4*>(weights), static_cast<const uint4*>(input), rows, int(columns / kVector)};
  half.cluster_rows = int(ceil_div(rows, clusters));
  half.part_vectors = int(ceil_div(ceil_div(half.vectors, parts), 4) * 4);  // 64 bytes
  const int64_t tiles = ceil_div(half.cluster_rows, kRows), steps = ceil_div(half.part_vectors, kStep);
  int64_t least = INT64_MAX;
  for (int along = kWarps; along >= 1; along /= 2) {
    const int64_t others = kWarps / along, rounds = ceil_div(tiles, others * kTiles);
    const int64_t own_tiles = rounds == 0 ? 0 : ceil_div(tiles, others * rounds), own_steps = ceil_div(steps, along);
    // In units: a step waits for its input as long as one takes, the end of a round as long as some.
    const int64_t cost = rounds * (own_steps * (own_tiles + 1) + 4);
    if (cost >= least) continue;
    least = cost;
    half.along = along, half.rounds = int(rounds), half.steps = int(own_steps), half.tiles = int(own_tiles);
  }
  return half;
}

template <typename Scalar>
cudaError_t launch(const LowRankDecode& arguments, cudaStream_t stream) {
  const auto kernel = low_rank_decode_mma_kernel<Scalar>;
  int device, multiprocessors, limit, has_clusters;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  const auto ask = [device](int* value, cudaDeviceAttr what) { return cudaDeviceGetAttribute(value, what, device); };
  if (cudaError_t error = ask(&multiprocessors, cudaDevAttrMultiProcessorCount)) return error;
  if (cudaError_t error = ask(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin)) return error;
  if (cudaError_t error = ask(&has_clusters, cudaDevAttrClusterLaunch)) return error;
  const int64_t pivot_bytes = arguments.pivots == nullptr ? 0 : arguments.r * sizeof(int64_t);
  const int64_t shared_bytes = (kRingVectors + kExchangeVectors) * sizeof(uint4) + pivot_bytes;
  if (shared_bytes > limit) return cudaErrorInvalidConfiguration;
  // Always the limit of the device, never what this call needs: another thread may be about to launch with more.
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit))
    return error;

  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = kParts;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1].id = cudaLaunchAttributeCooperative;
  attributes[1].val.cooperative = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(kParts);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = size_t(shared_bytes);
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 1;
  int clusters = 0;
  if (has_clusters)
    if (cudaError_t error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config)) return error;
  const int parts = clusters > 0 ? kParts : 1;
  if (parts == 1) clusters = multiprocessors, config.attrs = attributes + 1;
  config.numAttrs = parts == 1 ? 1 : 2;
  config.gridDim = dim3(unsigned(clusters * parts));

  Problem p{arguments};
  const int64_t left_rows = p.pivots == nullptr ? p.n : p.n - p.r;
  p.halves[0] = plan(p.right, p.x, p.r, p.k, clusters, parts);
  p.halves[1] = plan(p.left, p.shrunk, left_rows, p.r, clusters, parts);
  p.parts = parts;
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

cudaError_t low_rank_decode_mma(const LowRankDecode& problem, DecodeType type, cudaStream_t stream) {
  const bool fits = 1 <= problem.m && problem.m <= kTokens && problem.n > 0 && problem.k > 0 && problem.r > 0;
  if (!fits || problem.k % kVector || problem.r % kVector) return cudaErrorInvalidValue;
  if (problem.pivots != nullptr && problem.n < problem.r) return cudaErrorInvalidValue;
  if (type == DecodeType::kBFloat16) return launch<__nv_bfloat16>(problem, stream);
  return launch<__half>(problem, stream);
}

}  // namespace lorap

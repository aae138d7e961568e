// Who multiplies what on tensor cores, and the ring through which the weights come. For low_rank_decode_mma.cu only.
#pragma once

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

// input (M, columns) times weights (rows, columns): the same for every block.
struct Product {
  const uint4* weights;
  const uint4* input;
  int64_t rows;
  int vectors;       // of 16 bytes in a row
  int cluster_rows;  // rows that fall to a cluster
  int part_vectors;  // of each row that fall to one of its blocks
  int along;         // warps that share a tile and split those; the other warps have tiles of their own
  int rounds;        // a round ends when sums are put together; in it each warp has
  int steps, tiles;  // so many steps, and in each step so many tiles
  int next;          // the product after it that reads weights at all
};

struct Problem {
  int64_t m = 0;
  int count = 0, parts = 1;  // layers; blocks of a cluster
  int first = 0;             // product that reads weights
  KeptLayer layers[kMaxDecodeLayers];
  Product products[2 * kMaxDecodeLayers];  // each layer's with right, then each one's with left
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
__device__ int cluster_rows(const Product& product, int64_t first_row) {
  const int64_t left_over = product.rows - first_row;
  return left_over <= 0 ? 0 : int(left_over < product.cluster_rows ? left_over : product.cluster_rows);
}

// A lane's two vectors of the step: the first one, counted from the start of the row, and the end of this block's part.
struct Span {
  int first, end;
  __device__ Span(const Product& product, const Place& at, int step) {
    const int start = at.part * product.part_vectors, stop = start + product.part_vectors;
    first = start + (step * product.along + at.warp % product.along) * kStep + at.member;
    end = stop < product.vectors ? stop : product.vectors;
  }
};

// Row of the cluster where a warp's tile begins: the tiles of a round alternate between the warps.
__device__ int tile_row(const Product& product, int warp, int round, int tile) {
  const int others = kWarps / product.along;
  return ((round * product.tiles + tile) * others + warp / product.along) * kRows;
}

// Walks through a warp's units of all products in the order in which they are multiplied, ahead of it.
struct Ring {
  uint4* slots;  // (kRing, 2, kThreads)
  int product;
  int round = 0, step = 0, tile = 0;
  int write = 0, read = 0;

  __device__ Ring(uint4* slots, int first) : slots(slots), product(first) {}

  // Starts copying the next unit. What is beyond the factor counts as zero and is not read.
  __device__ void fetch(const Problem& p, const Place& at) {
    if (product < 2 * p.count) {
      const Product& h = p.products[product];
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
      advance(h);
    }
    __pipeline_commit();  // empty after the last unit: the number of groups says which one has arrived
    write = write + 1 == kRing ? 0 : write + 1;
  }

  __device__ void advance(const Product& h) {
    if (++tile < h.tiles) return;
    tile = 0;
    if (++step < h.steps) return;
    step = 0;
    if (++round < h.rounds) return;
    round = 0;
    product = h.next;
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
  __device__ void load(const Problem& p, const Product& product, const Place& at, int step) {
    const Span span(product, at, step);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int token = at.group + 8 * j, v = span.first + 4 * i;
        const bool inside = token < p.m && v < span.end;
        vectors[i][j] = inside ? __ldcg(product.input + int64_t(token) * product.vectors + v) : uint4{};
      }
  }
};

// Splits a product between the clusters, the blocks of each, their warps, rounds and steps.
inline Product plan(const void* weights, const void* input, int64_t rows, int64_t columns, int clusters, int parts) {
  Product product{static_cast<const uint4*>(weights), static_cast<const uint4*>(input), rows, int(columns / kVector)};
  product.cluster_rows = int(ceil_div(rows, clusters));
  product.part_vectors = int(ceil_div(ceil_div(product.vectors, parts), 4) * 4);  // 64 bytes
  const int64_t tiles = ceil_div(product.cluster_rows, kRows), steps = ceil_div(product.part_vectors, kStep);
  int64_t least = INT64_MAX;
  for (int along = kWarps; along >= 1; along /= 2) {
    const int64_t others = kWarps / along, rounds = ceil_div(tiles, others * kTiles);
    const int64_t own_tiles = rounds == 0 ? 0 : ceil_div(tiles, others * rounds), own_steps = ceil_div(steps, along);
    // In units: a step waits for its input as long as one takes, the end of a round as long as some.
    const int64_t cost = rounds * (own_steps * (own_tiles + 1) + 4);
    if (cost >= least) continue;
    least = cost;
    product.along = along, product.rounds = int(rounds), product.steps = int(own_steps), product.tiles = int(own_tiles);
  }
  return product;
}

// Splits the work of a launch; p->layers are there.
inline void plan(const LowRankDecode& arguments, int clusters, int parts, Problem* p) {
  p->m = arguments.m, p->count = arguments.count, p->parts = parts;
  int next = 2 * p->count;
  for (int i = next - 1; i >= 0; --i) {
    const bool is_left = i >= p->count;
    const KeptLayer& layer = p->layers[is_left ? i - p->count : i];
    Product& product = p->products[i];
    product = is_left ? plan(layer.left, layer.shrunk, layer.left_rows, layer.r, clusters, parts)
                      : plan(layer.right, arguments.x, layer.r, arguments.k, clusters, parts);
    product.next = next;
    if (product.rounds > 0 && product.steps > 0) next = i;
  }
  p->first = next;
}

}  // namespace
}  // namespace lorap

// One-launch decode of low-rank layers that read the same x, for M <= 16 tokens on tensor cores:
// y = (x @ right.T) @ left.T + bias.
//
// The plan of low_rank_decode.cu, products -> barrier of all blocks -> products, with three differences:
//
// - mma.m16n8k16: the tokens are its 16 rows and 8 rows of a factor its 8 columns, as a multiprocessor has few rows of
//   right. Sums are float32; `shrunk`, an operand of the products with left, is in the type of the weights as it is in
//   torch.
// - A cluster of 4 blocks shares its rows of a factor and splits the columns: each reads a quarter of x and of
//   `shrunk` from L2, where otherwise every multiprocessor would read all of them, more bytes than the weights have.
//   The sums meet in distributed shared memory. Before sm_90 a "cluster" is one block.
// - Weights come through a ring of asynchronous copies that does not stop at the barriers: while a block waits for the
//   others, its first 64 KB of left are on their way. A thread copies what it multiplies itself and nobody else does,
//   so that the ring needs no barrier; that works without ldmatrix, because the order of k within a product is free:
//   a lane's 8 adjacent scalars are the fragments of two mma, in x and in the weights alike.
//
// The products of up to 3 layers follow each other: all with right, the barrier, all with left. The ring runs on from
// one to the next. low_rank_ring.h has the ring and who multiplies what; here is what becomes of the sums.
//
// Every sum has a fixed order, so results repeat bit for bit. Never run on a GPU.
#include "low_rank_ring.h"

namespace lorap {
namespace {

template <typename Scalar>
__device__ void multiply(float (&sums)[4], const Inputs& x, const uint4 (&weights)[2]) {
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint4 low = x.vectors[i][0], high = x.vectors[i][1], w = weights[i];
    mma(sums, low.x, high.x, low.y, high.y, w.x, w.y, Scalar{});
    mma(sums, low.z, high.z, low.w, high.w, w.z, w.w, Scalar{});
  }
}

// The sums of this warp's tiles in a round, over its steps, to its part of `exchange` (warp, tile, token, row); `read`:
// other blocks may still read what is overwritten there.
template <typename Scalar>
__device__ void accumulate(const Problem& p, const Product& product, const Place& at, Ring& ring, bool read,
                           float* exchange) {
  float sums[kTiles][4] = {};
  Inputs next;
  next.load(p, product, at, 0);
#pragma unroll 1
  for (int step = 0; step < product.steps; ++step) {
    const Inputs inputs = next;
    if (step + 1 < product.steps) next.load(p, product, at, step + 1);
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile >= product.tiles) continue;  // constant bounds, so that the compiler keeps the sums in registers
      uint4 weights[2];
      ring.take(p, at, weights);
      multiply<Scalar>(sums[tile], inputs, weights);
    }
  }
  if (read) cluster_barrier();
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
    float* to = exchange + (at.warp * kTiles + tile) * kTile + at.group * kRows + at.member * 2;
    if (tile < product.tiles) {
      *reinterpret_cast<float2*>(to) = float2{sums[tile][0], sums[tile][1]};
      *reinterpret_cast<float2*>(to + 8 * kRows) = float2{sums[tile][2], sums[tile][3]};
    }
  }
}

// Where the sums of a tile of the round are put together: in the part of the first warp that has some.
__device__ int place_of(const Product& product, int tile) {
  const int others = kWarps / product.along;
  return (tile % others * product.along * kTiles + tile / others) * kTile;
}

// Adds up what the warps of a block have, then what the blocks of a cluster have, each of them a share of the tiles,
// and hands the results on: those with right to the other blocks, and as outputs where they are pivots; those with left
// as outputs.
template <typename Scalar>
__device__ void finish(const Problem& p, int index, const Place& at, int round, float* exchange, const uint4* pivots) {
  const Product& product = p.products[index];
  const bool is_left = index >= p.count;
  const KeptLayer& layer = p.layers[is_left ? index - p.count : index];
  const int count = kWarps / product.along * product.tiles * kTile;
  __syncthreads();
  for (int i = threadIdx.x; product.along > 1 && i < count; i += kThreads) {
    float* sums = exchange + place_of(product, i / kTile) + i % kTile;
    float sum = sums[0];
    for (int warp = 1; warp < product.along; ++warp) sum += sums[warp * kTiles * kTile];
    sums[0] = sum;
  }
  cluster_barrier();
  const int64_t first_row = at.cluster * product.cluster_rows;
  const int rows = cluster_rows(product, first_row);
  for (int i = threadIdx.x; i < count; i += kThreads) {
    const int tile = i / kTile, token = i % kTile / kRows;
    const int row = (round * product.tiles * (kWarps / product.along) + tile) * kRows + i % kRows;
    if (tile % p.parts != at.part || row >= rows || token >= p.m) continue;
    float sum = 0.0f;
    for (int part = 0; part < p.parts; ++part) sum += of_block(exchange, part)[place_of(product, tile) + i % kTile];
    if (is_left) {
      store<Scalar>(layer, token, output_row(layer, pivots, first_row + row), sum);
      continue;
    }
    if (layer.left_rows > 0) narrow(sum, reinterpret_cast<Scalar*>(layer.shrunk)[token * layer.r + first_row + row]);
    if (layer.pivots != nullptr) store<Scalar>(layer, token, pivot_row(layer, pivots, first_row + row), sum);
  }
}

// Every block reaches every barrier, also one without rows: an early return would hang the others.
template <typename Scalar>
__global__ void __launch_bounds__(kThreads, 1) low_rank_decode_mma_kernel(Problem p) {
  const Place at(p);
  Ring ring{shared_memory, p.first};
  float* exchange = reinterpret_cast<float*>(shared_memory + kRingVectors);
  uint4* pivots = shared_memory + kRingVectors + kExchangeVectors;
  fetch_pivots(p.layers, p.count, pivots, kThreads);
#pragma unroll 1
  for (int i = 0; i < kRing - 1; ++i) ring.fetch(p, at);  // the first group takes the pivots along

  bool read = false;
#pragma unroll 1
  for (int index = 0; index < 2 * p.count; ++index) {
    if (index == p.count) {
      cooperative_groups::this_grid().sync();
      read = false;
    }
#pragma unroll 1
    for (int round = 0; round < p.products[index].rounds; ++round) {
      accumulate<Scalar>(p, p.products[index], at, ring, read, exchange);
      finish<Scalar>(p, index, at, round, exchange, pivots);
      read = true;
    }
  }
  cluster_barrier();  // shared memory that others read must outlive them
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
  Problem p;
  const int64_t shared_bytes = (kRingVectors + kExchangeVectors + keep(arguments, p.layers)) * sizeof(uint4);
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

  plan(arguments, clusters, parts, &p);
  return cudaLaunchKernelEx(&config, kernel, p);
}

}  // namespace

cudaError_t low_rank_decode_mma(const LowRankDecode& problem, DecodeType type, cudaStream_t stream) {
  if (!is_valid(problem, kTokens)) return cudaErrorInvalidValue;
  if (type == DecodeType::kBFloat16) return launch<__nv_bfloat16>(problem, stream);
  return launch<__half>(problem, stream);
}

}  // namespace lorap

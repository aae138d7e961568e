// How a launch of low_rank_one_launch.h shares out its work among blocks, and starts. For its kernels only.
#pragma once

#include <algorithm>

#include "low_rank_products.h"

namespace lorap {
namespace {

struct Layer : KeptLayer {
  int right_rows = 0;       // rows of right per block
  int warps_log2 = 0;       // of the warps that share a row of right, where it is packed
  int own_rows_before = 0;  // those of the layers before: where its partial sums are
  int64_t rows_before = 0;  // ranks of the layers before that are needed for their left: where its shrunk is
  int rows_per_block = 0;   // rows of left per block
  int prefetched_rows = 0;  // how many of them are copied to shared memory; a multiple of kRows, or all
  int prefetched_at = 0;    // in vectors of 16 bytes
  int scales_at = 0;        // likewise their scales, where they are packed
  int right_groups = 0, left_groups = 0;  // scales of a row
  uint32_t inverse = 0;                   // see group_of
};

struct Problem {
  const void* x = nullptr;
  int64_t m = 0, k = 0;
  int count = 0;
  int exchange_floats = 0;  // start of shared memory: partial sums in the shrink phase, shrunk in the expand phase
  int pivot_vectors = 0;    // of 16 bytes; they follow there
  Layer layers[kMaxDecodeLayers];
};

// For Layer::warps_log2, where a block has so many groups of kRows rows of so many vectors: with the fewest rounds.
inline int fewest_rounds(int64_t vectors, int64_t groups) {
  const auto rounds = [=](int log2) { return ceil_div(vectors, kWarpSize << log2) * ceil_div(groups, kWarps >> log2); };
  int best = kWarpsLog2;
  for (int log2 = kWarpsLog2 - 1; log2 >= 0; --log2)
    if (rounds(log2) < rounds(best)) best = log2;
  return best;
}

// How a launch of so many blocks shares out the work, and the bytes of shared memory that it takes, more than `limit`
// where they cannot suffice.
inline int64_t plan(const LowRankDecode& arguments, int tokens, int blocks, int64_t limit, Problem* p) {
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
    if (layer.bits == 16) continue;
    const int64_t group = std::min(layer.group, 32 * ceil_div(std::max(p->k, layer.r), 32));
    layer.right_groups = int(ceil_div(p->k, group)), layer.left_groups = int(ceil_div(layer.r, group));
    layer.inverse = inverse_of_group(group);
    layer.warps_log2 = fewest_rounds(p->k * layer.bits / 128, ceil_div(layer.right_rows, kRows));
  }
  // A multiple of 8 floats, as each rank is.
  p->exchange_floats = int(tokens * std::max<int64_t>(rows, kWarps * own_rows));
  int64_t bytes = p->exchange_floats * sizeof(float) + p->pivot_vectors * sizeof(uint4), prefetched = 0;
  for (int i = 0; i < p->count; ++i) {
    Layer& layer = p->layers[i];
    // Scales, of 16 bits, take whole vectors: up to one more at either end.
    const int64_t scale_bytes = 2 * layer.left_groups, vectors = layer.bits == 16 ? 0 : 2 * sizeof(uint4);
    const int64_t row_bytes = layer.r * layer.bits / 8, room = limit - bytes - vectors;
    const int64_t fitting_rows = row_bytes > 0 && room > 0 ? room / (kRows * (row_bytes + scale_bytes)) * kRows : 0;
    layer.prefetched_rows = int(std::min<int64_t>(layer.rows_per_block, fitting_rows));
    layer.prefetched_at = int(prefetched / sizeof(uint4));
    layer.scales_at = layer.prefetched_at + int(layer.prefetched_rows * row_bytes / sizeof(uint4));
    int64_t taken = layer.prefetched_rows * (row_bytes + scale_bytes);
    if (taken > 0) taken = ceil_div(taken + vectors / 2, sizeof(uint4)) * sizeof(uint4);
    prefetched += taken;
    bytes += taken;
  }
  return bytes;
}

template <typename Kernel>
cudaError_t launch(Kernel kernel, int tokens, const LowRankDecode& arguments, cudaStream_t stream) {
  int device, blocks, limit;
  if (cudaError_t error = cudaGetDevice(&device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&blocks, cudaDevAttrMultiProcessorCount, device)) return error;
  if (cudaError_t error = cudaDeviceGetAttribute(&limit, cudaDevAttrMaxSharedMemoryPerBlockOptin, device)) return error;
  // Always the limit of the device, never what this call needs: another thread may be about to launch with more.
  if (cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, limit))
    return error;

  Problem p;
  const int64_t shared_bytes = plan(arguments, tokens, blocks, limit, &p);
  if (shared_bytes > limit) return cudaErrorInvalidConfiguration;
  void* kernel_arguments[] = {&p};
  return cudaLaunchCooperativeKernel(kernel, dim3(blocks), dim3(kThreads), kernel_arguments, size_t(shared_bytes),
                                     stream);
}

}  // namespace
}  // namespace lorap

// Just enough CUDA to run csrc/cuda on the host, one cooperative launch at a time, every CUDA thread a fiber.
//
// A fiber runs until it meets a barrier (block, warp, cluster or grid) and then hands over to the next of its block, or
// to another block when all of its own wait for others, so a barrier that some thread misses is found as a deadlock.
// Shared memory starts as NaN, one exact allocation per block. Four launches see the extremes of what a GPU may do:
// threads and blocks first to last or last to first, each with cp.async that arrives as late as it may, when its thread
// waits for its group, or at once. Built with -fsanitize=thread the fibers are made known to the sanitizer as threads
// that only barriers order; it then reports every pair of accesses to shared or global memory that needs a barrier and
// has none.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <type_traits>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif

struct float2 {
  float x, y;
};
struct float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct dim3 {
  unsigned x, y = 1, z = 1;
  explicit dim3(unsigned x) : x(x) {}
};

namespace emulation {

// How many threads stand at a barrier, and how often it has opened.
struct Barrier {
  int size, waiting = 0, opened = 0;
};

struct Fragments {
  uint32_t a[4], b[2];
};

struct Block {
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<float> exchange;       // one value per thread, for shuffles
  std::vector<Fragments> fragments;  // of each thread, for mma
  std::unique_ptr<uint4[]> shared;
  Block* first_of_cluster;
  Barrier cluster;  // that of the first block of a cluster is used
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes, zeros;  // written; of them the last so many, which are not read
  int group;

  void run() const {
    std::memcpy(to, from, bytes - zeros);
    std::memset(static_cast<char*>(to) + bytes - zeros, 0, zeros);
  }
};

constexpr size_t kStackBytes = 128 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 thread{0}, block_index{0};
  Block* block;
  std::vector<Copy> copies;  // issued, not yet done
  int copy_groups = 0;       // that were closed
  bool copies_at_once = false;
  Barrier* waits_for = nullptr;
  int ticket = 0;
  bool done = false;
  void* sanitizer = nullptr;
};

struct Machine {
  int multiprocessors = 3, shared_limit = 160 * 1024;  // what the launcher finds the device to have
  bool clusters = false;
  Barrier grid;
  Fiber* current = nullptr;
  ucontext_t scheduler;
  void* scheduler_sanitizer = nullptr;
  std::function<void()> body;
  int launches = 0;
  size_t shared_bytes = 0;  // of the last launch
  int grid_barriers = 0;    // passed by the last launch
};

inline Machine machine;

// The emulator's own state passes between fibers without barriers; only the kernel is to be watched for races.
#ifdef __SANITIZE_THREAD__
#define EMULATOR __attribute__((no_sanitize_thread, noinline)) inline
inline void switch_to(void* sanitizer) { __tsan_switch_to_fiber(sanitizer, __tsan_switch_to_fiber_no_sync); }
inline void* this_sanitizer() { return __tsan_get_current_fiber(); }
inline void* new_sanitizer() { return __tsan_create_fiber(0); }
inline void delete_sanitizer(void* sanitizer) { __tsan_destroy_fiber(sanitizer); }
inline void release(void* what) { __tsan_release(what); }
inline void acquire(void* what) { __tsan_acquire(what); }
#else
#define EMULATOR inline
inline void switch_to(void*) {}
inline void* this_sanitizer() { return nullptr; }
inline void* new_sanitizer() { return nullptr; }
inline void delete_sanitizer(void*) {}
inline void release(void*) {}
inline void acquire(void*) {}
#endif

EMULATOR Fiber& current() { return *machine.current; }

// Ends the turn of the current fiber; it continues when the barrier opens.
EMULATOR void wait(Barrier* barrier, bool orders_memory = true) {
  Fiber* fiber = machine.current;
  if (orders_memory) release(barrier);
  fiber->waits_for = barrier;
  fiber->ticket = barrier->opened;
  if (++barrier->waiting == barrier->size) {
    barrier->waiting = 0;
    ++barrier->opened;
  }
  switch_to(machine.scheduler_sanitizer);
  swapcontext(&fiber->context, &machine.scheduler);
  if (orders_memory) acquire(barrier);
}

// A shuffle brings the lanes together but, unlike a barrier, promises nothing about what they wrote to memory.
EMULATOR float shuffle(Barrier* warp, float* exchange, unsigned thread, float value, int mask) {
  exchange[thread] = value;
  wait(warp, false);
  const float other = exchange[thread ^ mask];
  wait(warp, false);
  return other;
}

// D = A B + D as the PTX manual lays a warp's fragments out: of A (16, 16) a lane has the rows l / 4 and l / 4 + 8, of
// B (16, 8) the column l / 4, of both the k with k % 8 / 2 = l % 4; of D (16, 8) the columns 2 (l % 4) and the next.
template <typename Widen>
EMULATOR void mma(Barrier* warp, Fragments* lanes, unsigned lane, float* sums, const Fragments& own, Widen widen) {
  lanes[lane] = own;
  wait(warp, false);
  for (int i = 0; i < 4; ++i) {
    const unsigned row = lane / 4 + i / 2 * 8, column = lane % 4 * 2 + i % 2;
    double sum = sums[i];
    for (unsigned k = 0; k < 16; ++k) {
      const uint32_t a = lanes[row % 8 * 4 + k % 8 / 2].a[row / 8 + k / 8 * 2];
      const uint32_t b = lanes[column * 4 + k % 8 / 2].b[k / 8];
      sum += double(widen(uint16_t(a >> k % 2 * 16))) * widen(uint16_t(b >> k % 2 * 16));
    }
    sums[i] = float(sum);
  }
  wait(warp, false);
}

EMULATOR void run_fiber() {
  acquire(&machine);
  machine.body();
  release(&machine);
  machine.current->done = true;
  switch_to(machine.scheduler_sanitizer);
  setcontext(&machine.scheduler);
}

// Runs the fibers of a block until each of them is done or waits for other blocks; says how many are now done.
EMULATOR size_t run_block(Fiber** fibers, size_t count, bool backwards, bool* progress) {
  size_t finished = 0;
  for (bool moved = true; moved; *progress |= moved) {
    moved = false;
    for (size_t i = 0; i < count; ++i) {
      Fiber* fiber = fibers[backwards ? count - 1 - i : i];
      const bool waits = fiber->waits_for != nullptr && fiber->waits_for->opened == fiber->ticket;
      if (fiber->done || waits) continue;
      moved = true;
      machine.current = fiber;
      switch_to(fiber->sanitizer);
      swapcontext(&machine.scheduler, &fiber->context);
      finished += fiber->done;
    }
  }
  return finished;
}

EMULATOR void schedule(Fiber** fibers, size_t count, size_t block, bool backwards) {
  size_t running = count;
  while (running > 0) {
    bool progress = false;
    for (size_t i = 0; i < count; i += block)
      running -= run_block(fibers + (backwards ? count - block - i : i), block, backwards, &progress);
    if (!progress) {
      std::fprintf(stderr, "deadlock: %zu threads wait at a barrier that others never reach\n", running);
      std::abort();
    }
  }
}

inline void make_fiber(Fiber* fiber, Block* block, unsigned block_index, unsigned thread) {
  fiber->thread.x = thread;
  fiber->block_index.x = block_index;
  fiber->block = block;
  fiber->copies_at_once = machine.launches / 2 % 2;
  getcontext(&fiber->context);
  fiber->context.uc_stack.ss_sp = fiber->stack.get();
  fiber->context.uc_stack.ss_size = kStackBytes;
  makecontext(&fiber->context, run_fiber, 0);
  fiber->sanitizer = new_sanitizer();
}

// Runs `body` once per thread of the grid.
inline void run(dim3 grid, dim3 block, unsigned cluster, size_t shared_bytes, std::function<void()> body) {
  std::vector<Block> blocks(grid.x);
  std::vector<Fiber> fibers(grid.x * block.x);
  std::vector<Fiber*> order;
  machine.body = std::move(body);
  machine.grid = {int(fibers.size())};
  machine.shared_bytes = shared_bytes;
  for (unsigned b = 0; b < grid.x; ++b) {
    blocks[b].barrier = {int(block.x)};
    blocks[b].warps.assign(block.x / 32, Barrier{32});
    blocks[b].exchange.resize(block.x);
    blocks[b].fragments.resize(block.x);
    blocks[b].first_of_cluster = &blocks[b / cluster * cluster];
    blocks[b].cluster = {int(cluster * block.x)};
    blocks[b].shared.reset(new uint4[shared_bytes / sizeof(uint4)]);
    std::memset(blocks[b].shared.get(), 0xff, shared_bytes);
    for (unsigned t = 0; t < block.x; ++t) {
      order.push_back(&fibers[b * block.x + t]);
      make_fiber(order.back(), &blocks[b], b, t);
    }
  }
  machine.scheduler_sanitizer = this_sanitizer();
  release(&machine);
  schedule(order.data(), order.size(), block.x, machine.launches % 2);
  ++machine.launches;
  acquire(&machine);
  machine.grid_barriers = machine.grid.opened;
  for (Fiber& fiber : fibers) delete_sanitizer(fiber.sanitizer);
}

}  // namespace emulation

#define __device__
#define __global__
#define __launch_bounds__(...)
#define threadIdx (emulation::current().thread)
#define blockIdx (emulation::current().block_index)
#define shared_memory (emulation::current().block->shared.get())

inline void __syncthreads() { emulation::wait(&emulation::current().block->barrier); }

inline float __shfl_xor_sync(unsigned, float value, int mask) {
  const unsigned thread = threadIdx.x;
  emulation::Block& block = *emulation::current().block;
  return emulation::shuffle(&block.warps[thread / 32], block.exchange.data(), thread, value, mask);
}

namespace cooperative_groups {
struct grid_group {
  void sync() const { emulation::wait(&emulation::machine.grid); }
};
inline grid_group this_grid() { return {}; }
struct cluster_group {
  void sync() const { emulation::wait(&emulation::current().block->first_of_cluster->cluster); }
  template <typename T>
  T* map_shared_rank(T* address, int rank) const {
    const emulation::Block& own = *emulation::current().block;
    const ptrdiff_t offset = reinterpret_cast<const char*>(address) - reinterpret_cast<const char*>(own.shared.get());
    return reinterpret_cast<T*>(reinterpret_cast<char*>(own.first_of_cluster[rank].shared.get()) + offset);
  }
};
inline cluster_group this_cluster() { return {}; }
}  // namespace cooperative_groups

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes, size_t zeros = 0) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % bytes) {
    std::fprintf(stderr, "an asynchronous copy of %zu bytes is not aligned to them\n", bytes);
    std::abort();
  }
  emulation::Fiber& fiber = emulation::current();
  const emulation::Copy copy{to, from, bytes, zeros, fiber.copy_groups};
  if (fiber.copies_at_once) {
    copy.run();
  } else {
    fiber.copies.push_back(copy);
  }
}
inline void __pipeline_commit() { ++emulation::current().copy_groups; }
// All but the last `prior` groups have arrived; like the hardware's own, it cannot tell apart more than 8.
inline void __pipeline_wait_prior(int prior) {
  emulation::Fiber& fiber = emulation::current();
  auto& copies = fiber.copies;
  size_t done = 0;
  for (; done < copies.size() && copies[done].group < fiber.copy_groups - prior; ++done) copies[done].run();
  copies.erase(copies.begin(), copies.begin() + done);
}

template <typename T>
T __ldcs(const T* address) {
  return *address;
}
template <typename T>
T __ldcg(const T* address) {
  return *address;
}
template <typename T>
T __ldg(const T* address) {
  return *address;
}

inline float __uint_as_float(uint32_t bits) {
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
inline uint32_t __umulhi(uint32_t a, uint32_t b) { return uint32_t(uint64_t(a) * b >> 32); }
inline void fetch_to_l2(const void*, int64_t, int64_t) {}
inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) { return (word & mask) | bits; }

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __nv_bfloat162 {
  __nv_bfloat16 x, y;
};
struct __half {
  _Float16 value;
};
struct __half2 {
  __half x, y;
};

inline float __bfloat162float(__nv_bfloat16 value) { return __uint_as_float(uint32_t(value.bits) << 16); }
inline __nv_bfloat16 __float2bfloat16_rn(float value) {
  if (std::isnan(value)) return {0x7fff};
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline float __half2float(__half value) { return float(value.value); }
inline __half __float2half_rn(float value) { return {_Float16(value)}; }
inline float2 __bfloat1622float2(__nv_bfloat162 pair) { return {__bfloat162float(pair.x), __bfloat162float(pair.y)}; }
inline float2 __half22float2(__half2 pair) { return {__half2float(pair.x), __half2float(pair.y)}; }

template <typename Scalar>
void mma(float (&sums)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, Scalar) {
  const unsigned thread = threadIdx.x;
  emulation::Block& block = *emulation::current().block;
  const auto widen = [](uint16_t bits) {
    Scalar value;
    std::memcpy(&value, &bits, sizeof(value));
    if constexpr (std::is_same_v<Scalar, __half>)
      return __half2float(value);
    else
      return __bfloat162float(value);
  };
  emulation::mma(&block.warps[thread / 32], block.fragments.data() + thread / 32 * 32, thread % 32, sums,
                 {{a0, a1, a2, a3}, {b0, b1}}, widen);
}

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrClusterLaunch
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const emulation::Machine& m = emulation::machine;
  *value = attribute == cudaDevAttrMultiProcessorCount ? m.multiprocessors
           : attribute == cudaDevAttrClusterLaunch     ? int(m.clusters)
                                                       : m.shared_limit;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename Arguments>
cudaError_t launch(void (*kernel)(Arguments), dim3 grid, dim3 block, unsigned cluster, void** arguments,
                   size_t shared_bytes) {
  if (int(grid.x) > emulation::machine.multiprocessors || grid.x % cluster) return cudaErrorInvalidConfiguration;
  if (shared_bytes > size_t(emulation::machine.shared_limit)) return cudaErrorInvalidConfiguration;
  const Arguments& values = *static_cast<const Arguments*>(arguments[0]);
  emulation::run(grid, block, cluster, shared_bytes, [&] { kernel(values); });
  return cudaSuccess;
}
template <typename Arguments>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments,
                                        size_t shared_bytes, cudaStream_t) {
  return launch(kernel, grid, block, 1, arguments, shared_bytes);
}

enum cudaLaunchAttributeID { cudaLaunchAttributeCooperative, cudaLaunchAttributeClusterDimension };
struct cudaLaunchAttribute {
  cudaLaunchAttributeID id;
  struct {
    struct {
      unsigned x, y, z;
    } clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim{1}, blockDim{1};
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};
inline unsigned cluster_size(const cudaLaunchConfig_t& config) {
  for (unsigned i = 0; i < config.numAttrs; ++i)
    if (config.attrs[i].id == cudaLaunchAttributeClusterDimension) return config.attrs[i].val.clusterDim.x;
  return 1;
}
template <typename Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* count, Kernel, const cudaLaunchConfig_t* config) {
  return *count = emulation::machine.multiprocessors / cluster_size(*config), cudaSuccess;
}
template <typename Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Arguments), Arguments arguments) {
  bool cooperative = false;
  for (unsigned i = 0; i < config->numAttrs; ++i) cooperative |= config->attrs[i].id == cudaLaunchAttributeCooperative;
  if (!cooperative) return cudaErrorInvalidConfiguration;  // the grid barrier needs all blocks at once
  void* pointers[] = {&arguments};
  return launch(kernel, config->gridDim, config->blockDim, cluster_size(*config), pointers, config->dynamicSmemBytes);
}

// Just enough CUDA to run low_rank_decode.cu on the host, one cooperative launch at a time, every CUDA thread a fiber.
//
// A fiber runs until it meets a barrier (block, warp or grid) and then hands over to the next, so a barrier that some
// thread misses is found as a deadlock. Shared memory starts as NaN, one exact allocation per block. Four launches see
// the extremes of what a GPU may do: threads first to last or last to first, each with cp.async that arrives as late as
// it may, when its thread waits for it, or at once. Built with -fsanitize=thread the fibers are made known to the
// sanitizer as threads that only barriers order; it then reports every pair of accesses to shared or global memory that
// needs a barrier and has none.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
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

struct Block {
  Barrier barrier;
  std::vector<Barrier> warps;
  std::vector<float> exchange;  // one value per thread, for shuffles
  std::unique_ptr<uint4[]> shared;
};

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
};

constexpr size_t kStackBytes = 128 * 1024;

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  dim3 thread{0}, block_index{0};
  Block* block;
  std::vector<Copy> copies;  // issued, not yet done
  bool copies_at_once = false;
  Barrier* waits_for = nullptr;
  int ticket = 0;
  bool done = false;
  void* sanitizer = nullptr;
};

struct Machine {
  int multiprocessors = 3, shared_limit = 64 * 1024;  // what the launcher finds the device to have
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

EMULATOR void run_fiber() {
  acquire(&machine);
  machine.body();
  release(&machine);
  machine.current->done = true;
  switch_to(machine.scheduler_sanitizer);
  setcontext(&machine.scheduler);
}

EMULATOR void schedule(Fiber** fibers, size_t count, bool backwards) {
  size_t running = count;
  while (running > 0) {
    bool progress = false;
    for (size_t i = 0; i < count; ++i) {
      Fiber* fiber = fibers[backwards ? count - 1 - i : i];
      const bool waits = fiber->waits_for != nullptr && fiber->waits_for->opened == fiber->ticket;
      if (fiber->done || waits) continue;
      progress = true;
      machine.current = fiber;
      switch_to(fiber->sanitizer);
      swapcontext(&machine.scheduler, &fiber->context);
      running -= fiber->done;
    }
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
inline void run(dim3 grid, dim3 block, size_t shared_bytes, std::function<void()> body) {
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
    blocks[b].shared.reset(new uint4[shared_bytes / sizeof(uint4)]);
    std::memset(blocks[b].shared.get(), 0xff, shared_bytes);
    for (unsigned t = 0; t < block.x; ++t) {
      order.push_back(&fibers[b * block.x + t]);
      make_fiber(order.back(), &blocks[b], b, t);
    }
  }
  machine.scheduler_sanitizer = this_sanitizer();
  release(&machine);
  schedule(order.data(), order.size(), machine.launches % 2);
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
}  // namespace cooperative_groups

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  emulation::Fiber& fiber = emulation::current();
  if (fiber.copies_at_once) {
    std::memcpy(to, from, bytes);
  } else {
    fiber.copies.push_back({to, from, bytes});
  }
}
inline void __pipeline_commit() {}
inline void __pipeline_wait_prior(int) {
  auto& copies = emulation::current().copies;
  for (const auto& copy : copies) std::memcpy(copy.to, copy.from, copy.bytes);
  copies.clear();
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

inline float __bfloat162float(__nv_bfloat16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, sizeof(result));
  return result;
}
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

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrMaxSharedMemoryPerBlockOptin };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
using cudaStream_t = void*;

inline const char* cudaGetErrorString(cudaError_t) { return "emulated error"; }

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const bool count = attribute == cudaDevAttrMultiProcessorCount;
  *value = count ? emulation::machine.multiprocessors : emulation::machine.shared_limit;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
template <typename Arguments>
cudaError_t cudaLaunchCooperativeKernel(void (*kernel)(Arguments), dim3 grid, dim3 block, void** arguments,
                                        size_t shared_bytes, cudaStream_t) {
  if (int(grid.x) > emulation::machine.multiprocessors) return cudaErrorInvalidConfiguration;
  if (shared_bytes > size_t(emulation::machine.shared_limit)) return cudaErrorInvalidConfiguration;
  const Arguments& values = *static_cast<const Arguments*>(arguments[0]);
  emulation::run(grid, block, shared_bytes, [&] { kernel(values); });
  return cudaSuccess;
}

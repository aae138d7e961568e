#include "trellis.h"

#include <cstring>

#include "row_blocks.h"

namespace lorap::cpu {
namespace {

// Numbers of all windows, in the order of the windows.
const float* trellis_numbers() {
  struct alignas(64) Table {
    float values[kTrellisWindows];
  };
  static const Table table = [] {
    Table made;
    for (int window = 0; window < kTrellisWindows; ++window) {
      made.values[window] = static_cast<float>(trellis_number(window)) * kTrellisUnit;
    }
    return made;
  }();
  return table.values;
}

// Rings on all threads, whoever is free: each takes some 10 to 100 microseconds.
template <class Body>
void for_each_ring(ParallelFor parallel_for, int64_t threads, int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  auto work = [&] { body(next); };
  if (threads == 1 || count == 1) return work();
  parallel_for(
      0, std::min(threads, count), 1,
      [](int64_t, int64_t, void* context) { (*static_cast<decltype(work)*>(context))(); }, &work);
}

}  // namespace

void trellis_search(const TrellisKernel& kernel, ParallelFor parallel_for, int64_t threads,
                    const TrellisTargets& targets, int32_t* windows) {
  const int64_t tiles = (targets.rows + kTrellisRows - 1) / kTrellisRows, count = tiles * targets.cols;
  if (!count) return;
  for_each_ring(parallel_for, threads, count, [&](std::atomic<int64_t>& next) {
    const auto memory = scratch<float>(trellis_scratch(kernel.bits));
    for (int64_t ring; (ring = next.fetch_add(1, std::memory_order_relaxed)) < count;) {
      const int64_t first = ring / targets.cols * kTrellisRows, col = ring % targets.cols;
      float wanted[kTrellisRows] = {}, importance[kTrellisRows] = {};
      for (int64_t i = 0; i < std::min<int64_t>(kTrellisRows, targets.rows - first); ++i) {
        const int64_t row = first + i;
        importance[i] = targets.importance[row * targets.importance_strides[0] + col * targets.importance_strides[1]];
        if (importance[i] != 0)
          wanted[i] = targets.wanted[row * targets.wanted_strides[0] + col * targets.wanted_strides[1]];
      }
      int32_t found[kTrellisRows];
      kernel.search(trellis_numbers(), wanted, importance, memory.get(), found);
      for (int64_t i = 0; i < kTrellisRows; ++i) windows[(first + i) * targets.cols + col] = found[i];
    }
  });
}

const TrellisKernel* find_trellis_kernel(int bits, const char* isa) {
  if (isa && std::strncmp(isa, "avx512_", 7) == 0) isa = "avx512";  // there is nothing more in them for this
  const TrellisKernel* best_first[3] = {};
  int found = 0;
#if defined(__x86_64__)
  const Processor processor = this_processor();
#ifdef LORAP_HAVE_AVX512
  if (processor.avx512) best_first[found++] = avx512_trellis_kernel(bits);
#endif
#ifdef LORAP_HAVE_AVX2
  if (processor.avx2) best_first[found++] = avx2_trellis_kernel(bits);
#endif
#endif
  best_first[found++] = scalar_trellis_kernel(bits);
  for (const TrellisKernel* kernel : best_first) {
    if (kernel && (!isa || !*isa || std::strcmp(kernel->isa, isa) == 0)) return kernel;
  }
  return nullptr;
}

}  // namespace lorap::cpu

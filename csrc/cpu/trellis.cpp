#include "trellis.h"

#include <cstring>

#include "tile_input.h"

namespace lorap::cpu {
namespace {

static_assert(kTrellisRows == kBlock);  // Call::finish takes the dots of a tile

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

// Calls body(next) on all threads; who is free takes the next of `count` rings or tiles.
template <class Body>
void on_all_threads(ParallelFor parallel_for, int64_t threads, int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  auto work = [&] { body(next); };
  if (threads == 1 || count == 1) return work();
  parallel_for(
      0, std::min(threads, count), 1,
      [](int64_t, int64_t, void* context) { (*static_cast<decltype(work)*>(context))(); }, &work);
}

int64_t tiles_of(int64_t rows) { return (rows + kTrellisRows - 1) / kTrellisRows; }

// dots[token * kBlock + i] of all rows of a tile, whose scales are there.
void tile_dots(const TrellisKernel& kernel, const TrellisMatrix& weight, int64_t tile, const TileInput& input,
               const float* scales, float* dots) {
  constexpr int64_t kMore = 3;  // what may be written behind the last token
  const int64_t words = kTrellisRows * kernel.bits / 32;
  std::fill_n(dots, (input.tokens() + kMore) * kTrellisRows, 0.0f);
  for_blocks(weight, [&](int64_t k, int64_t columns, int64_t group, int64_t block) {
    kernel.dot(weight.words + tile * weight.word_stride + k * words, columns, input.column(k), input.tokens(),
               input.stride(), input.scales(block), scales + group * kTrellisRows, dots);
  });
  input.add_digits(kTrellisRows, dots);
}

// A product for tokens of one pass over its weight.
struct Part {
  Part(const TrellisProduct& product, const Call& call, const void* x)
      : product(product), call(call), input(call, product.weight, 1) {
    input.pack(x);
  }
  const TrellisProduct& product;
  Call call;
  TileInput input;

  void finish(int64_t tile, float* scales, float* loaded, float* dots) const {
    const TrellisMatrix& weight = product.weight;
    const int64_t row = tile * kTrellisRows, rows = std::min<int64_t>(kTrellisRows, weight.rows - row);
    load_scales(weight, row, rows, kTrellisUnit, loaded, scales);
    tile_dots(*product.kernel, weight, tile, input, scales, dots);
    call.finish(product.bias, row, row, rows, dots);
  }
};

void run_parts(Machine machine, const std::vector<Part>& parts) {
  int64_t tiles = 0, weights = 0, groups = 0;
  for (const Part& part : parts) {
    const TrellisMatrix& weight = part.product.weight;
    tiles += tiles_of(weight.rows);
    weights += weight.rows * weight.cols;
    groups = std::max(groups, groups_of(weight));
  }
  const int64_t threads = weights <= kGrainWeights ? 1 : machine.threads;
  on_all_threads(machine.parallel_for, threads, tiles, [&](std::atomic<int64_t>& next) {
    const auto scales = scratch<float>(groups * kTrellisRows), loaded = scratch<float>(groups * kTrellisRows),
               dots = scratch<float>((kTrellisTokens + 3) * kTrellisRows);
    for (int64_t tile; (tile = next.fetch_add(1, std::memory_order_relaxed)) < tiles;) {
      const Part* part = parts.data();
      for (int64_t own; tile >= (own = tiles_of(part->product.weight.rows)); ++part) tile -= own;
      part->finish(tile, scales.get(), loaded.get(), dots.get());
    }
  });
}

}  // namespace

void trellis_products(Machine machine, int64_t tokens, const TrellisProduct* products, int64_t count) {
  const int64_t element = machine.kernel->element_bytes;
  const int64_t most = element == sizeof(float) ? kTrellisTokens / 2 : kTrellisTokens;
  for (int64_t first = 0; first < tokens; first += most) {
    std::vector<Part> parts;
    parts.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      const TrellisProduct& one = products[i];
      const Call call{*machine.kernel, machine.parallel_for,
                      machine.threads, std::min(most, tokens - first),
                      element,         static_cast<char*>(one.y) + first * one.y_stride * element,
                      one.y_stride};
      const char* x = static_cast<const char*>(one.x) + first * one.weight.cols * element;
      parts.emplace_back(one, call, x);
    }
    run_parts(machine, parts);
  }
}

void trellis_weight(Machine machine, const TrellisKernel& kernel, const TrellisMatrix& weight, void* to) {
  const RowKernel& outer = *machine.kernel;
  const int64_t groups = groups_of(weight), words = kTrellisRows * kernel.bits / 32, element = outer.element_bytes;
  const int64_t threads = weight.rows * weight.cols <= kGrainWeights ? 1 : machine.threads;
  on_all_threads(machine.parallel_for, threads, tiles_of(weight.rows), [&](std::atomic<int64_t>& next) {
    const auto scales = scratch<float>(groups * kTrellisRows),
               values = scratch<float>(std::max(groups, kTrellisColumns) * kTrellisRows);
    for (int64_t tile; (tile = next.fetch_add(1, std::memory_order_relaxed)) < tiles_of(weight.rows);) {
      const int64_t row = tile * kTrellisRows, rows = std::min<int64_t>(kTrellisRows, weight.rows - row);
      load_scales(weight, row, rows, 1.0f, values.get(), scales.get());
      outer.store(scales.get(), groups * kTrellisRows, values.get());
      outer.load(values.get(), groups * kTrellisRows, scales.get());
      for_blocks(weight, [&](int64_t k, int64_t columns, int64_t group, int64_t) {
        kernel.columns(weight.words + tile * weight.word_stride + k * words, columns, outer.dtype == Dtype::kBFloat16,
                       scales.get() + group * kTrellisRows, values.get());
        char* of_column = static_cast<char*>(to) + (k * weight.rows + row) * element;
        for (int64_t i = 0; i < columns; ++i) {
          outer.store(values.get() + i * kTrellisRows, rows, of_column + i * weight.rows * element);
        }
      });
    }
  });
}

void trellis_search(const TrellisKernel& kernel, ParallelFor parallel_for, int64_t threads,
                    const TrellisTargets& targets, int32_t* windows) {
  const int64_t count = tiles_of(targets.rows) * targets.cols;
  if (!count) return;
  on_all_threads(parallel_for, threads, count, [&](std::atomic<int64_t>& next) {
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
  // There is nothing more in these for codes.
  if (isa && (std::strcmp(isa, "avx512_bf16") == 0 || std::strcmp(isa, "avx512_vnni") == 0)) isa = "avx512";
  const TrellisKernel* best_first[4] = {};
  int found = 0;
#if defined(__x86_64__)
  const Processor processor = this_processor();
#ifdef LORAP_HAVE_AVX512_VBMI
  if (processor.avx512 && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi"))
    best_first[found++] = avx512_vbmi_trellis_kernel(bits);
#endif
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

#include "trellis.h"

#include <cstring>

#include "row_blocks.h"

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

// x as the kernels want it, see TrellisKernel::dot.
class TrellisInput {
 public:
  TrellisInput(const Call& call, const void* x, int64_t k)
      : tokens_(call.tokens), group_(call.tokens > 2 ? 4 : call.tokens), k_(k) {
    const int64_t groups = (tokens_ + group_ - 1) / group_;
    data_ = scratch<float>(groups * stride());
    const auto values = scratch<float>(k);
    for (int64_t m = 0; m < groups * group_; ++m) {
      float* to = data_.get() + m / group_ * stride() + m % group_;
      if (m < tokens_) call.kernel.load(static_cast<const char*>(x) + m * k * call.element, k, values.get());
      for (int64_t i = 0; i < k; ++i) to[i * group_] = m < tokens_ ? values[i] : 0.0f;
    }
  }
  int64_t stride() const { return k_ * group_; }
  const float* column(int64_t k) const { return data_.get() + k * group_; }

 private:
  int64_t tokens_, group_, k_;
  std::unique_ptr<float[], Free> data_;
};

// Scales of a tile, (groups, 64), times the unit of the numbers.
void load_scales(const TrellisMatrix& weight, int64_t row, int64_t rows, int64_t groups, float* of_row, float* scales) {
  const int64_t element = weight.scale_kernel->element_bytes;
  for (int64_t i = 0; i < rows; ++i) {
    const char* from = static_cast<const char*>(weight.scales) + (row + i) * weight.scale_stride * element;
    weight.scale_kernel->load(from, groups, of_row);
    for (int64_t g = 0; g < groups; ++g) scales[g * kTrellisRows + i] = of_row[g] * kTrellisUnit;
  }
}

void tile_dots(const TrellisKernel& kernel, const TrellisMatrix& weight, int64_t tile, const TrellisInput& input,
               int64_t tokens, const float* scales, float* dots) {
  const int64_t words = kTrellisRows * kernel.bits / 32;
  int64_t columns;
  for (int64_t k = 0; k < weight.cols; k += columns) {
    const int64_t group = k / weight.group, end = std::min(weight.cols, (group + 1) * weight.group);
    columns = std::min(kTrellisColumns, end - k);
    kernel.dot(weight.words + tile * weight.word_stride + k * words, columns, input.column(k), tokens, input.stride(),
               scales + group * kTrellisRows, dots);
  }
}

int64_t groups_of(const TrellisMatrix& weight) { return weight.cols ? (weight.cols - 1) / weight.group + 1 : 0; }

// A product for tokens of one pass over its weight.
struct Part {
  const TrellisProduct& product;
  Call call;
  TrellisInput input;

  void finish(int64_t tile, float* scales, float* of_row, float* dots) const {
    const TrellisMatrix& weight = product.weight;
    const int64_t row = tile * kTrellisRows, rows = std::min<int64_t>(kTrellisRows, weight.rows - row);
    std::fill_n(scales, groups_of(weight) * kTrellisRows, 0.0f);
    load_scales(weight, row, rows, groups_of(weight), of_row, scales);
    std::fill_n(dots, kTrellisTokens * kTrellisRows, 0.0f);
    tile_dots(*product.kernel, weight, tile, input, call.tokens, scales, dots);
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
    const auto scales = scratch<float>(groups * kTrellisRows), of_row = scratch<float>(groups),
               dots = scratch<float>(kTrellisTokens * kTrellisRows);
    for (int64_t tile; (tile = next.fetch_add(1, std::memory_order_relaxed)) < tiles;) {
      const Part* part = parts.data();
      for (int64_t own; tile >= (own = tiles_of(part->product.weight.rows)); ++part) tile -= own;
      part->finish(tile, scales.get(), of_row.get(), dots.get());
    }
  });
}

}  // namespace

void trellis_products(Machine machine, int64_t tokens, const TrellisProduct* products, int64_t count) {
  const int64_t element = machine.kernel->element_bytes;
  for (int64_t first = 0; first < tokens; first += kTrellisTokens) {
    std::vector<Part> parts;
    parts.reserve(count);
    for (int64_t i = 0; i < count; ++i) {
      const TrellisProduct& one = products[i];
      const Call call{*machine.kernel, machine.parallel_for,
                      machine.threads, std::min(kTrellisTokens, tokens - first),
                      element,         static_cast<char*>(one.y) + first * one.y_stride * element,
                      one.y_stride};
      const char* x = static_cast<const char*>(one.x) + first * one.weight.cols * element;
      parts.push_back({one, call, TrellisInput(call, x, one.weight.cols)});
    }
    run_parts(machine, parts);
  }
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

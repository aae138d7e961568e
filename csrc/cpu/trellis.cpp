#include "trellis.h"

#include <bit>
#include <cstring>

#include "quantized_packing.h"
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

// Calls body(first column, columns, group, block) for what is multiplied together: columns of one group.
template <class Body>
void for_blocks(const TrellisMatrix& weight, const Body& body) {
  int64_t columns;
  for (int64_t k = 0, block = 0; k < weight.cols; k += columns, ++block) {
    const int64_t group = k / weight.group, end = std::min(weight.cols, (group + 1) * weight.group);
    columns = std::min(kTrellisColumns, end - k);
    body(k, columns, group, block);
  }
}

// The nearest whole number, of 16 bits: adding 1.5 * 2^23 leaves it in the low bits, as exp_negative has it.
int16_t nearest(float x) {
  const int32_t whole = std::bit_cast<int32_t>(x + 12582912.0f) - std::bit_cast<int32_t>(12582912.0f);
  return static_cast<int16_t>(std::min(whole, 32767));
}

// x as the kernels want it, see TrellisKernel::dot: a block of columns becomes numbers of 16 bits that share a power of
// two, which quantized.h has more about; of float32 what they leave becomes a second token of such numbers.
class TrellisInput {
 public:
  TrellisInput(const Call& call, const void* x, const TrellisMatrix& weight)
      : digits_(call.element == sizeof(float) ? 2 : 1),
        tokens_(call.tokens * digits_),
        together_(tokens_ > 2 ? 4 : tokens_),
        padded_((tokens_ + together_ - 1) / together_ * together_),
        stride_((weight.cols + 1) / 2 * together_ * 2),
        numbers_(scratch<int16_t>(padded_ / together_ * stride_)) {
    int64_t blocks = 0;
    for_blocks(weight, [&](auto...) { ++blocks; });
    scales_ = scratch<float>(blocks * padded_);
    std::fill_n(numbers_.get(), padded_ / together_ * stride_, int16_t{0});
    std::fill_n(scales_.get(), blocks * padded_, 0.0f);
    const auto values = scratch<float>(weight.cols);
    for (int64_t m = 0; m < call.tokens; ++m) {
      call.kernel.load(static_cast<const char*>(x) + m * weight.cols * call.element, weight.cols, values.get());
      for_blocks(weight, [&](int64_t k, int64_t columns, int64_t, int64_t block) {
        pack(values.get() + k, k, columns, m, scales_.get() + block * padded_);
      });
    }
  }
  int64_t digits() const { return digits_; }
  int64_t tokens() const { return tokens_; }
  int64_t stride() const { return stride_; }
  const int16_t* column(int64_t k) const { return numbers_.get() + k * together_; }  // k is even
  const float* scales(int64_t block) const { return scales_.get() + block * padded_; }

 private:
  void pack(float* values, int64_t k, int64_t columns, int64_t token, float* scales) {
    constexpr float kDigit = 32768.0f;
    float scale = block_scale<16>(values, columns), inverse = scale == scale ? 1.0f / scale : 0.0f;
    for (int64_t m = token * digits_; m < (token + 1) * digits_; ++m) {
      scales[m] = scale;
      int16_t rounded[kTrellisColumns];
      for (int64_t i = 0; i < columns; ++i) rounded[i] = nearest(values[i] * inverse);
      int16_t* to = numbers_.get() + m / together_ * stride_ + m % together_ * 2;
      for (int64_t i = 0; i < columns; ++i) {
        to[(k + i) / 2 * together_ * 2 + i % 2] = rounded[i];
        values[i] = (values[i] * inverse - rounded[i]) * kDigit;  // exact, as in quantized_packing.h
      }
      scale /= kDigit, inverse = 1.0f;
    }
  }

  int64_t digits_, tokens_, together_, padded_, stride_;
  std::unique_ptr<int16_t[], Free> numbers_;
  std::unique_ptr<float[], Free> scales_;
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

// dots[token * kBlock + i] of all rows of a tile, whose scales are there.
void tile_dots(const TrellisKernel& kernel, const TrellisMatrix& weight, int64_t tile, const TrellisInput& input,
               const float* scales, float* dots) {
  constexpr int64_t kMore = 3;  // what may be written behind the last token
  const int64_t words = kTrellisRows * kernel.bits / 32, digits = input.digits();
  std::fill_n(dots, (input.tokens() + kMore) * kTrellisRows, 0.0f);
  for_blocks(weight, [&](int64_t k, int64_t columns, int64_t group, int64_t block) {
    kernel.dot(weight.words + tile * weight.word_stride + k * words, columns, input.column(k), input.tokens(),
               input.stride(), input.scales(block), scales + group * kTrellisRows, dots);
  });
  for (int64_t m = 0; m < input.tokens() / digits && digits == 2; ++m) {
    const float *high = dots + 2 * m * kTrellisRows, *low = high + kTrellisRows;
    for (int64_t i = 0; i < kTrellisRows; ++i) dots[m * kTrellisRows + i] = high[i] + low[i];
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
    const auto scales = scratch<float>(groups * kTrellisRows), of_row = scratch<float>(groups),
               dots = scratch<float>((kTrellisTokens + 3) * kTrellisRows);
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
      parts.push_back({one, call, TrellisInput(call, x, one.weight)});
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

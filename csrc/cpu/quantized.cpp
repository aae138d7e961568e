#include "quantized.h"

#include <cstring>
#include <optional>

#include "tile_input.h"

namespace lorap::cpu {
namespace {

static_assert(kTileRows == kBlock);

// Whether rows are unpacked to memory for all tokens, of which float32 makes two each, in place of once for each four
// of them. The loop over single rows takes longer for each token where rows are short.
bool by_tiles(const QuantizedKernel& kernel, int64_t tokens, int64_t columns) {
  constexpr int64_t kEnds = 512;  // columns that would take as long as what is done once a row
  return kernel.tile && tokens > 4 && tokens * (columns + kEnds) > kernel.tile_tokens * columns;
}

// Inputs of a stage as whole numbers: one packed token for each token, two where x is float32.
class PackedNumbers {
 public:
  PackedNumbers(const QuantizedKernel& kernel, const Call& call, int digits, const QuantizedMatrix& weight)
      : kernel_(kernel), call_(call), digits_(digits), k_(weight.cols), group_(weight.group) {
    if (by_tiles(kernel, call.tokens * digits, weight.cols)) {
      tiles_.emplace(call, weight, kHalfWord / kernel.bits);
    } else {
      stride_ = kernel.packed_bytes(k_, group_);
      data_ = scratch<char>(call.tokens * digits * stride_);
    }
  }

  void pack(const void* x) {
    if (tiles_) return tiles_->pack(x);
    const auto values = scratch<float>(k_);
    for (int64_t m = 0; m < call_.tokens; ++m) {
      call_.kernel.load(static_cast<const char*>(x) + m * k_ * call_.element, k_, values.get());
      pack_one(m, values.get());
    }
  }
  void pack_float(const float* x) {
    if (tiles_) return tiles_->pack_float(x);
    for (int64_t m = 0; m < call_.tokens; ++m) pack_one(m, x + m * k_);
  }

  // dots[token * kBlock + i] of weight rows row + i.
  void dot(const QuantizedMatrix& weight, int64_t row, int64_t rows, float* dots) const {
    if (tiles_) return tile_dots(weight, row, rows, dots);
    const int64_t tokens = call_.tokens * digits_;
    kernel_.dot(weight, row, rows, data_.get(), stride_, tokens, dots, kBlock);
    for (int64_t m = 0; m < call_.tokens && digits_ == 2; ++m) {
      const float *high = dots + 2 * m * kBlock, *low = high + kBlock;
      for (int64_t i = 0; i < rows; ++i) dots[m * kBlock + i] = high[i] + low[i];
    }
  }

 private:
  static constexpr int kHalfWord = 16;  // bits

  void pack_one(int64_t token, const float* x) {
    kernel_.pack(x, k_, group_, digits_, data_.get() + token * digits_ * stride_, stride_);
  }

  void tile_dots(const QuantizedMatrix& weight, int64_t row, int64_t rows, float* dots) const {
    constexpr int64_t kMore = 3;        // what is written behind the last token
    constexpr int64_t kAhead = 4 * 32;  // bytes: of 4 bits, four blocks
    const int64_t groups = groups_of(weight), row_bytes = weight.word_stride * 4;
    const auto loaded = scratch<float>(groups * kTileRows), scales = scratch<float>(groups * kTileRows);
    load_scales(weight, row, rows, 1.0f, loaded.get(), scales.get());
    std::fill_n(dots, (tiles_->tokens() + kMore) / 4 * 4 * kTileRows, 0.0f);
    for_blocks(weight, [&](int64_t k, int64_t columns, int64_t group, int64_t block) {
      const int64_t word = k * kernel_.bits / 32, end = word * 4 + kAhead;
      // Behind the end of the rows comes the next tile.
      const int64_t ahead = end < row_bytes ? kAhead : kAhead - row_bytes + kTileRows * row_bytes;
      kernel_.tile(weight.words + row * weight.word_stride + word, weight.word_stride, rows, columns, ahead,
                   tiles_->column(k), tiles_->tokens(), tiles_->stride(), tiles_->scales(block),
                   scales.get() + group * kTileRows, dots);
    });
    tiles_->add_digits(rows, dots);
  }

  const QuantizedKernel& kernel_;
  const Call& call_;
  int digits_;
  int64_t k_, group_, stride_ = 0;
  std::unique_ptr<char[], Free> data_;
  std::optional<TileInput> tiles_;
};

int digits_of(const QuantizedMachine& machine) {
  return machine.outer.kernel->element_bytes == sizeof(float) && machine.kernel->activation_bits == 16 ? 2 : 1;
}

Rows rows_of(const QuantizedMachine& machine, const QuantizedMatrix& weight) {
  constexpr int kBitsOfOthers = 16;
  return {weight.rows, weight.cols * machine.kernel->bits / kBitsOfOthers + 1};
}

template <class Body>
void for_calls(const QuantizedMachine& machine, const void* x, int64_t tokens, int64_t k, void* y, int64_t out_features,
               const Body& body) {
  const int64_t digits = digits_of(machine),
                most = by_tiles(*machine.kernel, tokens * digits, k) ? kTileTokens : kMaxTokens;
  for_token_blocks(machine.outer, x, tokens, k, y, out_features, body, most / digits);
}

// Rows that a thread takes at least.
int64_t unit_of(const QuantizedMachine& machine, const Call& call) {
  return machine.kernel->tile && call.tokens * digits_of(machine) > 4 ? kTileRows : kUnit;
}

}  // namespace

void quantized_layers(QuantizedMachine machine, const void* x, int64_t tokens, const QuantizedLayer* layers,
                      int64_t count, void* y) {
  const QuantizedMatrix& reads_x = layers[0].low_rank ? layers[0].right : layers[0].left;
  std::vector<int64_t> first_output;
  std::vector<Rows> first_jobs, second_jobs;
  std::vector<int64_t> second_layers;
  int64_t out_features = 0, shrunk_size = 0;
  for (int64_t i = 0; i < count; ++i) {
    const QuantizedLayer& one = layers[i];
    first_output.push_back(out_features);
    out_features += one.left.rows;
    first_jobs.push_back(rows_of(machine, one.low_rank ? one.right : one.left));
    if (!one.low_rank) continue;
    second_jobs.push_back(rows_of(machine, one.left));
    second_layers.push_back(i);
    shrunk_size += one.right.rows;
  }
  for_calls(machine, x, tokens, reads_x.cols, y, out_features, [&](const Call& call, const void* some_x) {
    const auto shrunk = scratch<float>(call.tokens * shrunk_size);
    std::vector<float*> shrunk_of(count);
    for (int64_t i = 0, at = 0; i < count; ++i) {
      shrunk_of[i] = shrunk.get() + at;
      if (layers[i].low_rank) at += call.tokens * layers[i].right.rows;
    }
    PackedNumbers packed(*machine.kernel, call, digits_of(machine), reads_x);
    packed.pack(some_x);
    for_row_blocks(
        call, first_jobs,
        [&](size_t job, int64_t row, int64_t rows) {
          const QuantizedLayer& one = layers[job];
          float dots[kTileTokens * kBlock];
          packed.dot(one.low_rank ? one.right : one.left, row, rows, dots);
          if (!one.low_rank) return call.finish(one.bias, row, first_output[job] + row, rows, dots);
          for (int64_t m = 0; m < call.tokens; ++m) {
            std::memcpy(shrunk_of[job] + m * one.right.rows + row, dots + m * kBlock, rows * sizeof(float));
          }
        },
        unit_of(machine, call));
    std::vector<PackedNumbers> packed_ranks;
    for (const int64_t i : second_layers) {
      packed_ranks.emplace_back(*machine.kernel, call, digits_of(machine), layers[i].left);
      packed_ranks.back().pack_float(shrunk_of[i]);
    }
    for_row_blocks(
        call, second_jobs,
        [&](size_t job, int64_t row, int64_t rows) {
          const int64_t i = second_layers[job];
          float dots[kTileTokens * kBlock];
          packed_ranks[job].dot(layers[i].left, row, rows, dots);
          call.finish(layers[i].bias, row, first_output[i] + row, rows, dots);
        },
        unit_of(machine, call));
  });
}

void quantized_linear(QuantizedMachine machine, const void* x, int64_t tokens, const QuantizedMatrix& weight,
                      const void* bias, void* y) {
  const QuantizedLayer layer{false, {}, weight, bias};
  quantized_layers(machine, x, tokens, &layer, 1, y);
}

void quantized_low_rank_linear(QuantizedMachine machine, const void* x, int64_t tokens, const QuantizedMatrix& right,
                               const QuantizedMatrix& left, const void* bias, void* y) {
  const QuantizedLayer layer{true, right, left, bias};
  quantized_layers(machine, x, tokens, &layer, 1, y);
}

void quantized_silu_gated_linear(QuantizedMachine machine, const void* x, int64_t tokens, const QuantizedMatrix& gate,
                                 const QuantizedMatrix& up, void* y) {
  for_calls(machine, x, tokens, gate.cols, y, gate.rows, [&](const Call& call, const void* some_x) {
    PackedNumbers packed(*machine.kernel, call, digits_of(machine), gate);
    packed.pack(some_x);
    const Rows both{gate.rows, 2 * rows_of(machine, gate).weights};
    for_row_blocks(
        call, {both},
        [&](size_t, int64_t row, int64_t rows) {
          float gate_dots[kTileTokens * kBlock], up_dots[kTileTokens * kBlock];
          packed.dot(gate, row, rows, gate_dots);
          packed.dot(up, row, rows, up_dots);
          multiply_by_silu(call.tokens, rows, gate_dots, up_dots);
          call.finish(nullptr, row, row, rows, up_dots);
        },
        unit_of(machine, call));
  });
}

void quantized_weight(QuantizedMachine machine, const QuantizedMatrix& weight, void* to) {
  const RowKernel &kernel = *machine.outer.kernel, &of_scales = *weight.scale_kernel;
  const int64_t groups = weight.cols ? (weight.cols - 1) / weight.group + 1 : 0;
  const Call call{kernel, machine.outer.parallel_for, machine.outer.threads, 1, kernel.element_bytes, nullptr, 0};
  // A row is worth as much as its floats take to write.
  for_row_blocks(call, {{weight.rows, weight.cols}}, [&](size_t, int64_t row, int64_t rows) {
    const auto values = scratch<float>(weight.cols), scales = scratch<float>(groups);
    const auto rounded = scratch<float>(groups);
    for (int64_t i = row; i < row + rows; ++i) {
      const int64_t at = i * weight.scale_stride * of_scales.element_bytes;
      of_scales.load(static_cast<const char*>(weight.scales) + at, groups, scales.get());
      if (&of_scales != &kernel) {
        kernel.store(scales.get(), groups, rounded.get());
        kernel.load(rounded.get(), groups, scales.get());
      }
      machine.kernel->row(weight.words + i * weight.word_stride, weight.cols, weight.group, scales.get(), values.get());
      kernel.store(values.get(), weight.cols, static_cast<char*>(to) + i * weight.cols * kernel.element_bytes);
    }
  });
}

const QuantizedKernel* find_quantized_kernel(int bits, const char* isa, int activation_bits) {
  // There is nothing more in these for whole numbers.
  if (isa && std::strcmp(isa, "avx512_bf16") == 0) isa = "avx512";
  if (isa && std::strcmp(isa, "avx512_vbmi") == 0) isa = "avx512_vnni";
  const QuantizedKernel* best_first[6] = {};
  int found = 0;
#if defined(__x86_64__)
  const Processor processor = this_processor();
  const bool bytes = activation_bits == 8 && bits == 4;
#ifdef LORAP_HAVE_AVX512_VNNI
  if (bytes && processor.avx512 && __builtin_cpu_supports("avx512vnni"))
    best_first[found++] = avx512_vnni_bytes_kernel();
#endif
#ifdef LORAP_HAVE_AVX2
  if (bytes && processor.avx2) best_first[found++] = avx2_bytes_kernel();
#endif
#ifdef LORAP_HAVE_AVX512_VNNI
  if (processor.avx512 && __builtin_cpu_supports("avx512vnni"))
    best_first[found++] = avx512_vnni_quantized_kernel(bits);
#endif
#ifdef LORAP_HAVE_AVX512
  if (processor.avx512) best_first[found++] = avx512_quantized_kernel(bits);
#endif
#ifdef LORAP_HAVE_AVX2
  if (processor.avx2) best_first[found++] = avx2_quantized_kernel(bits);
#endif
#endif
  best_first[found++] = scalar_quantized_kernel(bits);
  for (const QuantizedKernel* kernel : best_first) {
    if (kernel && (!isa || !*isa || std::strcmp(kernel->isa, isa) == 0)) return kernel;
  }
  return nullptr;
}

}  // namespace lorap::cpu

#include "quantized.h"

#include <cstring>

#include "row_blocks.h"

namespace lorap::cpu {
namespace {

// Inputs of a stage as whole numbers: one packed token for each token, two where x is float32.
class PackedNumbers {
 public:
  PackedNumbers(const QuantizedKernel& kernel, const Call& call, int digits, int64_t k, int64_t group)
      : kernel_(kernel),
        call_(call),
        digits_(digits),
        k_(k),
        group_(group),
        stride_(kernel.packed_bytes(k, group)),
        data_(scratch<char>(call.tokens * digits * stride_)) {}

  void pack(const void* x) {
    const auto values = scratch<float>(k_);
    for (int64_t m = 0; m < call_.tokens; ++m) {
      call_.kernel.load(static_cast<const char*>(x) + m * k_ * call_.element, k_, values.get());
      pack_one(m, values.get());
    }
  }
  void pack_float(const float* x) {
    for (int64_t m = 0; m < call_.tokens; ++m) pack_one(m, x + m * k_);
  }

  // dots[token * kBlock + i] of weight rows row + i.
  void dot(const QuantizedMatrix& weight, int64_t row, int64_t rows, float* dots) const {
    const int64_t tokens = call_.tokens * digits_;
    kernel_.dot(weight, row, rows, data_.get(), stride_, tokens, dots, kBlock);
    for (int64_t m = 0; m < call_.tokens && digits_ == 2; ++m) {
      const float *high = dots + 2 * m * kBlock, *low = high + kBlock;
      for (int64_t i = 0; i < rows; ++i) dots[m * kBlock + i] = high[i] + low[i];
    }
  }

 private:
  void pack_one(int64_t token, const float* x) {
    kernel_.pack(x, k_, group_, digits_, data_.get() + token * digits_ * stride_, stride_);
  }
  const QuantizedKernel& kernel_;
  const Call& call_;
  int digits_;
  int64_t k_, group_, stride_;
  std::unique_ptr<char[], Free> data_;
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
  for_token_blocks(machine.outer, x, tokens, k, y, out_features, body, kMaxTokens / digits_of(machine));
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
    PackedNumbers packed(*machine.kernel, call, digits_of(machine), reads_x.cols, reads_x.group);
    packed.pack(some_x);
    for_row_blocks(call, first_jobs, [&](size_t job, int64_t row, int64_t rows) {
      const QuantizedLayer& one = layers[job];
      float dots[kMaxTokens * kBlock];
      packed.dot(one.low_rank ? one.right : one.left, row, rows, dots);
      if (!one.low_rank) return call.finish(one.bias, row, first_output[job] + row, rows, dots);
      for (int64_t m = 0; m < call.tokens; ++m) {
        std::memcpy(shrunk_of[job] + m * one.right.rows + row, dots + m * kBlock, rows * sizeof(float));
      }
    });
    std::vector<PackedNumbers> packed_ranks;
    for (const int64_t i : second_layers) {
      packed_ranks.emplace_back(*machine.kernel, call, digits_of(machine), layers[i].left.cols, layers[i].left.group);
      packed_ranks.back().pack_float(shrunk_of[i]);
    }
    for_row_blocks(call, second_jobs, [&](size_t job, int64_t row, int64_t rows) {
      const int64_t i = second_layers[job];
      float dots[kMaxTokens * kBlock];
      packed_ranks[job].dot(layers[i].left, row, rows, dots);
      call.finish(layers[i].bias, row, first_output[i] + row, rows, dots);
    });
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
    PackedNumbers packed(*machine.kernel, call, digits_of(machine), gate.cols, gate.group);
    packed.pack(some_x);
    const Rows both{gate.rows, 2 * rows_of(machine, gate).weights};
    for_row_blocks(call, {both}, [&](size_t, int64_t row, int64_t rows) {
      float gate_dots[kMaxTokens * kBlock], up_dots[kMaxTokens * kBlock];
      packed.dot(gate, row, rows, gate_dots);
      packed.dot(up, row, rows, up_dots);
      multiply_by_silu(call.tokens, rows, gate_dots, up_dots);
      call.finish(nullptr, row, row, rows, up_dots);
    });
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

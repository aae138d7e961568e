#include "decode.h"

#include <cstring>
#include <vector>

#include "row_blocks.h"

namespace lorap::cpu {
namespace {

// Inputs of a stage, in the order in which the kernel's registers hold the weights.
class PackedTokens {
 public:
  PackedTokens(const RowKernel& kernel, int64_t tokens, int64_t k)
      : kernel_(kernel),
        k_(k),
        stride_((k + kernel.step - 1) / kernel.step * kernel.step * kernel.packed_bytes),
        data_(scratch<char>(tokens * stride_)) {}
  void pack(int64_t token, const void* x) { kernel_.pack(x, k_, at(token)); }
  void pack_float(int64_t token, const float* x) { kernel_.pack_float(x, k_, at(token)); }
  const void* data() const { return data_.get(); }
  int64_t stride() const { return stride_; }

 private:
  void* at(int64_t token) { return data_.get() + token * stride_; }
  const RowKernel& kernel_;
  int64_t k_, stride_;
  std::unique_ptr<char[], Free> data_;
};

PackedTokens pack(const Call& call, const void* x, int64_t k) {
  PackedTokens packed(call.kernel, call.tokens, k);
  for (int64_t m = 0; m < call.tokens; ++m) packed.pack(m, static_cast<const char*>(x) + m * k * call.element);
  return packed;
}

PackedTokens pack_float(const Call& call, const float* x, int64_t k) {
  PackedTokens packed(call.kernel, call.tokens, k);
  for (int64_t m = 0; m < call.tokens; ++m) packed.pack_float(m, x + m * k);
  return packed;
}

void dot(const Call& call, const Matrix& weight, int64_t row, int64_t rows, const PackedTokens& x, float* dots) {
  const char* first = static_cast<const char*>(weight.data) + row * weight.stride * call.element;
  call.kernel.dot(first, weight.stride, rows, weight.cols, x.data(), x.stride(), call.tokens, dots, kBlock);
}

// Rows that are not pivots, ascending.
std::vector<int64_t> other_rows(const LowRankLayer& layer) {
  std::vector<int64_t> rows;
  rows.reserve(layer.left.rows);
  int64_t next_pivot = 0;
  for (int64_t row = 0; row < layer.out_features(); ++row) {
    if (next_pivot < layer.right.rows && layer.pivot_rows[next_pivot] == row) {
      ++next_pivot;
    } else {
      rows.push_back(row);
    }
  }
  return rows;
}

// Bias and output of rows that lie scattered; `rows[i]` counts from the layer's first output.
void finish_scattered(const Call& call, const LowRankLayer& layer, int64_t first_output, const int64_t* rows,
                      int64_t count, float* dots) {
  char rounded[kBlock * sizeof(float)];
  for (int64_t m = 0; m < call.tokens; ++m) {
    float* values = dots + m * kBlock;
    for (int64_t i = 0; layer.bias && i < count; ++i) {
      float bias;
      call.kernel.load(static_cast<const char*>(layer.bias) + rows[i] * call.element, 1, &bias);
      values[i] += bias;
    }
    call.kernel.store(values, count, rounded);
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(call.output(m, first_output + rows[i]), rounded + i * call.element, call.element);
    }
  }
}

using Shrunk = std::vector<std::unique_ptr<float[], Free>>;

// Stage 1 of a group: T of each layer, (tokens, rank) float32; pivot rows are finished here.
Shrunk shrink(const Call& call, const void* x, const LowRankLayer* layers, int64_t count, const int64_t* first_output) {
  Shrunk shrunk;
  std::vector<Rows> jobs;
  for (int64_t i = 0; i < count; ++i) {
    jobs.push_back({layers[i].right.rows, layers[i].right.cols});
    shrunk.push_back(scratch<float>(call.tokens * layers[i].right.rows));
  }
  const PackedTokens packed = pack(call, x, layers[0].right.cols);
  for_row_blocks(call, jobs, [&](size_t job, int64_t row, int64_t rows) {
    const int64_t rank = layers[job].right.rows;
    float dots[kMaxTokens * kBlock];
    dot(call, layers[job].right, row, rows, packed, dots);
    for (int64_t m = 0; m < call.tokens; ++m) {
      std::memcpy(shrunk[job].get() + m * rank + row, dots + m * kBlock, rows * sizeof(float));
    }
    if (layers[job].pivot_rows) {
      finish_scattered(call, layers[job], first_output[job], layers[job].pivot_rows + row, rows, dots);
    }
  });
  return shrunk;
}

void low_rank_block(const Call& call, const void* x, const LowRankLayer* layers, int64_t count) {
  std::vector<int64_t> first_output(count);
  std::vector<Rows> jobs;
  std::vector<std::vector<int64_t>> others(count);
  for (int64_t i = 0, next = 0; i < count; next += layers[i++].out_features()) {
    first_output[i] = next;
    jobs.push_back({layers[i].left.rows, layers[i].left.cols});
    if (layers[i].pivot_rows) others[i] = other_rows(layers[i]);
  }
  const Shrunk shrunk = shrink(call, x, layers, count, first_output.data());
  std::vector<PackedTokens> packed;
  for (int64_t i = 0; i < count; ++i) {
    packed.push_back(pack_float(call, shrunk[i].get(), layers[i].right.rows));
  }
  for_row_blocks(call, jobs, [&](size_t job, int64_t row, int64_t block) {
    const LowRankLayer& layer = layers[job];
    float dots[kMaxTokens * kBlock];
    dot(call, layer.left, row, block, packed[job], dots);
    if (layer.pivot_rows) {
      return finish_scattered(call, layer, first_output[job], others[job].data() + row, block, dots);
    }
    call.finish(layer.bias, row, first_output[job] + row, block, dots);
  });
}

// One stage: silu(gate_x gate^T + gate_bias) * (up_x up^T + up_bias).
void gated_stage(const Call& call, const PackedTokens& gate_x, const PackedTokens& up_x, Matrix gate, Matrix up,
                 const void* gate_bias, const void* up_bias) {
  for_row_blocks(call, {{gate.rows, gate.cols + up.cols}}, [&](size_t, int64_t row, int64_t rows) {
    float gate_dots[kMaxTokens * kBlock], up_dots[kMaxTokens * kBlock];
    dot(call, gate, row, rows, gate_x, gate_dots);
    dot(call, up, row, rows, up_x, up_dots);
    for (int64_t m = 0; m < call.tokens; ++m) {
      call.add_bias(gate_bias, row, rows, gate_dots + m * kBlock);
      call.add_bias(up_bias, row, rows, up_dots + m * kBlock);
    }
    multiply_by_silu(call.tokens, rows, gate_dots, up_dots);
    call.finish(nullptr, row, row, rows, up_dots);
  });
}

}  // namespace

void linear(Machine machine, const void* x, int64_t tokens, Matrix weight, const void* bias, void* y) {
  for_token_blocks(machine, x, tokens, weight.cols, y, weight.rows, [&](const Call& call, const void* some_x) {
    const PackedTokens packed = pack(call, some_x, weight.cols);
    for_row_blocks(call, {{weight.rows, weight.cols}}, [&](size_t, int64_t row, int64_t rows) {
      float dots[kMaxTokens * kBlock];
      dot(call, weight, row, rows, packed, dots);
      call.finish(bias, row, row, rows, dots);
    });
  });
}

void low_rank_linear(Machine machine, const void* x, int64_t tokens, const LowRankLayer* layers, int64_t count,
                     void* y) {
  int64_t out_features = 0;
  for (int64_t i = 0; i < count; ++i) out_features += layers[i].out_features();
  for_token_blocks(machine, x, tokens, layers[0].right.cols, y, out_features,
                   [&](const Call& call, const void* some_x) { low_rank_block(call, some_x, layers, count); });
}

void silu_gated_linear(Machine machine, const void* x, int64_t tokens, Matrix gate, Matrix up, const void* gate_bias,
                       const void* up_bias, void* y) {
  for_token_blocks(machine, x, tokens, gate.cols, y, gate.rows, [&](const Call& call, const void* some_x) {
    const PackedTokens packed = pack(call, some_x, gate.cols);
    gated_stage(call, packed, packed, gate, up, gate_bias, up_bias);
  });
}

void low_rank_silu_gated_linear(Machine machine, const void* x, int64_t tokens, const LowRankLayer& gate,
                                const LowRankLayer& up, void* y) {
  const LowRankLayer layers[2] = {gate, up};
  const int64_t first_output[2] = {0, 0};
  for_token_blocks(machine, x, tokens, gate.right.cols, y, gate.left.rows, [&](const Call& call, const void* some_x) {
    const Shrunk shrunk = shrink(call, some_x, layers, 2, first_output);
    gated_stage(call, pack_float(call, shrunk[0].get(), gate.right.rows),
                pack_float(call, shrunk[1].get(), up.right.rows), gate.left, up.left, gate.bias, up.bias);
  });
}

const RowKernel* find_kernel(Dtype dtype, const char* isa) {
  // There is nothing more in these for floats.
  if (isa && (std::strcmp(isa, "avx512_vnni") == 0 || std::strcmp(isa, "avx512_vbmi") == 0)) isa = "avx512";
  const RowKernel* best_first[4] = {};
  int found = 0;
#if defined(__x86_64__)
  const Processor processor = this_processor();
#ifdef LORAP_HAVE_AVX512_BF16
  if (processor.avx512 && __builtin_cpu_supports("avx512bf16")) best_first[found++] = avx512_bf16_kernel(dtype);
#endif
#ifdef LORAP_HAVE_AVX512
  if (processor.avx512) best_first[found++] = avx512_kernel(dtype);
#endif
#ifdef LORAP_HAVE_AVX2
  if (processor.avx2) best_first[found++] = avx2_kernel(dtype);
#endif
#endif
  best_first[found++] = scalar_kernel(dtype);
  for (const RowKernel* kernel : best_first) {
    if (kernel && (!isa || !*isa || std::strcmp(kernel->isa, isa) == 0)) return kernel;
  }
  return nullptr;
}

}  // namespace lorap::cpu

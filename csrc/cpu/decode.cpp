#include "decode.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

namespace lorap::cpu {
namespace {

// Rows whose outputs are finished together: bias, activation and rounding run over vectors of this length.
constexpr int64_t kBlock = 16;

// Weights that are worth waking another thread for (about 5 us of reading from memory).
constexpr int64_t kGrainWeights = 1 << 16;

// Weights that a thread takes at a time: long enough to stream, short enough that none waits long for the last.
constexpr int64_t kChunkWeights = 1 << 16;

struct Free {
  void operator()(void* p) const { std::free(p); }
};

template <class T>
std::unique_ptr<T[], Free> scratch(int64_t count) {
  constexpr size_t kAlignment = 64;  // a cache line, and the widest vector
  const size_t bytes = (std::max<int64_t>(count, 1) * sizeof(T) + kAlignment - 1) / kAlignment * kAlignment;
  void* memory = std::aligned_alloc(kAlignment, bytes);
  if (!memory) throw std::bad_alloc();
  return std::unique_ptr<T[], Free>(static_cast<T*>(memory));
}

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

// One call: up to kMaxTokens tokens, one dtype.
struct Call {
  const RowKernel& kernel;
  ParallelFor parallel_for;
  int64_t threads;
  int64_t tokens;
  int64_t element;  // bytes of one element of x, weights and y
  char* y;          // (tokens, out_features)
  int64_t out_features;

  char* output(int64_t token, int64_t row) const { return y + (token * out_features + row) * element; }

  PackedTokens pack(const void* x, int64_t k) const {
    PackedTokens packed(kernel, tokens, k);
    for (int64_t m = 0; m < tokens; ++m) packed.pack(m, static_cast<const char*>(x) + m * k * element);
    return packed;
  }
  PackedTokens pack_float(const float* x, int64_t k) const {
    PackedTokens packed(kernel, tokens, k);
    for (int64_t m = 0; m < tokens; ++m) packed.pack_float(m, x + m * k);
    return packed;
  }
  void dot(const Matrix& weight, int64_t row, int64_t rows, const PackedTokens& x, float* dots) const {
    const char* first = static_cast<const char*>(weight.data) + row * weight.stride * element;
    kernel.dot(first, weight.stride, rows, weight.cols, x.data(), x.stride(), tokens, dots, kBlock);
  }
  // Adds bias[row ...] to dots[count] where there is a bias.
  void add_bias(const void* bias, int64_t row, int64_t count, float* dots) const {
    if (!bias) return;
    float values[kBlock];
    kernel.load(static_cast<const char*>(bias) + row * element, count, values);
    for (int64_t i = 0; i < count; ++i) dots[i] += values[i];
  }
};

// Rows of one weight in a parallel loop over the rows of several.
struct Rows {
  int64_t count;
  int64_t weights;  // in each
};

// Calls body(job, row, rows) for blocks of rows of several weights. Threads take a chunk at a time, whoever is free: a
// thread that wakes up late, or shares its core with another program, does less. Chunks are whole blocks, so the same
// rows share a tile, and round alike, with any number of threads.
template <class Body>
void for_row_blocks(const Call& call, const std::vector<Rows>& jobs, const Body& body) {
  int64_t weights = 0, chunks = 0;
  std::vector<int64_t> chunk_rows;  // of each job
  for (const Rows& job : jobs) {
    const int64_t blocks = kChunkWeights / (kBlock * std::max<int64_t>(job.weights, 1)) + 1;
    chunk_rows.push_back(blocks * kBlock);
    chunks += (job.count + chunk_rows.back() - 1) / chunk_rows.back();
    weights += job.count * job.weights;
  }
  auto run_chunk = [&](int64_t chunk) {
    size_t job = 0;
    for (int64_t before; chunk >= (before = (jobs[job].count + chunk_rows[job] - 1) / chunk_rows[job]); ++job) {
      chunk -= before;
    }
    const int64_t last = std::min((chunk + 1) * chunk_rows[job], jobs[job].count);
    for (int64_t row = chunk * chunk_rows[job]; row < last; row += kBlock) body(job, row, std::min(kBlock, last - row));
  };
  std::atomic<int64_t> next{0};
  auto work = [&] {
    for (int64_t chunk; (chunk = next.fetch_add(1, std::memory_order_relaxed)) < chunks;) run_chunk(chunk);
  };
  if (weights <= kGrainWeights || call.threads == 1) return work();
  call.parallel_for(
      0, call.threads, 1, [](int64_t, int64_t, void* context) { (*static_cast<decltype(work)*>(context))(); }, &work);
}

float silu(float x) { return x / (1.0f + std::exp(-x)); }

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
  const PackedTokens packed = call.pack(x, layers[0].right.cols);
  for_row_blocks(call, jobs, [&](size_t job, int64_t row, int64_t rows) {
    const int64_t rank = layers[job].right.rows;
    float dots[kMaxTokens * kBlock];
    call.dot(layers[job].right, row, rows, packed, dots);
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
    packed.push_back(call.pack_float(shrunk[i].get(), layers[i].right.rows));
  }
  for_row_blocks(call, jobs, [&](size_t job, int64_t row, int64_t block) {
    const LowRankLayer& layer = layers[job];
    float dots[kMaxTokens * kBlock];
    call.dot(layer.left, row, block, packed[job], dots);
    if (layer.pivot_rows) {
      return finish_scattered(call, layer, first_output[job], others[job].data() + row, block, dots);
    }
    for (int64_t m = 0; m < call.tokens; ++m) {
      call.add_bias(layer.bias, row, block, dots + m * kBlock);
      call.kernel.store(dots + m * kBlock, block, call.output(m, first_output[job] + row));
    }
  });
}

// One stage: silu(gate_x gate^T + gate_bias) * (up_x up^T + up_bias).
void gated_stage(const Call& call, const PackedTokens& gate_x, const PackedTokens& up_x, Matrix gate, Matrix up,
                 const void* gate_bias, const void* up_bias) {
  for_row_blocks(call, {{gate.rows, gate.cols + up.cols}}, [&](size_t, int64_t row, int64_t rows) {
    float gate_dots[kMaxTokens * kBlock], up_dots[kMaxTokens * kBlock];
    call.dot(gate, row, rows, gate_x, gate_dots);
    call.dot(up, row, rows, up_x, up_dots);
    for (int64_t m = 0; m < call.tokens; ++m) {
      float *g = gate_dots + m * kBlock, *u = up_dots + m * kBlock;
      call.add_bias(gate_bias, row, rows, g);
      call.add_bias(up_bias, row, rows, u);
      for (int64_t i = 0; i < rows; ++i) u[i] *= silu(g[i]);
      call.kernel.store(u, rows, call.output(m, row));
    }
  });
}

// Splits the tokens into calls of at most kMaxTokens.
template <class Body>
void for_token_blocks(Machine machine, const void* x, int64_t tokens, int64_t k, void* y, int64_t out_features,
                      const Body& body) {
  const int64_t element = machine.kernel->element_bytes;
  if (!out_features) return;  // any number of tokens without an output
  for (int64_t first = 0; first < tokens; first += kMaxTokens) {
    const Call call{*machine.kernel, machine.parallel_for,
                    machine.threads, std::min(kMaxTokens, tokens - first),
                    element,         static_cast<char*>(y) + first * out_features * element,
                    out_features};
    body(call, static_cast<const char*>(x) + first * k * element);
  }
}

}  // namespace

void linear(Machine machine, const void* x, int64_t tokens, Matrix weight, const void* bias, void* y) {
  for_token_blocks(machine, x, tokens, weight.cols, y, weight.rows, [&](const Call& call, const void* some_x) {
    const PackedTokens packed = call.pack(some_x, weight.cols);
    for_row_blocks(call, {{weight.rows, weight.cols}}, [&](size_t, int64_t row, int64_t rows) {
      float dots[kMaxTokens * kBlock];
      call.dot(weight, row, rows, packed, dots);
      for (int64_t m = 0; m < call.tokens; ++m) {
        call.add_bias(bias, row, rows, dots + m * kBlock);
        call.kernel.store(dots + m * kBlock, rows, call.output(m, row));
      }
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
    const PackedTokens packed = call.pack(some_x, gate.cols);
    gated_stage(call, packed, packed, gate, up, gate_bias, up_bias);
  });
}

void low_rank_silu_gated_linear(Machine machine, const void* x, int64_t tokens, const LowRankLayer& gate,
                                const LowRankLayer& up, void* y) {
  const LowRankLayer layers[2] = {gate, up};
  const int64_t first_output[2] = {0, 0};
  for_token_blocks(machine, x, tokens, gate.right.cols, y, gate.left.rows, [&](const Call& call, const void* some_x) {
    const Shrunk shrunk = shrink(call, some_x, layers, 2, first_output);
    gated_stage(call, call.pack_float(shrunk[0].get(), gate.right.rows),
                call.pack_float(shrunk[1].get(), up.right.rows), gate.left, up.left, gate.bias, up.bias);
  });
}

const RowKernel* find_kernel(Dtype dtype, const char* isa) {
  const RowKernel* best_first[4] = {};
  int found = 0;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl");
#ifdef LORAP_HAVE_AVX512_BF16
  if (avx512 && __builtin_cpu_supports("avx512bf16")) best_first[found++] = avx512_bf16_kernel(dtype);
#endif
#ifdef LORAP_HAVE_AVX512
  if (avx512) best_first[found++] = avx512_kernel(dtype);
#endif
#ifdef LORAP_HAVE_AVX2
  if (avx2) best_first[found++] = avx2_kernel(dtype);
#endif
#endif
  best_first[found++] = scalar_kernel(dtype);
  for (const RowKernel* kernel : best_first) {
    if (kernel && (!isa || !*isa || std::strcmp(kernel->isa, isa) == 0)) return kernel;
  }
  return nullptr;
}

}  // namespace lorap::cpu

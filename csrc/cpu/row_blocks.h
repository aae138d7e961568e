// What the ops of decode.cpp and quantized.cpp share: calls of a few tokens, and loops over blocks of rows on all
// threads. Not for the files of an instruction set: these may share no template with others.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdlib>
#include <memory>
#include <new>
#include <vector>

#include "decode.h"

namespace lorap::cpu {

// Rows that are read, and whose outputs are finished, together: bias, activation and rounding run over vectors of this
// length. At one token 64 are 1.1 times as fast as 16 with 1024 bfloat16 columns and 1.5 times with 288, on Zen 2 (the
// streams of dot_tile.h are longer), and even with 4096.
constexpr int64_t kBlock = 64;

// Weights of 16 bits that are worth waking another thread for (about 5 us of reading from memory).
constexpr int64_t kGrainWeights = 1 << 16;

// Weights of 16 bits that a thread takes at a time: long enough to stream, short enough that none waits long for the
// last.
constexpr int64_t kChunkWeights = 1 << 16;

// Rows of a chunk are a multiple of it.
constexpr int64_t kUnit = 16;

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

// One call: a few tokens, one dtype.
struct Call {
  const RowKernel& kernel;
  ParallelFor parallel_for;
  int64_t threads;
  int64_t tokens;
  int64_t element;  // bytes of one element of x, biases and y
  char* y;          // (tokens, out_features)
  int64_t out_features;

  char* output(int64_t token, int64_t row) const { return y + (token * out_features + row) * element; }

  // Adds bias[row ...] to dots[count] where there is a bias.
  void add_bias(const void* bias, int64_t row, int64_t count, float* dots) const {
    if (!bias) return;
    float values[kBlock];
    kernel.load(static_cast<const char*>(bias) + row * element, count, values);
    for (int64_t i = 0; i < count; ++i) dots[i] += values[i];
  }

  // Outputs first ... of all tokens from dots[token * kBlock + i], with the bias from bias_row on.
  void finish(const void* bias, int64_t bias_row, int64_t first, int64_t count, float* dots) const {
    for (int64_t m = 0; m < tokens; ++m) {
      add_bias(bias, bias_row, count, dots + m * kBlock);
      kernel.store(dots + m * kBlock, count, output(m, first));
    }
  }
};

inline float silu(float x) { return x / (1.0f + std::exp(-x)); }

// up = silu(gate) * up, for a block of rows of all tokens.
inline void multiply_by_silu(int64_t tokens, int64_t count, const float* gate, float* up) {
  for (int64_t m = 0; m < tokens; ++m) {
    for (int64_t i = m * kBlock; i < m * kBlock + count; ++i) up[i] *= silu(gate[i]);
  }
}

// Rows of one weight in a parallel loop over the rows of several.
struct Rows {
  int64_t count;
  int64_t weights;  // in each, as if they had 16 bits
};

// Calls body(job, row, rows) for blocks of rows of several weights. Threads take a chunk at a time, whoever is free: a
// thread that wakes up late, or shares its core with another program, does less. Chunks are whole blocks, or one
// smaller block of whole units where rows are long, so the same rows share a tile, and round alike, with any number of
// threads.
template <class Body>
void for_row_blocks(const Call& call, const std::vector<Rows>& jobs, const Body& body, int64_t unit = kUnit) {
  int64_t weights = 0, chunks = 0;
  std::vector<int64_t> chunk_rows;  // of each job
  for (const Rows& job : jobs) {
    const int64_t rows = kChunkWeights / std::max<int64_t>(job.weights, 1) + 1, whole = rows < kBlock ? unit : kBlock;
    chunk_rows.push_back((rows + whole - 1) / whole * whole);
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

// Splits the tokens into calls of at most `most`.
template <class Body>
void for_token_blocks(Machine machine, const void* x, int64_t tokens, int64_t k, void* y, int64_t out_features,
                      const Body& body, int64_t most = kMaxTokens) {
  const int64_t element = machine.kernel->element_bytes;
  if (!out_features) return;  // any number of tokens without an output
  for (int64_t first = 0; first < tokens; first += most) {
    const Call call{*machine.kernel, machine.parallel_for,
                    machine.threads, std::min(most, tokens - first),
                    element,         static_cast<char*>(y) + first * out_features * element,
                    out_features};
    body(call, static_cast<const char*>(x) + first * k * element);
  }
}

#if defined(__x86_64__)
struct Processor {
  bool avx2, avx512;
};

// What the files avx2.cpp and avx512.cpp need.
inline Processor this_processor() {
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  return {avx2, avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                    __builtin_cpu_supports("avx512vl")};
}
#endif

}  // namespace lorap::cpu

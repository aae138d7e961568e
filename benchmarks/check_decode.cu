// The kernels of csrc/cuda on a GPU without torch: values against double, one cudaMalloc for each tensor, so that
// compute-sanitizer sees the first byte beyond each, and starts in a second. Also times a launch in a graph.
// benchmarks/gpu_check.sh builds and runs it:
//
//   check_decode [quick]      quick: without the large shapes, for a sanitizer
//
// Never run on a GPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "low_rank_decode.h"

namespace {

void check(cudaError_t error, int line) {
  if (error == cudaSuccess) return;
  std::printf("line %d: %s\n", line, cudaGetErrorString(error));
  std::exit(3);
}
#define CHECK(call) check(call, __LINE__)

float uniform() {  // in [-1, 1), the same on every machine
  static unsigned long long state = 1;
  state = state * 6364136223846793005ull + 1442695040888963407ull;
  return float(int(state >> 32)) / 2147483648.0f;
}

template <typename T>
struct Type;
template <>
struct Type<__nv_bfloat16> {
  static constexpr auto kName = "bf16";
  static constexpr auto kDecode = lorap::DecodeType::kBFloat16;
  static constexpr double kLimit = 4e-3;
  static __nv_bfloat16 narrow(float value) { return __float2bfloat16(value); }
  static float widen(__nv_bfloat16 value) { return __bfloat162float(value); }
};
template <>
struct Type<__half> {
  static constexpr auto kName = "fp16";
  static constexpr auto kDecode = lorap::DecodeType::kFloat16;
  static constexpr double kLimit = 6e-4;
  static __half narrow(float value) { return __float2half(value); }
  static float widen(__half value) { return __half2float(value); }
};

template <typename T>
struct Device {
  T* data;
  explicit Device(const std::vector<T>& host) {
    CHECK(cudaMalloc(&data, std::max<size_t>(host.size(), 1) * sizeof(T)));
    CHECK(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data); }
};

using Decode = decltype(lorap::low_rank_decode);

struct Size {
  int64_t r, n;
  bool bias, pivoted;
  int bits = 16;
  int64_t group = 64;  // of weights in 8 and 4 bits
  int64_t left_rows() const { return pivoted ? n - r : n; }
};

struct Case {
  int64_t m, k;
  std::vector<Size> layers;
};

// A matrix of random weights (rows, columns), each in [-1, 1): of 16 bits, or packed ones and their scales.
template <typename T>
struct Factor {
  std::vector<float> weights;
  std::vector<T> plain, scales;
  std::vector<uint32_t> packed;

  Factor(int64_t rows, int64_t columns, int bits, int64_t group) : weights(rows * columns) {
    const int64_t groups = (columns + group - 1) / group, half = 1 << (bits - 1);
    if (bits != 16) packed.resize(rows * columns * bits / 32);
    for (int64_t i = 0; i < rows * columns; ++i) {
      if (bits == 16) {
        plain.push_back(Type<T>::narrow(uniform()));
        weights[i] = Type<T>::widen(plain.back());
        continue;
      }
      if (i % columns % group == 0) scales.push_back(Type<T>::narrow((0.75f + 0.25f * uniform()) / float(half)));
      const int64_t number = int64_t(std::floor(uniform() * float(half)));
      packed[i * bits / 32] |= uint32_t(number + half) << i * bits % 32;
      weights[i] = float(number) * Type<T>::widen(scales[i / columns * groups + i % columns / group]);
    }
  }
};

template <typename T>
struct OnDevice {
  Device<T> plain, scales;
  Device<uint32_t> packed;
  explicit OnDevice(const Factor<T>& factor) : plain(factor.plain), scales(factor.scales), packed(factor.packed) {}
};

template <typename T>
struct Layer {
  Size size;
  Factor<T> right, left;
  std::vector<T> bias;
  std::vector<int64_t> pivots;
  OnDevice<T> on_right, on_left;
  Device<T> on_bias;
  Device<int64_t> on_pivots;
  Device<float> shrunk;

  Layer(const Size& size, int64_t m, int64_t k)
      : size(size),
        right(size.r, k, size.bits, size.group),
        left(size.left_rows(), size.r, size.bits, size.group),
        bias(random(size.n)),
        pivots(rows(size)),
        on_right(right),
        on_left(left),
        on_bias(bias),
        on_pivots(pivots),
        shrunk(std::vector<float>(m * size.r, NAN)) {}

  static std::vector<T> random(int64_t count) {
    std::vector<T> values(count);
    for (auto& value : values) value = Type<T>::narrow(uniform());
    return values;
  }
  static std::vector<int64_t> rows(const Size& size) {
    std::vector<int64_t> pivots(size.r);
    for (int64_t i = 0; i < size.r; ++i) pivots[i] = i * size.n / size.r;
    return pivots;
  }

  lorap::DecodeLayer argument(T* y, int64_t stride) const {
    const bool packed = size.bits != 16;
    return {packed ? static_cast<const void*>(on_right.packed.data) : on_right.plain.data,
            packed ? static_cast<const void*>(on_left.packed.data) : on_left.plain.data,
            size.bias ? on_bias.data : nullptr,
            size.pivoted ? on_pivots.data : nullptr,
            shrunk.data,
            y,
            size.n,
            size.r,
            stride,
            size.bits,
            size.group,
            on_right.scales.data,
            on_left.scales.data};
  }

  // Adds the squares of the errors and of the values of one token; x (K,), y (N,).
  void compare(const T* x, const T* y, int64_t k, double* error, double* norm) const {
    const auto widen = Type<T>::widen;
    std::vector<double> exact(size.r);
    for (int64_t i = 0; i < size.r; ++i)
      for (int64_t j = 0; j < k; ++j) exact[i] += double(widen(x[j])) * right.weights[i * k + j];
    for (int64_t o = 0, pivot = 0, row = 0; o < size.n; ++o) {
      double sum = size.bias ? widen(bias[o]) : 0;
      if (size.pivoted && pivot < size.r && pivots[pivot] == o) {
        sum += exact[pivot++];
      } else {
        for (int64_t i = 0; i < size.r; ++i) sum += left.weights[row * size.r + i] * exact[i];
        ++row;
      }
      const double found = widen(y[o]);
      *error += std::isfinite(found) ? (found - sum) * (found - sum) : INFINITY;
      *norm += sum * sum;
    }
  }
};

// Microseconds of one of 100 launches in a graph. All of them read the same weights, which may stay in L2.
float time_of(Decode* decode, const lorap::LowRankDecode& problem, lorap::DecodeType type, cudaStream_t stream) {
  cudaGraph_t graph;
  cudaGraphExec_t launches;
  cudaEvent_t start, end;
  float milliseconds;
  CHECK(cudaEventCreate(&start));
  CHECK(cudaEventCreate(&end));
  CHECK(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
  for (int i = 0; i < 100; ++i) CHECK(decode(problem, type, stream));
  CHECK(cudaStreamEndCapture(stream, &graph));
  CHECK(cudaGraphInstantiate(&launches, graph, 0));
  for (int i = 0; i < 2; ++i) {
    CHECK(cudaEventRecord(start, stream));
    CHECK(cudaGraphLaunch(launches, stream));
    CHECK(cudaEventRecord(end, stream));
    CHECK(cudaStreamSynchronize(stream));
  }
  CHECK(cudaEventElapsedTime(&milliseconds, start, end));
  CHECK(cudaGraphExecDestroy(launches));
  CHECK(cudaGraphDestroy(graph));
  return milliseconds * 10;
}

template <typename T>
bool run(const Case& c, bool time, Decode* decode = lorap::low_rank_decode) {
  const auto x = Layer<T>::random(c.m * c.k);
  std::vector<std::unique_ptr<Layer<T>>> layers;
  int64_t columns = 0;
  for (const Size& size : c.layers) {
    layers.push_back(std::make_unique<Layer<T>>(size, c.m, c.k));
    columns += size.n;
  }
  std::vector<T> y(c.m * columns);
  std::memset(static_cast<void*>(y.data()), 0xff, y.size() * sizeof(T));  // NaN
  const Device<T> on_x(x), on_y(y);
  lorap::LowRankDecode problem{on_x.data, c.m, c.k, int(layers.size()), {}};
  for (size_t i = 0, column = 0; i < layers.size(); column += c.layers[i++].n)
    problem.layers[i] = layers[i]->argument(on_y.data + column, columns);
  cudaStream_t stream;
  CHECK(cudaStreamCreate(&stream));
  bool differs = false;
  std::vector<T> first;
  for (int launch = 0; launch < 3; ++launch) {
    CHECK(decode(problem, Type<T>::kDecode, stream));
    CHECK(cudaStreamSynchronize(stream));
    CHECK(cudaMemcpy(y.data(), on_y.data, y.size() * sizeof(T), cudaMemcpyDeviceToHost));
    if (launch == 0) first = y;
    differs |= std::memcmp(first.data(), y.data(), y.size() * sizeof(T)) != 0;
  }
  double worst = 0;
  std::printf("%s%s M=%d K=%d", Type<T>::kName, decode == lorap::low_rank_decode_mma ? " mma" : "", int(c.m), int(c.k));
  for (size_t i = 0, column = 0; i < layers.size(); column += c.layers[i++].n) {
    const Size& size = c.layers[i];
    double error = 0, norm = 0;
    for (int64_t m = 0; m < c.m; ++m)
      layers[i]->compare(x.data() + m * c.k, y.data() + m * columns + column, c.k, &error, &norm);
    worst = std::max(worst, error == 0 ? 0.0 : std::sqrt(error / norm));
    std::printf("%s R=%d N=%d%s%s", i ? " and" : "", int(size.r), int(size.n), size.bias ? " bias" : "",
                size.pivoted ? " pivoted" : "");
    if (size.bits != 16) std::printf(" %d bits in groups of %d", size.bits, int(size.group));
  }
  const bool ok = worst < Type<T>::kLimit && !differs;
  std::printf(": error %.2e%s%s", worst, differs ? " DIFFERS between launches" : "", ok ? " ok" : " WRONG");
  if (time) std::printf(" %.2f us", time_of(decode, problem, Type<T>::kDecode, stream));
  std::printf("\n");
  CHECK(cudaStreamDestroy(stream));
  return ok;
}

// Each number of tokens that there is a kernel for; with `time`, 1, 4, 8 and 16.
int run_cases(const std::vector<Case>& cases, bool time) {
  int wrong = 0;
  Decode* const tensor_cores = lorap::low_rank_decode_mma;
  for (int m = 1; m <= 16; ++m)
    for (Case c : cases) {
      c.m = m;
      if (time && m != 1 && m != 4 && m != 8 && m != 16) continue;
      const bool for_mma = c.layers[0].bits == 16 && (!time || m >= 4);
      if (m <= 8) wrong += !run<__nv_bfloat16>(c, time) + (!time && !run<__half>(c, false));
      if (for_mma) wrong += !run<__nv_bfloat16>(c, time, tensor_cores);
      if (for_mma && !time) wrong += !run<__half>(c, false, tensor_cores);
    }
  return wrong;
}

}  // namespace

int main(int count, char**) {
  const bool quick = count > 1;
  const std::vector<Case> small = {
      {0, 176, {{48, 112, false, false}}},
      {0, 1000, {{344, 711, true, true}}},
      {0, 80, {{8, 24, false, true}}},
      {0, 2056, {{264, 333, true, false}}},
      {0, 1000, {{104, 711, true, true}, {0, 33, true, false}, {48, 333, false, false}}},  // q, k, v
      {0, 176, {{344, 711, false, false}, {80, 80, true, true}, {8, 24, false, true}}},    // the second is dense
  };
  const std::vector<Case> packed = {
      {0, 192, {{64, 112, false, false, 4, 32}}},
      {0, 1120, {{352, 711, true, true, 8, 96}}},  // K and R end within a group
      {0, 1120, {{96, 711, true, true, 4, 64}, {0, 33, true, false, 8, 64}, {32, 333, false, false, 8, 128}}},
      {0, 192, {{32, 711, false, false, 8, 32}, {96, 96, true, true, 4, 64}, {16, 24, false, true, 8, 64}}},
  };
  int wrong = run_cases(small, false) + run_cases(packed, false);
  wrong += !run<__nv_bfloat16>({8, 264, {{1536, 11008, true, false}}}, false);  // left fits shared memory in part
  wrong += !run<__half>({16, 72, {{64, 20001, true, true}}}, false);            // more than one round of tiles
  wrong += !run<__half>({7, 256, {{1536, 20001, true, false, 8, 64}}}, false);  // as the first, in 8 bits
  const std::vector<Case> large = {
      {0, 4096, {{512, 4096, false, false}}},
      {0, 4096, {{1024, 4096, false, true}}},
      {0, 4096, {{1632, 4096, false, false}}},
      {0, 4096, {{512, 4096, false, false}, {512, 4096, false, false}, {1536, 4096, false, false}}},
      {0, 4096, {{1024, 4096, false, true}, {512, 1024, false, true}, {768, 1024, false, true}}},
  };
  std::vector<Case> large_packed;
  for (int bits : {4, 8})
    for (Case c : large) {
      for (Size& size : c.layers) size.bits = bits;
      large_packed.push_back(c);
    }
  if (!quick) wrong += run_cases(large, true) + run_cases(large_packed, true);
  std::printf("%d wrong\n", wrong);
  return wrong ? 1 : 0;
}

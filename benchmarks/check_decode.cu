// The kernels of csrc/cuda on a GPU without torch: values against double, one cudaMalloc for each tensor, so that
// compute-sanitizer sees the first byte beyond each, and starts in a second. Also times a launch in a graph.
// benchmarks/gpu_check.sh builds and runs it:
//
//   check_decode [quick]      quick: without the large shapes, for a sanitizer
//
// Never run on a GPU.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
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
    CHECK(cudaMalloc(&data, host.size() * sizeof(T)));
    CHECK(cudaMemcpy(data, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice));
  }
  Device(const Device&) = delete;
  ~Device() { cudaFree(data); }
};

using Decode = decltype(lorap::low_rank_decode);

struct Case {
  int64_t m, k, r, n;
  bool bias, pivoted;
};

// Relative error of y in the norm, infinite where it is not finite.
template <typename T>
double error_of(const Case& c, const std::vector<T>& x, const std::vector<T>& right, const std::vector<T>& left,
                const std::vector<T>& bias, const std::vector<int64_t>& pivots, const std::vector<T>& y) {
  const auto widen = Type<T>::widen;
  double error = 0, norm = 0;
  std::vector<double> shrunk(c.r);
  for (int64_t m = 0; m < c.m; ++m) {
    for (int64_t i = 0; i < c.r; ++i) {
      shrunk[i] = 0;
      for (int64_t j = 0; j < c.k; ++j) shrunk[i] += double(widen(x[m * c.k + j])) * widen(right[i * c.k + j]);
    }
    for (int64_t o = 0, pivot = 0, row = 0; o < c.n; ++o) {
      double sum = c.bias ? widen(bias[o]) : 0;
      if (c.pivoted && pivot < c.r && pivots[pivot] == o) {
        sum += shrunk[pivot++];
      } else {
        for (int64_t i = 0; i < c.r; ++i) sum += widen(left[row * c.r + i]) * shrunk[i];
        ++row;
      }
      const double found = widen(y[m * c.n + o]);
      if (!std::isfinite(found)) return INFINITY;
      error += (found - sum) * (found - sum);
      norm += sum * sum;
    }
  }
  return std::sqrt(error / norm);
}

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
  const int64_t rows = c.pivoted ? c.n - c.r : c.n;
  std::vector<T> x(c.m * c.k), right(c.r * c.k), left(rows * c.r), bias(c.n), y(c.m * c.n);
  for (auto* values : {&x, &right, &left, &bias})
    for (auto& value : *values) value = Type<T>::narrow(uniform());
  std::memset(static_cast<void*>(y.data()), 0xff, y.size() * sizeof(T));  // NaN
  std::vector<int64_t> pivots(c.r);
  for (int64_t i = 0; i < c.r; ++i) pivots[i] = i * c.n / c.r;
  const Device<T> on_x(x), on_right(right), on_left(left), on_bias(bias), on_y(y);
  const Device<float> shrunk(std::vector<float>(c.m * c.r, NAN));
  const Device<int64_t> on_pivots(pivots);
  const lorap::LowRankDecode problem{on_x.data,
                                     on_right.data,
                                     on_left.data,
                                     c.bias ? on_bias.data : nullptr,
                                     c.pivoted ? on_pivots.data : nullptr,
                                     shrunk.data,
                                     on_y.data,
                                     c.m,
                                     c.n,
                                     c.k,
                                     c.r};
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
  const double error = error_of(c, x, right, left, bias, pivots, y);
  const bool ok = error < Type<T>::kLimit && !differs;
  std::printf("%s%s M=%d K=%d R=%d N=%d%s%s: error %.2e%s%s", Type<T>::kName,
              decode == lorap::low_rank_decode_mma ? " mma" : "", int(c.m), int(c.k), int(c.r), int(c.n),
              c.bias ? " bias" : "", c.pivoted ? " pivoted" : "", error, differs ? " DIFFERS between launches" : "",
              ok ? " ok" : " WRONG");
  if (time) std::printf(" %.2f us", time_of(decode, problem, Type<T>::kDecode, stream));
  std::printf("\n");
  CHECK(cudaStreamDestroy(stream));
  return ok;
}

}  // namespace

int main(int count, char**) {
  const bool quick = count > 1;
  const Case small[] = {{0, 176, 48, 112, false, false},
                        {0, 1000, 344, 711, true, true},
                        {0, 80, 8, 24, false, true},
                        {0, 2056, 264, 333, true, false}};
  int wrong = 0;
  Decode* const tensor_cores = lorap::low_rank_decode_mma;
  for (int m = 1; m <= 16; ++m)
    for (Case c : small) {
      c.m = m;
      if (m <= 8) wrong += !run<__nv_bfloat16>(c, false) + !run<__half>(c, false);
      wrong += !run<__nv_bfloat16>(c, false, tensor_cores) + !run<__half>(c, false, tensor_cores);
    }
  wrong += !run<__nv_bfloat16>({8, 264, 1536, 11008, true, false}, false);  // left fits shared memory in part
  wrong += !run<__half>({16, 72, 64, 20001, true, true}, false);            // more than one round of tiles
  for (int m : {1, 4, 8, 16})
    for (Case c : {Case{m, 4096, 512, 4096, false, false},
                   {m, 4096, 1024, 4096, false, true},
                   {m, 4096, 1632, 4096, false, false}})
      if (!quick) {
        if (m <= 8) wrong += !run<__nv_bfloat16>(c, true);
        if (m >= 4) wrong += !run<__nv_bfloat16>(c, true, tensor_cores);
      }
  std::printf("%d wrong\n", wrong);
  return wrong ? 1 : 0;
}

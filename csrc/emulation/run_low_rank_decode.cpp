// Runs the kernels of csrc/cuda on the host and compares it with double precision.
//
//   run_low_rank_decode TYPE M K R N BIAS BLOCKS SHARED_LIMIT PIVOTED [TENSOR_CORES]
//
// PIVOTED: 0 none; 1 every N / R-th row of y is a pivot, 2 the first R are, 3 the last R.
// TENSOR_CORES: 0 as the number of tokens has it, 1 low_rank_decode_mma, 2 the same on a GPU that has clusters.
//
// prints the largest error of `shrunk` and of y, each relative to the sum of absolute values that was accumulated and
// beyond the rounding of y to its type, then the shared memory used in bytes and the grid barriers passed. Exit status
// 1 if an output was not written, or if one of four launches, see cuda_emulation.h, differs in any bit.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "../cuda/low_rank_decode.h"

namespace {

using lorap::DecodeType;
using lorap::LowRankDecode;

struct BFloat16 {
  using Scalar = __nv_bfloat16;
  static constexpr DecodeType kType = DecodeType::kBFloat16;
  static constexpr double kRounding = 1.0 / 256;
  static Scalar narrow(float value) { return __float2bfloat16_rn(value); }
  static float widen(Scalar value) { return __bfloat162float(value); }
};

struct Float16 {
  using Scalar = __half;
  static constexpr DecodeType kType = DecodeType::kFloat16;
  static constexpr double kRounding = 1.0 / 2048;
  static Scalar narrow(float value) { return __float2half_rn(value); }
  static float widen(Scalar value) { return __half2float(value); }
};

// 16-byte aligned, and exactly as long as asked, so that a sanitizer sees the first element read beyond.
template <typename T>
struct Buffer {
  T* data;
  size_t size;
  explicit Buffer(size_t size)
      : data(static_cast<T*>(std::aligned_alloc(16, (size * sizeof(T) + 15) / 16 * 16))), size(size) {}
  Buffer(const Buffer&) = delete;
  ~Buffer() { std::free(data); }
  T& operator[](size_t i) { return data[i]; }
};

float random_value() {  // uniform in [-1, 1), the same on every machine
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return float(int32_t(state >> 32)) / 2147483648.0f;
}

template <typename Type>
int check(int64_t m, int64_t k, int64_t r, int64_t n, bool with_bias, int pivoted, int tensor_cores) {
  using Scalar = typename Type::Scalar;
  Buffer<Scalar> x(m * k), right(r * k), left((pivoted ? n - r : n) * r), bias(n), y(m * n);
  Buffer<float> shrunk(m * r);
  for (auto* buffer : {&x, &right, &left, &bias})
    for (size_t i = 0; i < buffer->size; ++i) (*buffer)[i] = Type::narrow(random_value());

  Buffer<int64_t> pivots(r);
  std::vector<int64_t> pivot_of(n, -1), row_of_left(n);
  for (int64_t i = 0; pivoted && i < r; ++i) {
    pivots[i] = pivoted == 1 ? i * n / r : pivoted == 2 ? i : n - r + i;
    pivot_of[pivots[i]] = i;
  }
  for (int64_t o = 0, next = 0; o < n; ++o) row_of_left[o] = pivot_of[o] < 0 ? next++ : -1;

  std::vector<Scalar> first;
  const LowRankDecode problem{x.data,
                              right.data,
                              left.data,
                              with_bias ? bias.data : nullptr,
                              pivoted ? pivots.data : nullptr,
                              shrunk.data,
                              y.data,
                              m,
                              n,
                              k,
                              r};
  for (int launch = 0; launch < 4; ++launch) {
    std::fill(shrunk.data, shrunk.data + shrunk.size, std::numeric_limits<float>::quiet_NaN());
    std::fill(y.data, y.data + y.size, Type::narrow(std::numeric_limits<float>::quiet_NaN()));
    const auto decode = tensor_cores ? lorap::low_rank_decode_mma : lorap::low_rank_decode;
    if (const int error = decode(problem, Type::kType, nullptr)) {
      std::printf("launch error %d\n", error);
      return 2;
    }
    if (launch == 0) first.assign(y.data, y.data + y.size);
    if (std::memcmp(first.data(), y.data, y.size * sizeof(Scalar))) return std::puts("launches differ"), 1;
  }

  const bool narrow = tensor_cores || m > 8;  // that is how `shrunk` is then kept, rounded
  const auto shrunk_at = [&](int64_t i) -> double {
    return narrow ? Type::widen(reinterpret_cast<const Scalar*>(shrunk.data)[i]) : shrunk[i];
  };
  double shrunk_error = 0, y_error = 0;
  bool complete = true;
  for (int64_t token = 0; token < m; ++token) {
    std::vector<double> exact(r), magnitude(r);
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const double product = double(Type::widen(x[token * k + j])) * Type::widen(right[i * k + j]);
        exact[i] += product;
        magnitude[i] += std::abs(product);
      }
      const double rounding = narrow ? Type::kRounding * std::abs(exact[i]) : 0.0;
      const double error = std::abs(shrunk_at(token * r + i) - exact[i]) - rounding;
      complete &= !std::isnan(error);
      shrunk_error = std::max(shrunk_error, error / magnitude[i]);
    }
    for (int64_t o = 0; o < n; ++o) {
      double sum = with_bias ? Type::widen(bias[o]) : 0.0, absolute = std::abs(sum);
      for (int64_t i = 0; i < r; ++i) {
        const double weight = pivot_of[o] < 0 ? Type::widen(left[row_of_left[o] * r + i]) : pivot_of[o] == i;
        sum += weight * (narrow && pivot_of[o] < 0 ? shrunk_at(token * r + i) : exact[i]);
        absolute += std::abs(weight) * magnitude[i];
      }
      const double error = std::abs(Type::widen(y[token * n + o]) - sum) - Type::kRounding * std::abs(sum);
      complete &= !std::isnan(error);
      y_error = std::max(y_error, error / absolute);
    }
  }
  std::printf("%.3g %.3g %zu %d\n", shrunk_error, y_error, emulation::machine.shared_bytes,
              emulation::machine.grid_barriers);
  return complete ? 0 : 1;
}

}  // namespace

int main(int count, char** values) {
  if (count != 10 && count != 11) return std::fputs("see the head of this file for the arguments\n", stderr), 2;
  int64_t numbers[11] = {};
  for (int i = 2; i < count; ++i) numbers[i] = std::atoll(values[i]);
  emulation::machine.multiprocessors = int(numbers[7]);
  emulation::machine.shared_limit = int(numbers[8]);
  emulation::machine.clusters = numbers[10] == 2;
  const auto run = std::string(values[1]) == "bfloat16" ? check<BFloat16> : check<Float16>;
  return run(numbers[2], numbers[3], numbers[4], numbers[5], numbers[6], int(numbers[9]), int(numbers[10]));
}

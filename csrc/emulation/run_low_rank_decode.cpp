// Runs the kernels of csrc/cuda on the host and compares them with double precision.
//
//   run_low_rank_decode TYPE M K R N BIAS BLOCKS SHARED_LIMIT PIVOTED [TENSOR_CORES [BITS GROUP]]
//
// R, N, BIAS, PIVOTED, BITS and GROUP: of each layer, with commas between; as many layers as there are R, and the last
// of the others is repeated. Layers write their columns of one y, with one column between them that nobody may write.
// PIVOTED: 0 none; 1 every N / R-th row of y is a pivot, 2 the first R are, 3 the last R.
// BITS: of a weight: 16, or 8 or 4, of which each GROUP in a row has a scale.
// TENSOR_CORES: 0 as the number of tokens has it, 1 low_rank_decode_mma, 2 the same on a GPU that has clusters.
//
// prints the largest error of `shrunk` and of y, each relative to the sum of absolute values that was accumulated and
// beyond the rounding of y to its type, then the shared memory used in bytes and the grid barriers passed. Exit status
// 1 if an output was not written, or if one of four launches, see cuda_emulation.h, differs in any bit.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <sstream>
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
  T& operator[](size_t i) const { return data[i]; }
};

float random_value() {  // uniform in [-1, 1), the same on every machine
  static uint64_t state = 1;
  state = state * 6364136223846793005u + 1442695040888963407u;
  return float(int32_t(state >> 32)) / 2147483648.0f;
}

struct Sizes {
  int64_t r, n;
  bool bias;
  int pivoted, bits;
  int64_t group;
  bool all_pivots() const { return pivoted && r == n; }
};

struct Errors {
  double shrunk = 0, y = 0;
  bool complete = true;
};

// A matrix of random weights (rows, columns): of 16 bits, or packed ones and their scales.
template <typename Type>
struct Factor {
  using Scalar = typename Type::Scalar;
  std::vector<double> weights;
  Buffer<Scalar> plain, scales;
  Buffer<uint32_t> packed;

  Factor(int64_t rows, int64_t columns, int bits, int64_t group)
      : weights(rows * columns),
        plain(bits == 16 ? rows * columns : 0),
        scales(bits == 16 ? 0 : rows * ((columns + group - 1) / group)),
        packed(bits == 16 ? 0 : rows * columns * bits / 32) {
    for (size_t i = 0; i < plain.size; ++i) weights[i] = Type::widen(plain[i] = Type::narrow(random_value()));
    for (size_t i = 0; i < packed.size; ++i) packed[i] = 0;
    for (size_t i = 0; i < scales.size; ++i) scales[i] = Type::narrow((1.25f + random_value()) / float(1 << bits));
    for (int64_t i = 0; scales.size > 0 && i < rows * columns; ++i) {
      const int half = 1 << (bits - 1), number = int(std::floor(random_value() * float(half)));
      packed[i * bits / 32] |= uint32_t(number + half) << i * bits % 32;
      const int64_t row = i / columns, of_row = scales.size / rows;
      weights[i] = number * double(Type::widen(scales[row * of_row + i % columns / group]));
    }
  }
  const void* data() const { return scales.size ? static_cast<const void*>(packed.data) : plain.data; }
};

template <typename Type>
struct Layer {
  using Scalar = typename Type::Scalar;
  const Sizes sizes;
  Factor<Type> right, left;
  Buffer<Scalar> bias;
  Buffer<float> shrunk;
  Buffer<int64_t> pivots;
  std::vector<int64_t> pivot_of, row_of_left;

  Layer(const Sizes& sizes, int64_t m, int64_t k)
      : sizes(sizes),
        right(sizes.r, k, sizes.bits, sizes.group),
        left(sizes.pivoted ? sizes.n - sizes.r : sizes.n, sizes.r, sizes.bits, sizes.group),
        bias(sizes.n),
        shrunk(m * sizes.r),
        pivots(sizes.r),
        pivot_of(sizes.n, -1),
        row_of_left(sizes.n) {
    for (size_t i = 0; i < bias.size; ++i) bias[i] = Type::narrow(random_value());
    for (int64_t i = 0; sizes.pivoted && i < sizes.r; ++i) {
      pivots[i] = sizes.pivoted == 1 ? i * sizes.n / sizes.r : sizes.pivoted == 2 ? i : sizes.n - sizes.r + i;
      pivot_of[pivots[i]] = i;
    }
    for (int64_t o = 0, next = 0; o < sizes.n; ++o) row_of_left[o] = pivot_of[o] < 0 ? next++ : -1;
  }

  lorap::DecodeLayer argument(Scalar* y, int64_t stride) const {
    return {right.data(),
            sizes.all_pivots() ? nullptr : left.data(),
            sizes.bias ? bias.data : nullptr,
            sizes.pivoted ? pivots.data : nullptr,
            sizes.all_pivots() ? nullptr : shrunk.data,
            y,
            sizes.n,
            sizes.r,
            stride,
            sizes.bits,
            sizes.group,
            right.scales.data,
            left.scales.data};
  }

  // `narrow`: shrunk is kept in the type of the weights.
  double shrunk_at(int64_t i, bool narrow) const {
    return narrow ? Type::widen(reinterpret_cast<const Scalar*>(shrunk.data)[i]) : shrunk[i];
  }

  // Of one token; x (K,), y (N,).
  void compare(const Scalar* x, const Scalar* y, int64_t token, int64_t k, bool narrow, Errors* errors) const {
    const int64_t r = sizes.r;
    std::vector<double> exact(r), magnitude(r);
    for (int64_t i = 0; i < r; ++i) {
      for (int64_t j = 0; j < k; ++j) {
        const double product = Type::widen(x[j]) * right.weights[i * k + j];
        exact[i] += product;
        magnitude[i] += std::abs(product);
      }
      if (sizes.all_pivots()) continue;
      const double rounding = narrow ? Type::kRounding * std::abs(exact[i]) : 0.0;
      const double error = std::abs(shrunk_at(token * r + i, narrow) - exact[i]) - rounding;
      errors->complete &= !std::isnan(error);
      errors->shrunk = std::max(errors->shrunk, error / magnitude[i]);
    }
    for (int64_t o = 0; o < sizes.n; ++o) {
      double sum = sizes.bias ? Type::widen(bias[o]) : 0.0, absolute = std::abs(sum);
      const bool is_pivot = pivot_of[o] >= 0;
      for (int64_t i = 0; i < r; ++i) {
        const double weight = is_pivot ? pivot_of[o] == i : left.weights[row_of_left[o] * r + i];
        sum += weight * (narrow && !is_pivot ? shrunk_at(token * r + i, narrow) : exact[i]);
        absolute += std::abs(weight) * magnitude[i];
      }
      const double error = std::abs(Type::widen(y[o]) - sum) - Type::kRounding * std::abs(sum);
      errors->complete &= !std::isnan(error);
      errors->y = std::max(errors->y, error / std::max(absolute, 1e-30));
    }
  }
};

template <typename Type>
int check(int64_t m, int64_t k, const std::vector<Sizes>& group, int tensor_cores) {
  using Scalar = typename Type::Scalar;
  const Scalar unwritten = Type::narrow(std::numeric_limits<float>::quiet_NaN());
  Buffer<Scalar> x(m * k);
  for (size_t i = 0; i < x.size; ++i) x[i] = Type::narrow(random_value());
  std::vector<std::unique_ptr<Layer<Type>>> layers;
  std::vector<int64_t> columns{0};  // where each layer's begin
  for (const Sizes& sizes : group) {
    layers.push_back(std::make_unique<Layer<Type>>(sizes, m, k));
    columns.push_back(columns.back() + sizes.n + 1);
  }
  const int64_t stride = columns.back() - 1;
  Buffer<Scalar> y(m * stride);
  LowRankDecode problem{x.data, m, k, int(layers.size()), {}};
  for (size_t i = 0; i < layers.size() && i < lorap::kMaxDecodeLayers; ++i)
    problem.layers[i] = layers[i]->argument(y.data + columns[i], stride);

  std::vector<Scalar> first;
  for (int launch = 0; launch < 4; ++launch) {
    for (auto& layer : layers)
      std::fill(layer->shrunk.data, layer->shrunk.data + layer->shrunk.size, std::numeric_limits<float>::quiet_NaN());
    std::fill(y.data, y.data + y.size, unwritten);
    const auto decode = tensor_cores ? lorap::low_rank_decode_mma : lorap::low_rank_decode;
    if (const int error = decode(problem, Type::kType, nullptr)) {
      std::printf("launch error %d\n", error);
      return 2;
    }
    if (launch == 0) first.assign(y.data, y.data + y.size);
    if (std::memcmp(first.data(), y.data, y.size * sizeof(Scalar))) return std::puts("launches differ"), 1;
  }

  Errors errors;
  for (int64_t token = 0; token < m; ++token)
    for (size_t i = 0; i < layers.size(); ++i) {
      Scalar* const row = y.data + token * stride;
      layers[i]->compare(x.data + token * k, row + columns[i], token, k, tensor_cores || m > 8, &errors);
      const bool last = i + 1 == layers.size();
      if (!last && std::memcmp(row + columns[i + 1] - 1, &unwritten, sizeof(Scalar)))
        return std::puts("written between the layers"), 1;
    }
  std::printf("%.3g %.3g %zu %d\n", errors.shrunk, errors.y, emulation::machine.shared_bytes,
              emulation::machine.grid_barriers);
  return errors.complete ? 0 : 1;
}

std::vector<int64_t> numbers_of(const char* list) {
  std::vector<int64_t> numbers;
  std::stringstream stream(list);
  for (std::string one; std::getline(stream, one, ',');) numbers.push_back(std::atoll(one.c_str()));
  return numbers;
}

}  // namespace

int main(int count, char** values) {
  if (count != 10 && count != 11 && count != 13)
    return std::fputs("see the head of this file for the arguments\n", stderr), 2;
  const auto at = [](const std::vector<int64_t>& list, size_t i) { return list[std::min(i, list.size() - 1)]; };
  const auto ranks = numbers_of(values[4]), rows = numbers_of(values[5]), biases = numbers_of(values[6]),
             pivoted = numbers_of(values[9]), bits = numbers_of(count > 11 ? values[11] : "16"),
             sizes = numbers_of(count > 11 ? values[12] : "0");
  std::vector<Sizes> group;
  for (size_t i = 0; i < ranks.size(); ++i)
    group.push_back({ranks[i], at(rows, i), at(biases, i) != 0, int(at(pivoted, i)), int(at(bits, i)), at(sizes, i)});
  const int tensor_cores = count > 10 ? std::atoi(values[10]) : 0;
  emulation::machine.multiprocessors = std::atoi(values[7]);
  emulation::machine.shared_limit = std::atoi(values[8]);
  emulation::machine.clusters = tensor_cores == 2;
  const auto run = std::string(values[1]) == "bfloat16" ? check<BFloat16> : check<Float16>;
  return run(std::atoll(values[2]), std::atoll(values[3]), group, tensor_cores);
}

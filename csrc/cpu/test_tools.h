// Arrays, tables in double precision and threads for the programs that test the kernels without torch.
//
// Arrays end at their last element, so that the sanitizer sees an overread; gaps between rows and outputs not yet
// written hold NaN, so that an overread within an array, or an element that nobody writes, spoils the comparison.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <random>
#include <thread>
#include <vector>

#include "decode.h"

namespace {

using namespace lorap::cpu;

// Significant bits after the leading one, smallest normal exponent and largest exponent.
struct Format {
  const char* name;
  int64_t bytes;
  int mantissa, min_exponent, max_exponent;
  double eps() const { return std::ldexp(1.0, -mantissa); }
  double smallest() const { return std::ldexp(1.0, min_exponent - mantissa); }
};

inline const Format& format_of(Dtype dtype) {
  static const Format float32{"float32", 4, 23, -126, 127}, bfloat16{"bfloat16", 2, 7, -126, 127},
      float16{"float16", 2, 10, -14, 15};
  return dtype == Dtype::kFloat32 ? float32 : dtype == Dtype::kBFloat16 ? bfloat16 : float16;
}

// The nearest number of the format, ties to even; too large ones become infinite.
inline double round_to(const Format& format, double value) {
  if (value == 0 || !std::isfinite(value)) return value;
  const int exponent = std::max(std::ilogb(value), format.min_exponent);
  const double quantum = std::ldexp(1.0, exponent - format.mantissa);
  const double rounded = std::nearbyint(value / quantum) * quantum;
  return std::abs(rounded) < std::ldexp(1.0, format.max_exponent + 1) ? rounded : std::copysign(INFINITY, value);
}

// Bit patterns by the definition of the formats; `value` must be a number of the format.
inline uint32_t encode(const Format& format, double value) {
  const uint32_t exponents = format.max_exponent - format.min_exponent + 2;  // the pattern of infinity and NaN
  const uint32_t sign = std::signbit(value) ? 1u << (format.bytes * 8 - 1) : 0;
  if (std::isnan(value)) return exponents << format.mantissa | 1u << (format.mantissa - 1);
  if (std::isinf(value)) return sign | exponents << format.mantissa;
  const int exponent = value == 0 ? format.min_exponent : std::max(std::ilogb(value), format.min_exponent);
  const auto digits = static_cast<uint32_t>(std::ldexp(std::abs(value), format.mantissa - exponent));
  return sign | (digits + (static_cast<uint32_t>(exponent - format.min_exponent) << format.mantissa));
}

inline double decode(const Format& format, uint32_t bits) {
  const uint32_t exponent = bits >> format.mantissa & ((1u << (format.bytes * 8 - 1 - format.mantissa)) - 1);
  const uint32_t digits = bits & ((1u << format.mantissa) - 1);
  const double sign = bits >> (format.bytes * 8 - 1) ? -1.0 : 1.0;
  if (static_cast<int>(exponent) == format.max_exponent - format.min_exponent + 2)
    return sign * (digits ? NAN : INFINITY);
  const double significand = digits * format.eps() + (exponent ? 1.0 : 0.0);
  return sign * std::ldexp(significand, static_cast<int>(std::max(exponent, 1u)) - 1 + format.min_exponent);
}

// Elements of a format on the heap, from an address that is aligned to one element only, to exactly the last one.
class Array {
 public:
  Array(const Format& format, int64_t count)
      : format_(&format), bytes_(new char[(count + 1) * format.bytes]), data_(bytes_.get() + format.bytes) {
    for (int64_t i = 0; i < count; ++i) set(i, NAN);
  }
  void set(int64_t i, double value) {
    const uint32_t bits = encode(*format_, value);
    std::memcpy(data_ + i * format_->bytes, &bits, format_->bytes);  // little-endian
  }
  double get(int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, data_ + i * format_->bytes, format_->bytes);
    return decode(*format_, bits);
  }
  void* data() { return data_; }

 private:
  const Format* format_;
  std::unique_ptr<char[]> bytes_;
  char* data_;
};

// A value, and its size without cancellation, of which rounding errors are a fraction.
struct Number {
  double exact = 0, size = 0;
};

struct Table {
  Table(int64_t rows, int64_t cols) : rows(rows), cols(cols), numbers(rows * cols) {}
  Number& at(int64_t i, int64_t j) { return numbers[i * cols + j]; }
  const Number& at(int64_t i, int64_t j) const { return numbers[i * cols + j]; }
  int64_t rows, cols;
  std::vector<Number> numbers;
};

std::mt19937 generator(0);

inline int64_t random_below(int64_t limit) { return std::uniform_int_distribution<int64_t>(0, limit - 1)(generator); }

// Random multiples of 1/128 between -1/2 and 1/2, which every format holds, with `gap` unused elements between rows.
struct Weight {
  Weight(const Format& format, int64_t rows, int64_t cols, int64_t gap = 0)
      : table(rows, cols), stride(cols + gap), array(format, rows ? (rows - 1) * stride + cols : 0) {
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        const double value = (random_below(129) - 64) / 128.0;
        table.at(i, j) = {value, std::abs(value)};
        array.set(i * stride + j, value);
      }
    }
  }
  Matrix matrix() { return {array.data(), table.rows, table.cols, stride}; }
  Table table;
  int64_t stride;
  Array array;
};

using Bias = std::optional<Weight>;

inline Bias some_bias(const Format& format, int64_t size) {
  return random_below(2) ? Bias(std::in_place, format, 1, size) : Bias();
}

inline const void* data_of(Bias& bias) { return bias ? bias->array.data() : nullptr; }

// x weight^T + bias.
inline Table product(const Table& x, const Table& weight, const Bias& bias = {}) {
  Table y(x.rows, weight.rows);
  for (int64_t m = 0; m < x.rows; ++m) {
    for (int64_t n = 0; n < weight.rows; ++n) {
      Number sum = bias ? bias->table.at(0, n) : Number();
      for (int64_t k = 0; k < x.cols; ++k) {
        sum.exact += x.at(m, k).exact * weight.at(n, k).exact;
        sum.size += x.at(m, k).size * weight.at(n, k).size;
      }
      y.at(m, n) = sum;
    }
  }
  return y;
}

inline Table gated(const Table& gate, const Table& up) {
  Table y(gate.rows, gate.cols);
  for (size_t i = 0; i < y.numbers.size(); ++i) {
    const Number g = gate.numbers[i], u = up.numbers[i];
    y.numbers[i] = {g.exact / (1 + std::exp(-g.exact)) * u.exact, g.size * u.size};
  }
  return y;
}

std::atomic<int64_t> threads_started{0};

// Every index in a thread of its own, as the kernels ask for one per thread.
inline void parallel_for(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* context) {
  std::vector<std::thread> threads;
  for (int64_t first = begin, last; first < end; first = last) {
    last = std::min(end, first + std::max<int64_t>(grain, 1));
    threads.emplace_back([=] { body(first, last, context); });
    ++threads_started;
  }
  for (std::thread& thread : threads) thread.join();
}

}  // namespace

// The ops on weights of 4 and 8 bits with every kernel of this processor, as test_decode.cpp does for the others.
#include "quantized.h"
#include "test_tools.h"

namespace {

using namespace lorap::cpu;

// Random numbers of `bits` bits, both ends of their range among them, with random scales that every format holds;
// unused words and scales between rows. The numbers of one row are all zero.
struct Quantized {
  Quantized(Dtype dtype, const char* isa, int bits, int64_t group, int64_t rows, int64_t cols)
      : table(rows, cols),
        group(group),
        word_stride((cols * bits + 31) / 32 + random_below(2) * 3),
        scale_stride((cols + group - 1) / group + random_below(2) * 2),
        words(rows ? (rows - 1) * word_stride + (cols * bits + 31) / 32 : 0),
        scales(format_of(dtype), rows ? (rows - 1) * scale_stride + (cols + group - 1) / group : 0),
        scale_kernel(find_kernel(dtype, isa)) {
    words.shrink_to_fit();
    const int half = 1 << (bits - 1);
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        if (j % group == 0) scales.set(i * scale_stride + j / group, (1 + random_below(128)) / 4096.0);
        const int number = rows > 2 && i == rows / 2 ? 0 : static_cast<int>(random_below(2 * half)) - half;
        set(i, j, bits, number);
      }
    }
  }
  void set(int64_t i, int64_t j, int bits, int number) {
    const uint32_t mask = (1u << bits) - 1, stored = static_cast<uint32_t>(number + (1 << (bits - 1)));
    uint32_t& word = words[i * word_stride + j * bits / 32];
    word = (word & ~(mask << (j * bits % 32))) | stored << (j * bits % 32);
    const double value = number * scales.get(i * scale_stride + j / group);
    table.at(i, j) = {value, std::abs(value)};
  }
  QuantizedMatrix matrix() {
    return {words.data(), table.rows, table.cols, word_stride, scales.data(), scale_stride, scale_kernel, group};
  }
  Table table;
  int64_t group, word_stride, scale_stride;
  std::vector<uint32_t> words;
  Array scales;
  const RowKernel* scale_kernel;
};

struct Test {
  const QuantizedKernel& kernel;
  Dtype dtype;
  const char* isa;  // of conversions between dtypes
  const Format& format = format_of(dtype);
  int64_t cases = 0;

  QuantizedMachine machine() const { return {{find_kernel(dtype, isa), parallel_for, 3}, &kernel}; }
  Quantized weight(int64_t group, int64_t rows, int64_t cols) const {
    return {random_below(2) ? Dtype::kFloat32 : dtype, isa, kernel.bits, group, rows, cols};
  }

  [[noreturn]] void fail(const char* what) const {
    std::printf("FAILED: %s %d bits %s %s\n", kernel.isa, kernel.bits, format.name, what);
    std::exit(1);
  }

  // `rounded`: what the activations, rounded to 16 bits beside the largest of their block, add to the error.
  void expect(const char* op, const Array& y, const Table& expected, double rounded = 0) {
    ++cases;
    for (int64_t i = 0; i < static_cast<int64_t>(expected.numbers.size()); ++i) {
      const Number want = expected.numbers[i];
      const double limit = 8 * format.eps() * want.size + format.smallest() + rounded;
      if (std::abs(y.get(i) - want.exact) <= limit) continue;
      std::printf("row %ld column %ld: %g, expected %g\n", static_cast<long>(i / expected.cols),
                  static_cast<long>(i % expected.cols), y.get(i), want.exact);
      fail(op);
    }
  }

  void ops(int64_t tokens, int64_t k, int64_t rank, int64_t n, int64_t group) {
    Weight x(format, tokens, k);
    Quantized one = weight(group, n, k), up = weight(group, n, k), right = weight(group, rank, k),
              left = weight(group, n, rank);
    Bias bias = some_bias(format, n);
    Array y(format, tokens * n), gate_up(format, tokens * n), low_rank(format, tokens * n);
    quantized_linear(machine(), x.array.data(), tokens, one.matrix(), data_of(bias), y.data());
    expect("quantized_linear", y, product(x.table, one.table, bias));
    quantized_silu_gated_linear(machine(), x.array.data(), tokens, one.matrix(), up.matrix(), gate_up.data());
    expect("quantized_silu_gated_linear", gate_up, gated(product(x.table, one.table), product(x.table, up.table)));
    quantized_low_rank_linear(machine(), x.array.data(), tokens, right.matrix(), left.matrix(), data_of(bias),
                              low_rank.data());
    expect("quantized_low_rank_linear", low_rank, product(product(x.table, right.table), left.table, bias));
  }

  // One activation of each block is 2^spread times as large as the others, which keep the digits that are left. Its
  // weight is zero, so that they are all that counts.
  void spread_activations(int spread) {
    const int64_t k = 320, group = 64, n = 17;
    Weight x(format, 1, k);
    Quantized one = weight(group, n, k);
    for (int64_t j = 0; j < k; j += group) {
      const double large = std::ldexp(1.0, spread);
      x.table.at(0, j) = {large, large};
      x.array.set(j, large);
      for (int64_t i = 0; i < n; ++i) one.set(i, j, kernel.bits, 0);
    }
    // Six times the standard deviation of rounding to a digit, with weights of half their largest size.
    const double digit = std::ldexp(1.0, spread - 14) * (dtype == Dtype::kFloat32 ? std::ldexp(1.0, -15) : 1);
    const double largest = (1 << (kernel.bits - 1)) / 32.0,
                 rounded = 6 * digit / std::sqrt(12) * std::sqrt(k) * largest / 2;
    Array y(format, n);
    quantized_linear(machine(), x.array.data(), 1, one.matrix(), nullptr, y.data());
    expect("activations of many sizes", y, product(x.table, one.table), rounded);
  }

  // The numbers next to 2 and -2, which are the largest of their blocks, and whole 64ths beside them: all exact.
  void next_to_two(int64_t tokens) {
    const int64_t k = 320, n = 17;
    Quantized one = weight(64, n, k);
    Weight x(format, tokens, k);
    for (int64_t m = 0; m < tokens; ++m) {
      for (int64_t j = 0; j < k; ++j) {
        const double value = (j % 2 ? 1 : -1) * (j % 5 ? random_below(127) / 64.0 : 2 - format.eps());
        x.table.at(m, j) = {value, std::abs(value)};
        x.array.set(m * k + j, value);
      }
    }
    Array y(format, tokens * n);
    quantized_linear(machine(), x.array.data(), tokens, one.matrix(), nullptr, y.data());
    expect("activations next to two", y, product(x.table, one.table));
  }

  // An output is the same number whatever other rows and tokens are computed with it, of as many as `at_once`: few and
  // many tokens are summed up in other orders.
  void each_alone(int64_t tokens, int64_t k, int64_t n, int64_t group, int64_t at_once = 1) {
    Quantized one = weight(group, n, k);
    Weight x(format, tokens, k);
    // Numbers of all digits, so that sums round.
    for (int64_t j = 0; j < tokens * k; ++j) x.array.set(j, round_to(format, random_below(1000) / 997.0));
    Array y(format, tokens * n), alone(format, at_once);
    quantized_linear(machine(), x.array.data(), tokens, one.matrix(), nullptr, y.data());
    for (int64_t m = 0; m < tokens; ++m) {
      Array token(format, at_once * k);
      for (int64_t j = 0; j < at_once * k; ++j) token.set(j, x.array.get(m * k + j % k));
      for (int64_t i = 0; i < n; ++i) {
        QuantizedMatrix row = one.matrix();
        row.rows = 1, row.words += i * row.word_stride;
        row.scales = static_cast<const char*>(row.scales) + i * row.scale_stride * row.scale_kernel->element_bytes;
        quantized_linear(machine(), token.data(), at_once, row, nullptr, alone.data());
        if (alone.get(at_once - 1) != y.get(m * n + i)) fail("a row and a token alone");
      }
    }
    ++cases;
  }

  // Numbers times scales, both in the format, rounded once.
  void whole_weight(int64_t k, int64_t n, int64_t group) {
    Quantized one = weight(group, n, k);
    Array found(format, n * k);
    quantized_weight(machine(), one.matrix(), found.data());
    for (int64_t i = 0; i < n * k; ++i) {
      if (found.get(i) != round_to(format, one.table.numbers[i].exact)) fail("a weight");
    }
    ++cases;
  }

  // In 8 bits, whole numbers up to 127 are exact where every block has one as large; others lose half a step at most.
  void eight_bits(int64_t tokens, int64_t k, int64_t n, int64_t group, bool whole) {
    Quantized one = weight(group, n, k);
    Weight x(format, tokens, k);
    for (int64_t m = 0; m < tokens && whole; ++m) {
      for (int64_t j = 0; j < k; ++j) {
        const double value = (random_below(2) ? 1 : -1) * static_cast<double>(j % 32 ? random_below(128) : 127);
        x.table.at(m, j) = {value, std::abs(value)};
        x.array.set(m * k + j, value);
      }
    }
    // As above; no activation of the others is larger than 1/2.
    const double largest = (1 << (kernel.bits - 1)) / 32.0, step = whole ? 0 : 0.5 / 127,
                 rounded = 6 * step / std::sqrt(12) * std::sqrt(k) * largest / 2;
    Array y(format, tokens * n);
    quantized_linear(machine(), x.array.data(), tokens, one.matrix(), nullptr, y.data());
    expect(whole ? "whole activations" : "activations of 8 bits", y, product(x.table, one.table), rounded);
  }

  // Sizes near the ends of the format, a row of zeros, and what is no number.
  void extremes(int64_t tokens = 1) {
    const int64_t k = 70, n = 5;
    Quantized one = weight(32, n, k);
    const double largest = std::ldexp(1.0, format.max_exponent - 4), smallest = std::ldexp(1.0, format.min_exponent);
    for (double size : {0.0, smallest, largest, double(INFINITY), double(NAN)}) {
      Array x(format, tokens * k), y(format, tokens * n);
      Table table(tokens, k);
      for (int64_t j = 0; j < tokens * k; ++j) {
        const double value = j % k == 40 ? size : 0;
        table.at(j / k, j % k) = {value, std::abs(value)};
        x.set(j, value);
      }
      quantized_linear(machine(), x.data(), tokens, one.matrix(), nullptr, y.data());
      if (std::isfinite(size)) {
        // Activations of 8 bits have no scale below the smallest normal number, and weights are 4 at most.
        expect("one activation", y, product(table, one.table), kernel.activation_bits == 8 ? 4 * 1.2e-38 : 0);
        if (y.get(n / 2) != 0) fail("a row of zeros");
      }
      for (int64_t i = 0; i < tokens * n && !std::isfinite(size); ++i) {
        if (!std::isnan(y.get(i))) fail("an activation that is no number");
      }
    }
  }
};

const Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

void run_eight_bits(const QuantizedKernel& kernel, const char* isa) {
  int64_t cases = 0;
  for (Dtype dtype : kDtypes) {
    Test test{kernel, dtype, isa};
    for (int64_t tokens : {1, 2, 3, 5, 17}) {
      for (int64_t k : {1, 7, 63, 100, 289, 2100}) {
        for (int64_t group : {32, 64, 96, 128}) test.eight_bits(tokens, k, 33, group, (k + group) % 3);
      }
    }
    for (int64_t group : {64, 96, 4224}) test.eight_bits(group == 96 ? 5 : 1, 4200, 3, group, true);
    test.each_alone(7, 289, 67, 64);
    test.extremes();
    cases += test.cases;
  }
  std::printf("%s %d bits, activations of 8: %ld cases\n", kernel.isa, kernel.bits, static_cast<long>(cases));
}

void run(const QuantizedKernel& kernel, const char* isa) {
  int64_t cases = 0;
  for (Dtype dtype : kDtypes) {
    Test test{kernel, dtype, isa};
    const int64_t token_counts[] = {1, 2, 3, 5, 16, 17, 65}, features[] = {1, 7, 63, 100, 289}, ranks[] = {1, 17, 150},
                  outputs[] = {1, 33, 100}, groups[] = {32, 64, 96, 128};
    int64_t i = 0;
    for (int64_t tokens : token_counts) {
      for (int64_t k : features) {
        test.ops(tokens, k, ranks[i % 3], outputs[i / 3 % 3], groups[i % 4]);
        ++i;
      }
    }
    // Rows of several segments, with groups across their ends and one that no row fills.
    for (int64_t group : {64, 96, 4224}) test.ops(group == 96 ? 5 : 1, 4200, 5, 3, group);
    for (int spread : {0, 3, 7, 12}) test.spread_activations(spread);
    for (int64_t tokens : {1, 3, 5, 17}) test.next_to_two(tokens);
    for (int64_t group : {32, 128}) {
      test.each_alone(kernel.tile ? 2 : 7, 289, 67, group);
      if (kernel.tile) test.each_alone(23, 289, 67, group, 21);
    }
    for (int64_t n : {1, 63, 100}) {
      for (int64_t k : {1, 7, 63, 100, 289}) test.whole_weight(k, n, 32 * (1 + (n + k) % 4));
    }
    for (int64_t tokens : {1, 23}) test.extremes(tokens);
    const int64_t before = threads_started;
    for (int64_t tokens : {1, 5, 70}) test.ops(tokens, 577, 150, 500, 64);  // enough weights for several threads
    test.whole_weight(577, 500, 64);
    if (threads_started == before) test.fail("ran in one thread");
    cases += test.cases;
  }
  std::printf("%s %d bits: %ld cases\n", kernel.isa, kernel.bits, static_cast<long>(cases));
}

}  // namespace

int main(int argc, char** argv) {
  for (const char* isa : {"scalar", "avx2", "avx512", "avx512_vnni"}) {
    if (argc > 1 && std::strcmp(isa, argv[1]) != 0) continue;
    for (int bits : {4, 8}) {
      const char* outer = std::strcmp(isa, "avx512_vnni") == 0 ? "avx512" : isa;
      if (const QuantizedKernel* kernel = find_quantized_kernel(bits, isa)) run(*kernel, outer);
      const QuantizedKernel* kernel = find_quantized_kernel(bits, isa, 8);
      if (kernel && kernel->activation_bits == 8) run_eight_bits(*kernel, outer);
    }
  }
  if (find_quantized_kernel(4, "no such thing")) return 1;
  std::puts("all passed");
  return 0;
}

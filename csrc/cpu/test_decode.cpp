// Every CPU op with every kernel of this processor, against double precision and without torch. tests/test_native.py
// builds and runs it under the address and undefined-behaviour sanitizers; `test_decode avx2` runs one instruction set
// alone.
#include "test_tools.h"

namespace {

using namespace lorap::cpu;

struct Layer {
  Layer(const Format& format, int64_t k, int64_t rank, int64_t rows, bool pivoted)
      : right(format, rank, k, random_below(2) * 3), left(format, rows, rank, random_below(2) * 5) {
    const int64_t outputs = rows + (pivoted ? rank : 0);
    for (int64_t row = 0, wanted = rank; pivoted && row < outputs; ++row) {
      if (random_below(outputs - row) < wanted) {
        pivots.push_back(row);
        --wanted;
      }
    }
    pivots.shrink_to_fit();
    bias = some_bias(format, outputs);
  }
  LowRankLayer view() {
    return {right.matrix(), left.matrix(), data_of(bias), pivots.empty() ? nullptr : pivots.data()};
  }
  Table outputs(const Table& x) const {
    const Table shrunk = product(x, right.table);
    if (pivots.empty()) return product(shrunk, left.table, bias);
    const Table others = product(shrunk, left.table);
    Table y(x.rows, shrunk.cols + others.cols);
    for (int64_t m = 0; m < x.rows; ++m) {
      for (int64_t row = 0, pivot = 0; row < y.cols; ++row) {
        const bool is_pivot = pivot < shrunk.cols && pivots[pivot] == row;
        Number& number = y.at(m, row) = is_pivot ? shrunk.at(m, pivot) : others.at(m, row - pivot);
        pivot += is_pivot;
        if (!bias) continue;
        number.exact += bias->table.at(0, row).exact;
        number.size += bias->table.at(0, row).size;
      }
    }
    return y;
  }
  Weight right, left;
  Bias bias;
  std::vector<int64_t> pivots;
};

[[noreturn]] void fail(const RowKernel& kernel, const Format& format, const char* what) {
  std::printf("FAILED: %s %s %s\n", kernel.isa, format.name, what);
  std::exit(1);
}

struct Test {
  const RowKernel& kernel;
  const Format& format;
  Array element{format, 1};
  int64_t cases = 0;

  Machine machine() const { return {&kernel, parallel_for, 3}; }

  void expect(const char* op, const Array& y, const Table& expected) {
    ++cases;
    for (int64_t i = 0; i < static_cast<int64_t>(expected.numbers.size()); ++i) {
      const Number want = expected.numbers[i];
      const double error = std::abs(y.get(i) - want.exact), limit = 8 * format.eps() * want.size + format.smallest();
      if (error <= limit) continue;
      std::printf("row %ld column %ld: %g, expected %g\n", static_cast<long>(i / expected.cols),
                  static_cast<long>(i % expected.cols), y.get(i), want.exact);
      fail(kernel, format, op);
    }
  }

  void ops(int64_t tokens, int64_t k, int64_t rank, int64_t n) {
    Weight x(format, tokens, k), weight(format, n, k, 1), up(format, n, k);
    Bias bias = some_bias(format, n), up_bias = some_bias(format, n);
    Array y(format, tokens * n);
    linear(machine(), x.array.data(), tokens, weight.matrix(), data_of(bias), y.data());
    expect("linear", y, product(x.table, weight.table, bias));

    Array gate_up(format, tokens * n);
    silu_gated_linear(machine(), x.array.data(), tokens, weight.matrix(), up.matrix(), data_of(bias), data_of(up_bias),
                      gate_up.data());
    expect("silu_gated_linear", gate_up,
           gated(product(x.table, weight.table, bias), product(x.table, up.table, up_bias)));

    Layer low_rank_gate(format, k, rank, n, false), low_rank_up(format, k, rank + 2, n, false);
    Array low_rank_y(format, tokens * n);
    low_rank_silu_gated_linear(machine(), x.array.data(), tokens, low_rank_gate.view(), low_rank_up.view(),
                               low_rank_y.data());
    expect("low_rank_silu_gated_linear", low_rank_y,
           gated(low_rank_gate.outputs(x.table), low_rank_up.outputs(x.table)));
    group(x, k, rank, n);
  }

  // A low-rank layer, a pivoted one, and a dense one, whose every row is a pivot; alone and together.
  void group(Weight& x, int64_t k, int64_t rank, int64_t n) {
    Layer layers[] = {{format, k, rank, n, false}, {format, k, rank, n, true}, {format, k, n, 0, true}};
    std::vector<LowRankLayer> views;
    std::vector<Table> tables;
    Table together(x.table.rows, 0);
    for (Layer& layer : layers) {
      views.push_back(layer.view());
      tables.push_back(layer.outputs(x.table));
      Array y(format, x.table.rows * tables.back().cols);
      low_rank_linear(machine(), x.array.data(), x.table.rows, &views.back(), 1, y.data());
      expect("low_rank_linear", y, tables.back());
      together.cols += tables.back().cols;
    }
    for (int64_t m = 0; m < together.rows; ++m) {
      for (const Table& table : tables) {
        for (int64_t j = 0; j < table.cols; ++j) together.numbers.push_back(table.at(m, j));
      }
    }
    Array y(format, together.numbers.size());
    low_rank_linear(machine(), x.array.data(), x.table.rows, views.data(), views.size(), y.data());
    expect("low_rank_linear of a group", y, together);
  }

  // Outputs are rounded to the nearest number, ties to even, over the whole range of the format.
  void store(float value) {
    kernel.store(&value, 1, element.data());
    const double found = element.get(0), expected = round_to(format, value);
    const bool same = found == expected && std::signbit(found) == std::signbit(expected);
    if (same || (std::isnan(found) && std::isnan(value))) return;
    std::printf("%.9g became %.9g, expected %.9g\n", value, found, expected);
    fail(kernel, format, "store");
  }

  void conversions() {
    for (int64_t i = 0; i < 20000; ++i) {
      const auto bits = static_cast<uint32_t>(generator());
      float value;
      std::memcpy(&value, &bits, sizeof value);
      store(value);
    }
    const int64_t patterns = format.bytes == 2 ? 65536 : 0;
    for (int64_t bits = 0; bits < patterns; ++bits) {
      const double value = decode(format, bits);
      element.set(0, value);
      float loaded;
      kernel.load(element.data(), 1, &loaded);
      if (loaded != value && !(std::isnan(loaded) && std::isnan(value))) fail(kernel, format, "load");
      store(loaded);
      if (!std::isfinite(value)) continue;
      // Halfway to the next number, and the floats on both sides of it.
      const double quantum = std::ldexp(1.0, std::max(std::ilogb(value), format.min_exponent) - format.mantissa);
      const float halfway = static_cast<float>(value + 0.5 * (value == 0 ? format.smallest() : quantum));
      for (float near : {std::nextafter(halfway, -INFINITY), halfway, std::nextafter(halfway, INFINITY)}) store(near);
    }
    cases += 20000 + patterns;
  }
};

void run(const RowKernel& kernel, const Format& format) {
  Test test{kernel, format};
  test.conversions();
  const int64_t token_counts[] = {1, 2, 3, 5, 16, 17, 37}, features[] = {1, 7, 63, 100, 289}, ranks[] = {1, 17, 64},
                outputs[] = {1, 33, 100};
  int64_t i = 0;
  for (int64_t tokens : token_counts) {
    for (int64_t k : features) {
      test.ops(tokens, k, ranks[i % 3], outputs[i / 3 % 3]);
      ++i;
    }
  }
  const int64_t before = threads_started;
  for (int64_t tokens : {1, 5}) test.ops(tokens, 577, 150, 500);  // enough weights for several threads
  if (threads_started == before) fail(kernel, format, "ran in one thread");
  std::printf("%s %s: %ld cases\n", kernel.isa, format.name, static_cast<long>(test.cases));
}

}  // namespace

int main(int argc, char** argv) {
  for (const char* isa : {"scalar", "avx2", "avx512", "avx512_bf16"}) {
    if (argc > 1 && std::strcmp(isa, argv[1]) != 0) continue;
    for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
      if (const RowKernel* kernel = find_kernel(dtype, isa)) run(*kernel, format_of(dtype));
    }
  }
  if (find_kernel(Dtype::kFloat32, "no such thing")) return 1;
  std::puts("all passed");
  return 0;
}

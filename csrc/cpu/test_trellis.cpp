// The ops on weights on a trellis with every kernel of this processor, as test_decode.cpp does for the others.
#include "test_tools.h"
#include "trellis.h"

namespace {

using namespace lorap::cpu;

double number(int window) { return trellis_number(window) / 128.0; }

// Random words, which are rings whatever they hold, with random scales that every format holds; unused words and scales
// between rows.
struct OnTrellis {
  OnTrellis(Dtype dtype, const char* isa, int bits, int64_t group, int64_t rows, int64_t cols)
      : table(rows, cols),
        group(group),
        word_stride(cols * 2 * bits + random_below(2) * 3),
        scale_stride((cols + group - 1) / group + random_below(2) * 2),
        words(rows ? (rows - 1) / kTrellisRows * word_stride + cols * 2 * bits : 0),
        scales(format_of(dtype), rows ? (rows - 1) * scale_stride + (cols + group - 1) / group : 0),
        scale_kernel(find_kernel(dtype, isa)) {
    for (uint32_t& word : words) word = generator();
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t j = 0; j < cols; ++j) {
        if (j % group == 0) scales.set(i * scale_stride + j / group, (1 + random_below(128)) / 512.0);
        const double value = number(window(i, j, bits)) * scales.get(i * scale_stride + j / group);
        table.at(i, j) = {value, std::abs(value)};
      }
    }
  }
  int window(int64_t row, int64_t col, int bits) const {
    const uint32_t* ring = &words[row / kTrellisRows * word_stride + col * 2 * bits];
    int result = 0;
    for (int i = 0; i < kTrellisWindow; ++i) {
      const int64_t bit = (row % kTrellisRows * bits + i) % (kTrellisRows * bits);
      result |= (ring[bit / 32] >> bit % 32 & 1) << i;
    }
    return result;
  }
  TrellisMatrix matrix() {
    return {words.data(), table.rows, table.cols, word_stride, scales.data(), scale_stride, scale_kernel, group};
  }
  Table table;
  int64_t group, word_stride, scale_stride;
  std::vector<uint32_t> words;
  Array scales;
  const RowKernel* scale_kernel;
};

// Errors of paths, in double precision.
struct Path {
  int bits;
  const double *wanted, *importance;

  double error(int row, int window) const {
    const double off = wanted[row % kTrellisRows] - number(window);
    return importance[row % kTrellisRows] * off * off;
  }
  // The least error, by the bits that row `first` shares with the one above it; `ends` of row `last`, or -1 for any.
  std::vector<double> least(int first, int last, int ends) const {
    const int shared = kTrellisWindows >> bits;
    std::vector<double> now(shared, ends < 0 ? 0 : INFINITY), next(shared);
    if (ends >= 0) now[ends] = 0;
    for (int row = last; row >= first; --row) {
      std::fill(next.begin(), next.end(), INFINITY);
      for (int n = 0; n < kTrellisWindows; ++n) {
        next[n % shared] = std::min(next[n % shared], now[n >> bits] + error(row, n));
      }
      now.swap(next);
    }
    return now;
  }
};

[[noreturn]] void fail(const TrellisKernel& kernel, const char* what) {
  std::printf("FAILED: %s %d bits %s\n", kernel.isa, kernel.bits, what);
  std::exit(1);
}

// A ring's error is the least of all rings with its bits at the seam.
void search(const TrellisKernel& kernel, int64_t rows, int64_t cols) {
  const int64_t tiles = (rows + kTrellisRows - 1) / kTrellisRows;
  std::vector<float> wanted(rows * cols), importance(2 * rows * cols);
  std::normal_distribution<float> normal;
  for (float& value : wanted) value = normal(generator);
  for (float& value : importance) value = static_cast<float>(random_below(5)) / 4;
  wanted[0] = NAN, importance[0] = 0;
  std::vector<int32_t> windows(tiles * kTrellisRows * cols, -1);
  const TrellisTargets targets{wanted.data(), importance.data(), rows, cols, {1, rows}, {2 * cols, 2}};
  trellis_search(kernel, parallel_for, 3, targets, windows.data());
  const int kept = (kTrellisWindows >> kernel.bits) - 1;
  for (int64_t tile = 0; tile < tiles; ++tile) {
    for (int64_t col = 0; col < cols; ++col) {
      double t[kTrellisRows] = {}, w[kTrellisRows] = {}, found = 0;
      const Path path{kernel.bits, t, w};
      const auto window = [&](int row) { return windows[(tile * kTrellisRows + row % kTrellisRows) * cols + col]; };
      for (int i = 0; i < kTrellisRows; ++i) {
        const int64_t row = tile * kTrellisRows + i;
        if (row < rows) w[i] = importance[row * 2 * cols + col * 2];
        if (row < rows && w[i] != 0) t[i] = wanted[row + col * rows];
        if (window(i) < 0 || window(i) >= kTrellisWindows ||
            window(i + 1) != (window(i) >> kernel.bits | (window(i + 1) & ~kept))) {
          fail(kernel, "windows that are no ring");
        }
        found += path.error(i, window(i));
      }
      const int ends = window(0) & kept;
      const double best = path.least(0, kTrellisRows - 1, ends)[ends];
      if (!(found <= best * (1 + 1e-5) + 1e-6)) fail(kernel, "not the best path");
    }
  }
}

// A product, and its place among outputs that lie side by side.
struct Case {
  Case(const TrellisKernel& kernel, Dtype dtype, int64_t tokens, int64_t k, int64_t n, int64_t group)
      : kernel(kernel),
        x(format_of(dtype), tokens, k),
        weight(random_below(2) ? Dtype::kFloat32 : dtype, kernel.isa, kernel.bits, group, n, k),
        bias(some_bias(format_of(dtype), n)) {}
  TrellisProduct to(void* y, int64_t stride) {
    return {&kernel, weight.matrix(), data_of(bias), x.array.data(), y, stride};
  }
  void check(const Array& y, int64_t first, int64_t stride, const Format& format) const {
    const Table expected = product(x.table, weight.table, bias);
    const int64_t n = weight.table.rows;
    for (int64_t i = 0; i < x.table.rows * n; ++i) {
      const double found = y.get(i / n * stride + first + i % n);
      const Number want = expected.numbers[i];
      if (std::abs(found - want.exact) <= 8 * format.eps() * want.size + format.smallest()) continue;
      std::printf("%s, %ld tokens, row %ld: %g, expected %g\n", format.name, static_cast<long>(x.table.rows),
                  static_cast<long>(i % n), found, want.exact);
      fail(kernel, "linear");
    }
  }
  const TrellisKernel& kernel;
  Weight x;
  OnTrellis weight;
  Bias bias;
};

void products(std::vector<Case>& cases, Dtype dtype) {
  int64_t stride = 0, first = 0;
  const int64_t tokens = cases[0].x.table.rows;
  for (const Case& one : cases) stride += one.weight.table.rows;
  Array y(format_of(dtype), tokens * stride);
  std::vector<TrellisProduct> all;
  for (Case& one : cases) {
    char* own = static_cast<char*>(y.data()) + first * format_of(dtype).bytes;
    all.push_back(one.to(own, stride));
    first += one.weight.table.rows;
  }
  trellis_products({find_kernel(dtype, cases[0].kernel.isa), parallel_for, 3}, tokens, all.data(), all.size());
  first = 0;
  for (const Case& one : cases) {
    one.check(y, first, stride, format_of(dtype));
    first += one.weight.table.rows;
  }
}

void linear(const TrellisKernel& kernel, Dtype dtype, int64_t tokens, int64_t k, int64_t n, int64_t group) {
  std::vector<Case> cases;
  cases.emplace_back(kernel, dtype, tokens, k, n, group);
  products(cases, dtype);
}

// With other bits, groups and inputs each.
void side_by_side(const TrellisKernel& kernel, Dtype dtype, int64_t tokens) {
  const TrellisKernel& other = *find_trellis_kernel(kernel.bits == 2 ? 3 : 2, kernel.isa);
  std::vector<Case> cases;
  cases.emplace_back(kernel, dtype, tokens, 100, 65, 32);
  cases.emplace_back(other, dtype, tokens, 31, 1, 64);
  cases.emplace_back(kernel, dtype, tokens, 289, 150, 96);
  products(cases, dtype);
}

// The weight, transposed: numbers and scales in the format, their product rounded once.
void whole_weight(const TrellisKernel& kernel, Dtype dtype, int64_t k, int64_t n, int64_t group) {
  const Format& format = format_of(dtype);
  OnTrellis weight(dtype, kernel.isa, kernel.bits, group, n, k);
  Array found(format, k * n);
  trellis_weight({find_kernel(dtype, kernel.isa), parallel_for, 3}, kernel, weight.matrix(), found.data());
  for (int64_t i = 0; i < n; ++i) {
    for (int64_t j = 0; j < k; ++j) {
      const double scale = weight.scales.get(i * weight.scale_stride + j / group);
      const double exact = round_to(format, number(weight.window(i, j, kernel.bits))) * scale;
      if (found.get(j * n + i) != round_to(format, exact)) fail(kernel, "a weight");
    }
  }
}

void run(const TrellisKernel& kernel) {
  const int64_t token_counts[] = {1, 2, 3, 4, 5, 8, 17, 65}, features[] = {1, 31, 64, 100, 289},
                outputs[] = {1, 63, 64, 65, 150}, groups[] = {32, 64, 96, 128, 4224};
  int64_t cases = 0;
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (int64_t tokens : token_counts) {
      for (int64_t k : features) {
        linear(kernel, dtype, tokens, k, outputs[(cases / 5 + cases) % 5], groups[cases % 4 + (k == 289)]);
        ++cases;
      }
    }
  }
  for (Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (int64_t n : outputs) {
      for (int64_t k : features) whole_weight(kernel, dtype, k, n, groups[(n + k) % 5]);
    }
  }
  for (int64_t tokens : {1, 3, 65}) side_by_side(kernel, Dtype::kBFloat16, tokens);
  const int64_t before = threads_started;
  linear(kernel, Dtype::kFloat32, 1, 577, 500, 64);
  whole_weight(kernel, Dtype::kFloat32, 577, 500, 64);
  if (threads_started == before) fail(kernel, "linear ran in one thread");
  for (int64_t rows : {1, 64, 100}) search(kernel, rows, 2);
  if (threads_started == before + 3) fail(kernel, "search ran in one thread");
  std::printf("%s %d bits: %ld cases\n", kernel.isa, kernel.bits, static_cast<long>(cases + 7));
}

}  // namespace

int main(int argc, char** argv) {
  for (const char* isa : {"scalar", "avx2", "avx512", "avx512_vbmi"}) {
    if (argc > 1 && std::strcmp(isa, argv[1]) != 0) continue;
    for (int bits = kTrellisFewestBits; bits <= kTrellisMostBits; ++bits) {
      if (const TrellisKernel* kernel = find_trellis_kernel(bits, isa)) run(*kernel);
    }
  }
  if (find_trellis_kernel(4, "no such thing")) return 1;
  std::puts("all passed");
  return 0;
}

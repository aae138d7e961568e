#include "decoder_layer.h"

#include <bit>
#include <cstring>
#include <numeric>

#include "row_blocks.h"

namespace lorap::cpu {
namespace {

using Bytes = std::unique_ptr<char[], Free>;
using Floats = std::unique_ptr<float[], Free>;

// Multiplications that are worth waking another thread for.
constexpr int64_t kGrainProducts = 1 << 16;

const char* at(const void* data, int64_t index, int64_t element) {
  return static_cast<const char*>(data) + index * element;
}
char* at(void* data, int64_t index, int64_t element) { return static_cast<char*>(data) + index * element; }

// Values of the dtype, in float32.
void round(const RowKernel& kernel, float* values, int64_t count, char* scratch) {
  if (kernel.element_bytes == sizeof(float)) return;
  kernel.store(values, count, scratch);
  kernel.load(scratch, count, values);
}

// e^x for x <= 0, to 2 units in the last place, and 0 below -87: without branches, so that it runs in vectors.
inline float exp_negative(float x) {
  constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
  constexpr float kRounder = 12582912.0f;  // 1.5 * 2^23: adding it leaves a whole number in the low bits
  const float clamped = x < -87.0f ? -87.0f : x;
  const float shifted = clamped * kLog2E + kRounder;
  const float whole = shifted - kRounder;
  const float r = clamped - whole * kLn2High - whole * kLn2Low;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(shifted) << 23) + 0x3f800000u);
  return x < -87.0f ? 0.0f : p * power;
}

float sum_squares(const float* x, int64_t count) {
  constexpr int kLanes = 16;
  float sums[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (int j = 0; j < kLanes; ++j) sums[j] += x[i + j] * x[i + j];
  }
  for (; i < count; ++i) sums[0] += x[i] * x[i];
  return std::accumulate(sums, sums + kLanes, 0.0f);
}

// RMSNorm of x[count] in place: rounded before the weight and left to be rounded behind it.
void normalize(const RowKernel& kernel, float* x, int64_t count, const void* weight, float epsilon, float* weights,
               char* bytes) {
  const float factor = 1.0f / std::sqrt(sum_squares(x, count) / static_cast<float>(count) + epsilon);
  for (int64_t i = 0; i < count; ++i) x[i] *= factor;
  round(kernel, x, count, bytes);
  kernel.load(weight, count, weights);
  for (int64_t i = 0; i < count; ++i) x[i] *= weights[i];
}

void normalize_rows(const RowKernel& kernel, const void* x, int64_t rows, int64_t count, const void* weight,
                    float epsilon, void* y) {
  const Floats values = scratch<float>(2 * count);
  const Bytes bytes = scratch<char>(count * kernel.element_bytes);
  for (int64_t row = 0; row < rows; ++row) {
    kernel.load(at(x, row * count, kernel.element_bytes), count, values.get());
    normalize(kernel, values.get(), count, weight, epsilon, values.get() + count, bytes.get());
    kernel.store(values.get(), count, at(y, row * count, kernel.element_bytes));
  }
}

// y += x, both (count,) in the dtype.
void add(const RowKernel& kernel, const void* x, int64_t count, void* y) {
  const Floats values = scratch<float>(2 * count);
  kernel.load(x, count, values.get());
  kernel.load(y, count, values.get() + count);
  for (int64_t i = 0; i < count; ++i) values[count + i] += values[i];
  kernel.store(values.get() + count, count, y);
}

// Projections with codes, of all tokens into rows of `width`. What a right factor makes is rounded, as where the
// factors are called one after the other.
void project_codes(Machine machine, const Projection* parts, int64_t count, const void* x, int64_t tokens, void* y,
                   int64_t width) {
  const int64_t element = machine.kernel->element_bytes;
  std::vector<TrellisProduct> first, second;
  std::vector<Bytes> shrunk;
  for (int64_t i = 0, at_output = 0; i < count; at_output += parts[i++].out_features()) {
    const TrellisLayer& codes = parts[i].codes;
    char* own = at(y, at_output, element);
    if (parts[i].form == Projection::Form::kTrellis) {
      first.push_back({codes.kernel, codes.left, parts[i].bias, x, own, width});
      continue;
    }
    shrunk.push_back(scratch<char>(tokens * codes.right.rows * element));
    first.push_back({codes.kernel, codes.right, nullptr, x, shrunk.back().get(), codes.right.rows});
    second.push_back({codes.kernel, codes.left, parts[i].bias, shrunk.back().get(), own, width});
  }
  trellis_products(machine, tokens, first.data(), first.size());
  if (!second.empty()) trellis_products(machine, tokens, second.data(), second.size());
}

void project(Machine machine, const Projection& how, const void* x, int64_t tokens, void* y) {
  if (how.is_trellis()) return project_codes(machine, &how, 1, x, tokens, y, how.out_features());
  if (how.is_quantized()) return quantized_layers(how.machine, x, tokens, &how.numbers, 1, y);
  if (how.form == Projection::Form::kLowRank) return low_rank_linear(machine, x, tokens, &how.factors, 1, y);
  linear(machine, x, tokens, how.weight, how.bias, y);
}

const QuantizedMatrix& reads_input(const QuantizedLayer& layer) { return layer.low_rank ? layer.right : layer.left; }

// Projections of the same x, of all tokens into rows of all outputs: in one group where they can share the packed x.
void project_together(Machine machine, const Projection* parts, int64_t count, const void* x, int64_t tokens, void* y,
                      int64_t width) {
  bool floats = true, numbers = true, codes = true;
  for (int64_t i = 0; i < count; ++i) {
    floats = floats && !parts[i].is_quantized() && !parts[i].is_trellis();
    codes = codes && parts[i].is_trellis();
    numbers = numbers && parts[i].is_quantized() && parts[i].machine.kernel == parts[0].machine.kernel &&
              reads_input(parts[i].numbers).group == reads_input(parts[0].numbers).group;
  }
  if (numbers) {
    std::vector<QuantizedLayer> group;
    for (int64_t i = 0; i < count; ++i) group.push_back(parts[i].numbers);
    return quantized_layers(parts[0].machine, x, tokens, group.data(), count, y);
  }
  if (codes) return project_codes(machine, parts, count, x, tokens, y, width);
  if (floats) {  // a dense layer is a pivoted one whose every row is a pivot
    std::vector<LowRankLayer> group;
    std::vector<std::vector<int64_t>> all_rows(count);
    for (int64_t i = 0; i < count; ++i) {
      const Projection& one = parts[i];
      if (one.form == Projection::Form::kLowRank) {
        group.push_back(one.factors);
        continue;
      }
      all_rows[i].resize(one.weight.rows);
      std::iota(all_rows[i].begin(), all_rows[i].end(), 0);
      group.push_back({one.weight, {nullptr, 0, one.weight.rows, one.weight.rows}, one.bias, all_rows[i].data()});
    }
    return low_rank_linear(machine, x, tokens, group.data(), count, y);
  }
  const int64_t element = machine.kernel->element_bytes;
  for (int64_t i = 0, first = 0; i < count; first += parts[i++].out_features()) {
    const int64_t own = parts[i].out_features();
    const Bytes rows = scratch<char>(tokens * own * element);
    project(machine, parts[i], x, tokens, rows.get());
    for (int64_t m = 0; m < tokens; ++m) {
      std::memcpy(at(y, m * width + first, element), at(rows.get(), m * own, element), own * element);
    }
  }
}

// silu(gate(x)) * up(x), (tokens, width), of gate and up.
void project_gated(Machine machine, const Projection* pair, const void* x, int64_t tokens, void* y) {
  using Form = Projection::Form;
  const Projection &gate = pair[0], &up = pair[1];
  const bool alike = gate.form == up.form;
  if (alike && gate.form == Form::kDense) {
    return silu_gated_linear(machine, x, tokens, gate.weight, up.weight, gate.bias, up.bias, y);
  }
  if (alike && gate.form == Form::kLowRank && !gate.factors.pivot_rows && !up.factors.pivot_rows) {
    return low_rank_silu_gated_linear(machine, x, tokens, gate.factors, up.factors, y);
  }
  if (alike && gate.form == Form::kQuantized && !gate.bias && !up.bias && gate.machine.kernel == up.machine.kernel &&
      gate.numbers.left.group == up.numbers.left.group) {
    return quantized_silu_gated_linear(gate.machine, x, tokens, gate.numbers.left, up.numbers.left, y);
  }
  const RowKernel& kernel = *machine.kernel;
  const int64_t width = gate.out_features(), element = kernel.element_bytes;
  const Bytes rows = scratch<char>(2 * tokens * width * element);
  const Floats values = scratch<float>(2 * width);
  float *left = values.get(), *right = left + width;
  project_together(machine, pair, 2, x, tokens, rows.get(), 2 * width);
  for (int64_t m = 0; m < tokens; ++m) {
    char* row = at(rows.get(), 2 * m * width, element);
    kernel.load(row, 2 * width, left);
    for (int64_t i = 0; i < width; ++i) left[i] = silu(left[i]);
    round(kernel, left, width, row);
    for (int64_t i = 0; i < width; ++i) right[i] *= left[i];
    kernel.store(right, width, at(y, m * width, element));
  }
}

// The heads of one token, one after the other: their norm, where there is one, and their rotation.
class Heads {
 public:
  Heads(const RowKernel& kernel, const DecoderLayer& layer)
      : kernel_(kernel),
        dim_(layer.head_dim),
        epsilon_(layer.epsilon),
        values_(scratch<float>(6 * dim_)),
        bytes_(scratch<char>(dim_ * kernel.element_bytes)) {}

  void turn_to(const void* cos, const void* sin) {
    kernel_.load(cos, dim_, part(4));
    kernel_.load(sin, dim_, part(5));
  }

  // from (dim,) to (dim,), which may be the same.
  void rotate(const void* from, const void* norm, void* to) {
    float *x = part(0), *kept = part(1), *turned = part(2);
    kernel_.load(from, dim_, x);
    if (norm) {
      normalize(kernel_, x, dim_, norm, epsilon_, part(3), bytes_.get());
      round(kernel_, x, dim_, bytes_.get());
    }
    const int64_t half = dim_ / 2;
    const float *cos = part(4), *sin = part(5);
    for (int64_t i = 0; i < dim_; ++i) kept[i] = x[i] * cos[i];
    for (int64_t i = 0; i < half; ++i) turned[i] = -x[i + half] * sin[i];
    for (int64_t i = half; i < dim_; ++i) turned[i] = x[i - half] * sin[i];
    round(kernel_, kept, dim_, bytes_.get());
    round(kernel_, turned, dim_, bytes_.get());
    for (int64_t i = 0; i < dim_; ++i) kept[i] += turned[i];
    kernel_.store(kept, dim_, to);
  }

 private:
  float* part(int64_t index) { return values_.get() + index * dim_; }
  const RowKernel& kernel_;
  int64_t dim_;
  float epsilon_;
  Floats values_;
  Bytes bytes_;
};

// Rotates q in `rows` (q, k, v of each token) in place, and appends k and v to the cache.
void append(const RowKernel& kernel, const DecoderLayer& layer, const KeyValues& cache, const Positions& positions,
            int64_t sequences, void* rows) {
  const int64_t dim = layer.head_dim, element = kernel.element_bytes;
  const int64_t width = (layer.heads + 2 * layer.kv_heads) * dim;
  Heads heads(kernel, layer);
  for (int64_t m = 0; m < sequences; ++m) {
    const int64_t turn = m * positions.rotation_stride;
    heads.turn_to(at(positions.cos, turn, element), at(positions.sin, turn, element));
    char* row = at(rows, m * width, element);
    for (int64_t h = 0; h < layer.heads; ++h) {
      char* q = at(row, h * dim, element);
      heads.rotate(q, layer.q_norm, q);
    }
    for (int64_t h = 0; h < layer.kv_heads; ++h) {
      const int64_t head = m * layer.kv_heads + h;
      heads.rotate(at(row, (layer.heads + h) * dim, element), layer.k_norm,
                   at(cache.keys, (head * cache.capacity + cache.length) * dim, element));
      const char* v = at(row, (layer.heads + layer.kv_heads + h) * dim, element);
      char* column = at(cache.values, head * dim * cache.capacity + cache.length, element);
      for (int64_t i = 0; i < dim; ++i)
        std::memcpy(at(column, i * cache.capacity, element), at(v, i, element), element);
    }
  }
}

// Scores of one head to probabilities; a token that may see nothing gets zeros.
void softmax(float* scores, int64_t length, float scaling, const float* mask) {
  float largest = -INFINITY;
  for (int64_t n = 0; n < length; ++n) {
    scores[n] *= scaling;
    if (mask) scores[n] += mask[n];
    largest = largest < scores[n] ? scores[n] : largest;
  }
  if (largest == -INFINITY) largest = 0;
  for (int64_t n = 0; n < length; ++n) scores[n] = exp_negative(scores[n] - largest);
  float sum = 0;
  for (int64_t n = 0; n < length; ++n) sum += scores[n];
  const float factor = sum == 0 ? 0 : 1 / sum;
  for (int64_t n = 0; n < length; ++n) scores[n] *= factor;
}

int64_t packed_bytes(const RowKernel& kernel, int64_t k) {
  return (k + kernel.step - 1) / kernel.step * kernel.step * kernel.packed_bytes;
}

// Query heads [first, first + count) of a sequence, which share keys and values: q (count, dim) to y (count, dim).
void attend(const RowKernel& kernel, const DecoderLayer& layer, const char* keys, const char* values, int64_t capacity,
            int64_t length, const float* mask, const char* q, int64_t count, char* y) {
  const int64_t dim = layer.head_dim, element = kernel.element_bytes;
  const int64_t q_bytes = packed_bytes(kernel, dim), p_bytes = packed_bytes(kernel, length);
  const Bytes packed = scratch<char>(count * std::max(q_bytes, p_bytes));
  const Floats sums = scratch<float>(count * std::max(length, dim));
  for (int64_t i = 0; i < count; ++i) kernel.pack(at(q, i * dim, element), dim, packed.get() + i * q_bytes);
  kernel.dot(keys, dim, length, dim, packed.get(), q_bytes, count, sums.get(), length);
  for (int64_t i = 0; i < count; ++i) softmax(sums.get() + i * length, length, layer.scaling, mask);
  for (int64_t i = 0; i < count; ++i) {
    kernel.pack_float(sums.get() + i * length, length, packed.get() + i * p_bytes);
  }
  kernel.dot(values, capacity, dim, length, packed.get(), p_bytes, count, sums.get(), dim);
  kernel.store(sums.get(), count * dim, y);
}

// q of `rows` (q, k, v of each token) over the cache, to y (sequences, heads * dim).
void attend_all(Machine machine, const DecoderLayer& layer, const KeyValues& cache, const float* mask,
                int64_t sequences, const void* rows, void* y) {
  const RowKernel& kernel = *machine.kernel;
  const int64_t dim = layer.head_dim, element = kernel.element_bytes, length = cache.length + 1;
  const int64_t width = (layer.heads + 2 * layer.kv_heads) * dim, shared = layer.heads / layer.kv_heads;
  auto work = [&](int64_t begin, int64_t end) {
    for (int64_t head = begin; head < end; ++head) {
      const int64_t m = head / layer.kv_heads, first = head % layer.kv_heads * shared;
      const int64_t own = head * cache.capacity * dim;
      for (int64_t i = 0; i < shared; i += kMaxTokens) {
        attend(kernel, layer, at(cache.keys, own, element), at(cache.values, own, element), cache.capacity, length,
               mask ? mask + m * length : nullptr, at(rows, m * width + (first + i) * dim, element),
               std::min(kMaxTokens, shared - i), at(y, (m * layer.heads + first + i) * dim, element));
      }
    }
  };
  const int64_t heads = sequences * layer.kv_heads, products = 2 * shared * length * dim;
  if (machine.threads == 1 || heads * products <= kGrainProducts) return work(0, heads);
  machine.parallel_for(
      0, heads, std::max<int64_t>(1, kGrainProducts / products),
      [](int64_t begin, int64_t end, void* context) { (*static_cast<decltype(work)*>(context))(begin, end); }, &work);
}

}  // namespace

int64_t Projection::out_features() const {
  if (is_trellis()) return codes.left.rows;
  if (is_quantized()) return numbers.left.rows;
  return form == Form::kLowRank ? factors.out_features() : weight.rows;
}

int64_t Projection::in_features() const {
  if (is_trellis()) return form == Form::kTrellis ? codes.left.cols : codes.right.cols;
  if (is_quantized()) return reads_input(numbers).cols;
  return form == Form::kLowRank ? factors.right.cols : weight.cols;
}

void decoder_layer(Machine machine, const DecoderLayer& layer, const void* x, int64_t sequences, KeyValues cache,
                   Positions positions, void* y) {
  const RowKernel& kernel = *machine.kernel;
  const int64_t element = kernel.element_bytes, all = sequences * layer.hidden;
  const int64_t width = (layer.heads + 2 * layer.kv_heads) * layer.head_dim;
  const int64_t attended = sequences * layer.heads * layer.head_dim;
  const int64_t inner = sequences * layer.projections[kGate].out_features();
  const Bytes normed = scratch<char>(all * element), rows = scratch<char>(sequences * width * element);
  const Bytes mixed = scratch<char>(std::max(attended, inner) * element), update = scratch<char>(all * element);

  normalize_rows(kernel, x, sequences, layer.hidden, layer.input_norm, layer.epsilon, normed.get());
  project_together(machine, layer.projections + kQ, 3, normed.get(), sequences, rows.get(), width);
  append(kernel, layer, cache, positions, sequences, rows.get());
  attend_all(machine, layer, cache, positions.mask, sequences, rows.get(), mixed.get());
  project(machine, layer.projections[kO], mixed.get(), sequences, y);
  add(kernel, x, all, y);

  normalize_rows(kernel, y, sequences, layer.hidden, layer.post_norm, layer.epsilon, normed.get());
  project_gated(machine, layer.projections + kGate, normed.get(), sequences, mixed.get());
  project(machine, layer.projections[kDown], mixed.get(), sequences, update.get());
  add(kernel, update.get(), all, y);
}

}  // namespace lorap::cpu

// A whole decoder layer as a torch operator, see ops.cpp.
//
// `weights` are input_norm, post_norm, and q_norm and k_norm, without elements where there are none; then those of q,
// k, v, o, gate, up and down, each in its form:
//
//   0  weight, bias                                                  forms: 0
//   1  right, left, bias, pivot_rows                                        1
//   2  packed, scales, bias                                                 2 + 8 * bits + 128 * group
//   3  left_packed, left_scales, right_packed, right_scales, bias           3 + 8 * bits + 128 * group
//   4, 5  as 2 and 3, with codes on a trellis                               4 or 5, likewise
//
// A bias or pivot_rows without elements is none.
#include "decoder_layer.h"
#include "trellis_tensors.h"

namespace {

using lorap::cpu::Projection;

const char* const kNames[lorap::cpu::kRoles] = {"q_proj",    "k_proj",  "v_proj",   "o_proj",
                                                "gate_proj", "up_proj", "down_proj"};

// Takes tensors from the list, one after the other; copies that the kernels need stay there.
class Weights {
 public:
  Weights(std::vector<Tensor>& tensors, const Tensor& x) : tensors_(tensors), x_(x) {}

  Tensor& next() {
    STD_TORCH_CHECK(used_ < tensors_.size(), "lorap_cpu: ", tensors_.size(), " weights are too few for this layer");
    return tensors_[used_++];
  }

  // Null where the tensor has no elements.
  const void* vector(const char* name, int64_t size) {
    Tensor& tensor = next();
    if (!tensor.numel()) return nullptr;
    OptionalTensor some = tensor;
    const void* data = vector_data(name, some, x_, size);
    tensor = *some;
    return data;
  }

  Projection projection(const char* name, int64_t form, int64_t in_features) {
    const int64_t kind = form % 8, bits = form / 8 % 16, group = form / 128;
    STD_TORCH_CHECK(form >= 0 && kind <= 5, "lorap_cpu: ", name, " has form ", form);
    Projection result{static_cast<Projection::Form>(kind), {}, {}, {}, {}, {}, nullptr};
    if (kind == 0) {
      result.weight = matrix(name, next(), x_, in_features);
      result.bias = vector("bias", result.weight.rows);
    } else if (kind == 1) {
      Tensor &right = next(), &left = next(), &bias = next(), &rows = next();
      OptionalTensor some_bias, pivots;
      if (bias.numel()) some_bias = bias;
      if (rows.numel()) pivots = rows;
      result.factors = layer(x_, in_features, right, left, some_bias, pivots);
      result.bias = result.factors.bias;
      if (some_bias) bias = *some_bias;
      if (pivots) rows = *pivots;
    } else if (kind <= 3) {
      result.machine = machine(dtype_of(x_), bits);
      result.numbers.low_rank = kind == 3;
      const auto read = [&](Tensor& packed, Tensor& scales, int64_t cols) {
        return quantized_matrix(name, packed, scales, cols, bits, group);
      };
      read_stored(kind == 3, in_features, result.numbers.right, result.numbers.left, read);
      result.bias = result.numbers.bias = vector("bias", result.numbers.left.rows);
    } else {
      result.codes.kernel = &trellis_kernel(bits);
      const auto read = [&](Tensor& packed, Tensor& scales, int64_t cols) {
        return trellis_matrix(name, packed, scales, cols, bits, group);
      };
      read_stored(kind == 5, in_features, result.codes.right, result.codes.left, read);
      result.bias = vector("bias", result.codes.left.rows);
    }
    return result;
  }

  void check_all_used() const {
    STD_TORCH_CHECK(used_ == tensors_.size(), "lorap_cpu: ", tensors_.size(), " weights for a layer of ", used_);
  }

 private:
  // Weights in few bits, of which `read` makes a matrix.
  template <class Read>
  void read_stored(bool low_rank, int64_t in_features, QuantizedMatrix& right, QuantizedMatrix& left,
                   const Read& read) {
    Tensor &left_packed = next(), &left_scales = next();
    if (low_rank) {
      Tensor &right_packed = next(), &right_scales = next();
      right = read(right_packed, right_scales, in_features);
      in_features = right.rows;
    }
    left = read(left_packed, left_scales, in_features);
  }

  std::vector<Tensor>& tensors_;
  const Tensor& x_;
  size_t used_ = 0;
};

void check_size(const char* name, int64_t is, int64_t wanted) {
  STD_TORCH_CHECK(is == wanted, "lorap_cpu: ", name, " is ", is, ", and the other tensors say ", wanted);
}

// Room for keys or values, which are written in place.
void* room(const char* name, Tensor& tensor, const Tensor& x, int64_t sequences, int64_t third, int64_t fourth) {
  check_like(name, tensor, x);
  STD_TORCH_CHECK(tensor.dim() == 4 && tensor.is_contiguous(), "lorap_cpu: ", name,
                  " must have 4 dimensions and no gaps");
  check_size("the number of sequences in the cache", tensor.size(0), sequences);
  check_size("a size of the cache", tensor.size(2), third);
  check_size("a size of the cache", tensor.size(3), fourth);
  return tensor.mutable_data_ptr();
}

void fill_shapes(lorap::cpu::DecoderLayer& layer, const Tensor& keys) {
  using namespace lorap::cpu;
  const Projection* parts = layer.projections;
  layer.kv_heads = keys.size(1);
  layer.heads = layer.head_dim ? parts[kQ].out_features() / layer.head_dim : 0;
  STD_TORCH_CHECK(layer.head_dim > 0 && layer.head_dim % 2 == 0 && layer.kv_heads > 0 && layer.heads > 0 &&
                      layer.heads % layer.kv_heads == 0,
                  "lorap_cpu: ", layer.heads, " heads of ", layer.head_dim, " channels cannot share ", layer.kv_heads,
                  " heads of keys");
  check_size("the output of q_proj", parts[kQ].out_features(), layer.heads * layer.head_dim);
  check_size("the output of k_proj", parts[kK].out_features(), layer.kv_heads * layer.head_dim);
  check_size("the output of v_proj", parts[kV].out_features(), layer.kv_heads * layer.head_dim);
  check_size("the input of o_proj", parts[kO].in_features(), layer.heads * layer.head_dim);
  check_size("the output of o_proj", parts[kO].out_features(), layer.hidden);
  check_size("the output of up_proj", parts[kUp].out_features(), parts[kGate].out_features());
  check_size("the output of down_proj", parts[kDown].out_features(), layer.hidden);
}

Tensor decoder_layer(Tensor x, Tensor cos, Tensor sin, OptionalTensor mask, Tensor keys, Tensor values, int64_t length,
                     std::vector<Tensor> weights, std::vector<int64_t> forms, double epsilon, double scaling) {
  using namespace lorap::cpu;
  const int64_t sequences = tokens_of(x);
  STD_TORCH_CHECK(sequences > 0 && sequences <= kMaxTokens, "lorap_cpu: ", sequences, " sequences; 1 to ", kMaxTokens,
                  " are possible");
  STD_TORCH_CHECK(forms.size() == kRoles, "lorap_cpu: ", forms.size(), " forms for ", int{kRoles}, " projections");
  STD_TORCH_CHECK(keys.dim() == 4, "lorap_cpu: keys must have 4 dimensions");
  DecoderLayer layer{};
  layer.hidden = x.size(x.dim() - 1);
  layer.head_dim = keys.size(3);
  layer.epsilon = static_cast<float>(epsilon);
  layer.scaling = static_cast<float>(scaling);
  Weights from(weights, x);
  layer.input_norm = from.vector("input_norm", layer.hidden);
  layer.post_norm = from.vector("post_norm", layer.hidden);
  STD_TORCH_CHECK(layer.input_norm && layer.post_norm, "lorap_cpu: a norm has no weight");
  layer.q_norm = from.vector("q_norm", layer.head_dim);
  layer.k_norm = from.vector("k_norm", layer.head_dim);
  for (int role = 0; role < kRoles; ++role) {
    const int64_t inputs[kRoles] = {layer.hidden,
                                    layer.hidden,
                                    layer.hidden,
                                    layer.projections[kQ].out_features(),
                                    layer.hidden,
                                    layer.hidden,
                                    layer.projections[kGate].out_features()};
    layer.projections[role] = from.projection(kNames[role], forms[role], inputs[role]);
  }
  from.check_all_used();
  fill_shapes(layer, keys);

  const int64_t capacity = keys.size(2);
  STD_TORCH_CHECK(length >= 0 && length < capacity, "lorap_cpu: no room at position ", length, " of ", capacity);
  KeyValues cache{room("keys", keys, x, sequences, capacity, layer.head_dim),
                  room("values", values, x, sequences, layer.head_dim, capacity), capacity, length};
  check_size("the number of heads of values", values.size(1), layer.kv_heads);
  const int64_t turns = tokens_of(cos);
  check_like("cos", cos, x);
  check_like("sin", sin, x);
  check_size("the number of rotations", tokens_of(sin), turns);
  STD_TORCH_CHECK(turns == 1 || turns == sequences, "lorap_cpu: ", turns, " rotations for ", sequences, " sequences");
  check_size("the length of cos", cos.size(cos.dim() - 1), layer.head_dim);
  check_size("the length of sin", sin.size(sin.dim() - 1), layer.head_dim);
  const float* added = nullptr;
  if (mask) {
    STD_TORCH_CHECK(mask->is_cpu() && mask->scalar_type() == ScalarType::Float, "lorap_cpu: the mask must be float32");
    if (!mask->is_contiguous()) *mask = torch::stable::contiguous(*mask);
    check_size("the size of the mask", mask->numel(), times(sequences, length + 1));
    added = static_cast<const float*>(aligned_data(*mask));
  }
  Tensor y = output_like(x, layer.hidden);
  lorap::cpu::decoder_layer(machine(dtype_of(x)), layer, x.const_data_ptr(), sequences, cache,
                            {cos.const_data_ptr(), sin.const_data_ptr(), turns == 1 ? 0 : layer.head_dim, added},
                            y.mutable_data_ptr());
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lorap_cpu, m) {
  m.def(
      "decoder_layer(Tensor x, Tensor cos, Tensor sin, Tensor? mask, Tensor(a!) keys, Tensor(b!) values, int length, "
      "Tensor[] weights, int[] forms, float epsilon, float scaling) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lorap_cpu, CPU, m) { m.impl("decoder_layer", TORCH_BOX(&decoder_layer)); }

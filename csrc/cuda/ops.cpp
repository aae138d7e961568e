// The CUDA kernels as torch operators lorap_cuda::low_rank_linear and low_rank_linear_group, and quantized_... of both,
// through torch's stable ABI: the library works with the torch it was built for and every later one, and with any
// Python. The gradient is left to lorap/nn/ops.py.

#include <cstdint>
#include <optional>
#include <vector>

#include "../torch_stable.h"
#include "low_rank_decode.h"

// Part of the stable C interface, but declared there only where torch itself is built with CUDA. Weak, so that a
// library with this file in it also loads into a torch without CUDA, where no tensor can bring anyone here.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index,
                                                                                   void** ret_stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

void check_place(const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), "lorap_cuda: ", name,
                  " must be on the GPU of x");
  STD_TORCH_CHECK(tensor.is_contiguous(), "lorap_cuda: ", name, " must be contiguous");
}

void check_operand(const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "lorap_cuda: ", name, " and x must have the same dtype");
  check_place(name, tensor, x);
}

// Loads of 16 bytes fail on views that start in between.
void check_start(const char* name, const Tensor& tensor) {
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, "lorap_cuda: ", name,
                  " must start at a multiple of 16 bytes");
}

void check_matrix(const char* name, const Tensor& tensor, const Tensor& x) {
  check_operand(name, tensor, x);
  check_start(name, tensor);
}

// Borrowed tensors of one layer, null where it has none; with scales the factors are packed.
struct LayerTensors {
  const Tensor& right;
  const Tensor& left;
  const Tensor* bias;
  const Tensor* pivot_rows;
  const Tensor* right_scales = nullptr;
  const Tensor* left_scales = nullptr;
  int64_t bits = 16, group = 0;
  int64_t rank() const { return right.size(0); }
  int64_t out_features() const { return left.size(0) + (pivot_rows != nullptr ? rank() : 0); }
};

void check_pivots(const Tensor& rows, int64_t rank, const Tensor& x) {
  STD_TORCH_CHECK(rows.numel() == rank && rows.scalar_type() == ScalarType::Long, "lorap_cuda: pivot_rows must be ",
                  rank, " int64, one per rank; there are ", rows.numel());
  STD_TORCH_CHECK(rows.is_cuda() && rows.get_device_index() == x.get_device_index(),
                  "lorap_cuda: pivot_rows must be on the GPU of x");
  STD_TORCH_CHECK(rows.is_contiguous() && reinterpret_cast<uintptr_t>(rows.const_data_ptr()) % 16 == 0,
                  "lorap_cuda: pivot_rows must be contiguous and start at a multiple of 16 bytes");
}

// A factor of 4 or 8 bits with so many columns, and its scales.
void check_packed(const char* name, const char* scales_name, const Tensor& packed, const Tensor& scales,
                  const LayerTensors& layer, int64_t columns, const Tensor& x) {
  const int64_t words = columns * layer.bits / 32, groups = (columns + layer.group - 1) / layer.group;
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Int, "lorap_cuda: ", name, " must be int32");
  STD_TORCH_CHECK(packed.dim() == 2 && packed.size(1) == words, "lorap_cuda: ", name, " must have rows of ", words,
                  " words for ", columns, " columns of ", layer.bits, " bits");
  STD_TORCH_CHECK(scales.dim() == 2 && scales.size(0) == packed.size(0) && scales.size(1) == groups,
                  "lorap_cuda: ", scales_name, " must be (", packed.size(0), ", ", groups, ") for ", columns,
                  " columns in groups of ", layer.group);
  check_place(name, packed, x);
  check_start(name, packed);
  check_matrix(scales_name, scales, x);
}

void check_packed_factors(const LayerTensors& layer, const Tensor& x) {
  STD_TORCH_CHECK(layer.bits == 4 || layer.bits == 8, "lorap_cuda: weights have 4 or 8 bits, not ", layer.bits);
  STD_TORCH_CHECK(layer.group > 0 && layer.group % 32 == 0, "lorap_cuda: a group of ", layer.group,
                  " weights is no multiple of 32");
  STD_TORCH_CHECK(x.dim() >= 1 && layer.right.dim() == 2 && layer.left.dim() == 2,
                  "lorap_cuda: expected x (..., K), right_packed (R, words) and left_packed (N, words), got ", x.dim(),
                  ", ", layer.right.dim(), " and ", layer.left.dim(), " dimensions");
  const int64_t k = x.size(x.dim() - 1), r = layer.rank(), multiple = 128 / layer.bits, most = 1 << 19;
  STD_TORCH_CHECK(k > 0 && k % multiple == 0 && r % multiple == 0 && k < most && r < most, "lorap_cuda: K = ", k,
                  " and R = ", r, " must be multiples of ", multiple, " for weights of ", layer.bits,
                  " bits and less than ", most, ", K a positive one");
  check_packed("right_packed", "right_scales", layer.right, *layer.right_scales, layer, k, x);
  check_packed("left_packed", "left_scales", layer.left, *layer.left_scales, layer, r, x);
}

void check_factors(const LayerTensors& layer, const Tensor& x) {
  const Tensor &right = layer.right, &left = layer.left;
  STD_TORCH_CHECK(x.dim() >= 1 && right.dim() == 2 && left.dim() == 2,
                  "lorap_cuda: expected x (..., K), right (R, K) and left (N, R), got ", x.dim(), ", ", right.dim(),
                  " and ", left.dim(), " dimensions");
  const int64_t k = x.size(x.dim() - 1), r = layer.rank();
  STD_TORCH_CHECK(right.size(1) == k && left.size(1) == r, "lorap_cuda: x (..., ", k, "), right (", r, ", ",
                  right.size(1), ") and left (", left.size(0), ", ", left.size(1), ") do not fit together");
  STD_TORCH_CHECK(k > 0 && k % 8 == 0 && r % 8 == 0, "lorap_cuda: K = ", k, " and R = ", r,
                  " must be multiples of 8, K a positive one");
  check_matrix("right", right, x);
  check_matrix("left", left, x);
}

void check_layer(const LayerTensors& layer, const Tensor& x) {
  if (layer.right_scales != nullptr) {
    check_packed_factors(layer, x);
  } else {
    check_factors(layer, x);
  }
  const int64_t n = layer.out_features();
  if (layer.bias != nullptr) {
    check_operand("bias", *layer.bias, x);
    STD_TORCH_CHECK(layer.bias->numel() == n, "lorap_cuda: bias has ", layer.bias->numel(), " elements, the output ", n,
                    " rows");
  }
  if (layer.pivot_rows != nullptr) check_pivots(*layer.pivot_rows, layer.rank(), x);
}

void check_input(const Tensor& x, int64_t most_tokens) {
  const int64_t k = x.dim() > 0 ? x.size(x.dim() - 1) : 0, m = k > 0 ? x.numel() / k : 0;
  STD_TORCH_CHECK(m <= most_tokens, "lorap_cuda: x has ", m, " tokens, at most ", most_tokens, " are supported");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
                  "lorap_cuda: x must be bfloat16 or float16");
  check_matrix("x", x, x);
}

void launch(const lorap::LowRankDecode& problem, const Tensor& x) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "lorap_cuda: no libtorch_cuda in this process");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const auto type = x.scalar_type() == ScalarType::Half ? lorap::DecodeType::kFloat16 : lorap::DecodeType::kBFloat16;
  const cudaError_t error = lorap::low_rank_decode(problem, type, static_cast<cudaStream_t>(stream));
  if (error == cudaSuccess) return;
  int64_t n = 0, r = 0;
  for (int i = 0; i < problem.count; ++i) n += problem.layers[i].n, r += problem.layers[i].r;
  STD_TORCH_CHECK(error != cudaErrorInvalidConfiguration, "lorap_cuda: rank ", r, " is too large for ", problem.m,
                  " tokens in the shared memory of this GPU");
  STD_TORCH_CHECK(false, "lorap_cuda: launch for M = ", problem.m, ", N = ", n, ", K = ", problem.k, ", R = ", r,
                  " failed: ", cudaGetErrorString(error));
}

// x (..., K) -> (..., N_1 + N_2 + ...): the outputs of at most 3 layers side by side, by one launch.
Tensor run(const Tensor& x, const std::vector<LayerTensors>& layers) {
  int64_t columns = 0, rank = 0;
  for (const LayerTensors& layer : layers) {
    check_layer(layer, x);
    columns += layer.out_features();
    rank += layer.rank();
  }
  const bool packed = layers[0].right_scales != nullptr;
  check_input(x, packed ? lorap::kMaxPackedTokens : lorap::kMaxDecodeTokens);
  const int64_t k = x.size(x.dim() - 1), m = x.numel() / k;
  const auto x_sizes = x.sizes();
  std::vector<int64_t> y_sizes(x_sizes.begin(), x_sizes.end());
  y_sizes.back() = columns;
  Tensor y = torch::stable::new_empty(x, y_sizes);
  if (m == 0 || columns == 0) return y;
  Tensor shrunk = torch::stable::new_empty(x, {m, rank}, ScalarType::Float);

  lorap::LowRankDecode problem{x.const_data_ptr(), m, k, 0, {}};
  char* y_data = static_cast<char*>(y.mutable_data_ptr());
  float* room = static_cast<float*>(shrunk.mutable_data_ptr());
  for (const LayerTensors& layer : layers) {
    const int64_t n = layer.out_features(), r = layer.rank();
    const auto pivots = layer.pivot_rows ? static_cast<const int64_t*>(layer.pivot_rows->const_data_ptr()) : nullptr;
    if (n > 0)
      problem.layers[problem.count++] = {layer.right.const_data_ptr(),
                                         layer.left.const_data_ptr(),
                                         layer.bias ? layer.bias->const_data_ptr() : nullptr,
                                         pivots,
                                         room,
                                         y_data,
                                         n,
                                         r,
                                         columns,
                                         static_cast<int>(layer.bits),
                                         layer.group,
                                         packed ? layer.right_scales->const_data_ptr() : nullptr,
                                         packed ? layer.left_scales->const_data_ptr() : nullptr};
    y_data += 2 * n;  // bytes of a scalar
    room += m * r;
  }
  launch(problem, x);
  return y;
}

// x (..., K) with at most 16 tokens, right (R, K), left (N, R), bias (N,) -> (..., N). With pivot_rows (R,), ascending
// and less than N, left is (N - R, R).
Tensor low_rank_linear(Tensor x, Tensor right, Tensor left, std::optional<Tensor> bias,
                       std::optional<Tensor> pivot_rows) {
  return run(x, {{right, left, bias ? &*bias : nullptr, pivot_rows ? &*pivot_rows : nullptr}});
}

void check_group(const std::vector<Tensor>& right, const std::vector<Tensor>& left, const std::vector<Tensor>& bias,
                 const std::vector<Tensor>& pivot_rows) {
  const size_t count = right.size();
  STD_TORCH_CHECK(1 <= count && count <= size_t(lorap::kMaxDecodeLayers), "lorap_cuda: a group has 1 to ",
                  lorap::kMaxDecodeLayers, " layers, not ", count);
  STD_TORCH_CHECK(left.size() == count && (bias.empty() || bias.size() == count) &&
                      (pivot_rows.empty() || pivot_rows.size() == count),
                  "lorap_cuda: a group needs as many of each, bias and pivot_rows may be empty: got ", count,
                  " right, ", left.size(), " left, ", bias.size(), " bias, ", pivot_rows.size(), " pivot_rows");
}

// That of a layer, null where it has none.
const Tensor* item(const std::vector<Tensor>& tensors, size_t i) {
  return tensors.empty() || tensors[i].numel() == 0 ? nullptr : &tensors[i];
}

// The same for at most 3 layers on one x, their outputs side by side. bias and pivot_rows may be empty, as may the
// tensor of a layer that has none.
Tensor low_rank_linear_group(Tensor x, std::vector<Tensor> right, std::vector<Tensor> left, std::vector<Tensor> bias,
                             std::vector<Tensor> pivot_rows) {
  check_group(right, left, bias, pivot_rows);
  std::vector<LayerTensors> layers;
  for (size_t i = 0; i < right.size(); ++i) layers.push_back({right[i], left[i], item(bias, i), item(pivot_rows, i)});
  return run(x, layers);
}

// low_rank_linear with both factors in 4 or 8 bits, for at most 8 tokens: arguments and their order as in
// lorap/nn/ops.py.
Tensor quantized_low_rank_linear(Tensor x, Tensor left, Tensor left_scales, Tensor right, Tensor right_scales,
                                 std::optional<Tensor> bias, int64_t bits, int64_t group,
                                 std::optional<Tensor> pivot_rows) {
  return run(x, {{right, left, bias ? &*bias : nullptr, pivot_rows ? &*pivot_rows : nullptr, &right_scales,
                  &left_scales, bits, group}});
}

// The same for at most 3 layers on one x, each with its own bits and groups.
Tensor quantized_low_rank_linear_group(Tensor x, std::vector<Tensor> left, std::vector<Tensor> left_scales,
                                       std::vector<Tensor> right, std::vector<Tensor> right_scales,
                                       std::vector<Tensor> bias, std::vector<int64_t> bits, std::vector<int64_t> group,
                                       std::vector<Tensor> pivot_rows) {
  check_group(right, left, bias, pivot_rows);
  const size_t count = right.size();
  STD_TORCH_CHECK(
      left_scales.size() == count && right_scales.size() == count && bits.size() == count && group.size() == count,
      "lorap_cuda: a group needs as many of each: got ", count, " layers, ", left_scales.size(), " left_scales, ",
      right_scales.size(), " right_scales, ", bits.size(), " bits, ", group.size(), " group");
  std::vector<LayerTensors> layers;
  for (size_t i = 0; i < count; ++i)
    layers.push_back(
        {right[i], left[i], item(bias, i), item(pivot_rows, i), &right_scales[i], &left_scales[i], bits[i], group[i]});
  return run(x, layers);
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lorap_cuda, m) {
  m.def("low_rank_linear(Tensor x, Tensor right, Tensor left, Tensor? bias, Tensor? pivot_rows=None) -> Tensor");
  m.def("low_rank_linear_group(Tensor x, Tensor[] right, Tensor[] left, Tensor[] bias, Tensor[] pivot_rows) -> Tensor");
  m.def(
      "quantized_low_rank_linear(Tensor x, Tensor left_packed, Tensor left_scales, Tensor right_packed, "
      "Tensor right_scales, Tensor? bias, int bits, int group, Tensor? pivot_rows=None) -> Tensor");
  m.def(
      "quantized_low_rank_linear_group(Tensor x, Tensor[] left_packed, Tensor[] left_scales, Tensor[] right_packed, "
      "Tensor[] right_scales, Tensor[] bias, int[] bits, int[] group, Tensor[] pivot_rows) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lorap_cuda, CUDA, m) {
  m.impl("low_rank_linear", TORCH_BOX(&low_rank_linear));
  m.impl("low_rank_linear_group", TORCH_BOX(&low_rank_linear_group));
  m.impl("quantized_low_rank_linear", TORCH_BOX(&quantized_low_rank_linear));
  m.impl("quantized_low_rank_linear_group", TORCH_BOX(&quantized_low_rank_linear_group));
}

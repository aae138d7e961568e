// The CPU kernels as torch operators, namespace lorap_cpu, through torch's stable ABI: the library works with the torch
// it was built for and every later one, and with any Python. Checks name the tensor and the numbers; lorap/nn/ops.py
// gives the operators their gradients and picks them only where they win.

#include <optional>
#include <string>
#include <vector>

#include "../torch_stable.h"
#include "decode.h"

namespace {

using lorap::cpu::Dtype;
using lorap::cpu::LowRankLayer;
using lorap::cpu::Machine;
using lorap::cpu::Matrix;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

Dtype dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "lorap_cpu: x must be float32, bfloat16 or float16");
  }
}

void check_like(const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.is_cpu() && x.is_cpu(), "lorap_cpu: ", name, " and x must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "lorap_cpu: ", name, " and x must have the same dtype");
}

// Sizes of expanded tensors are limited by nothing, those of their products must be.
int64_t times(int64_t a, int64_t b) {
  int64_t product;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &product), "lorap_cpu: ", a, " times ", b, " elements are too many");
  return product;
}

int64_t plus(int64_t a, int64_t b) {
  int64_t sum;
  STD_TORCH_CHECK(!__builtin_add_overflow(a, b, &sum), "lorap_cpu: ", a, " plus ", b, " elements are too many");
  return sum;
}

// The kernels read whole elements; in a file that is mapped into memory these may begin at any byte. Then `tensor` is
// replaced by a copy.
const void* aligned_data(Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  if (reinterpret_cast<uintptr_t>(data) % tensor.element_size() == 0) return data;
  tensor = torch::stable::clone(tensor);
  return tensor.const_data_ptr();
}

// The kernels read rows without gaps; `weight` is replaced by a copy where it has some, e.g. when it is transposed.
Matrix matrix(const char* name, Tensor& weight, const Tensor& x, int64_t cols) {
  check_like(name, weight, x);
  STD_TORCH_CHECK(weight.dim() == 2, "lorap_cpu: ", name, " must have 2 dimensions, has ", weight.dim());
  STD_TORCH_CHECK(weight.size(1) == cols, "lorap_cpu: ", name, " has ", weight.size(1), " columns, its input has ",
                  cols);
  if (weight.stride(1) != 1) weight = torch::stable::contiguous(weight);
  const void* data = aligned_data(weight);
  // The stride of a single row, or of rows without elements, is any number and the data may be null.
  const bool stepped = weight.size(0) > 1 && cols > 0;
  return {data, weight.size(0), cols, stepped ? weight.stride(0) : cols};
}

const void* vector_data(const char* name, OptionalTensor& vector, const Tensor& x, int64_t size) {
  if (!vector) return nullptr;
  check_like(name, *vector, x);
  STD_TORCH_CHECK(vector->dim() == 1 && vector->numel() == size, "lorap_cpu: ", name, " must have 1 dimension of ",
                  size, " elements, has ", vector->dim(), " and ", vector->numel());
  if (!vector->is_contiguous()) *vector = torch::stable::contiguous(*vector);
  return aligned_data(*vector);
}

const int64_t* pivot_data(OptionalTensor& pivots, int64_t rank, int64_t out_features) {
  if (!pivots) return nullptr;
  STD_TORCH_CHECK(pivots->is_cpu() && pivots->scalar_type() == ScalarType::Long,
                  "lorap_cpu: pivot_rows must be int64 on the CPU");
  if (!pivots->is_contiguous()) *pivots = torch::stable::contiguous(*pivots);
  STD_TORCH_CHECK(pivots->dim() == 1 && pivots->numel() == rank, "lorap_cpu: ", pivots->numel(), " pivot_rows in ",
                  pivots->dim(), " dimensions for rank ", rank);
  const int64_t* rows = static_cast<const int64_t*>(aligned_data(*pivots));
  for (int64_t i = 0; i < rank; ++i) {
    STD_TORCH_CHECK(rows[i] > (i ? rows[i - 1] : -1) && rows[i] < out_features,
                    "lorap_cpu: pivot_rows must ascend within [0, ", out_features, "), pivot_rows[", i, "] is ",
                    rows[i]);
  }
  return rows;
}

LowRankLayer layer(const Tensor& x, Tensor& right, Tensor& left, OptionalTensor& bias, OptionalTensor& pivot_rows) {
  LowRankLayer result{matrix("right", right, x, x.size(x.dim() - 1)), matrix("left", left, x, right.size(0)), nullptr,
                      nullptr};
  result.pivot_rows = pivot_data(pivot_rows, right.size(0), plus(left.size(0), right.size(0)));
  result.bias = vector_data("bias", bias, x, result.out_features());
  return result;
}

std::vector<LowRankLayer> layers(const Tensor& x, std::vector<Tensor>& right, std::vector<Tensor>& left,
                                 std::vector<Tensor>& bias, std::vector<Tensor>& pivot_rows) {
  const size_t count = right.size();
  STD_TORCH_CHECK(count > 0 && left.size() == count, "lorap_cpu: ", count, " right and ", left.size(), " left factors");
  STD_TORCH_CHECK(bias.empty() || bias.size() == count, "lorap_cpu: ", bias.size(), " biases for ", count, " layers");
  STD_TORCH_CHECK(pivot_rows.empty() || pivot_rows.size() == count, "lorap_cpu: ", pivot_rows.size(),
                  " pivot_rows for ", count, " layers");
  std::vector<LowRankLayer> result;
  for (size_t i = 0; i < count; ++i) {
    OptionalTensor one_bias, one_pivots;
    if (!bias.empty() && bias[i].numel()) one_bias = bias[i];
    if (!pivot_rows.empty() && pivot_rows[i].numel()) one_pivots = pivot_rows[i];
    result.push_back(layer(x, right[i], left[i], one_bias, one_pivots));
    if (one_bias) bias[i] = *one_bias;  // where layer() made a copy, it must outlive the call
    if (one_pivots) pivot_rows[i] = *one_pivots;
  }
  return result;
}

// Makes x contiguous and aligned, and counts its tokens.
int64_t tokens_of(Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, "lorap_cpu: x is a scalar; its last axis must hold the features");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  aligned_data(x);
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens = times(tokens, x.size(i));
  return tokens;
}

// Straight from the C shim: the dispatcher's new_empty would cost as much as a small layer.
Tensor output_like(const Tensor& x, int64_t out_features) {
  const int64_t dim = x.dim();
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end()), strides(dim, 1);
  sizes.back() = out_features;
  for (int64_t i = dim - 2; i >= 0; --i) strides[i] = times(strides[i + 1], sizes[i + 1]);
  int32_t dtype;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &dtype));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes.data(), strides.data(), dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

void parallel_for(int64_t begin, int64_t end, int64_t grain, lorap::cpu::ParallelBody body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

Machine machine(Dtype dtype) {
  static const char* forced = std::getenv("LORAP_CPU_ISA");
  const lorap::cpu::RowKernel* kernel = lorap::cpu::find_kernel(dtype, forced);
  STD_TORCH_CHECK(kernel, "lorap_cpu: this processor or build has no instructions called LORAP_CPU_ISA=", forced,
                  " for this dtype");
  return {kernel, parallel_for, torch::stable::get_num_threads()};
}

Tensor linear(Tensor x, Tensor weight, OptionalTensor bias) {
  const int64_t tokens = tokens_of(x);
  const Matrix w = matrix("weight", weight, x, x.size(x.dim() - 1));
  const void* b = vector_data("bias", bias, x, w.rows);
  Tensor y = output_like(x, w.rows);
  lorap::cpu::linear(machine(dtype_of(x)), x.const_data_ptr(), tokens, w, b, y.mutable_data_ptr());
  return y;
}

Tensor run_group(const Tensor& x, int64_t tokens, const std::vector<LowRankLayer>& group) {
  int64_t out_features = 0;
  for (const LowRankLayer& one : group) out_features = plus(out_features, one.out_features());
  Tensor y = output_like(x, out_features);
  lorap::cpu::low_rank_linear(machine(dtype_of(x)), x.const_data_ptr(), tokens, group.data(), group.size(),
                              y.mutable_data_ptr());
  return y;
}

Tensor low_rank_linear(Tensor x, Tensor right, Tensor left, OptionalTensor bias, OptionalTensor pivot_rows) {
  const int64_t tokens = tokens_of(x);
  return run_group(x, tokens, {layer(x, right, left, bias, pivot_rows)});
}

Tensor low_rank_linear_group(Tensor x, std::vector<Tensor> right, std::vector<Tensor> left, std::vector<Tensor> bias,
                             std::vector<Tensor> pivot_rows) {
  const int64_t tokens = tokens_of(x);
  return run_group(x, tokens, layers(x, right, left, bias, pivot_rows));
}

Tensor silu_gated_linear(Tensor x, Tensor gate, Tensor up, OptionalTensor gate_bias, OptionalTensor up_bias) {
  const int64_t tokens = tokens_of(x);
  const int64_t k = x.size(x.dim() - 1);
  const Matrix g = matrix("gate", gate, x, k), u = matrix("up", up, x, k);
  STD_TORCH_CHECK(g.rows == u.rows, "lorap_cpu: gate has ", g.rows, " rows, up has ", u.rows);
  Tensor y = output_like(x, g.rows);
  lorap::cpu::silu_gated_linear(machine(dtype_of(x)), x.const_data_ptr(), tokens, g, u,
                                vector_data("gate_bias", gate_bias, x, g.rows),
                                vector_data("up_bias", up_bias, x, u.rows), y.mutable_data_ptr());
  return y;
}

Tensor low_rank_silu_gated_linear(Tensor x, std::vector<Tensor> right, std::vector<Tensor> left,
                                  std::vector<Tensor> bias) {
  const int64_t tokens = tokens_of(x);
  std::vector<Tensor> no_pivots;
  const std::vector<LowRankLayer> pair = layers(x, right, left, bias, no_pivots);
  STD_TORCH_CHECK(pair.size() == 2 && pair[0].left.rows == pair[1].left.rows,
                  "lorap_cpu: gate and up must be two layers of the same width");
  Tensor y = output_like(x, pair[0].left.rows);
  lorap::cpu::low_rank_silu_gated_linear(machine(dtype_of(x)), x.const_data_ptr(), tokens, pair[0], pair[1],
                                         y.mutable_data_ptr());
  return y;
}

// What this processor runs for a dtype, e.g. "avx512_bf16".
std::string isa(ScalarType dtype) {
  const Dtype which = dtype == ScalarType::Float      ? Dtype::kFloat32
                      : dtype == ScalarType::BFloat16 ? Dtype::kBFloat16
                                                      : Dtype::kFloat16;
  return machine(which).kernel->isa;
}

}  // namespace

STABLE_TORCH_LIBRARY(lorap_cpu, m) {
  m.def("linear(Tensor x, Tensor weight, Tensor? bias=None) -> Tensor");
  m.def("low_rank_linear(Tensor x, Tensor right, Tensor left, Tensor? bias=None, Tensor? pivot_rows=None) -> Tensor");
  m.def("low_rank_linear_group(Tensor x, Tensor[] right, Tensor[] left, Tensor[] bias, Tensor[] pivot_rows) -> Tensor");
  m.def("silu_gated_linear(Tensor x, Tensor gate, Tensor up, Tensor? gate_bias=None, Tensor? up_bias=None) -> Tensor");
  m.def("low_rank_silu_gated_linear(Tensor x, Tensor[] right, Tensor[] left, Tensor[] bias) -> Tensor");
  m.def("isa(ScalarType dtype) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lorap_cpu, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("low_rank_linear", TORCH_BOX(&low_rank_linear));
  m.impl("low_rank_linear_group", TORCH_BOX(&low_rank_linear_group));
  m.impl("silu_gated_linear", TORCH_BOX(&silu_gated_linear));
  m.impl("low_rank_silu_gated_linear", TORCH_BOX(&low_rank_silu_gated_linear));
}

STABLE_TORCH_LIBRARY_IMPL(lorap_cpu, CompositeExplicitAutograd, m) { m.impl("isa", TORCH_BOX(&isa)); }

// The CPU kernels as torch operators, namespace lorap_cpu, through torch's stable ABI: the library works with the torch
// it was built for and every later one, and with any Python. Checks name the tensor and the numbers; lorap/nn/ops.py
// gives the operators their gradients and picks them only where they win.

#include <string>
#include <vector>

#include "tensors.h"

namespace {

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
    result.push_back(layer(x, x.size(x.dim() - 1), right[i], left[i], one_bias, one_pivots));
    if (one_bias) bias[i] = *one_bias;  // where layer() made a copy, it must outlive the call
    if (one_pivots) pivot_rows[i] = *one_pivots;
  }
  return result;
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
  return run_group(x, tokens, {layer(x, x.size(x.dim() - 1), right, left, bias, pivot_rows)});
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

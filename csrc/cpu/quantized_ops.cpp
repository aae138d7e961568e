// The ops on weights of 4 and 8 bits as torch operators, see ops.cpp.
#include <string>

#include "quantized_tensors.h"

namespace {

Tensor quantized_linear(Tensor x, Tensor packed, Tensor scales, OptionalTensor bias, int64_t bits, int64_t group) {
  const int64_t tokens = tokens_of(x);
  const QuantizedMachine how = machine(dtype_of(x), bits);
  const QuantizedMatrix weight = quantized_matrix("packed", packed, scales, x.size(x.dim() - 1), bits, group);
  const void* b = vector_data("bias", bias, x, weight.rows);
  Tensor y = output_like(x, weight.rows);
  lorap::cpu::quantized_linear(how, x.const_data_ptr(), tokens, weight, b, y.mutable_data_ptr());
  return y;
}

Tensor quantized_low_rank_linear(Tensor x, Tensor left_packed, Tensor left_scales, Tensor right_packed,
                                 Tensor right_scales, OptionalTensor bias, int64_t bits, int64_t group) {
  const int64_t tokens = tokens_of(x);
  const QuantizedMachine how = machine(dtype_of(x), bits);
  const QuantizedMatrix right =
      quantized_matrix("right_packed", right_packed, right_scales, x.size(x.dim() - 1), bits, group);
  const QuantizedMatrix left = quantized_matrix("left_packed", left_packed, left_scales, right.rows, bits, group);
  const void* b = vector_data("bias", bias, x, left.rows);
  Tensor y = output_like(x, left.rows);
  lorap::cpu::quantized_low_rank_linear(how, x.const_data_ptr(), tokens, right, left, b, y.mutable_data_ptr());
  return y;
}

Tensor quantized_silu_gated_linear(Tensor x, Tensor gate_packed, Tensor gate_scales, Tensor up_packed, Tensor up_scales,
                                   int64_t bits, int64_t group) {
  const int64_t tokens = tokens_of(x);
  const QuantizedMachine how = machine(dtype_of(x), bits);
  const int64_t k = x.size(x.dim() - 1);
  const QuantizedMatrix gate = quantized_matrix("gate_packed", gate_packed, gate_scales, k, bits, group);
  const QuantizedMatrix up = quantized_matrix("up_packed", up_packed, up_scales, k, bits, group);
  STD_TORCH_CHECK(gate.rows == up.rows, "lorap_cpu: gate_packed has ", gate.rows, " rows, up_packed has ", up.rows);
  Tensor y = output_like(x, gate.rows);
  lorap::cpu::quantized_silu_gated_linear(how, x.const_data_ptr(), tokens, gate, up, y.mutable_data_ptr());
  return y;
}

// The weight (rows, columns) that packed numbers and scales stand for.
Tensor quantized_weight(Tensor packed, Tensor scales, int64_t columns, int64_t bits, int64_t group, ScalarType dtype) {
  STD_TORCH_CHECK(columns >= 0, "lorap_cpu: packed has ", columns, " columns");
  const QuantizedMachine how = machine(dtype_of(dtype), bits);
  const QuantizedMatrix weight = quantized_matrix("packed", packed, scales, columns, bits, group);
  Tensor result = empty_matrix(weight.rows, columns, dtype);
  lorap::cpu::quantized_weight(how, weight, result.mutable_data_ptr());
  return result;
}

// What this processor runs for weights of so many bits, e.g. "avx512_vnni", and "avx2, int8 activations".
std::string quantized_isa(int64_t bits) {
  if (bits != 4 && bits != 8) return "none";
  const auto* kernel = lorap::cpu::find_quantized_kernel(static_cast<int>(bits), forced_isa(), activation_bits());
  return kernel ? std::string(kernel->isa) + (kernel->activation_bits == 8 ? ", int8 activations" : "") : "none";
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lorap_cpu, m) {
  m.def("quantized_linear(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int bits, int group) -> Tensor");
  m.def(
      "quantized_low_rank_linear(Tensor x, Tensor left_packed, Tensor left_scales, Tensor right_packed, "
      "Tensor right_scales, Tensor? bias, int bits, int group) -> Tensor");
  m.def(
      "quantized_silu_gated_linear(Tensor x, Tensor gate_packed, Tensor gate_scales, Tensor up_packed, "
      "Tensor up_scales, int bits, int group) -> Tensor");
  m.def("quantized_weight(Tensor packed, Tensor scales, int columns, int bits, int group, ScalarType dtype) -> Tensor");
  m.def("quantized_isa(int bits) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lorap_cpu, CPU, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("quantized_low_rank_linear", TORCH_BOX(&quantized_low_rank_linear));
  m.impl("quantized_silu_gated_linear", TORCH_BOX(&quantized_silu_gated_linear));
  m.impl("quantized_weight", TORCH_BOX(&quantized_weight));
}

STABLE_TORCH_LIBRARY_IMPL(lorap_cpu, CompositeExplicitAutograd, m) {
  m.impl("quantized_isa", TORCH_BOX(&quantized_isa));
}

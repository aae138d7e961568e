// The ops on weights of 4 and 8 bits as torch operators, see ops.cpp.
#include <cstring>
#include <string>

#include "quantized.h"
#include "tensors.h"

namespace {

using lorap::cpu::QuantizedMachine;
using lorap::cpu::QuantizedMatrix;

const char* forced_isa() {
  static const char* forced = std::getenv("LORAP_CPU_ISA");
  return forced;
}

// For what brings floats from and to memory, of which the extensions of AVX-512 have nothing more.
const lorap::cpu::RowKernel* float_kernel(Dtype dtype) {
  const char* isa = forced_isa();
  if (isa && std::strncmp(isa, "avx512_", 7) == 0) isa = "avx512";
  return lorap::cpu::find_kernel(dtype, isa);
}

QuantizedMachine machine(const Tensor& x, int64_t bits) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "lorap_cpu: weights have ", bits, " bits; 4 and 8 are there");
  const lorap::cpu::RowKernel* outer = float_kernel(dtype_of(x));
  const lorap::cpu::QuantizedKernel* kernel = lorap::cpu::find_quantized_kernel(static_cast<int>(bits), forced_isa());
  STD_TORCH_CHECK(outer && kernel,
                  "lorap_cpu: this processor or build has no instructions called LORAP_CPU_ISA=", forced_isa(),
                  " for weights of ", bits, " bits");
  return {{outer, parallel_for, torch::stable::get_num_threads()}, kernel};
}

// Rows that lie without gaps within; `tensor` is replaced by a copy where they do not.
void bring_rows(const char* what, const char* name, Tensor& tensor, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(tensor.is_cpu(), "lorap_cpu: the ", what, " of ", name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols, "lorap_cpu: the ", what,
                  " of ", name, " must be ", rows, " x ", cols, ", but have ", tensor.numel(), " elements in ",
                  tensor.dim(), " dimensions");
  if (tensor.stride(1) != 1 || tensor.stride(0) < 0) tensor = torch::stable::contiguous(tensor);
  aligned_data(tensor);
}

int64_t stride_of(const Tensor& tensor) {
  return tensor.size(0) > 1 && tensor.size(1) > 0 ? tensor.stride(0) : tensor.size(1);
}

int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

QuantizedMatrix quantized_matrix(const char* name, Tensor& packed, Tensor& scales, int64_t cols, int64_t bits,
                                 int64_t group) {
  STD_TORCH_CHECK(group > 0 && group % 32 == 0, "lorap_cpu: ", name, " has groups of ", group,
                  " numbers; it must be a multiple of 32");
  STD_TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == ScalarType::Int, "lorap_cpu: ", name,
                  " must be int32 with 2 dimensions, has ", packed.dim());
  const int64_t rows = packed.size(0);
  bring_rows("words", name, packed, rows, divide_up(cols, 32 / bits));
  bring_rows("scales", name, scales, rows, divide_up(cols, group));
  constexpr int64_t kLargestBlock = 128;
  if (group > cols) group = (cols / kLargestBlock + 1) * kLargestBlock;  // all the same, and sums of it fit
  return {static_cast<const uint32_t*>(packed.const_data_ptr()),
          rows,
          cols,
          stride_of(packed),
          scales.const_data_ptr(),
          stride_of(scales),
          float_kernel(dtype_of(scales)),
          group};
}

Tensor quantized_linear(Tensor x, Tensor packed, Tensor scales, OptionalTensor bias, int64_t bits, int64_t group) {
  const int64_t tokens = tokens_of(x);
  const QuantizedMachine how = machine(x, bits);
  const QuantizedMatrix weight = quantized_matrix("packed", packed, scales, x.size(x.dim() - 1), bits, group);
  const void* b = vector_data("bias", bias, x, weight.rows);
  Tensor y = output_like(x, weight.rows);
  lorap::cpu::quantized_linear(how, x.const_data_ptr(), tokens, weight, b, y.mutable_data_ptr());
  return y;
}

Tensor quantized_low_rank_linear(Tensor x, Tensor left_packed, Tensor left_scales, Tensor right_packed,
                                 Tensor right_scales, OptionalTensor bias, int64_t bits, int64_t group) {
  const int64_t tokens = tokens_of(x);
  const QuantizedMachine how = machine(x, bits);
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
  const QuantizedMachine how = machine(x, bits);
  const int64_t k = x.size(x.dim() - 1);
  const QuantizedMatrix gate = quantized_matrix("gate_packed", gate_packed, gate_scales, k, bits, group);
  const QuantizedMatrix up = quantized_matrix("up_packed", up_packed, up_scales, k, bits, group);
  STD_TORCH_CHECK(gate.rows == up.rows, "lorap_cpu: gate_packed has ", gate.rows, " rows, up_packed has ", up.rows);
  Tensor y = output_like(x, gate.rows);
  lorap::cpu::quantized_silu_gated_linear(how, x.const_data_ptr(), tokens, gate, up, y.mutable_data_ptr());
  return y;
}

// What this processor runs for weights of so many bits, e.g. "avx512_vnni".
std::string quantized_isa(int64_t bits) {
  const lorap::cpu::QuantizedKernel* kernel =
      bits == 4 || bits == 8 ? lorap::cpu::find_quantized_kernel(static_cast<int>(bits), forced_isa()) : nullptr;
  return kernel ? kernel->isa : "none";
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
  m.def("quantized_isa(int bits) -> str");
}

STABLE_TORCH_LIBRARY_IMPL(lorap_cpu, CPU, m) {
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("quantized_low_rank_linear", TORCH_BOX(&quantized_low_rank_linear));
  m.impl("quantized_silu_gated_linear", TORCH_BOX(&quantized_silu_gated_linear));
}

STABLE_TORCH_LIBRARY_IMPL(lorap_cpu, CompositeExplicitAutograd, m) {
  m.impl("quantized_isa", TORCH_BOX(&quantized_isa));
}

// The ops on weights on a trellis as torch operators, see ops.cpp.
#include "trellis_tensors.h"

namespace {

const float* floats(const char* name, Tensor& tensor, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Float, "lorap_cpu: ", name,
                  " must be float32 on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols, "lorap_cpu: ", name,
                  " must be ", rows, " x ", cols, ", but has ", tensor.numel(), " elements in ", tensor.dim(),
                  " dimensions");
  return static_cast<const float*>(aligned_data(tensor));
}

Tensor trellis_search(Tensor wanted, Tensor importance, int64_t bits) {
  STD_TORCH_CHECK(wanted.dim() == 2, "lorap_cpu: wanted must have 2 dimensions, has ", wanted.dim());
  const int64_t rows = wanted.size(0), cols = wanted.size(1);
  const TrellisKernel& kernel = trellis_kernel(bits);
  lorap::cpu::TrellisTargets targets{
      floats("wanted", wanted, rows, cols), floats("importance", importance, rows, cols), rows, cols,
      {wanted.stride(0), wanted.stride(1)}, {importance.stride(0), importance.stride(1)}};
  const int64_t padded = times(divide_up(rows, lorap::cpu::kTrellisRows), lorap::cpu::kTrellisRows);
  Tensor windows = empty_matrix(padded, cols, ScalarType::Int);
  lorap::cpu::trellis_search(kernel, parallel_for, torch::stable::get_num_threads(), targets,
                             static_cast<int32_t*>(windows.mutable_data_ptr()));
  return windows;
}

Tensor trellis_linear(Tensor x, Tensor packed, Tensor scales, OptionalTensor bias, int64_t bits, int64_t group) {
  const int64_t tokens = tokens_of(x);
  const TrellisKernel& kernel = trellis_kernel(bits);
  const lorap::cpu::RowKernel* outer = float_kernel(dtype_of(x));
  STD_TORCH_CHECK(x.is_cpu() && outer, "lorap_cpu: x must be on the CPU");
  const TrellisMatrix weight = trellis_matrix("packed", packed, scales, x.size(x.dim() - 1), bits, group);
  const void* b = vector_data("bias", bias, x, weight.rows);
  Tensor y = output_like(x, weight.rows);
  const lorap::cpu::TrellisProduct product{&kernel, weight, b, x.const_data_ptr(), y.mutable_data_ptr(), weight.rows};
  lorap::cpu::trellis_products({outer, parallel_for, torch::stable::get_num_threads()}, tokens, &product, 1);
  return y;
}

// The weight (rows, columns) that codes and scales stand for, transposed.
Tensor trellis_weight(Tensor packed, Tensor scales, int64_t columns, int64_t bits, int64_t group, ScalarType dtype) {
  STD_TORCH_CHECK(columns >= 0, "lorap_cpu: packed has ", columns, " columns");
  const TrellisKernel& kernel = trellis_kernel(bits);
  const lorap::cpu::RowKernel* outer = float_kernel(dtype_of(dtype));
  const TrellisMatrix weight = trellis_matrix("packed", packed, scales, columns, bits, group);
  Tensor result = empty_matrix(columns, weight.rows, dtype);
  lorap::cpu::trellis_weight({outer, parallel_for, torch::stable::get_num_threads()}, kernel, weight,
                             result.mutable_data_ptr());
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lorap_cpu, m) {
  m.def("trellis_linear(Tensor x, Tensor packed, Tensor scales, Tensor? bias, int bits, int group) -> Tensor");
  m.def("trellis_weight(Tensor packed, Tensor scales, int columns, int bits, int group, ScalarType dtype) -> Tensor");
  m.def("trellis_search(Tensor wanted, Tensor importance, int bits) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lorap_cpu, CPU, m) {
  m.impl("trellis_linear", TORCH_BOX(&trellis_linear));
  m.impl("trellis_weight", TORCH_BOX(&trellis_weight));
  m.impl("trellis_search", TORCH_BOX(&trellis_search));
}

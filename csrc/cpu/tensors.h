// What the files of operators share: tensors checked and brought into the form that the kernels read. Messages name the
// tensor and the numbers.
#pragma once

#include <cstdlib>
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

inline Dtype dtype_of(ScalarType dtype) {
  switch (dtype) {
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

inline Dtype dtype_of(const Tensor& x) { return dtype_of(x.scalar_type()); }

inline void check_like(const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.is_cpu() && x.is_cpu(), "lorap_cpu: ", name, " and x must be on the CPU");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "lorap_cpu: ", name, " and x must have the same dtype");
}

// Sizes of expanded tensors are limited by nothing, those of their products must be.
inline int64_t times(int64_t a, int64_t b) {
  int64_t product;
  STD_TORCH_CHECK(!__builtin_mul_overflow(a, b, &product), "lorap_cpu: ", a, " times ", b, " elements are too many");
  return product;
}

inline int64_t plus(int64_t a, int64_t b) {
  int64_t sum;
  STD_TORCH_CHECK(!__builtin_add_overflow(a, b, &sum), "lorap_cpu: ", a, " plus ", b, " elements are too many");
  return sum;
}

// The kernels read whole elements; in a file that is mapped into memory these may begin at any byte. Then `tensor` is
// replaced by a copy.
inline const void* aligned_data(Tensor& tensor) {
  const void* data = tensor.const_data_ptr();
  if (reinterpret_cast<uintptr_t>(data) % tensor.element_size() == 0) return data;
  tensor = torch::stable::clone(tensor);
  return tensor.const_data_ptr();
}

// The kernels read rows without gaps; `weight` is replaced by a copy where it has some, e.g. when it is transposed.
inline Matrix matrix(const char* name, Tensor& weight, const Tensor& x, int64_t cols) {
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

inline const void* vector_data(const char* name, OptionalTensor& vector, const Tensor& x, int64_t size) {
  if (!vector) return nullptr;
  check_like(name, *vector, x);
  STD_TORCH_CHECK(vector->dim() == 1 && vector->numel() == size, "lorap_cpu: ", name, " must have 1 dimension of ",
                  size, " elements, has ", vector->dim(), " and ", vector->numel());
  if (!vector->is_contiguous()) *vector = torch::stable::contiguous(*vector);
  return aligned_data(*vector);
}

inline const int64_t* pivot_data(OptionalTensor& pivots, int64_t rank, int64_t out_features) {
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

inline LowRankLayer layer(const Tensor& x, int64_t in_features, Tensor& right, Tensor& left, OptionalTensor& bias,
                          OptionalTensor& pivot_rows) {
  LowRankLayer result{matrix("right", right, x, in_features), matrix("left", left, x, right.size(0)), nullptr, nullptr};
  result.pivot_rows = pivot_data(pivot_rows, right.size(0), plus(left.size(0), right.size(0)));
  result.bias = vector_data("bias", bias, x, result.out_features());
  return result;
}

// Makes x contiguous and aligned, and counts its tokens.
inline int64_t tokens_of(Tensor& x) {
  STD_TORCH_CHECK(x.dim() >= 1, "lorap_cpu: x is a scalar; its last axis must hold the features");
  if (!x.is_contiguous()) x = torch::stable::contiguous(x);
  aligned_data(x);
  int64_t tokens = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) tokens = times(tokens, x.size(i));
  return tokens;
}

// Straight from the C shim: the dispatcher's new_empty would cost as much as a small layer.
inline Tensor output_like(const Tensor& x, int64_t out_features) {
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

inline Tensor empty_matrix(int64_t rows, int64_t cols, ScalarType dtype) {
  const int64_t sizes[] = {rows, cols}, strides[] = {std::max<int64_t>(cols, 1), 1};
  const int32_t number = dtype == ScalarType::Float      ? aoti_torch_dtype_float32()
                         : dtype == ScalarType::BFloat16 ? aoti_torch_dtype_bfloat16()
                         : dtype == ScalarType::Half     ? aoti_torch_dtype_float16()
                                                         : aoti_torch_dtype_int32();
  times(times(rows, strides[0]), sizeof(int32_t));
  AtenTensorHandle handle;
  STABLE_TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, number, aoti_torch_device_type_cpu(), 0, &handle));
  return Tensor(handle);
}

inline void parallel_for(int64_t begin, int64_t end, int64_t grain, lorap::cpu::ParallelBody body, void* context) {
  STABLE_TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, body, context));
}

inline Machine machine(Dtype dtype) {
  static const char* forced = std::getenv("LORAP_CPU_ISA");
  const lorap::cpu::RowKernel* kernel = lorap::cpu::find_kernel(dtype, forced);
  STD_TORCH_CHECK(kernel, "lorap_cpu: this processor or build has no instructions called LORAP_CPU_ISA=", forced,
                  " for this dtype");
  return {kernel, parallel_for, torch::stable::get_num_threads()};
}

}  // namespace

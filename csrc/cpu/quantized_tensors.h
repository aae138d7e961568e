// What the files of operators on weights of 4 and 8 bits share, as tensors.h.
#pragma once

#include <cstring>

#include "quantized.h"
#include "tensors.h"

namespace {

using lorap::cpu::QuantizedMachine;
using lorap::cpu::QuantizedMatrix;

inline const char* forced_isa() {
  static const char* forced = std::getenv("LORAP_CPU_ISA");
  return forced;
}

// Of activations beside weights of 4 and 8 bits.
inline int activation_bits() {
  static const char* wish = std::getenv("LORAP_ACTIVATIONS");
  if (!wish || !*wish) return 16;
  STD_TORCH_CHECK(std::strcmp(wish, "int8") == 0, "lorap_cpu: LORAP_ACTIVATIONS=", wish, "; it is int8, or not set");
  return 8;
}

// For what brings floats from and to memory, of which the extensions of AVX-512 have nothing more.
inline const lorap::cpu::RowKernel* float_kernel(Dtype dtype) {
  const char* isa = forced_isa();
  if (isa && std::strncmp(isa, "avx512_", 7) == 0) isa = "avx512";
  return lorap::cpu::find_kernel(dtype, isa);
}

inline QuantizedMachine machine(Dtype dtype, int64_t bits) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, "lorap_cpu: weights have ", bits, " bits; 4 and 8 are there");
  const lorap::cpu::RowKernel* outer = float_kernel(dtype);
  const lorap::cpu::QuantizedKernel* kernel =
      lorap::cpu::find_quantized_kernel(static_cast<int>(bits), forced_isa(), activation_bits());
  STD_TORCH_CHECK(outer && kernel,
                  "lorap_cpu: this processor or build has no instructions called LORAP_CPU_ISA=", forced_isa(),
                  " for weights of ", bits, " bits");
  return {{outer, parallel_for, torch::stable::get_num_threads()}, kernel};
}

// Rows that lie without gaps within; `tensor` is replaced by a copy where they do not.
inline void bring_rows(const char* what, const char* name, Tensor& tensor, int64_t rows, int64_t cols) {
  STD_TORCH_CHECK(tensor.is_cpu(), "lorap_cpu: the ", what, " of ", name, " must be on the CPU");
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == cols, "lorap_cpu: the ", what,
                  " of ", name, " must be ", rows, " x ", cols, ", but have ", tensor.numel(), " elements in ",
                  tensor.dim(), " dimensions");
  if (tensor.stride(1) != 1 || tensor.stride(0) < 0) tensor = torch::stable::contiguous(tensor);
  aligned_data(tensor);
}

inline int64_t stride_of(const Tensor& tensor) {
  return tensor.size(0) > 1 && tensor.size(1) > 0 ? tensor.stride(0) : tensor.size(1);
}

inline int64_t divide_up(int64_t a, int64_t b) { return a / b + (a % b != 0); }

// Words and scales that are where the kernels want them.
inline QuantizedMatrix matrix_of(const Tensor& packed, const Tensor& scales, int64_t rows, int64_t cols,
                                 int64_t group) {
  return {static_cast<const uint32_t*>(packed.const_data_ptr()),
          rows,
          cols,
          stride_of(packed),
          scales.const_data_ptr(),
          stride_of(scales),
          float_kernel(dtype_of(scales)),
          group};
}

inline QuantizedMatrix quantized_matrix(const char* name, Tensor& packed, Tensor& scales, int64_t cols, int64_t bits,
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
  return matrix_of(packed, scales, rows, cols, group);
}

}  // namespace

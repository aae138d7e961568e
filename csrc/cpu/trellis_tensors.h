// What the files of operators on weights on a trellis share, as quantized_tensors.h.
#pragma once

#include "quantized_tensors.h"
#include "trellis.h"

namespace {

using lorap::cpu::TrellisKernel;
using lorap::cpu::TrellisMatrix;

inline const TrellisKernel& trellis_kernel(int64_t bits) {
  using lorap::cpu::kTrellisFewestBits, lorap::cpu::kTrellisMostBits;
  STD_TORCH_CHECK(bits >= kTrellisFewestBits && bits <= kTrellisMostBits, "lorap_cpu: a trellis of ", bits, " bits; ",
                  kTrellisFewestBits, " to ", kTrellisMostBits, " are there");
  const TrellisKernel* kernel = lorap::cpu::find_trellis_kernel(static_cast<int>(bits), forced_isa());
  STD_TORCH_CHECK(kernel, "lorap_cpu: this processor or build has no instructions called LORAP_CPU_ISA=", forced_isa());
  return *kernel;
}

inline TrellisMatrix trellis_matrix(const char* name, Tensor& packed, Tensor& scales, int64_t cols, int64_t bits,
                                    int64_t group) {
  STD_TORCH_CHECK(group > 0 && group % 32 == 0, "lorap_cpu: ", name, " has groups of ", group,
                  " weights; it must be a multiple of 32");
  STD_TORCH_CHECK(packed.dim() == 2 && packed.scalar_type() == ScalarType::Int && scales.dim() == 2,
                  "lorap_cpu: ", name, " must be int32 and its scales floats, both with 2 dimensions, not ",
                  packed.dim(), " and ", scales.dim());
  const int64_t rows = scales.size(0);
  bring_rows("words", name, packed, divide_up(rows, lorap::cpu::kTrellisRows), times(cols, 2 * bits));
  bring_rows("scales", name, scales, rows, divide_up(cols, group));
  return matrix_of(packed, scales, rows, cols, std::min(group, std::max<int64_t>(cols, 1)));
}

}  // namespace

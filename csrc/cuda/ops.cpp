// The CUDA kernels as torch operator lorap_cuda::low_rank_linear, through torch's stable ABI: the library works with
// the torch it was built for and every later one, and with any Python. The gradient is left to lorap/nn/ops.py.

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

void check_operand(const char* name, const Tensor& tensor, const Tensor& x) {
  STD_TORCH_CHECK(tensor.is_cuda() && tensor.get_device_index() == x.get_device_index(), "lorap_cuda: ", name,
                  " must be on the GPU of x");
  STD_TORCH_CHECK(tensor.scalar_type() == x.scalar_type(), "lorap_cuda: ", name, " and x must have the same dtype");
  STD_TORCH_CHECK(tensor.is_contiguous(), "lorap_cuda: ", name, " must be contiguous");
}

// Loads of 16 bytes fail on views that start in between.
void check_matrix(const char* name, const Tensor& tensor, const Tensor& x) {
  check_operand(name, tensor, x);
  STD_TORCH_CHECK(reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0, "lorap_cuda: ", name,
                  " must start at a multiple of 16 bytes");
}

// x (..., K) with at most 16 tokens, right (R, K), left (N, R), bias (N,) -> (..., N). With pivot_rows (R,), ascending
// and less than N, left is (N - R, R).
Tensor low_rank_linear(Tensor x, Tensor right, Tensor left, std::optional<Tensor> bias,
                       std::optional<Tensor> pivot_rows) {
  STD_TORCH_CHECK(x.dim() >= 1 && right.dim() == 2 && left.dim() == 2,
                  "lorap_cuda: expected x (..., K), right (R, K) and left (N, R), got ", x.dim(), ", ", right.dim(),
                  " and ", left.dim(), " dimensions");
  const int64_t k = x.size(x.dim() - 1), r = right.size(0), n = left.size(0) + (pivot_rows ? r : 0);
  STD_TORCH_CHECK(right.size(1) == k && left.size(1) == r, "lorap_cuda: x (..., ", k, "), right (", r, ", ",
                  right.size(1), ") and left (", left.size(0), ", ", left.size(1), ") do not fit together");
  STD_TORCH_CHECK(k > 0 && r > 0 && k % 8 == 0 && r % 8 == 0, "lorap_cuda: K = ", k, " and R = ", r,
                  " must be positive multiples of 8");
  const int64_t m = x.numel() / k;
  STD_TORCH_CHECK(m <= lorap::kMaxDecodeTokens, "lorap_cuda: x has ", m, " tokens, at most ", lorap::kMaxDecodeTokens,
                  " are supported");
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16 || x.scalar_type() == ScalarType::Half,
                  "lorap_cuda: x must be bfloat16 or float16");
  check_matrix("x", x, x);
  check_matrix("right", right, x);
  check_matrix("left", left, x);
  if (bias) {
    check_operand("bias", *bias, x);
    STD_TORCH_CHECK(bias->numel() == n, "lorap_cuda: bias has ", bias->numel(), " elements, the output ", n, " rows");
  }
  if (pivot_rows) {
    STD_TORCH_CHECK(pivot_rows->numel() == r && pivot_rows->scalar_type() == ScalarType::Long,
                    "lorap_cuda: pivot_rows must be ", r, " int64, one per rank; there are ", pivot_rows->numel());
    STD_TORCH_CHECK(pivot_rows->is_cuda() && pivot_rows->get_device_index() == x.get_device_index(),
                    "lorap_cuda: pivot_rows must be on the GPU of x");
    STD_TORCH_CHECK(pivot_rows->is_contiguous() && reinterpret_cast<uintptr_t>(pivot_rows->const_data_ptr()) % 16 == 0,
                    "lorap_cuda: pivot_rows must be contiguous and start at a multiple of 16 bytes");
  }

  const auto x_sizes = x.sizes();
  std::vector<int64_t> y_sizes(x_sizes.begin(), x_sizes.end());
  y_sizes.back() = n;
  Tensor y = torch::stable::new_empty(x, y_sizes);
  if (m == 0 || n == 0) return y;
  Tensor shrunk = torch::stable::new_empty(x, {m, r}, ScalarType::Float);

  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "lorap_cuda: no libtorch_cuda in this process");
  const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
  const lorap::LowRankDecode problem{
      x.const_data_ptr(),
      right.const_data_ptr(),
      left.const_data_ptr(),
      bias ? bias->const_data_ptr() : nullptr,
      pivot_rows ? static_cast<const int64_t*>(pivot_rows->const_data_ptr()) : nullptr,
      static_cast<float*>(shrunk.mutable_data_ptr()),
      y.mutable_data_ptr(),
      m,
      n,
      k,
      r,
  };
  const auto type = x.scalar_type() == ScalarType::Half ? lorap::DecodeType::kFloat16 : lorap::DecodeType::kBFloat16;
  const cudaError_t error = lorap::low_rank_decode(problem, type, static_cast<cudaStream_t>(stream));
  STD_TORCH_CHECK(error != cudaErrorInvalidConfiguration, "lorap_cuda: rank ", r, " is too large for ", m,
                  " tokens in the shared memory of this GPU");
  STD_TORCH_CHECK(error == cudaSuccess, "lorap_cuda: launch for M = ", m, ", N = ", n, ", K = ", k, ", R = ", r,
                  " failed: ", cudaGetErrorString(error));
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(lorap_cuda, m) {
  m.def("low_rank_linear(Tensor x, Tensor right, Tensor left, Tensor? bias, Tensor? pivot_rows=None) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(lorap_cuda, CUDA, m) { m.impl("low_rank_linear", TORCH_BOX(&low_rank_linear)); }

// The kernels of low_rank_one_launch.h for weights of 4 and 8 bits.
#include "low_rank_one_launch.h"

namespace lorap {
namespace {

template <typename Scalar, int M>
__global__ void __launch_bounds__(kThreads, 1) quantized_low_rank_decode_kernel(Problem p) {
  decode<Scalar, M, true>(p);
}

template <typename Scalar>
cudaError_t launch_for_tokens(const LowRankDecode& arguments, cudaStream_t stream) {
  if (arguments.m <= 1) return launch(quantized_low_rank_decode_kernel<Scalar, 1>, 1, arguments, stream);
  if (arguments.m <= 2) return launch(quantized_low_rank_decode_kernel<Scalar, 2>, 2, arguments, stream);
  if (arguments.m <= 4) return launch(quantized_low_rank_decode_kernel<Scalar, 4>, 4, arguments, stream);
  return launch(quantized_low_rank_decode_kernel<Scalar, 8>, 8, arguments, stream);
}

}  // namespace

cudaError_t quantized_low_rank_decode(const LowRankDecode& problem, DecodeType type, cudaStream_t stream) {
  if (!is_valid(problem, kMaxPackedTokens, true)) return cudaErrorInvalidValue;
  if (type == DecodeType::kBFloat16) return launch_for_tokens<__nv_bfloat16>(problem, stream);
  return launch_for_tokens<__half>(problem, stream);
}

}  // namespace lorap

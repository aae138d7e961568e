// The kernels of low_rank_one_launch.h for weights of 16 bits.
#include "low_rank_one_launch.h"

namespace lorap {
namespace {

template <typename Scalar, int M>
__global__ void __launch_bounds__(kThreads, 1) low_rank_decode_kernel(Problem p) {
  decode<Scalar, M, false>(p);
}

template <typename Scalar>
cudaError_t launch_for_tokens(const LowRankDecode& arguments, cudaStream_t stream) {
  if (arguments.m <= 1) return launch(low_rank_decode_kernel<Scalar, 1>, 1, arguments, stream);
  if (arguments.m <= 2) return launch(low_rank_decode_kernel<Scalar, 2>, 2, arguments, stream);
  if (arguments.m <= 4) return launch(low_rank_decode_kernel<Scalar, 4>, 4, arguments, stream);
  return launch(low_rank_decode_kernel<Scalar, 8>, 8, arguments, stream);
}

}  // namespace

cudaError_t low_rank_decode(const LowRankDecode& problem, DecodeType type, cudaStream_t stream) {
  const bool packed = problem.count > 0 && problem.layers[0].bits != 16;
  if (packed) return quantized_low_rank_decode(problem, type, stream);
  if (problem.m > kTokens) return low_rank_decode_mma(problem, type, stream);
  if (!is_valid(problem, kTokens)) return cudaErrorInvalidValue;
  if (type == DecodeType::kBFloat16) return launch_for_tokens<__nv_bfloat16>(problem, stream);
  return launch_for_tokens<__half>(problem, stream);
}

}  // namespace lorap

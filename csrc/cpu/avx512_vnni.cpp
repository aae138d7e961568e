// AVX-512 with dot products of whole numbers: Intel since Cascade Lake, AMD since Zen 4.
// Built with -mavx512f -mavx512bw -mavx512vl -mavx512vnni. For weights of 4 and 8 bits only.
#include "avx512_quantized.h"

namespace {

// One instruction multiplies pairs, adds neighbours, and adds to the sums.
struct Quantized : Avx512Quantized {
  static Whole multiply_add(Whole whole, Part part, const int16_t* x) {
    return _mm512_dpwssd_epi32(whole, part, _mm512_loadu_si512(x));
  }
};

}  // namespace

namespace lorap::cpu {

const QuantizedKernel* avx512_vnni_quantized_kernel(int bits) {
  static constexpr QuantizedKernel four = make_quantized_kernel<Quantized, 4>("avx512_vnni");
  static constexpr QuantizedKernel eight = make_quantized_kernel<Quantized, 8>("avx512_vnni");
  return bits == 4 ? &four : &eight;
}

}  // namespace lorap::cpu

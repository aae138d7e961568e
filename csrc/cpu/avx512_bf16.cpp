// AVX-512 with bfloat16 dot products: Intel since Cooper Lake and Sapphire Rapids, AMD since Zen 4.
// Built with -mavx512f -mavx512bw -mavx512vl -mavx512bf16.
//
// One instruction multiplies 32 pairs and adds neighbours: half the work per token of avx512.cpp. It treats subnormal
// numbers as zero, and the outputs of the shrink stage are rounded to bfloat16, as two torch matmuls do too.
#include "avx512_sums.h"
#include "dot_tile.h"

namespace {

struct BFloat16 : Avx512Sums {
  using Weight = uint16_t;
  using Packed = uint16_t;
  using Wide = __m512i;
  static constexpr int64_t kStep = 32;
  static Wide widen(const uint16_t* w) { return _mm512_loadu_si512(w); }
  static Wide widen_tail(const uint16_t* w, int64_t count) { return _mm512_maskz_loadu_epi16((1u << count) - 1, w); }
  static Acc multiply_add(Wide wide, const uint16_t* packed, Acc acc) {
    return _mm512_dpbf16_ps(acc, (__m512bh)wide, (__m512bh)_mm512_loadu_si512(packed));
  }
  static int64_t place(int64_t i) { return i; }
  static Packed from_weight(uint16_t w) { return w; }
  static Packed from_float(float f) { return to_bfloat16(f); }
  static float to_float(uint16_t w) { return from_bfloat16(w); }
  static uint16_t to_weight(float f) { return to_bfloat16(f); }
};

}  // namespace

namespace lorap::cpu {

const RowKernel* avx512_bf16_kernel(Dtype dtype) {
  static constexpr RowKernel bfloat16 = make_kernel<BFloat16>("avx512_bf16", Dtype::kBFloat16);
  return dtype == Dtype::kBFloat16 ? &bfloat16 : nullptr;
}

}  // namespace lorap::cpu

// AVX-512 F + BW: Intel servers since 2017, AMD since 2022. Built with -mavx512f -mavx512bw -mavx512vl -mf16c.
#include "avx512_quantized.h"
#include "avx512_sums.h"
#include "avx512_trellis.h"
#include "dot_tile.h"

namespace {

struct Avx512 : Avx512Sums {
  using Packed = float;
  static Packed from_float(float f) { return f; }
};

struct Float32 : Avx512 {
  using Weight = float;
  using Wide = __m512;
  static constexpr int64_t kStep = 16;
  static Wide widen(const float* w) { return _mm512_loadu_ps(w); }
  static Wide widen_tail(const float* w, int64_t count) {
    return _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1), w);
  }
  static Acc multiply_add(Wide wide, const float* packed, Acc acc) {
    return _mm512_fmadd_ps(wide, _mm512_loadu_ps(packed), acc);
  }
  static int64_t place(int64_t i) { return i; }
  static Packed from_weight(float w) { return w; }
  static float to_float(float w) { return w; }
  static float to_weight(float f) { return f; }
};

// 32 weights of two bytes, as two vectors of sixteen floats.
struct Pair {
  __m512 first, second;
};

template <class Half>
struct TwoByte : Avx512 {
  using Weight = uint16_t;
  using Wide = Pair;
  static constexpr int64_t kStep = 32;
  static Wide widen(const uint16_t* w) { return Half::split(_mm512_loadu_si512(w)); }
  static Wide widen_tail(const uint16_t* w, int64_t count) {
    return Half::split(_mm512_maskz_loadu_epi16((1u << count) - 1, w));
  }
  static Acc multiply_add(const Wide& wide, const float* packed, Acc acc) {
    acc = _mm512_fmadd_ps(wide.first, _mm512_loadu_ps(packed), acc);
    return _mm512_fmadd_ps(wide.second, _mm512_loadu_ps(packed + 16), acc);
  }
};

// Even elements of a step by a shift, odd ones by a mask; see avx2.cpp.
struct BFloat16 : TwoByte<BFloat16> {
  static Pair split(__m512i w) {
    return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16)),
            _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static int64_t place(int64_t i) { return (i & 1) * 16 + (i >> 1); }
  static Packed from_weight(uint16_t w) { return from_bfloat16(w); }
  static float to_float(uint16_t w) { return from_bfloat16(w); }
  static uint16_t to_weight(float f) { return to_bfloat16(f); }
};

struct Float16 : TwoByte<Float16> {
  static Pair split(__m512i w) {
    return {_mm512_cvtph_ps(_mm512_castsi512_si256(w)), _mm512_cvtph_ps(_mm512_extracti64x4_epi64(w, 1))};
  }
  static int64_t place(int64_t i) { return i; }
  static Packed from_weight(uint16_t w) { return _cvtsh_ss(w); }
  static float to_float(uint16_t w) { return _cvtsh_ss(w); }
  static uint16_t to_weight(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
};

}  // namespace

namespace lorap::cpu {

const RowKernel* avx512_kernel(Dtype dtype) {
  static constexpr RowKernel float32 = make_kernel<Float32>("avx512", Dtype::kFloat32);
  static constexpr RowKernel bfloat16 = make_kernel<BFloat16>("avx512", Dtype::kBFloat16);
  static constexpr RowKernel float16 = make_kernel<Float16>("avx512", Dtype::kFloat16);
  if (dtype == Dtype::kFloat32) return &float32;
  return dtype == Dtype::kBFloat16 ? &bfloat16 : &float16;
}

const QuantizedKernel* avx512_quantized_kernel(int bits) {
  constexpr int64_t kTilesFrom = 7;  // tokens, measured on Zen 4
  static constexpr QuantizedKernel four =
      with_tiles<Avx512Rows, 4>(make_quantized_kernel<Avx512Quantized, 4>("avx512"), kTilesFrom);
  static constexpr QuantizedKernel eight =
      with_tiles<Avx512Rows, 8>(make_quantized_kernel<Avx512Quantized, 8>("avx512"), kTilesFrom);
  return bits == 4 ? &four : &eight;
}

const TrellisKernel* avx512_trellis_kernel(int bits) { return trellis_kernel<Avx512Trellis>("avx512", bits); }

}  // namespace lorap::cpu

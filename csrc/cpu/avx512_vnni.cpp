// AVX-512 with dot products of whole numbers: Intel since Cascade Lake, AMD since Zen 4.
// Built with -mavx512f -mavx512bw -mavx512vl -mavx512vnni. For weights of 4 and 8 bits only.
#include "avx512_quantized.h"

namespace {

// For weights of 8 bits: one instruction multiplies pairs, adds neighbours, and adds to the sums.
struct Pairs : Avx512Quantized {
  static Whole multiply_add(Whole whole, Part part, const int16_t* x) {
    return _mm512_dpwssd_epi32(whole, part, _mm512_loadu_si512(x));
  }
};

// For weights of 4 bits: one instruction multiplies four bytes, of which one side has no sign, and adds to the sums.
// Activations are one byte, or two: so weights are unpacked to bytes, twice as many at once as to 16 bits.
struct Bytes : Avx512Quantized {
  using Activation = int8_t;
  template <int Bits>
  static Part part(Words words, int i) {
    const __m512i shifted = i ? _mm512_srli_epi16(words, Bits) : words;
    return _mm512_and_si512(shifted, _mm512_set1_epi8((1 << Bits) - 1));
  }
  static Part constant(int number) { return _mm512_set1_epi8(static_cast<char>(number)); }
  static Whole multiply_add(Whole whole, Part part, const int8_t* x) {
    return _mm512_dpbusd_epi32(whole, part, _mm512_loadu_si512(x));
  }
  static Part load_part(const int8_t* x) {
    Part part = _mm512_loadu_si512(x);
    asm("" : "+v"(part));  // otherwise compilers read it again for every row
    return part;
  }
  template <class Shape>
  static Whole multiply_add_all(Whole whole, const Part* parts, const Part* x) {
    for (int i = 0; i < Shape::kParts; ++i) whole = _mm512_dpbusd_epi32(whole, parts[i], x[i]);
    return whole;
  }
};

struct OneByte : Bytes {
  using Rounded = int8_t;
  static void round(const float* x, float factor, int8_t* to) {
    for (int i = 0; i < kSmallestBlock; i += 16) {
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor)));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i), _mm512_cvtsepi32_epi8(rounded));
    }
  }
};

struct TwoBytes : Bytes {
  static constexpr int kPlanes = 2;
  template <int Bits, int Tokens>
  static constexpr int kRows = Tokens < 4 ? 4 : 2;
  static Whole join(Whole low, Whole high) { return _mm512_add_epi32(low, _mm512_slli_epi32(high, 8)); }
};

}  // namespace

namespace lorap::cpu {

const QuantizedKernel* avx512_vnni_quantized_kernel(int bits) {
  constexpr int64_t kTilesFrom = 10;  // tokens, measured on Zen 4
  static constexpr QuantizedKernel four =
      with_tiles<Avx512Rows, 4>(make_quantized_kernel<TwoBytes, 4>("avx512_vnni"), kTilesFrom);
  static constexpr QuantizedKernel eight =
      with_tiles<Avx512Rows, 8>(make_quantized_kernel<Pairs, 8>("avx512_vnni"), kTilesFrom);
  return bits == 4 ? &four : &eight;
}

const QuantizedKernel* avx512_vnni_bytes_kernel() {
  static constexpr QuantizedKernel four = make_quantized_kernel<OneByte, 4>("avx512_vnni");
  return &four;
}

}  // namespace lorap::cpu

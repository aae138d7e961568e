// AVX-512's way with weights of 4 and 8 bits; included by the files that are compiled for AVX-512.
#pragma once

#include "avx512_sums.h"
#include "avx512_trellis.h"
#include "quantized_tile.h"
#include "row_tile.h"

namespace {

struct Avx512Quantized {
  using Activation = int16_t;
  using Rounded = int16_t;
  static constexpr int kPlanes = 1;
  static constexpr int64_t kBytes = 64;
  static constexpr int kTileTokens = 4;
  template <int Bits, int Tokens>
  static constexpr int kRows = Bits == 8 ? 4 : 2;
  using Words = __m512i;
  using Part = __m512i;
  using Whole = __m512i;
  using Sums = __m512;
  using Scale = __m512;
  static Words load(const char* from) {
    Words words = _mm512_loadu_si512(from);
    asm("" : "+v"(words));  // otherwise compilers read the same words again for every shift
    return words;
  }
  static Words load_first(const char* from, int64_t count) {
    if (count >= kBytes) return load(from);
    return _mm512_maskz_loadu_epi8(count > 0 ? ~uint64_t{0} >> (kBytes - count) : 0, from);
  }
  template <int Bits>
  static Part part(Words words, int i) {
    const __m512i shifted = _mm512_srli_epi16(words, i * Bits);
    return (i + 1) * Bits == 16 ? shifted : _mm512_and_si512(shifted, _mm512_set1_epi16((1 << Bits) - 1));
  }
  static Part constant(int number) { return _mm512_set1_epi16(static_cast<int16_t>(number)); }
  static Whole zero_whole() { return _mm512_setzero_si512(); }
  static Whole load_whole(const int32_t* from) { return _mm512_loadu_si512(from); }
  static void store_whole(int32_t* to, Whole whole) { _mm512_storeu_si512(to, whole); }
  static Whole multiply_add(Whole whole, Part part, const int16_t* x) {
    return _mm512_add_epi32(whole, _mm512_madd_epi16(part, _mm512_loadu_si512(x)));
  }
  static Sums zero() { return Avx512Sums::zero(); }
  static float sum(Sums sums) {
    float four[4];
    sum(sums, sums, sums, sums, four);
    return four[0];
  }
  static void sum(Sums a, Sums b, Sums c, Sums d, float* out) { Avx512Sums::sum(a, b, c, d, out); }
  static void load_bfloat16(const char* from, int64_t count, float* to) {
    for (int64_t i = 0; i < count; i += 16) {
      const auto mask = static_cast<__mmask16>(count - i < 16 ? (1u << (count - i)) - 1 : 0xffffu);
      const __m512i wide = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, from + 2 * i));
      _mm512_storeu_ps(to + i, _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16)));
    }
  }
  template <int Count>
  static Scale spread(const float* scales) {
    if constexpr (Count == 1) return _mm512_set1_ps(*scales);
    if constexpr (Count == 2) {
      const __m512i halves = _mm512_set_epi32(1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0);
      const __m128 two = _mm_castsi128_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(scales)));
      return _mm512_permutexvar_ps(halves, _mm512_castps128_ps512(two));
    }
    if constexpr (Count == 4) {
      const __m512i quarters = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
      return _mm512_permutexvar_ps(quarters, _mm512_castps128_ps512(_mm_loadu_ps(scales)));
    }
  }
  static Sums scale_add(Whole whole, Scale scale, Sums sums) {
    return _mm512_fmadd_ps(_mm512_cvtepi32_ps(whole), scale, sums);
  }
  static void round(const float* x, float factor, int16_t* to) {
    for (int i = 0; i < kSmallestBlock; i += 16) {
      const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(_mm512_loadu_ps(x + i), _mm512_set1_ps(factor)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), _mm512_cvtsepi32_epi16(rounded));
    }
  }
};

// For row_tile.h.
struct Avx512Rows : Avx512Trellis {
  // Four words of 16 rows, of which each quarter of a vector gets four: a transpose within the quarters.
  static void load_words(const uint32_t* first, int64_t stride, Numbers* words) {
    const auto row = [&](int64_t r) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(first + r * stride)); };
    __m512i of[4];
    for (int i = 0; i < 4; ++i) {
      const __m256i low = _mm256_inserti128_si256(_mm256_castsi128_si256(row(i)), row(i + 4), 1);
      const __m256i high = _mm256_inserti128_si256(_mm256_castsi128_si256(row(i + 8)), row(i + 12), 1);
      of[i] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
    }
    const __m512i a = _mm512_unpacklo_epi32(of[0], of[1]), b = _mm512_unpacklo_epi32(of[2], of[3]);
    const __m512i c = _mm512_unpackhi_epi32(of[0], of[1]), d = _mm512_unpackhi_epi32(of[2], of[3]);
    words[0] = _mm512_unpacklo_epi64(a, b), words[1] = _mm512_unpackhi_epi64(a, b);
    words[2] = _mm512_unpacklo_epi64(c, d), words[3] = _mm512_unpackhi_epi64(c, d);
  }
  template <int Bits>
  static Numbers part(Numbers words, int i) {
    return Avx512Quantized::part<Bits>(words, i);
  }
  template <int Bits>
  static Numbers center(Numbers numbers) {
    return _mm512_sub_epi16(numbers, _mm512_set1_epi16(1 << (Bits - 1)));
  }
};

}  // namespace

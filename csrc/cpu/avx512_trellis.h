// AVX-512's way with weights on a trellis; included by avx512.cpp.
#pragma once

#include <immintrin.h>

#include "trellis_dot_tile.h"
#include "trellis_search_tile.h"

namespace {

struct Avx512Trellis {
  static constexpr int kFloats = 16;
  using Floats = __m512;
  static Floats load(const float* from) { return _mm512_load_ps(from); }
  static void store(float* to, Floats floats) { _mm512_store_ps(to, floats); }
  static Floats load_unaligned(const float* from) { return _mm512_loadu_ps(from); }
  static void store_unaligned(float* to, Floats floats) { _mm512_storeu_ps(to, floats); }
  static Floats zero() { return _mm512_setzero_ps(); }
  static Floats broadcast(float f) { return _mm512_set1_ps(f); }
  static Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
  static Floats least(Floats a, Floats b) { return _mm512_min_ps(a, b); }
  template <int Each>
  static Floats spread(const float* from) {
    if constexpr (Each >= kFloats) return _mm512_set1_ps(*from);
    if constexpr (Each == 8) {
      const __m512 pairs = _mm512_castpd_ps(_mm512_set1_pd(*reinterpret_cast<const double*>(from)));
      return _mm512_permutevar_ps(pairs, _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1));
    }
    const __m512 fours = _mm512_broadcast_f32x4(_mm_loadu_ps(from));
    return _mm512_permutevar_ps(fours, _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3));
  }

  static constexpr int kColumns = 1;
  using Numbers = __m512i;
  using Whole = __m512i;
  static Numbers load_numbers(const int32_t* from) { return _mm512_load_si512(from); }
  static void store_numbers(int32_t* to, Numbers numbers) { _mm512_store_si512(to, numbers); }
  static Whole zero_whole() { return _mm512_setzero_si512(); }
  static Floats to_floats(Whole whole) { return _mm512_cvtepi32_ps(whole); }
  static Whole multiply_add(Whole whole, Numbers numbers, const int16_t* x) {
    int32_t two;
    std::memcpy(&two, x, sizeof two);
    return _mm512_add_epi32(whole, _mm512_madd_epi16(numbers, _mm512_set1_epi32(two)));
  }

  // As in avx2_trellis.h, of 16 rows.
  template <int Bits>
  struct Decoder {
    OpenRings<Bits> rings;
    __m512i bytes_of_row = shuffle(), shift = shifts();
    Decoder(const uint32_t* words, int64_t columns) : rings(words, columns) {}
    static __m512i shuffle() {
      alignas(64) uint8_t from[64];
      for (int i = 0; i < 64; ++i) from[i] = static_cast<uint8_t>(i / 4 * Bits / 8 + i % 4);
      return _mm512_load_si512(from);
    }
    static __m512i shifts() {
      alignas(64) int32_t by[16];
      for (int i = 0; i < 16; ++i) by[i] = i * Bits % 8;
      return _mm512_load_si512(by);
    }
    const unsigned char* load(int64_t step) const { return rings.column(step); }
    Numbers decode(const unsigned char* column, int slice) const {
      const auto* from = reinterpret_cast<const __m128i*>(column + slice * kFloats * Bits / 8);
      const __m128i sixteen = _mm_loadu_si128(from);
      const __m512i rows = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(sixteen), bytes_of_row);
      const __m512i window = _mm512_and_si512(_mm512_srlv_epi32(rows, shift), _mm512_set1_epi32(kTrellisWindows - 1));
      const __m512i product = _mm512_mullo_epi32(window, _mm512_set1_epi32(kTrellisFactor));
      return _mm512_maddubs_epi16(_mm512_set1_epi8(1), product);
    }
  };
};

}  // namespace

// AVX-512's way with weights on a trellis, and with pairs of columns; included by avx512.cpp and those that build on
// it.
#pragma once

#include <immintrin.h>

#include "trellis_dot_tile.h"
#include "trellis_search_tile.h"

namespace {

struct Avx512Trellis {
  static constexpr int kFloats = 16;
  static constexpr int kSlices = 4;  // times 4 tokens are 16 of 32 registers
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

  using Numbers = __m512i;
  using Whole = __m512i;
  static Numbers load_numbers(const int32_t* from) { return _mm512_load_si512(from); }
  static void store_numbers(int32_t* to, Numbers numbers) { _mm512_store_si512(to, numbers); }
  static Whole zero_whole() { return _mm512_setzero_si512(); }
  static Floats to_floats(Whole whole) { return _mm512_cvtepi32_ps(whole); }
  static Whole multiply_add(Whole whole, Numbers numbers, const int16_t* x) {
    int32_t two;
    std::memcpy(&two, x, sizeof two);
#ifdef __AVX512VNNI__
    return _mm512_dpwssd_epi32(whole, numbers, _mm512_set1_epi32(two));
#else
    return _mm512_add_epi32(whole, _mm512_madd_epi16(numbers, _mm512_set1_epi32(two)));
#endif
  }

  // See avx2_trellis.h.
  struct Hash {
    __m512i low_factor = _mm512_set1_epi16(static_cast<int16_t>(kTrellisFactor & 0xffff));
    __m512i high_factor = _mm512_set1_epi16(static_cast<int16_t>(kTrellisFactor >> 16));
    Hash() { asm("" : "+v"(high_factor)); }
    Numbers operator()(__m512i windows) const {
      const __m512i low = _mm512_mullo_epi16(windows, low_factor), ones = _mm512_set1_epi8(1);
      const __m512i high =
          _mm512_add_epi16(_mm512_mulhi_epu16(windows, low_factor), _mm512_mullo_epi16(windows, high_factor));
      return _mm512_add_epi16(_mm512_maddubs_epi16(ones, low), _mm512_maddubs_epi16(ones, high));
    }
  };

  // As in avx2_trellis.h, of 16 rows.
  template <int Bits>
  struct Decoder {
    OpenRings<Bits> rings;
    __m512i first_bytes, second_bytes, right, left;
    Hash hash;
    Decoder(const uint32_t* words, int64_t columns) : rings(words, columns) {
      alignas(64) uint8_t first[64], second[64];
      alignas(64) int32_t shifts[kFloats];
      for (int i = 0; i < 64; ++i) {
        first[i] = static_cast<uint8_t>(i / 4 * Bits / 8 + i % 4);
        second[i] = static_cast<uint8_t>(i % 4 ? first[i] - 1 : first[i]);
      }
      for (int i = 0; i < kFloats; ++i) shifts[i] = i * Bits % 8;
      first_bytes = _mm512_load_si512(first);
      second_bytes = _mm512_load_si512(second);
      right = _mm512_load_si512(shifts);
      left = _mm512_sub_epi32(_mm512_set1_epi32(8), right);
    }
    const unsigned char* load(int64_t pair) const { return rings.column(2 * pair); }
    Numbers decode(const unsigned char* column, int slice) const {
      const unsigned char* from = column + slice * kFloats * Bits / 8;
      const __m512i first = _mm512_srlv_epi32(_mm512_shuffle_epi8(spread(from), first_bytes), right);
      const __m512i second =
          _mm512_sllv_epi32(_mm512_shuffle_epi8(spread(from + OpenRings<Bits>::kStride), second_bytes), left);
      const __m512i both = _mm512_mask_blend_epi16(0xaaaaaaaa, first, second);
      return hash(_mm512_and_si512(both, _mm512_set1_epi16(kTrellisWindows - 1)));
    }
    static __m512i spread(const unsigned char* from) {
      return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
    }
  };
};

}  // namespace

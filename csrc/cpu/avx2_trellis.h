// AVX2's way with weights on a trellis; included by avx2.cpp.
#pragma once

#include <immintrin.h>

#include "trellis_dot_tile.h"
#include "trellis_search_tile.h"

namespace {

struct Avx2Trellis {
  static constexpr int kFloats = 8;
  using Floats = __m256;
  static Floats load(const float* from) { return _mm256_load_ps(from); }
  static void store(float* to, Floats floats) { _mm256_store_ps(to, floats); }
  static Floats load_unaligned(const float* from) { return _mm256_loadu_ps(from); }
  static void store_unaligned(float* to, Floats floats) { _mm256_storeu_ps(to, floats); }
  static Floats zero() { return _mm256_setzero_ps(); }
  static Floats broadcast(float f) { return _mm256_set1_ps(f); }
  static Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
  static Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
  static Floats least(Floats a, Floats b) { return _mm256_min_ps(a, b); }
  template <int Each>
  static Floats spread(const float* from) {
    if constexpr (Each >= kFloats) return _mm256_broadcast_ss(from);
    const __m256 pairs = _mm256_castpd_ps(_mm256_broadcast_sd(reinterpret_cast<const double*>(from)));
    return _mm256_permutevar_ps(pairs, _mm256_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1));
  }

  static constexpr int kColumns = 1;
  using Numbers = __m256i;
  using Whole = __m256i;
  static Numbers load_numbers(const int32_t* from) { return _mm256_load_si256(reinterpret_cast<const __m256i*>(from)); }
  static void store_numbers(int32_t* to, Numbers numbers) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to), numbers);
  }
  static Whole zero_whole() { return _mm256_setzero_si256(); }
  static Floats to_floats(Whole whole) { return _mm256_cvtepi32_ps(whole); }
  static Whole multiply_add(Whole whole, Numbers numbers, const int16_t* x) {
    int32_t two;
    std::memcpy(&two, x, sizeof two);
    return _mm256_add_epi32(whole, _mm256_madd_epi16(numbers, _mm256_set1_epi32(two)));
  }

  // Each row gets the four bytes that its window begins in.
  template <int Bits>
  struct Decoder {
    OpenRings<Bits> rings;
    __m256i bytes_of_row = shuffle(), shift = shifts();
    Decoder(const uint32_t* words, int64_t columns) : rings(words, columns) {}
    static __m256i shuffle() {
      alignas(32) uint8_t from[32];
      for (int i = 0; i < 32; ++i) from[i] = static_cast<uint8_t>(i / 4 * Bits / 8 + i % 4);
      return _mm256_load_si256(reinterpret_cast<const __m256i*>(from));
    }
    static __m256i shifts() {
      alignas(32) int32_t by[8];
      for (int i = 0; i < 8; ++i) by[i] = i * Bits % 8;
      return _mm256_load_si256(reinterpret_cast<const __m256i*>(by));
    }
    const unsigned char* load(int64_t step) const { return rings.column(step); }
    Numbers decode(const unsigned char* column, int slice) const {
      int64_t eight;
      std::memcpy(&eight, column + slice * kFloats * Bits / 8, sizeof eight);
      const __m256i rows = _mm256_shuffle_epi8(_mm256_set1_epi64x(eight), bytes_of_row);
      const __m256i window = _mm256_and_si256(_mm256_srlv_epi32(rows, shift), _mm256_set1_epi32(kTrellisWindows - 1));
      const __m256i product = _mm256_mullo_epi32(window, _mm256_set1_epi32(kTrellisFactor));
      return _mm256_maddubs_epi16(_mm256_set1_epi8(1), product);
    }
  };
};

}  // namespace

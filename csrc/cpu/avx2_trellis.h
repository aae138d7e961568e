// AVX2's way with weights on a trellis; included by avx2.cpp.
#pragma once

#include <immintrin.h>

#include "trellis_dot_tile.h"
#include "trellis_search_tile.h"

namespace {

struct Avx2Trellis {
  static constexpr int kFloats = 8;
  static constexpr int kSlices = 2;  // times 4 tokens are 8 of 16 registers
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

  // The sums of the bytes of what windows make, each half of the product by itself.
  struct Hash {
    __m256i low_factor = _mm256_set1_epi16(static_cast<int16_t>(kTrellisFactor & 0xffff));
    __m256i high_factor = _mm256_set1_epi16(static_cast<int16_t>(kTrellisFactor >> 16));
    // A compiler that knows this factor makes five shifts and sums of one multiplication.
    Hash() { asm("" : "+x"(high_factor)); }
    Numbers operator()(__m256i windows) const {
      const __m256i low = _mm256_mullo_epi16(windows, low_factor), ones = _mm256_set1_epi8(1);
      const __m256i high =
          _mm256_add_epi16(_mm256_mulhi_epu16(windows, low_factor), _mm256_mullo_epi16(windows, high_factor));
      return _mm256_add_epi16(_mm256_maddubs_epi16(ones, low), _mm256_maddubs_epi16(ones, high));
    }
  };

  // Each row gets four bytes of either column, of the first from the one on that its window begins in, of the second
  // from the one before. Then shifts bring one window to the lower 16 bits and the other to the upper.
  template <int Bits>
  struct Decoder {
    OpenRings<Bits> rings;
    __m256i first_bytes, second_bytes, right, left;
    Hash hash;
    Decoder(const uint32_t* words, int64_t columns) : rings(words, columns) {
      alignas(32) uint8_t first[32], second[32];
      alignas(32) int32_t shifts[kFloats];
      for (int i = 0; i < 32; ++i) {
        first[i] = static_cast<uint8_t>(i / 4 * Bits / 8 + i % 4);
        second[i] = static_cast<uint8_t>(i % 4 ? first[i] - 1 : first[i]);
      }
      for (int i = 0; i < kFloats; ++i) shifts[i] = i * Bits % 8;
      first_bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(first));
      second_bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(second));
      right = _mm256_load_si256(reinterpret_cast<const __m256i*>(shifts));
      left = _mm256_sub_epi32(_mm256_set1_epi32(8), right);
    }
    const unsigned char* load(int64_t pair) const { return rings.column(2 * pair); }
    Numbers decode(const unsigned char* column, int slice) const {
      const unsigned char* from = column + slice * kFloats * Bits / 8;
      const __m256i first = _mm256_srlv_epi32(_mm256_shuffle_epi8(spread(from), first_bytes), right);
      const __m256i second =
          _mm256_sllv_epi32(_mm256_shuffle_epi8(spread(from + OpenRings<Bits>::kStride), second_bytes), left);
      const __m256i both = _mm256_blend_epi16(first, second, 0xaa);
      return hash(_mm256_and_si256(both, _mm256_set1_epi16(kTrellisWindows - 1)));
    }
    static __m256i spread(const unsigned char* from) {
      int64_t eight;
      std::memcpy(&eight, from, sizeof eight);
      return _mm256_set1_epi64x(eight);
    }
  };
};

}  // namespace

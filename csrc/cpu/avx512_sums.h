// Horizontal sums of AVX-512 vectors; included by the files that are compiled for AVX-512.
#pragma once

#include <immintrin.h>

namespace {

struct Avx512Sums {
  using Acc = __m512;
  static constexpr int kStreams = 1;   // measured on Zen 4 with prefetching a page ahead; more is unmeasured
  static constexpr int kTileRows = 4;  // 4 rows x 4 tokens = 16 of 32 registers hold sums
  static constexpr int kSums = 16;
  static __m512 zero() { return _mm512_setzero_ps(); }
  static __m512 add(__m512 a, __m512 b) { return _mm512_add_ps(a, b); }
  static float sum(__m512 v) { return _mm512_reduce_add_ps(v); }

  static void sum(__m512 a, __m512 b, __m512 c, __m512 d, float* out) {
    const __m512 lanes = quarter(a, b, c, d);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(lanes), upper(lanes));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
  }

  // A transpose that adds on its way: two vectors become one with half the elements of each, four times.
  static void sums(const __m512* v, float* out) {
    __m512 quarters[4];  // [i]: in each 128-bit lane, the sums of that lane of v[4 i] ... v[4 i + 3]
    for (int i = 0; i < 4; ++i) {
      quarters[i] = quarter(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
    }
    const __m512 a = add_lanes(quarters[0], quarters[1]), b = add_lanes(quarters[2], quarters[3]);
    _mm512_storeu_ps(out, add_lanes(a, b));
  }

 private:
  static __m512 quarter(__m512 a, __m512 b, __m512 c, __m512 d) {
    const __m512 first = halve(a, b), second = halve(c, d);
    return _mm512_add_ps(unpack_low(first, second), unpack_high(first, second));
  }
  static __m256 upper(__m512 v) { return _mm256_castpd_ps(_mm512_extractf64x4_pd(_mm512_castps_pd(v), 1)); }
  static __m512 halve(__m512 a, __m512 b) { return _mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
  static __m512 unpack_low(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  static __m512 unpack_high(__m512 a, __m512 b) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(a), _mm512_castps_pd(b)));
  }
  // Lanes (a0 + a1, a2 + a3, b0 + b1, b2 + b3).
  static __m512 add_lanes(__m512 a, __m512 b) {
    return _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
};

}  // namespace

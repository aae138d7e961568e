// AVX-512's way with weights on a trellis; included by avx512.cpp.
#pragma once

#include <immintrin.h>

#include "trellis_search_tile.h"

namespace {

struct Avx512Trellis {
  static constexpr int kFloats = 16;
  using Floats = __m512;
  static Floats load(const float* from) { return _mm512_load_ps(from); }
  static void store(float* to, Floats floats) { _mm512_store_ps(to, floats); }
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
};

}  // namespace

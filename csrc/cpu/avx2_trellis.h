// AVX2's way with weights on a trellis; included by avx2.cpp.
#pragma once

#include <immintrin.h>

#include "trellis_search_tile.h"

namespace {

struct Avx2Trellis {
  static constexpr int kFloats = 8;
  using Floats = __m256;
  static Floats load(const float* from) { return _mm256_load_ps(from); }
  static void store(float* to, Floats floats) { _mm256_store_ps(to, floats); }
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
};

}  // namespace

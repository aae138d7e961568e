// AVX2 + FMA + F16C: Intel since 2013, AMD since 2015. Built with -mavx2 -mfma -mf16c.
#include <immintrin.h>

#include "avx2_trellis.h"
#include "dot_tile.h"
#include "quantized_tile.h"

namespace {

struct Avx2 {
  using Packed = float;
  using Acc = __m256;
  static constexpr int kStreams = 4;   // 1.2 times as fast as 2 on Zen 2, and even with 8
  static constexpr int kTileRows = 2;  // 2 rows x 4 tokens = 8 of 16 registers hold sums
  static constexpr int kSums = 8;
  static Acc zero() { return _mm256_setzero_ps(); }
  static Acc add(Acc a, Acc b) { return _mm256_add_ps(a, b); }
  static float sum(__m256 v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  // Adding neighbours of two vectors side by side, twice, leaves in each half of a vector four sums over that half.
  static void sums(const __m256* v, float* out) {
    const __m256 low = _mm256_hadd_ps(_mm256_hadd_ps(v[0], v[1]), _mm256_hadd_ps(v[2], v[3]));
    const __m256 high = _mm256_hadd_ps(_mm256_hadd_ps(v[4], v[5]), _mm256_hadd_ps(v[6], v[7]));
    _mm256_storeu_ps(out,
                     _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31)));
  }
  static Packed from_float(float f) { return f; }
};

struct Float32 : Avx2 {
  using Weight = float;
  using Wide = __m256;
  static constexpr int64_t kStep = 8;
  static Wide widen(const float* w) { return _mm256_loadu_ps(w); }
  static Wide widen_tail(const float* w, int64_t count) {
    alignas(32) float buffer[kStep] = {};
    std::memcpy(buffer, w, count * sizeof(float));
    return _mm256_load_ps(buffer);
  }
  static Acc multiply_add(Wide wide, const float* packed, Acc acc) {
    return _mm256_fmadd_ps(wide, _mm256_loadu_ps(packed), acc);
  }
  static int64_t place(int64_t i) { return i; }
  static Packed from_weight(float w) { return w; }
  static float to_float(float w) { return w; }
  static float to_weight(float f) { return f; }
};

// 16 weights of two bytes, as two vectors of eight floats.
struct Pair {
  __m256 first, second;
};

template <class Half>
struct TwoByte : Avx2 {
  using Weight = uint16_t;
  using Wide = Pair;
  static constexpr int64_t kStep = 16;
  static Wide widen(const uint16_t* w) { return Half::split(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(w))); }
  static Wide widen_tail(const uint16_t* w, int64_t count) {
    alignas(32) uint16_t buffer[kStep] = {};
    std::memcpy(buffer, w, count * sizeof(uint16_t));
    return widen(buffer);
  }
  static Acc multiply_add(const Wide& wide, const float* packed, Acc acc) {
    acc = _mm256_fmadd_ps(wide.first, _mm256_loadu_ps(packed), acc);
    return _mm256_fmadd_ps(wide.second, _mm256_loadu_ps(packed + 8), acc);
  }
};

// A bfloat16 is the upper half of a float32: even elements need a shift, odd ones a mask, and no shuffle at all; x is
// packed with the even elements of a step before the odd ones.
struct BFloat16 : TwoByte<BFloat16> {
  static Pair split(__m256i w) {
    return {_mm256_castsi256_ps(_mm256_slli_epi32(w, 16)),
            _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(static_cast<int>(0xffff0000u))))};
  }
  static int64_t place(int64_t i) { return (i & 1) * 8 + (i >> 1); }
  static Packed from_weight(uint16_t w) { return from_bfloat16(w); }
  static float to_float(uint16_t w) { return from_bfloat16(w); }
  static uint16_t to_weight(float f) { return to_bfloat16(f); }
};

struct Float16 : TwoByte<Float16> {
  static Pair split(__m256i w) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(w)), _mm256_cvtph_ps(_mm256_extracti128_si256(w, 1))};
  }
  static int64_t place(int64_t i) { return i; }
  static Packed from_weight(uint16_t w) { return _cvtsh_ss(w); }
  static float to_float(uint16_t w) { return _cvtsh_ss(w); }
  static uint16_t to_weight(float f) { return _cvtss_sh(f, _MM_FROUND_TO_NEAREST_INT); }
};

struct Quantized {
  using Activation = int16_t;
  using Rounded = int16_t;
  static constexpr int kPlanes = 1;
  static constexpr int64_t kBytes = 32;
  static constexpr int kTileTokens = 4;
  // Of 4 bits, two rows and two tokens are what registers hold.
  template <int Bits, int Tokens>
  static constexpr int kRows = Bits == 8    ? 4
                               : Tokens < 4 ? 2
                                            : 1;
  using Words = __m256i;
  using Part = __m256i;
  using Whole = __m256i;
  using Sums = __m256;
  using Scale = __m256;
  static __m256i load_bytes(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
  static Words load(const char* from) { return load_bytes(from); }
  template <int Bits>
  static Part part(Words words, int i) {
    const __m256i shifted = _mm256_srli_epi16(words, i * Bits);
    return (i + 1) * Bits == 16 ? shifted : _mm256_and_si256(shifted, _mm256_set1_epi16((1 << Bits) - 1));
  }
  static Part constant(int number) { return _mm256_set1_epi16(static_cast<int16_t>(number)); }
  static Whole zero_whole() { return _mm256_setzero_si256(); }
  static Whole load_whole(const int32_t* from) { return load_bytes(from); }
  static void store_whole(int32_t* to, Whole whole) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), whole); }
  static Whole multiply_add(Whole whole, Part part, const int16_t* x) {
    return _mm256_add_epi32(whole, _mm256_madd_epi16(part, load_bytes(x)));
  }
  static Sums zero() { return Avx2::zero(); }
  static float sum(Sums sums) {
    float four[4];
    sum(sums, sums, sums, sums, four);
    return four[0];
  }
  static void sum(Sums a, Sums b, Sums c, Sums d, float* out) {
    const __m256 lanes = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(lanes), _mm256_extractf128_ps(lanes, 1)));
  }
  static void load_bfloat16(const char* from, int64_t count, float* to) {
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      const __m128i eight = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + 2 * i));
      const __m256i wide = _mm256_slli_epi32(_mm256_cvtepu16_epi32(eight), 16);
      _mm256_storeu_ps(to + i, _mm256_castsi256_ps(wide));
    }
    for (; i < count; ++i) {
      uint16_t one;
      std::memcpy(&one, from + 2 * i, sizeof one);
      to[i] = from_bfloat16(one);
    }
  }
  template <int Count>
  static Scale spread(const float* scales) {
    if constexpr (Count == 1) return _mm256_broadcast_ss(scales);
    if constexpr (Count == 2) return _mm256_set_m128(_mm_broadcast_ss(scales + 1), _mm_broadcast_ss(scales));
  }
  static Sums scale_add(Whole whole, Scale scale, Sums sums) {
    return _mm256_fmadd_ps(_mm256_cvtepi32_ps(whole), scale, sums);
  }
  static void round(const float* x, float factor, int16_t* to) {
    const __m256 by = _mm256_set1_ps(factor);
    for (int i = 0; i < kSmallestBlock; i += 16) {
      const __m256i low = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), by));
      const __m256i high = _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i + 8), by));
      // Packing takes turns between the halves of the two.
      const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi32(low, high), 0xd8);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), packed);
    }
  }
};

// For weights of 4 bits: one instruction multiplies bytes, of which one side has no sign, and adds neighbours in 16
// bits. Four products of 15 and 127 stay below 2^13 there, so that two such sums are widened at once.
struct QuantizedBytes : Quantized {
  using Activation = int8_t;
  using Rounded = int8_t;
  template <int Bits>
  static Part part(Words words, int i) {
    return _mm256_and_si256(_mm256_srli_epi16(words, i * Bits), _mm256_set1_epi8((1 << Bits) - 1));
  }
  static Part constant(int number) { return _mm256_set1_epi8(static_cast<int8_t>(number)); }
  static Whole multiply_add(Whole whole, Part part, const int8_t* x) {
    return add_wide(whole, _mm256_maddubs_epi16(part, load_bytes(x)));
  }
  static Part load_part(const int8_t* x) { return load_bytes(x); }
  template <class Shape>
  static Whole multiply_add_all(Whole whole, const Part* parts, const Part* x) {
    static_assert(Shape::kParts == 2);
    const __m256i first = _mm256_maddubs_epi16(parts[0], x[0]), second = _mm256_maddubs_epi16(parts[1], x[1]);
    return add_wide(whole, _mm256_add_epi16(first, second));
  }
  static Whole add_wide(Whole whole, __m256i pairs) {
    return _mm256_add_epi32(whole, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
  }
  static void round(const float* x, float factor, int8_t* to) {
    int16_t rounded[kSmallestBlock];
    Quantized::round(x, factor, rounded);
    const __m256i packed = _mm256_packs_epi16(load_bytes(rounded), load_bytes(rounded + 16));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permute4x64_epi64(packed, 0xd8));
  }
};

}  // namespace

namespace lorap::cpu {

const RowKernel* avx2_kernel(Dtype dtype) {
  static constexpr RowKernel float32 = make_kernel<Float32>("avx2", Dtype::kFloat32);
  static constexpr RowKernel bfloat16 = make_kernel<BFloat16>("avx2", Dtype::kBFloat16);
  static constexpr RowKernel float16 = make_kernel<Float16>("avx2", Dtype::kFloat16);
  if (dtype == Dtype::kFloat32) return &float32;
  return dtype == Dtype::kBFloat16 ? &bfloat16 : &float16;
}

const QuantizedKernel* avx2_quantized_kernel(int bits) {
  static constexpr QuantizedKernel four = make_quantized_kernel<Quantized, 4>("avx2");
  static constexpr QuantizedKernel eight = make_quantized_kernel<Quantized, 8>("avx2");
  return bits == 4 ? &four : &eight;
}

const QuantizedKernel* avx2_bytes_kernel() {
  static constexpr QuantizedKernel four = make_quantized_kernel<QuantizedBytes, 4>("avx2");
  return &four;
}

const TrellisKernel* avx2_trellis_kernel(int bits) { return trellis_kernel<Avx2Trellis>("avx2", bits); }

}  // namespace lorap::cpu

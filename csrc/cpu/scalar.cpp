// Plain C++, for processors that none of the other files serves; also the reading aid for dot_tile.h and
// quantized_tile.h.
#include <cmath>

#include "dot_tile.h"
#include "quantized_tile.h"
#include "scalar_trellis.h"

namespace {

inline float from_float16(uint16_t bits) {
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000u) << 16;
  const uint32_t exponent = (bits >> 10) & 0x1fu;
  const uint32_t mantissa = bits & 0x3ffu;
  if (exponent == 0x1fu) return bits_float(sign | 0x7f800000u | (mantissa << 13));
  if (exponent != 0) return bits_float(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float subnormal = static_cast<float>(mantissa) * 5.9604644775390625e-8f;  // 2^-24
  return sign ? -subnormal : subnormal;
}

// Round to nearest even.
inline uint16_t to_float16(float value) {
  const uint32_t bits = float_bits(value);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000u);
  const uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return sign | 0x7e00u;
  if (magnitude >= 0x477ff000u) return sign | 0x7c00u;   // 65520 and more round to infinity
  if (magnitude < 0x38800000u) {                         // below 2^-14: subnormal in float16
    const float shifted = bits_float(magnitude) + 0.5f;  // one unit in the last place of [0.5, 1) is 2^-24
    return sign | static_cast<uint16_t>(float_bits(shifted) - 0x3f000000u);
  }
  const uint32_t rounded = magnitude + 0xfffu + ((magnitude >> 13) & 1u);
  return sign | static_cast<uint16_t>((rounded - 0x38000000u) >> 13);
}

template <class WeightType, float (*ToFloat)(WeightType), WeightType (*FromFloat)(float)>
struct ScalarLane {
  using Weight = WeightType;
  using Packed = float;
  struct Wide {
    float value[8];
  };
  struct Acc {
    float value[8];
  };
  static constexpr int64_t kStep = 8;
  static constexpr int kStreams = 1;
  static constexpr int kTileRows = 1;
  static constexpr int kSums = 1;
  static Acc zero() { return {}; }
  static Wide widen(const Weight* w) { return widen_tail(w, kStep); }
  static Wide widen_tail(const Weight* w, int64_t count) {
    Wide wide = {};
    for (int64_t i = 0; i < count; ++i) wide.value[i] = ToFloat(w[i]);
    return wide;
  }
  static Acc multiply_add(const Wide& wide, const Packed* packed, Acc acc) {
    for (int i = 0; i < 8; ++i) acc.value[i] += wide.value[i] * packed[i];
    return acc;
  }
  static Acc add(Acc a, const Acc& b) {
    for (int i = 0; i < 8; ++i) a.value[i] += b.value[i];
    return a;
  }
  static float sum(const Acc& acc) {
    float total = 0;
    for (int i = 0; i < 8; ++i) total += acc.value[i];
    return total;
  }
  static int64_t place(int64_t i) { return i; }
  static Packed from_weight(Weight w) { return ToFloat(w); }
  static Packed from_float(float f) { return f; }
  static float to_float(Weight w) { return ToFloat(w); }
  static Weight to_weight(float f) { return FromFloat(f); }
};

inline float same(float f) { return f; }

struct Quantized {
  using Activation = int16_t;
  using Rounded = int16_t;
  static constexpr int kPlanes = 1;
  static constexpr int64_t kBytes = 16;
  static constexpr int kTileTokens = 1;
  template <int Bits, int Tokens>
  static constexpr int kRows = 1;
  struct Words {
    uint16_t value[8];
  };
  struct Part {
    int32_t value[8];
  };
  struct Whole {
    int32_t value[4];
  };
  struct Sums {
    float value[4];
  };
  using Scale = float;
  static Words load(const char* from) {
    Words words;
    std::memcpy(&words, from, sizeof words);
    return words;
  }
  template <int Bits>
  static Part part(const Words& words, int i) {
    Part part;
    for (int j = 0; j < 8; ++j) part.value[j] = (words.value[j] >> (i * Bits)) & ((1 << Bits) - 1);
    return part;
  }
  static Part constant(int number) {
    Part part;
    for (int32_t& value : part.value) value = number;
    return part;
  }
  static Whole zero_whole() { return {}; }
  static Whole load_whole(const int32_t* from) {
    Whole whole;
    std::memcpy(&whole, from, sizeof whole);
    return whole;
  }
  static void store_whole(int32_t* to, const Whole& whole) { std::memcpy(to, &whole, sizeof whole); }
  static Whole multiply_add(Whole whole, const Part& part, const int16_t* x) {
    for (int j = 0; j < 8; ++j) whole.value[j / 2] += part.value[j] * x[j];
    return whole;
  }
  static Sums zero() { return {}; }
  static float sum(const Sums& sums) { return sums.value[0] + sums.value[1] + (sums.value[2] + sums.value[3]); }
  template <int Count>
  static Scale spread(const float* scales) {
    static_assert(Count == 1);
    return *scales;
  }
  static Sums scale_add(const Whole& whole, Scale scale, Sums sums) {
    for (int j = 0; j < 4; ++j) sums.value[j] += static_cast<float>(whole.value[j]) * scale;
    return sums;
  }
  static void round(const float* x, float factor, int16_t* to) {
    for (int j = 0; j < kSmallestBlock; ++j) {
      const float rounded = std::nearbyint(x[j] * factor);
      to[j] = static_cast<int16_t>(rounded < 32767.0f ? rounded : 32767.0f);
    }
  }
};

}  // namespace

namespace lorap::cpu {

const RowKernel* scalar_kernel(Dtype dtype) {
  static constexpr RowKernel float32 = make_kernel<ScalarLane<float, same, same>>("scalar", Dtype::kFloat32);
  static constexpr RowKernel bfloat16 =
      make_kernel<ScalarLane<uint16_t, from_bfloat16, to_bfloat16>>("scalar", Dtype::kBFloat16);
  static constexpr RowKernel float16 =
      make_kernel<ScalarLane<uint16_t, from_float16, to_float16>>("scalar", Dtype::kFloat16);
  if (dtype == Dtype::kFloat32) return &float32;
  return dtype == Dtype::kBFloat16 ? &bfloat16 : &float16;
}

const QuantizedKernel* scalar_quantized_kernel(int bits) {
  static constexpr QuantizedKernel four = make_quantized_kernel<Quantized, 4>("scalar");
  static constexpr QuantizedKernel eight = make_quantized_kernel<Quantized, 8>("scalar");
  return bits == 4 ? &four : &eight;
}

const TrellisKernel* scalar_trellis_kernel(int bits) { return trellis_kernel<ScalarTrellis>("scalar", bits); }

}  // namespace lorap::cpu

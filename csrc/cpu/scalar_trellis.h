// Plain C++'s way with weights on a trellis; included by scalar.cpp.
#pragma once

#include "trellis_dot_tile.h"
#include "trellis_search_tile.h"

namespace {

struct ScalarTrellis {
  static constexpr int kFloats = 8;  // so that slices begin with whole bytes
  static constexpr int kSlices = 1;
  struct Floats {
    float value[kFloats];
  };
  static Floats load(const float* from) {
    Floats floats;
    std::memcpy(&floats, from, sizeof floats);
    return floats;
  }
  static void store(float* to, const Floats& floats) {
    for (int i = 0; i < kFloats; ++i) to[i] = floats.value[i];
  }
  static Floats load_unaligned(const float* from) { return load(from); }
  static void store_unaligned(float* to, const Floats& floats) { store(to, floats); }
  static Floats zero() { return {}; }
  static Floats broadcast(float f) { return spread<kFloats>(&f); }
  static Floats add(Floats a, const Floats& b) {
    for (int i = 0; i < kFloats; ++i) a.value[i] += b.value[i];
    return a;
  }
  static Floats multiply_add(const Floats& a, const Floats& b, Floats c) {
    for (int i = 0; i < kFloats; ++i) c.value[i] += a.value[i] * b.value[i];
    return c;
  }
  static Floats least(const Floats& a, Floats b) {
    for (int i = 0; i < kFloats; ++i) b.value[i] = a.value[i] < b.value[i] ? a.value[i] : b.value[i];
    return b;
  }
  template <int Each>
  static Floats spread(const float* from) {
    Floats floats;
    for (int i = 0; i < kFloats; ++i) floats.value[i] = from[i / Each];
    return floats;
  }

  struct Numbers {
    int16_t value[2 * kFloats];
  };
  struct Whole {
    int32_t value[kFloats];
  };
  static Numbers load_numbers(const int32_t* from) {
    Numbers numbers;
    std::memcpy(&numbers, from, sizeof numbers);
    return numbers;
  }
  static void store_numbers(int32_t* to, const Numbers& numbers) { std::memcpy(to, &numbers, sizeof numbers); }
  static Whole zero_whole() { return {}; }
  static Floats to_floats(const Whole& whole) {
    Floats floats;
    for (int i = 0; i < kFloats; ++i) floats.value[i] = static_cast<float>(whole.value[i]);
    return floats;
  }
  static Whole multiply_add(Whole whole, const Numbers& numbers, const int16_t* x) {
    for (int i = 0; i < kFloats; ++i) {
      whole.value[i] += numbers.value[2 * i] * x[0] + numbers.value[2 * i + 1] * x[1];
    }
    return whole;
  }
  template <int Bits>
  struct Decoder {
    OpenRings<Bits> rings;
    Decoder(const uint32_t* words, int64_t columns) : rings(words, columns) {}
    const unsigned char* load(int64_t pair) const { return rings.column(2 * pair); }
    Numbers decode(const unsigned char* column, int slice) const {
      Numbers numbers;
      for (int which = 0; which < 2; ++which) {
        const unsigned char* from = column + which * OpenRings<Bits>::kStride;
        uint64_t bits = 0;
        std::memcpy(&bits, from + slice * kFloats * Bits / 8, sizeof bits);
        for (int i = 0; i < kFloats; ++i) {
          const int number = trellis_number(bits >> i * Bits & (kTrellisWindows - 1));
          numbers.value[2 * i + which] = static_cast<int16_t>(number);
        }
      }
      return numbers;
    }
  };
};

}  // namespace

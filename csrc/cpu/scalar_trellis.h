// Plain C++'s way with weights on a trellis; included by scalar.cpp.
#pragma once

#include "trellis_dot_tile.h"
#include "trellis_search_tile.h"

namespace {

struct ScalarTrellis {
  static constexpr int kFloats = 8;  // so that slices begin with whole bytes
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
  template <int Bits>
  struct Decoder {
    Floats operator()(const unsigned char* from) const {
      uint64_t bits = 0;
      std::memcpy(&bits, from, sizeof bits);
      Floats floats;
      for (int i = 0; i < kFloats; ++i) {
        floats.value[i] = static_cast<float>(trellis_number(bits >> i * Bits & (kTrellisWindows - 1)));
      }
      return floats;
    }
  };
};

}  // namespace

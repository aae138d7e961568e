// Plain C++'s way with weights on a trellis; included by scalar.cpp.
#pragma once

#include "trellis_search_tile.h"

namespace {

struct ScalarTrellis {
  static constexpr int kFloats = 4;
  struct Floats {
    float value[kFloats];
  };
  static Floats load(const float* from) { return {from[0], from[1], from[2], from[3]}; }
  static void store(float* to, const Floats& floats) {
    for (int i = 0; i < kFloats; ++i) to[i] = floats.value[i];
  }
  static Floats broadcast(float f) { return {f, f, f, f}; }
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
    static_assert(Each >= kFloats);
    return broadcast(*from);
  }
};

}  // namespace

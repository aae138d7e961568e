// Rows of weights of 4 and 8 bits as floats. Part of quantized_tile.h: plain loops, which the compiler makes vectors of
// for each instruction set.
#pragma once

#include <cstdint>

namespace {

// to[i] = number of element i times `scale`, for numbers that begin with a byte.
template <int Bits>
void scaled_numbers(const unsigned char* bytes, int64_t count, float scale, float* to) {
  if constexpr (Bits == 8) {
    for (int64_t i = 0; i < count; ++i) to[i] = static_cast<float>(bytes[i] - 128) * scale;
  } else {
    for (int64_t i = 0; i < count / 2; ++i) {
      to[2 * i] = static_cast<float>((bytes[i] & 15) - 8) * scale;
      to[2 * i + 1] = static_cast<float>((bytes[i] >> 4) - 8) * scale;
    }
    if (count % 2) to[count - 1] = static_cast<float>((bytes[count / 2] & 15) - 8) * scale;
  }
}

// A row of `cols` numbers, each times the scale of its group.
template <int Bits>
void quantized_row(const uint32_t* words, int64_t cols, int64_t group, const float* scales, float* to) {
  const auto* bytes = reinterpret_cast<const unsigned char*>(words);
  for (int64_t first = 0; first < cols; first += group, ++scales) {
    const int64_t count = cols - first < group ? cols - first : group;
    scaled_numbers<Bits>(bytes + first * Bits / 8, count, *scales, to + first);
  }
}

}  // namespace

// Activations as whole numbers, in the order in which weights of 4 and 8 bits are unpacked. Part of quantized_tile.h,
// which says what a Lane is.
#pragma once

#include <cstring>

#include "quantized.h"

namespace {

// Weights of a row whose scales are multiplied at a time.
constexpr int64_t kSegment = 2048;

// Numbers that share a scale, at least. A vector of activations of 8 bits may hold several such blocks.
constexpr int64_t kSmallestBlock = 32;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a packed token lies in memory. A block is what shares a scale; a unit, what the loop takes at a time: one block
// of several vectors, or one vector of several blocks.
template <class Lane, int BitsOfNumber, int BlockSize>
struct Layout {
  using Activation = typename Lane::Activation;
  static constexpr int kBits = BitsOfNumber;
  static constexpr int kActivationBits = 8 * sizeof(Activation) * Lane::kPlanes;
  static constexpr int64_t kBlockSize = BlockSize;
  static constexpr int kParts = 8 * sizeof(Activation) / kBits;        // numbers in the bits of an activation
  static constexpr int64_t kPart = Lane::kBytes / sizeof(Activation);  // numbers in a Part
  static constexpr int64_t kStep = kParts * kPart;                     // numbers in a vector
  static constexpr int64_t kUnit = kStep > BlockSize ? kStep : BlockSize;
  static constexpr int64_t kSteps = kUnit / kStep;
  static constexpr int kScales = kUnit / BlockSize;    // blocks in a unit
  static constexpr int64_t kWords = Lane::kBytes / 4;  // elements of a Whole
  static_assert(kSegment % kUnit == 0);

  static constexpr int64_t unit_bytes = kUnit * kBits / 8;  // of weights
  static int64_t units(int64_t k) { return divide_up(k, kUnit); }
  static int64_t scales(int64_t k) { return units(k) * kScales; }

  // Of all units the activations in the order of the parts, each followed by what centers its sums; then all scales.
  // Of two planes, that of the low bytes comes first.
  static constexpr int64_t kActivations = kUnit * Lane::kPlanes;
  static constexpr int64_t token_unit_bytes = kActivations * sizeof(Activation) + Lane::kBytes;
  static Activation* activations(void* token, int64_t unit) {
    return reinterpret_cast<Activation*>(static_cast<char*>(token) + unit * token_unit_bytes);
  }
  static int32_t* offsets(void* token, int64_t unit) {
    return reinterpret_cast<int32_t*>(activations(token, unit) + kActivations);
  }
  static float* scales_of(void* token, int64_t k) { return reinterpret_cast<float*>(activations(token, units(k))); }
  static int64_t token_bytes(int64_t k) {
    constexpr int64_t kLine = 64;
    return divide_up(units(k) * token_unit_bytes + scales(k) * sizeof(float), kLine) * kLine;
  }
};

// What a block of numbers is divided by; NaN where one is not finite. For 16 bits a power of two, so that the largest
// becomes 2^14 to 2^15 and quotients are exact; for 8 bits, which have none to spare, the largest becomes 127.
template <int Bits, int Planes = 1>
float block_scale(const float* x, int64_t count) {
  uint32_t most = 0;
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, sizeof bits);
    bits &= 0x7fffffffu;
    most = most > bits ? most : bits;
  }
  constexpr uint32_t kMantissa = 23, kLargest = 255, kDigits = 14;
  uint32_t exponent = most >> kMantissa;
  if constexpr (Planes == 2) {
    // Two bytes reach to 127 * 256 + 127, which takes one digit from the 2^-8 of all numbers that would be above.
    constexpr uint32_t kAbove = (1u << 16) + (1u << 8);
    if (exponent < kLargest) exponent = (most + kAbove) >> kMantissa;
  }
  if constexpr (Bits == 8) {
    if (exponent < kLargest) {
      constexpr float kSmallest = 1.17549435e-38f;  // its inverse is a float too
      float largest;
      std::memcpy(&largest, &most, sizeof largest);
      return largest / 127 > kSmallest ? largest / 127 : kSmallest;
    }
  }
  // From the smallest normal scale on; its inverse is a float too.
  const uint32_t bits =
      most >> kMantissa == kLargest ? 0x7fc00000u : (exponent > kDigits ? exponent - kDigits : 1u) << kMantissa;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return scale;
}

// x * inverse in whole numbers, as they are; then in the order of the parts, from `activations` on.
template <class Lane, class Shape>
void pack_unit(const float* x, const float* inverse, typename Lane::Rounded* rounded,
               typename Shape::Activation* activations, int32_t* offsets) {
  constexpr int64_t kPart = Shape::kPart;
  for (int64_t i = 0; i < Shape::kUnit; i += kSmallestBlock) {
    Lane::round(x + i, inverse[i / Shape::kBlockSize], rounded + i);
  }
  for (int64_t step = 0; step < Shape::kUnit; step += Shape::kStep) {
    for (int part = 0; part < Shape::kParts; ++part) {
      for (int64_t j = 0; j < kPart; ++j) {
        const auto number = rounded[step + j * Shape::kParts + part];
        const auto low = static_cast<typename Shape::Activation>(number);
        auto* to = activations + step + part * kPart + j;
        *to = low;
        if constexpr (Lane::kPlanes == 2) to[Shape::kUnit] = static_cast<int8_t>((number - low) >> 8);
      }
    }
  }
  // Weights are stored as q + 2^(bits-1).
  const auto center = Lane::constant(1 << (Shape::kBits - 1));
  typename Lane::Whole sums = Lane::zero_whole();
  for (int64_t i = 0; i < Shape::kUnit; i += kPart) sums = Lane::multiply_add(sums, center, activations + i);
  if constexpr (Lane::kPlanes == 2) {
    typename Lane::Whole high = Lane::zero_whole();
    for (int64_t i = Shape::kUnit; i < 2 * Shape::kUnit; i += kPart) {
      high = Lane::multiply_add(high, center, activations + i);
    }
    sums = Lane::join(sums, high);
  }
  Lane::store_whole(offsets, sums);
  for (int64_t i = 0; i < Shape::kWords; ++i) offsets[i] = -offsets[i];
}

template <class Lane, class Shape>
void pack_token(const float* x, int64_t k, int digits, char* token, int64_t stride) {
  constexpr float kDigit = 32768.0f;
  for (int64_t unit = 0; unit < Shape::units(k); ++unit) {
    float values[Shape::kUnit] = {}, inverse[Shape::kScales];
    const int64_t first = unit * Shape::kUnit, count = k - first < Shape::kUnit ? k - first : Shape::kUnit;
    std::memcpy(values, x + first, count * sizeof(float));
    for (int64_t block = 0; block < Shape::kScales; ++block) {
      float scale =
          block_scale<Shape::kActivationBits, Lane::kPlanes>(values + block * Shape::kBlockSize, Shape::kBlockSize);
      inverse[block] = 1.0f / scale;
      const bool finite = scale == scale;
      for (int64_t i = 0; i < Shape::kBlockSize && !finite; ++i) values[block * Shape::kBlockSize + i] = 0;
      if (!finite) inverse[block] = 0;
      for (int digit = 0; digit < digits; ++digit, scale /= kDigit) {
        Shape::scales_of(token + digit * stride, k)[unit * Shape::kScales + block] = scale;
      }
    }
    for (int digit = 0; digit < digits; ++digit) {
      char* to = token + digit * stride;
      typename Lane::Rounded rounded[Shape::kUnit];
      pack_unit<Lane, Shape>(values, inverse, rounded, Shape::activations(to, unit), Shape::offsets(to, unit));
      if (digit + 1 == digits) break;
      // What is left, times 2^15: products with powers of two and their differences are exact.
      for (int64_t i = 0; i < Shape::kUnit; ++i) {
        values[i] = (values[i] * inverse[i / Shape::kBlockSize] - rounded[i]) * kDigit;
      }
      for (int64_t block = 0; block < Shape::kScales; ++block) inverse[block] = 1.0f;
    }
  }
}

}  // namespace

// The loop of quantized weights, shared by all instruction sets. Each .cpp of an instruction set includes this file and
// supplies a `Lane` type:
//
//   Lane::Activation              int16_t, or int8_t for weights of 4 bits
//   Lane::kBytes                  of a vector
//   Lane::kTileTokens             tokens that share the unpacked weights in registers: 1 or 4
//   Lane::Words, load(bytes)      a vector of packed weights
//   Lane::Part, part<Bits>(words, i)   the i-th number of each 16 bits, or 8 where activations are; not yet centered
//   Lane::Whole                   vector of int32 sums; load_whole(from), store_whole(to, sums)
//   Lane::multiply_add(sums, part, x)  adds part[2 j] * x[2 j] + part[2 j + 1] * x[2 j + 1] to sums[j], or with
//                                 activations of 8 bits four such products
//   Lane::multiply_add_two(sums, low, high, x, y)  the same of low and x, and of high and y; for 8 bits only
//   Lane::constant(number)        a Part of equal numbers
//   Lane::Sums                    vector of float sums; zero(), sum(sums) adds its elements
//   Lane::Scale, spread<Count>(scales)   Count scales, each for as many neighbours of a vector
//   Lane::scale_add(whole, scale, sums)  sums + whole * scale
//   Lane::round(x, factor, to)    products for kSmallestBlock activations, to nearest even, the largest where too large
//
// Everything sits in an anonymous namespace, see dot_tile.h.
#pragma once

#include <cstring>

#include "quantized.h"

namespace {

using lorap::cpu::QuantizedKernel;
using lorap::cpu::QuantizedMatrix;

// Weights of a row whose activations, four tokens of them, stay in the fastest cache while several rows pass by.
constexpr int64_t kSegment = 2048;

// The same distance as in dot_tile.h.
constexpr int64_t kAheadBytes = 4096;

// Numbers that share a scale, at least. A vector of activations of 8 bits may hold several such blocks.
constexpr int64_t kSmallestBlock = 32;

constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How a packed token lies in memory. A block is what shares a scale; a unit, what the loop takes at a time: one block
// of several vectors, or one vector of several blocks.
template <class Lane, int BitsOfNumber, int BlockSize>
struct Layout {
  using Activation = typename Lane::Activation;
  static constexpr int kBits = BitsOfNumber;
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
  static constexpr int64_t token_unit_bytes = kUnit * sizeof(Activation) + Lane::kBytes;
  static Activation* activations(void* token, int64_t unit) {
    return reinterpret_cast<Activation*>(static_cast<char*>(token) + unit * token_unit_bytes);
  }
  static int32_t* offsets(void* token, int64_t unit) {
    return reinterpret_cast<int32_t*>(activations(token, unit) + kUnit);
  }
  static float* scales_of(void* token, int64_t k) { return reinterpret_cast<float*>(activations(token, units(k))); }
  static int64_t token_bytes(int64_t k) {
    constexpr int64_t kLine = 64;
    return divide_up(units(k) * token_unit_bytes + scales(k) * sizeof(float), kLine) * kLine;
  }
};

// What a block of numbers is divided by; NaN where one is not finite. For 16 bits a power of two, so that the largest
// becomes 2^14 to 2^15 and quotients are exact; for 8 bits, which have none to spare, the largest becomes 127.
template <class Activation>
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
  if constexpr (sizeof(Activation) == 1) {
    if (exponent < kLargest) {
      constexpr float kSmallest = 1.17549435e-38f;  // its inverse is a float too
      float largest;
      std::memcpy(&largest, &most, sizeof largest);
      return largest / 127 > kSmallest ? largest / 127 : kSmallest;
    }
  }
  // From the smallest normal scale on; its inverse is a float too.
  const uint32_t bits =
      exponent == kLargest ? 0x7fc00000u : (exponent > kDigits ? exponent - kDigits : 1u) << kMantissa;
  float scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return scale;
}

template <class Lane, class Shape>
void pack_unit(const float* x, const float* inverse, typename Shape::Activation* activations, int32_t* offsets) {
  typename Shape::Activation rounded[Shape::kUnit];
  constexpr int64_t kPart = Shape::kPart;
  for (int64_t i = 0; i < Shape::kUnit; i += kSmallestBlock) {
    Lane::round(x + i, inverse[i / Shape::kBlockSize], rounded + i);
  }
  for (int64_t step = 0; step < Shape::kUnit; step += Shape::kStep) {
    for (int part = 0; part < Shape::kParts; ++part) {
      for (int64_t j = 0; j < kPart; ++j) {
        activations[step + part * kPart + j] = rounded[step + j * Shape::kParts + part];
      }
    }
  }
  // Weights are stored as q + 2^(bits-1).
  const auto center = Lane::constant(1 << (Shape::kBits - 1));
  typename Lane::Whole sums = Lane::zero_whole();
  for (int64_t i = 0; i < Shape::kUnit; i += kPart) sums = Lane::multiply_add(sums, center, activations + i);
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
      float scale = block_scale<typename Shape::Activation>(values + block * Shape::kBlockSize, Shape::kBlockSize);
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
      auto* activations = Shape::activations(to, unit);
      pack_unit<Lane, Shape>(values, inverse, activations, Shape::offsets(to, unit));
      if (digit + 1 == digits) break;
      // What is left, times 2^15: products with powers of two and their differences are exact.
      for (int64_t i = 0; i < Shape::kUnit; ++i) {
        const int64_t at = i / Shape::kStep * Shape::kStep, in = i % Shape::kStep;
        const int64_t place = at + in % Shape::kParts * Shape::kPart + in / Shape::kParts;
        values[i] = (values[i] * inverse[i / Shape::kBlockSize] - activations[place]) * kDigit;
      }
      for (int64_t block = 0; block < Shape::kScales; ++block) inverse[block] = 1.0f;
    }
  }
}

// Rows of a weight from `first` to `last` column, beside the packed tokens.
template <class Lane, class Shape, int Tokens>
struct Tile {
  const QuantizedMatrix& weight;
  const char* packed;
  int64_t packed_stride;
  int64_t first, last;
  typename Lane::Sums sums[Tokens];

  // scales[token][block]: of the weights times those of the activations.
  using Scales = float[Tokens][kSegment / Shape::kBlockSize];

  void multiply_scales(int64_t row, Scales& scales) const {
    const int64_t group = weight.group, first_group = first / group, groups = divide_up(last, group) - first_group;
    float of_groups[kSegment / 32 + 1];
    const auto& from = *weight.scale_kernel;
    const int64_t at = row * weight.scale_stride + first_group;
    from.load(static_cast<const char*>(weight.scales) + at * from.element_bytes, groups, of_groups);
    const int64_t blocks = divide_up(last - first, Shape::kUnit) * Shape::kScales;
    for (int m = 0; m < Tokens; ++m) {
      const float* own = Shape::scales_of(token(m), weight.cols) + first / Shape::kBlockSize;
      if (group == Shape::kBlockSize) {
        for (int64_t i = 0; i < groups; ++i) scales[m][i] = of_groups[i] * own[i];
        for (int64_t i = groups; i < blocks; ++i) scales[m][i] = 0;
      } else {
        for (int64_t i = 0, g = 0, end = (first_group + 1) * group - first; i < blocks; ++i) {
          if (i * Shape::kBlockSize >= end && g + 1 < groups) ++g, end += group;
          scales[m][i] = of_groups[g] * own[i];
        }
      }
    }
  }

  void* token(int m) const { return const_cast<char*>(packed + m * packed_stride); }

  void unit(const char* weights, int64_t index, const Scales& scales) {
    typename Lane::Whole whole[Tokens];
    for (int m = 0; m < Tokens; ++m)
      whole[m] = Lane::load_whole(Shape::offsets(token(m), first / Shape::kUnit + index));
    for (int64_t step = 0; step < Shape::kSteps; ++step) {
      const auto address = reinterpret_cast<uintptr_t>(weights + step * Lane::kBytes);
      __builtin_prefetch(reinterpret_cast<const char*>(address + kAheadBytes), 0, 2);
      const typename Lane::Words words = Lane::load(weights + step * Lane::kBytes);
      if constexpr (sizeof(typename Shape::Activation) == 1) {
        const auto low = Lane::template part<Shape::kBits>(words, 0);
        const auto high = Lane::template part<Shape::kBits>(words, 1);
        for (int m = 0; m < Tokens; ++m) {
          const auto* x = Shape::activations(token(m), first / Shape::kUnit + index) + step * Shape::kStep;
          whole[m] = Lane::multiply_add_two(whole[m], low, high, x, x + Shape::kPart);
        }
      } else {
#pragma GCC unroll 4
        for (int part = 0; part < Shape::kParts; ++part) {
          const typename Lane::Part numbers = Lane::template part<Shape::kBits>(words, part);
          for (int m = 0; m < Tokens; ++m) {
            const auto* x = Shape::activations(token(m), first / Shape::kUnit + index);
            whole[m] = Lane::multiply_add(whole[m], numbers, x + step * Shape::kStep + part * Shape::kPart);
          }
        }
      }
    }
    for (int m = 0; m < Tokens; ++m) {
      const auto scale = Lane::template spread<Shape::kScales>(scales[m] + index * Shape::kScales);
      sums[m] = Lane::scale_add(whole[m], scale, sums[m]);
    }
  }

  void row(int64_t row) {
    Scales scales;
    multiply_scales(row, scales);
    const char* weights =
        reinterpret_cast<const char*>(weight.words + row * weight.word_stride) + first * Shape::kBits / 8;
    const int64_t whole_units = (last - first) / Shape::kUnit, rest = last - first - whole_units * Shape::kUnit;
    char buffer[Shape::unit_bytes] = {};  // where the row ends within a unit
    if (rest) std::memcpy(buffer, weights + whole_units * Shape::unit_bytes, divide_up(rest * Shape::kBits, 8));
    for (int64_t index = 0; index < whole_units + (rest != 0); ++index) {
      unit(index < whole_units ? weights + index * Shape::unit_bytes : buffer, index, scales);
    }
  }
};

// One token: rows from one end to the other, the pattern that the processor fetches ahead best.
template <class Lane, class Shape>
void dot_stream(const QuantizedMatrix& weight, int64_t row, int64_t rows, const char* packed, float* dots) {
  for (int64_t n = 0; n < rows; ++n) {
    Tile<Lane, Shape, 1> tile{weight, packed, 0, 0, 0, {Lane::zero()}};
    for (; tile.first < weight.cols; tile.first += kSegment) {
      tile.last = weight.cols - tile.first < kSegment ? weight.cols : tile.first + kSegment;
      tile.row(row + n);
    }
    dots[n] = Lane::sum(tile.sums[0]);
  }
}

template <class Lane, class Shape, int Tokens>
void add_tile(const QuantizedMatrix& weight, int64_t row, int64_t rows, int64_t first, int64_t last, const char* packed,
              int64_t packed_stride, float* dots, int64_t dots_stride) {
  for (int64_t n = 0; n < rows; ++n) {
    Tile<Lane, Shape, Tokens> tile{weight, packed, packed_stride, first, last, {}};
    for (int m = 0; m < Tokens; ++m) tile.sums[m] = Lane::zero();
    tile.row(row + n);
    for (int m = 0; m < Tokens; ++m) dots[m * dots_stride + n] += Lane::sum(tile.sums[m]);
  }
}

template <class Lane, class Shape>
void dot_shape(const QuantizedMatrix& weight, int64_t row, int64_t rows, const char* packed, int64_t packed_stride,
               int64_t tokens, float* dots, int64_t dots_stride) {
  if (tokens == 1) return dot_stream<Lane, Shape>(weight, row, rows, packed, dots);
  for (int64_t m = 0; m < tokens; ++m)
    for (int64_t n = 0; n < rows; ++n) dots[m * dots_stride + n] = 0;
  for (int64_t first = 0; first < weight.cols; first += kSegment) {
    const int64_t last = weight.cols - first < kSegment ? weight.cols : first + kSegment;
    int64_t m = 0;
    const auto add = [&](auto tile, int64_t some) {
      for (; m + some <= tokens; m += some) {
        tile(weight, row, rows, first, last, packed + m * packed_stride, packed_stride, dots + m * dots_stride,
             dots_stride);
      }
    };
    if constexpr (Lane::kTileTokens == 4) {
      add(add_tile<Lane, Shape, 4>, 4);
      add(add_tile<Lane, Shape, 2>, 2);
    }
    add(add_tile<Lane, Shape, 1>, 1);
  }
}

// Calls body with the Layout for weights whose groups have so many numbers.
template <class Lane, int Bits, class Body>
auto with_shape(int64_t group, const Body& body) {
  if (group % 128 == 0) return body(Layout<Lane, Bits, 128>());
  if (group % 64 == 0) return body(Layout<Lane, Bits, 64>());
  return body(Layout<Lane, Bits, kSmallestBlock>());
}

template <class Lane, int Bits>
int64_t quantized_packed_bytes(int64_t k, int64_t group) {
  return with_shape<Lane, Bits>(group, [=](auto shape) { return decltype(shape)::token_bytes(k); });
}

template <class Lane, int Bits>
void quantized_pack(const float* x, int64_t k, int64_t group, int digits, void* packed, int64_t stride) {
  with_shape<Lane, Bits>(
      group, [=](auto shape) { pack_token<Lane, decltype(shape)>(x, k, digits, static_cast<char*>(packed), stride); });
}

template <class Lane, int Bits>
void quantized_dot(const QuantizedMatrix& weight, int64_t row, int64_t rows, const void* packed, int64_t packed_stride,
                   int64_t tokens, float* dots, int64_t dots_stride) {
  with_shape<Lane, Bits>(weight.group, [&](auto shape) {
    dot_shape<Lane, decltype(shape)>(weight, row, rows, static_cast<const char*>(packed), packed_stride, tokens, dots,
                                     dots_stride);
  });
}

template <class Lane, int Bits>
constexpr QuantizedKernel make_quantized_kernel(const char* isa) {
  return {isa,
          Bits,
          8 * sizeof(typename Lane::Activation),
          quantized_packed_bytes<Lane, Bits>,
          quantized_pack<Lane, Bits>,
          quantized_dot<Lane, Bits>};
}

}  // namespace

// The loop of quantized weights, shared by all instruction sets. Each .cpp of an instruction set includes this file and
// supplies a `Lane` type:
//
//   Lane::Activation              int16_t, or int8_t for weights of 4 bits
//   Lane::kBytes                  of a vector
//   Lane::kTileTokens             tokens that share the unpacked weights in registers: 1 or 4
//   Lane::kRows<Bits, Tokens>     rows to read side by side, each a stream that the processor fetches ahead by itself
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

#include "quantized_packing.h"

namespace {

using lorap::cpu::QuantizedKernel;
using lorap::cpu::QuantizedMatrix;

// Bytes to fetch ahead in each stream, as far as in dot_tile.h; here that pays beside other streams too.
constexpr int64_t kAheadBytes = 4096;

// Rows of a weight, `apart` rows from each other, from `first` to `last` column, beside the packed tokens.
template <class Lane, class Shape, int Rows, int Tokens>
struct Tile {
  const QuantizedMatrix& weight;
  int64_t row, apart;
  const char* packed;
  int64_t packed_stride;
  int64_t first, last;
  typename Lane::Sums sums[Rows][Tokens];

  // scales[row][token][block]: of the weights times those of the activations.
  using Scales = float[Rows][Tokens][kSegment / Shape::kBlockSize];

  void multiply_scales(int r, Scales& scales) const {
    const int64_t group = weight.group, first_group = first / group, groups = divide_up(last, group) - first_group;
    float of_groups[kSegment / 32 + 1];
    const auto& from = *weight.scale_kernel;
    const int64_t at = (row + r * apart) * weight.scale_stride + first_group;
    from.load(static_cast<const char*>(weight.scales) + at * from.element_bytes, groups, of_groups);
    const int64_t blocks = divide_up(last - first, Shape::kUnit) * Shape::kScales;
    for (int m = 0; m < Tokens; ++m) {
      const float* own = Shape::scales_of(token(m), weight.cols) + first / Shape::kBlockSize;
      float* to = scales[r][m];
      if (group == Shape::kBlockSize) {
        for (int64_t i = 0; i < groups; ++i) to[i] = of_groups[i] * own[i];
        for (int64_t i = groups; i < blocks; ++i) to[i] = 0;
      } else {
        for (int64_t i = 0, g = 0, end = (first_group + 1) * group - first; i < blocks; ++i) {
          if (i * Shape::kBlockSize >= end && g + 1 < groups) ++g, end += group;
          to[i] = of_groups[g] * own[i];
        }
      }
    }
  }

  void* token(int m) const { return const_cast<char*>(packed + m * packed_stride); }

  // A unit of each row, so many bytes apart.
  void unit(const char* weights, int64_t bytes_apart, int64_t index, const Scales& scales) {
    typename Lane::Whole whole[Rows][Tokens];
    for (int m = 0; m < Tokens; ++m) {
      const auto start = Lane::load_whole(Shape::offsets(token(m), first / Shape::kUnit + index));
      for (int r = 0; r < Rows; ++r) whole[r][m] = start;
    }
    for (int64_t step = 0; step < Shape::kSteps; ++step) {
      typename Lane::Words words[Rows];
      for (int r = 0; r < Rows; ++r) {
        const char* from = weights + r * bytes_apart + step * Lane::kBytes;
        const auto address = reinterpret_cast<uintptr_t>(from);
        __builtin_prefetch(reinterpret_cast<const char*>(address + kAheadBytes), 0, 3);
        words[r] = Lane::load(from);
      }
      const auto x = [&](int m, int part) {
        return Shape::activations(token(m), first / Shape::kUnit + index) + step * Shape::kStep + part * Shape::kPart;
      };
      if constexpr (sizeof(typename Shape::Activation) == 1) {
        for (int r = 0; r < Rows; ++r) {
          const auto low = Lane::template part<Shape::kBits>(words[r], 0);
          const auto high = Lane::template part<Shape::kBits>(words[r], 1);
          for (int m = 0; m < Tokens; ++m) {
            whole[r][m] = Lane::multiply_add_two(whole[r][m], low, high, x(m, 0), x(m, 1));
          }
        }
      } else {
#pragma GCC unroll 4
        for (int part = 0; part < Shape::kParts; ++part) {
          for (int r = 0; r < Rows; ++r) {
            const typename Lane::Part numbers = Lane::template part<Shape::kBits>(words[r], part);
            for (int m = 0; m < Tokens; ++m) whole[r][m] = Lane::multiply_add(whole[r][m], numbers, x(m, part));
          }
        }
      }
    }
    for (int r = 0; r < Rows; ++r) {
      for (int m = 0; m < Tokens; ++m) {
        const auto scale = Lane::template spread<Shape::kScales>(scales[r][m] + index * Shape::kScales);
        sums[r][m] = Lane::scale_add(whole[r][m], scale, sums[r][m]);
      }
    }
  }

  void add() {
    Scales scales;
    for (int r = 0; r < Rows; ++r) multiply_scales(r, scales);
    const int64_t bytes_apart = 4 * apart * weight.word_stride;
    const char* weights =
        reinterpret_cast<const char*>(weight.words + row * weight.word_stride) + first * Shape::kBits / 8;
    const int64_t whole_units = (last - first) / Shape::kUnit, rest = last - first - whole_units * Shape::kUnit;
    for (int64_t index = 0; index < whole_units; ++index) {
      unit(weights + index * Shape::unit_bytes, bytes_apart, index, scales);
    }
    if (!rest) return;
    char buffer[Rows][Shape::unit_bytes] = {};  // where rows end within a unit
    for (int r = 0; r < Rows; ++r) {
      const char* from = weights + r * bytes_apart + whole_units * Shape::unit_bytes;
      std::memcpy(buffer[r], from, divide_up(rest * Shape::kBits, 8));
    }
    unit(buffer[0], Shape::unit_bytes, whole_units, scales);
  }
};

// Adds to the dots what the columns from `first` to `last` make. Rows of a tile are as far apart as the block allows,
// so that each is a stream that goes on in memory with the next tile.
template <class Lane, class Shape, int Tokens, int Rows = Lane::template kRows<Shape::kBits, Tokens>>
void add_rows(const QuantizedMatrix& weight, int64_t row, int64_t rows, int64_t first, int64_t last, const char* packed,
              int64_t packed_stride, float* dots, int64_t dots_stride) {
  const int64_t tiles = rows / Rows, done = tiles * Rows;
  for (int64_t n = 0; n < tiles; ++n) {
    Tile<Lane, Shape, Rows, Tokens> tile{weight, row + n, tiles, packed, packed_stride, first, last, {}};
    for (auto& of_row : tile.sums)
      for (auto& sums : of_row) sums = Lane::zero();
    for (; tile.first < last; tile.first += kSegment) {
      tile.last = last - tile.first < kSegment ? last : tile.first + kSegment;
      tile.add();
    }
    for (int r = 0; r < Rows; ++r)
      for (int m = 0; m < Tokens; ++m) dots[m * dots_stride + n + r * tiles] += Lane::sum(tile.sums[r][m]);
  }
  if constexpr (Rows > 1) {
    add_rows<Lane, Shape, Tokens, 1>(weight, row + done, rows - done, first, last, packed, packed_stride, dots + done,
                                     dots_stride);
  }
}

// One token takes rows from one end to the other, several a segment of all rows at a time.
template <class Lane, class Shape>
void dot_shape(const QuantizedMatrix& weight, int64_t row, int64_t rows, const char* packed, int64_t packed_stride,
               int64_t tokens, float* dots, int64_t dots_stride) {
  for (int64_t m = 0; m < tokens; ++m)
    for (int64_t n = 0; n < rows; ++n) dots[m * dots_stride + n] = 0;
  const int64_t step = tokens == 1 ? weight.cols : kSegment;
  for (int64_t first = 0; first < weight.cols; first += step) {
    const int64_t last = weight.cols - first < step ? weight.cols : first + step;
    int64_t m = 0;
    const auto add = [&](auto some_rows, int64_t some) {
      for (; m + some <= tokens; m += some) {
        some_rows(weight, row, rows, first, last, packed + m * packed_stride, packed_stride, dots + m * dots_stride,
                  dots_stride);
      }
    };
    if constexpr (Lane::kTileTokens == 4) {
      add(add_rows<Lane, Shape, 4>, 4);
      add(add_rows<Lane, Shape, 2>, 2);
    }
    add(add_rows<Lane, Shape, 1>, 1);
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

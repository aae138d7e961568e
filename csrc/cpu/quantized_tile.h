// The loop of quantized weights, shared by all instruction sets. Each .cpp of an instruction set includes this file and
// supplies a `Lane` type:
//
//   Lane::Activation              int16_t, or int8_t
//   Lane::kPlanes                 1; or 2 where an activation of 16 bits is two of 8, the low one and the high one
//   Lane::kBytes                  of a vector
//   Lane::kTileTokens             tokens that share the unpacked weights in registers: 1 or 4
//   Lane::kRows<Bits, Tokens>     rows to read side by side, each a stream that the processor fetches ahead by itself
//   Lane::Words, load(bytes)      a vector of packed weights; load_first(bytes, count), where there is a way that
//                                 reads no byte behind them and copies none, has zeros behind the first ones
//   Lane::Part, part<Bits>(words, i)   the i-th number of each 16 bits, or 8 where activations are; not yet centered
//   Lane::Whole                   vector of int32 sums; load_whole(from), store_whole(to, sums)
//   Lane::multiply_add(sums, part, x)  adds part[2 j] * x[2 j] + part[2 j + 1] * x[2 j + 1] to sums[j], or with
//                                 activations of 8 bits four such products
//   Lane::load_part(x)            a Part of activations; of 8 bits only, as is
//   Lane::multiply_add_all(sums, parts, xs)  multiply_add of each of Shape::kParts, with loaded activations
//   Lane::join(low, high)         low + 256 high, where there are two planes
//   Lane::constant(number)        a Part of equal numbers
//   Lane::Sums                    vector of float sums; zero(); sum(sums) adds its elements, in the order of the sum of
//                                 four, below
//   Lane::Scale, spread<Count>(scales)   Count scales, each for as many neighbours of a vector
//   Lane::scale_add(whole, scale, sums)  sums + whole * scale
//   Lane::load_bfloat16(from, count, to)  of scales, where there is a way without calling a RowKernel
//   Lane::sum(a, b, c, d, out)    adds the elements of each of four Sums
//   Lane::round(x, factor, to)    products for kSmallestBlock activations, to nearest even, the largest where too large
//
// Everything sits in an anonymous namespace, see dot_tile.h.
#pragma once

#include "quantized_packing.h"
#include "quantized_row.h"

namespace {

using lorap::cpu::QuantizedKernel;
using lorap::cpu::QuantizedMatrix;

// Bytes to fetch ahead in each stream, into the second cache: the first has too few places for lines on their way. On
// two Zen 4 cores, 4 bits, M = 1, this reads 1.2 to 1.5 times as fast as 4096 bytes ahead into the first; there 512 to
// 8192 bytes are alike, here 1024 and 3072 are up to a tenth slower than 2048.
constexpr int64_t kAheadBytes = 2048;

// Floats that load_bfloat16 may write behind the last one.
constexpr int64_t kSpareScales = 16;

template <class Lane>
void load_scales(const lorap::cpu::RowKernel& kernel, const void* scales, int64_t at, int64_t count, float* to) {
  const char* from = static_cast<const char*>(scales) + at * kernel.element_bytes;
  if constexpr (requires { Lane::load_bfloat16; }) {
    // A call of another file for every row is a seventh of the time of rows of 576 numbers.
    if (kernel.dtype == lorap::cpu::Dtype::kBFloat16) return Lane::load_bfloat16(from, count, to);
  }
  kernel.load(from, count, to);
}

// A vector of the first `count` bytes, which may be none or more than it holds, and zeros.
template <class Lane>
typename Lane::Words load_first(const char* from, int64_t count) {
  if constexpr (requires { Lane::load_first; }) {
    return Lane::load_first(from, count);
  } else {
    char bytes[Lane::kBytes] = {};
    if (count > 0) std::memcpy(bytes, from, count < Lane::kBytes ? count : Lane::kBytes);
    return Lane::load(bytes);
  }
}

// Rows of a weight, `apart` rows from each other, from `first` to `last` column, beside the packed tokens.
template <class Lane, class Shape, int Rows, int Tokens>
struct Tile {
  const QuantizedMatrix& weight;
  int64_t row, apart;
  const char* packed;
  int64_t packed_stride;
  int64_t first, last, ahead;
  typename Lane::Sums sums[Rows][Tokens];

  // scales[row][token][block]: of the weights times those of the activations.
  using Scales = float[Rows][Tokens][kSegment / Shape::kBlockSize];

  void multiply_scales(Scales& scales) const {
    const int64_t group = weight.group, first_group = first / group, groups = divide_up(last, group) - first_group;
    const int64_t blocks = divide_up(last - first, Shape::kUnit) * Shape::kScales;
    for (int r = 0; r < Rows; ++r) {
      float of_groups[kSegment / 32 + kSpareScales];
      const int64_t at = (row + r * apart) * weight.scale_stride + first_group;
      load_scales<Lane>(*weight.scale_kernel, weight.scales, at, groups, of_groups);
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
  }

  void* token(int m) const { return const_cast<char*>(packed + m * packed_stride); }

  using Wholes = typename Lane::Whole[Rows][Tokens];
  using Words = typename Lane::Words[Rows];

  // What a vector of words of each row makes with activations of bytes, `x` of the first token: every vector of these
  // serves all rows.
  void add_bytes(const Words& words, const typename Shape::Activation* x, Wholes& whole, Wholes& high) const {
    typename Lane::Part parts[Rows][Shape::kParts];
    for (int r = 0; r < Rows; ++r) {
      for (int i = 0; i < Shape::kParts; ++i) parts[r][i] = Lane::template part<Shape::kBits>(words[r], i);
    }
    for (int m = 0; m < Tokens; ++m) {
      for (int plane = 0; plane < Lane::kPlanes; ++plane) {
        const auto* from = x + m * packed_stride + plane * Shape::kUnit;
        typename Lane::Part own[Shape::kParts];
        for (int i = 0; i < Shape::kParts; ++i) own[i] = Lane::load_part(from + i * Shape::kPart);
        for (int r = 0; r < Rows; ++r) {
          auto& sum = plane ? high[r][m] : whole[r][m];
          sum = Lane::template multiply_add_all<Shape>(sum, parts[r], own);
        }
      }
    }
  }

  // The same of activations of 16 bits.
  void add_words(const Words& words, const typename Shape::Activation* x, Wholes& whole) const {
    const int64_t stride = packed_stride / sizeof *x;
#pragma GCC unroll 4
    for (int i = 0; i < Shape::kParts; ++i) {
      for (int r = 0; r < Rows; ++r) {
        const typename Lane::Part numbers = Lane::template part<Shape::kBits>(words[r], i);
        for (int m = 0; m < Tokens; ++m) {
          whole[r][m] = Lane::multiply_add(whole[r][m], numbers, x + m * stride + i * Shape::kPart);
        }
      }
    }
  }

  // A unit of each row, so many bytes apart; of the last one, where rows end within it, the first `bytes`.
  template <bool Full = true>
  void unit(const char* weights, int64_t bytes_apart, int64_t index, const Scales& scales, int64_t bytes = 0) {
    Wholes whole, high;
    for (int m = 0; m < Tokens; ++m) {
      const auto start = Lane::load_whole(Shape::offsets(token(m), first / Shape::kUnit + index));
      for (int r = 0; r < Rows; ++r) whole[r][m] = start, high[r][m] = Lane::zero_whole();
    }
    for (int64_t step = 0; step < Shape::kSteps; ++step) {
      Words words;
      for (int r = 0; r < Rows; ++r) {
        const char* from = weights + r * bytes_apart + step * Lane::kBytes;
        const auto address = reinterpret_cast<uintptr_t>(from);
        __builtin_prefetch(reinterpret_cast<const char*>(address + ahead), 0, 2);
        words[r] = Full ? Lane::load(from) : load_first<Lane>(from, bytes - step * Lane::kBytes);
      }
      const auto* x = Shape::activations(token(0), first / Shape::kUnit + index) + step * Shape::kStep;
      if constexpr (sizeof *x == 1) add_bytes(words, x, whole, high);
      if constexpr (sizeof *x != 1) add_words(words, x, whole);
    }
    for (int r = 0; r < Rows; ++r) {
      for (int m = 0; m < Tokens; ++m) {
        const auto scale = Lane::template spread<Shape::kScales>(scales[r][m] + index * Shape::kScales);
        if constexpr (Lane::kPlanes == 2) whole[r][m] = Lane::join(whole[r][m], high[r][m]);
        sums[r][m] = Lane::scale_add(whole[r][m], scale, sums[r][m]);
      }
    }
  }

  void add() {
    Scales scales;
    multiply_scales(scales);
    const int64_t bytes_apart = 4 * apart * weight.word_stride;
    const char* weights =
        reinterpret_cast<const char*>(weight.words + row * weight.word_stride) + first * Shape::kBits / 8;
    const int64_t whole_units = (last - first) / Shape::kUnit, rest = last - first - whole_units * Shape::kUnit;
    for (int64_t index = 0; index < whole_units; ++index) {
      unit(weights + index * Shape::unit_bytes, bytes_apart, index, scales);
    }
    if (!rest) return;
    unit<false>(weights + whole_units * Shape::unit_bytes, bytes_apart, whole_units, scales,
                divide_up(rest * Shape::kBits, 8));
  }
};

// Rows of a tile are as far apart as the block allows, so that each is a stream that goes on in memory with the next
// tile.
template <class Lane, class Shape, int Tokens, int Rows = Lane::template kRows<Shape::kBits, Tokens>>
void dot_rows(const QuantizedMatrix& weight, int64_t row, int64_t rows, const char* packed, int64_t packed_stride,
              float* dots, int64_t dots_stride) {
  const int64_t tiles = rows / Rows, done = tiles * Rows;
  const int64_t row_bytes = 4 * weight.word_stride, stream = tiles * row_bytes;
  for (int64_t n = 0; n < tiles; ++n) {
    // Where a stream ends, its part of the next block of rows goes on.
    const int64_t ahead = n * row_bytes + kAheadBytes < stream ? kAheadBytes : kAheadBytes + (Rows - 1) * stream;
    Tile<Lane, Shape, Rows, Tokens> tile{weight, row + n, tiles, packed, packed_stride, 0, 0, ahead, {}};
    for (auto& of_row : tile.sums)
      for (auto& sums : of_row) sums = Lane::zero();
    for (; tile.first < weight.cols; tile.first += kSegment) {
      tile.last = weight.cols - tile.first < kSegment ? weight.cols : tile.first + kSegment;
      tile.add();
    }
    const auto at = [&](int i) -> float& { return dots[i / Rows * dots_stride + n + i % Rows * tiles]; };
    const auto sums = [&](int i) { return tile.sums[i % Rows][i / Rows]; };
    if constexpr (Rows * Tokens % 4 == 0) {
#pragma GCC unroll 4
      for (int i = 0; i < Rows * Tokens; i += 4) {
        float four[4];
        Lane::sum(sums(i), sums(i + 1), sums(i + 2), sums(i + 3), four);
        for (int j = 0; j < 4; ++j) at(i + j) = four[j];
      }
    } else {
      for (int i = 0; i < Rows * Tokens; ++i) at(i) = Lane::sum(sums(i));
    }
  }
  if constexpr (Rows > 1) {
    dot_rows<Lane, Shape, Tokens, 1>(weight, row + done, rows - done, packed, packed_stride, dots + done, dots_stride);
  }
}

// Tokens that do not fit into registers together read the rows from the caches again.
template <class Lane, class Shape>
void dot_shape(const QuantizedMatrix& weight, int64_t row, int64_t rows, const char* packed, int64_t packed_stride,
               int64_t tokens, float* dots, int64_t dots_stride) {
  int64_t m = 0;
  const auto some = [&](auto dot, int64_t count) {
    for (; m + count <= tokens; m += count) {
      dot(weight, row, rows, packed + m * packed_stride, packed_stride, dots + m * dots_stride, dots_stride);
    }
  };
  if constexpr (Lane::kTileTokens == 4) {
    some(dot_rows<Lane, Shape, 4>, 4);
    some(dot_rows<Lane, Shape, 2>, 2);
  }
  some(dot_rows<Lane, Shape, 1>, 1);
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
          8 * sizeof(typename Lane::Activation) * Lane::kPlanes,
          quantized_packed_bytes<Lane, Bits>,
          quantized_pack<Lane, Bits>,
          quantized_dot<Lane, Bits>,
          quantized_row<Bits>,
          nullptr,
          0};
}

}  // namespace

// Products of whole numbers of 16 bits with a few tokens, 64 rows and two columns at a time, shared by weights on a
// trellis and those of 4 and 8 bits. A `Lane` has
//
//   Lane::Floats                  vector of kFloats floats: zero(), broadcast(float), multiply_add(a, b, c),
//                                 load_unaligned(from), store_unaligned(to, floats)
//   Lane::Numbers                 of a slice, which is kFloats rows, and two columns: 16 bits each, those of a row side
//                                 by side; load_numbers(from), store_numbers(to, numbers)
//   Lane::Whole                   vector of int32 sums: zero_whole(), to_floats(sums)
//   Lane::multiply_add(sums, numbers, x)  adds the two numbers of each row, times the two of x, to its sum
//   Lane::kSlices                 that share what is loaded of x, where numbers come from memory
//
// Everything sits in an anonymous namespace, see dot_tile.h.
#pragma once

#include "quantized.h"

namespace {

using lorap::cpu::kTileColumns;
using lorap::cpu::kTileRows;

template <class Lane>
struct FromMemory {
  const int32_t* numbers;  // (pairs of columns, rows of a tile)
  const int32_t* load(int64_t pair) const { return numbers + pair * kTileRows; }
  typename Lane::Numbers decode(const int32_t* from, int slice) const {
    return Lane::load_numbers(from + slice * Lane::kFloats);
  }
};

// dots[token][row] += scales[row] * x_scales[token] * sum over columns of number[row, column] * x[column][token].
template <class Lane, int Tokens, int kTogether = Tokens == 1 ? 4 : 2, class Source>
void multiply(const Source& source, int64_t rows, int64_t pairs, const int16_t* x, const float* x_scales,
              const float* scales, float* dots) {
  static_assert(kTileRows / Lane::kFloats % kTogether == 0);
  for (int first = 0; first * Lane::kFloats < rows; first += kTogether) {
    typename Lane::Whole sums[kTogether][Tokens];
    for (auto& of_slice : sums) {
      for (auto& sum : of_slice) sum = Lane::zero_whole();
    }
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const auto loaded = source.load(pair);
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        const typename Lane::Numbers numbers = source.decode(loaded, first + i);
#pragma GCC unroll 4
        for (int m = 0; m < Tokens; ++m) {
          sums[i][m] = Lane::multiply_add(sums[i][m], numbers, x + 2 * (pair * Tokens + m));
        }
      }
    }
    for (int i = 0; i < kTogether; ++i) {
      const int row = (first + i) * Lane::kFloats;
      const auto scale = Lane::load_unaligned(scales + row);
      for (int m = 0; m < Tokens; ++m) {
        float* dot = dots + m * kTileRows + row;
        const auto both = Lane::multiply_add(scale, Lane::broadcast(x_scales[m]), Lane::zero());
        Lane::store_unaligned(dot, Lane::multiply_add(Lane::to_floats(sums[i][m]), both, Lane::load_unaligned(dot)));
      }
    }
  }
}

// The same of any number of tokens, those beyond 4 in steps of 4, with numbers[pair][row].
template <class Lane>
void multiply_from_memory(const int32_t* numbers, int64_t rows, int64_t pairs, const int16_t* x, int64_t tokens,
                          int64_t x_stride, const float* x_scales, const float* scales, float* dots) {
  for (int64_t m = 0; m < tokens; m += 4) {
    multiply<Lane, 4, Lane::kSlices>(FromMemory<Lane>{numbers}, rows, pairs, x + m / 4 * x_stride, x_scales + m, scales,
                                     dots + m * kTileRows);
  }
}

}  // namespace

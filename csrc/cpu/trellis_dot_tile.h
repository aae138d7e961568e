// Products with weights on a trellis, shared by all instruction sets. Each .cpp of an instruction set includes this
// file and supplies a `Lane` type, with what trellis_search_tile.h wants and
//
//   Lane::load_unaligned(from), Lane::store_unaligned(to, floats), Lane::zero()
//   Lane::Decoder<Bits>           of a slice, which is as many rows as a vector has floats: from the bytes that begin
//                                 with the window of the first to the numbers of all; reads 16 bytes
//
// A column of a tile is decoded slice by slice in registers, and multiplied by its activation of up to four tokens.
// More tokens share numbers that are written to memory, for a block of columns that stays in the fastest cache.
//
// Everything sits in an anonymous namespace, see dot_tile.h.
#pragma once

#include <cstring>

#include "trellis_search_tile.h"

namespace {

using namespace lorap::cpu;

// Columns of a tile with the first bytes of each behind its last ones, so that rings need no seam.
template <int Bits>
struct OpenRings {
  static constexpr int kBytes = kTrellisRows * Bits / 8, kMore = 16, kStride = kBytes + kMore;
  alignas(64) unsigned char bytes[kTrellisColumns * kStride];

  OpenRings(const uint32_t* words, int64_t columns) {
    const auto* from = reinterpret_cast<const unsigned char*>(words);
    for (int64_t k = 0; k < columns; ++k) {
      std::memcpy(bytes + k * kStride, from + k * kBytes, kBytes);
      std::memcpy(bytes + k * kStride + kBytes, from + k * kBytes, kMore);
    }
  }
};

template <class Lane, int Bits>
struct FromRings {
  const OpenRings<Bits>& rings;
  typename Lane::template Decoder<Bits> decode;
  typename Lane::Floats operator()(int64_t column, int slice) const {
    return decode(rings.bytes + column * OpenRings<Bits>::kStride + slice * (Lane::kFloats * Bits / 8));
  }
};

template <class Lane>
struct FromNumbers {
  const float* numbers;  // (columns, rows of a tile)
  typename Lane::Floats operator()(int64_t column, int slice) const {
    return Lane::load(numbers + column * kTrellisRows + slice * Lane::kFloats);
  }
};

// dots[token][row] += scales[row] * sum over columns of number[row, column] * x[column][token].
template <class Lane, int Tokens, class Numbers>
void multiply(const Numbers& number, int64_t columns, const float* x, const float* scales, float* dots) {
  using Floats = typename Lane::Floats;
  constexpr int kSlices = kTrellisRows / Lane::kFloats, kTogether = Tokens == 1 ? 4 : 2;
  static_assert(kSlices % kTogether == 0);
  for (int first = 0; first < kSlices; first += kTogether) {
    Floats sums[kTogether][Tokens];
    for (auto& of_slice : sums) {
      for (Floats& sum : of_slice) sum = Lane::zero();
    }
    for (int64_t k = 0; k < columns; ++k) {
#pragma GCC unroll 4
      for (int i = 0; i < kTogether; ++i) {
        const Floats weight = number(k, first + i);
#pragma GCC unroll 4
        for (int m = 0; m < Tokens; ++m) {
          sums[i][m] = Lane::multiply_add(weight, Lane::broadcast(x[k * Tokens + m]), sums[i][m]);
        }
      }
    }
    for (int i = 0; i < kTogether; ++i) {
      const int row = (first + i) * Lane::kFloats;
      const Floats scale = Lane::load_unaligned(scales + row);
      for (int m = 0; m < Tokens; ++m) {
        float* dot = dots + m * kTrellisRows + row;
        Lane::store_unaligned(dot, Lane::multiply_add(sums[i][m], scale, Lane::load_unaligned(dot)));
      }
    }
  }
}

template <class Lane, int Bits>
void trellis_dot(const uint32_t* words, int64_t columns, const float* x, int64_t tokens, int64_t x_stride,
                 const float* scales, float* dots) {
  const OpenRings<Bits> rings(words, columns);
  const FromRings<Lane, Bits> number{rings, {}};
  if (tokens == 1) return multiply<Lane, 1>(number, columns, x, scales, dots);
  if (tokens == 2) return multiply<Lane, 2>(number, columns, x, scales, dots);
  if (tokens <= 4) return multiply<Lane, 4>(number, columns, x, scales, dots);
  alignas(64) float numbers[kTrellisColumns * kTrellisRows];
  for (int64_t k = 0; k < columns; ++k) {
    for (int slice = 0; slice < kTrellisRows / Lane::kFloats; ++slice) {
      Lane::store(numbers + k * kTrellisRows + slice * Lane::kFloats, number(k, slice));
    }
  }
  for (int64_t m = 0; m < tokens; m += 4) {
    multiply<Lane, 4>(FromNumbers<Lane>{numbers}, columns, x + m / 4 * x_stride, scales, dots + m * kTrellisRows);
  }
}

// Of 2, 3 and 4 bits.
template <class Lane>
const TrellisKernel* trellis_kernel(const char* isa, int bits) {
  static const TrellisKernel kernels[] = {{isa, 2, search_ring<Lane, 2>, trellis_dot<Lane, 2>},
                                          {isa, 3, search_ring<Lane, 3>, trellis_dot<Lane, 3>},
                                          {isa, 4, search_ring<Lane, 4>, trellis_dot<Lane, 4>}};
  return &kernels[bits - 2];
}

}  // namespace

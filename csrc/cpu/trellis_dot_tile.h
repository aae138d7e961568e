// Products with weights on a trellis, shared by all instruction sets. Each .cpp of an instruction set includes this
// file and supplies a `Lane` type, with what trellis_search_tile.h wants and
//
//   Lane::load_unaligned(from), Lane::store_unaligned(to, floats), Lane::zero()
//   Lane::Numbers                 of a slice, which is as many rows as a vector has floats, and two columns: 16 bits
//   each,
//                                 those of a row side by side; load_numbers(from), store_numbers(to, numbers)
//   Lane::Decoder<Bits>           of some columns of a tile, from their words; load(pair) brings what decode(loaded,
//                                 slice) wants of two columns
//   Lane::Whole                   vector of int32 sums: zero_whole(), to_floats(sums)
//   Lane::multiply_add(sums, numbers, x)  adds the two numbers of each row, times the two of x, to its sum
//
// Two columns of a tile are decoded slice by slice in registers, and multiplied by the activations of up to four
// tokens. More tokens share numbers that are written to memory, for a block of columns that stays in the fastest cache.
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
    if (columns % 2) std::memset(bytes + columns * kStride, 0, kStride);
  }
  const unsigned char* column(int64_t index) const { return bytes + index * kStride; }
};

template <class Lane>
struct FromMemory {
  const int32_t* numbers;  // (pairs of columns, rows of a tile)
  const int32_t* load(int64_t pair) const { return numbers + pair * kTrellisRows; }
  typename Lane::Numbers decode(const int32_t* from, int slice) const {
    return Lane::load_numbers(from + slice * Lane::kFloats);
  }
};

// dots[token][row] += scales[row] * x_scales[token] * sum over columns of number[row, column] * x[column][token].
template <class Lane, int Tokens, class Source>
void multiply(const Source& source, int64_t pairs, const int16_t* x, const float* x_scales, const float* scales,
              float* dots) {
  constexpr int kSlices = kTrellisRows / Lane::kFloats, kTogether = Tokens == 1 ? 4 : 2;
  static_assert(kSlices % kTogether == 0);
  for (int first = 0; first < kSlices; first += kTogether) {
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
        float* dot = dots + m * kTrellisRows + row;
        const auto both = Lane::multiply_add(scale, Lane::broadcast(x_scales[m]), Lane::zero());
        Lane::store_unaligned(dot, Lane::multiply_add(Lane::to_floats(sums[i][m]), both, Lane::load_unaligned(dot)));
      }
    }
  }
}

template <class Lane, int Bits>
void trellis_dot(const uint32_t* words, int64_t columns, const int16_t* x, int64_t tokens, int64_t x_stride,
                 const float* x_scales, const float* scales, float* dots) {
  const typename Lane::template Decoder<Bits> source(words, columns);
  const int64_t pairs = (columns + 1) / 2;
  if (tokens == 1) return multiply<Lane, 1>(source, pairs, x, x_scales, scales, dots);
  if (tokens == 2) return multiply<Lane, 2>(source, pairs, x, x_scales, scales, dots);
  if (tokens <= 4) return multiply<Lane, 4>(source, pairs, x, x_scales, scales, dots);
  alignas(64) int32_t numbers[kTrellisColumns / 2 * kTrellisRows];
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const auto loaded = source.load(pair);
    for (int slice = 0; slice < kTrellisRows / Lane::kFloats; ++slice) {
      Lane::store_numbers(numbers + pair * kTrellisRows + slice * Lane::kFloats, source.decode(loaded, slice));
    }
  }
  for (int64_t m = 0; m < tokens; m += 4) {
    multiply<Lane, 4>(FromMemory<Lane>{numbers}, pairs, x + m / 4 * x_stride, x_scales + m, scales,
                      dots + m * kTrellisRows);
  }
}

template <class Lane, int Bits>
TrellisKernel trellis_kernel_of(const char* isa) {
  return {isa, Bits, search_ring<Lane, Bits>, trellis_dot<Lane, Bits>};
}

template <class Lane>
const TrellisKernel* trellis_kernel(const char* isa, int bits) {
  static const TrellisKernel kernels[] = {trellis_kernel_of<Lane, 2>(isa), trellis_kernel_of<Lane, 3>(isa),
                                          trellis_kernel_of<Lane, 4>(isa), trellis_kernel_of<Lane, 5>(isa),
                                          trellis_kernel_of<Lane, 6>(isa)};
  static_assert(sizeof kernels / sizeof *kernels == kTrellisMostBits - kTrellisFewestBits + 1);
  return &kernels[bits - kTrellisFewestBits];
}

}  // namespace

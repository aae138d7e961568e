// Products with weights on a trellis, shared by all instruction sets. Each .cpp of an instruction set includes this
// file and supplies a `Lane` type, with what trellis_search_tile.h and pair_tile.h want, and
//
//   Lane::Decoder<Bits>           of some columns of a tile, from their words; load(pair) brings what decode(loaded,
//                                 slice) wants of two columns
//
// Two columns of a tile are decoded slice by slice in registers, and multiplied by the activations of up to four
// tokens. More tokens share numbers that are written to memory, for a block of columns that stays in the fastest cache.
//
// Everything sits in an anonymous namespace, see dot_tile.h.
#pragma once

#include <cstring>

#include "dot_tile.h"
#include "pair_tile.h"
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

// numbers[pair of columns][row of a tile], two of 16 bits in each.
template <class Lane, int Bits>
void decode_pairs(const typename Lane::template Decoder<Bits>& source, int64_t pairs, int32_t* numbers) {
  for (int64_t pair = 0; pair < pairs; ++pair) {
    const auto loaded = source.load(pair);
    for (int slice = 0; slice < kTrellisRows / Lane::kFloats; ++slice) {
      Lane::store_numbers(numbers + pair * kTrellisRows + slice * Lane::kFloats, source.decode(loaded, slice));
    }
  }
}

template <class Lane, int Bits>
void trellis_columns(const uint32_t* words, int64_t columns, bool bfloat16, const float* scales, float* to) {
  const typename Lane::template Decoder<Bits> source(words, columns);
  alignas(64) int32_t numbers[kTrellisColumns / 2 * kTrellisRows];
  decode_pairs<Lane, Bits>(source, (columns + 1) / 2, numbers);
  const auto scaled = [&](int shift, const int32_t* pairs, float* of_column) {
    for (int r = 0; r < kTrellisRows; ++r) {
      const float number = static_cast<float>(static_cast<int16_t>(pairs[r] >> shift)) * kTrellisUnit;
      of_column[r] = (bfloat16 ? from_bfloat16(to_bfloat16(number)) : number) * scales[r];
    }
  };
  for (int64_t k = 0; k < columns; ++k) scaled(k % 2 * 16, numbers + k / 2 * kTrellisRows, to + k * kTrellisRows);
}

template <class Lane, int Bits>
void trellis_dot(const uint32_t* words, int64_t columns, const int16_t* x, int64_t tokens, int64_t x_stride,
                 const float* x_scales, const float* scales, float* dots) {
  const typename Lane::template Decoder<Bits> source(words, columns);
  const int64_t pairs = (columns + 1) / 2;
  if (tokens == 1) return multiply<Lane, 1>(source, kTrellisRows, pairs, x, x_scales, scales, dots);
  if (tokens == 2) return multiply<Lane, 2>(source, kTrellisRows, pairs, x, x_scales, scales, dots);
  if (tokens <= 4) return multiply<Lane, 4>(source, kTrellisRows, pairs, x, x_scales, scales, dots);
  alignas(64) int32_t numbers[kTrellisColumns / 2 * kTrellisRows];
  decode_pairs<Lane, Bits>(source, pairs, numbers);
  multiply_from_memory<Lane>(numbers, kTrellisRows, pairs, x, tokens, x_stride, x_scales, scales, dots);
}

template <class Lane, int Bits>
TrellisKernel trellis_kernel_of(const char* isa) {
  return {isa, Bits, search_ring<Lane, Bits>, trellis_dot<Lane, Bits>, trellis_columns<Lane, Bits>};
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

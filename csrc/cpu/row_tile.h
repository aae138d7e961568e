// Tiles of weights of 4 and 8 bits for many tokens, shared by all instruction sets: 64 rows and up to 64 columns become
// pairs of 16-bit numbers in the fastest cache, in the order of pair_tile.h, whose `Lane` has besides
//
//   Lane::load_words(first, stride, words)  words[i] = the i-th of four neighbouring words of each row of a slice,
//   whose
//                                 first ones are `stride` words apart
//   Lane::part<Bits>(words, i)    the i-th number of each 16 bits, as it is stored: not yet centered
//   Lane::center<Bits>(numbers)   minus 2^(Bits - 1)
//
// A pair is a number of the lower half of a word and the one that has its place in the upper half, so unpacking takes a
// shift, a mask and a difference for all of a vector.
//
// Everything sits in an anonymous namespace, see dot_tile.h.
#pragma once

#include <cstring>

#include "pair_tile.h"

namespace {

// Words of a row that are loaded together.
constexpr int64_t kLoadedWords = 4;

// numbers[pair][row] of the first `count` of such words of a slice.
template <class Lane, int Bits>
void unpack_words(const uint32_t* first, int64_t stride, int64_t count, int32_t* numbers) {
  typename Lane::Numbers words[kLoadedWords];
  Lane::load_words(first, stride, words);
  for (int64_t word = 0; word < count; ++word) {
#pragma GCC unroll 4
    for (int i = 0; i < 16 / Bits; ++i, numbers += kTileRows) {
      Lane::store_numbers(numbers, Lane::template center<Bits>(Lane::template part<Bits>(words[word], i)));
    }
  }
}

template <class Lane, int Bits>
void row_tile(const uint32_t* words, int64_t word_stride, int64_t rows, int64_t columns, int64_t ahead,
              const int16_t* x, int64_t tokens, int64_t x_stride, const float* x_scales, const float* scales,
              float* dots) {
  constexpr int64_t kPairs = 16 / Bits;                 // of a word
  constexpr int64_t kWords = kTileColumns * Bits / 32;  // of a row
  const int64_t count = (columns * Bits + 31) / 32;
  alignas(64) int32_t numbers[kTileColumns / 2 * kTileRows];
  // Rows that are a power of two apart may have but a few places in the fastest cache, so each is read once.
  alignas(64) uint32_t copy[kTileRows * kWords];
  if (rows < kTileRows || count < kWords) std::memset(copy, 0, sizeof copy);
  for (int64_t r = 0; r < rows; ++r) {
    const uint32_t* from = words + r * word_stride;
    const auto address = reinterpret_cast<uintptr_t>(from);
    __builtin_prefetch(reinterpret_cast<const char*>(address + ahead), 0, 2);
    if (count == kWords) std::memcpy(copy + r * kWords, from, kWords * sizeof *from);
    if (count != kWords) std::memcpy(copy + r * kWords, from, count * sizeof *from);
  }
  for (int64_t row = 0; row < rows; row += Lane::kSlices * Lane::kFloats) {
    for (int64_t word = 0; word < count; word += kLoadedWords) {
      const int64_t few = count - word < kLoadedWords ? count - word : kLoadedWords;
      for (int64_t r = row; r < row + Lane::kSlices * Lane::kFloats; r += Lane::kFloats) {
        unpack_words<Lane, Bits>(copy + r * kWords + word, kWords, few, numbers + word * kPairs * kTileRows + r);
      }
    }
  }
  multiply_from_memory<Lane>(numbers, rows, count * kPairs, x, tokens, x_stride, x_scales, scales, dots);
}

// `kernel` with tiles for many tokens.
template <class Lane, int Bits>
constexpr QuantizedKernel with_tiles(QuantizedKernel kernel, int64_t tile_tokens) {
  kernel.tile = row_tile<Lane, Bits>;
  kernel.tile_tokens = tile_tokens;
  return kernel;
}

}  // namespace

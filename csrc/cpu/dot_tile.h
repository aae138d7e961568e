// The loop shared by all instruction sets. Each .cpp of an instruction set includes this file and supplies a `Lane`
// type:
//
//   Lane::Weight, Lane::Packed    element types in memory
//   Lane::kStep                   elements per weight load
//   Lane::kStreams                rows to read side by side, each a stream that the processor fetches ahead by itself
//   Lane::kTileRows               rows that share the loads of x when three or more tokens are served
//   Lane::Acc                     vector of partial sums; zero() makes one, add(a, b) adds two, sum(a) adds its
//   elements Lane::kSums, sums(acc, out)   sum() of kSums vectors at once, which takes a third of the instructions
//   Lane::Wide                    one step of weights, ready to multiply
//   widen(weight), widen_tail(weight, count), multiply_add(wide, packed, acc)
//   place(i)                      where element i of a step goes when x is packed
//   from_weight(w), from_float(f) to Packed; to_float(w), to_weight(f)
//
// Everything sits in an anonymous namespace: the same template compiled for AVX-512 must never be linked into the AVX2
// file.
#pragma once

#include <cstring>

#include "row_kernel.h"

namespace {

using lorap::cpu::kMaxTokens;

inline uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// Round to nearest even; a NaN stays a NaN.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits = float_bits(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 0x40u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float from_bfloat16(uint16_t bits) { return bits_float(static_cast<uint32_t>(bits) << 16); }

template <class Lane, class Source, class Convert>
void pack_with(const Source* x, int64_t k, typename Lane::Packed* packed, Convert convert) {
  constexpr int64_t step = Lane::kStep;
  for (int64_t start = 0; start < k; start += step) {
    for (int64_t i = 0; i < step; ++i) {
      packed[start + Lane::place(i)] = start + i < k ? convert(x[start + i]) : typename Lane::Packed(0);
    }
  }
}

template <class Lane>
void pack(const void* x, int64_t k, void* packed) {
  pack_with<Lane>(static_cast<const typename Lane::Weight*>(x), k, static_cast<typename Lane::Packed*>(packed),
                  [](typename Lane::Weight w) { return Lane::from_weight(w); });
}

template <class Lane>
void pack_float(const float* x, int64_t k, void* packed) {
  pack_with<Lane>(x, k, static_cast<typename Lane::Packed*>(packed), [](float f) { return Lane::from_float(f); });
}

template <class Lane>
void load(const void* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = Lane::to_float(static_cast<const typename Lane::Weight*>(from)[i]);
}

template <class Lane>
void store(const float* from, int64_t count, void* to) {
  for (int64_t i = 0; i < count; ++i) static_cast<typename Lane::Weight*>(to)[i] = Lane::to_weight(from[i]);
}

// The rows of a tile: the first, where its dot product goes, how far the other rows and theirs lie behind it, and how
// far behind each row the one that will be read next.
template <class Lane>
struct TileRows {
  const typename Lane::Weight* weight;
  float* dots;
  int64_t apart, dots_apart, next;
};

// Rows x Tokens dot products with their sums in registers. The next rows are fetched into the cache meanwhile, because
// the passes over later tokens read no memory that the processor could fetch ahead by itself.
template <class Lane, int Rows, int Tokens, bool Prefetch>
void dot_tile(const TileRows<Lane>& tile, int64_t k, const char* packed, int64_t packed_stride, int64_t dots_stride) {
  using Weight = typename Lane::Weight;
  using Packed = typename Lane::Packed;
  constexpr int kSums = Rows == 1 ? Tokens : Lane::kSums;
  static_assert(Rows * Tokens <= kSums);
  typename Lane::Acc acc[kSums] = {};  // [token][row], and zeros up to what sums() takes

  auto step = [&](int64_t at, auto load) {
    for (int r = 0; r < Rows; ++r) {
      const typename Lane::Wide wide = load(tile.weight + r * tile.apart + at);
      for (int m = 0; m < Tokens; ++m) {
        const Packed* x = reinterpret_cast<const Packed*>(packed + m * packed_stride) + at;
        acc[m * Rows + r] = Lane::multiply_add(wide, x, acc[m * Rows + r]);
      }
    }
  };
  int64_t at = 0;
  for (; at + Lane::kStep <= k; at += Lane::kStep) {
    if (Prefetch) {
      for (int r = 0; r < Rows; ++r) {
        const auto address = reinterpret_cast<uintptr_t>(tile.weight + r * tile.apart + at);
        __builtin_prefetch(reinterpret_cast<const char*>(address + tile.next * sizeof(Weight)), 0, 2);
      }
    }
    step(at, [](const Weight* w) { return Lane::widen(w); });
  }
  if (at < k) step(at, [&](const Weight* w) { return Lane::widen_tail(w, k - at); });

  float sums[kSums];
  if constexpr (Rows == 1) {
    for (int m = 0; m < Tokens; ++m) sums[m] = Lane::sum(acc[m]);
  } else {
    Lane::sums(acc, sums);
  }
  for (int m = 0; m < Tokens; ++m)
    for (int r = 0; r < Rows; ++r) tile.dots[m * dots_stride + r * tile.dots_apart] = sums[m * Rows + r];
}

// Bytes to fetch ahead in a single stream: the processor's own prefetching stops at the end of each page. On two Zen 4
// cores, M = 1, this raised the share of read bandwidth from 90 to 99 %; half of it, to 95 %.
constexpr int64_t kPrefetchBytes = 4096;

// One row and one token, where a single stream is what the processor fetches ahead best, with four independent sums to
// hide the latency of the multiply-add.
template <class Lane>
float dot_stream(const typename Lane::Weight* weight, int64_t k, const typename Lane::Packed* packed) {
  constexpr int64_t step = Lane::kStep;
  typename Lane::Acc acc[4] = {Lane::zero(), Lane::zero(), Lane::zero(), Lane::zero()};
  int64_t at = 0;
  for (; at + 4 * step <= k; at += 4 * step) {
    for (int i = 0; i < 4; ++i) {
      __builtin_prefetch(reinterpret_cast<const char*>(weight + at + i * step) + kPrefetchBytes, 0, 2);
      acc[i] = Lane::multiply_add(Lane::widen(weight + at + i * step), packed + at + i * step, acc[i]);
    }
  }
  for (; at + step <= k; at += step) acc[0] = Lane::multiply_add(Lane::widen(weight + at), packed + at, acc[0]);
  if (at < k) acc[1] = Lane::multiply_add(Lane::widen_tail(weight + at, k - at), packed + at, acc[1]);
  return Lane::sum(Lane::add(Lane::add(acc[0], acc[1]), Lane::add(acc[2], acc[3])));
}

template <class Lane, int Rows>
void dot_tokens(TileRows<Lane> tile, int64_t k, const char* packed, int64_t packed_stride, int64_t tokens,
                int64_t dots_stride) {
  using Run = decltype(&dot_tile<Lane, Rows, 1, false>);
  const auto run = [&](Run some, int64_t count) {
    some(tile, k, packed, packed_stride, dots_stride);
    packed += count * packed_stride;
    tile.dots += count * dots_stride;
    tokens -= count;
  };
  if constexpr (Rows == 1 || 4 * Rows <= Lane::kSums) {
    for (bool first = true; tokens >= 4; first = false) {
      run(first ? dot_tile<Lane, Rows, 4, true> : dot_tile<Lane, Rows, 4, false>, 4);
    }
    if (tokens == 3) run(dot_tile<Lane, Rows, 3, false>, 3);
  }
  if (tokens == 2) run(dot_tile<Lane, Rows, 2, false>, 2);
  if (tokens == 1) run(dot_tile<Lane, Rows, 1, false>, 1);
}

// Rows of a tile are neighbours, or, where the processor follows several streams, as far apart as the block allows:
// each stream goes on in memory with the next tile. On two Zen 2 cores that reads 1.3 to 1.5 times as fast at one
// token as a single stream that is fetched a page ahead, and 1.35 to 2.5 times as fast as neighbours at two, at which
// each row would begin a stream of its own.
template <class Lane, int Rows>
void dot_rows(const typename Lane::Weight* weight, int64_t weight_stride, int64_t rows, int64_t k, const char* packed,
              int64_t packed_stride, int64_t tokens, float* dots, int64_t dots_stride) {
  constexpr bool kSpread = Lane::kStreams > 1;
  const int64_t tiles = rows / Rows, apart = kSpread ? tiles : 1, step = kSpread ? 1 : Rows;
  for (int64_t i = 0; i < tiles; ++i) {
    const int64_t row = i * step, next = i + 1 < tiles || !kSpread ? step : rows - row;
    dot_tokens<Lane, Rows>(
        {weight + row * weight_stride, dots + row, apart * weight_stride, apart, next * weight_stride}, k, packed,
        packed_stride, tokens, dots_stride);
  }
  for (int64_t row = tiles * Rows; row < rows; ++row) {
    dot_tokens<Lane, 1>({weight + row * weight_stride, dots + row, 0, 0, weight_stride}, k, packed, packed_stride,
                        tokens, dots_stride);
  }
}

template <class Lane>
void dot(const void* weight_data, int64_t weight_stride, int64_t rows, int64_t k, const void* packed_data,
         int64_t packed_stride, int64_t tokens, float* dots, int64_t dots_stride) {
  const auto* weight = static_cast<const typename Lane::Weight*>(weight_data);
  const auto* packed = static_cast<const char*>(packed_data);
  if (tokens == 1 && Lane::kStreams == 1) {
    for (int64_t n = 0; n < rows; ++n) {
      dots[n] = dot_stream<Lane>(weight + n * weight_stride, k, static_cast<const typename Lane::Packed*>(packed_data));
    }
    return;
  }
  constexpr int kFewTokensRows = Lane::kStreams > Lane::kTileRows ? Lane::kStreams : Lane::kTileRows;
  const auto run = tokens <= 2 ? dot_rows<Lane, kFewTokensRows> : dot_rows<Lane, Lane::kTileRows>;
  run(weight, weight_stride, rows, k, packed, packed_stride, tokens, dots, dots_stride);
}

template <class Lane>
constexpr lorap::cpu::RowKernel make_kernel(const char* isa, lorap::cpu::Dtype dtype) {
  return {isa,
          dtype,
          sizeof(typename Lane::Weight),
          Lane::kStep,
          sizeof(typename Lane::Packed),
          load<Lane>,
          store<Lane>,
          pack<Lane>,
          pack_float<Lane>,
          dot<Lane>};
}

}  // namespace

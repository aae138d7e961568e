// How weights are stored, and what becomes of them in registers: eight at a time, the widest load holding one, two or
// four times as many. For the kernels of low_rank_one_launch.h only.
#pragma once

#include <type_traits>

#include "low_rank_device.h"

namespace lorap {
namespace {

template <typename Scalar>
struct PairOf;
template <>
struct PairOf<__nv_bfloat16> {
  using Type = __nv_bfloat162;
};
template <>
struct PairOf<__half> {
  using Type = __half2;
};

template <typename Scalar>
__device__ void unpack(uint4 packed, float (&values)[kVector]) {
  using Pair = typename PairOf<Scalar>::Type;
  const Pair* pairs = reinterpret_cast<const Pair*>(&packed);
#pragma unroll
  for (int i = 0; i < kVector / 2; ++i) {
    const float2 pair = widen(pairs[i]);
    values[2 * i] = pair.x;
    values[2 * i + 1] = pair.y;
  }
}

// In 16 bits, the type of the activations.
template <typename Scalar>
struct InFull {
  static constexpr int kBits = 16;
  static constexpr bool kScaled = false;
  using Eight = uint4;
  static __device__ void numbers(uint4 eight, float (&values)[kVector]) { unpack<Scalar>(eight, values); }
};

#ifndef LORAP_EMULATE_CUDA
// (word & mask) | bits in one instruction: with two constants the compiler makes two of it.
__device__ inline uint32_t and_or(uint32_t word, uint32_t mask, uint32_t bits) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(result) : "r"(word), "r"(mask), "r"(bits));
  return result;
}

// Starts bringing the whole 16 bytes in [begin, end) of what starts at `from` to the L2 cache, where a GPU can by one
// instruction.
__device__ inline void fetch_to_l2(const void* from, int64_t begin, int64_t end) {
#if __CUDA_ARCH__ >= 900
  const int64_t first = (begin + 15) / 16 * 16, bytes = end / 16 * 16 - first;
  const size_t address = __cvta_generic_to_global(static_cast<const char*>(from) + first);
  if (bytes > 0) asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(address), "r"(uint32_t(bytes)));
#endif
}
#endif

// Whole numbers q of 4 or 8 bits as q + 2^(bits - 1), lowest bits first, to be multiplied by a scale of their group.
template <int kNumberBits>
struct Packed {
  static constexpr int kBits = kNumberBits;
  static constexpr bool kScaled = true;
  using Eight = std::conditional_t<kBits == 4, uint32_t, uint2>;

  static __device__ void numbers(Eight eight, float (&values)[kVector]) {
    const uint32_t* words = reinterpret_cast<const uint32_t*>(&eight);
#pragma unroll
    for (int i = 0; i < kVector; ++i) {
      const int bit = i * kBits % 32;
      const uint32_t word = words[i * kBits / 32];
      values[i] = bit + kBits <= 23 ? number_at(word, bit) : number_at(word >> 16, bit - 16);
    }
  }

  // The bits of 2^(23 - place) are those of a float32 whose bit `place` counts ones: a number is or-ed in where it is,
  // and subtracting leaves q, exactly. A conversion of integers would take a GPU four times as long or longer.
  static __device__ float number_at(uint32_t word, int place) {
    const uint32_t mask = ((1u << kBits) - 1u) << place, power = uint32_t(127 + 23 - place) << 23;
    return __uint_as_float(and_or(word, mask, power)) - float((1 << (23 - place)) + (1 << (kBits - 1)));
  }
};

// What group_of multiplies by, rounded up; a group is that of 32 weights or more, so that it has 32 bits.
inline uint32_t inverse_of_group(int64_t group) {
  return uint32_t(((int64_t(1) << 32) + group / kVector - 1) / (group / kVector));
}

// Which group of a row its `eight`-th eight weights are in. `inverse` is too large by less than 1 / 2^32 of a group's
// eights for each eight, which changes nothing as long as fewer than 2^32 / those are counted: see kMostPacked.
__device__ inline int group_of(uint32_t inverse, int eight) { return int(__umulhi(uint32_t(eight), inverse)); }

}  // namespace
}  // namespace lorap

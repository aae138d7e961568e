// The search for windows on a ring, shared by all instruction sets. Each .cpp of an instruction set includes this file
// and supplies a `Lane` type:
//
//   Lane::Floats, Lane::kFloats   a vector of floats, and how many
//   Lane::load(from), Lane::store(to, floats), Lane::broadcast(float)
//   Lane::multiply_add(a, b, c)   a * b + c
//   Lane::add(a, b), Lane::least(a, b)   the sums, and the smaller ones; least has b's where a's is no number
//   Lane::spread<Each>(from)      floats from `from` on, each for `Each` neighbours of a vector
//
// A window n of a row is (top bits h, bits it shares with the row above s): n = h * kShared + s. The row below has the
// windows whose shared bits are n >> Bits. So with the least error of all rows below by what they share, and that of
// the row itself,
//
//   next[s] = min over h of (least[n >> Bits] + importance * (wanted - number[n])^2)
//
// which is two fused multiplications and a minimum for each window. Which h it was is not kept, but found again for
// those 64 windows that are on the way back.
//
// Everything sits in an anonymous namespace, see dot_tile.h.
#pragma once

#include <limits>

#include "trellis.h"

namespace {

using namespace lorap::cpu;

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// importance * (wanted - v)^2 as (slope * v + offset) * v + constant.
struct RowError {
  RowError(float wanted, float importance)
      : slope(importance), offset(-2 * importance * wanted), constant(importance * wanted * wanted) {}
  float slope, offset, constant;
};

template <class Lane, int Bits>
struct RingSearch {
  static constexpr int kHigh = 1 << Bits, kShared = kTrellisWindows >> Bits;

  const float *numbers, *wanted, *importance;
  float* scratch;

  float* least(int step) const { return scratch + step * kShared; }
  RowError error(int row) const { return {wanted[row], importance[row]}; }

  // least(step + 1) from least(step), across a row, which already holds the constant of that row.
  void advance(int step, int row, float next_constant) const {
    using Floats = typename Lane::Floats;
    const RowError of_row = error(row);
    const float *from = least(step), *number = numbers;
    float* to = least(step + 1);
    const Floats slope = Lane::broadcast(of_row.slope), offset = Lane::broadcast(of_row.offset),
                 constant = Lane::broadcast(next_constant);
    for (int s = 0; s < kShared; s += Lane::kFloats) {
      Floats best;
#pragma GCC unroll 16
      for (int h = 0; h < kHigh; ++h) {
        const int n = h * kShared + s;
        const Floats v = Lane::load(number + n), below = Lane::template spread<kHigh>(from + (n >> Bits));
        const Floats sum = Lane::multiply_add(Lane::multiply_add(slope, v, offset), v, below);
        best = h ? Lane::least(sum, best) : sum;
      }
      Lane::store(to + s, Lane::add(best, constant));
    }
  }

  // The best window of a row with these shared bits, of those that least(step) allows.
  int window(int step, int row, int shared) const {
    const RowError of_row = error(row);
    const float* from = least(step);
    int found = shared;
    float best = kInfinity;
    for (int n = shared; n < kTrellisWindows; n += kShared) {
      const float v = numbers[n], sum = (of_row.slope * v + of_row.offset) * v + from[n >> Bits];
      if (sum < best) best = sum, found = n;
    }
    return found;
  }

  float constant(int row) const { return error(row).constant; }

  // The bits that row 0 shares with row 63: those of the best path from kTrellisSeam rows before to as many after.
  int seam() const {
    constexpr int kSteps = 2 * kTrellisSeam;
    const auto row_of = [](int step) { return (kTrellisSeam - 1 - step + 2 * kTrellisRows) % kTrellisRows; };
    for (int s = 0; s < kShared; ++s) least(0)[s] = constant(row_of(0));
    for (int step = 0; step < kSteps; ++step) {
      advance(step, row_of(step), step + 1 < kSteps ? constant(row_of(step + 1)) : 0.0f);
    }
    int shared = 0;
    const float* last = least(kSteps);
    for (int s = 1; s < kShared; ++s) shared = last[s] < last[shared] ? s : shared;
    for (int step = kSteps - 1; step >= kTrellisSeam; --step) shared = window(step, row_of(step), shared) >> Bits;
    return shared;
  }

  void path(int32_t* windows) const {
    constexpr int kLast = kTrellisRows - 1;
    const int ends = seam();
    for (int s = 0; s < kShared; ++s) least(0)[s] = kInfinity;
    least(0)[ends] = constant(kLast);
    for (int step = 0; step < kLast; ++step) advance(step, kLast - step, constant(kLast - step - 1));
    int own[kTrellisRows];
    for (int row = 0, shared = ends; row < kTrellisRows; ++row) {
      const int n = window(kLast - row, row, shared);
      own[row] = n & (kHigh - 1);
      shared = n >> Bits;
    }
    // From the bits that each row has for itself, so that it is a ring even where numbers were none.
    for (int row = 0; row < kTrellisRows; ++row) {
      windows[row] = 0;
      for (int i = 0; i * Bits < kTrellisWindow; ++i) windows[row] |= own[(row + i) % kTrellisRows] << i * Bits;
      windows[row] &= kTrellisWindows - 1;
    }
  }
};

template <class Lane, int Bits>
void search_ring(const float* numbers, const float* wanted, const float* importance, float* scratch, int32_t* windows) {
  RingSearch<Lane, Bits>{numbers, wanted, importance, scratch}.path(windows);
}

}  // namespace

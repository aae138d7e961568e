// Activations for the tiles of pair_tile.h, whose weights may be on a trellis or have 4 or 8 bits. Not for the files of
// an instruction set, see row_blocks.h.
#pragma once

#include <bit>

#include "quantized.h"
#include "quantized_packing.h"
#include "row_blocks.h"

namespace lorap::cpu {
namespace {

// Calls body(first column, columns, group, block) for what is multiplied together: columns of one group.
template <class Body>
void for_blocks(const QuantizedMatrix& weight, const Body& body) {
  int64_t columns;
  for (int64_t k = 0, block = 0; k < weight.cols; k += columns, ++block) {
    const int64_t group = k / weight.group, end = std::min(weight.cols, (group + 1) * weight.group);
    columns = std::min(kTileColumns, end - k);
    body(k, columns, group, block);
  }
}

inline int64_t groups_of(const QuantizedMatrix& weight) {
  return weight.cols ? (weight.cols - 1) / weight.group + 1 : 0;
}

// The nearest whole number, as an int32: adding 1.5 * 2^23 leaves it in the low bits. No more than 2^15 - 1.
inline int32_t nearest(float x) {
  return std::bit_cast<int32_t>(std::min(x, 32767.0f) + 12582912.0f) - std::bit_cast<int32_t>(12582912.0f);
}

// x as the kernels want it: a block of columns becomes numbers of 16 bits that share a power of two, which quantized.h
// has more about; of float32 what they leave becomes a second token of such numbers. The numbers of two columns lie
// side by side: `apart` columns that are next to each other with as many that follow them.
class TileInput {
 public:
  TileInput(const Call& call, const QuantizedMatrix& weight, int64_t apart)
      : call_(call),
        weight_(weight),
        apart_(apart),
        digits_(call.element == sizeof(float) ? 2 : 1),
        tokens_(call.tokens * digits_),
        together_(tokens_ > 2 ? 4 : tokens_),
        padded_((tokens_ + together_ - 1) / together_ * together_),
        stride_((weight.cols + 2 * apart - 1) / (2 * apart) * 2 * apart * together_),
        numbers_(scratch<int16_t>(padded_ / together_ * stride_)) {
    int64_t blocks = 0;
    for_blocks(weight, [&](auto...) { ++blocks; });
    scales_ = scratch<float>(blocks * padded_);
    std::fill_n(numbers_.get(), padded_ / together_ * stride_, int16_t{0});
    std::fill_n(scales_.get(), blocks * padded_, 0.0f);
  }
  // (tokens, columns of the weight), in the dtype of the call.
  void pack(const void* x) {
    const auto values = scratch<float>(weight_.cols);
    for (int64_t m = 0; m < call_.tokens; ++m) {
      call_.kernel.load(static_cast<const char*>(x) + m * weight_.cols * call_.element, weight_.cols, values.get());
      pack_one(m, values.get());
    }
  }
  void pack_float(const float* x) {
    for (int64_t m = 0; m < call_.tokens; ++m) pack_one(m, x + m * weight_.cols);
  }
  int64_t digits() const { return digits_; }
  int64_t tokens() const { return tokens_; }
  int64_t stride() const { return stride_; }
  const int16_t* column(int64_t k) const { return numbers_.get() + k * together_; }  // k as for_blocks has it
  const float* scales(int64_t block) const { return scales_.get() + block * padded_; }

  // Where activations are two tokens each, dots[token * kTileRows + i] become their sums.
  void add_digits(int64_t rows, float* dots) const {
    for (int64_t m = 0; m < call_.tokens && digits_ == 2; ++m) {
      const float *high = dots + 2 * m * kTileRows, *low = high + kTileRows;
      for (int64_t i = 0; i < rows; ++i) dots[m * kTileRows + i] = high[i] + low[i];
    }
  }

 private:
  void pack_one(int64_t token, const float* x) {
    for_blocks(weight_, [&](int64_t k, int64_t columns, int64_t, int64_t block) {
      float values[kTileColumns] = {};
      std::copy_n(x + k, columns, values);
      pack_block(values, k, columns, token, scales_.get() + block * padded_);
    });
  }
  void pack_block(float* values, int64_t k, int64_t columns, int64_t token, float* scales) {
    constexpr float kDigit = 32768.0f;
    float scale = block_scale<16>(values, columns), inverse = scale == scale ? 1.0f / scale : 0.0f;
    for (int64_t m = token * digits_; m < (token + 1) * digits_; ++m) {
      scales[m] = scale;
      int32_t rounded[kTileColumns];
      for (int64_t i = 0; i < kTileColumns; ++i) rounded[i] = nearest(values[i] * inverse);
      int16_t* to = numbers_.get() + m / together_ * stride_ + m % together_ * 2 + k * together_;
      for (int64_t first = 0; first < columns; first += 2 * apart_) {
        for (int64_t i = first; i < first + apart_; ++i, to += 2 * together_) {
          const uint32_t both = (rounded[i] & 0xffff) | static_cast<uint32_t>(rounded[i + apart_]) << 16;
          std::memcpy(to, &both, sizeof both);
        }
      }
      scale /= kDigit;
      if (m + 1 == (token + 1) * digits_) break;
      for (int64_t i = 0; i < kTileColumns; ++i) {
        values[i] = (values[i] * inverse - rounded[i]) * kDigit;  // exact, as in quantized_packing.h
      }
      inverse = 1.0f;
    }
  }

  Call call_;
  QuantizedMatrix weight_;
  int64_t apart_, digits_, tokens_, together_, padded_, stride_;
  std::unique_ptr<int16_t[], Free> numbers_;
  std::unique_ptr<float[], Free> scales_;
};

// Scales of rows from `row` on times `unit`, as (groups, kTileRows) with zeros behind the last row. `loaded` has room
// for as many.
inline void load_scales(const QuantizedMatrix& weight, int64_t row, int64_t rows, float unit, float* loaded,
                        float* scales) {
  const RowKernel& kernel = *weight.scale_kernel;
  const int64_t groups = groups_of(weight), at = row * weight.scale_stride;
  const char* from = static_cast<const char*>(weight.scales) + at * kernel.element_bytes;
  if (weight.scale_stride == groups) {
    kernel.load(from, rows * groups, loaded);
  } else {
    for (int64_t i = 0; i < rows; ++i) {
      kernel.load(from + i * weight.scale_stride * kernel.element_bytes, groups, loaded + i * groups);
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t i = 0; i < kTileRows; ++i) scales[g * kTileRows + i] = i < rows ? loaded[i * groups + g] * unit : 0.0f;
  }
}

}  // namespace
}  // namespace lorap::cpu

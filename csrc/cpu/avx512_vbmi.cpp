// AVX-512 with dot products of whole numbers and permutations of bytes: Intel since Ice Lake, AMD since Zen 4.
// Built with -mavx512f -mavx512bw -mavx512vl -mavx512vnni -mavx512vbmi. For weights on a trellis only.
#include "avx512_trellis.h"

namespace {

struct Avx512VbmiTrellis : Avx512Trellis {
  // One permutation brings the bytes of two rows to each 64 bits, four of either column, wherever the ring goes on; one
  // shift of each byte by its own bits brings the windows out.
  template <int Bits>
  class Decoder {
    static constexpr int kVector = 64, kBytes = kTrellisRows * Bits / 8;  // of a column
    static constexpr bool kApart = 2 * kBytes > kVector;                  // both do not fit into a vector

   public:
    struct Columns {
      __m512i first, second;
    };
    Decoder(const uint32_t* words, int64_t columns)
        : from_(reinterpret_cast<const char*>(words)), size_(columns * kBytes) {
      alignas(64) uint8_t places[kVector], shifts[kVector];
      for (int slice = 0; slice < 4; ++slice) {
        for (int i = 0; i < kVector; ++i) {
          const int row = slice * kFloats + i / 8 * 2, column = i % 8 / 4;
          const int byte = (row * Bits / 8 + i % 4) % kBytes;
          places[i] = static_cast<uint8_t>(byte + column * (kApart ? kVector : kBytes));
        }
        places_[slice] = _mm512_load_si512(places);
      }
      for (int i = 0; i < kVector; ++i) {
        const int first_row = i / 8 * 2, row = i % 8 / 4, column = i % 4 / 2;
        shifts[i] = static_cast<uint8_t>(first_row * Bits % 8 + row * Bits + 32 * column + 8 * (i % 2));
      }
      shifts_ = _mm512_load_si512(shifts);
    }
    Columns load(int64_t pair) const {
      const int64_t at = pair * 2 * kBytes;
      return {vector(at), kApart ? vector(at + kBytes) : _mm512_setzero_si512()};
    }
    Numbers decode(const Columns& columns, int slice) const {
      __m512i bytes;
      if constexpr (kApart) bytes = _mm512_permutex2var_epi8(columns.first, places_[slice], columns.second);
      if constexpr (!kApart) bytes = _mm512_permutexvar_epi8(places_[slice], columns.first);
      const __m512i windows = _mm512_multishift_epi64_epi8(shifts_, bytes);
      return hash_(_mm512_and_si512(windows, _mm512_set1_epi16(kTrellisWindows - 1)));
    }

   private:
    // What the columns have from a byte on, and zeros.
    __m512i vector(int64_t at) const {
      const int64_t left = size_ - at;
      if (left >= kVector) return _mm512_loadu_si512(from_ + at);
      if (left <= 0) return _mm512_setzero_si512();
      return _mm512_maskz_loadu_epi8(~uint64_t{0} >> (kVector - left), from_ + at);
    }
    const char* from_;
    int64_t size_;
    __m512i places_[4], shifts_;
    Hash hash_;
  };
};

}  // namespace

namespace lorap::cpu {

const TrellisKernel* avx512_vbmi_trellis_kernel(int bits) {
  return trellis_kernel<Avx512VbmiTrellis>("avx512_vbmi", bits);
}

}  // namespace lorap::cpu

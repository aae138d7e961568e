// One decoder layer of LLaMA's kind for one new token of each sequence, without torch: pointers and sizes in, outputs
// written.
//
//   x += o(attention(rotate(norm(q(n))), rotate(norm(k(n))), v(n)))    n = norm(x), norms of heads where there are some
//   x += down(silu(gate(n)) * up(n))                                   n = norm(x)
//
// Rounds to the dtype where transformers' layer does, except within a norm's mean and within attention, which are
// computed in float32.
#pragma once

#include "decode.h"
#include "quantized.h"
#include "trellis.h"

namespace lorap::cpu {

// Codes on a trellis: of a dense layer `left` alone.
struct TrellisLayer {
  const TrellisKernel* kernel;
  TrellisMatrix right, left;
};

// A projection in one of six forms. `bias` and, of `factors`, what LowRankLayer lets be null, may be null.
struct Projection {
  enum class Form { kDense, kLowRank, kQuantized, kQuantizedLowRank, kTrellis, kTrellisLowRank } form;
  Matrix weight;           // kDense
  LowRankLayer factors;    // kLowRank
  QuantizedLayer numbers;  // kQuantized, kQuantizedLowRank
  QuantizedMachine machine;
  TrellisLayer codes;  // kTrellis, kTrellisLowRank
  const void* bias;

  bool is_quantized() const { return form == Form::kQuantized || form == Form::kQuantizedLowRank; }
  bool is_trellis() const { return form == Form::kTrellis || form == Form::kTrellisLowRank; }
  int64_t out_features() const;
  int64_t in_features() const;
};

enum Role { kQ, kK, kV, kO, kGate, kUp, kDown, kRoles };

struct DecoderLayer {
  Projection projections[kRoles];
  const void *input_norm, *post_norm;  // (hidden,)
  const void *q_norm, *k_norm;         // (head_dim,), or null
  float epsilon, scaling;
  int64_t hidden, head_dim, heads, kv_heads;
};

// Keys (sequences, kv_heads, capacity, head_dim) and values, which lie transposed: (sequences, kv_heads, head_dim,
// capacity). Positions before `length` are there.
struct KeyValues {
  void *keys, *values;
  int64_t capacity, length;
};

// What is new of each sequence: its rotation (head_dim,), `rotation_stride` elements from one sequence to the next, and
// what is added to its scores (length + 1,), or null.
struct Positions {
  const void *cos, *sin;
  int64_t rotation_stride;
  const float* mask;
};

// x (sequences, hidden) to y of the same shape, at most kMaxTokens sequences; appends to `cache` at `length`.
void decoder_layer(Machine machine, const DecoderLayer& layer, const void* x, int64_t sequences, KeyValues cache,
                   Positions positions, void* y);

}  // namespace lorap::cpu

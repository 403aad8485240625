// Stages: what a team of threads can do together, each with its arguments as a plain struct. `kernels/stages.py` mirrors
// these structs field by field; a test holds the two to the same sizes.
//
// Everything that changes from step to step (how many tokens, where they stand) is read through `Step`, so a model's
// program is written once.
#pragma once
#include <cstdint>

#include "crew.h"
#include "simd.h"

enum class Type : int32_t { fp32 = 0, bf16 = 1, int8 = 2, fp16 = 3, fp8 = 4 };  // fp8: e4m3

// A row of weights in the type they are kept in; null when there is none.
struct Numbers {
  const void* at;
  Type type;
  int32_t unused;

  explicit operator bool() const { return at != nullptr; }
  V16 load16(int64_t i, int count = LANES) const {
    if (type == Type::fp32) return load(static_cast<const float*>(at) + i, count);
    const uint16_t* from = static_cast<const uint16_t*>(at) + i;
    return type == Type::bf16 ? load_bf16(from, count) : load_fp16(from, count);
  }
  float one(int64_t i) const {
    if (type == Type::fp32) return static_cast<const float*>(at)[i];
    const uint16_t half = static_cast<const uint16_t*>(at)[i];
    return type == Type::bf16 ? widen(half) : widen_fp16(half);
  }
};

// One step's tokens: spans of sequences, end to end on the token axis.
struct Step {
  int32_t tokens, spans, wanted, table_stride;
  const int32_t* ids;        // [tokens]
  const int32_t* positions;  // [tokens] absolute
  const int32_t* first;      // [spans + 1] a span's first token on the axis
  const int32_t* start;      // [spans] the position of a span's first token
  const int32_t* table;      // [spans][table_stride] blocks that hold a sequence's positions from 0 on
  const int32_t* rows;       // [wanted] tokens whose logits are wanted
  const int32_t* kinds;      // [tokens] of which of several texts in one; null: all of the first
};

// out[t] = scale * table[ids[t]] + places[positions[t] + offset] + kinds[kinds[t]]
struct Embed {
  const Step* step;
  Numbers table, places, kinds;
  int32_t width, offset;
  float scale;
  int32_t unused;
  float* out;
  int64_t out_stride;
};

enum class NormKind : int32_t { rms = 0, layer = 1 };

// x += scale * y (where y is given), then out = norm(x) * weight + bias, for `groups` runs of `width` in each row.
struct Norm {
  const int32_t* rows;
  int32_t groups, width;
  NormKind kind;
  int32_t offset;      // weight is kept as w - 1
  int32_t per_group;   // each group has its own weights
  float eps, scale;
  int32_t unused;
  Numbers weight, bias;
  float* x;
  int64_t x_stride;
  const float* y;
  int64_t y_stride;
  float* out;
  int64_t out_stride;
};

// x += scale * (y + z); z may be null.
struct Add {
  const int32_t* rows;
  int32_t width;
  float scale;
  float* x;
  int64_t x_stride;
  const float* y;
  int64_t y_stride;
  const float* z;
  int64_t z_stride;
};

// out = act(x), or act(x's first half) * its second half; and clip, multiplier, soft cap for what needs them.
struct Pointwise {
  const int32_t* rows;
  int32_t width, act, gated, unused;
  float clip, multiplier, softcap, unused_too;  // 0: none
  const float* x;
  int64_t x_stride;
  float* out;
  int64_t out_stride;
};

// out[r] = in[index[r]]
struct Gather {
  const int32_t* rows;
  const int32_t* const* index;
  int32_t width, unused;
  const float* in;
  int64_t in_stride;
  float* out;
  int64_t out_stride;
};

// out[row][i] = in[row][order[i]]
struct Reorder {
  const int32_t* rows;
  const int32_t* order;
  int32_t width, unused;
  const float* in;
  int64_t in_stride;
  float* out;
  int64_t out_stride;
};

// out[row] = 1 when every number of x[row] is finite, else 0.
struct Finite {
  const int32_t* rows;
  int32_t width, unused;
  const float* x;
  int64_t x_stride;
  uint8_t* out;
};

// out[rows, n] = act(a[rows, k] . w[n, k] + bias), w as in the checkpoint, fp32 or bf16. Gated: w has 2n rows, the gates'
// first, and out = act(gate) * up.
struct Linear {
  const int32_t* rows;
  int32_t n, k;
  Type type;
  int32_t act, gated, unused;
  const void* w;
  int64_t w_stride;
  Numbers bias;
  const float* a;
  int64_t a_stride;
  float* out;
  int64_t out_stride;
};

// One layer's keys and values: blocks of `size` tokens, a multiple of 16.
//   keys    [blocks][kv_heads][size/16][dim][16]       int8: [size/16][dim/4][16][4]
//   values  [blocks][kv_heads][size][dim]
//   scales  [blocks][kv_heads][size], int8 and fp8 only
struct Cache {
  void *keys, *values;
  float *key_scales, *value_scales;
  Type type;
  int32_t size, kv_heads, dim;
};

// Queries and keys made ready: clip, normalise each head, turn by position; then keys and values go to the cache.
struct Heads {
  const Step* step;
  Cache cache;
  float* qkv;            // [tokens][(heads + 2 kv_heads) * dim], changed in place
  int64_t qkv_stride;
  int32_t heads, pairs;  // pairs of numbers turned; 0: none
  int32_t interleaved, norm;  // norm: 0 none, 1 rms, 2 layer
  int32_t offset, per_head;
  float eps, clip;
  Numbers q_weight, k_weight, q_bias, k_bias;
  const float *cos, *sin;  // [positions][pairs]
};

// Which keys there are at all for each query: bits[pattern of the head][position / block][key / 128], a bit for sixteen
// keys. All are there when bits is null. There is a row for each position, and a byte for each key, of the step.
struct Sparse {
  const uint8_t* bits;     // [patterns][rows][stride]
  const int32_t* pattern;  // [heads]
  int32_t block, rows, stride, unused;

  const uint8_t* row(int head, int64_t position) const {
    return bits ? bits + (int64_t(pattern[head]) * rows + position / block) * stride : nullptr;
  }
};

// Each query looks back over its own sequence's cache, in blocks of 128 keys; or `ahead` too, where spans are whole sequences.
struct Attention {
  const Step* step;
  Cache cache;
  const float* q;        // [tokens][heads * dim]
  int64_t q_stride;
  float* out;            // [tokens][heads * dim]
  int64_t out_stride;
  int32_t heads, window;   // 0: no window
  float scale, softcap;    // 0: no cap
  const float* slopes;   // [heads] or null
  const float* sinks;    // [heads] or null: a score that takes part in the sum and has no value
  float* lse;            // [tokens][heads] or null
  Sparse sparse;
  int32_t ahead, unused;
};

enum class Report : int32_t { none = 0, raw = 1, processed = 2, given = 3, tempered = 4, beam = 5 };
enum class Fault : int32_t { none = 0, not_finite = 1, nothing_left = 2, unknown_id = 3 };

// What one row asks of the sampler, and what it is answered.
struct Choice {
  double top_p, u;
  float temperature, min_p, repetition, frequency, presence;  // temperature 0: greedy
  int32_t top_k;
  Report report;  // of the model's logits (tempered: / temperature), of what is drawn from, of a given token with no draw,
                  // beam: edits are made to log-probabilities, and reported are these as they are
  int32_t allows, biases, bans, seens, counts;
  const int32_t *allowed, *bias_ids, *banned, *seen, *counted;
  const uint32_t* mask;  // a bit for each id that may come; none: every id may
  const float* bias;
  float* top_values;  // [tops]
  int32_t* top_ids;
  int32_t tops;
  Fault fault;
  int32_t token, rank, found;  // found: of the tops asked for
  float logprob;
};

// A token for each row of logits.
struct Sample {
  const int32_t* rows;
  int32_t vocab, choice_size;
  const float* logits;
  int64_t stride;
  Choice* choices;  // [rows] of choice_size bytes
};

// A quantized weight in panels of sixteen outputs: w = scale * (code - zero), or scale * code + offset. `group` inputs share
// a scale, of `inputs` in all (k filled up with codes equal to zero's).
//   codes          int8 [n/16][inputs/4][16][4]; int4 [n/16][inputs/8][16][4], two to a byte
//   scales, zeros  [n/16][groups][16]; no zeros: 0 for int8, 8 for int4
//   floats         codes of 8 bits are e4m3 numbers; these and offsets have float activations only
struct Panels {
  const uint8_t* codes;
  Numbers scales;
  const int8_t* zeros;
  const float* offsets;
  int32_t bits, group, inputs, groups, floats, unused;
};

// Activations rounded to int8 by row and group: codes [rows] each `stride` bytes, zero from k to `inputs`; scales and sums
// of codes [rows][groups].
struct Rounded {
  int8_t* codes;
  float* scales;
  int32_t* sums;
  int32_t stride, groups;
};

// a[rows, k] rounded: scale = largest / 127 of each group, codes to the nearest, ties to even.
struct Quantize {
  const int32_t* rows;
  int32_t k, group;
  const float* a;
  int64_t a_stride;
  Rounded out;
};

// As Linear, of rounded activations, or of floats where `a` is given: then weights are widened.
struct QuantizedLinear {
  const int32_t* rows;
  int32_t n, k, act, gated;
  Panels w;
  Numbers bias;
  Rounded rounded;
  const float* a;
  int64_t a_stride;
  float* out;
  int64_t out_stride;
};

// As Embed, from a table in panels.
struct QuantizedEmbed {
  const Step* step;
  Panels table;
  Numbers places;
  int32_t width, offset;
  float scale;
  int32_t unused;
  float* out;
  int64_t out_stride;
};

// The top_k best of softmax(logits[row]) and their weights, best first; of equals the lower expert is the better.
struct Route {
  const int32_t* rows;
  int32_t experts, top_k, renormalise, unused;
  const float* logits;
  int64_t logits_stride;
  const float* bias;  // [experts] added to the probabilities for the choice alone; or null
  float* weights;     // [rows][top_k]
  int32_t* chosen;    // [rows][top_k]
};

// Each (row, choice) is dealt a place: group g's are first[g] to first[g+1]-1, in the order of their rows. A negative choice
// gets none.
struct Deal {
  const int32_t* rows;
  int32_t groups, choices;
  const int32_t* chosen;  // [rows][choices]
  int32_t* first;         // [groups + 1]
  int32_t* row;           // [places]
  int32_t* pair;          // [places] row * choices + choice; or null
  int32_t* places;        // [rows][choices] a row's places, rising, then -1; or null
};

// One of the matrices of Grouped: w [n, k], or [2n, k] when gated, fp32 or bf16; or in panels, where w is null. It reads a
// from column a_at on and writes out from column out_at on (floats alone). With n 0 it does nothing.
struct Matrix {
  const void* w;
  int64_t stride;
  int32_t n, k;
  Type type;
  float scale;
  int32_t a_at, out_at;
  Panels panels;
};

// Places first[g] to first[g+1]-1 go through each of matrices[g]: out[to] = act(a[from] . w), or out[to] += scale * act(a[from]
// . w). Where `a` is null, its rows are `rounded`.
struct Grouped {
  int32_t groups, act, gated, add;
  int32_t parts, unused;
  const Matrix* matrices;  // [groups][parts]
  const int32_t* first;    // [groups + 1]
  const int32_t* from;     // [places] the row of a; null: the place itself
  const int32_t* to;       // [places] the row of out; null: the place itself
  Rounded rounded;
  const float* a;
  int64_t a_stride;
  float* out;
  int64_t out_stride;
};

// out[row] = the sum over a row's places, in their order, of the pair's weight times y[place].
struct Combine {
  const int32_t* rows;
  int32_t choices, width;
  const int32_t *places, *pair;  // as Deal wrote them
  const float* weights;          // [rows][choices]
  const float* y;
  int64_t y_stride;
  float* out;
  int64_t out_stride;
};

// out = x + y / (1 + e^-gate), one gate for each row.
struct Gate {
  const int32_t* rows;
  int32_t width, unused;
  const float* gate;
  int64_t gate_stride;
  const float* x;
  int64_t x_stride;
  const float* y;
  int64_t y_stride;
  float* out;
  int64_t out_stride;
};

// The gradients of whole sequences' attention (step: first, start all 0); k and v as they were looked at, [tokens][kv_heads *
// dim] each, lse from the forward. Rows without gaps.
struct AttentionBackward {
  const Step* step;
  int32_t heads, kv_heads, dim, window;
  float scale, softcap;
  const float* slopes;
  const float *q, *k, *v, *out, *grad, *lse;
  float *dq, *dk, *dv;
  Sparse sparse;
  int32_t ahead, unused;
};

// One stage of a program: the function that does a thread's share of it, and its arguments.
struct Stage {
  void (*run)(const void*, Crew&);
  const void* args;
};

// Makes a stage known to the Python side under its struct's name, with the struct's size. Each stage's source has one.
#define TF_STAGE(Args)                                                                                          \
  extern "C" __attribute__((visibility("default"))) const int32_t tf_size_##Args = sizeof(Args);                \
  extern "C" __attribute__((visibility("default"))) void tf_run_##Args(const void* args, Crew& crew) {          \
    run(*static_cast<const Args*>(args), crew);                                                                 \
  }

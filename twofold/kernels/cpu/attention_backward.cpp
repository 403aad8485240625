// Gradients of attention over whole sequences, from the saved log-sum-exp, as FlashAttention does (Dao et al. 2022).
//
//   a piece of work: one kv head of one sequence      for each block of 128 keys, for each head of the group, for each
//                                                     tile of 64 queries that sees any of them:
//     s = q . keys       p = exp(s - lse)             dv += p^T . grad        ds = p * (dp - grad . out)
//     dp = grad . values                              dk += ds^T . q          dq += ds . keys
//
// Everything is added up in one order, so a run repeated has the same bits on any number of threads.
#include <numeric>
#include <vector>

#include "attention_tile.h"
#include "math.h"

namespace {

constexpr int QUERIES = 64;  // of a tile

// What a thread works in; rows are `stride` apart and zero past the head's size.
struct Bench {
  int64_t stride;
  float *q, *grad, *s, *dp, *dq;               // [QUERIES][stride or S_STRIDE]
  float *k, *dk, *dv;                          // [KEYS][stride]
  float *key_panels, *value_panels;            // [PANELS][dim][16]
  float delta[QUERIES], lse[QUERIES];

  Bench(const AttentionBackward& it, Crew& crew) {
    stride = divide_up(it.dim, LANES) * LANES + LANES;
    const int64_t tile = QUERIES * stride, block = KEYS * stride, panels = KEYS * int64_t(it.dim);
    q = crew.scratch->need<float>(3 * tile + 2 * QUERIES * S_STRIDE + 3 * block + 2 * panels);
    grad = q + tile, dq = grad + tile, s = dq + tile, dp = s + QUERIES * S_STRIDE;
    k = dp + QUERIES * S_STRIDE, dk = k + block, dv = dk + block;
    key_panels = dv + block, value_panels = key_panels + panels;
  }
};

// Lines of a product's inner dimension: those of [first, last) in some panels; `first` is a multiple of 16.
struct Range {
  int first, last;
  unsigned panels;
  bool idle(int panel, int wide) const { return !(panels >> panel & ((1u << wide) - 1)); }
};

// A tile of queries of one head against a block of keys; positions within the sequence.
struct Tile {
  int64_t query, key, length;  // the first ones, and how many the sequence has
  int queries, keys, head;
  unsigned there[QUERIES / PANEL] = {};  // of each sixteen queries, the panels of keys that their layout has

  Tile(const AttentionBackward& it, int64_t query, int64_t key, int64_t length, int head)
      : query(query), key(key), length(length), queries(int(std::min<int64_t>(QUERIES, length - query))),
        keys(int(std::min<int64_t>(KEYS, length - key))), head(head) {
    for (int i = 0; i * PANEL < queries; i++) {
      const uint8_t* layout = it.sparse.row(head, query + i * PANEL);
      there[i] = layout ? layout[key / KEYS] : ALL_PANELS;
    }
  }
  bool empty() const { return std::none_of(there, there + QUERIES / PANEL, [](unsigned panels) { return panels; }); }

  Reach reach(const AttentionBackward& it, int row) const { return {it.window, it.ahead, query + row, length}; }

  // Keys that any of the queries [from, to) sees.
  Range seen(const AttentionBackward& it, int from, int to) const {
    const int first = Sight(reach(it, from), nullptr, key).first / PANEL * PANEL;
    const int last = std::min(keys, Sight(reach(it, to - 1), nullptr, key).last);
    unsigned panels = 0;
    for (int i = from / PANEL; i * PANEL < to; i++) panels |= there[i];
    return {first, last, panels & panels_of(first, last)};
  }
  // Queries that see any of the keys [from, to).
  Range seeing(const AttentionBackward& it, int from, int to) const {
    const int64_t least = !it.ahead ? key + from : it.window ? key + from - it.window + 1 : 0;
    const int64_t first = std::clamp<int64_t>(least - query, 0, queries);
    unsigned panels = 0;
    for (int i = 0; i < QUERIES / PANEL; i++) panels |= (there[i] & panels_of(from, to) ? 1u : 0u) << i;
    return {int(first / PANEL * PANEL), queries, panels};
  }
};

// f(first, last) for tiles of like size.
template <class F>
void by_tiles(int rows, F f) {
  const int count = int(divide_up(rows, TILE));
  for (int t = 0; t < count; t++) f(rows * t / count, rows * (t + 1) / count);
}

void copy_rows(const float* from, int64_t from_stride, int rows, int width, float scale, float* to, int64_t stride) {
  for (int r = 0; r < rows; r++)
    for (int d = 0; d < width; d += LANES)
      store(to + r * stride + d, load(from + r * from_stride + d, width - d) * all(scale));
}

// Rows as panels of sixteen, zero past the last row.
void fill_panels(const float* rows, int64_t stride, int count, int dim, float* panels) {
  for (int p = 0; p * PANEL < count; p++)
    for (int d = 0; d < dim; d++)
      for (int lane = 0; lane < PANEL; lane++) {
        const int row = p * PANEL + lane;
        panels[(int64_t(p) * dim + d) * PANEL + lane] = row < count ? rows[row * stride + d] : 0.0f;
      }
}

// s[query][key] = rows . panels, of the keys that each tile of queries sees.
void products(const AttentionBackward& it, const Tile& tile, const float* rows, int64_t stride, const float* panels,
              float* s) {
  Ahead none;
  const int most = wide_for(std::min(TILE, tile.queries));
  for (int p = 0; p * PANEL < tile.keys;) {
    const int wide = (p + most) * PANEL <= tile.keys ? most : 1;
    const auto& score = wide == most ? score_tiles<float>.wide : score_tiles<float>.one;
    const float* panel[4];
    for (int i = 0; i < wide; i++) panel[i] = panels + (p + i) * int64_t(it.dim) * PANEL;
    by_tiles(tile.queries, [&](int first, int last) {
      const Range seen = tile.seen(it, first, last);
      if (seen.idle(p, wide)) return;
      const Scores job{rows + first * stride, stride, it.dim, s + first * S_STRIDE + p * PANEL, S_STRIDE};
      score[last - first - 1](job, panel, none);
    });
    p += wide;
  }
}

// Raw scores become weights p, and dp becomes ds; both are zero where a query sees nothing.
void soften_back(const AttentionBackward& it, const Tile& tile, Bench& on) {
  const float* slope = it.slopes ? it.slopes + tile.head : nullptr;
  const V16 cap = all(it.softcap), one = all(1.0f);
  for (int r = 0; r < tile.queries; r++) {
    const int64_t position = tile.query + r;
    const Sight sight(tile.reach(it, r), it.sparse.row(tile.head, position), tile.key);
    float *s = on.s + r * S_STRIDE, *dp = on.dp + r * S_STRIDE;
    for (int i = 0; i < KEYS; i += LANES) {
      if (!(sight.panels() >> i / LANES & 1)) {
        store(s + i, all(0.0f)), store(dp + i, all(0.0f));
        continue;
      }
      V16 x = load(s + i), turn = one;
      if (it.softcap != 0.0f) {
        const V16 bent = tanh(x / cap);
        x = cap * bent, turn = one - bent * bent;
      }
      x = biased(x, slope, tile.key + i - position, sight, i);
      const V16 p = exp(x - all(on.lse[r]));
      store(s + i, p);
      store(dp + i, p * (load(dp + i) - all(on.delta[r])) * turn);
    }
  }
}

// o[row][d] (+)= sum over `inner` lines of weight * line, for `rows` rows; `seen` says which lines a tile of rows needs.
template <class Seen>
void weigh(const float* weights, int64_t row_step, int64_t line_step, const float* lines, int64_t stride, int rows, int dim,
           bool add, float* o, Seen seen) {
  float ones[TILE];
  std::fill_n(ones, TILE, 1.0f);
  Ahead none;
  const float* page[PANELS];
  for (int i = 0; i < PANELS; i++) page[i] = lines + i * PANEL * stride;
  const int columns = int(divide_up(dim, LANES)), most = wide_for(std::min(TILE, rows));
  for (int c = 0; c < columns;) {
    const int wide = c + most <= columns ? most : 1;
    const auto& value = wide == most ? value_tiles.wide : value_tiles.one;
    int64_t at[4];
    for (int i = 0; i < wide; i++) at[i] = (c + i) * LANES;
    by_tiles(rows, [&](int first, int last) {
      const Range range = seen(first, last);
      value[last - first - 1]({weights + first * row_step, row_step, line_step, range.first, range.last, stride,
                               add ? ones : nullptr, ones, o + first * stride, stride, range.panels},
                              page, at, at, none);
    });
    c += wide;
  }
}

void read_tile(const AttentionBackward& it, const Tile& tile, int64_t token, Bench& on) {
  const int64_t width = int64_t(it.heads) * it.dim, at = token * width + int64_t(tile.head) * it.dim;
  copy_rows(it.q + at, width, tile.queries, it.dim, it.scale, on.q, on.stride);
  copy_rows(it.grad + at, width, tile.queries, it.dim, 1.0f, on.grad, on.stride);
  for (int r = 0; r < tile.queries; r++) {
    V16 sum = all(0.0f);
    for (int d = 0; d < it.dim; d += LANES)
      sum = fma(load(on.grad + r * on.stride + d), load(it.out + at + r * width + d, it.dim - d), sum);
    on.delta[r] = total(sum);
    on.lse[r] = it.lse[(token + r) * it.heads + tile.head];
  }
}

void do_tile(const AttentionBackward& it, const Tile& tile, int64_t token, Bench& on) {
  read_tile(it, tile, token, on);
  products(it, tile, on.q, on.stride, on.key_panels, on.s);
  products(it, tile, on.grad, on.stride, on.value_panels, on.dp);
  soften_back(it, tile, on);
  const auto seeing = [&](int first, int last) { return tile.seeing(it, first, last); };
  weigh(on.s, 1, S_STRIDE, on.grad, on.stride, tile.keys, it.dim, true, on.dv, seeing);
  weigh(on.dp, 1, S_STRIDE, on.q, on.stride, tile.keys, it.dim, true, on.dk, seeing);
  weigh(on.dp, S_STRIDE, 1, on.k, on.stride, tile.queries, it.dim, false, on.dq,
        [&](int first, int last) { return tile.seen(it, first, last); });
  const int64_t width = int64_t(it.heads) * it.dim;
  for (int r = 0; r < tile.queries; r++) {
    float* to = it.dq + (token + r) * width + int64_t(tile.head) * it.dim;
    for (int d = 0; d < it.dim; d += LANES)
      store(to + d, load(to + d, it.dim - d) + load(on.dq + r * on.stride + d) * all(it.scale), it.dim - d);
  }
}

void do_sequence(const AttentionBackward& it, int span, int kv_head, Bench& on) {
  const int64_t from = it.step->first[span], length = it.step->first[span + 1] - from, group = it.heads / it.kv_heads;
  const int64_t kv_width = int64_t(it.kv_heads) * it.dim, width = int64_t(it.heads) * it.dim;
  for (int64_t t = from; t < from + length; t++)
    std::fill_n(it.dq + t * width + kv_head * group * it.dim, group * it.dim, 0.0f);
  for (int64_t key = 0; key < length; key += KEYS) {
    const int keys = int(std::min<int64_t>(KEYS, length - key));
    const int64_t at = (from + key) * kv_width + int64_t(kv_head) * it.dim;
    copy_rows(it.k + at, kv_width, keys, it.dim, 1.0f, on.k, on.stride);
    fill_panels(it.k + at, kv_width, keys, it.dim, on.key_panels);
    fill_panels(it.v + at, kv_width, keys, it.dim, on.value_panels);
    std::fill_n(on.dk, KEYS * on.stride, 0.0f);
    std::fill_n(on.dv, KEYS * on.stride, 0.0f);
    for (int64_t g = 0; g < group; g++)
      for (int64_t query = it.ahead ? 0 : key; query < length; query += QUERIES) {
        if (it.ahead && it.window && query + QUERIES - 1 + it.window - 1 < key) continue;  // they do not see as far
        if (it.window && query - it.window + 1 >= key + keys) break;  // these and all later ones are past these keys
        const Tile tile(it, query, key, length, int(kv_head * group + g));
        if (!tile.empty()) do_tile(it, tile, from + query, on);
      }
    for (int r = 0; r < keys; r++)
      for (int d = 0; d < it.dim; d += LANES) {
        store(it.dk + at + r * kv_width + d, load(on.dk + r * on.stride + d), it.dim - d);
        store(it.dv + at + r * kv_width + d, load(on.dv + r * on.stride + d), it.dim - d);
      }
  }
}

}  // namespace

void run(const AttentionBackward& it, Crew& crew) {
  const Step& step = *it.step;
  if (!step.tokens) return;
  std::vector<int> longest(step.spans);  // first, so that the last pieces are small
  std::iota(longest.begin(), longest.end(), 0);
  const auto count = [&](int s) { return step.first[s + 1] - step.first[s]; };
  std::stable_sort(longest.begin(), longest.end(), [&](int a, int b) { return count(a) > count(b); });
  Bench on(it, crew);
  for (int64_t i; (i = crew.take()) < int64_t(step.spans) * it.kv_heads;)
    do_sequence(it, longest[i / it.kv_heads], int(i % it.kv_heads), on);
}

TF_STAGE(AttentionBackward)

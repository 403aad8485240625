// Which rows walk together, and how the work falls into pieces.
//
//   spans                  groups                                     pieces of a group
//   a ─ b ─ c ─ d          {a, b, c}: the first blocks of their       each kv head of each tile of rows; where pieces are
//   d' ...                 tables are the same blocks, so their       few and contexts long, each part of its blocks too
//                          rows walk over those together              (parts keep every block's result apart)
//
// Walking together over a shared prefix is what Hydragen (Juravsky et al. 2024) and FlashInfer's cascades (Ye et al.
// 2025) do; here it changes no bit, since a row's walk is its own. Splitting a long context is Flash-Decoding (Dao et
// al. 2023).
#pragma once
#include <algorithm>
#include <vector>

#include "attention_walk.h"

namespace {

constexpr int LEAST_PART = 4;          // blocks that are worth a part
constexpr int64_t ROOM = 4 << 20;      // floats that parts may take up together

struct Group {
  int first, count;         // spans of Plan::order
  int64_t shared;           // blocks of keys that all of them begin with
  int64_t rows, blocks;     // rows of a kv head; blocks of the longest walk
  int tiles, parts;
  int64_t piece, unit;      // numbers of its first piece and of its first (tile, kv head)
};

class Plan {
 public:
  std::vector<int32_t> order;
  std::vector<Group> groups;
  int64_t pieces;
  int most;  // rows of a tile

  void make(const Attention& it, int threads) {
    step_ = it.step, size_ = it.cache.size, window_ = it.window, group_ = it.heads / it.cache.kv_heads;
    order.clear(), groups.clear();
    for (int s = 0; s < step_->spans; s++)
      if (count(s)) order.push_back(s);
    share();
    cut(it.cache.kv_heads, threads);
    split(it, threads);
    number(it.cache.kv_heads);
  }

  // The first block of keys that a group's rows see anything of.
  int64_t oldest(const Group& group) const {
    if (!window_) return 0;
    int32_t start = step_->start[order[group.first]];
    for (int i = 1; i < group.count; i++) start = std::min(start, step_->start[order[group.first + i]]);
    return std::max<int64_t>(0, start - window_ + 1) / KEYS;
  }

  // Numbers of one block's result in a part: m and l of each row, then o.
  static int64_t record(int64_t rows, int64_t o_stride) { return 2 * divide_up(rows, LANES) * LANES + rows * o_stride; }

 private:
  const Step* step_;
  int64_t size_, window_, group_;
  std::vector<int64_t> alike_;  // [i] blocks that order[i] begins with like order[i - 1]

  int64_t count(int s) const { return step_->first[s + 1] - step_->first[s]; }
  int64_t end(int s) const { return step_->start[s] + count(s); }
  const int32_t* table(int s) const { return step_->table + int64_t(s) * step_->table_stride; }

  // Sequences that begin alike come to stand side by side; only blocks 0, 1, 2, 4 ... are looked at.
  bool before(int a, int b) const {
    for (int64_t block = 0;; block = std::max<int64_t>(1, 2 * block)) {
      const int64_t page = block * KEYS / size_;
      const int32_t x = block * KEYS < end(a) ? table(a)[page] : -1, y = block * KEYS < end(b) ? table(b)[page] : -1;
      if (x != y) return x < y;
      if (x < 0) return a < b;
    }
  }

  // Whole blocks of keys, older than all rows of both, that two sequences have in common.
  int64_t common(int a, int b) const {
    const int64_t blocks = std::min(step_->start[a], step_->start[b]) / KEYS, pages = divide_up(blocks * KEYS, size_);
    const int64_t same = std::mismatch(table(a), table(a) + pages, table(b)).first - table(a);
    return same * size_ / KEYS;
  }

  void share() {
    if (order.size() > 1) std::sort(order.begin(), order.end(), [this](int a, int b) { return before(a, b); });
    alike_.assign(order.size(), 0);
    for (size_t i = 1; i < order.size(); i++) alike_[i] = common(order[i - 1], order[i]);
    if (!order.empty()) group(0, int(order.size()));
  }

  // Blocks that need not be loaded again when [first, last) of the order is grouped as well as it can be.
  int64_t gain(int first, int last) const {
    if (last - first < 2) return 0;
    const int64_t least = *std::min_element(alike_.begin() + first + 1, alike_.begin() + last);
    return std::max(least * (last - first - 1), apart(first, last, least, [this](int a, int b) { return gain(a, b); }));
  }

  template <class F>
  int64_t apart(int first, int last, int64_t least, F f) const {  // cut wherever neighbours are least alike
    int64_t sum = 0;
    for (int from = first, i = first + 1; i <= last; i++)
      if (i == last || alike_[i] == least) sum += f(from, i), from = i;
    return sum;
  }

  void group(int first, int last) {
    const int64_t least = last - first < 2 ? 0 : *std::min_element(alike_.begin() + first + 1, alike_.begin() + last);
    if (last - first < 2 || (least && least * (last - first - 1) >= gain(first, last))) {
      Group made{first, last - first, least, 0, 0, 1, 1, 0, 0};
      for (int i = first; i < last; i++) {
        made.rows += count(order[i]) * group_;
        made.blocks = std::max(made.blocks, divide_up(end(order[i]), KEYS));
      }
      groups.push_back(made);
      return;
    }
    apart(first, last, least, [this](int a, int b) { return group(a, b), int64_t(0); });
  }

  // As many rows to a tile as there may be, but enough pieces for every thread.
  void cut(int kv_heads, int threads) {
    for (most = ROWS;; most /= 2) {
      int64_t tiles = 0;
      for (Group& group : groups) tiles += group.tiles = int(divide_up(group.rows, most));
      if (tiles * kv_heads >= 3 * threads || most / 2 < MANY - 1) return;
    }
  }

  void split(const Attention& it, int threads) {
    int64_t units = 0, need = 0;
    for (const Group& group : groups) units += int64_t(group.tiles) * it.cache.kv_heads;
    if (threads == 1 || units > Door::COUNTERS || units >= 3 * threads) return;
    for (Group& group : groups) {
      const int64_t blocks = group.blocks - oldest(group), rows = divide_up(group.rows, group.tiles);
      const int64_t room = group.tiles * it.cache.kv_heads * blocks * record(rows, divide_up(it.cache.dim, LANES) * LANES);
      const int64_t parts = std::min(divide_up(4 * threads, units), blocks / LEAST_PART);
      if (group.count > 1 || parts < 2 || need + room > ROOM) continue;
      group.parts = int(parts);
      need += room;
    }
  }

  // Dearest first, so that the last pieces are small ones.
  void number(int kv_heads) {
    const auto cost = [this](const Group& it) {
      return (it.blocks - oldest(it)) * divide_up(it.rows, it.tiles) / it.parts;
    };
    std::stable_sort(groups.begin(), groups.end(), [&](const Group& a, const Group& b) { return cost(a) > cost(b); });
    int64_t units = 0;
    pieces = 0;
    for (Group& group : groups) {
      group.piece = pieces, group.unit = units;
      units += int64_t(group.tiles) * kv_heads;
      pieces += int64_t(group.tiles) * kv_heads * group.parts;
    }
  }
};

}  // namespace

// Each query looks over its own sequence's cache; `attention_walk.h` says how, `attention_plan.h` who with whom.
//
//   a piece of work      rows of one kv head          rows are (query, head of the group), up to ROWS of them
//   together             rows of several sequences over the blocks that all of them begin with, then each its own
//   in parts             every block's (m, l, o) is kept apart; who finishes the last part folds them in order
//
// A row has the same bits in a chunk of any size, in any company, on any number of threads, with blocks of any size.
#include "attention_plan.h"

namespace {

// Memory that the parts of all threads share. Only one team runs at a time, and a crew of one never splits.
struct Shared {
  float* at = static_cast<float*>(std::aligned_alloc(64, ROOM * sizeof(float)));
};

// Some rows of the desk that belong to one sequence.
struct Run {
  int span, first, last;
};

struct Piece {
  const Group& group;
  int head, part;
  int64_t tile, unit;  // `unit` counts (tile, kv head) of all groups
};

Piece piece_of(const Plan& plan, const Cache& cache, int64_t number) {
  const auto after = [](int64_t n, const Group& group) { return n < group.piece; };
  const Group& group = *(std::upper_bound(plan.groups.begin(), plan.groups.end(), number, after) - 1);
  const int64_t here = number - group.piece, unit = here / group.parts;
  const int64_t tile = group.tiles - 1 - unit / cache.kv_heads;  // the last rows see the most keys
  return {group, int(unit % cache.kv_heads), int(here % group.parts), tile, group.unit + unit};
}

// Puts the rows of a piece on the desk; returns how many sequences they belong to.
int gather(const Attention& it, const Plan& plan, const Piece& piece, Desk& desk, Run* runs) {
  const Step& step = *it.step;
  const int64_t per_kv = it.heads / it.cache.kv_heads;
  const int64_t all = piece.group.rows, tiles = piece.group.tiles;
  const int64_t from = all * piece.tile / tiles, to = all * (piece.tile + 1) / tiles;
  int count = 0;
  int64_t base = 0;
  for (int i = 0; i < piece.group.count && base < to; i++) {
    const int32_t span = plan.order[piece.group.first + i];
    const int64_t rows = (step.first[span + 1] - step.first[span]) * per_kv;
    const int64_t length = step.start[span] + step.first[span + 1] - step.first[span];
    const int64_t first = std::max(from, base), last = std::min(to, base + rows);
    if (first < last) runs[count++] = {span, int(first - from), int(last - from)};
    for (int64_t r = first; r < last; r++) {
      const int64_t query = (r - base) / per_kv;
      const int32_t head = int32_t(piece.head * per_kv + (r - base) % per_kv), position = int32_t(step.start[span] + query);
      const Reach reach(it.window, it.ahead, position, length);
      desk.row[r - from] = {step.first[span] + query, head, position, it.sparse.row(head, position), reach};
    }
    base += rows;
  }
  return count;
}

int64_t oldest_block(const Desk& desk, const Run& run) { return desk.row[run.first].reach.from / KEYS; }

const int32_t* table_of(const Step& step, int span) { return step.table + int64_t(span) * step.table_stride; }

template <class T>
void together(const Attention& it, const Piece& piece, Desk& desk, const Run* runs, int count) {
  int64_t oldest = piece.group.blocks;
  for (int i = 0; i < count; i++) oldest = std::min(oldest, oldest_block(desk, runs[i]));
  const int64_t shared = piece.group.shared * KEYS;
  walk<T>(it, desk, piece.head, table_of(*it.step, runs[0].span), 0, runs[count - 1].last, oldest * KEYS, shared);
  for (int i = 0; i < count; i++) {
    const int64_t begin = std::max(shared, oldest_block(desk, runs[i]) * KEYS);
    walk<T>(it, desk, piece.head, table_of(*it.step, runs[i].span), runs[i].first, runs[i].last, begin,
            desk.row[runs[i].last - 1].reach.to);
  }
}

// Where the results of a unit's blocks are kept.
struct Records {
  int64_t rows, o_stride, blocks;
  float* at;

  Records(const Attention& it, const Plan& plan, const Piece& piece, float* room) {
    rows = divide_up(piece.group.rows, piece.group.tiles);
    o_stride = divide_up(it.cache.dim, LANES) * LANES;
    blocks = piece.group.blocks - plan.oldest(piece.group);
    at = room;
    for (const Group& group : plan.groups) {
      const int64_t units = group.unit < piece.group.unit ? int64_t(group.tiles) * it.cache.kv_heads : 0;
      const int64_t each = Plan::record(divide_up(group.rows, group.tiles), o_stride) * (group.blocks - plan.oldest(group));
      if (group.parts > 1) at += units * each;
    }
    at += (piece.unit - piece.group.unit) * blocks * Plan::record(rows, o_stride);
  }
  float* m(int64_t block) const { return at + block * Plan::record(rows, o_stride); }
  float* l(int64_t block) const { return m(block) + divide_up(rows, LANES) * LANES; }
  float* o(int64_t block) const { return l(block) + divide_up(rows, LANES) * LANES; }
};

thread_local std::vector<int64_t> starts;  // of the blocks that a piece's rows see

// One part of a unit; whoever finishes its last part folds the blocks in their order. Returns whether that was done.
template <class T>
bool in_parts(const Attention& it, const Plan& plan, const Piece& piece, Desk& desk, const Run& run, Crew& crew) {
  static const Shared shared;
  if (!shared.at) std::abort();
  const Records records(it, plan, piece, shared.at);
  const int64_t parts = piece.group.parts, end = desk.row[run.last - 1].reach.to;
  const View view(desk, 0, run.last);
  const Past past{piece.head, table_of(*it.step, run.span), end, view};
  starts.clear();
  for (int64_t at = plan.oldest(piece.group) * KEYS; (at = view.next(at, end)) < end; at += KEYS) starts.push_back(at);
  const int64_t seen = int64_t(starts.size()), last = seen * (piece.part + 1) / parts;
  starts.push_back(end);
  for (int64_t i = seen * piece.part / parts; i < last; i++) {
    see_block<T>(it, desk, past, 0, run.last, starts[i], starts[i + 1], {records.o(i), records.o_stride, true});
    std::copy_n(desk.m_block, run.last, records.m(i));
    std::copy_n(desk.l_block, run.last, records.l(i));
  }
  if (crew.door->done[piece.unit].fetch_add(1, std::memory_order_acq_rel) != parts - 1) return false;
  for (int64_t i = 0; i < seen; i++) {
    std::copy_n(records.m(i), run.last, desk.m_block);
    std::copy_n(records.l(i), run.last, desk.l_block);
    fold(desk, 0, run.last);
    for (int r = 0; r < run.last; r++)
      for (int64_t d = 0; d < records.o_stride; d += LANES) {
        float* o = desk.o + r * desk.o_stride + d;
        store(o, load(o) * all(desk.old[r]) + load(records.o(i) + r * records.o_stride + d) * all(desk.fresh[r]));
      }
  }
  return true;
}

template <class T>
void do_pieces(const Attention& it, const Plan& plan, Desk& desk, Crew& crew) {
  for (int64_t i; (i = crew.take()) < plan.pieces;) {
    const Piece piece = piece_of(plan, it.cache, i);
    Run runs[ROWS];
    const int count = gather(it, plan, piece, desk, runs), rows = runs[count - 1].last;
    sit_down(it, desk, rows);
    if (piece.group.parts == 1) together<T>(it, piece, desk, runs, count);
    else if (!in_parts<T>(it, plan, piece, desk, runs[0], crew)) continue;
    stand_up(it, desk, rows);
  }
}

thread_local Plan plan;
thread_local Desk desk;

}  // namespace

void run(const Attention& it, Crew& crew) {
  if (!it.step->tokens) return;
  plan.make(it, crew.threads);
  lay_out(it, crew, desk);
  switch (it.cache.type) {
    case Type::int8: return do_pieces<int8_t>(it, plan, desk, crew);
    case Type::fp8: return do_pieces<Fp8>(it, plan, desk, crew);
    case Type::bf16: return do_pieces<uint16_t>(it, plan, desk, crew);
    default: return do_pieces<float>(it, plan, desk, crew);
  }
}

TF_STAGE(Attention)

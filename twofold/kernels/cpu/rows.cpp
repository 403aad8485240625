// What is done to one row at a time: embedding, norms, sums, activations, gathering.
#include "math.h"
#include "normalise.h"
#include "rows.h"
#include "stages.h"

void run(const Embed& it, Crew& crew) {
  const Step& step = *it.step;
  by_rows(crew, step.tokens, it.width, [&](int64_t first, int64_t last) {
    for (int64_t t = first; t < last; t++)
      by_lanes(0, it.width, [&](int64_t i, int count) {
        V16 x = it.table.load16(int64_t(step.ids[t]) * it.width + i, count);
        if (it.scale != 1.0f) x = x * all(it.scale);
        if (it.places) x = x + it.places.load16(int64_t(step.positions[t] + it.offset) * it.width + i, count);
        if (it.kinds) x = x + it.kinds.load16(int64_t(step.kinds ? step.kinds[t] : 0) * it.width + i, count);
        store(it.out + t * it.out_stride + i, x, count);
      });
  });
}

void run(const Norm& it, Crew& crew) {
  const int64_t rows = *it.rows;
  by_rows(crew, rows * it.groups, it.width, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; i++) {
      const int64_t row = i / it.groups, at = (i % it.groups) * it.width;
      float* x = it.x + row * it.x_stride + at;
      if (it.y)
        by_lanes(0, it.width, [&](int64_t j, int count) {
          V16 y = load(it.y + row * it.y_stride + at + j, count);
          if (it.scale != 1.0f) y = y * all(it.scale);
          store(x + j, load(x + j, count) + y, count);
        });
      normalise(it.kind, x, it.width, it.eps, it.offset, it.weight, it.bias, it.per_group ? at : 0,
                it.out + row * it.out_stride + at);
    }
  });
}

void run(const Add& it, Crew& crew) {
  by_parts(crew, *it.rows, it.width, [&](int64_t row, int64_t from, int64_t to) {
    by_lanes(from, to, [&](int64_t i, int count) {
      V16 y = load(it.y + row * it.y_stride + i, count);
      if (it.z) y = y + load(it.z + row * it.z_stride + i, count);
      if (it.scale != 1.0f) y = y * all(it.scale);
      float* x = it.x + row * it.x_stride + i;
      store(x, load(x, count) + y, count);
    });
  });
}

void run(const Pointwise& it, Crew& crew) {
  const Act act = Act(it.act);
  by_parts(crew, *it.rows, it.width, [&](int64_t row, int64_t from, int64_t to) {
    const float* in = it.x + row * it.x_stride;
    by_lanes(from, to, [&](int64_t i, int count) {
      V16 x = load(in + i, count);
      if (it.clip != 0.0f) x = min(all(it.clip), max(all(-it.clip), x));
      if (it.multiplier != 0.0f) x = x * all(it.multiplier);
      if (it.softcap != 0.0f) x = all(it.softcap) * tanh(x / all(it.softcap));
      x = activation(x, act);
      if (it.gated) x = x * load(in + it.width + i, count);
      store(it.out + row * it.out_stride + i, x, count);
    });
  });
}

void run(const Gather& it, Crew& crew) {
  by_rows(crew, *it.rows, it.width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++)
      std::memcpy(it.out + r * it.out_stride, it.in + (*it.index)[r] * it.in_stride, sizeof(float) * it.width);
  });
}

void run(const Reorder& it, Crew& crew) {
  by_rows(crew, *it.rows, it.width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const float* from = it.in + r * it.in_stride;
      for (int i = 0; i < it.width; i++) it.out[r * it.out_stride + i] = from[it.order[i]];
    }
  });
}

// Of finite numbers x - x is zero, and of others it is not a number.
void run(const Finite& it, Crew& crew) {
  by_rows(crew, *it.rows, it.width, [&](int64_t first, int64_t last) {
    for (int64_t r = first; r < last; r++) {
      const float* x = it.x + r * it.x_stride;
      V16 sum = all(0.0f);
      by_lanes(0, it.width, [&](int64_t i, int count) { sum = sum + (load(x + i, count) - load(x + i, count)); });
      it.out[r] = total(sum) == 0.0f;
    }
  });
}

TF_STAGE(Embed)
TF_STAGE(Norm)
TF_STAGE(Add)
TF_STAGE(Pointwise)
TF_STAGE(Gather)
TF_STAGE(Reorder)
TF_STAGE(Finite)

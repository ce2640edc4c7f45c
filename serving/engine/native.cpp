// A step of a LLaMA decoder on a CPU with AVX-512 BF16 or AVX2: tokens of many requests in, fp32 logits out.
// products.h has the products and says how weights, cache and activations are kept. serving/engine/native.py
// compiles this file and describes its structs; no pointer that is read may be null.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "products.h"

namespace {

constexpr long BLOCK = 32; // tokens of a block of the cache

struct Layer {
  const uint16_t *attention_norm, *mlp_norm;       // [hidden]
  const uint16_t *q_norm, *k_norm;                 // [head_dim]; null: the model has none
  const uint32_t *qkv, *out, *gate_up, *down;      // panels
  uint32_t *keys;                                  // [blocks, kv_heads, head_dim/2, BLOCK]
  uint32_t *values;                                // [blocks, kv_heads, BLOCK/2, head_dim]
};

struct Model {
  long num_layers, hidden, heads, kv_heads, head_dim, ffn, vocab;
  float eps;
  const uint16_t *embedding, *norm;
  const uint32_t* head;
  const float *cosines, *sines;  // [positions, head_dim/2]
  const Layer* layers;
};

struct Span {  // rows of one request, at consecutive positions
  int first_row, num_rows, first_position;
  int first_block;  // where its blocks begin in Step.blocks
};

struct Step {
  long num_rows, num_kept, num_spans, num_outputs, threads;
  const int *tokens, *outputs, *blocks;
  const Span* spans;
  const Span* kept;  // of each span the last rows, whose logits may be asked for: as rows of the kept ones; or none
  Activation *x, *normed, *qkv, *mixed, *inner;  // [rows, hidden], the same, [rows, q + 2 kv], [rows, q], [rows, ffn]
  float* logits;                                 // [outputs, vocab]
};

// As an activation holds it.
Vec kept(Vec x) {
  if constexpr (PARTS == 1) return as_bf16(x);
  return x;
}

uint16_t bf16(uint16_t x) { return x; }
uint16_t bf16(float x) { return rounded(x); }
void keep(float x, uint16_t* to) { *to = rounded(x); }
void keep(float x, float* to) { *to = x; }

void copy(const uint16_t* from, uint16_t* to, long size) { std::memcpy(to, from, 2 * size); }
void copy(const uint16_t* from, float* to, long size) {
  for (long i = 0; i < size; i++) to[i] = widen(from[i]);
}

struct Columns {  // [first, stop) of a matrix; `first` begins a panel
  long first, stop;
};

// Columns of out [rows, outputs] = x [rows, inputs] · weightᵀ, plus what is in `out` if `add`.
void linear(const Activation* x, long num_rows, long inputs, const uint32_t* panels, Columns columns, long outputs,
            Activation* out, bool add) {
#pragma omp for schedule(static)
  for (long column = columns.first; column < columns.stop; column += PANEL)
    linear_panel(x, num_rows, inputs, panels + column * inputs / 2, out + column, outputs, [&](auto* to, Vec* sums) {
      for (long v = 0, left = columns.stop - column; v < VECTORS; v++, left -= WIDTH) {
        Vec sum = add ? kept(sums[v]) + load(to + v * WIDTH, left) : sums[v];
        store(to + v * WIDTH, sum, left);
      }
    });
}

// logits [rows, vocab], fp32 and not rounded.
void logits(const Activation* x, long num_rows, long inputs, const uint32_t* panels, long vocab, float* out) {
#pragma omp for schedule(static)
  for (long column = 0; column < vocab; column += PANEL)
    linear_panel(x, num_rows, inputs, panels + column * inputs / 2, out + column, vocab, [&](auto* to, Vec* sums) {
      for (long v = 0; v < VECTORS; v++) store(to + v * WIDTH, sums[v], vocab - column - v * WIDTH);
    });
}

// out [rows, ffn] = silu(gate) · up; a panel holds columns of gate in its first half, the same of up in its second.
void gated(const Activation* x, long num_rows, long inputs, const uint32_t* panels, long ffn, Activation* out) {
  constexpr long half = VECTORS / 2;
#pragma omp for schedule(static)
  for (long column = 0; column < ffn; column += half * WIDTH)
    linear_panel(x, num_rows, inputs, panels + column * inputs, out + column, ffn, [&](auto* to, Vec* sums) {
      for (long v = 0; v < half; v++) {
        Vec gate = kept(sums[v]), up = kept(sums[v + half]);
        Vec below = spread(1.0f) + exponential(zeros() - gate);
        store(to + v * WIDTH, kept(gate / below) * up, ffn - column - v * WIDTH);
      }
    });
}

// RMSNorm of one row.
void norm(const Activation* x, const uint16_t* weight, long size, float eps, Activation* out) {
  Vec squares = zeros();
  for (long i = 0; i < size; i += WIDTH) {
    Vec value = load(x + i, size - i);
    squares = multiply_add(value, value, squares);
  }
  Vec scale = spread(1.0f / std::sqrt(sum_of(squares) / size + eps));
  for (long i = 0; i < size; i += WIDTH) {
    Vec normed = kept(load(x + i, size - i) * scale);
    store(out + i, normed * load(weight + i, size - i), size - i);
  }
}

void norms(const Activation* x, const uint16_t* weight, long num_rows, long size, float eps, Activation* out) {
#pragma omp for schedule(static)
  for (long row = 0; row < num_rows; row++) norm(x + row * size, weight, size, eps, out + row * size);
}

void rotate(Activation* head, const float* cosines, const float* sines, long half) {
  for (long i = 0; i < half; i++) {
    float a = widen(head[i]), b = widen(head[i + half]);
    keep(a * cosines[i] - b * sines[i], &head[i]);
    keep(b * cosines[i] + a * sines[i], &head[i + half]);
  }
}

// Normalises, if the model does, and rotates heads [first, stop) of a row of qkv, in place: queries, then keys.
void place(const Model& m, const Layer& layer, Activation* qkv, long position, long first, long stop) {
  long half = m.head_dim / 2;
  for (long h = first; h < stop; h++) {
    Activation* head = qkv + h * m.head_dim;
    if (layer.q_norm) norm(head, h < m.heads ? layer.q_norm : layer.k_norm, m.head_dim, m.eps, head);
    rotate(head, m.cosines + position * half, m.sines + position * half, half);
  }
}

// Calls visit(row, span, position) for each row of the spans.
template <class Visit>
void for_rows(const Span* spans, long num_rows, Visit visit) {
#pragma omp for schedule(static)
  for (long row = 0; row < num_rows; row++) {
    const Span* span = spans;
    while (row >= span->first_row + span->num_rows) span++;
    visit(row, *span, span->first_position + row - span->first_row);
  }
}

// Places keys, and queries if asked to; puts keys and values into the cache.
void remember(const Model& m, const Layer& layer, const Step& s, bool queries) {
  long half = m.head_dim / 2, width = (m.heads + 2 * m.kv_heads) * m.head_dim;
  for_rows(s.spans, s.num_rows, [&](long row, const Span& span, long position) {
    long token = position % BLOCK, block = s.blocks[span.first_block + position / BLOCK];
    Activation* qkv = s.qkv + row * width;
    place(m, layer, qkv, position, queries ? 0 : m.heads, m.heads + m.kv_heads);
    for (long h = 0; h < m.kv_heads; h++) {
      const Activation* key = qkv + (m.heads + h) * m.head_dim;
      uint32_t* keys = layer.keys + (block * m.kv_heads + h) * half * BLOCK + token;
      for (long i = 0; i < half; i++) keys[i * BLOCK] = bf16(key[2 * i]) | uint32_t(bf16(key[2 * i + 1])) << 16;
      const Activation* value = qkv + (m.heads + m.kv_heads + h) * m.head_dim;
      uint16_t* values = (uint16_t*)(layer.values + ((block * m.kv_heads + h) * BLOCK + token) / 2 * m.head_dim);
      for (long i = 0; i < m.head_dim; i++) values[2 * i + token % 2] = bf16(value[i]);
      // The other half of the newest pair may hold what an earlier request left there, NaN too.
      if (token % 2 == 0 && row + 1 == span.first_row + span.num_rows)
        for (long i = 0; i < m.head_dim; i++) values[2 * i + 1] = 0;
    }
  });
}

// softmax(scale · scores[0 .. length)) as bf16, zero from there to `padded`. All three may be read to `padded`.
void softmax(float* scores, long length, long padded, float scale, Activation* chances) {
  Vec largest = spread(-INFINITY), total = zeros();
  for (long i = 0; i < length; i += WIDTH) largest = larger(largest, load(scores + i), length - i);
  Vec shift = spread(largest_of(largest));
  for (long i = 0; i < length; i += WIDTH) {
    Vec chance = first(exponential((load(scores + i) - shift) * spread(scale)), length - i);
    total = total + chance;
    store(scores + i, chance);
  }
  Vec by = spread(1.0f / sum_of(total));
  for (long i = 0; i < padded; i += WIDTH) store(chances + i, first(load(scores + i) * by, length - i), WIDTH);
}

struct Scratch {
  std::vector<float> scores;
  std::vector<Activation> chances;
};

// sums[0 .. num_rows) = 0.
void clear(Vec (&sums)[ROWS][VECTORS], long num_rows) {
  for (long i = 0; i < num_rows; i++)
    for (auto& sum : sums[i]) sum = zeros();
}

// Up to ROWS pairs (row, query head) of one span, all with the key/value head `kv`: [first, first + count).
void attend(const Model& m, const Layer& layer, const Step& s, const Span& span, long kv, long first, long count,
            Scratch& scratch) {
  long group = m.heads / m.kv_heads, c = m.head_dim, half = c / 2;
  long longest = span.first_position + (first + count - 1) / group + 1;
  long blocks = (longest + BLOCK - 1) / BLOCK, padded = blocks * BLOCK;
  scratch.scores.resize(std::max<size_t>(scratch.scores.size(), ROWS * padded));
  scratch.chances.resize(std::max<size_t>(scratch.chances.size(), ROWS * padded));
  float* scores = scratch.scores.data();
  Activation* chances = scratch.chances.data();
  const int* table = s.blocks + span.first_block;
  auto row = [&](long i) { return span.first_row + (first + i) / group; };
  auto head = [&](long i) { return kv * group + (first + i) % group; };

  const Activation* queries[ROWS];
  for (long i = 0; i < count; i++)
    queries[i] = s.qkv + row(i) * (m.heads + 2 * m.kv_heads) * c + head(i) * c;
  Vec sums[ROWS][VECTORS];
  for (long b = 0; b < blocks; b++) {
    clear(sums, count);
    const uint32_t* keys = layer.keys + (table[b] * m.kv_heads + kv) * half * BLOCK;
    accumulate<BLOCK / WIDTH>(count, sums, queries, keys, BLOCK, STRIP * WIDTH, half);
    for (long i = 0; i < count; i++)
      for (int v = 0; v < BLOCK / WIDTH; v++) store(scores + i * padded + b * BLOCK + v * WIDTH, sums[i][v]);
  }
  for (long i = 0; i < count; i++)
    softmax(scores + i * padded, span.first_position + (first + i) / group + 1, padded, 1.0f / std::sqrt((float)c),
            chances + i * padded);

  long columns = c % PANEL ? 16 : PANEL;  // at a time
  for (long column = 0; column < c; column += columns) {
    clear(sums, count);
    for (long b = 0; b < blocks; b++) {
      const Activation* rows[ROWS];
      for (long i = 0; i < count; i++) rows[i] = chances + i * padded + b * BLOCK;
      const uint32_t* values = layer.values + (table[b] * m.kv_heads + kv) * BLOCK / 2 * c + column;
      long pairs = (std::min(BLOCK, longest - b * BLOCK) + 1) / 2;  // what lies beyond may be anything, NaN too
      if (columns == PANEL)
        accumulate<VECTORS>(count, sums, rows, values, c, STRIP * WIDTH, pairs);
      else
        accumulate<16 / WIDTH>(count, sums, rows, values, c, STRIP * WIDTH, pairs);
    }
    for (long i = 0; i < count; i++)
      for (long v = 0; v < columns / WIDTH; v++)
        store(s.mixed + (row(i) * m.heads + head(i)) * c + column + v * WIDTH, sums[i][v], WIDTH);
  }
}

struct Task {
  int span, kv, first, count;
};

std::vector<Task> attention_tasks(const Model& m, const Span* spans, long num_spans) {
  std::vector<Task> tasks;
  for (int i = 0; i < num_spans; i++) {
    long pairs = spans[i].num_rows * (m.heads / m.kv_heads), tiles = (pairs + ROWS - 1) / ROWS;
    for (int kv = 0; kv < m.kv_heads; kv++)
      for (long t = 0; t < tiles; t++) {
        long first = cut(pairs, tiles, t);
        tasks.push_back({i, kv, (int)first, (int)(cut(pairs, tiles, t + 1) - first)});
      }
  }
  return tasks;
}

// Moves the kept rows of `x` and `normed` to the front.
void keep_rows(const Model& m, const Step& s) {
#pragma omp single
  for (long i = 0; i < s.num_spans; i++) {
    const Span &from = s.spans[i], &to = s.kept[i];
    long first = from.first_row + from.num_rows - to.num_rows;
    for (Activation* rows : {s.x, s.normed})
      std::memmove(rows + to.first_row * m.hidden, rows + first * m.hidden,
                   to.num_rows * m.hidden * sizeof(Activation));
  }
}

// Queries, keys and values of `normed`, in the cache and in `qkv`. If some rows are not kept (in the last layer), they
// have to leave nothing but keys and values: the kept ones then move to the front, and they alone get queries.
void project(const Model& m, const Layer& layer, const Step& s, bool all_kept) {
  long q = m.heads * m.head_dim, width = q + 2 * m.kv_heads * m.head_dim;
  Columns columns{all_kept ? 0 : q / PANEL * PANEL, width};
  linear(s.normed, s.num_rows, m.hidden, layer.qkv, columns, width, s.qkv, false);
  remember(m, layer, s, all_kept);
  if (all_kept) return;
  keep_rows(m, s);
  linear(s.normed, s.num_kept, m.hidden, layer.qkv, {0, q}, width, s.qkv, false);
  for_rows(s.kept, s.num_kept, [&](long row, const Span&, long position) {
    place(m, layer, s.qkv + row * width, position, 0, m.heads);
  });
}

// Of the rows `outputs` of the kept ones, when `x` holds what the last layer left.
void output_logits(const Model& m, const Step& s) {
#pragma omp for schedule(static)
  for (long i = 0; i < s.num_outputs; i++)
    norm(s.x + s.outputs[i] * m.hidden, m.norm, m.hidden, m.eps, s.normed + i * m.hidden);
  logits(s.normed, s.num_outputs, m.hidden, m.head, m.vocab, s.logits);
}

void forward(const Model& m, const Step& s, const std::vector<Task>& tasks, const std::vector<Task>& kept_tasks) {
  Scratch scratch;
  long q = m.heads * m.head_dim, num_rows = s.num_rows;
#pragma omp for schedule(static)
  for (long row = 0; row < num_rows; row++)
    copy(m.embedding + s.tokens[row] * m.hidden, s.x + row * m.hidden, m.hidden);
  for (long l = 0; l < m.num_layers; l++) {
    const Layer& layer = m.layers[l];
    bool last = l + 1 == m.num_layers;
    norms(s.x, layer.attention_norm, num_rows, m.hidden, m.eps, s.normed);
    project(m, layer, s, !last || s.num_kept == num_rows);
    if (last) num_rows = s.num_kept;
    const Span* spans = last ? s.kept : s.spans;
    const std::vector<Task>& now = last ? kept_tasks : tasks;
#pragma omp for schedule(dynamic, 4)
    for (size_t t = 0; t < now.size(); t++)
      attend(m, layer, s, spans[now[t].span], now[t].kv, now[t].first, now[t].count, scratch);
    linear(s.mixed, num_rows, q, layer.out, {0, m.hidden}, m.hidden, s.x, true);
    norms(s.x, layer.mlp_norm, num_rows, m.hidden, m.eps, s.normed);
    gated(s.normed, num_rows, m.hidden, layer.gate_up, m.ffn, s.inner);
    linear(s.inner, num_rows, m.ffn, layer.down, {0, m.hidden}, m.hidden, s.x, true);
  }
  output_logits(m, s);
}

}  // namespace

extern "C" void decoder_step(const Model* model, const Step* step) {
  std::vector<Task> tasks = attention_tasks(*model, step->spans, step->num_spans);
  std::vector<Task> kept_tasks = attention_tasks(*model, step->kept, step->num_spans);
#pragma omp parallel num_threads(step->threads)
  forward(*model, *step, tasks, kept_tasks);
}

// Logits of further kept rows of the step that ran last: `outputs`, `x`, `normed`, `logits` and two counts are read.
extern "C" void decoder_logits(const Model* model, const Step* step) {
#pragma omp parallel num_threads(step->threads)
  output_logits(*model, *step);
}

// What the caller must know to lay out weights and activations.
extern "C" long panel_rows() { return PANEL; }
extern "C" long activation_bytes() { return sizeof(Activation); }

// weight [rows, columns] -> panels of panel_rows() rows, zeros beyond the last; `columns` is even. A panel is made
// of strips, a strip of pairs.
extern "C" void pack_panels(const uint16_t* weight, long rows, long columns, uint32_t* panels) {
  constexpr long strip = STRIP * WIDTH;
  const uint32_t* from = (const uint32_t*)weight;
  long pairs = columns / 2;
  for (long first = 0; first < (rows + PANEL - 1) / PANEL * PANEL; first += strip)
    for (long kk = 0; kk < pairs; kk++)
      for (long row = first; row < first + strip; row++)
        *panels++ = row < rows ? from[row * pairs + kk] : 0;
}

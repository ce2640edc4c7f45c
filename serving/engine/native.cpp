// A step of a LLaMA decoder on a CPU with AVX-512 BF16 or AVX2: tokens of many requests in, fp32 logits out.
// cluster/machine/simd.h has the vectors of both tiers; where the CPU has AMX, linear layers are multiplied by its tiles.
//
// Weights and cache are bf16, kept as panels of pairs: panel[kk][column] holds elements 2kk and 2kk + 1 of a
// column. One kernel, `accumulate`, does every product: the linear layers, queries by keys (a block of the cache is
// a panel of 32 keys), and chances by values (pairs of tokens). Sums are fp32. With AVX-512, activations are bf16,
// rounded where transformers rounds them. With AVX2 they are fp32 and never rounded: products read a single
// element of a row at a time, and only what many columns share is worth storing in half the bytes.
//
// Where it counts: one row reads each weight once and is bound by memory; many rows are bound by the multipliers.
// serving/engine/native.py compiles this file and describes its structs; no pointer that is read may be null.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace {

using Activation = std::conditional_t<PARTS == 1, uint16_t, float>;

constexpr long VECTORS = 4;              // of a panel of weights
constexpr long PANEL = VECTORS * WIDTH;  // its columns
constexpr long STRIP = REGISTERS == 32 ? 4 : 2;  // vectors of a panel that lie together, to be read in one go
constexpr long BLOCK = 32;               // tokens of a block of the cache
constexpr long ROWS = 6;                 // rows that share a load of a panel
constexpr long SUMS = REGISTERS == 32 ? 24 : 12;  // vectors of sums that are computed together

// Columns of a panel whose elements are kept as Scalars, so that a product has nothing to widen. AVX-512 has none.
template <class Column>
constexpr bool WIDENED = PARTS == 2 && std::is_same_v<Column, Scalar>;
constexpr long WIDENED_ROWS = 64;  // from so many rows on it pays to widen a panel once for all of them

struct Layer {
  const uint16_t *attention_norm, *mlp_norm;       // [hidden]
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
  const int *tokens, *positions, *outputs, *blocks;
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

// e^x to 2e-7 relative (Cephes' polynomial); 0 far below.
Vec exponential(Vec x) {
  x = larger(x, spread(-87.0f));
  Vec n = nearest(x * spread(1.44269504f));
  x = subtract_product(x, n, spread(0.693359375f));
  x = subtract_product(x, n, spread(-2.12194440e-4f));
  Vec y = spread(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = multiply_add(y, x, spread(c));
  y = multiply_add(y, x * x, x) + spread(1.0f);
  return times_power(y, n);
}

// sums[r][v] += rows[r] · panel over `pairs` pairs, for Z vectors of columns from v on. A pair is `stride` behind the
// one before it, a strip of vectors `next_strip` behind the one before it.
// Not inlined, or GCC runs out of registers. Of 3 rows by 4 vectors AVX2 has some on the stack all the same, which
// is still faster than two times 3 by 2: too few sums to hide the latency of adding to one.
template <int R, int Z, class Column>
__attribute__((noinline)) void accumulate_some(Vec (&sums)[ROWS][VECTORS], const Activation* const* rows,
                                               const Column* panel, long stride, long next_strip, long pairs,
                                               int v) {
  Vec total[R][Z];  // a copy, which the compiler keeps in registers
  const Scalar* row[R];
#pragma GCC unroll 6
  for (int r = 0; r < R; r++) {
    row[r] = (const Scalar*)rows[r];
#pragma GCC unroll 4
    for (int z = 0; z < Z; z++) total[r][z] = sums[r][v + z];
  }
  panel += v / STRIP * next_strip + v % STRIP * WIDTH;
  long next_panel = VECTORS / STRIP * next_strip;  // of weights: the memory works while this one is multiplied
  auto at = [&](int z) { return z / STRIP * next_strip + z % STRIP * WIDTH; };
  for (long place = 0; place < pairs * PARTS; place += PARTS, panel += stride) {
    asm("" : "+r"(place));  // one index for all rows: GCC would count up a pointer to each
#pragma GCC unroll 4
    for (int z = 0; !WIDENED<Column> && z < Z; z += 64 / (4 * WIDTH))
      _mm_prefetch((const char*)(panel + next_panel + at(z)), _MM_HINT_T1);
#pragma GCC unroll 2
    for (long part = 0; part < PARTS; part++) {
      // Kept in registers is what there is less of: elements of rows, or columns.
      Operand elements[R], columns[Z];
      auto element = [&](int r) { return broadcast(row[r] + place + part); };
      auto column = [&](int z) {
        if constexpr (WIDENED<Column>) return load_operand(panel + part * STRIP * WIDTH + at(z));
        else return load_operand(panel + at(z), part);
      };
      if constexpr (R < Z) {
#pragma GCC unroll 4
        for (int r = 0; r < R; r++) elements[r] = element(r);
#pragma GCC unroll 4
        for (int z = 0; z < Z; z++) {
          columns[z] = column(z);
#pragma GCC unroll 4
          for (int r = 0; r < R; r++) total[r][z] = add_product(total[r][z], elements[r], columns[z]);
        }
      } else {
#pragma GCC unroll 4
        for (int z = 0; z < Z; z++) columns[z] = column(z);
#pragma GCC unroll 6
        for (int r = 0; r < R; r++) {
          elements[r] = element(r);
#pragma GCC unroll 4
          for (int z = 0; z < Z; z++) total[r][z] = add_product(total[r][z], elements[r], columns[z]);
        }
      }
    }
  }
#pragma GCC unroll 6
  for (int r = 0; r < R; r++)
#pragma GCC unroll 4
    for (int z = 0; z < Z; z++) sums[r][v + z] = total[r][z];
}

// The same for V vectors, as many at a time as there are registers for.
template <int R, int V, class Column>
inline void accumulate(Vec (&sums)[ROWS][VECTORS], const Activation* const* rows, const Column* panel, long stride,
                       long next_strip, long pairs) {
  constexpr int Z = R * V > SUMS ? V / 2 : V;
  for (int v = 0; v < V; v += Z) accumulate_some<R, Z>(sums, rows, panel, stride, next_strip, pairs, v);
}

template <int V, class Column>
void accumulate(long num_rows, Vec (&sums)[ROWS][VECTORS], const Activation* const* rows, const Column* panel,
                long stride, long next_strip, long pairs) {
  switch (num_rows) {
    case 1: return accumulate<1, V>(sums, rows, panel, stride, next_strip, pairs);
    case 2: return accumulate<2, V>(sums, rows, panel, stride, next_strip, pairs);
    case 3: return accumulate<3, V>(sums, rows, panel, stride, next_strip, pairs);
    case 4: return accumulate<4, V>(sums, rows, panel, stride, next_strip, pairs);
    case 5: return accumulate<5, V>(sums, rows, panel, stride, next_strip, pairs);
    default: return accumulate<6, V>(sums, rows, panel, stride, next_strip, pairs);
  }
}

// The n-th part of `total` cut into `parts` that differ by at most one.
long cut(long total, long parts, long n) { return total * n / parts; }

#ifdef __AMX_BF16__

constexpr long TILE = 16;  // rows of a tile; a row holds 16 pairs, or 16 sums

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0 to 3 hold sums of `count` rows, 16 columns each; 4 holds pairs of the rows, 5 and 6 those of columns.
void configure_tiles(long count) {
  TileConfig config;
  for (int tile = 0; tile < 7; tile++) {
    config.row_bytes[tile] = 64;
    config.rows[tile] = tile < 5 ? count : TILE;
  }
  _tile_loadconfig(&config);
}

// sums [count, PANEL] = x [count, inputs] · panel; `inputs` is a multiple of 32.
void multiply_tiles(const uint16_t* x, long inputs, const uint32_t* panel, float* sums) {
  asm volatile("" ::: "memory");  // the intrinsics do not tell the compiler which memory they use
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (long pair = 0; pair < inputs / 2; pair += TILE) {
    const uint32_t* columns = panel + pair * PANEL;
    _tile_loadd(4, x + 2 * pair, 2 * inputs);
    _tile_loadd(5, columns, 4 * PANEL);
    _tile_dpbf16ps(0, 4, 5);
    _tile_loadd(6, columns + 16, 4 * PANEL);
    _tile_dpbf16ps(1, 4, 6);
    _tile_loadd(5, columns + 32, 4 * PANEL);
    _tile_dpbf16ps(2, 4, 5);
    _tile_loadd(6, columns + 48, 4 * PANEL);
    _tile_dpbf16ps(3, 4, 6);
  }
  _tile_stored(0, sums, 4 * PANEL);
  _tile_stored(1, sums + 16, 4 * PANEL);
  _tile_stored(2, sums + 32, 4 * PANEL);
  _tile_stored(3, sums + 48, 4 * PANEL);
  asm volatile("" ::: "memory");
}

// As `linear_panel`, by tiles. For one row too: a row's sums must not depend on how many others there are.
template <class Finish>
void linear_panel_by_tiles(const uint16_t* x, long num_rows, long inputs, const uint32_t* panel, Finish finish) {
  static_assert(PANEL == 4 * TILE && STRIP == VECTORS);
  alignas(64) float results[TILE * PANEL];
  long tiles = (num_rows + TILE - 1) / TILE, configured = 0;
  for (long tile = 0; tile < tiles; tile++) {
    long first = cut(num_rows, tiles, tile), count = cut(num_rows, tiles, tile + 1) - first;
    if (count != configured) configure_tiles(configured = count);
    multiply_tiles(x + first * inputs, inputs, panel, results);
    for (long r = 0; r < count; r++) {
      Vec sums[VECTORS];
      for (long v = 0; v < VECTORS; v++) sums[v] = load(results + r * PANEL + v * WIDTH);
      finish(first + r, sums);
    }
  }
  _tile_release();
}

#endif

#ifndef __AVX512BF16__

// The elements of a panel, in their order: of each pair the first elements of its strip, then the second ones.
const Scalar* widened(const uint32_t* panel, long inputs) {
  static thread_local std::vector<Scalar> elements;
  elements.resize(PANEL * inputs + 16);
  Scalar* aligned = elements.data() + (-(uintptr_t)elements.data() % 64) / sizeof(Scalar);  // to a line of the cache
  Scalar* to = aligned;
  for (long place = 0; place < PANEL * inputs / PARTS; place += STRIP * WIDTH)
    for (long part = 0; part < PARTS; part++)
      for (long v = 0; v < STRIP; v++, to += WIDTH)
        store(to, load_operand(panel + place + v * WIDTH, part));
  return aligned;
}

#endif

// One panel of a linear layer for every row; `finish(row, sums)` takes the columns of a row.
template <class Column, class Finish>
void linear_panel_by_rows(const Activation* x, long num_rows, long inputs, const Column* panel, Finish finish) {
  constexpr long stride = STRIP * WIDTH * (WIDENED<Column> ? PARTS : 1);
  long tiles = (num_rows + ROWS - 1) / ROWS;
  for (long tile = 0; tile < tiles; tile++) {
    long first = cut(num_rows, tiles, tile), count = cut(num_rows, tiles, tile + 1) - first;
    const Activation* rows[ROWS];
    Vec sums[ROWS][VECTORS];
    for (long r = 0; r < count; r++) {
      rows[r] = x + (first + r) * inputs;
      for (auto& sum : sums[r]) sum = zeros();
    }
    accumulate<VECTORS>(count, sums, rows, panel, stride, stride * inputs / 2, inputs / 2);
    for (long r = 0; r < count; r++) finish(first + r, sums[r]);
  }
}

// The same by what multiplies fastest.
template <class Finish>
void linear_panel(const Activation* x, long num_rows, long inputs, const uint32_t* panel, Finish finish) {
#ifdef __AMX_BF16__
  if (inputs % (2 * TILE) == 0) return linear_panel_by_tiles(x, num_rows, inputs, panel, finish);
#endif
#ifndef __AVX512BF16__
  if (num_rows >= WIDENED_ROWS) return linear_panel_by_rows(x, num_rows, inputs, widened(panel, inputs), finish);
#endif
  linear_panel_by_rows(x, num_rows, inputs, panel, finish);
}

// out [rows, outputs] = x [rows, inputs] · weightᵀ, plus what is in `out` if `add`.
void linear(const Activation* x, long num_rows, long inputs, const uint32_t* panels, long outputs, Activation* out,
            bool add) {
#pragma omp for schedule(static)
  for (long p = 0; p < (outputs + PANEL - 1) / PANEL; p++)
    linear_panel(x, num_rows, inputs, panels + p * PANEL * inputs / 2, [&](long row, Vec* sums) {
      for (int v = 0; v < VECTORS; v++) {
        long column = p * PANEL + v * WIDTH;
        Activation* to = out + row * outputs + column;
        Vec sum = add ? kept(sums[v]) + load(to, outputs - column) : sums[v];
        store(to, sum, outputs - column);
      }
    });
}

// logits [rows, vocab], fp32 and not rounded.
void logits(const Activation* x, long num_rows, long inputs, const uint32_t* panels, long vocab, float* out) {
#pragma omp for schedule(static)
  for (long p = 0; p < (vocab + PANEL - 1) / PANEL; p++)
    linear_panel(x, num_rows, inputs, panels + p * PANEL * inputs / 2, [&](long row, Vec* sums) {
      for (int v = 0; v < VECTORS; v++) {
        long column = p * PANEL + v * WIDTH;
        store(out + row * vocab + column, sums[v], vocab - column);
      }
    });
}

// out [rows, ffn] = silu(gate) · up; a panel holds columns of gate in its first half, the same of up in its second.
void gated(const Activation* x, long num_rows, long inputs, const uint32_t* panels, long ffn, Activation* out) {
  constexpr long half = VECTORS / 2;
#pragma omp for schedule(static)
  for (long p = 0; p < (ffn + half * WIDTH - 1) / (half * WIDTH); p++)
    linear_panel(x, num_rows, inputs, panels + p * PANEL * inputs / 2, [&](long row, Vec* sums) {
      for (int v = 0; v < half; v++) {
        Vec gate = kept(sums[v]), up = kept(sums[v + half]);
        Vec below = spread(1.0f) + exponential(zeros() - gate);
        long column = (p * half + v) * WIDTH;
        store(out + row * ffn + column, kept(gate / below) * up, ffn - column);
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

// Rotates queries in place and puts rotated keys, and values, into the cache.
void remember(const Model& m, const Layer& layer, const Step& s) {
  long half = m.head_dim / 2, width = (m.heads + 2 * m.kv_heads) * m.head_dim;
#pragma omp for schedule(static)
  for (long row = 0; row < s.num_rows; row++) {
    const Span* span = s.spans;
    while (row >= span->first_row + span->num_rows) span++;
    long position = s.positions[row], token = position % BLOCK;
    long block = s.blocks[span->first_block + position / BLOCK];
    const float *cosines = m.cosines + position * half, *sines = m.sines + position * half;
    Activation* qkv = s.qkv + row * width;
    for (long h = 0; h < m.heads + m.kv_heads; h++) rotate(qkv + h * m.head_dim, cosines, sines, half);
    for (long h = 0; h < m.kv_heads; h++) {
      const Activation* key = qkv + (m.heads + h) * m.head_dim;
      uint32_t* keys = layer.keys + (block * m.kv_heads + h) * half * BLOCK + token;
      for (long i = 0; i < half; i++) keys[i * BLOCK] = bf16(key[2 * i]) | uint32_t(bf16(key[2 * i + 1])) << 16;
      const Activation* value = qkv + (m.heads + m.kv_heads + h) * m.head_dim;
      uint16_t* values = (uint16_t*)(layer.values + ((block * m.kv_heads + h) * BLOCK + token) / 2 * m.head_dim);
      for (long i = 0; i < m.head_dim; i++) values[2 * i + token % 2] = bf16(value[i]);
      // The other half of the newest pair may hold what an earlier request left there, NaN too.
      if (token % 2 == 0 && row + 1 == span->first_row + span->num_rows)
        for (long i = 0; i < m.head_dim; i++) values[2 * i + 1] = 0;
    }
  }
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

// Moves the kept rows of `x` and `qkv` to the front.
void keep_rows(const Model& m, const Step& s) {
  long width = (m.heads + 2 * m.kv_heads) * m.head_dim;
#pragma omp single
  for (long i = 0; i < s.num_spans; i++) {
    const Span &from = s.spans[i], &to = s.kept[i];
    long first = from.first_row + from.num_rows - to.num_rows;
    std::memmove(s.x + to.first_row * m.hidden, s.x + first * m.hidden, to.num_rows * m.hidden * sizeof(Activation));
    std::memmove(s.qkv + to.first_row * width, s.qkv + first * width, to.num_rows * width * sizeof(Activation));
  }
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
  long q = m.heads * m.head_dim, width = q + 2 * m.kv_heads * m.head_dim, num_rows = s.num_rows;
#pragma omp for schedule(static)
  for (long row = 0; row < num_rows; row++)
    copy(m.embedding + s.tokens[row] * m.hidden, s.x + row * m.hidden, m.hidden);
  for (long l = 0; l < m.num_layers; l++) {
    const Layer& layer = m.layers[l];
    norms(s.x, layer.attention_norm, num_rows, m.hidden, m.eps, s.normed);
    linear(s.normed, num_rows, m.hidden, layer.qkv, width, s.qkv, false);
    remember(m, layer, s);
    bool last = l + 1 == m.num_layers;  // of the other rows it has to leave nothing but keys and values
    if (last && s.num_kept < num_rows) keep_rows(m, s);
    if (last) num_rows = s.num_kept;
    const Span* spans = last ? s.kept : s.spans;
    const std::vector<Task>& now = last ? kept_tasks : tasks;
#pragma omp for schedule(dynamic, 4)
    for (size_t t = 0; t < now.size(); t++)
      attend(m, layer, s, spans[now[t].span], now[t].kv, now[t].first, now[t].count, scratch);
    linear(s.mixed, num_rows, q, layer.out, m.hidden, s.x, true);
    norms(s.x, layer.mlp_norm, num_rows, m.hidden, m.eps, s.normed);
    gated(s.normed, num_rows, m.hidden, layer.gate_up, m.ffn, s.inner);
    linear(s.inner, num_rows, m.ffn, layer.down, m.hidden, s.x, true);
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

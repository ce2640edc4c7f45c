// Products of a decoder step (native.cpp): rows of activations by panels of weights or of the cache.
//
// Weights and cache are bf16, kept as panels of pairs: panel[kk][column] holds elements 2kk and 2kk + 1 of a
// column. One kernel, `accumulate`, does every product: the linear layers, queries by keys (a block of the cache is
// a panel of 32 keys), and chances by values (pairs of tokens). Where the CPU has AMX, its tiles do the linear layers.
// Sums are fp32. With AVX-512, activations are bf16, rounded where transformers rounds them. With AVX2 they are fp32
// and never rounded: to broadcast an fp32 element costs nothing, and a bf16 one would have to be widened (simd.h).
//
// Where it counts: one row reads each weight once and is bound by memory; many rows are bound by the multipliers.
// A row's sums are the same to the bit, however many rows there are.

#pragma once

#include <cstdint>
#include <type_traits>
#include <vector>

#include "simd.h"

namespace {

using Activation = std::conditional_t<PARTS == 1, uint16_t, float>;

constexpr long VECTORS = 4;              // of a panel of weights
constexpr long PANEL = VECTORS * WIDTH;  // its columns
constexpr long STRIP = REGISTERS == 32 ? 4 : 2;  // vectors of a panel that lie together, to be read in one go
constexpr long ROWS = 6;                 // rows that share a load of a panel
constexpr long SUMS = REGISTERS == 32 ? 24 : 12;  // vectors of sums that are computed together

// Columns of a panel whose elements are kept as Scalars, so that a product has nothing to widen. AVX-512 has none.
template <class Column>
constexpr bool WIDENED = PARTS == 2 && std::is_same_v<Column, Scalar>;
constexpr long WIDENED_ROWS = 64;  // from so many rows on it pays to widen a panel once for all of them
constexpr long SLAB = 256;         // pairs of a strip that are widened at once, to 32 KB

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

// As `linear_panel_by_rows`, by tiles. For one row too: a row's sums must not depend on how many others there are.
template <class Out, class Finish>
void linear_panel_by_tiles(const uint16_t* x, long num_rows, long inputs, const uint32_t* panel, Out* out, long width,
                           Finish finish) {
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
      finish(out + (first + r) * width, sums);
    }
  }
  _tile_release();
}

#endif

// One panel of a linear layer for every row; `finish(to, sums)` takes the columns of a row, to out[row * width].
template <class Out, class Finish>
void linear_panel_by_rows(const Activation* x, long num_rows, long inputs, const uint32_t* panel, Out* out, long width,
                          Finish finish) {
  constexpr long stride = STRIP * WIDTH;
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
    for (long r = 0; r < count; r++) finish(out + (first + r) * width, sums[r]);
  }
}

#ifndef __AVX512BF16__

// The elements of `depth` pairs of a strip: of each pair the first elements, then the second ones.
void widen_strip(const uint32_t* pairs, long depth, Scalar* to) {
  for (long k = 0; k < depth; k++, pairs += STRIP * WIDTH)
    for (long part = 0; part < PARTS; part++)
      for (long v = 0; v < STRIP; v++, to += WIDTH) store(to, load_operand(pairs + v * WIDTH, part));
}

// The same for many rows: a slab of SLAB pairs of a strip is widened once for all of them, and stays in the innermost
// cache. Meanwhile the next one comes from memory, and so do the places that `finish` writes.
template <class Out, class Finish>
void linear_panel_by_slabs(const Activation* x, long num_rows, long inputs, const uint32_t* panel, Out* out,
                           long width, Finish finish) {
  constexpr long stride = STRIP * WIDTH, line = 64 / sizeof(uint32_t);
  static thread_local std::vector<Vec> totals;  // [rows, VECTORS]
  totals.resize(num_rows * VECTORS);
  alignas(64) Scalar slab[SLAB * stride * PARTS];
  long tiles = (num_rows + ROWS - 1) / ROWS, pairs = inputs / 2, slabs = (pairs + SLAB - 1) / SLAB;
  for (long part = 0; part < VECTORS / STRIP * slabs; part++) {
    long strip = part / slabs, start = cut(pairs, slabs, part % slabs);
    long depth = cut(pairs, slabs, part % slabs + 1) - start, lines = depth * stride / line;
    const uint32_t *columns = panel + (strip * pairs + start) * stride, *next = columns + depth * stride;
    widen_strip(columns, depth, slab);
    for (long tile = 0; tile < tiles; tile++) {
      for (long l = cut(lines, tiles, tile); l < cut(lines, tiles, tile + 1); l++)
        _mm_prefetch((const char*)(next + l * line), _MM_HINT_T1);
      long first = cut(num_rows, tiles, tile), count = cut(num_rows, tiles, tile + 1) - first;
      auto& sums = (Vec(&)[ROWS][VECTORS])totals[first * VECTORS + strip * STRIP];
      const Activation* rows[ROWS];
      for (long r = 0; r < count; r++) {
        rows[r] = x + (first + r) * inputs + 2 * start;
        for (long v = 0; start == 0 && v < STRIP; v++) sums[r][v] = zeros();
        if (start + depth == pairs)
          _mm_prefetch((const char*)(out + (first + r) * width + strip * stride), _MM_HINT_T1);
      }
      accumulate<STRIP>(count, sums, rows, (const Scalar*)slab, stride * PARTS, 0, depth);
    }
  }
  for (long row = 0; row < num_rows; row++) finish(out + row * width, &totals[row * VECTORS]);
}

#endif

// The same by what multiplies fastest.
template <class Out, class Finish>
void linear_panel(const Activation* x, long num_rows, long inputs, const uint32_t* panel, Out* out, long width,
                  Finish finish) {
#ifdef __AMX_BF16__
  if (inputs % (2 * TILE) == 0) return linear_panel_by_tiles(x, num_rows, inputs, panel, out, width, finish);
#endif
#ifndef __AVX512BF16__
  if (num_rows >= WIDENED_ROWS) return linear_panel_by_slabs(x, num_rows, inputs, panel, out, width, finish);
#endif
  linear_panel_by_rows(x, num_rows, inputs, panel, out, width, finish);
}

}  // namespace

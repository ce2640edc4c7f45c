// Products of matrices in tiles, from panels, in both tiers of simd.h.
//
// A matrix lies in panels of 32 rows, padded with zeros: panel[kk][part][row] are the elements 2kk and 2kk + 1 of
// a row. C = A·Bᵀ is computed in tiles of 32 x 32, each from a panel of A and one of B. The next product reads a
// tile as one block of a panel: of its rows, or of its columns.

#pragma once

#include "simd.h"

#include <type_traits>

namespace {

constexpr long PANEL = 32;  // rows of a panel and of a tile
constexpr long PAIRS = 16;  // of a row of a tile
constexpr long KEPT = PAIRS * PARTS;  // Scalars of a row of a tile
constexpr long SUMS = REGISTERS == 32 ? 16 : 12;  // vectors of sums that are computed together
constexpr long DEPTH = REGISTERS == 32 ? 1L << 40 : 64;  // pairs that are multiplied before the next columns
constexpr bool PREFETCH = REGISTERS != 32;  // the next pairs and the results' places, into the second cache
constexpr bool ROUNDED = !std::is_same_v<Scalar, float>;  // whether a Scalar holds less than a sum

long panels_of(long n) { return (n + PANEL - 1) / PANEL; }

struct Panels {  // of a matrix [panels·32, pairs·2]
  Scalar* data;
  long panels, pairs;
  Scalar* at(long panel, long pair) const { return data + (panel * pairs + pair) * PARTS * PANEL; }
};

struct Tile {
  alignas(64) float sums[PANEL][PANEL];
  alignas(64) Scalar rounded[ROUNDED ? PANEL : 1][KEPT];
  const Scalar* kept(long row) const { return ROUNDED ? rounded[row] : (const Scalar*)sums[row]; }
};

// So that tile.kept are its sums.
void keep(Tile& tile) {
  for (long i = 0; ROUNDED && i < PANEL; i++)
    for (long j = 0; j < KEPT; j += WIDTH) store_scalars(tile.rounded[i] + j, tile.sums[i] + j * PANEL / KEPT);
}

// out <- the rows of the tile, as one block of a panel.
void store_rows(const Tile& tile, Scalar* out) {
  for (long row = 0; row < PANEL; row += WIDTH)
    for (long j = 0; j < KEPT; j += WIDTH) {
      Words r[WIDTH];
      for (long i = 0; i < WIDTH; i++) r[i] = load_words(tile.kept(row + i) + j);
      transpose(r);
      for (long i = 0; i < WIDTH; i++) store_words(out + (j + i) * PANEL + row, r[i]);
    }
}

// The same of its columns.
void store_columns(const Tile& tile, Scalar* out) {
  for (long i = 0; i < PAIRS; i++)
    store_pairs<PANEL>(tile.kept(2 * i), tile.kept(2 * i + 1), out + i * PARTS * PANEL);
}

// A block of tile.sums = rows of a · rows of b: `rows` of them from `row` on, `vectors` of columns from `column` on.
// `more`: added to what is there.
template <long rows, long vectors>
void multiply_block(const Scalar* a, const Scalar* b, long pairs, bool more, long row, long column, Tile& tile) {
  Vec total[rows][vectors];
#pragma GCC unroll 16
  for (long i = 0; i < rows; i++)
    for (long v = 0; v < vectors; v++)
      total[i][v] = more ? load(tile.sums[row + i] + column + v * WIDTH) : zeros();
  // The next pairs of b and of a, fetched by the blocks of rows 6 and 12, whose own operands are cached by then.
  const Scalar* next = (row == 6 ? b : a) + pairs * PARTS * PANEL + column;
  const bool fetch = PREFETCH && (row == 6 || row == 12);
  for (long k = 0; k < pairs * PARTS; k++) {
    if (fetch) _mm_prefetch((const char*)(next + k * PANEL), _MM_HINT_T1);
    Operand right[vectors];
    for (long v = 0; v < vectors; v++) right[v] = load_operand(b + k * PANEL + column + v * WIDTH);
#pragma GCC unroll 16
    for (long i = 0; i < rows; i++) {
      Operand left = broadcast(a + k * PANEL + row + i);
      total[i][0] = add_product(total[i][0], left, right[0]);
      if constexpr (vectors == 2) total[i][1] = add_product(total[i][1], left, right[1]);
    }
  }
#pragma GCC unroll 16
  for (long i = 0; i < rows; i++)
    for (long v = 0; v < vectors; v++) store(tile.sums[row + i] + column + v * WIDTH, total[i][v]);
}

// Rows [row, row + rows) of tile.sums = rows of a · rows of b, their first `width` columns.
template <long rows, long width>
void multiply_rows(const Scalar* a, const Scalar* b, long pairs, bool more, long row, Tile& tile) {
  constexpr long vectors = std::min(width / WIDTH, 2L);
  constexpr long blocks = (rows * vectors + SUMS - 1) / SUMS, now = (rows + blocks - 1) / blocks;
  for (long column = 0; column < width; column += vectors * WIDTH)
    multiply_block<now, vectors>(a, b, pairs, more, row, column, tile);
  if constexpr (now < rows) multiply_rows<rows - now, width>(a, b, pairs, more, row + now, tile);
}

// Calls body(a, b, pairs, more) for as many pairs at a time as stay in the innermost cache.
template <class Body>
void by_depth(const Scalar* a, const Scalar* b, long pairs, Body body) {
  for (long kk = 0; kk < pairs; kk += DEPTH)
    body(a + kk * PARTS * PANEL, b + kk * PARTS * PANEL, std::min(DEPTH, pairs - kk), kk > 0);
}

// tile.sums = rows of a · rows of b; with `more` added to what is there.
void multiply_tile(const Scalar* a, const Scalar* b, long pairs, Tile& tile, bool more = false) {
  by_depth(a, b, pairs, [&](const Scalar* a, const Scalar* b, long pairs, bool later) {
    multiply_rows<PANEL, PANEL>(a, b, pairs, more || later, 0, tile);
  });
}

}  // namespace

// The optimizer step on a CPU with AVX-512 BF16: orthogonalisation, and the two passes over a shard (at the end of
// this file). optim/native.py compiles it and says why where it cannot.
//
// Newton-Schulz takes a batch of matrices in one call, one of them at a time on each thread, so that what an
// iteration computes is in the cache when the next one reads it. optim/polar.py has the same iteration in torch.
// Here Y [n, m], n <= m, is the matrix or its transpose. Products are bf16 with sums in fp32, rounded once; half
// of a symmetric one is computed. aY in the standard form and aI in the Gram form are added before the rounding:
// what torch's bf16 tensors round twice.
//
// Matrices are kept as panels of 32 rows, padded with zeros: panel[kk][row] is the pair of elements 2kk and
// 2kk + 1 of a row, which is what one lane of vdpbf16ps multiplies. C = A·Bᵀ is computed in tiles of 32 x 32,
// from a panel of A and one of B, and rounded straight into the panels that the next product reads.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

constexpr long PANEL = 32;  // rows of a panel and of a tile
constexpr long PAIRS = 16;  // of a row of a tile
constexpr long HALF = 16;   // columns of a tile that a vector of sums holds
constexpr long SUMS = 16;   // vectors of sums that are computed together: half of the registers

long panels_of(long n) { return (n + PANEL - 1) / PANEL; }

struct Panels {  // of a matrix [panels·32, pairs·2]
  uint32_t* data;
  long panels, pairs;
  uint32_t* at(long panel, long pair) const { return data + (panel * pairs + pair) * PANEL; }
};

struct Tile {
  alignas(64) float sums[PANEL][PANEL];
  alignas(64) uint16_t rounded[PANEL][PANEL];
};

__m512 widen(__m256i words) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16)); }

// r[i][j] -> r[j][i], 16 x 16 values of 32 bits.
void transpose(__m512i r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Pairs lo[i], hi[i] of words, i from 0 to 31, in two vectors of 16 pairs.
void interleave(__m512i lo, __m512i hi, __m512i* first, __m512i* second) {
  alignas(64) static const uint16_t ORDER[64] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  *first = _mm512_permutex2var_epi16(lo, _mm512_load_si512(ORDER), hi);
  *second = _mm512_permutex2var_epi16(lo, _mm512_load_si512(ORDER + 32), hi);
}

// out <- the rows of the tile, as one block of a panel.
void store_rows(const Tile& tile, uint32_t* out) {
  for (long half = 0; half < PANEL; half += 16) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(tile.rounded[half + i]);
    transpose(r);
    for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * PANEL + half, r[i]);
  }
}

// The same of its columns.
void store_columns(const Tile& tile, uint32_t* out) {
  for (long i = 0; i < PAIRS; i++) {
    __m512i first, second;
    interleave(_mm512_load_si512(tile.rounded[2 * i]), _mm512_load_si512(tile.rounded[2 * i + 1]), &first, &second);
    _mm512_storeu_si512(out + i * PANEL, first);
    _mm512_storeu_si512(out + i * PANEL + 16, second);
  }
}

// Some rows of tile.sums = rows of a · rows of b, in their left half or in both.
template <long halves>
void multiply_rows(const uint32_t* a, const uint32_t* b, long pairs, long first, Tile& tile) {
  constexpr long rows = SUMS / halves;
  __m512 total[rows][halves];
#pragma GCC unroll 16
  for (long i = 0; i < rows; i++)
    for (long half = 0; half < halves; half++) total[i][half] = _mm512_setzero_ps();
  for (long kk = 0; kk < pairs; kk++) {
    __m512bh columns[halves];
    for (long half = 0; half < halves; half++)
      columns[half] = (__m512bh)_mm512_loadu_si512(b + kk * PANEL + half * HALF);
#pragma GCC unroll 16
    for (long i = 0; i < rows; i++) {
      __m512bh pair = (__m512bh)_mm512_set1_epi32(a[kk * PANEL + first + i]);
      total[i][0] = _mm512_dpbf16_ps(total[i][0], pair, columns[0]);
      if constexpr (halves == 2) total[i][1] = _mm512_dpbf16_ps(total[i][1], pair, columns[1]);
    }
  }
#pragma GCC unroll 16
  for (long i = 0; i < rows; i++)
    for (long half = 0; half < halves; half++) _mm512_store_ps(tile.sums[first + i] + half * HALF, total[i][half]);
}

// tile.sums = rows of a · rows of b.
void multiply(const uint32_t* a, const uint32_t* b, long pairs, Tile& tile) {
  for (long first = 0; first < PANEL; first += SUMS / 2) multiply_rows<2>(a, b, pairs, first, tile);
}

// The same on the diagonal of a symmetric product: three quarters of it, and one from its mirror image.
void multiply_diagonal(const uint32_t* a, const uint32_t* b, long pairs, Tile& tile) {
  multiply_rows<1>(a, b, pairs, 0, tile);
  for (long first = HALF; first < PANEL; first += SUMS / 2) multiply_rows<2>(a, b, pairs, first, tile);
  __m512i r[HALF];
  for (long i = 0; i < HALF; i++) r[i] = _mm512_load_si512(tile.sums[HALF + i]);
  transpose(r);
  for (long i = 0; i < HALF; i++) _mm512_store_si512(tile.sums[i] + HALF, r[i]);
}

// tile.sums = alpha·sums + beta·(the tile whose columns are this block of a panel).
void add(Tile& tile, float alpha, const uint32_t* columns, float beta) {
  __m512 scale = _mm512_set1_ps(alpha), factor = _mm512_set1_ps(beta);
  for (long i = 0; i < PANEL; i++)
    for (long half = 0; half < PANEL; half += 16) {
      __m512i pair = _mm512_loadu_si512(columns + i / 2 * PANEL + half);
      __m512i word = i % 2 ? _mm512_and_si512(pair, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(pair, 16);
      __m512 sum = _mm512_mul_ps(_mm512_load_ps(tile.sums[i] + half), scale);
      _mm512_store_ps(tile.sums[i] + half, _mm512_fmadd_ps(_mm512_castsi512_ps(word), factor, sum));
    }
}

void round(Tile& tile) {
  for (long i = 0; i < PANEL; i++) {
    __m512 low = _mm512_load_ps(tile.sums[i]), high = _mm512_load_ps(tile.sums[i] + 16);
    _mm512_store_si512(tile.rounded[i], (__m512i)_mm512_cvtne2ps_pbh(high, low));
  }
}

// out = A·Bᵀ and what `more` makes of a tile of it, known to be symmetric.
template <class More>
void symmetric(const Panels& a, const Panels& b, const Panels& out, More more) {
  Tile tile;
  for (long row = 0; row < a.panels; row++)
    for (long col = 0; col <= row; col++) {
      (row == col ? multiply_diagonal : multiply)(a.at(row, 0), b.at(col, 0), a.pairs, tile);
      more(tile, row, col);
      round(tile);
      if (row == col && a.data != b.data)  // else it is symmetric as it is
        for (long i = 0; i < PANEL; i++)
          for (long j = 0; j < i; j++) tile.rounded[j][i] = tile.rounded[i][j];
      store_columns(tile, out.at(col, row * PAIRS));
      if (row != col) store_rows(tile, out.at(row, col * PAIRS));
    }
}

void symmetric(const Panels& a, const Panels& b, const Panels& out) {
  symmetric(a, b, out, [](Tile&, long, long) {});
}

// out = aI + bG + cG² for symmetric G [n, n].
void polynomial(const Panels& gram, const Panels& out, long n, float a, float b, float c) {
  symmetric(gram, gram, out, [&](Tile& tile, long row, long col) {
    add(tile, c, gram.at(col, row * PAIRS), b);
    for (long i = 0; row == col && i < std::min(PANEL, n - row * PANEL); i++) tile.sums[i][i] += a;
  });
}

// out = A·Bᵀ, all of it.
void full(const Panels& a, const Panels& b, const Panels& out) {
  Tile tile;
  for (long row = 0; row < a.panels; row++)
    for (long col = 0; col < b.panels; col++) {
      multiply(a.at(row, 0), b.at(col, 0), a.pairs, tile);
      round(tile);
      store_rows(tile, out.at(row, col * PAIRS));
    }
}

struct Matrix {  // element (row, col) of Y [n, m] is at data[row·row_stride + col·col_stride]; one stride is 1
  uint16_t* data;
  long n, m, row_stride, col_stride;
};

// The tile at panels (row, col) of Y, to memory.
void store(const Tile& tile, const Matrix& y, long row, long col) {
  long rows = std::min(PANEL, y.n - row * PANEL), cols = std::min(PANEL, y.m - col * PANEL);
  uint16_t* out = y.data + row * PANEL * y.row_stride + col * PANEL * y.col_stride;
  if (y.col_stride == 1) {
    __mmask32 inside = cols == PANEL ? ~0u : (1u << cols) - 1;
    for (long i = 0; i < rows; i++)
      _mm512_mask_storeu_epi16(out + i * y.row_stride, inside, _mm512_load_si512(tile.rounded[i]));
    return;
  }
  __mmask32 inside = rows == PANEL ? ~0u : (1u << rows) - 1;
  alignas(64) uint32_t columns[PAIRS][PANEL];
  store_columns(tile, columns[0]);
  for (long half = 0; half < PANEL; half += 16) {
    __m512i r[16];
    for (int i = 0; i < 16; i++) r[i] = _mm512_load_si512(columns[i] + half);
    transpose(r);
    for (long j = 0; j < std::min(16L, cols - half); j++)
      _mm512_mask_storeu_epi16(out + (half + j) * y.col_stride, inside, r[j]);
  }
}

// factor·Y, from memory, in panels of its rows and of its columns.
void load(const Matrix& y, float factor, const Panels& by_rows, const Panels& by_columns) {
  Tile tile;
  __m512 scale = _mm512_set1_ps(factor);
  for (long row = 0; row < by_rows.panels; row++)
    for (long col = 0; col < by_columns.panels; col++) {
      long rows = std::min(PANEL, y.n - row * PANEL), cols = std::min(PANEL, y.m - col * PANEL);
      const uint16_t* x = y.data + row * PANEL * y.row_stride + col * PANEL * y.col_stride;
      // Along the stride of 1: rows of Y, or of its transpose, for which the panels change places.
      bool straight = y.col_stride == 1;
      long lines = straight ? rows : cols, length = straight ? cols : rows;
      long stride = straight ? y.row_stride : y.col_stride;
      __mmask32 inside = length == PANEL ? ~0u : (1u << length) - 1;
      for (long i = 0; i < PANEL; i++) {
        __m512i words = i < lines ? _mm512_maskz_loadu_epi16(inside, x + i * stride) : _mm512_setzero_si512();
        __m512 low = _mm512_mul_ps(widen(_mm512_castsi512_si256(words)), scale);
        __m512 high = _mm512_mul_ps(widen(_mm512_extracti64x4_epi64(words, 1)), scale);
        _mm512_store_si512(tile.rounded[i], (__m512i)_mm512_cvtne2ps_pbh(high, low));
      }
      uint32_t *to_rows = by_rows.at(row, col * PAIRS), *to_columns = by_columns.at(col, row * PAIRS);
      store_rows(tile, straight ? to_rows : to_columns);
      store_columns(tile, straight ? to_columns : to_rows);
    }
}

// Y of one matrix, and what its iterations need: space that a thread keeps for all of its matrices.
class Iteration {
 public:
  explicit Iteration(long n, long m) : n_(n), rows_(panels_of(n)), cols_(panels_of(m)) {
    long wide = rows_ * PANEL * cols_ * PAIRS, square = rows_ * PANEL * rows_ * PAIRS;
    space_.resize(3 * wide + 5 * square);
    uint32_t* next = space_.data();
    auto take = [&](long panels, long pairs) {
      Panels taken{next, panels, pairs};
      next += panels * pairs * PANEL;
      return taken;
    };
    by_rows_ = take(rows_, cols_ * PAIRS);
    for (Panels* each : {&by_columns_, &next_columns_}) *each = take(cols_, rows_ * PAIRS);
    for (Panels* each : {&gram_, &factor_, &product_, &square_, &last_}) *each = take(rows_, rows_ * PAIRS);
  }

  void standard(const Matrix& y, float factor, const float* coefficients, long steps) {
    load(y, factor, by_rows_, by_columns_);
    for (long step = 0; step < steps; step++) {
      const float* abc = coefficients + 3 * step;
      symmetric(by_rows_, by_rows_, gram_);
      polynomial(gram_, factor_, n_, 0, abc[1], abc[2]);
      apply(factor_, abc[0], step == steps - 1 ? &y : nullptr);
    }
  }

  // As `_gram_form` in optim/polar.py: anew after `restart` steps.
  void gram(const Matrix& y, float factor, const float* coefficients, long steps, long restart) {
    load(y, factor, by_rows_, by_columns_);
    for (long first = 0, end = restart; first < steps; first = end, end = steps) {
      symmetric(by_rows_, by_rows_, gram_);
      for (long step = first; step < end; step++) {
        const float* abc = coefficients + 3 * step;
        polynomial(gram_, factor_, n_, abc[0], abc[1], abc[2]);
        if (step < end - 1) {
          full(factor_, gram_, square_);
          symmetric(square_, factor_, gram_);
        }
        if (step > first) {
          full(factor_, product_, last_);
          std::swap(product_, last_);
        } else {
          std::swap(product_, factor_);
        }
      }
      apply(product_, 0, end == steps ? &y : nullptr);
    }
  }

 private:
  // Y <- aY + P·Y, for the next product or, at the end, to memory.
  void apply(const Panels& p, float a, const Matrix* out) {
    Tile tile;
    for (long col = 0; col < cols_; col++)
      for (long row = 0; row < rows_; row++) {
        multiply(p.at(row, 0), by_columns_.at(col, 0), p.pairs, tile);
        if (a != 0) add(tile, 1, by_columns_.at(col, row * PAIRS), a);
        round(tile);
        if (out) {
          store(tile, *out, row, col);
        } else {
          store_rows(tile, by_rows_.at(row, col * PAIRS));
          store_columns(tile, next_columns_.at(col, row * PAIRS));
        }
      }
    std::swap(by_columns_, next_columns_);
  }

  long n_, rows_, cols_;
  std::vector<uint32_t> space_;
  Panels by_rows_, by_columns_, next_columns_, gram_, factor_, product_, square_, last_;
};

// --- passes over a shard: what the kernels of optim/kernels.py do, and with their table ---

constexpr long WIDTH = 16;  // elements of a vector

__m512 load(const float* x, __mmask16 inside) { return _mm512_maskz_loadu_ps(inside, x); }
__m512 load(const uint16_t* x, __mmask16 inside) { return widen(_mm256_maskz_loadu_epi16(inside, x)); }
void store(float* x, __mmask16 inside, __m512 value) { _mm512_mask_storeu_ps(x, inside, value); }
void store(uint16_t* x, __mmask16 inside, __m512 value) {
  _mm256_mask_storeu_epi16(x, inside, (__m256i)_mm512_cvtneps_pbh(value));
}

// As torch.lerp: from the nearer end, so that weight 1 gives `end` exactly.
__m512 lerp(__m512 start, __m512 end, float weight) {
  __m512 apart = _mm512_sub_ps(end, start);
  if (weight < 0.5f) return _mm512_fmadd_ps(_mm512_set1_ps(weight), apart, start);
  return _mm512_fmadd_ps(_mm512_set1_ps(weight - 1), apart, end);
}

// Calls body(i, inside) for vectors of WIDTH elements from i on, the last one perhaps not whole.
template <class Body>
void vectors(long numel, Body body) {
  for (long i = 0; i < numel; i += WIDTH) body(i, numel - i >= WIDTH ? 0xffff : (1u << (numel - i)) - 1);
}

template <class Gradient>
void momentum_blocks(const Gradient* gradient, float* momentum, uint16_t* out, double* partials, const long* sources,
                     const long* targets, const long* numels, long blocks, float beta, bool nesterov, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long block = 0; block < blocks; block++) {
    __m512d low = _mm512_setzero_pd(), high = low;
    vectors(numels[block], [&](long i, __mmask16 inside) {
      float* m = momentum + sources[block] + i;
      __m512 g = load(gradient + sources[block] + i, inside), now = lerp(load(m, inside), g, 1 - beta);
      store(m, inside, now);
      __m512 update = nesterov ? lerp(g, now, beta) : now;
      store(out + targets[block] + i, inside, update);
      __m512d first = _mm512_cvtps_pd(_mm512_castps512_ps256(update));
      __m512d second = _mm512_cvtps_pd(_mm512_extractf32x8_ps(update, 1));
      low = _mm512_fmadd_pd(first, first, low);
      high = _mm512_fmadd_pd(second, second, high);
    });
    partials[block] = _mm512_reduce_add_pd(_mm512_add_pd(low, high));
  }
}

template <class Model>
void apply_blocks(float* weight, const uint16_t* update, Model* model, const long* sources, const long* targets,
                  const long* numels, long blocks, float decay, float factor, float ahead, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long block = 0; block < blocks; block++)
    vectors(numels[block], [&](long i, __mmask16 inside) {
      float* w = weight + sources[block] + i;
      __m512 before = load(w, inside), u = load(update + targets[block] + i, inside);
      __m512 now = _mm512_fnmadd_ps(_mm512_set1_ps(factor), u, _mm512_mul_ps(before, _mm512_set1_ps(decay)));
      store(w, inside, now);
      __m512 point = _mm512_fmadd_ps(_mm512_set1_ps(ahead), _mm512_sub_ps(now, before), now);
      if (model) store(model + sources[block] + i, inside, point);
    });
}

}  // namespace

extern "C" void momentum_pass(const void* gradient, long gradient_is_bf16, float* momentum, uint16_t* out,
                              double* partials, const long* sources, const long* targets, const long* numels,
                              long blocks, float beta, long nesterov, long threads) {
  auto pass = [&](auto* g) {
    momentum_blocks(g, momentum, out, partials, sources, targets, numels, blocks, beta, nesterov, threads);
  };
  gradient_is_bf16 ? pass((const uint16_t*)gradient) : pass((const float*)gradient);
}

extern "C" void apply_pass(float* weight, const uint16_t* update, void* model, long model_is_bf16,
                           const long* sources, const long* targets, const long* numels, long blocks, float decay,
                           float factor, float ahead, long threads) {
  auto pass = [&](auto* m) {
    apply_blocks(weight, update, m, sources, targets, numels, blocks, decay, factor, ahead, threads);
  };
  model_is_bf16 ? pass((uint16_t*)model) : pass((float*)model);
}

// x [batch, rows, cols], contiguous, in place, each times its factor. `restart` 0: the standard form.
extern "C" void orthogonalize(uint16_t* x, const float* factors, long batch, long rows, long cols,
                              const float* coefficients, long steps, long restart, long threads) {
  bool wide = rows <= cols;
  long n = std::min(rows, cols), m = std::max(rows, cols);
#pragma omp parallel num_threads(std::max(1L, std::min(threads, batch)))
  {
    Iteration iteration(n, m);
#pragma omp for schedule(dynamic)
    for (long i = 0; i < batch; i++) {
      Matrix y{x + i * n * m, n, m, wide ? cols : 1, wide ? 1 : cols};
      if (restart)
        iteration.gram(y, factors[i], coefficients, steps, restart);
      else
        iteration.standard(y, factors[i], coefficients, steps);
    }
  }
}

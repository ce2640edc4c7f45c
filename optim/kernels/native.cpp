// The optimizer step on a CPU with AVX-512 BF16 or AVX2: orthogonalisation, and the passes over a shard (at the
// end of this file). cluster/machine/simd.h has the vectors of both tiers;
// optim/kernels/native.py compiles this file and says why where it cannot.
//
// Newton-Schulz takes a batch of matrices in one call, one of them at a time on each thread, so that what an
// iteration computes is in the cache when the next one reads it. optim/polar.py has the same iteration in torch.
// Here Y [n, m], n <= m, is the matrix or its transpose. Half of a symmetric product is computed.
//
// What is multiplied is kept as Scalars: with AVX-512 as bf16, so that every product is rounded once (aY in the
// standard form and aI in the Gram form are added before that: what torch's bf16 tensors round twice); with AVX2
// in fp32 and not rounded, as widening it again for each product would cost 8% of the multiplications. Inputs
// and outputs are bf16 in both.
//
// C = A·Bᵀ is computed in tiles (cluster/machine/panels.h), which are written straight into the panels that the
// next product reads.

#include <algorithm>
#include <cstdint>
#include <memory>

#include "panels.h"

namespace {

constexpr long HALF = 16;  // rows and columns of a quarter of a tile
constexpr long BAND = 4;   // panels of rows that are multiplied with a panel of columns in turn

// Fetches a block of a panel that is about to be read or written.
void expect(const Scalar* block) {
  for (long i = 0; PREFETCH && i < PAIRS * PARTS * PANEL; i += 64 / sizeof(Scalar))
    _mm_prefetch((const char*)(block + i), _MM_HINT_T1);
}

// The same as multiply_tile on the diagonal of a symmetric product: three quarters of it, and one from its mirror image.
void multiply_diagonal_tile(const Scalar* a, const Scalar* b, long pairs, Tile& tile) {
  by_depth(a, b, pairs, [&](const Scalar* a, const Scalar* b, long pairs, bool more) {
    multiply_rows<HALF, HALF>(a, b, pairs, more, 0, tile);
    multiply_rows<HALF, PANEL>(a, b, pairs, more, HALF, tile);
  });
  for (long row = 0; row < HALF; row += WIDTH)
    for (long column = 0; column < HALF; column += WIDTH) {
      Words r[WIDTH];
      for (long i = 0; i < WIDTH; i++) r[i] = load_words(tile.sums[HALF + row + i] + column);
      transpose(r);
      for (long i = 0; i < WIDTH; i++) store_words(tile.sums[column + i] + HALF + row, r[i]);
    }
}

// tile.sums = alpha·sums + beta·(the tile whose columns are this block of a panel).
void add(Tile& tile, float alpha, const Scalar* columns, float beta) {
  Vec scale = spread(alpha), factor = spread(beta);
  for (long i = 0; i < PANEL; i++)
    for (long column = 0; column < PANEL; column += WIDTH) {
      Vec addend = load_element(columns + i / 2 * PARTS * PANEL + column, PANEL, i % 2);
      Vec sum = load(tile.sums[i] + column) * scale;
      store(tile.sums[i] + column, multiply_add(addend, factor, sum));
    }
}

// Calls body(row, col) for every tile, or for those with col <= row: BAND rows at a time, for which a panel of
// columns is fetched once.
template <class Body>
void each_tile(long rows, long cols, bool lower, Body body) {
  for (long first = 0; first < rows; first += BAND) {
    long last = std::min(first + BAND, rows);
    for (long col = 0; col < (lower ? last : cols); col++)
      for (long row = lower ? std::max(first, col) : first; row < last; row++) body(row, col);
  }
}

// out = A·Bᵀ and what `more` makes of a tile of it, known to be symmetric.
template <class More>
void symmetric(const Panels& a, const Panels& b, const Panels& out, More more) {
  Tile tile;
  each_tile(a.panels, b.panels, true, [&](long row, long col) {
    expect(out.at(col, row * PAIRS));
    expect(out.at(row, col * PAIRS));
    row == col ? multiply_diagonal_tile(a.at(row, 0), b.at(col, 0), a.pairs, tile)
               : multiply_tile(a.at(row, 0), b.at(col, 0), a.pairs, tile);
    more(tile, row, col);
    if (row == col && a.data != b.data)  // else it is symmetric as it is
      for (long i = 0; i < PANEL; i++)
        for (long j = 0; j < i; j++) tile.sums[j][i] = tile.sums[i][j];
    keep(tile);
    store_columns(tile, out.at(col, row * PAIRS));
    if (row != col) store_rows(tile, out.at(row, col * PAIRS));
  });
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

// out = A·Bᵀ of two polynomials of one matrix: symmetric but for their rounding, and in bf16 computed in full
// (`_multiply_polynomials` in optim/polar.py says why). In fp32 half will do.
void commuting(const Panels& a, const Panels& b, const Panels& out) {
  if (!ROUNDED) return symmetric(a, b, out);
  Tile tile;
  each_tile(a.panels, b.panels, false, [&](long row, long col) {
    multiply_tile(a.at(row, 0), b.at(col, 0), a.pairs, tile);
    keep(tile);
    store_rows(tile, out.at(row, col * PAIRS));
  });
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
    for (long i = 0; i < rows; i++)
      for (long j = 0; j < cols; j += WIDTH) store(out + i * y.row_stride + j, load(tile.sums[i] + j), cols - j);
    return;
  }
  for (long i = 0; i < rows; i += WIDTH)
    for (long j = 0; j < cols; j += WIDTH) {
      Words r[WIDTH];
      for (long k = 0; k < WIDTH; k++) r[k] = load_words(tile.sums[i + k] + j);
      transpose(r);
      for (long k = 0; k < std::min(WIDTH, cols - j); k++)
        store(out + (j + k) * y.col_stride + i, as_floats(r[k]), rows - i);
    }
}

// factor·Y, rounded to bf16, from memory, in panels of its rows and of its columns.
void load(const Matrix& y, float factor, const Panels& by_rows, const Panels& by_columns) {
  Tile tile;
  Vec scale = spread(factor);
  for (long row = 0; row < by_rows.panels; row++)
    for (long col = 0; col < by_columns.panels; col++) {
      long rows = std::min(PANEL, y.n - row * PANEL), cols = std::min(PANEL, y.m - col * PANEL);
      const uint16_t* x = y.data + row * PANEL * y.row_stride + col * PANEL * y.col_stride;
      // Along the stride of 1: rows of Y, or of its transpose, for which the panels change places.
      bool straight = y.col_stride == 1;
      long lines = straight ? rows : cols, length = straight ? cols : rows;
      long stride = straight ? y.row_stride : y.col_stride;
      for (long i = 0; i < PANEL; i++)
        for (long j = 0; j < PANEL; j += WIDTH)
          store(tile.sums[i] + j, as_bf16(load(x + i * stride + j, i < lines ? length - j : 0) * scale));
      keep(tile);
      Scalar *to_rows = by_rows.at(row, col * PAIRS), *to_columns = by_columns.at(col, row * PAIRS);
      store_rows(tile, straight ? to_rows : to_columns);
      store_columns(tile, straight ? to_columns : to_rows);
    }
}

// Y of one matrix, and what its iterations need: space that a thread keeps for all of its matrices.
class Iteration {
 public:
  explicit Iteration(long n, long m) : n_(n), rows_(panels_of(n)), cols_(panels_of(m)) {
    long wide = rows_ * PANEL * cols_ * KEPT, square = rows_ * PANEL * rows_ * KEPT;
    space_.reset(new Scalar[3 * wide + 5 * square]);  // not set to zero: every tile is written before it is read
    Scalar* next = space_.get();
    auto take = [&](long panels, long pairs) {
      Panels taken{next, panels, pairs};
      next += panels * pairs * PARTS * PANEL;
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

  // As `_gram_form` in optim/polar.py: anew after `restart` steps. Products in fp32 need no restart, which saves a
  // sixth of them at m = 8n/3. The rounding of G grows by a² in each step, by 2e5 in all. So it stays below 0.1,
  // in the basin of the polynomials; the rounding of bf16 leaves it.
  void gram(const Matrix& y, float factor, const float* coefficients, long steps, long restart) {
    load(y, factor, by_rows_, by_columns_);
    if (!ROUNDED) restart = steps;
    for (long first = 0, end = restart; first < steps; first = end, end = steps) {
      symmetric(by_rows_, by_rows_, gram_);
      for (long step = first; step < end; step++) {
        const float* abc = coefficients + 3 * step;
        polynomial(gram_, factor_, n_, abc[0], abc[1], abc[2]);
        if (step < end - 1) {
          commuting(factor_, gram_, square_);
          symmetric(square_, factor_, gram_);
        }
        if (step > first) {
          commuting(factor_, product_, last_);
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
    each_tile(rows_, cols_, false, [&](long row, long col) {
      expect(by_columns_.at(col, row * PAIRS));
      expect(by_rows_.at(row, col * PAIRS));
      expect(next_columns_.at(col, row * PAIRS));
      multiply_tile(p.at(row, 0), by_columns_.at(col, 0), p.pairs, tile);
      if (a != 0) add(tile, 1, by_columns_.at(col, row * PAIRS), a);
      if (out) return store(tile, *out, row, col);
      keep(tile);
      store_rows(tile, by_rows_.at(row, col * PAIRS));
      store_columns(tile, next_columns_.at(col, row * PAIRS));
    });
    std::swap(by_columns_, next_columns_);
  }

  long n_, rows_, cols_;
  std::unique_ptr<Scalar[]> space_;
  Panels by_rows_, by_columns_, next_columns_, gram_, factor_, product_, square_, last_;
};

// --- passes over a shard: what the kernels of optim/kernels/gpu.py do, and with their table ---

// As torch.lerp: from the nearer end, so that weight 1 gives `end` exactly.
Vec lerp(Vec start, Vec end, float weight) {
  Vec apart = end - start;
  if (weight < 0.5f) return multiply_add(spread(weight), apart, start);
  return multiply_add(spread(weight - 1), apart, end);
}

template <class Gradient>
void momentum_blocks(const Gradient* gradient, float* momentum, uint16_t* out, double* partials, const long* sources,
                     const long* targets, const long* numels, long blocks, float beta, bool nesterov, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long block = 0; block < blocks; block++) {
    Squares squares;
    for (long i = 0; i < numels[block]; i += WIDTH) {
      long left = numels[block] - i;
      float* m = momentum + sources[block] + i;
      Vec g = load(gradient + sources[block] + i, left), now = lerp(load(m, left), g, 1 - beta);
      store(m, now, left);
      Vec update = nesterov ? lerp(g, now, beta) : now;
      store(out + targets[block] + i, update, left);
      squares.add(update);
    }
    partials[block] = squares.sum();
  }
}

template <class Model>
void apply_blocks(float* weight, const uint16_t* update, Model* model, const long* sources, const long* targets,
                  const long* numels, long blocks, float decay, float factor, float ahead, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long block = 0; block < blocks; block++)
    for (long i = 0; i < numels[block]; i += WIDTH) {
      long left = numels[block] - i;
      float* w = weight + sources[block] + i;
      Vec before = load(w, left), u = load(update + targets[block] + i, left);
      Vec now = subtract_product(before * spread(decay), spread(factor), u);
      store(w, now, left);
      Vec point = multiply_add(spread(ahead), now - before, now);
      if (model) store(model + sources[block] + i, point, left);
    }
}

struct AdamW {  // the numbers of a step: of_square 1 - β₂, bias 1 - βᵗ
  float lerp, beta2, of_square, bias1, bias2, eps, decay, factor;
};

template <class Gradient, class Model>
void adamw_elements(float* weight, const Gradient* gradient, float* first, float* second, Model* model, long numel,
                    const AdamW& by, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < numel; i += WIDTH) {
    long left = numel - i;
    Vec g = load(gradient + i, left), m = lerp(load(first + i, left), g, by.lerp);
    Vec v = multiply_add(spread(by.of_square) * g, g, load(second + i, left) * spread(by.beta2));
    store(first + i, m, left);
    store(second + i, v, left);
    Vec update = m / spread(by.bias1) / (root(v / spread(by.bias2)) + spread(by.eps));
    Vec now = subtract_product(load(weight + i, left) * spread(by.decay), spread(by.factor), update);
    store(weight + i, now, left);
    if (model) store(model + i, now, left);
  }
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

extern "C" void add(float* total, const uint16_t* gradient, long numel, long threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (long i = 0; i < numel; i += WIDTH)
    store(total + i, load(total + i, numel - i) + load(gradient + i, numel - i), numel - i);
}

extern "C" void adamw_pass(float* weight, const void* gradient, long gradient_is_bf16, float* first, float* second,
                           void* model, long model_is_bf16, long numel, float lerp, float beta2, float of_square,
                           float bias1, float bias2, float eps, float decay, float factor, long threads) {
  AdamW by{lerp, beta2, of_square, bias1, bias2, eps, decay, factor};
  auto pass = [&](auto* g, auto* m) { adamw_elements(weight, g, first, second, m, numel, by, threads); };
  auto with = [&](auto* g) { model_is_bf16 ? pass(g, (uint16_t*)model) : pass(g, (float*)model); };
  gradient_is_bf16 ? with((const uint16_t*)gradient) : with((const float*)gradient);
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

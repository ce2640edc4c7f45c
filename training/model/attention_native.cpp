// Causal attention on a CPU and its gradient, one head at a time on each thread. The logits of 32 queries, and in the
// gradient those of 32 keys, stay in the cache: memory sees only what autograd keeps. training/model/
// attention_native.py compiles this file.
//
// Products are those of cluster/machine/panels.h: with AVX-512 of bf16 with sums in fp32, with AVX2 of fp32.
//
// T tokens, C head_dim, H query heads, K key/value heads. Names of panels: `q` its rows, of 32 tokens each, in pairs
// along C; `q_columns` its columns, of 32 of C each, in pairs along the tokens. A panel has R = ceil(T / 32) or
// D = ceil(C / 32) blocks.

#include "panels.h"

#include <cmath>
#include <memory>

namespace {

constexpr long BAND = 4;  // panels of keys whose products with a panel of queries end in one sum

struct alignas(64) Block {
  Scalar data[PAIRS * PARTS * PANEL];
};

template <class Element>
struct Heads {  // [B, heads, T, C]; the elements of a token lie side by side
  Element* data;
  long batch, head, token;  // strides
  Element* at(long b, long h) const { return data + b * batch + h * head; }
};

struct Shape {
  long batch, heads, kv_heads, tokens, size;  // B, H, K, T, C
  long rows() const { return panels_of(tokens); }
  long columns() const { return panels_of(size); }
  long blocks() const { return rows() * columns(); }
  float scale() const { return 1 / std::sqrt((float)size); }
};

// Panels of a head's rows and columns, of those that are not null.
template <class Element>
void pack(const Element* x, long stride, const Shape& shape, Block* rows, Block* columns) {
  Tile tile;
  for (long i = 0; i < shape.rows(); i++)
    for (long c = 0; c < shape.columns(); c++) {
      for (long row = 0; row < PANEL; row++)
        for (long j = 0; j < PANEL; j += WIDTH) {
          long token = i * PANEL + row, left = token < shape.tokens ? shape.size - c * PANEL - j : 0;
          store(tile.sums[row] + j, left > 0 ? load(x + token * stride + c * PANEL + j, left) : zeros());
        }
      keep(tile);
      if (rows) store_rows(tile, rows[i * shape.columns() + c].data);
      if (columns) store_columns(tile, columns[c * shape.rows() + i].data);
    }
}

// Rows [32·panel, ...) of a head <- tiles, one for each panel of columns, times a factor for each row.
template <class Element>
void unpack(const Tile* tiles, const float* factors, long panel, const Shape& shape, Element* x, long stride) {
  for (long c = 0; c < shape.columns(); c++)
    for (long row = 0; row < std::min(PANEL, shape.tokens - panel * PANEL); row++)
      for (long j = 0; j < std::min(PANEL, shape.size - c * PANEL); j += WIDTH)
        store(x + (panel * PANEL + row) * stride + c * PANEL + j,
              load(tiles[c].sums[row] + j) * spread(factors[row]), shape.size - c * PANEL - j);
}

// Of 32 queries, the last of whom see the last of `panels` panels of keys in part: probabilities of their logits
// before their sum is 1, as a panel. `sums` and `log_z`: of each query, its logits' exponentials' sum and its log.
void softmax(Tile* logits, long panels, float scale, Block* out, float* sums, float* log_z) {
  Vec tops[PANEL];
  for (long row = 0; row < PANEL; row++) tops[row] = spread(-INFINITY);
  for (long j = 0; j < panels; j++)
    for (long row = 0; row < PANEL; row++)
      for (long v = 0; v < PANEL; v += WIDTH) {
        long seen = j + 1 < panels ? PANEL : row + 1 - v;
        tops[row] = larger(tops[row], load(logits[j].sums[row] + v), seen);
      }
  float top[PANEL];
  Vec totals[PANEL];
  for (long row = 0; row < PANEL; row++) top[row] = largest_of(tops[row]), totals[row] = zeros();
  for (long j = 0; j < panels; j++) {
    for (long row = 0; row < PANEL; row++)
      for (long v = 0; v < PANEL; v += WIDTH) {
        float* at = logits[j].sums[row] + v;
        Vec power = exponential((load(at) - spread(top[row])) * spread(scale));
        if (j + 1 == panels) power = first(power, row + 1 - v);
        totals[row] = totals[row] + power;
        store(at, power);
      }
    keep(logits[j]);
    store_rows(logits[j], out[j].data);
  }
  for (long row = 0; row < PANEL; row++) {
    sums[row] = sum_of(totals[row]);
    log_z[row] = top[row] * scale + std::log(sums[row]);
  }
}

template <class Element>
void forward_heads(const Shape& shape, Heads<const Element> q, Heads<const Element> k, Heads<const Element> v,
                   Heads<Element> out, float* log_z, long threads) {
  long rows = shape.rows(), columns = shape.columns(), group = shape.heads / shape.kv_heads;
#pragma omp parallel num_threads(threads)
  {
    std::unique_ptr<Block[]> blocks(new Block[3 * shape.blocks() + rows]);
    Block *queries = blocks.get(), *keys = queries + shape.blocks(), *values = keys + shape.blocks();
    Block* chances = values + shape.blocks();
    std::unique_ptr<Tile[]> tiles(new Tile[rows + columns]);
    Tile *logits = tiles.get(), *mixed = logits + rows;
#pragma omp for schedule(dynamic)
    for (long task = 0; task < shape.batch * shape.kv_heads; task++) {
      long b = task / shape.kv_heads, of = task % shape.kv_heads;
      pack(k.at(b, of), k.token, shape, keys, (Block*)nullptr);
      pack(v.at(b, of), v.token, shape, (Block*)nullptr, values);
      for (long h = of * group; h < (of + 1) * group; h++) {
        pack(q.at(b, h), q.token, shape, queries, (Block*)nullptr);
        for (long i = 0; i < rows; i++) {
          for (long j = 0; j <= i; j++)
            multiply_tile(queries[i * columns].data, keys[j * columns].data, columns * PAIRS, logits[j]);
          float sums[PANEL], logs[PANEL];
          softmax(logits, i + 1, shape.scale(), chances, sums, logs);
          for (float& sum : sums) sum = 1 / sum;
          for (long c = 0; c < columns; c++)
            multiply_tile(chances[0].data, values[c * rows].data, (i + 1) * PAIRS, mixed[c]);
          unpack(mixed, sums, i, shape, out.at(b, h), out.token);
          std::copy_n(logs, std::min(PANEL, shape.tokens - i * PANEL),
                      log_z + (b * shape.heads + h) * shape.tokens + i * PANEL);
        }
      }
    }
  }
}

// What a thread needs for the gradient of one head of keys and of the queries that ask it.
struct Scratch {
  explicit Scratch(const Shape& shape) {
    long each = shape.blocks(), rows = shape.rows();
    blocks.reset(new Block[7 * each + (2 * rows + 1) * BAND]);
    tiles.reset(new Tile[3 * each + 2]);
    numbers.reset(new float[2 * rows * PANEL]);
    Block* next = blocks.get();
    for (Block** panel : {&q, &q_columns, &k, &k_columns, &v, &up, &up_columns}) *panel = next, next += each;
    chances = next, slopes = chances + BAND * rows, slope_rows = slopes + BAND * rows;
    of_q = tiles.get(), of_k = of_q + each, of_v = of_k + each, logits = of_v + each, rise = logits + 1;
    log_z = numbers.get(), inner = log_z + rows * PANEL;
  }
  std::unique_ptr<Block[]> blocks;
  std::unique_ptr<Tile[]> tiles;
  std::unique_ptr<float[]> numbers;
  Block *q, *q_columns, *k, *k_columns, *v, *up, *up_columns;  // `up`: the gradient of the result
  Block *chances, *slopes;  // BAND panels of keys, in pairs along the queries: probabilities, gradients of logits
  Block* slope_rows;        // the latter as a panel of queries, in pairs along the keys
  Tile *of_q, *of_k, *of_v, *logits, *rise;
  float *log_z, *inner;  // of each token; `inner`: its result times the result's gradient
};

// logits <- probabilities, rise <- gradients of the logits before `scale`; `diagonal`: a query sees keys up to its own.
void slope(Tile& logits, Tile& rise, const float* log_z, const float* inner, float scale, bool diagonal) {
  for (long row = 0; row < PANEL; row++)
    for (long v = 0; v < PANEL; v += WIDTH) {
      Vec power = exponential(multiply_add(load(logits.sums[row] + v), spread(scale), spread(-log_z[row])));
      Vec apart = load(rise.sums[row] + v) - spread(inner[row]);
      if (diagonal) power = first(power, row + 1 - v), apart = first(apart, row + 1 - v);
      store(logits.sums[row] + v, power);
      store(rise.sums[row] + v, power * apart);
    }
}

// Adds the gradients of keys and values by one head of queries, and computes that of the queries.
void backward_head(const Shape& shape, Scratch& s) {
  long rows = shape.rows(), columns = shape.columns();
  for (long each = 0; each < shape.blocks(); each++) std::fill_n(s.of_q[each].sums[0], PANEL * PANEL, 0.0f);
  for (long first = 0; first < rows; first += BAND) {
    long band = std::min(BAND, rows - first);
    for (long i = first; i < rows; i++) {
      long seen = std::min(band, i - first + 1);
      for (long j = 0; j < seen; j++) {
        const Scalar *key = s.k[(first + j) * columns].data, *value = s.v[(first + j) * columns].data;
        multiply_tile(s.q[i * columns].data, key, columns * PAIRS, *s.logits);
        multiply_tile(s.up[i * columns].data, value, columns * PAIRS, *s.rise);
        slope(*s.logits, *s.rise, s.log_z + i * PANEL, s.inner + i * PANEL, shape.scale(), first + j == i);
        keep(*s.logits);
        keep(*s.rise);
        store_columns(*s.logits, s.chances[j * rows + i].data);
        store_columns(*s.rise, s.slopes[j * rows + i].data);
        store_rows(*s.rise, s.slope_rows[j].data);
      }
      for (long c = 0; c < columns; c++)
        multiply_tile(s.slope_rows[0].data, s.k_columns[c * rows + first].data, seen * PAIRS,
                      s.of_q[i * columns + c], true);
    }
    for (long j = 0; j < band; j++)
      for (long c = 0; c < columns; c++) {
        long key = first + j, pairs = (rows - key) * PAIRS, at = j * rows + key, from = c * rows + key;
        multiply_tile(s.chances[at].data, s.up_columns[from].data, pairs, s.of_v[key * columns + c], true);
        multiply_tile(s.slopes[at].data, s.q_columns[from].data, pairs, s.of_k[key * columns + c], true);
      }
  }
}

template <class Element>
void backward_heads(const Shape& shape, Heads<const Element> q, Heads<const Element> k, Heads<const Element> v,
                    Heads<const Element> out, Heads<const Element> up, const float* log_z, Heads<Element> of_q,
                    Heads<Element> of_k, Heads<Element> of_v, long threads) {
  long rows = shape.rows(), columns = shape.columns(), group = shape.heads / shape.kv_heads;
  float scales[PANEL], ones[PANEL];
  std::fill_n(scales, PANEL, shape.scale());
  std::fill_n(ones, PANEL, 1.0f);
#pragma omp parallel num_threads(threads)
  {
    Scratch s(shape);
#pragma omp for schedule(dynamic)
    for (long task = 0; task < shape.batch * shape.kv_heads; task++) {
      long b = task / shape.kv_heads, of = task % shape.kv_heads;
      pack(k.at(b, of), k.token, shape, s.k, s.k_columns);
      pack(v.at(b, of), v.token, shape, s.v, (Block*)nullptr);
      for (Tile* tile = s.of_k; tile != s.of_v + shape.blocks(); tile++)
        std::fill_n(tile->sums[0], PANEL * PANEL, 0.0f);
      for (long h = of * group; h < (of + 1) * group; h++) {
        pack(q.at(b, h), q.token, shape, s.q, s.q_columns);
        pack(up.at(b, h), up.token, shape, s.up, s.up_columns);
        std::fill_n(s.log_z, 2 * rows * PANEL, 0.0f);
        std::copy_n(log_z + (b * shape.heads + h) * shape.tokens, shape.tokens, s.log_z);
        for (long t = 0; t < shape.tokens; t++) {
          const Element *x = out.at(b, h) + t * out.token, *y = up.at(b, h) + t * up.token;
          Vec sum = zeros();
          for (long j = 0; j < shape.size; j += WIDTH)
            sum = multiply_add(load(x + j, shape.size - j), load(y + j, shape.size - j), sum);
          s.inner[t] = sum_of(sum);
        }
        backward_head(shape, s);
        for (long i = 0; i < rows; i++)
          unpack(s.of_q + i * columns, scales, i, shape, of_q.at(b, h), of_q.token);
      }
      for (long i = 0; i < rows; i++) {
        unpack(s.of_k + i * columns, scales, i, shape, of_k.at(b, of), of_k.token);
        unpack(s.of_v + i * columns, ones, i, shape, of_v.at(b, of), of_v.token);
      }
    }
  }
}

struct Tensor {  // as the caller has it
  void* data;
  long batch, head, token;
  template <class Element>
  operator Heads<Element>() const {
    return {(Element*)data, batch, head, token};
  }
};

}  // namespace

// q, k, v, out; log_z [B, H, T]: of each query the log of the sum of its logits' exponentials.
extern "C" void attention_forward(long bf16, const long* sizes, const Tensor* tensors, float* log_z, long threads) {
  Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  const Tensor* t = tensors;
  if (bf16)
    forward_heads<uint16_t>(shape, t[0], t[1], t[2], t[3], log_z, threads);
  else
    forward_heads<float>(shape, t[0], t[1], t[2], t[3], log_z, threads);
}

// q, k, v, out, the gradient of out; those of q, k and v, which are written.
extern "C" void attention_backward(long bf16, const long* sizes, const Tensor* tensors, const float* log_z,
                                   long threads) {
  Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4]};
  const Tensor* t = tensors;
  if (bf16)
    backward_heads<uint16_t>(shape, t[0], t[1], t[2], t[3], t[4], log_z, t[5], t[6], t[7], threads);
  else
    backward_heads<float>(shape, t[0], t[1], t[2], t[3], t[4], log_z, t[5], t[6], t[7], threads);
}

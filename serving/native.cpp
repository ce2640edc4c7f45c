// A step of a LLaMA decoder on a CPU with AVX-512 BF16: tokens of many requests in, fp32 logits out.
//
// Weights and cache are kept as panels of pairs: panel[kk][column] holds elements 2kk and 2kk + 1 of a column,
// which is what one lane of vdpbf16ps multiplies. So one kernel, `accumulate`, does every product: the linear
// layers, queries by keys (a block of the cache is a panel of 32 keys), and chances by values (pairs of
// tokens). Activations are bf16 and rounded where transformers rounds them; sums are fp32.
//
// Where it counts: one row reads each weight once and is bound by memory; from about 50 rows on it is bound by
// the multipliers. serving/native.py compiles this file and describes its structs; no pointer that is read may be null.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

namespace {

constexpr long PANEL = 64;  // columns of a panel of weights
constexpr long BLOCK = 32;  // tokens of a block of the cache
constexpr long ROWS = 6;    // rows that share a load of a panel: 6 x 4 sums fill 24 of 32 registers

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
  long num_rows, num_spans, num_outputs, threads;
  const int *tokens, *positions, *outputs, *blocks;
  const Span* spans;
  uint16_t *x, *normed, *qkv, *mixed, *inner;  // [rows, hidden], the same, [rows, q + 2 kv], [rows, q], [rows, ffn]
  float* logits;                               // [outputs, vocab]
};

__m512 load(const uint16_t* bf16, __mmask16 inside) {
  return _mm512_castsi512_ps(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, bf16)), 16));
}

__m256i rounded(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

__m512 as_bf16(__m512 x) {  // rounded, and widened again
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(rounded(x)), 16));
}

float wide(uint16_t bf16) {
  uint32_t bits = uint32_t(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t narrow(float value) { return _mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(value)), 0); }

// e^x to 2e-7 relative (Cephes' polynomial); 0 far below.
__m512 exponential(__m512 x) {
  x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  x = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), x);
  __m512 y = _mm512_set1_ps(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = _mm512_fmadd_ps(y, x, _mm512_set1_ps(c));
  y = _mm512_add_ps(_mm512_fmadd_ps(y, _mm512_mul_ps(x, x), x), _mm512_set1_ps(1.0f));
  return _mm512_scalef_ps(y, n);
}

// sums[r] += rows[r] · panel over `pairs` pairs, Z vectors of 16 columns; a pair of the panel is `stride` wide.
template <int R, int Z>
inline void accumulate(__m512 (&sums)[ROWS][4], const uint16_t* const* rows, const uint32_t* panel, long stride,
                       long pairs) {
  __m512 total[R][Z];  // a copy, which the compiler keeps in registers
  const int* row[R];
  for (int r = 0; r < R; r++) {
    row[r] = (const int*)rows[r];
    for (int z = 0; z < Z; z++) total[r][z] = sums[r][z];
  }
  for (long kk = 0; kk < pairs; kk++) {
    __m512bh columns[Z];
#pragma GCC unroll 4
    for (int z = 0; z < Z; z++) columns[z] = (__m512bh)_mm512_loadu_si512(panel + kk * stride + 16 * z);
#pragma GCC unroll 6
    for (int r = 0; r < R; r++) {
      __m512bh pair = (__m512bh)_mm512_set1_epi32(row[r][kk]);
#pragma GCC unroll 4
      for (int z = 0; z < Z; z++) total[r][z] = _mm512_dpbf16_ps(total[r][z], pair, columns[z]);
    }
  }
  for (int r = 0; r < R; r++)
    for (int z = 0; z < Z; z++) sums[r][z] = total[r][z];
}

template <int Z>
void accumulate(long num_rows, __m512 (&sums)[ROWS][4], const uint16_t* const* rows, const uint32_t* panel,
                long stride, long pairs) {
  switch (num_rows) {
    case 1: return accumulate<1, Z>(sums, rows, panel, stride, pairs);
    case 2: return accumulate<2, Z>(sums, rows, panel, stride, pairs);
    case 3: return accumulate<3, Z>(sums, rows, panel, stride, pairs);
    case 4: return accumulate<4, Z>(sums, rows, panel, stride, pairs);
    case 5: return accumulate<5, Z>(sums, rows, panel, stride, pairs);
    default: return accumulate<6, Z>(sums, rows, panel, stride, pairs);
  }
}

// The n-th part of `total` cut into `parts` that differ by at most one.
long cut(long total, long parts, long n) { return total * n / parts; }

// One panel of a linear layer for every row; `finish(row, sums)` takes the 64 columns of a row.
template <class Finish>
void linear_panel(const uint16_t* x, long num_rows, long inputs, const uint32_t* panel, Finish finish) {
  long tiles = (num_rows + ROWS - 1) / ROWS;
  for (long tile = 0; tile < tiles; tile++) {
    long first = cut(num_rows, tiles, tile), count = cut(num_rows, tiles, tile + 1) - first;
    const uint16_t* rows[ROWS];
    __m512 sums[ROWS][4];
    for (long r = 0; r < count; r++) {
      rows[r] = x + (first + r) * inputs;
      for (auto& sum : sums[r]) sum = _mm512_setzero_ps();
    }
    accumulate<4>(count, sums, rows, panel, PANEL, inputs / 2);
    for (long r = 0; r < count; r++) finish(first + r, sums[r]);
  }
}

__mmask16 inside(long left) { return left >= 16 ? 0xffff : left > 0 ? (1u << left) - 1 : 0; }

// out [rows, outputs] = x [rows, inputs] · weightᵀ, plus what is in `out` if `add`.
void linear(const uint16_t* x, long num_rows, long inputs, const uint32_t* panels, long outputs, uint16_t* out,
            bool add) {
#pragma omp for schedule(static)
  for (long p = 0; p < (outputs + PANEL - 1) / PANEL; p++)
    linear_panel(x, num_rows, inputs, panels + p * PANEL * inputs / 2, [&](long row, __m512* sums) {
      for (int z = 0; z < 4; z++) {
        long column = p * PANEL + 16 * z;
        uint16_t* to = out + row * outputs + column;
        __mmask16 mask = inside(outputs - column);
        __m512 sum = add ? _mm512_add_ps(as_bf16(sums[z]), load(to, mask)) : sums[z];
        _mm256_mask_storeu_epi16(to, mask, rounded(sum));
      }
    });
}

// logits [rows, vocab], fp32 and not rounded.
void logits(const uint16_t* x, long num_rows, long inputs, const uint32_t* panels, long vocab, float* out) {
#pragma omp for schedule(static)
  for (long p = 0; p < (vocab + PANEL - 1) / PANEL; p++)
    linear_panel(x, num_rows, inputs, panels + p * PANEL * inputs / 2, [&](long row, __m512* sums) {
      for (int z = 0; z < 4; z++) {
        long column = p * PANEL + 16 * z;
        _mm512_mask_storeu_ps(out + row * vocab + column, inside(vocab - column), sums[z]);
      }
    });
}

// out [rows, ffn] = silu(gate) · up; a panel holds 32 columns of gate and then the same 32 of up.
void gated(const uint16_t* x, long num_rows, long inputs, const uint32_t* panels, long ffn, uint16_t* out) {
#pragma omp for schedule(static)
  for (long p = 0; p < (ffn + 31) / 32; p++)
    linear_panel(x, num_rows, inputs, panels + p * PANEL * inputs / 2, [&](long row, __m512* sums) {
      for (int z = 0; z < 2; z++) {
        __m512 gate = as_bf16(sums[z]), up = as_bf16(sums[z + 2]), one = _mm512_set1_ps(1.0f);
        __m512 below = _mm512_add_ps(one, exponential(_mm512_sub_ps(_mm512_setzero_ps(), gate)));
        __m512 inner = _mm512_mul_ps(as_bf16(_mm512_div_ps(gate, below)), up);
        long column = p * 32 + 16 * z;
        _mm256_mask_storeu_epi16(out + row * ffn + column, inside(ffn - column), rounded(inner));
      }
    });
}

// RMSNorm of one row.
void norm(const uint16_t* x, const uint16_t* weight, long size, float eps, uint16_t* out) {
  __m512 squares = _mm512_setzero_ps();
  for (long i = 0; i < size; i += 16) {
    __m512 value = load(x + i, inside(size - i));
    squares = _mm512_fmadd_ps(value, value, squares);
  }
  __m512 scale = _mm512_set1_ps(1.0f / std::sqrt(_mm512_reduce_add_ps(squares) / size + eps));
  for (long i = 0; i < size; i += 16) {
    __mmask16 mask = inside(size - i);
    __m512 normed = as_bf16(_mm512_mul_ps(load(x + i, mask), scale));
    _mm256_mask_storeu_epi16(out + i, mask, rounded(_mm512_mul_ps(normed, load(weight + i, mask))));
  }
}

void norms(const uint16_t* x, const uint16_t* weight, long num_rows, long size, float eps, uint16_t* out) {
#pragma omp for schedule(static)
  for (long row = 0; row < num_rows; row++) norm(x + row * size, weight, size, eps, out + row * size);
}

void rotate(uint16_t* head, const float* cosines, const float* sines, long half) {
  for (long i = 0; i < half; i++) {
    float a = wide(head[i]), b = wide(head[i + half]);
    head[i] = narrow(a * cosines[i] - b * sines[i]);
    head[i + half] = narrow(b * cosines[i] + a * sines[i]);
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
    uint16_t* qkv = s.qkv + row * width;
    for (long h = 0; h < m.heads + m.kv_heads; h++) rotate(qkv + h * m.head_dim, cosines, sines, half);
    for (long h = 0; h < m.kv_heads; h++) {
      const uint32_t* key = (const uint32_t*)(qkv + (m.heads + h) * m.head_dim);
      uint32_t* keys = layer.keys + (block * m.kv_heads + h) * half * BLOCK + token;
      for (long i = 0; i < half; i++) keys[i * BLOCK] = key[i];
      const uint16_t* value = qkv + (m.heads + m.kv_heads + h) * m.head_dim;
      uint16_t* values = (uint16_t*)(layer.values + ((block * m.kv_heads + h) * BLOCK + token) / 2 * m.head_dim);
      for (long i = 0; i < m.head_dim; i++) values[2 * i + token % 2] = value[i];
      // The other half of the newest pair may hold what an earlier request left there, NaN too.
      if (token % 2 == 0 && row + 1 == span->first_row + span->num_rows)
        for (long i = 0; i < m.head_dim; i++) values[2 * i + 1] = 0;
    }
  }
}

// softmax(scale · scores[0 .. length)) as bf16, zero from there to `padded`. All three may be read to `padded`.
void softmax(float* scores, long length, long padded, float scale, uint16_t* chances) {
  __m512 largest = _mm512_set1_ps(-INFINITY), total = _mm512_setzero_ps();
  for (long i = 0; i < length; i += 16)
    largest = _mm512_mask_max_ps(largest, inside(length - i), largest, _mm512_loadu_ps(scores + i));
  __m512 shift = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
  for (long i = 0; i < length; i += 16) {
    __m512 away = _mm512_mul_ps(_mm512_sub_ps(_mm512_loadu_ps(scores + i), shift), _mm512_set1_ps(scale));
    __m512 chance = _mm512_maskz_mov_ps(inside(length - i), exponential(away));
    total = _mm512_add_ps(total, chance);
    _mm512_storeu_ps(scores + i, chance);
  }
  __m512 by = _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total));
  for (long i = 0; i < padded; i += 16) {
    __m512 chance = _mm512_maskz_mul_ps(inside(length - i), _mm512_loadu_ps(scores + i), by);
    _mm256_storeu_si256((__m256i*)(chances + i), rounded(chance));
  }
}

struct Scratch {
  std::vector<float> scores;
  std::vector<uint16_t> chances;
};

// Up to ROWS pairs (row, query head) of one span, all with the key/value head `kv`: [first, first + count).
void attend(const Model& m, const Layer& layer, const Step& s, const Span& span, long kv, long first, long count,
            Scratch& scratch) {
  long group = m.heads / m.kv_heads, c = m.head_dim, half = c / 2;
  long longest = span.first_position + (first + count - 1) / group + 1;
  long blocks = (longest + BLOCK - 1) / BLOCK, padded = blocks * BLOCK;
  scratch.scores.resize(std::max<size_t>(scratch.scores.size(), ROWS * padded));
  scratch.chances.resize(std::max<size_t>(scratch.chances.size(), ROWS * padded));
  float* scores = scratch.scores.data();
  uint16_t* chances = scratch.chances.data();
  const int* table = s.blocks + span.first_block;
  auto row = [&](long i) { return span.first_row + (first + i) / group; };
  auto head = [&](long i) { return kv * group + (first + i) % group; };

  const uint16_t* queries[ROWS];
  for (long i = 0; i < count; i++)
    queries[i] = s.qkv + row(i) * (m.heads + 2 * m.kv_heads) * c + head(i) * c;
  for (long b = 0; b < blocks; b++) {
    __m512 sums[ROWS][4];
    for (long i = 0; i < count; i++) sums[i][0] = sums[i][1] = _mm512_setzero_ps();
    const uint32_t* keys = layer.keys + (table[b] * m.kv_heads + kv) * half * BLOCK;
    accumulate<2>(count, sums, queries, keys, BLOCK, half);
    for (long i = 0; i < count; i++)
      for (int z = 0; z < 2; z++) _mm512_storeu_ps(scores + i * padded + b * BLOCK + 16 * z, sums[i][z]);
  }
  for (long i = 0; i < count; i++)
    softmax(scores + i * padded, span.first_position + (first + i) / group + 1, padded, 1.0f / std::sqrt((float)c),
            chances + i * padded);

  long columns = c % PANEL ? 16 : PANEL;  // at a time
  for (long column = 0; column < c; column += columns) {
    __m512 sums[ROWS][4];
    for (long i = 0; i < count; i++)
      for (auto& sum : sums[i]) sum = _mm512_setzero_ps();
    for (long b = 0; b < blocks; b++) {
      const uint16_t* rows[ROWS];
      for (long i = 0; i < count; i++) rows[i] = chances + i * padded + b * BLOCK;
      const uint32_t* values = layer.values + (table[b] * m.kv_heads + kv) * BLOCK / 2 * c + column;
      long pairs = (std::min(BLOCK, longest - b * BLOCK) + 1) / 2;  // what lies beyond may be anything, NaN too
      if (columns == PANEL)
        accumulate<4>(count, sums, rows, values, c, pairs);
      else
        accumulate<1>(count, sums, rows, values, c, pairs);
    }
    for (long i = 0; i < count; i++)
      for (long z = 0; z < columns / 16; z++)
        _mm256_storeu_si256((__m256i*)(s.mixed + (row(i) * m.heads + head(i)) * c + column + 16 * z),
                            rounded(sums[i][z]));
  }
}

struct Task {
  int span, kv, first, count;
};

std::vector<Task> attention_tasks(const Model& m, const Step& s) {
  std::vector<Task> tasks;
  for (int i = 0; i < s.num_spans; i++) {
    long pairs = s.spans[i].num_rows * (m.heads / m.kv_heads), tiles = (pairs + ROWS - 1) / ROWS;
    for (int kv = 0; kv < m.kv_heads; kv++)
      for (long t = 0; t < tiles; t++) {
        long first = cut(pairs, tiles, t);
        tasks.push_back({i, kv, (int)first, (int)(cut(pairs, tiles, t + 1) - first)});
      }
  }
  return tasks;
}

// Of the rows `outputs`, when `x` holds what the last layer left.
void output_logits(const Model& m, const Step& s) {
#pragma omp for schedule(static)
  for (long i = 0; i < s.num_outputs; i++)
    norm(s.x + s.outputs[i] * m.hidden, m.norm, m.hidden, m.eps, s.normed + i * m.hidden);
  logits(s.normed, s.num_outputs, m.hidden, m.head, m.vocab, s.logits);
}

void forward(const Model& m, const Step& s, const std::vector<Task>& tasks) {
  Scratch scratch;
  long q = m.heads * m.head_dim, width = q + 2 * m.kv_heads * m.head_dim;
#pragma omp for schedule(static)
  for (long row = 0; row < s.num_rows; row++)
    std::memcpy(s.x + row * m.hidden, m.embedding + s.tokens[row] * m.hidden, 2 * m.hidden);
  for (long l = 0; l < m.num_layers; l++) {
    const Layer& layer = m.layers[l];
    norms(s.x, layer.attention_norm, s.num_rows, m.hidden, m.eps, s.normed);
    linear(s.normed, s.num_rows, m.hidden, layer.qkv, width, s.qkv, false);
    remember(m, layer, s);
#pragma omp for schedule(dynamic, 4)
    for (size_t t = 0; t < tasks.size(); t++)
      attend(m, layer, s, s.spans[tasks[t].span], tasks[t].kv, tasks[t].first, tasks[t].count, scratch);
    linear(s.mixed, s.num_rows, q, layer.out, m.hidden, s.x, true);
    norms(s.x, layer.mlp_norm, s.num_rows, m.hidden, m.eps, s.normed);
    gated(s.normed, s.num_rows, m.hidden, layer.gate_up, m.ffn, s.inner);
    linear(s.inner, s.num_rows, m.ffn, layer.down, m.hidden, s.x, true);
  }
  output_logits(m, s);
}

}  // namespace

extern "C" void decoder_step(const Model* model, const Step* step) {
  std::vector<Task> tasks = attention_tasks(*model, *step);
#pragma omp parallel num_threads(step->threads)
  forward(*model, *step, tasks);
}

// Logits of further rows of the step that ran last: `outputs`, `x`, `normed`, `logits` and two counts are read.
extern "C" void decoder_logits(const Model* model, const Step* step) {
#pragma omp parallel num_threads(step->threads)
  output_logits(*model, *step);
}

// weight [rows, columns] -> panels of 64 rows, zeros beyond the last; `columns` is even.
extern "C" void pack_panels(const uint16_t* weight, long rows, long columns, uint32_t* panels) {
  const uint32_t* pairs = (const uint32_t*)weight;
  for (long p = 0; p < (rows + PANEL - 1) / PANEL; p++)
    for (long kk = 0; kk < columns / 2; kk++)
      for (long i = 0; i < PANEL; i++) {
        long row = p * PANEL + i;
        panels[(p * columns / 2 + kk) * PANEL + i] = row < rows ? pairs[row * columns / 2 + kk] : 0;
      }
}

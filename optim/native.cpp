// Symmetric products on a CPU with AVX-512 BF16: half of each is computed, and written twice.
//
// out = alpha·A·Bᵀ + beta·C for bf16 A, B [n, k] and symmetric C, out [n, n], sums in fp32, rounded once.
// The caller knows that the product is symmetric: XXᵀ, or polynomials of one matrix. A BLAS does not, and
// computes all of it. optim/native.py compiles this file and says why where it cannot.
//
// Both operands are packed into panels of 32 rows: panel[kk][row] is the pair of elements 2kk and 2kk + 1 of
// a row, which is what one lane of vdpbf16ps multiplies. A tile is 32 x 32, in four blocks of 8 rows whose
// sums fill 16 registers.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <thread>
#include <vector>

namespace {

constexpr long PANEL = 32;  // rows of a panel and of a tile
constexpr long ROWS = 8;    // of a tile that are computed together

struct Matrix {  // element (row, col) of matrix b is at data[b·batch + row·row_stride + col·col_stride]
  const uint16_t* data;
  long batch, row, col;
};

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

// One panel: rows [top, top + 32) of a matrix, zeros beyond row n and column k.
void pack_panel(const uint16_t* x, long row, long col, long top, long n, long k, uint32_t* panel) {
  long rows = std::min(PANEL, n - top), pairs = (k + 1) / 2, kk = 0;
  x += top * row;
  if (rows == PANEL && row == 1) {
    for (; kk < k / 2; kk++) {
      __m512i first, second;
      interleave(_mm512_loadu_si512(x + 2 * kk * col), _mm512_loadu_si512(x + (2 * kk + 1) * col), &first, &second);
      _mm512_storeu_si512(panel + kk * PANEL, first);
      _mm512_storeu_si512(panel + kk * PANEL + 16, second);
    }
  } else if (rows == PANEL && col == 1) {
    for (; kk + 16 <= k / 2; kk += 16)
      for (long half = 0; half < PANEL; half += 16) {
        __m512i r[16];
        for (int i = 0; i < 16; i++) r[i] = _mm512_loadu_si512(x + (half + i) * row + 2 * kk);
        transpose(r);
        for (int i = 0; i < 16; i++) _mm512_storeu_si512(panel + (kk + i) * PANEL + half, r[i]);
      }
  }
  for (; kk < pairs; kk++)
    for (long i = 0; i < PANEL; i++) {
      uint32_t low = i < rows ? x[i * row + 2 * kk * col] : 0;
      uint32_t high = i < rows && 2 * kk + 1 < k ? x[i * row + (2 * kk + 1) * col] : 0;
      panel[kk * PANEL + i] = low | high << 16;
    }
}

// Rows [first, first + 8) of a tile, in fp32.
void multiply(const uint32_t* a, const uint32_t* b, long pairs, long first, float (*sums)[PANEL]) {
  __m512 total[ROWS][2];
  for (auto& row : total) row[0] = row[1] = _mm512_setzero_ps();
  for (long kk = 0; kk < pairs; kk++) {
    __m512bh left = (__m512bh)_mm512_loadu_si512(b + kk * PANEL);
    __m512bh right = (__m512bh)_mm512_loadu_si512(b + kk * PANEL + 16);
#pragma GCC unroll 8
    for (long i = 0; i < ROWS; i++) {
      __m512bh pair = (__m512bh)_mm512_set1_epi32(a[kk * PANEL + first + i]);
      total[i][0] = _mm512_dpbf16_ps(total[i][0], pair, left);
      total[i][1] = _mm512_dpbf16_ps(total[i][1], pair, right);
    }
  }
  for (long i = 0; i < ROWS; i++)
    for (long half = 0; half < 2; half++) _mm512_storeu_ps(sums[first + i] + 16 * half, total[i][half]);
}

// alpha·sums + beta·C, rounded, to the tile at (top, left) and mirrored.
void finish(float (*sums)[PANEL], const uint16_t* c, uint16_t* out, long n, long top, long left, float alpha,
            float beta) {
  alignas(64) uint16_t tile[PANEL][PANEL];
  long rows = std::min(PANEL, n - top), cols = std::min(PANEL, n - left);
  for (long i = 0; i < rows; i++)
    for (long half = 0; half < PANEL; half += 16) {
      __mmask16 inside = cols - half >= 16 ? 0xffff : cols > half ? (1u << (cols - half)) - 1 : 0;
      __m512 value = _mm512_mul_ps(_mm512_loadu_ps(sums[i] + half), _mm512_set1_ps(alpha));
      if (c) {
        __m256i words = _mm256_maskz_loadu_epi16(inside, c + (top + i) * n + left + half);
        __m512 addend = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
        value = _mm512_fmadd_ps(addend, _mm512_set1_ps(beta), value);
      }
      __m256i rounded = (__m256i)_mm512_cvtneps_pbh(value);
      _mm256_store_si256((__m256i*)(tile[i] + half), rounded);
      if (top != left) _mm256_mask_storeu_epi16(out + (top + i) * n + left + half, inside, rounded);
    }
  if (top == left) {
    for (long i = 0; i < rows; i++)
      for (long j = 0; j <= i; j++) out[(top + i) * n + left + j] = out[(left + j) * n + top + i] = tile[i][j];
  } else if (rows == PANEL && cols == PANEL) {
    __m512i first[16], second[16];
    for (int i = 0; i < 16; i++)
      interleave(_mm512_load_si512(tile[2 * i]), _mm512_load_si512(tile[2 * i + 1]), first + i, second + i);
    transpose(first);
    transpose(second);
    for (int j = 0; j < 16; j++) {
      _mm512_storeu_si512(out + (left + j) * n + top, first[j]);
      _mm512_storeu_si512(out + (left + 16 + j) * n + top, second[j]);
    }
  } else {
    for (long j = 0; j < cols; j++)
      for (long i = 0; i < rows; i++) out[(left + j) * n + top + i] = tile[i][j];
  }
}

void product(const Matrix& a, const Matrix& b, const uint16_t* c, uint16_t* out, long index, long n, long k,
             float alpha, float beta, std::vector<uint32_t>& space) {
  long panels = (n + PANEL - 1) / PANEL, size = (k + 1) / 2 * PANEL;
  const uint16_t *x = a.data + index * a.batch, *y = b.data + index * b.batch;
  bool same = x == y && a.row == b.row && a.col == b.col;
  space.resize((same ? 1 : 2) * panels * size);
  uint32_t *left = space.data(), *right = same ? left : left + panels * size;
  for (long p = 0; p < panels; p++) {
    pack_panel(x, a.row, a.col, p * PANEL, n, k, left + p * size);
    if (!same) pack_panel(y, b.row, b.col, p * PANEL, n, k, right + p * size);
  }
  float sums[PANEL][PANEL];
  for (long row = 0; row < panels; row++)
    for (long col = 0; col <= row; col++) {
      for (long first = 0; first < PANEL; first += ROWS)
        multiply(left + row * size, right + col * size, (k + 1) / 2, first, sums);
      finish(sums, c ? c + index * n * n : nullptr, out + index * n * n, n, row * PANEL, col * PANEL, alpha, beta);
    }
}

}  // namespace

extern "C" void symmetric_product(const uint16_t* a, long a_batch, long a_row, long a_col, const uint16_t* b,
                                  long b_batch, long b_row, long b_col, const uint16_t* c, uint16_t* out,
                                  long batch, long n, long k, float alpha, float beta, long threads) {
  Matrix left{a, a_batch, a_row, a_col}, right{b, b_batch, b_row, b_col};
  threads = std::max(1L, std::min(threads, batch));
  auto work = [&](long thread) {
    std::vector<uint32_t> space;
    for (long i = thread; i < batch; i += threads) product(left, right, c, out, i, n, k, alpha, beta, space);
  };
  std::vector<std::thread> others;
  for (long thread = 1; thread < threads; thread++) others.emplace_back(work, thread);
  work(0);
  for (auto& other : others) other.join();
}

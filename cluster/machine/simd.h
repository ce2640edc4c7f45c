// Vectors of fp32 in two tiers, for the compiled code (cluster/machine/compiled.py): AVX-512 BF16, 16 lanes, and AVX2
// with FMA, 8 lanes. The compiler's flags choose the tier. Code that uses only what is declared here is written
// once, in terms of WIDTH and PARTS.
//
// Products. Two elements that follow each other in a row or column are a pair: 2kk and 2kk + 1. AVX-512 BF16
// multiplies the pairs of two vectors and adds them up in one instruction; AVX2 takes PARTS = 2 steps, one for each
// element of the pair:
//
//   sum = add_product(sum, broadcast(row + kk * PARTS + part), columns)
//
// What is broadcast is a Scalar: a bf16 pair with AVX-512, an fp32 element with AVX2, where to broadcast from
// memory costs nothing and to widen after it would. `columns` is load_operand(pairs, part) of bf16 pairs, the first
// element in the low half, which AVX2 widens in a register; or load_operand(scalars) of what is kept as Scalars.
//
// Counts. `count` is how many lanes hold data: all if it is WIDTH or more, none if it is 0 or less. Lanes beyond
// it are read as 0 and not written; memory beyond it is not touched.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {  // internal linkage: two libraries of different tiers may be loaded in one process

#ifdef __AVX512BF16__

constexpr long WIDTH = 16;      // lanes of a Vec
constexpr long REGISTERS = 32;  // vector registers
constexpr long PARTS = 1;       // steps that multiply a vector of pairs

using Vec = __m512;        // WIDTH fp32
using Words = __m512i;     // WIDTH times 32 bits
using Operand = __m512bh;  // either side of a product
using Scalar = uint32_t;   // what is broadcast

Vec spread(float x) { return _mm512_set1_ps(x); }
Vec zeros() { return _mm512_setzero_ps(); }
Vec larger(Vec a, Vec b) { return _mm512_max_ps(a, b); }  // b if either is NaN
Vec multiply_add(Vec a, Vec b, Vec c) { return _mm512_fmadd_ps(a, b, c); }  // a·b + c
Vec subtract_product(Vec c, Vec a, Vec b) { return _mm512_fnmadd_ps(a, b, c); }  // c - a·b
Vec root(Vec x) { return _mm512_sqrt_ps(x); }
Vec nearest(Vec x) { return _mm512_roundscale_ps(x, 0); }  // integer, ties to even
Vec times_power(Vec x, Vec n) { return _mm512_scalef_ps(x, n); }  // x·2ⁿ, n an integer
float sum_of(Vec x) { return _mm512_reduce_add_ps(x); }
float largest_of(Vec x) { return _mm512_reduce_max_ps(x); }

__mmask16 lanes(long count) { return count >= 16 ? 0xffff : count > 0 ? (1u << count) - 1 : 0; }

Vec first(Vec x, long count) { return _mm512_maskz_mov_ps(lanes(count), x); }  // 0 beyond
Vec larger(Vec a, Vec b, long count) { return _mm512_mask_max_ps(a, lanes(count), a, b); }  // a beyond

Vec widen(__m256i bf16) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bf16), 16)); }
__m256i rounded(Vec x) { return (__m256i)_mm512_cvtneps_pbh(x); }  // to bf16: to nearest, ties to even
Vec as_bf16(Vec x) { return widen(rounded(x)); }  // rounded, and widened again
uint16_t rounded(float x) { return _mm_extract_epi16((__m128i)_mm_cvtneps_pbh(_mm_set_ss(x)), 0); }

Vec load(const float* x) { return _mm512_loadu_ps(x); }
Vec load(const float* x, long count) { return _mm512_maskz_loadu_ps(lanes(count), x); }
Vec load(const uint16_t* bf16, long count) { return widen(_mm256_maskz_loadu_epi16(lanes(count), bf16)); }
void store(float* to, Vec x) { _mm512_storeu_ps(to, x); }
void store(float* to, Vec x, long count) { _mm512_mask_storeu_ps(to, lanes(count), x); }
void store(uint16_t* to, Vec x, long count) { _mm256_mask_storeu_epi16(to, lanes(count), rounded(x)); }

Words load_words(const void* from) { return _mm512_loadu_si512(from); }
void store_words(void* to, Words x) { _mm512_storeu_si512(to, x); }
Vec as_floats(Words x) { return _mm512_castsi512_ps(x); }

Operand load_operand(const Scalar* x) { return (Operand)load_words(x); }
Operand load_operand(const uint32_t* pairs, long /* part */) { return (Operand)load_words(pairs); }
Operand broadcast(const Scalar* x) { return (Operand)_mm512_set1_epi32(*x); }
Vec add_product(Vec sum, Operand left, Operand right) { return _mm512_dpbf16_ps(sum, left, right); }

// As many Scalars as make a vector, from elements that follow each other.
void store_scalars(Scalar* to, const float* x) { store_words(to, (Words)_mm512_cvtne2ps_pbh(load(x + 16), load(x))); }
// Elements `i`, 0 or 1, of pairs that are kept as Scalars: with AVX2 the second ones are `stride` behind the first.
Vec load_element(const Scalar* x, long, long i) {
  Words pairs = load_words(x);
  return as_floats(i ? _mm512_and_si512(pairs, _mm512_set1_epi32(0xffff0000)) : _mm512_slli_epi32(pairs, 16));
}
// Pairs of an element of `first` and the one below it in `second`, `size` of them, as load_element reads them.
template <long size>
void store_pairs(const Scalar* first, const Scalar* second, Scalar* to) {
  alignas(64) static const uint16_t ORDER[64] = {
      0,  32, 1,  33, 2,  34, 3,  35, 4,  36, 5,  37, 6,  38, 7,  39, 8,  40, 9,  41, 10, 42,
      11, 43, 12, 44, 13, 45, 14, 46, 15, 47, 16, 48, 17, 49, 18, 50, 19, 51, 20, 52, 21, 53,
      22, 54, 23, 55, 24, 56, 25, 57, 26, 58, 27, 59, 28, 60, 29, 61, 30, 62, 31, 63};
  for (long j = 0; j < size; j += 2 * WIDTH) {
    Words a = load_words(first + j / 2), b = load_words(second + j / 2);
    store_words(to + j, _mm512_permutex2var_epi16(a, _mm512_load_si512(ORDER), b));
    store_words(to + j + WIDTH, _mm512_permutex2var_epi16(a, _mm512_load_si512(ORDER + 32), b));
  }
}

// r[i][j] -> r[j][i], 16 x 16 values of 32 bits.
void transpose(Words r[16]) {
  Words t[16];
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

struct Squares {  // a sum of squares in fp64
  __m512d low = _mm512_setzero_pd(), high = _mm512_setzero_pd();
  void add(Vec x) {
    __m512d first = _mm512_cvtps_pd(_mm512_castps512_ps256(x));
    __m512d second = _mm512_cvtps_pd(_mm512_extractf32x8_ps(x, 1));
    low = _mm512_fmadd_pd(first, first, low);
    high = _mm512_fmadd_pd(second, second, high);
  }
  double sum() const { return _mm512_reduce_add_pd(_mm512_add_pd(low, high)); }
};

#else  // AVX2 and FMA: as above, where nothing else is said

constexpr long WIDTH = 8;
constexpr long REGISTERS = 16;
constexpr long PARTS = 2;

using Vec = __m256;
using Words = __m256i;
using Operand = __m256;
using Scalar = float;

Vec spread(float x) { return _mm256_set1_ps(x); }
Vec zeros() { return _mm256_setzero_ps(); }
Vec larger(Vec a, Vec b) { return _mm256_max_ps(a, b); }
Vec multiply_add(Vec a, Vec b, Vec c) { return _mm256_fmadd_ps(a, b, c); }
Vec subtract_product(Vec c, Vec a, Vec b) { return _mm256_fnmadd_ps(a, b, c); }
Vec root(Vec x) { return _mm256_sqrt_ps(x); }
Vec nearest(Vec x) { return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
Vec times_power(Vec x, Vec n) {  // n from -126; above 127 as if it were 127, where AVX-512 gives infinity
  __m256i exponent = _mm256_cvtps_epi32(_mm256_min_ps(n, _mm256_set1_ps(127)));
  return _mm256_mul_ps(x, _mm256_castsi256_ps(
                              _mm256_slli_epi32(_mm256_add_epi32(exponent, _mm256_set1_epi32(127)), 23)));
}
float sum_of(Vec x) {
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}
float largest_of(Vec x) {
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(x), _mm256_extractf128_ps(x, 1));
  __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

__m256i lanes(long count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(std::min(count, WIDTH)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// Whole vectors are the usual case, and a mask takes as long as some of the arithmetic.
Vec first(Vec x, long count) { return count >= WIDTH ? x : _mm256_and_ps(x, _mm256_castsi256_ps(lanes(count))); }
Vec larger(Vec a, Vec b, long count) {
  return count >= WIDTH ? larger(a, b) : _mm256_blendv_ps(a, _mm256_max_ps(a, b), _mm256_castsi256_ps(lanes(count)));
}

Vec widen(__m128i bf16) { return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bf16), 16)); }
__m256i rounded_in_place(Vec x) {  // the upper halves of 32 bits are bf16, the lower ones are to be dropped
  __m256i bits = _mm256_castps_si256(x), odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  __m256i near = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));  // a carry could make NaN infinite
  __m256i not_a_number = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  return _mm256_blendv_epi8(near, quiet, not_a_number);
}
__m128i rounded(Vec x) {
  __m256i words = _mm256_srli_epi32(rounded_in_place(x), 16);
  return _mm_packus_epi32(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
}
Vec as_bf16(Vec x) { return _mm256_castsi256_ps(_mm256_and_si256(rounded_in_place(x), _mm256_set1_epi32(0xffff0000))); }
uint16_t rounded(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  return (x == x ? bits + 0x7fff + (bits >> 16 & 1) : bits | 0x400000) >> 16;
}

// Part of a vector of bf16 goes through memory: AVX2 has no mask for 16-bit words.
__m128i load_some(const uint16_t* from, long count) {
  __m128i words{};
  if (count > 0) std::memcpy(&words, from, 2 * count);
  return words;
}
void store_some(uint16_t* to, __m128i words, long count) {
  if (count > 0) std::memcpy(to, &words, 2 * count);
}

Vec load(const float* x) { return _mm256_loadu_ps(x); }
Vec load(const float* x, long count) { return count >= WIDTH ? load(x) : _mm256_maskload_ps(x, lanes(count)); }
Vec load(const uint16_t* bf16, long count) {
  return widen(count >= WIDTH ? _mm_loadu_si128((const __m128i*)bf16) : load_some(bf16, count));
}
void store(float* to, Vec x) { _mm256_storeu_ps(to, x); }
void store(float* to, Vec x, long count) {
  count >= WIDTH ? store(to, x) : _mm256_maskstore_ps(to, lanes(count), x);
}
void store(uint16_t* to, Vec x, long count) {
  count >= WIDTH ? _mm_storeu_si128((__m128i*)to, rounded(x)) : store_some(to, rounded(x), count);
}

Words load_words(const void* from) { return _mm256_loadu_si256((const __m256i*)from); }
void store_words(void* to, Words x) { _mm256_storeu_si256((__m256i*)to, x); }
Vec as_floats(Words x) { return _mm256_castsi256_ps(x); }

Operand load_operand(const Scalar* x) { return load(x); }
Operand load_operand(const uint32_t* pairs, long part) {
  asm volatile("" ::: "memory");  // reads them again for the other part: no register is left to keep them in
  Words words = load_words(pairs);
  return as_floats(part ? _mm256_and_si256(words, _mm256_set1_epi32(0xffff0000)) : _mm256_slli_epi32(words, 16));
}
Operand broadcast(const Scalar* x) { return _mm256_broadcast_ss(x); }
Vec add_product(Vec sum, Operand left, Operand right) {
  // In place, which GCC does not do by itself: it would keep some of 12 sums on the stack.
  asm("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(left), "x"(right));
  return sum;
}

void store_scalars(Scalar* to, const float* x) { store(to, load(x)); }
Vec load_element(const Scalar* x, long stride, long i) { return load(x + i * stride); }
template <long size>
void store_pairs(const Scalar* first, const Scalar* second, Scalar* to) {
  for (long j = 0; j < size; j += WIDTH) {
    store(to + j, load(first + j));
    store(to + size + j, load(second + j));
  }
}

// r[i][j] -> r[j][i], 8 x 8 values of 32 bits.
void transpose(Words r[8]) {
  Words t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) r[i] = t[i];
}

struct Squares {
  __m256d low = _mm256_setzero_pd(), high = _mm256_setzero_pd();
  void add(Vec x) {
    __m256d first = _mm256_cvtps_pd(_mm256_castps256_ps128(x));
    __m256d second = _mm256_cvtps_pd(_mm256_extractf128_ps(x, 1));
    low = _mm256_fmadd_pd(first, first, low);
    high = _mm256_fmadd_pd(second, second, high);
  }
  double sum() const {
    __m256d four = _mm256_add_pd(low, high);
    __m128d two = _mm_add_pd(_mm256_castpd256_pd128(four), _mm256_extractf128_pd(four, 1));
    return _mm_cvtsd_f64(_mm_add_sd(two, _mm_unpackhi_pd(two, two)));
  }
};

#endif

// e^x to 2e-7 relative (Cephes' polynomial); 0 far below, NaN of NaN.
Vec exponential(Vec x) {
  x = larger(spread(-87.0f), x);
  Vec n = nearest(x * spread(1.44269504f));
  x = subtract_product(x, n, spread(0.693359375f));
  x = subtract_product(x, n, spread(-2.12194440e-4f));
  Vec y = spread(1.9875691500e-4f);
  for (float c : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
    y = multiply_add(y, x, spread(c));
  y = multiply_add(y, x * x, x) + spread(1.0f);
  return times_power(y, n);
}

float widen(uint16_t bf16) {
  uint32_t bits = uint32_t(bf16) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

float widen(float x) { return x; }

}  // namespace

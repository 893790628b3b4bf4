// Products of float32 rows with weights in 16, 8 and 4 bits, on a CPU.
//
//   y[row][o] = sum over i of x[row][i] * weight[o][i] + bias[o]
//
// 32, 16 bits: float32 or float16 weights, float32 everything else.
// 8 bits:  the row is rounded to int8 by its own largest value; sums are exact in int32.
// 4 bits:  each group of 128 inputs of the row is rounded so; sums of a group are exact, groups are added in float32.
//
// Weights are read as the model's files hold them (docs/quantization.md), so they may stay mapped. What a row becomes
// depends on that row alone, to the last bit: a tile of one row and one of four add in the same order.
//
// Names: R rows and O outputs of a tile; K inputs; G groups.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "pool.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VNNI__)
#define PLUG_AVX512 1
#include <immintrin.h>
#endif

namespace plug {

constexpr int64_t GROUP = 128;
constexpr int64_t OUTPUTS_AT_ONCE = 32;  // what a thread takes at a time

// --- rows in 8 bits ----------------------------------------------------------------------------------------------------

// `count` values to int8 by their largest; the scale, and the sum of the integers.
inline float round_values(const float* x, int64_t count, int8_t* q, int32_t* sum) {
  float largest = 0;
  for (int64_t i = 0; i < count; ++i) largest = std::max(largest, std::fabs(x[i]));
  const float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t value = static_cast<int32_t>(std::nearbyint(x[i] * inverse));
    q[i] = static_cast<int8_t>(value);
    total += value;
  }
  *sum = total;
  return scale;
}

// Where the eight inputs of a 32-bit word of 4-bit weights stand: the low halves of its bytes hold inputs 0, 4, 1, 5,
// the high ones 2, 6, 3, 7 (`NIBBLES` in quantization/scheme.py). A group's inputs are put in that order, all low first.
constexpr int LOW[4] = {0, 4, 1, 5}, HIGH[4] = {2, 6, 3, 7};

inline void order_for_nibbles(const int8_t* q, int8_t* ordered) {
  for (int word = 0; word < GROUP / 8; ++word)
    for (int byte = 0; byte < 4; ++byte) {
      ordered[4 * word + byte] = q[8 * word + LOW[byte]];
      ordered[GROUP / 2 + 4 * word + byte] = q[8 * word + HIGH[byte]];
    }
}

inline int64_t padded(int64_t in) { return (in + 63) / 64 * 64; }

struct Rows {  // rounded rows
  std::vector<int8_t> q;
  std::vector<float> scale;   // a row (8 bits) or a row and group (4 bits)
  std::vector<float> summed;  // 4 bits: scale times the sum of the group's integers
  std::vector<int32_t> sum;   // 8 bits: the sum of the row's integers
};

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// --- tiles -------------------------------------------------------------------------------------------------------------

#ifdef PLUG_AVX512

#define UNROLL _Pragma("GCC unroll 8")

inline __m512 load(const float* weight, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, weight); }
inline __m512 load(const uint16_t* weight, __mmask16 mask) { return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, weight)); }

template <int R, int O, typename Weight>
inline void tile_float(const Weight* weight, const float* x, int64_t K, float (*y)[O]) {
  __m512 sums[R][O];
  UNROLL for (auto& row : sums)
    UNROLL for (auto& sum : row) sum = _mm512_setzero_ps();
  const int64_t whole = K & ~int64_t{15};
  for (int64_t k = 0; k < whole; k += 16) {
    __m512 inputs[R];
    UNROLL for (int r = 0; r < R; ++r) inputs[r] = _mm512_loadu_ps(x + r * K + k);
    UNROLL for (int o = 0; o < O; ++o) {
      const __m512 w = load(weight + o * K + k, 0xffff);
      UNROLL for (int r = 0; r < R; ++r) sums[r][o] = _mm512_fmadd_ps(inputs[r], w, sums[r][o]);
    }
  }
  if (whole < K) {
    const __mmask16 mask = (1u << (K - whole)) - 1;
    UNROLL for (int o = 0; o < O; ++o) {
      const __m512 w = load(weight + o * K + whole, mask);
      UNROLL for (int r = 0; r < R; ++r)
        sums[r][o] = _mm512_fmadd_ps(_mm512_maskz_loadu_ps(mask, x + r * K + whole), w, sums[r][o]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int o = 0; o < O; ++o) y[r][o] = _mm512_reduce_add_ps(sums[r][o]);
}

template <int R, int O>
inline void tile_8(const int8_t* weight, const int8_t* q, int64_t K, int64_t width, int32_t (*y)[O]) {
  // The product of unsigned with signed bytes: weights get 128 added, which `linear` takes off again.
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  __m512i sums[R][O];
  UNROLL for (auto& row : sums)
    UNROLL for (auto& sum : row) sum = _mm512_setzero_si512();
  for (int64_t k = 0; k < K; k += 64) {
    const __mmask64 mask = K - k < 64 ? (uint64_t{1} << (K - k)) - 1 : ~uint64_t{0};
    __m512i inputs[R];
    UNROLL for (int r = 0; r < R; ++r) inputs[r] = _mm512_loadu_si512(q + r * width + k);
    UNROLL for (int o = 0; o < O; ++o) {
      const __m512i w = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, weight + o * K + k), flip);
      UNROLL for (int r = 0; r < R; ++r) sums[r][o] = _mm512_dpbusd_epi32(sums[r][o], w, inputs[r]);
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int o = 0; o < O; ++o) y[r][o] = _mm512_reduce_add_epi32(sums[r][o]);
}

inline __m512 widen_bfloat16(const uint16_t* bits, __mmask16 mask) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, bits)), 16));
}

inline float group_terms(const uint16_t* scale, const uint16_t* center, const float* row_scale, const float* summed, int64_t G,
                         float* factors) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t g = 0; g < G; g += 16) {
    const __mmask16 mask = G - g < 16 ? (1u << (G - g)) - 1 : 0xffff;
    const __m512 s = widen_bfloat16(scale + g, mask);
    _mm512_mask_storeu_ps(factors + g, mask, _mm512_mul_ps(s, _mm512_maskz_loadu_ps(mask, row_scale + g)));
    const __m512 shift = _mm512_fnmadd_ps(_mm512_set1_ps(8), s, widen_bfloat16(center + g, mask));
    sum = _mm512_fmadd_ps(shift, _mm512_maskz_loadu_ps(mask, summed + g), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

template <int R, int O>
inline void tile_4(const uint8_t* weight, const float* factors, const int8_t* q, int64_t G, float (*y)[O]) {
  const __m512i low = _mm512_set1_epi8(15);
  __m512 sums[R][O];
  UNROLL for (auto& row : sums)
    UNROLL for (auto& sum : row) sum = _mm512_setzero_ps();
  for (int64_t g = 0; g < G; ++g) {
    __m512i first[R], second[R];
    UNROLL for (int r = 0; r < R; ++r) {
      first[r] = _mm512_loadu_si512(q + (r * G + g) * GROUP);
      second[r] = _mm512_loadu_si512(q + (r * G + g) * GROUP + GROUP / 2);
    }
    UNROLL for (int o = 0; o < O; ++o) {
      const __m512i packed = _mm512_loadu_si512(weight + (o * G + g) * (GROUP / 2));
      const __m512i even = _mm512_and_si512(packed, low);
      const __m512i odd = _mm512_and_si512(_mm512_srli_epi16(packed, 4), low);
      UNROLL for (int r = 0; r < R; ++r) {
        __m512i dot = _mm512_dpbusd_epi32(_mm512_setzero_si512(), even, first[r]);
        dot = _mm512_dpbusd_epi32(dot, odd, second[r]);
        sums[r][o] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(dot), _mm512_set1_ps(factors[(r * O + o) * G + g]), sums[r][o]);
      }
    }
  }
  UNROLL for (int r = 0; r < R; ++r)
    UNROLL for (int o = 0; o < O; ++o) y[r][o] = _mm512_reduce_add_ps(sums[r][o]);
}

#else  // what the compiler makes of it for AVX2, NEON, …

inline float widened(float weight) { return weight; }

inline float widened(uint16_t bits) {  // float16
#if defined(__FLT16_MANT_DIG__)
  _Float16 value;
  std::memcpy(&value, &bits, 2);
  return static_cast<float>(value);
#else
  const uint32_t sign = (bits & 0x8000u) << 16, magnitude = bits & 0x7fffu;
  uint32_t wide = magnitude << 13;
  float value;
  std::memcpy(&value, &wide, 4);
  value *= 0x1p112f;  // the exponent's bias: 127 - 15
  if (magnitude >= 0x7c00u) value = magnitude == 0x7c00u ? INFINITY : NAN;
  std::memcpy(&wide, &value, 4);
  wide |= sign;
  std::memcpy(&value, &wide, 4);
  return value;
#endif
}

template <int R, int O, typename Weight>
inline void tile_float(const Weight* weight, const float* x, int64_t K, float (*y)[O]) {
  for (int o = 0; o < O; ++o) {
    float sums[R][16] = {};
    for (int64_t k = 0; k < K; k += 16) {
      const int lanes = static_cast<int>(std::min<int64_t>(16, K - k));
      for (int lane = 0; lane < lanes; ++lane) {
        const float w = widened(weight[o * K + k + lane]);
        for (int r = 0; r < R; ++r) sums[r][lane] += x[r * K + k + lane] * w;
      }
    }
    for (int r = 0; r < R; ++r) {
      y[r][o] = 0;
      for (float sum : sums[r]) y[r][o] += sum;
    }
  }
}

template <int R, int O>
inline void tile_8(const int8_t* weight, const int8_t* q, int64_t K, int64_t width, int32_t (*y)[O]) {
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) {
      int32_t sum = 0;
      for (int64_t k = 0; k < K; ++k) sum += (int32_t{weight[o * K + k]} + 128) * q[r * width + k];
      y[r][o] = sum;
    }
}

inline float group_terms(const uint16_t* scale, const uint16_t* center, const float* row_scale, const float* summed, int64_t G,
                         float* factors) {
  float sum = 0;
  for (int64_t g = 0; g < G; ++g) {
    const float s = from_bfloat16(scale[g]);
    factors[g] = s * row_scale[g];
    sum += (from_bfloat16(center[g]) - 8 * s) * summed[g];
  }
  return sum;
}

template <int R, int O>
inline void tile_4(const uint8_t* weight, const float* factors, const int8_t* q, int64_t G, float (*y)[O]) {
  for (int r = 0; r < R; ++r)
    for (int o = 0; o < O; ++o) {
      float sum = 0;
      for (int64_t g = 0; g < G; ++g) {
        const uint8_t* packed = weight + (o * G + g) * (GROUP / 2);
        const int8_t* inputs = q + (r * G + g) * GROUP;
        int32_t dot = 0;
        for (int i = 0; i < GROUP / 2; ++i)
          dot += (packed[i] & 15) * inputs[i] + (packed[i] >> 4) * inputs[GROUP / 2 + i];
        sum += static_cast<float>(dot) * factors[(r * O + o) * G + g];
      }
      y[r][o] = sum;
    }
}

#endif

// --- products ----------------------------------------------------------------------------------------------------------

struct Product {
  int64_t bits;
  const void* weight;
  const void* scale;   // 8 bits: float32 (out,); 4 bits: bfloat16 (out, G)
  const void* center;  // 4 bits: bfloat16 (out, G)
  const float* bias;   // or null
  int64_t out, in;
};

// Tiles of O outputs and one or four rows over outputs [from, to) and all rows.
template <int O, typename Tile>
inline void tiles(int64_t from, int64_t to, int64_t rows, const Tile& tile) {
  for (int64_t o = from; o < to; o += O) {
    int64_t r = 0;
    if constexpr (O == 2)
      for (; r + 8 <= rows; r += 8) tile.template operator()<8>(r, o);
    for (; r + 4 <= rows; r += 4) tile.template operator()<4>(r, o);
    for (; r < rows; ++r) tile.template operator()<1>(r, o);
  }
}

template <int O, typename Weight>
void outputs_float(const Product& p, const float* x, float* y, int64_t rows, int64_t from, int64_t to) {
  tiles<O>(from, to, rows, [&]<int R>(int64_t r, int64_t o) {
    float found[R][O];
    tile_float<R, O>(static_cast<const Weight*>(p.weight) + o * p.in, x + r * p.in, p.in, found);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < O; ++j) y[(r + i) * p.out + o + j] = found[i][j] + (p.bias ? p.bias[o + j] : 0);
  });
}

template <int O>
void outputs_8(const Product& p, const Rows& x, float* y, int64_t rows, int64_t from, int64_t to) {
  const int64_t width = padded(p.in);
  const float* scale = static_cast<const float*>(p.scale);
  tiles<O>(from, to, rows, [&]<int R>(int64_t r, int64_t o) {
    int32_t found[R][O];
    tile_8<R, O>(static_cast<const int8_t*>(p.weight) + o * p.in, x.q.data() + r * width, p.in, width, found);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < O; ++j) {
        const float sum = static_cast<float>(found[i][j] - 128 * x.sum[r + i]);
        y[(r + i) * p.out + o + j] = sum * (x.scale[r + i] * scale[o + j]) + (p.bias ? p.bias[o + j] : 0);
      }
  });
}

template <int O>
void outputs_4(const Product& p, const Rows& x, float* y, int64_t rows, int64_t from, int64_t to) {
  const int64_t G = p.in / GROUP;
  static thread_local std::vector<float> own;
  std::vector<float>& factors = own;  // of each row, output and group: the weights' scale times the inputs'
  factors.resize(8 * O * G);
  tiles<O>(from, to, rows, [&]<int R>(int64_t r, int64_t o) {
    float found[R][O], shifts[R][O];
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < O; ++j) {
        const int64_t at = (o + j) * G, row = (r + i) * G;
        shifts[i][j] = group_terms(static_cast<const uint16_t*>(p.scale) + at, static_cast<const uint16_t*>(p.center) + at,
                                   x.scale.data() + row, x.summed.data() + row, G, factors.data() + (i * O + j) * G);
      }
    tile_4<R, O>(static_cast<const uint8_t*>(p.weight) + o * (p.in / 2), factors.data(), x.q.data() + r * p.in, G, found);
    for (int i = 0; i < R; ++i)
      for (int j = 0; j < O; ++j)
        y[(r + i) * p.out + o + j] = found[i][j] + shifts[i][j] + (p.bias ? p.bias[o + j] : 0);
  });
}

// The rows that `product` multiplies, made ready once for several weights of the same `bits`.
inline void make_ready(Rows& ready, int bits, const float* x, int64_t rows, int64_t in) {
  if (bits == 8) {
    const int64_t width = padded(in);
    ready.q.assign(rows * width, 0);
    ready.scale.resize(rows);
    ready.sum.resize(rows);
    for (int64_t r = 0; r < rows; ++r)
      ready.scale[r] = round_values(x + r * in, in, ready.q.data() + r * width, &ready.sum[r]);
  } else if (bits == 4) {
    const int64_t groups = rows * (in / GROUP);
    ready.q.resize(groups * GROUP);
    ready.scale.resize(groups);
    ready.summed.resize(groups);
    for (int64_t i = 0; i < groups; ++i) {
      int8_t q[GROUP];
      int32_t sum;
      ready.scale[i] = round_values(x + i * GROUP, GROUP, q, &sum);
      ready.summed[i] = ready.scale[i] * static_cast<float>(sum);
      order_for_nibbles(q, ready.q.data() + i * GROUP);
    }
  }
}

// Outputs [from, to) of all rows. Four outputs share what is read of four rows; a single row streams its weights.
inline void outputs(const Product& p, const Rows& ready, const float* x, float* y, int64_t rows, int64_t from, int64_t to) {
  const int64_t whole = rows < 4 ? from : from + (to - from) / 4 * 4;
  if (p.bits == 32) {
    outputs_float<4, float>(p, x, y, rows, from, whole);
    outputs_float<1, float>(p, x, y, rows, whole, to);
  } else if (p.bits == 16) {
    outputs_float<4, uint16_t>(p, x, y, rows, from, whole);
    outputs_float<1, uint16_t>(p, x, y, rows, whole, to);
  } else if (p.bits == 8) {
    outputs_8<4>(p, ready, y, rows, from, whole);
    outputs_8<1>(p, ready, y, rows, whole, to);
  } else {
    // Eight rows share what is unpacked, as long as they fit the first cache together.
    const bool wide = rows >= 8 && p.in <= 2048;
    wide ? outputs_4<2>(p, ready, y, rows, from, whole) : outputs_4<4>(p, ready, y, rows, from, whole);
    outputs_4<1>(p, ready, y, rows, whole, to);
  }
}

// x (rows, in) and y (rows, out) of each product, which share x; `after` gets a product's number and the outputs that are done.
template <typename After>
inline void multiply(Pool& pool, const Product* products, int count, const float* x, float* const* y, int64_t rows,
                     const After& after) {
  static thread_local Rows own;
  Rows& ready = own;  // of the calling thread, also where others read it
  make_ready(ready, products[0].bits, x, rows, products[0].in);
  int64_t chunks = 0, first[4];
  for (int i = 0; i < count; ++i) {
    first[i] = chunks;
    chunks += (products[i].out + OUTPUTS_AT_ONCE - 1) / OUTPUTS_AT_ONCE;
  }
  pool.run(chunks, [&](int64_t chunk) {
    int i = count - 1;
    while (chunk < first[i]) --i;
    const int64_t from = (chunk - first[i]) * OUTPUTS_AT_ONCE, to = std::min(from + OUTPUTS_AT_ONCE, products[i].out);
    outputs(products[i], ready, x, y[i], rows, from, to);
    after(i, from, to);
  });
}

}  // namespace plug

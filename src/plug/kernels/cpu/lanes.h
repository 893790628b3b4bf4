// Sixteen lanes side by side: all that the products need of a processor. AVX-512 with VNNI, AVX2, Arm with dot products,
// and plain loops for everything else.
//
//   Floats  16 floats               Ints  16 int32               Bytes  16 times 4 bytes
//
// Every path has the same order of sums for one row and for many, so that equal rows get equal bits.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VNNI__)
#define PLUG_AVX512 1
#include <immintrin.h>
#elif defined(__AVX2__) && defined(__FMA__)
#define PLUG_AVX2 1
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__ARM_FEATURE_DOTPROD)
#define PLUG_NEON 1
#include <arm_neon.h>
#endif

#define UNROLL _Pragma("GCC unroll 16")

namespace plug {

constexpr int LANES = 16;
constexpr int64_t GROUP = 128;  // inputs that share a scale in 4 bits; also the inputs of a tile of integers

inline float from_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  float value;
  std::memcpy(&value, &wide, 4);
  return value;
}

// Into the second cache, before they are read: `bytes` of each of N rows, or at the end of rows of the N behind. Rows of the
// 27B in 4 bits are 4 KB apart, and the first cache keeps eight lines at such a distance.
template <int N>
inline void fetch_ahead(const void* rows, int64_t stride, int64_t at, int64_t bytes) {
  constexpr int64_t AHEAD = 1024;
  const uint8_t* from = static_cast<const uint8_t*>(rows) + at + AHEAD + (at + AHEAD < stride ? 0 : (N - 1) * stride);
  for (int i = 0; i < N; ++i)
    for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(from + i * stride + line, 0, 2);
}

#if defined(PLUG_AVX512) || defined(PLUG_AVX2)
inline float sum_of_four(__m128 four) {
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_shuffle_ps(four, four, 1)));
}
inline float sum_of_eight(__m256 eight) { return sum_of_four(_mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1))); }
#endif

#if defined(PLUG_AVX512)

constexpr int INSTRUCTIONS = 512;
constexpr int TILE = 16;      // registers of sums: rows times vectors of outputs
constexpr uint8_t FLIP = 128;  // products are of unsigned with signed bytes: signed weights get 128 added

using Floats = __m512;
using Ints = __m512i;
using Bytes = __m512i;

inline Floats zero() { return _mm512_setzero_ps(); }
inline Floats all(float value) { return _mm512_set1_ps(value); }
inline Floats load(const float* from) { return _mm512_loadu_ps(from); }
inline Floats load_words(const uint32_t* from) { return _mm512_loadu_ps(from); }
inline void store(float* to, Floats values) { _mm512_storeu_ps(to, values); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats multiply(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
// The sum of the lanes, in one order everywhere: to each the one 8, 4, 2 and 1 behind it is added.
inline float sum_of(Floats values) {
  return sum_of_eight(_mm256_add_ps(_mm512_castps512_ps256(values), _mm512_extractf32x8_ps(values, 1)));
}
// Of pairs of bfloat16: the first ones, the second ones.
inline Floats first_of_pairs(const uint16_t* pairs) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_loadu_si512(pairs), 16));
}
inline Floats second_of_pairs(const uint16_t* pairs) {
  return _mm512_castsi512_ps(_mm512_and_si512(_mm512_loadu_si512(pairs), _mm512_set1_epi32(-65536)));
}
// The first `count` values, 16 at most; zeros after them.
inline Floats load_some(const float* from, int64_t count) {
  return _mm512_maskz_loadu_ps(count < 16 ? (1u << count) - 1 : 0xffff, from);
}

inline Ints zero_ints() { return _mm512_setzero_si512(); }
inline Ints load_ints(const int32_t* from) { return _mm512_loadu_si512(from); }
inline void store_ints(int32_t* to, Ints values) { _mm512_storeu_si512(to, values); }
inline Floats to_floats(Ints values) { return _mm512_cvtepi32_ps(values); }
inline Bytes load_bytes(const void* from) { return _mm512_loadu_si512(from); }
inline Bytes all_fours(const int8_t* four) {
  int32_t bits;
  std::memcpy(&bits, four, 4);
  return _mm512_set1_epi32(bits);
}
inline Bytes flipped(Bytes bytes) { return _mm512_xor_si512(bytes, _mm512_set1_epi8(static_cast<char>(FLIP))); }
inline Bytes low_halves(Bytes bytes) { return _mm512_and_si512(bytes, _mm512_set1_epi8(15)); }
inline Bytes high_halves(Bytes bytes) { return low_halves(_mm512_srli_epi16(bytes, 4)); }
// sum += weights . inputs, in each lane four products; weights with FLIP. Not by the intrinsic: GCC 12 copies the sum before
// and after it, and then has too few registers.
inline Ints dot(Ints sum, Bytes weights, Bytes inputs) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(weights), "v"(inputs));
  return sum;
}

#if defined(__AVX512BF16__)
#define PLUG_PAIRS 1
inline Floats dot_pairs(Floats sum, const uint16_t* weights, const uint16_t* pair) {
  int32_t bits;
  std::memcpy(&bits, pair, 4);
  return _mm512_dpbf16_ps(sum, (__m512bh)_mm512_loadu_si512(weights), (__m512bh)_mm512_set1_epi32(bits));
}
#endif

inline void transpose(__m512i (&a)[16]) {
  __m512i b[16];
  UNROLL for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
  }
  UNROLL for (int i = 0; i < 16; i += 4) UNROLL for (int j = 0; j < 2; ++j) {
    a[i + 2 * j] = _mm512_unpacklo_epi64(b[i + j], b[i + j + 2]);
    a[i + 2 * j + 1] = _mm512_unpackhi_epi64(b[i + j], b[i + j + 2]);
  }
  UNROLL for (int i = 0; i < 16; i += 8) UNROLL for (int j = 0; j < 4; ++j) {
    b[i + j] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0x88);
    b[i + j + 4] = _mm512_shuffle_i32x4(a[i + j], a[i + j + 4], 0xdd);
  }
  UNROLL for (int j = 0; j < 8; ++j) {
    a[j] = _mm512_shuffle_i32x4(b[j], b[j + 8], 0x88);
    a[j + 8] = _mm512_shuffle_i32x4(b[j], b[j + 8], 0xdd);
  }
}

inline void transpose(uint32_t (&square)[LANES][LANES]) {
  __m512i a[16];
  UNROLL for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_si512(square[i]);
  transpose(a);
  UNROLL for (int i = 0; i < 16; ++i) _mm512_storeu_si512(square[i], a[i]);
}

// Words of 4 bytes, turned: to[word][row] = from[row * stride + 4 * word]. `rows` of 16 and `bytes` of 64 are read.
inline void transpose(const uint8_t* from, int64_t stride, int64_t rows, int64_t bytes, uint32_t (*to)[LANES]) {
  __m512i a[16];
  if (rows == 16 && bytes >= 64) {
    UNROLL for (int row = 0; row < 16; ++row) a[row] = load_bytes(from + row * stride);
  } else {
    const __mmask64 mask = bytes < 64 ? (uint64_t{1} << bytes) - 1 : ~uint64_t{0};
    UNROLL for (int row = 0; row < 16; ++row) a[row] = _mm512_maskz_loadu_epi8(row < rows ? mask : 0, from + row * stride);
  }
  transpose(a);
  UNROLL for (int word = 0; word < 16; ++word) _mm512_storeu_si512(to[word], a[word]);
}

// The sums of the lanes of each of 16, in one.
inline Ints sums_of_lanes(__m512i (&a)[16]) {
  __m512i b[8], c[4], d[2];
  UNROLL for (int i = 0; i < 8; ++i)
    b[i] = _mm512_add_epi32(_mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]), _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]));
  UNROLL for (int i = 0; i < 4; ++i)
    c[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(b[2 * i], b[2 * i + 1]), _mm512_unpackhi_epi64(b[2 * i], b[2 * i + 1]));
  UNROLL for (int i = 0; i < 2; ++i)
    d[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(c[2 * i], c[2 * i + 1], 0x88), _mm512_shuffle_i32x4(c[2 * i], c[2 * i + 1], 0xdd));
  return _mm512_add_epi32(_mm512_shuffle_i32x4(d[0], d[1], 0x88), _mm512_shuffle_i32x4(d[0], d[1], 0xdd));
}

// (the group at `packed`) . q, in each lane the sum of eight products: at most 15240.
inline __m512i nibble_sums(const uint8_t* packed, __m512i first, __m512i second) {
  const __m512i bytes = load_bytes(packed);
  return dot(dot(zero_ints(), low_halves(bytes), first), high_halves(bytes), second);
}
// Of each quarter, neighbours of a are added, then those of b. What is added fits 16 bits.
inline __m512i add_neighbours(__m512i a, __m512i b) { return _mm512_madd_epi16(_mm512_packs_epi32(a, b), _mm512_set1_epi16(1)); }
inline __m512i add_quarters(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i32x4(a, b, 0x88), _mm512_shuffle_i32x4(a, b, 0xdd));
}
// Of `N` outputs; sums are added as soon as there are two, so that they stay in registers.
template <int N>
inline __m512i nibble_tree(const uint8_t* packed, int64_t stride, __m512i first, __m512i second) {
  if constexpr (N == 1) {
    return nibble_sums(packed, first, second);
  } else {
    const __m512i a = nibble_tree<N / 2>(packed, stride, first, second);
    const __m512i b = nibble_tree<N / 2>(packed + N / 2 * stride, stride, first, second);
    return N <= 4 ? add_neighbours(a, b) : add_quarters(a, b);
  }
}
// found[i] = (the group of output i at `packed` + i `stride`) . q, for 16 outputs.
inline Ints nibble_dots(const uint8_t* packed, int64_t stride, const int8_t* q) {
  return nibble_tree<16>(packed, stride, load_bytes(q), load_bytes(q + GROUP / 2));
}
inline int32_t nibble_dot(const uint8_t* packed, const int8_t* q) {
  return _mm512_reduce_add_epi32(nibble_sums(packed, load_bytes(q), load_bytes(q + GROUP / 2)));
}

// found[i] = (weights of output i, with FLIP) . q, for 16 outputs; q is padded with zeros to whole GROUPs.
inline void byte_dots(const int8_t* weights, const int8_t* q, int64_t count, int32_t* found) {
  const int64_t whole = count & ~int64_t{63};
  __m512i sums[16];
  UNROLL for (auto& sum : sums) sum = zero_ints();
  for (int64_t k = 0; k < whole; k += 64) {
    const __m512i inputs = load_bytes(q + k);
    fetch_ahead<16>(weights, count, k, 64);
    UNROLL for (int i = 0; i < 16; ++i) sums[i] = dot(sums[i], flipped(load_bytes(weights + i * count + k)), inputs);
  }
  if (whole < count) {
    const __mmask64 mask = (uint64_t{1} << (count - whole)) - 1;
    UNROLL for (int i = 0; i < 16; ++i)
      sums[i] = dot(sums[i], flipped(_mm512_maskz_loadu_epi8(mask, weights + i * count + whole)), load_bytes(q + whole));
  }
  store_ints(found, sums_of_lanes(sums));
}
inline int32_t byte_dot(const int8_t* weights, const int8_t* q, int64_t count) {
  __m512i sum = zero_ints();
  for (int64_t k = 0; k < count; k += 64) {
    const __mmask64 mask = count - k < 64 ? (uint64_t{1} << (count - k)) - 1 : ~uint64_t{0};
    sum = dot(sum, flipped(_mm512_maskz_loadu_epi8(mask, weights + k)), load_bytes(q + k));
  }
  return _mm512_reduce_add_epi32(sum);
}

#else  // in two, in four, or in loops

#if defined(PLUG_AVX2)

constexpr int INSTRUCTIONS = 256;
constexpr int TILE = 4;

struct Floats {
  __m256 part[2];
};
struct Ints {
  __m256i part[2];
};
using Bytes = Ints;

inline Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
inline Floats all(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
inline Floats load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
inline void store(float* to, Floats values) {
  _mm256_storeu_ps(to, values.part[0]);
  _mm256_storeu_ps(to + 8, values.part[1]);
}
inline Floats add(Floats a, Floats b) { return {_mm256_add_ps(a.part[0], b.part[0]), _mm256_add_ps(a.part[1], b.part[1])}; }
inline Floats multiply(Floats a, Floats b) {
  return {_mm256_mul_ps(a.part[0], b.part[0]), _mm256_mul_ps(a.part[1], b.part[1])};
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.part[0], b.part[0], c.part[0]), _mm256_fmadd_ps(a.part[1], b.part[1], c.part[1])};
}
inline float sum_of(Floats values) { return sum_of_eight(_mm256_add_ps(values.part[0], values.part[1])); }
inline __m256i load_256(const void* from) { return _mm256_loadu_si256(static_cast<const __m256i*>(from)); }
inline Floats first_of_pairs(const uint16_t* pairs) {
  return {_mm256_castsi256_ps(_mm256_slli_epi32(load_256(pairs), 16)),
          _mm256_castsi256_ps(_mm256_slli_epi32(load_256(pairs + 16), 16))};
}
inline Floats second_of_pairs(const uint16_t* pairs) {
  const __m256i high = _mm256_set1_epi32(-65536);
  return {_mm256_castsi256_ps(_mm256_and_si256(load_256(pairs), high)),
          _mm256_castsi256_ps(_mm256_and_si256(load_256(pairs + 16), high))};
}

inline Ints zero_ints() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
inline Ints load_ints(const int32_t* from) { return {load_256(from), load_256(from + 8)}; }
inline void store_ints(int32_t* to, Ints values) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), values.part[0]);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + 8), values.part[1]);
}
inline Floats to_floats(Ints values) { return {_mm256_cvtepi32_ps(values.part[0]), _mm256_cvtepi32_ps(values.part[1])}; }
inline Bytes load_bytes(const void* from) { return {load_256(from), load_256(static_cast<const uint8_t*>(from) + 32)}; }
inline Bytes all_fours(const int8_t* four) {
  int32_t bits;
  std::memcpy(&bits, four, 4);
  return {_mm256_set1_epi32(bits), _mm256_set1_epi32(bits)};
}
#if defined(__AVXVNNI__)
constexpr uint8_t FLIP = 128;
inline __m256i dot_256(__m256i sum, __m256i weights, __m256i inputs) { return _mm256_dpbusd_avx_epi32(sum, weights, inputs); }
#else
constexpr uint8_t FLIP = 0;
// The sums of two products fit 16 bits, because no input is -128.
inline __m256i dot_256(__m256i sum, __m256i weights, __m256i inputs) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(inputs), _mm256_sign_epi8(weights, inputs));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}
#endif
inline Ints dot(Ints sum, Bytes weights, Bytes inputs) {
  return {dot_256(sum.part[0], weights.part[0], inputs.part[0]), dot_256(sum.part[1], weights.part[1], inputs.part[1])};
}
inline int32_t sum_of(Ints values) {
  const __m256i eight = _mm256_add_epi32(values.part[0], values.part[1]);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline Bytes flipped(Bytes bytes) {
  const __m256i flip = _mm256_set1_epi8(static_cast<char>(FLIP));
  return {_mm256_xor_si256(bytes.part[0], flip), _mm256_xor_si256(bytes.part[1], flip)};
}
inline Bytes low_halves(Bytes bytes) {
  const __m256i low = _mm256_set1_epi8(15);
  return {_mm256_and_si256(bytes.part[0], low), _mm256_and_si256(bytes.part[1], low)};
}
inline Bytes high_halves(Bytes bytes) {
  return low_halves({_mm256_srli_epi16(bytes.part[0], 4), _mm256_srli_epi16(bytes.part[1], 4)});
}

// The sums of the lanes of each of 16.
inline void sums_of_lanes(const Ints* a, int32_t* found) {
  UNROLL for (int i = 0; i < 16; i += 8) {
    __m256i eight[8];
    UNROLL for (int j = 0; j < 8; ++j) eight[j] = _mm256_add_epi32(a[i + j].part[0], a[i + j].part[1]);
    const __m256i first = _mm256_hadd_epi32(_mm256_hadd_epi32(eight[0], eight[1]), _mm256_hadd_epi32(eight[2], eight[3]));
    const __m256i second = _mm256_hadd_epi32(_mm256_hadd_epi32(eight[4], eight[5]), _mm256_hadd_epi32(eight[6], eight[7]));
    const __m256i sums = _mm256_add_epi32(_mm256_permute2x128_si256(first, second, 0x20), _mm256_permute2x128_si256(first, second, 0x31));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(found + i), sums);
  }
}

// Turns 4 x 4 words of each half.
inline void turn_fours(__m256i (&a)[4]) {
  const __m256i b[4] = {_mm256_unpacklo_epi32(a[0], a[1]), _mm256_unpackhi_epi32(a[0], a[1]), _mm256_unpacklo_epi32(a[2], a[3]),
                        _mm256_unpackhi_epi32(a[2], a[3])};
  a[0] = _mm256_unpacklo_epi64(b[0], b[2]);
  a[1] = _mm256_unpackhi_epi64(b[0], b[2]);
  a[2] = _mm256_unpacklo_epi64(b[1], b[3]);
  a[3] = _mm256_unpackhi_epi64(b[1], b[3]);
}
inline void transpose_whole(const uint8_t* from, int64_t stride, uint32_t (*to)[LANES]) {
  for (int row = 0; row < 16; row += 8)
    for (int word = 0; word < 16; word += 8) {
      __m256i first[4], second[4];
      UNROLL for (int i = 0; i < 4; ++i) {
        first[i] = load_256(from + (row + i) * stride + 4 * word);
        second[i] = load_256(from + (row + i + 4) * stride + 4 * word);
      }
      turn_fours(first);
      turn_fours(second);
      UNROLL for (int i = 0; i < 4; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to[word + i] + row), _mm256_permute2x128_si256(first[i], second[i], 0x20));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to[word + i + 4] + row), _mm256_permute2x128_si256(first[i], second[i], 0x31));
      }
    }
}

#elif defined(PLUG_NEON)

constexpr int INSTRUCTIONS = 128;
constexpr int TILE = 4;
constexpr uint8_t FLIP = 0;

using Floats = float32x4x4_t;
using Ints = int32x4x4_t;
using Bytes = int8x16x4_t;

inline Floats all(float value) {
  const float32x4_t part = vdupq_n_f32(value);
  return {part, part, part, part};
}
inline Floats zero() { return all(0); }
inline Floats load(const float* from) {
  return {vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)};
}
inline void store(float* to, Floats values) {
  UNROLL for (int i = 0; i < 4; ++i) vst1q_f32(to + 4 * i, values.val[i]);
}
inline Floats add(Floats a, Floats b) {
  UNROLL for (int i = 0; i < 4; ++i) a.val[i] = vaddq_f32(a.val[i], b.val[i]);
  return a;
}
inline Floats multiply(Floats a, Floats b) {
  UNROLL for (int i = 0; i < 4; ++i) a.val[i] = vmulq_f32(a.val[i], b.val[i]);
  return a;
}
inline Floats multiply_add(Floats a, Floats b, Floats c) {
  UNROLL for (int i = 0; i < 4; ++i) c.val[i] = vfmaq_f32(c.val[i], a.val[i], b.val[i]);
  return c;
}
inline float sum_of(Floats values) {
  const float32x4_t four = vaddq_f32(vaddq_f32(values.val[0], values.val[2]), vaddq_f32(values.val[1], values.val[3]));
  const float32x2_t two = vadd_f32(vget_low_f32(four), vget_high_f32(four));
  return vget_lane_f32(two, 0) + vget_lane_f32(two, 1);
}
inline Floats first_of_pairs(const uint16_t* pairs) {
  Floats found;
  UNROLL for (int i = 0; i < 4; ++i)
    found.val[i] = vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u16(vld1q_u16(pairs + 8 * i)), 16));
  return found;
}
inline Floats second_of_pairs(const uint16_t* pairs) {
  Floats found;
  UNROLL for (int i = 0; i < 4; ++i)
    found.val[i] = vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u16(vld1q_u16(pairs + 8 * i)), vdupq_n_u32(0xffff0000u)));
  return found;
}

inline Ints zero_ints() {
  const int32x4_t part = vdupq_n_s32(0);
  return {part, part, part, part};
}
inline Ints load_ints(const int32_t* from) {
  return {vld1q_s32(from), vld1q_s32(from + 4), vld1q_s32(from + 8), vld1q_s32(from + 12)};
}
inline void store_ints(int32_t* to, Ints values) {
  UNROLL for (int i = 0; i < 4; ++i) vst1q_s32(to + 4 * i, values.val[i]);
}
inline Floats to_floats(Ints values) {
  Floats found;
  UNROLL for (int i = 0; i < 4; ++i) found.val[i] = vcvtq_f32_s32(values.val[i]);
  return found;
}
inline Bytes load_bytes(const void* from) {
  const int8_t* bytes = static_cast<const int8_t*>(from);
  return {vld1q_s8(bytes), vld1q_s8(bytes + 16), vld1q_s8(bytes + 32), vld1q_s8(bytes + 48)};
}
inline Bytes all_fours(const int8_t* four) {
  int32_t bits;
  std::memcpy(&bits, four, 4);
  const int8x16_t part = vreinterpretq_s8_s32(vdupq_n_s32(bits));
  return {part, part, part, part};
}
inline Ints dot(Ints sum, Bytes weights, Bytes inputs) {
  UNROLL for (int i = 0; i < 4; ++i) sum.val[i] = vdotq_s32(sum.val[i], weights.val[i], inputs.val[i]);
  return sum;
}
inline int32_t sum_of(Ints values) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(values.val[0], values.val[1]), vaddq_s32(values.val[2], values.val[3])));
}
inline Bytes flipped(Bytes bytes) { return bytes; }
inline Bytes low_halves(Bytes bytes) {
  UNROLL for (int i = 0; i < 4; ++i) bytes.val[i] = vandq_s8(bytes.val[i], vdupq_n_s8(15));
  return bytes;
}
inline Bytes high_halves(Bytes bytes) {
  UNROLL for (int i = 0; i < 4; ++i)
    bytes.val[i] = vreinterpretq_s8_u8(vshrq_n_u8(vreinterpretq_u8_s8(bytes.val[i]), 4));
  return bytes;
}

// The sums of the lanes of each of 16.
inline void sums_of_lanes(const Ints* a, int32_t* found) {
  UNROLL for (int i = 0; i < 16; i += 4) {
    int32x4_t four[4];
    UNROLL for (int j = 0; j < 4; ++j) {
      const Ints& each = a[i + j];
      four[j] = vaddq_s32(vaddq_s32(each.val[0], each.val[1]), vaddq_s32(each.val[2], each.val[3]));
    }
    vst1q_s32(found + i, vpaddq_s32(vpaddq_s32(four[0], four[1]), vpaddq_s32(four[2], four[3])));
  }
}

inline void transpose_whole(const uint8_t* from, int64_t stride, uint32_t (*to)[LANES]) {
  for (int row = 0; row < 16; row += 4)
    for (int word = 0; word < 16; word += 4) {
      uint32x4_t a[4];
      UNROLL for (int i = 0; i < 4; ++i) a[i] = vreinterpretq_u32_u8(vld1q_u8(from + (row + i) * stride + 4 * word));
      const uint32x4x2_t first = vtrnq_u32(a[0], a[1]), second = vtrnq_u32(a[2], a[3]);
      vst1q_u32(to[word] + row, vcombine_u32(vget_low_u32(first.val[0]), vget_low_u32(second.val[0])));
      vst1q_u32(to[word + 1] + row, vcombine_u32(vget_low_u32(first.val[1]), vget_low_u32(second.val[1])));
      vst1q_u32(to[word + 2] + row, vcombine_u32(vget_high_u32(first.val[0]), vget_high_u32(second.val[0])));
      vst1q_u32(to[word + 3] + row, vcombine_u32(vget_high_u32(first.val[1]), vget_high_u32(second.val[1])));
    }
}

#else

constexpr int INSTRUCTIONS = 0;
constexpr int TILE = 4;
constexpr uint8_t FLIP = 0;

struct Floats {
  float lane[LANES];
};
struct Ints {
  int32_t lane[LANES];
};
struct Bytes {
  int8_t lane[LANES][4];
};

inline Floats all(float value) {
  Floats found;
  for (float& each : found.lane) each = value;
  return found;
}
inline Floats zero() { return all(0); }
inline Floats load(const float* from) {
  Floats found;
  std::memcpy(&found, from, sizeof found);
  return found;
}
inline void store(float* to, Floats values) { std::memcpy(to, &values, sizeof values); }
inline Floats add(Floats a, Floats b) {
  for (int i = 0; i < LANES; ++i) a.lane[i] += b.lane[i];
  return a;
}
inline Floats multiply(Floats a, Floats b) {
  for (int i = 0; i < LANES; ++i) a.lane[i] *= b.lane[i];
  return a;
}
inline Floats multiply_add(Floats a, Floats b, Floats c) { return add(multiply(a, b), c); }
inline float sum_of(Floats values) {
  for (int step = LANES / 2; step; step /= 2)
    for (int i = 0; i < step; ++i) values.lane[i] += values.lane[i + step];
  return values.lane[0];
}
inline Floats first_of_pairs(const uint16_t* pairs) {
  Floats found;
  for (int i = 0; i < LANES; ++i) found.lane[i] = from_bfloat16(pairs[2 * i]);
  return found;
}
inline Floats second_of_pairs(const uint16_t* pairs) {
  Floats found;
  for (int i = 0; i < LANES; ++i) found.lane[i] = from_bfloat16(pairs[2 * i + 1]);
  return found;
}

inline Ints zero_ints() { return {}; }
inline Ints load_ints(const int32_t* from) {
  Ints found;
  std::memcpy(&found, from, sizeof found);
  return found;
}
inline void store_ints(int32_t* to, Ints values) { std::memcpy(to, &values, sizeof values); }
inline Floats to_floats(Ints values) {
  Floats found;
  for (int i = 0; i < LANES; ++i) found.lane[i] = static_cast<float>(values.lane[i]);
  return found;
}
inline Bytes load_bytes(const void* from) {
  Bytes found;
  std::memcpy(&found, from, sizeof found);
  return found;
}
inline Bytes all_fours(const int8_t* four) {
  Bytes found;
  for (auto& each : found.lane) std::memcpy(each, four, 4);
  return found;
}
inline Ints dot(Ints sum, Bytes weights, Bytes inputs) {
  for (int i = 0; i < LANES; ++i)
    for (int j = 0; j < 4; ++j) sum.lane[i] += int32_t{weights.lane[i][j]} * inputs.lane[i][j];
  return sum;
}
inline int32_t sum_of(Ints values) {
  int32_t sum = 0;
  for (int32_t each : values.lane) sum += each;
  return sum;
}
inline Bytes flipped(Bytes bytes) { return bytes; }
inline Bytes low_halves(Bytes bytes) {
  for (auto& each : bytes.lane)
    for (int8_t& byte : each) byte &= 15;
  return bytes;
}
inline Bytes high_halves(Bytes bytes) {
  for (auto& each : bytes.lane)
    for (int8_t& byte : each) byte = static_cast<int8_t>(static_cast<uint8_t>(byte) >> 4);
  return bytes;
}

inline void sums_of_lanes(const Ints* a, int32_t* found) {
  for (int i = 0; i < 16; ++i) found[i] = sum_of(a[i]);
}

inline void transpose_whole(const uint8_t* from, int64_t stride, uint32_t (*to)[LANES]) {
  for (int row = 0; row < 16; ++row)
    for (int word = 0; word < 16; ++word) std::memcpy(&to[word][row], from + row * stride + 4 * word, 4);
}

#endif

inline Floats load_some(const float* from, int64_t count) {
  if (count >= LANES) return load(from);
  float lanes[LANES] = {};
  std::memcpy(lanes, from, count * sizeof(float));
  return load(lanes);
}
inline void transpose(const uint8_t* from, int64_t stride, int64_t rows, int64_t bytes, uint32_t (*to)[LANES]) {
  if (rows == LANES && bytes >= 64) return transpose_whole(from, stride, to);
  std::memset(to, 0, 64 * LANES);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t word = 0; 4 * word < bytes; ++word)
      std::memcpy(&to[word][row], from + row * stride + 4 * word, bytes - 4 * word < 4 ? bytes - 4 * word : 4);
}

inline Ints nibble_sums(const uint8_t* packed, const int8_t* q) {
  const Bytes bytes = load_bytes(packed);
  return dot(dot(zero_ints(), low_halves(bytes), load_bytes(q)), high_halves(bytes), load_bytes(q + GROUP / 2));
}
inline int32_t nibble_dot(const uint8_t* packed, const int8_t* q) { return sum_of(nibble_sums(packed, q)); }
inline Ints nibble_dots(const uint8_t* packed, int64_t stride, const int8_t* q) {
  Ints sums[16];
  int32_t found[16];
  for (int i = 0; i < 16; ++i) sums[i] = nibble_sums(packed + i * stride, q);
  sums_of_lanes(sums, found);
  return load_ints(found);
}

inline Ints byte_sums(const int8_t* weights, const int8_t* q, int64_t count) {
  Ints sum = zero_ints();
  int64_t k = 0;
  for (; k + 64 <= count; k += 64) sum = dot(sum, flipped(load_bytes(weights + k)), load_bytes(q + k));
  if (k < count) {
    int8_t rest[64] = {};
    std::memcpy(rest, weights + k, count - k);
    sum = dot(sum, flipped(load_bytes(rest)), load_bytes(q + k));
  }
  return sum;
}
inline int32_t byte_dot(const int8_t* weights, const int8_t* q, int64_t count) { return sum_of(byte_sums(weights, q, count)); }
inline void byte_dots(const int8_t* weights, const int8_t* q, int64_t count, int32_t* found) {
  Ints sums[16];
  for (int i = 0; i < 16; ++i) sums[i] = byte_sums(weights + i * count, q, count);
  sums_of_lanes(sums, found);
}

#endif

}  // namespace plug

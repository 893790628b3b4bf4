// Products of float32 rows with weights in 32, 16, 8 and 4 bits, on a CPU.
//
//   y[row][o] = sum over i of x[row][i] * weight[o][i] + bias[o]
//
// 32 bits: float32 everywhere.
// 16 bits: bfloat16 weights, float32 sums; where the processor multiplies pairs of bfloat16, the row is rounded to it.
//          AMX adds in an order of its own, so there one row uses it too.
// 8 bits:  the row is rounded to int8 by its own largest value; sums are exact in int32.
// 4 bits:  each group of 128 inputs of the row is rounded so; sums of a group are exact, groups are added in float32.
//
// Weights in 8 and 4 bits are read as the model's files hold them (docs/quantization.md), so they may stay mapped: one row
// streams them, several rows share a tile that is turned so that outputs lie side by side; for AMX the rows are turned
// instead. Weights in 32 and 16 bits are copies that lie so from the start (`products.py`). What a row becomes depends on
// that row alone, to the last bit: one row and many add in the same order.
//
// Names: R rows and V vectors of 16 outputs of a tile; G groups of a row.

#pragma once

#include <algorithm>
#include <vector>

#include "adapters.h"
#include "amx.h"
#include "lanes.h"
#include "pool.h"

namespace plug {

constexpr int64_t ROWS_TOGETHER = 64;    // that share a tile of integers
constexpr int64_t PAIRED = 32;           // 16 bits: inputs are a multiple of it, zeros added
constexpr int64_t ROWS_ONE_BY_ONE = 3;   // up to so many, turning a tile costs more than reading its weights again
constexpr int64_t ROWS_FOR_AMX = 3;      // from so many, AMX is faster than that
constexpr int INTEGER_ROWS = TILE == 16 ? 8 : 4, INTEGER_VECTORS = TILE / INTEGER_ROWS;
constexpr int64_t TILE_OUTPUTS = INTEGER_VECTORS * LANES;

// --- rows in 8 bits ----------------------------------------------------------------------------------------------------

// Adding it leaves an integer in the last bits of a float, rounded to even.
constexpr float TO_INTEGER = 12582912.0f;

// `count` values to int8 by their largest; the scale, and the sum of the integers.
inline float round_values(const float* x, int64_t count, int8_t* q, int32_t* sum) {
  uint32_t largest_bits = 0;  // floats without their sign are ordered as integers are
  for (int64_t i = 0; i < count; ++i) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    largest_bits = std::max(largest_bits, bits & 0x7fffffffu);
  }
  float largest;
  std::memcpy(&largest, &largest_bits, 4);
  const float scale = largest / 127, inverse = largest > 0 ? 127 / largest : 0;
  int32_t total = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float moved = x[i] * inverse + TO_INTEGER;
    int32_t value;
    std::memcpy(&value, &moved, 4);
    q[i] = static_cast<int8_t>(value);
    total += q[i];
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

// To bfloat16, ties to even. NaN stays NaN.
inline uint16_t to_bfloat16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return static_cast<uint16_t>(((bits & 0x7fffffffu) > 0x7f800000u ? bits | 0x400000u : rounded) >> 16);
}

inline int64_t rounded_up(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }
inline int64_t blocks_of(int64_t count) { return (count + LANES - 1) / LANES; }

struct Rows {  // made ready for the products with weights of some bits
  std::vector<float> x;        // 32, 16 bits: with one zero more where the inputs are odd
  std::vector<uint16_t> half;  // 16 bits, where pairs are multiplied
  std::vector<int8_t> q;       // 8 bits: padded with zeros to whole groups
  std::vector<float> scale;    // a row (8 bits) or a row and group (4 bits)
  std::vector<float> summed;   // 4 bits: scale times the sum of the group's integers
  std::vector<int32_t> sum;    // 8 bits: the sum of the row's integers
  // For AMX, of each 16 rows: q as squares of 64 inputs; of 4 bits also scale and summed, 16 rows of a group side by side.
  std::vector<Square> turned;
  std::vector<float> turned_scale, turned_summed;
};

// --- tiles -------------------------------------------------------------------------------------------------------------

struct Product {
  int64_t bits;
  const void* weight;
  const void* scale;   // 8 bits: float32 (out,); 4 bits: bfloat16 (out, G)
  const void* center;  // 4 bits: bfloat16 (out, G)
  const float* bias;   // or null
  int64_t out, in;
};

// act<R>(row) for all rows, R at a time.
template <int R, typename Act>
inline void by_rows(int64_t rows, const Act& act, int64_t row = 0) {
  for (; row + R <= rows; row += R) act.template operator()<R>(row);
  if constexpr (R > 1) by_rows<R / 2>(rows, act, row);
}

inline void put(float* y, const Floats& values, const float* bias, int64_t count) {
  if (count == LANES) return store(y, bias ? add(values, load(bias)) : values);
  float lanes[LANES];
  store(lanes, values);
  for (int64_t i = 0; i < count; ++i) y[i] = lanes[i] + (bias ? bias[i] : 0);
}

// Weights (out / 16, in, 16), float32.
template <int R, int V>
inline void tile(const float* weight, int64_t block, const float* x, int64_t in, Floats (&sums)[R][V]) {
  for (int64_t k = 0; k < in; ++k) {
    Floats w[V];
    UNROLL for (int v = 0; v < V; ++v) w[v] = load(weight + v * block + k * LANES);
    UNROLL for (int r = 0; r < R; ++r) {
      const Floats input = all(x[r * in + k]);
      UNROLL for (int v = 0; v < V; ++v) sums[r][v] = multiply_add(w[v], input, sums[r][v]);
    }
  }
}

// Weights (out / 16, in / 2, 16, 2), bfloat16.
template <int R, int V>
inline void tile(const uint16_t* weight, int64_t block, const float* x, int64_t in, Floats (&sums)[R][V]) {
  for (int64_t k = 0; k < in; k += 2) {
    UNROLL for (int v = 0; v < V; ++v) {
      const Floats first = first_of_pairs(weight + v * block + k * LANES), second = second_of_pairs(weight + v * block + k * LANES);
      UNROLL for (int r = 0; r < R; ++r) {
        sums[r][v] = multiply_add(first, all(x[r * in + k]), sums[r][v]);
        sums[r][v] = multiply_add(second, all(x[r * in + k + 1]), sums[r][v]);
      }
    }
  }
}

#ifdef PLUG_PAIRS
template <int R, int V>
inline void tile(const uint16_t* weight, int64_t block, const uint16_t* x, int64_t in, Floats (&sums)[R][V]) {
  for (int64_t k = 0; k < in; k += 2)
    UNROLL for (int v = 0; v < V; ++v) UNROLL for (int r = 0; r < R; ++r)
      sums[r][v] = dot_pairs(sums[r][v], weight + v * block + k * LANES, x + r * in + k);
}
#endif

template <int R, int V, typename Weight, typename Input>
inline void outputs_float(const Product& p, const Weight* weight, const Input* x, int64_t in, float* y, int64_t from, int64_t to) {
  const int64_t block = in * LANES;
  Floats sums[R][V];
  UNROLL for (auto& row : sums) UNROLL for (auto& sum : row) sum = zero();
  tile<R, V>(weight + from / LANES * block, block, x, in, sums);
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      const int64_t o = from + v * LANES;
      put(y + r * p.out + o, sums[r][v], p.bias ? p.bias + o : nullptr, std::min<int64_t>(LANES, to - o));
    }
}

// Outputs [from, to) in 32 or 16 bits; `from` is a multiple of 16.
template <typename Weight, typename Input>
void outputs_float(const Product& p, const Input* x, float* y, int64_t rows, int64_t from, int64_t to) {
  const Weight* weight = static_cast<const Weight*>(p.weight);
  const int64_t in = sizeof(Weight) == 2 ? rounded_up(p.in, PAIRED) : p.in;
  by_rows<TILE == 16 ? 8 : 4>(rows, [&]<int R>(int64_t r) {
    constexpr int V = std::min(4, TILE / R);
    int64_t o = from;
    for (; o + (V - 1) * LANES < to; o += V * LANES) outputs_float<R, V>(p, weight, x + r * in, in, y + r * p.out, o, to);
    for (; o < to; o += LANES) outputs_float<R, 1>(p, weight, x + r * in, in, y + r * p.out, o, to);
  });
}

inline float scaled(const Product& p, const Rows& x, int32_t dot, int64_t row, int64_t o) {
  const float sum = static_cast<float>(dot - FLIP * x.sum[row]);
  return sum * (x.scale[row] * static_cast<const float*>(p.scale)[o]) + (p.bias ? p.bias[o] : 0);
}

inline void one_row_8(const Product& p, const Rows& x, int64_t row, float* y, int64_t from, int64_t to) {
  const int8_t *weight = static_cast<const int8_t*>(p.weight), *q = x.q.data() + row * rounded_up(p.in, GROUP);
  int32_t found[16];
  for (int64_t o = from; o < to; o += 16) {
    const int64_t count = std::min<int64_t>(16, to - o);
    if (count == 16) byte_dots(weight + o * p.in, q, p.in, found);
    else
      for (int64_t i = 0; i < count; ++i) found[i] = byte_dot(weight + (o + i) * p.in, q, p.in);
    for (int64_t i = 0; i < count; ++i) y[o + i] = scaled(p, x, found[i], row, o + i);
  }
}

// The sum over groups of dot * (weights' scale * row's scale) + shift * summed, where shift is center - 8 scale: a weight is
// center + scale (integer - 8). Groups g, g + 16, … are summed first, then those 16 sums.
inline void add_group(Floats& sum, const Floats& dots, const Floats& scale, const Floats& shift, const Floats& row_scale, const Floats& summed) {
  sum = multiply_add(dots, multiply(scale, row_scale), sum);
  sum = multiply_add(shift, summed, sum);
}
inline Floats shift_of(const Floats& center, const Floats& scale) { return multiply_add(all(-8), scale, center); }

// To each of the first `count` of 16 sums the one 8, 4, 2 and 1 behind it is added; what is left is the first.
template <typename Add>
inline void fold(int64_t count, const Add& add) {
  for (int64_t step = LANES / 2; step; step /= 2)
    for (int64_t i = 0; i < step && i + step < count; ++i) add(i, i + step);
}

// 128 inputs of TILE_OUTPUTS weights: each `dot` takes four inputs of 16 outputs.
struct Tile {
  alignas(64) uint32_t fours[INTEGER_VECTORS][GROUP / 4][LANES];
};

inline void put_bytes(void* to, const Bytes& bytes) { std::memcpy(to, &bytes, sizeof bytes); }

// Of 8 bits: inputs [k, k + 128) of `outputs` rows, zeros where there are fewer.
inline void fill_8(Tile& tile, const int8_t* weight, int64_t in, int64_t k, int64_t outputs) {
  for (int v = 0; v < INTEGER_VECTORS; ++v)
    for (int half = 0; half < 2; ++half) {
      const int64_t begin = k + 64 * half, rows = std::clamp<int64_t>(outputs - v * LANES, 0, LANES);
      const int64_t bytes = std::clamp<int64_t>(in - begin, 0, 64);
      uint32_t(*to)[LANES] = tile.fours[v] + 16 * half;
      transpose(reinterpret_cast<const uint8_t*>(weight) + v * LANES * in + begin, in, rows, bytes, to);
      for (int word = 0; word < 16; ++word) put_bytes(to[word], flipped(load_bytes(to[word])));
    }
}

inline void fill_4(Tile& tile, const uint8_t* weight, int64_t stride, int64_t outputs) {
  for (int v = 0; v < INTEGER_VECTORS; ++v) {
    const int64_t rows = std::clamp<int64_t>(outputs - v * LANES, 0, LANES);
    uint32_t(*to)[LANES] = tile.fours[v];
    transpose(weight + v * LANES * stride, stride, rows, GROUP / 2, to);
    for (int word = 0; word < 16; ++word) {
      const Bytes packed = load_bytes(to[word]);
      put_bytes(to[word], low_halves(packed));
      put_bytes(to[word + 16], high_halves(packed));
    }
  }
}

template <int R>
inline void dots(const Tile& tile, const int8_t* x, int64_t stride, Ints (&sums)[R][INTEGER_VECTORS]) {
  for (int64_t four = 0; four < GROUP / 4; ++four) {
    Bytes weights[INTEGER_VECTORS];
    UNROLL for (int v = 0; v < INTEGER_VECTORS; ++v) weights[v] = load_bytes(tile.fours[v][four]);
    UNROLL for (int r = 0; r < R; ++r) {
      const Bytes inputs = all_fours(x + r * stride + 4 * four);
      UNROLL for (int v = 0; v < INTEGER_VECTORS; ++v) sums[r][v] = dot(sums[r][v], weights[v], inputs);
    }
  }
}

// Scales, or centers, of TILE_OUTPUTS outputs and the 32 groups from g on, as vectors of outputs.
using Turned = float[2 * LANES][TILE_OUTPUTS];

struct Scratch {  // of a thread
  Tile tile;
  Turned scales, centers;
  alignas(64) int32_t sums_8[ROWS_TOGETHER][TILE_OUTPUTS];
  // Sums of groups g, g + 16, …
  alignas(64) float sums_4[LANES][ROWS_TOGETHER][TILE_OUTPUTS];
};

inline void many_rows_8(const Product& p, const Rows& x, float* y, int64_t rows, int64_t from, int64_t to) {
  const int64_t width = rounded_up(p.in, GROUP);
  static thread_local Scratch own;
  Tile& tile = own.tile;
  auto& sums = own.sums_8;
  for (int64_t first = 0; first < rows; first += ROWS_TOGETHER)
    for (int64_t o = from; o < to; o += TILE_OUTPUTS) {
      const int64_t here = std::min(ROWS_TOGETHER, rows - first), outputs = std::min(TILE_OUTPUTS, to - o);
      for (int64_t k = 0; k < p.in; k += GROUP) {
        const int8_t* weight = static_cast<const int8_t*>(p.weight) + o * p.in;
        fetch_ahead<TILE_OUTPUTS>(weight, p.in, k, GROUP);
        fill_8(tile, weight, p.in, k, outputs);
        by_rows<INTEGER_ROWS>(here, [&]<int R>(int64_t r) {
          Ints found[R][INTEGER_VECTORS];
          UNROLL for (int i = 0; i < R; ++i) UNROLL for (int v = 0; v < INTEGER_VECTORS; ++v)
            found[i][v] = k ? load_ints(sums[r + i] + v * LANES) : zero_ints();
          dots<R>(tile, x.q.data() + (first + r) * width + k, width, found);
          UNROLL for (int i = 0; i < R; ++i) UNROLL for (int v = 0; v < INTEGER_VECTORS; ++v)
            store_ints(sums[r + i] + v * LANES, found[i][v]);
        });
      }
      for (int64_t r = 0; r < here; ++r)
        for (int64_t i = 0; i < outputs; ++i) y[(first + r) * p.out + o + i] = scaled(p, x, sums[r][i], first + r, o + i);
    }
}

inline void turn(Turned& turned, const void* of, int64_t G, int64_t o, int64_t g, int64_t outputs) {
  const uint16_t* values = static_cast<const uint16_t*>(of) + o * G + g;
  alignas(64) uint32_t words[LANES][LANES];
  for (int v = 0; v * LANES < outputs; ++v) {
    const int64_t rows = std::min<int64_t>(outputs - v * LANES, LANES), bytes = std::min<int64_t>(2 * (G - g), 64);
    transpose(reinterpret_cast<const uint8_t*>(values + v * LANES * G), 2 * G, rows, bytes, words);
    for (int word = 0; 4 * word < bytes; ++word) {
      store(turned[2 * word] + v * LANES, first_of_pairs(reinterpret_cast<const uint16_t*>(words[word])));
      store(turned[2 * word + 1] + v * LANES, second_of_pairs(reinterpret_cast<const uint16_t*>(words[word])));
    }
  }
}

// Sixteen outputs side by side.
inline void one_row_4(const Product& p, const Rows& x, int64_t row, float* y, int64_t from, int64_t to) {
  const int64_t G = p.in / GROUP, stride = G * (GROUP / 2);
  static thread_local Scratch own;
  Scratch& scratch = own;
  for (int64_t o = from; o < to; o += LANES) {
    const int64_t outputs = std::min<int64_t>(LANES, to - o);
    const uint8_t* weight = static_cast<const uint8_t*>(p.weight) + o * stride;
    Floats sums[LANES];
    for (int64_t g = 0; g < G; ++g) {
      const int64_t at = g % (2 * LANES);
      if (at == 0) {
        turn(scratch.scales, p.scale, G, o, g, outputs);
        turn(scratch.centers, p.center, G, o, g, outputs);
      }
      const int8_t* q = x.q.data() + (row * G + g) * GROUP;
      Ints dots;
      if (outputs == LANES) {
        fetch_ahead<LANES>(weight, stride, g * (GROUP / 2), GROUP / 2);
        dots = nibble_dots(weight + g * (GROUP / 2), stride, q);
      } else {
        int32_t found[LANES] = {};
        for (int64_t i = 0; i < outputs; ++i) found[i] = nibble_dot(weight + i * stride + g * (GROUP / 2), q);
        dots = load_ints(found);
      }
      const Floats scale = load(scratch.scales[at]), shift = shift_of(load(scratch.centers[at]), scale);
      Floats sum = g < LANES ? zero() : sums[g % LANES];
      add_group(sum, to_floats(dots), scale, shift, all(x.scale[row * G + g]), all(x.summed[row * G + g]));
      sums[g % LANES] = sum;
    }
    fold(std::min<int64_t>(G, LANES), [&](int64_t to, int64_t from) { sums[to] = add(sums[to], sums[from]); });
    put(y + o, sums[0], p.bias ? p.bias + o : nullptr, outputs);
  }
}

inline void many_rows_4(const Product& p, const Rows& x, float* y, int64_t rows, int64_t from, int64_t to) {
  const int64_t G = p.in / GROUP, stride = G * (GROUP / 2), kept = std::min<int64_t>(G, LANES);
  static thread_local Scratch own;
  Tile& tile = own.tile;
  auto& sums = own.sums_4;
  for (int64_t first = 0; first < rows; first += ROWS_TOGETHER)
    for (int64_t o = from; o < to; o += TILE_OUTPUTS) {
      const int64_t here = std::min(ROWS_TOGETHER, rows - first), outputs = std::min(TILE_OUTPUTS, to - o);
      for (int64_t g = 0; g < G; ++g) {
        if (g % (2 * LANES) == 0) {
          turn(own.scales, p.scale, G, o, g, outputs);
          turn(own.centers, p.center, G, o, g, outputs);
        }
        const uint8_t* weight = static_cast<const uint8_t*>(p.weight) + o * stride;
        fetch_ahead<TILE_OUTPUTS>(weight, stride, g * (GROUP / 2), GROUP / 2);
        fill_4(tile, weight + g * (GROUP / 2), stride, outputs);
        Floats scale[INTEGER_VECTORS], shift[INTEGER_VECTORS];
        for (int v = 0; v < INTEGER_VECTORS; ++v) {
          scale[v] = load(own.scales[g % (2 * LANES)] + v * LANES);
          shift[v] = shift_of(load(own.centers[g % (2 * LANES)] + v * LANES), scale[v]);
        }
        by_rows<INTEGER_ROWS>(here, [&]<int R>(int64_t r) {
          Ints found[R][INTEGER_VECTORS];
          UNROLL for (auto& row : found) UNROLL for (auto& each : row) each = zero_ints();
          const int64_t row = first + r;
          dots<R>(tile, x.q.data() + (row * G + g) * GROUP, G * GROUP, found);
          UNROLL for (int i = 0; i < R; ++i) {
            const Floats row_scale = all(x.scale[(row + i) * G + g]), summed = all(x.summed[(row + i) * G + g]);
            UNROLL for (int v = 0; v < INTEGER_VECTORS; ++v) {
              float* at = sums[g % LANES][r + i] + v * LANES;
              Floats sum = g < LANES ? zero() : load(at);
              add_group(sum, to_floats(found[i][v]), scale[v], shift[v], row_scale, summed);
              store(at, sum);
            }
          }
        });
      }
      for (int64_t r = 0; r < here; ++r)
        for (int v = 0; v * LANES < outputs; ++v) {
          fold(kept, [&](int64_t to, int64_t from) {
            float* at = sums[to][r] + v * LANES;
            store(at, add(load(at), load(sums[from][r] + v * LANES)));
          });
          const int64_t begin = o + v * LANES;
          put(y + (first + r) * p.out + begin, load(sums[0][r] + v * LANES), p.bias ? p.bias + begin : nullptr,
              std::min<int64_t>(LANES, to - begin));
        }
    }
}

#ifdef PLUG_AMX
// The outputs from o on of up to 16 rows.
inline void put_rows(const Square& sums, const Product& p, float* y, int64_t rows, int64_t first, int64_t o, int64_t outputs) {
  const int64_t count = std::min<int64_t>(LANES, rows - first);
  y += first * p.out + o;
  if (outputs == LANES) {
    for (int64_t i = 0; i < count; ++i) put(y + i * p.out, load_words(sums.word[i]), p.bias ? p.bias + o : nullptr, LANES);
  } else {
    for (int64_t i = 0; i < count; ++i) put(y + i * p.out, load_words(sums.word[i]), p.bias ? p.bias + o : nullptr, outputs);
  }
}

// Outputs [from, to) of any number of rows in bfloat16: sums have another order than without AMX.
inline void outputs_pairs(const Product& p, const Rows& x, float* y, int64_t rows, int64_t from, int64_t to) {
  const int64_t squares = rounded_up(p.in, PAIRED) / PAIRED;
  const Square* weight = static_cast<const Square*>(p.weight) + from / LANES * squares;
  const Registers registers;
  by_rows<2>(blocks_of(rows), [&]<int M>(int64_t block) {
    by_rows<M>(blocks_of(to - from), [&]<int N>(int64_t column) {
      Square sums[M][N];
      Blocks inputs = squares_at(x.turned.data() + block * squares, squares);
      if (rows == 1) inputs.row = 0;  // the row 16 times: fewer lines are read
      multiply_blocks<uint16_t>(inputs, squares_at(weight + column * squares, squares), squares, sums);
      for (int n = 0; n < N; ++n) {
        const int64_t o = from + (column + n) * LANES, outputs = std::min<int64_t>(LANES, to - o);
        for (int m = 0; m < M; ++m) put_rows(sums[m][n], p, y, rows, (block + m) * LANES, o, outputs);
      }
    });
  });
}

// Whole blocks of 16 outputs; the weights are read as they lie.
inline void blocks_8(const Product& p, const Rows& x, float* y, int64_t rows, int64_t from, int64_t to) {
  const int64_t squares = p.in / 64;
  const Registers registers;
  by_rows<2>(blocks_of(rows), [&]<int N>(int64_t block) {
    by_rows<N == 1 ? 4 : 2>((to - from) / LANES, [&]<int M>(int64_t column) {
      const int64_t first = block * LANES, begin = from + column * LANES;
      Square sums[M][N];
      const Blocks weights{static_cast<const int8_t*>(p.weight) + begin * p.in, p.in, 64, LANES * p.in};
      multiply_blocks<int8_t>(weights, squares_at(x.turned.data() + block * squares, squares), squares, sums);
      for (int m = 0; m < M; ++m) {
        const int64_t o = begin + m * LANES;
        const Floats scale = load(static_cast<const float*>(p.scale) + o), bias = p.bias ? load(p.bias + o) : zero();
        for (int n = 0; n < N; ++n) {
          transpose(sums[m][n].word);
          for (int64_t i = 0, row; i < LANES && (row = first + n * LANES + i) < rows; ++i) {
            const Floats sum = to_floats(load_bytes(sums[m][n].word[i]));
            store(y + row * p.out + o, add(multiply(sum, multiply(all(x.scale[row]), scale)), bias));
          }
        }
      }
    });
  });
}

// One group of 16 outputs: the low halves, then the high ones.
inline void unpack(const uint8_t* packed, int64_t stride, Square (&weights)[2]) {
  UNROLL for (int i = 0; i < LANES; ++i) {
    const Bytes bytes = load_bytes(packed + i * stride);
    put_bytes(weights[0].word[i], low_halves(bytes));
    put_bytes(weights[1].word[i], high_halves(bytes));
  }
}

struct Scratch4 {  // of a thread
  Turned scales, centers;
  Square weights[2][2], dots[2][2];  // of a group and its neighbour
  alignas(64) float shifts[2 * LANES][LANES];
  // Sums of groups g, g + 16, …: outputs by rows.
  alignas(64) float sums[LANES][2][LANES][LANES];
};

template <int N>
inline void block_4(const Product& p, const Rows& x, float* y, int64_t rows, int64_t block, int64_t o) {
  const int64_t G = p.in / GROUP, stride = G * (GROUP / 2);
  static thread_local Scratch4 own;
  Scratch4& s = own;
  const uint8_t* weight = static_cast<const uint8_t*>(p.weight) + o * stride;
  const auto add_up = [&](int64_t g) {
    const int64_t at = g % (2 * LANES);
    for (int n = 0; n < N; ++n) {
      const int64_t row = ((block + n) * G + g) * LANES;
      const Floats row_scale = load(x.turned_scale.data() + row), summed = load(x.turned_summed.data() + row);
      UNROLL for (int i = 0; i < LANES; ++i) {
        float* to = s.sums[g % LANES][n][i];
        Floats sum = g < LANES ? zero() : load(to);
        add_group(sum, to_floats(load_bytes(s.dots[g % 2][n].word[i])), all(s.scales[at][i]), all(s.shifts[at][i]), row_scale, summed);
        store(to, sum);
      }
    }
  };
  // The registers multiply a group while the group before is added up and the one behind is unpacked.
  unpack(weight, stride, s.weights[0]);
  for (int64_t g = 0; g < G; ++g) {
    stores_end();
    load_register<4>(&s.weights[g % 2][0], 64);
    load_register<5>(&s.weights[g % 2][1], 64);
    each<N>([&]<int I>() {
      const Square* inputs = x.turned.data() + ((block + I) * G + g) * 2;
      clear_register<I>();
      load_register<6>(inputs, 64);
      multiply_registers<int8_t, I, 4, 6>();
      load_register<7>(inputs + 1, 64);
      multiply_registers<int8_t, I, 5, 7>();
    });
    if (g) add_up(g - 1);
    if (g + 1 < G) unpack(weight + (g + 1) * (GROUP / 2), stride, s.weights[(g + 1) % 2]);
    const int64_t at = g % (2 * LANES);
    if (at == 0) {
      turn(s.scales, p.scale, G, o, g, LANES);
      turn(s.centers, p.center, G, o, g, LANES);
    }
    store(s.shifts[at], shift_of(load(s.centers[at]), load(s.scales[at])));
    each<N>([&]<int I>() { store_register<I>(s.dots[g % 2][I]); });
  }
  add_up(G - 1);
  for (int n = 0; n < N; ++n) {
    fold(std::min<int64_t>(G, LANES), [&](int64_t to, int64_t from) {
      UNROLL for (int i = 0; i < LANES; ++i) store(s.sums[to][n][i], add(load(s.sums[to][n][i]), load(s.sums[from][n][i])));
    });
    Square& turned = s.dots[0][n];
    std::memcpy(&turned, s.sums[0][n], sizeof turned);
    transpose(turned.word);
    put_rows(turned, p, y, rows, (block + n) * LANES, o, LANES);
  }
}

inline void blocks_4(const Product& p, const Rows& x, float* y, int64_t rows, int64_t from, int64_t to) {
  const Registers registers;
  by_rows<2>(blocks_of(rows), [&]<int N>(int64_t block) {
    for (int64_t o = from; o < to; o += LANES) block_4<N>(p, x, y, rows, block, o);
  });
}
#endif

// --- products ----------------------------------------------------------------------------------------------------------

inline void make_row_ready(Rows& ready, int64_t bits, const float* x, int64_t r, int64_t in) {
  if (bits == 16) {
    const int64_t width = rounded_up(in, PAIRED);
#ifdef PLUG_PAIRS
    uint16_t* half = ready.half.data() + r * width;
    for (int64_t i = 0; i < in; ++i) half[i] = to_bfloat16(x[i]);
    std::fill_n(half + in, width - in, 0);
    if (has_amx())
      for (int64_t k = 0; k < width / PAIRED; ++k)
        std::memcpy(ready.turned[r / LANES * (width / PAIRED) + k].word[r % LANES], half + k * PAIRED, 64);
#else
    std::copy_n(x, in, ready.x.data() + r * width);
#endif
  } else if (bits == 8) {
    ready.scale[r] = round_values(x, in, ready.q.data() + r * rounded_up(in, GROUP), &ready.sum[r]);
  } else {
    const int64_t groups = in / GROUP;
    for (int64_t g = 0; g < groups; ++g) {
      const int64_t at = r * groups + g;
      int8_t q[GROUP];
      int32_t sum;
      ready.scale[at] = round_values(x + g * GROUP, GROUP, q, &sum);
      ready.summed[at] = ready.scale[at] * static_cast<float>(sum);
      order_for_nibbles(q, ready.q.data() + (r * groups + g) * GROUP);
    }
  }
}

// Whether AMX multiplies rows of integers: several, of whole squares.
inline bool is_turned(int64_t bits, int64_t rows, int64_t in) {
  return bits < 16 && rows >= ROWS_FOR_AMX && in % 64 == 0 && has_amx();
}

// Room for rows that products with weights of `bits` multiply; whether there is something to be done for each row.
inline bool make_room(Rows& ready, int64_t bits, int64_t rows, int64_t in) {
  if (bits == 32) return false;
  if (bits == 16) {
    const int64_t width = rounded_up(in, PAIRED);
#ifdef PLUG_PAIRS
    ready.half.resize(rows * width);
    if (has_amx()) ready.turned.resize(blocks_of(rows) * (width / PAIRED));
#else
    if (width == in) return false;  // `x` itself is read
    ready.x.assign(rows * width, 0);
#endif
  } else if (bits == 8) {
    ready.q.assign(rows * rounded_up(in, GROUP), 0);
    ready.scale.resize(rows);
    ready.sum.resize(rows);
  } else {
    const int64_t groups = rows * (in / GROUP);
    ready.q.resize(groups * GROUP);
    ready.scale.resize(groups);
    ready.summed.resize(groups);
  }
  if (is_turned(bits, rows, in)) {
    ready.turned.resize(blocks_of(rows) * (in / 64));
    ready.turned_scale.resize(rounded_up(rows, LANES) * (in / GROUP));
    ready.turned_summed.resize(ready.turned_scale.size());
  }
  return true;
}

// Rows [first, first + count) of a block, for AMX.
inline void turn_rows(Rows& ready, int64_t bits, int64_t first, int64_t count, int64_t in) {
  const int64_t squares = in / 64, width = rounded_up(in, GROUP), G = in / GROUP;
  const uint8_t* q = reinterpret_cast<const uint8_t*>(ready.q.data()) + first * width;
  for (int64_t k = 0; k < squares; ++k) transpose(q + 64 * k, width, count, 64, ready.turned[first / LANES * squares + k].word);
  for (int64_t r = 0; bits == 4 && r < count; ++r)
    for (int64_t g = 0; g < G; ++g) {
      const int64_t to = (first / LANES * G + g) * LANES + r;
      ready.turned_scale[to] = ready.scale[(first + r) * G + g];
      ready.turned_summed[to] = ready.summed[(first + r) * G + g];
    }
}

// The rows that products multiply, made ready once for several weights of the same `bits`, and read by `added`.
inline void make_ready(Pool& pool, Rows& ready, int64_t bits, const float* x, int64_t rows, int64_t in, Added& added) {
  const bool changes = make_room(ready, bits, rows, in);
  if (!rows || (!changes && added.is_nothing())) return;
  const bool turned = is_turned(bits, rows, in);
  const int64_t at_once = rows < 4 ? rows : turned ? LANES : (rows + 15) / 16;
  pool.run((rows + at_once - 1) / at_once, [&](int64_t chunk) {
    for (int64_t r = chunk * at_once; r < std::min(rows, (chunk + 1) * at_once); ++r) {
      if (changes) make_row_ready(ready, bits, x + r * in, r, in);
      if (!added.is_nothing()) added.read(r, x + r * in);
    }
    if (turned) turn_rows(ready, bits, chunk * LANES, std::min<int64_t>(LANES, rows - chunk * LANES), in);
  });
}

// Outputs [from, to) of all rows; `from` is a multiple of OUTPUTS_AT_ONCE.
inline void outputs(const Product& p, const Rows& ready, const float* x, float* y, int64_t rows, int64_t from, int64_t to) {
  if (p.bits == 32) {
    outputs_float<float>(p, x, y, rows, from, to);
  } else if (p.bits == 16) {
#ifdef PLUG_AMX
    if (has_amx()) return outputs_pairs(p, ready, y, rows, from, to);
#endif
#ifdef PLUG_PAIRS
    outputs_float<uint16_t>(p, ready.half.data(), y, rows, from, to);
#else
    outputs_float<uint16_t>(p, p.in % PAIRED ? ready.x.data() : x, y, rows, from, to);
#endif
  } else {
#ifdef PLUG_AMX
    if (is_turned(p.bits, rows, p.in)) {
      const int64_t whole = from + (to - from) / LANES * LANES;
      (p.bits == 8 ? blocks_8 : blocks_4)(p, ready, y, rows, from, whole);
      from = whole;
    }
#endif
    if (rows > ROWS_ONE_BY_ONE) return (p.bits == 8 ? many_rows_8 : many_rows_4)(p, ready, y, rows, from, to);
    for (int64_t r = 0; r < rows; ++r) (p.bits == 8 ? one_row_8 : one_row_4)(p, ready, r, y + r * p.out, from, to);
  }
}

// x (rows, in) and y (rows, out) of each product, which share x; `added` is part of them; `after` gets a product's number and
// the outputs that are done.
template <typename After>
inline void multiply(Pool& pool, const Product* products, int count, const float* x, float* const* y, int64_t rows, Added& added,
                     const After& after) {
  static thread_local Rows own;
  Rows& ready = own;  // of the calling thread, also where others read it
  make_ready(pool, ready, products[0].bits, x, rows, products[0].in, added);
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
    if (!added.is_nothing()) added.add(i, y[i], products[i].out, from, to);
    after(i, from, to);
  });
}

}  // namespace plug

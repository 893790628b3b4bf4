// What LoRA adapters add to products, for each row by its own adapter.

#pragma once

#include <algorithm>
#include <vector>

#include "lanes.h"

namespace plug {

// b times (a times x), with a (rank, in) and b (out / 64, rank, 64), zeros added. Rank 0: nothing.
struct LowRank {
  const float *a, *b;
  int64_t rank;
};

constexpr int64_t OUTPUTS_AT_ONCE = 64;  // what a thread takes at a time

// The adapters that rows use besides the weights.
struct Adapters {
  const LowRank* parts;    // (layers, products of a layer, count)
  const int64_t* numbers;  // of each row's adapter, below count; null: all rows use number 0
  int64_t count;
};

// COUNT sums of products of x with rows of a, side by side: one alone would wait for each addition.
template <int COUNT>
inline void inner_products(const float* a, const float* x, int64_t in, float* found) {
  Floats sums[COUNT];
  UNROLL for (auto& sum : sums) sum = zero();
  int64_t i = 0;
  for (; i + LANES <= in; i += LANES) {
    const Floats input = load(x + i);
    UNROLL for (int c = 0; c < COUNT; ++c) sums[c] = multiply_add(load(a + c * in + i), input, sums[c]);
  }
  if (i < in) {
    const Floats input = load_some(x + i, in - i);
    UNROLL for (int c = 0; c < COUNT; ++c) sums[c] = multiply_add(load_some(a + c * in + i, in - i), input, sums[c]);
  }
  UNROLL for (int c = 0; c < COUNT; ++c) found[c] = sum_of(sums[c]);
}

// y[o] += sum over r of inner[r] * b[r][o], for VECTORS vectors of outputs from y and b on.
template <int VECTORS>
inline void add_outputs(const float* inner, const float* b, int64_t rank, float* y) {
  Floats sums[VECTORS];
  UNROLL for (int v = 0; v < VECTORS; ++v) sums[v] = load(y + v * LANES);
  for (int64_t r = 0; r < rank; ++r) {
    const Floats by = all(inner[r]);
    UNROLL for (int v = 0; v < VECTORS; ++v) sums[v] = multiply_add(load(b + r * OUTPUTS_AT_ONCE + v * LANES), by, sums[v]);
  }
  UNROLL for (int v = 0; v < VECTORS; ++v) store(y + v * LANES, sums[v]);
}

// The low-rank parts of several products of the same tokens.
class Added {
 public:
  // `parts`: (count, adapters of a product). Token n is of row rows[n]; without `rows` it is row n.
  Added(const Adapters* adapters, const LowRank* parts, int count, int64_t tokens, const int64_t* rows, int64_t in)
      : adapters_(adapters), parts_(parts), count_(count), tokens_(tokens), rows_(rows), in_(in) {
    for (int64_t i = 0; adapters && i < count * adapters->count; ++i) width_ = std::max(width_, parts[i].rank);
    inner_.resize(count * tokens * width_);
  }

  bool is_nothing() const { return width_ == 0; }

  // Computes a times x of token n, whose inputs are `x`.
  void read(int64_t n, const float* x) {
    for (int i = 0; i < count_; ++i) {
      const LowRank& part = of(i, n);
      float* found = inner_.data() + (i * tokens_ + n) * width_;
      int64_t r = 0;
      for (; r + TOGETHER <= part.rank; r += TOGETHER) inner_products<TOGETHER>(part.a + r * in_, x, in_, found + r);
      for (; r < part.rank; ++r) inner_products<1>(part.a + r * in_, x, in_, found + r);
    }
  }

  // Adds b times that to outputs [from, to) of product `i`, whose y is (tokens, out); `from` is a multiple of 64, and no more
  // than 64 are added.
  void add(int i, float* y, int64_t out, int64_t from, int64_t to) const {
    for (int64_t n = 0; n < tokens_; ++n) {
      const LowRank& part = of(i, n);
      if (!part.rank) continue;
      const float *inner = inner_.data() + (i * tokens_ + n) * width_, *b = part.b + from * part.rank;
      float* own = y + n * out + from;
      int64_t o = 0;
      for (; o + VECTORS * LANES <= to - from; o += VECTORS * LANES) add_outputs<VECTORS>(inner, b + o, part.rank, own + o);
      for (; o + LANES <= to - from; o += LANES) add_outputs<1>(inner, b + o, part.rank, own + o);
      for (; o < to - from; ++o)
        for (int64_t r = 0; r < part.rank; ++r) own[o] += inner[r] * b[r * OUTPUTS_AT_ONCE + o];
    }
  }

 private:
  static constexpr int TOGETHER = TILE == 16 ? 8 : 4, VECTORS = TILE == 16 ? 4 : 2;

  const LowRank& of(int64_t i, int64_t n) const {
    const int64_t number = adapters_->numbers ? adapters_->numbers[rows_ ? rows_[n] : n] : 0;
    return parts_[i * adapters_->count + number];
  }

  const Adapters* adapters_;
  const LowRank* parts_;
  const int count_;
  const int64_t tokens_;
  const int64_t* rows_;
  const int64_t in_;
  int64_t width_ = 0;
  std::vector<float> inner_;
};

}  // namespace plug

// A step of the decoder on a CPU, in one call: PyTorch's functions would cost more than the arithmetic of a small model.
// The mathematics is that of `model/layers.py`. A C interface, so that no header of PyTorch is compiled and a build takes
// seconds; `build.py` compiles it for the processor at hand.

#include <memory>
#include <mutex>

#include "functions.h"
#include "products.h"

namespace plug {
namespace {

constexpr float SQRT_HALF = 0.70710678f;

struct Norm {
  const float *weight, *bias;
};

struct Layer {
  Norm self_norm, cross_norm, feed_forward_norm;
  Product query_key_value[3], out, source_query, source_out, fc1, fc2;
  float *keys, *values;                        // (rows, heads, capacity, head_dim): written and read
  const float *source_keys, *source_values;    // (rows, heads, source_capacity, head_dim)
};

constexpr int PRODUCTS = 8;  // of a layer, in the order of its fields

struct Shape {
  int64_t hidden, heads, head_dim, capacity, source_capacity, layers;
  double eps;
};

inline float dot(const float* a, const float* b, int64_t count) {
  Floats sum = zero();
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) sum = multiply_add(load(a + i), load(b + i), sum);
  if (i < count) sum = multiply_add(load_some(a + i, count - i), load_some(b + i, count - i), sum);
  return sum_of(sum);
}

void normalize(const float* x, const Norm& norm, int64_t hidden, double eps, float* y) {
  const double mean = sum_over<double>(hidden, [&](int64_t i) { return static_cast<double>(x[i]); }) / hidden;
  const double squares = sum_over<double>(hidden, [&](int64_t i) { return (x[i] - mean) * (x[i] - mean); });
  const float scale = static_cast<float>(1 / std::sqrt(squares / hidden + eps)), shift = static_cast<float>(mean);
  for (int64_t i = 0; i < hidden; ++i) y[i] = (x[i] - shift) * scale * norm.weight[i] + norm.bias[i];
}

// One head of one token: softmax(query keys / sqrt(head_dim)) values, over the first `count` positions.
void attend(const float* query, const float* keys, const float* values, int64_t count, int64_t head_dim, float* context) {
  static thread_local std::vector<float> own;
  own.resize(count);
  float* chances = own.data();
  const float scale = 1 / std::sqrt(static_cast<float>(head_dim));
  float largest = -INFINITY;
  for (int64_t i = 0; i < count; ++i) {
    chances[i] = scale * dot(query, keys + i * head_dim, head_dim);
    largest = std::max(largest, chances[i]);
  }
  for (int64_t i = 0; i < count; ++i) chances[i] = exp_of_negative(chances[i] - largest);
  const float share = 1 / sum_over<float>(count, [&](int64_t i) { return chances[i]; });
  int64_t d = 0;
  for (; d + 4 * LANES <= head_dim; d += 4 * LANES) {
    Floats sums[4] = {zero(), zero(), zero(), zero()};
    for (int64_t i = 0; i < count; ++i)
      UNROLL for (int j = 0; j < 4; ++j)
        sums[j] = multiply_add(all(chances[i]), load(values + i * head_dim + d + j * LANES), sums[j]);
    UNROLL for (int j = 0; j < 4; ++j) store(context + d + j * LANES, multiply(sums[j], all(share)));
  }
  for (; d < head_dim; d += LANES) {
    const int64_t left = std::min<int64_t>(head_dim - d, LANES);
    Floats sum = zero();
    for (int64_t i = 0; i < count; ++i) sum = multiply_add(all(chances[i]), load_some(values + i * head_dim + d, left), sum);
    float lanes[LANES];
    store(lanes, multiply(sum, all(share)));
    std::copy_n(lanes, left, context + d);
  }
}

// The exact GELU.
void gelu(float* values, int64_t count) {
  for (int64_t i = 0; i < count; ++i) values[i] = 0.5f * values[i] * (1 + erf_of(values[i] * SQRT_HALF));
}

constexpr auto NOTHING = [](int, int64_t, int64_t) {};

void step(Pool& pool, const Shape& shape, const Layer* layers, const Norm& final_norm, const Product& head, float* hidden,
          int64_t tokens, const int64_t* rows, const int64_t* positions, const int32_t* source_lengths, const Adapters* adapters,
          float* logits) {
  const int64_t width = shape.hidden, heads = shape.heads, head_dim = shape.head_dim, inner = heads * head_dim;
  std::vector<float> normalized(tokens * width), query(tokens * inner), key(tokens * inner), value(tokens * inner),
      context(tokens * inner), change(tokens * width), wide(tokens * layers[0].fc1.out);
  const auto norm = [&](const Norm& by) {
    for (int64_t n = 0; n < tokens; ++n)
      normalize(hidden + n * width, by, width, shape.eps, normalized.data() + n * width);
  };
  int64_t index = 0;  // of the layer
  // `which`: the number of the first product among those of a layer.
  const auto multiply_some = [&](int which, const Product* products, int count, const float* x, float* const* y, const auto& after) {
    const LowRank* parts = adapters ? adapters->parts + (index * PRODUCTS + which) * adapters->count : nullptr;
    Added added(adapters, parts, count, tokens, rows, products[0].in);
    multiply(pool, products, count, x, y, tokens, added, after);
  };
  const auto multiply_one = [&](int which, const Product& product, const float* x, float* y) {
    multiply_some(which, &product, 1, x, &y, NOTHING);
  };
  const auto add = [&](int which, const Product& product, const float* x) {
    multiply_one(which, product, x, change.data());
    for (int64_t i = 0; i < tokens * width; ++i) hidden[i] += change[i];
  };
  const auto attend_all = [&](const float* keys, const float* values, int64_t capacity, const auto& count) {
    pool.run(heads, [&](int64_t h) {
      for (int64_t n = 0; n < tokens; ++n) {
        const int64_t begin = (rows[n] * heads + h) * capacity * head_dim, own = n * inner + h * head_dim;
        attend(query.data() + own, keys + begin, values + begin, count(n), head_dim, context.data() + own);
      }
    });
  };
  for (; index < shape.layers; ++index) {
    const Layer& layer = layers[index];
    norm(layer.self_norm);
    float* const parts[] = {query.data(), key.data(), value.data()};
    multiply_some(0, layer.query_key_value, 3, normalized.data(), parts, NOTHING);
    // All new positions join the cache before any attends, each to those up to its own.
    for (int64_t n = 0; n < tokens; ++n)
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t at = ((rows[n] * heads + h) * shape.capacity + positions[n]) * head_dim, own = n * inner + h * head_dim;
        std::copy_n(key.data() + own, head_dim, layer.keys + at);
        std::copy_n(value.data() + own, head_dim, layer.values + at);
      }
    attend_all(layer.keys, layer.values, shape.capacity, [&](int64_t n) { return positions[n] + 1; });
    add(3, layer.out, context.data());
    norm(layer.cross_norm);
    multiply_one(4, layer.source_query, normalized.data(), query.data());
    attend_all(layer.source_keys, layer.source_values, shape.source_capacity, [&](int64_t n) { return source_lengths[rows[n]]; });
    add(5, layer.source_out, context.data());
    norm(layer.feed_forward_norm);
    float* y = wide.data();
    multiply_some(6, &layer.fc1, 1, normalized.data(), &y, [&](int, int64_t from, int64_t to) {
      for (int64_t n = 0; n < tokens; ++n) gelu(y + n * layer.fc1.out + from, to - from);
    });
    add(7, layer.fc2, wide.data());
  }
  norm(final_norm);
  Added nothing(nullptr, nullptr, 1, tokens, nullptr, width);
  multiply(pool, &head, 1, normalized.data(), &logits, tokens, nothing, NOTHING);
}

}  // namespace
}  // namespace plug

namespace {

// One pool for all models of the process; calls from several threads wait for each other.
std::mutex mutex;
std::unique_ptr<plug::Pool> pool;
int pool_threads = 0;

plug::Pool& pool_of(int threads) {
  if (threads != pool_threads) {
    pool.reset();
    pool = std::make_unique<plug::Pool>(threads);
    pool_threads = threads;
  }
  return *pool;
}

}  // namespace

extern "C" {

// 1024: AMX and AVX-512. 512: AVX-512 with VNNI. 256: AVX2. 128: Arm with dot products. 0: what the compiler made of loops.
int plug_instructions() { return plug::has_amx() ? 1024 : plug::INSTRUCTIONS; }

// x (rows, in) and y (rows, out), float32, contiguous; `low_rank`, of all rows, may be null.
void plug_multiply(int threads, const plug::Product* product, const float* x, float* y, int64_t rows,
                   const plug::LowRank* low_rank) {
  const std::lock_guard<std::mutex> lock(mutex);
  const plug::Adapters adapters{low_rank, nullptr, 1};
  plug::Added added(low_rank ? &adapters : nullptr, low_rank, 1, rows, nullptr, product->in);
  plug::multiply(pool_of(threads), product, 1, x, &y, rows, added, plug::NOTHING);
}

// hidden (tokens, hidden), the embedded tokens, is overwritten; token n is at positions[n] of text rows[n]; adapters may be
// null; logits (tokens, vocabulary).
void plug_step(int threads, const plug::Shape* shape, const plug::Layer* layers, const plug::Norm* final_norm,
               const plug::Product* head, float* hidden, int64_t tokens, const int64_t* rows, const int64_t* positions,
               const int32_t* source_lengths, const plug::Adapters* adapters, float* logits) {
  const std::lock_guard<std::mutex> lock(mutex);
  plug::step(pool_of(threads), *shape, layers, *final_norm, *head, hidden, tokens, rows, positions, source_lengths, adapters,
             logits);
}

// 0 if products in 32, 16, 8 and 4 bits of a weight that is 1 everywhere are what they should be.
int plug_self_test() {
  constexpr int64_t out = 80, in = 256;
  std::vector<float> x(5 * in, 0.5f), y(5 * out), single(out * in, 1.0f), scale(out, 1.0f);
  std::vector<uint16_t> half(out * in, 0x3f80), ones(out * in / plug::GROUP, 0x3f80), zeros(ones.size(), 0);
  std::vector<int8_t> eight(out * in, 1);
  std::vector<uint8_t> four(out * in / 2, 0x99);  // (9 - 8) * 1 + 0
  for (const plug::Product& product : {plug::Product{32, single.data(), nullptr, nullptr, nullptr, out, in},
                                       plug::Product{16, half.data(), nullptr, nullptr, nullptr, out, in},
                                       plug::Product{8, eight.data(), scale.data(), nullptr, nullptr, out, in},
                                       plug::Product{4, four.data(), ones.data(), zeros.data(), nullptr, out, in}})
    for (int64_t rows : {1, 5}) {
      plug_multiply(2, &product, x.data(), y.data(), rows, nullptr);
      for (int64_t i = 0; i < rows * out; ++i)
        if (std::fabs(y[i] - 0.5f * in) > 1e-3f) return static_cast<int>(product.bits);
    }
  return 0;
}

}  // extern "C"

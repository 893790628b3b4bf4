// The products of `kernels/cpu` against sums in float64, for processors that the tests do not run on: `test_processors.py`
// builds this for each, and runs it where it can (Arm by an emulator). Prints what differs; returns how much of it.

#include <cstdio>
#include <random>

#include "products.h"

using namespace plug;

namespace {

std::mt19937 source(0);
float normal() { return std::normal_distribution<float>()(source); }

struct Case {
  int64_t bits, rows, out, in;
  std::vector<float> x, bias, scale;
  std::vector<double> weight;  // (out, in), what the product's weight stands for
  std::vector<uint16_t> scale_4, center_4, pairs;
  std::vector<float> single;
  std::vector<int8_t> eight;
  std::vector<uint8_t> four;

  Case(int64_t bits, int64_t rows, int64_t out, int64_t in) : bits(bits), rows(rows), out(out), in(in), weight(out * in) {
    for (int64_t i = 0; i < rows * in; ++i) x.push_back(normal());
    for (int64_t o = 0; o < out; ++o) bias.push_back(normal());
    const int64_t blocks = rounded_up(out, LANES), width = rounded_up(in, PAIRED);
    single.resize(blocks * in);
    pairs.resize(blocks * width);
    eight.resize(out * in);
    four.resize(out * in / 2);
    for (int64_t o = 0; o < out; ++o) scale.push_back(0.01f + 0.001f * (o % 7));
    for (int64_t i = 0; i < out * in / GROUP; ++i) {
      scale_4.push_back(to_bfloat16(0.01f + 0.003f * (i % 5)));
      center_4.push_back(to_bfloat16(0.02f * (i % 3 - 1)));
    }
    for (int64_t o = 0; o < out; ++o)
      for (int64_t i = 0; i < in; ++i) put(o, i);
  }

  void put(int64_t o, int64_t i) {
    double& exact = weight[o * in + i];
    const float value = normal();
    if (bits == 32) {
      exact = single[(o / LANES * in + i) * LANES + o % LANES] = value;
    } else if (bits == 16) {
      const uint16_t half = to_bfloat16(value);
      pairs[((o / LANES * (rounded_up(in, PAIRED) / 2) + i / 2) * LANES + o % LANES) * 2 + i % 2] = half;
      exact = from_bfloat16(half);
    } else if (bits == 8) {
      const int integer = o == 0 ? (i % 2 ? 127 : -127) : std::clamp(static_cast<int>(value * 40), -127, 127);
      eight[o * in + i] = static_cast<int8_t>(integer);
      exact = integer * static_cast<double>(scale[o]);
    } else {
      const int integer = o == 0 ? 15 * (i % 2) : static_cast<int>(source() % 16);
      const int64_t group = (o * in + i) / GROUP, place = i % 8;
      for (int byte = 0; byte < 4; ++byte) {
        uint8_t& packed = four[(o * in + i - place) / 2 + byte];
        if (LOW[byte] == place) packed |= integer;
        if (HIGH[byte] == place) packed |= integer << 4;
      }
      exact = from_bfloat16(center_4[group]) + static_cast<double>(from_bfloat16(scale_4[group])) * (integer - 8);
    }
  }

  Product product() const {
    const void* of[] = {four.data(), eight.data(), pairs.data(), single.data()};
    const int which = bits == 4 ? 0 : bits == 8 ? 1 : bits == 16 ? 2 : 3;
    const void* scales = bits == 4 ? static_cast<const void*>(scale_4.data()) : scale.data();
    return {bits, of[which], scales, center_4.data(), bias.data(), out, in};
  }

  // The row as the product reads it.
  std::vector<double> read(int64_t row) const {
    std::vector<double> found(x.begin() + row * in, x.begin() + (row + 1) * in);
    if (bits == 16) {
#ifdef PLUG_PAIRS
      for (double& each : found) each = from_bfloat16(to_bfloat16(static_cast<float>(each)));
#endif
    } else if (bits < 16) {
      const int64_t group = bits == 4 ? GROUP : in;
      for (int64_t begin = 0; begin < in; begin += group) {
        std::vector<int8_t> q(group);
        int32_t sum;
        const float step = round_values(x.data() + row * in + begin, group, q.data(), &sum);
        for (int64_t i = 0; i < group; ++i) found[begin + i] = q[i] * static_cast<double>(step);
      }
    }
    return found;
  }
};

// An adapter's matrices, and what they add to a row.
struct Pair {
  int64_t rank, out, in;
  std::vector<float> a, b;  // as `LowRank` has them

  Pair(int64_t rank, int64_t out, int64_t in) : rank(rank), out(out), in(in), a(rank * in), b(rounded_up(out, OUTPUTS_AT_ONCE) * rank) {
    for (float& each : a) each = normal();
    for (int64_t o = 0; o < out; ++o)
      for (int64_t r = 0; r < rank; ++r) b[at(o, r)] = normal();
  }

  int64_t at(int64_t o, int64_t r) const { return (o / OUTPUTS_AT_ONCE * rank + r) * OUTPUTS_AT_ONCE + o % OUTPUTS_AT_ONCE; }

  // The sum, and that of the absolute values.
  std::pair<double, double> added(const float* x, int64_t o) const {
    double sum = 0, size = 0;
    for (int64_t r = 0; r < rank; ++r) {
      double inner = 0, inner_size = 0;
      for (int64_t i = 0; i < in; ++i) {
        inner += static_cast<double>(a[r * in + i]) * x[i];
        inner_size += std::fabs(static_cast<double>(a[r * in + i]) * x[i]);
      }
      sum += inner * b[at(o, r)];
      size += inner_size * std::fabs(b[at(o, r)]);
    }
    return {sum, size};
  }
};

int check(Pool& pool, int64_t bits, int64_t rows, int64_t out, int64_t in) {
  const Case each(bits, rows, out, in);
  const Product product = each.product();
  const auto nothing = [](int, int64_t, int64_t) {};
  std::vector<float> together(rows * out), alone(out);
  float* y = together.data();
  const Pair pairs[] = {{0, out, in}, {3, out, in}, {11, out, in}};  // the rows use them in turn
  std::vector<LowRank> parts;
  for (const Pair& pair : pairs) parts.push_back({pair.a.data(), pair.b.data(), pair.rank});
  std::vector<int64_t> numbers;
  for (int64_t row = 0; row < rows; ++row) numbers.push_back(row % 3);
  const Adapters adapters{parts.data(), numbers.data(), 3};
  Added added(&adapters, parts.data(), 1, rows, nullptr, in);
  multiply(pool, &product, 1, each.x.data(), &y, rows, added, nothing);
  int wrong = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const std::vector<double> inputs = each.read(row);
    for (int64_t o = 0; o < out; ++o) {
      auto [exact, size] = pairs[row % 3].added(each.x.data() + row * in, o);
      for (int64_t i = 0; i < in; ++i) {
        exact += inputs[i] * each.weight[o * in + i];
        size += std::fabs(inputs[i] * each.weight[o * in + i]);
      }
      // Float32 sums; in 4 bits a group's sum and its shift cancel in part.
      if (!(std::fabs(together[row * out + o] - exact - each.bias[o]) <= 2e-6 * (size + std::fabs(each.bias[o])) * (bits == 4 ? 4 : 1)))
        ++wrong;
    }
    float* one = alone.data();
    const Adapters its_own{&parts[row % 3], nullptr, 1};
    Added alone_added(&its_own, its_own.parts, 1, 1, nullptr, in);
    multiply(pool, &product, 1, each.x.data() + row * in, &one, 1, alone_added, nothing);
    if (std::memcmp(one, y + row * out, out * sizeof(float))) ++wrong;
  }
  if (wrong) std::printf("%lld bits, %lld rows, %lld x %lld: %d differ\n", (long long)bits, (long long)rows, (long long)out, (long long)in, wrong);
  return wrong;
}

}  // namespace

int main() {
  std::printf("instructions %d%s\n", INSTRUCTIONS, has_amx() ? " and AMX" : "");
  Pool pool(2);
  int wrong = 0;
  for (int64_t rows : {1, 2, 3, 7, 13, 20, 66}) {
    for (int64_t bits : {32, 16, 8, 4}) {
      wrong += check(pool, bits, rows, 70, 384);
      wrong += check(pool, bits, rows, 17, 2176);
      wrong += check(pool, bits, rows, 1, 128);
    }
    for (int64_t bits : {32, 16, 8}) {
      wrong += check(pool, bits, rows, 33, 67);
      wrong += check(pool, bits, rows, 5, 3);
    }
  }
  return wrong > 100 ? 100 : wrong;
}

// exp, erf and sums of many values, in forms that compilers put side by side.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace plug {

// exp(x) for x <= 0, within 2 units of the last place: 2^n times a polynomial of what is left, |rest| <= log(2) / 2.
inline float exp_of_negative(float x) {
  constexpr float TO_INTEGER = 12582912.0f;  // as in products.h
  x = std::max(x, -87.0f);
  const float moved = x * 1.44269504f + TO_INTEGER, n = moved - TO_INTEGER;
  const float rest = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  for (float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) sum = sum * rest + next;
  sum = sum * rest * rest + rest + 1;
  int32_t bits, power;
  std::memcpy(&power, &moved, 4);
  std::memcpy(&bits, &sum, 4);
  bits += static_cast<int32_t>(static_cast<uint32_t>(power) << 23);
  std::memcpy(&sum, &bits, 4);
  return sum;
}

// Within 4e-7 of erf(x): the rational function that Eigen and XLA have.
inline float erf_of(float x) {
  x = std::min(std::max(x, -4.0f), 4.0f);
  const float square = x * x;
  float top = -2.72614225801306e-10f;
  for (float next : {2.77068142495902e-08f, -2.10102402082508e-06f, -5.69250639462346e-05f, -7.34990630326855e-04f,
                     -2.95459980854025e-03f, -1.60960333262415e-02f})
    top = top * square + next;
  float bottom = -1.45660718464996e-05f;
  for (float next : {-2.13374055278905e-04f, -1.68282697438203e-03f, -7.37332916720468e-03f, -1.42647390514189e-02f})
    bottom = bottom * square + next;
  return x * top / bottom;
}

// term(0) + … + term(count - 1): sixteen sums side by side.
template <typename Sum, typename Term>
inline Sum sum_over(int64_t count, const Term& term) {
  constexpr int WIDTH = 16;
  Sum sums[WIDTH] = {};
  int64_t i = 0;
  for (; i + WIDTH <= count; i += WIDTH)
    for (int lane = 0; lane < WIDTH; ++lane) sums[lane] += term(i + lane);
  for (int lane = 0; i < count; ++i, ++lane) sums[lane] += term(i);
  Sum sum = 0;
  for (Sum each : sums) sum += each;
  return sum;
}

}  // namespace plug

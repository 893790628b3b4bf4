// AMX: eight registers of 16 rows of 64 bytes in each thread, and products of them.
//
//   sums (16 rows of A, 16 columns of B)  +=  A (16, 64 bytes)  times  B (16 words of 4 bytes, 16 columns)
//
// Int8 is summed in int32, bfloat16 in float32. A sum depends on its own row and column alone, to the last bit.

#pragma once

#include <utility>

#include "lanes.h"

#if defined(PLUG_AVX512) && defined(__AMX_INT8__) && defined(__AMX_BF16__) && defined(__linux__)
#define PLUG_AMX 1
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace plug {

struct alignas(64) Square {  // what a register holds
  uint32_t word[LANES][LANES];
};

#ifdef PLUG_AMX

// Whether Linux lets this process use the registers: it wants to be asked, and may refuse.
inline bool has_amx() {
  constexpr int ARCH_REQ_XCOMP_PERM = 0x1023, XTILEDATA = 18;
  static const bool granted = syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XTILEDATA) == 0;
  return granted;
}

// While it lives, this thread's registers are set up. Others (oneDNN) set them up for themselves.
class Registers {
 public:
  Registers() {
    struct alignas(64) {
      uint8_t palette = 1, start_row = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } shape;
    __asm__ volatile("ldtilecfg %0" : : "m"(shape));
  }
  ~Registers() { __asm__ volatile("tilerelease"); }
  Registers(const Registers&) = delete;
};

template <int N>
inline void clear_register() {
  __asm__ volatile("tilezero %%tmm%c0" : : "i"(N));
}
// Comes before the first load of what was stored: loads do not say that they read memory, or the compiler would keep all
// pointers there between them.
inline void stores_end() { __asm__ volatile("" : : : "memory"); }
template <int N>
inline void load_register(const void* from, int64_t stride) {
  __asm__ volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(N));
}
template <int N>
inline void store_register(Square& to) {
  __asm__ volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(&to), "r"(int64_t{64}), "i"(N) : "memory");
}
template <typename Value, int SUMS, int A, int B>
inline void multiply_registers() {
  if constexpr (sizeof(Value) == 1)
    __asm__ volatile("tdpbssd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
  else
    __asm__ volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(SUMS), "i"(A), "i"(B));
}

// act<0>() ... act<COUNT - 1>()
template <int COUNT, typename Act>
inline void each(const Act& act) {
  const auto all = [&]<int... I>(std::integer_sequence<int, I...>) { (act.template operator()<I>(), ...); };
  all(std::make_integer_sequence<int, COUNT>());
}

// Where a product finds blocks of 16 rows: bytes from a row to the next, from 64 bytes of it to the next 64, and from a
// block to the next.
struct Blocks {
  const void* first;
  int64_t row, step, block;
};
inline Blocks squares_at(const Square* first, int64_t squares) {
  return {first, 64, sizeof(Square), squares * int64_t{sizeof(Square)}};
}

constexpr int64_t AHEAD = 8 * sizeof(Square);

// sums[m][n] = block m of A times block n of B, over `steps`; `Value` is int8 or bfloat16.
template <typename Value, int M, int N>
inline void multiply_blocks(const Blocks a, const Blocks b, int64_t steps, Square (&sums)[M][N]) {
  static_assert(M * N <= 4 && (M == 1 || N <= 2));
  const char *from_a = static_cast<const char*>(a.first), *from_b = static_cast<const char*>(b.first);
  stores_end();
  each<M * N>([]<int I>() { clear_register<I>(); });
  for (int64_t k = 0; k < steps; ++k, from_a += a.step, from_b += b.step)
    each<M>([&]<int I>() {
      load_register<4 + I % 2>(from_a + I * a.block, a.row);
      each<N>([&]<int J>() {
        if constexpr (I == 0) load_register<6 + J % 2>(from_b + J * b.block, b.row);
        if constexpr (M * N == 1 && sizeof(Value) == 2)  // a stream of weights: no other work hides its latency
          UNROLL for (int line = 0; line < LANES; ++line) _mm_prefetch(from_b + AHEAD + 64 * line, _MM_HINT_T0);
        multiply_registers<Value, I * N + J, 4 + I % 2, 6 + J % 2>();
      });
    });
  each<M * N>([&]<int I>() { store_register<I>(sums[I / N][I % N]); });
}

#else
inline bool has_amx() { return false; }
#endif

}  // namespace plug

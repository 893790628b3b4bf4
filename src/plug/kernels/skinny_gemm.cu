// out[m][n] = sum_k x[m][k] w[n][k] (+ bias, GELU) for 1 to 8 * TILES rows of x in half precision,
// with weights in 16, 8 or 4 bits.
//
// Each weight is read once, in its own bits, so the time is that of reading the weights. The tensor
// core multiplies a 16 x 16 piece of weights with 8 rows. A lane holds weights of two outputs and
// inputs of one row. Which input stands in which column of the piece is free, as long as both sides
// agree. So a lane takes 16 bytes that lie together in memory and makes numbers of them in registers:
// no weight passes through shared memory. A row's sums do not depend on the other rows.
//
// Weights in 16 and 8 bits lie row by row. Weights in 4 bits lie in the tiles of tiles.py: a warp's
// step reads one tile, 1 KB of weights and 64 bytes of scales.
//
// A block has 16 * PIECES * ACROSS outputs, PIECES * 16 a warp; its ALONG warps share the inputs.
// Set from outside: BITS, HALF (1: float16, 0: bfloat16), TILES, PIECES, ACROSS, ALONG, UNROLL, and
// BLOCKS, how many should fit on a multiprocessor.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#define PER (128 / BITS)  // weights in 16 bytes
#define SPAN (4 * PER)    // inputs of a warp's step; with 4 bits, a group
#define OUTPUTS (16 * PIECES * ACROSS)

#if HALF
#define TYPE "f16"
#define ONE 0x3C003C00u    // two 1
#define MAGIC 0x64006400u  // two 1024, whose last four bits count ones
#define MAGIC_VALUE 1024.f
#else
#define TYPE "bf16"
#define ONE 0x3F803F80u
#define MAGIC 0x43004300u  // two 128
#define MAGIC_VALUE 128.f
#endif

__device__ __forceinline__ float number(u16 v) {
    float r;
    asm("cvt.f32." TYPE " %0, %1;" : "=f"(r) : "h"(v));
    return r;
}

__device__ __forceinline__ u16 rounded(float v) {
    u16 r;
    asm("cvt.rn." TYPE ".f32 %0, %1;" : "=h"(r) : "f"(v));
    return r;
}

__device__ __forceinline__ void multiply(float d[4], const u32 a[4], u32 b0, u32 b1) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// Weights are read once: they pass by the first cache, which is for the inputs.
__device__ __forceinline__ uint4 passing(const uint4* p) {
    uint4 v;
    asm volatile("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(p));
    return v;
}

__device__ __forceinline__ u32 word(const uint4& v, int i) {
    return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w;
}

// Two of four int8 that had 128 added, as a pair of halves: 2^23 + byte is a float, and exact.
template <int J> __device__ __forceinline__ u32 pair_of_bytes(u32 v) {
    float a = __uint_as_float(__byte_perm(v, 0x4B000000u, 0x7440 + J)) - 8388736.f;
    float b = __uint_as_float(__byte_perm(v, 0x4B000000u, 0x7440 + J + 1)) - 8388736.f;
#if HALF
    u32 r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(b), "f"(a));
    return r;
#else
    return __byte_perm(__float_as_uint(a), __float_as_uint(b), 0x7632);
#endif
}

// The 4 bits from bit AT on of both halves of v, as a pair of halves that are MAGIC_VALUE too large.
template <int AT> __device__ __forceinline__ u32 pair_of_nibbles(u32 v) {
    u32 r;
    asm("lop3.b32 %0, %1, %2, %3, 0xEA;" : "=r"(r) : "r"(v >> AT), "r"(0x000F000Fu), "r"(MAGIC));
    return r;
}

// Weights of outputs g and g + 8 for two products with 8 neighbouring inputs: chunk i of u and v.
__device__ __forceinline__ void unpack(const uint4& u, const uint4& v, int i, u32 a[2][4]) {
#if BITS == 16
    a[0][0] = u.x, a[0][1] = v.x, a[0][2] = u.y, a[0][3] = v.y;
    a[1][0] = u.z, a[1][1] = v.z, a[1][2] = u.w, a[1][3] = v.w;
#elif BITS == 8
    #pragma unroll
    for (int h = 0; h < 2; h++) {
        u32 p = word(u, 2 * i + h) ^ 0x80808080u, q = word(v, 2 * i + h) ^ 0x80808080u;
        a[h][0] = pair_of_bytes<0>(p), a[h][1] = pair_of_bytes<0>(q);
        a[h][2] = pair_of_bytes<2>(p), a[h][3] = pair_of_bytes<2>(q);
    }
#else
    u32 p = word(u, i), q = word(v, i);
    a[0][0] = pair_of_nibbles<0>(p), a[0][1] = pair_of_nibbles<0>(q);
    a[0][2] = pair_of_nibbles<4>(p), a[0][3] = pair_of_nibbles<4>(q);
    a[1][0] = pair_of_nibbles<8>(p), a[1][1] = pair_of_nibbles<8>(q);
    a[1][2] = pair_of_nibbles<12>(p), a[1][3] = pair_of_nibbles<12>(q);
#endif
}

// Eight inputs of a row; zeros where there is no such row.
__device__ __forceinline__ uint4 inputs(const u16* x, bool there) {
    return there ? *(const uint4*)x : make_uint4(0, 0, 0, 0);
}

// A step's weights of a lane: those of outputs g and g + 8 of each piece.
__device__ __forceinline__ void load(
    uint4 w[PIECES][2], const uint4* mine, int steps, u64 stride, int step)
{
    #pragma unroll
    for (int p = 0; p < PIECES; p++) {
#if BITS == 4
        const uint4* tile = mine + (p * steps + step) * 64;
        w[p][0] = passing(tile), w[p][1] = passing(tile + 32);
#else
        const uint4* first = mine + p * 16 * stride + step * 4;
        w[p][0] = passing(first), w[p][1] = passing(first + 8 * stride);
#endif
    }
}

// Programmatic dependent launch (launch.py): this kernel may start while the one before it ends. It
// then fetches the first bytes of its weights, which no kernel writes, into the second cache.
__device__ __forceinline__ void before_the_inputs(const uint4* weight, int n_in, int prefetch) {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    int bytes = n_in / PER * 16 * OUTPUTS;  // of a block, which lie together
    if (threadIdx.x == 0 && prefetch) {
        asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;"
                     :: "l"((const char*)weight + (u64)blockIdx.x * bytes),
                        "r"(bytes < prefetch ? bytes : prefetch) : "memory");
    }
#endif
}

__device__ __forceinline__ void wait_for_the_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// x (rows, n_in); bias (n_out); out (rows, n_out), in float where wide.
// 8 bits: scale is float (n_out). 4 bits: weight and scale are what `tile_4bit` returns.
// prefetch: bytes of its weights that a block fetches before its inputs are there.
extern "C" __global__ void __launch_bounds__(ACROSS * ALONG * 32, BLOCKS) skinny_gemm(
    const u16* x, const uint4* weight, const void* scale, const u16* bias, void* out,
    int rows, int n_out, int n_in, int gelu, int wide, int prefetch)
{
    __shared__ float part[ALONG][8 * TILES][OUTPUTS + 1];
    int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    int along = warp % ALONG, across = warp / ALONG;
    int steps = n_in / SPAN;
    int n = blockIdx.x * OUTPUTS + across * 16 * PIECES + g;  // this lane's first output
    u64 stride = n_in / PER;
#if BITS == 4
    u64 tile = (u64)(n / 16) * steps;
    const uint4* mine = weight + tile * 64 + lane;
    const u32* pairs = (const u32*)scale + tile * 16 + g;
#else
    const uint4* mine = weight + n * stride + t;
#endif
    const u16* column = x + (u64)g * n_in + t * PER;
    float total[PIECES][TILES][4] = {};

    before_the_inputs(weight, n_in, prefetch);
    wait_for_the_inputs();

    #pragma unroll UNROLL
    for (int s = along; s < steps; s += ALONG) {
        uint4 w[PIECES][2];
        load(w, mine, steps, stride, s);
        const u16* at = column + s * SPAN;
#if BITS == 4
        u32 pair[PIECES][2];
        #pragma unroll
        for (int p = 0; p < PIECES; p++) {
            pair[p][0] = __ldg(pairs + (p * steps + s) * 16);
            pair[p][1] = __ldg(pairs + (p * steps + s) * 16 + 8);
        }
        float sums[TILES][4] = {}, products[PIECES][TILES][4] = {};
#endif
#if TILES == 1  // there is room for all inputs of the step at once
        uint4 all[PER / 8];
        #pragma unroll
        for (int i = 0; i < PER / 8; i++) all[i] = inputs(at + 8 * i, g < rows);
#endif
        #pragma unroll
        for (int i = 0; i < PER / 8; i++) {
            uint4 in[TILES];
#if TILES == 1
            in[0] = all[i];
#else
            #pragma unroll
            for (int m = 0; m < TILES; m++)
                in[m] = inputs(at + (u64)m * 8 * n_in + 8 * i, m * 8 + g < rows);
#endif
            #pragma unroll
            for (int p = 0; p < PIECES; p++) {
                u32 a[2][4];
                unpack(w[p][0], w[p][1], i, a);
                #pragma unroll
                for (int m = 0; m < TILES; m++) {
#if BITS == 4
                    multiply(products[p][m], a[0], in[m].x, in[m].y);
                    multiply(products[p][m], a[1], in[m].z, in[m].w);
#else
                    multiply(total[p][m], a[0], in[m].x, in[m].y);
                    multiply(total[p][m], a[1], in[m].z, in[m].w);
#endif
                }
            }
#if BITS == 4
            const u32 ones[4] = {ONE, ONE, ONE, ONE};
            #pragma unroll
            for (int m = 0; m < TILES; m++) {
                multiply(sums[m], ones, in[m].x, in[m].y);
                multiply(sums[m], ones, in[m].z, in[m].w);
            }
#endif
        }
#if BITS == 4
        // w = (q - 8) * scale + center, and q came MAGIC_VALUE too large.
        #pragma unroll
        for (int p = 0; p < PIECES; p++) {
            #pragma unroll
            for (int h = 0; h < 2; h++) {
                float by = __uint_as_float(pair[p][h] << 16);
                float plus = __uint_as_float(pair[p][h] & 0xFFFF0000u) - (MAGIC_VALUE + 8.f) * by;
                #pragma unroll
                for (int m = 0; m < TILES; m++) {
                    total[p][m][2 * h] += by * products[p][m][2 * h] + plus * sums[m][2 * h];
                    total[p][m][2 * h + 1] += by * products[p][m][2 * h + 1] + plus * sums[m][2 * h + 1];
                }
            }
        }
#endif
    }

    #pragma unroll
    for (int p = 0; p < PIECES; p++) {
        #pragma unroll
        for (int m = 0; m < TILES; m++) {
            #pragma unroll
            for (int c = 0; c < 4; c++) {
                int output = across * 16 * PIECES + p * 16 + g + 8 * (c / 2);
                part[along][m * 8 + 2 * t + c % 2][output] = total[p][m][c];
            }
        }
    }
    __syncthreads();
    for (int at = threadIdx.x; at < 8 * TILES * OUTPUTS; at += ACROSS * ALONG * 32) {
        int m = at / OUTPUTS, o = at % OUTPUTS;
        if (m >= rows) break;
        float v = 0.f;
        #pragma unroll
        for (int i = 0; i < ALONG; i++) v += part[i][m][o];
        n = blockIdx.x * OUTPUTS + o;
#if BITS == 8
        v *= ((const float*)scale)[n];
#endif
        v += number(bias[n]);
        if (gelu) v = 0.5f * v * (1.f + erff(v * 0.70710678118654752f));
        u64 where = (u64)m * n_out + n;
        if (wide) ((float*)out)[where] = v;
        else ((u16*)out)[where] = rounded(v);
    }
}

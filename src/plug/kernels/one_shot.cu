// One-shot collectives of a few rows over NVLink: every process writes its rows into the memory of
// all others, and each adds up (or puts side by side) what it received.
//
// A packet of 16 bytes carries 8 bytes of data and, after each 4 of them, the number of the call.
// 8 bytes arrive at once, so who sees the number sees the data: no other signal is needed. A block
// always has the same packets, counts its own calls, and writes to two places in turn: nobody can
// be more than one call ahead, since a call ends only when the others' packets of it have arrived.
//
// Set from outside: GATHER (1: put side by side; 0: add up), HALF (1: float16, 0: bfloat16), WORLD.
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

#if HALF
#define TYPE "f16"
#else
#define TYPE "bf16"
#endif

__device__ __forceinline__ float number(u32 v) {
    float r;
    asm("cvt.f32." TYPE " %0, %1;" : "=f"(r) : "h"((u16)v));
    return r;
}

__device__ __forceinline__ u32 rounded(float low, float high) {
    u32 r;
    asm("cvt.rn." TYPE "x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

__device__ __forceinline__ void send(uint4* to, uint2 v, u32 call) {
    asm volatile("st.volatile.global.v4.u32 [%0], {%1, %2, %3, %2};"
                 :: "l"(to), "r"(v.x), "r"(call), "r"(v.y) : "memory");
}

__device__ __forceinline__ uint2 receive(const uint4* from, u32 call) {
    uint4 v;
    do {
        asm volatile("ld.volatile.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    } while (v.y != call || v.w != call);
    return make_uint2(v.x, v.z);
}

// x, 8 bytes at a time, count of them; out: as many, or WORLD times as many: `row` of them from each
// process, then the next row. memory: where each process's packets lie, as seen from here, with
// places [2][WORLD][capacity]. calls: of each block.
extern "C" __global__ void __launch_bounds__(256) one_shot(
    const uint2* x, uint2* out, uint4* const* memory, u32* calls, int rank, int count, int row,
    int capacity)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
    u32 call = calls[blockIdx.x] + 1;
    int i = blockIdx.x * 256 + threadIdx.x;
    if (i < count) {
        uint2 own = x[i];
        u64 turn = (u64)(call & 1) * WORLD;
        #pragma unroll
        for (int p = 1; p < WORLD; p++) {
            int to = (rank + p) % WORLD;
            send(memory[to] + (turn + rank) * capacity + i, own, call);
        }
#if !GATHER
        float sum[4] = {};
#endif
        for (int r = 0; r < WORLD; r++) {  // in this order everywhere, so that all get the same bits
            uint2 v = r == rank ? own : receive(memory[rank] + (turn + r) * capacity + i, call);
#if GATHER
            out[((u64)(i / row) * WORLD + r) * row + i % row] = v;
#else
            sum[0] += number(v.x), sum[1] += number(v.x >> 16);
            sum[2] += number(v.y), sum[3] += number(v.y >> 16);
#endif
        }
#if !GATHER
        out[i] = make_uint2(rounded(sum[0], sum[1]), rounded(sum[2], sum[3]));
#endif
    }
    __syncthreads();
    if (threadIdx.x == 0) calls[blockIdx.x] = call;
}

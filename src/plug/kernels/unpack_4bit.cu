// Dequantise 4-bit tiles (see `tile_4bit` in tiles.py) to bfloat16, or to FP8 in units of a
// scale of each row. A thread takes 16 bytes: 32 neighbouring weights of one output.
// Set from outside: FP8 (1 or 0).
typedef unsigned int u32;
typedef unsigned short u16;
typedef unsigned long long u64;

__device__ __forceinline__ float quotient(float a, float b) {
    float r;
    asm("div.full.f32 %0, %1, %2;" : "=f"(r) : "f"(a), "f"(b));
    return r;
}

// Four bits as a float: 2^23 + q is exact.
__device__ __forceinline__ float nibble(u32 word, int at) {
    return __uint_as_float(((word >> at) & 15u) | 0x4B000000u) - 8388608.f;
}

__device__ __forceinline__ u32 pair(u32 word, int at, float scale, float center) {
    // Columns 0, 2, 4, 6, 1, 3, 5, 7 stand in bits 0, 4, 8, ...: neighbours are 16 bits apart.
    float low = fmaf(nibble(word, at), scale, center);
    float high = fmaf(nibble(word, at + 16), scale, center);
#if FP8
    u16 r;
    asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(r) : "f"(high), "f"(low));
#else
    u32 r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
#endif
    return r;
}

extern "C" __global__ void __launch_bounds__(256) unpack_4bit(
    const uint4* tiles, const u32* pairs, const float* row_scale, uint4* out, int groups, int count)
{
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
    int i = blockIdx.x * 256 + threadIdx.x;  // a tile has 64 times 16 bytes
    if (i < count) {
        int place = i / 4, t = i % 4;  // place: of one output in one tile
        int tile = place / 16;
        u64 row = (u64)(tile / groups) * 16 + place % 16;
        uint4 w = tiles[i];
        u32 both = pairs[place];
        float scale = __uint_as_float(both << 16);
        float center = __uint_as_float(both & 0xFFFF0000u) - 8.f * scale;
#if FP8
        float unit = row_scale[row];
        scale = quotient(scale, unit), center = quotient(center, unit);
#endif
#if __CUDA_ARCH__ >= 900
        asm volatile("griddepcontrol.wait;" ::: "memory");  // others may still read where we write
#endif
        u32 words[4] = {w.x, w.y, w.z, w.w};
        u64 column = (u64)(tile % groups) * 4 + t;  // of 32 weights each
#if FP8
        u32 v[2][4];
        #pragma unroll
        for (int k = 0; k < 8; k++) {
            u32 word = words[k / 2];
            int first = k % 2 * 8;
            v[k / 4][k % 4] = pair(word, first, scale, center) | pair(word, first + 4, scale, center) << 16;
        }
        // Neighbours exchange halves, so that both write 32 bytes that lie together at a time.
        bool odd = t % 2;
        uint4 mine[2];
        u32* to = (u32*)mine;
        #pragma unroll
        for (int k = 0; k < 4; k++) {
            u32 other = __shfl_xor_sync(0xFFFFFFFFu, odd ? v[0][k] : v[1][k], 1);
            to[k] = odd ? other : v[0][k];
            to[4 + k] = odd ? v[1][k] : other;
        }
        uint4* at = out + (row * groups * 4 + column - odd) * 2 + odd;
        at[0] = mine[0];
        at[2] = mine[1];
#else
        uint4* at = out + (row * groups * 4 + column) * 4;
        #pragma unroll
        for (int h = 0; h < 4; h++) {
            at[h] = make_uint4(pair(words[h], 0, scale, center), pair(words[h], 4, scale, center),
                               pair(words[h], 8, scale, center), pair(words[h], 12, scale, center));
        }
#endif
    }
}

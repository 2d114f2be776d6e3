// SPDX-License-Identifier: Apache-2.0
// u t of a compensator, for kernels that add it to a product that they already hold in registers.
#pragma once
#include "common.cuh"

// Record `record` of a row block, where a matrix has `records` of them a row block, of `size` bytes.
__device__ __forceinline__ const u8* locate(const u8* matrix, int row_block, int record, int records, u32 size) {
    return matrix + (u64)((row_block / 4 * records + record) * 4 + row_block % 4) * size;
}

// A unit of u, 16 rows by 64 columns, in registers; t comes in 16 bits: it is new for each row block, and too short to be worth
// making integers of. The zero of a factor is the middle code, which is taken off the codes, so it needs no sums.
template <int B> struct FactorUnit {
    u32 words[B], low, high;

    // Unit u of a record of U units.
    template <int U> __device__ __forceinline__ void load(const u8* record, int u, int lane) {
#pragma unroll
        for (int c = 0; c < B; ++c) {
            const int word = u * B + c;
            words[c] = *reinterpret_cast<const u32*>(record + word / U * 128 * U + lane * 4 * U + word % U * 4);
        }
        low = *reinterpret_cast<const u32*>(record + 128 * U * B + 4 * (U * (lane / 4) + u));
        high = *reinterpret_cast<const u32*>(record + 128 * U * B + 4 * (U * (lane / 4 + 8) + u));
    }
    // Codes less the middle one, as A operands of four steps of 16 columns.
    template <bool BF16> __device__ __forceinline__ void operands(u32 (&a)[16]) const {
        using H = Half<BF16>;
        unpack<B, BF16>(words, a);
#pragma unroll
        for (int pair = 0; pair < 8; ++pair)
            if (B < 8 || !BF16) {  // bytes come less 128 in bfloat16
                const int p = place<B, BF16>(pair);
                const u32 minus = (0x8000u | (H::exponent(p) + (1u << (B - 1 + p)))) * 0x10001u;
                a[2 * pair] = H::fma(a[2 * pair], H::ONE, minus);
                a[2 * pair + 1] = H::fma(a[2 * pair + 1], H::ONE, minus);
            }
    }
    // Scales of rows lane / 4 and lane / 4 + 8.
    __device__ __forceinline__ float scale(int r) const { return Half<false>::lo(r ? high : low); }
};

// c = 16 rows by 8 tokens: a's 64 columns times t's, of which a lane has columns 8 i + 2 (lane % 4) and the next of token
// lane / 4 in b[i].
template <bool BF16> __device__ __forceinline__ void multiply_unit(float (&c)[4], const u32 (&a)[16], const u32 (&b)[8]) {
    mma<BF16, false>(c, a, b[0], b[1]);
#pragma unroll
    for (int j = 1; j < 4; ++j) mma<BF16, true>(c, a + 4 * j, b[2 * j], b[2 * j + 1]);
}

// Until a counter of what is done of t has come so far.
__device__ __forceinline__ void await_count(const int* counter, int count, int lane) {
    if (lane == 0) {
        int found;
        do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
        while (found < count);
    }
    __syncwarp();
}

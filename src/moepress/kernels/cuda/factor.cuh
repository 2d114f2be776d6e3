// SPDX-License-Identifier: Apache-2.0
// u t of a compensator, for kernels that add it to a product that they already hold in registers.
#pragma once
#include "common.cuh"

// Record `record` of a row block, where a matrix has `records` of them a row block, of `size` bytes.
__device__ __forceinline__ const u8* locate(const u8* matrix, int row_block, int record, int records, u32 size) {
    return matrix + (u64)((row_block / 4 * records + record) * 4 + row_block % 4) * size;
}

// What of a unit of u can be other than zero: all; its first 32 columns; of gate's rows, 0 to 7, the first 32 and of up's the rest.
enum Shape { WHOLE, HALF, GATED };

// A unit of u, 16 rows by 64 columns, in registers; t comes in 16 bits: it is new for each row block, and too short to be worth
// making integers of. The zero of a factor is the middle code, which is taken off the codes, so it needs no sums.
template <int B> struct FactorUnit {
    u32 words[B], low, high;

    // Unit u of a record of U units.
    template <int U> __device__ __forceinline__ void load(const u8* record, int u, int lane) {
#pragma unroll
        for (int c = 0; c < B; ++c) {
            const int word = u * B + c;
            words[c] = __ldg(reinterpret_cast<const u32*>(record + word / U * 128 * U + lane * 4 * U + word % U * 4));
        }
        low = __ldg(reinterpret_cast<const u32*>(record + 128 * U * B + 4 * (U * (lane / 4) + u)));
        high = __ldg(reinterpret_cast<const u32*>(record + 128 * U * B + 4 * (U * (lane / 4 + 8) + u)));
    }
    // The same from shared memory.
    template <int U> __device__ __forceinline__ void load_shared_unit(u32 record, int u, int lane) {
        auto word = [&](u32& x, u32 at) { load_shared<1>(reinterpret_cast<u32(&)[1]>(x), record + at); };
#pragma unroll
        for (int c = 0; c < B; ++c) word(words[c], (u * B + c) / U * 128 * U + lane * 4 * U + (u * B + c) % U * 4);
        word(low, 128 * U * B + 4 * (U * (lane / 4) + u)), word(high, 128 * U * B + 4 * (U * (lane / 4 + 8) + u));
    }
    // Codes less the middle one, as A operands of four steps of 16 columns. Of those that are known to be zero the compiler
    // drops the work: 4 % of a dense layer of 4096x4096 at four tokens.
    template <bool BF16, Shape S = WHOLE> __device__ __forceinline__ void operands(u32 (&a)[16]) const {
        using H = Half<BF16>;
        unpack<B, BF16>(words, a);
#pragma unroll
        for (int i = 0; i < 16; ++i) {
            const int pair = i / 2, p = place<B, BF16>(pair);
            const u32 minus = (0x8000u | (H::exponent(p) + (1u << (B - 1 + p)))) * 0x10001u;
            if (B < 8 || !BF16) a[i] = H::fma(a[i], H::ONE, minus);  // bytes come less 128 in bfloat16
            if ((S == HALF && pair >= 4) || (S == GATED && pair / 4 != i % 2)) a[i] = 0;
        }
    }
    // The same times their scales.
    template <bool BF16> __device__ __forceinline__ void scaled(u32 (&a)[16]) const {
        using H = Half<BF16>;
        const u32 scales[2] = {H::pack(scale(0), scale(0)), H::pack(scale(1), scale(1))};
        operands<BF16>(a);
#pragma unroll
        for (int i = 0; i < 16; ++i) a[i] = H::fma(a[i], scales[i % 2], 0);
    }
    // c = 16 rows by 8 tokens: 64 columns times t's, of which a lane has columns 8 i + 2 (lane % 4) and the next of token
    // lane / 4 in b[i].
    template <bool BF16, Shape S> __device__ __forceinline__ void multiply(float (&c)[4], const u32 (&b)[8]) const {
        u32 a[16];
        operands<BF16, S>(a);
        mma<BF16, false>(c, a, b[0], b[1]);
#pragma unroll
        for (int j = 1; j < (S == HALF ? 2 : 4); ++j) mma<BF16, true>(c, a + 4 * j, b[2 * j], b[2 * j + 1]);
    }
    // GATED in half as many steps, for four tokens: token i's gate has column 2 i of B, up 2 i + 1, so that gate's results
    // are c[0] and up's c[3]. A lane has columns 8 i + 2 (lane % 4) of its half of t in b[i].
    template <bool BF16> __device__ __forceinline__ void multiply_gated(float (&c)[4], const u32 (&b)[4]) const {
        u32 a[16];
        operands<BF16, GATED>(a);
#pragma unroll
        for (int i = 0; i < 8; i += 2) a[i + 1] = a[8 + i + 1];
        mma<BF16, false>(c, a, b[0], b[1]);
        mma<BF16, true>(c, a + 4, b[2], b[3]);
    }
    // Scales of rows lane / 4 and lane / 4 + 8.
    __device__ __forceinline__ float scale(int r) const { return Half<false>::lo(r ? high : low); }
};

// A row of t has 32 columns or a multiple of 64; those that u does not have, beyond 8 or 16, are zeros.
__device__ __forceinline__ int t_columns(int columns) { return columns < UNIT / 2 ? UNIT / 2 : columns; }

// Where column `column` of a row of t lies: a lane's columns of each octet, as products take them, side by side.
__device__ __forceinline__ int t_place(int column, int columns) {
    const int bits = columns < UNIT ? 5 : 6;  // of a column's number in its unit; to divide took some 60 instructions
    const int unit = column >> bits << bits, octet = (column - unit) / 8;
    return unit + (column % 8 / 2 << (bits - 2)) + octet * 2 + column % 2;
}

// Column `column` of a row block of t, into a row. All 16 have a place. Zeros are stored as negative ones, because 0 is what is not
// there yet (ours): so whoever loads t early enough waits for nobody, where a counter took three trips to memory, each as long as
// the queue of weights before it.
template <bool BF16> __device__ __forceinline__ void put_t(u16* row, int column, int columns, float x) {
    constexpr u16 ZERO = 0x8000;
    const u16 value = round16<BF16>(x);
    auto put = [&](int column, u16 value) {
        asm volatile("st.relaxed.gpu.global.u16 [%0], %1;" ::"l"(row + t_place(column, columns)), "h"(value) : "memory");
    };
    put(column, value == 0 ? ZERO : value);
    if (columns <= ROWS) put(column + ROWS, ZERO);
}

// From where all multiprocessors see what others store meanwhile, each time anew.
__device__ __forceinline__ uint4 load_global(const uint4* from) {
    uint4 x;
    asm volatile("ld.relaxed.gpu.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "l"(from)
                 : "memory");
    return x;
}

// A lane's part of unit `unit` of a row of t. No more than one load can write a register: with one for each number of columns, and
// zeros where a token is none, the second waited for the first, 0.25 us of a tile's 4.
__device__ __forceinline__ void load_t(u32 (&b)[8], const u16* row, int unit, int columns, int lane) {
    const uint4* from = reinterpret_cast<const uint4*>(row + unit * UNIT + lane % 4 * (columns < UNIT ? 8 : 16));
    uint4 v[2] = {load_global(from), {~0u, ~0u, ~0u, ~0u}};  // not 0, which would not be there yet; only HALF may follow
    if (columns >= UNIT) v[1] = load_global(from + 1);
#pragma unroll
    for (int i = 0; i < 2; ++i) b[4 * i] = v[i].x, b[4 * i + 1] = v[i].y, b[4 * i + 2] = v[i].z, b[4 * i + 3] = v[i].w;
}

// The same of one half of a row of 64 columns.
__device__ __forceinline__ void load_half_t(u32 (&b)[4], const u16* row, int half, int lane) {
    const uint4 v = load_global(reinterpret_cast<const uint4*>(row + lane % 4 * 16) + half);
    b[0] = v.x, b[1] = v.y, b[2] = v.z, b[3] = v.w;
}

// Whether all of t had been stored when this was loaded, see `put_t`.
template <int N> __device__ __forceinline__ bool is_there(const u32 (&t)[N]) {
#if __CUDA_ARCH__ >= 900
    u32 least = t[0];
#pragma unroll
    for (int i = 1; i < N; ++i) asm("min.u16x2 %0, %0, %1;" : "+r"(least) : "r"(t[i]));
    return least & 0xffff && least >> 16;
#else
    u32 zeros = 0;  // the highest bit of a half of a word, where one is 0
#pragma unroll
    for (int i = 0; i < N; ++i) zeros |= t[i] - 0x10001u & ~t[i];
    return !(zeros & 0x80008000u);
#endif
}

__device__ __forceinline__ int load_acquire(const int* from) {
    int x;
    asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}

// Counts one more, after all that the warp has stored. (A fence and an addition took 0.1 us more.)
__device__ __forceinline__ void add_release(int* to) {
    asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(to) : "memory");
}

// Counts one more, after all that the warp has stored and before what it will read; how many there were. By one lane.
__device__ __forceinline__ int add_and_see(int* to) {
    int before;
    asm volatile("atom.acq_rel.gpu.global.add.s32 %0, [%1], 1;" : "=r"(before) : "l"(to) : "memory");
    return before;
}

// Until a counter of what is done of t has come so far.
__device__ __forceinline__ void await_count(const int* counter, int count, int lane) {
    if (lane == 0)
        while (load_acquire(counter) < count) {}
    __syncwarp();
}

// SPDX-License-Identifier: Apache-2.0
// The records of a warp of `gemv`: in which order, through which ring, and one of them times x.
#pragma once
#include "factor.cuh"
#include "gemv_active.cuh"

// How far a step goes: whole matrices, and the rest in row blocks (GATE_UP) or in records of a row block (DOWN). Known
// beforehand, because small matrices are many to a step: carrying over one by one took half of all instructions.
template <int WARPS, int MODE> struct Steps {
    int first_slot, first, slots, rest;

    __device__ Steps(const Arguments& p, int row_block, int stride, int warp) {
        const int from = MODE == GATE_UP ? row_block : warp, step = MODE == GATE_UP ? stride : WARPS;
        const int size = MODE == GATE_UP ? p.row_blocks : p.records;
        first_slot = from / size, first = from - first_slot * size;
        slots = step / size, rest = step - slots * size;
    }
};

// Walks a warp's records: columns warp, warp + WARPS, ... of every `stride`-th row block.
template <int WARPS, int MODE> struct Cursor {
    int slot, row_block, record;

    __device__ Cursor(const Steps<WARPS, MODE>& steps, int row_block, int warp)
        : slot(MODE == DENSE ? 0 : steps.first_slot), row_block(MODE == GATE_UP ? steps.first : row_block),
          record(MODE == DOWN ? steps.first : warp) {}
    // Whether that ends a row of records.
    __device__ bool next_record(const Arguments& p, const Steps<WARPS, MODE>& steps) {
        record += MODE == DOWN ? steps.rest : WARPS;
        if constexpr (MODE == DOWN) {
            slot += steps.slots;
            if (record >= p.records) record -= p.records, ++slot;
            return true;
        }
        return record >= p.records;
    }
    __device__ bool at_end_of_row(const Arguments& p, int count) const {
        return MODE == DOWN ? slot >= count : record >= p.records;
    }
    __device__ void next_row(const Arguments& p, const Steps<WARPS, MODE>& steps, int stride, int warp) {
        if constexpr (MODE == GATE_UP) {
            slot += steps.slots, row_block += steps.rest;
            if (row_block >= p.row_blocks) row_block -= p.row_blocks, ++slot;
        } else {
            row_block += stride;
        }
        if constexpr (MODE == DOWN) slot = steps.first_slot;
        record = MODE == DOWN ? steps.first : warp;
    }
    __device__ bool done(const Arguments& p, int count) const {
        return MODE == GATE_UP ? slot >= count : row_block >= p.row_blocks;
    }
};

// A warp's ring of records in shared memory.
struct Ring {
    u32 slots, bars, bytes;
    int stages, issue, take;
    u32 phase;
    bool asks;  // for copies: this lane

    __device__ Ring(u32 slots, u32 bars, u32 bytes, int stages)
        : slots(slots), bars(bars), bytes(bytes), stages(stages), issue(0), take(0), phase(0), asks(elect()) {}
    __device__ u32 head() const { return slots + take * bytes; }
    __device__ void release() {
        __syncwarp();
        if (++take == stages) take = 0, phase ^= 1;
    }
#if __CUDA_ARCH__ >= 900
    __device__ void fetch(const u8* from, u32 size, u64 policy, int lane) {
        if (asks) {
            mbarrier_expect(bars + 8 * issue, size);
            bulk_copy(slots + issue * bytes, from, size, bars + 8 * issue, policy);
        }
        if (++issue == stages) issue = 0;
    }
    __device__ void nothing() {}
    __device__ void wait() const { mbarrier_wait(bars + 8 * take, phase); }
#else
    __device__ void fetch(const u8* from, u32 size, u64, int lane) {
        for (u32 at = 16 * lane; at < size; at += 16 * WARP) copy16(slots + issue * bytes + at, from + at, true);
        copy_commit();
        if (++issue == stages) issue = 0;
    }
    __device__ void nothing() { copy_commit(); }  // keeps the count of groups in flight
    __device__ void wait() const {  // copies are counted, not signalled: all but the latest stages - 1
        if (stages == 2) copy_wait<1>();
        else if (stages == 3) copy_wait<2>();
        else copy_wait<3>();
        __syncwarp();
    }
#endif
};

// y += one record times x, whose segments are SEGMENTS to a unit. Columns of B are high and low bytes of the tokens by turns,
// so that a lane has the results of two rows and of token lane % 4. `x` and `sums` are its addresses for the record's first
// unit: of the bytes of its column, and of the sums of its token.
template <int B, int U, int G, int SEGMENTS>
__device__ __forceinline__ void multiply(float (&y)[2], u32 record, u32 x, u32 sums, int lane) {
    constexpr int M = Record<U, G>::GROUPS;
    u32 words[U * B], low[M], high[M];
#pragma unroll
    for (int c = 0; c < B; ++c)
        load_shared<U>(reinterpret_cast<u32(&)[U]>(words[c * U]), record + c * 128 * U + lane * 4 * U);
    const u32 meta = record + 128 * U * B + 4 * M * (lane / 4);
    load_shared<M>(low, meta);
    load_shared<M>(high, meta + 32 * M);
#pragma unroll
    for (int u = 0; u < U; ++u) {
        u32 a[8], b[4];
        load_shared<4>(b, x + 128 * u);
        unpack_bytes<B>(words + u * B, a);
#pragma unroll
        for (int s = 0; s < SEGMENTS; ++s) {
            int c[4];
#pragma unroll
            for (int j = s * 2 / SEGMENTS; j < (s + 1) * 2 / SEGMENTS; ++j)
                if (j == s * 2 / SEGMENTS) mma_bytes<false>(c, a + 4 * j, b[2 * j], b[2 * j + 1]);
                else mma_bytes<true>(c, a + 4 * j, b[2 * j], b[2 * j + 1]);
            const int m = M == 1 ? 0 : (u * SEGMENTS + s) * M / (U * SEGMENTS);
            float scale, sum;
            asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(scale), "=f"(sum) : "r"(sums + (u * SEGMENTS + s) * 8));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const u32 meta = r ? high[m] : low[m];
                const float products = float(c[2 * r] * 256 + c[2 * r + 1]);
                y[r] = fmaf(Half<false>::lo(meta) * scale, fmaf(-Half<false>::hi(meta), sum, products), y[r]);
            }
        }
    }
}

template <int B, int U, int G>
__device__ __forceinline__ void multiply_any(float (&y)[2], u32 record, u32 x, u32 sums, int bits, int lane) {
    constexpr int SEGMENTS = Record<U, G>::SEGMENTS;
    if constexpr (B) {
        multiply<B, U, G, SEGMENTS>(y, record, x, sums, lane);
    } else {
        if (bits == 1) multiply<1, U, G, SEGMENTS>(y, record, x, sums, lane);
        else if (bits == 2) multiply<2, U, G, SEGMENTS>(y, record, x, sums, lane);
        else if (bits == 3) multiply<3, U, G, SEGMENTS>(y, record, x, sums, lane);
        else if (bits == 4) multiply<4, U, G, SEGMENTS>(y, record, x, sums, lane);
        else multiply<8, U, G, SEGMENTS>(y, record, x, sums, lane);
    }
}

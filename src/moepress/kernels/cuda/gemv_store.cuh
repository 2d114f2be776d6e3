// SPDX-License-Identifier: Apache-2.0
// What becomes of the sums of a row block of `gemv`: results, bytes for down, or t.
#pragma once
#include "factor.cuh"
#include "gemv_active.cuh"

// The sums of a row block that u t is added to later.
template <int NT> struct Pending {
    float sums[NT * ROWS];
    int slot, row_block;
};

// A warp's sums of one row block into its part of the buffer.
template <int NT> __device__ __forceinline__ void put_part(float* part, const float (&y)[2], int lane) {
    const int column = NT == 1 ? 0 : lane % 4;
    if (NT == 1 && lane % 4) return;
    part[column * ROWS + lane / 4] = y[0], part[column * ROWS + lane / 4 + 8] = y[1];
}

// The warps' sums of row `row` of a row block, added in their order. A warp has them for COLUMNS columns or tokens.
template <int COLUMNS, int WARPS> __device__ __forceinline__ float add_parts(const float* parts, int column, int row) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += parts[(w * COLUMNS + column) * ROWS + row];
    return sum;
}

// Stores the results of one row block; one of STORING warps, the `part`-th.
template <bool BF16, int NT, int COLUMNS, int MODE, int WARPS, int STORING>
__device__ void finish_row(const Arguments& p, const Active<NT>& active, const float* parts, int slot, int row_block, int part,
                           int lane) {
    for (int i = part * WARP + lane; i < ROWS * COLUMNS; i += STORING * WARP) {
        const int row = i % ROWS, column = i / ROWS;
        float sum = add_parts<COLUMNS, WARPS>(parts, column, row);
        if constexpr (MODE == GATE_UP) {  // rows 0..7 are gate, 8..15 up
            const float up = __shfl_down_sync(NT == 1 ? 0xffffu : ~0u, sum, 8, 16);
            const int n = row_block * 8 + row, pair = active.pair[slot][column];
            if (row < 8 && pair >= 0 && n < p.n) p.y[pair * p.n + n] = round16<BF16>(silu(sum) * up);
        } else {
            const int n = row_block * ROWS + row;
            if (n < p.n && column < p.tokens) {
                if (MODE == DENSE && p.bias) sum += widen<BF16>(p.bias[n]);
                p.y[column * p.n + n] = round16<BF16>(sum);
            }
        }
    }
}

// 64 results of gate and up for the tokens of an expert, and how many of the eight row blocks are there.
template <int NT> struct alignas(16) Segment {
    u16 h[NT][UNIT];
    int stored, unused[3];
};

// The same of gate and up where down takes bytes: eight groups have a segment's results between them, and the last of them
// makes the bytes.
template <int G, bool BF16, int NT, int WARPS>
__device__ void pass_row(const Arguments& p, const Active<NT>& active, const float* parts, Segment<NT>& segment, int slot,
                         int row_block, int lane) {
    for (int i = lane; i < ROWS * NT; i += WARP) {
        const int row = i % ROWS, column = i / ROWS;
        const float sum = add_parts<NT, WARPS>(parts, column, row), up = __shfl_down_sync(~0u, sum, 8, 16);
        const bool real = row_block * 8 + row < p.n;
        if (row < 8) segment.h[column][row_block % 8 * 8 + row] = real ? round16<BF16>(silu(sum) * up) : u16(0);
    }
    __syncwarp();
    int before = 0;
    if (lane == 0) __threadfence_block(), before = atomicAdd(&segment.stored, 1);
    if (__shfl_sync(~0u, before, 0) < 7) return;
    __threadfence_block();
    const int column = lane / 8, octet = lane % 8, pair = active.pair[slot][column], unit = row_block / 8, units = p.row_blocks / 8;
    const uint4 own = *reinterpret_cast<const uint4*>(segment.h[column] + 8 * octet);
    const u32 h[4] = {own.x, own.y, own.z, own.w};
    Bytes bytes;
    bytes.make<G, BF16>(h, octet);
    if (pair < 0) return;
    u32* words = p.passed.bytes + ((u64)pair * units + unit) * UNIT_WORDS + Bytes::at(octet, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) words[4 * i] = bytes.high[i], words[4 * i + 16] = bytes.low[i];
    constexpr int SEGMENTS = Record<1, G>::SEGMENTS;
    const int at = (unit * SEGMENTS + octet / (8 / SEGMENTS)) * SUM_FLOATS;
    if (Bytes::has_sums<G>(octet))
        *reinterpret_cast<float2*>(p.passed.sums + (u64)pair * row_sums<NT>(units * SEGMENTS) + at) = make_float2(bytes.scale, bytes.sum);
}

// The same for a row block of t; one warp.
template <bool BF16, int NT, int COLUMNS, int WARPS>
__device__ void finish_t(const Compensators& f, const Active<NT>& active, const float* parts, int slot, int row_block, int lane) {
    // (else the compiler keeps what follows from a lane in registers all along, and has none left)
    for (int i = from_here(lane); i < ROWS * NT; i += WARP) {
        const int row = i % ROWS, token = i / ROWS, pair = active.pair[slot][token];
        const float sum = add_parts<COLUMNS, WARPS>(parts, token, row);
        if (pair >= 0) put_t<BF16>(f.t + pair * t_columns(f.columns), row_block * ROWS + row, f.columns, sum);
    }
}

// SPDX-License-Identifier: Apache-2.0
// The rows of x that `gemv` multiplies, as bytes in shared memory.
#pragma once
#include "gemv_active.cuh"

// Rows of x as B operands of bytes in unit order, and the scale and sum of their segments.
struct Staged {
    u32* x;
    float* sums;
    int rows, words, row_sums, units;  // words and sums from row to row
};

// Floats of a row's sums; with padding, so that tokens' sums meet no bank twice.
template <int NT> __device__ __forceinline__ int row_sums(int segments) { return segments * SUM_FLOATS + (NT > 1 ? 2 : 0); }

// Octet `o` of a row. All lanes.
template <int G, bool BF16>
__device__ __forceinline__ void stage_octet(const Staged& s, const u32 (&octet)[4], int row, int o, bool inside) {
    Bytes bytes;
    bytes.make<G, BF16>(octet, o % 8);
    if (!inside) return;
    u32* to = s.x + row * s.words + o / 8 * UNIT_WORDS;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        to[Bytes::at(o % 8, i)] = bytes.high[i];
        to[Bytes::at(o % 8, i) + 16] = bytes.low[i];
    }
    if (Bytes::has_sums<G>(o % 8))
        *reinterpret_cast<float2*>(s.sums + row * s.row_sums + o / (G == 32 ? 4 : 8) * SUM_FLOATS) =
            make_float2(bytes.scale, bytes.sum);
}

// Whether a thread's octets are those `blockDim.x` apart in memory: of one row, or of rows without padding between them.
template <int NT> __device__ __forceinline__ bool has_early(int k) { return NT == 1 || k % UNIT == 0; }

// All threads take part; a thread asks for several octets of columns before it uses the first, because each takes most of
// a microsecond to come. `row_of(i)` is where row i of k values begins, null for zeros; `early` are the thread's first EARLY
// octets where `has_early`, asked for together with the ids. (Rows by bulk copies, permuted and summed afterwards, took 1 us
// longer; a division for each octet, and arithmetic on octets past the end, 3 us with eight tokens.)
template <int G, bool BF16, int NT, int EARLY, int N, typename R>
__device__ void stage_rows(const Staged& s, R row_of, const u32 (&early)[N][4], int k) {
    constexpr int BATCH = NT == 1 ? 2 : 4;
    const int octets = 8 * s.units, rows_ahead = blockDim.x / octets, octets_ahead = blockDim.x - rows_ahead * octets;
    int row = threadIdx.x / octets, o = threadIdx.x - row * octets;
    bool first = true;
    // the warp's first lane is the last to pass the end
    while (__shfl_sync(~0u, row, 0) < s.rows) {
        u32 v[BATCH][4];
        int rows[BATCH], os[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const bool known = i < EARLY && first && has_early<NT>(k);
            rows[i] = row, os[i] = o;
#pragma unroll
            for (int t = 0; t < 4; ++t) v[i][t] = known ? early[min(i, N - 1)][t] : 0;
            if (!known && row < s.rows)
                if (const u16* from = row_of(row)) load_octet<BF16>(v[i], from, 8 * o, k);
            row += rows_ahead, o += octets_ahead;
            if (o >= octets) o -= octets, ++row;
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (i == 0 || __shfl_sync(~0u, rows[i], 0) < s.rows) stage_octet<G, BF16>(s, v[i], rows[i], os[i], rows[i] < s.rows);
        first = false;
    }
}

// Rows that are bytes already. All threads.
__device__ __forceinline__ void copy_rows(const Staged& s, const Passed& from) {
    const int bytes = s.rows * s.words * 4, sums = s.rows * s.row_sums * 4;
    const u32 x_at = shared_address(s.x), sums_at = shared_address(s.sums);
    for (int at = 16 * threadIdx.x; at < bytes; at += 16 * blockDim.x)
        copy16(x_at + at, reinterpret_cast<const u8*>(from.bytes) + at, true);
    for (int at = 16 * threadIdx.x; at < sums; at += 16 * blockDim.x)
        copy16(sums_at + at, reinterpret_cast<const u8*>(from.sums) + at, true);
    copy_commit();
    copy_wait<0>();
}

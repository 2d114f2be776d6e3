// SPDX-License-Identifier: Apache-2.0
// How a tile of `grouped` adds up what warpgroups and blocks have of it, and leaves.
#pragma once
#include "cluster.cuh"
#include "grouped_tiles.cuh"

// Where a tile's columns go and what they are multiplied with; DOWN only.
struct Columns {
    int row;
    float weight;
};

// One warp's 16 rows of a tile. Lanes hold pairs of tokens and rows 8 apart; through a corner of shared memory, a row's
// eight neighbours come together and leave as 16 bytes. (Two bytes at a time took half of the time of short K.) Where a
// next product wants bytes, `octets` gets each token's eight, at a stride of eight of them; where it wants sums, `sums` theirs.
template <bool BF16, int NT, int MODE>
__device__ __forceinline__ void store_rows(const Arguments& p, const Work& work, const Columns* columns, u32 corner, uint4* octets,
                                           float* sums, int row_block, float (&acc)[NT / 2], int lane) {
    using H = Half<BF16>;
    constexpr int CHUNK = NT < 32 ? NT : NT % 32 == 0 ? 32 : NT % 16 == 0 ? 16 : 8;
    constexpr int HALVES = MODE == GATE_UP ? 1 : 2;  // 16-byte pieces of a token
    const int n = row_block * 8 * HALVES;
    float bias[2] = {0.f, 0.f};
    if (MODE == DENSE && p.bias)
#pragma unroll
        for (int r = 0; r < 2; ++r)
            if (n + lane / 4 + 8 * r < p.n) bias[r] = widen<BF16>(p.bias[n + lane / 4 + 8 * r]);
#pragma unroll
    for (int first = 0; first < NT; first += CHUNK) {
#pragma unroll
        for (int i = first / 8; i < (first + CHUNK) / 8; ++i) {
            float* c = acc + 4 * i;
            const u32 to = corner + ((8 * i - first + lane % 8) * HALVES + (HALVES == 2 ? lane / 8 % 2 : 0)) * 16;
            if constexpr (MODE == GATE_UP) {
                const u32 h = H::pack(silu(c[0]) * c[2], silu(c[1]) * c[3]);
                asm volatile("stmatrix.sync.aligned.m8n8.x1.trans.shared.b16 [%0], {%1};" ::"r"(to), "r"(h) : "memory");
            } else {
                float w[2] = {1.f, 1.f};
                if constexpr (MODE == DOWN)
#pragma unroll
                    for (int e = 0; e < 2; ++e) w[e] = columns[8 * i + 2 * (lane % 4) + e].weight;
                const u32 low = H::pack(c[0] * w[0] + bias[0], c[1] * w[1] + bias[0]);
                const u32 high = H::pack(c[2] * w[0] + bias[1], c[3] * w[1] + bias[1]);
                asm volatile("stmatrix.sync.aligned.m8n8.x2.trans.shared.b16 [%0], {%1, %2};" ::"r"(to), "r"(low), "r"(high)
                             : "memory");
            }
        }
        __syncwarp();
#pragma unroll
        for (int i = lane; i < CHUNK * HALVES; i += WARP) {
            const int column = first + i / HALVES, at = n + 8 * (i % HALVES);
            u32 x[4];
            load_shared<4>(x, corner + 16 * i);
            const bool inside = column < work.tokens && at < p.n;
            if (MODE == GATE_UP && octets) octets[8 * column] = inside ? make_uint4(x[0], x[1], x[2], x[3]) : make_uint4(0, 0, 0, 0);
            if (MODE == GATE_UP && sums) {
                float sum = 0.f;
#pragma unroll
                for (int j = 0; j < 4; ++j) sum += H::lo(x[j]) + H::hi(x[j]);
                sums[column] = inside ? sum : 0.f;
            }
            if (!inside || (MODE == GATE_UP && !p.y)) continue;
            u16* to = p.y + (u64)(MODE == DOWN ? columns[column].row : work.token + column) * p.ld + at;
            if (MODE == PLAIN) to += work.split * p.n;
            *reinterpret_cast<uint4*>(to) = make_uint4(x[0], x[1], x[2], x[3]);  // beyond n: padding up to ld
        }
        __syncwarp();
    }
}

// Bytes of the tile's results from their octets, [unit][token][octet]. Whole warps; a thread has an octet.
template <int G, bool BF16, int NT, int UNITS>
__device__ __forceinline__ void store_bytes(const Arguments& p, const Work& work, const uint4* octets, int thread) {
    const Next& next = p.next;
    const int pair = thread % 8, token = thread / 8 % NT, unit = work.row_block / 8 + thread / 8 / NT;
    const u32 octet[4] = {octets[thread].x, octets[thread].y, octets[thread].z, octets[thread].w};
    Bytes bytes;
    bytes.make<G, BF16>(octet, pair);
    if (8 * unit >= p.row_blocks || token >= work.tokens) return;
    const int row = work.token + token, record = unit / next.record_units;
    u32* to = next.bytes + ((u64)row * next.units + unit) * UNIT_WORDS + Bytes::at(pair, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) to[4 * i] = bytes.high[i], to[4 * i + 16] = bytes.low[i];
    if (!Bytes::has_sums<G>(pair)) return;
    const int segment = (unit - record * next.record_units) * next.segments + pair / (G == 32 ? 4 : 8);
    float* sums = next.sums + ((u64)record * p.tokens * p.slots + row) * next.floats + segment * SUM_FLOATS;
    sums[0] = bytes.scale, sums[1] = bytes.sum;
}

// Sums of the tile's results over units, from those of octets, [unit][octet][token]. Whole warps, with no branch: after one
// the compiler took the stage for different from lane to lane.
template <int NT, int UNITS>
__device__ __forceinline__ void store_sums(const Arguments& p, const Work& work, const float* octets, int thread) {
    const Next& next = p.next;
    const int token = thread % NT, unit = work.row_block / 8 + thread / NT;
    float sum[8];
#pragma unroll
    for (int octet = 0; octet < 8; ++octet) sum[octet] = octets[(min(thread / NT, UNITS - 1) * 8 + octet) * NT + token];
#pragma unroll
    for (int step = 1; step < 8; step *= 2)  // in the order of `make_sums`
#pragma unroll
        for (int octet = 0; octet < 8; octet += 2 * step) sum[octet] += sum[octet + step];
    if (thread < UNITS * NT && 8 * unit < p.row_blocks && token < work.tokens)
        next.sums[(u64)(work.token + token) * next.floats + unit] = sum[0];
}

// Adds up what the KW warpgroups of the same rows have, in their order; the first of them gets it.
template <int NT, int MI, int WGS, int KW, int THREADS>
__device__ __forceinline__ void add_columns(float (&acc)[MI][NT / 2], float* sums, int wg, int kw, int thread) {
    constexpr int PART = WGS * MI * 64 * NT;
    if (kw > 0)
#pragma unroll
        for (int mi = 0; mi < MI; ++mi)
#pragma unroll
            for (int i = 0; i < NT / 2; ++i)
                sums[(kw - 1) * PART + ((wg * MI + mi) * (NT / 2) + i) * 128 + thread % 128] = acc[mi][i];
    named_barrier(1, THREADS);
    if (kw == 0)
#pragma unroll
        for (int mi = 0; mi < MI; ++mi)
#pragma unroll
            for (int i = 0; i < NT / 2; ++i)
#pragma unroll
                for (int other = 0; other < KW - 1; ++other)
                    acc[mi][i] += sums[other * PART + ((wg * MI + mi) * (NT / 2) + i) * 128 + thread % 128];
    named_barrier(1, THREADS);
}

// Adds up what the blocks of a cluster have of the same tile, in their order, and stores it: each block every so many octets of
// tokens, from all blocks' shared memory. There sums take the place of the ring, which nobody needs any more: a block has one tile.
template <bool BF16, int N, int MI, int WGS>
__device__ __forceinline__ void store_sum(const Arguments& p, const Work& work, const float (&acc)[MI][N / 2], u32 sums, u32 corner,
                                          int wg, int thread) {
    const int lane = thread % WARP;
    auto at = [&](int mi, int octet) { return sums + (((wg * MI + mi) * (N / 8) + octet) * 128 + thread % 128) * 16; };
    named_barrier(2, WGS * 128);  // nobody reads the ring
#pragma unroll
    for (int mi = 0; mi < MI; ++mi)
#pragma unroll
        for (int octet = 0; octet < N / 8; ++octet) {
            store_shared(at(mi, octet), reinterpret_cast<const float(&)[4]>(acc[mi][4 * octet]));
        }
    await_cluster<false>();
    for (int octet = work.split; 8 * octet < work.tokens; octet += p.splits) {
        float parts[MI][MAX_SPLITS][4] = {};
#pragma unroll
        for (int mi = 0; mi < MI; ++mi)
#pragma unroll
            for (int split = 0; split < MAX_SPLITS; ++split)
                if (split < p.splits) load_from(parts[mi][split], at(mi, octet), split);
        Work of = work;
        of.token += 8 * octet, of.tokens -= 8 * octet;
#pragma unroll
        for (int mi = 0; mi < MI; ++mi) {
            float y[4] = {};
#pragma unroll
            for (int split = 0; split < MAX_SPLITS; ++split)
#pragma unroll
                for (int i = 0; i < 4; ++i) y[i] += parts[mi][split][i];
            const int row_block = work.row_block + (wg * MI + mi) * 4 + thread / WARP % 4;
            store_rows<BF16, 8, DENSE>(p, of, nullptr, corner, nullptr, nullptr, row_block, y, lane);
        }
    }
    await_cluster<true>();  // others have read what is here
}

// SPDX-License-Identifier: Apache-2.0
// u t of compensators, and t itself, for a tile of `grouped`.
#pragma once
#include "factor.cuh"
#include "grouped_tiles.cuh"

// Unit `i` of u for a row block.
template <int FB, int FU>
__device__ __forceinline__ void load_u(FactorUnit<FB>& unit, const Compensators& f, const u8* u, int i, int row_block, int lane) {
    unit.template load<FU>(locate(u, row_block, i / FU, f.u_records, Record<FU, UNIT>::bytes(FB)), i % FU, lane);
}

// u t from 24 tokens a tile on: t's units are stages after those of x, u is in registers, the first unit since before W's products.
// A row tile's operand is made while the products before it run: waiting for each was 1.3 us a tile of Qwen3-30B-A3B.
template <int FB, int FU, bool BF16, int MI> struct Added {
    FactorUnit<FB> unit[MI];
    const Compensators& f;
    const u8* u;  // null: none
    int row_block, row_blocks;

    __device__ __forceinline__ Added(const Compensators& f, const u8* u, int row_block, int row_blocks)
        : f(f), u(u), row_block(row_block), row_blocks(row_blocks) {}
    // A last tile may have more row blocks than the matrix, in fours: these take the first ones' place.
    __device__ __forceinline__ int inside(int block) const { return block < row_blocks ? block : block % 4; }
    __device__ __forceinline__ int units() const { return u ? (f.columns + UNIT - 1) / UNIT : 0; }
    __device__ __forceinline__ void load(int i, int lane) {
#pragma unroll
        for (int mi = 0; mi < MI; ++mi) load_u<FB, FU>(unit[mi], f, u, i, inside(row_block + 4 * mi), lane);
    }
    // The first unit into L1, where registers have no room for it.
    __device__ __forceinline__ void prefetch(int lane) {
        const u8* record = locate(u, inside(row_block), 0, f.u_records, Record<FU, UNIT>::bytes(FB));
        if (128 * lane < Record<FU, UNIT>::bytes(FB)) asm volatile("prefetch.global.L1 [%0];" ::"l"(record + 128 * lane));
    }
    __device__ __forceinline__ void operands(u32 (&a)[16], int mi) const {
        unit[mi].template scaled<BF16>(a);
    }
};

// u t for a row block and a tile of 8 tokens. What a first unit takes is asked for before W's products: one trip to memory a
// tile was 5 % of Mixtral's time at 8 tokens. Where to find more is not kept, for want of registers.
template <int FB, int FU, bool BF16> struct Compensator {
    FactorUnit<FB> unit;
    u32 t[8];

    __device__ __forceinline__ void load_unit(const Compensators& f, const Work& work, int row_block, int i, int lane) {
        load_u<FB, FU>(unit, f, work.u, i, row_block, lane);
    }
    __device__ __forceinline__ void load_row(const Compensators& f, const Work& work, int i, int lane) {
        const int token = work.token + min(lane / 4, work.tokens - 1);  // any for columns without a token
        load_t(t, f.t + (u64)token * t_columns(f.columns), i, f.columns, lane);
    }
    // y += u t. The first unit is there, and t's asked for.
    __device__ __forceinline__ void add(float (&y)[4], const Compensators& f, const Work& work, int row_block, int lane) {
        for (int i = 0; i < (f.columns + UNIT - 1) / UNIT; ++i) {
            float c[4];
            if (i > 0) load_unit(f, work, row_block, i, lane), load_row(f, work, i, lane);
            while (!__all_sync(~0u, is_there(t))) load_row(f, work, i, lane);
            if (f.columns <= UNIT / 2) unit.template multiply<BF16, HALF>(c, t);
            else unit.template multiply<BF16, WHOLE>(c, t);
#pragma unroll
            for (int e = 0; e < 4; ++e) y[e] = fmaf(unit.scale(e / 2), c[e], y[e]);
        }
    }
};

// A tile of v where tiles have 24 tokens, or a part of its columns: 64 rows in the four warps of each warpgroup, which has one unit of
// a stage. They add up in the last stage's place, where each warpgroup gets 8 tokens (the last none). Of several parts whoever comes
// last adds them up, in their order. With the warps' own products, which are few, so that wgmma has one loop only.
template <typename C, int FB, int U, bool BF16, int NT, int WGS>
__device__ __forceinline__ void multiply_v(const Arguments& p, const Work& work, u32 stages_at, u32 stage_bytes, u32 bars, int stage,
                                           u32 phase, int records, int wg, int warp, int lane) {
    static_assert(WGS == 4 && NT <= 8 * WGS, "a unit and an octet for each warpgroup");
    constexpr int OCTETS = NT / 8, WARPS = C::CONSUMERS / WARP;
    const Compensators& f = p.add;
    float acc[OCTETS][4] = {};
    u32 at;
    for (int record = 0;;) {
        mbarrier_wait(bars + 16 * stage, phase);
        at = stages_at + stage * stage_bytes;
        if (record + wg / U < records) {
            FactorUnit<FB> unit;
            unit.template load_shared_unit<U>(at + C::X_BYTES + (wg / U * 4 + warp) * Record<U, UNIT>::bytes(FB), wg % U, lane);
            u32 a[16];
            unit.template scaled<BF16>(a);
            const u32 x = at + wg * NT * 128 + lane % 8 * 128;
#pragma unroll
            for (int o = 0; o < OCTETS; ++o)  // columns without a token may be anything
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    u32 b[4];  // of 32 columns
                    load_matrices(b, x + o * 1024 + ((4 * half + lane / 8) ^ lane % 8) * 16);
                    mma<BF16, true>(acc[o], a + 8 * half, b[0], b[1]), mma<BF16, true>(acc[o], a + 8 * half + 4, b[2], b[3]);
                }
        }
        record += C::STEP;
        if (record >= records) break;
        __syncwarp();
        if (lane == 0) mbarrier_arrive(bars + 16 * stage + 8);
        if (++stage == p.stages) stage = 0, phase ^= 1;
    }
    auto place = [&](int octet, int wg) { return at + (((octet * WGS + wg) * 4 + warp) * WARP + lane) * 16; };
    named_barrier(1, C::CONSUMERS);  // nobody reads the stage
#pragma unroll
    for (int o = 0; o < OCTETS; ++o) store_shared(place(o, wg), acc[o]);
    named_barrier(1, C::CONSUMERS);
    float y[4] = {};
#pragma unroll
    for (int other = 0; other < WGS; ++other) {
        float x[4] = {};
        if (wg < OCTETS) load_shared<4>(reinterpret_cast<u32(&)[4]>(x), place(wg, other));
#pragma unroll
        for (int e = 0; e < 4; ++e) y[e] += x[e];
    }
    copies_follow();
    __syncwarp();
    if (lane == 0) mbarrier_arrive(bars + 16 * stage + 8);
    if (f.v_splits > 1) {
        // tiles of one expert begin NT tokens apart, so these numbers differ
        const int tile = (work.expert + work.token / NT) * (f.v_row_blocks / 4) + work.row_block / 4, own = wg * 4 + warp;
        float4* const parts = reinterpret_cast<float4*>(f.parts) + ((u64)tile * f.v_splits * WARPS + own) * WARP + lane;
        parts[(work.split - 1) * WARPS * WARP] = make_float4(y[0], y[1], y[2], y[3]);
        __syncwarp();
        const int before = __shfl_sync(~0u, lane == 0 ? add_and_see(f.arrived + tile * WARPS + own) : 0, 0);
        if (before != f.v_splits - 1) return;
        __syncwarp();  // what lane 0 has seen of others is there for all
#pragma unroll
        for (int e = 0; e < 4; ++e) y[e] = 0.f;
        for (int split = 0; split < f.v_splits; ++split) {
            const float4 x = __ldcg(parts + split * WARPS * WARP);
            y[0] += x.x, y[1] += x.y, y[2] += x.z, y[3] += x.w;
        }
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int column = (work.row_block + warp) * ROWS + lane / 4 + e / 2 * 8, token = wg * 8 + lane % 4 * 2 + e % 2;
        if (token < work.tokens) f.t[(u64)(work.token + token) * f.columns + column] = round16<BF16>(y[e]);
    }
    copies_follow();
    __syncwarp();
    if (lane == 0) add_release(f.done);
}

// A warp's 16 rows of t for a tile of 8 tokens.
template <bool BF16>
__device__ __forceinline__ void store_t(const Compensators& f, const Work& work, int row_block, const float (&acc)[4], int lane) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int column = row_block * ROWS + lane / 4 + e / 2 * 8, token = lane % 4 * 2 + e % 2;
        if (token < work.tokens && row_block < f.v_row_blocks)
            put_t<BF16>(f.t + (u64)(work.token + token) * t_columns(f.columns), column, f.columns, acc[e]);
    }
}

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

// u t of wide tiles: t's units are stages after those of x, u is in registers, the first unit since before W's products.
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
        using H = Half<BF16>;
        u32 scales[2];
        unit[mi].template operands<BF16>(a);
#pragma unroll
        for (int r = 0; r < 2; ++r) scales[r] = H::pack(unit[mi].scale(r), unit[mi].scale(r));
#pragma unroll
        for (int j = 0; j < 16; ++j) a[j] = H::fma(a[j], scales[j % 2], 0);
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
        load_t<false>(t, f.t + (u64)token * t_columns(f.columns), i, f.columns, lane);
    }
    // y += u t. The first unit and t's are there.
    __device__ __forceinline__ void add(float (&y)[4], const Compensators& f, const Work& work, int row_block, int lane) {
        for (int i = 0; i < (f.columns + UNIT - 1) / UNIT; ++i) {
            float c[4];
            if (i > 0) load_unit(f, work, row_block, i, lane), load_row(f, work, i, lane);
            if (f.columns <= UNIT / 2) unit.template multiply<BF16, HALF>(c, t);
            else unit.template multiply<BF16, WHOLE>(c, t);
#pragma unroll
            for (int e = 0; e < 4; ++e) y[e] = fmaf(unit.scale(e / 2), c[e], y[e]);
        }
    }
};

// A warp's 16 rows of t for a tile of 8 tokens; then says so.
template <bool BF16>
__device__ __forceinline__ void store_t(const Compensators& f, const Work& work, int row_block, const float (&acc)[4], int lane) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
        const int column = row_block * ROWS + lane / 4 + e / 2 * 8, token = lane % 4 * 2 + e % 2;
        if (token < work.tokens && row_block < f.v_row_blocks)
            put_t<BF16>(f.t + (u64)(work.token + token) * t_columns(f.columns), column, f.columns, acc[e]);
    }
    __syncwarp();
    if (lane == 0 && row_block < f.v_row_blocks) add_release(f.done);
}

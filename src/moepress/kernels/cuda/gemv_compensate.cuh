// SPDX-License-Identifier: Apache-2.0
// u t of compensators in `gemv`.
#pragma once
#include "factor.cuh"
#include "gemv_active.cuh"

// u t of one row block and of one expert's tokens.
template <int FB, int FU, int NT, bool BF16, int MODE> struct Correction {
    static constexpr int UNITS = FU > 0 ? FU : 1;  // of a record
    using Unit = FactorUnit<FB ? FB : 1>;
    static constexpr u32 BYTES = Record<UNITS, UNIT>::bytes(FB);
    const Compensators& f;
    const Active<NT>& active;

    __device__ const u8* record(int slot, int row_block, int i) const {
        return locate(active.u[slot], row_block, i / UNITS, f.u_records, BYTES);
    }
    __device__ void load(Unit& unit, int slot, int row_block, int i, int lane) const {
        unit.template load<UNITS>(record(slot, row_block, i), i % UNITS, lane);
    }
    // Of t; the first column's for those without a token.
    __device__ const u16* row(int slot, int lane) const {
        const int pair = active.pair[slot][NT == 1 ? 0 : lane / 8];
        return f.t + (pair < 0 ? active.pair[slot][0] : pair) * t_columns(f.columns);
    }
    __device__ void prefetch(int slot, int row_block, int lane) const {
        if (128 * lane < BYTES) asm volatile("prefetch.global.L2 [%0];" ::"l"(record(slot, row_block, 0) + 128 * lane));
    }
    // Rank 32 of gate and up: u is zero but for halves (factors.py), and a lane has its half of t.
    __device__ bool gated() const { return MODE == GATE_UP && f.columns == UNIT; }
    // What a lane takes of t for unit i.
    __device__ __forceinline__ void load_row(u32 (&t)[8], int slot, int lane, int i = 0) const {
        if (gated()) load_half_t(reinterpret_cast<u32(&)[4]>(t), row(slot, lane), lane / 4 % 2, lane);
        else load_t(t, row(slot, lane), i, f.columns, lane);
    }
    // part += u t, of rows lane / 4 and lane / 4 + 8 and of token lane % 4; the first unit is there, and t's asked for.
    __device__ __forceinline__ void add(float (&part)[2], Unit& unit, u32 (&t)[8], int slot, int row_block, int lane) const {
        float c[4];
        if (gated()) {
            u32(&half)[4] = reinterpret_cast<u32(&)[4]>(t);
            while (!__all_sync(~0u, is_there(half))) load_row(t, slot, lane);
            unit.template multiply_gated<BF16>(c, half);
            part[0] = fmaf(unit.scale(0), c[0], part[0]), part[1] = fmaf(unit.scale(1), c[3], part[1]);
            return;
        }
        for (int i = 0; i < f.u_records * UNITS; ++i) {
            if (i > 0) load(unit, slot, row_block, i, lane), load_row(t, slot, lane, i);
            while (!__all_sync(~0u, is_there(t))) load_row(t, slot, lane, i);
            if (f.columns <= UNIT / 2) unit.template multiply<BF16, HALF>(c, t);
            else unit.template multiply<BF16, WHOLE>(c, t);
            part[0] = fmaf(unit.scale(0), c[0], part[0]), part[1] = fmaf(unit.scale(1), c[2], part[1]);
        }
    }
};

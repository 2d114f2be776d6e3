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
    // part += u t, of rows lane / 4 and lane / 4 + 8 and of token lane % 4; the first unit is in `unit`.
    __device__ __forceinline__ void add(float (&part)[2], Unit& unit, int slot, int row_block, int lane) const {
        const u16* t = row(slot, lane);
        float c[4];
        if (MODE == GATE_UP && f.columns == UNIT) {  // rank 32; u is zero elsewhere (factors.py)
            u32 b[4];
            do load_half_t<false>(b, t, lane / 4 % 2, lane);
            while (!__all_sync(~0u, is_there(b)));
            unit.template multiply_gated<BF16>(c, b);
            part[0] = fmaf(unit.scale(0), c[0], part[0]), part[1] = fmaf(unit.scale(1), c[3], part[1]);
            return;
        }
        for (int i = 0; i < f.u_records * UNITS; ++i) {
            u32 b[8];
            if (i > 0) load(unit, slot, row_block, i, lane);
            do load_t<false>(b, t, i, f.columns, lane);
            while (!__all_sync(~0u, is_there(b)));
            if (f.columns <= UNIT / 2) unit.template multiply<BF16, HALF>(c, b);
            else unit.template multiply<BF16, WHOLE>(c, b);
            part[0] = fmaf(unit.scale(0), c[0], part[0]), part[1] = fmaf(unit.scale(1), c[2], part[1]);
        }
    }
};

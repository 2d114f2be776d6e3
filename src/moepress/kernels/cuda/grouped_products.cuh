// SPDX-License-Identifier: Apache-2.0
// The columns of a tile of `grouped`: records are unpacked into A registers and multiplied with tokens' rows, both from the ring.
#pragma once
#include "grouped_tiles.cuh"
#include "wgmma.cuh"

// A lane's words of a record's unit `u`, after those of the units before. They come in chunks of U; `chunk` is the last one.
template <int B, int U>
__device__ __forceinline__ void load_words(u32 (&words)[B], u32 (&chunk)[U], u32 record, int u, int lane) {
#pragma unroll
    for (int i = 0; i < B; ++i) {
        const int word = u * B + i;
        if (word % U == 0) load_shared<U>(chunk, record + word * 128 + lane * 4 * U);
        words[i] = chunk[word % U];
    }
}

// Unit `u` of a record -> scaled weights in the A registers; zeros where there is no such record, whatever lies in its place.
template <int B, int U, int G, bool BF16>
__device__ __forceinline__ void dequantize(u32 (&a)[16], u32 (&chunk)[U], u32 record, int u, int lane, int byte_centre,
                                           bool exists) {
    using H = Half<BF16>;
    constexpr int M = Record<U, G>::GROUPS, SEGMENTS = G == 32 ? 2 : 1;
    // Taken off the codes before they are scaled: rounding the offset to 16 bits costs in proportion to its size, and
    // zeros lie near the middle. Without it errors were 1.8 times those of rounding each weight, with it 1.2 times.
    const int centre = B == 8 ? byte_centre : B == 1 ? 0 : 1 << (B - 1);
    u32 words[B];
    load_words<B, U>(words, chunk, record, u, lane);
    unpack<B, BF16>(words, a, (0xc500u + centre / 16) * 0x10001u);
#pragma unroll
    for (int s = 0; s < SEGMENTS; ++s) {
        const int m = M == 1 ? 0 : (u * SEGMENTS + s) * M / (U * SEGMENTS);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 meta[1];
            load_shared<1>(meta, record + 128 * U * B + 4 * (M * (lane / 4 + 8 * r) + m));
            if (!exists) meta[0] = 0;
            const float scale = Half<false>::lo(meta[0]), zero = Half<false>::hi(meta[0]);
            const float offset = (float(centre) - zero) * scale;
            // A bit has two values only; a scale that makes up for the offset's rounding takes one error off the second.
            const float step = B == 1 ? fmaf(1.f - zero, scale, -H::lo(H::pack(offset, 0.f))) : scale;
            u32 scale2, offset2;  // halves of one register, which an operand selects: one register less for each FMA to read
            split(scale2, offset2, H::pack(step, offset));
#pragma unroll
            for (int pair = 8 * s / SEGMENTS; pair < 8 * (s + 1) / SEGMENTS; ++pair) {
                u32& x = a[2 * pair + r];
                if (B < 8 || !BF16) {  // the sum of base and centre is exact
                    const int p = place<B, BF16>(pair);
                    const u32 minus = (0x8000u | (H::exponent(p) + (u32(centre) << p))) * 0x10001u;
                    x = H::fma(x, H::ONE, minus);
                }
                x = H::fma(x, scale2, offset2);
            }
        }
    }
}

// The same where widths are mixed. The choice is made here, unit by unit, so that one set of products serves all widths:
// with a loop for each the compiler found no registers for their sums and made every product wait for the one before.
template <int B, int MAX_B, int U, int G, bool BF16>
__device__ __forceinline__ void dequantize_any(u32 (&a)[16], u32 (&chunk)[U], u32 record, int u, int lane, int bits,
                                               int centre, bool exists) {
#define DEQUANTIZE(W) dequantize<W, U, G, BF16>(a, chunk, record, u, lane, centre, exists)
    if constexpr (B) DEQUANTIZE(B);
    else if (bits == 1) DEQUANTIZE(1);
    else if (bits == 2) DEQUANTIZE(2);
    else if (bits == 3) DEQUANTIZE(3);
    else if (MAX_B == 4 || bits == 4) DEQUANTIZE(4);
    else DEQUANTIZE(MAX_B);
#undef DEQUANTIZE
}

// The columns of one tile of N tokens, in stages that have room for NT, for one consumer warpgroup; and those of t, in the same
// loop: with a loop for each the compiler made every descriptor by hand, 7 % of Mixtral's time at 64 tokens.
template <typename C, int B, int MAX_B, int U, int G, bool BF16, int NT, int N, int MI, int WGS, int KW, int FB, typename A>
__device__ __forceinline__ void accumulate(float (&acc)[MI][N / 2], A& added, u32 stages_at, u32 stage_bytes, u32 bars, int stages,
                                           int& stage, u32& phase, int records, int wg, int kw, int lane, int warp, int bits,
                                           int centre) {
    constexpr int STEP = C::STEP;
    u32 a[2][16];
    int held = -1;  // the stage that the last products still read
    const u32 size = Record<U, G>::bytes(B ? B : bits);
    const int rounds = (records + KW * STEP - 1) / (KW * STEP), more = FB > 0 ? added.units() : 0;
    for (int round = 0; round < rounds + more; ++round) {
        const int record = round * KW * STEP;
        mbarrier_wait(bars + 16 * stage, phase);
        if (record + kw * STEP < records) {
            const u32 at = stages_at + stage * stage_bytes, w = at + C::X_BYTES;
            const u64 tile = swizzled_tile(at + kw * 4 * N * 128);
            u32 chunk[MI][U];
#pragma unroll
            for (int unit = 0; unit < 4; ++unit) {
                const int s = unit / U, u = unit % U;
                // With a way out after each unit the compiler made every product wait. Zeros meet x's zeros, or in a part of
                // the columns what another part has: nothing, but for a NaN where that has an infinity.
                const bool exists = s == 0 || record + kw * STEP + s < records;
                if (U > 1 && !exists) break;
#pragma unroll
                for (int mi = 0; mi < MI; ++mi) {
                    u32(&operand)[16] = a[(unit * MI + mi) % 2];
                    const u32 from = w + (((wg * MI + mi) * KW * STEP + kw * STEP + s) * 4 + warp) * size;
                    dequantize_any<B, MAX_B, U, G, BF16>(operand, chunk[mi], from, u, lane, bits, centre, U > 1 || exists);
                    wgmma_fence();
                    Wgmma<N, BF16>::run(acc[mi], operand, tile + unit * N * 8);
                    wgmma_commit();
                    wgmma_wait<1>();
                    if (unit == 0 && mi == 0 && held >= 0) {
                        if (lane == 0) mbarrier_arrive(bars + 16 * held + 8);
                        held = -1;
                    }
                }
            }
        } else if (FB > 0 && round >= rounds && kw == 0) {
            if (MI == 1) wgmma_wait<0>();  // of W's last unit, or t's, which may be in the first operand
            const u64 tile = swizzled_tile(stages_at + stage * stage_bytes);
            if (round > rounds) added.load(round - rounds, lane);
#pragma unroll
            for (int mi = 0; mi < MI; ++mi) {
                added.operands(a[mi % 2], mi);
                wgmma_fence();
                Wgmma<N, BF16>::run(acc[mi], a[mi % 2], tile);
                wgmma_commit();
                wgmma_wait<1>();
                if (mi == 0 && held >= 0 && lane == 0) mbarrier_arrive(bars + 16 * held + 8);
            }
        } else if (held >= 0) {
            wgmma_wait<0>();
            if (lane == 0) mbarrier_arrive(bars + 16 * held + 8);
        }
        held = stage;
        if (++stage == stages) stage = 0, phase ^= 1;
    }
    wgmma_wait<0>();
    if (held >= 0 && lane == 0) mbarrier_arrive(bars + 16 * held + 8);
}

// Unit `u` of a record -> CODE_BASE + code in the A registers.
template <int B, int U, bool BF16>
__device__ __forceinline__ void unpack_codes(u32 (&a)[16], u32 (&chunk)[U], u32 record, int u, int lane) {
    u32 words[B];
    load_words<B, U>(words, chunk, record, u, lane);
    unpack<B, BF16, true>(words, a);
}

// Scales and zeros in a lane's rows of two units of a record, or of one where records have no more; and the sums of x of two
// units in its tokens, where registers have room for them.
template <int N> struct Scaling {
    static constexpr bool KEEPS_SUMS = N <= 16;
    u32 meta[2][2];                         // [unit][row]
    float sums[2][KEEPS_SUMS ? N / 4 : 1];  // [unit][token]
    u32 first_sum;  // where that of the first unit and the lane's first token is; tokens are 16 bytes apart

    __device__ __forceinline__ u32 sum_at(int i) const { return first_sum + (i / 2 * 8 + i % 2) * 16; }

    template <int U, int G> __device__ __forceinline__ void load(u32 metas_at, int u, u32 at) {
        constexpr int M = Record<U, G>::GROUPS;
        first_sum = at;
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const u32 from = metas_at + 4 * (M * 8 * r + u * M / U);
            if constexpr (M == U && U > 1) {
                u32 both[2];
                load_shared<2>(both, from);
                meta[0][r] = both[0], meta[1][r] = both[1];
            } else {
                load_shared<1>(reinterpret_cast<u32(&)[1]>(meta[0][r]), from);
                meta[1][r] = meta[0][r];
            }
        }
        if constexpr (KEEPS_SUMS)
#pragma unroll
            for (int i = 0; i < N / 4; ++i)
                asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(sums[0][i]), "=f"(sums[1][i]) : "r"(sum_at(i)));
    }

    // acc += scale (part - (zero + base) sum), where part is the sum of x times codes with their base.
    __device__ __forceinline__ void add(float (&acc)[N / 2], const float (&part)[N / 2], int unit, int of_sums) const {
#pragma unroll
        for (int i = 0; i < N / 4; ++i) {
            float sum;
            if constexpr (KEEPS_SUMS) sum = sums[of_sums][i];
            else asm volatile("ld.shared.f32 %0, [%1];" : "=f"(sum) : "r"(sum_at(i) + 4 * of_sums));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                float& y = acc[i / 2 * 4 + 2 * r + i % 2];
                const float own = fmaf(-CODE_BASE - Half<false>::hi(meta[unit][r]), sum, part[i / 2 * 4 + 2 * r + i % 2]);
                y = fmaf(Half<false>::lo(meta[unit][r]), own, y);
            }
        }
    }
};

// The columns of one stage of codes with their base, whose sums are scaled unit by unit: for few tokens less work than scaling
// weights. `first` is a warp's first record there, of `records`; `sums_at` has the sums of x of the lane's first token.
template <int B, int U, int G, bool BF16, int NT, int N>
__device__ __forceinline__ void multiply_codes(float (&acc)[N / 2], u32 first, int records, u64 tile, u32 sums_at, int lane) {
    u32 a[2][16], chunk[U];
    float part[2][N / 2];
    Scaling<N> scaling;
    auto scale = [&](int unit) { scaling.add(acc, part[unit % 2], unit % U % 2, unit % 2); };
#pragma unroll
    for (int unit = 0; unit < 4; ++unit) {
        const int s = unit / U, u = unit % U;
        if (s > 0 && s >= records) break;
        const u32 record = first + s * 4 * Record<U, G>::bytes(B);
        unpack_codes<B, U, BF16>(a[unit % 2], chunk, record, u, lane);
        wgmma_fence();
        Wgmma<N, BF16>::template run<false>(part[unit % 2], a[unit % 2], tile + unit * NT * 8);
        wgmma_commit();
        if (u > 0) wgmma_wait<1>(), scale(unit - 1);
        if (u % 2 == 0)
            scaling.template load<U, G>(record + 128 * U * B + 4 * Record<U, G>::GROUPS * (lane / 4), u,
                                        sums_at + unit / 2 * 8);
        if (u == U - 1) wgmma_wait<0>(), scale(unit);
    }
}

template <int N> struct Size {
    static constexpr int VALUE = N;
};

// All stages of a tile, in a loop for each width where these are mixed, and those of t.
template <typename C, int B, int U, int G, bool BF16, int NT, int N, int FB, typename A>
__device__ __forceinline__ void accumulate_codes(float (&acc)[1][N / 2], A& added, u32 stages_at, u32 stage_bytes, u32 sums_at,
                                                 u32 bars, int stages, int& stage, u32& phase, int records, int wg, int lane,
                                                 int warp, int bits) {
    constexpr int STEP = C::STEP;
    const int rounds = (records + STEP - 1) / STEP, more = FB > 0 ? added.units() : 0;
    const u32 first = C::X_BYTES + (wg * STEP * 4 + warp) * Record<U, G>::bytes(B ? B : bits);
    auto run = [&](auto width) {
        constexpr int W = decltype(width)::VALUE;
        for (int round = 0; round < rounds; ++round) {
            mbarrier_wait(bars + 16 * stage, phase);
            const u32 at = stages_at + stage * stage_bytes;
            multiply_codes<W, U, G, BF16, NT, N>(acc[0], at + first, records - round * STEP, swizzled_tile(at),
                                                 at + sums_at + lane % 4 * 32, lane);
            __syncwarp();  // all lanes have read sums of x
            if (lane == 0) mbarrier_arrive(bars + 16 * stage + 8);
            if (++stage == stages) stage = 0, phase ^= 1;
        }
    };
    if constexpr (B) run(Size<B>{});
    else if (bits == 1) run(Size<1>{});
    else if (bits == 2) run(Size<2>{});
    else if (bits == 3) run(Size<3>{});
    else run(Size<4>{});
    for (int unit = 0; unit < more; ++unit) {
        mbarrier_wait(bars + 16 * stage, phase);
        u32 a[16];
        added.load(unit, lane);
        added.operands(a, 0);
        wgmma_fence();
        Wgmma<N, BF16>::run(acc[0], a, swizzled_tile(stages_at + stage * stage_bytes));
        wgmma_commit();
        wgmma_wait<0>();
        if (lane == 0) mbarrier_arrive(bars + 16 * stage + 8);
        if (++stage == stages) stage = 0, phase ^= 1;
    }
}

// The same for up to 8 tokens, in bytes and with the warp's own products. Columns of the first product are high bytes of
// even tokens and low bytes of odd ones, of the second the others: so lanes meet all banks.
template <typename C, int B, int U, int G, int SEGMENTS, int WGS, int KW>
__device__ __forceinline__ void accumulate_bytes(float (&acc)[1][4], u32 stages_at, u32 stage_bytes, u32 sums_at, u32 bars,
                                                 int stages, int& stage, u32& phase, int records, int wg, int kw, int lane,
                                                 int warp, bool live) {
    constexpr int M = Record<U, G>::GROUPS, TOKENS = 8;
    constexpr u32 SIZE = Record<U, G>::bytes(B);
    const int g = lane / 4, t = lane % 4;
    u32 chunk[2];  // the lane's 16 bytes of a row of 128, of which chunk c of row r lies at c ^ r
#pragma unroll
    for (int i = 0; i < 2; ++i) chunk[i] = g * 128 + ((4 * (i ^ g % 2) + t) ^ g) * 16;
    constexpr int STEP = C::STEP;
    for (int record = 0; record < records; record += KW * STEP) {
        mbarrier_wait(bars + 16 * stage, phase);
        const u32 at = stages_at + stage * stage_bytes;
#pragma unroll
        for (int s = 0; s < STEP; ++s) {
            if (!live || record + kw * STEP + s >= records) break;
            const u32 x = at + (kw * STEP + s) * U * TOKENS * 128;
            const u32 w = at + C::X_BYTES + ((wg * KW * STEP + kw * STEP + s) * 4 + warp) * SIZE;
            const u32 sums = at + sums_at + ((kw * STEP + s) * TOKENS + 2 * t) * C::SUM_BYTES;
            u32 words[U * B], low[M], high[M];
#pragma unroll
            for (int c = 0; c < B; ++c)
                load_shared<U>(reinterpret_cast<u32(&)[U]>(words[c * U]), w + c * 128 * U + lane * 4 * U);
            load_shared<M>(low, w + 128 * U * B + 4 * M * g);
            load_shared<M>(high, w + 128 * U * B + 4 * M * (g + 8));
#pragma unroll
            for (int u = 0; u < U; ++u) {
                u32 a[8], b[2][4];
                unpack_bytes<B>(words + u * B, a);
#pragma unroll
                for (int i = 0; i < 2; ++i) load_shared<4>(b[i], x + u * TOKENS * 128 + chunk[i]);
#pragma unroll
                for (int s = 0; s < SEGMENTS; ++s) {
                    const int m = M == 1 ? 0 : (u * SEGMENTS + s) * M / (U * SEGMENTS);
                    const float scales[2] = {Half<false>::lo(low[m]), Half<false>::lo(high[m])};
                    const float zeros[2] = {Half<false>::hi(low[m]), Half<false>::hi(high[m])};
                    int c[2][4];
#pragma unroll
                    for (int i = 0; i < 2; ++i)
#pragma unroll
                        for (int j = s * 2 / SEGMENTS; j < (s + 1) * 2 / SEGMENTS; ++j)
                            if (j == s * 2 / SEGMENTS) mma_bytes<false>(c[i], a + 4 * j, b[i][2 * j], b[i][2 * j + 1]);
                            else mma_bytes<true>(c[i], a + 4 * j, b[i][2 * j], b[i][2 * j + 1]);
#pragma unroll
                    for (int e = 0; e < 2; ++e) {
                        float scale, sum;
                        asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];"
                                     : "=f"(scale), "=f"(sum)
                                     : "r"(sums + e * C::SUM_BYTES + (u * SEGMENTS + s) * 4 * SUM_FLOATS));
#pragma unroll
                        for (int r = 0; r < 2; ++r) {
                            float& y = acc[0][2 * r + e];
                            const float products = float(c[e][2 * r + e] * 256 + c[1 - e][2 * r + e]);
                            y = fmaf(scales[r] * scale, fmaf(-zeros[r], sum, products), y);
                        }
                    }
                }
            }
        }
        __syncwarp();
        if (lane == 0) mbarrier_arrive(bars + 16 * stage + 8);
        if (++stage == stages) stage = 0, phase ^= 1;
    }
}

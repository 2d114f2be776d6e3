// SPDX-License-Identifier: Apache-2.0
// y = x W^T for two tokens or more, one matrix or a bank of experts in one persistent launch, on Hopper's wgmma.
//
// W is the A operand: each warp turns its own records into registers, (base + code) -> code -> code * scale - zero * scale,
// and the tokens are the columns, a multiple of eight (the transposed problem, as in Humming). A producer keeps a ring of
// stages full by bulk copies: records as they lie, tokens' rows, sorted by expert beforehand, into the swizzled tile that
// wgmma reads. While the tensor cores work on one unit the next one is unpacked. Where rows alone cannot fill the GPU, KW
// warpgroups share the columns and add up in their order, and in a dense layer the blocks of a cluster.
//
// Tiles of 24 tokens leave the scale out of W: (base + code) is multiplied as it is, unit by unit into sums of their own, and
// scale * (sum - zero * sum of x - sum of base * x) is added to the tile's (ours; sums of x come with x, as with bytes). That
// is three operations for each sum instead of two for each pair of weights, so it pays while columns are few.
//
// Compensators W + u v: u times t = v x is added to the sums of W x while they are in registers. In wide tiles t is the last
// stages, made by a launch before. Tiles of 8 tokens multiply v in the same launch, as its first tiles: they go to the blocks
// that start first, so nobody waits for a block that waits for a free multiprocessor.
#include "bytes.cuh"
#include "cluster.cuh"
#include "factor.cuh"
#include "wgmma.cuh"

// What a product after this one takes of y besides y, as `prepare_rows` makes it: bytes, or the sums that go with 16 bits.
struct Next {
    u32* bytes;    // [pairs][units][UNIT_WORDS]; null: not needed
    float* sums;   // with bytes [records][pairs][floats], else [units / 2][pairs][2][2]; null: not needed
    int units;     // of a row
    int record_units;
    int segments;  // of a unit
    int floats;    // of a record and token
    int bits;      // of the codes that are multiplied next
};

struct Compensators {
    const Expert* u;  // [num_experts] rows of W by columns of t; records null: that expert has none
    int u_records, columns;  // of t: 8, 16, 32 or a multiple of 64
    // tiles of 8 tokens
    const Expert* v;  // as u, rows of t by k
    u16* t;           // [pairs or tokens, columns] in the order of `t_place`
    int* done;        // row blocks of t that are stored, of all tokens' tiles; 0 before
    int v_row_blocks;
};

struct Arguments {
    u16* y;                 // DENSE [tokens, n]; GATE_UP [pairs, n] or null, PLAIN [pairs, splits * n] in sorted order; DOWN
                            // [tokens * slots, n]
    const u16* bias;        // DENSE [n] or null
    Bank bank;              // PLAIN: experts without records are left out, and their rows of y as they are
    const int* first;       // [num_experts + 1] first sorted pair of each expert; null: one matrix, for all tokens
    const int* pairs;       // [pairs] token * slots + slot, sorted by expert; DENSE null
    const float* weights;   // DOWN [pairs], sorted as they are
    Compensators add;       // before SiLU and weights
    Next next;              // GATE_UP
    int tokens, slots, num_experts;
    int n, ld;              // columns of y and elements from row to row; GATE_UP: the intermediate size, half of W's rows
    int records;            // of a row block
    int row_blocks;
    int stages;
    int splits;             // parts of the columns: PLAIN with a result each, DENSE blocks of a cluster; else 1
    int split_records;      // of a part
    int first_tile, tiles;  // DENSE, but for tiles of 8 tokens: what this launch runs
};

constexpr int MAX_EXPERTS = 512, MAX_SPLITS = 4;

// Tensor maps of the activations, DENSE of the tokens, else of the sorted pairs: x as [units][rows][64] in boxes of
// [KW * 4, NT or NARROW, 64] with 128-byte swizzle, and for tiles of 8 tokens the same of x's bytes, and their sums as
// [records][rows][..] in boxes of [KW * 4 / U, NT, ..]; where sums are scaled, [units / 2][rows][4] in [2, NT, 4]. t, for wider tiles, as x in boxes of [1, NT, 64].
struct alignas(64) TensorMap {
    u8 opaque[128];
};

// One tile of work: an expert, a range of its sorted pairs, a range of row blocks; PLAIN: a part of the columns. The producer
// finds it and leaves it with the tile's first stage: found by every warp it took a third of the instructions of short K.
struct alignas(16) Work {
    int expert;  // -1: no more
    int token, tokens, row_block;
    int split;   // PLAIN, DENSE; tiles of 8 tokens: 1 of v
    int bits, centre;
    const u8* u;  // of its compensator; null: none

    // Known to the compiler to be the same for the whole warp, and with it the stage, of which it makes descriptors.
    template <bool FACTORS> __device__ __forceinline__ Work uniform() const {
        auto first = [](auto x) { return __shfl_sync(~0u, x, 0); };
        return {first(expert), first(token), first(tokens), first(row_block), first(split), first(bits), first(centre),
                FACTORS ? reinterpret_cast<const u8*>(first(reinterpret_cast<u64>(u))) : nullptr};
    }

    template <bool SPLIT> __device__ int first_record(const Arguments& p) const { return SPLIT ? split * p.split_records : 0; }
    template <bool SPLIT> __device__ int records(const Arguments& p) const {
        return SPLIT ? min(p.split_records, p.records - split * p.split_records) : p.records;
    }
};

// Wide tiles have products of two sizes: experts' tokens come in all numbers, and time goes with columns, empty or not. Mixed
// widths have one: unpacking all of them twice took 3 s to compile. Tiles of 152 are a dense layer's, where all are full.
template <int NT, int MI, int B>
constexpr int NARROW = MI == 1 || B == 0 || NT == 152 ? NT : NT == 144 ? 128 : NT == 128 ? 96 : NT == 80 ? 64 : NT;

// Tiles in order: expert, row tile, token tile; so that blocks at work together share an expert's records in L2. Of an
// expert's tiles, as few as can be are wider than N tokens. Before them all, those of v.
template <int NT, int N, int TILE_BLOCKS, int MODE> struct Schedule {
    const int *tiles, *first;  // [num_experts + 1] token tiles and pairs before each expert
    int own_row_tiles, v_row_tiles, token_tiles, num_experts, all_tokens, splits;
    int first_tile, some;  // DENSE; 0: all of them

    __device__ int total() const { return MODE == DENSE && some ? some * splits : token_tiles * (v_row_tiles + own_row_tiles); }

    __device__ Work at(int index) const {
        const bool of_v = index < token_tiles * v_row_tiles;
        const int row_tiles = of_v ? v_row_tiles : own_row_tiles;
        if (!of_v) index -= token_tiles * v_row_tiles;
        if constexpr (MODE == DENSE) {
            const int at = first_tile + index / splits, tile = at % token_tiles, start = begin(all_tokens, tile, token_tiles);
            return {0, start, begin(all_tokens, tile + 1, token_tiles) - start, at / token_tiles * TILE_BLOCKS,
                    of_v ? 1 : index % splits};
        }
        int low = 0, high = num_experts;  // the last expert whose tiles begin at or before this one
        while (high - low > 1) {
            const int middle = (low + high) / 2;
            if (tiles[middle] * row_tiles <= index) low = middle; else high = middle;
        }
        const int own = tiles[low + 1] - tiles[low], rest = index - tiles[low] * row_tiles, tile = rest % own;
        const int all = first[low + 1] - first[low], start = begin(all, tile, own);
        const int row = rest / own;
        return {low, first[low] + start, begin(all, tile + 1, own) - start, (MODE == PLAIN ? row / splits : row) * TILE_BLOCKS,
                MODE == PLAIN ? row % splits : of_v};
    }
    // Where the i-th of n tiles begins: wide ones first.
    static __device__ int begin(int all, int i, int n) {
        const int wide = NT == N ? n : max(0, (all - n * N + NT - N - 1) / (NT > N ? NT - N : 1));
        return min(all, i * N + min(i, wide) * (NT - N));
    }
};

// Unit `u` of a record -> scaled weights in the A registers. Chunks of words are read when first needed.
template <int B, int U, int G, bool BF16>
__device__ __forceinline__ void dequantize(u32 (&a)[16], u32 (&words)[U * B], u32 record, int u, int lane, int byte_centre) {
    using H = Half<BF16>;
    constexpr int M = Record<U, G>::GROUPS, SEGMENTS = G == 32 ? 2 : 1;
    // Taken off the codes before they are scaled: rounding the offset to 16 bits costs in proportion to its size, and
    // zeros lie near the middle. Without it errors were 1.8 times those of rounding each weight, with it 1.2 times.
    const int centre = B == 8 ? byte_centre : B == 1 ? 0 : 1 << (B - 1);
#pragma unroll
    for (int c = 0; c < B; ++c)
        if (c * U >= u * B && c * U < (u + 1) * B)
            load_shared<U>(reinterpret_cast<u32(&)[U]>(words[c * U]), record + c * 128 * U + lane * 4 * U);
    unpack<B, BF16>(words + u * B, a, (0xc500u + centre / 16) * 0x10001u);
#pragma unroll
    for (int s = 0; s < SEGMENTS; ++s) {
        const int m = M == 1 ? 0 : (u * SEGMENTS + s) * M / (U * SEGMENTS);
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            u32 meta[1];
            load_shared<1>(meta, record + 128 * U * B + 4 * (M * (lane / 4 + 8 * r) + m));
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
__device__ __forceinline__ void dequantize_any(u32 (&a)[16], u32 (&words)[U * MAX_B], u32 record, int u, int lane, int bits,
                                               int centre) {
#define DEQUANTIZE(W) dequantize<W, U, G, BF16>(a, reinterpret_cast<u32(&)[U * W]>(words), record, u, lane, centre)
    if constexpr (B) DEQUANTIZE(B);
    else if (bits == 1) DEQUANTIZE(1);
    else if (bits == 2) DEQUANTIZE(2);
    else if (bits == 3) DEQUANTIZE(3);
    else if (MAX_B == 4 || bits == 4) DEQUANTIZE(4);
    else DEQUANTIZE(MAX_B);
#undef DEQUANTIZE
}

template <int U, int G, int NT, int MI, int WGS, int KW, int FB, bool AFTER> struct Config {
    static constexpr int ROW_BLOCKS = 4 * MI * WGS;           // of a tile
    static constexpr int CONSUMERS = WGS * KW * 128;
    static constexpr bool MANY_REGISTERS = MI * NT >= 128 || AFTER;   // more than an even share; a whole warpgroup then gives some up
    static constexpr int THREADS = CONSUMERS + (MANY_REGISTERS ? 128 : WARP);
    static constexpr int STEP = 4 / U;                        // records of a warpgroup in a stage: 256 columns
    static constexpr int X_BYTES = KW * 4 * NT * 128;         // of a stage
    // Up to 8 tokens codes are multiplied as bytes and their sums scaled; with more it is cheaper to scale the weights.
    static constexpr bool BYTES = NT == 8 && MI == 1;
    static constexpr int H_UNITS = ROW_BLOCKS / 8;            // units of the intermediate that a tile of GATE_UP has
    static constexpr int SEGMENTS = U * Record<U, G>::SEGMENTS;
    static constexpr int SUM_BYTES = 4 * SUM_FLOATS * (SEGMENTS > 2 ? SEGMENTS : 2);  // of one token and record
    static constexpr int STAGE_SUMS = BYTES ? KW * STEP * NT * SUM_BYTES : AFTER ? 4 * NT * 8 : 0;  // bytes
    static constexpr bool MULTIPLIES_V = BYTES && FB > 0;
    // A stage: x [KW * 4][NT][64], records [MI * WGS][KW * STEP][4], sums: BYTES [KW * STEP][NT][..], AFTER [2][NT][2][2].
    static __device__ __host__ constexpr int sums_at(int max_b) {
        const int own = Record<U, G>::bytes(max_b), v = MULTIPLIES_V ? Record<U, UNIT>::bytes(FB) : 0;
        return (X_BYTES + KW * STEP * ROW_BLOCKS * (own > v ? own : v) + 127) / 128 * 128;
    }
    static __device__ __host__ constexpr int stage_bytes(int max_b) {
        return (sums_at(max_b) + STAGE_SUMS + 1023) / 1024 * 1024;
    }
};

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
            u32 words[MI][U * MAX_B];
#pragma unroll
            for (int unit = 0; unit < 4; ++unit) {
                const int s = unit / U, u = unit % U;
                if (s > 0 && record + kw * STEP + s >= records) break;
#pragma unroll
                for (int mi = 0; mi < MI; ++mi) {
                    u32(&operand)[16] = a[(unit * MI + mi) % 2];
                    const u32 from = w + (((wg * MI + mi) * KW * STEP + kw * STEP + s) * 4 + warp) * size;
                    dequantize_any<B, MAX_B, U, G, BF16>(operand, words[mi], from, u, lane, bits, centre);
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

// acc += scale (part - zero sum - base): the sums of a group's codes, which had a base. `sums` are those of x,
// of a lane's tokens, in steps of 16 bytes.
template <int N>
__device__ __forceinline__ void scale_sums(float (&acc)[N / 2], const float (&part)[N / 2], const u32 (&meta)[2], u32 sums) {
#pragma unroll
    for (int i = 0; i < N / 8; ++i)
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float sum, base;
            asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(sum), "=f"(base) : "r"(sums + (8 * i + e) * 16));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const int at = 4 * i + 2 * r + e;
                const float own = part[at] - fmaf(Half<false>::hi(meta[r]), sum, base);
                acc[at] = fmaf(Half<false>::lo(meta[r]), own, acc[at]);
            }
        }
}

// The same with codes that have their base, whose sums are scaled group by group: for few tokens less work than scaling weights.
template <typename C, int B, int U, int G, bool BF16, int NT, int N, int FB, typename A>
__device__ __forceinline__ void accumulate_codes(float (&acc)[1][N / 2], A& added, u32 stages_at, u32 stage_bytes, u32 sums_at,
                                                 u32 bars, int stages, int& stage, u32& phase, int records, int wg, int lane,
                                                 int warp) {
    constexpr int STEP = C::STEP, M = Record<U, G>::GROUPS;
    constexpr u32 SIZE = Record<U, G>::bytes(B);
    const int rounds = (records + STEP - 1) / STEP, more = FB > 0 ? added.units() : 0;
    for (int round = 0; round < rounds; ++round) {
        mbarrier_wait(bars + 16 * stage, phase);
        const u32 at = stages_at + stage * stage_bytes;
        const u64 tile = swizzled_tile(at);
        u32 a[2][16], meta[2][2], words[U * B];
        float part[2][N / 2];
        auto scale = [&](int unit) {
            scale_sums<N>(acc[0], part[unit % 2], meta[unit % 2], at + sums_at + (unit / 2 * NT + lane % 4 * 2) * 16 + unit % 2 * 8);
        };
#pragma unroll
        for (int unit = 0; unit < 4; ++unit) {
            const int s = unit / U, u = unit % U;
            if (s > 0 && round * STEP + s >= records) break;
            const u32 record = at + C::X_BYTES + ((wg * STEP + s) * 4 + warp) * SIZE;
#pragma unroll
            for (int c = 0; c < B; ++c)
                if (c * U >= u * B && c * U < (u + 1) * B)
                    load_shared<U>(reinterpret_cast<u32(&)[U]>(words[c * U]), record + c * 128 * U + lane * 4 * U);
#pragma unroll
            for (int r = 0; r < 2; ++r)
                load_shared<1>(reinterpret_cast<u32(&)[1]>(meta[unit % 2][r]),
                               record + 128 * U * B + 4 * (M * (lane / 4 + 8 * r) + (M == 1 ? 0 : u * M / U)));
            unpack<B, BF16>(words + u * B, a[unit % 2]);
            wgmma_fence();
            Wgmma<N, BF16>::template run<false>(part[unit % 2], a[unit % 2], tile + unit * NT * 8);
            wgmma_commit();
            if (u > 0) wgmma_wait<1>(), scale(unit - 1);
            if (u == U - 1) wgmma_wait<0>(), scale(unit);
        }
        if (lane == 0) mbarrier_arrive(bars + 16 * stage + 8);
        if (++stage == stages) stage = 0, phase ^= 1;
    }
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

// Where a tile's columns go and what they are multiplied with; DOWN only.
struct Columns {
    int row;
    float weight;
};

// Where column `column` of t lies: a lane's columns of each octet, as products take them, side by side.
__device__ __forceinline__ int t_place(int column, int columns) {
    const int width = columns < UNIT ? columns : UNIT;
    return column / width * width + column % 8 / 2 * (width / 4) + column % width / 8 * 2 + column % 2;
}

// A lane's part of unit `unit` of a row of t; null: zeros. Past L1, which may have an older neighbour of this row.
__device__ __forceinline__ void load_t(u32 (&b)[8], const u16* row, int unit, int columns, int lane) {
    uint4 v[2] = {};
    if (row) {
        const int width = columns < UNIT ? columns : UNIT;
        const u16* from = row + unit * UNIT + lane % 4 * (width / 4);
        if (width >= 32) v[0] = __ldcg(reinterpret_cast<const uint4*>(from));
        if (width == 64) v[1] = __ldcg(reinterpret_cast<const uint4*>(from) + 1);
        if (width == 16)
            v[0].x = __ldcg(reinterpret_cast<const u32*>(from)), v[0].y = __ldcg(reinterpret_cast<const u32*>(from) + 1);
        if (width == 8) v[0].x = __ldcg(reinterpret_cast<const u32*>(from));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) b[4 * i] = v[i].x, b[4 * i + 1] = v[i].y, b[4 * i + 2] = v[i].z, b[4 * i + 3] = v[i].w;
}

// u t for a row block and a tile of 8 tokens. What a first unit takes is asked for before W's products: one trip to memory a
// tile was 5 % of Mixtral's time at 8 tokens.
template <int FB, int FU, bool BF16> struct Compensator {
    FactorUnit<FB> unit;
    u32 t[8];
    const u8* u;     // of the expert; null: none
    const u16* row;  // of t
    int row_block;

    __device__ __forceinline__ void load_unit(const Compensators& f, int i, int lane) {
        load_u<FB, FU>(unit, f, u, i, row_block, lane);
    }
    __device__ __forceinline__ void load_row(const Compensators& f, int i, int lane) { load_t(t, row, i, f.columns, lane); }

    __device__ __forceinline__ void begin(const Compensators& f, const Work& work, int row_block, bool t_is_there, int lane) {
        u = work.u;
        if (!u) return;
        this->row_block = row_block, row = lane / 4 < work.tokens ? f.t + (u64)(work.token + lane / 4) * f.columns : nullptr;
        load_unit(f, 0, lane);
        if (t_is_there) load_row(f, 0, lane);
    }
    __device__ __forceinline__ void add(float (&y)[4], const Compensators& f, int lane) {
        for (int i = 0; i < (f.columns + UNIT - 1) / UNIT; ++i) {
            u32 a[16];
            float c[4];
            if (i > 0) load_unit(f, i, lane), load_row(f, i, lane);
            unit.template operands<BF16>(a);
            multiply_unit<BF16>(c, a, t);
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
        if (token < work.tokens && column < f.columns)
            f.t[(u64)(work.token + token) * f.columns + t_place(column, f.columns)] = round16<BF16>(acc[e]);
    }
    __syncwarp();
    if (lane == 0 && row_block < f.v_row_blocks) {
        __threadfence();
        atomicAdd(f.done, 1);
    }
}

// One warp's 16 rows of a tile. Lanes hold pairs of tokens and rows 8 apart; through a corner of shared memory, a row's
// eight neighbours come together and leave as 16 bytes. (Two bytes at a time took half of the time of short K.) Where a
// next product wants bytes, `octets` gets each token's eight, at a stride of eight of them; where it wants sums, `sums` theirs.
template <bool BF16, int NT, int MODE>
__device__ __forceinline__ void store_rows(const Arguments& p, const Work& work, const Columns* columns, u32 corner, uint4* octets,
                                           float* sums, int row_block, float (&acc)[NT / 2], int lane) {
    using H = Half<BF16>;
    constexpr int CHUNK = NT < 32 ? NT : NT % 32 == 0 ? 32 : NT % 16 == 0 ? 16 : 8, HALVES = MODE == GATE_UP ? 1 : 2;  // 16-byte pieces of a token
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
            if (p.ld % 8 == 0) {  // rows beyond n are padding up to ld, and zeros
                *reinterpret_cast<uint4*>(to) = make_uint4(x[0], x[1], x[2], x[3]);
            } else {
#pragma unroll 1
                for (int j = 0; j < 8 && at + j < p.n; ++j)
                    asm volatile("{.reg .b16 h; ld.shared.b16 h, [%1]; st.global.b16 [%0], h;}"
                                 ::"l"(to + j), "r"(corner + 16 * i + 2 * j) : "memory");
            }
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

// Sums of the tile's results over units, and of them times bases, from those of octets, [unit][octet][token]. Whole warps, with
// no branch: after one the compiler took the stage for different from lane to lane.
template <bool BF16, int NT, int UNITS>
__device__ __forceinline__ void store_sums(const Arguments& p, const Work& work, const float* octets, int thread) {
    const Next& next = p.next;
    const int token = thread % NT, unit = work.row_block / 8 + thread / NT, pairs = p.tokens * p.slots;
    float sum[8], base[8];
#pragma unroll
    for (int octet = 0; octet < 8; ++octet) {
        sum[octet] = octets[(min(thread / NT, UNITS - 1) * 8 + octet) * NT + token];
        base[octet] = sum[octet] * code_base<BF16>(next.bits, octet);
    }
#pragma unroll
    for (int step = 1; step < 8; step *= 2)  // in the order of `make_sums`
#pragma unroll
        for (int octet = 0; octet < 8; octet += 2 * step) sum[octet] += sum[octet + step], base[octet] += base[octet + step];
    if (thread < UNITS * NT && 8 * unit < p.row_blocks && token < work.tokens)
        reinterpret_cast<float2*>(next.sums)[((u64)(unit / 2) * pairs + work.token + token) * 2 + unit % 2] = make_float2(sum[0], base[0]);
}

// Token tiles and pairs before each expert, by one warp, which asks for all of them at once.
template <int NT, int MODE> __device__ __forceinline__ void count_tiles(const Arguments& p, int* tiles, int* first, int lane) {
    constexpr int BATCH = 4;
    int before = 0;
    for (int from = lane; from - lane < p.num_experts; from += BATCH * WARP) {
        int begin[BATCH], end[BATCH];
        bool runs[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int e = from + i * WARP;
            auto first_of = [&](int e) { return p.first ? p.first[e] : e * p.tokens; };
            begin[i] = e <= p.num_experts ? first_of(e) : 0, end[i] = e < p.num_experts ? first_of(e + 1) : 0;
            runs[i] = e < p.num_experts && (MODE != PLAIN || p.bank.expert(e).records);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int e = from + i * WARP;
            int sum = runs[i] ? (end[i] - begin[i] + NT - 1) / NT : 0;
#pragma unroll
            for (int step = 1; step < WARP; step *= 2) {
                const int left = __shfl_up_sync(~0u, sum, step);
                if (lane >= step) sum += left;
            }
            if (e < p.num_experts) tiles[e + 1] = before + sum, first[e] = begin[i], first[e + 1] = end[i];
            before += __shfl_sync(~0u, sum, WARP - 1);
        }
    }
    if (lane == 0) tiles[0] = 0;
}

// Keeps the ring full with the stages of this block's tiles. One warp, of which lane 0 asks for copies.
template <typename C, int B, int MAX_B, int U, int G, int NT, int MODE, int MI, int WGS, int KW, int FB, bool AFTER, typename S>
__device__ __forceinline__ void produce(const Arguments& p, const S& schedule, const TensorMap& x_map, const TensorMap& other_map,
                                        const TensorMap& t_map, Work* works, u32 ring, u32 bars, int lane) {
    constexpr u32 STAGE = C::stage_bytes(MAX_B);
    const u64 policy = evict_first();
    int stage = 0;
    u32 phase = 1;
    for (int index = blockIdx.x; index < schedule.total(); index += gridDim.x) {
        Work work = schedule.at(index);
        const bool of_v = C::MULTIPLIES_V && work.split;
        const Expert e = of_v ? p.add.v[work.expert] : p.bank.expert(work.expert);
        if (of_v && !e.records) {
            if (lane == 0) atomicAdd(p.add.done, min(4 * WGS, p.add.v_row_blocks - work.row_block));
            continue;
        }
        work.bits = e.word_bits, work.centre = e.centre;
        work.u = FB > 0 && (MODE != DENSE || C::BYTES || work.split == 0) ? p.add.u[work.expert].records : nullptr;
        const u32 size = of_v ? Record<U, UNIT>::bytes(FB) : Record<U, G>::bytes(B ? B : e.word_bits);
        const int groups = min(MI * WGS, ((of_v ? p.add.v_row_blocks : p.row_blocks) - work.row_block + 3) / 4);
        const u8* from = e.records + (u64)work.row_block * p.records * size;
        constexpr bool SPLIT = MODE == PLAIN || (MODE == DENSE && !C::BYTES);
        const int first = work.template first_record<SPLIT>(p), end = first + work.template records<SPLIT>(p);
        const bool narrow = NARROW<NT, MI, B> < NT && work.tokens <= NARROW<NT, MI, B>;
        const u32 x_bytes = narrow ? KW * 4 * NARROW<NT, MI, B> * 128 : C::X_BYTES;
        constexpr int RECORDS = KW * C::STEP;
        for (int record = first; record < end; record += RECORDS) {
            const u32 full = bars + 16 * stage, to = ring + stage * STAGE, bytes = min(RECORDS, end - record) * 4 * size;
            mbarrier_wait(full + 8, phase);
            if (lane == 0) {
                if (record == first) works[stage] = work;
                mbarrier_expect(full, groups * bytes + x_bytes + C::STAGE_SUMS);
                tensor_copy(to, narrow ? &other_map : &x_map, 0, work.token, record * U, full);
                for (int i = 0; i < groups; ++i)
                    bulk_copy(to + C::X_BYTES + i * RECORDS * 4 * size, from + (u64)(i * p.records + record) * 4 * size, bytes, full,
                              policy);
                if constexpr (C::BYTES) tensor_copy(to + C::sums_at(MAX_B), &other_map, 0, work.token, record, full);
                if constexpr (AFTER) tensor_copy(to + C::sums_at(MAX_B), &other_map, 0, work.token, record * U / 2, full);
            }
            if (++stage == p.stages) stage = 0, phase ^= 1;
        }
        if constexpr (FB > 0 && !C::BYTES) {
            const int units = work.u ? (p.add.columns + UNIT - 1) / UNIT : 0;
            for (int unit = 0; unit < units; ++unit) {
                const u32 full = bars + 16 * stage;
                mbarrier_wait(full + 8, phase);
                if (lane == 0) {
                    mbarrier_expect(full, NT * 128);
                    tensor_copy(ring + stage * STAGE, &t_map, 0, work.token, unit, full);
                }
                if (++stage == p.stages) stage = 0, phase ^= 1;
            }
        }
    }
    mbarrier_wait(bars + 16 * stage + 8, phase);
    if (lane == 0) works[stage].expert = -1, mbarrier_arrive(bars + 16 * stage);
}

template <int N> struct Size {
    static constexpr int VALUE = N;
};

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
            const float* y = acc[mi] + 4 * octet;
            asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
                         ::"r"(at(mi, octet)), "f"(y[0]), "f"(y[1]), "f"(y[2]), "f"(y[3]) : "memory");
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

// FB is the bits of compensators' factors, 0 for none, and FU the units of u's records.
template <int B, int MAX_B, int U, int G, bool BF16, int NT, int MODE, int MI, int WGS, int KW, int BLOCKS, bool AFTER,
          int FB, int FU>
__global__ void __launch_bounds__(Config<U, G, NT, MI, WGS, KW, FB, AFTER>::THREADS, BLOCKS)
    grouped(const Arguments p, const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap other_map,
            const __grid_constant__ TensorMap t_map) {
    using C = Config<U, G, NT, MI, WGS, KW, FB, AFTER>;
    constexpr u32 STAGE = C::stage_bytes(MAX_B);
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ __align__(8) u64 bar[2 * 16];
    __shared__ Work works[16];
    __shared__ int tiles[MODE == DENSE ? 1 : MAX_EXPERTS + 1], firsts[MODE == DENSE ? 1 : MAX_EXPERTS + 1];
    __shared__ __align__(16) u8 corners[WGS * 4][(NT < 32 ? NT : 32) * 32];
    constexpr bool BYTES_NEXT = MODE == GATE_UP && C::BYTES && C::H_UNITS > 0;
    constexpr bool SUMS_NEXT = MODE == GATE_UP && AFTER && C::H_UNITS > 0;
    constexpr bool SPLIT = MODE == PLAIN || (MODE == DENSE && !C::BYTES);
    __shared__ Columns all_columns[2][MODE == DOWN ? NT : 1];            // of this tile and the next
    __shared__ __align__(16) uint4 all_octets[2][BYTES_NEXT ? C::ROW_BLOCKS * NT : 1];  // likewise; [unit][token][row block]
    __shared__ float all_sums[2][SUMS_NEXT ? C::ROW_BLOCKS * NT : 1];                     // likewise; [row block][token]
    __shared__ float sums[KW > 1 ? (KW - 1) * MI * WGS * 64 * NT : 1];
    const int thread = threadIdx.x, lane = thread % WARP;
    const u32 ring = (shared_address(shared) + 1023) / 1024 * 1024, bars = shared_address(bar);

    if (thread == 0) {
        for (int s = 0; s < p.stages; ++s) mbarrier_init(bars + 16 * s, 1), mbarrier_init(bars + 16 * s + 8, C::CONSUMERS / WARP);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    await_producers();
    allow_dependents();
    if (MODE != DENSE && thread < WARP) count_tiles<NT, MODE>(p, tiles, firsts, lane);
    __syncthreads();
    Schedule<NT, NARROW<NT, MI, B>, C::ROW_BLOCKS, MODE> schedule;
    auto row_tiles = [](int row_blocks) { return (row_blocks + C::ROW_BLOCKS - 1) / C::ROW_BLOCKS; };
    schedule.own_row_tiles = row_tiles(p.row_blocks) * (MODE == PLAIN ? p.splits : 1);
    schedule.v_row_tiles = C::MULTIPLIES_V ? row_tiles(p.add.v_row_blocks) : 0;
    schedule.first = firsts, schedule.tiles = tiles, schedule.num_experts = p.num_experts, schedule.all_tokens = p.tokens;
    schedule.splits = p.splits, schedule.first_tile = p.first_tile, schedule.some = p.tiles;
    schedule.token_tiles = MODE == DENSE ? (p.tokens + NT - 1) / NT : tiles[p.num_experts];

    if (thread >= C::CONSUMERS) {  // producer
        if constexpr (C::MANY_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(AFTER ? 56 : 40));
        if (thread >= C::CONSUMERS + WARP) return;
        produce<C, B, MAX_B, U, G, NT, MODE, MI, WGS, KW, FB, AFTER>(p, schedule, x_map, other_map, t_map, works, ring, bars, lane);
    } else {  // consumers
        if constexpr (C::MANY_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(AFTER ? 104 : 232));
        // through a shuffle, so that the compiler knows it to be the same for the whole warp, and with it the addresses of
        // tiles: they then live in uniform registers and cost the other pipes nothing
        const int group = __shfl_sync(~0u, thread / 128, 0), wg = group % WGS, kw = group / WGS, warp = thread / WARP % 4;
        int stage = 0;
        u32 phase = 0;
        int turn = 0;
        bool t_is_there = false;
        for (;; turn ^= 1) {
            mbarrier_wait(bars + 16 * stage, phase);
            const Work work = works[stage].template uniform<(FB > 0)>();
            if (work.expert < 0) return;
            Columns *columns = all_columns[turn], column;
            const bool has_column = MODE == DOWN && thread < NT && thread < work.tokens;
            if (has_column) column = {p.pairs[work.token + thread], p.weights[work.token + thread]};
            const int bits = B ? B : work.bits, records = work.template records<SPLIT>(p);
#define WHERE ring, STAGE, bars, p.stages, stage, phase, records, wg, kw, lane, warp
#define BYTES(...)                                                                                                          \
    accumulate_bytes<C, __VA_ARGS__, Record<U, G>::SEGMENTS, WGS, KW>(acc, ring, STAGE, C::sums_at(MAX_B), bars, p.stages,   \
                                                                      stage, phase, records, wg, kw, lane, warp, live)
            const int row_block = work.row_block + wg * MI * 4 + warp;  // of this warp and its first row tile
            const bool live = work.row_block + wg * 4 < (C::MULTIPLIES_V && work.split ? p.add.v_row_blocks : p.row_blocks);
            if constexpr (C::MULTIPLIES_V)
                if (work.split) {
                    float acc[1][NT / 2] = {};
                    BYTES(FB, U, UNIT);
                    if constexpr (KW > 1) add_columns<NT, MI, WGS, KW, C::CONSUMERS>(acc, sums, wg, kw, thread);
                    if (kw == 0) store_t<BF16>(p.add, work, row_block, acc[0], lane);
                    continue;
                }
            Compensator<FB ? FB : 1, FU ? FU : 1, BF16> compensator;
            if constexpr (C::MULTIPLIES_V)
                if (kw == 0) compensator.begin(p.add, work, row_block < p.row_blocks ? row_block : row_block % 4, t_is_there, lane);
            uint4* octets = BYTES_NEXT && p.next.bytes ? all_octets[turn] : nullptr;
            float* octet_sums = SUMS_NEXT && p.next.sums ? all_sums[turn] : nullptr;
            // sums live and end inside: shared by both sizes they made the compiler wait for every product
            auto run = [&](auto size) {
                constexpr int N = decltype(size)::VALUE;
                float acc[MI][N / 2];
#pragma unroll
                for (int mi = 0; mi < MI; ++mi)
#pragma unroll
                    for (int i = 0; i < N / 2; ++i) acc[mi][i] = 0.f;
                if constexpr (!C::BYTES) {
                    Added<FB ? FB : 1, FU ? FU : 1, BF16, MI> added(p.add, work.u, row_block, p.row_blocks);
                    if (FB > 0 && work.u && kw == 0) {
                        if constexpr (AFTER) added.prefetch(lane);
                        else added.load(0, lane);
                    }
                    if constexpr (AFTER)
                        accumulate_codes<C, B, U, G, BF16, NT, N, FB>(acc, added, ring, STAGE, C::sums_at(MAX_B), bars, p.stages,
                                                                           stage, phase, records, wg, lane, warp);
                    else accumulate<C, B, MAX_B, U, G, BF16, NT, N, MI, WGS, KW, FB>(acc, added, WHERE, bits, work.centre);
                } else {
                    if constexpr (B) BYTES(B, U, G);
                    else if (bits == 1) BYTES(1, U, G);
                    else if (bits == 2) BYTES(2, U, G);
                    else if (bits == 3) BYTES(3, U, G);
                    else if (MAX_B == 4 || bits == 4) BYTES(4, U, G);
                    else BYTES(MAX_B, U, G);
                }
                if (has_column) columns[thread] = column;  // not before: they are still on their way
                if constexpr (KW > 1) add_columns<N, MI, WGS, KW, C::CONSUMERS>(acc, sums, wg, kw, thread);
                if (KW == 1 && MODE == DOWN) named_barrier(1, C::CONSUMERS);  // columns are there
                if (kw > 0) return;
                if constexpr (MODE == DENSE && !C::BYTES)
                    if (p.splits > 1) {
                        store_sum<BF16, N, MI, WGS>(p, work, acc, ring, shared_address(corners[thread / WARP]), wg, thread);
                        return;
                    }
                if constexpr (C::MULTIPLIES_V)
                    if (compensator.u) {
                        if (!t_is_there) {
                            await_count(p.add.done, schedule.token_tiles * p.add.v_row_blocks, lane);
                            t_is_there = true;
                            compensator.load_row(p.add, 0, lane);
                        }
                        compensator.add(acc[0], p.add, lane);
                    }
#pragma unroll
                for (int mi = 0; mi < MI; ++mi) {
                    const int block = (wg * MI + mi) * 4 + warp;
                    store_rows<BF16, N, MODE>(p, work, columns, shared_address(corners[thread / WARP]),
                                              octets ? octets + block / 8 * 8 * NT + block % 8 : nullptr,
                                              octet_sums ? octet_sums + block * NT : nullptr, work.row_block + block, acc[mi], lane);
                }
            };
            if constexpr (AFTER) {
                if (work.tokens <= 8) run(Size<8>{});
                else if (work.tokens <= 16) run(Size<16>{});
                else run(Size<NT>{});
            } else if (NARROW<NT, MI, B> < NT && work.tokens <= NARROW<NT, MI, B>) run(Size<NARROW<NT, MI, B>>{});
            else run(Size<NT>{});
#undef BYTES
#undef WHERE
            if constexpr (BYTES_NEXT)
                if (kw == 0 && octets) {
                    named_barrier(2, WGS * 128);
                    if (thread < 8 * C::H_UNITS * NT) store_bytes<G, BF16, NT, C::H_UNITS>(p, work, octets, thread);
                }
            if constexpr (SUMS_NEXT)
                if (octet_sums) {
                    named_barrier(2, WGS * 128);
                    if (128 * group < C::H_UNITS * NT) store_sums<BF16, NT, C::H_UNITS>(p, work, octet_sums, thread);
                }
        }
    }
}

// SPDX-License-Identifier: Apache-2.0
// What `grouped` is told, and how it cuts a problem into tiles.
#pragma once
#include "bytes.cuh"

// What a product after this one takes of y besides y, as `prepare_rows` makes it: bytes, or the sums that go with 16 bits.
struct Next {
    u32* bytes;    // [pairs][units][UNIT_WORDS]; null: not needed
    float* sums;   // with bytes [records][pairs][floats], else [pairs][floats], one a unit; null: not needed
    int units;     // of a row
    int record_units;
    int segments;  // of a unit
    int floats;    // of a record and token, or of a token
};

struct Compensators {
    Bank u;  // [num_experts] rows of W by columns of t; an expert without records has none
    int u_records, columns;  // of t: in tiles of 8 tokens 8, 16, 32 or a multiple of 64, else a multiple of 64
    // where v is multiplied by the same launch (`Config`)
    Bank v;           // as u, rows of t by k
    u16* t;           // tiles of 8 tokens [pairs or tokens, t_columns] in the order of `t_place`, 0 before; others [pairs, columns]
    int v_row_blocks;
    // but for tiles of 8 tokens
    int* done;                      // row blocks of t that are stored, of all tokens' tiles, by each warpgroup; 0 before
    int v_splits, v_split_records;  // parts of v's columns, and records of one
    float* parts;                   // of t, where splits are several: [tiles of v][splits][warps][32][4]
    int* arrived;                   // [tiles of v][warps] how many of the splits are there, 0 before
};

struct Arguments {
    u16* y;                 // DENSE [tokens, ld]; GATE_UP [pairs, ld] or null, PLAIN [pairs, splits * n] in sorted order; DOWN
                            // [tokens * slots, ld]
    const u16* bias;        // DENSE [n] or null
    Bank bank;              // PLAIN: experts without records are left out, and their rows of y as they are
    const int* first;       // [num_experts + 1] first sorted pair of each expert; DENSE null
    const int* pairs;       // [pairs] token * slots + slot, sorted by expert; DENSE null
    const float* weights;   // DOWN [pairs], sorted as they are
    Compensators add;       // before SiLU and weights
    Next next;              // GATE_UP
    int tokens, slots, num_experts;
    int n, ld;              // columns of y and elements from row to row, a multiple of 8; GATE_UP: the intermediate size, half of W's rows
    int records;            // of a row block
    int row_blocks;
    int stages;
    int splits;             // parts of the columns: PLAIN with a result each, DENSE blocks of a cluster; else 1
    int split_records;      // of a part
    int first_tile, tiles;  // DENSE, but for tiles of 8 tokens: what this launch runs
    int tiles_known;        // 1: tiles can be counted while the launch ahead of this one runs, which does not make `first`, or of ids
    const void* ids;        // GATE_UP, which counts these instead of reading `first`: [tokens * slots], as `place_rows` has them; or null
    int ids_wide;           // int64, else int32
};

constexpr int MAX_EXPERTS = 512, MAX_SPLITS = 4;

// Tensor maps of the activations, DENSE of the tokens, else of the sorted pairs: x as [units][rows][64] in boxes of
// [KW * 4, NT or NARROW, 64] with 128-byte swizzle, and for tiles of 8 tokens the same of x's bytes, and their sums as
// [records][rows][..] in boxes of [KW * 4 / U, NT, ..]; where sums are scaled, of units [rows][..] in [NT, 4].
// t, for wider tiles, as x in boxes of [1, NT, 64].
struct alignas(64) TensorMap {
    u8 opaque[128];
};

// One tile of work: an expert, a range of its sorted pairs, a range of row blocks, a part of the columns. The producer finds it and
// leaves it with the tile's first stage: found by every warp it took a third of the instructions of short K.
struct alignas(16) Work {
    int expert;  // -1: no more
    int token, tokens, row_block;
    int split;   // the part; of v one more, and 0 says that the tile is of W
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
template <int NT, int N, int TILE_BLOCKS, int V_BLOCKS, int MODE> struct Schedule {
    const int *tiles, *first;  // [num_experts + 1] token tiles and pairs before each expert
    int own_row_tiles, v_row_tiles, v_splits, token_tiles, num_experts, all_tokens, splits;
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
        return {low, first[low] + start, begin(all, tile + 1, own) - start,
                of_v ? row / v_splits * V_BLOCKS : (MODE == PLAIN ? row / splits : row) * TILE_BLOCKS,
                of_v ? 1 + row % v_splits : MODE == PLAIN ? row % splits : 0};
    }
    // Where the i-th of n tiles begins: wide ones first.
    static __device__ int begin(int all, int i, int n) {
        const int wide = NT == N ? n : max(0, (all - n * N + NT - N - 1) / (NT > N ? NT - N : 1));
        return min(all, i * N + min(i, wide) * (NT - N));
    }
};

// The width of the v that is multiplied in W's launch, 0 where t is made before.
template <int NT, bool AFTER, int FB> constexpr int V_BITS = NT == 8 || AFTER ? FB : 0;

// FB is those `V_BITS`.
template <int U, int G, int NT, int MI, int WGS, int KW, int FB, bool AFTER> struct Config {
    static constexpr int ROW_BLOCKS = 4 * MI * WGS;           // of a tile
    static constexpr int CONSUMERS = WGS * KW * 128;
    // more than an even share; a whole warpgroup then gives some up
    static constexpr bool MANY_REGISTERS = MI * NT >= 128 || AFTER;
    static constexpr int THREADS = CONSUMERS + (MANY_REGISTERS ? 128 : WARP);
    static constexpr int STEP = 4 / U;                        // records of a warpgroup in a stage: 256 columns
    static constexpr int X_BYTES = KW * 4 * NT * 128;         // of a stage
    // Up to 8 tokens codes are multiplied as bytes and their sums scaled, AFTER with their base; with more it is cheaper to
    // scale the weights.
    static constexpr bool BYTES = NT == 8 && MI == 1;
    static constexpr int H_UNITS = ROW_BLOCKS / 8;            // units of the intermediate that a tile of GATE_UP has
    static constexpr int SEGMENTS = U * Record<U, G>::SEGMENTS;
    static constexpr int SUM_BYTES = 4 * SUM_FLOATS * (SEGMENTS > 2 ? SEGMENTS : 2);  // of one token and record
    static constexpr int STAGE_SUMS = BYTES ? KW * STEP * NT * SUM_BYTES : AFTER ? 16 * NT : 0;  // bytes
    static constexpr bool MULTIPLIES_V = FB > 0;
    static constexpr int V_BLOCKS = BYTES ? ROW_BLOCKS : 4;    // row blocks of a tile of v
    // A stage: x [KW * 4][NT][64], records [MI * WGS][KW * STEP][4], sums: BYTES [KW * STEP][NT][..], AFTER [NT][4]. When
    // a tile of v ends, but for BYTES, what each warpgroup has of it.
    static __device__ __host__ constexpr int sums_at(int max_b) {
        const int own = ROW_BLOCKS * Record<U, G>::bytes(max_b), v = MULTIPLIES_V ? V_BLOCKS * Record<U, UNIT>::bytes(FB) : 0;
        const int used = X_BYTES + KW * STEP * (own > v ? own : v), sums = MULTIPLIES_V && !BYTES ? WGS * 64 * NT * 4 : 0;
        return ((used > sums ? used : sums) + 127) / 128 * 128;
    }
    static __device__ __host__ constexpr int stage_bytes(int max_b) {
        return (sums_at(max_b) + STAGE_SUMS + 1023) / 1024 * 1024;
    }
};

// Token tiles and pairs before each expert, by all threads, from what the tokens chose.
template <int NT> __device__ __forceinline__ void count_ids(const Arguments& p, int* tiles, int* first, int thread) {
    constexpr int BATCH = 4;
    for (int e = thread; e <= p.num_experts; e += blockDim.x) first[e] = 0;
    __syncthreads();
    const int pairs = p.tokens * p.slots;
    for (int from = thread; from < pairs; from += BATCH * blockDim.x) {
        long long id[BATCH];
#pragma unroll
        for (int j = 0; j < BATCH; ++j) {
            const int i = from + j * blockDim.x;
            // from L2, as below
            if (i >= pairs) id[j] = -1;
            else id[j] = p.ids_wide ? __ldcg((const long long*)p.ids + i) : __ldcg((const int*)p.ids + i);
        }
#pragma unroll
        for (int j = 0; j < BATCH; ++j)
            if (id[j] >= 0 && id[j] < p.num_experts) atomicAdd(first + 1 + id[j], 1);
    }
    __syncthreads();
    if (thread >= WARP) return;
    int before_tiles = 0, before = 0;
    for (int from = 0; from < p.num_experts; from += WARP) {
        const int e = from + thread, own = e < p.num_experts ? first[1 + e] : 0;
        int sum = own, sum_tiles = (own + NT - 1) / NT;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int left = __shfl_up_sync(~0u, sum, step), left_tiles = __shfl_up_sync(~0u, sum_tiles, step);
            if (thread >= step) sum += left, sum_tiles += left_tiles;
        }
        if (e < p.num_experts) first[1 + e] = before + sum, tiles[1 + e] = before_tiles + sum_tiles;
        before += __shfl_sync(~0u, sum, WARP - 1), before_tiles += __shfl_sync(~0u, sum_tiles, WARP - 1);
    }
    if (thread == 0) tiles[0] = 0;
}

// The same from `first`, by one warp, which asks for all of them at once.
template <int NT, int MODE> __device__ __forceinline__ void count_tiles(const Arguments& p, int* tiles, int* first, int lane) {
    constexpr int BATCH = 4;
    int before = 0;
    for (int from = lane; from - lane < p.num_experts; from += BATCH * WARP) {
        int begin[BATCH], end[BATCH];
        bool runs[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int e = from + i * WARP;
            // from L2: while the launch ahead runs L1 may have what was there before
            begin[i] = e <= p.num_experts ? __ldcg(p.first + e) : 0, end[i] = e < p.num_experts ? __ldcg(p.first + e + 1) : 0;
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

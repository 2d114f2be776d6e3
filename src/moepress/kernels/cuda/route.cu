// SPDX-License-Identifier: Apache-2.0
// What surrounds the grouped products of many tokens: the pairs of token and expert sorted by expert, their activations
// in that order, and the sum over a token's experts. Sorting is stable and sums have a fixed order, so results repeat
// bitwise.
#include "bytes.cuh"

__device__ __forceinline__ long long read_id(const void* ids, int wide, int i) {
    return wide ? ((const long long*)ids)[i] : (long long)((const int*)ids)[i];
}

enum WeightType { FLOAT32, BFLOAT16, FLOAT16 };

__device__ __forceinline__ float read_weight(const void* weights, int type, int i) {
    if (type == FLOAT32) return ((const float*)weights)[i];
    return type == BFLOAT16 ? widen<true>(((const u16*)weights)[i]) : widen<false>(((const u16*)weights)[i]);
}

struct SortArguments {
    const void* ids;      // [pairs], int64 where ids_wide, else int32; outside 0..num_experts-1: run nothing
    const void* weights;  // [pairs]
    int* first;           // [num_experts + 1]
    int* sorted;          // [pairs]
    float* sorted_weights;
    int ids_wide, weight_type, count, num_experts;
};

constexpr int SORT_WARPS = 32, SORT_THREADS = SORT_WARPS * WARP;
constexpr int NOBODY = 0xffff;  // the expert of a pair that is not run

// One block. Each warp counts its own run of pairs, the counts become offsets, each warp places its run. Ids are read
// once, many at a time: reading them again in both passes took most of the time.
extern "C" __global__ void __launch_bounds__(SORT_THREADS, 1) sort_pairs(const SortArguments p) {
    extern __shared__ int counts[];  // [SORT_WARPS][num_experts], starts [num_experts], expert of each pair as u16
    __shared__ int warp_sums[SORT_WARPS];
    int* starts = counts + SORT_WARPS * p.num_experts;
    u16* experts = reinterpret_cast<u16*>(starts + p.num_experts);
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int run = (p.count + SORT_THREADS - 1) / SORT_THREADS * WARP;
    const int begin = warp * run, end = min(p.count, begin + run);
    for (int i = threadIdx.x; i < SORT_WARPS * p.num_experts; i += SORT_THREADS) counts[i] = 0;
    await_producers();
#pragma unroll 8
    for (int i = threadIdx.x; i < p.count; i += SORT_THREADS) {
        const long long id = read_id(p.ids, p.ids_wide, i);
        experts[i] = id >= 0 && id < p.num_experts ? u16(id) : u16(NOBODY);
    }
    __syncthreads();
    int* own = counts + warp * p.num_experts;
    for (int at = begin; at < end; at += WARP) {
        const int e = at + lane < end ? experts[at + lane] : NOBODY;
        const u32 same = __match_any_sync(~0u, e);
        if (e != NOBODY && lane == __ffs(same) - 1) own[e] += __popc(same);
        __syncwarp();
    }
    __syncthreads();
    int total = 0;  // of expert threadIdx.x
    if (threadIdx.x < p.num_experts)
#pragma unroll 8
        for (int w = 0; w < SORT_WARPS; ++w) {
            const int here = counts[w * p.num_experts + threadIdx.x];
            counts[w * p.num_experts + threadIdx.x] = total;
            total += here;
        }
    int sum = total;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const int left = __shfl_up_sync(~0u, sum, step);
        if (lane >= step) sum += left;
    }
    if (lane == WARP - 1) warp_sums[warp] = sum;
    __syncthreads();
    int before = 0;
    for (int w = 0; w < warp; ++w) before += warp_sums[w];
    if (threadIdx.x < p.num_experts) starts[threadIdx.x] = p.first[threadIdx.x] = before + sum - total;
    if (threadIdx.x == p.num_experts - 1) p.first[p.num_experts] = before + sum;
    __syncthreads();
    for (int at = begin; at < end; at += WARP) {
        const int e = at + lane < end ? experts[at + lane] : NOBODY;
        const u32 same = __match_any_sync(~0u, e);
        if (e != NOBODY) {
            const int place = starts[e] + own[e] + __popc(same & ((1u << lane) - 1));
            p.sorted[place] = at + lane, p.sorted_weights[place] = read_weight(p.weights, p.weight_type, at + lane);
        }
        __syncwarp();
        if (e != NOBODY && lane == __ffs(same) - 1) own[e] += __popc(same);
        __syncwarp();
    }
    allow_dependents();
}

struct CombineArguments {
    const u16* parts;  // [tokens * slots, n], weighted
    u16* y;            // [tokens, n]
    const void* ids;   // [tokens * slots]; null: all run
    int ids_wide, slots, num_experts, n, tokens;
};

// y[token] = the sum of its slots that ran, in slot order, in float32. A thread has eight columns, and asks for several
// slots' at once: one after the other they took most of a microsecond each.
template <bool BF16> __global__ void __launch_bounds__(256) combine(const CombineArguments p) {
    constexpr int BATCH = 8;
    await_producers();
    allow_dependents();
    const int octets = (p.n + 7) / 8;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.tokens * octets; i += gridDim.x * blockDim.x) {
        const int token = i / octets, n = i % octets * 8;
        const u16* from = p.parts + (u64)token * p.slots * p.n + n;
        float sum[8] = {};
        for (int first = 0; first < p.slots; first += BATCH) {
            uint4 v[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                const int slot = first + j;
                const long long id = slot < p.slots && p.ids ? read_id(p.ids, p.ids_wide, token * p.slots + slot) : 0;
                v[j] = make_uint4(0, 0, 0, 0);
                if (slot < p.slots && id >= 0 && id < p.num_experts) v[j] = *reinterpret_cast<const uint4*>(from + (u64)slot * p.n);
            }
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                const u32 word[4] = {v[j].x, v[j].y, v[j].z, v[j].w};
#pragma unroll
                for (int t = 0; t < 4; ++t) sum[2 * t] += Half<BF16>::lo(word[t]), sum[2 * t + 1] += Half<BF16>::hi(word[t]);
            }
        }
        uint4 out;
        out.x = Half<BF16>::pack(sum[0], sum[1]), out.y = Half<BF16>::pack(sum[2], sum[3]);
        out.z = Half<BF16>::pack(sum[4], sum[5]), out.w = Half<BF16>::pack(sum[6], sum[7]);
        *reinterpret_cast<uint4*>(p.y + (u64)token * p.n + n) = out;
    }
}

// Rows as `grouped` reads them: 16-bit numbers, bytes, or both.
struct RowsOut {
    u16* rows;    // [rows, 64 * units], zeros past the end; null: not needed
    u32* bytes;   // [rows][units][UNIT_WORDS] or null
    float* sums;  // with bytes, of their segments: [records][count][sum_floats]
    int* zeros;   // [zero_count] that are set to 0: counters of the products that follow
    int count, units, record_units, sum_floats, zero_count;

    __device__ __forceinline__ void clear() const {
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < zero_count; i += gridDim.x * blockDim.x) zeros[i] = 0;
    }
};

// One octet of columns on its way to its rows: a lane's four words of 16 bits, and four of bytes.
struct Piece {
    u32 octet[4];
    uint4 bytes;  // words 4 pair to 4 pair + 3 of the unit: whole pieces of 16 bytes
    float scale, sum;

    // All lanes, of which each has the octet o with o % 8 == lane % 8; `corner` is the warp's own.
    template <int G, bool BF16> __device__ __forceinline__ void make_bytes(u32 (&corner)[4 * WARP], int lane) {
        Bytes made;
        made.make<G, BF16>(octet, lane % 8);
        u32* unit = corner + lane / 8 * UNIT_WORDS;
#pragma unroll
        for (int i = 0; i < 2; ++i) unit[Bytes::at(lane % 8, i)] = made.high[i], unit[Bytes::at(lane % 8, i) + 16] = made.low[i];
        __syncwarp();
        bytes = reinterpret_cast<const uint4*>(corner)[lane];
        scale = made.scale, sum = made.sum;
        __syncwarp();
    }
    // As octet `o` of row `row`.
    template <int G> __device__ __forceinline__ void store(const RowsOut& out, int row, int o) const {
        const u64 unit = (u64)row * out.units + o / 8;
        if (out.rows) *reinterpret_cast<uint4*>(out.rows + unit * 64 + o % 8 * 8) = make_uint4(octet[0], octet[1], octet[2], octet[3]);
        if (!out.bytes) return;
        reinterpret_cast<uint4*>(out.bytes)[unit * (UNIT_WORDS / 4) + o % 8] = bytes;
        if (!Bytes::has_sums<G>(o % 8)) return;
        const int record = o / 8 / out.record_units, segment = (o - record * out.record_units * 8) / (G == 32 ? 4 : 8);
        *reinterpret_cast<float2*>(out.sums + ((u64)record * out.count + row) * out.sum_floats + segment * SUM_FLOATS) =
            make_float2(scale, sum);
    }
};

constexpr int ROWS_THREADS = 256;

struct PrepareArguments {
    const u16* x;      // [tokens, k] where `pairs`, else [rows, k]
    RowsOut out;
    const int* pairs;  // row i is x[pairs[i] / slots]; null: x is in order already
    const int* count;  // how many rows there are, at most `rows`; null: all
    int rows, k, slots;
};

// Activations in sorted order. A thread has an octet of columns.
template <int G, bool BF16> __global__ void __launch_bounds__(ROWS_THREADS) prepare_rows(const PrepareArguments p) {
    __shared__ __align__(16) u32 corners[ROWS_THREADS / WARP][4 * WARP];
    await_producers();
    allow_dependents();
    p.out.clear();
    const int octets = 8 * p.out.units, rows = p.count ? *p.count : p.rows, all = rows * octets;
    for (int first = blockIdx.x * ROWS_THREADS; first < all; first += gridDim.x * ROWS_THREADS) {
        const int at = first + threadIdx.x, row = at / octets, o = at - row * octets;
        Piece piece = {};
        if (at < all) load_octet<BF16>(piece.octet, p.x + (u64)(p.pairs ? p.pairs[row] / p.slots : row) * p.k, 8 * o, p.k);
        if (p.out.bytes) piece.make_bytes<G, BF16>(corners[threadIdx.x / WARP], threadIdx.x % WARP);
        if (at < all) piece.store<G>(p.out, row, o);
    }
}

// ---- both at once, for few pairs ----------------------------------------------------------------------------------

struct PlaceArguments {
    const u16* x;     // [tokens, k]
    const void* ids;  // [tokens, slots], and weights, as `sort_pairs` takes them
    const void* weights;
    int* first;       // [num_experts + 1]
    int* pairs;       // [tokens * slots]
    float* sorted_weights;
    RowsOut out;      // of tokens * slots rows
    int ids_wide, weight_type, tokens, slots, num_experts, k;
};

constexpr int PLACE_WARPS = ROWS_THREADS / WARP;
constexpr int PLACE_PAIRS = 8192;  // the most
constexpr int PLACE_SLOTS = 32;    // of a token, the most

// How many of the keys are below `key`, by a warp; the last keys are filled up to whole quads with larger ones.
__device__ __forceinline__ int count_below(const u32* keys, int quads, u32 key, int lane) {
    int below = 0;
    for (int i = lane; i < quads; i += WARP) {
        const uint4 other = reinterpret_cast<const uint4*>(keys)[i];
        below += (other.x < key) + (other.y < key) + (other.z < key) + (other.w < key);
    }
    return __reduce_add_sync(~0u, below);
}

// `sort_pairs` and `prepare_rows` in one launch without a sort: the place of a pair is the number of pairs before it,
// so whoever needs one counts, and all blocks count side by side. A pair's key is (expert, pair): what is below it comes
// before it, and what is below (expert, 0) before the expert. A token's octet is read once, while the ids are on their
// way, and written for all of its slots.
template <int G, bool BF16> __global__ void __launch_bounds__(ROWS_THREADS) place_rows(const PlaceArguments p) {
    __shared__ __align__(16) u32 keys[PLACE_PAIRS];
    __shared__ __align__(16) u32 corners[PLACE_WARPS][4 * WARP];
    __shared__ int places[PLACE_SLOTS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, pairs = p.tokens * p.slots, quads = (pairs + 3) / 4;
    const int octets = 8 * p.out.units, chunks = (octets + ROWS_THREADS - 1) / ROWS_THREADS, items = p.tokens * chunks;
    await_producers();
    allow_dependents();
    Piece piece;
    auto read_octet = [&](int item) {
        const int token = item / chunks, o = item % chunks * ROWS_THREADS + threadIdx.x;
        piece = {};
        if (token < p.tokens && o < octets) load_octet<BF16>(piece.octet, p.x + (u64)token * p.k, 8 * o, p.k);
    };
    read_octet(blockIdx.x);
    p.out.clear();
    for (int i = threadIdx.x; i < 4 * quads; i += ROWS_THREADS) {
        const long long id = i < pairs ? read_id(p.ids, p.ids_wide, i) : -1;
        keys[i] = u32(id >= 0 && id < p.num_experts ? int(id) : NOBODY) << 16 | u32(i);
    }
    __syncthreads();
    for (int item = blockIdx.x; item < items; item += gridDim.x) {
        const int token = item / chunks, o = item % chunks * ROWS_THREADS + threadIdx.x;
        if (item != blockIdx.x) read_octet(item);
        for (int slot = warp; slot < p.slots; slot += PLACE_WARPS) {
            const int pair = token * p.slots + slot;
            const bool runs = keys[pair] >> 16 != NOBODY, writes = lane == 0 && runs && item % chunks == 0;
            const float weight = writes ? read_weight(p.weights, p.weight_type, pair) : 0.f;
            const int place = count_below(keys, quads, keys[pair], lane);
            if (lane == 0) places[slot] = runs ? place : -1;
            if (writes) p.pairs[place] = pair, p.sorted_weights[place] = weight;
        }
        __syncthreads();
        if (p.out.bytes) piece.make_bytes<G, BF16>(corners[warp], lane);
        for (int slot = 0; slot < p.slots; ++slot)
            if (places[slot] >= 0 && o < octets) piece.store<G>(p.out, places[slot], o);
        __syncthreads();
    }
    for (int e = blockIdx.x * PLACE_WARPS + warp; e <= p.num_experts; e += gridDim.x * PLACE_WARPS) {
        const int before = count_below(keys, quads, u32(e) << 16, lane);
        if (lane == 0) p.first[e] = before;
    }
}

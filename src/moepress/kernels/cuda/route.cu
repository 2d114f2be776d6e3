// SPDX-License-Identifier: Apache-2.0
// What surrounds the grouped products of many tokens: activations in the order of their experts, and the sum over a token's
// experts. That order is stable and sums have a fixed one, so results repeat bitwise.
#include "bytes.cuh"

__device__ __forceinline__ long long read_id(const void* ids, int wide, int i) {
    return wide ? ((const long long*)ids)[i] : (long long)((const int*)ids)[i];
}

enum WeightType { FLOAT32, BFLOAT16, FLOAT16 };

__device__ __forceinline__ float read_weight(const void* weights, int type, int i) {
    if (type == FLOAT32) return ((const float*)weights)[i];
    return type == BFLOAT16 ? widen<true>(((const u16*)weights)[i]) : widen<false>(((const u16*)weights)[i]);
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

// Rows as `grouped` reads them: 16-bit numbers, alone or with sums, bytes, or both.
struct RowsOut {
    u16* rows;    // [rows, 64 * units], zeros past the end; null: not needed
    u32* bytes;   // [rows][units][UNIT_WORDS] or null
    float* sums;  // with bytes scale and sum of segments, [records][count][sum_floats]; else of units, [count][sum_floats]
    int* zeros;   // [zero_count, a multiple of 4] that are set to 0: counters of the products that follow, and t
    int count, units, record_units, sum_floats, zero_count;

    __device__ __forceinline__ void clear() const {
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < zero_count / 4; i += gridDim.x * blockDim.x)
            reinterpret_cast<uint4*>(zeros)[i] = make_uint4(0, 0, 0, 0);
    }
};

// One octet of columns on its way to its rows: a lane's four words of 16 bits, and four of bytes.
struct Piece {
    u32 octet[4];
    uint4 bytes;  // words 4 pair to 4 pair + 3 of the unit: whole pieces of 16 bytes
    float scale, sum;  // as in `sums`; a scale with bytes only

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
    // Sums of 64 columns of 16-bit numbers, in float32.
    template <bool BF16> __device__ __forceinline__ void make_sums() {
        sum = 0.f;
#pragma unroll
        for (int t = 0; t < 4; ++t) sum += Half<BF16>::lo(octet[t]) + Half<BF16>::hi(octet[t]);
#pragma unroll
        for (int mask = 1; mask < 8; mask *= 2) sum += __shfl_xor_sync(~0u, sum, mask);
    }
    // As octet `o` of row `row`.
    template <int G> __device__ __forceinline__ void store(const RowsOut& out, int row, int o) const {
        const u64 unit = (u64)row * out.units + o / 8;
        if (out.rows) *reinterpret_cast<uint4*>(out.rows + unit * 64 + o % 8 * 8) = make_uint4(octet[0], octet[1], octet[2], octet[3]);
        if (out.bytes) reinterpret_cast<uint4*>(out.bytes)[unit * (UNIT_WORDS / 4) + o % 8] = bytes;
        if (!out.sums || !Bytes::has_sums<G>(o % 8)) return;
        if (!out.bytes) {
            out.sums[(u64)row * out.sum_floats + o / 8] = sum;
            return;
        }
        const int record = o / 8 / out.record_units, segment = (o - record * out.record_units * 8) / (G == 32 ? 4 : 8);
        *reinterpret_cast<float2*>(out.sums + ((u64)record * out.count + row) * out.sum_floats + segment * SUM_FLOATS) =
            make_float2(scale, sum);
    }
};

constexpr int ROWS_THREADS = 256;

struct PrepareArguments {
    const u16* x;  // [rows, k]
    RowsOut out;
    const int* count;  // how many rows there are, at most `rows`; null: all
    int rows, k;
};

// Rows that are in order already. A thread has an octet of columns.
template <int G, bool BF16> __global__ void __launch_bounds__(ROWS_THREADS) prepare_rows(const PrepareArguments p) {
    __shared__ __align__(16) u32 corners[ROWS_THREADS / WARP][4 * WARP];
    await_producers();
    allow_dependents();
    p.out.clear();
    const int octets = 8 * p.out.units, rows = p.count ? *p.count : p.rows, all = rows * octets;
    for (int first = blockIdx.x * ROWS_THREADS; first < all; first += gridDim.x * ROWS_THREADS) {
        const int at = first + threadIdx.x, row = at / octets, o = at - row * octets;
        Piece piece = {};
        if (at < all) load_octet<BF16>(piece.octet, p.x + (u64)row * p.k, 8 * o, p.k);
        if (p.out.bytes) piece.make_bytes<G, BF16>(corners[threadIdx.x / WARP], threadIdx.x % WARP);
        else if (p.out.sums) piece.make_sums<BF16>();
        if (at < all) piece.store<G>(p.out, row, o);
    }
}

// ---- tokens' rows in the order of their experts ------------------------------------------------------------------------

struct PlaceArguments {
    const u16* x;         // [tokens, k]
    const void* ids;      // [tokens, slots], int64 where ids_wide, else int32; outside 0..num_experts-1: run nothing
    const void* weights;  // [tokens, slots]
    int* first;           // [num_experts + 1]
    int* pairs;           // [tokens * slots]
    float* sorted_weights;
    RowsOut out;  // of tokens * slots rows
    int ids_wide, weight_type, tokens, slots, num_experts, k;
    int chunks;  // of a row, each by blocks of its own
};

constexpr int PLACE_THREADS = 1024;  // the most
constexpr int PLACE_PAIRS = 1024;    // of a block, the most
constexpr int PLACE_EXPERTS = 512;
constexpr int NOBODY = 0xffff;  // the expert of a pair that is not run

// A block has some of the tokens. It counts all pairs by their experts, and apart those before its own; so it knows where its
// own go without asking another block. An octet of a token is read once and written for all of its slots.
struct Placing {
    int total[PLACE_EXPERTS], before[PLACE_EXPERTS];
    int places[PLACE_PAIRS];  // of the block's pairs: first their experts

    __device__ __forceinline__ void count(const PlaceArguments& p, int begin, int own) {
        constexpr int BATCH = 8;
        const int pairs = p.tokens * p.slots;
        for (int from = threadIdx.x; from < pairs; from += BATCH * blockDim.x) {
            int expert[BATCH];
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                const int i = from + j * blockDim.x;
                const long long id = i < pairs ? read_id(p.ids, p.ids_wide, i) : -1;
                expert[j] = id >= 0 && id < p.num_experts ? int(id) : NOBODY;
            }
#pragma unroll
            for (int j = 0; j < BATCH; ++j) {
                const int i = from + j * blockDim.x;
                if (i >= begin && i < begin + own) places[i - begin] = expert[j];
                if (expert[j] == NOBODY) continue;
                atomicAdd(total + expert[j], 1);
                if (i < begin) atomicAdd(before + expert[j], 1);
            }
        }
    }
    // Counts before become the place of each expert's next pair; by one warp.
    __device__ __forceinline__ void locate(const PlaceArguments& p, int lane) {
        const int each = (p.num_experts + WARP - 1) / WARP, from = lane * each, to = min(p.num_experts, from + each);
        int sum = 0;
        for (int e = from; e < to; ++e) sum += total[e];
        int start = sum;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int left = __shfl_up_sync(~0u, start, step);
            if (lane >= step) start += left;
        }
        if (blockIdx.x == 0 && lane == WARP - 1) p.first[p.num_experts] = start;
        start -= sum;
        for (int e = from; e < to; ++e) {
            if (blockIdx.x == 0) p.first[e] = start;
            before[e] += start, start += total[e];
        }
        __syncwarp();
    }
    // Experts of the block's pairs become places, in their order; -1: not run. By one warp.
    __device__ __forceinline__ void rank(int own, int lane) {
        for (int at = lane; at - lane < own; at += WARP) {
            const int e = at < own ? places[at] : NOBODY;
            const u32 same = __match_any_sync(~0u, e);
            if (at < own) places[at] = e == NOBODY ? -1 : before[e] + __popc(same & ((1u << lane) - 1));
            __syncwarp();
            if (e != NOBODY && lane == __ffs(same) - 1) before[e] += __popc(same);
            __syncwarp();
        }
    }
};

template <int G, bool BF16> __global__ void __launch_bounds__(PLACE_THREADS) place_rows(const PlaceArguments p) {
    __shared__ __align__(16) u32 corners[PLACE_THREADS / WARP][4 * WARP];
    __shared__ Placing placing;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, chunk = blockIdx.x % p.chunks;
    const int shares = gridDim.x / p.chunks, share = blockIdx.x / p.chunks;
    const int first = int((u64)p.tokens * share / shares), last = int((u64)p.tokens * (share + 1) / shares);
    const int units = (p.out.units + p.chunks - 1) / p.chunks, octet = chunk * units * 8;
    const int width = max(0, min(units, p.out.units - chunk * units)) * 8, all = (last - first) * width;
    await_producers();
    allow_dependents();
    Piece piece;
    auto read_octet = [&](int at) {
        piece = {};
        if (at < all) load_octet<BF16>(piece.octet, p.x + (u64)(first + at / width) * p.k, 8 * (octet + at % width), p.k);
    };
    read_octet(threadIdx.x);
    p.out.clear();
    for (int e = threadIdx.x; e < p.num_experts; e += blockDim.x) placing.total[e] = placing.before[e] = 0;
    __syncthreads();
    const int begin = first * p.slots, own = (last - first) * p.slots;
    placing.count(p, begin, own);
    __syncthreads();
    if (warp == 0) placing.locate(p, lane), placing.rank(own, lane);
    __syncthreads();
    if (chunk == 0)
        for (int i = threadIdx.x; i < own; i += blockDim.x)
            if (const int place = placing.places[i]; place >= 0)
                p.pairs[place] = begin + i, p.sorted_weights[place] = read_weight(p.weights, p.weight_type, begin + i);
    for (int from = 0; from < all; from += blockDim.x) {
        const int at = from + threadIdx.x;
        if (from > 0) read_octet(at);
        if (p.out.bytes) piece.make_bytes<G, BF16>(corners[warp], lane);
        else if (p.out.sums) piece.make_sums<BF16>();
        if (at >= all) continue;
        const int* places = placing.places + at / width * p.slots;
        for (int slot = 0; slot < p.slots; ++slot)
            if (places[slot] >= 0) piece.store<G>(p.out, places[slot], octet + at % width);
    }
}

// SPDX-License-Identifier: Apache-2.0
// What surrounds the grouped products of many tokens: the pairs of token and expert sorted by expert, and the sum over
// a token's experts. Both are stable and add in a fixed order, so results repeat bitwise.
#include "sums.cuh"

struct SortArguments {
    const void* ids;  // [pairs], int64 where ids_wide, else int32; outside 0..num_experts-1: run nothing
    int* first;       // [num_experts + 1]
    int* sorted;      // [pairs]
    int ids_wide, count, num_experts;
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
        const long long id = p.ids_wide ? ((const long long*)p.ids)[i] : (long long)((const int*)p.ids)[i];
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
        if (e != NOBODY) p.sorted[starts[e] + own[e] + __popc(same & ((1u << lane) - 1))] = at + lane;
        __syncwarp();
        if (e != NOBODY && lane == __ffs(same) - 1) own[e] += __popc(same);
        __syncwarp();
    }
    allow_dependents();
}

struct CombineArguments {
    const u16* parts;  // [tokens * slots, n], weighted
    u16* y;            // [tokens, n]
    const void* ids;   // [tokens * slots]
    int ids_wide, slots, num_experts, n, tokens;
};

// y[token] = the sum of its slots that ran, in slot order, in float32. A thread has eight columns.
template <bool BF16> __global__ void __launch_bounds__(256) combine(const CombineArguments p) {
    await_producers();
    allow_dependents();
    const int octets = (p.n + 7) / 8;
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < p.tokens * octets; i += gridDim.x * blockDim.x) {
        const int token = i / octets, n = i % octets * 8;
        float sum[8] = {};
        for (int slot = 0; slot < p.slots; ++slot) {
            const int pair = token * p.slots + slot;
            const long long id = p.ids_wide ? ((const long long*)p.ids)[pair] : (long long)((const int*)p.ids)[pair];
            if (id < 0 || id >= p.num_experts) continue;
            const uint4 v = *reinterpret_cast<const uint4*>(p.parts + (u64)pair * p.n + n);
            const u32 word[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
            for (int j = 0; j < 4; ++j) sum[2 * j] += Half<BF16>::lo(word[j]), sum[2 * j + 1] += Half<BF16>::hi(word[j]);
        }
        uint4 out;
        out.x = Half<BF16>::pack(sum[0], sum[1]), out.y = Half<BF16>::pack(sum[2], sum[3]);
        out.z = Half<BF16>::pack(sum[4], sum[5]), out.w = Half<BF16>::pack(sum[6], sum[7]);
        *reinterpret_cast<uint4*>(p.y + (u64)token * p.n + n) = out;
    }
}

struct PrepareArguments {
    const u16* x;      // [tokens, k] where `pairs`, else [rows, k]
    u16* sorted;       // [rows, 64 * units], row i is x[pairs[i] / slots] and zeros; null: x is in order already
    float* sums;       // [records][rows][sum_floats], of a record's segments; null: not needed
    const int* pairs;  // [rows] or null
    const int* count;  // how many rows there are, at most `rows`; null: all
    int rows, k, slots, units, record_units, sum_floats;
};

// Activations as `grouped` wants them: rows in sorted order, and where few tokens make a tile the sums of their segments.
// A thread has an octet of columns.
template <int B, int G, bool BF16> __global__ void __launch_bounds__(256) prepare_rows(const PrepareArguments p) {
    constexpr int FLOATS = Sums<B>::FLOATS, SPAN = G == 32 ? 4 : 8;
    await_producers();
    allow_dependents();
    const int octets = 8 * p.units, rows = p.count ? *p.count : p.rows, all = rows * octets;
    for (int first = blockIdx.x * blockDim.x; first < all; first += gridDim.x * blockDim.x) {
        const int at = first + threadIdx.x, row = at / octets, o = at - row * octets, pair = o % 8;
        u32 octet[4] = {0, 0, 0, 0};
        if (at < all) load_octet<BF16>(octet, p.x + (u64)(p.pairs ? p.pairs[row] / p.slots : row) * p.k, 8 * o, p.k);
        if (p.sorted && at < all)
            *reinterpret_cast<uint4*>(p.sorted + (u64)at * 8) = make_uint4(octet[0], octet[1], octet[2], octet[3]);
        if (!p.sums) continue;
        float part[FLOATS];
        segment_sums<B, G, BF16>(part, octet, pair);
        if (at < all && pair % SPAN == 0) {
            const int record = o / 8 / p.record_units, segment = (o / 8 % p.record_units * 8 + pair) / SPAN;
            float* to = p.sums + ((u64)record * p.rows + row) * p.sum_floats + segment * FLOATS;
#pragma unroll
            for (int j = 0; j < FLOATS; ++j) to[j] = part[j];
        }
    }
}

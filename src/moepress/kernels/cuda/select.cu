// SPDX-License-Identifier: Apache-2.0
// Which of its experts a token runs, by a learned selector, and what that makes of the router's ids and weights: one launch
// between router and experts. The definition is kernels/selector/reference.py; router.cu has the router in it as well.
//
// A token's projections P x read all of P, 128 KB at 4096 columns: too much for one multiprocessor while a layer waits for
// it. With few tokens a cluster of CLUSTER blocks shares the columns of one token and adds up through shared memory; with
// many a block has TOKENS of them and reads P once for all. Sums have one order, whatever the grid.
#include "cluster.cuh"
#include "selector.cuh"

struct SelectArguments {
    const u16* x;            // [tokens, columns]
    const void* ids;         // [tokens, slots], int64 where ids_wide, else int32
    const void* weights;     // [tokens, slots], float32 where weights_wide, else as x
    void* new_ids;           // both in the types of the old ones
    void* new_weights;
    Selector selector;
    int ids_wide, weights_wide, renormalises;
    int tokens, slots, num_experts, columns;  // columns a multiple of 8, slots at most 32
};

constexpr int SELECT_WARPS = 8;                 // that multiply
// A token of its own gets a warp of its own that asks for its choices' numbers, two loads that wait for each other, while
// the others multiply.
template <int TOKENS> constexpr int DECIDERS_FROM = TOKENS == 1 ? SELECT_WARPS : 0;
template <int TOKENS> constexpr int SELECT_THREADS = WARP * (SELECT_WARPS + (TOKENS == 1));

// What a lane must know of its choice.
template <int R> struct Choice {
    float weight, z, least, sensitivity[R];  // z without the features
};

// The lane's choice and its expert; asked for before the projections, which take as long.
template <bool BF16, int R>
__device__ __forceinline__ long long load_choice(Choice<R>& choice, const SelectArguments& p, int token, int lane) {
    const bool real = lane < p.slots && token < p.tokens;
    const u64 at = (u64)token * p.slots + lane;
    const long long id = !real ? 0 : p.ids_wide ? ((const long long*)p.ids)[at] : (long long)((const int*)p.ids)[at];
    choice.weight = !real ? 0.f : p.weights_wide ? ((const float*)p.weights)[at] : widen<BF16>(((const u16*)p.weights)[at]);
    choice.least = log_price(*p.selector.dial);
    const long long e = id < 0 || id >= p.num_experts ? 0 : id;
    choice.z = fmaf(*p.selector.power, log_weight(choice.weight), p.selector.offset[e]);
#pragma unroll
    for (int i = 0; i < R; ++i) choice.sensitivity[i] = p.selector.sensitivity[e * R + i];
    return id;
}

template <bool BF16>
__device__ __forceinline__ void store_choice(const SelectArguments& p, int token, int lane, long long id, float weight) {
    const u64 at = (u64)token * p.slots + lane;
    if (p.ids_wide) ((long long*)p.new_ids)[at] = id;
    else ((int*)p.new_ids)[at] = int(id);
    if (p.weights_wide) ((float*)p.new_weights)[at] = weight;
    else ((u16*)p.new_weights)[at] = round16<BF16>(weight);
}

// R features; a cluster for each TOKENS tokens.
template <bool BF16, int R, int CLUSTER, int TOKENS> __global__ void __launch_bounds__(SELECT_THREADS<TOKENS>)
select(const SelectArguments p) {
    static_assert(R <= WARP && TOKENS <= SELECT_WARPS, "a lane has a feature, a warp decides for a token");
    constexpr int EACH = (R + SELECT_WARPS - 1) / SELECT_WARPS;  // rows of P a warp
    constexpr int AHEAD = TOKENS == 1 ? 2 : 1;                   // chunks under way
    __shared__ float parts[TOKENS][CLUSTER][R + 1];              // the last is the sum of squares
    __shared__ __align__(8) u64 box;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int rank = rank_in_cluster<CLUSTER>(), first = blockIdx.x / CLUSTER * TOKENS;
    const int own = warp - DECIDERS_FROM<TOKENS>;  // which token this warp decides for, if any
    const bool decides = rank == 0 && own >= 0 && own < TOKENS;
    make_box<CLUSTER>(&box, rank, sizeof(parts));
    open_boxes<CLUSTER>();
    float w[AHEAD][EACH][OCTET];
    // past the ends for warps that do not multiply
    int column = warp < SELECT_WARPS ? rank * CHUNK + lane * OCTET : p.columns + lane * OCTET;
#pragma unroll
    for (int a = 0; a < AHEAD; ++a)
        load_rows<R, SELECT_WARPS>(w[a], p.selector.projection, p.columns, warp, column + a * CLUSTER * CHUNK);
    await_producers();
    allow_dependents();
    Choice<R> choice;
    long long id = 0;
    if (decides) id = load_choice<BF16>(choice, p, first + own, lane);

    float sums[EACH][TOKENS] = {}, squares[TOKENS] = {};
    while (column - lane * OCTET < p.columns) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            float x[AHEAD][OCTET];
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                const int from = column + a * CLUSTER * CHUNK;
                const bool real = first + t < p.tokens && from < p.columns;
                widen_octet<BF16>(x[a], load_words(p.x + (u64)(first + t) * p.columns + from, real));
            }
#pragma unroll
            for (int a = 0; a < AHEAD; ++a)
#pragma unroll
                for (int j = 0; j < OCTET; ++j) {
                    squares[t] = fmaf(x[a][j], x[a][j], squares[t]);
#pragma unroll
                    for (int i = 0; i < EACH; ++i) sums[i][t] = fmaf(w[a][i][j], x[a][j], sums[i][t]);
                }
        }
        column += AHEAD * CLUSTER * CHUNK;
        if (column - lane * OCTET < p.columns)
#pragma unroll
            for (int a = 0; a < AHEAD; ++a)
                load_rows<R, SELECT_WARPS>(w[a], p.selector.projection, p.columns, warp, column + a * CLUSTER * CHUNK);
    }
    await_open<CLUSTER>();
#pragma unroll
    for (int t = 0; t < TOKENS; ++t) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int row = warp + i * SELECT_WARPS;
            const float sum = add_lanes(sums[i][t]);
            if (lane == 0 && warp < SELECT_WARPS && row < R) send<CLUSTER>(&parts[t][rank][row], sum, &box);
        }
        const float sum = add_lanes(squares[t]);
        if (lane == 0 && warp == 0) send<CLUSTER>(&parts[t][rank][R], sum, &box);
    }
    await_parts<CLUSTER>(&box, decides);
    if (!decides || first + own >= p.tokens) return;
    float feature = 0.f, square = 0.f;
#pragma unroll
    for (int c = 0; c < CLUSTER; ++c) {
        square += parts[own][c][R];
        if (lane < R) feature += parts[own][c][lane];
    }
    feature *= rsqrtf(square / p.columns + LEAST);
#pragma unroll
    for (int i = 0; i < R; ++i) choice.z = fmaf(choice.sensitivity[i], __shfl_sync(~0u, feature, i), choice.z);
    const Total total(p.renormalises, choice.weight, p.slots);
    const bool kept = decide(choice.z, choice.least, total, choice.weight, p.slots, lane);
    if (lane < p.slots) store_choice<BF16>(p, first + own, lane, kept ? id : -1, choice.weight);
}

// SPDX-License-Identifier: Apache-2.0
// A router in one launch: logits of all experts, their softmax, the greatest of them as ids and weights; and, where a layer is
// pruned by a learned selector, which of these a token runs. The definitions are kernels/router/reference.py and
// kernels/selector/reference.py.
//
// A router reads all its weights for a token, 512 KB for 128 experts of 2048 columns: a cluster of CLUSTER blocks shares them,
// for up to TOKENS tokens at once, which are the columns of tensor core products with 16 experts as rows. A warp has some of
// the columns of x for 16 experts; a block adds up its warps and sends the sums to the cluster's first block, in which a warp
// for each token does the rest. Sums have one order, whatever the tokens and the grid. Weights are asked for before the
// kernel ahead has ended.
#include "cluster.cuh"
#include "selector.cuh"

struct RouteArguments {
    const u16* x;        // [tokens, columns]
    const u16* weight;   // [num_experts, columns]
    void* logits;        // [tokens, num_experts], float32 where WIDE, else as x
    long long* ids;      // [tokens, slots]
    void* weights;       // [tokens, slots], float32 where weights_wide, else as x
    Selector selector;   // where R > 0
    int weights_wide;
    int renormalises;    // whether a token's weights add up to 1
    int rescales;        // whether those that the selector keeps take over the sum of all
    int each;            // tokens of a cluster, at most TOKENS
    int tokens, slots, num_experts, columns;  // columns a multiple of 8, slots at most 32 and num_experts
    // How the work is shared, so that nothing is divided here: blocks of 16 experts, parts of a block's columns in a thread
    // block (a warp each), 2^16 / blocks + 1, spans of a part.
    int blocks, shares, inverse, run;
    float scaling;       // of the weights
};

constexpr int ROUTE_WARPS = 16, ROUTE_THREADS = ROUTE_WARPS * WARP;
constexpr int TOKENS = 8;   // columns of a product
constexpr int SPAN = 32;    // columns of x in a lane's 16 bytes of a row: those of four lanes, two products
constexpr int AHEAD = 4;    // spans under way

// ---- products -----------------------------------------------------------------------------------------------------

// A span of 16 rows of weights, of which a lane has two, and of a token.
struct Operands {
    uint4 top, bottom, x;

    // `row` is that of `top`; nothing from `end` on.
    __device__ __forceinline__ void load_weights(const RouteArguments& p, int row, int column, int end) {
        const bool real = column < end && column < p.columns;
        const u16* from = p.weight + (u64)row * p.columns + column;
        top = load_words(from, real && row < p.num_experts);
        bottom = load_words(from + (u64)(ROWS / 2) * p.columns, real && row + ROWS / 2 < p.num_experts);
    }
    __device__ __forceinline__ void load_x(const RouteArguments& p, const u16* token, int column, int end) {
        x = load_words(token + column, column < end && column < p.columns);
    }
    template <bool BF16> __device__ __forceinline__ void multiply(float (&c)[4]) const {
        const u32 first[4] = {top.x, bottom.x, top.y, bottom.y}, second[4] = {top.z, bottom.z, top.w, bottom.w};
        mma<BF16, true>(c, first, x.x, x.y);
        mma<BF16, true>(c, second, x.z, x.w);
    }
};

// ---- order --------------------------------------------------------------------------------------------------------

// A logit and its expert as one number, which is the greater the greater the logit, then the lower the id; never 0.
template <bool BF16, bool WIDE> struct Key;

template <bool BF16> struct Key<BF16, false> {  // 16 bits each
    typedef u32 Type;
    static __device__ __forceinline__ u32 make(float logit, int id) {
        const u32 bits = round16<BF16>(logit);
        return (bits & 0x8000u ? ~bits & 0xffffu : bits | 0x8000u) << 16 | (0xffffu - id);
    }
    static __device__ __forceinline__ int id(u32 key) { return 0xffffu - (key & 0xffffu); }
    static __device__ __forceinline__ float logit(u32 key) {
        const u32 rank = key >> 16;
        return widen<BF16>(u16(rank & 0x8000u ? rank ^ 0x8000u : ~rank));
    }
    static __device__ __forceinline__ u32 most(u32 key) { return greatest(key); }
};

template <bool BF16> struct Key<BF16, true> {  // 32 bits each
    typedef u64 Type;
    static __device__ __forceinline__ u64 make(float logit, int id) { return (u64)ordered(logit) << 32 | ~u32(id); }
    static __device__ __forceinline__ int id(u64 key) { return ~u32(key); }
    static __device__ __forceinline__ float logit(u64 key) {
        const u32 rank = u32(key >> 32);
        return __uint_as_float(rank & 0x80000000u ? rank ^ 0x80000000u : ~rank);
    }
    static __device__ __forceinline__ u64 most(u64 key) {
        const u32 high = greatest(u32(key >> 32));
        return (u64)high << 32 | greatest(u32(key >> 32) == high ? u32(key) : 0);
    }
};

// In descending order.
template <typename T, int N> __device__ __forceinline__ void sort(T (&key)[N]) {
#pragma unroll
    for (int pass = 0; pass < N; ++pass)
#pragma unroll
        for (int i = pass % 2; i + 1 < N; i += 2) {
            const T a = key[i], b = key[i + 1];
            key[i] = a > b ? a : b, key[i + 1] = a > b ? b : a;
        }
}

// ---- one token's choices ------------------------------------------------------------------------------------------

// From the logits of a lane's experts (-inf past their end) to the lane's choice, if it has one, and its weight, else 0.
template <bool BF16, bool WIDE, int PER>
__device__ __forceinline__ int choose(const float (&logits)[PER], const RouteArguments& p, int lane, float& weight) {
    typedef Key<BF16, WIDE> Order;
    typename Order::Type key[PER], own = 0;
    float largest = 0.f;
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const int id = i * WARP + lane;
        key[i] = id < p.num_experts ? Order::make(logits[i], id) : 0;
    }
    sort(key);
    for (int slot = 0; slot < p.slots; ++slot) {
        const typename Order::Type top = Order::most(key[0]);
        if (slot == 0) largest = Order::logit(top);
        if (lane == slot) own = top;
        if (key[0] == top) {
#pragma unroll
            for (int i = 0; i < PER; ++i) key[i] = i + 1 < PER ? key[i + 1] : 0;
        }
    }
    const bool real = lane < p.slots;
    const float mine = real ? expf(Order::logit(own) - largest) : 0.f;
    float all = 0.f;
    if (p.renormalises) {
        all = add_slots(mine, p.slots);
    } else {
#pragma unroll
        for (int i = 0; i < PER; ++i) all += expf(logits[i] - largest);
        all = add_lanes(all);
    }
    weight = real ? mine / all * p.scaling : 0.f;
    if (!p.weights_wide) weight = widen<BF16>(round16<BF16>(weight));
    return real ? Order::id(own) : 0;
}

// `parts` are [CLUSTER] sums of logits, `stride` apart; they are rounded as the logits' type has it, and stored.
template <bool BF16, bool WIDE, int PER, int CLUSTER>
__device__ __forceinline__ void add_logits(float (&logits)[PER], const float* parts, int stride, const RouteArguments& p, int token, int lane) {
#pragma unroll
    for (int i = 0; i < PER; ++i) {
        const int id = i * WARP + lane;
        logits[i] = -__int_as_float(0x7f800000);
        if (id >= p.num_experts) continue;
        float sum = 0.f;
#pragma unroll
        for (int c = 0; c < CLUSTER; ++c) sum += parts[c * stride + id];
        const u64 at = (u64)token * p.num_experts + id;
        if constexpr (WIDE) {
            ((float*)p.logits)[at] = sum;
        } else {
            const u16 rounded = round16<BF16>(sum);
            ((u16*)p.logits)[at] = rounded;
            sum = widen<BF16>(rounded);
        }
        logits[i] = sum;
    }
}

// ---- the selector's features ----------------------------------------------------------------------------------------

// Rows of P over the warps, and where there are fewer rows than warps, several parts of the columns.
template <int R> struct Projections {
    static constexpr int EACH = (R + ROUTE_WARPS - 1) / ROUTE_WARPS, SHARES = R < ROUTE_WARPS ? ROUTE_WARPS / R : 1;
    float w[EACH][OCTET];
    uint4 ahead;  // the first octet of the first token
    int row, share, column;

    template <int CLUSTER> __device__ __forceinline__ void load_weights(const RouteArguments& p, int warp, int lane, int rank) {
        row = warp % R, share = warp / R;
        column = share < SHARES ? (share * CLUSTER + rank) * CHUNK + lane * OCTET : p.columns;
        load_rows<R, ROUTE_WARPS>(w, p.selector.projection, p.columns, row, column);
    }
    __device__ __forceinline__ void load_x(const RouteArguments& p, int first) {
        ahead = load_words(p.x + (u64)first * p.columns + column, column < p.columns);
    }
    // Sums [SHARES][each][R + 1] of this block; the last of R + 1 is the sum of squares.
    template <bool BF16, int CLUSTER>
    __device__ __forceinline__ void multiply(const RouteArguments& p, int first, int here, int lane, float* sums_of) {
        if (share >= SHARES) return;
        float sums[EACH][TOKENS] = {}, squares[TOKENS] = {};
        for (int from = column; from - lane * OCTET < p.columns; from += SHARES * CLUSTER * CHUNK) {
            if (from != column) load_rows<R, ROUTE_WARPS>(w, p.selector.projection, p.columns, row, from);
            uint4 words[TOKENS];
#pragma unroll
            for (int t = 0; t < TOKENS; ++t)
                if (t || from != column)
                    words[t] = load_words(p.x + (u64)(first + t) * p.columns + from, t < here && from < p.columns);
                else
                    words[t] = ahead;
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) {
                if (t >= here) break;
                float x[OCTET];
                widen_octet<BF16>(x, words[t]);
#pragma unroll
                for (int j = 0; j < OCTET; ++j) {
                    squares[t] = fmaf(x[j], x[j], squares[t]);
#pragma unroll
                    for (int i = 0; i < EACH; ++i) sums[i][t] = fmaf(w[i][j], x[j], sums[i][t]);
                }
            }
        }
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            if (t >= here) break;
            float* to = sums_of + (share * p.each + t) * (R + 1);
#pragma unroll
            for (int i = 0; i < EACH; ++i) {
                const float sum = add_lanes(sums[i][t]);
                if (lane == 0 && row + i * ROUTE_WARPS < R) to[row + i * ROUTE_WARPS] = sum;
            }
            const float sum = add_lanes(squares[t]);
            if (lane == 0 && row == 0) to[R] = sum;
        }
    }
};

template <> struct Projections<0> {
    static constexpr int SHARES = 0;
};

__device__ __forceinline__ void fetch(float* to, const float* from) {  // a copy under way to shared memory
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// To [num_experts][R + 1]: an expert's sensitivities, then its offset.
template <int R> __device__ __forceinline__ void fetch_experts(float* table, const RouteArguments& p) {
    for (int i = threadIdx.x; i < p.num_experts * (R + 1); i += ROUTE_THREADS) {
        const int e = i / (R + 1), at = i % (R + 1);
        fetch(table + i, at < R ? p.selector.sensitivity + e * R + at : p.selector.offset + e);
    }
}

// ---- all of it ----------------------------------------------------------------------------------------------------

// PER: experts a lane, R: the selector's features, 0 without; a cluster for each `each` tokens. The launcher counts the same
// shared memory (router.py).
template <bool BF16, bool WIDE, int PER, int R, int CLUSTER> __global__ void __launch_bounds__(ROUTE_THREADS)
route(const RouteArguments p) {
    static_assert(R <= WARP && 2 * TOKENS <= ROUTE_WARPS, "a lane has a feature, a warp decides for a token");
    constexpr int LINE = PER * WARP, FEATURES = R ? R + 1 : 0;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int rank = rank_in_cluster<CLUSTER>(), first = blockIdx.x / CLUSTER * p.each;
    const int here = min(p.each, p.tokens - first), rows = p.blocks * ROWS;

    extern __shared__ __align__(16) float shared[];
    __shared__ __align__(8) u64 box;
    float* parts = shared;                                          // [CLUSTER][each][LINE], of the first block
    float* sums = parts + CLUSTER * p.each * LINE;                  // [shares][each][rows], of this block
    float* part_features = sums + p.shares * p.each * rows;         // [CLUSTER][each][FEATURES], of the first block
    float* features = part_features + CLUSTER * p.each * FEATURES;  // [SHARES][each][FEATURES], of this block
    float* table = features + Projections<R>::SHARES * p.each * FEATURES;  // [num_experts][FEATURES], power, dial

    open_box<CLUSTER>(&box, rank, CLUSTER * here * (rows + FEATURES) * sizeof(float));
    const int share = warp * p.inverse >> 16;
    int block = warp - share * p.blocks, row = block * ROWS + lane / 4;
    const int begin = (rank * p.shares + share) * p.run * SPAN + lane % 4 * OCTET;  // columns
    const int end = share < p.shares ? begin + p.run * SPAN : begin;
    Operands next[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) next[a].load_weights(p, row, begin + a * SPAN, end);
    Projections<R> projections;
    if constexpr (R > 0) {
        projections.template load_weights<CLUSTER>(p, warp, lane, rank);
        if (rank == 0) fetch_experts<R>(table, p);
    }
    await_producers();
    allow_dependents();
    const u16* x = p.x + (u64)(first + lane / 4) * p.columns;
    const int x_end = lane / 4 < here ? end : begin;
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) next[a].load_x(p, x, begin + a * SPAN, x_end);
    if constexpr (R > 0) {
        projections.load_x(p, first);
        if (rank == 0 && threadIdx.x < 2)
            fetch(table + p.num_experts * FEATURES + threadIdx.x, threadIdx.x ? p.selector.dial : p.selector.power);
        copy_commit();
    }

    while (block < p.blocks && share < p.shares) {
        float c[AHEAD][4] = {};
        for (int at = begin; at < end; at += AHEAD * SPAN)
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                next[a].template multiply<BF16>(c[a]);
                next[a].load_weights(p, row, at + (AHEAD + a) * SPAN, end);
                next[a].load_x(p, x, at + (AHEAD + a) * SPAN, x_end);
            }
        float* to = sums + share * p.each * rows + row;  // rows lane / 4 and 8 more of tokens 2 (lane % 4) and 1 more
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int t = lane % 4 * 2 + i % 2;
            const float sum = (c[0][i] + c[1][i]) + (c[2][i] + c[3][i]);
            if (t < here) to[t * rows + i / 2 * (ROWS / 2)] = sum;
        }
        block += ROUTE_WARPS, row += ROUTE_WARPS * ROWS;  // more than 256 experts
        if (block >= p.blocks) break;
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            next[a].load_weights(p, row, begin + a * SPAN, end);
            next[a].load_x(p, x, begin + a * SPAN, x_end);
        }
    }
    if constexpr (R > 0) {
        projections.template multiply<BF16, CLUSTER>(p, first, here, lane, features);
        copy_wait<0>();
    }
    __syncthreads();
    await_open<CLUSTER>();

    if (warp < here)
        for (int at = lane * 4; at < rows; at += WARP * 4) {
            float4 sum = make_float4(0.f, 0.f, 0.f, 0.f);
            for (int s = 0; s < p.shares; ++s) {
                const float4 more = *reinterpret_cast<const float4*>(sums + (s * p.each + warp) * rows + at);
                sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
            }
            send<CLUSTER>(parts + (rank * p.each + warp) * LINE + at, sum, &box);
        }
    if constexpr (R > 0)  // by other warps
        if (const int t = warp - TOKENS; t >= 0 && t < here)
            for (int i = lane; i < FEATURES; i += WARP) {
                float sum = 0.f;
#pragma unroll
                for (int s = 0; s < Projections<R>::SHARES; ++s) sum += features[(s * p.each + t) * FEATURES + i];
                send<CLUSTER>(part_features + (rank * p.each + t) * FEATURES + i, sum, &box);
            }

    const bool decides = rank == 0 && warp < here;
    await_parts<CLUSTER>(&box, decides);
    if (!decides) return;
    float logits[PER], weight;
    add_logits<BF16, WIDE, PER, CLUSTER>(logits, parts + warp * LINE, p.each * LINE, p, first + warp, lane);
    int id = choose<BF16, WIDE>(logits, p, lane, weight);
    if constexpr (R > 0) {
        float feature = 0.f, square = 0.f;
#pragma unroll
        for (int c = 0; c < CLUSTER; ++c) {
            const float* from = part_features + (c * p.each + warp) * FEATURES;
            square += from[R];
            if (lane < R) feature += from[lane];
        }
        Choice<R> choice;
        choice.weight = weight, choice.offset = table[id * FEATURES + R];
        choice.power = table[p.num_experts * FEATURES], choice.dial = table[p.num_experts * FEATURES + 1];
#pragma unroll
        for (int i = 0; i < R; ++i) choice.sensitivity[i] = table[id * FEATURES + i];
        const bool kept = choice.decide(p.slots, p.rescales, lane, feature * rsqrtf(square / p.columns + LEAST));
        id = kept ? id : -1, weight = choice.weight;
    }
    if (lane >= p.slots) return;
    const u64 at = (u64)(first + warp) * p.slots + lane;
    p.ids[at] = id;
    if (p.weights_wide) ((float*)p.weights)[at] = weight;
    else ((u16*)p.weights)[at] = round16<BF16>(weight);
}

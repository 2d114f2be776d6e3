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
//
// A selector has warps of its own, which do meanwhile what does not wait for the router: x's features, and from them the
// costs of all experts but for what their weights add.
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
constexpr int SELECTOR_WARPS = 4, SELECTOR_THREADS = SELECTOR_WARPS * WARP;  // besides, with a selector
constexpr int TOKENS = 8;   // columns of a product
constexpr int SPAN = 32;    // columns of x in a lane's 16 bytes of a row: those of four lanes, two products
constexpr int AHEAD = 4;    // spans under way
// Named barriers: of the router's warps, of the selector's, and from there on one for each token, of both that have it.
constexpr int ROUTER_READY = 1, SELECTOR_READY = 2, COSTS_READY = 3;

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

// ---- the selector's warps -------------------------------------------------------------------------------------------

// A span of eight rows of P, of which a lane has one, and of x.
struct Projected {
    float4 w[2];
    uint4 x;

    // Nothing from `end` on.
    __device__ __forceinline__ void load_weights(const float* row, int column, int end) {
        const float4* from = reinterpret_cast<const float4*>(row + column);
        const float4 none = make_float4(0.f, 0.f, 0.f, 0.f);
        w[0] = column < end ? from[0] : none, w[1] = column < end ? from[1] : none;
    }
    __device__ __forceinline__ void load_x(const u16* token, int column, int end) {
        x = load_words(token + column, column < end);
    }

    // c += P x, with P as two numbers of x's type: rows 0 to 7 have the sums of P rounded, the others those of what that left,
    // 16 bits of P or more in all. `square` += the sum of squares of x here.
    template <bool BF16> __device__ __forceinline__ void multiply(float (&c)[4], float& square) const {
        u32 high[4], low[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const float a = i % 2 ? w[i / 2].z : w[i / 2].x, b = i % 2 ? w[i / 2].w : w[i / 2].y;
            high[i] = Half<BF16>::pack(a, b);
            low[i] = Half<BF16>::pack(a - Half<BF16>::lo(high[i]), b - Half<BF16>::hi(high[i]));
        }
        const u32 first[4] = {high[0], low[0], high[1], low[1]}, second[4] = {high[2], low[2], high[3], low[3]};
        mma<BF16, true>(c, first, x.x, x.y);
        mma<BF16, true>(c, second, x.z, x.w);
        float wide[OCTET];
        widen_octet<BF16>(wide, x);
#pragma unroll
        for (int j = 0; j < OCTET; ++j) square = fmaf(wide[j], wide[j], square);
    }
};

// Eight rows of P for each block of a warp, and where there are fewer blocks than warps, several parts of the columns.
template <int R> struct Projections {
    static constexpr int FEATURES = R + 1;  // the last is the sum of squares
    static constexpr int BLOCKS = (R + OCTET - 1) / OCTET, SHARES = SELECTOR_WARPS / BLOCKS;
    static_assert(BLOCKS <= SELECTOR_WARPS, "a warp has eight rows");
    Projected next[AHEAD];
    const float* weights;  // the lane's row
    const u16* x;          // the lane's token
    int row, share, begin, end, x_end;  // columns, none where row or token is not real

    template <int CLUSTER> __device__ __forceinline__ void load_weights(const RouteArguments& p, int rank, int warp, int lane) {
        constexpr int STEP = CLUSTER * SHARES * SPAN;
        const int run = (p.columns + STEP - 1) / STEP * SPAN;
        row = warp % BLOCKS * OCTET + lane / 4, share = warp / BLOCKS;
        begin = (rank * SHARES + share) * run + lane % 4 * OCTET;
        x_end = share < SHARES ? min(begin + run, p.columns) : 0, end = row < R ? x_end : 0;
        weights = p.selector.projection + (u64)row * p.columns;
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) next[a].load_weights(weights, begin + a * SPAN, end);
    }
    __device__ __forceinline__ void load_x(const RouteArguments& p, int token, bool real) {
        x = p.x + (u64)token * p.columns, x_end = real ? x_end : 0;
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) next[a].load_x(x, begin + a * SPAN, x_end);
    }
    // Sums [SHARES][each][FEATURES] of this block's columns.
    template <bool BF16, int CLUSTER>
    __device__ __forceinline__ void multiply(const RouteArguments& p, int here, int lane, float* sums) {
        constexpr int STEP = CLUSTER * SHARES * SPAN;
        const int run = share < SHARES ? (p.columns + STEP - 1) / STEP * SPAN : 0;
        float c[2][4] = {}, square = 0.f;  // the latter of this lane's columns of token lane / 4
        for (int at = 0; at < run; at += AHEAD * SPAN) {
            begin += AHEAD * SPAN;
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) {
                next[a].template multiply<BF16>(c[a % 2], square);
                next[a].load_weights(weights, begin + a * SPAN, end);
                next[a].load_x(x, begin + a * SPAN, x_end);
            }
        }
        square += __shfl_xor_sync(~0u, square, 1), square += __shfl_xor_sync(~0u, square, 2);
        if (share >= SHARES) return;
        float* to = sums + share * p.each * FEATURES;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int t = lane % 4 * 2 + i;
            const float high = c[0][i] + c[1][i], low = c[0][i + 2] + c[1][i + 2];
            if (t < here && row < R) to[t * FEATURES + row] = high + low;
        }
        if (lane / 4 < here && row == lane / 4 && lane % 4 == 0) to[row * FEATURES + R] = square;
    }
};

template <> struct Projections<0> {
    static constexpr int FEATURES = 0, SHARES = 0;
};

__device__ __forceinline__ void fetch(float* to, const float* from) {  // a copy under way to shared memory
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(to)), "l"(from) : "memory");
}

// To [num_experts][R + 1]: an expert's sensitivities, then its offset.
template <int R> __device__ __forceinline__ void fetch_experts(float* table, const RouteArguments& p, int thread) {
#pragma unroll 1
    for (int e = thread; e < p.num_experts; e += SELECTOR_THREADS) {
#pragma unroll
        for (int i = 0; i < R; ++i) fetch(table + e * (R + 1) + i, p.selector.sensitivity + e * R + i);
        fetch(table + e * (R + 1) + R, p.selector.offset + e);
    }
}

// Shared memory of a selector.
template <int R, int CLUSTER> struct SelectorMemory {
    float* parts;  // [CLUSTER][each][FEATURES], of the first block
    float* sums;   // [SHARES][each][FEATURES], of this block
    float* costs;  // [each][num_experts + 2], of the first block: z without weights, then power and the z worth the price
    float* table;  // [num_experts][FEATURES], of the first block

    __device__ __forceinline__ SelectorMemory(const RouteArguments& p, float* from) {
        constexpr int FEATURES = Projections<R>::FEATURES;
        parts = from;
        sums = parts + CLUSTER * p.each * FEATURES;
        costs = sums + Projections<R>::SHARES * p.each * FEATURES;
        table = costs + p.each * (p.num_experts + 2);
    }
};

// One token's z of all experts but for its weights, from the sums of the blocks; `setting` is the lane's of the last two.
template <int R, int CLUSTER>
__device__ __forceinline__ void cost_experts(
    const RouteArguments& p, const SelectorMemory<R, CLUSTER>& memory, float setting, int t, int lane) {
    constexpr int FEATURES = R + 1;
    float* costs = memory.costs + t * (p.num_experts + 2);
    float own = 0.f, square = 0.f, feature[R];
#pragma unroll
    for (int c = 0; c < CLUSTER; ++c) {
        const float* from = memory.parts + (c * p.each + t) * FEATURES;
        square += from[R];
        if (lane < R) own += from[lane];
    }
    own *= rsqrtf(__fdividef(square, p.columns) + LEAST);
#pragma unroll
    for (int i = 0; i < R; ++i) feature[i] = __shfl_sync(~0u, own, i);
    for (int e = lane; e < p.num_experts; e += WARP) {
        const float* expert = memory.table + e * FEATURES;
        float z = expert[R];
#pragma unroll
        for (int i = 0; i < R; ++i) z = fmaf(expert[i], feature[i], z);
        costs[e] = z;
    }
    if (lane < 2) costs[p.num_experts + lane] = setting;
}

// All that the selector's warps do.
template <bool BF16, int R, int CLUSTER>
__device__ __forceinline__ void select_meanwhile(
    const RouteArguments& p, float* shared, int first, int here, int rank, int warp, int lane, u64* box) {
    constexpr int FEATURES = R + 1, SHARES = Projections<R>::SHARES;
    __shared__ float settings[2];  // power and dial, of the first block
    const SelectorMemory<R, CLUSTER> memory(p, shared);
    Projections<R> projections;
    projections.template load_weights<CLUSTER>(p, rank, warp, lane);
    if (rank == 0) fetch_experts<R>(memory.table, p, warp * WARP + lane);
    await_producers();
    allow_dependents();
    projections.load_x(p, first + lane / 4, lane / 4 < here);
    if (rank == 0 && warp == 0 && lane < 2) fetch(settings + lane, lane ? p.selector.dial : p.selector.power);
    copy_commit();
    projections.template multiply<BF16, CLUSTER>(p, here, lane, memory.sums);
    named_barrier(SELECTOR_READY, SELECTOR_THREADS);
    await_open<CLUSTER>();
#pragma unroll 1
    for (int t = warp; t < here; t += SELECTOR_WARPS)
        for (int i = lane; i < FEATURES; i += WARP) {
            float sum = 0.f;
#pragma unroll
            for (int s = 0; s < SHARES; ++s) sum += memory.sums[(s * p.each + t) * FEATURES + i];
            send<CLUSTER>(memory.parts + (rank * p.each + t) * FEATURES + i, sum, box);
        }
    if (rank) return;
    copy_wait<0>();
    named_barrier(SELECTOR_READY, SELECTOR_THREADS);
    if (warp >= here) return;
    const float setting = lane ? log_price(settings[1]) : settings[0];
    await_parts<CLUSTER>(box, true);
#pragma unroll 1
    for (int t = warp; t < here; t += SELECTOR_WARPS) {
        cost_experts<R, CLUSTER>(p, memory, setting, t, lane);
        arrive_at(COSTS_READY + t, 2 * WARP);
    }
}

// ---- all of it ----------------------------------------------------------------------------------------------------

// PER: experts a lane, R: the selector's features, 0 without; a cluster for each `each` tokens. The launcher counts the same
// shared memory (router.py).
template <bool BF16, bool WIDE, int PER, int R, int CLUSTER>
__global__ void __launch_bounds__(ROUTE_THREADS + (R ? SELECTOR_THREADS : 0))
route(const RouteArguments p) {
    static_assert(R <= WARP && TOKENS <= ROUTE_WARPS, "a lane has a feature, a warp decides for a token");
    static_assert(CLUSTER > 1, "await_parts is not for all threads of a block");
    constexpr int LINE = PER * WARP, FEATURES = Projections<R>::FEATURES;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int rank = rank_in_cluster<CLUSTER>(), first = blockIdx.x / CLUSTER * p.each;
    const int here = min(p.each, p.tokens - first), rows = p.blocks * ROWS;

    extern __shared__ __align__(16) float shared[];
    __shared__ __align__(8) u64 box;
    __shared__ __align__(8) u64 feature_box;
    float* parts = shared;                          // [CLUSTER][each][LINE], of the first block
    float* sums = parts + CLUSTER * p.each * LINE;  // [shares][each][rows], of this block
    float* rest = sums + p.shares * p.each * rows;  // the selector's

    make_box<CLUSTER>(&box, rank, CLUSTER * here * rows * sizeof(float));
    if constexpr (R > 0) make_box<CLUSTER>(&feature_box, rank, CLUSTER * here * FEATURES * sizeof(float));
    open_boxes<CLUSTER>();
    if constexpr (R > 0)
        if (warp >= ROUTE_WARPS) {
            select_meanwhile<BF16, R, CLUSTER>(p, rest, first, here, rank, warp - ROUTE_WARPS, lane, &feature_box);
            return;
        }
    const int share = warp * p.inverse >> 16;
    int block = warp - share * p.blocks, row = block * ROWS + lane / 4;
    const int begin = (rank * p.shares + share) * p.run * SPAN + lane % 4 * OCTET;  // columns
    const int end = share < p.shares ? begin + p.run * SPAN : begin;
    Operands next[AHEAD];
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) next[a].load_weights(p, row, begin + a * SPAN, end);
    await_producers();
    allow_dependents();
    const u16* x = p.x + (u64)(first + lane / 4) * p.columns;
    const int x_end = lane / 4 < here ? end : begin;
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) next[a].load_x(p, x, begin + a * SPAN, x_end);

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
    named_barrier(ROUTER_READY, ROUTE_THREADS);
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

    const bool decides = rank == 0 && warp < here;
    await_parts<CLUSTER>(&box, decides);
    if (!decides) return;
    float logits[PER], weight;
    add_logits<BF16, WIDE, PER, CLUSTER>(logits, parts + warp * LINE, p.each * LINE, p, first + warp, lane);
    int id = choose<BF16, WIDE>(logits, p, lane, weight);
    if constexpr (R > 0) {
        const Total total(p.rescales, weight, p.slots);
        const float* costs = SelectorMemory<R, CLUSTER>(p, rest).costs + warp * (p.num_experts + 2);
        const float log = log_weight(weight);
        named_barrier(COSTS_READY + warp, 2 * WARP);
        const float z = fmaf(costs[p.num_experts], log, costs[id]);
        if (!decide(z, costs[p.num_experts + 1], total, weight, p.slots, lane)) id = -1;
    }
    if (lane >= p.slots) return;
    const u64 at = (u64)(first + warp) * p.slots + lane;
    p.ids[at] = id;
    if (p.weights_wide) ((float*)p.weights)[at] = weight;
    else ((u16*)p.weights)[at] = round16<BF16>(weight);
}

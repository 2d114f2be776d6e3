// SPDX-License-Identifier: Apache-2.0
// Which of its experts a token runs, by a learned selector, and what that makes of the router's ids and weights: one launch
// between router and experts. The definition is kernels/selector/reference.py.
//
// A token's projections P x read all of P, 128 KB at 4096 columns: too much for one multiprocessor while a layer waits for
// it. With few tokens a cluster of CLUSTER blocks shares the columns of one token and adds up through shared memory; with
// many a block has TOKENS of them and reads P once for all. Sums have one order, whatever the grid.
#include "common.cuh"

struct SelectArguments {
    const u16* x;            // [tokens, columns]
    const void* ids;         // [tokens, slots], int64 where ids_wide, else int32
    const void* weights;     // [tokens, slots], float32 where weights_wide, else as x
    void* new_ids;           // both in the types of the old ones
    void* new_weights;
    const float* projection;   // [R, columns]
    const float* sensitivity;  // [num_experts, R]
    const float* offset;       // [num_experts]
    const float* power;        // one
    const float* dial;         // one
    int ids_wide, weights_wide, renormalises;
    int tokens, slots, num_experts, columns;  // columns a multiple of 8, slots at most 32
};

constexpr int SELECT_WARPS = 8;                 // that multiply
// A token of its own gets a warp of its own that asks for its choices' numbers, two loads that wait for each other, while
// the others multiply.
template <int TOKENS> constexpr int DECIDERS_FROM = TOKENS == 1 ? SELECT_WARPS : 0;
template <int TOKENS> constexpr int SELECT_THREADS = WARP * (SELECT_WARPS + (TOKENS == 1));
constexpr int OCTET = 8, CHUNK = WARP * OCTET;  // columns that a lane and a warp take at a time
constexpr float LEAST = 1e-6f;                  // in the mean square of x, and the least weight that has a logarithm

__device__ __forceinline__ float add_lanes(float x) {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// ---- clusters -----------------------------------------------------------------------------------------------------

// What the blocks of a cluster send to the first one: into `parts` there, at the place that it has here, and `box`, an
// mbarrier, counts the bytes. A barrier of the cluster instead would wait for all of the GPU's memory (MEMBAR).

template <int CLUSTER> __device__ __forceinline__ int rank_in_cluster() {
    u32 rank = 0;
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

// All threads of all blocks, before and after which others' shared memory may be written.
template <int CLUSTER> __device__ __forceinline__ void open_box(u64* box, int rank, int bytes) {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER == 1) return;
    if (rank == 0 && threadIdx.x == 0) {
        mbarrier_init(shared_address(box), 1);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
        mbarrier_expect(shared_address(box), bytes);
    }
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
template <int CLUSTER> __device__ __forceinline__ void await_open() {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

template <int CLUSTER> __device__ __forceinline__ void send(float* to, float value, u64* box) {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) {
        asm volatile("{.reg .u32 there, bar; mapa.shared::cluster.u32 there, %0, 0; mapa.shared::cluster.u32 bar, %1, 0; "
                     "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %2, [bar];}"
                     ::"r"(shared_address(to)), "r"(shared_address(box)), "f"(value) : "memory");
        return;
    }
#endif
    *to = value;
}

// All threads of a block on its own; of a cluster, those that `receive`.
template <int CLUSTER> __device__ __forceinline__ void await_parts(u64* box, bool receives) {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) {
        if (receives)
            asm volatile("{.reg .pred done; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0; "
                         "@done bra over; bra again; over:}" ::"r"(shared_address(box)) : "memory");
        return;
    }
#endif
    __syncthreads();
}

// ---- one token's choices ------------------------------------------------------------------------------------------

// What a lane must know of its choice; asked for before the projections, which take as long.
template <int R> struct Choice {
    long long id;
    float weight, offset, power, dial, sensitivity[R];

    template <bool BF16> __device__ __forceinline__ void load(const SelectArguments& p, int token, int lane) {
        const bool real = lane < p.slots && token < p.tokens;
        const u64 at = (u64)token * p.slots + lane;
        id = !real ? 0 : p.ids_wide ? ((const long long*)p.ids)[at] : (long long)((const int*)p.ids)[at];
        weight = !real ? 0.f : p.weights_wide ? ((const float*)p.weights)[at] : widen<BF16>(((const u16*)p.weights)[at]);
        power = *p.power, dial = *p.dial;
        const long long e = id < 0 || id >= p.num_experts ? 0 : id;
        offset = p.offset[e];
#pragma unroll
        for (int i = 0; i < R; ++i) sensitivity[i] = p.sensitivity[e * R + i];
    }

    // `feature` is that of the lane's number.
    template <bool BF16> __device__ __forceinline__ void decide(const SelectArguments& p, int token, int lane, float feature) {
        const bool real = lane < p.slots;
        float z = fmaf(power, logf(fmaxf(weight, LEAST)), offset);
#pragma unroll
        for (int i = 0; i < R; ++i) z = fmaf(sensitivity[i], __shfl_sync(~0u, feature, i), z);
        float most = real ? z : -__int_as_float(0x7f800000);
#pragma unroll
        for (int step = WARP / 2; step; step /= 2) most = fmaxf(most, __shfl_xor_sync(~0u, most, step));
        const u32 dearest = __ballot_sync(~0u, real && z == most);
        const bool kept = real && (expf(z) >= 1.f + dial || lane == max(__ffs(dearest), 1) - 1);
        float scale = 1.f;
        if (p.renormalises) {
            const float all = add_lanes(weight), rest = add_lanes(kept ? weight : 0.f);
            if (rest > 0.f) scale = all / rest;
        }
        if (!real) return;
        const u64 at = (u64)token * p.slots + lane;
        if (p.ids_wide) ((long long*)p.new_ids)[at] = kept ? id : -1;
        else ((int*)p.new_ids)[at] = kept ? int(id) : -1;
        const float w = kept ? weight * scale : 0.f;
        if (p.weights_wide) ((float*)p.new_weights)[at] = w;
        else ((u16*)p.new_weights)[at] = round16<BF16>(w);
    }
};

// ---- projections --------------------------------------------------------------------------------------------------

// An octet of columns of the warp's rows of P; zeros past the ends.
template <int R, int EACH>
__device__ __forceinline__ void load_rows(float (&w)[EACH][OCTET], const SelectArguments& p, int warp, int column) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int row = warp + i * SELECT_WARPS;
        float4 low = make_float4(0.f, 0.f, 0.f, 0.f), high = low;
        if (row < R && column < p.columns) {
            const float4* from = reinterpret_cast<const float4*>(p.projection + (u64)row * p.columns + column);
            low = from[0], high = from[1];
        }
        w[i][0] = low.x, w[i][1] = low.y, w[i][2] = low.z, w[i][3] = low.w;
        w[i][4] = high.x, w[i][5] = high.y, w[i][6] = high.z, w[i][7] = high.w;
    }
}

template <bool BF16> __device__ __forceinline__ void load_x(float (&x)[OCTET], const SelectArguments& p, int token, int column) {
    uint4 words = make_uint4(0, 0, 0, 0);
    if (token < p.tokens && column < p.columns)
        words = *reinterpret_cast<const uint4*>(p.x + (u64)token * p.columns + column);
    const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[2 * i] = Half<BF16>::lo(word[i]), x[2 * i + 1] = Half<BF16>::hi(word[i]);
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
    open_box<CLUSTER>(&box, rank, sizeof(parts));
    float w[AHEAD][EACH][OCTET];
    // past the ends for warps that do not multiply
    int column = warp < SELECT_WARPS ? rank * CHUNK + lane * OCTET : p.columns + lane * OCTET;
#pragma unroll
    for (int a = 0; a < AHEAD; ++a) load_rows<R>(w[a], p, warp, column + a * CLUSTER * CHUNK);
    await_producers();
    allow_dependents();
    Choice<R> choice;
    if (decides) choice.template load<BF16>(p, first + own, lane);

    float sums[EACH][TOKENS] = {}, squares[TOKENS] = {};
    while (column - lane * OCTET < p.columns) {
#pragma unroll
        for (int t = 0; t < TOKENS; ++t) {
            float x[AHEAD][OCTET];
#pragma unroll
            for (int a = 0; a < AHEAD; ++a) load_x<BF16>(x[a], p, first + t, column + a * CLUSTER * CHUNK);
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
            for (int a = 0; a < AHEAD; ++a) load_rows<R>(w[a], p, warp, column + a * CLUSTER * CHUNK);
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
    choice.template decide<BF16>(p, first + own, lane, feature * rsqrtf(square / p.columns + LEAST));
}

// SPDX-License-Identifier: Apache-2.0
// What `gemv` is told, and which experts run for which tokens.
#pragma once
#include "bytes.cuh"

// Gate and up's results as down has them in shared memory, row after row; of several tokens.
struct Passed {
    u32* bytes;   // [tokens * slots][units][UNIT_WORDS]; null: down makes them of 16 bits
    float* sums;  // [tokens * slots][row_sums]
};

struct Arguments {
    const u16* x;           // DENSE, GATE_UP [tokens, k], DOWN [tokens * slots, k]
    u16* y;                 // DENSE, DOWN [tokens, n], GATE_UP [tokens * slots, n]
    const u16* bias;        // DENSE [n] or null
    Passed passed;          // GATE_UP, where there are eight groups, and DOWN
    Bank bank;
    const void* ids;        // [tokens * slots], int64 where ids_wide, else int32; outside 0..num_experts-1: run nothing.
                            // A token's ids differ from each other.
    const void* weights;    // DOWN [tokens * slots], float32 where weights_wide, else as x
    int ids_wide, weights_wide;
    int tokens, slots, num_experts;
    int n, k;               // GATE_UP: n is the intermediate size, half of the rows
    int records;            // of a row block
    int row_blocks;
    int stages;             // DENSE; experts have EXPERT_STAGES
};

struct Compensators {
    Bank v;                 // [num_experts] rows of t by k; an expert without records has none
    Bank u;                 // [num_experts] rows of W by columns of t
    u16* t;                 // v x, [tokens * slots, t_columns] in the order of `t_place`, 0 before
    int* ended;             // DENSE: blocks that have, 0 before
    uint4* others;          // t of the other half of a layer of experts, which nobody uses now and this launch sets to 0
    int other_pieces;       // of 16 bytes, of `others`
    int columns;            // of t: 8, 16, 32 or a multiple of 64
    int v_row_blocks, v_records, u_records;
    u32 v_inverse;          // of v_row_blocks, see `divide`
};

constexpr int MAX_SLOTS = 32;
constexpr int MAX_TOKENS = 8;
constexpr int MAX_PAIRS = 64;  // of several tokens
constexpr int MAX_EXPERTS = 512;
constexpr int MAX_SEGMENTS = 16;  // of 64 results of gate and up that a block makes bytes of
constexpr int PENDING = 4;  // row blocks of a group that wait for u t, at most
constexpr int EXPERT_STAGES = 2;  // of the rings of experts' launches: known to the compiler it saves registers
constexpr int GEMV_STATIC = 41984;  // shared bytes that no instance declares more of

// The experts that were chosen, with up to NT of the tokens that chose them: one token's in the order of its slots, several
// tokens' in the order of their numbers, and then those with more than NT tokens once more.
template <int NT> struct Active {
    static constexpr int MOST = NT == 1 ? MAX_SLOTS : MAX_PAIRS;
    Expert expert[MOST];
    const u8 *v[MOST], *u[MOST];  // null: no compensator
    float weight[MOST][NT];       // DOWN
    int pair[MOST][NT];           // token * slots + slot; -1: no more tokens
    short token[MOST][NT];
    int count;
    u32 chosen[2][NT == 1 ? 1 : MAX_EXPERTS / 32];  // by anybody; by more than NT
    u32 tokens[NT == 1 ? 1 : MAX_EXPERTS / 4];      // a byte of tokens for each expert
};

// Asked for before any arithmetic that follows.
__device__ __forceinline__ int id_of(const Arguments& p, int pair) {
    const long long id = p.ids_wide ? load_here((const long long*)p.ids + pair) : load_here((const int*)p.ids + pair);
    return id >= 0 && id < p.num_experts ? int(id) : -1;
}

template <bool BF16> __device__ __forceinline__ float weight_of(const Arguments& p, int pair) {
    return p.weights_wide ? ((const float*)p.weights)[pair] : widen<BF16>(((const u16*)p.weights)[pair]);
}

// How many tokens before this one chose its expert; notes who chose what. All threads; ends with a barrier.
template <int NT> __device__ __forceinline__ int mark_tokens(Active<NT>& active, int id, int token) {
    constexpr int WORDS = MAX_EXPERTS / 32;
    const int thread = threadIdx.x, byte = id % 4 * 8;
    if (thread < 2 * WORDS) active.chosen[thread / WORDS][thread % WORDS] = 0;
    if (thread < MAX_EXPERTS / 4) active.tokens[thread] = 0;
    for (int i = thread; i < MAX_PAIRS * NT; i += blockDim.x) active.pair[i / NT][i % NT] = -1, active.token[i / NT][i % NT] = 0;
    __syncthreads();
    if (id >= 0 && thread < MAX_PAIRS)
        atomicOr(&active.tokens[id / 4], 1u << (byte + token)), atomicOr(&active.chosen[0][id / 32], 1u << (id % 32));
    __syncthreads();
    const int rank = id < 0 ? 0 : __popc(active.tokens[id / 4] >> byte & ((1u << token) - 1));
    if (rank == NT && thread < MAX_PAIRS) atomicOr(&active.chosen[1][id / 32], 1u << (id % 32));
    __syncthreads();
    return rank;
}

// Where in the list a token finds its expert, with `rank` tokens before it; and how long the list is. The first warps.
template <int NT> __device__ __forceinline__ int place_of(Active<NT>& active, int id, int rank, int num_experts) {
    int before[2] = {}, all[2] = {};
#pragma unroll
    for (int more = 0; more < 2; ++more)
#pragma unroll
        for (int w = 0; w < MAX_EXPERTS / 32; ++w) {
            if (WARP * w >= num_experts) break;
            const u32 word = active.chosen[more][w];
            all[more] += __popc(word);
            before[more] += __popc(w < id / 32 ? word : w == id / 32 ? word & ((1u << (id % 32)) - 1) : 0u);
        }
    if (threadIdx.x == 0) active.count = all[0] + all[1];
    return rank < NT ? before[0] : all[0] + before[1];
}

// Threads that enter a pair in the list: the first for W, as many for v and for u, since one thread's way to three banks took half a
// microsecond, mostly for arithmetic: 0.2 of 12.2 us of Qwen3's one token were saved by that and what it no longer divides.
template <int NT, bool FACTORS> struct Entering {
    static constexpr int PLACES = NT == 1 ? WARP : MAX_PAIRS, THREADS = (FACTORS ? 3 : 1) * PLACES;
};

// What a thread asks for of its pair; on its way while the thread goes on.
struct Chosen {
    int id;
    float weight;
};
template <bool BF16, int NT, int MODE, bool FACTORS> __device__ __forceinline__ Chosen ask_chosen(const Arguments& p) {
    using E = Entering<NT, FACTORS>;
    const int pair = threadIdx.x % E::PLACES;
    const bool has = MODE != DENSE && threadIdx.x < E::THREADS && pair < p.tokens * p.slots;
    return {has ? id_of(p, pair) : -1, has && MODE == DOWN ? weight_of<BF16>(p, pair) : 0.f};
}

// All threads; ends with a barrier.
template <int NT, int MODE, bool FACTORS>
__device__ void find_active(Active<NT>& active, const Arguments& p, const Compensators& f, const Chosen& chosen) {
    using E = Entering<NT, FACTORS>;
    const int thread = threadIdx.x, pair = thread % E::PLACES, bank = thread / E::PLACES, id = chosen.id;
    auto enter = [&](int at, int column) {
        if (FACTORS && bank == 1) active.v[at] = f.v.records(id);
        if (FACTORS && bank == 2) active.u[at] = f.u.records(id);
        if (bank > 0) return;
        active.expert[at] = p.bank.expert(id);
        // of equal ids of a token, which there must not be, all blocks take the same pair: they would wait for each other's t
        if (NT > 1) atomicMax(&active.pair[at][column], pair), active.token[at][column] = pair / p.slots;
        else active.pair[at][column] = pair;
        if (MODE == DOWN) active.weight[at][column] = chosen.weight;
    };
    if constexpr (MODE == DENSE) {
        if (thread == 0) active.expert[0] = p.bank.expert(0), active.count = 1;
        if (FACTORS && thread == 0) active.v[0] = f.v.records(0), active.u[0] = f.u.records(0);
        if (thread < NT) active.pair[0][thread] = thread < p.tokens ? thread : -1;
    } else if constexpr (NT == 1) {
        if (thread < E::THREADS) {
            const u32 votes = __ballot_sync(~0u, id >= 0);
            if (id >= 0) enter(__popc(votes & ((1u << pair) - 1)), 0);
            if (thread == 0) active.count = __popc(votes);
        }
    } else {
        const int rank = mark_tokens(active, id, pair / p.slots);
        if (thread < E::THREADS) {
            const int at = place_of(active, id, rank, p.num_experts);
            if (id >= 0) enter(at, rank % NT);  // tokens that share an expert write the same
        }
    }
    __syncthreads();
}

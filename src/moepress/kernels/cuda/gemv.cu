// SPDX-License-Identifier: Apache-2.0
// y = x W^T for one token, or up to eight, at the speed of W's bytes: dense layers, and the experts those tokens chose.
//
// A warp streams whole records through its own ring of shared memory and multiplies them on the tensor cores with W as
// the A operand. Codes stay integers, four to a register, which takes half the logic that numbers of 16 bits take; x becomes
// two bytes (bytes.cuh), which are two columns of B. Scale and zero come after. (W in the order of fragments is MARLIN's
// idea, the rest ours.)
// The warps of a block share the columns of a row block and add up in their order, so results do not depend on the grid
// and repeat bitwise.
//
// With several tokens an expert is read once and multiplied with those that chose it, four at a time. What gate and up make of
// x they leave as bytes: else every multiprocessor would convert the rows of all pairs, 4 us of 44 for Qwen3's eight tokens.
//
// Compensators W + u v: some groups first multiply v and publish t = v x; at the end of each row block a warp adds u t, for
// which it waits until t is complete. Row blocks of v go to the first blocks, which start first: nobody waits for a block
// that waits for a free multiprocessor.
#include "bytes.cuh"
#include "factor.cuh"

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
    int stages;
};

struct Compensators {
    const Expert* v;        // [num_experts] rows of t by k; records null: that expert has none
    const Expert* u;        // [num_experts] rows of W by columns of t
    u16* t;                 // [tokens * slots, columns] in the order of `t_place`, v x
    int* counters;          // {warps that have stored t, blocks that have ended}; both 0 between launches
    int columns;            // of t: 8, 16, 32 or a multiple of 64
    int v_row_blocks, v_records, u_records;
};

constexpr int MAX_SLOTS = 32;
constexpr int MAX_TOKENS = 8;
constexpr int MAX_PAIRS = 64;  // of several tokens
constexpr int MAX_EXPERTS = 512;
constexpr int MAX_SEGMENTS = 16;  // of 64 results of gate and up that a block makes bytes of
constexpr int PENDING = 5;        // row blocks of a group that wait for u t
constexpr int GEMV_STATIC = 41984;  // shared bytes that no instance declares more of

// ---- who runs -----------------------------------------------------------------------------------------------------

// The experts that were chosen, with up to NT of the tokens that chose them: one token's in the order of its slots, several
// tokens' in the order of their numbers, and then those with more than NT tokens once more.
template <int NT> struct Active {
    static constexpr int MOST = NT == 1 ? MAX_SLOTS : MAX_PAIRS;
    Expert expert[MOST];
    const u8 *v[MOST], *u[MOST];  // null: no compensator
    float weight[MOST][NT];       // DOWN
    short pair[MOST][NT];         // token * slots + slot; -1: no more tokens
    short token[MOST][NT];
    short compensated[MOST];      // which of them have compensators
    int count, compensated_count;
    u32 chosen[2][NT == 1 ? 1 : MAX_EXPERTS / 32];  // by anybody; by more than NT
    u32 tokens[NT == 1 ? 1 : MAX_EXPERTS / 4];      // a byte of tokens for each expert
};

__device__ __forceinline__ int id_of(const Arguments& p, int pair) {
    const long long id = p.ids_wide ? ((const long long*)p.ids)[pair] : (long long)((const int*)p.ids)[pair];
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
    if (id >= 0) atomicOr(&active.tokens[id / 4], 1u << (byte + token)), atomicOr(&active.chosen[0][id / 32], 1u << (id % 32));
    __syncthreads();
    const int rank = id < 0 ? 0 : __popc(active.tokens[id / 4] >> byte & ((1u << token) - 1));
    if (rank == NT) atomicOr(&active.chosen[1][id / 32], 1u << (id % 32));
    __syncthreads();
    return rank;
}

// Where in the list a token finds its expert, with `rank` tokens before it; and how long the list is. The first warps.
template <int NT> __device__ __forceinline__ int place_of(Active<NT>& active, int id, int rank) {
    int before[2] = {}, all[2] = {};
#pragma unroll
    for (int more = 0; more < 2; ++more)
#pragma unroll
        for (int w = 0; w < MAX_EXPERTS / 32; ++w) {
            const u32 word = active.chosen[more][w];
            all[more] += __popc(word);
            before[more] += __popc(w < id / 32 ? word : w == id / 32 ? word & ((1u << (id % 32)) - 1) : 0u);
        }
    if (threadIdx.x == 0) active.count = all[0] + all[1];
    return rank < NT ? before[0] : all[0] + before[1];
}

// All threads; ends with a barrier.
template <bool BF16, int NT, int MODE, bool FACTORS>
__device__ void find_active(Active<NT>& active, const Arguments& p, const Compensators& f) {
    const int thread = threadIdx.x;
    auto enter = [&](int at, int id, int pair, int column) {
        active.expert[at] = p.bank.expert(id);
        active.pair[at][column] = pair, active.token[at][column] = pair / p.slots;
        if (MODE == DOWN) active.weight[at][column] = weight_of<BF16>(p, pair);
        if (FACTORS) active.v[at] = f.v[id].records, active.u[at] = f.u[id].records;
    };
    if constexpr (MODE == DENSE) {
        if (thread == 0) active.expert[0] = p.bank.expert(0), active.count = 1;
        if (FACTORS && thread == 0) active.v[0] = f.v[0].records, active.u[0] = f.u[0].records;
        if (thread < NT) active.pair[0][thread] = thread < p.tokens ? thread : -1;
    } else if constexpr (NT == 1) {
        if (thread < WARP) {
            const int id = thread < p.slots ? id_of(p, thread) : -1;
            const u32 votes = __ballot_sync(~0u, id >= 0);
            if (id >= 0) enter(__popc(votes & ((1u << thread) - 1)), id, thread, 0);
            if (thread == 0) active.count = __popc(votes);
        }
    } else {
        const int id = thread < p.tokens * p.slots ? id_of(p, thread) : -1;
        const int rank = mark_tokens(active, id, thread / p.slots);
        if (thread < MAX_PAIRS) {
            const int at = place_of(active, id, rank);
            if (id >= 0) enter(at, id, thread, rank % NT);  // tokens that share an expert write the same
        }
    }
    __syncthreads();
    if constexpr (FACTORS) {
        if (thread < WARP) {
            int count = 0;
            for (int at = thread; at - thread < active.count; at += WARP) {
                const bool has = at < active.count && active.v[at];
                const u32 votes = __ballot_sync(~0u, has);
                if (has) active.compensated[count + __popc(votes & ((1u << thread) - 1))] = at;
                count += __popc(votes);
            }
            if (thread == 0) active.compensated_count = count;
        }
        __syncthreads();
    }
}

// ---- x in shared memory -------------------------------------------------------------------------------------------

// Rows of x as B operands of bytes in unit order, and the scale and sum of their segments.
struct Staged {
    u32* x;
    float* sums;
    int rows, words, row_sums, units;  // words and sums from row to row
};

// Floats of a row's sums; with padding, so that tokens' sums meet no bank twice.
template <int NT> __device__ __forceinline__ int row_sums(int segments) { return segments * SUM_FLOATS + (NT > 1 ? 2 : 0); }

// Octet `o` of a row. All lanes.
template <int G, bool BF16>
__device__ __forceinline__ void stage_octet(const Staged& s, const u32 (&octet)[4], int row, int o, bool inside) {
    Bytes bytes;
    bytes.make<G, BF16>(octet, o % 8);
    if (!inside) return;
    u32* to = s.x + row * s.words + o / 8 * UNIT_WORDS;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        to[Bytes::at(o % 8, i)] = bytes.high[i];
        to[Bytes::at(o % 8, i) + 16] = bytes.low[i];
    }
    if (Bytes::has_sums<G>(o % 8))
        *reinterpret_cast<float2*>(s.sums + row * s.row_sums + o / (G == 32 ? 4 : 8) * SUM_FLOATS) =
            make_float2(bytes.scale, bytes.sum);
}

// All threads take part; a thread asks for several octets of columns before it uses the first, because each takes most of
// a microsecond to come. `row_of(i)` is where row i of k values begins, null for zeros; `early` is the thread's first octet
// where EARLY, asked for together with the ids. (Rows by bulk copies, permuted and summed afterwards, took 1 us longer;
// a division for each octet, and arithmetic on octets past the end, 3 us with eight tokens.)
template <int G, bool BF16, int NT, bool EARLY, typename R>
__device__ void stage_rows(const Staged& s, R row_of, const u32 (&early)[4], int k) {
    constexpr int BATCH = NT == 1 ? 2 : 4;
    const int octets = 8 * s.units, rows_ahead = blockDim.x / octets, octets_ahead = blockDim.x - rows_ahead * octets;
    int row = threadIdx.x / octets, o = threadIdx.x - row * octets;
    bool first = true;
    // the warp's first lane is the last to pass the end
    while (__shfl_sync(~0u, row, 0) < s.rows) {
        u32 v[BATCH][4];
        int rows[BATCH], os[BATCH];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const bool known = EARLY && i == 0 && first;
            rows[i] = row, os[i] = o;
#pragma unroll
            for (int t = 0; t < 4; ++t) v[i][t] = known ? early[t] : 0;
            if (!known && row < s.rows)
                if (const u16* from = row_of(row)) load_octet<BF16>(v[i], from, 8 * o, k);
            row += rows_ahead, o += octets_ahead;
            if (o >= octets) o -= octets, ++row;
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i)
            if (i == 0 || __shfl_sync(~0u, rows[i], 0) < s.rows) stage_octet<G, BF16>(s, v[i], rows[i], os[i], rows[i] < s.rows);
        first = false;
    }
}

// Rows that are bytes already. All threads.
__device__ __forceinline__ void copy_rows(const Staged& s, const Passed& from) {
    const int bytes = s.rows * s.words * 4, sums = s.rows * s.row_sums * 4;
    const u32 x_at = shared_address(s.x), sums_at = shared_address(s.sums);
    for (int at = 16 * threadIdx.x; at < bytes; at += 16 * blockDim.x)
        copy16(x_at + at, reinterpret_cast<const u8*>(from.bytes) + at, true);
    for (int at = 16 * threadIdx.x; at < sums; at += 16 * blockDim.x)
        copy16(sums_at + at, reinterpret_cast<const u8*>(from.sums) + at, true);
    copy_commit();
    copy_wait<0>();
}

// ---- one record ---------------------------------------------------------------------------------------------------

// y += one record times x, whose segments are SEGMENTS to a unit. Columns of B are high and low bytes of the tokens by turns,
// so that a lane has the results of two rows and of token lane % 4. `x` and `sums` are its addresses for the record's first
// unit: of the bytes of its column, and of the sums of its token.
template <int B, int U, int G, int SEGMENTS>
__device__ __forceinline__ void multiply(float (&y)[2], u32 record, u32 x, u32 sums, int lane) {
    constexpr int M = Record<U, G>::GROUPS;
    u32 words[U * B], low[M], high[M];
#pragma unroll
    for (int c = 0; c < B; ++c)
        load_shared<U>(reinterpret_cast<u32(&)[U]>(words[c * U]), record + c * 128 * U + lane * 4 * U);
    const u32 meta = record + 128 * U * B + 4 * M * (lane / 4);
    load_shared<M>(low, meta);
    load_shared<M>(high, meta + 32 * M);
#pragma unroll
    for (int u = 0; u < U; ++u) {
        u32 a[8], b[4];
        load_shared<4>(b, x + 128 * u);
        unpack_bytes<B>(words + u * B, a);
#pragma unroll
        for (int s = 0; s < SEGMENTS; ++s) {
            int c[4];
#pragma unroll
            for (int j = s * 2 / SEGMENTS; j < (s + 1) * 2 / SEGMENTS; ++j)
                if (j == s * 2 / SEGMENTS) mma_bytes<false>(c, a + 4 * j, b[2 * j], b[2 * j + 1]);
                else mma_bytes<true>(c, a + 4 * j, b[2 * j], b[2 * j + 1]);
            const int m = M == 1 ? 0 : (u * SEGMENTS + s) * M / (U * SEGMENTS);
            float scale, sum;
            asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(scale), "=f"(sum) : "r"(sums + (u * SEGMENTS + s) * 8));
#pragma unroll
            for (int r = 0; r < 2; ++r) {
                const u32 meta = r ? high[m] : low[m];
                const float products = float(c[2 * r] * 256 + c[2 * r + 1]);
                y[r] = fmaf(Half<false>::lo(meta) * scale, fmaf(-Half<false>::hi(meta), sum, products), y[r]);
            }
        }
    }
}

template <int B, int U, int G>
__device__ __forceinline__ void multiply_any(float (&y)[2], u32 record, u32 x, u32 sums, int bits, int lane) {
    constexpr int SEGMENTS = Record<U, G>::SEGMENTS;
    if constexpr (B) {
        multiply<B, U, G, SEGMENTS>(y, record, x, sums, lane);
    } else {
        if (bits == 1) multiply<1, U, G, SEGMENTS>(y, record, x, sums, lane);
        else if (bits == 2) multiply<2, U, G, SEGMENTS>(y, record, x, sums, lane);
        else if (bits == 3) multiply<3, U, G, SEGMENTS>(y, record, x, sums, lane);
        else if (bits == 4) multiply<4, U, G, SEGMENTS>(y, record, x, sums, lane);
        else multiply<8, U, G, SEGMENTS>(y, record, x, sums, lane);
    }
}

// ---- the order of records -----------------------------------------------------------------------------------------

// How far a step goes: whole matrices, and the rest in row blocks (GATE_UP) or in records of a row block (DOWN). Known
// beforehand, because small matrices are many to a step: carrying over one by one took half of all instructions.
template <int WARPS, int MODE> struct Steps {
    int first_slot, first, slots, rest;

    __device__ Steps(const Arguments& p, int row_block, int stride, int warp) {
        const int from = MODE == GATE_UP ? row_block : warp, step = MODE == GATE_UP ? stride : WARPS;
        const int size = MODE == GATE_UP ? p.row_blocks : p.records;
        first_slot = from / size, first = from - first_slot * size;
        slots = step / size, rest = step - slots * size;
    }
};

// Walks a warp's records: columns warp, warp + WARPS, ... of every `stride`-th row block.
template <int WARPS, int MODE> struct Cursor {
    int slot, row_block, record;

    __device__ Cursor(const Steps<WARPS, MODE>& steps, int row_block, int warp)
        : slot(MODE == DENSE ? 0 : steps.first_slot), row_block(MODE == GATE_UP ? steps.first : row_block),
          record(MODE == DOWN ? steps.first : warp) {}
    // Whether that ends a row of records.
    __device__ bool next_record(const Arguments& p, const Steps<WARPS, MODE>& steps) {
        record += MODE == DOWN ? steps.rest : WARPS;
        if constexpr (MODE == DOWN) {
            slot += steps.slots;
            if (record >= p.records) record -= p.records, ++slot;
            return true;
        }
        return record >= p.records;
    }
    __device__ bool at_end_of_row(const Arguments& p, int count) const {
        return MODE == DOWN ? slot >= count : record >= p.records;
    }
    __device__ void next_row(const Arguments& p, const Steps<WARPS, MODE>& steps, int stride, int warp) {
        if constexpr (MODE == GATE_UP) {
            slot += steps.slots, row_block += steps.rest;
            if (row_block >= p.row_blocks) row_block -= p.row_blocks, ++slot;
        } else {
            row_block += stride;
        }
        if constexpr (MODE == DOWN) slot = steps.first_slot;
        record = MODE == DOWN ? steps.first : warp;
    }
    __device__ bool done(const Arguments& p, int count) const {
        return MODE == GATE_UP ? slot >= count : row_block >= p.row_blocks;
    }
};

// A warp's ring of records in shared memory.
struct Ring {
    u32 slots, bars, bytes;
    int stages, issue, take;
    u32 phase;
    bool asks;  // for copies: this lane

    __device__ Ring(u32 slots, u32 bars, u32 bytes, int stages)
        : slots(slots), bars(bars), bytes(bytes), stages(stages), issue(0), take(0), phase(0), asks(elect()) {}
    __device__ u32 head() const { return slots + take * bytes; }
    __device__ void release() {
        __syncwarp();
        if (++take == stages) take = 0, phase ^= 1;
    }
#if __CUDA_ARCH__ >= 900
    __device__ void fetch(const u8* from, u32 size, u64 policy, int lane) {
        if (asks) {
            mbarrier_expect(bars + 8 * issue, size);
            bulk_copy(slots + issue * bytes, from, size, bars + 8 * issue, policy);
        }
        if (++issue == stages) issue = 0;
    }
    __device__ void nothing() {}
    __device__ void wait() const { mbarrier_wait(bars + 8 * take, phase); }
#else
    __device__ void fetch(const u8* from, u32 size, u64, int lane) {
        for (u32 at = 16 * lane; at < size; at += 16 * WARP) copy16(slots + issue * bytes + at, from + at, true);
        copy_commit();
        if (++issue == stages) issue = 0;
    }
    __device__ void nothing() { copy_commit(); }  // keeps the count of groups in flight
    __device__ void wait() const {  // copies are counted, not signalled: all but the latest stages - 1
        if (stages == 2) copy_wait<1>();
        else if (stages == 3) copy_wait<2>();
        else copy_wait<3>();
        __syncwarp();
    }
#endif
};

// ---- the kernel ---------------------------------------------------------------------------------------------------

// The warps' sums of row `row` of a row block, added in their order. A warp has them for COLUMNS columns or tokens.
template <int COLUMNS, int WARPS> __device__ __forceinline__ float add_parts(const float* parts, int column, int row) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += parts[(w * COLUMNS + column) * ROWS + row];
    return sum;
}

// Stores the results of one row block; one of STORING warps, the `part`-th.
template <bool BF16, int NT, int COLUMNS, int MODE, int WARPS, int STORING>
__device__ void finish_row(const Arguments& p, const Active<NT>& active, const float* parts, int slot, int row_block, int part,
                           int lane) {
    for (int i = part * WARP + lane; i < ROWS * COLUMNS; i += STORING * WARP) {
        const int row = i % ROWS, column = i / ROWS;
        float sum = add_parts<COLUMNS, WARPS>(parts, column, row);
        if constexpr (MODE == GATE_UP) {  // rows 0..7 are gate, 8..15 up
            const float up = __shfl_down_sync(NT == 1 ? 0xffffu : ~0u, sum, 8, 16);
            const int n = row_block * 8 + row, pair = active.pair[slot][column];
            if (row < 8 && pair >= 0 && n < p.n) p.y[pair * p.n + n] = round16<BF16>(silu(sum) * up);
        } else {
            const int n = row_block * ROWS + row;
            if (n < p.n && column < p.tokens) {
                if (MODE == DENSE && p.bias) sum += widen<BF16>(p.bias[n]);
                p.y[column * p.n + n] = round16<BF16>(sum);
            }
        }
    }
}

// 64 results of gate and up for the tokens of an expert, and how many of the eight row blocks are there.
template <int NT> struct alignas(16) Segment {
    u16 h[NT][UNIT];
    int stored, unused[3];
};

// The same of gate and up where down takes bytes: eight groups have a segment's results between them, and the last of them
// makes the bytes.
template <int G, bool BF16, int NT, int WARPS>
__device__ void pass_row(const Arguments& p, const Active<NT>& active, const float* parts, Segment<NT>& segment, int slot,
                         int row_block, int lane) {
    for (int i = lane; i < ROWS * NT; i += WARP) {
        const int row = i % ROWS, column = i / ROWS;
        const float sum = add_parts<NT, WARPS>(parts, column, row), up = __shfl_down_sync(~0u, sum, 8, 16);
        const bool real = row_block * 8 + row < p.n;
        if (row < 8) segment.h[column][row_block % 8 * 8 + row] = real ? round16<BF16>(silu(sum) * up) : u16(0);
    }
    __syncwarp();
    int before = 0;
    if (lane == 0) __threadfence_block(), before = atomicAdd(&segment.stored, 1);
    if (__shfl_sync(~0u, before, 0) < 7) return;
    __threadfence_block();
    const int column = lane / 8, octet = lane % 8, pair = active.pair[slot][column], unit = row_block / 8, units = p.row_blocks / 8;
    const uint4 own = *reinterpret_cast<const uint4*>(segment.h[column] + 8 * octet);
    const u32 h[4] = {own.x, own.y, own.z, own.w};
    Bytes bytes;
    bytes.make<G, BF16>(h, octet);
    if (pair < 0) return;
    u32* words = p.passed.bytes + ((u64)pair * units + unit) * UNIT_WORDS + Bytes::at(octet, 0);
#pragma unroll
    for (int i = 0; i < 2; ++i) words[4 * i] = bytes.high[i], words[4 * i + 16] = bytes.low[i];
    constexpr int SEGMENTS = Record<1, G>::SEGMENTS;
    const int at = (unit * SEGMENTS + octet / (8 / SEGMENTS)) * SUM_FLOATS;
    if (Bytes::has_sums<G>(octet))
        *reinterpret_cast<float2*>(p.passed.sums + (u64)pair * row_sums<NT>(units * SEGMENTS) + at) = make_float2(bytes.scale, bytes.sum);
}

// The same for a row block of t; then says that this warp has stored its part.
template <bool BF16, int NT, int COLUMNS, int WARPS, int STORING>
__device__ void finish_t(const Compensators& f, const Active<NT>& active, const float* parts, int slot, int row_block, int part,
                         int lane) {
    for (int i = part * WARP + lane; i < ROWS * NT; i += STORING * WARP) {
        const int row = i % ROWS, token = i / ROWS, pair = active.pair[slot][token], column = row_block * ROWS + row;
        const float sum = add_parts<COLUMNS, WARPS>(parts, token, row);
        if (pair >= 0 && column < f.columns) f.t[pair * f.columns + t_place(column, f.columns)] = round16<BF16>(sum);
    }
    __syncwarp();
    if (lane == 0) {
        __threadfence();
        atomicAdd(f.counters, 1);
    }
}

// u t of one row block and of one expert's tokens.
template <int FB, int FU, int NT, bool BF16, int MODE> struct Correction {
    static constexpr int UNITS = FU > 0 ? FU : 1;  // of a record
    using Unit = FactorUnit<FB ? FB : 1>;
    static constexpr u32 BYTES = Record<UNITS, UNIT>::bytes(FB);
    const Compensators& f;
    const Active<NT>& active;

    __device__ const u8* record(int slot, int row_block, int i) const {
        return locate(active.u[slot], row_block, i / UNITS, f.u_records, BYTES);
    }
    __device__ void load(Unit& unit, int slot, int row_block, int i, int lane) const {
        unit.template load<UNITS>(record(slot, row_block, i), i % UNITS, lane);
    }
    __device__ const u16* row(int slot, int lane) const {  // of t; L1 has nothing older, because `await_count` acquires
        const int pair = active.pair[slot][NT == 1 ? 0 : lane / 8];
        return pair < 0 ? nullptr : f.t + pair * f.columns;
    }
    __device__ void prefetch(int slot, int row_block, int lane) const {
        if (128 * lane < BYTES) asm volatile("prefetch.global.L2 [%0];" ::"l"(record(slot, row_block, 0) + 128 * lane));
    }
    // part += u t, of rows lane / 4 and lane / 4 + 8 and of token lane % 4; the first unit is in `unit`.
    __device__ __forceinline__ void add(float (&part)[2], Unit& unit, int slot, int row_block, int lane) const {
        const u16* t = row(slot, lane);
        float c[4];
        if (MODE == GATE_UP && f.columns == UNIT) {
            u32 b[4];
            load_half_t<true>(b, t, lane / 4 % 2, lane);
            unit.template multiply_gated<BF16>(c, b);
            part[0] = fmaf(unit.scale(0), c[0], part[0]), part[1] = fmaf(unit.scale(1), c[3], part[1]);
            return;
        }
        for (int i = 0; i < f.u_records * UNITS; ++i) {
            u32 b[8];
            if (i > 0) load(unit, slot, row_block, i, lane);
            load_t<true>(b, t, i, f.columns, lane);
            if (f.columns <= UNIT / 2) unit.template multiply<BF16, HALF>(c, b);
            else unit.template multiply<BF16, WHOLE>(c, b);
            part[0] = fmaf(unit.scale(0), c[0], part[0]), part[1] = fmaf(unit.scale(1), c[2], part[1]);
        }
    }
};

// A warp's sums of one row block into its part of its group's buffer.
template <int NT> __device__ __forceinline__ void put_part(float* part, const float (&y)[2], int lane) {
    const int column = NT == 1 ? 0 : lane % 4;
    if (NT == 1 && lane % 4) return;
    part[column * ROWS + lane / 4] = y[0], part[column * ROWS + lane / 4 + 8] = y[1];
}

// GROUPS groups of WARPS warps: a group has a row block at a time, and all share x. With 32 warps on a multiprocessor
// the latencies of unpacking hide each other; with 16, four issue slots in ten were used. NT is 1 for one token, or 4, the columns of a product.
// FB is the bits of compensators' factors, 0 for none, and FU the units of u's records.
template <int B, int MAX_B, int U, int G, bool BF16, int NT, int MODE, int WARPS, int GROUPS, int FB, int FU>
__global__ void __launch_bounds__(WARPS* GROUPS* WARP, 1) gemv(const Arguments p, const Compensators f) {
    constexpr int SEGMENTS = Record<U, G>::SEGMENTS;
    constexpr bool FACTORS = FB > 0;
    // several tokens' results of experts are added up by token, in the warp's part of the buffer instead of in registers
    constexpr bool SCATTERS = NT > 1 && MODE == DOWN;
    constexpr int PARTS = SCATTERS ? MAX_TOKENS : NT;       // columns or tokens of a part
    constexpr int STORING = NT > 1 && WARPS >= 16 ? PARTS / 2 : 1;  // warps that store a row block
    constexpr u32 V_SIZE = FACTORS ? Record<U, UNIT>::bytes(FB) : 0, OWN_SIZE = Record<U, G>::bytes(MAX_B);
    constexpr u32 SLOT = OWN_SIZE > V_SIZE ? OWN_SIZE : V_SIZE;
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ Active<NT> active;
    __shared__ float all_parts[GROUPS][2][WARPS * PARTS * ROWS];
    constexpr bool PASSES = MODE == GATE_UP && NT > 1 && GROUPS == 8;
    // Where gate and up have several tokens, u t of up to PENDING turns is added after them, each by a warp of its own: waiting for
    // t, and a trip to memory at the end of each turn, took 3 of 49 us for Qwen3's eight tokens.
    constexpr bool DEFERS = FACTORS && MODE == GATE_UP && NT > 1;
    __shared__ float pending[DEFERS ? GROUPS : 1][DEFERS ? PENDING : 1][NT * ROWS];
    __shared__ Segment<NT> segments[PASSES ? MAX_SEGMENTS : 1];  // of this block, in the order of their turns
    static_assert(sizeof(active) + sizeof(all_parts) + sizeof(pending) + sizeof(segments) <= GEMV_STATIC, "launches count on it");
    // by a shuffle: the same for the whole warp, so addresses of rings and records can live in uniform registers
    const int lane = threadIdx.x % WARP, any_warp = __shfl_sync(~0u, threadIdx.x / WARP, 0);
    const int warp = any_warp % WARPS, group = any_warp / WARPS;
    auto& parts = all_parts[group];
    const int pairs = p.tokens * p.slots;
    u64* bars = reinterpret_cast<u64*>(shared + WARPS * GROUPS * p.stages * SLOT);
    Staged s;
    s.units = p.records * U;
    s.rows = MODE == DOWN ? pairs : p.tokens;
    s.words = s.units * UNIT_WORDS;
    s.row_sums = row_sums<NT>(s.units * SEGMENTS);
    s.x = reinterpret_cast<u32*>(bars + WARPS * GROUPS * p.stages);
    s.sums = reinterpret_cast<float*>(s.x + s.rows * s.words);

    Ring ring(shared_address(shared) + any_warp * p.stages * SLOT, shared_address(bars + any_warp * p.stages), SLOT, p.stages);
#if __CUDA_ARCH__ >= 900
    if (lane < p.stages) mbarrier_init(shared_address(bars + any_warp * p.stages + lane), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    const u64 policy = evict_first();
#else
    const u64 policy = 0;
#endif
    if (MODE == GATE_UP) await_producers();  // ids; for DOWN they are older than the kernel that is waited for
    constexpr bool EARLY = MODE == GATE_UP && NT == 1;
    u32 early[4] = {0, 0, 0, 0};
    if (EARLY && 8 * threadIdx.x < p.k) load_octet<BF16>(early, p.x, 8 * threadIdx.x, p.k);
    if (PASSES && threadIdx.x < MAX_SEGMENTS) segments[threadIdx.x].stored = 0;
    find_active<BF16, NT, MODE, FACTORS>(active, p, f);
    const int count = active.count;

    // the first row blocks go to different multiprocessors, whole segments to those from the last, since the first multiply v
    const int first = PASSES && p.passed.bytes ? (gridDim.x - 1 - blockIdx.x) * 8 + group : blockIdx.x + group * gridDim.x;
    const int stride = gridDim.x * GROUPS;
    const Steps<WARPS, MODE> steps(p, first, stride, warp);
    Cursor<WARPS, MODE> ahead(steps, first, warp), here = ahead;
    const u8* row = nullptr;  // of records that `ahead` is in; null at the end
    u32 size = 0;
    auto find_row = [&] {
        while (!ahead.done(p, count) && ahead.at_end_of_row(p, count)) ahead.next_row(p, steps, stride, warp);
        row = nullptr;
        if (ahead.done(p, count)) return;
        const Expert& e = active.expert[ahead.slot];
        size = Record<U, G>::bytes(B ? B : e.word_bits);
        row = locate(e.records, ahead.row_block, 0, p.records, size);
    };
    auto fetch_next = [&] {
        if (!row) return ring.nothing();
        ring.fetch(row + ahead.record * (4 * size), size, policy, lane);
        if (ahead.next_record(p, steps)) find_row();
    };
    find_row();
    // row blocks of t go to groups that have fewer of their own; with whole segments, to blocks that do
    int item = PASSES && p.passed.bytes ? blockIdx.x * GROUPS + group : blockIdx.x + (GROUPS - 1 - group) * gridDim.x;
    const int items = FACTORS ? active.compensated_count * f.v_row_blocks : 0;
    int v_slot = 0, v_row_block = 0, v_record = 0;
    auto fetch_v = [&] {
        if (v_record >= f.v_records) return ring.nothing();
        ring.fetch(locate(active.v[v_slot], v_row_block, v_record, f.v_records, V_SIZE), V_SIZE, policy, lane);
        v_record += WARPS;
    };
    auto fetch_first = [&] {
        if (item >= items) {
#pragma unroll 1
            for (int i = 0; i < p.stages - 1; ++i) fetch_next();
            return;
        }
        v_slot = active.compensated[item / f.v_row_blocks], v_row_block = item % f.v_row_blocks, v_record = warp;
#pragma unroll 1
        for (int i = 0; i < p.stages - 1; ++i) fetch_v();
    };
    if constexpr (FACTORS) fetch_first();
    else
#pragma unroll 1
        for (int i = 0; i < p.stages - 1; ++i) fetch_next();

    if (MODE != GATE_UP) await_producers();
    allow_dependents();
    auto row_of = [&](int row) -> const u16* {
        if (MODE != DOWN || NT > 1) return p.x + (u64)row * p.k;
        return row < count ? p.x + (u64)active.pair[row][0] * p.k : nullptr;
    };
    if (MODE == DOWN && NT > 1 && p.passed.bytes) copy_rows(s, p.passed);
    else stage_rows<G, BF16, NT, EARLY>(s, row_of, early, p.k);
    __syncthreads();

    // the staged row of the input of an expert's column; any for columns without a token
    auto staged = [&](int slot, int column) {
        if (NT == 1) return MODE == DOWN ? slot : 0;
        return MODE == DOWN ? max(int(active.pair[slot][column]), 0) : int(active.token[slot][column]);
    };
    // of a lane's column: its half of a unit for high or low bytes, and there its own 16
    const u32 x_lane = shared_address(s.x) + lane / 4 % 2 * 64 + lane % 4 * 16, sums_at = shared_address(s.sums);
    auto x_of = [&](int slot, int record) { return x_lane + staged(slot, lane / 8) * s.words * 4 + 128 * U * record; };
    auto sums_of = [&](int slot, int record) {
        return sums_at + 4 * staged(slot, lane % 4) * s.row_sums + 8 * SEGMENTS * U * record;
    };
    // adds an expert's results to those of its tokens
    auto scatter = [&](float* part, int slot, const float (&y)[2]) {
        if (active.pair[slot][lane % 4] < 0) return;
        float* to = part + active.token[slot][lane % 4] * ROWS + lane / 4;
        to[0] += active.weight[slot][lane % 4] * y[0], to[8] += active.weight[slot][lane % 4] * y[1];
    };
    int turn = 0;
    // below STORING: this warp stores, and that part
    auto storing = [&] { return (warp + WARPS - turn * STORING % WARPS) % WARPS; };

    if constexpr (FACTORS) {
        for (; item < items; ++turn) {
            const int slot = v_slot, row_block = v_row_block;
            float y[2] = {};
            for (int record = warp; record < f.v_records; record += WARPS) {
                fetch_v();
                ring.wait();
                multiply<FB, U, UNIT, SEGMENTS>(y, ring.head(), x_of(slot, record), sums_of(slot, record), lane);
                ring.release();
            }
            item += stride;
            fetch_first();
            put_part<NT>(parts[turn % 2] + warp * PARTS * ROWS, y, lane);
            named_barrier(1 + group, WARPS * WARP);
            if (storing() < STORING)
                finish_t<BF16, NT, PARTS, WARPS, STORING>(f, active, parts[turn % 2], slot, row_block, storing(), lane);
        }
    }

    const Correction<FB, FU, NT, BF16, MODE> correction = {f, active};
    typename Correction<FB, FU, NT, BF16, MODE>::Unit unit;
    bool t_is_there = false;
    auto await_t = [&] {
        if (!t_is_there) await_count(f.counters, STORING * items, lane), t_is_there = true;
    };
    const bool passes = PASSES && p.passed.bytes;
    Segment<NT>* segment = segments;
    int waiting = 0;  // row blocks, from `late` on
    Cursor<WARPS, MODE> late = here;
    auto add_late = [&] {
        named_barrier(1 + group, WARPS * WARP);
        for (int i = 0; i < waiting; ++i, ++segment, late.next_row(p, steps, stride, warp)) {
            if (i % WARPS != warp) continue;
            float *sums = pending[group][i], part[2] = {};
            if (active.u[late.slot]) {
                correction.load(unit, late.slot, late.row_block, 0, lane);
                await_t();
                correction.add(part, unit, late.slot, late.row_block, lane);
                sums[lane % 4 * ROWS + lane / 4] += part[0], sums[lane % 4 * ROWS + lane / 4 + 8] += part[1];
                __syncwarp();
            }
            if constexpr (PASSES)
                if (passes) pass_row<G, BF16, NT, 1>(p, active, sums, *segment, late.slot, late.row_block, lane);
            if (!passes) finish_row<BF16, NT, NT, MODE, 1, 1>(p, active, sums, late.slot, late.row_block, 0, lane);
        }
        waiting = 0;
    };
    for (; !here.done(p, count); ++turn) {
        const int row_block = here.row_block, row_slot = here.slot;
        const u32 row_x = x_of(row_slot, 0), row_sums = sums_of(row_slot, 0);
        float y[2] = {}, *own = parts[turn % 2] + warp * PARTS * ROWS;
        if constexpr (SCATTERS) {
#pragma unroll
            for (int i = 0; i < PARTS * ROWS / WARP; ++i) own[i * WARP + lane] = 0.f;
            __syncwarp();
        }
        // u t: of one expert by the last warp, which has the fewest columns, of down's by one warp each; asked for here and
        // multiplied at the end
        int compensated = MODE == DOWN ? warp : warp == WARPS - 1 ? row_slot : count;
        if constexpr (FACTORS)
            if (compensated < count && active.u[compensated]) {
                if constexpr (DEFERS) correction.prefetch(compensated, row_block, lane);
                else correction.load(unit, compensated, row_block, 0, lane);
            }
        while (!here.at_end_of_row(p, count)) {
            fetch_next();
            ring.wait();
            const int bits = B ? B : active.expert[here.slot].word_bits;
            float part[2] = {};
            const u32 x = MODE == DOWN ? x_of(here.slot, here.record) : row_x + 128 * U * here.record;
            const u32 sums = MODE == DOWN ? sums_of(here.slot, here.record) : row_sums + 8 * SEGMENTS * U * here.record;
            multiply_any<B, U, G>(part, ring.head(), x, sums, bits, lane);
            ring.release();
            if constexpr (SCATTERS) scatter(own, here.slot, part);
            else
#pragma unroll
                for (int i = 0; i < 2; ++i) y[i] = MODE == DOWN ? fmaf(active.weight[here.slot][0], part[i], y[i]) : y[i] + part[i];
            here.next_record(p, steps);
        }
        if constexpr (FACTORS && !DEFERS) {
            for (bool loaded = true; compensated < count; compensated += MODE == DOWN ? WARPS : count, loaded = false) {
                if (!active.u[compensated]) continue;
                await_t();
                float part[2] = {};
                if (!loaded) correction.load(unit, compensated, row_block, 0, lane);
                correction.add(part, unit, compensated, row_block, lane);
                if constexpr (SCATTERS) scatter(own, compensated, part);
                else
#pragma unroll
                    for (int i = 0; i < 2; ++i) y[i] = fmaf(MODE == DOWN ? active.weight[compensated][0] : 1.f, part[i], y[i]);
            }
        }
        if constexpr (!SCATTERS) put_part<NT>(own, y, lane);
        named_barrier(1 + group, WARPS * WARP);
        if constexpr (DEFERS) {
            if (storing() == 0)
                for (int i = lane; i < NT * ROWS; i += WARP)
                    pending[group][waiting][i] = add_parts<NT, WARPS>(parts[turn % 2], i / ROWS, i % ROWS);
            here.next_row(p, steps, stride, warp);
            if (++waiting == PENDING || here.done(p, count)) add_late();
            continue;
        }
        if constexpr (PASSES)
            if (passes && storing() == 0)
                pass_row<G, BF16, NT, WARPS>(p, active, parts[turn % 2], *segment, row_slot, row_block, lane);
        if (!passes && storing() < STORING)
            finish_row<BF16, NT, PARTS, MODE, WARPS, STORING>(p, active, parts[turn % 2], row_slot, row_block, storing(), lane);
        if (PASSES) ++segment;
        here.next_row(p, steps, stride, warp);
    }
    if constexpr (FACTORS) {  // the last block to end leaves the counters as it found them
        __syncthreads();
        if (threadIdx.x > 0) return;
        const u32 last = gridDim.x - 1;
        if (atomicInc(reinterpret_cast<u32*>(f.counters + 1), last) == last) f.counters[0] = 0;
    }
}

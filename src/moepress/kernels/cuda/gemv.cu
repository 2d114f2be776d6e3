// SPDX-License-Identifier: Apache-2.0
// y = x W^T for one token, or up to eight, at the speed of W's bytes: dense layers, and the experts those tokens chose.
//
// A warp streams whole records through its own ring of shared memory and multiplies them on the tensor cores with W as
// the A operand and a column for each token. Codes keep the base that unpacking adds to them and are neither shifted to
// zero nor scaled one by one: a group's accumulator starts at -sum(base x), known per group since x was staged, and scale
// and zero are applied to the group's sum, (sum(q x) - zero sum(x)) scale (ours; the fragment order of W is MARLIN's idea).
// The warps of a block share the columns of a row block and add up in their order, so results do not depend on the grid
// and repeat bitwise.
//
// With several tokens an expert is read once and multiplied with all of them; only those that chose it are kept.
//
// Compensators W + u v: some groups first multiply v and publish t = v x; at the end of each row block a warp adds u t, for
// which it waits until t is complete. Row blocks of v go to the first blocks, which start first: nobody waits for a block
// that waits for a free multiprocessor.
#include "sums.cuh"

struct Arguments {
    const u16* x;           // DENSE, GATE_UP [tokens, k], DOWN [tokens * slots, k]
    u16* y;                 // DENSE, DOWN [tokens, n], GATE_UP [tokens * slots, n]
    const u16* bias;        // DENSE [n] or null
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
    u16* t;                 // [tokens * slots, columns], v x
    int* counters;          // {warps that have stored t, blocks that have ended}; both 0 between launches
    int columns;            // of t, a multiple of 8
    int v_row_blocks, v_records, u_records;
};

constexpr int MAX_SLOTS = 32;
constexpr int MAX_PAIRS = 64;  // of several tokens
constexpr int MAX_EXPERTS = 512;

// ---- who runs -----------------------------------------------------------------------------------------------------

// The experts that were chosen: one token's in the order of its slots, several tokens' in the order of their numbers.
template <int NT> struct Active {
    static constexpr int MOST = NT == 1 ? MAX_SLOTS : MAX_PAIRS;
    Expert expert[MOST];
    const u8 *v[MOST], *u[MOST];  // null: no compensator
    float weight[MOST][NT];       // DOWN; 0 for tokens that did not choose it
    short pair[MOST][NT];         // token * slots + slot; -1 for those
    short compensated[MOST];      // which of them have compensators
    int count, compensated_count;
    u32 chosen[NT == 1 ? 1 : MAX_EXPERTS / 32];
};

__device__ __forceinline__ int id_of(const Arguments& p, int pair) {
    const long long id = p.ids_wide ? ((const long long*)p.ids)[pair] : (long long)((const int*)p.ids)[pair];
    return id >= 0 && id < p.num_experts ? int(id) : -1;
}

template <bool BF16> __device__ __forceinline__ float weight_of(const Arguments& p, int pair) {
    return p.weights_wide ? ((const float*)p.weights)[pair] : widen<BF16>(((const u16*)p.weights)[pair]);
}

// All threads; ends with a barrier.
template <bool BF16, int NT, int MODE, bool FACTORS>
__device__ void find_active(Active<NT>& active, const Arguments& p, const Compensators& f) {
    const int thread = threadIdx.x;
    auto enter = [&](int at, int id, int pair) {
        active.expert[at] = p.bank.expert(id);
        active.pair[at][pair / p.slots] = pair;
        if (MODE == DOWN) active.weight[at][pair / p.slots] = weight_of<BF16>(p, pair);
        if (FACTORS) active.v[at] = f.v[id].records, active.u[at] = f.u[id].records;
    };
    if constexpr (MODE == DENSE) {
        if (thread == 0) active.expert[0] = p.bank.expert(0), active.count = 1;
        if (thread < NT) active.pair[0][thread] = thread < p.tokens ? thread : -1;
    } else if constexpr (NT == 1) {
        if (thread < WARP) {
            const int id = thread < p.slots ? id_of(p, thread) : -1;
            const u32 votes = __ballot_sync(~0u, id >= 0);
            if (id >= 0) enter(__popc(votes & ((1u << thread) - 1)), id, thread);
            if (thread == 0) active.count = __popc(votes);
        }
    } else {
        const int id = thread < p.tokens * p.slots ? id_of(p, thread) : -1;
        if (thread < MAX_EXPERTS / 32) active.chosen[thread] = 0;
        for (int i = thread; i < MAX_PAIRS * NT; i += blockDim.x)
            active.pair[i / NT][i % NT] = -1, active.weight[i / NT][i % NT] = 0.f;
        __syncthreads();
        if (id >= 0) atomicOr(&active.chosen[id / 32], 1u << (id % 32));
        __syncthreads();
        int before = 0, all = 0;
#pragma unroll
        for (int w = 0; w < MAX_EXPERTS / 32; ++w) {
            const u32 word = active.chosen[w];
            all += __popc(word);
            before += __popc(w < id / 32 ? word : w == id / 32 ? word & ((1u << (id % 32)) - 1) : 0u);
        }
        if (id >= 0) enter(before, id, thread);  // tokens that share an expert write the same
        if (thread == 0) active.count = all;
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

// Rows of x as B fragments in unit order, and the sums of their segments.
struct Staged {
    u32* x;
    float* sums;
    int rows, words, row_sums, units;  // words and sums from row to row
};

// All threads take part; a thread asks for several octets of columns before it uses the first, because each takes most of
// a microsecond to come. `row_of(i)` is where row i of k values begins, null for zeros; `early` is the thread's first octet
// where EARLY, asked for together with the ids. (Rows by bulk copies, permuted and summed afterwards, took 1 us longer.)
template <int B, int G, bool BF16, int NT, bool EARLY, typename R>
__device__ void stage_rows(const Staged& s, R row_of, const u32 (&early)[4], int k) {
    constexpr int SEGMENTS = G == 32 ? 2 : 1, SPAN = 8 / SEGMENTS, FLOATS = Sums<B>::FLOATS, BATCH = NT == 1 ? 2 : 4;
    const int octets = 8 * s.units;
    for (int first = threadIdx.x; first - int(threadIdx.x) < s.rows * octets; first += BATCH * blockDim.x) {
        u32 v[BATCH][4];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int at = first + i * blockDim.x, row = at / octets;
            const bool known = EARLY && i == 0 && first == threadIdx.x;
#pragma unroll
            for (int t = 0; t < 4; ++t) v[i][t] = known ? early[t] : 0;
            if (!known && row < s.rows)
                if (const u16* from = row_of(row)) load_octet<BF16>(v[i], from, 8 * (at - row * octets), k);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int at = first + i * blockDim.x, row = at / octets, o = at - row * octets, pair = o % 8;
            const bool inside = row < s.rows;
#pragma unroll
            for (int t = 0; t < 4; ++t)
                if (inside) s.x[row * s.words + (o / 8) * 32 + t * 8 + pair] = v[i][t];
            float part[FLOATS];
            segment_sums<B, G, BF16>(part, v[i], pair);
            float* out = s.sums + row * s.row_sums + (o / 8 * SEGMENTS + pair / SPAN) * FLOATS;
            if (inside && pair % SPAN == 0)
#pragma unroll
                for (int j = 0; j < (B ? 2 : 1 + WIDTHS); ++j) out[j] = part[j];
        }
    }
}

// ---- one record ---------------------------------------------------------------------------------------------------

// The sums of one segment for the lane's columns, {sum x, -sum base x} of each.
template <int NT, int FLOATS>
__device__ __forceinline__ void load_sums(float (&sum)[2], float (&start)[2], const u32 (&at)[2], int offset, int base_at) {
#pragma unroll
    for (int i = 0; i < (NT == 1 ? 1 : 2); ++i) {
        if constexpr (FLOATS == 2) {
            asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(sum[i]), "=f"(start[i]) : "r"(at[i] + offset));
        } else {
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(sum[i]) : "r"(at[i] + offset));
            asm volatile("ld.shared.f32 %0, [%1];" : "=f"(start[i]) : "r"(at[i] + offset + 4 * base_at));
        }
    }
    if constexpr (NT == 1) sum[1] = sum[0], start[1] = start[0];
}

template <int NT> constexpr int OWN = NT == 1 ? 2 : 4;  // a lane's results: two rows by one or two tokens

// y += one record times x. `x` and `sums` are this lane's addresses for the record's first unit: of the token whose column
// of the B operand it holds, and of those whose results it holds.
template <int B, int U, int G, bool BF16, int NT, int FLOATS>
__device__ __forceinline__ void multiply(float (&y)[OWN<NT>], u32 record, u32 x, const u32 (&sums)[2], int base_at, int lane) {
    constexpr int M = Record<U, G>::GROUPS, SEGMENTS = Record<U, G>::SEGMENTS;
    u32 words[U * B], low[M], high[M];
#pragma unroll
    for (int c = 0; c < B; ++c)
        load_shared<U>(reinterpret_cast<u32(&)[U]>(words[c * U]), record + c * 128 * U + lane * 4 * U);
    const u32 meta = record + 128 * U * B + 4 * M * (lane / 4);
    load_shared<M>(low, meta);
    load_shared<M>(high, meta + 32 * M);
#pragma unroll
    for (int u = 0; u < U; ++u) {
        u32 a[16], b[8];
        load_shared<8>(b, x + 128 * u);
        unpack<B, BF16>(words + u * B, a);
#pragma unroll
        for (int s = 0; s < SEGMENTS; ++s) {
            float sum[2], start[2];
            load_sums<NT, FLOATS>(sum, start, sums, (u * SEGMENTS + s) * 4 * FLOATS, base_at);
            float c[4];
#pragma unroll
            for (int j = s * 4 / SEGMENTS; j < (s + 1) * 4 / SEGMENTS; ++j)
                if (j == s * 4 / SEGMENTS) mma<BF16, false>(c, a + 4 * j, b[2 * j], b[2 * j + 1]);
                else mma<BF16, true>(c, a + 4 * j, b[2 * j], b[2 * j + 1]);
            const int m = M == 1 ? 0 : (u * SEGMENTS + s) * M / (U * SEGMENTS);
            const float s0 = Half<false>::lo(low[m]), z0 = Half<false>::hi(low[m]);
            const float s1 = Half<false>::lo(high[m]), z1 = Half<false>::hi(high[m]);
#pragma unroll
            for (int i = 0; i < OWN<NT> / 2; ++i) {
                y[i] = fmaf(s0, c[i] + fmaf(-z0, sum[i], start[i]), y[i]);
                y[OWN<NT> / 2 + i] = fmaf(s1, c[2 + i] + fmaf(-z1, sum[i], start[i]), y[OWN<NT> / 2 + i]);
            }
        }
    }
}

template <int B, int U, int G, bool BF16, int NT>
__device__ __forceinline__ void multiply_any(float (&y)[OWN<NT>], u32 record, u32 x, const u32 (&sums)[2], int bits, int lane) {
    if constexpr (B) {
        multiply<B, U, G, BF16, NT, 2>(y, record, x, sums, 1, lane);
    } else {
        if (bits == 1) multiply<1, U, G, BF16, NT, 8>(y, record, x, sums, 1, lane);
        else if (bits == 2) multiply<2, U, G, BF16, NT, 8>(y, record, x, sums, 2, lane);
        else if (bits == 3) multiply<3, U, G, BF16, NT, 8>(y, record, x, sums, 3, lane);
        else if (bits == 4) multiply<4, U, G, BF16, NT, 8>(y, record, x, sums, 4, lane);
        else multiply<8, U, G, BF16, NT, 8>(y, record, x, sums, 5, lane);
    }
}

// A unit of a factor, in registers: its zero is the middle code, which is taken off the codes, so it needs no sums.
template <int B> struct FactorUnit {
    u32 words[B], low, high;

    // Unit u of a record of U units, from shared memory or from global memory.
    template <int U> __device__ __forceinline__ void load_shared_unit(u32 record, int u, int lane) {
#pragma unroll
        for (int c = 0; c < B; ++c) words[c] = load_word(record + word_at<U>(u * B + c, lane));
        low = load_word(record + 128 * U * B + 4 * (U * (lane / 4) + u));
        high = load_word(record + 128 * U * B + 4 * (U * (lane / 4 + 8) + u));
    }
    template <int U> __device__ __forceinline__ void load_global_unit(const u8* record, int u, int lane) {
#pragma unroll
        for (int c = 0; c < B; ++c) words[c] = *reinterpret_cast<const u32*>(record + word_at<U>(u * B + c, lane));
        low = *reinterpret_cast<const u32*>(record + 128 * U * B + 4 * (U * (lane / 4) + u));
        high = *reinterpret_cast<const u32*>(record + 128 * U * B + 4 * (U * (lane / 4 + 8) + u));
    }
    // y += this unit times b
    template <bool BF16, int NT> __device__ __forceinline__ void multiply(float (&y)[OWN<NT>], const u32 (&b)[8]) const {
        using H = Half<BF16>;
        u32 a[16];
        unpack<B, BF16>(words, a);
#pragma unroll
        for (int pair = 0; pair < 8; ++pair)
            if (B < 8 || !BF16) {  // bytes come less 128 in bfloat16
                const int p = place<B, BF16>(pair);
                const u32 minus = (0x8000u | (H::exponent(p) + (1u << (B - 1 + p)))) * 0x10001u;
                a[2 * pair] = H::fma(a[2 * pair], H::ONE, minus);
                a[2 * pair + 1] = H::fma(a[2 * pair + 1], H::ONE, minus);
            }
        float c[4];
        mma<BF16, false>(c, a, b[0], b[1]);
#pragma unroll
        for (int j = 1; j < 4; ++j) mma<BF16, true>(c, a + 4 * j, b[2 * j], b[2 * j + 1]);
#pragma unroll
        for (int i = 0; i < OWN<NT> / 2; ++i) {
            y[i] = fmaf(Half<false>::lo(low), c[i], y[i]);
            y[OWN<NT> / 2 + i] = fmaf(Half<false>::lo(high), c[2 + i], y[OWN<NT> / 2 + i]);
        }
    }

private:
    template <int U> static __device__ __forceinline__ int word_at(int word, int lane) {
        return word / U * 128 * U + lane * 4 * U + word % U * 4;
    }
    static __device__ __forceinline__ u32 load_word(u32 address) {
        u32 x[1];
        load_shared<1>(x, address);
        return x[0];
    }
};

// ---- the order of records -----------------------------------------------------------------------------------------

// Walks a warp's records: columns warp, warp + WARPS, ... of every `stride`-th row block.
template <int WARPS, int NT, int MODE> struct Cursor {
    int slot, row_block, record, warp, stride;

    __device__ Cursor(int first, int stride, int warp) : slot(0), row_block(first), record(warp), warp(warp), stride(stride) {}
    __device__ void settle(const Arguments& p, int count) {  // carries an overflow into the next slot
        if constexpr (MODE == GATE_UP)
            while (row_block >= p.row_blocks && slot < count) row_block -= p.row_blocks, ++slot;
        if constexpr (MODE == DOWN)
            while (record >= p.records && slot < count) record -= p.records, ++slot;
    }
    __device__ void next_record(const Arguments& p, int count) {
        record += WARPS;
        if constexpr (MODE == DOWN) settle(p, count);
    }
    __device__ bool at_end_of_row(const Arguments& p, int count) const {
        return MODE == DOWN ? slot >= count : record >= p.records;
    }
    __device__ void next_row(const Arguments& p, int count) {
        row_block += stride;
        record = warp;
        if constexpr (MODE == DOWN) slot = 0;
        settle(p, count);
    }
    __device__ bool done(const Arguments& p, int count) const {
        return MODE == GATE_UP ? slot >= count : row_block >= p.row_blocks;
    }
};

// Record `record` of a row block, where a matrix has `records` of them a row block, of `size` bytes.
__device__ __forceinline__ const u8* locate(const u8* matrix, int row_block, int record, int records, u32 size) {
    return matrix + (u64)((row_block / 4 * records + record) * 4 + row_block % 4) * size;
}

// A warp's ring of records in shared memory.
struct Ring {
    u32 slots, bars, bytes;
    int stages, issue, take;
    u32 phase;

    __device__ Ring(u32 slots, u32 bars, u32 bytes, int stages)
        : slots(slots), bars(bars), bytes(bytes), stages(stages), issue(0), take(0), phase(0) {}
    __device__ u32 head() const { return slots + take * bytes; }
    __device__ void release() {
        __syncwarp();
        if (++take == stages) take = 0, phase ^= 1;
    }
#if __CUDA_ARCH__ >= 900
    __device__ void fetch(const u8* from, u32 size, u64 policy, int lane) {
        if (lane == 0) {
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

// The warps' sums of row `row` of a row block, added in their order.
template <int NT, int WARPS> __device__ __forceinline__ float add_parts(const float* parts, int token, int row) {
    float sum = 0.f;
#pragma unroll
    for (int w = 0; w < WARPS; ++w) sum += parts[(w * NT + token) * ROWS + row];
    return sum;
}

// Stores the results of one row block; one of STORING warps, the `part`-th.
template <bool BF16, int NT, int MODE, int WARPS, int STORING>
__device__ void finish_row(const Arguments& p, const Active<NT>& active, const float* parts, int slot, int row_block, int part,
                           int lane) {
    for (int i = part * WARP + lane; i < ROWS * NT; i += STORING * WARP) {
        const int row = i % ROWS, token = i / ROWS;
        float sum = add_parts<NT, WARPS>(parts, token, row);
        if constexpr (MODE == GATE_UP) {  // rows 0..7 are gate, 8..15 up
            const float up = __shfl_down_sync(NT == 1 ? 0xffffu : ~0u, sum, 8, 16);
            const int n = row_block * 8 + row, pair = active.pair[slot][token];
            if (row < 8 && pair >= 0 && n < p.n) p.y[pair * p.n + n] = round16<BF16>(sum / (1.f + __expf(-sum)) * up);
        } else {
            const int n = row_block * ROWS + row;
            if (n < p.n && token < p.tokens) {
                if (MODE == DENSE && p.bias) sum += widen<BF16>(p.bias[n]);
                p.y[token * p.n + n] = round16<BF16>(sum);
            }
        }
    }
}

// The same for a row block of t; then says that this warp has stored its part.
template <bool BF16, int NT, int WARPS, int STORING>
__device__ void finish_t(const Compensators& f, const Active<NT>& active, const float* parts, int slot, int row_block, int part,
                         int lane) {
    for (int i = part * WARP + lane; i < ROWS * NT; i += STORING * WARP) {
        const int row = i % ROWS, token = i / ROWS, pair = active.pair[slot][token], column = row_block * ROWS + row;
        const float sum = add_parts<NT, WARPS>(parts, token, row);
        if (pair >= 0 && column < f.columns) f.t[pair * f.columns + column] = round16<BF16>(sum);
    }
    __syncwarp();
    if (lane == 0) {
        __threadfence();
        atomicAdd(f.counters, 1);
    }
}

__device__ __forceinline__ void await_count(const int* counter, int count, int lane) {
    if (lane == 0) {
        int found;
        do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(found) : "l"(counter) : "memory");
        while (found < count);
    }
    __syncwarp();
}

// A row of t as a B operand. Nobody on this multiprocessor has read it before it was complete: L1 has nothing stale.
__device__ __forceinline__ void load_t(u32 (&b)[8], const u16* row, int column, int columns, int lane) {
#pragma unroll
    for (int octet = 0; octet < 8; ++octet) {
        b[octet] = 0;
        const int at = column + 8 * octet;
        const u16* from = row + at + 2 * (lane % 4);
        if (row && at < columns) asm volatile("ld.global.u32 %0, [%1];" : "=r"(b[octet]) : "l"(from) : "memory");
    }
}

// A warp's sums of one row block into its group's buffer.
template <int NT> __device__ __forceinline__ void put_part(float* out, const float (&y)[OWN<NT>], int lane) {
    if constexpr (NT == 1) {
        if (lane % 4 == 0) out[lane / 4] = y[0], out[lane / 4 + 8] = y[1];
    } else {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            out[(2 * (lane % 4) + i) * ROWS + lane / 4] = y[i];
            out[(2 * (lane % 4) + i) * ROWS + lane / 4 + 8] = y[2 + i];
        }
    }
}

// GROUPS groups of WARPS warps: a group has a row block at a time, and all share x. With 32 warps on a multiprocessor
// the latencies of unpacking hide each other; with 16, four issue slots in ten were used. NT is 1 or 8 columns for tokens.
// FB is the bits of compensators' factors, 0 for none, and FU the units of u's records.
template <int B, int MAX_B, int U, int G, bool BF16, int NT, int MODE, int WARPS, int GROUPS, int FB, int FU>
__global__ void __launch_bounds__(WARPS* GROUPS* WARP, 1) gemv(const Arguments p, const Compensators f) {
    constexpr int FLOATS = Sums<B>::FLOATS, SEGMENTS = Record<U, G>::SEGMENTS;
    constexpr bool FACTORS = FB > 0;
    constexpr int U_UNITS = FU > 0 ? FU : 1;
    constexpr int STORING = NT > 1 && WARPS >= 16 ? 4 : 1;  // warps that store a row block
    constexpr u32 V_SIZE = FACTORS ? Record<U, UNIT>::bytes(FB) : 0, OWN_SIZE = Record<U, G>::bytes(MAX_B);
    constexpr u32 SLOT = OWN_SIZE > V_SIZE ? OWN_SIZE : V_SIZE;
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ Active<NT> active;
    __shared__ float all_parts[GROUPS][2][WARPS * NT * ROWS];
    // by a shuffle: the same for the whole warp, so addresses of rings and records can live in uniform registers
    const int lane = threadIdx.x % WARP, any_warp = __shfl_sync(~0u, threadIdx.x / WARP, 0);
    const int warp = any_warp % WARPS, group = any_warp / WARPS;
    auto& parts = all_parts[group];
    const int pairs = p.tokens * p.slots;
    u64* bars = reinterpret_cast<u64*>(shared + WARPS * GROUPS * p.stages * SLOT);
    Staged s;
    s.units = p.records * U;
    // the last of several pairs' rows is zeros
    s.rows = NT == 1 ? (MODE == DOWN ? p.slots : 1) : MODE == DOWN ? pairs + 1 : p.tokens;
    // several tokens: 16 and 8 bytes of padding, so that their fragments and sums meet no bank twice
    s.words = s.units * 32 + (NT > 1 ? 4 : 0);
    s.row_sums = s.units * SEGMENTS * FLOATS + (NT > 1 ? 2 : 0);
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
    find_active<BF16, NT, MODE, FACTORS>(active, p, f);
    const int count = active.count;

    // the first row blocks go to different multiprocessors
    Cursor<WARPS, NT, MODE> ahead(blockIdx.x + group * gridDim.x, gridDim.x * GROUPS, warp), here = ahead;
    ahead.settle(p, count), here.settle(p, count);
    auto fetch_next = [&] {
        while (!ahead.done(p, count) && ahead.at_end_of_row(p, count)) ahead.next_row(p, count);
        if (ahead.done(p, count)) return ring.nothing();
        const Expert& e = active.expert[ahead.slot];
        const u32 size = Record<U, G>::bytes(B ? B : e.word_bits);
        ring.fetch(locate(e.records, ahead.row_block, ahead.record, p.records, size), size, policy, lane);
        ahead.next_record(p, count);
    };
    // row blocks of t go to groups that have fewer of their own
    int item = blockIdx.x + (GROUPS - 1 - group) * gridDim.x;
    const int items = FACTORS ? active.compensated_count * f.v_row_blocks : 0;
    int v_slot = 0, v_row_block = 0, v_record = 0;
    auto fetch_v = [&] {
        if (v_record >= f.v_records) return ring.nothing();
        ring.fetch(locate(active.v[v_slot], v_row_block, v_record, f.v_records, V_SIZE), V_SIZE, policy, lane);
        v_record += WARPS;
    };
    auto fetch_first = [&] {
        if (item >= items) {
            for (int i = 0; i < p.stages - 1; ++i) fetch_next();
            return;
        }
        v_slot = active.compensated[item / f.v_row_blocks], v_row_block = item % f.v_row_blocks, v_record = warp;
        for (int i = 0; i < p.stages - 1; ++i) fetch_v();
    };
    if constexpr (FACTORS) fetch_first();
    else
        for (int i = 0; i < p.stages - 1; ++i) fetch_next();

    if (MODE != GATE_UP) await_producers();
    allow_dependents();
    auto row_of = [&](int row) -> const u16* {
        if (MODE != DOWN || NT > 1) return MODE == DOWN && row == pairs ? nullptr : p.x + (u64)row * p.k;
        return row < count ? p.x + (u64)active.pair[row][0] * p.k : nullptr;
    };
    stage_rows<B, G, BF16, NT, EARLY>(s, row_of, early, p.k);
    __syncthreads();

    // the staged row of a token's input for an expert
    auto staged = [&](int slot, int token) {
        if (MODE != DOWN) return NT == 1 ? 0 : min(token, p.tokens - 1);
        if (NT == 1) return slot;
        const int pair = active.pair[slot][token];
        return pair < 0 ? pairs : pair;
    };
    const u32 x_lane = shared_address(s.x) + lane % 4 * 32, sums_at = shared_address(s.sums);
    int turn = 0;
    // below STORING: this warp stores, and that part
    auto storing = [&] { return (warp + WARPS - turn * STORING % WARPS) % WARPS; };

    if constexpr (FACTORS) {
        for (; item < items; ++turn) {
            const int slot = v_slot, row_block = v_row_block;
            float y[OWN<NT>] = {};
            for (int record = warp; record < f.v_records; record += WARPS) {
                fetch_v();
                ring.wait();
                const u32 x = x_lane + staged(slot, lane / 4) * s.words * 4 + 128 * U * record;
#pragma unroll
                for (int u = 0; u < U; ++u) {
                    FactorUnit<FB> unit;
                    u32 b[8];
                    unit.template load_shared_unit<U>(ring.head(), u, lane);
                    load_shared<8>(b, x + 128 * u);
                    unit.template multiply<BF16, NT>(y, b);
                }
                ring.release();
            }
            item += gridDim.x * GROUPS;
            fetch_first();
            put_part<NT>(parts[turn % 2] + warp * NT * ROWS, y, lane);
            named_barrier(1 + group, WARPS * WARP);
            if (storing() < STORING)
                finish_t<BF16, NT, WARPS, STORING>(f, active, parts[turn % 2], slot, row_block, storing(), lane);
        }
    }

    bool t_is_there = false;
    for (; !here.done(p, count); ++turn) {
        const int row_block = here.row_block, row_slot = here.slot;
        float y[OWN<NT>] = {};
        // u t: of gate and up by the last warp, which has the fewest columns, of down's experts by one warp each; asked for
        // here and multiplied at the end
        FactorUnit<FACTORS ? FB : 1> unit;
        int compensated = MODE == GATE_UP ? (warp == WARPS - 1 ? row_slot : count) : warp;
        auto load_unit = [&](int i) {
            const u8* u = active.u[compensated];
            u = locate(u, row_block, i / U_UNITS, f.u_records, Record<U_UNITS, UNIT>::bytes(FB));
            unit.template load_global_unit<U_UNITS>(u, i % U_UNITS, lane);
        };
        if constexpr (FACTORS)
            if (compensated < count && active.u[compensated]) load_unit(0);
        while (!here.at_end_of_row(p, count)) {
            fetch_next();
            ring.wait();
            u32 sums_lane[2];
#pragma unroll
            for (int i = 0; i < 2; ++i)
                sums_lane[i] = sums_at + 4 * (staged(here.slot, NT == 1 ? 0 : 2 * (lane % 4) + i) * s.row_sums +
                                              FLOATS * SEGMENTS * U * here.record);
            const u32 x = x_lane + staged(here.slot, lane / 4) * s.words * 4 + 128 * U * here.record;
            const int bits = B ? B : active.expert[here.slot].word_bits;
            float part[OWN<NT>] = {};
            multiply_any<B, U, G, BF16, NT>(part, ring.head(), x, sums_lane, bits, lane);
            ring.release();
#pragma unroll
            for (int i = 0; i < OWN<NT>; ++i) {
                const float weight = MODE == DOWN ? active.weight[here.slot][NT == 1 ? 0 : 2 * (lane % 4) + i % 2] : 1.f;
                y[i] = MODE == DOWN ? fmaf(weight, part[i], y[i]) : y[i] + part[i];
            }
            here.next_record(p, count);
        }
        if constexpr (FACTORS) {
            for (bool loaded = true; compensated < count; compensated += MODE == GATE_UP ? count : WARPS, loaded = false) {
                if (!active.u[compensated]) continue;
                if (!t_is_there) await_count(f.counters, STORING * items, lane), t_is_there = true;
                const int pair = active.pair[compensated][NT == 1 ? 0 : lane / 4];
                const u16* t = pair < 0 ? nullptr : f.t + pair * f.columns;
                float part[OWN<NT>] = {};
                for (int i = 0; i < f.u_records * U_UNITS; ++i) {
                    u32 b[8];
                    if (i > 0 || !loaded) load_unit(i);
                    load_t(b, t, i * UNIT, f.columns, lane);
                    unit.template multiply<BF16, NT>(part, b);
                }
#pragma unroll
                for (int i = 0; i < OWN<NT>; ++i) {
                    const float weight = MODE == DOWN ? active.weight[compensated][NT == 1 ? 0 : 2 * (lane % 4) + i % 2] : 1.f;
                    y[i] = fmaf(weight, part[i], y[i]);
                }
            }
        }
        put_part<NT>(parts[turn % 2] + warp * NT * ROWS, y, lane);
        named_barrier(1 + group, WARPS * WARP);
        if (storing() < STORING)
            finish_row<BF16, NT, MODE, WARPS, STORING>(p, active, parts[turn % 2], row_slot, row_block, storing(), lane);
        here.next_row(p, count);
    }
    if constexpr (FACTORS) {  // the last block to end leaves the counters as it found them
        __syncthreads();
        if (threadIdx.x > 0) return;
        const u32 last = gridDim.x - 1;
        if (atomicInc(reinterpret_cast<u32*>(f.counters + 1), last) == last) f.counters[0] = 0;
    }
}

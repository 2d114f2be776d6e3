// SPDX-License-Identifier: Apache-2.0
// y = x W^T for one token, or up to eight, at the speed of W's bytes: dense layers, and one token's experts.
//
// A warp streams whole records through its own ring of shared memory and multiplies them on the tensor cores with W as
// the A operand. Codes keep the base that unpacking adds to them and are neither shifted to zero nor scaled one by one:
// a group's accumulator starts at -sum(base x), known per group since x was staged, and scale and zero are applied to
// the group's sum, (sum(q x) - zero sum(x)) scale (ours; the fragment order of W is MARLIN's idea). The warps of a block
// share the columns of a row block and add up in their order, so results do not depend on the grid and repeat bitwise.
#include "sums.cuh"

struct Arguments {
    const u16* x;           // DENSE [tokens, k], GATE_UP [1, k], DOWN [slots, k]
    u16* y;                 // DENSE [tokens, n], GATE_UP [slots, n], DOWN [1, n]
    const u16* bias;        // DENSE [n] or null
    Bank bank;
    const void* ids;        // [slots], int64 where ids_wide, else int32; outside 0..num_experts-1: run nothing
    const void* weights;    // DOWN [slots], float32 where weights_wide, else as x
    int ids_wide, weights_wide;
    int tokens, slots, num_experts;
    int n, k;               // GATE_UP: n is the intermediate size, half of the rows
    int records;            // of a row block
    int row_blocks;
    int stages;
};

constexpr int MAX_SLOTS = 32;
constexpr int RING = 4;  // stages where copies are counted, not signalled: before Hopper

// ---- x in shared memory -------------------------------------------------------------------------------------------

// Rows of k values -> B fragments in unit order, and the sums of their segments. All threads take part; a thread asks
// for two octets of columns before it uses the first, because each takes most of a microsecond to come.
// `early` is the thread's first octet where EARLY; it was asked for together with the ids.
template <int B, int G, bool BF16, int NT, bool EARLY>
__device__ void stage_rows(u32* to, float* sums, const u16* const* rows, const u32 (&early)[4], int count, int k, int units,
                           int row_words) {
    constexpr int SEGMENTS = G == 32 ? 2 : 1, SPAN = 8 / SEGMENTS, FLOATS = Sums<B>::FLOATS, BATCH = 2;
    const int octets = 8 * units;
    for (int first = threadIdx.x; first - int(threadIdx.x) < count * octets; first += BATCH * blockDim.x) {
        u32 v[BATCH][4];
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int at = first + i * blockDim.x, row = at / octets;
            const bool known = EARLY && i == 0 && first == threadIdx.x;
#pragma unroll
            for (int t = 0; t < 4; ++t) v[i][t] = known ? early[t] : 0;
            if (!known && row < count && rows[row]) load_octet<BF16>(v[i], rows[row], 8 * (at - row * octets), k);
        }
#pragma unroll
        for (int i = 0; i < BATCH; ++i) {
            const int at = first + i * blockDim.x, row = at / octets, o = at - row * octets, pair = o % 8;
            const bool inside = row < count;
#pragma unroll
            for (int t = 0; t < 4; ++t)
                if (inside) to[row * row_words + (o / 8) * 32 + t * 8 + pair] = v[i][t];
            float part[FLOATS];
            segment_sums<B, G, BF16>(part, v[i], pair);
            const int segment = (o / 8) * SEGMENTS + pair / SPAN;
            float* out = sums + (NT > 1 ? segment * NT + row : row * units * SEGMENTS + segment) * FLOATS;
            if (inside && pair % SPAN == 0)
#pragma unroll
                for (int j = 0; j < (B ? 2 : 1 + WIDTHS); ++j) out[j] = part[j];
        }
    }
}

// ---- one record ---------------------------------------------------------------------------------------------------

// y += one record times x. `x` and `sums` are this lane's addresses for the record's first unit.
template <int B, int U, int G, bool BF16, int NT, int FLOATS>
__device__ __forceinline__ void multiply(float (&y)[NT == 1 ? 2 : 4], u32 record, u32 x, u32 sums, int base_at, int lane) {
    constexpr int M = Record<U, G>::GROUPS, SEGMENTS = Record<U, G>::SEGMENTS;
    constexpr int SUM_BYTES = 4 * FLOATS * NT;
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
            const u32 at = sums + (u * SEGMENTS + s) * SUM_BYTES;
            float sum[2], start[2];
            if constexpr (NT == 1 && FLOATS == 2) {
                asm volatile("ld.shared.v2.f32 {%0,%1}, [%2];" : "=f"(sum[0]), "=f"(start[0]) : "r"(at));
            } else if constexpr (FLOATS == 2) {
                asm volatile("ld.shared.v4.f32 {%0,%1,%2,%3}, [%4];"
                             : "=f"(sum[0]), "=f"(start[0]), "=f"(sum[1]), "=f"(start[1]) : "r"(at));
            } else {
#pragma unroll
                for (int i = 0; i < (NT == 1 ? 1 : 2); ++i) {
                    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(sum[i]) : "r"(at + 4 * FLOATS * i));
                    asm volatile("ld.shared.f32 %0, [%1];" : "=f"(start[i]) : "r"(at + 4 * FLOATS * i + 4 * base_at));
                }
            }
            if constexpr (NT == 1) sum[1] = sum[0], start[1] = start[0];
            float c[4];
#pragma unroll
            for (int j = s * 4 / SEGMENTS; j < (s + 1) * 4 / SEGMENTS; ++j)
                if (j == s * 4 / SEGMENTS) mma<BF16, false>(c, a + 4 * j, b[2 * j], b[2 * j + 1]);
                else mma<BF16, true>(c, a + 4 * j, b[2 * j], b[2 * j + 1]);
            const int m = M == 1 ? 0 : (u * SEGMENTS + s) * M / (U * SEGMENTS);
            const float s0 = Half<false>::lo(low[m]), z0 = Half<false>::hi(low[m]);
            const float s1 = Half<false>::lo(high[m]), z1 = Half<false>::hi(high[m]);
            if constexpr (NT == 1) {
                y[0] = fmaf(s0, c[0] + fmaf(-z0, sum[0], start[0]), y[0]);
                y[1] = fmaf(s1, c[2] + fmaf(-z1, sum[0], start[0]), y[1]);
            } else {
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                    y[i] = fmaf(s0, c[i] + fmaf(-z0, sum[i], start[i]), y[i]);
                    y[2 + i] = fmaf(s1, c[2 + i] + fmaf(-z1, sum[i], start[i]), y[2 + i]);
                }
            }
        }
    }
}

template <int B, int U, int G, bool BF16, int NT>
__device__ __forceinline__ void multiply_any(float (&y)[NT == 1 ? 2 : 4], u32 record, u32 x, u32 sums, int bits, int lane) {
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

// ---- the order of records -----------------------------------------------------------------------------------------

// Walks a warp's records: columns warp, warp + WARPS, ... of every `stride`-th row block.
template <int WARPS, int MODE> struct Cursor {
    int slot, row_block, record, warp, stride;

    __device__ Cursor(int first, int stride, int warp) : slot(0), row_block(first), record(warp), warp(warp), stride(stride) {}
    __device__ void settle(const Arguments& p) {  // carries an overflow into the next slot
        if constexpr (MODE == GATE_UP)
            while (row_block >= p.row_blocks && slot < MAX_SLOTS) row_block -= p.row_blocks, ++slot;
        if constexpr (MODE == DOWN)
            while (record >= p.records && slot < MAX_SLOTS) record -= p.records, ++slot;
    }
    __device__ bool at_end_of_row(const Arguments& p, int active) const {
        return MODE == DOWN ? slot >= active : record >= p.records;
    }
    __device__ void next_row(const Arguments& p) {
        row_block += stride;
        record = warp;
        if constexpr (MODE == DOWN) slot = 0;
        settle(p);
    }
    __device__ bool done(const Arguments& p, int active) const {
        return MODE == GATE_UP ? slot >= active : row_block >= p.row_blocks;
    }
};

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
    __device__ void wait() const { copy_wait<RING - 1>(); __syncwarp(); }
#endif
};

// ---- the kernel ---------------------------------------------------------------------------------------------------

// Slots that name an expert, in their order: how many, their matrices and their routing weights.
struct Active {
    Expert expert[MAX_SLOTS];
    const u16* row[MAX_SLOTS];  // of x
    float weight[MAX_SLOTS];
    int slot[MAX_SLOTS];
    int count;
};

template <bool BF16, int MODE> __device__ void find_active(Active& active, const Arguments& p) {
    if (threadIdx.x < WARP) {
        const int s = threadIdx.x;
        long long id = -1;
        if (MODE == DENSE) id = s == 0 ? 0 : -1;
        else if (s < p.slots) id = p.ids_wide ? ((const long long*)p.ids)[s] : (long long)((const int*)p.ids)[s];
        const bool real = id >= 0 && id < p.num_experts;
        const u32 votes = __ballot_sync(~0u, real);
        if (real) {
            const int at = __popc(votes & ((1u << s) - 1));
            active.expert[at] = p.bank.expert(int(id));
            active.slot[at] = s;
            if (MODE == DOWN)
                active.weight[at] = p.weights_wide ? ((const float*)p.weights)[s] : widen<BF16>(((const u16*)p.weights)[s]);
        }
        if (s == 0) active.count = __popc(votes);
        if (MODE != DOWN) active.row[s] = s < p.tokens ? p.x + (u64)s * p.k : nullptr;
        else if (real) active.row[__popc(votes & ((1u << s) - 1))] = p.x + (u64)s * p.k;
    }
}

// Adds the warps' sums of one row block in their order and writes its results.
template <bool BF16, int NT, int MODE, int WARPS>
__device__ void finish_row(const Arguments& p, const Active& active, const float* parts, const Cursor<WARPS, MODE>& at, int lane) {
    for (int i = lane; i < ROWS * NT; i += WARP) {
        const int row = i % ROWS, token = i / ROWS;
        float sum = 0.f;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) sum += parts[(w * NT + token) * ROWS + row];
        if constexpr (MODE == GATE_UP) {  // rows 0..7 are gate, 8..15 up
            const float up = __shfl_down_sync(0xffffu, sum, 8, 16);
            const int n = at.row_block * 8 + row;
            if (row < 8 && i < ROWS && n < p.n)
                p.y[active.slot[at.slot] * p.n + n] = round16<BF16>(sum / (1.f + __expf(-sum)) * up);
        } else {
            const int n = at.row_block * ROWS + row;
            if (n < p.n && token < p.tokens) {
                if (MODE == DENSE && p.bias) sum += widen<BF16>(p.bias[n]);
                p.y[token * p.n + n] = round16<BF16>(sum);
            }
        }
    }
}

// GROUPS groups of WARPS warps: a group has a row block at a time, and all share x. With 32 warps on a multiprocessor
// the latencies of unpacking hide each other; with 16, four issue slots in ten were used.
template <int B, int MAX_B, int U, int G, bool BF16, int NT, int MODE, int WARPS, int GROUPS>
__global__ void __launch_bounds__(WARPS* GROUPS* WARP, 1) gemv(const Arguments p) {
    constexpr int FLOATS = Sums<B>::FLOATS, SEGMENTS = Record<U, G>::SEGMENTS;
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ Active active;
    __shared__ float all_parts[GROUPS][2][WARPS * NT * ROWS];
    // by a shuffle: the same for the whole warp, so addresses of rings and records can live in uniform registers
    const int lane = threadIdx.x % WARP, any_warp = __shfl_sync(~0u, threadIdx.x / WARP, 0);
    const int warp = any_warp % WARPS, group = any_warp / WARPS;
    auto& parts = all_parts[group];
    const int rows_of_x = MODE == DOWN ? p.slots : NT, units = p.records * U;
    const int x_words = units * 32 + (NT > 1 ? 4 : 0);  // 16 bytes of padding: eight tokens' fragments, no bank twice
    constexpr u32 SLOT = Record<U, G>::bytes(MAX_B);
    u8* ring_memory = shared;
    u64* bars = reinterpret_cast<u64*>(shared + WARPS * GROUPS * p.stages * SLOT);
    u32* x_shared = reinterpret_cast<u32*>(bars + WARPS * GROUPS * p.stages);
    float* sums = reinterpret_cast<float*>(x_shared + rows_of_x * x_words);

    Ring ring(shared_address(ring_memory) + any_warp * p.stages * SLOT, shared_address(bars + any_warp * p.stages), SLOT, p.stages);
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
    find_active<BF16, MODE>(active, p);
    __syncthreads();
    const int count = active.count;

    // the first row blocks go to different multiprocessors
    Cursor<WARPS, MODE> ahead(blockIdx.x + group * gridDim.x, gridDim.x * GROUPS, warp), here = ahead;
    ahead.settle(p), here.settle(p);
    auto fetch_next = [&] {
        while (!ahead.done(p, count) && ahead.at_end_of_row(p, count)) ahead.next_row(p);
        if (ahead.done(p, count)) return ring.nothing();
        const Expert& e = active.expert[ahead.slot];
        const u32 size = Record<U, G>::bytes(B ? B : e.word_bits);
        ring.fetch(e.records + (u64)((ahead.row_block / 4 * p.records + ahead.record) * 4 + ahead.row_block % 4) * size, size, policy, lane);
        ahead.record += WARPS;
        if constexpr (MODE == DOWN) ahead.settle(p);
    };
    for (int s = 0; s < p.stages - 1; ++s) fetch_next();

    if (MODE != GATE_UP) await_producers();
    allow_dependents();
    stage_rows<B, G, BF16, NT, EARLY>(x_shared, sums, active.row, early, MODE == DOWN ? count : NT, p.k, units, x_words);
    __syncthreads();

    const u32 x_lane = shared_address(x_shared) + (NT > 1 ? (lane / 4) * x_words * 4 : 0) + (lane % 4) * 32;
    const u32 sums_lane = shared_address(sums) + (NT > 1 ? (lane % 4) * 8 * FLOATS : 0);
    for (int turn = 0; !here.done(p, count); ++turn) {
        const Cursor<WARPS, MODE> row = here;
        float y[NT == 1 ? 2 : 4] = {};
        while (!here.at_end_of_row(p, count)) {
            fetch_next();
            ring.wait();
            const int first = ((MODE == DOWN ? here.slot * p.records : 0) + here.record) * U;
            float part[NT == 1 ? 2 : 4] = {};
            multiply_any<B, U, G, BF16, NT>(part, ring.head(), x_lane + 128 * first, sums_lane + 4 * FLOATS * NT * SEGMENTS * first,
                                            B ? B : active.expert[here.slot].word_bits, lane);
            ring.release();
            const float weight = MODE == DOWN ? active.weight[here.slot] : 1.f;
#pragma unroll
            for (int i = 0; i < (NT == 1 ? 2 : 4); ++i) y[i] = MODE == DOWN ? fmaf(weight, part[i], y[i]) : y[i] + part[i];
            here.record += WARPS;
            if constexpr (MODE == DOWN) here.settle(p);
        }
        float* out = parts[turn % 2] + warp * NT * ROWS;
        if constexpr (NT == 1) {
            if (lane % 4 == 0) out[lane / 4] = y[0], out[lane / 4 + 8] = y[1];
        } else {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                out[(2 * (lane % 4) + i) * ROWS + lane / 4] = y[i];
                out[(2 * (lane % 4) + i) * ROWS + lane / 4 + 8] = y[2 + i];
            }
        }
        named_barrier(1 + group, WARPS * WARP);
        if (warp == turn % WARPS) finish_row<BF16, NT, MODE, WARPS>(p, active, parts[turn % 2], row, lane);
        here.next_row(p);
    }
}

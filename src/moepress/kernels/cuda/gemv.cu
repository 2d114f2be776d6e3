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
// Compensators W + u v: some groups first multiply v and publish t = v x; at the end of a row block, or of several, a warp adds
// u t, for which it waits until t is complete. Row blocks of v go to the first blocks, which start first: nobody waits for a
// block that waits for a free multiprocessor.
#include "gemv_compensate.cuh"
#include "gemv_records.cuh"
#include "gemv_rows.cuh"
#include "gemv_shares.cuh"
#include "gemv_store.cuh"

// GROUPS groups of WARPS warps: a group has a row block at a time, and all share x. With 32 warps on a multiprocessor
// the latencies of unpacking hide each other; with 16, four issue slots in ten were used. NT is 1 for one token, or 4, the
// columns of a product. FB is the bits of compensators' factors, 0 for none, and FU the units of u's records.
template <int B, int MAX_B, int U, int G, bool BF16, int NT, int MODE, int WARPS, int GROUPS, int FB, int FU>
__global__ void __launch_bounds__(WARPS* GROUPS* WARP, 1) gemv(const Arguments p, const Compensators f) {
    constexpr int SEGMENTS = Record<U, G>::SEGMENTS;
    constexpr bool FACTORS = FB > 0;
    // several tokens' results of experts are added up by token, in the warp's part of the buffer instead of in registers
    constexpr bool SCATTERS = NT > 1 && MODE == DOWN;
    constexpr int PARTS = SCATTERS ? MAX_TOKENS : NT;       // columns or tokens of a part
    // A row block of v has groups of its own size: down's few records would leave most of a large group idle (Qwen3's one token 11.9
    // us, now 11.8), and of one token's gate and up a warp has so few that most are asked for before x (DeepSeek-MoE's 14.7 us, now 14.5).
    constexpr int V_WARPS = MODE == GATE_UP && NT == 1 ? 8 : WARPS < 16 ? WARPS : 4, V_GROUPS = WARPS * GROUPS / V_WARPS;
    static_assert(V_WARPS == WARPS || GROUPS + V_GROUPS < 16, "each has a barrier");
    static_assert(Entering<NT, FACTORS>::THREADS <= WARPS * GROUPS * WARP, "a block has them");
    constexpr int STORING = NT > 1 && WARPS >= 16 ? PARTS / 2 : 1;  // warps that store a row block
    constexpr u32 V_SIZE = FACTORS ? Record<U, UNIT>::bytes(FB) : 0, OWN_SIZE = Record<U, G>::bytes(MAX_B);
    constexpr u32 SLOT = OWN_SIZE > V_SIZE ? OWN_SIZE : V_SIZE;
    const int stages = MODE == DENSE ? p.stages : EXPERT_STAGES;
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ Active<NT> active;
    __shared__ float all_parts[2][WARPS * GROUPS * PARTS * ROWS];  // turn by turn, warp by warp
    constexpr bool PASSES = MODE == GATE_UP && NT > 1 && GROUPS == 8;
    // u t of up to PENDING turns of gate and up is added after them, each by a warp of its own: waiting for t, and a trip to memory
    // at the end of each turn, took 3 of 49 us for Qwen3's eight tokens, and 1.7 of 47 for Mixtral's one.
    constexpr bool DEFERS = FACTORS && MODE == GATE_UP;
    __shared__ Pending<NT> all_pending[DEFERS ? GROUPS : 1][DEFERS ? PENDING : 1];
    __shared__ int most_pending;
    static_assert(!DEFERS || PENDING <= WARPS, "a warp has one of them at most");
    __shared__ Segment<NT> segments[PASSES ? MAX_SEGMENTS : 1];  // of this block, in the order of their turns
    static_assert(sizeof(active) + sizeof(all_parts) + sizeof(all_pending) + sizeof(most_pending) + sizeof(segments) + 1024
                      <= GEMV_STATIC, "launches count on it, with what the system has");
    // ids take most of a microsecond to come, and what does not depend on them is computed meanwhile; those of GATE_UP may be made
    // by the launch ahead of it, for DOWN they are older than that
    Chosen chosen = {};
    if (MODE == DOWN) chosen = ask_chosen<BF16, NT, MODE, FACTORS>(p);
    // (a dense layer of 4096x4096 took 0.1 us longer with it, of 5.7)
    if (MODE != DENSE) ask_for(p.row_blocks & (FACTORS ? f.columns : -1));
    // by a shuffle: the same for the whole warp, so addresses of rings and records can live in uniform registers
    const int lane = threadIdx.x % WARP, any_warp = __shfl_sync(~0u, threadIdx.x / WARP, 0);
    const int warp = any_warp % WARPS, group = any_warp / WARPS;
    const int v_warp = any_warp % V_WARPS, v_group = any_warp / V_WARPS;
    auto& pending = all_pending[DEFERS ? group : 0];
    const int pairs = p.tokens * p.slots;
    u64* bars = reinterpret_cast<u64*>(shared + WARPS * GROUPS * stages * SLOT);
    Staged s;
    s.units = p.records * U;
    s.rows = MODE == DOWN ? pairs : p.tokens;
    s.words = s.units * UNIT_WORDS;
    s.row_sums = row_sums<NT>(s.units * SEGMENTS);
    s.x = reinterpret_cast<u32*>(bars + WARPS * GROUPS * stages);
    s.sums = reinterpret_cast<float*>(s.x + s.rows * s.words);

    // with compensators there are no registers left for it
    const u32 ring_at = kept<!FACTORS>(shared_address(shared));
    const u32 bars_at = FACTORS ? shared_address(bars) : ring_at + WARPS * GROUPS * stages * SLOT;
    Ring ring(ring_at + any_warp * stages * SLOT, bars_at + any_warp * stages * 8, SLOT, stages);
#if __CUDA_ARCH__ >= 900
    if (lane < stages) mbarrier_init(shared_address(bars + any_warp * stages + lane), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    const u64 policy = evict_first();
#else
    const u64 policy = 0;
#endif
    if (MODE == GATE_UP) await_producers(), chosen = ask_chosen<BF16, NT, MODE, FACTORS>(p);
    // x with them: asked for after the first records it cost 2 of 19 us for Qwen3's two tokens
    constexpr int EARLY = MODE != GATE_UP ? 0 : NT == 1 ? 1 : 2;
    u32 early[EARLY ? EARLY : 1][4] = {};
    if (has_early<NT>(p.k))
#pragma unroll
        for (int i = 0; i < EARLY; ++i) {
            const int at = 8 * (threadIdx.x + i * blockDim.x);
            if (at < p.tokens * p.k) load_octet<BF16>(early[i], p.x, at, p.tokens * p.k);
        }
    if (PASSES && threadIdx.x < MAX_SEGMENTS) segments[threadIdx.x].stored = 0;
    const int block = from_here(blockIdx.x), blocks = gridDim.x;
    const bool passes = PASSES && p.passed.bytes;
    Shares<GROUPS, V_GROUPS> shares(blocks, block, group, v_group, passes);
    const int stride = shares.stride;
    const Steps<WARPS, MODE> steps(p, shares.first, stride, warp);
    Cursor<WARPS, MODE> ahead(steps, shares.first, warp), here = ahead;
    find_active<NT, MODE, FACTORS>(active, p, f, chosen);
    const int count = active.count;
    const u8* row = nullptr;  // of records that `ahead` is in; null at the end
    u32 size = Record<U, G>::bytes(B);
    auto find_row = [&] {
        while (!ahead.done(p, count) && ahead.at_end_of_row(p, count)) ahead.next_row(p, steps, stride, warp);
        row = nullptr;
        if (ahead.done(p, count)) return;
        const Expert& e = active.expert[ahead.slot];
        if (!B) size = Record<U, G>::bytes(e.word_bits);
        row = locate(e.records, ahead.row_block, 0, p.records, size);
    };
    auto fetch_next = [&] {
        if (!row) return ring.nothing();
        ring.fetch(row + ahead.record * (4 * size), size, policy, lane);
        if (ahead.next_record(p, steps)) find_row();
    };
    find_row();
    const int items = FACTORS ? count * f.v_row_blocks : 0;
    if (FACTORS && passes) shares.spread_v(blocks, block, v_group, count * (p.row_blocks / 8), items);
    int item = shares.first_of_v, v_slot = 0, v_row_block = 0, v_record = 0;
    auto fetch_v = [&] {
        if (v_record >= f.v_records) return ring.nothing();
        ring.fetch(locate(active.v[v_slot], v_row_block, v_record, f.v_records, V_SIZE), V_SIZE, policy, lane);
        v_record += V_WARPS;
    };
    auto fetch_some = [&](int from, int to) {  // of a ring that is empty but for the first
#pragma unroll 1
        for (int i = from; i < to; ++i)
            if (FACTORS && item < items) fetch_v();
            else fetch_next();
    };
    auto find_v = [&] {
#pragma unroll 1  // in two copies of it there are no registers left
        for (; item < items; item += shares.stride_of_v) {
            v_slot = divide(item, f.v_inverse), v_row_block = item - v_slot * f.v_row_blocks, v_record = v_warp;
            if (active.v[v_slot]) return;
        }
    };
    if constexpr (FACTORS) find_v();
    // x would come after whatever is asked for before it; but for v, which everybody waits for: its second record asked for after x
    // came behind all others' (DeepSeek-MoE's eight tokens 47.7 us, now 46.8; experts' one token took 0.2 longer so)
    constexpr bool V_FIRST = FACTORS && (NT > 1 || MODE == DENSE);
    const int v_ahead = V_FIRST ? stages : stages - 1;
    fetch_some(0, V_FIRST && item < items ? stages : 1);

    if (MODE != GATE_UP) await_producers();
    // halves of a layer set each other's t to 0
    if (MODE != DENSE)
        for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < f.other_pieces; i += gridDim.x * blockDim.x)
            f.others[i] = make_uint4(0, 0, 0, 0);
    allow_dependents();
    auto row_of = [&](int row) -> const u16* {
        if (MODE != DOWN || NT > 1) return p.x + (u64)row * p.k;
        return row < count ? p.x + (u64)active.pair[row][0] * p.k : nullptr;
    };
    if (MODE == DOWN && NT > 1 && p.passed.bytes) copy_rows(s, p.passed);
    else stage_rows<G, BF16, NT, EARLY>(s, row_of, early, p.k);
    if (!V_FIRST || item >= items) fetch_some(1, stages - 1);
    if (DEFERS && threadIdx.x == 0) most_pending = even_part<PENDING>(count * p.row_blocks, stride);
    __syncthreads();

    // the staged row of the input of an expert's column; any for columns without a token
    auto staged = [&](int slot, int column) {
        if (NT == 1) return MODE == DOWN ? slot : 0;
        return MODE == DOWN ? max(int(active.pair[slot][column]), 0) : int(active.token[slot][column]);
    };
    // of a lane's column: its half of a unit for high or low bytes, and there its own 16
    const u32 x_at = FACTORS ? shared_address(s.x) : bars_at + WARPS * GROUPS * stages * 8;
    const u32 sums_at = FACTORS ? shared_address(s.sums) : x_at + s.rows * s.words * 4;
    const u32 x_lane = x_at + lane / 4 % 2 * 64 + lane % 4 * 16;
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
    auto parts_of = [&](int first) { return all_parts[turn % 2] + first * PARTS * ROWS; };  // a warp and those after it
    // below STORING: this warp stores, and that part
    auto storing = [&] { return (warp + WARPS - turn * STORING % WARPS) % WARPS; };

    if constexpr (FACTORS) {
        const int v_barrier = V_WARPS == WARPS ? 1 + group : 1 + GROUPS + v_group;
        for (; item < items; ++turn) {
            const int slot = v_slot, row_block = v_row_block;
            float y[2] = {};
            for (int record = v_warp; record < f.v_records; record += V_WARPS) {
                if (!V_FIRST) fetch_v();
                ring.wait();
                multiply<FB, U, UNIT, SEGMENTS>(y, ring.head(), x_of(slot, record), sums_of(slot, record), lane);
                ring.release();
                if (V_FIRST) fetch_v();
            }
            item += shares.stride_of_v;
            find_v(), fetch_some(0, item < items ? v_ahead : stages - 1);
            put_part<NT>(parts_of(any_warp), y, lane);
            named_barrier(v_barrier, V_WARPS * WARP);
            if (v_warp == turn % V_WARPS) finish_t<BF16, NT, PARTS, V_WARPS>(f, active, parts_of(v_group * V_WARPS), slot, row_block, lane);
        }
        if (V_WARPS != WARPS && turn > 0) turn = 0, named_barrier(v_barrier, V_WARPS * WARP);  // the last sums have been read
    }

    const Correction<FB, FU, NT, BF16, MODE> correction = {f, active};
    using Unit = typename Correction<FB, FU, NT, BF16, MODE>::Unit;
    Segment<NT>* segment = segments;
    int waiting = 0;  // row blocks whose sums are pending
    auto add_late = [&](Unit& unit, u32 (&t)[8], int slot, int row_block) {
        float *sums = pending[warp].sums, part[2] = {};
        if (active.u[slot]) {
            correction.add(part, unit, t, slot, row_block, lane);
            if (NT > 1 || lane % 4 == 0) sums[lane % 4 * ROWS + lane / 4] += part[0], sums[lane % 4 * ROWS + lane / 4 + 8] += part[1];
            __syncwarp();
        }
        if constexpr (PASSES)
            if (passes) pass_row<G, BF16, NT, 1>(p, active, sums, segment[warp], slot, row_block, lane);
        if (!passes) finish_row<BF16, NT, NT, MODE, 1, 1>(p, active, sums, slot, row_block, 0, lane);
        __syncwarp();  // lanes without a token are ahead, and products take all lanes
    };
    for (; !here.done(p, count); ++turn) {
        const int row_block = here.row_block, row_slot = here.slot;
        const u32 row_x = x_of(row_slot, 0), row_sums = sums_of(row_slot, 0);
        float y[2] = {}, *own = parts_of(any_warp);
        if constexpr (SCATTERS) {
#pragma unroll
            for (int i = 0; i < PARTS * ROWS / WARP; ++i) own[i * WARP + lane] = 0.f;
            __syncwarp();
        }
        // u t: of a dense layer by the last warp, which has the fewest columns, of down's experts by one warp each, the last first,
        // at the end, with u asked for here; where it DEFERS u is on its way to L2 for whoever multiplies it later
        Unit unit;
        int compensated = MODE == DOWN ? WARPS - 1 - warp : warp == WARPS - 1 ? row_slot : count;
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
            u32 t[8];
            if (compensated < count && active.u[compensated]) correction.load_row(t, compensated, lane);
            while (compensated < count) {
                // what the next one takes is asked for before this one's t is waited for
                const int next = compensated + (MODE == DOWN ? WARPS : count);
                Unit next_unit;
                u32 next_t[8];
                if (next < count && active.u[next])
                    correction.load(next_unit, next, row_block, 0, lane), correction.load_row(next_t, next, lane);
                if (active.u[compensated]) {
                    float part[2] = {};
                    correction.add(part, unit, t, compensated, row_block, lane);
                    if constexpr (SCATTERS) scatter(own, compensated, part);
                    else
#pragma unroll
                        for (int i = 0; i < 2; ++i) y[i] = fmaf(MODE == DOWN ? active.weight[compensated][0] : 1.f, part[i], y[i]);
                }
                compensated = next, unit = next_unit;
#pragma unroll
                for (int i = 0; i < 8; ++i) t[i] = next_t[i];
            }
        }
        if constexpr (!SCATTERS) put_part<NT>(own, y, lane);
        if constexpr (DEFERS) {
            here.next_row(p, steps, stride, warp);
            Pending<NT>& last = pending[waiting];
            const bool now = ++waiting == most_pending || here.done(p, count), mine = now && warp < waiting;
            int late_slot = row_slot, late_row_block = row_block;
            if (mine && warp < waiting - 1) late_slot = pending[warp].slot, late_row_block = pending[warp].row_block;
            u32 t[8];
            if (mine && active.u[late_slot])  // on their way while sums are added
                correction.load(unit, late_slot, late_row_block, 0, lane), correction.load_row(t, late_slot, lane);
            if (threadIdx.x % (WARPS * WARP) == 0) last.slot = row_slot, last.row_block = row_block;
            named_barrier(1 + group, WARPS * WARP);
            if (storing() == 0)
                for (int i = lane; i < NT * ROWS; i += WARP)
                    last.sums[i] = add_parts<NT, WARPS>(parts_of(group * WARPS), i / ROWS, i % ROWS);
            if (!now) continue;
            named_barrier(1 + group, WARPS * WARP);
            if (mine) add_late(unit, t, late_slot, late_row_block);
            segment += waiting, waiting = 0;
            continue;
        }
        named_barrier(1 + group, WARPS * WARP);
        if constexpr (PASSES)
            if (passes && storing() == 0)
                pass_row<G, BF16, NT, WARPS>(p, active, parts_of(group * WARPS), *segment, row_slot, row_block, lane);
        if (!passes && storing() < STORING)
            finish_row<BF16, NT, PARTS, MODE, WARPS, STORING>(p, active, parts_of(group * WARPS), row_slot, row_block, storing(), lane);
        if (PASSES) ++segment;
        here.next_row(p, steps, stride, warp);
    }
    if constexpr (FACTORS && MODE == DENSE) {  // the last block to end leaves t and the counter as it found them
        __syncthreads();
        if (threadIdx.x > 0) return;
        // nobody stores t any more: some block that has counted itself had seen all of it before
        const u32 last = gridDim.x - 1;
        if (atomicInc(reinterpret_cast<u32*>(f.ended), last) != last) return;
        for (int i = 0; i < t_columns(f.columns) / 8; ++i) reinterpret_cast<uint4*>(f.t)[i] = make_uint4(0, 0, 0, 0);
    }
}

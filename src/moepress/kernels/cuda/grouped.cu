// SPDX-License-Identifier: Apache-2.0
// y = x W^T for two tokens or more, one matrix or a bank of experts in one persistent launch, on Hopper's wgmma.
//
// W is the A operand: each warp turns its own records into registers, (base + code) -> code -> code * scale - zero * scale,
// and the tokens are the columns, a multiple of eight (the transposed problem, as in Humming). A producer keeps a ring of
// stages full by bulk copies: records as they lie, tokens' rows, sorted by expert beforehand, into the swizzled tile that
// wgmma reads. While the tensor cores work on one unit the next one is unpacked. Where rows alone cannot fill the GPU, KW
// warpgroups share the columns and add up in their order, and in a dense layer the blocks of a cluster.
//
// Tiles of 24 tokens leave the scale out of W: (base + code) is multiplied as it is, unit by unit into sums of their own, and
// scale * (sum - (zero + base) * sum of x) is added to the tile's (ours; sums of x come with x, as with bytes). That is two
// operations for each sum instead of two for each pair of weights, so it pays while columns are few.
//
// Compensators W + u v: u times t = v x is added to the sums of W x while they are in registers; from 24 tokens a tile on t is the
// last stages. Tiles of 8 and 24 tokens multiply v in the same launch, as its first tiles; all of its blocks are at work at once, so
// nobody waits for one that waits for a free multiprocessor. Other tiles' t is made by a launch before.
#include "grouped_compensate.cuh"
#include "grouped_products.cuh"
#include "grouped_store.cuh"

// Stages that are asked for beside `place_rows`, whose own loads and stores would stand behind more of them (ours, measured:
// Qwen3-30B-A3B at 64 tokens took as long with all five as with none, and 2 of 84 us less with two).
constexpr int AHEAD = 2;

// Keeps the ring full with the stages of this block's tiles. One warp, of which one lane asks for copies. Records of the first
// tile that there is, which nobody changes, are asked for before the launch ahead has ended, if tiles are known by then.
template <typename C, int B, int MAX_B, int U, int G, int NT, int MODE, int MI, int WGS, int KW, int FB, bool AFTER, typename S>
__device__ __forceinline__ void produce(const Arguments& p, const S& schedule, const TensorMap& x_map, const TensorMap& other_map,
                                        const TensorMap& t_map, Work* works, u32 ring, u32 bars, int lane) {
    constexpr u32 STAGE = C::stage_bytes(MAX_B);
    const u64 policy = evict_first();
    const bool asks = elect();
    int stage = 0;
    u32 phase = 1;
    bool t_is_there = !C::MULTIPLIES_V, is_first = true;
    for (int index = blockIdx.x; index < schedule.total(); index += gridDim.x) {
        Work work = schedule.at(index);
        const bool of_v = C::MULTIPLIES_V && work.split;
        const Expert e = of_v ? p.add.v.expert(work.expert) : p.bank.expert(work.expert);
        if (of_v && !e.records) {
            if constexpr (!C::BYTES) {
                await_producers();
                if (lane == 0 && work.split == 1) atomicAdd(p.add.done, 4 * WGS);
            }
            continue;
        }
        work.bits = e.word_bits, work.centre = e.centre;
        work.u = FB > 0 && (MODE != DENSE || C::BYTES || work.split == 0) ? p.add.u.expert(work.expert).records : nullptr;
        const u32 size = of_v ? Record<U, UNIT>::bytes(FB) : Record<U, G>::bytes(B ? B : e.word_bits);
        const int most = of_v ? C::V_BLOCKS / 4 : MI * WGS;
        const int groups = min(most, ((of_v ? p.add.v_row_blocks : p.row_blocks) - work.row_block + 3) / 4);
        const u8* from = e.records + (u64)work.row_block * p.records * size;
        constexpr bool SPLIT = MODE == PLAIN || (MODE == DENSE && !C::BYTES);
        const bool part = !C::BYTES && of_v;
        const int first = part ? (work.split - 1) * p.add.v_split_records : work.template first_record<SPLIT>(p);
        const int end = part ? min(p.records, first + p.add.v_split_records) : first + work.template records<SPLIT>(p);
        const bool narrow = NARROW<NT, MI, B> < NT && work.tokens <= NARROW<NT, MI, B>;
        const u32 x_bytes = narrow ? KW * 4 * NARROW<NT, MI, B> * 128 : C::X_BYTES;
        constexpr int RECORDS = KW * C::STEP;
        // x first, but for the stages below: it is most of a wide tile's bytes, and behind the records it came too late
        auto ask_x = [&](int stage, int record) {
            const u32 full = bars + 16 * stage, to = ring + stage * STAGE;
            tensor_copy(to, narrow ? &other_map : &x_map, 0, work.token, record * U, full);
            if constexpr (C::BYTES) tensor_copy(to + C::sums_at(MAX_B), &other_map, 0, work.token, record, full);
            if constexpr (AFTER) tensor_copy(to + C::sums_at(MAX_B), &other_map, record * U, work.token, 0, full);
        };
        auto ask_records = [&](int stage, int record, u32 bytes) {
            const u32 full = bars + 16 * stage, to = ring + stage * STAGE + C::X_BYTES;
#pragma unroll 1  // as predicated copies two of them made all of the producer's registers different from lane to lane
            for (int i = 0; i < groups; ++i)
                bulk_copy(to + i * RECORDS * 4 * size, from + (u64)(i * p.records + record) * 4 * size, bytes, full, policy);
        };
        auto expect = [&](int stage, int record, u32 bytes) {
            if (record == first) works[stage] = work;
            mbarrier_expect(bars + 16 * stage, groups * bytes + x_bytes + C::STAGE_SUMS);
        };
        auto bytes_of = [&](int record) { return min(RECORDS, end - record) * 4 * size; };
        int record = first;
        if (is_first) {  // the ring is empty, and the launch ahead may still run
            is_first = false;
            if (p.tiles_known) {
                const int most = MODE == GATE_UP && p.ids ? min(p.stages, AHEAD) : p.stages;
                for (; stage < most && record < end; ++stage, record += RECORDS)
                    if (asks) expect(stage, record, bytes_of(record)), ask_records(stage, record, bytes_of(record));
            }
            await_producers();
            for (int s = 0; s < stage; ++s)
                if (asks) ask_x(s, first + s * RECORDS);
            if (stage == p.stages) stage = 0, phase ^= 1;
        }
        for (; record < end; record += RECORDS) {
            const u32 bytes = bytes_of(record);
            mbarrier_wait(bars + 16 * stage + 8, phase);
            if (asks) expect(stage, record, bytes), ask_x(stage, record), ask_records(stage, record, bytes);
            if (++stage == p.stages) stage = 0, phase ^= 1;
        }
        if constexpr (FB > 0 && !C::BYTES) {
            const int units = work.u && !of_v ? (p.add.columns + UNIT - 1) / UNIT : 0;
            if (units && !t_is_there) {
                await_count(p.add.done, schedule.token_tiles * (p.add.v_row_blocks / 4) * 4 * WGS, lane);
                copies_follow();
                t_is_there = true;
            }
            for (int unit = 0; unit < units; ++unit) {
                const u32 full = bars + 16 * stage;
                mbarrier_wait(full + 8, phase);
                if (asks) {
                    mbarrier_expect(full, NT * 128);
                    tensor_copy(ring + stage * STAGE, &t_map, 0, work.token, unit, full);
                }
                if (++stage == p.stages) stage = 0, phase ^= 1;
            }
        }
    }
    mbarrier_wait(bars + 16 * stage + 8, phase);
    if (lane == 0) works[stage].expert = -1, mbarrier_arrive(bars + 16 * stage);
}

// FB is the bits of compensators' factors, 0 for none, and FU the units of u's records.
template <int B, int MAX_B, int U, int G, bool BF16, int NT, int MODE, int MI, int WGS, int KW, int BLOCKS, bool AFTER,
          int FB, int FU>
__global__ void __launch_bounds__(Config<U, G, NT, MI, WGS, KW, FB, AFTER>::THREADS, BLOCKS)
    grouped(const Arguments p, const __grid_constant__ TensorMap x_map, const __grid_constant__ TensorMap other_map,
            const __grid_constant__ TensorMap t_map) {
    using C = Config<U, G, NT, MI, WGS, KW, V_BITS<NT, AFTER, FB>, AFTER>;
    static_assert(!AFTER || (MI == 1 && WGS == 4 && KW == 1 && BLOCKS == 1), "as registers are handed over below");
    static_assert(!AFTER || (MAX_B <= CODE_BITS && G != 32), "codes have a base, and units one scale");
    constexpr u32 STAGE = C::stage_bytes(MAX_B);
    extern __shared__ __align__(1024) u8 shared[];
    __shared__ __align__(8) u64 bar[2 * 16];
    __shared__ Work works[16];
    __shared__ int tiles[MODE == DENSE ? 1 : MAX_EXPERTS + 1], firsts[MODE == DENSE ? 1 : MAX_EXPERTS + 1];
    __shared__ __align__(16) u8 corners[WGS * 4][(NT < 32 ? NT : 32) * 32];
    constexpr bool BYTES_NEXT = MODE == GATE_UP && C::BYTES && C::H_UNITS > 0;
    constexpr bool SUMS_NEXT = MODE == GATE_UP && AFTER && C::H_UNITS > 0;
    constexpr bool SPLIT = MODE == PLAIN || (MODE == DENSE && !C::BYTES);
    constexpr bool ADDS = C::BYTES && FB > 0;  // u t, from registers
    // v is multiplied in the loop of W where records are alike: a second loop took registers of the first, 2 % of the time
    constexpr bool ONE_LOOP = ADDS && FB == B && G == UNIT;
    __shared__ Columns all_columns[2][MODE == DOWN ? NT : 1];            // of this tile and the next
    __shared__ __align__(16) uint4 all_octets[2][BYTES_NEXT ? C::ROW_BLOCKS * NT : 1];  // likewise; [unit][token][row block]
    __shared__ float all_sums[2][SUMS_NEXT ? C::ROW_BLOCKS * NT : 1];                     // likewise; [row block][token]
    __shared__ float sums[KW > 1 ? (KW - 1) * MI * WGS * 64 * NT : 1];
    const int thread = threadIdx.x, lane = thread % WARP;
    const u32 ring = (shared_address(shared) + 1023) / 1024 * 1024, bars = shared_address(bar);

    if (thread == 0) {
        for (int s = 0; s < p.stages; ++s) mbarrier_init(bars + 16 * s, 1), mbarrier_init(bars + 16 * s + 8, C::CONSUMERS / WARP);
        asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    }
    if (MODE == GATE_UP && p.ids) {
        count_ids<NT>(p, tiles, firsts, thread);
    } else {
        if (!p.tiles_known) await_producers();
        if (MODE != DENSE && thread < WARP) count_tiles<NT, MODE>(p, tiles, firsts, lane);
    }
    __syncthreads();
    Schedule<NT, NARROW<NT, MI, B>, C::ROW_BLOCKS, C::V_BLOCKS, MODE> schedule;
    auto row_tiles = [](int row_blocks) { return (row_blocks + C::ROW_BLOCKS - 1) / C::ROW_BLOCKS; };
    schedule.own_row_tiles = row_tiles(p.row_blocks) * (MODE == PLAIN ? p.splits : 1);
    schedule.v_splits = C::BYTES ? 1 : p.add.v_splits;
    schedule.v_row_tiles = C::MULTIPLIES_V ? (p.add.v_row_blocks + C::V_BLOCKS - 1) / C::V_BLOCKS * schedule.v_splits : 0;
    schedule.first = firsts, schedule.tiles = tiles, schedule.num_experts = p.num_experts, schedule.all_tokens = p.tokens;
    schedule.splits = p.splits, schedule.first_tile = p.first_tile, schedule.some = p.tiles;
    schedule.token_tiles = MODE == DENSE ? (p.tokens + NT - 1) / NT : tiles[p.num_experts];

    // through a shuffle, so that the compiler knows it to be the same for the whole warp: stages, addresses of tiles and what
    // copies take are then in uniform registers, and cost the other pipes nothing and the producer a third of its time
    const int first_lane = __shfl_sync(~0u, thread, 0);
    if (first_lane >= C::CONSUMERS) {  // producer
        if constexpr (C::MANY_REGISTERS) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(AFTER ? 56 : 40));
        if (first_lane >= C::CONSUMERS + WARP) return;
        produce<C, B, MAX_B, U, G, NT, MODE, MI, WGS, KW, FB, AFTER>(p, schedule, x_map, other_map, t_map, works, ring, bars, lane);
    } else {  // consumers
        if constexpr (C::MANY_REGISTERS) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(AFTER ? 104 : 232));
        await_producers();
        allow_dependents();
        const int group = first_lane / 128, wg = group % WGS, kw = group / WGS, warp = first_lane / WARP % 4;
        const u32 own_ring = kept<C::BYTES>(ring), own_bars = kept<C::BYTES>(bars);
        int stage = 0;
        u32 phase = 0;
        int turn = 0;
        for (;; turn ^= 1) {
            mbarrier_wait(own_bars + 16 * stage, phase);
            const Work work = works[stage].template uniform<(FB > 0)>();
            if (work.expert < 0) return;
            Columns *columns = all_columns[turn], column;
            const bool has_column = MODE == DOWN && thread < NT && thread < work.tokens;
            if (has_column) column = {p.pairs[work.token + thread], p.weights[work.token + thread]};
            const int bits = B ? B : work.bits, records = work.template records<SPLIT>(p);
#define WHERE own_ring, STAGE, own_bars, p.stages, stage, phase, records, wg, kw, lane, warp
#define BYTES(...)                                                                                                          \
    accumulate_bytes<C, __VA_ARGS__, Record<U, G>::SEGMENTS, WGS, KW>(acc, own_ring, STAGE, C::sums_at(MAX_B), own_bars,     \
                                                                      p.stages, stage, phase, records, wg, kw, lane, warp, live)
            const int row_block = work.row_block + wg * MI * 4 + warp;  // of this warp and its first row tile
            const bool of_v = C::MULTIPLIES_V && work.split, adds = ADDS && work.u && !(ONE_LOOP && of_v);
            const bool live = work.row_block + wg * 4 < (of_v ? p.add.v_row_blocks : p.row_blocks);
            if constexpr (C::MULTIPLIES_V && !C::BYTES)
                if (of_v) {
                    const int v_records = min(p.add.v_split_records, p.records - (work.split - 1) * p.add.v_split_records);
                    multiply_v<C, FB, U, BF16, NT, WGS>(p, work, own_ring, STAGE, own_bars, stage, phase, v_records, wg, warp, lane);
                    // here, of numbers that the compiler knows to be the same for the whole warp, which it forgets in there
                    stage += (v_records + C::STEP - 1) / C::STEP, phase ^= stage / p.stages & 1, stage %= p.stages;
                    continue;
                }
            if constexpr (ADDS && !ONE_LOOP)
                if (of_v) {
                    float acc[1][NT / 2] = {};
                    BYTES(FB, U, UNIT);
                    if constexpr (KW > 1) add_columns<NT, MI, WGS, KW, C::CONSUMERS>(acc, sums, wg, kw, thread);
                    if (kw == 0) store_t<BF16>(p.add, work, row_block, acc[0], lane);
                    continue;
                }
            Compensator<FB ? FB : 1, FU ? FU : 1, BF16> compensator;
            const int u_row_block = row_block < p.row_blocks ? row_block : row_block % 4;
            if constexpr (ADDS)
                if (kw == 0 && adds) {
                    compensator.load_unit(p.add, work, u_row_block, 0, lane), compensator.load_row(p.add, work, 0, lane);
                }
            uint4* octets = BYTES_NEXT && p.next.bytes && !(ONE_LOOP && of_v) ? all_octets[turn] : nullptr;
            float* octet_sums = SUMS_NEXT && p.next.sums ? all_sums[turn] : nullptr;
            // sums live and end inside: shared by both sizes they made the compiler wait for every product
            auto run = [&](auto size) {
                constexpr int N = decltype(size)::VALUE;
                float acc[MI][N / 2];
#pragma unroll
                for (int mi = 0; mi < MI; ++mi)
#pragma unroll
                    for (int i = 0; i < N / 2; ++i) acc[mi][i] = 0.f;
                if constexpr (!C::BYTES) {
                    Added<FB ? FB : 1, FU ? FU : 1, BF16, MI> added(p.add, work.u, row_block, p.row_blocks);
                    if (FB > 0 && work.u && kw == 0) {
                        if constexpr (AFTER) added.prefetch(lane);
                        else added.load(0, lane);
                    }
                    if constexpr (AFTER)
                        accumulate_codes<C, B, U, G, BF16, NT, N, FB>(acc, added, own_ring, STAGE, C::sums_at(MAX_B), own_bars,
                                                                      p.stages, stage, phase, records, wg, lane, warp, bits);
                    else accumulate<C, B, MAX_B, U, G, BF16, NT, N, MI, WGS, KW, FB>(acc, added, WHERE, bits, work.centre);
                } else {
                    if constexpr (B) BYTES(B, U, G);
                    else if (bits == 1) BYTES(1, U, G);
                    else if (bits == 2) BYTES(2, U, G);
                    else if (bits == 3) BYTES(3, U, G);
                    else if (MAX_B == 4 || bits == 4) BYTES(4, U, G);
                    else BYTES(MAX_B, U, G);
                }
                if (has_column) columns[thread] = column;  // not before: they are still on their way
                if constexpr (KW > 1) add_columns<N, MI, WGS, KW, C::CONSUMERS>(acc, sums, wg, kw, thread);
                if (MODE == DOWN) named_barrier(1, C::CONSUMERS);  // columns are there
                if (kw > 0) return;
                if constexpr (ONE_LOOP)
                    if (of_v) return store_t<BF16>(p.add, work, row_block, acc[0], lane);
                if constexpr (MODE == DENSE && !C::BYTES)
                    if (p.splits > 1) {
                        store_sum<BF16, N, MI, WGS>(p, work, acc, ring, shared_address(corners[thread / WARP]), wg, thread);
                        return;
                    }
                if constexpr (ADDS)
                    if (adds) compensator.add(acc[0], p.add, work, u_row_block, lane);
#pragma unroll
                for (int mi = 0; mi < MI; ++mi) {
                    const int block = (wg * MI + mi) * 4 + warp;
                    store_rows<BF16, N, MODE>(p, work, columns, shared_address(corners[thread / WARP]),
                                              octets ? octets + block / 8 * 8 * NT + block % 8 : nullptr,
                                              octet_sums ? octet_sums + block * NT : nullptr, work.row_block + block, acc[mi], lane);
                }
            };
            if constexpr (AFTER) {
                if (work.tokens <= 8) run(Size<8>{});
                else if (work.tokens <= 16) run(Size<16>{});
                else run(Size<NT>{});
            } else if (NARROW<NT, MI, B> < NT && work.tokens <= NARROW<NT, MI, B>) run(Size<NARROW<NT, MI, B>>{});
            else run(Size<NT>{});
#undef BYTES
#undef WHERE
            if constexpr (BYTES_NEXT)
                if (kw == 0 && octets) {
                    named_barrier(2, WGS * 128);
                    if (first_lane < 8 * C::H_UNITS * NT) store_bytes<G, BF16, NT, C::H_UNITS>(p, work, octets, thread);
                }
            if constexpr (SUMS_NEXT)
                if (octet_sums) {
                    named_barrier(2, WGS * 128);
                    if (128 * group < C::H_UNITS * NT) store_sums<NT, C::H_UNITS>(p, work, octet_sums, thread);
                }
        }
    }
}

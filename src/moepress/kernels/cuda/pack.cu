// SPDX-License-Identifier: Apache-2.0
// Stored parts -> records, at load; each byte is read once and written once. The definition is kernels/records.py.
//
// A block takes 64 rows and TILE columns of one expert, whose records lie together. It fetches the rows' packed codes
// into shared memory, writes scales and zeros meanwhile, and then each warp makes records: a lane builds its words in
// registers and stores them where they stay. A lane's two codes of a pair are neighbours in a row as well: 2 b bits, and
// 8 b bits further on are those of the next pair. Codes of 1 to 4 bits are moved many at a time: logic runs at half rate,
// and code by code it would take longer than the memory does.
#include "common.cuh"

struct Source {          // what the format stores; the leading dimensions are one, E
    const u8* packed;    // [E, rows, row_bytes]
    const u16* scale;    // fp16 [E, rows, groups]
    const u16* zero;     // the same
};

struct PackArguments {
    Source first, second;  // the second is that of up, eight rows of each by turns, or null
    u8* records;           // [E, row_groups, across, 4, record_bytes]
    int rows, row_bytes, groups;           // of one source
    int row_groups, across, record_bytes;  // blocks of 64 rows; records side by side
    int tiles;                             // blocks side by side
    int groups_log2, span_log2;            // of the groups in a record, and of the records that a group reaches across
    int piece;                             // 16, 4 or 1 bytes, which are copied at once: rows begin at multiples of it
    int last_mask;                         // of a row's last byte, what is codes
};

constexpr int PACK_THREADS = 256, PACK_WARPS = PACK_THREADS / WARP;
constexpr int BLOCKS = 4, BLOCK_ROWS = BLOCKS * ROWS;
template <int STORED> constexpr int TILE = STORED == 1 ? 2048 : STORED <= 3 ? 1024 : 512;  // 256 to 512 bytes of a row
template <int STORED> constexpr int TILE_BYTES = TILE<STORED> * STORED / 8;
template <int STORED> constexpr int STRIDE = TILE_BYTES<STORED> + 16;  // eight rows' loads meet no bank twice

// ---- rows ---------------------------------------------------------------------------------------------------------

// The 64 rows of a block, all of one source or eight of each by turns; rows are counted from the first of these.
struct Rows {
    bool by_turns;
    int left;   // rows that each source has from there on
    u64 first;  // in [E, rows] of each source

    __device__ __forceinline__ Rows(const PackArguments& p, int expert, int group) : by_turns(p.second.packed) {
        const int own = group * (by_turns ? BLOCK_ROWS / 2 : BLOCK_ROWS);
        left = p.rows - own;
        first = u64(expert) * p.rows + own;
    }
    __device__ __forceinline__ bool second(int row) const { return by_turns && row % ROWS >= ROWS / 2; }
    __device__ __forceinline__ int own(int row) const {  // in its source
        return by_turns ? row / ROWS * (ROWS / 2) + row % (ROWS / 2) : row;
    }
};

template <int STORED> using Tile = u8[BLOCK_ROWS][STRIDE<STORED>];

// `bytes` of all rows' codes from byte `from` of each; zeros past the ends. A warp has eight rows, all of one source.
template <int STORED, int PIECE> __device__ __forceinline__
void fetch(Tile<STORED>& tile, const PackArguments& p, const Rows& rows, int from, int bytes) {
    constexpr int EACH = BLOCK_ROWS / PACK_WARPS, STEPS = (TILE_BYTES<STORED> + WARP * PIECE - 1) / (WARP * PIECE);
    static_assert(EACH == ROWS / 2, "eight rows a warp");
    const int row = threadIdx.x / WARP * EACH, begin = threadIdx.x % WARP * PIECE;
    const int own = rows.own(row), left = p.row_bytes - from;
    const u8* codes = (rows.second(row) ? p.second.packed : p.first.packed) + (rows.first + own) * p.row_bytes + from;
#pragma unroll(PIECE == 16 ? EACH : 1)
    for (int i = 0; i < EACH; ++i, codes += p.row_bytes) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            const int at = begin + step * WARP * PIECE;
            if (at < bytes) copy_piece<PIECE>(tile[row + i] + at, codes + at, at < left && own + i < rows.left);
        }
    }
}

// All pairs of scale and zero of a record: of row block `block`, the records' number `column` in a row.
__device__ __forceinline__
void write_groups(u8* record, const PackArguments& p, const Rows& rows, int block, int column) {
    u32* out = reinterpret_cast<u32*>(record + p.record_bytes) - (ROWS << p.groups_log2);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // eight rows, all of one source
        const int first = block * ROWS + half * (ROWS / 2), own = rows.own(first), count = ROWS / 2 << p.groups_log2;
        const u16* scale = (rows.second(first) ? p.second.scale : p.first.scale) + rows.first * p.groups;
        const u16* zero = (rows.second(first) ? p.second.zero : p.first.zero) + rows.first * p.groups;
#pragma unroll 1
        for (int i = threadIdx.x % WARP; i < count; i += WARP) {
            const int row = own + (i >> p.groups_log2), among = i & ((1 << p.groups_log2) - 1);
            const int group = ((column << p.groups_log2) + among) >> p.span_log2;
            const bool real = row < rows.left && group < p.groups;
            const int place = real ? row * p.groups + group : 0;  // the loads need no branch
            const u32 both = __ldg(scale + place) | u32(__ldg(zero + place)) << 16;
            out[half * count + i] = real ? both : 0;
        }
    }
}

// ---- words of a unit ----------------------------------------------------------------------------------------------

// 64 codes of a row, moved down so that the lane's pair i begins at bit 8 B i.
template <int B> __device__ __forceinline__ void load_row(u32 (&bits)[2 * B], const u8* codes, int t) {
    u32 word[2 * B + 1];
#pragma unroll
    for (int i = 0; i < B; ++i) {
        const uint2 two = reinterpret_cast<const uint2*>(codes)[i];
        word[2 * i] = two.x, word[2 * i + 1] = two.y;
    }
    word[2 * B] = 0;
#pragma unroll
    for (int i = 0; i < 2 * B; ++i)
        bits[i] = B == 3 ? __funnelshift_r(word[i], word[i + 1], 2 * B * t) : word[i] >> (2 * B * t);
}

// The bits of `mask` that swapping two bits of each code's number moves down, for codes of B bits: I above J.
template <int B> __host__ __device__ constexpr u32 lower_of_exchange(int i, int j) {
    u32 mask = 0;
    for (int code = 0; code < 32 / B; ++code)
        if ((code >> j & 1) && !(code >> i & 1)) mask |= ((1u << B) - 1) << (B * code);
    return mask;
}

// Swaps the bits of `mask` with those `by` bits above them.
__device__ __forceinline__ u32 exchange(u32 x, u32 mask, int by) {
    const u32 differ = (x ^ x >> by) & mask;
    return x ^ differ ^ differ << by;
}
template <int B, int I, int J> __device__ __forceinline__ u32 exchange(u32 x) {
    constexpr u32 mask = lower_of_exchange<B>(I, J);
    return exchange(x, mask, B * ((1 << I) - (1 << J)));
}

// 1, 2 and 4 bits: 32 / B codes of rows g (`a`) and g + 8 (`b`) into a word, and then in order. The number of a code in
// a word is, from its highest bit, [e, row, pair]; gathered it is [low bits of pair, row and pair as below, e].
template <int B> __device__ __forceinline__ void assemble(u32* word, const u32 (&a)[2 * B], const u32 (&b)[2 * B]) {
    constexpr u32 fields = B == 1 ? 0x03030303u : B == 2 ? 0x000f000fu : 0x000000ffu;
    constexpr int pair = B == 2 ? 2 * B : 4 * B, row = 6 * B - pair;  // how far up the second word and row g + 8 go
#pragma unroll
    for (int i = 0; i < B; ++i) {
        u32 x = a[2 * i] & fields | (a[2 * i + 1] & fields) << pair;
        x |= (b[2 * i] & fields) << row | (b[2 * i + 1] & fields) << (pair + row);
        if constexpr (B == 1) word[i] = exchange<1, 1, 0>(exchange<1, 3, 1>(exchange<1, 4, 0>(x)));
        if constexpr (B == 2) word[i] = exchange<2, 3, 0>(x);
        if constexpr (B == 4) word[i] = exchange<4, 2, 0>(x);
    }
}

// The six bits of a pair, at bit `to`; 3 bits.
__device__ __forceinline__ u32 pair_of_three(const u32 (&bits)[6], int pair, int to) {
    const int from = 24 * pair % 32;
    const u32 word = bits[24 * pair / 32];
    return (from > to ? word >> (from - to) : word << (to - from)) & 0x3fu << to;
}

template <> __device__ __forceinline__ void assemble<3>(u32* word, const u32 (&a)[6], const u32 (&b)[6]) {
    const u32 last = pair_of_three(b, 7, 0), spare = last & 7 | last << 13 & 0x70000u;  // H
#pragma unroll
    for (int i = 0; i < 3; ++i) {
        // the four whole pairs side by side, then e = 1 of those below changes places with e = 0 of those above
        u32 x = pair_of_three(a, 2 * i, 0) | pair_of_three(a, 2 * i + 1, 16);
        x |= pair_of_three(b, 2 * i, 9) | pair_of_three(b, 2 * i + 1, 25);
        x = exchange(x, 0x7038u, 13);
        const u32 extra = i == 1 ? pair_of_three(b, 6, 6) : pair_of_three(a, i == 0 ? 6 : 7, 6);  // G, g, h
        x |= extra & 0x1c0u | extra << 13 & 0x1c00000u;
        word[i] = x | spare << (15 - i) & 0x80008000u;
    }
}

// Other widths, and codes that come as bytes: pair by pair. Two bytes hold a pair, wherever it begins.
template <int STORED> __device__ __forceinline__ u32 load_pair(const u8* codes, int pair, int t) {
    const u8* octet = codes + STORED * pair;
    u32 both;
    if constexpr (STORED == 8) both = reinterpret_cast<const u16*>(octet)[t];
    else both = (octet[2 * STORED * t / 8] | octet[2 * STORED * t / 8 + 1] << 8) >> (2 * STORED * t % 8);
    constexpr u32 mask = (1u << STORED) - 1;
    return both & mask | (both >> STORED & mask) << 16;
}

// Two codes, 16 bits from each other, to their places in a lane's words; records.py has the picture.
template <int WORD> __device__ __forceinline__ void put_pair(u32* word, int pair, int row, u32 codes) {
    constexpr int each = 8 / WORD;
    if (WORD != 3) {
        word[pair / each] |= codes << WORD * (pair % each + each * row);
    } else if (pair < 6) {
        word[pair / 2] |= codes << 3 * (pair % 2 + 3 * row);
    } else if (pair == 6 || row == 0) {
        word[pair == 6 ? row : 2] |= codes << 6;
    } else {
#pragma unroll
        for (int i = 0; i < 3; ++i) word[i] |= (codes >> i & 0x10001u) << 15;
    }
}

// A lane's WORD words of the unit whose codes of row g are there in shared memory.
template <int STORED, int WORD> __device__ __forceinline__ void make_unit(u32* word, const u8* upper, int t) {
    const u8* lower = upper + ROWS / 2 * STRIDE<STORED>;
    if constexpr (STORED == WORD && WORD <= 4) {
        u32 a[2 * WORD], b[2 * WORD];
        load_row<WORD>(a, upper, t);
        load_row<WORD>(b, lower, t);
        assemble<WORD>(word, a, b);
    } else {
#pragma unroll
        for (int i = 0; i < WORD; ++i) word[i] = 0;
#pragma unroll
        for (int pair = 0; pair < 8; ++pair) {
            put_pair<WORD>(word, pair, 0, load_pair<STORED>(upper, pair, t));
            put_pair<WORD>(word, pair, 1, load_pair<STORED>(lower, pair, t));
        }
    }
}

// ---- kernel -------------------------------------------------------------------------------------------------------

// UNITS words at an address aligned to them.
template <int UNITS> __device__ __forceinline__ void store(u8* to, const u32* word) {
    if constexpr (UNITS == 4) *reinterpret_cast<uint4*>(to) = make_uint4(word[0], word[1], word[2], word[3]);
    if constexpr (UNITS == 2) *reinterpret_cast<uint2*>(to) = make_uint2(word[0], word[1]);
    if constexpr (UNITS == 1) *reinterpret_cast<u32*>(to) = word[0];
}

// Codes of STORED bits into records of UNITS units whose codes take WORD bits.
template <int STORED, int WORD, int UNITS> __global__ void __launch_bounds__(PACK_THREADS) pack(const PackArguments p) {
    static_assert(WORD == (STORED > 4 ? 8 : STORED) || STORED == 8, "5 and 6 bits take a byte of a word");
    __shared__ __align__(16) Tile<STORED> tile;
    constexpr int EACH = TILE<STORED> / (UNIT * UNITS), RECORD_BYTES = UNIT * UNITS * STORED / 8;  // of a row
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    const int number = blockIdx.x % p.tiles, group = blockIdx.x / p.tiles % p.row_groups;
    const int expert = blockIdx.x / p.tiles / p.row_groups;
    const int first = number * EACH, count = min(EACH, p.across - first), from = first * RECORD_BYTES;
    const Rows rows(p, expert, group);
    u8* out = p.records + ((u64(expert) * p.row_groups + group) * p.across + first) * BLOCKS * p.record_bytes;

    const int bytes = (count * RECORD_BYTES + 15) / 16 * 16;
    if (p.piece == 16) fetch<STORED, 16>(tile, p, rows, from, bytes);
    else if (p.piece == 4) fetch<STORED, 4>(tile, p, rows, from, bytes);
    else fetch<STORED, 1>(tile, p, rows, from, bytes);
    copy_commit();
    for (int i = threadIdx.x / WARP; i < BLOCKS * count; i += PACK_WARPS)
        write_groups(out + u64(i) * p.record_bytes, p, rows, i % BLOCKS, first + i / BLOCKS);
    copy_wait<0>();
    __syncthreads();
    if (p.last_mask != 0xff && number == p.tiles - 1) {  // what is behind the codes of a last byte is nobody's
        if (threadIdx.x < BLOCK_ROWS) tile[threadIdx.x][p.row_bytes - 1 - from] &= p.last_mask;
        __syncthreads();
    }
    for (int i = threadIdx.x / WARP; i < BLOCKS * count; i += PACK_WARPS) {
        const u8* codes = tile[i % BLOCKS * ROWS + g] + i / BLOCKS * RECORD_BYTES;
        u32 word[UNITS * WORD];
#pragma unroll
        for (int u = 0; u < UNITS; ++u) make_unit<STORED, WORD>(word + u * WORD, codes + u * (RECORD_BYTES / UNITS), t);
        u8* record = out + u64(i) * p.record_bytes + lane * 4 * UNITS;
#pragma unroll
        for (int chunk = 0; chunk < WORD; ++chunk) store<UNITS>(record + chunk * 128 * UNITS, word + chunk * UNITS);
    }
}

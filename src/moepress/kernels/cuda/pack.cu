// SPDX-License-Identifier: Apache-2.0
// Stored parts -> records, at load; each byte is read once and written once. The definition is kernels/records.py.
//
// A block takes 64 rows and TILE columns of one expert, whose records lie together. It fetches the rows' packed codes
// into shared memory, writes scales and zeros meanwhile, and then each warp makes records: a lane builds its words in
// registers and stores them where they stay. A lane's two codes of a pair are neighbours in a row as well: 2 b bits,
// and 8 b bits further on are those of the next pair. Codes are moved by bytes, at 1 to 4 bits with a pair or more in
// each: logic runs at half rate, and code by code it would take longer than the memory does.
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

// Of a row's 64 codes the lane's, a pair in a byte: four[m] has pairs 4 m to 4 m + 3. A pair begins at bit 2 B t % 8 of
// its byte, with 3 bits at bit 0; what else a byte has is other lanes'.
template <int B> __device__ __forceinline__ void load_row(u32* four, const u8* codes, int t) {
    u32 word[2 * B];
#pragma unroll
    for (int i = 0; i < B; ++i) {
        const uint2 two = reinterpret_cast<const uint2*>(codes)[i];
        word[2 * i] = two.x, word[2 * i + 1] = two.y;
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const u32* w = word + B * m;
        if constexpr (B == 1) four[m] = w[0];
        if constexpr (B == 2) four[m] = __byte_perm(w[0], w[1], 0x6420 + 0x1111 * (t / 2));
        if constexpr (B == 3) {  // of a pair's three bytes the first or the last two, one pair in each half
            const u32 by = 6 * t - t / 2 * 8, low = __byte_perm(w[0], w[1], 0x4310 + 0x1111 * (t / 2)) >> by;
            four[m] = __byte_perm(low, __byte_perm(w[1], w[2], 0x6532 + 0x1111 * (t / 2)) >> by, 0x6420);
        }
        if constexpr (B == 4) {
            const u32 low = __byte_perm(w[0], w[1], 0x40 + 0x11 * t), high = __byte_perm(w[2], w[3], 0x40 + 0x11 * t);
            four[m] = __byte_perm(low, high, 0x5410);
        }
    }
}

// Bytes of pairs (4 m, 4 m + 1, 4 m + 2, 4 m + 3), each with e = 0 below e = 1 -> bytes of (even, odd) pairs with e = 0
// and then with e = 1, each with the lower pair below: e = 1 of the lower half changes places with e = 0 of the upper.
template <int B> __device__ __forceinline__ u32 split_columns(u32 x) {
    constexpr u32 mask = B == 1 ? 0xaaaa : B == 2 ? 0xcccc : B == 3 ? 0x3838 : 0xf0f0;
    const u32 differ = (x ^ x >> (16 - B)) & mask;
    return x ^ differ ^ differ << (16 - B);
}

__device__ __forceinline__ u32 select(u32 mask, u32 yes, u32 no) { return yes & mask | no & ~mask; }

// Fours of row g, and then of row g + 8, into words; 1, 2 and 4 bits. A byte of a word has place for 4 / B pairs.
template <int B> __device__ __forceinline__ void assemble(u32* word, const u32 (&four)[4], int t) {
    constexpr int each = 4 / B, width = 2 * B;
#pragma unroll
    for (int i = 0; i < B; ++i) {
        u32 x = 0;
#pragma unroll
        for (int j = 0; j < each; ++j) {
            const u32 from = four[each * i + j], field = 0xffu >> (8 - width) << width * j, mask = 0x01010101u * field;
            const u32 moved = B == 4 ? from : __funnelshift_r(from, from, width * t % 8 - width * j);  // a rotation
            x = j ? select(mask, moved, x) : moved;
        }
        word[i] = split_columns<B>(x);
    }
}

template <> __device__ __forceinline__ void assemble<3>(u32* word, const u32 (&four)[4], int) {
    u32 x[4];  // pairs 2 n and 2 n + 1 for n = 0 and 1, or 2 and 3, from bits 0 and 3 of each byte
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = split_columns<3>(four[i]);
    word[0] = select(0x3f3f3f3fu, x[0], x[1] << 3);
    word[1] = select(0x3f3f3f3fu, x[2], x[3] << 3);
    const u32 low = select(0x07070707u, x[1], x[3] << 3), high = select(0x40404040u, x[1] << 1, x[3] << 2);
    word[2] = select(0x3f3f3f3fu, low, high);
}

// Other widths, and codes that come as bytes. Two bytes hold a pair, wherever it begins.
template <int STORED> __device__ __forceinline__ u32 load_pair(const u8* codes, int pair, int t) {
    const u8* octet = codes + STORED * pair;
    if constexpr (STORED == 8) return reinterpret_cast<const u16*>(octet)[t];
    else return octet[2 * STORED * t / 8] | octet[2 * STORED * t / 8 + 1] << 8;
}

// The codes of pairs 2 n and 2 n + 1, a byte each and in a word's order: even and odd with e = 0, the same with e = 1.
template <int STORED> __device__ __forceinline__ u32 load_codes(const u8* codes, int n, int t) {
    u32 x = load_pair<STORED>(codes, 2 * n, t) | load_pair<STORED>(codes, 2 * n + 1, t) << 16;
    if constexpr (STORED < 8) x >>= 2 * STORED * t % 8;
    return __byte_perm(x, x >> STORED, 0x6420) & 0x01010101u * ((1u << STORED) - 1);
}

// These to their places in a lane's words; records.py has the picture.
template <int WORD> __device__ __forceinline__ void put_codes(u32* word, int n, int row, u32 codes) {
    constexpr int each = 8 / WORD;
    if (WORD != 3) {
        word[(4 * row + n) / each] |= codes << WORD * ((4 * row + n) % each);
    } else if (n < 3) {
        word[n < 2 ? row : 2] |= codes << 3 * (n < 2 ? n : row);
    } else {
        word[row] |= (codes & 0x03030303u) << 6;
        word[2] |= (codes & 0x04040404u) << (4 + row);
    }
}

// A lane's WORD words of the unit whose codes of row g are there in shared memory.
template <int STORED, int WORD> __device__ __forceinline__ void make_unit(u32* word, const u8* upper, int t) {
    const u8* lower = upper + ROWS / 2 * STRIDE<STORED>;
    if constexpr (STORED == WORD && WORD <= 4) {
        u32 four[4];
        load_row<WORD>(four, upper, t);
        load_row<WORD>(four + 2, lower, t);
        assemble<WORD>(word, four, t);
    } else {
#pragma unroll
        for (int i = 0; i < WORD; ++i) word[i] = 0;
#pragma unroll
        for (int n = 0; n < 4; ++n) {
            put_codes<WORD>(word, n, 0, load_codes<STORED>(upper, n, t));
            put_codes<WORD>(word, n, 1, load_codes<STORED>(lower, n, t));
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

    const int bytes = (count * RECORD_BYTES + 15) / 16 * 16;
    if (p.piece == 16) fetch<STORED, 16>(tile, p, rows, from, bytes);
    else if (p.piece == 4) fetch<STORED, 4>(tile, p, rows, from, bytes);
    else fetch<STORED, 1>(tile, p, rows, from, bytes);
    copy_commit();
    u8* out = p.records + ((u64(expert) * p.row_groups + group) * p.across + first) * BLOCKS * p.record_bytes;
    for (int i = threadIdx.x / WARP; i < BLOCKS * count; i += PACK_WARPS)
        write_groups(out + u64(i) * p.record_bytes, p, rows, i % BLOCKS, first + i / BLOCKS);
    copy_wait<0>();
    __syncthreads();
    if (p.last_mask != 0xff && number == p.tiles - 1) {  // what is behind the codes of a last byte is nobody's
        if (threadIdx.x < BLOCK_ROWS) tile[threadIdx.x][p.row_bytes - 1 - from] &= p.last_mask;
        __syncthreads();
    }
#pragma unroll 1  // other warps fill the waits, and several records at once would take registers from them
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

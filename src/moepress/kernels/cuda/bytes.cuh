// SPDX-License-Identifier: Apache-2.0
// x as integers, to be multiplied with codes as they are: of the columns that share a scale ("segment"), 15 bits below a
// power of two, as a high and a low byte (ours). With their sum, sum((q - zero) scale x) = scale (sum(q x) - zero sum(x)).
// Elements within 1/64 of a segment's largest are exact, the others lose at most 2^-14 of it: far below what storing a
// result in 16 bits costs. An infinity or NaN spoils its segment's scale, and so all results of its row.
#pragma once
#include "common.cuh"

template <int U, int G> struct Record {
    static constexpr int GROUPS = UNIT * U / G > 1 ? UNIT * U / G : 1;
    static constexpr int SEGMENTS = G == 32 ? 2 : 1;  // sums a unit
    static __device__ __host__ constexpr int bytes(int b) { return 128 * U * b + 64 * GROUPS; }
};

// A float32 whose last place is worth 1: what is added to it lies, as an integer, in its lower bits. And 128, because low
// bytes are signed: where one is negative the high one has to be one more.
constexpr float INTEGERS = 12582912.f + 128.f;
constexpr int UNIT_WORDS = 32;  // of a unit's bytes: 64 high ones, 64 low ones, each [t][n][4]
constexpr int SUM_FLOATS = 2;   // of a segment: scale, sum

template <bool BF16> __device__ __forceinline__ void load_octet(u32 (&v)[4], const u16* row, int at, int k) {
    if (at + 8 <= k && (reinterpret_cast<u64>(row + at) & 15) == 0) {
        const uint4 q = *reinterpret_cast<const uint4*>(row + at);
        v[0] = q.x, v[1] = q.y, v[2] = q.z, v[3] = q.w;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            u32 low = at + 2 * i < k ? row[at + 2 * i] : 0, high = at + 2 * i + 1 < k ? row[at + 2 * i + 1] : 0;
            v[i] = low | high << 16;
        }
    }
}

// What a lane makes of an octet of columns, pair 0..7 of a unit: words of high and of low bytes. The lane t = 0..3 of a
// fragment has, in word n, columns 16 n + {2 t, 8 + 2 t, 2 t + 1, 8 + 2 t + 1}. Neighbours swap halves, so that each has
// whole words. All lanes of the segment.
struct Bytes {
    u32 high[2], low[2];
    float scale, sum;

    // Where word i of the high bytes lies in the unit; that of the low ones 16 further.
    static __device__ __forceinline__ int at(int pair, int i) { return (2 * (pair % 2) + i) * 4 + pair / 2; }
    template <int G> static __device__ __forceinline__ bool has_sums(int pair) { return pair % (G == 32 ? 4 : 8) == 0; }

    template <int G, bool BF16> __device__ __forceinline__ void make(const u32 (&octet)[4], int pair) {
        constexpr int SPAN = G == 32 ? 4 : 8;
        float x[8];
        u32 pairs = 0;  // without their signs numbers are in the order of their bits
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            x[2 * t] = Half<BF16>::lo(octet[t]), x[2 * t + 1] = Half<BF16>::hi(octet[t]);
            pairs = __vmaxu2(pairs, octet[t] & 0x7fff7fffu);
        }
#pragma unroll
        for (int mask = 1; mask < SPAN; mask *= 2) pairs = __vmaxu2(pairs, __shfl_xor_sync(~0u, pairs, mask));
        const u32 most = __float_as_uint(Half<BF16>::lo(max(pairs & 0xffffu, pairs >> 16)));
        // a power of two that makes the largest at least 2^13 and less than 2^14
        const u32 exponent = max(most >> 23, 14u);
        const float to_integers = __uint_as_float((267u - exponent) << 23);
        scale = __uint_as_float(exponent == 255 ? 0x7fc00000u : (exponent - 13u) << 23);
        u32 total = 0, bytes[4];  // of two columns: low, low, high, high
#pragma unroll
        for (int t = 0; t < 4; ++t) {
            const u32 a = __float_as_uint(fmaf(x[2 * t], to_integers, INTEGERS));
            const u32 b = __float_as_uint(fmaf(x[2 * t + 1], to_integers, INTEGERS));
            total += a + b;
            bytes[t] = __byte_perm(a, b, 0x5140);
        }
        total -= 8 * __float_as_uint(INTEGERS);
#pragma unroll
        for (int mask = 1; mask < SPAN; mask *= 2) total += __shfl_xor_sync(~0u, total, mask);
        sum = float(int(total));
        const bool odd = pair % 2;  // has the columns t = 2, 3 of both
        const u32 take_high = odd ? 0x3726 : 0x7362, take_low = odd ? 0x1504 : 0x5140;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const u32 own = odd ? bytes[2 + i] : bytes[i], other = __shfl_xor_sync(~0u, odd ? bytes[i] : bytes[2 + i], 1);
            high[i] = __byte_perm(own, other, take_high);
            low[i] = __byte_perm(own, other, take_low) ^ 0x80808080u;
        }
    }
};

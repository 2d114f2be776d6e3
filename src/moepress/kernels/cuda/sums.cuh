// SPDX-License-Identifier: Apache-2.0
// Sums of x over the columns that share a scale. With them codes can stay as they are unpacked, with a base and without
// scale and zero: sum((q - zero) scale x) = scale (sum((base + q) x) - sum(base x) - zero sum(x)).
#pragma once
#include "common.cuh"

constexpr int WIDTHS = 5;  // word widths 1, 2, 3, 4, 8
__device__ constexpr int width_index(int b) { return b == 8 ? 4 : b - 1; }

template <int U, int G> struct Record {
    static constexpr int GROUPS = UNIT * U / G > 1 ? UNIT * U / G : 1;
    static constexpr int SEGMENTS = G == 32 ? 2 : 1;  // sums a unit
    static __device__ __host__ constexpr int bytes(int b) { return 128 * U * b + 64 * GROUPS; }
};

// Sums of x a segment: {sum x, -sum base x}; where widths are mixed, one base sum for each width.
template <int B> struct Sums {
    static constexpr int FLOATS = B ? 2 : 8;
    static __device__ int base_at(int b) { return B ? 1 : 1 + width_index(b); }
};

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

template <int B, bool BF16> __device__ __forceinline__ float base_of(int pair) {
    float x = base<B, BF16>(0);
#pragma unroll
    for (int i = 1; i < 8; ++i) x = pair == i ? base<B, BF16>(i) : x;
    return x;
}

template <bool BF16> __device__ __forceinline__ float sum_octet(const u32 (&octet)[4]) {
    float sum = 0.f;
#pragma unroll
    for (int t = 0; t < 4; ++t) sum += Half<BF16>::lo(octet[t]) + Half<BF16>::hi(octet[t]);
    return sum;
}

// Sums over the segment of `pair`'s octet of columns: {sum x, -sum base x, ...} in every lane of the segment. All lanes.
template <int B, int G, bool BF16>
__device__ __forceinline__ void segment_sums(float (&part)[Sums<B>::FLOATS], const u32 (&octet)[4], int pair) {
    const float sum = sum_octet<BF16>(octet);
    part[0] = sum;
    if constexpr (B) {
        part[1] = -base_of<B, BF16>(pair) * sum;
    } else {
        part[1] = -base_of<1, BF16>(pair) * sum, part[2] = -base_of<2, BF16>(pair) * sum;
        part[3] = -base_of<3, BF16>(pair) * sum, part[4] = -base_of<4, BF16>(pair) * sum;
        part[5] = -base_of<8, BF16>(pair) * sum;
    }
#pragma unroll
    for (int j = 0; j < (B ? 2 : 1 + WIDTHS); ++j)
#pragma unroll
        for (int mask = 1; mask < (G == 32 ? 4 : 8); mask *= 2) part[j] += __shfl_xor_sync(~0u, part[j], mask);
}

// SPDX-License-Identifier: Apache-2.0
// A learned selector's arithmetic, for the kernels that run it: select.cu after any router, router.cu with its own. The
// definition is kernels/selector/reference.py.
#pragma once
#include "common.cuh"

struct Selector {
    const float* projection;   // [R, columns]
    const float* sensitivity;  // [num_experts, R]
    const float* offset;       // [num_experts]
    const float* power;        // one
    const float* dial;         // one
};

constexpr int OCTET = 8, CHUNK = WARP * OCTET;  // columns that a lane and a warp take at a time
constexpr float LEAST = 1e-6f;                  // in the mean square of x, and the least weight that has a logarithm

__device__ __forceinline__ float add_lanes(float x) {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// The same for the first `slots` lanes, where the others have zeros.
__device__ __forceinline__ float add_slots(float x, int slots) {
#pragma unroll
    for (int step = WARP / 2; step; step /= 2)
        if (step < slots) x += __shfl_xor_sync(~0u, x, step);
    return x;
}

// Numbers in their order; 0 is less than any but NaN with a sign.
__device__ __forceinline__ u32 ordered(float x) {
    const u32 bits = __float_as_uint(x);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ __forceinline__ u32 greatest(u32 x) {  // of the warp
#if __CUDA_ARCH__ >= 800
    u32 most;
    asm volatile("redux.sync.max.u32 %0, %1, 0xffffffff;" : "=r"(most) : "r"(x));
    return most;
#else
#pragma unroll
    for (int step = WARP / 2; step; step /= 2) x = max(x, __shfl_xor_sync(~0u, x, step));
    return x;
#endif
}

// What a weight adds to z, over the power.
__device__ __forceinline__ float log_weight(float weight) { return __logf(fmaxf(weight, LEAST)); }

// The z from which a choice is worth the price.
__device__ __forceinline__ float log_price(float dial) {
    const float price = 1.f + dial;
    return price <= 0.f ? -__int_as_float(0x7f800000) : logf(price);
}

// What the weights of choices that are kept shall add up to, if anything.
struct Total {
    bool wanted;
    float all;
    __device__ __forceinline__ Total(bool renormalises, float weight, int slots)
        : wanted(renormalises), all(renormalises ? add_slots(weight, slots) : 0.f) {}
};

// Whether a lane's choice, if it has one, is kept; changes its weight, which is 0 in lanes that have none.
__device__ __forceinline__ bool decide(float z, float least, Total total, float& weight, int slots, int lane) {
    const bool real = lane < slots;
    u32 kept = __ballot_sync(~0u, real && z >= least);
    if (!kept) {  // the dearest, which is among those kept otherwise
        const u32 rank = real ? ordered(z) : 0, most = greatest(rank);
        kept = __ballot_sync(~0u, real && rank == most);
        kept &= 0u - kept;
    }
    const bool mine = kept >> lane & 1;
    weight = mine ? weight : 0.f;
    if (total.wanted) {
        const float rest = add_slots(weight, slots);
        if (rest > 0.f && rest != total.all) weight *= __fdividef(total.all, rest);
    }
    return mine;
}

// ---- projections --------------------------------------------------------------------------------------------------

// An octet of columns of rows `first`, `first` + STEP, ... of P; zeros past the ends.
template <int R, int STEP, int EACH>
__device__ __forceinline__ void load_rows(float (&w)[EACH][OCTET], const float* projection, int columns, int first, int column) {
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int row = first + i * STEP;
        float4 low = make_float4(0.f, 0.f, 0.f, 0.f), high = low;
        if (row < R && column < columns) {
            const float4* from = reinterpret_cast<const float4*>(projection + (u64)row * columns + column);
            low = from[0], high = from[1];
        }
        w[i][0] = low.x, w[i][1] = low.y, w[i][2] = low.z, w[i][3] = low.w;
        w[i][4] = high.x, w[i][5] = high.y, w[i][6] = high.z, w[i][7] = high.w;
    }
}

// An octet of 16-bit numbers, or zeros.
__device__ __forceinline__ uint4 load_words(const u16* from, bool real) {
    return real ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
}

template <bool BF16> __device__ __forceinline__ void widen_octet(float (&x)[OCTET], uint4 words) {
    const u32 word[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) x[2 * i] = Half<BF16>::lo(word[i]), x[2 * i + 1] = Half<BF16>::hi(word[i]);
}

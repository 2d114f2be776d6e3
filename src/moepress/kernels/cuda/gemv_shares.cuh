// SPDX-License-Identifier: Apache-2.0
// Which row blocks of W and of compensators' v the groups of `gemv` begin with, and how far they go on. Arithmetic alone, which a
// test runs on a CPU: each row block has one group, whatever the numbers.
#pragma once

// Of a group: row blocks first, first + stride, ... The first ones go to different multiprocessors, whole segments to those from
// the last, since the first multiply v. v goes to groups that have fewer of W, the last of the first blocks, which start first; a
// block has V_GROUPS of its groups.
template <int GROUPS, int V_GROUPS> struct Shares {
    static constexpr int NONE = 1 << 30;
    int first, stride, first_of_v, stride_of_v;

    __device__ __forceinline__ Shares(int blocks, int block, int group, int v_group, bool segments)
        : first(segments ? (blocks - 1 - block) * GROUPS + group : block + group * blocks), stride(blocks * GROUPS) {
        give_v(block, v_group, blocks);
    }
    // With whole segments v goes to blocks that have one less, two row blocks in each if there are so many, and more blocks only
    // where else groups would have more than two: Qwen3's four tokens 31.4 us, now 29.2, DeepSeek-MoE's 38.2, now 35.6.
    __device__ __forceinline__ void spread_v(int blocks, int block, int v_group, int segments, int items) {
        const int fewer = blocks - segments % blocks, most = 2 * V_GROUPS;
        give_v(block, v_group, min(blocks, max(min(fewer, (items + 1) / 2), (items + most - 1) / most)));
    }

private:
    __device__ __forceinline__ void give_v(int block, int v_group, int own) {
        first_of_v = block < own ? block + (V_GROUPS - 1 - v_group) * own : NONE;
        stride_of_v = own * V_GROUPS;
    }
};

// i / n for i n < 2^31, where `inverse` is 2^31 / n + 1. (The compiler's own way takes 40 instructions, ahead of v's first record.)
__device__ __forceinline__ int divide(int i, unsigned inverse) { return int((unsigned long long)(2 * i) * inverse >> 32); }

// Turns of `stride` for `all` row blocks in as few parts of up to MOST turns as there have to be: how many a part has, as even as
// can be; 0 where there are none. Without divisions: everybody waits for the thread that finds out.
template <int MOST> __device__ __forceinline__ int even_part(int all, int stride) {
    int turns = 0;  // with more than these a part has MOST
#pragma unroll 1
    for (int left = all; left > 0 && turns < MOST * MOST; left -= stride) ++turns;
    const int parts = (turns + MOST - 1) / MOST;
    int part = 0;
#pragma unroll 1
    while (part * parts < turns) ++part;
    return part;
}

// SPDX-License-Identifier: Apache-2.0
// Which row blocks of W and of compensators' v the groups of `gemv` begin with, and how far they go on. Arithmetic alone, which a
// test runs on a CPU: each row block has one group, whatever the numbers.
#pragma once

// Of a group: row blocks first, first + stride, ... The first ones go to different multiprocessors, whole segments to those from
// the last, since the first multiply v. v goes to groups that have fewer of W, the last of the first blocks, which start first.
template <int GROUPS> struct Shares {
    static constexpr int NONE = 1 << 30;
    int first, stride, first_of_v, stride_of_v;

    // `apart`: row blocks of v that have blocks of their own, two in each, if the other blocks have a group for each of W's `all` row
    // blocks. Everybody waits for t, and behind records of W for the same multiprocessor v's were the last to come: Qwen3's one token
    // 16.0 us, now 14.0. With more of W those blocks' groups would take it after v, all at once: DeepSeek-MoE's 14.9 us, else 15.2.
    __device__ __forceinline__ Shares(int blocks, int block, int group, bool segments, int apart, int all) {
        stride = blocks * GROUPS;
        const bool alone = apart && all <= (blocks - (apart + 1) / 2) * GROUPS;
        const int own = alone ? (apart + 1) / 2 : blocks, others = blocks - own;
        if (alone) first = block >= own ? block - own + group * others : NONE;
        else first = segments ? (blocks - 1 - block) * GROUPS + group : block + group * blocks;
        give_v(block, group, own);
    }
    // With whole segments v goes to blocks that have one less, two row blocks in each if there are so many, and more blocks only
    // where else groups would have more than two: Qwen3's four tokens 31.4 us, now 29.2, DeepSeek-MoE's 38.2, now 35.6.
    __device__ __forceinline__ void spread_v(int blocks, int block, int group, int segments, int items) {
        const int fewer = blocks - segments % blocks, most = 2 * GROUPS;
        give_v(block, group, min(blocks, max(min(fewer, (items + 1) / 2), (items + most - 1) / most)));
    }

private:
    __device__ __forceinline__ void give_v(int block, int group, int own) {
        first_of_v = block < own ? block + (GROUPS - 1 - group) * own : NONE;
        stride_of_v = own * GROUPS;
    }
};

// SPDX-License-Identifier: Apache-2.0
// In the place of kernels/cuda/common.cuh: a block's threads one after another on a CPU, from barrier to barrier.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

#define __device__
#define __host__
#define __global__
#define __shared__ static
#define __forceinline__ inline
#define __align__(bytes) __attribute__((aligned(bytes)))
#define __launch_bounds__(threads)

constexpr int WARP = 32, ROWS = 16, UNIT = 64;
struct alignas(8) uint2 { u32 x, y; };
struct alignas(16) uint4 { u32 x, y, z, w; };
inline uint2 make_uint2(u32 x, u32 y) { return {x, y}; }
inline uint4 make_uint4(u32 x, u32 y, u32 z, u32 w) { return {x, y, z, w}; }
using std::min;
template <class T> T __ldg(const T* from) { return *from; }
inline u32 __funnelshift_r(u32 low, u32 high, u32 by) { return u32((u64(high) << 32 | low) >> (by % 32)); }
inline u32 __byte_perm(u32 low, u32 high, u32 pick) {
    const u64 both = u64(high) << 32 | low;
    u32 x = 0;
    for (int i = 0; i < 4; ++i) x |= u32(both >> 8 * (pick >> 4 * i & 7) & 0xff) << 8 * i;
    return x;
}

template <int BYTES> void copy_piece(u8* to, const u8* from, bool real) {
    const bool aligned = uintptr_t(to) % BYTES == 0 && (!real || uintptr_t(from) % BYTES == 0);
    if (!aligned) std::abort();
    if (real) std::memcpy(to, from, BYTES);
    else std::memset(to, 0, BYTES);
}
inline void copy_commit() {}
template <int PENDING> void copy_wait() {}

struct Index { int x; };
inline Index threadIdx, blockIdx;
inline ucontext_t scheduler, fiber[1024];
inline void __syncthreads() { swapcontext(&fiber[threadIdx.x], &scheduler); }

// Every thread must meet the same barriers.
inline void run_blocks(int blocks, int threads, void (*body)()) {
    constexpr size_t STACK = 1 << 15;
    static std::vector<char> stacks(1024 * STACK);
    static bool running[1024];
    static void (*current)();
    current = body;
    for (blockIdx.x = 0; blockIdx.x < blocks; ++blockIdx.x) {
        for (int i = 0; i < threads; ++i) {
            getcontext(&fiber[i]);
            fiber[i].uc_stack.ss_sp = &stacks[i * STACK], fiber[i].uc_stack.ss_size = STACK;
            fiber[i].uc_link = &scheduler;
            running[i] = true;
            makecontext(&fiber[i], [] { current(); running[threadIdx.x] = false; }, 0);
        }
        while (running[0])
            for (threadIdx.x = 0; threadIdx.x < threads; ++threadIdx.x) {
                if (!running[threadIdx.x]) std::abort();
                swapcontext(&scheduler, &fiber[threadIdx.x]);
            }
    }
}

// SPDX-License-Identifier: Apache-2.0
// Hopper's warpgroup products D[64, N] (+)= A[64, 16] B[N, 16]^T: A from registers, B from shared memory (128-byte swizzle).
#pragma once
#include "common.cuh"

#if __CUDA_ARCH__ >= 900

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}

// The descriptor of a tile of rows of 64 numbers (128 bytes), chunk c of row r at 16 * (c ^ r % 8); 1024-byte aligned. What begins
// further on is that plus sixteenths of bytes. Its halves are put together where the compiler does not see it: then it adds to
// both at once, one operation of the uniform pipe, where it had made each descriptor from its halves again, in three.
__device__ __forceinline__ u64 swizzled_tile(u32 address) {
    u64 tile;
    asm("mov.b64 %0, {%1, %2};" : "=l"(tile) : "r"((address & 0x3ffff) >> 4 | 1 << 16), "r"(1024 >> 4 | 1 << 30));
    return tile;
}

// D layout: d[4 i + 2 r + e] is row (16 warp + lane / 4 + 8 r), column 8 i + 2 (lane % 4) + e.
template <int N, bool BF16> struct Wgmma;

// One statement for the four products of a unit: with one for each, 72 operands in and out, NVRTC took a third longer.
#define STEP(N, TYPE, OUT, A, B, ADD) \
    "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " " OUT ", " A ", " B ", " ADD ", 1, 1, 0;"
#define WGMMA(N, IS_BF16, TYPE, OUT, A0, A1, A2, A3, B0, B1, B2, B3, ...)                                               \
    template <> struct Wgmma<N, IS_BF16> {                                                                             \
        /* d (+)= a's 64 columns times a tile's rows, from a `swizzled_tile` on; without ADD d is only written. */     \
        template <bool ADD = true>                                                                                     \
        static __device__ __forceinline__ void run(float (&d)[N / 2], const u32 (&a)[16], u64 tile) {                  \
            if constexpr (ADD) RUN("eq", N, TYPE, OUT, A0, A1, A2, A3, B0, B1, B2, B3, __VA_ARGS__);                   \
            else RUN("ne", N, TYPE, OUT, A0, A1, A2, A3, B0, B1, B2, B3, __VA_ARGS__);                                 \
        }                                                                                                              \
    };
#define RUN(ADD, N, TYPE, OUT, A0, A1, A2, A3, B0, B1, B2, B3, ...)                                                     \
            asm volatile("{.reg .pred p, q; setp.eq.u32 p, 0, 0; setp." ADD ".u32 q, 0, 0;"                            \
                         STEP(N, TYPE, OUT, A0, B0, "q") STEP(N, TYPE, OUT, A1, B1, "p")                               \
                         STEP(N, TYPE, OUT, A2, B2, "p") STEP(N, TYPE, OUT, A3, B3, "p") "}"                           \
                         : __VA_ARGS__                                                                                 \
                         : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(a[4]), "r"(a[5]), "r"(a[6]), "r"(a[7]),     \
                           "r"(a[8]), "r"(a[9]), "r"(a[10]), "r"(a[11]), "r"(a[12]), "r"(a[13]), "r"(a[14]),           \
                           "r"(a[15]), "l"(tile), "l"(tile + 2), "l"(tile + 4), "l"(tile + 6))
#define BOTH(N, ...)                       \
    WGMMA(N, true, "bf16", __VA_ARGS__)    \
    WGMMA(N, false, "f16", __VA_ARGS__)
#define D4(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define D16(i) D4(i), D4(i + 4), D4(i + 8), D4(i + 12)
#define D64(i) D16(i), D16(i + 16), D16(i + 32), D16(i + 48)

BOTH(8,
     "{%0, %1, %2, %3}",
     "{%4, %5, %6, %7}", "{%8, %9, %10, %11}", "{%12, %13, %14, %15}", "{%16, %17, %18, %19}",
     "%20", "%21", "%22", "%23", D4(0))
BOTH(16,
     "{%0, %1, %2, %3, %4, %5, %6, %7}",
     "{%8, %9, %10, %11}", "{%12, %13, %14, %15}", "{%16, %17, %18, %19}", "{%20, %21, %22, %23}",
     "%24", "%25", "%26", "%27", D4(0), D4(4))
BOTH(24,
     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11}",
     "{%12, %13, %14, %15}", "{%16, %17, %18, %19}", "{%20, %21, %22, %23}", "{%24, %25, %26, %27}",
     "%28", "%29", "%30", "%31", D4(0), D4(4), D4(8))
BOTH(32,
     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}",
     "{%16, %17, %18, %19}", "{%20, %21, %22, %23}", "{%24, %25, %26, %27}", "{%28, %29, %30, %31}",
     "%32", "%33", "%34", "%35", D16(0))
BOTH(64,
     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
     "%23, %24, %25, %26, %27, %28, %29, %30, %31}",
     "{%32, %33, %34, %35}", "{%36, %37, %38, %39}", "{%40, %41, %42, %43}", "{%44, %45, %46, %47}",
     "%48", "%49", "%50", "%51", D16(0), D16(16))
BOTH(80,
     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
     "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39}",
     "{%40, %41, %42, %43}", "{%44, %45, %46, %47}", "{%48, %49, %50, %51}", "{%52, %53, %54, %55}",
     "%56", "%57", "%58", "%59", D16(0), D16(16), D4(32), D4(36))
BOTH(96,
     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
     "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
     "%44, %45, %46, %47}",
     "{%48, %49, %50, %51}", "{%52, %53, %54, %55}", "{%56, %57, %58, %59}", "{%60, %61, %62, %63}",
     "%64", "%65", "%66", "%67", D16(0), D16(16), D16(32))
BOTH(128,
     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
     "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
     "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}",
     "{%64, %65, %66, %67}", "{%68, %69, %70, %71}", "{%72, %73, %74, %75}", "{%76, %77, %78, %79}",
     "%80", "%81", "%82", "%83", D64(0))
BOTH(144,
     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
     "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
     "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, "
     "%65, %66, %67, %68, %69, %70, %71}",
     "{%72, %73, %74, %75}", "{%76, %77, %78, %79}", "{%80, %81, %82, %83}", "{%84, %85, %86, %87}",
     "%88", "%89", "%90", "%91", D64(0), D4(64), D4(68))
BOTH(152,
     "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, "
     "%23, %24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, "
     "%44, %45, %46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63, %64, "
     "%65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75}",
     "{%76, %77, %78, %79}", "{%80, %81, %82, %83}", "{%84, %85, %86, %87}", "{%88, %89, %90, %91}",
     "%92", "%93", "%94", "%95", D64(0), D4(64), D4(68), D4(72))
#undef STEP
#undef WGMMA
#undef RUN
#undef BOTH
#undef D4
#undef D16
#undef D64

#endif

// SPDX-License-Identifier: Apache-2.0
// What all kernels share: 16-bit arithmetic, unpacking of record words, asynchronous copies, launch dependences.
//
// Layout of records: moepress/kernels/records.py. Nothing here includes a system header, so NVRTC needs none.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int WARP = 32;
constexpr int ROWS = 16;      // rows of a record
constexpr int UNIT = 64;      // columns of a unit: the four k-steps of one scale group of 64

// ---- weights ------------------------------------------------------------------------------------------------------

// One matrix; experts' gate and up interleaved, with SiLU; their down; their matrices without more.
enum Mode { DENSE, GATE_UP, DOWN, PLAIN };

struct Expert {  // one weight matrix in records
    const u8* records;
    int word_bits;
    int centre;  // the middle of its codes; 5- and 6-bit codes have words of 8 bits, so these do not tell
};

// A matrix for each expert, at `stride` bytes from the first or where a table says; DENSE has one.
struct Bank {
    const Expert* experts;  // [num_experts] or null
    Expert first;
    u64 stride;

    __device__ Expert expert(int id) const {
        return experts ? experts[id] : Expert{first.records + id * stride, first.word_bits, first.centre};
    }
    __device__ const u8* records(int id) const { return experts ? experts[id].records : first.records + id * stride; }
};

// ---- 16-bit types -------------------------------------------------------------------------------------------------

// One activation type of a kernel: `bf16` true is bfloat16, false is IEEE half. Weights are unpacked to the same.
template <bool BF16> struct Half;

template <> struct Half<true> {
    static constexpr int MANTISSA = 7;
    static __device__ u32 exponent(int p) { return u32(127 + MANTISSA - p) << MANTISSA; }
    static __device__ float lo(u32 x) { return __uint_as_float(x << 16); }
    static __device__ float hi(u32 x) { return __uint_as_float(x & 0xffff0000u); }
    static __device__ u32 pack(float lo, float hi) {
        u32 x;
        asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
        return x;
    }
    static __device__ u32 fma(u32 a, u32 b, u32 c) {
        u32 x;
        asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
        return x;
    }
    static constexpr u32 ONE = 0x3f803f80u;
};

template <> struct Half<false> {
    static constexpr int MANTISSA = 10;
    static __device__ u32 exponent(int p) { return u32(15 + MANTISSA - p) << MANTISSA; }
    static __device__ float lo(u32 x) {
        float y;
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, l;}" : "=f"(y) : "r"(x));
        return y;
    }
    static __device__ float hi(u32 x) {
        float y;
        asm("{.reg .b16 l, h; mov.b32 {l, h}, %1; cvt.f32.f16 %0, h;}" : "=f"(y) : "r"(x));
        return y;
    }
    static __device__ u32 pack(float lo, float hi) {
        u32 x;
        asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(x) : "f"(hi), "f"(lo));
        return x;
    }
    static __device__ u32 fma(u32 a, u32 b, u32 c) {
        u32 x;
        asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(x) : "r"(a), "r"(b), "r"(c));
        return x;
    }
    static constexpr u32 ONE = 0x3c003c00u;
};

// The lower of two numbers twice, and the upper.
__device__ __forceinline__ void split(u32& lower, u32& upper, u32 both) {
    asm("{.reg .b16 l, h; mov.b32 {l, h}, %2; mov.b32 %0, {l, l}; mov.b32 %1, {h, h};}" : "=r"(lower), "=r"(upper) : "r"(both));
}

template <bool BF16> __device__ u16 round16(float x) { return u16(Half<BF16>::pack(x, 0.f) & 0xffffu); }
template <bool BF16> __device__ float widen(u16 x) { return Half<BF16>::lo(u32(x)); }

// Where the denominator passes 2^126 the quotient is below what any of the types can hold, and may be 0.
__device__ __forceinline__ float silu(float x) { return __fdividef(x, 1.f + __expf(-x)); }

// ---- unpacking ----------------------------------------------------------------------------------------------------

// The base of codes that are multiplied with it: there must be room for them below it, up to 4 bits.
constexpr int CODE_BITS = 4, CODE_BASE = 1 << CODE_BITS;

// A code left at mantissa bit p of a number whose last place there is worth 1 has unit weight whatever p is; only the
// base 2^(MANTISSA - p) that comes with it differs. `place` is that p for pair `pair` of a unit (ours), in both rows: where it
// takes fewest shifts, or where all have the base CODE_BASE.
template <int B, bool BF16, bool ONE_BASE = false> __host__ __device__ constexpr int place(int pair) {
    if (ONE_BASE) return Half<BF16>::MANTISSA - CODE_BITS;
    const int n = pair / 2, p = B == 3 ? (n == 3 ? 4 : n == 2 ? 0 : 3 * n) : B * (n % (8 / B));
    return BF16 && p + B > 7 ? 0 : p;
}

__device__ __forceinline__ u32 select_or(u32 word, u32 mask, u32 with) {
    u32 x;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(x) : "r"(word), "r"(mask), "r"(with));
    return x;
}

// A word's bit `at` at bit `to`.
__device__ __forceinline__ u32 move_bit(u32 word, int at, int to) { return at < to ? word << (to - at) : word >> (at - to); }

// The two codes at bit `at` of both halves of a word, as numbers (base + code) with the code at bit p.
template <int B, bool BF16> __device__ __forceinline__ u32 extract(u32 word, int at, int p) {
    const u32 mask = ((1u << B) - 1u) << p;
    const u32 with = Half<BF16>::exponent(p);
    return select_or(move_bit(word, at, p), mask * 0x10001u, with * 0x10001u);
}

// 8-bit codes in bfloat16, less a multiple of 16 up to 128: two nibbles, each exact, and their exact sum. `high_base` is
// -(2048 + that multiple), twice.
__device__ __forceinline__ u32 extract_byte_bf16(u32 word, u32 high_base) {
    using H = Half<true>;
    u32 low = H::fma(select_or(word, 0x000f000fu, 0x43004300u), H::ONE, 0xc300c300u);        // 128 + q - 128
    u32 high = H::fma(select_or(word >> 4, 0x000f000fu, 0x45004500u), H::ONE, high_base);        // 2048 + 16 q - ...
    return H::fma(low, H::ONE, high);
}

// One unit's words -> the 16 A registers of its four k-steps, as base + code, the base that of `place`; register 2 * pair + r.
// 8-bit codes do not fit bfloat16's mantissa and come without a base, less 128 or what `high_base` takes off.
template <int B, bool BF16, bool ONE_BASE = false>
__device__ __forceinline__ void unpack(const u32* word, u32 (&a)[16], u32 high_base = 0xc508c508u) {
#pragma unroll
    for (int pair = 0; pair < 8; ++pair) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int n = pair / 2, odd = 8 * (pair % 2), q = 4 * r + n, p = place<B, BF16, ONE_BASE>(pair);
            u32& x = a[2 * pair + r];
            if constexpr (B == 3) {
                if (n < 3) {
                    x = extract<3, BF16>(word[n < 2 ? r : 2], 3 * (n < 2 ? n : r) + odd, p);
                } else {  // two bits from one word, the highest from another
                    x = extract<2, BF16>(word[r], 6 + odd, p);
                    x = select_or(move_bit(word[2], 6 + r + odd, p + 2), 0x00040004u << p, x);
                }
            } else if constexpr (B == 8 && BF16) {
                x = extract_byte_bf16(word[q] >> odd, high_base);
            } else {
                constexpr int EACH = 8 / B;
                x = extract<B, BF16>(word[q / EACH], B * (q % EACH) + odd, p);
            }
        }
    }
}

// One unit's words -> the A registers of its two k-steps of integers, codes as bytes. Half the operations of `unpack`.
template <int B> __device__ __forceinline__ void unpack_bytes(const u32* word, u32 (&a)[8]) {
    constexpr u32 MASK = 0x01010101u * ((1u << B) - 1u);
#pragma unroll
    for (int n = 0; n < 4; ++n)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int q = 4 * r + n;
            u32& x = a[2 * n + r];
            if constexpr (B == 3) {
                if (n < 3) x = (word[n < 2 ? r : 2] >> (3 * (n < 2 ? n : r))) & MASK;
                else x = select_or(word[2] >> (4 + r), 0x04040404u, (word[r] >> 6) & 0x03030303u);
            } else {
                constexpr int EACH = 8 / B;
                x = (word[q / EACH] >> (B * (q % EACH))) & MASK;
            }
        }
}

// ---- tensor cores -------------------------------------------------------------------------------------------------

// c (+)= a b; with ADD false, c is only written, and the zeros need no registers.
template <bool BF16, bool ADD> __device__ __forceinline__ void mma(float (&c)[4], const u32* a, u32 b0, u32 b1) {
    const float x0 = ADD ? c[0] : 0.f, x1 = ADD ? c[1] : 0.f, x2 = ADD ? c[2] : 0.f, x3 = ADD ? c[3] : 0.f;
#define MMA(TYPE)                                                                                                      \
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." TYPE "." TYPE ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, " \
                 "{%10,%11,%12,%13};"                                                                                  \
                 : "=f"(c[0]), "=f"(c[1]), "=f"(c[2]), "=f"(c[3])                                                      \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "f"(x0), "f"(x1), "f"(x2), "f"(x3))
    if constexpr (BF16) MMA("bf16");
    else MMA("f16");
#undef MMA
}

// The same for unsigned bytes times signed ones.
template <bool ADD> __device__ __forceinline__ void mma_bytes(int (&c)[4], const u32* a, u32 b0, u32 b1) {
    const int x0 = ADD ? c[0] : 0, x1 = ADD ? c[1] : 0, x2 = ADD ? c[2] : 0, x3 = ADD ? c[3] : 0;
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%10,%11,%12,%13};"
                 : "=r"(c[0]), "=r"(c[1]), "=r"(c[2]), "=r"(c[3])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1), "r"(x0), "r"(x1), "r"(x2), "r"(x3));
}

__device__ __forceinline__ void named_barrier(int id, int threads) {
    asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}
// The same without waiting, for threads that only have something ready for the others.
__device__ __forceinline__ void arrive_at(int id, int threads) {
    asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// ---- order of instructions ----------------------------------------------------------------------------------------

// A load that is asked for here: the compiler puts long arithmetic ahead of plain ones.
__device__ __forceinline__ int load_here(const int* from) {
    int x;
    asm volatile("ld.global.s32 %0, [%1];" : "=r"(x) : "l"(from) : "memory");
    return x;
}
__device__ __forceinline__ long long load_here(const long long* from) {
    long long x;
    asm volatile("ld.global.s64 %0, [%1];" : "=l"(x) : "l"(from) : "memory");
    return x;
}
// What a launch is told comes through a cache, by the line, and the first to use a line waits for memory: lines are asked for early,
// together with other things. `x` is a number of each that is not -1.
__device__ __forceinline__ void ask_for(int x) {
    asm volatile("{.reg .pred q; setp.eq.s32 q, %0, -1; @q trap;}" ::"r"(x));
}
// x, of which nothing is computed before what is asked for above.
__device__ __forceinline__ int from_here(int x) {
    asm volatile("" : "+r"(x));
    return x;
}

// ---- shared memory and copies -------------------------------------------------------------------------------------

__device__ __forceinline__ u32 shared_address(const void* p) { return u32(__cvta_generic_to_shared(p)); }

// An address of shared memory that stays in a register where KEPT. On Hopper it depends on a special register, and the compiler
// rather reads that again for each record or stage, some 50 cycles before the first load: 3 % of a layer of 64 tokens.
template <bool KEPT> __device__ __forceinline__ u32 kept(u32 address) {
    if (KEPT) asm volatile("" : "+r"(address));
    return address;
}

// N consecutive words of shared memory at an address aligned to them.
template <int N> __device__ __forceinline__ void load_shared(u32 (&x)[N], u32 address) {
    static_assert(N == 1 || N == 2 || N % 4 == 0, "1, 2 or a multiple of 4 words");
    if constexpr (N == 1) {
        asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x[0]) : "r"(address));
    } else if constexpr (N == 2) {
        asm volatile("ld.shared.v2.u32 {%0,%1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(address));
    } else {
#pragma unroll
        for (int i = 0; i < N; i += 4)
            asm volatile("ld.shared.v4.u32 {%0,%1,%2,%3}, [%4];"
                         : "=r"(x[i]), "=r"(x[i + 1]), "=r"(x[i + 2]), "=r"(x[i + 3])
                         : "r"(address + 4 * i));
    }
}

__device__ __forceinline__ void store_shared(u32 address, const float (&x)[4]) {
    asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};"
                 ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}
// Four matrices of 8 by 8 numbers of 16 bits; lane 8 i + r gives the address of row r of the i-th.
__device__ __forceinline__ void load_matrices(u32 (&x)[4], u32 address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(address));
}

__device__ __forceinline__ void mbarrier_init(u32 bar, u32 count) {
    asm volatile("mbarrier.init.shared.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

// True in one lane of a warp, which all of it asks. The compiler knows that it is one: of copies asked for by `lane == 0` it made
// loops over lanes.
__device__ __forceinline__ bool elect() {
    u32 one = threadIdx.x % WARP == 0;
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p;}" : "=r"(one));
#endif
    return one;
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ void mbarrier_expect(u32 bar, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u32 bar) {
    asm volatile("mbarrier.arrive.shared.b64 _, [%0];" ::"r"(bar) : "memory");
}
__device__ __forceinline__ void mbarrier_wait(u32 bar, u32 parity) {
    asm volatile("{.reg .pred done; again: mbarrier.try_wait.parity.shared.b64 done, [%0], %1; @done bra over; "
                 "bra again; over:}" ::"r"(bar), "r"(parity) : "memory");
}
// What other threads have written, and this one knows of, is there for copies that it asks for.
__device__ __forceinline__ void copies_follow() { asm volatile("fence.proxy.async;" ::: "memory"); }
__device__ __forceinline__ u64 evict_first() {
    u64 policy;
    asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
    return policy;
}
__device__ __forceinline__ void bulk_copy(u32 to, const void* from, u32 bytes, u32 bar, u64 policy) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, "
                 "[%3], %4;" ::"r"(to), "l"(from), "r"(bytes), "r"(bar), "l"(policy) : "memory");
}
// The box of a tensor map of three dimensions that begins there; what lies outside of the tensor becomes zero.
__device__ __forceinline__ void tensor_copy(u32 to, const void* map, int x, int y, int z, u32 bar) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3, %4}], [%5];"
                 ::"r"(to), "l"(map), "r"(x), "r"(y), "r"(z), "r"(bar) : "memory");
}
#endif

__device__ __forceinline__ void copy16(u32 to, const void* from, bool real) {  // zeros where not real
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(real ? 16 : 0) : "memory");
}
// The same of 16, 4 or 1 bytes at addresses aligned to them; a single one is there at once.
template <int BYTES> __device__ __forceinline__ void copy_piece(u8* to, const u8* from, bool real) {
    if constexpr (BYTES == 16) copy16(shared_address(to), from, real);
    else if constexpr (BYTES == 1) *to = real ? *from : u8(0);
    else
        asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;"
                     ::"r"(shared_address(to)), "l"(from), "n"(BYTES), "r"(real ? BYTES : 0) : "memory");
}
__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N> __device__ __forceinline__ void copy_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory"); }

// ---- programmatic dependent launch --------------------------------------------------------------------------------

// After `await_producers` the memory of the kernels before is visible; without the launch attribute both are free.
__device__ __forceinline__ void await_producers() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
__device__ __forceinline__ void allow_dependents() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

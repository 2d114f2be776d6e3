// SPDX-License-Identifier: Apache-2.0
// What blocks of a cluster have to do with each other's shared memory.
//
// What they send to the first one: into its shared memory, at the place that it has here, and a `box`, an
// mbarrier, counts the bytes. A barrier of the cluster instead would wait for all of the GPU's memory (MEMBAR). Without a
// cluster, and before compute capability 9.0, all of it is within the block.
#pragma once
#include "common.cuh"

template <int CLUSTER> __device__ __forceinline__ int rank_in_cluster() {
    u32 rank = 0;
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
#endif
    return rank;
}

// A box of the first block for so many bytes, before `open_boxes`.
template <int CLUSTER> __device__ __forceinline__ void make_box(u64* box, int rank, int bytes) {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER == 1 || rank || threadIdx.x) return;
    mbarrier_init(shared_address(box), 1);
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    mbarrier_expect(shared_address(box), bytes);
#endif
}
// All threads of all blocks, before and after which others' shared memory may be written.
template <int CLUSTER> __device__ __forceinline__ void open_boxes() {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER == 1) return;
    __syncwarp();
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
#endif
}
template <int CLUSTER> __device__ __forceinline__ void await_open() {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

template <int CLUSTER> __device__ __forceinline__ void send(float* to, float value, u64* box) {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) {
        asm volatile("{.reg .u32 there, bar; mapa.shared::cluster.u32 there, %0, 0; mapa.shared::cluster.u32 bar, %1, 0; "
                     "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.f32 [there], %2, [bar];}"
                     ::"r"(shared_address(to)), "r"(shared_address(box)), "f"(value) : "memory");
        return;
    }
#endif
    *to = value;
}

// Four numbers, to an address that 16 divides.
template <int CLUSTER> __device__ __forceinline__ void send(float* to, float4 value, u64* box) {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) {
        asm volatile("{.reg .u32 there, bar; mapa.shared::cluster.u32 there, %0, 0; mapa.shared::cluster.u32 bar, %1, 0; "
                     "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [there], {%2, %3, %4, %5}, [bar];}"
                     ::"r"(shared_address(to)), "r"(shared_address(box)), "f"(value.x), "f"(value.y), "f"(value.z),
                     "f"(value.w) : "memory");
        return;
    }
#endif
    *reinterpret_cast<float4*>(to) = value;
}

// All threads of a block on its own; of a cluster, those that `receive`.
template <int CLUSTER> __device__ __forceinline__ void await_parts(u64* box, bool receives) {
#if __CUDA_ARCH__ >= 900
    if (CLUSTER > 1) {
        if (receives)
            asm volatile("{.reg .pred done; again: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 done, [%0], 0; "
                         "@done bra over; bra again; over:}" ::"r"(shared_address(box)) : "memory");
        return;
    }
#endif
    __syncthreads();
}

// All threads of the cluster that have not ended. What they stored before is there for others to read; but not with READ_ONLY, where
// they have only read what was to be read.
template <bool READ_ONLY> __device__ __forceinline__ void await_cluster() {
#if __CUDA_ARCH__ >= 900
    if (READ_ONLY) asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
    else asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
#endif
}

// Four numbers that block `rank` of the cluster has at this address.
__device__ __forceinline__ void load_from(float (&value)[4], u32 address, u32 rank) {
#if __CUDA_ARCH__ >= 900
    asm volatile("{.reg .u32 there; mapa.shared::cluster.u32 there, %4, %5; "
                 "ld.shared::cluster.v4.f32 {%0, %1, %2, %3}, [there];}"
                 : "=f"(value[0]), "=f"(value[1]), "=f"(value[2]), "=f"(value[3]) : "r"(address), "r"(rank) : "memory");
#endif
}

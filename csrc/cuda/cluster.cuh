// Threads, blocks and thread-block clusters: who am I, wait for the others, reach into their shared memory.
// Below sm_90 a cluster is one block. The host twin is tests/emulate/machine.h.
#pragma once

#ifdef FUSED_ATTN_EMULATE
#include "machine.h"
#else

namespace fused_attn::cuda {

__device__ __forceinline__ int thread_rank() { return threadIdx.x; }
__device__ __forceinline__ int thread_count() { return blockDim.x; }
__device__ __forceinline__ int64_t block_index() { return blockIdx.x; }
__device__ __forceinline__ int block_row() { return blockIdx.y; }
__device__ __forceinline__ void block_barrier() { __syncthreads(); }

// The one dynamic buffer that all shared memory is carved from.
__device__ __forceinline__ char* shared_memory() {
    extern __shared__ __align__(16) char fused_attn_shared_memory[];
    return fused_attn_shared_memory;
}

#if __CUDA_ARCH__ >= 900
__device__ __forceinline__ int cluster_rank() {
    int rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
__device__ __forceinline__ int cluster_size() {
    int size;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
    return size;
}
// Arrive: what I wrote is visible, what I read is read. Wait: for all threads of the cluster to arrive.
__device__ __forceinline__ void cluster_arrive() { asm volatile("barrier.cluster.arrive.release;" ::: "memory"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire;" ::: "memory"); }
// The same object in the shared memory of block `rank` of this cluster.
template <class P>
__device__ __forceinline__ P* of_rank(P* pointer, int rank) {
    uint64_t remote;
    asm("mapa.u64 %0, %1, %2;" : "=l"(remote) : "l"(pointer), "r"(rank));
    return reinterpret_cast<P*>(remote);
}
#else
__device__ __forceinline__ int cluster_rank() { return 0; }
__device__ __forceinline__ int cluster_size() { return 1; }
__device__ __forceinline__ void cluster_arrive() { __syncthreads(); }
__device__ __forceinline__ void cluster_wait() {}
template <class P>
__device__ __forceinline__ P* of_rank(P* pointer, int) {
    return pointer;
}
#endif

}  // namespace fused_attn::cuda

#endif  // FUSED_ATTN_EMULATE

namespace fused_attn::cuda {

__device__ __forceinline__ void cluster_barrier() {
    cluster_arrive();
    cluster_wait();
}

}  // namespace fused_attn::cuda

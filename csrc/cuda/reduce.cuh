// Reductions over neighbouring threads, always in the same order: a butterfly, whose result every one of them
// has.
#pragma once

#include "cluster.cuh"

namespace fused_attn::cuda {

#ifndef FUSED_ATTN_EMULATE
template <class V>
__device__ __forceinline__ V shuffle_xor(V value, int mask) {
    return __shfl_xor_sync(0xffffffffu, value, mask);
}
#endif

template <class Acc>
struct Sum {
    Acc sum = 0;
    __device__ __forceinline__ void merge(const Sum& other) { sum += other.sum; }
    __device__ __forceinline__ Sum shuffled(int mask) const { return {shuffle_xor(sum, mask)}; }
};

template <class Acc>
struct TwoSums {
    Acc first = 0, second = 0;
    __device__ __forceinline__ void merge(const TwoSums& other) {
        first += other.first;
        second += other.second;
    }
    __device__ __forceinline__ TwoSums shuffled(int mask) const {
        return {shuffle_xor(first, mask), shuffle_xor(second, mask)};
    }
};

// A maximum (NaN wins) with its sum and `index`: its first position, or with kEven how many elements equal
// it.
template <class Acc, bool kEven>
struct Peak {
    Acc sum = 0, peak = -INFINITY;
    int index = kEven ? 0 : 0x7fffffff;
    __device__ __forceinline__ void merge(const Peak& other) {
        sum += other.sum;
        const bool greater = other.peak > peak || (other.peak != other.peak && peak == peak);
        const bool same = other.peak == peak || (other.peak != other.peak && peak != peak);
        if (kEven) {
            index = greater ? other.index : other.peak == peak ? index + other.index : index;
        } else {
            index = greater || (same && other.index < index) ? other.index : index;
        }
        peak = greater ? other.peak : peak;
    }
    __device__ __forceinline__ Peak shuffled(int mask) const {
        return {shuffle_xor(sum, mask), shuffle_xor(peak, mask), shuffle_xor(index, mask)};
    }
};

// Merge the parts of `lanes` (a power of two up to 32) neighbouring threads; all threads of the warp call it.
template <class Part>
__device__ __forceinline__ void merge_lanes(Part& part, int lanes) {
#pragma unroll 1
    for (int mask = lanes / 2; mask > 0; mask /= 2) part.merge(part.shuffled(mask));
}

}  // namespace fused_attn::cuda

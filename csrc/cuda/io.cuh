// Storage types and every access to a feature map: 16-byte vectors, single elements, copies into shared
// memory. All maps of a call start at a 16-byte boundary, so a slice of one has the same misalignment in all
// of them; its image in shared memory keeps it, and vectors are aligned on both sides. The host twin is
// tests/emulate/machine.h.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cluster.cuh"

#ifndef FUSED_ATTN_EMULATE
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace fused_attn::cuda {

enum Dtype { kFloat64, kFloat32, kFloat16, kBFloat16 };

#ifndef FUSED_ATTN_EMULATE

using Half = __half;
using BFloat16 = __nv_bfloat16;

__device__ __forceinline__ float widen(Half v) { return __half2float(v); }
__device__ __forceinline__ float widen(BFloat16 v) { return __bfloat162float(v); }
__device__ __forceinline__ void narrow(float v, Half& to) { to = __float2half_rn(v); }
__device__ __forceinline__ void narrow(float v, BFloat16& to) { to = __float2bfloat16_rn(v); }

// A piece of a map in global memory, read or written once: 4 or 2 words, or one element.
struct alignas(16) Words4 {
    uint32_t word[4];
};
__device__ __forceinline__ Words4 read_map(const Words4* p) {
    Words4 v;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
                 : "l"(p));
    return v;
}
__device__ __forceinline__ void write_map(Words4* p, const Words4& v) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]),
                 "r"(v.word[3])
                 : "memory");
}
struct alignas(8) Words2 {
    uint32_t word[2];
};
__device__ __forceinline__ Words2 read_map(const Words2* p) {
    Words2 v;
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "l"(p));
    return v;
}
__device__ __forceinline__ void write_map(Words2* p, const Words2& v) {
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]) : "memory");
}
template <class T>
__device__ __forceinline__ T read_map(const T* p) {
    return *p;
}
template <class T>
__device__ __forceinline__ void write_map(T* p, const T& v) {
    *p = v;
}

// Asynchronous copies from global to shared memory, in multiples of 16 bytes, 16-byte aligned on both sides.
// begin: one thread, before a block barrier. add: one thread says which piece, all threads call it. wait:
// all.
#if __CUDA_ARCH__ >= 900
// One bulk copy a piece, completing on an mbarrier that counts its bytes.
__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
__device__ __forceinline__ void copies_begin(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(shared_address(barrier)) : "memory");
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
__device__ __forceinline__ void copies_add(uint64_t* barrier, char* to, const char* from, uint32_t bytes) {
    if (thread_rank() != 0) return;
    constexpr uint32_t kPiece = 16384;
    for (uint32_t done = 0; done < bytes; done += kPiece) {
        const uint32_t piece = bytes - done < kPiece ? bytes - done : kPiece;
        asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                         shared_address(to + done)),
                     "l"(__cvta_generic_to_global(from + done)), "r"(piece), "r"(shared_address(barrier))
                     : "memory");
    }
}
__device__ __forceinline__ void copies_wait(uint64_t* barrier) {
    uint32_t done = 0;
    while (!done) {
        asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], 0; selp.u32 %0, 1, 0, p; }"
                     : "=r"(done)
                     : "r"(shared_address(barrier))
                     : "memory");
    }
}
#else
// 16-byte asynchronous copies by all threads.
__device__ __forceinline__ void copies_begin(uint64_t*, uint32_t) {}
__device__ __forceinline__ void copies_add(uint64_t*, char* to, const char* from, uint32_t bytes) {
#pragma unroll 1
    for (uint32_t i = thread_rank() * 16; i < bytes; i += thread_count() * 16) {
        asm volatile(
            "cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(to + i))),
            "l"(__cvta_generic_to_global(from + i))
            : "memory");
    }
}
__device__ __forceinline__ void copies_wait(uint64_t*) { asm volatile("cp.async.wait_all;" ::: "memory"); }
#endif

#endif  // FUSED_ATTN_EMULATE

__device__ __forceinline__ float widen(float v) { return v; }
__device__ __forceinline__ double widen(double v) { return v; }
__device__ __forceinline__ void narrow(float v, float& to) { to = v; }
__device__ __forceinline__ void narrow(double v, double& to) { to = v; }

// N elements at a time, from and to an address aligned to all of them.
template <class T, int N>
struct alignas(sizeof(T) * N) Elements {
    T at[N];
};
template <class T, int N, class Acc>
__device__ __forceinline__ void load_elements(const char* from, Acc (&values)[N]) {
    const auto raw = *reinterpret_cast<const Elements<T, N>*>(from);
#pragma unroll
    for (int e = 0; e < N; ++e) values[e] = widen(raw.at[e]);
}
template <class T, int N, class Acc>
__device__ __forceinline__ void store_elements(char* to, const Acc (&values)[N]) {
    Elements<T, N> raw;
#pragma unroll
    for (int e = 0; e < N; ++e) narrow(values[e], raw.at[e]);
    *reinterpret_cast<Elements<T, N>*>(to) = raw;
}

// How a kernel sees the elements of a map. Typed: the storage type is known and elements go by 16-byte
// vectors. Untyped: by element, through a switch; one kernel then serves every storage type of an
// accumulator.
template <class T>
struct Typed {
    using Acc = float;
    static constexpr int kVector = 16 / sizeof(T);
    static constexpr bool kGeneral = false;
    template <int N>
    static __device__ __forceinline__ void load(int, const char* tile, int at, Acc (&values)[N]) {
        load_elements<T, N>(tile + at * static_cast<int>(sizeof(T)), values);
    }
    template <int N>
    static __device__ __forceinline__ void store(int, char* tile, int at, const Acc (&values)[N]) {
        store_elements<T, N>(tile + at * static_cast<int>(sizeof(T)), values);
    }
    // The elements at.. of a slice of `count` elements in global memory: those inside it.
    static __device__ __forceinline__ void read(int, const char* map, int at, int count, Acc (&values)[kVector]) {
        const T* from = reinterpret_cast<const T*>(map) + at;
        if (at >= 0 && at + kVector <= count) {
            const Words4 raw = read_map(reinterpret_cast<const Words4*>(from));
            const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
            for (int e = 0; e < kVector; ++e) values[e] = widen(elements[e]);
        } else {
#pragma unroll
            for (int e = 0; e < kVector; ++e)
                values[e] = at + e >= 0 && at + e < count ? widen(read_map(from + e)) : Acc(0);
        }
    }
    static __device__ __forceinline__ void write(int, char* map, int at, int count, const Acc (&values)[kVector]) {
        T* to = reinterpret_cast<T*>(map) + at;
        Words4 raw;
        T* elements = reinterpret_cast<T*>(&raw);
#pragma unroll
        for (int e = 0; e < kVector; ++e) narrow(values[e], elements[e]);
        if (at >= 0 && at + kVector <= count) {
            write_map(reinterpret_cast<Words4*>(to), raw);
        } else {
#pragma unroll
            for (int e = 0; e < kVector; ++e)
                if (at + e >= 0 && at + e < count) write_map(to + e, elements[e]);
        }
    }
    // N elements in global memory from `at`, a place aligned to all of them.
    template <int N>
    using Words = std::conditional_t<N * sizeof(T) == 16, Words4, std::conditional_t<N * sizeof(T) == 8, Words2, T>>;
    template <int N>
    static __device__ __forceinline__ void read_some(int, const char* map, int at, Acc (&values)[N]) {
        const auto raw = read_map(reinterpret_cast<const Words<N>*>(reinterpret_cast<const T*>(map) + at));
        const T* elements = reinterpret_cast<const T*>(&raw);
#pragma unroll
        for (int e = 0; e < N; ++e) values[e] = widen(elements[e]);
    }
    template <int N>
    static __device__ __forceinline__ void write_some(char* map, int at, const Acc (&values)[N]) {
        Words<N> raw;
        T* elements = reinterpret_cast<T*>(&raw);
#pragma unroll
        for (int e = 0; e < N; ++e) narrow(values[e], elements[e]);
        write_map(reinterpret_cast<Words<N>*>(reinterpret_cast<T*>(map) + at), raw);
    }
    static __device__ __forceinline__ Acc rounded(int, Acc value) {
        T stored;
        narrow(value, stored);
        return widen(stored);
    }
};

// Calls f with a null pointer to the storage type of `dtype`; an accumulator of float has no float64 maps.
template <class Acc, class F>
__device__ __forceinline__ auto with_storage(int dtype, F f) {
    if constexpr (sizeof(Acc) == 8) {
        return f(static_cast<double*>(nullptr));
    } else {
        if (dtype == kFloat16) return f(static_cast<Half*>(nullptr));
        if (dtype == kBFloat16) return f(static_cast<BFloat16*>(nullptr));
        return f(static_cast<float*>(nullptr));
    }
}
template <class Pointer>
using Pointee = std::remove_pointer_t<Pointer>;

template <class A>
struct Untyped {
    using Acc = A;
    static constexpr int kVector = 1;
    static constexpr bool kGeneral = true;
    static __device__ __forceinline__ void load(int dtype, const char* tile, int at, Acc (&values)[1]) {
        values[0] = with_storage<Acc>(
            dtype, [&](auto* p) -> Acc { return widen(reinterpret_cast<const Pointee<decltype(p)>*>(tile)[at]); });
    }
    static __device__ __forceinline__ void store(int dtype, char* tile, int at, const Acc (&values)[1]) {
        with_storage<Acc>(dtype,
                          [&](auto* p) { narrow(values[0], reinterpret_cast<Pointee<decltype(p)>*>(tile)[at]); });
    }
    template <int N>
    static __device__ __forceinline__ void read_some(int dtype, const char* map, int at, Acc (&values)[N]) {
        read(dtype, map, at, 0, values);
    }
    static __device__ __forceinline__ void read(int dtype, const char* map, int at, int, Acc (&values)[1]) {
        values[0] = with_storage<Acc>(dtype, [&](auto* p) -> Acc {
            return widen(read_map(reinterpret_cast<const Pointee<decltype(p)>*>(map) + at));
        });
    }
    static __device__ __forceinline__ Acc rounded(int dtype, Acc value) {
        return with_storage<Acc>(dtype, [&](auto* p) -> Acc {
            Pointee<decltype(p)> stored;
            narrow(value, stored);
            return widen(stored);
        });
    }
};

// Start the copy of a slice of a map into `tile` (its 16-byte block that holds the slice's first byte). The
// whole blocks go asynchronously; the ragged ends element by element, visible after the next block barrier.
__device__ __forceinline__ uint32_t whole_blocks(const char* map, uint32_t bytes, uint32_t& head) {
    head = (16 - reinterpret_cast<uintptr_t>(map) % 16) % 16;
    head = head < bytes ? head : bytes;
    return (bytes - head) / 16 * 16;
}
__device__ __forceinline__ void load_slice(uint64_t* barrier, char* tile, const char* map, uint32_t bytes) {
    uint32_t head;
    const uint32_t whole = whole_blocks(map, bytes, head), ragged = (bytes - whole) / 2;
    char* to = tile + reinterpret_cast<uintptr_t>(map) % 16;
    if (whole > 0) copies_add(barrier, to + head, map + head, whole);
#pragma unroll 1
    for (uint32_t i = thread_rank(); i < ragged; i += thread_count()) {
        const uint32_t at = 2 * i < head ? 2 * i : 2 * i + whole;
        *reinterpret_cast<uint16_t*>(to + at) = read_map(reinterpret_cast<const uint16_t*>(map + at));
    }
}
// The slice back to global memory; `tile` as above.
__device__ __forceinline__ void store_slice(const char* tile, char* map, uint32_t bytes) {
    uint32_t head;
    const uint32_t whole = whole_blocks(map, bytes, head), ragged = (bytes - whole) / 2;
    const char* from = tile + reinterpret_cast<uintptr_t>(map) % 16;
#pragma unroll 1
    for (uint32_t at = head + 16 * thread_rank(); at < head + whole; at += 16 * thread_count())
        write_map(reinterpret_cast<Words4*>(map + at), *reinterpret_cast<const Words4*>(from + at));
#pragma unroll 1
    for (uint32_t i = thread_rank(); i < ragged; i += thread_count()) {
        const uint32_t at = 2 * i < head ? 2 * i : 2 * i + whole;
        write_map(reinterpret_cast<uint16_t*>(map + at), *reinterpret_cast<const uint16_t*>(from + at));
    }
}

// A small tensor (a weight, a bias, an affine parameter) of any float dtype.
struct Small {
    const void* data = nullptr;
    int dtype = kFloat32;
};
// Calls f with the typed pointer of a small tensor.
template <class F>
__device__ __forceinline__ auto with_data(const Small& small, F f) {
    switch (small.dtype) {
        case kFloat64:
            return f(static_cast<const double*>(small.data));
        case kFloat16:
            return f(static_cast<const Half*>(small.data));
        case kBFloat16:
            return f(static_cast<const BFloat16*>(small.data));
        default:
            return f(static_cast<const float*>(small.data));
    }
}
template <class Acc>
__device__ __forceinline__ Acc value_at(const Small& small, int64_t i) {
    return with_data(small, [i](auto* p) { return static_cast<Acc>(widen(p[i])); });
}

}  // namespace fused_attn::cuda

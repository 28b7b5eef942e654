// One table of kernels an instruction set; kernels.cpp picks among them at run time.
#pragma once

#include "axes.h"
#include "kernels.h"

#if defined(__x86_64__) && __has_include(<avx512bf16intrin.h>)  // of g++ 10, clang 9 and newer
#define FUSED_ATTN_AVX512BF16
#endif

namespace fused_attn::cpu {

template <class T>
struct TypedKernels {
    MapKernels<T> map;
    SpaceKernels<T> space;
    SimamKernels<T> simam;
    NormKernels<T> norm;
    MixKernels<T> mix;
    AxisKernels<T> axis;
    SelectKernels<T> select;
    AttentionKernels<T> attention;
    LineKernels<T> lines;
    ContextKernels<T> context;
};

// Maps of float64 are bound by memory, and are for checking: they have one build, the baseline's.
struct KernelTable {
    TypedKernels<float> of_float;
    TypedKernels<Half> of_half;
    TypedKernels<BFloat16> of_bfloat16;
    TapKernels<double> tap_double;
    TapKernels<float> tap_float;
    DenseKernels<double> dense_double;
    DenseKernels<float> dense_float;
};

// What AVX-512 does better than AVX2: maps of half precision, but for their axes and lines, and in float32
// what computes most. Lines of a hundred positions fill narrow panels better.
struct WideKernels {
    TypedKernels<Half> of_half;
    TypedKernels<BFloat16> of_bfloat16;
    SimamKernels<float> simam;
    AttentionKernels<float> attention;
};

namespace baseline {
extern const TypedKernels<double> kDoubleKernels;
extern const KernelTable kTable;
}  // namespace baseline
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const WideKernels kWide;
}
namespace avx512bf16 {
extern const AttentionKernels<BFloat16> kTerms;
}

}  // namespace fused_attn::cpu

#define FUSED_ATTN_TYPED_KERNELS(T)                                                             \
    {kMapKernels<T>,  kSpaceKernels<T>,  kSimamKernels<T>,     kNormKernels<T>, kMixKernels<T>, \
     kAxisKernels<T>, kSelectKernels<T>, kAttentionKernels<T>, kLineKernels<T>, kContextKernels<T>}

#define FUSED_ATTN_KERNEL_TABLE(isa)                                     \
    constexpr fused_attn::cpu::KernelTable fused_attn::cpu::isa::kTable{ \
        FUSED_ATTN_TYPED_KERNELS(float),                                 \
        FUSED_ATTN_TYPED_KERNELS(Half),                                  \
        FUSED_ATTN_TYPED_KERNELS(BFloat16),                              \
        kTapKernels<double>,                                             \
        kTapKernels<float>,                                              \
        kDenseKernels<double>,                                           \
        kDenseKernels<float>,                                            \
    };

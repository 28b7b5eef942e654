// One table of kernels an instruction set; kernels.cpp picks among them at run time.
#pragma once

#include "axes.h"
#include "kernels.h"

namespace fused_attn::cpu {

struct KernelTable {
    MapKernels<double> map_double;
    MapKernels<float> map_float;
    MapKernels<Half> map_half;
    MapKernels<BFloat16> map_bfloat16;
    SpaceKernels<double> space_double;
    SpaceKernels<float> space_float;
    SpaceKernels<Half> space_half;
    SpaceKernels<BFloat16> space_bfloat16;
    SimamKernels<double> simam_double;
    SimamKernels<float> simam_float;
    SimamKernels<Half> simam_half;
    SimamKernels<BFloat16> simam_bfloat16;
    MixKernels<double> mix_double;
    MixKernels<float> mix_float;
    MixKernels<Half> mix_half;
    MixKernels<BFloat16> mix_bfloat16;
    AxisKernels<double> axis_double;
    AxisKernels<float> axis_float;
    AxisKernels<Half> axis_half;
    AxisKernels<BFloat16> axis_bfloat16;
    TapKernels<double> tap_double;
    TapKernels<float> tap_float;
    DenseKernels<double> dense_double;
    DenseKernels<float> dense_float;
};

namespace baseline {
extern const KernelTable kTable;
}
namespace avx2 {
extern const KernelTable kTable;
}
namespace avx512 {
extern const KernelTable kTable;
}

}  // namespace fused_attn::cpu

#define FUSED_ATTN_KERNEL_TABLE(isa)                                                                 \
    constexpr fused_attn::cpu::KernelTable fused_attn::cpu::isa::kTable{                             \
        kMapKernels<double>,   kMapKernels<float>,   kMapKernels<Half>,     kMapKernels<BFloat16>,   \
        kSpaceKernels<double>, kSpaceKernels<float>, kSpaceKernels<Half>,   kSpaceKernels<BFloat16>, \
        kSimamKernels<double>, kSimamKernels<float>, kSimamKernels<Half>,   kSimamKernels<BFloat16>, \
        kMixKernels<double>,   kMixKernels<float>,   kMixKernels<Half>,     kMixKernels<BFloat16>,   \
        kAxisKernels<double>,  kAxisKernels<float>,  kAxisKernels<Half>,    kAxisKernels<BFloat16>,  \
        kTapKernels<double>,   kTapKernels<float>,   kDenseKernels<double>, kDenseKernels<float>,    \
    };

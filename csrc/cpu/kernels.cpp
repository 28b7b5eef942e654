// Picks the kernels for this processor, once. FUSED_ATTN_ISA=baseline|avx2 asks for less (tests do).
#include "kernels.h"

#include <cstdlib>
#include <cstring>

#include "table.h"

namespace fused_attn::cpu {
namespace {

struct Choice {
    const KernelTable* table;
    const char* name;
};

Choice choose() {
#if defined(__x86_64__)
    const char* asked = std::getenv("FUSED_ATTN_ISA");
    auto allowed = [&](const char* name) { return asked == nullptr || std::strcmp(asked, name) == 0; };
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (has_avx512 && allowed("avx512")) return {&avx512::kTable, "avx512"};
    if (has_avx2 && allowed("avx2")) return {&avx2::kTable, "avx2"};
#endif
    return {&baseline::kTable, "baseline"};
}

const Choice& choice() {
    static const Choice chosen = choose();
    return chosen;
}

}  // namespace

template <>
const MapKernels<double>& map_kernels() {
    return choice().table->map_double;
}
template <>
const MapKernels<float>& map_kernels() {
    return choice().table->map_float;
}
template <>
const MapKernels<Half>& map_kernels() {
    return choice().table->map_half;
}
template <>
const MapKernels<BFloat16>& map_kernels() {
    return choice().table->map_bfloat16;
}
template <>
const SpaceKernels<double>& space_kernels() {
    return choice().table->space_double;
}
template <>
const SpaceKernels<float>& space_kernels() {
    return choice().table->space_float;
}
template <>
const SpaceKernels<Half>& space_kernels() {
    return choice().table->space_half;
}
template <>
const SpaceKernels<BFloat16>& space_kernels() {
    return choice().table->space_bfloat16;
}
template <>
const SimamKernels<double>& simam_kernels() {
    return choice().table->simam_double;
}
template <>
const SimamKernels<float>& simam_kernels() {
    return choice().table->simam_float;
}
template <>
const SimamKernels<Half>& simam_kernels() {
    return choice().table->simam_half;
}
template <>
const SimamKernels<BFloat16>& simam_kernels() {
    return choice().table->simam_bfloat16;
}
template <>
const MixKernels<double>& mix_kernels() {
    return choice().table->mix_double;
}
template <>
const MixKernels<float>& mix_kernels() {
    return choice().table->mix_float;
}
template <>
const MixKernels<Half>& mix_kernels() {
    return choice().table->mix_half;
}
template <>
const MixKernels<BFloat16>& mix_kernels() {
    return choice().table->mix_bfloat16;
}
template <>
const AxisKernels<double>& axis_kernels() {
    return choice().table->axis_double;
}
template <>
const AxisKernels<float>& axis_kernels() {
    return choice().table->axis_float;
}
template <>
const AxisKernels<Half>& axis_kernels() {
    return choice().table->axis_half;
}
template <>
const AxisKernels<BFloat16>& axis_kernels() {
    return choice().table->axis_bfloat16;
}
template <>
const TapKernels<double>& tap_kernels() {
    return choice().table->tap_double;
}
template <>
const TapKernels<float>& tap_kernels() {
    return choice().table->tap_float;
}
template <>
const DenseKernels<double>& dense_kernels() {
    return choice().table->dense_double;
}
template <>
const DenseKernels<float>& dense_kernels() {
    return choice().table->dense_float;
}
const char* instruction_set() { return choice().name; }

}  // namespace fused_attn::cpu

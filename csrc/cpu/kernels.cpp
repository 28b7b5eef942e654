// Picks the kernels for this processor, once. FUSED_ATTN_ISA=avx512, =avx2 or =baseline asks for less (tests do).
#include "kernels.h"

#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "table.h"

namespace fused_attn::cpu {
namespace {

struct Choice {
    const KernelTable* table;
    const AttentionKernels<BFloat16>* terms;
    const char* name;
};

#if defined(__x86_64__)
const KernelTable& wide_table() {
    static const KernelTable table = [] {
        KernelTable made = avx2::kTable;
        made.of_half = avx512::kWide.of_half;
        made.of_half.axis = avx2::kTable.of_half.axis;
        made.of_half.lines = avx2::kTable.of_half.lines;
        made.of_bfloat16 = avx512::kWide.of_bfloat16;
        made.of_bfloat16.axis = avx2::kTable.of_bfloat16.axis;
        made.of_bfloat16.lines = avx2::kTable.of_bfloat16.lines;
        made.of_float.simam = avx512::kWide.simam;
        made.of_float.attention = avx512::kWide.attention;
        return made;
    }();
    return table;
}
#endif

Choice choose() {
#if defined(__x86_64__)
    const char* asked = std::getenv("FUSED_ATTN_ISA");
    const char* const names[] = {"baseline", "avx2", "avx512", "avx512bf16"};
    int most = 3;
    for (int i = 0; asked != nullptr && i < 3; ++i)
        if (std::strcmp(asked, names[i]) == 0) most = i;
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    // The processors with vbmi2 are those that do not slow down for wide vectors.
    const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vbmi2");
#if defined(FUSED_ATTN_AVX512BF16)
    if (most >= 3 && avx512 && __builtin_cpu_supports("avx512bf16"))
        return {&wide_table(), &avx512bf16::kTerms, names[3]};
#endif
    if (most >= 2 && avx512) return {&wide_table(), &avx512::kWide.of_bfloat16.attention, names[2]};
    if (most >= 1 && avx2) return {&avx2::kTable, &avx2::kTable.of_bfloat16.attention, names[1]};
#endif
    return {&baseline::kTable, &baseline::kTable.of_bfloat16.attention, "baseline"};
}

const Choice& choice() {
    static const Choice chosen = choose();
    return chosen;
}

template <class T>
const TypedKernels<T>& typed() {
    if constexpr (std::is_same_v<T, double>) return baseline::kDoubleKernels;
    if constexpr (std::is_same_v<T, float>) return choice().table->of_float;
    if constexpr (std::is_same_v<T, Half>) return choice().table->of_half;
    if constexpr (std::is_same_v<T, BFloat16>) return choice().table->of_bfloat16;
}

template <class T>
const AttentionKernels<T>& terms_of() {
    if constexpr (std::is_same_v<T, BFloat16>)
        return *choice().terms;
    else
        return typed<T>().attention;
}

}  // namespace

#define FUSED_ATTN_PICK(T)                           \
    template <>                                      \
    const MapKernels<T>& map_kernels() {             \
        return typed<T>().map;                       \
    }                                                \
    template <>                                      \
    const SpaceKernels<T>& space_kernels() {         \
        return typed<T>().space;                     \
    }                                                \
    template <>                                      \
    const SimamKernels<T>& simam_kernels() {         \
        return typed<T>().simam;                     \
    }                                                \
    template <>                                      \
    const MixKernels<T>& mix_kernels() {             \
        return typed<T>().mix;                       \
    }                                                \
    template <>                                      \
    const AxisKernels<T>& axis_kernels() {           \
        return typed<T>().axis;                      \
    }                                                \
    template <>                                      \
    const SelectKernels<T>& select_kernels() {       \
        return typed<T>().select;                    \
    }                                                \
    template <>                                      \
    const NormKernels<T>& norm_kernels() {           \
        return typed<T>().norm;                      \
    }                                                \
    template <>                                      \
    const AttentionKernels<T>& attention_kernels() { \
        return typed<T>().attention;                 \
    }                                                \
    template <>                                      \
    const LineKernels<T>& line_kernels() {           \
        return typed<T>().lines;                     \
    }                                                \
    template <>                                      \
    const AttentionKernels<T>& term_kernels() {      \
        return terms_of<T>();                        \
    }                                                \
    template <>                                      \
    const ContextKernels<T>& context_kernels() {     \
        return typed<T>().context;                   \
    }

FUSED_ATTN_PICK(double)
FUSED_ATTN_PICK(float)
FUSED_ATTN_PICK(Half)
FUSED_ATTN_PICK(BFloat16)

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

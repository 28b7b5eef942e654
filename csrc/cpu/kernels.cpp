// Picks the kernels for this processor, once. FUSED_ATTN_ISA=avx2 or =baseline asks for less (tests do).
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

Choice choose() {
#if defined(__x86_64__)
    const char* asked = std::getenv("FUSED_ATTN_ISA");
    const bool all = asked == nullptr || *asked == 0 || std::strcmp(asked, "avx512bf16") == 0;
    __builtin_cpu_init();
    if ((all || std::strcmp(asked, "avx2") == 0) && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
        __builtin_cpu_supports("f16c")) {
#if defined(FUSED_ATTN_AVX512BF16)
        if (all && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
            return {&avx2::kTable, &avx512bf16::kTerms, "avx512bf16"};
#endif
        return {&avx2::kTable, &avx2::kTable.of_bfloat16.attention, "avx2"};
    }
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

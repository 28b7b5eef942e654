// The kernels for x86 with AVX512-BF16 where it does more than AVX-512: products of bfloat16 maps.
#include "table.h"

#if defined(FUSED_ATTN_AVX512BF16)
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include <immintrin.h>

#include "../codes.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // of a placeholder in g++ 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16")
#endif

#define INSTRUCTION_SET avx512bf16
#define VECTOR_BYTES 64
#define PAIRS_OF_BFLOAT16

// As in kernels.inl, nothing here may instantiate a template of another namespace.
namespace fused_attn::cpu::INSTRUCTION_SET {
#include "vec.inl"

#include "attention.inl"
}  // namespace fused_attn::cpu::INSTRUCTION_SET

constexpr fused_attn::cpu::AttentionKernels<fused_attn::cpu::BFloat16> fused_attn::cpu::avx512bf16::kTerms =
    kAttentionKernels<BFloat16, 2>;

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // FUSED_ATTN_AVX512BF16

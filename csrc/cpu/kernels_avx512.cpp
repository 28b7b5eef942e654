// The kernels for x86 with AVX-512 that are faster than AVX2's. Where memory is what is waited for they are not:
// vectors of 64 bytes straddle two lines of the cache wherever the rows of an NCHW map do not begin with one.
#if defined(__x86_64__)
#include "kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include <immintrin.h>

#include "../codes.h"
#include "table.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl"))), apply_to = function)
#else
#pragma GCC diagnostic ignored "-Wuninitialized"  // of a placeholder in g++ 12's own header
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl")
#endif

#define INSTRUCTION_SET avx512
#define VECTOR_BYTES 64
#include "kernels.inl"

// The target stays set: templates are instantiated at the end of the file.
#define HALF_PRECISION(T)                                       \
    {kMapKernels<T>,    kSpaceKernels<T>,     kSimamKernels<T>, \
     kNormKernels<T>,   kMixKernels<T>,       {},               \
     kSelectKernels<T>, kAttentionKernels<T>, {},               \
     kContextKernels<T>}
constexpr fused_attn::cpu::WideKernels fused_attn::cpu::avx512::kWide{HALF_PRECISION(Half), HALF_PRECISION(BFloat16),
                                                                      kSimamKernels<float>, kAttentionKernels<float>};

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

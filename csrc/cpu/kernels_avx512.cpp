// The kernels for x86 with AVX-512.
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
FUSED_ATTN_KERNEL_TABLE(avx512)

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

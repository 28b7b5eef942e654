// The kernels for x86 with AVX2.
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
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif

#define INSTRUCTION_SET avx2
#define VECTOR_BYTES 32
#include "kernels.inl"

// The target stays set: templates are instantiated at the end of the file.
FUSED_ATTN_KERNEL_TABLE(avx2)

#if defined(__clang__)
#pragma clang attribute pop
#endif

#endif  // __x86_64__

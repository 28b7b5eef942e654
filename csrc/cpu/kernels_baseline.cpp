// The kernels for any processor: 16-byte vectors.
#include "kernels.h"

#include <cmath>
#include <cstdlib>
#include <cstring>
#include <type_traits>

#include "../codes.h"
#include "table.h"

#define INSTRUCTION_SET baseline
#define VECTOR_BYTES 16
#include "kernels.inl"

FUSED_ATTN_KERNEL_TABLE(baseline)
constexpr fused_attn::cpu::TypedKernels<double> fused_attn::cpu::baseline::kDoubleKernels =
    FUSED_ATTN_TYPED_KERNELS(double);

// The activations and their derivatives, as PyTorch computes them; the codes are those of csrc/codes.h.
#pragma once

#include <math.h>

#include "../codes.h"
#include "cluster.cuh"

namespace fused_attn::cuda {

template <class A>
__device__ __forceinline__ A sigmoid(A x) {
    return A(1) / (A(1) + exp(-x));
}
template <class A>
__device__ __forceinline__ A clamp(A x, A low, A high) {  // NaN stays NaN
    x = x < low ? low : x;
    return x > high ? high : x;
}
template <class A>
struct Constants {
    static constexpr A kSqrtHalf = A(0.70710678118654752440), kInvSqrt2Pi = A(0.39894228040143267794);
    static constexpr A kSqrt2OverPi = A(0.79788456080286535588), kCubic = A(0.044715);
};

template <class A>
__device__ __forceinline__ A activate_inline(int code, A x) {
    using K = Constants<A>;
    switch (code) {
        case kRelu:
            return x <= 0 ? A(0) : x;
        case kSilu:
            return x * sigmoid(x);
        case kGelu:
            return x * A(0.5) * (1 + erf(x * K::kSqrtHalf));
        case kGeluTanh:
            return x * A(0.5) * (1 + tanh(K::kSqrt2OverPi * (x + K::kCubic * x * x * x)));
        case kHardSwish:
            return x * clamp(x + A(3), A(0), A(6)) / A(6);
        case kSigmoid:
            return sigmoid(x);
        case kHardSigmoid:
            return clamp(x + A(3), A(0), A(6)) / A(6);
        case kTanh:
            return tanh(x);
        case kLeakyRelu:
            return x > 0 ? x : x * A(0.01);
        case kRelu6:
            return clamp(x, A(0), A(6));
        default:
            return x;
    }
}

template <class A>
__device__ __forceinline__ A derivative_inline(int code, A x) {
    using K = Constants<A>;
    switch (code) {
        case kRelu:
            return x <= 0 ? A(0) : A(1);
        case kSilu: {
            const A s = sigmoid(x);
            return s * (1 + x * (1 - s));
        }
        case kGelu:
            return A(0.5) * (1 + erf(x * K::kSqrtHalf)) + x * K::kInvSqrt2Pi * exp(x * x * A(-0.5));
        case kGeluTanh: {
            const A h = tanh(K::kSqrt2OverPi * (x + K::kCubic * x * x * x));
            return A(0.5) * (1 + h) + A(0.5) * x * (1 - h * h) * K::kSqrt2OverPi * (1 + 3 * K::kCubic * x * x);
        }
        case kHardSwish:
            return x <= -3 ? A(0) : x < 3 ? x / A(3) + A(0.5) : A(1);
        case kSigmoid: {
            const A s = sigmoid(x);
            return s * (1 - s);
        }
        case kHardSigmoid:
            return x > -3 && x < 3 ? A(1) / A(6) : A(0);
        case kTanh: {
            const A h = tanh(x);
            return 1 - h * h;
        }
        case kLeakyRelu:
            return x > 0 ? A(1) : A(0.01);
        case kRelu6:
            return x <= 0 || x >= 6 ? A(0) : A(1);
        default:
            return A(1);
    }
}

__device__ __forceinline__ float activate(int code, float x) { return activate_inline(code, x); }
__device__ __forceinline__ float derivative(int code, float x) { return derivative_inline(code, x); }
// Calls in float64, where exp, erf and tanh are hundreds of instructions: copies at every place would be most of a
// kernel.
__device__ __noinline__ inline double activate(int code, double x) { return activate_inline(code, x); }
__device__ __noinline__ inline double derivative(int code, double x) { return derivative_inline(code, x); }

}  // namespace fused_attn::cuda

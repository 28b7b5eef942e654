// The loops over memory that every CPU op is made of, compiled once per instruction set.
//
// A panel is a piece of one sample that lies contiguously: whole channels of an NCHW map, or whole positions
// of a channels_last map. Each function makes one pass over a panel; what it reads and writes is in its name:
// pool reads x; scale reads x (and the residual) and writes y; dot reads grad and x (and y or the residual) and
// writes grad_residual where there is an epilogue; spread reads grad (and x after a prologue) and writes grad_x.
#pragma once

#include <cstdint>

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

namespace fused_attn::cpu {

using Half = torch::headeronly::Half;
using BFloat16 = torch::headeronly::BFloat16;

// The type sums, descriptors and gates are kept in.
template <class T>
struct AccumulatorOf {
    using type = float;
};
template <>
struct AccumulatorOf<double> {
    using type = double;
};
template <class T>
using Accumulator = typename AccumulatorOf<T>::type;

struct Panel {
    int64_t channels;
    int64_t positions;
    bool channels_last;
    int64_t first_position = 0;  // of the panel in its sample, for the index of a maximum
};

// u = activation(x * weight[c] + bias[c]); weight may be null.
template <class A>
struct Prologue {
    const A* weight = nullptr;
    const A* bias = nullptr;
    int activation = 0;
    bool identity() const { return weight == nullptr && activation == 0; }
    Prologue from(int64_t channel) const {
        return weight ? Prologue{weight + channel, bias + channel, activation} : *this;
    }
};

// Gradient of a maximum: to position index[c] ("first"), or to every u equal to peak[c] ("even"); value[c] is
// what one such position receives. No maximum: value is null.
template <class A>
struct PeakGrad {
    const A* value = nullptr;
    const A* peak = nullptr;
    const int32_t* index = nullptr;
};

template <class T>
struct MapKernels {
    using A = Accumulator<T>;
    // sum[c] += sum of u (null: not wanted). peak/index (null: not wanted) are set: the maximum of u rounded to T
    // (NaN if any) and its first position or, with `even`, how many elements equal it.
    void (*pool)(const T* x, Panel, Prologue<A>, bool even, double* sum, A* peak, int32_t* index);
    // y = activation(u * gate[c] + residual)
    void (*scale)(const T* x, const T* residual, Panel, Prologue<A>, const A* gate, int activation, T* y);
    // d = grad * activation'(..), from y (ReLU) or recomputed; written to grad_residual unless activation is the
    // identity; dot[c] += sum of d * u
    void (*dot)(const T* grad, const T* x, const T* y, const T* residual, Panel, Prologue<A>, const A* gate,
                int activation, T* grad_residual, double* dot);
    // grad_u = grad * gate[c] + mean[c] + what the maximum receives (grad, gate null: only the pools' share);
    // grad_x = grad_u through the prologue; grad_weight[c] += .., grad_bias[c] += .. (null without affine)
    void (*spread)(const T* grad, const T* x, Panel, Prologue<A>, const A* gate, const A* mean, PeakGrad<A>, T* grad_x,
                   double* grad_weight, double* grad_bias);
};

// The excitation: dense layers on a few samples at a time, so that a weight is read once for all of them.
template <class A>
struct DenseKernels {
    void (*activate)(const A* in, int64_t n, int activation, A* out);
    // out = in * activation'(at)
    void (*activate_grad)(const A* in, const A* at, int64_t n, int activation, A* out);
    // out[s] = weight (rows, columns) @ in[s] + bias; strides between samples
    void (*forward)(const A* weight, const A* bias, int64_t rows, int64_t columns, int64_t samples, const A* in,
                    int64_t in_stride, A* out, int64_t out_stride);
    // out[s] = weight^T @ in[s]
    void (*transposed)(const A* weight, int64_t rows, int64_t columns, int64_t samples, const A* in, int64_t in_stride,
                       A* out, int64_t out_stride);
    // grad_weight[r] = sum over s of grad[s][r] * in[s], for rows first..last; samples in order
    void (*weight_grad)(const A* grad, int64_t grad_stride, const A* in, int64_t in_stride, int64_t samples,
                        int64_t first, int64_t last, int64_t columns, A* grad_weight);
};

// Filled for the best instruction set this processor has.
template <class T>
const MapKernels<T>& map_kernels();
template <class A>
const DenseKernels<A>& dense_kernels();
const char* instruction_set();

}  // namespace fused_attn::cpu

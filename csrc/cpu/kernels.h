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
    int64_t channel_stride = 0;  // NCHW, where the panel is a piece of space: the positions of the whole sample
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

// The gradient of the pools over one axis, as spread receives it: its share of the mean, and the maximum's.
template <class A>
struct PoolGrad {
    const A* mean = nullptr;
    PeakGrad<A> peak;
};

// Passes that pool and scale over the channels at each position. The panel is a piece of space with all its
// channels; arrays a position begin at its first position, arrays a channel at channel 0. v = u * gate[c] (gate
// null: 1) is the map that the channels are pooled of.
template <class T>
struct SpaceKernels {
    using A = Accumulator<T>;
    // Over the channels at each position: the mean of v, the maximum of v rounded to T (NaN if any), and its first
    // channel or, with `even`, how many channels equal it.
    void (*pool)(const T* x, Panel, Prologue<A>, const A* gate, bool even, A* mean, A* peak, int32_t* index);
    // y = activation(v * space_gate[p] + residual)
    void (*scale)(const T* x, const T* residual, Panel, Prologue<A>, const A* gate, const A* space_gate, int activation,
                  T* y);
    // d = grad * activation'(..), from y (ReLU) or recomputed; written to grad_residual unless activation is the
    // identity; space_dot[p] = sum of d * v; dot[c] += sum of d * u * space_gate[p] (null: not wanted)
    void (*dot)(const T* grad, const T* x, const T* y, const T* residual, Panel, Prologue<A>, const A* gate,
                const A* space_gate, int activation, T* grad_residual, A* space_dot, double* dot);
    // dot[c] += sum of u * what the pools over the channels pass to v
    void (*weigh)(const T* x, Panel, Prologue<A>, const A* gate, PoolGrad<A> space, double* dot);
    // grad_v = grad * space_gate[p] + what the pools over the channels pass (grad, space_gate null: only that);
    // grad_u = grad_v * gate[c] + what the pools over space pass (arrays a channel);
    // grad_x = grad_u through the prologue; grad_weight[c] += .., grad_bias[c] += .. (null without affine)
    void (*spread)(const T* grad, const T* x, Panel, Prologue<A>, const A* gate, const A* space_gate, PoolGrad<A> space,
                   PoolGrad<A> channel, T* grad_x, double* grad_weight, double* grad_bias);
};

// Several gates on one map, null where there is none: a channel's, a position's, (channels, height) of rows and
// (channels, width) of columns; (height, channels) and (width, channels) on a channels_last map. All begin where the
// panel does, whose `height` rows of `width` positions are whole: a panel is whole channels or whole rows.
template <class A>
struct MixedGates {
    const A *channel, *spatial, *rows, *columns;
    int combine;
    int64_t height, width;
};
// Their gradients from one panel, likewise; null where none is wanted.
template <class A>
struct MixedSums {
    A *channel, *spatial, *rows, *columns;
};
template <class T>
struct MixKernels {
    using A = Accumulator<T>;
    // y = x with its gates
    void (*scale)(const T* x, Panel, MixedGates<A>, T* y);
    // grad_x, and the sums of all gates' gradients
    void (*backward)(const T* grad, const T* x, Panel, MixedGates<A>, T* grad_x, MixedSums<A>);
};

// The branches of a selection in one panel: maps whose rows (channels, or positions of a channels_last panel) lie
// `pitch` elements apart. Arrays a branch and channel begin at the panel's first channel in branch 0; the next branch's
// numbers are `apart` behind. u = activation(x * weight + bias), with a branch's own weight and bias.
constexpr int64_t kMostBranches = 8;
template <class T>
struct Branches {
    int64_t count, apart;
    const T* data[kMostBranches];
    int64_t pitch[kMostBranches];
    Prologue<Accumulator<T>> prologue;
};
template <class T>
struct BranchOutputs {
    T* data[kMostBranches];
    int64_t pitch[kMostBranches];
};
template <class T>
struct SelectKernels {
    using A = Accumulator<T>;
    // sum[c] += sum of u, of all branches
    void (*pool)(Branches<T>, Panel, double* sum);
    // y = sum over the branches of u * weights[..]; past_cache, here and below: written around the cache if its rows
    // are whole aligned vectors, which saves the read of every line before it is written
    void (*sum)(Branches<T>, Panel, const A* weights, bool past_cache, T* y);
    // dot[..] += sum of grad * u
    void (*dot)(const T* grad, Branches<T>, Panel, double* dot);
    // grad_u = grad * weights[..] + mean[c]; grads = grad_u through the prologue; grad_weight[..] += ..,
    // grad_bias[..] += .. (null without affine)
    void (*spread)(const T* grad, Branches<T>, Panel, const A* weights, const A* mean, bool past_cache,
                   BranchOutputs<T> grads, double* grad_weight, double* grad_bias);
};

// The convolution of a spatial gate, on maps whose rows are padded with zeros so that every tap is one offset.
// Rows of numbers are read and written in whole blocks: past their ends lie kTapBlock numbers of slack, of zeros
// where they are read.
constexpr int64_t kTapBlock = 128;
template <class A>
struct TapKernels {
    // out[i] = bias + sum over t of taps[t] * in[offsets[t] + i]
    void (*correlate)(const A* in, const int64_t* offsets, const A* taps, int64_t count, A bias, int64_t n, A* out);
    // sums[t] += sum over i of grad[i] * in[offsets[t] + i]
    void (*tap_grad)(const A* grad, const A* in, const int64_t* offsets, int64_t count, int64_t n, double* sums);
};

// Numbers a channel of SimAM: y = x * sigmoid(c^2 * q[..] + 1/2) with c = (x - pivot[..]) - rest[..], pivot being any
// element of the channel and rest the mean's distance from it; for its backward k and shift.
template <class A>
struct Energy {
    const A* pivot = nullptr;
    const A* rest = nullptr;
    const A* q = nullptr;
    const A* k = nullptr;
    const A* shift = nullptr;
};

// Chan's formula: mean and sum of squared distances of `count` numbers, joined by those of `more` others.
static inline void join_moments(double& mean, double& squares, double count, double mean2, double squares2,
                                double more) {
    const double distance = mean2 - mean, share = more / (count + more);
    mean += distance * share;
    squares += squares2 + distance * distance * count * share;
}

template <class T>
struct SimamKernels {
    using A = Accumulator<T>;
    // mean[c] of x - pivot[c] and the sum of squared distances from it; reads x twice, the second time from cache
    void (*moments)(const T* x, Panel, const A* pivot, double* mean, double* squares);
    void (*apply)(const T* x, Panel, Energy<A>, T* y);
    // With s the sigmoid and h = grad * x * s * (1 - s): dot[c] += sum of h * c, squares[c] += sum of h * c^2
    void (*dots)(const T* grad, const T* x, Panel, Energy<A>, double* dot, double* squares);
    // grad_x = grad * s + 2 * c * (q * h - k) + shift
    void (*spread)(const T* grad, const T* x, Panel, Energy<A>, T* grad_x);
};

// Numbers a channel of a norm gate: u = activation(x * weight[c] + bias[c]), weight and bias made of the statistics of
// a BatchNorm, and its mean.
template <class A>
struct Norm {
    const A *weight, *bias, *mean;
};
// What its backward sums, with c = x - mean and h the gradient of u * gate: of[0] += h * u, of[1] += h * u', of[2] +=
// h * u' * c, of[3] += u', of[4] += u' * c.
constexpr int kNormSums = 5;
struct NormSums {
    double* of[kNormSums];
};
template <class A>
struct NormFactors {
    const A *gate, *pooled, *shift, *slope;
};
// Where a ReLU's gradient passes: one bit an element, in rows as memory has them (a channel's positions, or in a
// channels_last panel a position's channels), each of whole bytes, the first element in the lowest bit of the first.
constexpr int64_t row_bytes(int64_t length) { return (length + 7) / 8; }
template <class T>
struct NormKernels {
    using A = Accumulator<T>;
    // y = post_activation(u * gate[c] + residual), and the bits of a ReLU (null: not wanted); y may be x or residual
    void (*scale)(const T* x, const T* residual, Panel, Norm<A>, const A* gate, int activation, int post_activation,
                  T* y, uint8_t* bits);
    // h = grad * post_activation'(..), by the bits (ReLU) or recomputed; written to grad_residual unless it is the
    // identity
    void (*dots)(const T* grad, const T* x, const uint8_t* bits, const T* residual, Panel, Norm<A>, const A* gate,
                 int activation, int post_activation, T* grad_residual, NormSums);
    // grad_x = (grad * gate[c] + pooled[c]) * u' + shift[c] + slope[c] * (x - mean[c])
    void (*spread)(const T* grad, const T* x, Panel, Norm<A>, NormFactors<A>, int activation, T* grad_x);
};

// c = scale a b, or c = scale (c * factors + a b) where it adds. a: `row` and `step` are the strides of its rows and of
// the sum's steps. b and c lie in panels of AttentionKernels::panel columns, each with its rows one after another:
// b_panel and c_panel are what lies between panels. factors: one a column, null for ones.
template <class A>
struct Product {
    const A* a;
    int64_t row, step;
    const A* b;
    int64_t b_panel;
    A* c;
    int64_t c_panel;
    int64_t rows, steps, panels;
    bool adds = false;
    const A* factors = nullptr;
    A scale = 1;
};
// Attention between positions: attention.inl says what each does, and what a term is.
template <class T>
struct AttentionKernels {
    using A = Accumulator<T>;
    int64_t panel, numbers;  // columns; numbers a term
    void (*product)(const Product<A>&);
    void (*pack)(const T* from, int64_t lane, int64_t step, int64_t lanes, int64_t steps, A* out);
    void (*copy_rows)(const T* from, int64_t stride, int64_t rows, int64_t length, A* out, int64_t pitch);
    void (*read_terms)(const T* from, int64_t stride, int64_t rows, int64_t length, bool across, A* out, int64_t pitch);
    void (*soften)(A* scores, int64_t keys, A* peak, A* sum, A* factor);
    void (*probabilities)(A* scores, int64_t queries, const A* peak, const A* inverse);
    void (*score_gradients)(A* gradients, const A* p, int64_t queries, const A* dot);
    const A* (*turn_terms)(const A* panel, int64_t rows, int64_t lanes, A* room);
    void (*write)(const A* panel, const A* factors, int64_t rows, int64_t lanes, T* out, int64_t row, int64_t lane);
};

// c = a b, or c = c * factors + a b where it adds. a: panels of AttentionKernels::panel rows, `a_panel` apart; in one
// `row` and `step` are the strides of its rows and of the sum's steps. b has a row a step, c one a row, of `columns`
// numbers each. factors: one a row, null for ones.
template <class A>
struct RowProduct {
    const A* a;
    int64_t a_panel, row, step;
    const A* b;
    int64_t b_row;
    A* c;
    int64_t c_row;
    int64_t rows, steps, columns;
    bool adds = false;
    const A* factors = nullptr;
};
// Attention along lines: lines.inl says what each does.
template <class T>
struct LineKernels {
    using A = Accumulator<T>;
    const AttentionKernels<A>* panels;  // that these go with
    void (*product)(const RowProduct<A>&);
    void (*dots)(const A* x, int64_t pitch, const T* y, int64_t stride, int64_t rows, int64_t length, A* out);
    void (*round_rows)(const A* from, int64_t stride, int64_t rows, int64_t length, T* out, int64_t pitch);
};

// The mean of a map over a panel's positions, weighted by exp(logit - peak): of largest logit, sum of weights and sums
// a channel.
template <class A>
struct Context {
    A peak;
    double total;
    double* sums;
};
template <class T>
struct ContextKernels {
    using A = Accumulator<T>;
    // logits[p] = the sum over the channels of x * weight[c], + bias; reads x twice, the second time from cache. The
    // context's sums are set, not added to.
    void (*pool)(const T* x, Panel, const A* weight, A bias, A* logits, Context<A>& context);
    // logits = exp(logits - peak) * scale
    void (*softmax)(A* logits, int64_t n, A peak, A scale);
    // With slope = shares[p] * (sum over the channels of (x - context[c]) * factors[c]): grad_weight[c] += sum of slope
    // * (x - context[c]), reading x twice likewise, and then grad_x = grad * gate[c] + shares[p] * factors[c] + slope *
    // weight[c] (gate null: 1; grad null: without it)
    void (*spread)(const T* grad, const A* gate, const T* x, Panel, const A* factors, const A* weight, const A* shares,
                   const A* context, T* grad_x, double* grad_weight);
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
template <class T>
const SpaceKernels<T>& space_kernels();
template <class T>
const MixKernels<T>& mix_kernels();
template <class T>
const SelectKernels<T>& select_kernels();
template <class A>
const TapKernels<A>& tap_kernels();
template <class T>
const SimamKernels<T>& simam_kernels();
template <class T>
const NormKernels<T>& norm_kernels();
template <class T>
const AttentionKernels<T>& attention_kernels();
// The same with terms of two bfloat16 numbers, where the processor multiplies such.
template <class T>
const AttentionKernels<T>& term_kernels();
template <class T>
const LineKernels<T>& line_kernels();
template <class T>
const ContextKernels<T>& context_kernels();
template <class A>
const DenseKernels<A>& dense_kernels();
const char* instruction_set();

}  // namespace fused_attn::cpu

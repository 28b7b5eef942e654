// The kernels that pool a map along its height, its width and its channels: one pass over a panel each, as in
// kernels.h. pool reads x; spread reads grad (and x for ties shared evenly) and writes grad_x.
#pragma once

#include "kernels.h"

namespace fused_attn::cpu {

// A contiguous piece of one sample: channels of an NCHW map, rows of a channels_last map.
struct AxisPanel {
    int64_t channels, height, width;
    bool channels_last;
    int64_t first;  // of the panel's channels or rows in the sample
};

// The pools over one axis: over the width (`rows`), the height (`columns`) and the channels (`plane`). Arrays lie as
// the map does: rows are (channels, height), channels_last (height, channels); columns (channels, width) or (width,
// channels); the plane is (height, width).
template <class A>
struct AxisPool {
    A* sum = nullptr;
    A* peak = nullptr;       // NaN if any
    int32_t* tag = nullptr;  // the first place of the maximum along that axis or, `even`, how many equal it
};
// What the elements receive of them: the mean's share to each, and `value` to the one whose place is `tag` or, where
// `peak` is given, to those that equal it. kAxisSlack numbers behind every array may be read.
template <class A>
struct AxisGrad {
    const A* mean = nullptr;
    const A* value = nullptr;
    const A* peak = nullptr;
    const int32_t* tag = nullptr;
};
constexpr int64_t kAxisSlack = 16;

template <class T>
struct AxisKernels {
    using A = Accumulator<T>;
    // Sets the sums and, where rows.peak is given, the maxima; the plane (sum null: not wanted) has both.
    void (*pool)(const T* x, AxisPanel, bool even, AxisPool<A> rows, AxisPool<A> columns, AxisPool<A> plane);
    // grad_x = grad (null: nothing) + what the pools pass on; rows.value null: there are no maxima, plane.mean null:
    // there is no plane
    void (*spread)(const T* grad, const T* x, AxisPanel, AxisGrad<A> rows, AxisGrad<A> columns, AxisGrad<A> plane,
                   T* grad_x);
};
template <class T>
const AxisKernels<T>& axis_kernels();

}  // namespace fused_attn::cpu

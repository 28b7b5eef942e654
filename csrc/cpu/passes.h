// The passes over a map that the ops are made of, by sample and piece, with their results per channel.
#pragma once

#include <limits>

#include "map.h"

namespace fused_attn::cpu {

template <class A>
struct AffineValues {
    Values<A> weight, bias;
    AffineValues(const OptionalTensor& w, const OptionalTensor& b) : weight(w), bias(b) {}
    Prologue<A> prologue(int64_t activation) const {
        return {weight.data(), bias.data(), static_cast<int>(activation)};
    }
};

// The maps that a forward reads and writes, all in x's layout; residual may be null.
template <class T>
struct ForwardMaps {
    Tensor x_dense;
    OptionalTensor residual_dense;
    Tensor y;
    MapView<T> x;
    const T* residual;
    T* out;

    ForwardMaps(const Tensor& x_in, const OptionalTensor& residual_in)
        : x_dense(dense_map(x_in)),
          residual_dense(residual_in ? OptionalTensor(in_layout_of<T>(x_dense, *residual_in)) : residual_in),
          y(empty_map<T>(x_dense)),
          x(x_dense),
          residual(pointer<T>(residual_dense)),
          out(static_cast<T*>(y.data_ptr())) {}
};

// The maps that a backward reads and writes, all in x's layout. `epilogue` is where grad_residual is written, null
// without an activation after the gate.
template <class T>
struct BackwardMaps {
    Tensor x_dense, grad_dense;
    OptionalTensor y_dense, residual_dense;
    Tensor grad_x, grad_residual;
    MapView<T> x;
    const T *grad, *y, *residual;
    T *epilogue, *out;

    BackwardMaps(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& y_in,
                 const OptionalTensor& residual_in, int64_t post_activation)
        : x_dense(dense_map(x_in)),
          grad_dense(in_layout_of<T>(x_dense, grad_in)),
          y_dense(y_in ? OptionalTensor(in_layout_of<T>(x_dense, *y_in)) : y_in),
          residual_dense(residual_in ? OptionalTensor(in_layout_of<T>(x_dense, *residual_in)) : residual_in),
          grad_x(empty_map<T>(x_dense)),
          grad_residual(post_activation == kIdentity ? no_tensor(x_in) : empty_map<T>(x_dense)),
          x(x_dense),
          grad(static_cast<const T*>(grad_dense.data_ptr())),
          y(pointer<T>(y_dense)),
          residual(pointer<T>(residual_dense)),
          epilogue(post_activation == kIdentity ? nullptr : static_cast<T*>(grad_residual.data_ptr())),
          out(static_cast<T*>(grad_x.data_ptr())) {}
    // The gradient of what the gate multiplies out to: grad, or what was written to grad_residual.
    const T* before_gate() const { return epilogue ? epilogue : grad; }
};

// A map's data from an offset on; null stays null.
template <class T>
T* from(T* map, int64_t at) {
    return map ? map + at : nullptr;
}

// The numbers that a sample's moments are taken about: the first element of each channel.
template <class T, class A>
void set_pivots(const MapView<T>& x, int64_t sample, int64_t first, int64_t last, A* pivots) {
    const int64_t stride = x.channels_last ? 1 : x.positions;
    for (int64_t c = first; c < last; ++c)
        pivots[c] = x.positions > 0 ? static_cast<A>(x.data[sample * x.sample_size() + c * stride]) : A(0);
}
// Moments of a sample's pieces into those of its first, in order.
template <class T>
void join_pieces(const MapView<T>& x, int64_t sample, int64_t pieces, int64_t first, int64_t last,
                 PieceValues<double>& mean, PieceValues<double>& squares) {
    for (int64_t piece = 1; piece < mean.rows(); ++piece)
        for (int64_t c = first; c < last; ++c)
            join_moments(mean.sample(sample)[c], squares.sample(sample)[c], x.begin(piece, pieces),
                         *mean.piece(sample, piece, c), *squares.piece(sample, piece, c),
                         x.panel(piece, pieces).positions);
}

// Sums and maxima of every sample, one read of the map.
template <class T>
class Pooling {
  public:
    using A = Accumulator<T>;
    Pooling(const MapView<T>& x, int64_t pieces, Prologue<A> prologue, int64_t pool, int64_t ties)
        : x_(x),
          pieces_(pieces),
          prologue_(prologue),
          wants_sum_(pool != kMax),
          wants_max_(pool != kAvg),
          even_(ties == kEven),
          sums_(x, pieces, 0.0, wants_sum_),
          peaks_(x, pieces, A(0), wants_max_),
          index_(x, pieces, 0, wants_max_) {}

    void run(int64_t sample, int64_t piece) {
        const int64_t c = x_.first_channel(piece, pieces_);
        map_kernels<T>().pool(x_.data + x_.offset(sample, piece, pieces_), x_.panel(piece, pieces_), prologue_.from(c),
                              even_, wants_sum_ ? sums_.piece(sample, piece, c) : nullptr,
                              wants_max_ ? peaks_.piece(sample, piece, c) : nullptr,
                              wants_max_ ? index_.piece(sample, piece, c) : nullptr);
    }
    void merge(int64_t sample) {
        if (wants_sum_) sums_.merge(sample);
        if (!wants_max_) return;
        A* best = peaks_.sample(sample);
        int32_t* tag = index_.sample(sample);
        for (int64_t row = 1; row < peaks_.rows(); ++row) {
            const A* value = peaks_.piece(sample, row, 0);
            const int32_t* other = index_.piece(sample, row, 0);
            for (int64_t c = 0; c < x_.channels; ++c) {  // rows come in order: the first maximum stays
                if (value[c] > best[c] || (std::isnan(value[c]) && !std::isnan(best[c]))) {
                    best[c] = value[c];
                    tag[c] = other[c];
                } else if (even_ && value[c] == best[c]) {
                    tag[c] += other[c];
                }
            }
        }
    }
    A mean(int64_t sample, int64_t c) { return static_cast<A>(sums_.sample(sample)[c] / x_.positions); }
    const A* peak(int64_t sample) { return peaks_.sample(sample); }
    const int32_t* index(int64_t sample) { return index_.sample(sample); }

  private:
    MapView<T> x_;
    int64_t pieces_;
    Prologue<A> prologue_;
    bool wants_sum_, wants_max_, even_;
    PieceValues<double> sums_;
    PieceValues<A> peaks_;
    PieceValues<int32_t> index_;
};

// What one equal position receives of a maximum's gradient; a NaN maximum makes its whole channel NaN, as
// dividing by its count of 0 does in eager. mean[c] is where that NaN goes.
template <class A>
void share_among_equals(const A* grad, const A* peak, const int32_t* count, int64_t n, A* value, A* mean) {
    for (int64_t c = 0; c < n; ++c) {
        value[c] = count[c] ? grad[c] / static_cast<A>(count[c]) : A(0);
        if (std::isnan(peak[c])) mean[c] = std::numeric_limits<A>::quiet_NaN();
    }
}

// The two passes of a backward through the scale: dot (reads grad, x and, with an epilogue, y or the residual;
// writes grad_residual) and spread (reads grad or grad_residual, and x after a prologue; writes grad_x).
template <class T>
class Backward {
  public:
    using A = Accumulator<T>;
    Backward(const Tensor& grad, const Tensor& x_in, const OptionalTensor& y, const OptionalTensor& residual,
             const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t pre_activation,
             int64_t post_activation)
        : maps(grad, x_in, y, residual, post_activation),
          x(maps.x),
          pieces(pieces_of(x.batch, x.axis_length(), x.batch * x.sample_size())),
          dots(x, pieces, 0.0),
          affine_weight_(affine_weight),
          affine_bias_(affine_bias),
          affine_(affine_weight, affine_bias),
          prologue_(affine_.prologue(pre_activation)),
          post_activation_(static_cast<int>(post_activation)),
          grad_weight_(x, pieces, 0.0, affine_weight.has_value()),
          grad_bias_(grad_weight_) {}

    const BackwardMaps<T> maps;
    const MapView<T>& x;
    const int64_t pieces;
    PieceValues<double> dots;
    const A* gates = nullptr;  // (batch, channels)

    void dot(int64_t sample, int64_t piece) {
        const int64_t c = x.first_channel(piece, pieces), at = x.offset(sample, piece, pieces);
        map_kernels<T>().dot(maps.grad + at, x.data + at, from(maps.y, at), from(maps.residual, at),
                             x.panel(piece, pieces), prologue_.from(c), gates + sample * x.channels + c,
                             post_activation_, from(maps.epilogue, at), dots.piece(sample, piece, c));
    }
    // Piece `piece` of `count`, which is `pieces` or, where that is 1, what it likes. mean and peak: what the pools
    // receive, per channel of this sample.
    void spread(int64_t sample, int64_t piece, int64_t count, const A* mean, PeakGrad<A> peak) {
        const int64_t c = x.first_channel(piece, count), at = x.offset(sample, piece, count);
        if (peak.value) peak = {peak.value + c, peak.peak ? peak.peak + c : nullptr, peak.index + c};
        map_kernels<T>().spread(maps.before_gate() + at, x.data + at, x.panel(piece, count), prologue_.from(c),
                                gates + sample * x.channels + c, mean ? mean + c : nullptr, peak, maps.out + at,
                                affine_weight_ ? grad_weight_.piece(sample, piece, c) : nullptr,
                                affine_weight_ ? grad_bias_.piece(sample, piece, c) : nullptr);
    }
    std::tuple<Tensor, Tensor> affine_grads() {
        if (affine_weight_)
            for (int64_t b = 0; b < x.batch; ++b) grad_weight_.merge(b), grad_bias_.merge(b);
        auto sum = [&](PieceValues<double>& values) {
            return [&](A* to) { batch_sum(values, x.batch, x.channels, to); };
        };
        return {gradient_like<A>(affine_weight_, maps.x_dense, sum(grad_weight_)),
                gradient_like<A>(affine_bias_, maps.x_dense, sum(grad_bias_))};
    }

  private:
    OptionalTensor affine_weight_, affine_bias_;
    AffineValues<A> affine_;
    Prologue<A> prologue_;
    int post_activation_;
    PieceValues<double> grad_weight_, grad_bias_;
};

}  // namespace fused_attn::cpu

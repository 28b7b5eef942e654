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
    Backward(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& y_in, const OptionalTensor& residual_in,
             const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t pre_activation,
             int64_t post_activation)
        : x_dense_(dense_map(x_in)),
          grad_dense_(in_layout_of<T>(x_dense_, grad_in)),
          y_dense_(y_in ? OptionalTensor(in_layout_of<T>(x_dense_, *y_in)) : y_in),
          residual_dense_(residual_in ? OptionalTensor(in_layout_of<T>(x_dense_, *residual_in)) : residual_in),
          affine_weight_(affine_weight),
          affine_bias_(affine_bias),
          affine_(affine_weight, affine_bias),
          prologue_(affine_.prologue(pre_activation)),
          post_activation_(static_cast<int>(post_activation)),
          x(x_dense_),
          pieces(pieces_of(x.batch, x.axis_length(), x.batch * x.sample_size())),
          grad_x(empty_map<T>(x_dense_)),
          grad_residual(post_activation == kIdentity ? no_tensor(x_in) : empty_map<T>(x_dense_)),
          dots(x, pieces, 0.0),
          grad_weight_(x, pieces, 0.0, affine_weight.has_value()),
          grad_bias_(grad_weight_) {}

    void dot(int64_t sample, int64_t piece) {
        const int64_t c = x.first_channel(piece, pieces), at = x.offset(sample, piece, pieces);
        map_kernels<T>().dot(data(grad_dense_) + at, x.data + at, offset(pointer<T>(y_dense_), at),
                             offset(pointer<T>(residual_dense_), at), x.panel(piece, pieces), prologue_.from(c),
                             gates + sample * x.channels + c, post_activation_,
                             post_activation_ == kIdentity ? nullptr : data(grad_residual) + at,
                             dots.piece(sample, piece, c));
    }
    // mean and peak: what the pools receive, per channel of this sample.
    void spread(int64_t sample, int64_t piece, const A* mean, PeakGrad<A> peak) {
        const int64_t c = x.first_channel(piece, pieces), at = x.offset(sample, piece, pieces);
        const Tensor& grad = post_activation_ == kIdentity ? grad_dense_ : grad_residual;
        if (peak.value) peak = {peak.value + c, peak.peak ? peak.peak + c : nullptr, peak.index + c};
        map_kernels<T>().spread(data(grad) + at, x.data + at, x.panel(piece, pieces), prologue_.from(c),
                                gates + sample * x.channels + c, mean ? mean + c : nullptr, peak, data(grad_x) + at,
                                affine_weight_ ? grad_weight_.piece(sample, piece, c) : nullptr,
                                affine_weight_ ? grad_bias_.piece(sample, piece, c) : nullptr);
    }
    std::tuple<Tensor, Tensor> affine_grads() {
        if (affine_weight_)
            for (int64_t b = 0; b < x.batch; ++b) grad_weight_.merge(b), grad_bias_.merge(b);
        auto sum = [&](PieceValues<double>& values) {
            return [&](A* to) { batch_sum(values, x.batch, x.channels, to); };
        };
        return {gradient_like<A>(affine_weight_, x_dense_, sum(grad_weight_)),
                gradient_like<A>(affine_bias_, x_dense_, sum(grad_bias_))};
    }

  private:
    static T* data(const Tensor& tensor) { return static_cast<T*>(tensor.data_ptr()); }
    static const T* offset(const T* p, int64_t at) { return p ? p + at : nullptr; }

    Tensor x_dense_, grad_dense_;
    OptionalTensor y_dense_, residual_dense_, affine_weight_, affine_bias_;
    AffineValues<A> affine_;
    Prologue<A> prologue_;
    int post_activation_;

  public:
    MapView<T> x;
    int64_t pieces;
    Tensor grad_x, grad_residual;
    PieceValues<double> dots;
    const A* gates = nullptr;  // (batch, channels)

  private:
    PieceValues<double> grad_weight_, grad_bias_;
};

}  // namespace fused_attn::cpu

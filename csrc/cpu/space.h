// The parts of ops that gate by position: the convolution of the pooled maps, and its gradients.
#pragma once

#include "passes.h"

namespace fused_attn::cpu {

// Pieces of space that every sample is cut into where there are too few samples for the threads.
template <class T>
int64_t space_pieces(const MapView<T>& x) {
    constexpr int64_t kPositions = 128;  // a piece of an NCHW sample has rows of at least this length
    return pieces_of(x.batch, x.channels_last ? x.positions : x.positions / kPositions, x.batch * x.sample_size());
}

// The convolution of [maximum, mean] to one map, zero-padded to the same size, for one to three spatial axes. Maps
// are held with zeros around every row, so that a tap is the same offset everywhere; numbers that come out for
// the zeros' places are dropped.
template <class A>
class SpatialConvolution {
  public:
    SpatialConvolution(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, bool mean_first)
        : weight_like_(weight), bias_like_(bias), mean_first_(mean_first) {
        const Values<A> weights(weight), biases(bias);
        bias_ = bias ? biases.data()[0] : A(0);
        const int64_t rank = x.dim() - 2;
        int64_t extent[3] = {1, 1, 1}, kernel[3] = {1, 1, 1};
        for (int64_t axis = 0; axis < rank; ++axis) {
            extent[3 - rank + axis] = x.size(2 + axis);
            kernel[3 - rank + axis] = weight.size(2 + axis);
        }
        width_ = extent[2];
        positions_ = extent[0] * extent[1] * extent[2];
        const int64_t row = extent[2] + kernel[2] - 1, plane = row * (extent[1] + kernel[1] - 1);
        shift_ = (kernel[0] / 2) * plane + (kernel[1] / 2) * row + kernel[2] / 2;
        for (int64_t i = 0; i < extent[0]; ++i)
            for (int64_t j = 0; j < extent[1]; ++j) lines_.push_back(i * plane + j * row);
        length_ = lines_.empty() ? 0 : lines_.back() + width_;
        padded_ = blocks(length_ + 2 * shift_) + kTapBlock;
        taps_ = kernel[0] * kernel[1] * kernel[2];
        for (int64_t slot = 0; slot < 2; ++slot) {  // slots: maximum, mean
            const A* from = weights.data() + (slot == int64_t(mean_first) ? 0 : taps_);
            weights_.insert(weights_.end(), from, from + taps_);
            for (int64_t i = 0; i < kernel[0]; ++i)
                for (int64_t j = 0; j < kernel[1]; ++j)
                    for (int64_t k = 0; k < kernel[2]; ++k)
                        offsets_.push_back(slot * padded_ + i * plane + j * row + k);
            flipped_.insert(flipped_.end(), std::make_reverse_iterator(from + taps_), std::make_reverse_iterator(from));
        }
    }

    int64_t taps() const { return 2 * taps_; }
    // A thread's room for the maps of one sample.
    struct Room {
        std::vector<A> pooled, grad, out;
    };
    Room room(bool backward) const {
        return {std::vector<A>(2 * padded_, A(0)), std::vector<A>(backward ? padded_ : 0, A(0)),
                std::vector<A>(blocks(length_))};
    }

    // pooled: (2, positions), maximum and mean; logits: (positions).
    void forward(const A* pooled, A* logits, Room& room) const {
        pad_pooled(pooled, room);
        tap_kernels<A>().correlate(room.pooled.data(), offsets_.data(), weights_.data(), 2 * taps_, bias_, length_,
                                   room.out.data());
        unpad(room.out.data(), logits);
    }
    // grad_logits (positions) to grad_pooled (2, positions); adds to the taps' gradients [maximum, mean].
    void backward(const A* pooled, const A* grad_logits, A* grad_pooled, double* grad_taps, Room& room) const {
        pad_pooled(pooled, room);
        pad(grad_logits, room.grad.data());
        for (int64_t slot = 0; slot < 2; ++slot) {
            tap_kernels<A>().correlate(room.grad.data(), offsets_.data(), &flipped_[slot * taps_], taps_, A(0), length_,
                                       room.out.data());
            unpad(room.out.data(), grad_pooled + slot * positions_);
        }
        tap_kernels<A>().tap_grad(room.grad.data() + shift_, room.pooled.data(), offsets_.data(), 2 * taps_, length_,
                                  grad_taps);
    }
    // The gradients of weight and bias from the samples' sums, added up in order.
    std::tuple<Tensor, Tensor> gradients(const Tensor& x, int64_t batch, const double* grad_taps,
                                         const double* grad_bias) const {
        auto weight = [&](A* to) {
            for (int64_t t = 0; t < 2 * taps_; ++t) {
                double total = 0;
                for (int64_t b = 0; b < batch; ++b) total += grad_taps[b * 2 * taps_ + t];
                to[mean_first_ ? (t + taps_) % (2 * taps_) : t] = static_cast<A>(total);
            }
        };
        auto bias = [&](A* to) { *to = static_cast<A>(std::accumulate(grad_bias, grad_bias + batch, 0.0)); };
        return {gradient_like<A>(weight_like_, x, weight), gradient_like<A>(bias_like_, x, bias)};
    }

  private:
    static int64_t blocks(int64_t n) { return (n + kTapBlock - 1) / kTapBlock * kTapBlock; }
    void pad(const A* map, A* padded) const {
        for (int64_t line : lines_) {
            std::copy_n(map, width_, padded + shift_ + line);
            map += width_;
        }
    }
    void unpad(const A* padded, A* map) const {
        for (int64_t line : lines_) map = std::copy_n(padded + line, width_, map);
    }
    void pad_pooled(const A* pooled, Room& room) const {
        for (int64_t slot = 0; slot < 2; ++slot) pad(pooled + slot * positions_, room.pooled.data() + slot * padded_);
    }

    OptionalTensor weight_like_, bias_like_;
    bool mean_first_;
    A bias_;
    int64_t width_, positions_, shift_, length_, padded_, taps_;
    std::vector<int64_t> lines_, offsets_;  // where a row starts, and how far a tap looks
    std::vector<A> weights_, flipped_;      // [maximum, mean]
};

// (state, index) of a spatial gate on x.
template <class A>
std::tuple<Tensor, Tensor> empty_space_state(const Tensor& x, bool normalised) {
    std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
    shape.erase(shape.begin() + 1);
    Tensor index = empty_tensor(shape, ScalarType::Int);
    shape.insert(shape.begin() + 1, normalised ? 4 : 3);
    return {empty_tensor(shape, kScalarType<A>), index};
}

// The BatchNorm between convolution and gate that takes its statistics from the batch: none without a weight.
template <class A>
class LogitNorm {
  public:
    LogitNorm(const OptionalTensor& weight, const OptionalTensor& bias, double eps)
        : weight_like_(weight), bias_like_(bias), eps_(eps) {
        const Values<A> weights(weight), biases(bias);
        if (weight) weight_ = weights.data()[0], bias_ = biases.data()[0];
        statistics = empty_tensor({weight ? 2 : 0}, kScalarType<A>);
    }
    LogitNorm(const OptionalTensor& weight, const OptionalTensor& bias, double eps, const Tensor& found)
        : LogitNorm(weight, bias, eps) {
        if (weight) read(found);
    }
    explicit operator bool() const { return weight_like_.has_value(); }

    Tensor statistics;  // mean and biased variance

    // state: (batch, 4, positions). The logits, row 2, from the convolution's output, row 3.
    void forward(A* state, int64_t batch, int64_t positions) {
        const double count = double(batch) * double(positions);
        const auto sum_of = [&](auto term) {
            return sum(batch, [&](int64_t b) {
                const A* raw = state + (4 * b + 3) * positions;
                double total = 0;
                for (int64_t p = 0; p < positions; ++p) total += term(double(raw[p]));
                return total;
            });
        };
        const double mean = sum_of([](double v) { return v; }) / count;
        const double variance = sum_of([mean](double v) { return (v - mean) * (v - mean); }) / count;
        A* const out = static_cast<A*>(statistics.data_ptr());
        out[0] = static_cast<A>(mean);
        out[1] = static_cast<A>(variance);
        read(statistics);
        parallel(batch, batch * positions, [&](int64_t b) {
            A* const z = state + (4 * b + 2) * positions;
            for (int64_t p = 0; p < positions; ++p) z[p] = normal(z[positions + p]) * weight_ + bias_;
        });
    }
    // The gradient of row 3 from that of row 2, in place: grad(b) is a sample's.
    template <class Grad>
    void backward(const A* state, int64_t batch, int64_t positions, Grad grad) {
        std::vector<double> dots(batch, 0.0);
        grad_bias_ = sum(batch, [&](int64_t b) {
            const A *g = grad(b), *raw = state + (4 * b + 3) * positions;
            double total = 0;
            for (int64_t p = 0; p < positions; ++p) total += g[p], dots[b] += double(g[p]) * double(normal(raw[p]));
            return total;
        });
        grad_weight_ = std::accumulate(dots.begin(), dots.end(), 0.0);
        const double count = double(batch) * double(positions);
        const A mean = static_cast<A>(grad_bias_ / count), slope = static_cast<A>(grad_weight_ / count);
        parallel(batch, batch * positions, [&](int64_t b) {
            A* const g = grad(b);
            const A* const raw = state + (4 * b + 3) * positions;
            for (int64_t p = 0; p < positions; ++p)
                g[p] = (g[p] - mean - normal(raw[p]) * slope) * (weight_ * reciprocal_);
        });
    }
    std::tuple<Tensor, Tensor> gradients(const Tensor& x) const {
        return {gradient_like<A>(weight_like_, x, [&](A* to) { *to = static_cast<A>(grad_weight_); }),
                gradient_like<A>(bias_like_, x, [&](A* to) { *to = static_cast<A>(grad_bias_); })};
    }

  private:
    A normal(A v) const { return (v - mean_) * reciprocal_; }
    void read(const Tensor& found) {
        const A* numbers = static_cast<const A*>(found.data_ptr());
        mean_ = numbers[0];
        reciprocal_ = static_cast<A>(1 / std::sqrt(double(numbers[1]) + eps_));
    }
    // The sum over the samples, in order.
    template <class F>
    static double sum(int64_t batch, const F& of_sample) {
        std::vector<double> totals(batch);
        for (int64_t b = 0; b < batch; ++b) totals[b] = of_sample(b);
        return std::accumulate(totals.begin(), totals.end(), 0.0);
    }

    OptionalTensor weight_like_, bias_like_;
    double eps_, grad_weight_ = 0, grad_bias_ = 0;
    A weight_ = 1, bias_ = 0, mean_ = 0, reciprocal_ = 1;
};

// What a sample has by position between the passes.
template <class A>
struct SpaceNumbers {
    std::vector<A> gate, dot, grad_pooled;  // the last: (2, positions), maximum and mean
    typename SpatialConvolution<A>::Room room;
};

// The passes of a spatial gate over a map x, or over x * gates (one gate a channel), by sample and piece of space.
template <class T>
class SpatialGate {
  public:
    using A = Accumulator<T>;
    // state: (B, 3 or 4, positions), maximum, mean, logits and (before a LogitNorm) the convolution's output, which
    // without one are the logits; index: (B, positions).
    SpatialGate(const MapView<T>& x, Prologue<A> prologue, const A* gates, const SpatialConvolution<A>& convolution,
                int64_t ties, int64_t gate, const Tensor& state, const Tensor& index)
        : pieces(space_pieces(x)),
          x_(x),
          prologue_(prologue),
          gates_(gates),
          convolution_(convolution),
          even_(ties == kEven),
          gate_(static_cast<int>(gate)),
          kept_(in_order(state)),
          kept_index_(in_order(index)),
          state_(static_cast<A*>(kept_.data_ptr())),
          rows_(state.size(1)),
          index_(static_cast<int32_t*>(kept_index_.data_ptr())) {}

    const int64_t pieces;

    const A* state() const { return state_; }
    SpaceNumbers<A> numbers(bool backward) const {
        const int64_t n = x_.positions, m = backward ? n : 0;
        return {std::vector<A>(n), std::vector<A>(m), std::vector<A>(2 * m), convolution_.room(backward)};
    }

    // Reads x; writes maxima, means and their index.
    void pool(int64_t b, int64_t piece) const {
        const int64_t p = first(piece);
        A* row = rows(b) + p;
        space_kernels<T>().pool(x_.data + at(b, piece), panel(piece), prologue_, gates(b), even_, row + x_.positions,
                                row, index_ + b * x_.positions + p);
    }
    // The convolution of the pooled maps; and the gate of it, unless a LogitNorm comes between.
    void convolve(int64_t b, SpaceNumbers<A>& n) const {
        convolution_.forward(rows(b), rows(b) + (rows_ - 1) * x_.positions, n.room);
    }
    void excite(int64_t b, SpaceNumbers<A>& n) const {
        convolve(b, n);
        open(b, n);
    }
    void open(int64_t b, SpaceNumbers<A>& n) const {
        dense_kernels<A>().activate(rows(b) + 2 * x_.positions, x_.positions, gate_, n.gate.data());
    }
    // Reads x (and the residual), writes y.
    void scale(int64_t b, int64_t piece, const SpaceNumbers<A>& n, const T* residual, int64_t activation, T* y) const {
        const int64_t offset = at(b, piece);
        space_kernels<T>().scale(x_.data + offset, from(residual, offset), panel(piece), prologue_, gates(b),
                                 n.gate.data() + first(piece), static_cast<int>(activation), y + offset);
    }

    // Reads grad and x (and y or the residual, and writes grad_residual): the sums of their product over the
    // channels and, where channel_dot is given, of the gated product over the positions.
    void dot(int64_t b, int64_t piece, SpaceNumbers<A>& n, const T* grad, const T* y, const T* residual,
             int64_t activation, T* grad_residual, double* channel_dot) const {
        const int64_t offset = at(b, piece), p = first(piece);
        space_kernels<T>().dot(grad + offset, x_.data + offset, from(y, offset), from(residual, offset), panel(piece),
                               prologue_, gates(b), n.gate.data() + p, static_cast<int>(activation),
                               from(grad_residual, offset), n.dot.data() + p, channel_dot);
    }
    // Back through the gate, and through the convolution: what the pools over the channels pass on.
    void open_backward(int64_t b, SpaceNumbers<A>& n) const {
        const int64_t positions = x_.positions;
        dense_kernels<A>().activate_grad(n.dot.data(), rows(b) + 2 * positions, positions, gate_, n.dot.data());
    }
    void excite_backward(int64_t b, SpaceNumbers<A>& n, double* grad_taps, double* grad_bias) const {
        open_backward(b, n);
        convolve_backward(b, n, grad_taps, grad_bias);
    }
    void convolve_backward(int64_t b, SpaceNumbers<A>& n, double* grad_taps, double* grad_bias) const {
        const int64_t positions = x_.positions;
        A *grad_max = n.grad_pooled.data(), *grad_mean = grad_max + positions, *peak = rows(b);
        *grad_bias = std::accumulate(n.dot.begin(), n.dot.end(), 0.0);
        convolution_.backward(peak, n.dot.data(), grad_max, grad_taps, n.room);
        for (int64_t p = 0; p < positions; ++p) grad_mean[p] /= static_cast<A>(x_.channels);
        if (even_) share_among_equals(grad_max, peak, index_ + b * positions, positions, grad_max, grad_mean);
    }
    // Reads x: dot[c] += the sum over the positions of u times what the pools over the channels pass on.
    void weigh(int64_t b, int64_t piece, const SpaceNumbers<A>& n, double* channel_dot) const {
        space_kernels<T>().weigh(x_.data + at(b, piece), panel(piece), prologue_, gates(b), pool_grad(b, piece, n),
                                 channel_dot);
    }
    // Reads grad (and x after a prologue or for ties), writes grad_x. channel: what pools over space pass on.
    void spread(int64_t b, int64_t piece, const SpaceNumbers<A>& n, const T* grad, PoolGrad<A> channel, T* grad_x,
                double* grad_weight, double* grad_bias) const {
        const int64_t offset = at(b, piece);
        space_kernels<T>().spread(grad + offset, x_.data + offset, panel(piece), prologue_, gates(b),
                                  n.gate.data() + first(piece), pool_grad(b, piece, n), channel, grad_x + offset,
                                  grad_weight, grad_bias);
    }

  private:
    int64_t first(int64_t piece) const { return x_.first_position(piece, pieces); }
    int64_t at(int64_t b, int64_t piece) const { return x_.space_offset(b, piece, pieces); }
    Panel panel(int64_t piece) const { return x_.space(piece, pieces); }
    A* rows(int64_t b) const { return state_ + b * rows_ * x_.positions; }
    const A* gates(int64_t b) const { return gates_ ? gates_ + b * x_.channels : nullptr; }
    PoolGrad<A> pool_grad(int64_t b, int64_t piece, const SpaceNumbers<A>& n) const {
        const int64_t p = first(piece);
        const A* grad_max = n.grad_pooled.data() + p;
        return {grad_max + x_.positions, {grad_max, even_ ? rows(b) + p : nullptr, index_ + b * x_.positions + p}};
    }

    MapView<T> x_;
    Prologue<A> prologue_;
    const A* gates_;
    const SpatialConvolution<A>& convolution_;
    bool even_;
    int gate_;
    Tensor kept_, kept_index_;
    A* state_;
    int64_t rows_;
    int32_t* index_;
};

// Sums a channel of every sample: a row of all channels for each piece of space, merged in order.
class ChannelSums {
  public:
    ChannelSums(int64_t batch, int64_t pieces, int64_t channels, bool wanted = true)
        : pieces_(pieces), channels_(channels), values_(wanted ? batch * pieces * channels : 0, 0.0) {}
    double* piece(int64_t sample, int64_t piece) {
        return values_.empty() ? nullptr : &values_[(sample * pieces_ + piece) * channels_];
    }
    const double* merged(int64_t sample) {
        double* total = piece(sample, 0);
        for (int64_t p = 1; p < pieces_; ++p)
            for (int64_t c = 0; c < channels_; ++c) total[c] += piece(sample, p)[c];
        return total;
    }
    // The gradient of an affine's tensor: the sum over samples and pieces in order.
    template <class A>
    Tensor gradient(const OptionalTensor& like, const Tensor& x) {
        return gradient_like<A>(like, x, [&](A* to) {
            std::vector<double> total(channels_, 0.0);
            for (size_t i = 0; i < values_.size(); ++i) total[i % channels_] += values_[i];
            std::copy(total.begin(), total.end(), to);
        });
    }

  private:
    int64_t pieces_, channels_;
    std::vector<double> values_;
};

}  // namespace fused_attn::cpu

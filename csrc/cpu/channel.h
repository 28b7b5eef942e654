// The gates of a channel gate between its passes, forward and backward, on rows of `state`:
// [descriptor (C) | logits (C) | hidden logits (hidden) | peak (C, ties shared evenly)], or with both pools
// [average (C) | logits (C) | its hidden logits (hidden) | maximum (C) | its hidden logits (hidden)].
#pragma once

#include "excitation.h"
#include "passes.h"

namespace fused_attn::cpu {

template <class T>
class ChannelGates {
  public:
    using A = Accumulator<T>;
    ChannelGates(const MapView<T>& x, const Excitation<A>& excitation, int64_t pool, int64_t ties, int64_t gate)
        : batch_(x.batch),
          channels_(x.channels),
          positions_(x.positions),
          sample_bytes_(x.sample_size() * int64_t(sizeof(T))),
          excitation_(excitation),
          hidden_(excitation.hidden()),
          second_(2 * channels_ + hidden_),
          pool_(pool),
          even_(ties == kEven),
          gate_(static_cast<int>(gate)),
          width_(second_ + (pool == kBoth                   ? channels_ + hidden_
                            : pool != kAvg && ties == kEven ? channels_
                                                            : 0)),
          gates_(std::max<int64_t>(1, batch_ * channels_)) {}

    // (state, index) for `use`.
    std::tuple<Tensor, Tensor> empty() const {
        const std::vector<int64_t> none = {0}, descriptor = {batch_, channels_};
        return {empty_tensor({batch_, width_}, kScalarType<A>),
                empty_tensor(pool_ == kAvg ? none : descriptor, ScalarType::Int)};
    }
    void use(const Tensor& state, const Tensor& index) {
        state_ = in_order(state), index_ = in_order(index);
        rows_ = static_cast<A*>(state_->data_ptr());
        tags_ = static_cast<int32_t*>(index_->data_ptr());
    }
    const A* gates() const { return gates_.data(); }

    // Samples that share one read of the weights, where a pass reads `maps` maps.
    int64_t group(int64_t maps) const {
        return samples_a_read(excitation_.weight_count() * sizeof(A), maps * sample_bytes_, batch_);
    }

    // Whether the weights are so large beside the maps that threads share them rather than take samples.
    bool weights_outweigh_maps() const {
        const int64_t threads = torch::stable::get_num_threads();
        return threads > 1 && excitation_.weight_count() * int64_t(sizeof(A)) >= 256 << 10 &&
               batch_ * sample_bytes_ <= threads * (512 << 10);
    }
    // The gates of some samples from their pools; writes their state and index. on_threads: as the excitation has it.
    void excite(int64_t first, int64_t samples, Pooling<T>& pooling, bool on_threads = false) {
        for (int64_t b = first; b < first + samples; ++b) {
            pooling.merge(b);
            A *row = rows_ + b * width_, *second = row + second_;
            for (int64_t c = 0; c < channels_; ++c) {
                if (pool_ == kAvg || pool_ == kBoth)
                    row[c] = pooling.mean(b, c);
                else
                    row[c] =
                        pool_ == kMax ? pooling.peak(b)[c] : A(0.5) * pooling.mean(b, c) + A(0.5) * pooling.peak(b)[c];
            }
            if (pool_ != kAvg) std::copy_n(pooling.index(b), channels_, tags_ + b * channels_);
            if (pool_ != kAvg && (even_ || pool_ == kBoth)) std::copy_n(pooling.peak(b), channels_, second);
        }
        A* row = rows_ + first * width_;
        excitation_.forward(samples, row, width_, row + 2 * channels_, row + channels_, width_, on_threads);
        if (pool_ == kBoth) {
            std::vector<A> logits(samples * channels_);
            excitation_.forward(samples, row + second_, width_, row + second_ + channels_, logits.data(), channels_,
                                on_threads);
            for (int64_t s = 0; s < samples; ++s)
                for (int64_t c = 0; c < channels_; ++c) row[s * width_ + channels_ + c] += logits[s * channels_ + c];
        }
        for (int64_t b = first; b < first + samples; ++b) open(b);
    }
    // A sample's gates from its logits.
    void open(int64_t b) {
        dense_kernels<A>().activate(rows_ + b * width_ + channels_, channels_, gate_, &gates_[b * channels_]);
    }

    void prepare_backward() {
        const int64_t descriptors = gates_.size(), branches = pool_ == kBoth ? 2 : 1;
        grad_logits_.resize(branches * descriptors);
        grad_hidden_.resize(std::max<int64_t>(1, branches * batch_ * hidden_));
        mean_.resize(descriptors);
        value_.resize(pool_ == kAvg ? 0 : descriptors);
    }
    // From the gradients of some samples' gates, dots(b), to what their pools pass on.
    template <class Dots>
    void excite_backward(int64_t first, int64_t samples, const Dots& dots) {
        const int64_t begin = first * channels_, n = samples * channels_;
        const A* row = rows_ + first * width_;
        for (int64_t b = first; b < first + samples; ++b) {
            A* grad = &grad_logits_[b * channels_];
            const double* from = dots(b);
            std::transform(from, from + channels_, grad, [](double v) { return static_cast<A>(v); });
            dense_kernels<A>().activate_grad(grad, rows_ + b * width_ + channels_, channels_, gate_, grad);
        }
        excitation_.backward(samples, row + 2 * channels_, width_, &grad_logits_[begin], &grad_hidden_[first * hidden_],
                             &mean_[begin]);
        if (pool_ == kBoth)
            excitation_.backward(samples, row + second_ + channels_, width_, &grad_logits_[begin],
                                 &grad_hidden_[(batch_ + first) * hidden_], &value_[begin]);
        else if (pool_ != kAvg)
            std::copy_n(&mean_[begin], n, &value_[begin]);
        const A share = pool_ == kAvgMax ? A(0.5) : A(1);
        for (int64_t i = begin; i < begin + n; ++i) {
            mean_[i] = pool_ == kMax ? A(0) : share * mean_[i] / A(positions_);
            if (pool_ != kAvg) value_[i] *= share;
        }
        if (pool_ == kAvg || !even_) return;
        for (int64_t b = first; b < first + samples; ++b)
            share_among_equals(&value_[b * channels_], peak(b), tags_ + b * channels_, channels_,
                               &value_[b * channels_], &mean_[b * channels_]);
    }
    // What the pools pass to a sample; without a maximum that part is null.
    PoolGrad<A> pool_grad(int64_t b) const {
        if (pool_ == kAvg) return {&mean_[b * channels_], {}};
        return {&mean_[b * channels_], {&value_[b * channels_], even_ ? peak(b) : nullptr, tags_ + b * channels_}};
    }

    std::array<Tensor, 4> weight_gradients(const Tensor& x) {
        if (pool_ != kBoth)
            return excitation_.weight_gradients(x, batch_, rows_, rows_ + 2 * channels_, width_, grad_logits_.data(),
                                                grad_hidden_.data());
        // Averages, then maxima, as twice as many samples with the same logits.
        const int64_t stride = channels_ + hidden_;
        std::vector<A> inputs(std::max<int64_t>(1, 2 * batch_ * stride));
        for (int64_t b = 0; b < batch_; ++b) {
            const A* row = rows_ + b * width_;
            A *average = &inputs[b * stride], *maximum = &inputs[(batch_ + b) * stride];
            std::copy_n(row, channels_, average);
            std::copy_n(row + 2 * channels_, hidden_, average + channels_);
            std::copy_n(row + second_, stride, maximum);
        }
        std::copy_n(grad_logits_.data(), batch_ * channels_, grad_logits_.data() + batch_ * channels_);
        return excitation_.weight_gradients(x, 2 * batch_, inputs.data(), inputs.data() + channels_, stride,
                                            grad_logits_.data(), grad_hidden_.data());
    }

  private:
    const A* peak(int64_t b) const { return rows_ + b * width_ + second_; }

    int64_t batch_, channels_, positions_, sample_bytes_;
    const Excitation<A>& excitation_;
    int64_t hidden_, second_, pool_;
    bool even_;
    int gate_;
    int64_t width_;
    std::optional<Tensor> state_, index_;
    A* rows_ = nullptr;
    int32_t* tags_ = nullptr;
    std::vector<A> gates_, grad_logits_, grad_hidden_, mean_, value_;
};

}  // namespace fused_attn::cpu

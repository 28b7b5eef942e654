// The excitation of a channel gate, (B, C) descriptors to (B, C) logits, forward and backward, on rows of `state`:
// [descriptor (C) | logits (C) | hidden logits (hidden) | peak (C, ties shared evenly)].
#pragma once

#include "map.h"

namespace fused_attn::cpu {

template <class A>
class Excitation {
  public:
    Excitation(int64_t channels, const OptionalTensor& weight1, const OptionalTensor& bias1,
               const OptionalTensor& weight2, const OptionalTensor& bias2, int64_t layer, int64_t activation)
        : channels_(channels),
          hidden_(weight2 ? weight1->size(0) : 0),
          layer_(layer),
          activation_(static_cast<int>(activation)),
          kernel_size_(weight1 && layer != kDense ? weight1->numel() : 0),
          weight1_(weight1),
          bias1_(bias1),
          weight2_(weight2),
          bias2_(bias2) {}

    int64_t hidden() const { return hidden_; }
    int64_t weight_count() const {
        if (!weight1_.data() || kernel_size_) return kernel_size_;
        return hidden_ ? 2 * hidden_ * channels_ : channels_ * channels_;
    }

    // Reads the descriptors of `samples` rows of state, writes their logits.
    void forward(int64_t samples, A* state, int64_t stride) const {
        const auto& dense = dense_kernels<A>();
        A* logits = state + channels_;
        if (hidden_) {
            A* hidden_logits = state + 2 * channels_;
            std::vector<A> hidden(samples * hidden_);
            dense.forward(weight1_.data(), bias1_.data(), hidden_, channels_, samples, state, stride, hidden_logits,
                          stride);
            for (int64_t s = 0; s < samples; ++s)
                dense.activate(hidden_logits + s * stride, hidden_, activation_, &hidden[s * hidden_]);
            dense.forward(weight2_.data(), bias2_.data(), channels_, hidden_, samples, hidden.data(), hidden_, logits,
                          stride);
        } else if (kernel_size_) {
            for (int64_t s = 0; s < samples; ++s) convolve(state + s * stride, logits + s * stride);
        } else if (weight1_.data()) {
            dense.forward(weight1_.data(), bias1_.data(), channels_, channels_, samples, state, stride, logits, stride);
        } else {
            for (int64_t s = 0; s < samples; ++s) std::copy_n(state + s * stride, channels_, logits + s * stride);
        }
    }

    // grad_logits (samples, C) to grad_descriptor (samples, C); grad_hidden (samples, hidden) is left for
    // the weights' gradients.
    void backward(int64_t samples, const A* state, int64_t stride, const A* grad_logits, A* grad_hidden,
                  A* grad_descriptor) const {
        const auto& dense = dense_kernels<A>();
        if (hidden_) {
            dense.transposed(weight2_.data(), channels_, hidden_, samples, grad_logits, channels_, grad_hidden,
                             hidden_);
            for (int64_t s = 0; s < samples; ++s)
                dense.activate_grad(grad_hidden + s * hidden_, state + s * stride + 2 * channels_, hidden_, activation_,
                                    grad_hidden + s * hidden_);
            dense.transposed(weight1_.data(), hidden_, channels_, samples, grad_hidden, hidden_, grad_descriptor,
                             channels_);
        } else if (kernel_size_) {
            for (int64_t s = 0; s < samples; ++s)
                convolve_transposed(grad_logits + s * channels_, grad_descriptor + s * channels_);
        } else if (weight1_.data()) {
            dense.transposed(weight1_.data(), channels_, channels_, samples, grad_logits, channels_, grad_descriptor,
                             channels_);
        } else {
            std::copy_n(grad_logits, samples * channels_, grad_descriptor);
        }
    }

    struct Gradients {
        std::vector<A> weight1, bias1, weight2, bias2;
    };
    // Sums over the batch in order, rows of the weights on torch's threads.
    Gradients weight_gradients(int64_t batch, const A* state, int64_t stride, const A* grad_logits,
                               const A* grad_hidden) const {
        Gradients out;
        if (!weight1_.data()) return out;
        if (kernel_size_) {
            out.weight1 = kernel_gradient(batch, state, stride, grad_logits);
            out.bias1 = {std::accumulate(grad_logits, grad_logits + batch * channels_, A(0))};
        } else if (hidden_) {
            out.weight1 = matrix_gradient(grad_hidden, hidden_, state, stride, batch, channels_);
            out.bias1 = row_sum(grad_hidden, hidden_, batch);
            std::vector<A> hidden(std::max<int64_t>(1, batch * hidden_));
            for (int64_t s = 0; s < batch; ++s)
                dense_kernels<A>().activate(state + s * stride + 2 * channels_, hidden_, activation_,
                                            &hidden[s * hidden_]);
            out.weight2 = matrix_gradient(grad_logits, channels_, hidden.data(), hidden_, batch, hidden_);
            out.bias2 = row_sum(grad_logits, channels_, batch);
        } else {
            out.weight1 = matrix_gradient(grad_logits, channels_, state, stride, batch, channels_);
            out.bias1 = row_sum(grad_logits, channels_, batch);
        }
        return out;
    }

  private:
    // The row with kernel_size / 2 more channels on either side: zeros, or the row around again.
    std::vector<A> padded(const A* row) const {
        const int64_t pad = kernel_size_ / 2;
        std::vector<A> out(channels_ + 2 * pad, A(0));
        for (int64_t i = 0; layer_ == kCircular && i < pad; ++i) {
            out[i] = row[((i - pad) % channels_ + channels_) % channels_];
            out[pad + channels_ + i] = row[i % channels_];
        }
        std::copy_n(row, channels_, out.begin() + pad);
        return out;
    }
    // out[c] = sum over j of taps[j] * padded(row)[c + j]
    void correlate(const A* taps, const A* row, A* out) const {
        dense_kernels<A>().weight_grad(taps, 1, padded(row).data(), 1, kernel_size_, 0, 1, channels_, out);
    }
    void convolve(const A* in, A* out) const {
        correlate(weight1_.data(), in, out);
        if (bias1_.data())
            for (int64_t c = 0; c < channels_; ++c) out[c] += bias1_.data()[0];
    }
    void convolve_transposed(const A* grad, A* out) const {
        std::vector<A> flipped(weight1_.data(), weight1_.data() + kernel_size_);
        std::reverse(flipped.begin(), flipped.end());
        correlate(flipped.data(), grad, out);
    }
    std::vector<A> kernel_gradient(int64_t batch, const A* state, int64_t stride, const A* grad) const {
        std::vector<double> total(kernel_size_, 0.0);
        std::vector<A> taps(kernel_size_);
        for (int64_t s = 0; s < batch; ++s) {
            const std::vector<A> row = padded(state + s * stride);
            dense_kernels<A>().forward(grad + s * channels_, nullptr, 1, channels_, kernel_size_, row.data(), 1,
                                       taps.data(), 1);
            for (int64_t j = 0; j < kernel_size_; ++j) total[j] += taps[j];
        }
        return std::vector<A>(total.begin(), total.end());
    }
    static std::vector<A> matrix_gradient(const A* grad, int64_t rows, const A* in, int64_t in_stride, int64_t batch,
                                          int64_t columns) {
        std::vector<A> out(std::max<int64_t>(1, rows * columns));
        constexpr int64_t kRows = 8;
        parallel((rows + kRows - 1) / kRows, batch * rows * columns, [&](int64_t block) {
            dense_kernels<A>().weight_grad(grad, rows, in, in_stride, batch, block * kRows,
                                           std::min(rows, (block + 1) * kRows), columns, out.data());
        });
        return out;
    }
    static std::vector<A> row_sum(const A* grad, int64_t n, int64_t batch) {
        std::vector<A> out(std::max<int64_t>(1, n), A(0));
        for (int64_t s = 0; s < batch; ++s)
            for (int64_t i = 0; i < n; ++i) out[i] += grad[s * n + i];
        return out;
    }

    int64_t channels_, hidden_, layer_;
    int activation_;
    int64_t kernel_size_;
    Values<A> weight1_, bias1_, weight2_, bias2_;
};

}  // namespace fused_attn::cpu

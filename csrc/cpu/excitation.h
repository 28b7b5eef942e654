// The excitation of a channel gate, (B, C) descriptors to (B, C) logits, forward and backward.
#pragma once

#include <array>

#include "map.h"

namespace fused_attn::cpu {

// grad_weight (rows, columns) = sum over the batch of grad[s] x in[s], in order; blocks of rows on torch's threads.
template <class A>
void matrix_gradient(const A* grad, int64_t grad_stride, int64_t rows, const A* in, int64_t in_stride, int64_t batch,
                     int64_t columns, A* grad_weight) {
    constexpr int64_t kRows = 16;
    parallel(ceil_div(rows, kRows), batch * rows * columns, [&](int64_t block) {
        dense_kernels<A>().weight_grad(grad, grad_stride, in, in_stride, batch, block * kRows,
                                       std::min(rows, (block + 1) * kRows), columns, grad_weight);
    });
}
template <class A>
void row_sum(const A* grad, int64_t n, int64_t batch, A* to) {
    std::fill_n(to, n, A(0));
    for (int64_t s = 0; s < batch; ++s)
        for (int64_t i = 0; i < n; ++i) to[i] += grad[s * n + i];
}

// Samples that share one read of the weights, where a pass reads sample_bytes a sample: one where the weights stay in
// cache anyway.
inline int64_t samples_a_read(int64_t weight_bytes, int64_t sample_bytes, int64_t batch) {
    if (weight_bytes <= 128 << 10) return 1;
    const int64_t wanted = 4 * weight_bytes / std::max<int64_t>(1, sample_bytes) + 1;
    const int64_t threads = torch::stable::get_num_threads(), round = wanted * threads;
    const int64_t units = std::max<int64_t>(1, ceil_div(batch, round)) * threads;  // as many for every thread
    return std::max<int64_t>(1, ceil_div(batch, units));
}

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
          like_{weight1, bias1, weight2, bias2},
          weight1_(weight1),
          bias1_(bias1),
          weight2_(weight2),
          bias2_(bias2) {}

    int64_t hidden() const { return hidden_; }
    int64_t weight_count() const {
        if (!weight1_.data() || kernel_size_) return kernel_size_;
        return hidden_ ? 2 * hidden_ * channels_ : channels_ * channels_;
    }

    // (samples, C) descriptors to logits, and hidden logits as far apart as the descriptors. on_threads: rows of the
    // weights on torch's threads.
    void forward(int64_t samples, const A* descriptor, int64_t stride, A* hidden_logits, A* logits,
                 int64_t logits_stride, bool on_threads) const {
        const auto& dense = dense_kernels<A>();
        auto layer = [&](const A* weight, const A* bias, int64_t rows, int64_t columns, const A* in, int64_t in_stride,
                         A* out, int64_t out_stride) {
            const int64_t block = on_threads ? 64 : std::max<int64_t>(1, rows);
            auto of_block = [&](int64_t i) {
                const int64_t first = i * block;
                dense.forward(weight + first * columns, bias ? bias + first : nullptr, std::min(block, rows - first),
                              columns, samples, in, in_stride, out + first, out_stride);
            };
            if (!on_threads) return of_block(0);
            parallel(ceil_div(rows, block), samples * rows * columns, of_block);
        };
        if (hidden_) {
            std::vector<A> hidden(samples * hidden_);
            layer(weight1_.data(), bias1_.data(), hidden_, channels_, descriptor, stride, hidden_logits, stride);
            for (int64_t s = 0; s < samples; ++s)
                dense.activate(hidden_logits + s * stride, hidden_, activation_, &hidden[s * hidden_]);
            layer(weight2_.data(), bias2_.data(), channels_, hidden_, hidden.data(), hidden_, logits, logits_stride);
        } else if (kernel_size_) {
            for (int64_t s = 0; s < samples; ++s) convolve(descriptor + s * stride, logits + s * logits_stride);
        } else if (weight1_.data()) {
            layer(weight1_.data(), bias1_.data(), channels_, channels_, descriptor, stride, logits, logits_stride);
        } else {
            for (int64_t s = 0; s < samples; ++s)
                std::copy_n(descriptor + s * stride, channels_, logits + s * logits_stride);
        }
    }

    // grad_logits (samples, C) to grad_descriptor (samples, C); grad_hidden (samples, hidden) is left for
    // the weights' gradients.
    void backward(int64_t samples, const A* hidden_logits, int64_t stride, const A* grad_logits, A* grad_hidden,
                  A* grad_descriptor) const {
        const auto& dense = dense_kernels<A>();
        if (hidden_) {
            dense.transposed(weight2_.data(), channels_, hidden_, samples, grad_logits, channels_, grad_hidden,
                             hidden_);
            for (int64_t s = 0; s < samples; ++s)
                dense.activate_grad(grad_hidden + s * hidden_, hidden_logits + s * stride, hidden_, activation_,
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

    // Gradients of weight1, bias1, weight2, bias2: sums over the batch in order, rows of the weights on torch's
    // threads.
    std::array<Tensor, 4> weight_gradients(const Tensor& x, int64_t batch, const A* descriptor, const A* hidden_logits,
                                           int64_t stride, const A* grad_logits, const A* grad_hidden) const {
        const A* grad_first = hidden_ ? grad_hidden : grad_logits;  // of the first layer's output
        const int64_t rows = hidden_ ? hidden_ : channels_;
        std::vector<A> hidden(std::max<int64_t>(1, batch * hidden_));
        for (int64_t s = 0; hidden_ && s < batch; ++s)
            dense_kernels<A>().activate(hidden_logits + s * stride, hidden_, activation_, &hidden[s * hidden_]);
        auto weight1 = [&](A* to) {
            if (kernel_size_)
                kernel_gradient(batch, descriptor, stride, grad_logits, to);
            else
                matrix_gradient(grad_first, rows, rows, descriptor, stride, batch, channels_, to);
        };
        auto bias1 = [&](A* to) {
            if (kernel_size_)
                *to = static_cast<A>(std::accumulate(grad_logits, grad_logits + batch * channels_, 0.0));
            else
                row_sum(grad_first, rows, batch, to);
        };
        auto weight2 = [&](A* to) {
            matrix_gradient(grad_logits, channels_, channels_, hidden.data(), hidden_, batch, hidden_, to);
        };
        auto bias2 = [&](A* to) { row_sum(grad_logits, channels_, batch, to); };
        return {gradient_like<A>(like_[0], x, weight1), gradient_like<A>(like_[1], x, bias1),
                gradient_like<A>(like_[2], x, weight2), gradient_like<A>(like_[3], x, bias2)};
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
    void kernel_gradient(int64_t batch, const A* descriptor, int64_t stride, const A* grad, A* to) const {
        std::vector<double> total(kernel_size_, 0.0);
        std::vector<A> taps(kernel_size_);
        for (int64_t s = 0; s < batch; ++s) {
            const std::vector<A> row = padded(descriptor + s * stride);
            dense_kernels<A>().forward(grad + s * channels_, nullptr, 1, channels_, kernel_size_, row.data(), 1,
                                       taps.data(), 1);
            for (int64_t j = 0; j < kernel_size_; ++j) total[j] += taps[j];
        }
        std::copy(total.begin(), total.end(), to);
    }
    int64_t channels_, hidden_, layer_;
    int activation_;
    int64_t kernel_size_;
    std::array<OptionalTensor, 4> like_;
    Values<A> weight1_, bias1_, weight2_, bias2_;
};

}  // namespace fused_attn::cpu

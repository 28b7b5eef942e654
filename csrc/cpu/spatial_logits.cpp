// spatial_logits: the convolution of two pooled maps to one. Everything here is a number a position; a thread takes
// whole samples.
#include "ops.h"
#include "space.h"

namespace fused_attn::cpu {
namespace {

Tensor with_channels(const Tensor& like, int64_t channels) {
    std::vector<int64_t> shape(like.sizes().begin(), like.sizes().end());
    shape[1] = channels;
    return empty_tensor(shape, like.scalar_type());
}
int64_t positions_of(const Tensor& map) {
    int64_t positions = 1;
    for (int64_t axis = 2; axis < map.dim(); ++axis) positions *= map.size(axis);
    return positions;
}

}  // namespace

Tensor spatial_logits(const Tensor& pooled_in, const Tensor& weight, const OptionalTensor& bias) {
    return dispatch(pooled_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor pooled = in_order(pooled_in);
        Tensor logits = with_channels(pooled, 1);
        const SpatialConvolution<A> convolution(pooled, weight, bias, false);
        const int64_t batch = pooled.size(0), n = positions_of(pooled);
        const T* const from = static_cast<const T*>(pooled.data_ptr());
        T* const to = static_cast<T*>(logits.data_ptr());
        parallel_ranges(batch, batch * n * convolution.taps(), [&](int64_t begin, int64_t end) {
            auto room = convolution.room(false);
            std::vector<A> maps(2 * n), out(n);
            for (int64_t b = begin; b < end; ++b) {
                std::copy_n(from + 2 * b * n, 2 * n, maps.begin());
                convolution.forward(maps.data(), out.data(), room);
                std::transform(out.begin(), out.end(), to + b * n, [](A v) { return static_cast<T>(v); });
            }
        });
        return logits;
    });
}

std::tuple<Tensor, Tensor, Tensor> spatial_logits_backward(const Tensor& grad_in, const Tensor& pooled_in,
                                                           const Tensor& weight, const OptionalTensor& bias) {
    return dispatch(pooled_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor pooled = in_order(pooled_in), grad = in_order(grad_in);
        Tensor grad_pooled = with_channels(pooled, 2);
        const SpatialConvolution<A> convolution(pooled, weight, bias, false);
        const int64_t batch = pooled.size(0), n = positions_of(pooled), taps = convolution.taps();
        const T* const maps_in = static_cast<const T*>(pooled.data_ptr());
        const T* const grads_in = static_cast<const T*>(grad.data_ptr());
        T* const to = static_cast<T*>(grad_pooled.data_ptr());
        std::vector<double> grad_taps(batch * taps, 0.0), grad_bias(batch, 0.0);
        parallel_ranges(batch, 3 * batch * n * taps, [&](int64_t begin, int64_t end) {
            auto room = convolution.room(true);
            std::vector<A> maps(2 * n), out(2 * n), grads(n);
            for (int64_t b = begin; b < end; ++b) {
                std::copy_n(maps_in + 2 * b * n, 2 * n, maps.begin());
                std::copy_n(grads_in + b * n, n, grads.begin());
                grad_bias[b] = std::accumulate(grads.begin(), grads.end(), 0.0);
                convolution.backward(maps.data(), grads.data(), out.data(), &grad_taps[b * taps], room);
                std::transform(out.begin(), out.end(), to + 2 * b * n, [](A v) { return static_cast<T>(v); });
            }
        });
        auto [grad_weight, bias_out] = convolution.gradients(pooled, batch, grad_taps.data(), grad_bias.data());
        return std::make_tuple(grad_pooled, grad_weight, bias_out);
    });
}

}  // namespace fused_attn::cpu

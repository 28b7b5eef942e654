// spatial_gate: reads x, reads it again and writes y; backward reads grad and x, then grad again (and x after a
// prologue or for ties shared evenly) and writes grad_x. A thread takes whole samples, and a sample's second read
// comes right after its first, from cache. Too few samples, or statistics over all of them: pieces of space, phase by
// phase.
#include "ops.h"
#include "space.h"

namespace fused_attn::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor> spatial_gate(
    const Tensor& x_in, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const OptionalTensor& affine_weight, const OptionalTensor& affine_bias,
    const OptionalTensor& residual, double eps, int64_t mean_first, int64_t ties, int64_t gate, int64_t pre_activation,
    int64_t post_activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const ForwardMaps<T> maps(x_in, residual);
        const MapView<T>& x = maps.x;
        LogitNorm<A> norm(norm_weight, norm_bias, eps);
        auto [state, index] = empty_space_state<A>(x_in, bool(norm));
        const AffineValues<A> affine(affine_weight, affine_bias);
        const SpatialConvolution<A> convolution(x_in, weight, bias, mean_first);
        const SpatialGate<T> pass(x, affine.prologue(pre_activation), nullptr, convolution, ties, gate, state, index);
        const int64_t elements = x.batch * x.sample_size(), pieces = pass.pieces;
        if (pieces == 1 && !norm) {
            parallel_ranges(x.batch, elements, [&](int64_t begin, int64_t end) {
                auto numbers = pass.numbers(false);
                for (int64_t b = begin; b < end; ++b) {
                    pass.pool(b, 0);
                    pass.excite(b, numbers);
                    pass.scale(b, 0, numbers, maps.residual, post_activation, maps.out);
                }
            });
        } else {
            std::vector<SpaceNumbers<A>> numbers(x.batch, pass.numbers(false));
            const int64_t units = x.batch * pieces;
            parallel(units, elements, [&](int64_t unit) { pass.pool(unit / pieces, unit % pieces); });
            parallel(x.batch, elements, [&](int64_t b) { pass.convolve(b, numbers[b]); });
            if (norm) norm.forward(static_cast<A*>(state.data_ptr()), x.batch, x.positions);
            parallel(x.batch, elements, [&](int64_t b) { pass.open(b, numbers[b]); });
            parallel(units, elements, [&](int64_t unit) {
                pass.scale(unit / pieces, unit % pieces, numbers[unit / pieces], maps.residual, post_activation,
                           maps.out);
            });
        }
        return std::make_tuple(maps.y, state, index, norm.statistics);
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> spatial_gate_backward(
    const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& y, const Tensor& state, const Tensor& index,
    const Tensor& statistics, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const OptionalTensor& affine_weight, const OptionalTensor& affine_bias,
    const OptionalTensor& residual, double eps, int64_t mean_first, int64_t ties, int64_t gate, int64_t pre_activation,
    int64_t post_activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const BackwardMaps<T> maps(grad_in, x_in, y, residual, post_activation);
        const MapView<T>& x = maps.x;
        const AffineValues<A> affine(affine_weight, affine_bias);
        LogitNorm<A> norm(norm_weight, norm_bias, eps, statistics);
        const SpatialConvolution<A> convolution(x_in, weight, bias, mean_first);
        const SpatialGate<T> pass(x, affine.prologue(pre_activation), nullptr, convolution, ties, gate, state, index);
        const int64_t elements = x.batch * x.sample_size(), pieces = pass.pieces, taps = convolution.taps();
        const bool wants_affine = affine_weight.has_value();
        ChannelSums grad_weight(x.batch, pieces, x.channels, wants_affine), grad_bias = grad_weight;
        std::vector<double> grad_taps(x.batch * taps, 0.0), grad_logits(x.batch, 0.0);

        auto dot = [&](int64_t b, int64_t piece, SpaceNumbers<A>& numbers) {
            pass.dot(b, piece, numbers, maps.grad, maps.y, maps.residual, post_activation, maps.epilogue, nullptr);
        };
        auto spread = [&](int64_t b, int64_t piece, const SpaceNumbers<A>& numbers) {
            pass.spread(b, piece, numbers, maps.before_gate(), {}, maps.out, grad_weight.piece(b, piece),
                        grad_bias.piece(b, piece));
        };
        if (pieces == 1 && !norm) {
            parallel_ranges(x.batch, elements, [&](int64_t begin, int64_t end) {
                auto numbers = pass.numbers(true);
                for (int64_t b = begin; b < end; ++b) {
                    pass.open(b, numbers);
                    dot(b, 0, numbers);
                    pass.excite_backward(b, numbers, &grad_taps[b * taps], &grad_logits[b]);
                    spread(b, 0, numbers);
                }
            });
        } else {
            std::vector<SpaceNumbers<A>> numbers(x.batch, pass.numbers(true));
            const int64_t units = x.batch * pieces;
            for (int64_t b = 0; b < x.batch; ++b) pass.open(b, numbers[b]);
            parallel(units, elements, [&](int64_t unit) { dot(unit / pieces, unit % pieces, numbers[unit / pieces]); });
            parallel(x.batch, elements, [&](int64_t b) { pass.open_backward(b, numbers[b]); });
            if (norm)
                norm.backward(pass.state(), x.batch, x.positions, [&](int64_t b) { return numbers[b].dot.data(); });
            parallel(x.batch, elements,
                     [&](int64_t b) { pass.convolve_backward(b, numbers[b], &grad_taps[b * taps], &grad_logits[b]); });
            parallel(units, elements,
                     [&](int64_t unit) { spread(unit / pieces, unit % pieces, numbers[unit / pieces]); });
        }
        auto [weight_out, bias_out] = convolution.gradients(x_in, x.batch, grad_taps.data(), grad_logits.data());
        auto [norm_weight_out, norm_bias_out] = norm.gradients(x_in);
        return std::make_tuple(maps.grad_x, maps.grad_residual, weight_out, bias_out, norm_weight_out, norm_bias_out,
                               grad_weight.gradient<A>(affine_weight, x_in), grad_bias.gradient<A>(affine_bias, x_in));
    });
}

}  // namespace fused_attn::cpu

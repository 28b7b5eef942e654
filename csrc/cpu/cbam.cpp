// cbam: reads x for the pools over space, reads it for the pools over channels of x * gates, reads it again and
// writes y. Backward reads grad and x (sums over channels, and over positions as far as they are known), reads x
// (the rest of those), then grad (and x after a prologue or for ties shared evenly) and writes grad_x. A thread
// takes whole samples (a few at a time where the weights are large), and a sample's later reads find it in cache.
// Too few samples, or statistics over all of them: pieces, phase by phase.
#include "channel.h"
#include "ops.h"
#include "space.h"

namespace fused_attn::cpu {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam(
    const Tensor& x_in, const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& weight2,
    const OptionalTensor& bias2, const Tensor& spatial_weight, const OptionalTensor& spatial_bias,
    const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const OptionalTensor& affine_weight,
    const OptionalTensor& affine_bias, const OptionalTensor& residual, double eps, int64_t layer, int64_t pool,
    int64_t channel_ties, int64_t activation, int64_t channel_gate, int64_t mean_first, int64_t spatial_ties,
    int64_t spatial_gate, int64_t pre_activation, int64_t post_activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const ForwardMaps<T> maps(x_in, residual);
        const MapView<T>& x = maps.x;
        const int64_t elements = x.batch * x.sample_size();
        const AffineValues<A> affine(affine_weight, affine_bias);
        const Prologue<A> prologue = affine.prologue(pre_activation);
        const Excitation<A> excitation(x.channels, weight1, bias1, weight2, bias2, layer, activation);
        ChannelGates<T> gates(x, excitation, pool, channel_ties, channel_gate);
        auto [channel_state, channel_index] = gates.empty();
        gates.use(channel_state, channel_index);
        const SpatialConvolution<A> convolution(x_in, spatial_weight, spatial_bias, mean_first);
        LogitNorm<A> norm(norm_weight, norm_bias, eps);
        auto [state, index] = empty_space_state<A>(x_in, bool(norm));
        const SpatialGate<T> space(x, prologue, gates.gates(), convolution, spatial_ties, spatial_gate, state, index);

        const int64_t pieces = pieces_of(x.batch, x.axis_length(), elements);
        Pooling<T> pooling(x, pieces, prologue, pool, channel_ties);
        if (pieces == 1 && space.pieces == 1 && !norm) {
            const int64_t group = gates.group(1);
            parallel_ranges(ceil_div(x.batch, group), elements, [&](int64_t begin, int64_t end) {
                auto numbers = space.numbers(false);
                for (int64_t unit = begin; unit < end; ++unit) {
                    const int64_t first = unit * group, last = std::min(x.batch, first + group);
                    for (int64_t b = first; b < last; ++b) pooling.run(b, 0);
                    gates.excite(first, last - first, pooling);
                    for (int64_t b = last; b-- > first;) {  // the last sample pooled is still in cache
                        space.pool(b, 0);
                        space.excite(b, numbers);
                        space.scale(b, 0, numbers, maps.residual, post_activation, maps.out);
                    }
                }
            });
        } else {
            const int64_t parts = space.pieces;
            std::vector<SpaceNumbers<A>> numbers(x.batch, space.numbers(false));
            parallel(x.batch * pieces, elements, [&](int64_t unit) { pooling.run(unit / pieces, unit % pieces); });
            gates.excite(0, x.batch, pooling);
            parallel(x.batch * parts, elements, [&](int64_t unit) { space.pool(unit / parts, unit % parts); });
            parallel(x.batch, elements, [&](int64_t b) { space.convolve(b, numbers[b]); });
            if (norm) norm.forward(static_cast<A*>(state.data_ptr()), x.batch, x.positions);
            parallel(x.batch, elements, [&](int64_t b) { space.open(b, numbers[b]); });
            parallel(x.batch * parts, elements, [&](int64_t unit) {
                space.scale(unit / parts, unit % parts, numbers[unit / parts], maps.residual, post_activation,
                            maps.out);
            });
        }
        return std::make_tuple(maps.y, channel_state, channel_index, state, index, norm.statistics);
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
cbam_backward(const Tensor& grad_in, const Tensor& x_in, const OptionalTensor& y, const Tensor& channel_state,
              const Tensor& channel_index, const Tensor& state, const Tensor& index, const Tensor& statistics,
              const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& weight2,
              const OptionalTensor& bias2, const Tensor& spatial_weight, const OptionalTensor& spatial_bias,
              const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const OptionalTensor& affine_weight,
              const OptionalTensor& affine_bias, const OptionalTensor& residual, double eps, int64_t layer,
              int64_t pool, int64_t channel_ties, int64_t activation, int64_t channel_gate, int64_t mean_first,
              int64_t spatial_ties, int64_t spatial_gate, int64_t pre_activation, int64_t post_activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const BackwardMaps<T> maps(grad_in, x_in, y, residual, post_activation);
        const MapView<T>& x = maps.x;
        const int64_t elements = x.batch * x.sample_size();
        const AffineValues<A> affine(affine_weight, affine_bias);
        const Excitation<A> excitation(x.channels, weight1, bias1, weight2, bias2, layer, activation);
        ChannelGates<T> gates(x, excitation, pool, channel_ties, channel_gate);
        gates.use(channel_state, channel_index);
        gates.prepare_backward();
        LogitNorm<A> norm(norm_weight, norm_bias, eps, statistics);
        const SpatialConvolution<A> convolution(x_in, spatial_weight, spatial_bias, mean_first);
        const SpatialGate<T> space(x, affine.prologue(pre_activation), gates.gates(), convolution, spatial_ties,
                                   spatial_gate, state, index);
        const int64_t pieces = space.pieces, taps = convolution.taps();
        const bool wants_affine = affine_weight.has_value();
        ChannelSums dots(x.batch, pieces, x.channels);
        ChannelSums grad_weight(x.batch, pieces, x.channels, wants_affine), grad_bias = grad_weight;
        std::vector<double> grad_taps(x.batch * taps, 0.0), grad_logits(x.batch, 0.0);
        const std::vector<A> nothing(x.channels, A(0));
        const std::vector<int32_t> nowhere(x.channels, 0);

        auto dot = [&](int64_t b, int64_t piece, SpaceNumbers<A>& numbers) {
            space.dot(b, piece, numbers, maps.grad, maps.y, maps.residual, post_activation, maps.epilogue,
                      dots.piece(b, piece));
        };
        auto excite_channels = [&](int64_t first, int64_t samples) {
            gates.excite_backward(first, samples, [&](int64_t b) { return dots.merged(b); });
        };
        auto spread = [&](int64_t b, int64_t piece, const SpaceNumbers<A>& numbers) {
            PoolGrad<A> pools = gates.pool_grad(b);
            if (!pools.peak.value) pools.peak = {nothing.data(), nullptr, nowhere.data()};
            space.spread(b, piece, numbers, maps.before_gate(), pools, maps.out, grad_weight.piece(b, piece),
                         grad_bias.piece(b, piece));
        };
        if (pieces == 1 && !norm) {
            const int64_t group = gates.group(2);
            parallel_ranges(ceil_div(x.batch, group), elements, [&](int64_t begin, int64_t end) {
                std::vector<SpaceNumbers<A>> numbers(group, space.numbers(true));
                for (int64_t unit = begin; unit < end; ++unit) {
                    const int64_t first = unit * group, last = std::min(x.batch, first + group);
                    for (int64_t b = first; b < last; ++b) {
                        gates.open(b);
                        space.open(b, numbers[b - first]);
                        dot(b, 0, numbers[b - first]);
                        space.excite_backward(b, numbers[b - first], &grad_taps[b * taps], &grad_logits[b]);
                        space.weigh(b, 0, numbers[b - first], dots.piece(b, 0));
                    }
                    excite_channels(first, last - first);
                    for (int64_t b = last; b-- > first;) spread(b, 0, numbers[b - first]);
                }
            });
        } else {
            std::vector<SpaceNumbers<A>> numbers(x.batch, space.numbers(true));
            const int64_t units = x.batch * pieces;
            for (int64_t b = 0; b < x.batch; ++b) gates.open(b), space.open(b, numbers[b]);
            parallel(units, elements, [&](int64_t unit) { dot(unit / pieces, unit % pieces, numbers[unit / pieces]); });
            parallel(x.batch, elements, [&](int64_t b) { space.open_backward(b, numbers[b]); });
            if (norm)
                norm.backward(space.state(), x.batch, x.positions, [&](int64_t b) { return numbers[b].dot.data(); });
            parallel(x.batch, elements,
                     [&](int64_t b) { space.convolve_backward(b, numbers[b], &grad_taps[b * taps], &grad_logits[b]); });
            parallel(units, elements, [&](int64_t unit) {
                const int64_t b = unit / pieces, piece = unit % pieces;
                space.weigh(b, piece, numbers[b], dots.piece(b, piece));
            });
            excite_channels(0, x.batch);
            parallel(units, elements,
                     [&](int64_t unit) { spread(unit / pieces, unit % pieces, numbers[unit / pieces]); });
        }
        const auto grads = gates.weight_gradients(x_in);
        auto [weight_out, bias_out] = convolution.gradients(x_in, x.batch, grad_taps.data(), grad_logits.data());
        auto [norm_weight_out, norm_bias_out] = norm.gradients(x_in);
        return std::make_tuple(maps.grad_x, maps.grad_residual, grads[0], grads[1], grads[2], grads[3], weight_out,
                               bias_out, norm_weight_out, norm_bias_out, grad_weight.gradient<A>(affine_weight, x_in),
                               grad_bias.gradient<A>(affine_bias, x_in));
    });
}

}  // namespace fused_attn::cpu

// channel_gate: reads x twice and writes y; backward reads grad twice and x once and writes grad_x. A thread
// takes whole samples (a few at a time where the weights are large, so that a weight is read once for them),
// and a sample's second read comes right after its first, from cache. Too few samples: pieces, phase by phase.
#include "channel.h"
#include "ops.h"

namespace fused_attn::cpu {

std::tuple<Tensor, Tensor, Tensor> channel_gate(const Tensor& x_in, const OptionalTensor& weight1,
                                                const OptionalTensor& bias1, const OptionalTensor& weight2,
                                                const OptionalTensor& bias2, const OptionalTensor& affine_weight,
                                                const OptionalTensor& affine_bias, const OptionalTensor& residual,
                                                int64_t layer, int64_t pool, int64_t ties, int64_t activation,
                                                int64_t gate, int64_t pre_activation, int64_t post_activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const ForwardMaps<T> maps(x_in, residual);
        const MapView<T>& x = maps.x;
        const int64_t channels = x.channels, elements = x.batch * x.sample_size();
        const Excitation<A> excitation(channels, weight1, bias1, weight2, bias2, layer, activation);
        const AffineValues<A> affine(affine_weight, affine_bias);
        const Prologue<A> prologue = affine.prologue(pre_activation);
        ChannelGates<T> gates(x, excitation, pool, ties, gate);
        auto [state, index] = gates.empty();
        gates.use(state, index);

        const int64_t pieces = pieces_of(x.batch, x.axis_length(), elements);
        Pooling<T> pooling(x, pieces, prologue, pool, ties);
        auto apply = [&](int64_t b, int64_t piece, int64_t count) {
            const int64_t c = x.first_channel(piece, count), at = x.offset(b, piece, count);
            map_kernels<T>().scale(x.data + at, from(maps.residual, at), x.panel(piece, count), prologue.from(c),
                                   gates.gates() + b * channels + c, static_cast<int>(post_activation), maps.out + at);
        };
        if (pieces == 1 && !gates.weights_outweigh_maps()) {
            const int64_t group = gates.group(1), parts = x.parts();
            parallel(ceil_div(x.batch, group), elements, [&](int64_t unit) {
                const int64_t first = unit * group, last = std::min(x.batch, first + group);
                for (int64_t b = first; b < last; ++b) pooling.run(b, 0);
                gates.excite(first, last - first, pooling);
                for (int64_t b = last; b-- > first;)  // the last sample pooled is still in cache
                    for (int64_t part = parts; part-- > 0;) apply(b, part, parts);
            });
        } else {
            const int64_t units = x.batch * pieces;
            parallel(units, elements, [&](int64_t unit) { pooling.run(unit / pieces, unit % pieces); });
            gates.excite(0, x.batch, pooling, true);
            parallel(units, elements, [&](int64_t unit) { apply(unit / pieces, unit % pieces, pieces); });
        }
        return std::make_tuple(maps.y, state, index);
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> channel_gate_backward(
    const Tensor& grad, const Tensor& x_in, const OptionalTensor& y, const Tensor& state, const Tensor& index,
    const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& weight2,
    const OptionalTensor& bias2, const OptionalTensor& affine_weight, const OptionalTensor& affine_bias,
    const OptionalTensor& residual, int64_t layer, int64_t pool, int64_t ties, int64_t activation, int64_t gate,
    int64_t pre_activation, int64_t post_activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        Backward<T> pass(grad, x_in, y, residual, affine_weight, affine_bias, pre_activation, post_activation);
        const MapView<T>& x = pass.x;
        const int64_t pieces = pass.pieces, elements = x.batch * x.sample_size();
        const Excitation<A> excitation(x.channels, weight1, bias1, weight2, bias2, layer, activation);
        ChannelGates<T> gates(x, excitation, pool, ties, gate);
        gates.use(state, index);
        gates.prepare_backward();
        pass.gates = gates.gates();
        auto excite = [&](int64_t first, int64_t samples) {
            gates.excite_backward(first, samples, [&](int64_t b) {
                pass.dots.merge(b);
                return pass.dots.sample(b);
            });
        };
        auto spread = [&](int64_t b, int64_t piece, int64_t count) {
            const PoolGrad<A> pools = gates.pool_grad(b);
            pass.spread(b, piece, count, pools.mean, pools.peak);
        };
        if (pieces == 1) {
            const int64_t group = gates.group(2), parts = x.parts();
            parallel(ceil_div(x.batch, group), elements, [&](int64_t unit) {
                const int64_t first = unit * group, last = std::min(x.batch, first + group);
                for (int64_t b = first; b < last; ++b) gates.open(b), pass.dot(b, 0);
                excite(first, last - first);
                for (int64_t b = last; b-- > first;)
                    for (int64_t part = parts; part-- > 0;) spread(b, part, parts);
            });
        } else {
            const int64_t units = x.batch * pieces;
            for (int64_t b = 0; b < x.batch; ++b) gates.open(b);
            parallel(units, elements, [&](int64_t unit) { pass.dot(unit / pieces, unit % pieces); });
            excite(0, x.batch);
            parallel(units, elements, [&](int64_t unit) { spread(unit / pieces, unit % pieces, pieces); });
        }
        auto [grad_weight, grad_bias] = pass.affine_grads();
        const auto grads = gates.weight_gradients(x_in);
        return std::make_tuple(pass.maps.grad_x, pass.maps.grad_residual, grads[0], grads[1], grads[2], grads[3],
                               grad_weight, grad_bias);
    });
}

}  // namespace fused_attn::cpu

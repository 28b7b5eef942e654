// context_pool: one read of x; every tile is swept twice, the second time from cache. context_pool_backward: one such
// read of x, then one write of grad_x (and a read of the gradient that reached the map itself).
#include "ops.h"
#include "space.h"

namespace fused_attn::cpu {
namespace {

// The contexts of a sample's pieces, in order, as one: relative to the largest logit of all.
template <class A>
Context<A> join_contexts(const Context<A>* pieces, int64_t count, int64_t channels) {
    A peak = pieces[0].peak;
    for (int64_t i = 1; i < count; ++i)
        if (pieces[i].peak > peak || std::isnan(pieces[i].peak)) peak = pieces[i].peak;
    if (count == 1) return pieces[0];
    const double base = std::isinf(peak) && peak < 0 ? 0.0 : static_cast<double>(peak);
    double* const sums = pieces[0].sums;
    double total = 0;
    for (int64_t i = 0; i < count; ++i) {
        const double share = std::exp(static_cast<double>(pieces[i].peak) - base);
        total += share * pieces[i].total;
        for (int64_t c = 0; c < channels; ++c) sums[c] = (i ? sums[c] : 0.0) + share * pieces[i].sums[c];
    }
    return {peak, total, sums};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> context_pool(const Tensor& x_in, const Tensor& weight, const OptionalTensor& bias) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x_dense = dense_map(x_in);
        const MapView<T> x(x_dense);
        Tensor context = empty_tensor({x.batch, x.channels}, x_in.scalar_type());
        Tensor mean = empty_tensor({x.batch, x.channels}, kScalarType<A>);
        Tensor shares = empty_tensor({x.batch, x.positions}, kScalarType<A>);
        A *const means = static_cast<A*>(mean.data_ptr()), *const logits = static_cast<A*>(shares.data_ptr());
        T* const out = static_cast<T*>(context.data_ptr());
        const Values<A> weights(weight), biases(bias);
        const A shift = bias ? biases.data()[0] : A(0);
        const int64_t pieces = space_pieces(x), elements = x.batch * x.sample_size(), n = x.positions;
        ChannelSums sums(x.batch, pieces, x.channels);
        std::vector<Context<A>> contexts(x.batch * pieces);
        parallel(x.batch * pieces, elements, [&](int64_t unit) {
            const int64_t b = unit / pieces, piece = unit % pieces;
            contexts[unit].sums = sums.piece(b, piece);
            context_kernels<T>().pool(x.data + x.space_offset(b, piece, pieces), x.space(piece, pieces), weights.data(),
                                      shift, logits + b * n + x.first_position(piece, pieces), contexts[unit]);
        });
        parallel(x.batch, x.batch * (pieces * x.channels + n), [&](int64_t b) {
            const Context<A> found = join_contexts(&contexts[b * pieces], pieces, x.channels);
            const double scale = 1 / found.total;
            for (int64_t c = 0; c < x.channels; ++c) {
                const double value = n > 0 ? found.sums[c] * scale : 0.0;  // of no position eager's product is 0
                means[b * x.channels + c] = static_cast<A>(value);
                out[b * x.channels + c] = static_cast<T>(means[b * x.channels + c]);
            }
            context_kernels<T>().softmax(logits + b * n, n, found.peak, static_cast<A>(scale));
        });
        return std::make_tuple(context, mean, shares);
    });
}

std::tuple<Tensor, Tensor, Tensor> context_pool_backward(const OptionalTensor& grad, const OptionalTensor& gate,
                                                         const Tensor& grad_context, const Tensor& x_in,
                                                         const Tensor& weight, const OptionalTensor& bias,
                                                         const Tensor& mean, const Tensor& shares) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x_dense = dense_map(x_in);
        const MapView<T> x(x_dense);
        const Tensor grad_dense = grad ? in_layout_of<T>(x_dense, *grad) : x_dense;
        const T* const grad_map = grad ? static_cast<const T*>(grad_dense.data_ptr()) : nullptr;
        Tensor grad_x = empty_map<T>(x_dense);
        T* const out = static_cast<T*>(grad_x.data_ptr());
        const Values<A> factors(grad_context), weights(weight), means(mean), parts(shares), gates(gate);
        const int64_t pieces = space_pieces(x), channels = x.channels;
        ChannelSums grad_weight(x.batch, pieces, channels);
        parallel(x.batch * pieces, x.batch * x.sample_size(), [&](int64_t unit) {
            const int64_t b = unit / pieces, piece = unit % pieces, at = x.space_offset(b, piece, pieces);
            context_kernels<T>().spread(from(grad_map, at), from(gates.data(), b * channels), x.data + at,
                                        x.space(piece, pieces), factors.data() + b * channels, weights.data(),
                                        parts.data() + b * x.positions + x.first_position(piece, pieces),
                                        means.data() + b * channels, out + at, grad_weight.piece(b, piece));
        });
        // A softmax does not see what all its logits have in common: 0, and NaN where what comes of them is no number.
        A none = 0;
        for (int64_t i = 0; i < x.batch * channels; ++i) none += A(0) * (factors.data()[i] * means.data()[i]);
        return std::make_tuple(grad_x, grad_weight.gradient<A>(weight, x_in),
                               gradient_like<A>(bias, x_in, [&](A* to) { *to = none; }));
    });
}

}  // namespace fused_attn::cpu

// channel_pool: one read of x. channel_pool_backward: one write of grad_x (and a read of x after a prologue or for
// ties shared evenly).
#include "ops.h"
#include "space.h"

namespace fused_attn::cpu {

std::tuple<Tensor, Tensor> channel_pool(const Tensor& x_in, const OptionalTensor& affine_weight,
                                        const OptionalTensor& affine_bias, int64_t pre_activation, int64_t mean_first,
                                        int64_t ties) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x_dense = dense_map(x_in);
        const MapView<T> x(x_dense);
        std::vector<int64_t> shape(x_in.sizes().begin(), x_in.sizes().end());
        shape[1] = 2;
        Tensor pooled = empty_tensor(shape, x_in.scalar_type());
        shape.erase(shape.begin() + 1);
        Tensor index = empty_tensor(shape, ScalarType::Int);
        T* out = static_cast<T*>(pooled.data_ptr());
        int32_t* tags = static_cast<int32_t*>(index.data_ptr());
        const int64_t pieces = space_pieces(x), n = x.positions;
        const AffineValues<A> affine(affine_weight, affine_bias);
        parallel(x.batch * pieces, x.batch * x.sample_size(), [&](int64_t unit) {
            const int64_t b = unit / pieces, piece = unit % pieces;
            const Panel panel = x.space(piece, pieces);
            std::vector<A> mean(panel.positions), peak(panel.positions);
            space_kernels<T>().pool(x.data + x.space_offset(b, piece, pieces), panel, affine.prologue(pre_activation),
                                    nullptr, ties == kEven, mean.data(), peak.data(),
                                    tags + b * n + panel.first_position);
            T* row = out + 2 * b * n + panel.first_position;
            auto round = [](A v) { return static_cast<T>(v); };
            std::transform(peak.begin(), peak.end(), row + (mean_first ? n : 0), round);
            std::transform(mean.begin(), mean.end(), row + (mean_first ? 0 : n), round);
        });
        return std::make_tuple(pooled, index);
    });
}

std::tuple<Tensor, Tensor, Tensor> channel_pool_backward(const Tensor& grad, const Tensor& x_in, const Tensor& pooled,
                                                         const Tensor& index_in, const OptionalTensor& affine_weight,
                                                         const OptionalTensor& affine_bias, int64_t pre_activation,
                                                         int64_t mean_first, int64_t ties) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x_dense = dense_map(x_in);
        const MapView<T> x(x_dense);
        Tensor grad_x = empty_map<T>(x_dense);
        T* out = static_cast<T*>(grad_x.data_ptr());
        const Tensor index = in_order(index_in);
        const int32_t* tags = static_cast<const int32_t*>(index.data_ptr());
        const Values<A> grads(grad), pools(pooled);
        const AffineValues<A> affine(affine_weight, affine_bias);
        const int64_t pieces = space_pieces(x), n = x.positions;
        const bool even = ties == kEven, wants_affine = affine_weight.has_value();
        ChannelSums grad_weight(x.batch, pieces, x.channels, wants_affine), grad_bias = grad_weight;
        parallel(x.batch * pieces, x.batch * x.sample_size(), [&](int64_t unit) {
            const int64_t b = unit / pieces, piece = unit % pieces;
            const Panel panel = x.space(piece, pieces);
            const int64_t length = panel.positions, at = x.space_offset(b, piece, pieces);
            const int64_t first = 2 * b * n + panel.first_position, peak = first + (mean_first ? n : 0);
            const A *grad_max = grads.data() + peak, *grad_mean = grads.data() + first + (mean_first ? 0 : n);
            const int32_t* tag = tags + b * n + panel.first_position;
            std::vector<A> mean(length), value(grad_max, grad_max + length);
            for (int64_t p = 0; p < length; ++p) mean[p] = grad_mean[p] / static_cast<A>(x.channels);
            if (even) share_among_equals(grad_max, pools.data() + peak, tag, length, value.data(), mean.data());
            const PoolGrad<A> space = {mean.data(), {value.data(), even ? pools.data() + peak : nullptr, tag}};
            space_kernels<T>().spread(nullptr, x.data + at, panel, affine.prologue(pre_activation), nullptr, nullptr,
                                      space, {}, out + at, grad_weight.piece(b, piece), grad_bias.piece(b, piece));
        });
        return std::make_tuple(grad_x, grad_weight.gradient<A>(affine_weight, x_in),
                               grad_bias.gradient<A>(affine_bias, x_in));
    });
}

}  // namespace fused_attn::cpu

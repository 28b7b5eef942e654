// squeeze: one read of x. squeeze_backward: one write of grad_x (and a read of x after a prologue or for ties).
#include "ops.h"
#include "passes.h"

namespace fused_attn::cpu {

std::tuple<Tensor, Tensor, Tensor> squeeze(const Tensor& x_in, const OptionalTensor& affine_weight,
                                           const OptionalTensor& affine_bias, int64_t pre_activation, int64_t pool,
                                           int64_t ties) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x_dense = dense_map(x_in);
        const MapView<T> x(x_dense);
        const int64_t descriptor[2] = {x.batch, x.channels};
        auto make = [&](bool wanted, ScalarType dtype) {
            const int64_t none = 0;
            torch::headeronly::IntHeaderOnlyArrayRef shape(wanted ? descriptor : &none, wanted ? 2 : 1);
            return allocate(shape, dtype);
        };
        Tensor avg = make(pool != kMax, x_in.scalar_type()), max = make(pool != kAvg, x_in.scalar_type());
        Tensor index = make(pool != kAvg, ScalarType::Int);

        const int64_t elements = x.batch * x.sample_size();
        const int64_t pieces = pieces_of(x.batch, x.axis_length(), elements);
        const AffineValues<A> affine(affine_weight, affine_bias);
        Pooling<T> pooling(x, pieces, affine.prologue(pre_activation), pool, ties);
        parallel(x.batch * pieces, elements, [&](int64_t unit) { pooling.run(unit / pieces, unit % pieces); });
        for (int64_t b = 0; b < x.batch; ++b) {
            pooling.merge(b);
            const int64_t row = b * x.channels;
            for (int64_t c = 0; c < x.channels; ++c) {
                if (pool != kMax) static_cast<T*>(avg.data_ptr())[row + c] = static_cast<T>(pooling.mean(b, c));
                if (pool == kAvg) continue;
                static_cast<T*>(max.data_ptr())[row + c] = static_cast<T>(pooling.peak(b)[c]);
                static_cast<int32_t*>(index.data_ptr())[row + c] = pooling.index(b)[c];
            }
        }
        return std::make_tuple(avg, max, index);
    });
}

std::tuple<Tensor, Tensor, Tensor> squeeze_backward(const OptionalTensor& grad_avg, const OptionalTensor& grad_max,
                                                    const Tensor& x_in, const Tensor& max, const Tensor& index_in,
                                                    const OptionalTensor& affine_weight,
                                                    const OptionalTensor& affine_bias, int64_t pre_activation,
                                                    int64_t pool, int64_t ties) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x_dense = dense_map(x_in);
        const MapView<T> x(x_dense);
        Tensor grad_x = empty_map<T>(x_dense);
        const MapView<T> out(grad_x);
        const int64_t channels = x.channels, elements = x.batch * x.sample_size();
        const Values<A> avg_values(grad_avg), max_values(grad_max), peak(max);
        const Tensor index = in_order(index_in);
        const int32_t* tags = static_cast<const int32_t*>(index.data_ptr());

        std::vector<A> mean(x.batch * channels, A(0)), value(x.batch * channels, A(0));
        if (grad_avg)
            for (int64_t i = 0; i < x.batch * channels; ++i)
                mean[i] = avg_values.data()[i] / static_cast<A>(x.positions);
        if (grad_max && ties == kEven)
            share_among_equals(max_values.data(), peak.data(), tags, x.batch * channels, value.data(), mean.data());
        else if (grad_max)
            std::copy_n(max_values.data(), x.batch * channels, value.begin());

        const int64_t pieces = pieces_of(x.batch, x.axis_length(), elements);
        const AffineValues<A> affine(affine_weight, affine_bias);
        const Prologue<A> prologue = affine.prologue(pre_activation);
        const bool wants_affine = affine_weight.has_value();
        PieceValues<double> grad_weight(x, pieces, 0.0, wants_affine), grad_bias = grad_weight;
        parallel(x.batch * pieces, elements, [&](int64_t unit) {
            const int64_t b = unit / pieces, piece = unit % pieces, c = x.first_channel(piece, pieces);
            const int64_t at = x.offset(b, piece, pieces), row = b * channels + c;
            PeakGrad<A> peak_grad;
            if (grad_max) peak_grad = {&value[row], ties == kEven ? peak.data() + row : nullptr, tags + row};
            map_kernels<T>().spread(nullptr, x.data + at, x.panel(piece, pieces), prologue.from(c), nullptr, &mean[row],
                                    peak_grad, out.data + at, wants_affine ? grad_weight.piece(b, piece, c) : nullptr,
                                    wants_affine ? grad_bias.piece(b, piece, c) : nullptr);
        });
        if (wants_affine)
            for (int64_t b = 0; b < x.batch; ++b) grad_weight.merge(b), grad_bias.merge(b);
        auto sum = [&](PieceValues<double>& values) {
            return [&](A* to) { batch_sum(values, x.batch, channels, to); };
        };
        return std::make_tuple(grad_x, gradient_like<A>(affine_weight, x_in, sum(grad_weight)),
                               gradient_like<A>(affine_bias, x_in, sum(grad_bias)));
    });
}

}  // namespace fused_attn::cpu

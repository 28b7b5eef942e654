// The passes of a norm gate that other ops have not. moments: reads x, each part of it twice, the second time from
// cache. norm_dots: reads grad and x (and y or the residual), writes grad_residual where there is a post activation.
// norm_gradients: reads grad and x, writes grad_x.
#include "ops.h"
#include "passes.h"

namespace fused_attn::cpu {
namespace {

// Rows of (count, channels) for one sample, or for all.
template <class A>
Norm<A> norm_of(const Values<A>& norm, int64_t channels, int64_t c) {
    const A* row = norm.data() + c;
    return {row, row + channels, row + 2 * channels};
}

}  // namespace

Tensor moments(const Tensor& x_in) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x_dense = dense_map(x_in);
        const MapView<T> x(x_dense);
        Tensor out = empty_tensor(x_in, {x.batch, 3, x.channels}, kScalarType<A>);
        A* numbers = static_cast<A*>(out.data_ptr());
        const int64_t elements = x.batch * x.sample_size();
        const int64_t pieces = pieces_of(x.batch, x.axis_length(), elements);
        PieceValues<double> mean(x, pieces, 0.0), squares(x, pieces, 0.0);
        parallel_ranges(x.batch, elements, [&](int64_t begin, int64_t end) {
            const int64_t stride = x.channels_last ? 1 : x.positions;
            for (int64_t b = begin; b < end; ++b)
                for (int64_t c = 0; c < x.channels; ++c)
                    numbers[3 * b * x.channels + c] =
                        x.positions > 0 ? static_cast<A>(x.data[b * x.sample_size() + c * stride]) : A(0);
        });
        parallel(x.batch * pieces, elements, [&](int64_t unit) {
            const int64_t b = unit / pieces, piece = unit % pieces, c = x.first_channel(piece, pieces);
            simam_kernels<T>().moments(x.data + x.offset(b, piece, pieces), x.panel(piece, pieces),
                                       numbers + 3 * b * x.channels + c, mean.piece(b, piece, c),
                                       squares.piece(b, piece, c));
        });
        for (int64_t b = 0; b < x.batch; ++b) {
            for (int64_t piece = 1; piece < mean.rows(); ++piece)
                for (int64_t c = 0; c < x.channels; ++c)
                    join_moments(mean.sample(b)[c], squares.sample(b)[c], x.begin(piece, pieces),
                                 *mean.piece(b, piece, c), *squares.piece(b, piece, c),
                                 x.panel(piece, pieces).positions);
            A* rest = numbers + (3 * b + 1) * x.channels;
            for (int64_t c = 0; c < x.channels; ++c) {
                rest[c] = static_cast<A>(mean.sample(b)[c]);
                rest[x.channels + c] = static_cast<A>(squares.sample(b)[c]);
            }
        }
        return out;
    });
}

std::tuple<Tensor, Tensor> norm_dots(const Tensor& grad, const Tensor& x_in, const OptionalTensor& y,
                                     const OptionalTensor& residual, const Tensor& norm_in, const Tensor& gate_in,
                                     int64_t activation, int64_t post_activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x_dense = dense_map(x_in), grad_dense = in_layout_of<T>(x_dense, grad);
        auto in_layout = [&](const OptionalTensor& map) {
            return map ? OptionalTensor(in_layout_of<T>(x_dense, *map)) : map;
        };
        const OptionalTensor y_dense = in_layout(y), residual_dense = in_layout(residual);
        const MapView<T> x(x_dense);
        const bool writes = post_activation != kIdentity;
        Tensor grad_residual = writes ? empty_map<T>(x_dense) : no_tensor(x_in);
        Tensor sums = empty_tensor(x_in, {x.batch, kNormSums, x.channels}, kScalarType<A>);
        const Values<A> norm(norm_in), gate(gate_in);
        const int64_t elements = x.batch * x.sample_size();
        const int64_t pieces = pieces_of(x.batch, x.axis_length(), elements);
        std::vector<PieceValues<double>> totals(kNormSums, PieceValues<double>(x, pieces, 0.0));
        parallel(x.batch * pieces, elements, [&](int64_t unit) {
            const int64_t b = unit / pieces, piece = unit % pieces, c = x.first_channel(piece, pieces);
            const int64_t at = x.offset(b, piece, pieces);
            NormSums to;
            for (int k = 0; k < kNormSums; ++k) to.of[k] = totals[k].piece(b, piece, c);
            norm_kernels<T>().dots(
                static_cast<const T*>(grad_dense.data_ptr()) + at, x.data + at, from(pointer<T>(y_dense), at),
                from(pointer<T>(residual_dense), at), x.panel(piece, pieces), norm_of(norm, x.channels, c),
                gate.data() + b * x.channels + c, static_cast<int>(activation), static_cast<int>(post_activation),
                writes ? static_cast<T*>(grad_residual.data_ptr()) + at : nullptr, to);
        });
        A* out = static_cast<A*>(sums.data_ptr());
        for (int64_t b = 0; b < x.batch; ++b)
            for (int k = 0; k < kNormSums; ++k) {
                totals[k].merge(b);
                const double* total = totals[k].sample(b);
                std::transform(total, total + x.channels, out + (b * kNormSums + k) * x.channels,
                               [](double v) { return static_cast<A>(v); });
            }
        return std::make_tuple(sums, grad_residual);
    });
}

Tensor norm_gradients(const Tensor& grad, const Tensor& x_in, const Tensor& norm_in, const Tensor& factors_in,
                      const Tensor& constants_in, int64_t activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const BackwardMaps<T> maps(grad, x_in, std::nullopt, std::nullopt, kIdentity);
        const MapView<T>& x = maps.x;
        const Values<A> norm(norm_in), factors(factors_in), constants(constants_in);
        const int64_t elements = x.batch * x.sample_size();
        const int64_t pieces = pieces_of(x.batch, x.axis_length(), elements);
        parallel(x.batch * pieces, elements, [&](int64_t unit) {
            const int64_t b = unit / pieces, piece = unit % pieces, c = x.first_channel(piece, pieces);
            const int64_t at = x.offset(b, piece, pieces);
            const A *factor = factors.data() + 2 * b * x.channels + c, *constant = constants.data() + c;
            norm_kernels<T>().spread(maps.grad + at, x.data + at, x.panel(piece, pieces), norm_of(norm, x.channels, c),
                                     {factor, factor + x.channels, constant, constant + x.channels},
                                     static_cast<int>(activation), maps.out + at);
        });
        return maps.grad_x;
    });
}

}  // namespace fused_attn::cpu

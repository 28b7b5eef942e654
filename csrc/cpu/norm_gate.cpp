// The passes of a norm gate. moments: reads x, each part of it twice, the second time from cache. norm_scale: reads x
// (and the residual), writes y, and one bit an element for the backward of a ReLU. norm_dots: reads grad and x (and the
// bits or the residual), writes grad_residual where there is a post activation. norm_gradients: reads grad and x,
// writes grad_x.
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

// Rows of bits, as kernels.h has them: (B, C, bytes) of an NCHW map, (B, positions, bytes) of a channels_last one.
template <class T>
int64_t bytes_a_row(const MapView<T>& x) {
    return row_bytes(x.channels_last ? x.channels : x.positions);
}
template <class T>
int64_t bits_offset(const MapView<T>& x, int64_t b, int64_t piece, int64_t pieces) {
    return (b * x.axis_length() + x.begin(piece, pieces)) * bytes_a_row(x);
}

// y, in x's layout, is written; the bits are returned, of size (0,) where they are not wanted.
template <class T>
Tensor scale_into(const Tensor& y, const Tensor& x_dense, const Tensor& gate_in, const Tensor& norm_in,
                  const OptionalTensor& residual, int64_t activation, int64_t post_activation, bool keep_bits) {
    using A = Accumulator<T>;
    const OptionalTensor residual_dense = residual ? OptionalTensor(in_layout_of<T>(x_dense, *residual)) : residual;
    const MapView<T> x(x_dense);
    const Values<A> norm(norm_in), gate(gate_in);
    Tensor bits = keep_bits ? empty_tensor(x_dense, {x.batch, x.axis_length(), bytes_a_row(x)}, ScalarType::Byte)
                            : empty_tensor(x_dense, {0}, ScalarType::Byte);
    uint8_t* row_bits = keep_bits ? static_cast<uint8_t*>(bits.data_ptr()) : nullptr;
    T* out = static_cast<T*>(y.data_ptr());
    const int64_t elements = x.batch * x.sample_size();
    const int64_t pieces = pieces_of(x.batch, x.axis_length(), elements);
    parallel(x.batch * pieces, elements, [&](int64_t unit) {
        const int64_t b = unit / pieces, piece = unit % pieces, c = x.first_channel(piece, pieces);
        const int64_t at = x.offset(b, piece, pieces);
        norm_kernels<T>().scale(x.data + at, from(pointer<T>(residual_dense), at), x.panel(piece, pieces),
                                norm_of(norm, x.channels, c), gate.data() + b * x.channels + c,
                                static_cast<int>(activation), static_cast<int>(post_activation), out + at,
                                from(row_bits, bits_offset(x, b, piece, pieces)));
    });
    return bits;
}

}  // namespace

std::tuple<Tensor, Tensor> norm_scale(const Tensor& x_in, const Tensor& gate, const Tensor& norm,
                                      const OptionalTensor& residual, int64_t activation, int64_t post_activation,
                                      bool keep_bits) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Tensor x = dense_map(x_in);
        Tensor y = empty_map<T>(x);
        Tensor bits = scale_into<T>(y, x, gate, norm, residual, activation, post_activation, keep_bits);
        return std::make_tuple(y, bits);
    });
}

Tensor norm_scale_into(const Tensor& x_in, const Tensor& gate, const Tensor& norm, const OptionalTensor& residual,
                       const Tensor& y, int64_t activation, int64_t post_activation, bool keep_bits) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        STD_TORCH_CHECK(x_in.is_contiguous() || is_channels_last(x_in), "norm_scale_into: expected a dense x");
        for (int64_t axis = 0; axis < x_in.dim(); ++axis)
            STD_TORCH_CHECK(
                y.size(axis) == x_in.size(axis) && (y.size(axis) == 1 || y.stride(axis) == x_in.stride(axis)),
                "norm_scale_into: expected y in x's layout");
        return scale_into<T>(y, x_in, gate, norm, residual, activation, post_activation, keep_bits);
    });
}

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
            for (int64_t b = begin; b < end; ++b) set_pivots(x, b, 0, x.channels, numbers + 3 * b * x.channels);
        });
        parallel(x.batch * pieces, elements, [&](int64_t unit) {
            const int64_t b = unit / pieces, piece = unit % pieces, c = x.first_channel(piece, pieces);
            simam_kernels<T>().moments(x.data + x.offset(b, piece, pieces), x.panel(piece, pieces),
                                       numbers + 3 * b * x.channels + c, mean.piece(b, piece, c),
                                       squares.piece(b, piece, c));
        });
        for (int64_t b = 0; b < x.batch; ++b) {
            join_pieces(x, b, pieces, 0, x.channels, mean, squares);
            A* rest = numbers + (3 * b + 1) * x.channels;
            for (int64_t c = 0; c < x.channels; ++c) {
                rest[c] = static_cast<A>(mean.sample(b)[c]);
                rest[x.channels + c] = static_cast<A>(squares.sample(b)[c]);
            }
        }
        return out;
    });
}

std::tuple<Tensor, Tensor> norm_dots(const Tensor& grad, const Tensor& x_in, const OptionalTensor& bits,
                                     const OptionalTensor& residual, const Tensor& norm_in, const Tensor& gate_in,
                                     int64_t activation, int64_t post_activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x_dense = dense_map(x_in), grad_dense = in_layout_of<T>(x_dense, grad);
        const OptionalTensor residual_dense = residual ? OptionalTensor(in_layout_of<T>(x_dense, *residual)) : residual;
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
            norm_kernels<T>().dots(static_cast<const T*>(grad_dense.data_ptr()) + at, x.data + at,
                                   from(pointer<const uint8_t>(bits), bits_offset(x, b, piece, pieces)),
                                   from(pointer<T>(residual_dense), at), x.panel(piece, pieces),
                                   norm_of(norm, x.channels, c), gate.data() + b * x.channels + c,
                                   static_cast<int>(activation), static_cast<int>(post_activation),
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

// The passes of a norm gate. moments: reads x, each part of it twice, the second time from cache. norm_scale: reads x
// (and the residual), writes y, and one bit an element for the backward of a ReLU. norm_dots: reads grad and x (and the
// bits or the residual), writes grad_residual where there is a post activation. norm_gradients: reads grad and x,
// writes grad_x. What lies between them, norm_coefficients and norm_factors, is numbers a channel of each sample: no
// map. norm_running: the coefficients where the statistics are the running ones.
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

// Rows of gates for one sample; of ones where there is no gate.
template <class A>
class Gates {
  public:
    Gates(const OptionalTensor& gate, int64_t channels)
        : given_(gate), ones_(gate ? 0 : channels, A(1)), step_(gate ? channels : 0) {}
    const A* of(int64_t sample) const { return step_ ? given_.data() + sample * step_ : ones_.data(); }

  private:
    Values<A> given_;
    std::vector<A> ones_;
    int64_t step_;
};

// x's sizes, which are all that is taken of it where only numbers a channel are read.
struct Sizes {
    int64_t batch, channels, positions = 1;
    explicit Sizes(const Tensor& x) : batch(x.size(0)), channels(x.size(1)) {
        for (int64_t axis = 2; axis < x.dim(); ++axis) positions *= x.size(axis);
    }
    double count() const { return static_cast<double>(batch * positions); }  // values a channel
};

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
Tensor scale_into(const Tensor& y, const Tensor& x_dense, const OptionalTensor& gate_in, const Tensor& norm_in,
                  const OptionalTensor& residual, int64_t activation, int64_t post_activation, bool keep_bits) {
    using A = Accumulator<T>;
    const OptionalTensor residual_dense = residual ? OptionalTensor(in_layout_of<T>(x_dense, *residual)) : residual;
    const MapView<T> x(x_dense);
    const Values<A> norm(norm_in);
    const Gates<A> gate(gate_in, x.channels);
    Tensor bits = keep_bits ? empty_tensor({x.batch, x.axis_length(), bytes_a_row(x)}, ScalarType::Byte)
                            : empty_tensor({0}, ScalarType::Byte);
    uint8_t* row_bits = keep_bits ? static_cast<uint8_t*>(bits.data_ptr()) : nullptr;
    T* out = static_cast<T*>(y.data_ptr());
    const int64_t elements = x.batch * x.sample_size();
    const int64_t pieces = pieces_of(x.batch, x.axis_length(), elements);
    parallel(x.batch * pieces, elements, [&](int64_t unit) {
        const int64_t b = unit / pieces, piece = unit % pieces, c = x.first_channel(piece, pieces);
        const int64_t at = x.offset(b, piece, pieces);
        norm_kernels<T>().scale(x.data + at, from(pointer<T>(residual_dense), at), x.panel(piece, pieces),
                                norm_of(norm, x.channels, c), gate.of(b) + c, static_cast<int>(activation),
                                static_cast<int>(post_activation), out + at,
                                from(row_bits, bits_offset(x, b, piece, pieces)));
    });
    return bits;
}

}  // namespace

std::tuple<Tensor, Tensor> norm_scale(const Tensor& x_in, const OptionalTensor& gate, const Tensor& norm,
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

Tensor norm_scale_into(const Tensor& x_in, const OptionalTensor& gate, const Tensor& norm,
                       const OptionalTensor& residual, const Tensor& y, int64_t activation, int64_t post_activation,
                       bool keep_bits) {
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
        Tensor out = empty_tensor({x.batch, 3, x.channels}, kScalarType<A>);
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

std::tuple<Tensor, Tensor, Tensor> norm_coefficients(const Tensor& x_in, const Tensor& moments_in,
                                                     const OptionalTensor& weight_in, const OptionalTensor& bias_in,
                                                     double eps, bool wants_descriptor) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Sizes x(x_in);
        const int64_t channels = x.channels;
        const Values<A> moments(moments_in), weight(weight_in), bias(bias_in);
        Tensor norm = empty_tensor({4, channels}, kScalarType<A>);
        Tensor unbiased = empty_tensor({channels}, kScalarType<A>);
        Tensor descriptor = wants_descriptor ? empty_tensor({x.batch, channels}, x_in.scalar_type()) : no_tensor(x_in);
        A *rows = static_cast<A*>(norm.data_ptr()), *variances = static_cast<A*>(unbiased.data_ptr());
        T* descriptors = static_cast<T*>(descriptor.data_ptr());
        parallel_ranges(channels, 3 * x.batch * channels, [&](int64_t begin, int64_t end) {
            const int64_t n = end - begin;
            const A* first = moments.data() + begin;  // the first sample's pivots
            // Of a sample's mean, from the first pivot: exact however large the mean is.
            auto offset = [=](int64_t b, int64_t c) {
                const A* of_sample = first + 3 * b * channels + c;
                return (double(of_sample[0]) - double(first[c])) + double(of_sample[channels]);
            };
            std::vector<double> numbers(2 * n, 0.0);
            double *middle = numbers.data(), *total = middle + n;
            for (int64_t b = 0; b < x.batch; ++b)
                for (int64_t c = 0; c < n; ++c) middle[c] += offset(b, c);
            for (int64_t c = 0; c < n; ++c) middle[c] /= static_cast<double>(x.batch);
            for (int64_t b = 0; b < x.batch; ++b)
                for (int64_t c = 0; c < n; ++c) {
                    const double distance = offset(b, c) - middle[c];
                    total[c] += double(first[(3 * b + 2) * channels + c]) + double(x.positions) * distance * distance;
                }
            A *a = rows + begin, *shift = a + channels, *mean = shift + channels, *rstd = mean + channels;
            for (int64_t c = 0; c < n; ++c) {
                const double variance = total[c] / x.count(),
                             centre = double(x.batch > 0 ? first[c] : A(0)) + middle[c];
                variances[begin + c] = static_cast<A>(variance * (x.count() / (x.count() - 1)));
                const double scale = 1 / std::sqrt(variance + eps);
                rstd[c] = static_cast<A>(scale);
                mean[c] = static_cast<A>(centre);
                a[c] = static_cast<A>(weight.data() ? double(weight.data()[begin + c]) * scale : scale);
                // Of the a that the map is multiplied with, so that a large mean cancels.
                shift[c] = static_cast<A>((bias.data() ? double(bias.data()[begin + c]) : 0.0) - centre * double(a[c]));
            }
            if (!wants_descriptor) return;
            for (int64_t b = 0; b < x.batch; ++b)
                for (int64_t c = 0; c < n; ++c)
                    descriptors[b * channels + begin + c] =
                        static_cast<T>(static_cast<A>(double(a[c]) * (offset(b, c) - middle[c]) +
                                                      (bias.data() ? double(bias.data()[begin + c]) : 0.0)));
        });
        return std::make_tuple(norm, unbiased, descriptor);
    });
}

Tensor norm_running(const OptionalTensor& weight_in, const OptionalTensor& bias_in, const Tensor& mean_in,
                    const Tensor& var_in, double eps) {
    return dispatch(mean_in, [&](auto* type) {
        using A = Accumulator<std::remove_pointer_t<decltype(type)>>;
        const int64_t channels = mean_in.numel();
        for (const OptionalTensor& other : {OptionalTensor(var_in), weight_in, bias_in})
            STD_TORCH_CHECK(!other || other->numel() == channels, "norm_running: expected as many values in each");
        const Values<A> weight(weight_in), bias(bias_in), means(mean_in), variances(var_in);
        Tensor norm = empty_tensor({4, channels}, kScalarType<A>);
        A *a = static_cast<A*>(norm.data_ptr()), *shift = a + channels, *mean = shift + channels,
          *rstd = mean + channels;
        for (int64_t c = 0; c < channels; ++c) {
            const double scale = 1 / std::sqrt(double(variances.data()[c]) + eps);
            rstd[c] = static_cast<A>(scale);
            mean[c] = means.data()[c];
            a[c] = static_cast<A>(weight.data() ? double(weight.data()[c]) * scale : scale);
            shift[c] = static_cast<A>((bias.data() ? double(bias.data()[c]) : 0.0) - double(mean[c]) * double(a[c]));
        }
        return norm;
    });
}

std::tuple<Tensor, Tensor> norm_dots(const Tensor& grad, const Tensor& x_in, const OptionalTensor& bits,
                                     const OptionalTensor& residual, const Tensor& norm_in,
                                     const OptionalTensor& gate_in, int64_t activation, int64_t post_activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x_dense = dense_map(x_in), grad_dense = in_layout_of<T>(x_dense, grad);
        const OptionalTensor residual_dense = residual ? OptionalTensor(in_layout_of<T>(x_dense, *residual)) : residual;
        const MapView<T> x(x_dense);
        const bool writes = post_activation != kIdentity;
        Tensor grad_residual = writes ? empty_map<T>(x_dense) : no_tensor(x_in);
        Tensor sums = empty_tensor({x.batch, kNormSums + 1, x.channels}, kScalarType<A>);
        const Values<A> norm(norm_in);
        const Gates<A> gate(gate_in, x.channels);
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
                                   norm_of(norm, x.channels, c), gate.of(b) + c, static_cast<int>(activation),
                                   static_cast<int>(post_activation),
                                   writes ? static_cast<T*>(grad_residual.data_ptr()) + at : nullptr, to);
        });
        A* out = static_cast<A*>(sums.data_ptr());
        for (int64_t b = 0; b < x.batch; ++b) {
            for (int k = 0; k < kNormSums; ++k) {
                totals[k].merge(b);
                const double* total = totals[k].sample(b);
                out = std::transform(total, total + x.channels, out, [](double v) { return static_cast<A>(v); });
            }
            out = std::copy_n(gate.of(b), x.channels, out);
        }
        return std::make_tuple(sums, grad_residual);
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> norm_factors(const Tensor& x_in, const Tensor& sums_in,
                                                        const OptionalTensor& grad_s_in, const Tensor& norm_in,
                                                        bool of_batch) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Sizes x(x_in);
        const int64_t channels = x.channels;
        const Values<A> sums(sums_in), grad_s(grad_s_in), norm(norm_in);
        Tensor grad_weight = empty_tensor({channels}, kScalarType<A>);
        Tensor grad_bias = empty_tensor({channels}, kScalarType<A>);
        Tensor factors = empty_tensor({x.batch, 2, channels}, kScalarType<A>);
        Tensor constants = empty_tensor({2, channels}, kScalarType<A>);
        A *to_weight = static_cast<A*>(grad_weight.data_ptr()), *to_bias = static_cast<A*>(grad_bias.data_ptr());
        A *factor = static_cast<A*>(factors.data_ptr()), *constant = static_cast<A*>(constants.data_ptr());
        parallel_ranges(channels, (kNormSums + 3) * x.batch * channels, [&](int64_t begin, int64_t end) {
            const int64_t n = end - begin;
            const A *a = norm.data() + begin, *rstd = a + 3 * channels;
            std::vector<double> numbers(2 * n, 0.0);
            double *of_dv = numbers.data(), *of_centred = of_dv + n;
            for (int64_t b = 0; b < x.batch; ++b) {
                const A* h = sums.data() + (b * (kNormSums + 1) + 1) * channels + begin;
                const A *h_c = h + channels, *slope = h_c + channels, *slope_c = slope + channels;
                const A *gate = slope_c + channels, *of_s = from(grad_s.data(), b * channels + begin);
                A *of_grad = factor + 2 * b * channels + begin, *of_slope = of_grad + channels;
                for (int64_t c = 0; c < n; ++c) {
                    const double pooled = of_s ? double(of_s[c]) / static_cast<double>(x.positions) : 0.0;
                    of_dv[c] += double(gate[c]) * double(h[c]) + pooled * double(slope[c]);
                    of_centred[c] += double(gate[c]) * double(h_c[c]) + pooled * double(slope_c[c]);
                    of_grad[c] = a[c] * gate[c];
                    of_slope[c] = static_cast<A>(double(a[c]) * pooled);
                }
            }
            for (int64_t c = 0; c < n; ++c) {
                const double scale = of_batch ? -double(a[c]) / x.count() : 0.0,
                             centred = double(rstd[c]) * of_centred[c];
                to_bias[begin + c] = static_cast<A>(of_dv[c]);
                to_weight[begin + c] = static_cast<A>(centred);
                constant[begin + c] = of_batch ? static_cast<A>(scale * of_dv[c]) : A(0);
                constant[channels + begin + c] = of_batch ? static_cast<A>(scale * double(rstd[c]) * centred) : A(0);
            }
        });
        return std::make_tuple(grad_weight, grad_bias, factors, constants);
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

// channel_gate: reads x twice and writes y; backward reads grad twice and x once and writes grad_x. A thread
// takes whole samples (a few at a time where the weights are large, so that a weight is read once for them),
// and a sample's second read comes right after its first, from cache. Too few samples: pieces, phase by phase.
#include "excitation.h"
#include "ops.h"
#include "passes.h"

namespace fused_attn::cpu {
namespace {

// Samples that share one read of the weights: none where the weights stay in cache anyway.
template <class A>
int64_t group_size(const Excitation<A>& excitation, int64_t batch, int64_t sample_bytes) {
    const int64_t weight_bytes = excitation.weight_count() * sizeof(A);
    if (weight_bytes <= 128 << 10) return 1;
    const int64_t threads = torch::stable::get_num_threads();
    const int64_t wanted = 4 * weight_bytes / std::max<int64_t>(1, sample_bytes) + 1;
    return std::clamp<int64_t>(wanted, 1, std::max<int64_t>(1, batch / threads));
}

template <class A>
void gate_values(const A* logits, int64_t n, int64_t gate, A* out) {
    dense_kernels<A>().activate(logits, n, static_cast<int>(gate), out);
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> channel_gate(const Tensor& x_in, const OptionalTensor& weight1,
                                                const OptionalTensor& bias1, const OptionalTensor& weight2,
                                                const OptionalTensor& bias2, const OptionalTensor& affine_weight,
                                                const OptionalTensor& affine_bias, const OptionalTensor& residual,
                                                int64_t layer, int64_t pool, int64_t ties, int64_t activation,
                                                int64_t gate, int64_t pre_activation, int64_t post_activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Tensor x_dense = dense_map(x_in);
        const MapView<T> x(x_dense);
        const OptionalTensor added = residual ? OptionalTensor(in_layout_of<T>(x_dense, *residual)) : residual;
        const T* from = pointer<T>(added);
        Tensor y = empty_map<T>(x_dense);
        const MapView<T> out(y);
        const int64_t channels = x.channels, elements = x.batch * x.sample_size();
        const Excitation<A> excitation(channels, weight1, bias1, weight2, bias2, layer, activation);
        const AffineValues<A> affine(affine_weight, affine_bias);
        const Prologue<A> prologue = affine.prologue(pre_activation);

        const bool keeps_peak = pool != kAvg && ties == kEven;
        const int64_t width = 2 * channels + excitation.hidden() + (keeps_peak ? channels : 0);
        const int64_t state_shape[2] = {x.batch, width}, index_shape[2] = {x.batch, channels}, none = 0;
        Tensor state = torch::stable::empty({state_shape, 2}, sizeof(A) == 8 ? ScalarType::Double : ScalarType::Float,
                                            std::nullopt, x_in.device());
        Tensor index = torch::stable::empty({pool == kAvg ? &none : index_shape, pool == kAvg ? 1u : 2u},
                                            ScalarType::Int, std::nullopt, x_in.device());
        A* rows = static_cast<A*>(state.data_ptr());
        int32_t* tags = static_cast<int32_t*>(index.data_ptr());

        const int64_t pieces = pieces_of(x.batch, x.axis_length(), elements);
        Pooling<T> pooling(x, pieces, prologue, pool, ties);
        std::vector<A> gates(std::max<int64_t>(1, x.batch * channels));
        auto excite = [&](int64_t first, int64_t samples) {
            for (int64_t b = first; b < first + samples; ++b) {
                pooling.merge(b);
                A* row = rows + b * width;
                for (int64_t c = 0; c < channels; ++c) {
                    if (pool == kAvg)
                        row[c] = pooling.mean(b, c);
                    else
                        row[c] = pool == kMax ? pooling.peak(b)[c]
                                              : A(0.5) * pooling.mean(b, c) + A(0.5) * pooling.peak(b)[c];
                }
                if (pool != kAvg) std::copy_n(pooling.index(b), channels, tags + b * channels);
                if (keeps_peak) std::copy_n(pooling.peak(b), channels, row + width - channels);
            }
            excitation.forward(samples, rows + first * width, width);
            for (int64_t b = first; b < first + samples; ++b)
                gate_values(rows + b * width + channels, channels, gate, &gates[b * channels]);
        };
        auto apply = [&](int64_t b, int64_t piece) {
            const int64_t c = x.first_channel(piece, pieces), at = x.offset(b, piece, pieces);
            map_kernels<T>().scale(x.data + at, from ? from + at : nullptr, x.panel(piece, pieces), prologue.from(c),
                                   &gates[b * channels + c], static_cast<int>(post_activation), out.data + at);
        };
        if (pieces == 1) {
            const int64_t group = group_size(excitation, x.batch, x.sample_size() * int64_t(sizeof(T)));
            parallel((x.batch + group - 1) / group, elements, [&](int64_t unit) {
                const int64_t first = unit * group, last = std::min(x.batch, first + group);
                for (int64_t b = first; b < last; ++b) pooling.run(b, 0);
                excite(first, last - first);
                for (int64_t b = last; b-- > first;) apply(b, 0);  // the last sample pooled is still in cache
            });
        } else {
            const int64_t units = x.batch * pieces;
            parallel(units, elements, [&](int64_t unit) { pooling.run(unit / pieces, unit % pieces); });
            excite(0, x.batch);
            parallel(units, elements, [&](int64_t unit) { apply(unit / pieces, unit % pieces); });
        }
        return std::make_tuple(y, state, index);
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
        const int64_t channels = x.channels, pieces = pass.pieces, elements = x.batch * x.sample_size();
        const Excitation<A> excitation(channels, weight1, bias1, weight2, bias2, layer, activation);
        const int64_t width = state.size(1), hidden = excitation.hidden();
        const A* rows = static_cast<const A*>(state.data_ptr());
        const int32_t* tags = static_cast<const int32_t*>(index.data_ptr());

        const int64_t descriptors = std::max<int64_t>(1, x.batch * channels);
        std::vector<A> gates(descriptors), grad_logits(descriptors), grad_descriptor(descriptors), mean(descriptors);
        std::vector<A> value(pool == kAvg ? 0 : descriptors), grad_hidden(std::max<int64_t>(1, x.batch * hidden));
        pass.gates = gates.data();
        auto open = [&](int64_t b) { gate_values(rows + b * width + channels, channels, gate, &gates[b * channels]); };
        auto excite = [&](int64_t first, int64_t samples) {
            for (int64_t b = first; b < first + samples; ++b) {
                pass.dots.merge(b);
                A* row = &grad_logits[b * channels];
                std::transform(pass.dots.sample(b), pass.dots.sample(b) + channels, row,
                               [](double v) { return static_cast<A>(v); });
                dense_kernels<A>().activate_grad(row, rows + b * width + channels, channels, static_cast<int>(gate),
                                                 row);
            }
            excitation.backward(samples, rows + first * width, width, &grad_logits[first * channels],
                                &grad_hidden[first * hidden], &grad_descriptor[first * channels]);
            const A share = pool == kAvgMax ? A(0.5) : A(1);
            for (int64_t b = first; b < first + samples; ++b) {
                const int64_t row = b * channels;
                for (int64_t c = 0; c < channels; ++c)
                    mean[row + c] = pool == kMax ? A(0) : share * grad_descriptor[row + c] / A(x.positions);
                if (pool == kAvg) continue;
                for (int64_t c = 0; c < channels; ++c) value[row + c] = share * grad_descriptor[row + c];
                if (ties == kEven)
                    share_among_equals(&value[row], rows + (b + 1) * width - channels, tags + row, channels,
                                       &value[row], &mean[row]);
            }
        };
        auto spread = [&](int64_t b, int64_t piece) {
            PeakGrad<A> peak;
            if (pool != kAvg)
                peak = {&value[b * channels], ties == kEven ? rows + (b + 1) * width - channels : nullptr,
                        tags + b * channels};
            pass.spread(b, piece, &mean[b * channels], peak);
        };
        if (pieces == 1) {
            const int64_t group = group_size(excitation, x.batch, 2 * x.sample_size() * int64_t(sizeof(T)));
            parallel((x.batch + group - 1) / group, elements, [&](int64_t unit) {
                const int64_t first = unit * group, last = std::min(x.batch, first + group);
                for (int64_t b = first; b < last; ++b) open(b), pass.dot(b, 0);
                excite(first, last - first);
                for (int64_t b = last; b-- > first;) spread(b, 0);
            });
        } else {
            const int64_t units = x.batch * pieces;
            for (int64_t b = 0; b < x.batch; ++b) open(b);
            parallel(units, elements, [&](int64_t unit) { pass.dot(unit / pieces, unit % pieces); });
            excite(0, x.batch);
            parallel(units, elements, [&](int64_t unit) { spread(unit / pieces, unit % pieces); });
        }
        auto [grad_weight, grad_bias] = pass.affine_grads();
        const auto grads =
            excitation.weight_gradients(x_in, x.batch, rows, width, grad_logits.data(), grad_hidden.data());
        return std::make_tuple(pass.grad_x, pass.grad_residual, grads[0], grads[1], grads[2], grads[3], grad_weight,
                               grad_bias);
    });
}

}  // namespace fused_attn::cpu

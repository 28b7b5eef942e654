// scale: reads x (and the residual), writes y. scale_backward: reads grad and x (and y or the residual), then
// grad (or what the first pass wrote for the epilogue) again, and writes grad_x; the second read of a sample
// comes right after the first, from cache. The gate is (B, C), or (B, 1, *spatial): one a position.
#include "ops.h"
#include "space.h"

namespace fused_attn::cpu {
namespace {

template <class T>
Tensor scale_space(const Tensor& x_in, const Tensor& gate, const OptionalTensor& affine_weight,
                   const OptionalTensor& affine_bias, const OptionalTensor& residual, int64_t pre_activation,
                   int64_t post_activation) {
    using A = Accumulator<T>;
    const ForwardMaps<T> maps(x_in, residual);
    const MapView<T>& x = maps.x;
    const Values<A> gates(gate);
    const AffineValues<A> affine(affine_weight, affine_bias);
    const int64_t pieces = space_pieces(x);
    parallel(x.batch * pieces, x.batch * x.sample_size(), [&](int64_t unit) {
        const int64_t b = unit / pieces, piece = unit % pieces, at = x.space_offset(b, piece, pieces);
        space_kernels<T>().scale(x.data + at, from(maps.residual, at), x.space(piece, pieces),
                                 affine.prologue(pre_activation), nullptr,
                                 gates.data() + b * x.positions + x.first_position(piece, pieces),
                                 static_cast<int>(post_activation), maps.out + at);
    });
    return maps.y;
}

template <class T>
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scale_space_backward(
    const Tensor& grad, const Tensor& x_in, const OptionalTensor& y, const Tensor& gate,
    const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, const OptionalTensor& residual,
    int64_t pre_activation, int64_t post_activation) {
    using A = Accumulator<T>;
    const BackwardMaps<T> maps(grad, x_in, y, residual, post_activation);
    const MapView<T>& x = maps.x;
    const int64_t pieces = space_pieces(x);
    const Values<A> gates(gate);
    const AffineValues<A> affine(affine_weight, affine_bias);
    const Prologue<A> prologue = affine.prologue(pre_activation);
    const bool wants_affine = affine_weight.has_value();
    ChannelSums grad_weight(x.batch, pieces, x.channels, wants_affine), grad_bias = grad_weight;
    std::vector<A> grad_gate(std::max<int64_t>(1, x.batch * x.positions));
    const std::vector<A> nothing(x.positions, A(0));  // no pool passes anything on
    const std::vector<int32_t> nowhere(x.positions, 0);
    parallel(x.batch * pieces, x.batch * x.sample_size(), [&](int64_t unit) {
        const int64_t b = unit / pieces, piece = unit % pieces, at = x.space_offset(b, piece, pieces);
        const int64_t first = b * x.positions + x.first_position(piece, pieces);
        const Panel panel = x.space(piece, pieces);
        space_kernels<T>().dot(maps.grad + at, x.data + at, from(maps.y, at), from(maps.residual, at), panel, prologue,
                               nullptr, gates.data() + first, static_cast<int>(post_activation),
                               from(maps.epilogue, at), &grad_gate[first], nullptr);
        space_kernels<T>().spread(maps.before_gate() + at, x.data + at, panel, prologue, nullptr, gates.data() + first,
                                  {nothing.data(), {nothing.data(), nullptr, nowhere.data()}}, {}, maps.out + at,
                                  grad_weight.piece(b, piece), grad_bias.piece(b, piece));
    });
    Tensor gate_out = contiguous_like(gate);
    write_values<A>(grad_gate.data(), gate_out);
    return std::make_tuple(maps.grad_x, gate_out, maps.grad_residual, grad_weight.gradient<A>(affine_weight, x_in),
                           grad_bias.gradient<A>(affine_bias, x_in));
}

}  // namespace

Tensor scale(const Tensor& x_in, const Tensor& gate, const OptionalTensor& affine_weight,
             const OptionalTensor& affine_bias, const OptionalTensor& residual, int64_t pre_activation,
             int64_t post_activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        if (gate.dim() > 2)
            return scale_space<T>(x_in, gate, affine_weight, affine_bias, residual, pre_activation, post_activation);
        const ForwardMaps<T> maps(x_in, residual);
        const MapView<T>& x = maps.x;
        const Values<A> gates(gate);
        const AffineValues<A> affine(affine_weight, affine_bias);
        const Prologue<A> prologue = affine.prologue(pre_activation);
        const int64_t elements = x.batch * x.sample_size();
        const int64_t pieces = pieces_of(x.batch, x.axis_length(), elements);
        parallel(x.batch * pieces, elements, [&](int64_t unit) {
            const int64_t b = unit / pieces, piece = unit % pieces, c = x.first_channel(piece, pieces);
            const int64_t at = x.offset(b, piece, pieces);
            map_kernels<T>().scale(x.data + at, from(maps.residual, at), x.panel(piece, pieces), prologue.from(c),
                                   gates.data() + b * x.channels + c, static_cast<int>(post_activation), maps.out + at);
        });
        return maps.y;
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> scale_backward(const Tensor& grad, const Tensor& x_in,
                                                                  const OptionalTensor& y, const Tensor& gate,
                                                                  const OptionalTensor& affine_weight,
                                                                  const OptionalTensor& affine_bias,
                                                                  const OptionalTensor& residual,
                                                                  int64_t pre_activation, int64_t post_activation) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        if (gate.dim() > 2)
            return scale_space_backward<T>(grad, x_in, y, gate, affine_weight, affine_bias, residual, pre_activation,
                                           post_activation);
        Backward<T> pass(grad, x_in, y, residual, affine_weight, affine_bias, pre_activation, post_activation);
        const MapView<T>& x = pass.x;
        const int64_t channels = x.channels, pieces = pass.pieces;
        const Values<A> gates(gate);
        pass.gates = gates.data();
        parallel(x.batch * pieces, x.batch * x.sample_size(), [&](int64_t unit) {
            pass.dot(unit / pieces, unit % pieces);
            pass.spread(unit / pieces, unit % pieces, pieces, nullptr, {});
        });
        for (int64_t b = 0; b < x.batch; ++b) pass.dots.merge(b);
        std::vector<A> grad_gate(std::max<int64_t>(1, x.batch * channels));
        for (int64_t b = 0; b < x.batch; ++b)
            std::transform(pass.dots.sample(b), pass.dots.sample(b) + channels, &grad_gate[b * channels],
                           [](double v) { return static_cast<A>(v); });
        Tensor gate_out = contiguous_like(gate);
        write_values<A>(grad_gate.data(), gate_out);
        auto [grad_weight, grad_bias] = pass.affine_grads();
        return std::make_tuple(pass.maps.grad_x, gate_out, pass.maps.grad_residual, grad_weight, grad_bias);
    });
}

}  // namespace fused_attn::cpu

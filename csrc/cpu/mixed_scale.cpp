// mixed_scale: reads x, writes y; backward reads grad and x, writes grad_x, and sums up all gates' gradients in the
// same pass. A thread takes whole samples; too few samples: channels of an NCHW map or rows of a channels_last one, and
// what goes over all of those is added up in order.
#include "ops.h"
#include "passes.h"

namespace fused_attn::cpu {
namespace {

// A gate of rows or columns, (B, C, n) with an axis of size 1, as the kernels read it: (B, C, n) or, for a
// channels_last map, (B, n, C).
template <class A>
class Strip {
  public:
    Strip(const OptionalTensor& gate, bool channels_last) {
        if (!gate) return;
        batch_ = gate->size(0), channels_ = gate->size(1), length_ = gate->size(2) * gate->size(3);
        const int64_t axis = gate->size(2) == 1 ? 3 : 2;
        const int64_t strides[3] = {gate->stride(0), gate->stride(1), gate->stride(axis)};
        outer_ = channels_last ? length_ : channels_, inner_ = channels_last ? channels_ : length_;
        outer_stride_ = strides[channels_last ? 2 : 1], inner_stride_ = strides[channels_last ? 1 : 2];
        const bool in_place = (inner_ == 1 || inner_stride_ == 1) && (outer_ == 1 || outer_stride_ == inner_) &&
                              (batch_ == 1 || strides[0] == outer_ * inner_);
        kept_ = gate;
        if (gate->scalar_type() == ScalarType::Double)
            read<double>(strides[0], in_place);
        else if (gate->scalar_type() == ScalarType::Half)
            read<Half>(strides[0], in_place);
        else if (gate->scalar_type() == ScalarType::BFloat16)
            read<BFloat16>(strides[0], in_place);
        else
            read<float>(strides[0], in_place);
    }
    const A* data() const { return data_; }

  private:
    template <class P>
    void read(int64_t batch_stride, bool in_place) {
        const P* from = static_cast<const P*>(kept_->data_ptr());
        if constexpr (std::is_same_v<P, A>) {
            if (in_place) {
                data_ = from;
                return;
            }
        }
        values_.resize(std::max<int64_t>(1, batch_ * outer_ * inner_));
        A* to = values_.data();
        for (int64_t b = 0; b < batch_; ++b)
            for (int64_t i = 0; i < outer_; ++i)
                for (int64_t j = 0; j < inner_; ++j)
                    *to++ = static_cast<A>(from[b * batch_stride + i * outer_stride_ + j * inner_stride_]);
        data_ = values_.data();
    }
    OptionalTensor kept_;
    int64_t batch_ = 0, channels_ = 0, length_ = 0, outer_ = 0, inner_ = 0, outer_stride_ = 0, inner_stride_ = 0;
    std::vector<A> values_;
    const A* data_ = nullptr;
};

// The four gates of x, and how x is cut: pieces are channels (NCHW) or rows (channels_last). Without gates of rows and
// columns every position is a row.
template <class T>
class Gates {
  public:
    using A = Accumulator<T>;
    Gates(const Tensor& x_in, const MapView<T>& x, const OptionalTensor& channel, const OptionalTensor& spatial,
          const OptionalTensor& rows, const OptionalTensor& columns, int64_t combine)
        : height(rows || columns ? x_in.size(2) : x.positions),
          width(rows || columns ? x_in.size(3) : 1),
          pieces(pieces_of(x.batch, std::min<int64_t>(x.channels_last ? height : x.channels, columns ? 8 : 32),
                           x.batch * x.sample_size())),
          x_(x),
          channel_(channel),
          spatial_(spatial),
          rows_(rows, x.channels_last),
          columns_(columns, x.channels_last),
          combine_(static_cast<int>(combine)) {}

    const int64_t height, width, pieces;

    struct Part {
        int64_t at, channel, position;  // offset in the map, and the first of each
        Panel panel;
        MixedGates<A> gates;
    };
    Part part(int64_t b, int64_t piece) const {
        const int64_t first = begin(piece), n = begin(piece + 1) - first, last = x_.channels_last;
        const int64_t c = last ? 0 : first, h = last ? first : 0, p = h * width;
        const Panel panel = last ? Panel{x_.channels, n * width, true} : Panel{n, x_.positions, false};
        const MixedGates<A> gates = {from(channel_.data(), b * x_.channels + c),
                                     from(spatial_.data(), b * x_.positions + p),
                                     from(rows_.data(), row(b, c, h)),
                                     from(columns_.data(), column(b, c)),
                                     combine_,
                                     last ? n : height,
                                     width};
        return {b * x_.sample_size() + (last ? p * x_.channels : c * x_.positions), c, p, panel, gates};
    }
    int64_t row(int64_t b, int64_t c, int64_t h) const { return (b * height + h) * x_.channels + c * height; }
    int64_t column(int64_t b, int64_t c) const { return (b * x_.channels + c) * width; }

  private:
    int64_t begin(int64_t piece) const { return (x_.channels_last ? height : x_.channels) * piece / pieces; }

    MapView<T> x_;
    Values<A> channel_, spatial_;
    Strip<A> rows_, columns_;
    int combine_;
};

// A gate's gradient: written by pieces each to its own part of it, or to `parts` copies of a sample's that are then
// added up in order. With `swapped` a sample's numbers are (length, channels) where the gate has (channels, length).
template <class A>
class GateGrad {
  public:
    GateGrad(const OptionalTensor& gate, const Tensor& x, int64_t batch, int64_t parts, bool swapped)
        : out_(gate ? contiguous_like(*gate) : no_tensor(x)), wanted_(gate.has_value()), parts_(parts) {
        if (!wanted_ || out_.numel() == 0) return;
        numbers_ = out_.numel() / batch, batch_ = batch;
        channels_ = swapped ? out_.size(1) : numbers_;
        in_place_ = out_.scalar_type() == kScalarType<A> && parts == 1 && channels_ == numbers_;
        if (!in_place_) room_.resize(batch * parts * numbers_);
        data_ = in_place_ ? static_cast<A*>(out_.data_ptr()) : room_.data();
    }
    // Where a piece of sample b writes; `at`: its first number's place in the sample.
    A* piece(int64_t b, int64_t piece, int64_t at) {
        return data_ ? data_ + (b * parts_ + (parts_ > 1 ? piece : 0)) * numbers_ + at : nullptr;
    }
    Tensor finish() {
        if (in_place_ || !data_) return out_;
        std::vector<A> values(batch_ * numbers_);
        const int64_t length = numbers_ / channels_;
        parallel(batch_, batch_ * parts_ * numbers_, [&](int64_t b) {
            for (int64_t i = 0; i < numbers_; ++i) {
                double total = data_[b * parts_ * numbers_ + i];
                for (int64_t part = 1; part < parts_; ++part) total += data_[(b * parts_ + part) * numbers_ + i];
                values[b * numbers_ + i % channels_ * length + i / channels_] = static_cast<A>(total);
            }
        });
        write_values<A>(values.data(), out_);
        return out_;
    }

  private:
    Tensor out_;
    bool wanted_, in_place_ = false;
    int64_t parts_, numbers_ = 0, batch_ = 0, channels_ = 0;
    std::vector<A> room_;
    A* data_ = nullptr;
};

}  // namespace

Tensor mixed_scale(const Tensor& x_in, const OptionalTensor& channel, const OptionalTensor& spatial,
                   const OptionalTensor& rows, const OptionalTensor& columns, int64_t combine) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const ForwardMaps<T> maps(x_in, std::nullopt);
        const MapView<T>& x = maps.x;
        const Gates<T> gates(x_in, x, channel, spatial, rows, columns, combine);
        parallel(x.batch * gates.pieces, x.batch * x.sample_size(), [&](int64_t unit) {
            const auto part = gates.part(unit / gates.pieces, unit % gates.pieces);
            mix_kernels<T>().scale(x.data + part.at, part.panel, part.gates, maps.out + part.at);
        });
        return maps.y;
    });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> mixed_scale_backward(
    const Tensor& grad, const Tensor& x_in, const OptionalTensor& channel, const OptionalTensor& spatial,
    const OptionalTensor& rows, const OptionalTensor& columns, int64_t combine) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const BackwardMaps<T> maps(grad, x_in, std::nullopt, std::nullopt, kIdentity);
        const MapView<T>& x = maps.x;
        const Gates<T> gates(x_in, x, channel, spatial, rows, columns, combine);
        const bool last = x.channels_last;
        const int64_t over_rows = last ? gates.pieces : 1, over_channels = last ? 1 : gates.pieces;
        GateGrad<A> to_channel(channel, x_in, x.batch, over_rows, false);
        GateGrad<A> to_spatial(spatial, x_in, x.batch, over_channels, false);
        GateGrad<A> to_rows(rows, x_in, x.batch, 1, last), to_columns(columns, x_in, x.batch, over_rows, last);
        parallel(x.batch * gates.pieces, x.batch * x.sample_size(), [&](int64_t unit) {
            const int64_t b = unit / gates.pieces, piece = unit % gates.pieces;
            const auto part = gates.part(b, piece);
            const int64_t c = part.channel, p = part.position;
            const MixedSums<A> sums = {to_channel.piece(b, piece, c), to_spatial.piece(b, piece, p),
                                       to_rows.piece(b, piece, gates.row(0, c, p / std::max<int64_t>(1, gates.width))),
                                       to_columns.piece(b, piece, gates.column(0, c))};
            mix_kernels<T>().backward(maps.grad + part.at, x.data + part.at, part.panel, part.gates, maps.out + part.at,
                                      sums);
        });
        return std::make_tuple(maps.grad_x, to_channel.finish(), to_spatial.finish(), to_rows.finish(),
                               to_columns.finish());
    });
}

}  // namespace fused_attn::cpu

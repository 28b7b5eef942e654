// simam: reads a channel (NCHW) for its moments, twice, and to gate it, all but the first time from cache; writes y.
// channels_last: reads a sample for its moments, part by part, and again to gate it. simam_backward: reads grad and x
// for two sums a channel, then again, and writes grad_x; an NCHW channel's second read comes from cache.
#include "ops.h"
#include "passes.h"

namespace fused_attn::cpu {
namespace {

// Elements of NCHW channels that are taken together: enough that calls cost nothing, little enough for the cache.
constexpr int64_t kTogether = 4096;

// Calls sums(b, panel, c, at, piece) for every piece of the map, finish(b, first channel, last) once these are there,
// and then apply(b, panel, c, at): per few channels (NCHW) or sample, or where positions are split for all of the map.
template <class T, class Sums, class Finish, class Apply>
void by_channel(const MapView<T>& x, int64_t pieces, const Sums& sums, const Finish& finish, const Apply& apply) {
    const int64_t units = x.batch * pieces, elements = x.batch * x.sample_size();
    if (x.channels_last) {
        auto of = [&](int64_t unit, const auto& body) {
            const int64_t b = unit / pieces, piece = unit % pieces;
            body(b, x.panel(piece, pieces), x.offset(b, piece, pieces), piece);
        };
        auto first_pass = [&](int64_t unit) {
            of(unit, [&](int64_t b, Panel panel, int64_t at, int64_t piece) { sums(b, panel, 0, at, piece); });
        };
        auto second_pass = [&](int64_t unit) {
            of(unit, [&](int64_t b, Panel panel, int64_t at, int64_t) { apply(b, panel, 0, at); });
        };
        if (pieces > 1) parallel(units, elements, first_pass);
        if (pieces > 1)
            for (int64_t b = 0; b < x.batch; ++b) finish(b, 0, x.channels);
        parallel(units, elements, [&](int64_t unit) {
            if (pieces == 1) first_pass(unit), finish(unit, 0, x.channels);
            second_pass(unit);
        });
        return;
    }
    const int64_t step = std::max<int64_t>(1, kTogether / std::max<int64_t>(1, x.positions));
    parallel(units, elements, [&](int64_t unit) {
        const int64_t b = unit / pieces, piece = unit % pieces, end = x.begin(piece + 1, pieces);
        for (int64_t c = x.begin(piece, pieces); c < end; c += step) {
            const Panel panel{std::min(step, end - c), x.positions, false};
            const int64_t at = b * x.sample_size() + c * x.positions;
            sums(b, panel, c, at, piece);
            finish(b, c, c + panel.channels);
            apply(b, panel, c, at);
        }
    });
}

}  // namespace

std::tuple<Tensor, Tensor> simam(const Tensor& x_in, double e_lambda) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const ForwardMaps<T> maps(x_in, std::nullopt);
        const MapView<T>& x = maps.x;
        Tensor state = empty_tensor({x.batch, 3, x.channels}, kScalarType<A>);
        A* numbers = static_cast<A*>(state.data_ptr());
        const int64_t pieces = pieces_of(x.batch, x.axis_length(), x.batch * x.sample_size());
        PieceValues<double> mean(x, pieces, 0.0), squares(x, pieces, 0.0);
        // Written where the channel is next read (NCHW), or from each sample's first row before any of its pieces is.
        auto pivots = [&](int64_t b) { return numbers + 3 * b * x.channels; };
        if (x.channels_last)
            for (int64_t b = 0; b < x.batch; ++b) set_pivots(x, b, 0, x.channels, pivots(b));
        by_channel(
            x, pieces,
            [&](int64_t b, Panel panel, int64_t c, int64_t at, int64_t piece) {
                if (!x.channels_last) set_pivots(x, b, c, c + panel.channels, pivots(b));
                simam_kernels<T>().moments(x.data + at, panel, pivots(b) + c, mean.piece(b, piece, c),
                                           squares.piece(b, piece, c));
            },
            [&](int64_t b, int64_t first, int64_t last) {
                join_pieces(x, b, pieces, first, last, mean, squares);
                const double others = static_cast<double>(x.positions - 1);
                A *rest = numbers + (3 * b + 1) * x.channels, *q = rest + x.channels;
                for (int64_t c = first; c < last; ++c) {
                    rest[c] = static_cast<A>(mean.sample(b)[c]);
                    q[c] = static_cast<A>(1 / (4 * (squares.sample(b)[c] / others + e_lambda)));
                }
            },
            [&](int64_t b, Panel panel, int64_t c, int64_t at) {
                const A* row = numbers + 3 * b * x.channels + c;
                simam_kernels<T>().apply(x.data + at, panel, {row, row + x.channels, row + 2 * x.channels},
                                         maps.out + at);
            });
        return std::make_tuple(maps.y, state);
    });
}

Tensor simam_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& state) {
    return dispatch(x_in, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const BackwardMaps<T> maps(grad_in, x_in, std::nullopt, std::nullopt, kIdentity);
        const MapView<T>& x = maps.x;
        const Values<A> numbers(state);
        const int64_t pieces = pieces_of(x.batch, x.axis_length(), x.batch * x.sample_size());
        PieceValues<double> dot(x, pieces, 0.0), squares(x, pieces, 0.0);
        std::vector<A> shares(std::max<int64_t>(1, 2 * x.batch * x.channels));
        auto energy = [&](int64_t b, int64_t c) {
            const A *row = numbers.data() + 3 * b * x.channels + c, *share = &shares[2 * b * x.channels + c];
            return Energy<A>{row, row + x.channels, row + 2 * x.channels, share, share + x.channels};
        };
        by_channel(
            x, pieces,
            [&](int64_t b, Panel panel, int64_t c, int64_t at, int64_t piece) {
                simam_kernels<T>().dots(maps.grad + at, x.data + at, panel, energy(b, c), dot.piece(b, piece, c),
                                        squares.piece(b, piece, c));
            },
            [&](int64_t b, int64_t first, int64_t last) {
                if (dot.rows() > 1) dot.merge(b), squares.merge(b);
                const double n = static_cast<double>(x.positions);
                const A* q_of = energy(b, 0).q;
                A *k = &shares[2 * b * x.channels], *shift = k + x.channels;
                for (int64_t c = first; c < last; ++c) {
                    const double q = q_of[c];
                    k[c] = static_cast<A>(4 * q * q * squares.sample(b)[c] / (n - 1));
                    shift[c] = static_cast<A>(-2 * q * dot.sample(b)[c] / n);
                }
            },
            [&](int64_t b, Panel panel, int64_t c, int64_t at) {
                simam_kernels<T>().spread(maps.grad + at, x.data + at, panel, energy(b, c), maps.out + at);
            });
        return maps.grad_x;
    });
}

}  // namespace fused_attn::cpu

// position_attention: for blocks of queries the scores against blocks of keys, their softmax while it goes (online),
// and the values' sum. No matrix of queries by keys is written; what lies between the products of a block stays in
// cache. Kept for the backward: each query's largest score and its sum's inverse. position_attention_backward: for
// blocks of keys against blocks of queries the scores once more, and from them the gradients of keys and values, which
// one thread owns, and of the queries, which each piece of the keys has a sum of its own for.
#include "ops.h"
#include "passes.h"

namespace fused_attn::cpu {
namespace {

// Queries and keys of a block, forward and backward, by the numbers of a term: what lies between the products of a
// block is to stay in the second cache, and of two bfloat16 numbers there go twice as many into it.
struct Sizes {
    int64_t queries, keys, queries_back, keys_back;
};
constexpr Sizes kSizes[] = {{128, 192, 96, 128}, {192, 256, 192, 192}};
template <class T>
const Sizes& sizes() {
    return kSizes[term_kernels<T>().numbers - 1];
}
constexpr int64_t kMostPieces = 8;  // of the keys, each with a sum the size of the queries

// A map as a matrix of channels by positions, in memory as it is.
template <class T>
struct Matrix {
    T* data;
    int64_t channels, positions, channel, position;  // the last two: strides

    Matrix(const MapView<T>& map, int64_t sample)
        : data(map.data + sample * map.sample_size()),
          channels(map.channels),
          positions(map.positions),
          channel(map.channels_last ? 1 : map.positions),
          position(map.channels_last ? map.channels : 1) {}
    T* at(int64_t first) const { return data + first * position; }
};

// Some positions of a map as the rows of a product and its terms: `row` and `step` are their strides.
template <class T>
class Block {
  public:
    using A = Accumulator<T>;
    Block(int64_t channels, int64_t most) : numbers_((channels + 16) * (most + 16)) {}
    // A row is a position, its terms are of the channels.
    void read_positions(const Matrix<T>& map, int64_t first, int64_t count) { read(map, first, count, true); }
    // A row is a channel, its terms are of the positions.
    void read_channels(const Matrix<T>& map, int64_t first, int64_t count) { read(map, first, count, false); }
    // The same, where they lie if they are such terms already.
    void see_channels(const Matrix<T>& map, int64_t first, int64_t count) {
        if constexpr (std::is_same_v<T, A>)
            if (map.position == 1) {
                data = map.at(first), row = map.channel, step = 1;
                return;
            }
        read_channels(map, first, count);
    }
    const A* data = nullptr;
    int64_t row = 0, step = 0;

  private:
    // In rows that do not all fall on the same lines of the cache, so that they may be read across, too.
    void read(const Matrix<T>& map, int64_t first, int64_t count, bool positions) {
        const AttentionKernels<T>& run = term_kernels<T>();
        const bool by_channel = map.position == 1, across = by_channel == positions;
        const int64_t length = by_channel ? count : map.channels;
        const int64_t pitch = (across ? length : ceil_div(length, run.numbers)) + 16;
        run.read_terms(map.at(first), by_channel ? map.channel : map.position, by_channel ? map.channels : count,
                       length, across, numbers_.data(), pitch);
        data = numbers_.data();
        row = across ? 1 : pitch;
        step = across ? pitch : 1;
    }
    std::vector<A> numbers_;
};

template <class T>
struct Inputs {
    using A = Accumulator<T>;
    Tensor query_dense, key_dense, value_dense;
    MapView<T> query, key, value;
    Inputs(const Tensor& q, const Tensor& k, const Tensor& v)
        : query_dense(dense_map(q)),
          key_dense(dense_map(k)),
          value_dense(dense_map(v)),
          query(query_dense),
          key(key_dense),
          value(value_dense) {}
    int64_t work() const { return query.batch * query.positions * key.positions * (query.channels + value.channels); }
};

// Like the value where it has the query's positions, so that a map keeps its layout.
template <class T>
Tensor empty_result(const Inputs<T>& in) {
    std::vector<int64_t> shape(in.query_dense.sizes().begin(), in.query_dense.sizes().end());
    shape[1] = in.value.channels;
    const auto of_value = in.value_dense.sizes();
    if (std::equal(shape.begin(), shape.end(), of_value.begin(), of_value.end())) return empty_map<T>(in.value_dense);
    Tensor out = empty_tensor(shape, in.query_dense.scalar_type());
    prefer_huge_pages(out, sizeof(T));
    return out;
}

template <class T>
void attend(const Inputs<T>& in, int64_t sample, int64_t first, int64_t count, Accumulator<T> scale,
            const Matrix<T>& out, Accumulator<T>* state, int64_t positions) {
    using A = Accumulator<T>;
    const AttentionKernels<T>& run = term_kernels<T>();
    const Sizes& size = sizes<T>();
    const int64_t width = run.panel, panels = ceil_div(count, width), wide = panels * width;
    const Matrix<T> query(in.query, sample), key(in.key, sample), value(in.value, sample);
    const int64_t depth = query.channels, channels = value.channels;
    std::vector<A> queries(wide * depth), scores(wide * size.keys), sums(wide * channels);
    std::vector<A> peak(wide, -std::numeric_limits<A>::infinity()), sum(wide, A(0)), factor(wide, A(1));
    Block<T> keys(depth, size.keys), values(channels, size.keys);
    run.pack(query.at(first), query.position, query.channel, count, depth, queries.data());
    const int64_t depth_terms = ceil_div(depth, run.numbers);
    for (int64_t k = 0; k < key.positions; k += size.keys) {
        const int64_t here = std::min(size.keys, key.positions - k);
        keys.read_positions(key, k, here);
        Product<A> score{keys.data,     keys.row,          keys.step, queries.data(), depth_terms * width,
                         scores.data(), size.keys * width, here,      depth_terms,    panels};
        score.scale = scale;
        run.product(score);
        for (int64_t p = 0; p < panels; ++p)
            run.soften(&scores[p * size.keys * width], here, &peak[p * width], &sum[p * width], &factor[p * width]);
        values.see_channels(value, k, here);
        Product<A> weighted{values.data,
                            values.row,
                            values.step,
                            scores.data(),
                            size.keys * width,
                            sums.data(),
                            channels * width,
                            channels,
                            ceil_div(here, run.numbers),
                            panels};
        weighted.adds = k > 0;
        weighted.factors = factor.data();
        run.product(weighted);
    }
    for (A& s : sum) s = A(1) / s;
    std::copy_n(peak.begin(), count, state);
    std::copy_n(sum.begin(), count, state + positions);
    for (int64_t p = 0; p < panels; ++p)
        run.write(&sums[p * channels * width], &sum[p * width], channels, std::min(width, count - p * width),
                  out.at(first + p * width), out.channel, out.position);
}

// Each position's product of two maps, summed over the channels.
template <class T>
void dots(const MapView<T>& a, const MapView<T>& b, std::vector<Accumulator<T>>& out) {
    constexpr int64_t kPositions = 512;  // of a block
    const int64_t blocks = ceil_div(a.positions, kPositions);
    parallel(a.batch * blocks, a.batch * a.sample_size(), [&](int64_t unit) {
        const int64_t sample = unit / blocks, first = unit % blocks * kPositions;
        const int64_t count = std::min(kPositions, a.positions - first);
        const Matrix<T> left(a, sample), right(b, sample);
        const T *x = left.at(first), *y = right.at(first);
        std::vector<double> sums(count, 0.0);
        auto add = [&](int64_t c, int64_t p) {
            sums[p] += static_cast<double>(x[c * left.channel + p * left.position]) *
                       static_cast<double>(y[c * right.channel + p * right.position]);
        };
        if (left.position == 1) {
            for (int64_t c = 0; c < a.channels; ++c)
                for (int64_t p = 0; p < count; ++p) add(c, p);
        } else {
            for (int64_t p = 0; p < count; ++p)
                for (int64_t c = 0; c < a.channels; ++c) add(c, p);
        }
        std::copy(sums.begin(), sums.end(), &out[sample * a.positions + first]);
    });
}

// The gradients that a piece of a sample's keys gives: of these keys and their values, and `queries`, which is added
// to: (panels of the depth, queries, width).
template <class T>
void attend_back(const Inputs<T>& in, const MapView<T>& grad_map, int64_t sample, int64_t from, int64_t to,
                 Accumulator<T> scale, const Accumulator<T>* state, const Accumulator<T>* dot,
                 const Matrix<T>& grad_key, const Matrix<T>& grad_value, Accumulator<T>* queries) {
    using A = Accumulator<T>;
    const AttentionKernels<T>& run = term_kernels<T>();
    const Sizes& size = sizes<T>();
    const int64_t width = run.panel, most = ceil_div(size.keys_back, width) * width;
    const Matrix<T> query(in.query, sample), key(in.key, sample), value(in.value, sample), grad(grad_map, sample);
    const int64_t depth = query.channels, channels = value.channels, positions = query.positions;
    const int64_t depth_panels = ceil_div(depth, width), depth_terms = ceil_div(depth, run.numbers);
    const int64_t channel_terms = ceil_div(channels, run.numbers);
    std::vector<A> keys(most * depth_terms), values(most * channel_terms), of_keys(most * depth);
    std::vector<A> of_values(most * channels), turned(depth_panels * width * size.keys_back);
    std::vector<A> scores(most * size.queries_back), slopes(scores.size()), room(width * size.queries_back);
    const std::vector<A> ones(width, A(1)), scales(width, scale);
    Block<T> a_query(depth, size.queries_back), a_depth(depth, size.queries_back);
    Block<T> a_grad(channels, size.queries_back), a_channel(channels, size.queries_back);
    for (int64_t k = from; k < to; k += size.keys_back) {
        const int64_t here = std::min(size.keys_back, to - k), panels = ceil_div(here, width);
        run.pack(key.at(k), key.position, key.channel, here, depth, keys.data());
        run.pack(value.at(k), value.position, value.channel, here, channels, values.data());
        run.pack(key.at(k), key.channel, key.position, depth, here, turned.data());
        for (int64_t q = 0; q < positions; q += size.queries_back) {
            const int64_t count = std::min(size.queries_back, positions - q), step = size.queries_back * width;
            const int64_t count_terms = ceil_div(count, run.numbers);
            a_query.read_positions(query, q, count);
            a_depth.read_channels(query, q, count);
            a_grad.read_positions(grad, q, count);
            a_channel.read_channels(grad, q, count);
            Product<A> score{a_query.data,  a_query.row, a_query.step, keys.data(), depth_terms * width,
                             scores.data(), step,        count,        depth_terms, panels};
            score.scale = scale;
            run.product(score);
            for (int64_t p = 0; p < panels; ++p)
                run.probabilities(&scores[p * step], count, state + q, state + positions + q);
            run.product({a_channel.data, a_channel.row, a_channel.step, scores.data(), step, of_values.data(),
                         channels * width, channels, count_terms, panels, q > 0});
            run.product({a_grad.data, a_grad.row, a_grad.step, values.data(), channel_terms * width, slopes.data(),
                         step, count, channel_terms, panels});
            for (int64_t p = 0; p < panels; ++p)
                run.score_gradients(&slopes[p * step], &scores[p * step], count, dot + q);
            run.product({a_depth.data, a_depth.row, a_depth.step, slopes.data(), step, of_keys.data(), depth * width,
                         depth, count_terms, panels, q > 0});
            for (int64_t p = 0; p < panels; ++p) {
                const int64_t lanes = std::min(width, here - p * width);
                const A* rows = run.turn_terms(&slopes[p * step], count, lanes, room.data());
                run.product({rows, width / run.numbers, 1, &turned[p * width / run.numbers * width],
                             ceil_div(here, run.numbers) * width, queries + q * width, positions * width, count,
                             ceil_div(lanes, run.numbers), depth_panels, true});
            }
        }
        for (int64_t p = 0; p < panels; ++p) {
            const int64_t lanes = std::min(width, here - p * width);
            run.write(&of_keys[p * depth * width], scales.data(), depth, lanes, grad_key.at(k + p * width),
                      grad_key.channel, grad_key.position);
            run.write(&of_values[p * channels * width], ones.data(), channels, lanes, grad_value.at(k + p * width),
                      grad_value.channel, grad_value.position);
        }
    }
}

}  // namespace

std::tuple<Tensor, Tensor> position_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                              double scale) {
    return dispatch(query, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Inputs<T> in(query, key, value);
        const int64_t positions = in.query.positions, queries = sizes<T>().queries;
        const int64_t blocks = ceil_div(positions, queries);
        Tensor out = empty_result(in);
        Tensor state = empty_tensor({in.query.batch, 2, positions}, kScalarType<A>);
        if (in.key.positions == 0) zero(out, sizeof(T));
        if (in.key.positions == 0) zero(state, sizeof(A));
        if (out.numel() == 0 || in.key.positions == 0) return std::make_tuple(out, state);
        const MapView<T> view(out);
        parallel(in.query.batch * blocks, in.work(), [&](int64_t unit) {
            const int64_t sample = unit / blocks, first = unit % blocks * queries;
            attend(in, sample, first, std::min(queries, positions - first), static_cast<A>(scale),
                   Matrix<T>(view, sample), static_cast<A*>(state.data_ptr()) + 2 * sample * positions + first,
                   positions);
        });
        return std::make_tuple(out, state);
    });
}

std::tuple<Tensor, Tensor, Tensor> position_attention_backward(const Tensor& grad, const Tensor& query,
                                                               const Tensor& key, const Tensor& value,
                                                               const Tensor& out, const Tensor& state_in,
                                                               double scale) {
    return dispatch(query, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Inputs<T> in(query, key, value);
        Tensor grad_query = empty_map<T>(in.query_dense), grad_key = empty_map<T>(in.key_dense);
        Tensor grad_value = empty_map<T>(in.value_dense);
        const int64_t batch = in.query.batch, positions = in.query.positions, keys = in.key.positions;
        if (grad.numel() == 0 || keys == 0) {
            zero(grad_query, sizeof(T)), zero(grad_key, sizeof(T)), zero(grad_value, sizeof(T));
            return std::make_tuple(grad_query, grad_key, grad_value);
        }
        const Tensor out_dense = dense_map(out), grad_dense = in_layout_of<T>(out_dense, grad);
        const MapView<T> result(out_dense), gradient(grad_dense);
        std::vector<A> dot(batch * positions);
        dots(gradient, result, dot);
        const AttentionKernels<T>& run = term_kernels<T>();
        const int64_t width = run.panel, depth_panels = ceil_div(in.query.channels, width);
        const int64_t size = depth_panels * width * positions, block = sizes<T>().keys_back;
        const int64_t blocks = ceil_div(keys, block);
        const int64_t pieces = std::min<int64_t>(pieces_of(batch, blocks, in.work()), kMostPieces);
        std::vector<A> sums(batch * pieces * size, A(0));
        const MapView<T> query_view(grad_query), key_view(grad_key), value_view(grad_value);
        const Tensor state = in_order(state_in);
        const A* states = static_cast<const A*>(state.data_ptr());
        parallel(batch * pieces, in.work(), [&](int64_t unit) {
            const int64_t sample = unit / pieces, piece = unit % pieces;
            attend_back(in, gradient, sample, blocks * piece / pieces * block,
                        std::min(keys, blocks * (piece + 1) / pieces * block), static_cast<A>(scale),
                        states + 2 * sample * positions, &dot[sample * positions], Matrix<T>(key_view, sample),
                        Matrix<T>(value_view, sample), &sums[unit * size]);
        });
        const std::vector<A> scales(width, static_cast<A>(scale));
        parallel(batch * depth_panels, batch * size, [&](int64_t unit) {
            const int64_t sample = unit / depth_panels, panel = unit % depth_panels;
            A* total = &sums[sample * pieces * size + panel * width * positions];
            for (int64_t piece = 1; piece < pieces; ++piece)
                for (int64_t i = 0; i < width * positions; ++i) total[i] += total[piece * size + i];
            const Matrix<T> to(query_view, sample);
            run.write(total, scales.data(), positions, std::min(width, to.channels - panel * width),
                      to.data + panel * width * to.channel, to.position, to.channel);
        });
        return std::make_tuple(grad_query, grad_key, grad_value);
    });
}

}  // namespace fused_attn::cpu

// criss_cross_attention: every position against those of its column, itself left out, and those of its row, in one
// softmax. Lines of an axis are independent: each is attention among at most a few hundred positions that fits the
// cache. Two passes over the maps: along columns, and along rows, where the online softmax goes on from what the
// columns left, the sum of values and each query's peak and sum. Kept for the backward: each query's peak and the
// inverse of its sum. Backward passes along columns and rows alike, the second adding to what the first wrote.
//
// Positions have their channels next to each other: columns and rows are then read and written alike, in long runs. An
// NCHW map is turned into such a map, and its results back: a pass each.
#include <cmath>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "ops.h"
#include "passes.h"

namespace fused_attn::cpu {
namespace {

constexpr int64_t kMost = 128;  // queries or keys of a block
constexpr int64_t kPad = 16;    // numbers behind a row: a vector, and so that rows do not fall on the same cache lines

// One sample's lines along an axis.
template <class T>
struct Lines {
    T* data;
    int64_t channels, length;
    int64_t position, line;  // strides
    T* at(int64_t index, int64_t first = 0) const { return data + index * line + first * position; }
};

// out[j][i] = in[i][j], in rows that are `pitch` and `out_pitch` apart. Line by line of the cache on both sides: rows a
// power of two apart share few places in it.
template <class A>
void turn(const A* in, int64_t pitch, int64_t rows, int64_t columns, A* out, int64_t out_pitch) {
    constexpr int64_t kLine = 64 / sizeof(A);
    for (int64_t i0 = 0; i0 < rows; i0 += kLine)
        for (int64_t j0 = 0; j0 < columns; j0 += kLine) {
            const int64_t end = std::min(rows, i0 + kLine), last = std::min(columns, j0 + kLine);
            int64_t i = i0;
#if defined(__SSE2__)
            if constexpr (std::is_same_v<A, float>)
                for (; i + 4 <= end; i += 4) {
                    const float* at = in + i * pitch;
                    int64_t j = j0;
                    for (; j + 4 <= last; j += 4) {
                        __m128 a = _mm_loadu_ps(at + j), b = _mm_loadu_ps(at + pitch + j);
                        __m128 c = _mm_loadu_ps(at + 2 * pitch + j), d = _mm_loadu_ps(at + 3 * pitch + j);
                        _MM_TRANSPOSE4_PS(a, b, c, d);
                        float* to = out + j * out_pitch + i;
                        _mm_storeu_ps(to, a), _mm_storeu_ps(to + out_pitch, b);
                        _mm_storeu_ps(to + 2 * out_pitch, c), _mm_storeu_ps(to + 3 * out_pitch, d);
                    }
                    for (; j < last; ++j)
                        for (int64_t k = 0; k < 4; ++k) out[j * out_pitch + i + k] = at[k * pitch + j];
                }
#endif
            for (; i < end; ++i)
                for (int64_t j = j0; j < last; ++j) out[j * out_pitch + i] = in[i * pitch + j];
        }
}

// A map of any strides in one of the two layouts: itself where it lies so.
template <class T>
Tensor in_layout(const Tensor& map, bool channels_last) {
    if (channels_last ? is_channels_last(map) : map.is_contiguous()) return map;
    const bool turns = channels_last ? map.is_contiguous() : is_channels_last(map);
    Tensor out = channels_last ? torch::stable::empty(map.sizes(), map.scalar_type(), std::nullopt, map.device(),
                                                      std::nullopt, torch::headeronly::MemoryFormat::ChannelsLast)
                               : contiguous_like(map);
    prefer_huge_pages(out, sizeof(T));
    if (!turns) {
        torch::stable::copy_(out, map);
        return out;
    }
    const MapView<T> view(map);
    const int64_t rows = channels_last ? view.channels : view.positions;
    const int64_t columns = channels_last ? view.positions : view.channels;
    T* to = static_cast<T*>(out.data_ptr());
    constexpr int64_t kTile = 128;
    const int64_t tiles = ceil_div(view.positions, kTile);
    parallel(view.batch * tiles, map.numel(), [&](int64_t unit) {
        const int64_t sample = unit / tiles * view.sample_size(), p = unit % tiles * kTile;
        for (int64_t c = 0; c < view.channels; c += kTile) {
            const int64_t i = channels_last ? c : p, j = channels_last ? p : c;
            turn(view.data + sample + i * columns + j, columns, std::min(kTile, rows - i), std::min(kTile, columns - j),
                 to + sample + j * rows + i, rows);
        }
    });
    return out;
}

template <class T>
Tensor in_layout_of_input(const Tensor& result, const Tensor& input) {
    return in_layout<T>(result, is_channels_last(input) && !input.is_contiguous());
}

template <class T>
struct Inputs {
    Tensor query_map, key_map, value_map;
    MapView<T> query, key, value;
    int64_t height, width;
    Inputs(const Tensor& q, const Tensor& k, const Tensor& v)
        : query_map(in_layout<T>(q, true)),
          key_map(in_layout<T>(k, true)),
          value_map(in_layout<T>(v, true)),
          query(query_map),
          key(key_map),
          value(value_map),
          height(v.size(2)),
          width(v.size(3)) {}
    int64_t batch() const { return query.batch; }
    int64_t work() const { return batch() * height * width * (height + width) * (query.channels + value.channels); }
    int64_t lines(bool columns) const { return columns ? width : height; }
    int64_t length(bool columns) const { return columns ? height : width; }
    template <class U>
    Lines<U> lines_of(U* data, int64_t channels, int64_t sample, bool columns) const {
        const int64_t row = channels * width;
        return {data + sample * height * row, channels, length(columns), columns ? row : channels,
                columns ? channels : row};
    }
    Lines<T> lines_of(const MapView<T>& map, int64_t sample, bool columns) const {
        return lines_of(map.data, map.channels, sample, columns);
    }
};

// A line's numbers in the accumulator's type.
template <class T>
class Line {
  public:
    using A = Accumulator<T>;
    Line(int64_t channels, int64_t length) : pitch(channels + kPad), numbers_(pitch * length) {}
    void read(const Lines<T>& lines, int64_t index) {
        attention_kernels<T>().copy_rows(lines.at(index), lines.position, lines.length, lines.channels, numbers_.data(),
                                         pitch);
    }
    const A* at(int64_t position) const { return numbers_.data() + position * pitch; }
    const int64_t pitch;

  private:
    std::vector<A> numbers_;
};

// A result to which columns and rows add: in the accumulator's type until both have, which is the result's own memory
// where it has that type.
template <class T>
struct Result {
    using A = Accumulator<T>;
    Tensor tensor;
    MapView<T> map;
    std::vector<A> own;
    A* sums;
    explicit Result(const Tensor& like)
        : tensor(empty_map<T>(like)), map(tensor), own(std::is_same_v<T, A> ? 0 : tensor.numel()) {
        if constexpr (std::is_same_v<T, A>)
            sums = map.data;
        else
            sums = own.data();
    }
    void finish(const Inputs<T>& in, int64_t sample, int64_t row) const {
        if constexpr (!std::is_same_v<T, A>) {
            const Lines<A> from = in.lines_of(sums, map.channels, sample, false);
            const Lines<T> to = in.lines_of(map, sample, false);
            line_kernels<T>().round_rows(from.at(row), from.position, to.length, to.channels, to.at(row), to.position);
        }
    }
};

// The size of blocks of about the same size, whole panels, that a line is cut into.
int64_t block_of(int64_t length, int64_t width) {
    const int64_t blocks = ceil_div(length, kMost);
    return ceil_div(ceil_div(length, blocks), width) * width;
}

// Scores of a position with itself into minus infinity. scores: panels of `columns` by rows, the first of which are
// positions `column` and `row` of the line.
template <class A>
void mask_self(A* scores, int64_t panel, int64_t width, int64_t column, int64_t columns, int64_t row, int64_t rows) {
    for (int64_t i = std::max(column, row); i < std::min(column + columns, row + rows); ++i)
        scores[(i - column) / width * panel + (i - row) * width + (i - column) % width] =
            -std::numeric_limits<A>::infinity();
}

// Positions of a line as the columns of panels with a row a channel; the last panel's rest is zero.
template <class T>
void to_panels(const Line<T>& line, int64_t first, int64_t positions, int64_t channels, int64_t width,
               std::vector<Accumulator<T>>& out) {
    for (int64_t p = 0; p < positions; p += width) {
        auto* panel = out.data() + p * channels;
        const int64_t here = std::min(width, positions - p);
        turn(line.at(first + p), line.pitch, here, channels, panel, width);
        for (int64_t c = 0; here < width && c < channels; ++c)
            std::fill(panel + c * width + here, panel + (c + 1) * width, Accumulator<T>(0));
    }
}

template <class T>
void attend(const Inputs<T>& in, bool columns, const Result<T>& out, Accumulator<T>* state) {
    using A = Accumulator<T>;
    const AttentionKernels<A>& run = *line_kernels<T>().panels;
    const int64_t depth = in.query.channels, channels = in.value.channels, length = in.length(columns);
    const int64_t width = run.panel, block = block_of(length, width), panel = block * width;
    const int64_t lines = in.lines(columns), step = columns ? in.width : 1, size = in.height * in.width;
    parallel_ranges(in.batch() * lines, in.work(), [&](int64_t begin, int64_t end) {
        Line<T> query(depth, length), key(depth, length), value(channels, length);
        std::vector<A> queries(block * depth), scores(block * block), peak(block), sum(block), factor(block);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t sample = unit / lines, index = unit % lines;
            query.read(in.lines_of(in.query, sample, columns), index);
            key.read(in.lines_of(in.key, sample, columns), index);
            value.read(in.lines_of(in.value, sample, columns), index);
            const Lines<A> sums = in.lines_of(out.sums, channels, sample, columns);
            A* peaks = state + sample * 2 * size + index * (columns ? 1 : in.width);
            A* totals = peaks + size;
            for (int64_t q = 0; q < length; q += block) {
                const int64_t here = std::min(block, length - q), panels = ceil_div(here, width);
                to_panels(query, q, here, depth, width, queries);
                // Not minus infinity: a column may have nothing but itself, or scores that are all that.
                std::fill(peak.begin(), peak.end(), std::numeric_limits<A>::lowest());
                std::fill(sum.begin(), sum.end(), A(0));
                for (int64_t j = 0; !columns && j < here; ++j) {
                    peak[j] = peaks[q + j];
                    sum[j] = totals[q + j];
                }
                for (int64_t k = 0; k < length; k += block) {
                    const int64_t keys = std::min(block, length - k);
                    run.product({key.at(k), key.pitch, 1, queries.data(), depth * width, scores.data(), panel, keys,
                                 depth, panels});
                    if (columns) mask_self(scores.data(), panel, width, q, here, k, keys);
                    for (int64_t p = 0; p < panels; ++p) {
                        A *at = &scores[p * panel], *factors = &factor[p * width];
                        run.soften(at, keys, &peak[p * width], &sum[p * width], factors);
                        if (columns || k + keys < length) continue;
                        for (int64_t j = 0; j < width; ++j) {  // nothing comes after this: divided by the whole sum
                            const A inverse = A(1) / sum[p * width + j];
                            sum[p * width + j] = inverse;
                            factors[j] *= inverse;
                        }
                        for (int64_t i = 0; i < keys; ++i)
                            for (int64_t j = 0; j < width; ++j) at[i * width + j] *= sum[p * width + j];
                    }
                    RowProduct<A> weighted{scores.data(),     panel,         1,    width, value.at(k), value.pitch,
                                           sums.at(index, q), sums.position, here, keys,  channels};
                    weighted.adds = !columns || k > 0;
                    weighted.factors = factor.data();
                    line_kernels<T>().product(weighted);
                }
                for (int64_t j = 0; j < here; ++j) {
                    peaks[(q + j) * step] = peak[j];
                    totals[(q + j) * step] = sum[j];
                }
            }
            if (!columns) out.finish(in, sample, index);
        }
    });
}

// dots: each position's product of gradient and result, summed over the channels; found along the columns.
template <class T>
void attend_back(const Inputs<T>& in, bool columns, const MapView<T>& gradient, const MapView<T>& result,
                 const Accumulator<T>* state, Accumulator<T>* dots, const Result<T>& grad_query,
                 const Result<T>& grad_key, const Result<T>& grad_value) {
    using A = Accumulator<T>;
    const AttentionKernels<A>& run = *line_kernels<T>().panels;
    const LineKernels<T>& with_rows = line_kernels<T>();
    const int64_t depth = in.query.channels, channels = in.value.channels, length = in.length(columns);
    const int64_t width = run.panel, block = block_of(length, width), panel = block * width;
    const int64_t lines = in.lines(columns), step = columns ? in.width : 1, size = in.height * in.width;
    parallel_ranges(in.batch() * lines, in.work(), [&](int64_t begin, int64_t end) {
        Line<T> query(depth, length), key(depth, length), value(channels, length), grad(channels, length);
        std::vector<A> keys(block * depth), values(block * channels), scores(block * block), slopes(scores.size());
        std::vector<A> peak(length), inverse(length), dot(length);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t sample = unit / lines, index = unit % lines;
            query.read(in.lines_of(in.query, sample, columns), index);
            key.read(in.lines_of(in.key, sample, columns), index);
            value.read(in.lines_of(in.value, sample, columns), index);
            grad.read(in.lines_of(gradient, sample, columns), index);
            const Lines<A> of_query = in.lines_of(grad_query.sums, depth, sample, columns);
            const Lines<A> of_key = in.lines_of(grad_key.sums, depth, sample, columns);
            const Lines<A> of_value = in.lines_of(grad_value.sums, channels, sample, columns);
            const int64_t at = index * (columns ? 1 : in.width);
            const A *peaks = state + sample * 2 * size + at, *inverses = peaks + size;
            A* of_positions = dots + sample * size + at;
            if (columns) {
                const Lines<T> out = in.lines_of(result, sample, columns);
                with_rows.dots(grad.at(0), grad.pitch, out.at(index), out.position, length, channels, dot.data());
            }
            for (int64_t q = 0; q < length; ++q) {
                peak[q] = peaks[q * step];
                inverse[q] = inverses[q * step];
                A& known = of_positions[q * step];
                (columns ? known : dot[q]) = columns ? dot[q] : known;
            }
            for (int64_t k = 0; k < length; k += block) {
                const int64_t here = std::min(block, length - k), panels = ceil_div(here, width);
                to_panels(key, k, here, depth, width, keys);
                to_panels(value, k, here, channels, width, values);
                for (int64_t q = 0; q < length; q += block) {
                    const int64_t rows = std::min(block, length - q);
                    const bool adds = !columns || q > 0;
                    run.product({query.at(q), query.pitch, 1, keys.data(), depth * width, scores.data(), panel, rows,
                                 depth, panels});
                    if (columns) mask_self(scores.data(), panel, width, k, here, q, rows);
                    for (int64_t p = 0; p < panels; ++p)
                        run.probabilities(&scores[p * panel], rows, &peak[q], &inverse[q]);
                    with_rows.product({scores.data(), panel, 1, width, grad.at(q), grad.pitch, of_value.at(index, k),
                                       of_value.position, here, rows, channels, adds});
                    run.product({grad.at(q), grad.pitch, 1, values.data(), channels * width, slopes.data(), panel, rows,
                                 channels, panels});
                    for (int64_t p = 0; p < panels; ++p)
                        run.score_gradients(&slopes[p * panel], &scores[p * panel], rows, &dot[q]);
                    with_rows.product({slopes.data(), panel, 1, width, query.at(q), query.pitch, of_key.at(index, k),
                                       of_key.position, here, rows, depth, adds});
                    for (int64_t p = 0; p < panels; ++p)
                        with_rows.product({&slopes[p * panel], width * width, width, 1, key.at(k + p * width),
                                           key.pitch, of_query.at(index, q), of_query.position, rows,
                                           std::min(width, here - p * width), depth, !columns || k + p > 0});
                }
            }
            if (!columns)
                for (const Result<T>* of : {&grad_query, &grad_key, &grad_value}) of->finish(in, sample, index);
        }
    });
}

}  // namespace

Tensor relayout(const Tensor& map, int64_t channels_last) {
    return dispatch(map, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        const Tensor out = in_layout<T>(map, channels_last != 0);
        return out.data_ptr() == map.data_ptr() ? torch::stable::clone(out) : out;
    });
}

std::tuple<Tensor, Tensor> criss_cross_attention(const Tensor& query, const Tensor& key, const Tensor& value) {
    return dispatch(query, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Inputs<T> in(query, key, value);
        const Result<T> out(in.value_map);
        Tensor state = empty_tensor({in.batch(), 2, in.height * in.width}, kScalarType<A>);
        if (out.tensor.numel() == 0)
            zero(state, sizeof(A));
        else
            for (const bool columns : {true, false}) attend(in, columns, out, static_cast<A*>(state.data_ptr()));
        return std::make_tuple(in_layout_of_input<T>(out.tensor, value), state);
    });
}

std::tuple<Tensor, Tensor, Tensor> criss_cross_attention_backward(const Tensor& grad, const Tensor& query,
                                                                  const Tensor& key, const Tensor& value,
                                                                  const Tensor& out, const Tensor& state_in) {
    return dispatch(query, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Inputs<T> in(query, key, value);
        const Result<T> grad_query(in.query_map), grad_key(in.key_map), grad_value(in.value_map);
        if (out.numel() == 0) {
            for (const Result<T>* result : {&grad_query, &grad_key, &grad_value}) zero(result->tensor, sizeof(T));
        } else {
            const Tensor grad_map = in_layout<T>(grad, true), out_map = in_layout<T>(out, true);
            const Tensor state = in_order(state_in);
            std::vector<A> dots(in.batch() * in.height * in.width);
            for (const bool columns : {true, false})
                attend_back(in, columns, MapView<T>(grad_map), MapView<T>(out_map),
                            static_cast<const A*>(state.data_ptr()), dots.data(), grad_query, grad_key, grad_value);
        }
        return std::make_tuple(in_layout_of_input<T>(grad_query.tensor, query),
                               in_layout_of_input<T>(grad_key.tensor, key),
                               in_layout_of_input<T>(grad_value.tensor, value));
    });
}

}  // namespace fused_attn::cpu

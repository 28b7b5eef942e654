// criss_cross_attention: every position against those of its column, itself left out, and those of its row, in one
// softmax. Lines of an axis are independent: each is attention among at most a few hundred positions that fits the
// cache. Two passes over the maps: along columns, and along rows, where the online softmax goes on from what the
// columns left, the sum of values and each query's peak and sum. Kept for the backward: each query's peak and the
// inverse of its sum. Backward passes along columns and rows alike, the second adding to what the first wrote.
#include <cmath>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

#include "ops.h"
#include "passes.h"

namespace fused_attn::cpu {
namespace {

constexpr int64_t kMost = 128;  // queries or keys of a block
constexpr int64_t kRowsAtOnce = 4;

// One sample's lines along an axis, in memory as they are.
template <class T>
struct Lines {
    T* data;
    int64_t channels, length;
    int64_t channel, position, line;  // strides
    T* at(int64_t index, int64_t first = 0) const { return data + index * line + first * position; }
};

template <class T>
struct Inputs {
    using A = Accumulator<T>;
    Tensor query_dense, key_dense, value_dense;
    MapView<T> query, key, value;
    int64_t height, width;
    Inputs(const Tensor& q, const Tensor& k, const Tensor& v)
        : query_dense(dense_map(q)),
          key_dense(dense_map(k)),
          value_dense(dense_map(v)),
          query(query_dense),
          key(key_dense),
          value(value_dense),
          height(v.size(2)),
          width(v.size(3)) {}
    int64_t batch() const { return query.batch; }
    int64_t work() const { return batch() * height * width * (height + width) * (query.channels + value.channels); }
    int64_t lines(bool columns) const { return columns ? width : height; }
    int64_t length(bool columns) const { return columns ? height : width; }
    template <class U>
    Lines<U> lines_of(U* data, const MapView<T>& map, int64_t sample, bool columns) const {
        const int64_t step = map.channels_last ? map.channels : 1;
        return {data + sample * map.sample_size(),
                map.channels,
                length(columns),
                map.channels_last ? 1 : map.positions,
                columns ? step * width : step,
                columns ? step : step * width};
    }
    Lines<T> lines_of(const MapView<T>& map, int64_t sample, bool columns) const {
        return lines_of(map.data, map, sample, columns);
    }
    // Neighbouring columns of an NCHW map share lines of the cache: as many as a panel has are taken at a time. Some
    // neighbouring rows of a channel are one longer read.
    int64_t at_once(bool columns) const {
        const bool together = query.channels_last && key.channels_last && value.channels_last;
        return together || (columns && width == 1) ? 1 : columns ? attention_kernels<T>().panel : kRowsAtOnce;
    }
};

// out[j][i] = in[i][j], in rows that are `pitch` and `out_pitch` apart.
template <class A>
void turn(const A* in, int64_t pitch, int64_t rows, int64_t columns, A* out, int64_t out_pitch) {
    int64_t turned = 0;
#if defined(__SSE2__)
    if constexpr (std::is_same_v<A, float>)
        for (; turned + 4 <= rows; turned += 4) {
            const float* at = in + turned * pitch;
            int64_t j = 0;
            for (; j + 4 <= columns; j += 4) {
                __m128 a = _mm_loadu_ps(at + j), b = _mm_loadu_ps(at + pitch + j);
                __m128 c = _mm_loadu_ps(at + 2 * pitch + j), d = _mm_loadu_ps(at + 3 * pitch + j);
                _MM_TRANSPOSE4_PS(a, b, c, d);
                float* to = out + j * out_pitch + turned;
                _mm_storeu_ps(to, a), _mm_storeu_ps(to + out_pitch, b);
                _mm_storeu_ps(to + 2 * out_pitch, c), _mm_storeu_ps(to + 3 * out_pitch, d);
            }
            for (; j < columns; ++j)
                for (int64_t i = 0; i < 4; ++i) out[j * out_pitch + turned + i] = at[i * pitch + j];
        }
#endif
    for (int64_t i = turned; i < rows; ++i)
        for (int64_t j = 0; j < columns; ++j) out[j * out_pitch + i] = in[i * pitch + j];
}

// The numbers of some neighbouring lines in the accumulator's type, in rows that do not all fall on the same lines of
// the cache.
template <class T>
class Group {
  public:
    using A = Accumulator<T>;
    Group(int64_t channels, int64_t length, int64_t most)
        : size_((channels + 16) * (length + 16)), numbers_(most * size_), some_(most * length) {}

    Lines<A> read(const Lines<T>& from, int64_t first, int64_t count) {
        const AttentionKernels<T>& run = attention_kernels<T>();
        const Lines<A> to = like(from);
        if (from.position == 1) {
            for (int64_t c = 0; c < from.channels; ++c)
                run.copy_rows(from.at(first) + c * from.channel, from.line, count, from.length,
                              to.data + c * to.channel, to.line);
        } else if (from.channel == 1) {
            for (int64_t i = 0; i < count; ++i)
                run.copy_rows(from.at(first + i), from.position, from.length, from.channels, to.at(i), to.position);
        } else {
            for (int64_t c = 0; c < from.channels; ++c) {
                const T* next = from.at(first) + std::min(c + 1, from.channels - 1) * from.channel;
                for (int64_t p = 0; p < from.length; ++p) {
                    __builtin_prefetch(next + p * from.position);
                    __builtin_prefetch(next + p * from.position + count - 1);
                }
                run.copy_rows(from.at(first) + c * from.channel, from.position, from.length, count, some_.data(),
                              count);
                turn(some_.data(), count, from.length, count, to.data + c * to.channel, to.line);
            }
        }
        return to;
    }
    // Where lines of a map are to be written that `write` then takes there: the map itself but for strided lines.
    Lines<A> target(const Lines<A>& map, int64_t first) {
        if (strided(map)) return like(map);
        Lines<A> lines = map;
        lines.data = map.at(first);
        return lines;
    }
    void write(const Lines<A>& map, int64_t first, int64_t count) {
        if (!strided(map)) return;
        const Lines<A> from = like(map);
        for (int64_t c = 0; c < map.channels; ++c)
            turn(from.data + c * from.channel, from.line, count, map.length, map.at(first) + c * map.channel,
                 map.position);
    }

  private:
    template <class U>
    static bool strided(const Lines<U>& map) {
        return map.position != 1 && map.channel != 1;
    }
    template <class U>
    Lines<A> like(const Lines<U>& map) {
        const bool by_position = map.position != 1 && map.channel == 1;
        return {numbers_.data(),
                map.channels,
                map.length,
                by_position ? 1 : map.length + 16,
                by_position ? map.channels + 16 : 1,
                size_};
    }
    int64_t size_;
    std::vector<A> numbers_, some_;
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
};

int64_t panels_of(int64_t n, int64_t width) { return (n + width - 1) / width; }

// The size of blocks of about the same size, whole panels, that a line is cut into.
int64_t block_of(int64_t length, int64_t width) {
    const int64_t blocks = panels_of(length, kMost);
    return panels_of(panels_of(length, blocks), width) * width;
}

// Scores of a position with itself into minus infinity. scores: panels of `columns` by rows, the first of which are
// positions `column` and `row` of the line.
template <class A>
void mask_self(A* scores, int64_t panel, int64_t width, int64_t column, int64_t columns, int64_t row, int64_t rows) {
    for (int64_t i = std::max(column, row); i < std::min(column + columns, row + rows); ++i)
        scores[(i - column) / width * panel + (i - row) * width + (i - column) % width] =
            -std::numeric_limits<A>::infinity();
}

template <class T>
void attend(const Inputs<T>& in, bool columns, Result<T>& out, Accumulator<T>* state) {
    using A = Accumulator<T>;
    const AttentionKernels<A>& run = attention_kernels<A>();
    const int64_t depth = in.query.channels, channels = in.value.channels, length = in.length(columns);
    const int64_t width = run.panel, block = block_of(length, width), most = in.at_once(columns);
    const int64_t groups = panels_of(in.lines(columns), most), step = columns ? in.width : 1;
    parallel_ranges(in.batch() * groups, in.work(), [&](int64_t begin, int64_t end) {
        Group<T> some_queries(depth, length, most), some_keys(depth, length, most), some_values(channels, length, most);
        Group<A> some_sums(channels, columns ? length : 0, most);
        std::vector<A> queries(block * depth), scores(block * block), sums(block * channels);
        std::vector<A> peak(block), sum(block), factor(block);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t sample = unit / groups, first = unit % groups * most;
            const int64_t count = std::min(most, in.lines(columns) - first);
            const Lines<A> query = some_queries.read(in.lines_of(in.query, sample, columns), first, count);
            const Lines<A> key = some_keys.read(in.lines_of(in.key, sample, columns), first, count);
            const Lines<A> value = some_values.read(in.lines_of(in.value, sample, columns), first, count);
            A* peaks = state + sample * 2 * in.height * in.width;
            A* totals = peaks + in.height * in.width;
            const Lines<A> summed = in.lines_of(out.sums, out.map, sample, columns);
            const Lines<T> result = in.lines_of(out.map, sample, columns);
            const Lines<A> target = columns ? some_sums.target(summed, first) : summed;
            for (int64_t i = 0; i < count; ++i)
                for (int64_t q = 0; q < length; q += block) {
                    const int64_t here = std::min(block, length - q), panels = panels_of(here, width);
                    const int64_t at = (first + i) * (columns ? 1 : in.width) + q * step;
                    run.pack(query.at(i, q), query.position, query.channel, here, depth, A(1), queries.data());
                    // Not minus infinity: a column may have nothing but itself, or scores that are all that.
                    std::fill(peak.begin(), peak.end(), std::numeric_limits<A>::lowest());
                    std::fill(sum.begin(), sum.end(), A(0));
                    if (!columns) {
                        std::copy_n(peaks + at, here, peak.begin());
                        std::copy_n(totals + at, here, sum.begin());
                        run.pack(summed.at(first + i, q), summed.position, summed.channel, here, channels, A(1),
                                 sums.data());
                    }
                    for (int64_t k = 0; k < length; k += block) {
                        const int64_t keys = std::min(block, length - k);
                        run.product({key.at(i, k), key.position, key.channel, queries.data(), depth * width,
                                     scores.data(), block * width, keys, depth, panels});
                        if (columns) mask_self(scores.data(), block * width, width, q, here, k, keys);
                        for (int64_t p = 0; p < panels; ++p)
                            run.soften(&scores[p * block * width], keys, &peak[p * width], &sum[p * width],
                                       &factor[p * width]);
                        Product<A> weighted{value.at(i, k), value.channel, value.position,   scores.data(),
                                            block * width,  sums.data(),   channels * width, channels,
                                            keys,           panels};
                        weighted.adds = !columns || k > 0;
                        weighted.factors = factor.data();
                        run.product(weighted);
                    }
                    for (int64_t j = 0; j < here; ++j) {
                        factor[j] = columns ? A(1) : A(1) / sum[j];
                        peaks[at + j * step] = peak[j];
                        totals[at + j * step] = columns ? sum[j] : factor[j];
                    }
                    for (int64_t p = 0; p < panels; ++p) {
                        const int64_t lanes = std::min(width, here - p * width), from = p * channels * width;
                        if (columns)
                            run.write(&sums[from], &factor[p * width], channels, lanes, target.at(i, q + p * width),
                                      target.channel, target.position);
                        else
                            attention_kernels<T>().write(&sums[from], &factor[p * width], channels, lanes,
                                                         result.at(first + i, q + p * width), result.channel,
                                                         result.position);
                    }
                }
            if (columns) some_sums.write(summed, first, count);
        }
    });
}

// Each position's product of two maps, summed over the channels.
template <class T>
std::vector<Accumulator<T>> dots(const Inputs<T>& in, const MapView<T>& a, const MapView<T>& b) {
    using A = Accumulator<T>;
    std::vector<A> out(in.batch() * in.height * in.width);
    const int64_t most = in.at_once(false), groups = panels_of(in.height, most);
    parallel_ranges(in.batch() * groups, in.batch() * a.sample_size(), [&](int64_t begin, int64_t end) {
        Group<T> left(a.channels, in.width, most), right(a.channels, in.width, most);
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t sample = unit / groups, first = unit % groups * most;
            const int64_t count = std::min(most, in.height - first);
            const Lines<A> x = left.read(in.lines_of(a, sample, false), first, count);
            const Lines<A> y = right.read(in.lines_of(b, sample, false), first, count);
            for (int64_t i = 0; i < count; ++i) {
                A* sums = &out[(sample * in.height + first + i) * in.width];
                const A *of_x = x.at(i), *of_y = y.at(i);
                if (x.position == 1) {
                    for (int64_t c = 0; c < a.channels; ++c)
                        for (int64_t p = 0; p < in.width; ++p)
                            sums[p] += of_x[c * x.channel + p] * of_y[c * y.channel + p * y.position];
                } else {
                    for (int64_t p = 0; p < in.width; ++p)
                        for (int64_t c = 0; c < a.channels; ++c)
                            sums[p] += of_x[c + p * x.position] * of_y[c * y.channel + p * y.position];
                }
            }
        }
    });
    return out;
}

// The results of a backward pass over one kind of lines: panels go to the sums after columns, to the map after rows.
template <class T>
struct Gradient {
    using A = Accumulator<T>;
    Result<T>& result;
    const Inputs<T>& in;
    const bool columns;
    Group<A> some;
    Lines<A> sums, target;
    Lines<T> map;
    Gradient(Result<T>& to, const Inputs<T>& inputs, bool of_columns, int64_t most)
        : result(to),
          in(inputs),
          columns(of_columns),
          some(to.map.channels, of_columns ? inputs.length(true) : 0, most),
          sums{},
          target{},
          map{} {}
    void begin(int64_t sample, int64_t first) {
        sums = in.lines_of(result.sums, result.map, sample, columns);
        map = in.lines_of(result.map, sample, columns);
        map.data = map.at(first);
        target = columns ? some.target(sums, first) : sums;
    }
    // Positions from `at` on in the panels' lanes, channels in their rows, or the other way round.
    void write(const A* panel, const A* ones, int64_t line, int64_t at, int64_t lanes) {
        if (columns)
            attention_kernels<A>().write(panel, ones, map.channels, lanes, target.at(line, at), target.channel,
                                         target.position);
        else
            attention_kernels<T>().write(panel, ones, map.channels, lanes, map.at(line, at), map.channel, map.position);
    }
    void write_turned(const A* panel, const A* ones, int64_t line, int64_t channel, int64_t lanes) {
        if (columns)
            attention_kernels<A>().write(panel, ones, map.length, lanes, target.at(line) + channel * target.channel,
                                         target.position, target.channel);
        else
            attention_kernels<T>().write(panel, ones, map.length, lanes, map.at(line) + channel * map.channel,
                                         map.position, map.channel);
    }
    void end(int64_t first, int64_t count) {
        if (columns) some.write(sums, first, count);
    }
};

template <class T>
void attend_back(const Inputs<T>& in, bool columns, const MapView<T>& gradient, const Accumulator<T>* state,
                 const Accumulator<T>* dots, Result<T>& grad_query, Result<T>& grad_key, Result<T>& grad_value) {
    using A = Accumulator<T>;
    const AttentionKernels<A>& run = attention_kernels<A>();
    const int64_t depth = in.query.channels, channels = in.value.channels, length = in.length(columns);
    const int64_t width = run.panel, block = block_of(length, width), most = in.at_once(columns);
    const int64_t groups = panels_of(in.lines(columns), most), depth_panels = panels_of(depth, width);
    const int64_t step = columns ? in.width : 1, panel = block * width;
    parallel_ranges(in.batch() * groups, in.work(), [&](int64_t begin, int64_t end) {
        Group<T> some_queries(depth, length, most), some_keys(depth, length, most);
        Group<T> some_values(channels, length, most), some_grads(channels, length, most);
        Gradient<T> to_query(grad_query, in, columns, most), to_key(grad_key, in, columns, most),
            to_value(grad_value, in, columns, most);
        std::vector<A> keys(block * depth), values(block * channels), of_keys(keys.size()), of_values(values.size());
        std::vector<A> turned(depth_panels * panel), of_queries(depth_panels * width * length);
        std::vector<A> scores(block * block), slopes(scores.size()), peak(length), inverse(length), dot(length);
        const std::vector<A> ones(width, A(1));
        for (int64_t unit = begin; unit < end; ++unit) {
            const int64_t sample = unit / groups, first = unit % groups * most;
            const int64_t count = std::min(most, in.lines(columns) - first);
            const Lines<A> query = some_queries.read(in.lines_of(in.query, sample, columns), first, count);
            const Lines<A> key = some_keys.read(in.lines_of(in.key, sample, columns), first, count);
            const Lines<A> value = some_values.read(in.lines_of(in.value, sample, columns), first, count);
            const Lines<A> grad = some_grads.read(in.lines_of(gradient, sample, columns), first, count);
            for (Gradient<T>* to : {&to_query, &to_key, &to_value}) to->begin(sample, first);
            for (int64_t i = 0; i < count; ++i) {
                const int64_t at = (first + i) * (columns ? 1 : in.width), size = in.height * in.width;
                for (int64_t q = 0; q < length; ++q) {
                    peak[q] = state[sample * 2 * size + at + q * step];
                    inverse[q] = state[(sample * 2 + 1) * size + at + q * step];
                    dot[q] = dots[sample * size + at + q * step];
                }
                if (columns)
                    std::fill(of_queries.begin(), of_queries.end(), A(0));
                else
                    run.pack(to_query.sums.at(first + i), to_query.sums.channel, to_query.sums.position, depth, length,
                             A(1), of_queries.data());
                for (int64_t k = 0; k < length; k += block) {
                    const int64_t here = std::min(block, length - k), panels = panels_of(here, width);
                    run.pack(key.at(i, k), key.position, key.channel, here, depth, A(1), keys.data());
                    run.pack(key.at(i, k), key.channel, key.position, depth, here, A(1), turned.data());
                    run.pack(value.at(i, k), value.position, value.channel, here, channels, A(1), values.data());
                    if (!columns) {
                        const Lines<A>& of_key = to_key.sums;
                        const Lines<A>& of_value = to_value.sums;
                        run.pack(of_key.at(first + i, k), of_key.position, of_key.channel, here, depth, A(1),
                                 of_keys.data());
                        run.pack(of_value.at(first + i, k), of_value.position, of_value.channel, here, channels, A(1),
                                 of_values.data());
                    }
                    for (int64_t q = 0; q < length; q += block) {
                        const int64_t rows = std::min(block, length - q);
                        const bool adds = !columns || q > 0;
                        const A *a = query.at(i, q), *g = grad.at(i, q);
                        run.product({a, query.position, query.channel, keys.data(), depth * width, scores.data(), panel,
                                     rows, depth, panels});
                        if (columns) mask_self(scores.data(), panel, width, k, here, q, rows);
                        for (int64_t p = 0; p < panels; ++p)
                            run.probabilities(&scores[p * panel], rows, &peak[q], &inverse[q]);
                        run.product({g, grad.channel, grad.position, scores.data(), panel, of_values.data(),
                                     channels * width, channels, rows, panels, adds});
                        run.product({g, grad.position, grad.channel, values.data(), channels * width, slopes.data(),
                                     panel, rows, channels, panels});
                        for (int64_t p = 0; p < panels; ++p)
                            run.score_gradients(&slopes[p * panel], &scores[p * panel], rows, &dot[q]);
                        run.product({a, query.channel, query.position, slopes.data(), panel, of_keys.data(),
                                     depth * width, depth, rows, panels, adds});
                        for (int64_t p = 0; p < panels; ++p)
                            run.product({&slopes[p * panel], width, 1, turned.data() + p * width * width, here * width,
                                         of_queries.data() + q * width, length * width, rows,
                                         std::min(width, here - p * width), depth_panels, true});
                    }
                    for (int64_t p = 0; p < panels; ++p) {
                        const int64_t lanes = std::min(width, here - p * width);
                        to_key.write(of_keys.data() + p * depth * width, ones.data(), i, k + p * width, lanes);
                        to_value.write(of_values.data() + p * channels * width, ones.data(), i, k + p * width, lanes);
                    }
                }
                for (int64_t p = 0; p < depth_panels; ++p)
                    to_query.write_turned(&of_queries[p * width * length], ones.data(), i, p * width,
                                          std::min(width, depth - p * width));
            }
            for (Gradient<T>* to : {&to_query, &to_key, &to_value}) to->end(first, count);
        }
    });
}

void zero(const Tensor& tensor, int64_t itemsize) { std::memset(tensor.data_ptr(), 0, tensor.numel() * itemsize); }

}  // namespace

std::tuple<Tensor, Tensor> criss_cross_attention(const Tensor& query, const Tensor& key, const Tensor& value) {
    return dispatch(query, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Inputs<T> in(query, key, value);
        Result<T> out(in.value_dense);
        Tensor state = empty_tensor(query, {in.batch(), 2, in.height * in.width}, kScalarType<A>);
        if (out.tensor.numel() == 0) {
            zero(state, sizeof(A));
            return std::make_tuple(out.tensor, state);
        }
        for (const bool columns : {true, false}) attend(in, columns, out, static_cast<A*>(state.data_ptr()));
        return std::make_tuple(out.tensor, state);
    });
}

std::tuple<Tensor, Tensor, Tensor> criss_cross_attention_backward(const Tensor& grad, const Tensor& query,
                                                                  const Tensor& key, const Tensor& value,
                                                                  const Tensor& out, const Tensor& state) {
    return dispatch(query, [&](auto* type) {
        using T = std::remove_pointer_t<decltype(type)>;
        using A = Accumulator<T>;
        const Inputs<T> in(query, key, value);
        Result<T> grad_query(in.query_dense), grad_key(in.key_dense), grad_value(in.value_dense);
        if (out.numel() == 0) {
            for (const Result<T>* result : {&grad_query, &grad_key, &grad_value}) zero(result->tensor, sizeof(T));
        } else {
            const Tensor out_dense = dense_map(out), grad_dense = in_layout_of<T>(out_dense, grad);
            const MapView<T> gradient(grad_dense);
            const std::vector<A> dot = dots(in, gradient, MapView<T>(out_dense));
            for (const bool columns : {true, false})
                attend_back(in, columns, gradient, static_cast<const A*>(state.data_ptr()), dot.data(), grad_query,
                            grad_key, grad_value);
        }
        return std::make_tuple(grad_query.tensor, grad_key.tensor, grad_value.tensor);
    });
}

}  // namespace fused_attn::cpu

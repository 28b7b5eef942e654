// The kernels of kernels.h for several gates on one map. At every element there are a channel's gate, a position's
// and a strip's, the last of them the row's and the column's put together (products are of three, sums of three; where
// a gate is missing stands 1 or 0). In an NCHW map the strips of a channel are laid out by position first, and their
// gradient by position is added up along rows and columns while it is in cache.
// Included by kernels.inl inside the namespace of one instruction set.

template <class A>
struct MixVectors {
    Vec<A> channel, spatial, strip;
};
// What a gradient d comes to: for x, and for a channel's, a position's and a strip's gate.
template <class A>
struct MixTerms {
    Vec<A> x, channel, spatial, strip;
};

template <class T, class V>
inline V mixed(int combine, V x, const MixVectors<Accumulator<T>>& g) {
    using A = Accumulator<T>;
    switch (combine) {
        case kProductOf:
            return x * (g.channel * g.spatial * g.strip);
        case kSumOf:
            return x * (g.channel + g.spatial + g.strip);
        case kMaxOf: {  // of products rounded to T, as in eager; NaN stays NaN
            const V a = rounded_to<T>(x * g.channel), b = rounded_to<T>(x * g.spatial);
            return ((a >= b) | (a != a)) ? a : b;
        }
        case kStripsOf:
            return x * sigmoid<A>(g.strip);
        case kGateOf:
            return x * sigmoid<A>(g.spatial);
        default:
            return x + x * sigmoid<A>(g.channel * g.spatial);
    }
}
template <class T, class V>
inline MixTerms<Accumulator<T>> mixed_grad(int combine, V d, V x, const MixVectors<Accumulator<T>>& g) {
    using A = Accumulator<T>;
    const V dx = d * x, zero{};
    switch (combine) {
        case kProductOf: {
            const V rest = g.channel * g.spatial;
            return {d * (rest * g.strip), dx * (g.spatial * g.strip), dx * (g.channel * g.strip), dx * rest};
        }
        case kSumOf:
            return {d * (g.channel + g.spatial + g.strip), dx, dx, dx};
        case kMaxOf: {  // halves where both are equal; both take all of it where one is NaN, as in torch
            const V a = rounded_to<T>(x * g.channel), b = rounded_to<T>(x * g.spatial);
            const V share = a == b ? d * splat<A>(A(0.5)) : d;
            const V to_channel = a < b ? zero : share, to_spatial = a > b ? zero : share;
            return {to_channel * g.channel + to_spatial * g.spatial, to_channel * x, to_spatial * x, zero};
        }
        case kStripsOf: {
            const V open = sigmoid<A>(g.strip);
            return {d * open, zero, zero, dx * (open * (splat<A>(1) - open))};
        }
        case kGateOf: {
            const V open = sigmoid<A>(g.spatial);
            return {d * open, zero, dx * (open * (splat<A>(1) - open)), zero};
        }
        default: {
            const V open = sigmoid<A>(g.channel * g.spatial);
            const V slope = dx * (open * (splat<A>(1) - open));
            return {d + d * open, slope * g.spatial, slope * g.channel, zero};
        }
    }
}
// What stands for a gate that is not there.
template <class A>
inline A neutral(int combine) {
    return combine == kSumOf || combine == kStripsOf ? A(0) : A(1);
}

// NCHW: calls body(first, last) for spans of whole rows.
template <class Body>
inline void row_spans(int64_t height, int64_t width, bool strips, Body body) {
    const int64_t most = greater(1, kSpan / greater(1, width)), rows = strips ? lesser(most, kBlock) : most;
    for (int64_t first = 0, last; first < height; first = last) {
        last = height - first < 2 * rows ? height : first + rows;
        body(first, last);
    }
}
// A channel's strips in an NCHW map. Rows are written and read in whole vectors, in order, with slack behind the last.
template <class A>
class Strips {
  public:
    explicit Strips(const MixedGates<A>& gates, int64_t rows)
        : gates_(gates),
          column_(gates.width + kLanes<A>),
          value_(rows * gates.width + kLanes<A>),
          grad_(value_.size()) {
        column_.fill(neutral<A>(gates.combine));
    }
    A* value() { return &value_[0]; }
    A* grad() { return &grad_[0]; }
    // Rows first..last of channel c by position.
    void lay_out(int64_t c, int64_t first, int64_t last) {
        const bool product = gates_.combine == kProductOf;
        if (gates_.columns)
            for (int64_t w = 0; w < gates_.width; ++w) column_[w] = gates_.columns[c * gates_.width + w];
        for (int64_t h = first; h < last; ++h) {
            const Vec<A> row = splat<A>(row_gate(c, h));
            A* to = value() + (h - first) * gates_.width;
            for (int64_t w = 0; w < gates_.width; w += kLanes<A>) {
                const Vec<A> column = load(&column_[w]);
                store(product ? row * column : row + column, to + w);
            }
        }
    }
    // grad() added up along the rows and the columns.
    void reduce(int64_t c, int64_t first, int64_t last, const MixedSums<A>& sums) {
        constexpr int64_t lanes = kLanes<A>;
        const bool product = gates_.combine == kProductOf;
        const int64_t width = gates_.width;
        if (sums.rows) {
            for (int64_t h = first; h < last; ++h) {
                const A* from = grad() + (h - first) * width;
                Vec<A> total{};
                double done = 0;
                for (int64_t w = 0; w < width; w += lanes) {
                    Vec<A> v = load(from + w);
                    if (product) v *= load(&column_[w]);
                    total += width - w < lanes ? (lanes_below<A>(width - w) ? v : Vec<A>{}) : v;
                    if (w % (kBlock * lanes) == (kBlock - 1) * lanes) done += sum_of<A>(total), total = Vec<A>{};
                }
                sums.rows[c * gates_.height + h] = static_cast<A>(done + sum_of<A>(total));
            }
        }
        if (sums.columns) {
            for (int64_t w = 0; w < width; w += lanes) {
                Vec<A> total{};
                for (int64_t h = first; h < last; ++h) {
                    const Vec<A> v = load(grad() + (h - first) * width + w);
                    total += product ? v * splat<A>(row_gate(c, h)) : v;
                }
                A* to = sums.columns + c * width + w;
                const int64_t n = lesser(lanes, width - w);
                store_n(load_n(to, n) + total, to, n);
            }
        }
    }

  private:
    A row_gate(int64_t c, int64_t h) const {
        return gates_.rows ? gates_.rows[c * gates_.height + h] : neutral<A>(gates_.combine);
    }
    MixedGates<A> gates_;
    Buffer<A> column_, value_, grad_;
};

template <class T>
void mix_nchw(const T* x, const Panel& panel, const MixedGates<Accumulator<T>>& gates, T* y) {
    using A = Accumulator<T>;
    const int combine = gates.combine;
    const bool strips = gates.rows || gates.columns;
    const A* const spatial = gates.spatial;
    row_spans(gates.height, gates.width, strips, [&](int64_t top, int64_t bottom) {
        const int64_t first = top * gates.width, last = bottom * gates.width;
        Strips<A> strip(gates, strips ? bottom - top : 0);
        const A* const strip_at = strip.value();
        for (int64_t c = 0; c < panel.channels; ++c) {
            if (strips) strip.lay_out(c, top, bottom);
            MixVectors<A> g;
            g.channel = splat<A>(gates.channel ? gates.channel[c] : neutral<A>(combine));
            g.spatial = g.strip = splat<A>(neutral<A>(combine));
            const int64_t row = c * panel.positions;
            vectors<A>(first, last, [&](int64_t p, int64_t n, auto) {
                if (spatial) g.spatial = load_n(spatial + p, n);
                if (strips) g.strip = load(strip_at + p - first);
                store_n(mixed<T>(combine, load_n(x + row + p, n), g), y + row + p, n);
            });
        }
    });
}

template <class T>
void mix_grad_nchw(const T* grad, const T* x, const Panel& panel, const MixedGates<Accumulator<T>>& gates, T* grad_x,
                   const MixedSums<Accumulator<T>>& sums) {
    using A = Accumulator<T>;
    constexpr int64_t lanes = kLanes<A>;
    const int combine = gates.combine;
    const bool strips = gates.rows || gates.columns, strip_sums = sums.rows || sums.columns;
    const A* const spatial = gates.spatial;
    Buffer<double> channel_total(panel.channels + 1);
    channel_total.fill(0);
    if (sums.columns)
        for (int64_t i = 0; i < panel.channels * gates.width; ++i) sums.columns[i] = A(0);
    row_spans(gates.height, gates.width, strips, [&](int64_t top, int64_t bottom) {
        const int64_t first = top * gates.width, last = bottom * gates.width, length = sums.spatial ? last - first : 0;
        Strips<A> strip(gates, strips ? bottom - top : 0);
        const A* const strip_at = strip.value();
        A* const strip_grad = strip.grad();
        Buffer<double> total(length + 1);
        Buffer<A> part(length + lanes);
        total.fill(0);
        for (int64_t begin = 0; begin < panel.channels; begin += kBlock) {
            part.fill(A(0));
            for (int64_t c = begin; c < lesser(panel.channels, begin + kBlock); ++c) {
                if (strips) strip.lay_out(c, top, bottom);
                MixVectors<A> g;
                g.channel = splat<A>(gates.channel ? gates.channel[c] : neutral<A>(combine));
                g.spatial = g.strip = splat<A>(neutral<A>(combine));
                const int64_t row = c * panel.positions;
                for (int64_t from = first, to; from < last; from = to) {
                    to = last - from < (kBlock + 1) * lanes ? last : from + kBlock * lanes;
                    Vec<A> sum{};
                    vectors<A>(from, to, [&](int64_t p, int64_t n, auto counted) {
                        if (spatial) g.spatial = load_n(spatial + p, n);
                        if (strips) g.strip = load(strip_at + p - first);
                        const MixTerms<A> t =
                            mixed_grad<T>(combine, load_n(grad + row + p, n), load_n(x + row + p, n), g);
                        store_n(t.x, grad_x + row + p, n);
                        sum += counted.of(t.channel);
                        if (length) {
                            A* at = &part[p - first];
                            store(load(at) + counted.of(t.spatial), at);
                        }
                        if (strip_sums) store(t.strip, strip_grad + p - first);
                    });
                    channel_total[c] += sum_of<A>(sum);
                }
                if (strip_sums) strip.reduce(c, top, bottom, sums);
            }
            for (int64_t i = 0; i < length; ++i) total[i] += part[i];
        }
        for (int64_t i = 0; i < length; ++i) sums.spatial[first + i] = static_cast<A>(total[i]);
    });
    if (sums.channel)
        for (int64_t c = 0; c < panel.channels; ++c) sums.channel[c] = static_cast<A>(channel_total[c]);
}

// channels_last: the gates at some channels of a position, and the row's and the column's by themselves.
template <class A>
struct MixColumn {
    Vec<A> row, column;
    MixVectors<A> gates;
    MixColumn(const MixedGates<A>& g, int64_t channels, int64_t h, int64_t w, Vec<A> spatial, int64_t c, int64_t n) {
        const Vec<A> missing = splat<A>(neutral<A>(g.combine));
        row = g.rows ? load_n(g.rows + h * channels + c, n) : missing;
        column = g.columns ? load_n(g.columns + w * channels + c, n) : missing;
        gates.channel = g.channel ? load_n(g.channel + c, n) : missing;
        gates.spatial = spatial;
        gates.strip = g.combine == kProductOf ? row * column : row + column;
    }
};

template <class T>
void mix_nhwc(const T* x, const Panel& panel, const MixedGates<Accumulator<T>>& gates_in, T* y) {
    using A = Accumulator<T>;
    const MixedGates<A> gates = gates_in;
    const int64_t channels = panel.channels;
    for (int64_t h = 0, p = 0; h < gates.height; ++h)
        for (int64_t w = 0; w < gates.width; ++w, ++p) {
            const Vec<A> spatial = splat<A>(gates.spatial ? gates.spatial[p] : neutral<A>(gates.combine));
            vectors<A>(0, channels, [=](int64_t c, int64_t n, auto) {
                const MixColumn<A> at(gates, channels, h, w, spatial, c, n);
                const int64_t i = p * channels + c;
                store_n(mixed<T>(gates.combine, load_n(x + i, n), at.gates), y + i, n);
            });
        }
}

template <class T>
void mix_grad_nhwc(const T* grad, const T* x, const Panel& panel, const MixedGates<Accumulator<T>>& gates_in, T* grad_x,
                   const MixedSums<Accumulator<T>>& sums) {
    using A = Accumulator<T>;
    constexpr int64_t lanes = kLanes<A>;
    const MixedGates<A> gates = gates_in;
    const bool product = gates.combine == kProductOf;
    const int64_t channels = panel.channels, height = gates.height, width = gates.width, row = width * channels;
    Buffer<double> channel_total(channels + 1);
    Buffer<A> channel_part(channels + lanes), row_part(channels + lanes), column_part((sums.columns ? row : 0) + lanes);
    channel_total.fill(0);
    channel_part.fill(A(0));
    column_part.fill(A(0));
    A *const to_channel = &channel_part[0], *const to_row = &row_part[0], *const to_column = &column_part[0];
    if (sums.columns)
        for (int64_t i = 0; i < row; ++i) sums.columns[i] = A(0);
    auto close = [&](A* part, int64_t n, auto* total) {  // float sums are of kBlock terms at most
        for (int64_t i = 0; i < n; ++i) total[i] += part[i], part[i] = A(0);
    };
    for (int64_t h = 0, p = 0; h < height; ++h) {
        row_part.fill(A(0));
        if (sums.rows)
            for (int64_t c = 0; c < channels; ++c) sums.rows[h * channels + c] = A(0);
        for (int64_t w = 0; w < width; ++w, ++p) {
            const Vec<A> spatial = splat<A>(gates.spatial ? gates.spatial[p] : neutral<A>(gates.combine));
            double total = 0;
            for (int64_t begin = 0; begin < channels;) {
                const int64_t end = channels - begin < (kBlock + 1) * lanes ? channels : begin + kBlock * lanes;
                Vec<A> sum{};
                vectors<A>(begin, end, [&](int64_t c, int64_t n, auto counted) {
                    const MixColumn<A> at(gates, channels, h, w, spatial, c, n);
                    const int64_t i = p * channels + c;
                    const MixTerms<A> t = mixed_grad<T>(gates.combine, load_n(grad + i, n), load_n(x + i, n), at.gates);
                    store_n(t.x, grad_x + i, n);
                    sum += counted.of(t.spatial);
                    auto add = [&](Vec<A> v, A* to) { store(load(to) + counted.of(v), to); };
                    if (sums.channel) add(t.channel, to_channel + c);
                    if (sums.rows) add(product ? t.strip * at.column : t.strip, to_row + c);
                    if (sums.columns) add(product ? t.strip * at.row : t.strip, to_column + w * channels + c);
                });
                total += sum_of<A>(sum);
                begin = end;
            }
            if (sums.spatial) sums.spatial[p] = static_cast<A>(total);
            if (sums.channel && p % kBlock == kBlock - 1) close(to_channel, channels, &channel_total[0]);
            if (sums.rows && (w % kBlock == kBlock - 1 || w == width - 1))
                close(to_row, channels, sums.rows + h * channels);
        }
        if (sums.columns && (h % kBlock == kBlock - 1 || h == height - 1)) close(to_column, row, sums.columns);
    }
    if (sums.channel)
        for (int64_t c = 0; c < channels; ++c) sums.channel[c] = static_cast<A>(channel_total[c] + channel_part[c]);
}

template <class T>
void mix(const T* x, Panel panel, MixedGates<Accumulator<T>> gates, T* y) {
    (panel.channels_last ? mix_nhwc<T> : mix_nchw<T>)(x, panel, gates, y);
}
template <class T>
void mix_grad(const T* grad, const T* x, Panel panel, MixedGates<Accumulator<T>> gates, T* grad_x,
              MixedSums<Accumulator<T>> sums) {
    (panel.channels_last ? mix_grad_nhwc<T> : mix_grad_nchw<T>)(grad, x, panel, gates, grad_x, sums);
}

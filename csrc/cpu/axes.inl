// The kernels of axes.h. Included by kernels.inl inside the namespace of one instruction set.
//
// A row of a map is often shorter than a few vectors, and rarely a multiple of one. Vectors are cut where a row ends:
// lanes behind it hold what comes next in memory, and do not count.

constexpr int64_t kAxisBlock = 4096;  // elements (of four channels) that stay in the first cache between two loops

// Calls step(i, lanes) for 0..n by vectors; the lanes of the last one that are not below n do not count.
template <class A, class Step>
inline void cut_vectors(int64_t n, Step step) {
    for (int64_t i = 0; i < n; i += kLanes<A>) step(i, SomeLanes<A>{lanes_below<A>(lesser(n - i, kLanes<A>))});
}
// The vector at `at` of an array of n elements: zeros behind its end.
template <class T>
__attribute__((noinline)) Vec<Accumulator<T>> load_end(const T* p, int64_t n) {
    return load_tail(p, n);
}
template <class T>
inline Vec<Accumulator<T>> load_before(const T* p, int64_t at, int64_t n) {
    return at + kLanes<Accumulator<T>> <= n ? load(p + at) : load_end(p + at, n - at);
}

// Running sums and maxima of places that lie next to each other; sums go to `total` now and then.
template <class A, bool kMax>
struct AxisBuffer {
    using Lane = std::remove_reference_t<decltype(Mask<A>{}[0])>;
    explicit AxisBuffer(int64_t n) : size(n), part(n), total(n), value(kMax ? n : 1), tag(kMax ? n : 1) {}
    int64_t size;
    Buffer<A> part;
    Buffer<double> total;
    Buffer<A> value;
    Buffer<Lane> tag;

    void begin() {
        part.fill(A(0));
        total.fill(0);
        if constexpr (kMax) {
            value.fill(-kInfinity<A>);
            tag.fill(0);
        }
    }
    void flush() {
        for (int64_t i = 0; i < size; ++i) total[i] += part[i];
        part.fill(A(0));
    }
    // Adds kCount vectors of the same places, with numbers id[k] along the axis.
    template <int kCount>
    __attribute__((always_inline)) void update(int64_t at, const Vec<A>* v, const Mask<A>* id, SomeLanes<A> counted,
                                               bool even) {
        Vec<A> sum = v[0];
        for (int k = 1; k < kCount; ++k) sum += v[k];
        store(load(&part[at]) + counted.of(sum), &part[at]);
        if constexpr (kMax) {
            RunningMax<A> running{load(&value[at]), load_bytes<Mask<A>>(&tag[at])};
            for (int k = 0; k < kCount; ++k) running.update(v[k], id[k], counted.mask(), even);
            store(running.value, &value[at]);
            std::memcpy(&tag[at], &running.tag, sizeof(running.tag));
        }
    }
    void write(int64_t from, int64_t n, AxisPool<A> to, int64_t at) {
        for (int64_t i = 0; i < n; ++i) to.sum[at + i] = static_cast<A>(total[from + i] + part[from + i]);
        if constexpr (kMax) {
            for (int64_t i = 0; i < n; ++i) to.peak[at + i] = value[from + i];
            for (int64_t i = 0; i < n; ++i) to.tag[at + i] = static_cast<int32_t>(tag[from + i]);
        }
    }
};

// One row of kRows channels: its own pools, and its share of the columns'.
template <class T, bool kMax, int kRows>
inline void pool_rows(const T* x, int64_t size, AxisPanel panel, bool even, int64_t c, int64_t h, int64_t padded,
                      AxisBuffer<Accumulator<T>, kMax>& columns, AxisPool<Accumulator<T>> rows) {
    using A = Accumulator<T>;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t width = panel.width, plane = panel.height * width;
    const Mask<A> row = numbers_from<true, A>(h);
    RunningMax<A> running[kRows];
    double total[kRows] = {};
    for (int64_t first = 0; first < width; first += kBlock * lanes) {
        Vec<A> sums[kRows] = {};
        cut_vectors<A>(lesser(width - first, kBlock * lanes), [&](int64_t i, SomeLanes<A> counted) {
            const int64_t w = first + i;
            const Mask<A> column = counting_from<A>(w);
            for (int k = 0; k < kRows; ++k) {
                const Vec<A> v = load_before(x, (c + k) * plane + h * width + w, size);
                sums[k] += counted.of(v);
                if constexpr (kMax) running[k].update(v, column, counted.mask(), even);
                columns.template update<1>(k * padded + w, &v, &row, counted, even);
            }
        });
        for (int k = 0; k < kRows; ++k) total[k] += sum_of<A>(sums[k]);
    }
    A peak[kRows];
    int32_t tag[kRows];
    if constexpr (kMax) finish<kRows>(running, even, peak, tag);
    for (int k = 0; k < kRows; ++k) {
        const int64_t to = (c + k) * panel.height + h;
        rows.sum[to] = static_cast<A>(total[k]);
        if constexpr (kMax) rows.peak[to] = peak[k], rows.tag[to] = tag[k];
    }
}

// Four channels at a time, some of their rows: first along the rows, then along the channels, from cache.
template <class T, bool kMax, bool kPlane>
void pool_axes_nchw(const T* x, AxisPanel panel, bool even, AxisPool<Accumulator<T>> rows,
                    AxisPool<Accumulator<T>> columns, AxisPool<Accumulator<T>> plane) {
    using A = Accumulator<T>;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t channels = panel.channels, height = panel.height, width = panel.width, positions = height * width;
    const int64_t padded = (width + lanes - 1) / lanes * lanes, size = channels * positions;
    const int64_t step = greater(1, lesser(kBlock, kAxisBlock / (4 * greater(1, width))));
    AxisBuffer<A, kMax> down(4 * padded);
    AxisBuffer<A, kPlane> across(kPlane ? positions + lanes : 0);
    if constexpr (kPlane) across.begin();
    for (int64_t begin = 0; begin < channels; begin += kBlock) {
        fours(begin, lesser(channels, begin + kBlock), [&](auto count, int64_t c) {
            constexpr int kRows = decltype(count)::value;
            down.begin();
            for (int64_t first = 0, last; first < height; first = last) {
                last = lesser(height, first + step);
                for (int64_t h = first; h < last; ++h)
                    pool_rows<T, kMax, kRows>(x, size, panel, even, c, h, padded, down, rows);
                if (last < height) down.flush();
                if constexpr (kPlane) {
                    Mask<A> id[kRows];
                    for (int k = 0; k < kRows; ++k) id[k] = numbers_from<true, A>(panel.first + c + k);
                    const int64_t at = first * width;
                    cut_vectors<A>((last - first) * width, [&](int64_t i, SomeLanes<A> counted) {
                        Vec<A> v[kRows];
                        for (int k = 0; k < kRows; ++k) v[k] = load_before(x, (c + k) * positions + at + i, size);
                        across.template update<kRows>(at + i, v, id, counted, even);
                    });
                }
            }
            for (int k = 0; k < kRows; ++k) down.write(k * padded, width, columns, (c + k) * width);
        });
        if constexpr (kPlane) across.flush();
    }
    if constexpr (kPlane) across.write(0, positions, plane, 0);
}

// Four positions of a row at a time, all channels: the columns' buffers have a row of channels a column.
template <class T, bool kMax, bool kPlane>
void pool_axes_nhwc(const T* x, AxisPanel panel, bool even, AxisPool<Accumulator<T>> rows,
                    AxisPool<Accumulator<T>> columns, AxisPool<Accumulator<T>> plane) {
    using A = Accumulator<T>;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t channels = panel.channels, height = panel.height, width = panel.width;
    const int64_t padded = (channels + lanes - 1) / lanes * lanes, size = channels * height * width;
    AxisBuffer<A, kMax> down(width * padded), along(padded);
    down.begin();
    for (int64_t h = 0; h < height; ++h) {
        const Mask<A> row = numbers_from<true, A>(panel.first + h);
        along.begin();
        for (int64_t first = 0; first < width; first += kBlock) {
            fours(first, lesser(width, first + kBlock), [&](auto count, int64_t w) {
                constexpr int kRows = decltype(count)::value;
                Mask<A> column[kRows];
                for (int k = 0; k < kRows; ++k) column[k] = numbers_from<true, A>(w + k);
                RunningMax<A> running[kRows];
                double total[kRows] = {};
                for (int64_t begin = 0; begin < channels; begin += kBlock * lanes) {
                    Vec<A> sums[kRows] = {};
                    cut_vectors<A>(lesser(channels - begin, kBlock * lanes), [&](int64_t i, SomeLanes<A> counted) {
                        const int64_t c = begin + i;
                        const Mask<A> id = counting_from<A>(c);
                        Vec<A> v[kRows];
                        for (int k = 0; k < kRows; ++k) {
                            v[k] = load_before(x, (h * width + w + k) * channels + c, size);
                            if constexpr (kPlane) {
                                sums[k] += counted.of(v[k]);
                                running[k].update(v[k], id, counted.mask(), even);
                            }
                            down.template update<1>((w + k) * padded + c, &v[k], &row, counted, even);
                        }
                        along.template update<kRows>(c, v, column, counted, even);
                    });
                    if constexpr (kPlane)
                        for (int k = 0; k < kRows; ++k) total[k] += sum_of<A>(sums[k]);
                }
                if constexpr (kPlane) {
                    const int64_t at = h * width + w;
                    finish<kRows>(running, even, plane.peak + at, plane.tag + at);
                    for (int k = 0; k < kRows; ++k) plane.sum[at + k] = static_cast<A>(total[k]);
                }
            });
            if (first + kBlock < width) along.flush();
        }
        along.write(0, channels, rows, h * channels);
        if (h % kBlock == kBlock - 1) down.flush();
    }
    for (int64_t w = 0; w < width; ++w) down.write(w * padded, channels, columns, w * channels);
}

template <class T>
void pool_axes(const T* x, AxisPanel panel, bool even, AxisPool<Accumulator<T>> rows, AxisPool<Accumulator<T>> columns,
               AxisPool<Accumulator<T>> plane) {
    auto pick = [&](auto max, auto all) {
        constexpr bool kMax = decltype(max)::value, kPlane = decltype(all)::value;
        return panel.channels_last ? pool_axes_nhwc<T, kMax, kPlane> : pool_axes_nchw<T, kMax, kPlane>;
    };
    auto run = plane.sum   ? pick(Count<1>{}, Count<1>{})
               : rows.peak ? pick(Count<1>{}, Count<0>{})
                           : pick(Count<0>{}, Count<0>{});
    run(x, panel, even, rows, columns, plane);
}

// What one place of a pool passes to the elements of a vector. id: the elements' number along the pooled axis.
template <class A, bool kSame, bool kMax>
struct AxisGradVector {
    Vec<A> mean, value, peak;
    Mask<A> tag;
    static AxisGradVector at(AxisGrad<A> grad, int64_t i) {
        AxisGradVector v;
        v.mean = numbers<kSame>(grad.mean, i, kLanes<A>);
        if constexpr (kMax) {
            v.value = numbers<kSame>(grad.value, i, kLanes<A>);
            if (grad.peak)
                v.peak = numbers<kSame>(grad.peak, i, kLanes<A>);
            else
                v.tag = indices<kSame, A>(grad.tag, i, kLanes<A>);
        }
        return v;
    }
    Vec<A> to(Mask<A> id, Vec<A> x, bool even) const {
        if constexpr (!kMax) return mean;
        const Mask<A> chosen = even ? x == peak : tag == id;
        return mean + (chosen ? value : Vec<A>{});
    }
};

// Some rows of a channel at a time: what the rows and columns pass on goes to a buffer, where a vector may run over
// the end of a row; then the rest is added.
template <class T, bool kMax>
void spread_axes_nchw(const T* grad, const T* x, AxisPanel panel, AxisGrad<Accumulator<T>> rows,
                      AxisGrad<Accumulator<T>> columns, AxisGrad<Accumulator<T>> plane, T* grad_x) {
    using A = Accumulator<T>;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t channels = panel.channels, height = panel.height, width = panel.width, positions = height * width;
    const int64_t step = greater(1, kAxisBlock / greater(1, width)), size = channels * positions;
    const bool even = kMax && rows.peak;
    Buffer<A> part(lesser(step, height) * width + lanes);
    for (int64_t c = 0; c < channels; ++c) {
        const Mask<A> id = numbers_from<true, A>(panel.first + c);
        for (int64_t first = 0, last; first < height; first = last) {
            last = lesser(height, first + step);
            for (int64_t h = first; h < last; ++h) {
                const auto here = AxisGradVector<A, true, kMax>::at(rows, c * height + h);
                const Mask<A> row = numbers_from<true, A>(h);
                for (int64_t w = 0; w < width; w += lanes) {
                    const auto above = AxisGradVector<A, false, kMax>::at(columns, c * width + w);
                    Vec<A> v{};
                    if (even) v = load_before(x, c * positions + h * width + w, size);
                    store(here.to(counting_from<A>(w), v, even) + above.to(row, v, even),
                          &part[(h - first) * width + w]);
                }
            }
            const int64_t at = first * width, from = c * positions + at;
            vectors<A>(0, (last - first) * width, [&](int64_t i, int64_t n, auto) {
                Vec<A> d = load(&part[i]);
                if (kMax && plane.mean) {
                    Vec<A> v{};
                    if (even) v = load_n(x + from + i, n);
                    d += AxisGradVector<A, false, kMax>::at(plane, at + i).to(id, v, even);
                }
                if (grad) d += load_n(grad + from + i, n);
                store_n(d, grad_x + from + i, n);
            });
        }
    }
}

template <class T, bool kMax>
void spread_axes_nhwc(const T* grad, const T* x, AxisPanel panel, AxisGrad<Accumulator<T>> rows,
                      AxisGrad<Accumulator<T>> columns, AxisGrad<Accumulator<T>> plane, T* grad_x) {
    using A = Accumulator<T>;
    const int64_t channels = panel.channels, height = panel.height, width = panel.width;
    const bool even = kMax && rows.peak;
    for (int64_t h = 0; h < height; ++h) {
        const Mask<A> row = numbers_from<true, A>(panel.first + h);
        fours(0, width, [&](auto count, int64_t w) {
            constexpr int kRows = decltype(count)::value;
            AxisGradVector<A, true, kMax> depth[kRows] = {};
            if (kMax && plane.mean)
                for (int k = 0; k < kRows; ++k) depth[k] = AxisGradVector<A, true, kMax>::at(plane, h * width + w + k);
            vectors<A>(0, channels, [&](int64_t c, int64_t n, auto) {
                const auto here = AxisGradVector<A, false, kMax>::at(rows, h * channels + c);
                const Mask<A> id = counting_from<A>(c);
                for (int k = 0; k < kRows; ++k) {
                    const int64_t at = (h * width + w + k) * channels + c;
                    const auto above = AxisGradVector<A, false, kMax>::at(columns, (w + k) * channels + c);
                    Vec<A> v{};
                    if (even) v = load_n(x + at, n);
                    Vec<A> d = here.to(numbers_from<true, A>(w + k), v, even) + above.to(row, v, even);
                    if (kMax && plane.mean) d += depth[k].to(id, v, even);
                    if (grad) d += load_n(grad + at, n);
                    store_n(d, grad_x + at, n);
                }
            });
        });
    }
}

template <class T>
void spread_axes(const T* grad, const T* x, AxisPanel panel, AxisGrad<Accumulator<T>> rows,
                 AxisGrad<Accumulator<T>> columns, AxisGrad<Accumulator<T>> plane, T* grad_x) {
    auto run = panel.channels_last ? (rows.value ? spread_axes_nhwc<T, true> : spread_axes_nhwc<T, false>)
                                   : (rows.value ? spread_axes_nchw<T, true> : spread_axes_nchw<T, false>);
    run(grad, x, panel, rows, columns, plane, grad_x);
}

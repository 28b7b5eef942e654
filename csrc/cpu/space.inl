// The kernels over space of kernels.h: what each needs of its channel and of its position, as vectors, and the
// loops that bring the two together. In an NCHW map a channel's numbers are the same in all lanes and a
// position's are a vector; in a channels_last map it is the other way round.
// Included by kernels.inl inside the namespace of one instruction set.

// NCHW: positions that are taken through all channels at a time; their numbers stay in the first-level cache.
constexpr int64_t kSpan = 1024;

template <int kNumber>
struct Count {
    static constexpr int value = kNumber;
};

// The lanes of a vector that count: the last vector of a row ends with it and overlaps the one before.
template <class A>
struct AllLanes {
    Mask<A> mask() const { return lanes_below<A>(kLanes<A>); }
    Vec<A> of(Vec<A> v) const { return v; }
};
template <class A>
struct SomeLanes {
    Mask<A> fresh;
    Mask<A> mask() const { return fresh; }
    Vec<A> of(Vec<A> v) const { return fresh ? v : Vec<A>{}; }
};

// Calls step(i, n, lanes) for the vectors of first..last; n < kLanes only where the row is shorter than that.
template <class A, class Step>
inline void vectors(int64_t first, int64_t last, Step step) {
    constexpr int64_t lanes = kLanes<A>;
    int64_t i = first;
    for (; i + lanes <= last; i += lanes) step(i, lanes, AllLanes<A>{});
    if (i == last) return;
    if (last - first >= lanes)
        step(last - lanes, lanes, SomeLanes<A>{~lanes_below<A>(lanes - (last - i))});
    else
        step(first, last - first, SomeLanes<A>{lanes_below<A>(last - first)});
}

// Calls body(first, last) for spans of positions, none shorter than a vector unless all are.
template <class A, class Body>
inline void spans(int64_t positions, Body body) {
    for (int64_t first = 0, last; first < positions; first = last) {
        last = positions - first < kSpan + kLanes<A> ? positions : first + kSpan;
        body(first, last);
    }
}
// Calls body(Count<k>, i) for i in first..last, four at a time while there are four.
template <class Body>
inline void fours(int64_t first, int64_t last, Body body) {
    int64_t i = first;
    for (; i + 4 <= last; i += 4) body(Count<4>{}, i);
    for (; i < last; ++i) body(Count<1>{}, i);
}

// values[i] in every lane, or values[i], values[i + 1], ...; what stands for no array at all is `absent`.
template <bool kSame, class A>
inline Vec<A> numbers(const A* values, int64_t i, int64_t n, A absent) {
    if (!values) return splat<A>(absent);
    if constexpr (kSame) return splat<A>(values[i]);
    return load_n(values + i, n);
}
template <bool kSame, class A>
inline Mask<A> indices(const int32_t* values, int64_t i, int64_t n) {
    Mask<A> v{};
    if constexpr (kSame) return v + values[i];
    if (n == kLanes<A>)
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) v[lane] = values[i + lane];
    else
        for (int64_t lane = 0; lane < n; ++lane) v[lane] = values[i + lane];
    return v;
}
template <bool kSame, class A>
inline Mask<A> counting_from(int64_t i) {
    using Lane = std::remove_reference_t<decltype(Mask<A>{}[0])>;
    Mask<A> v{};
    if constexpr (!kSame)
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) v[lane] = static_cast<Lane>(lane);
    return v + static_cast<Lane>(i);
}

// Calls body(channel(c, n), position(p, n), offset, n) for every vector of a panel; body must give the same when
// it is repeated.
template <bool kChannelsLast, class A, class Channel, class Position, class Body>
inline void walk_space(const Panel& panel, Channel channel, Position position, Body body) {
    if constexpr (kChannelsLast) {
        for (int64_t p = 0; p < panel.positions; ++p) {
            const auto here = position(p, kLanes<A>);
            vectors<A>(0, panel.channels,
                       [&](int64_t c, int64_t n, auto) { body(channel(c, n), here, p * panel.channels + c, n); });
        }
    } else {
        spans<A>(panel.positions, [&](int64_t first, int64_t last) {
            for (int64_t c = 0; c < panel.channels; ++c) {
                const auto row = channel(c, kLanes<A>);
                const int64_t at = c * panel.channel_stride;
                vectors<A>(first, last, [&](int64_t p, int64_t n, auto) { body(row, position(p, n), at + p, n); });
            }
        });
    }
}

// What one vector adds to the sums a position and to the sums a channel.
template <class A>
struct Terms {
    Vec<A> position{}, channel[2]{};
};

// position_sums[p] = the sum over channels, and channel_sums[k][c] += the sum over positions, of the parts of
// term(channel(c, n), position(p, n), offset, n): one pass over the panel. term may be called twice for the same
// element. Sums are of float for at most kBlock vectors (and four channels or positions), then of double.
template <bool kChannelsLast, bool kPosition, int kChannelSums, class A, class Channel, class Position, class Term>
inline void reduce_space(const Panel& panel, Channel channel, Position position, Term term, A* position_sums,
                         double* const* channel_sums) {
    constexpr int64_t lanes = kLanes<A>;
    const int64_t channels = panel.channels, positions = panel.positions;
    if constexpr (!kChannelsLast) {
        spans<A>(positions, [&](int64_t first, int64_t last) {
            double total[kPosition ? kSpan + lanes : 1];
            A part[kPosition ? kSpan + lanes : 1];
            for (int64_t begin = 0; begin < channels; begin += kBlock) {
                if constexpr (kPosition)
                    for (int64_t i = 0; i < kSpan + lanes; ++i) part[i] = A(0);
                fours(begin, lesser(channels, begin + kBlock), [&](auto count, int64_t c) {
                    constexpr int kRows = decltype(count)::value;
                    decltype(channel(c, lanes)) row[kRows];
                    for (int k = 0; k < kRows; ++k) row[k] = channel(c + k, lanes);
                    Vec<A> sums[2][kRows] = {};
                    vectors<A>(first, last, [&](int64_t p, int64_t n, auto counted) {
                        const auto here = position(p, n);
                        Vec<A> sum{};
                        for (int k = 0; k < kRows; ++k) {
                            const Terms<A> t = term(row[k], here, (c + k) * panel.channel_stride + p, n);
                            if constexpr (kPosition) sum += t.position;
                            for (int j = 0; j < kChannelSums; ++j) sums[j][k] += counted.of(t.channel[j]);
                        }
                        if constexpr (kPosition) store(load(part + p - first) + counted.of(sum), part + p - first);
                    });
                    for (int j = 0; j < kChannelSums; ++j)
                        for (int k = 0; k < kRows; ++k) channel_sums[j][c + k] += sum_of<A>(sums[j][k]);
                });
                if constexpr (kPosition)
                    for (int64_t i = 0; i < last - first; ++i) total[i] = begin ? total[i] + part[i] : part[i];
            }
            if constexpr (kPosition)
                for (int64_t i = first; i < last; ++i) position_sums[i] = static_cast<A>(total[i - first]);
        });
    } else {
        const int64_t padded = channels + lanes;
        Buffer<A> buffer(kChannelSums * padded + 1);
        for (int64_t first = 0; first < positions; first += kBlock) {
            buffer.fill(A(0));
            fours(first, lesser(positions, first + kBlock), [&](auto count, int64_t p) {
                constexpr int kRows = decltype(count)::value;
                decltype(position(p, lanes)) here[kRows];
                for (int k = 0; k < kRows; ++k) here[k] = position(p + k, lanes);
                double total[kRows] = {};
                for (int64_t begin = 0; begin < channels;) {
                    const int64_t end = channels - begin < (kBlock + 1) * lanes ? channels : begin + kBlock * lanes;
                    Vec<A> sums[kRows] = {};
                    vectors<A>(begin, end, [&](int64_t c, int64_t n, auto counted) {
                        const auto column = channel(c, n);
                        Vec<A> sum[2] = {};
                        for (int k = 0; k < kRows; ++k) {
                            const Terms<A> t = term(column, here[k], (p + k) * channels + c, n);
                            if constexpr (kPosition) sums[k] += counted.of(t.position);
                            for (int j = 0; j < kChannelSums; ++j) sum[j] += t.channel[j];
                        }
                        for (int j = 0; j < kChannelSums; ++j) {
                            A* to = &buffer[j * padded + c];
                            store(load(to) + counted.of(sum[j]), to);
                        }
                    });
                    if constexpr (kPosition)
                        for (int k = 0; k < kRows; ++k) total[k] += sum_of<A>(sums[k]);
                    begin = end;
                }
                if constexpr (kPosition)
                    for (int k = 0; k < kRows; ++k) position_sums[p + k] = static_cast<A>(total[k]);
            });
            for (int j = 0; j < kChannelSums; ++j)
                for (int64_t c = 0; c < channels; ++c) channel_sums[j][c] += buffer[j * padded + c];
        }
    }
}

// A channel's prologue and gate, and a position's gate.
template <class A, bool kPlain>
struct ChannelVector {
    PrologueVector<A, kPlain> u;
    Vec<A> gate;
};
template <bool kChannelsLast, bool kPlain, class A>
inline ChannelVector<A, kPlain> channel_of(const Prologue<A>& prologue, const A* gate, int64_t c, int64_t n) {
    return {PrologueVector<A, kPlain>::template at<kChannelsLast>(prologue, c, n),
            numbers<!kChannelsLast>(gate, c, n, A(1))};
}

// The lanes of a running maximum against each other: every lane then holds the maximum of all.
template <class A>
inline void across_lanes(RunningMax<A>& running, bool even) {
    constexpr int64_t lanes = kLanes<A>;
    for (int64_t by = lanes / 2; by > 0; by /= 2) {
        Vec<A> v;
        Mask<A> t;
#if defined(__clang__)
        for (int64_t i = 0; i < lanes; ++i)
            v[i] = running.value[(i + by) % lanes], t[i] = running.tag[(i + by) % lanes];
#else
        Mask<A> from;
        for (int64_t i = 0; i < lanes; ++i) from[i] = (i + by) % lanes;
        v = __builtin_shuffle(running.value, from);
        t = __builtin_shuffle(running.tag, from);
#endif
        const Mask<A> larger = ~(v <= running.value) & (running.value == running.value);
        const Mask<A> smaller = ~(running.value <= v) & (v == v);
        const Mask<A> tied = even ? running.tag + t : (t < running.tag ? t : running.tag);
        running.tag = larger ? t : (smaller ? running.tag : tied);
        running.value = larger ? v : running.value;
    }
}

template <class T, bool kChannelsLast, bool kPlain>
void pool_space_in(const T* x, const Panel& panel, const Prologue<Accumulator<T>>& prologue, const Accumulator<T>* gate,
                   bool even, Accumulator<T>* mean, Accumulator<T>* peak, int32_t* index) {
    using A = Accumulator<T>;
    using Lane = std::remove_reference_t<decltype(Mask<A>{}[0])>;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t channels = panel.channels, positions = panel.positions;
    const double share = 1.0 / static_cast<double>(channels);
    auto channel = [&](int64_t c, int64_t n) { return channel_of<kChannelsLast, kPlain>(prologue, gate, c, n); };
    auto value_of = [&](const ChannelVector<A, kPlain>& row, int64_t at, int64_t n) {
        return row.u(load_n(x + at, n)) * row.gate;
    };
    if constexpr (!kChannelsLast) {
        spans<A>(positions, [&](int64_t first, int64_t last) {
            double total[kSpan + lanes];
            A part[kSpan + lanes], value[kSpan + lanes];
            Lane tag[kSpan + lanes];
            for (int64_t i = 0; i < kSpan + lanes; ++i) value[i] = -kInfinity<A>, tag[i] = 0;
            for (int64_t begin = 0; begin < channels; begin += kBlock) {
                for (int64_t i = 0; i < kSpan + lanes; ++i) part[i] = A(0);
                fours(begin, lesser(channels, begin + kBlock), [&](auto count, int64_t c) {
                    constexpr int kRows = decltype(count)::value;
                    ChannelVector<A, kPlain> row[kRows];
                    for (int k = 0; k < kRows; ++k) row[k] = channel(c + k, lanes);
                    vectors<A>(first, last, [&](int64_t p, int64_t n, auto counted) {
                        const int64_t i = p - first;
                        RunningMax<A> running{load(value + i), load_bytes<Mask<A>>(tag + i)};
                        Vec<A> sum{};
                        for (int k = 0; k < kRows; ++k) {
                            const Vec<A> v = value_of(row[k], (c + k) * panel.channel_stride + p, n);
                            sum += v;
                            running.update(rounded_to<T>(v), counting_from<true, A>(c + k), counted.mask(), even);
                        }
                        store(load(part + i) + counted.of(sum), part + i);
                        store(running.value, value + i);
                        std::memcpy(tag + i, &running.tag, sizeof(running.tag));
                    });
                });
                for (int64_t i = 0; i < last - first; ++i) total[i] = begin ? total[i] + part[i] : part[i];
            }
            for (int64_t p = first; p < last; ++p) {
                mean[p] = static_cast<A>(total[p - first] * share);
                peak[p] = value[p - first];
                index[p] = static_cast<int32_t>(tag[p - first]);
            }
        });
    } else {
        fours(0, positions, [&](auto count, int64_t p) {
            constexpr int kRows = decltype(count)::value;
            RunningMax<A> running[kRows];
            double total[kRows] = {};
            for (int64_t begin = 0; begin < channels;) {
                const int64_t end = channels - begin < (kBlock + 1) * lanes ? channels : begin + kBlock * lanes;
                Vec<A> sums[kRows] = {};
                vectors<A>(begin, end, [&](int64_t c, int64_t n, auto counted) {
                    const auto column = channel(c, n);
                    const Mask<A> id = counting_from<false, A>(c);
                    for (int k = 0; k < kRows; ++k) {
                        const Vec<A> v = value_of(column, (p + k) * channels + c, n);
                        sums[k] += counted.of(v);
                        running[k].update(rounded_to<T>(v), id, counted.mask(), even);
                    }
                });
                for (int k = 0; k < kRows; ++k) total[k] += sum_of<A>(sums[k]);
                begin = end;
            }
            for (int k = 0; k < kRows; ++k) {
                across_lanes(running[k], even);
                mean[p + k] = static_cast<A>(total[k] * share);
                peak[p + k] = running[k].value[0];
                index[p + k] = static_cast<int32_t>(running[k].tag[0]);
            }
        });
    }
}

template <class T>
void pool_space(const T* x, Panel panel, Prologue<Accumulator<T>> prologue, const Accumulator<T>* gate, bool even,
                Accumulator<T>* mean, Accumulator<T>* peak, int32_t* index) {
    const bool plain = prologue.identity();
    auto run = panel.channels_last ? (plain ? pool_space_in<T, true, true> : pool_space_in<T, true, false>)
                                   : (plain ? pool_space_in<T, false, true> : pool_space_in<T, false, false>);
    run(x, panel, prologue, gate, even, mean, peak, index);
}

template <class T, bool kChannelsLast, bool kPlain>
void scale_space_in(const T* x, const T* residual, const Panel& panel, const Prologue<Accumulator<T>>& prologue,
                    const Accumulator<T>* gate, const Accumulator<T>* space_gate, int activation, T* y) {
    using A = Accumulator<T>;
    walk_space<kChannelsLast, A>(
        panel, [&](int64_t c, int64_t n) { return channel_of<kChannelsLast, kPlain>(prologue, gate, c, n); },
        [&](int64_t p, int64_t n) { return numbers<kChannelsLast>(space_gate, p, n, A(1)); },
        [&](const ChannelVector<A, kPlain>& row, const Vec<A>& here, int64_t at, int64_t n) {
            Vec<A> out = row.u(load_n(x + at, n)) * row.gate * here;
            if constexpr (!kPlain) {
                if (residual) out += load_n(residual + at, n);
                out = activate<A>(out, activation);
            }
            store_n(out, y + at, n);
        });
}

template <class T>
void scale_space(const T* x, const T* residual, Panel panel, Prologue<Accumulator<T>> prologue,
                 const Accumulator<T>* gate, const Accumulator<T>* space_gate, int activation, T* y) {
    const bool plain = prologue.identity() && !residual && activation == kIdentity;
    auto run = panel.channels_last ? (plain ? scale_space_in<T, true, true> : scale_space_in<T, true, false>)
                                   : (plain ? scale_space_in<T, false, true> : scale_space_in<T, false, false>);
    run(x, residual, panel, prologue, gate, space_gate, activation, y);
}

template <class T, bool kChannelsLast, bool kPlain, int kChannelSums>
void dot_space_in(const T* grad, const T* x, const T* y, const T* residual, const Panel& panel,
                  const Prologue<Accumulator<T>>& prologue, const Accumulator<T>* gate,
                  const Accumulator<T>* space_gate, int activation, T* grad_residual, Accumulator<T>* space_dot,
                  double* dot) {
    using A = Accumulator<T>;
    reduce_space<kChannelsLast, true, kChannelSums, A>(
        panel, [&](int64_t c, int64_t n) { return channel_of<kChannelsLast, kPlain>(prologue, gate, c, n); },
        [&](int64_t p, int64_t n) { return numbers<kChannelsLast>(space_gate, p, n, A(1)); },
        [&](const ChannelVector<A, kPlain>& row, const Vec<A>& here, int64_t at, int64_t n) {
            const Vec<A> u = row.u(load_n(x + at, n));
            Vec<A> d = load_n(grad + at, n);
            if constexpr (!kPlain) {
                if (activation != kIdentity) {
                    Vec<A> out = y ? load_n(y + at, n) : u * row.gate * here;
                    if (!y && residual) out += load_n(residual + at, n);
                    d *= activate_grad<A>(out, activation);
                    store_n(d, grad_residual + at, n);
                }
            }
            Terms<A> terms;
            terms.position = d * u * row.gate;
            if constexpr (kChannelSums) terms.channel[0] = d * u * here;
            return terms;
        },
        space_dot, &dot);
}

template <class T>
void dot_space(const T* grad, const T* x, const T* y, const T* residual, Panel panel, Prologue<Accumulator<T>> prologue,
               const Accumulator<T>* gate, const Accumulator<T>* space_gate, int activation, T* grad_residual,
               Accumulator<T>* space_dot, double* dot) {
    const bool plain = prologue.identity() && activation == kIdentity;
    auto pick = [&](auto one) {
        constexpr int kOne = decltype(one)::value;
        return panel.channels_last ? (plain ? dot_space_in<T, true, true, kOne> : dot_space_in<T, true, false, kOne>)
                                   : (plain ? dot_space_in<T, false, true, kOne> : dot_space_in<T, false, false, kOne>);
    };
    auto run = dot ? pick(Count<1>{}) : pick(Count<0>{});
    run(grad, x, y, residual, panel, prologue, gate, space_gate, activation, grad_residual, space_dot, dot);
}

// What the pools over one axis pass to the elements of a vector; `id` of an element counts along that axis.
template <class A>
struct PoolGradVector {
    Vec<A> mean, value, peak;
    Mask<A> index;
    template <bool kSame>
    static PoolGradVector at(const PoolGrad<A>& grad, int64_t i, int64_t n) {
        PoolGradVector v{};
        v.mean = numbers<kSame>(grad.mean, i, n, A(0));
        v.value = numbers<kSame>(grad.peak.value, i, n, A(0));
        if (grad.peak.peak)
            v.peak = numbers<kSame>(grad.peak.peak, i, n, A(0));
        else if (grad.peak.value)
            v.index = indices<kSame, A>(grad.peak.index, i, n);
        return v;
    }
    Vec<A> to(Mask<A> chosen) const { return mean + (chosen ? value : Vec<A>{}); }
};

template <class A, bool kPlain>
struct SpreadChannel {
    ChannelVector<A, kPlain> in;
    PoolGradVector<A> pools;
    Mask<A> id;
};
template <class A>
struct SpreadPosition {
    Vec<A> gate;
    PoolGradVector<A> pools;
    Mask<A> id;
};

template <class T, bool kChannelsLast, bool kPlain>
void weigh_space_in(const T* x, const Panel& panel, const Prologue<Accumulator<T>>& prologue,
                    const Accumulator<T>* gate, const PoolGrad<Accumulator<T>>& space, double* dot) {
    using A = Accumulator<T>;
    const bool even = space.peak.peak;
    reduce_space<kChannelsLast, false, 1, A>(
        panel,
        [&](int64_t c, int64_t n) {
            return SpreadChannel<A, kPlain>{
                channel_of<kChannelsLast, kPlain>(prologue, gate, c, n), {}, counting_from<!kChannelsLast, A>(c)};
        },
        [&](int64_t p, int64_t n) { return PoolGradVector<A>::template at<kChannelsLast>(space, p, n); },
        [&](const SpreadChannel<A, kPlain>& row, const PoolGradVector<A>& here, int64_t at, int64_t n) {
            const Vec<A> u = row.in.u(load_n(x + at, n));
            Terms<A> terms;
            terms.channel[0] = u * here.to(even ? rounded_to<T>(u * row.in.gate) == here.peak : row.id == here.index);
            return terms;
        },
        nullptr, &dot);
}

template <class T>
void weigh_space(const T* x, Panel panel, Prologue<Accumulator<T>> prologue, const Accumulator<T>* gate,
                 PoolGrad<Accumulator<T>> space, double* dot) {
    const bool plain = prologue.identity();
    auto run = panel.channels_last ? (plain ? weigh_space_in<T, true, true> : weigh_space_in<T, true, false>)
                                   : (plain ? weigh_space_in<T, false, true> : weigh_space_in<T, false, false>);
    run(x, panel, prologue, gate, space, dot);
}

template <class T, bool kChannelsLast, bool kPlain>
void spread_space_in(const T* grad, const T* x, const Panel& panel, const Prologue<Accumulator<T>>& prologue,
                     const Accumulator<T>* gate, const Accumulator<T>* space_gate,
                     const PoolGrad<Accumulator<T>>& space, const PoolGrad<Accumulator<T>>& channel, T* grad_x,
                     double* const* affine_grads) {
    using A = Accumulator<T>;
    const bool even_channels = space.peak.peak, even_positions = channel.peak.peak;  // equals count along that axis
    auto make_channel = [&](int64_t c, int64_t n) {
        return SpreadChannel<A, kPlain>{channel_of<kChannelsLast, kPlain>(prologue, gate, c, n),
                                        PoolGradVector<A>::template at<!kChannelsLast>(channel, c, n),
                                        counting_from<!kChannelsLast, A>(c)};
    };
    auto make_position = [&](int64_t p, int64_t n) {
        return SpreadPosition<A>{numbers<kChannelsLast>(space_gate, p, n, A(0)),
                                 PoolGradVector<A>::template at<kChannelsLast>(space, p, n),
                                 counting_from<kChannelsLast, A>(p + panel.first_position)};
    };
    // Writes grad_x; the terms are the gradient before the prologue's activation times x, and that itself.
    auto term = [&](const SpreadChannel<A, kPlain>& row, const SpreadPosition<A>& here, int64_t at, int64_t n) {
        Terms<A> terms;
        Mask<A> largest_channel = row.id == here.pools.index, largest_position = here.id == row.pools.index;
        Vec<A> x_at{};
        if constexpr (!kPlain) {
            x_at = load_n(x + at, n);
            if (even_channels || even_positions) {
                const Vec<A> u = row.in.u(x_at);
                if (even_channels) largest_channel = rounded_to<T>(u * row.in.gate) == here.pools.peak;
                if (even_positions) largest_position = rounded_to<T>(u) == row.pools.peak;
            }
        }
        Vec<A> d = here.pools.to(largest_channel);
        if (grad) d += load_n(grad + at, n) * here.gate;
        d = d * row.in.gate + row.pools.to(largest_position);
        if constexpr (!kPlain) {
            if (row.in.u.activation != kIdentity) d *= activate_grad<A>(row.in.u.before(x_at), row.in.u.activation);
            terms.channel[0] = d * x_at;
            terms.channel[1] = d;
        }
        store_n(kPlain ? d : d * row.in.u.weight, grad_x + at, n);
        return terms;
    };
    if (kPlain || !affine_grads[0])
        walk_space<kChannelsLast, A>(panel, make_channel, make_position, term);
    else
        reduce_space<kChannelsLast, false, 2, A>(panel, make_channel, make_position, term, nullptr, affine_grads);
}

template <class T>
void spread_space(const T* grad, const T* x, Panel panel, Prologue<Accumulator<T>> prologue, const Accumulator<T>* gate,
                  const Accumulator<T>* space_gate, PoolGrad<Accumulator<T>> space, PoolGrad<Accumulator<T>> channel,
                  T* grad_x, double* grad_weight, double* grad_bias) {
    const bool plain = prologue.identity() && !space.peak.peak && !channel.peak.peak;
    auto run = panel.channels_last ? (plain ? spread_space_in<T, true, true> : spread_space_in<T, true, false>)
                                   : (plain ? spread_space_in<T, false, true> : spread_space_in<T, false, false>);
    double* const affine_grads[2] = {grad_weight, grad_bias};
    run(grad, x, panel, prologue, gate, space_gate, space, channel, grad_x, affine_grads);
}

template <class A>
void correlate_taps(const A* in, const int64_t* offsets, const A* taps, int64_t count, A bias, int64_t n, A* out) {
    constexpr int64_t lanes = kLanes<A>, kWide = 8;  // eight vectors at a time: eight independent sums
    static_assert(kTapBlock % (kWide * lanes) == 0);
    for (int64_t i = 0; i < n; i += kWide * lanes) {
        Vec<A> sums[kWide];
        for (int k = 0; k < kWide; ++k) sums[k] = splat<A>(bias);
        for (int64_t t = 0; t < count; ++t) {
            const Vec<A> tap = splat<A>(taps[t]);
            const A* from = in + offsets[t] + i;
            for (int k = 0; k < kWide; ++k) sums[k] += tap * load(from + k * lanes);
        }
        for (int k = 0; k < kWide; ++k) store(sums[k], out + i + k * lanes);
    }
}

template <class A>
void tap_grad(const A* grad, const A* in, const int64_t* offsets, int64_t count, int64_t n, double* sums) {
    constexpr int64_t lanes = kLanes<A>, kWide = 8;  // eight taps at a time share one read of grad
    for (int64_t t = 0; t < count; t += kWide) {
        const int64_t taps = lesser(kWide, count - t);
        const A* from[kWide];
        for (int64_t k = 0; k < kWide; ++k) from[k] = in + offsets[t + lesser(k, taps - 1)];
        for (int64_t first = 0; first < n; first += kBlock * lanes) {
            const int64_t last = lesser(n, first + kBlock * lanes);
            Vec<A> total[kWide] = {};
            for (int64_t i = first; i < last; i += lanes) {
                const Vec<A> g = load(grad + i);
                for (int k = 0; k < kWide; ++k) total[k] += g * load(from[k] + i);
            }
            for (int64_t k = 0; k < taps; ++k) sums[t + k] += sum_of<A>(total[k]);
        }
    }
}

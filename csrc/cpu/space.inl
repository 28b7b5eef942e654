// The kernels over space of kernels.h: what each needs of its channel and of its position, as vectors, and the
// loops that bring the two together. In an NCHW map a channel's numbers are the same in all lanes and a
// position's are a vector; in a channels_last map it is the other way round.
// Included by kernels.inl inside the namespace of one instruction set.

// NCHW: positions that are taken through all channels at a time, while their numbers stay in cache. (Arguments are
// copies throughout: what is read through a reference is read again after every store.)
constexpr int64_t kSpan = 4096;

// Calls body(first, last) for spans of positions, none shorter than a vector unless all are.
template <class A, class Body>
inline void spans(int64_t positions, Body body) {
    for (int64_t first = 0, last; first < positions; first = last) {
        last = positions - first < kSpan + kLanes<A> ? positions : first + kSpan;
        body(first, last);
    }
}
// values[i] in every lane, or values[i], values[i + 1], ...
template <bool kSame, class A>
inline Vec<A> numbers(const A* values, int64_t i, int64_t n) {
    if constexpr (kSame) return splat<A>(values[i]);
    return load_n(values + i, n);
}
template <bool kSame, class A>
inline Mask<A> indices(const int32_t* values, int64_t i, int64_t n) {
    Mask<A> v{};
    if constexpr (kSame) return v + values[i];
    if (n == kLanes<A>) {
        if constexpr (sizeof(A) == sizeof(int32_t)) return load_bytes<Mask<A>>(values + i);
        for (int64_t lane = 0; lane < kLanes<A>; ++lane) v[lane] = values[i + lane];
    } else {
        for (int64_t lane = 0; lane < n; ++lane) v[lane] = values[i + lane];
    }
    return v;
}
// i in every lane, or i, i + 1, ...
template <bool kSame, class A>
inline Mask<A> numbers_from(int64_t i) {
    if constexpr (!kSame) return counting_from<A>(i);
    return Mask<A>{} + static_cast<std::remove_reference_t<decltype(Mask<A>{}[0])>>(i);
}

// Calls body(channel(c, n), position(p, n), offset, n) for every vector of a panel; body must give the same when
// it is repeated.
template <bool kChannelsLast, class A, class Channel, class Position, class Body>
inline void walk_space(Panel panel, Channel channel, Position position, Body body) {
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
inline void reduce_space(Panel panel, Channel channel, Position position, Term term, A* position_sums,
                         double* const* channel_sums) {
    constexpr int64_t lanes = kLanes<A>;
    const int64_t channels = panel.channels, positions = panel.positions;
    if constexpr (!kChannelsLast) {
        spans<A>(positions, [&](int64_t first, int64_t last) {
            const int64_t length = kPosition ? last - first : 0;
            Buffer<double> total(length + 1);
            Buffer<A> part(length + lanes);
            for (int64_t begin = 0; begin < channels; begin += kBlock) {
                part.fill(A(0));
                fours(begin, lesser(channels, begin + kBlock), [&](auto count, int64_t c) {
                    constexpr int kRows = decltype(count)::value;
                    decltype(channel(c, lanes)) row[kRows];
                    for (int k = 0; k < kRows; ++k) row[k] = channel(c + k, lanes);
                    for (int64_t from = first, to; from < last; from = to) {
                        to = last - from < (kBlock + 1) * lanes ? last : from + kBlock * lanes;
                        Vec<A> sums[2][kRows] = {};
                        vectors<A>(from, to, [&](int64_t p, int64_t n, auto counted) {
                            const auto here = position(p, n);
                            Vec<A> sum{};
                            for (int k = 0; k < kRows; ++k) {
                                const Terms<A> t = term(row[k], here, (c + k) * panel.channel_stride + p, n);
                                if constexpr (kPosition) sum += t.position;
                                for (int j = 0; j < kChannelSums; ++j) sums[j][k] += counted.of(t.channel[j]);
                            }
                            if constexpr (kPosition) {
                                A* at = &part[p - first];
                                store(load(at) + counted.of(sum), at);
                            }
                        });
                        for (int j = 0; j < kChannelSums; ++j)
                            for (int k = 0; k < kRows; ++k) channel_sums[j][c + k] += sum_of<A>(sums[j][k]);
                    }
                });
                for (int64_t i = 0; i < length; ++i) total[i] = begin ? total[i] + part[i] : part[i];
            }
            for (int64_t i = 0; i < length; ++i) position_sums[first + i] = static_cast<A>(total[i]);
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
            gate ? numbers<!kChannelsLast>(gate, c, n) : splat<A>(1)};
}

template <class T, bool kChannelsLast, bool kPlain>
void pool_space_in(const T* x, Panel panel, Prologue<Accumulator<T>> prologue, const Accumulator<T>* gate, bool even,
                   Accumulator<T>* mean, Accumulator<T>* peak, int32_t* index) {
    using A = Accumulator<T>;
    using Lane = std::remove_reference_t<decltype(Mask<A>{}[0])>;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t channels = panel.channels, positions = panel.positions;
    const double share = 1.0 / static_cast<double>(channels);
    auto channel = [=](int64_t c, int64_t n) { return channel_of<kChannelsLast, kPlain>(prologue, gate, c, n); };
    auto value_of = [=](const ChannelVector<A, kPlain>& row, int64_t at, int64_t n) {
        return row.u(load_n(x + at, n)) * row.gate;
    };
    if constexpr (!kChannelsLast) {
        spans<A>(positions, [&](int64_t first, int64_t last) {
            const int64_t length = last - first;
            Buffer<double> total(length);
            Buffer<A> part(length + lanes), value(length + lanes);
            Buffer<Lane> tag(length + lanes);
            value.fill(-kInfinity<A>);
            tag.fill(0);
            for (int64_t begin = 0; begin < channels; begin += kBlock) {
                part.fill(A(0));
                fours(begin, lesser(channels, begin + kBlock), [&](auto count, int64_t c) {
                    constexpr int kRows = decltype(count)::value;
                    ChannelVector<A, kPlain> row[kRows];
                    for (int k = 0; k < kRows; ++k) row[k] = channel(c + k, lanes);
                    vectors<A>(first, last, [&](int64_t p, int64_t n, auto counted) {
                        A *sum_at = &part[p - first], *value_at = &value[p - first];
                        Lane* tag_at = &tag[p - first];
                        RunningMax<A> running{load(value_at), load_bytes<Mask<A>>(tag_at)};
                        Vec<A> sum{};
                        for (int k = 0; k < kRows; ++k) {
                            const Vec<A> v = value_of(row[k], (c + k) * panel.channel_stride + p, n);
                            sum += v;
                            running.update(rounded_to<T>(v), numbers_from<true, A>(c + k), counted.mask(), even);
                        }
                        store(load(sum_at) + counted.of(sum), sum_at);
                        store(running.value, value_at);
                        std::memcpy(tag_at, &running.tag, sizeof(running.tag));
                    });
                });
                for (int64_t i = 0; i < length; ++i) total[i] = begin ? total[i] + part[i] : part[i];
            }
            for (int64_t i = 0; i < length; ++i) {
                mean[first + i] = static_cast<A>(total[i] * share);
                peak[first + i] = value[i];
                index[first + i] = static_cast<int32_t>(tag[i]);
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
                    const Mask<A> id = counting_from<A>(c);
                    for (int k = 0; k < kRows; ++k) {
                        const Vec<A> v = value_of(column, (p + k) * channels + c, n);
                        sums[k] += counted.of(v);
                        running[k].update(rounded_to<T>(v), id, counted.mask(), even);
                    }
                });
                for (int k = 0; k < kRows; ++k) total[k] += sum_of<A>(sums[k]);
                begin = end;
            }
            finish<kRows>(running, even, peak + p, index + p);
            for (int k = 0; k < kRows; ++k) mean[p + k] = static_cast<A>(total[k] * share);
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

template <class T, bool kChannelsLast, int kPre, int kPost>
void scale_space_in(const T* x, const T* residual, Panel panel, Prologue<Accumulator<T>> prologue,
                    const Accumulator<T>* gate, const Accumulator<T>* space_gate, int activation, T* y) {
    using A = Accumulator<T>;
    constexpr bool kPlain = kPre == kNoPrologue;
    auto walk_with = [&](auto has_residual) {
        walk_space<kChannelsLast, A>(
            panel, [=](int64_t c, int64_t n) { return channel_of<kChannelsLast, kPlain>(prologue, gate, c, n); },
            [=](int64_t p, int64_t n) { return numbers<kChannelsLast>(space_gate, p, n); },
            [=](const ChannelVector<A, kPlain>& row, const Vec<A>& here, int64_t at, int64_t n) {
                Vec<A> out = row.u(load_n(x + at, n)) * row.gate * here;
                if constexpr (decltype(has_residual)::value) out += load_n(residual + at, n);
                store_n(activate<A>(out, kPost < 0 ? activation : kPost), y + at, n);
            });
    };
    if (residual)
        walk_with(Count<1>{});
    else
        walk_with(Count<0>{});
}

template <class T>
void scale_space(const T* x, const T* residual, Panel panel, Prologue<Accumulator<T>> prologue,
                 const Accumulator<T>* gate, const Accumulator<T>* space_gate, int activation, T* y) {
    by_end(prologue, activation, [&](auto pre, auto post) {
        constexpr int kPre = decltype(pre)::value, kPost = decltype(post)::value;
        auto run = panel.channels_last ? scale_space_in<T, true, kPre, kPost> : scale_space_in<T, false, kPre, kPost>;
        run(x, residual, panel, prologue, gate, space_gate, activation, y);
    });
}

template <class T, bool kChannelsLast, int kPre, int kPost, int kChannelSums>
void dot_space_in(const T* grad, const T* x, const T* y, const T* residual, Panel panel,
                  Prologue<Accumulator<T>> prologue, const Accumulator<T>* gate, const Accumulator<T>* space_gate,
                  int activation, T* grad_residual, Accumulator<T>* space_dot, double* dot) {
    using A = Accumulator<T>;
    constexpr bool kPlain = kPre == kNoPrologue;
    reduce_space<kChannelsLast, true, kChannelSums, A>(
        panel, [=](int64_t c, int64_t n) { return channel_of<kChannelsLast, kPlain>(prologue, gate, c, n); },
        [=](int64_t p, int64_t n) { return numbers<kChannelsLast>(space_gate, p, n); },
        [=](const ChannelVector<A, kPlain>& row, const Vec<A>& here, int64_t at, int64_t n) {
            const Vec<A> u = row.u(load_n(x + at, n));
            Vec<A> d = load_n(grad + at, n);
            if (kPost > 0 || (kPost < 0 && activation != kIdentity)) {
                Vec<A> out = y ? load_n(y + at, n) : u * row.gate * here;
                if (!y && residual) out += load_n(residual + at, n);
                d *= activate_grad<A>(out, kPost < 0 ? activation : kPost);
                store_n(d, grad_residual + at, n);
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
    by_end(prologue, activation, [&](auto pre, auto post) {
        auto pick = [&](auto one) {
            constexpr int kPre = decltype(pre)::value, kPost = decltype(post)::value, kOne = decltype(one)::value;
            return panel.channels_last ? dot_space_in<T, true, kPre, kPost, kOne>
                                       : dot_space_in<T, false, kPre, kPost, kOne>;
        };
        auto run = dot ? pick(Count<1>{}) : pick(Count<0>{});
        run(grad, x, y, residual, panel, prologue, gate, space_gate, activation, grad_residual, space_dot, dot);
    });
}

// What the pools over one axis pass to the elements of a vector: the mean's share to each, the maximum's to the one
// at `index` along that axis or, where ties are shared, to those that equal `peak`.
template <class A>
struct PoolGradVector {
    Vec<A> mean, value, peak;
    Mask<A> index;
    template <bool kSame, bool kEven>
    static PoolGradVector at(PoolGrad<A> grad, int64_t i, int64_t n) {
        PoolGradVector v;
        v.mean = numbers<kSame>(grad.mean, i, n);
        v.value = numbers<kSame>(grad.peak.value, i, n);
        if (kEven && grad.peak.peak)
            v.peak = numbers<kSame>(grad.peak.peak, i, n);
        else
            v.index = indices<kSame, A>(grad.peak.index, i, n);
        return v;
    }
    Vec<A> to(Mask<A> chosen) const { return mean + (chosen ? value : Vec<A>{}); }
};

// A channel in weigh and spread: its number, and what pools over space pass to it.
template <class A, bool kPlain>
struct WeighChannel {
    ChannelVector<A, kPlain> in;
    Mask<A> id;
};
template <class A, bool kPlain>
struct SpreadChannel : WeighChannel<A, kPlain> {
    PoolGradVector<A> pools;
};
template <class A>
struct SpreadPosition {
    Vec<A> gate;
    PoolGradVector<A> pools;
    Mask<A> id;
};

template <class T, bool kChannelsLast, bool kPlain>
void weigh_space_in(const T* x, Panel panel, Prologue<Accumulator<T>> prologue, const Accumulator<T>* gate,
                    PoolGrad<Accumulator<T>> space, double* dot) {
    using A = Accumulator<T>;
    using Channel = WeighChannel<A, kPlain>;
    const bool even = space.peak.peak;
    reduce_space<kChannelsLast, false, 1, A>(
        panel,
        [=](int64_t c, int64_t n) {
            return Channel{channel_of<kChannelsLast, kPlain>(prologue, gate, c, n), numbers_from<!kChannelsLast, A>(c)};
        },
        [=](int64_t p, int64_t n) { return PoolGradVector<A>::template at<kChannelsLast, true>(space, p, n); },
        [=](const Channel& row, const PoolGradVector<A>& here, int64_t at, int64_t n) {
            const Vec<A> u = row.in.u(load_n(x + at, n));
            Mask<A> largest = row.id == here.index;
            if (even) largest = rounded_to<T>(u * row.in.gate) == here.peak;
            Terms<A> terms;
            terms.channel[0] = u * here.to(largest);
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

template <class T, bool kChannelsLast, bool kPlain, bool kGated>
void spread_space_in(const T* grad, const T* x, Panel panel, Prologue<Accumulator<T>> prologue,
                     const Accumulator<T>* gate, const Accumulator<T>* space_gate, PoolGrad<Accumulator<T>> space,
                     PoolGrad<Accumulator<T>> channel, T* grad_x, double* grad_weight, double* grad_bias) {
    using A = Accumulator<T>;
    using Channel = SpreadChannel<A, kPlain>;
    const bool even_channels = space.peak.peak, even_positions = channel.peak.peak;  // ties along that axis
    auto make_channel = [=](int64_t c, int64_t n) {
        Channel row;
        row.in = channel_of<kChannelsLast, kPlain>(prologue, gate, c, n);
        row.id = numbers_from<!kChannelsLast, A>(c);
        if constexpr (kGated) row.pools = PoolGradVector<A>::template at<!kChannelsLast, !kPlain>(channel, c, n);
        return row;
    };
    auto make_position = [=](int64_t p, int64_t n) {
        SpreadPosition<A> here;
        if (grad) here.gate = numbers<kChannelsLast>(space_gate, p, n);
        here.pools = PoolGradVector<A>::template at<kChannelsLast, !kPlain>(space, p, n);
        here.id = numbers_from<kChannelsLast, A>(p + panel.first_position);
        return here;
    };
    // Writes grad_x; the terms are the gradient before the prologue's activation, times x and by itself.
    auto term = [=](const Channel& row, const SpreadPosition<A>& here, int64_t at, int64_t n) {
        Mask<A> largest_channel = row.id == here.pools.index, largest_position{};
        if constexpr (kGated) largest_position = here.id == row.pools.index;
        Vec<A> x_at{};
        if constexpr (!kPlain) {
            x_at = load_n(x + at, n);
            const Vec<A> u = row.in.u(x_at);
            if (even_channels) largest_channel = rounded_to<T>(u * row.in.gate) == here.pools.peak;
            if (even_positions) largest_position = rounded_to<T>(u) == row.pools.peak;
        }
        Vec<A> d = here.pools.to(largest_channel);
        if (grad) d += load_n(grad + at, n) * here.gate;
        if constexpr (kGated) d = d * row.in.gate + row.pools.to(largest_position);
        Terms<A> terms;
        if constexpr (!kPlain) {
            if (row.in.u.activation != kIdentity) d *= activate_grad<A>(row.in.u.before(x_at), row.in.u.activation);
            terms.channel[0] = d * x_at;
            terms.channel[1] = d;
        }
        store_n(kPlain ? d : d * row.in.u.weight, grad_x + at, n);
        return terms;
    };
    double* const sums[2] = {grad_weight, grad_bias};
    if (kPlain || !grad_weight)
        walk_space<kChannelsLast, A>(panel, make_channel, make_position, term);
    else
        reduce_space<kChannelsLast, false, 2, A>(panel, make_channel, make_position, term, nullptr, sums);
}

template <class T>
void spread_space(const T* grad, const T* x, Panel panel, Prologue<Accumulator<T>> prologue, const Accumulator<T>* gate,
                  const Accumulator<T>* space_gate, PoolGrad<Accumulator<T>> space, PoolGrad<Accumulator<T>> channel,
                  T* grad_x, double* grad_weight, double* grad_bias) {
    const bool plain = prologue.identity() && !space.peak.peak && !channel.peak.peak;
    auto pick = [&](auto gated) {
        constexpr bool kGated = decltype(gated)::value;
        return panel.channels_last
                   ? (plain ? spread_space_in<T, true, true, kGated> : spread_space_in<T, true, false, kGated>)
                   : (plain ? spread_space_in<T, false, true, kGated> : spread_space_in<T, false, false, kGated>);
    };
    auto run = gate ? pick(Count<1>{}) : pick(Count<0>{});
    run(grad, x, panel, prologue, gate, space_gate, space, channel, grad_x, grad_weight, grad_bias);
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

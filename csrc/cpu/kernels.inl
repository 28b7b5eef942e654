// The bodies of kernels.h, compiled once per instruction set: included by kernels_*.cpp with VECTOR_BYTES and
// INSTRUCTION_SET defined and the compiler's target set. Nothing here may instantiate a template of another
// namespace (std::vector, std::min, ...): the linker keeps one copy of those, maybe this file's, for everybody.

namespace fused_attn::cpu::INSTRUCTION_SET {

#include "vec.inl"

// Float partial sums run over at most this many vectors before they are added to a double.
constexpr int64_t kBlock = 128;

// A per-channel array at one vector of a panel: the same value in every lane (NCHW) or consecutive channels.
template <bool kChannelsLast, class A>
inline Vec<A> channel_vector(const A* values, int64_t channel, int64_t n) {
    if constexpr (!kChannelsLast) return splat<A>(values[channel]);
    return n == kLanes<A> ? load(values + channel) : load_tail(values + channel, n);
}

// The prologue with its channel parameters as vectors; kPlain: there is none.
template <class A, bool kPlain>
struct PrologueVector {
    Vec<A> weight = splat<A>(1), bias{};
    int activation = 0;
    template <bool kChannelsLast>
    static PrologueVector at(const Prologue<A>& prologue, int64_t channel, int64_t n) {
        PrologueVector v;
        if constexpr (!kPlain) {
            v.activation = prologue.activation;
            if (prologue.weight) {
                v.weight = channel_vector<kChannelsLast>(prologue.weight, channel, n);
                v.bias = channel_vector<kChannelsLast>(prologue.bias, channel, n);
            }
        }
        return v;
    }
    Vec<A> before(Vec<A> x) const { return kPlain ? x : x * weight + bias; }
    Vec<A> operator()(Vec<A> x) const { return apply<-1>(x); }
    // The same where the activation is known to be kKind; -1: it is asked for.
    template <int kKind>
    Vec<A> apply(Vec<A> x) const {
        return kPlain ? x : activate<A>(before(x), kKind < 0 ? activation : kKind);
    }
};

template <int kNumber>
struct Count {
    static constexpr int value = kNumber;
};

// Calls body(Count<activation>) for those compiled by themselves, else with -1: beside calls of the C library nothing
// stays in registers.
template <class Body>
inline void by_activation(int activation, Body body) {
    if (activation == kIdentity)
        body(Count<kIdentity>{});
    else if (activation == kRelu)
        body(Count<kRelu>{});
    else if (activation == kSilu)
        body(Count<kSilu>{});
    else
        body(Count<-1>{});
}

// Calls body(Count<k>, i) for i in first..last, four at a time while there are four.
template <class Body>
inline void fours(int64_t first, int64_t last, Body body) {
    int64_t i = first;
    for (; i + 4 <= last; i += 4) body(Count<4>{}, i);
    for (; i < last; ++i) body(Count<1>{}, i);
}

// Calls body(make(channel, n), offset, n) for the vectors of a panel; n is the number of lanes in use. A row's
// last vector ends with the row and overlaps the one before, so body must give the same when it is repeated.
template <bool kChannelsLast, class A, class Make, class Body>
inline void walk(const Panel& panel, Make make, Body body) {
    const int64_t rows = kChannelsLast ? panel.positions : panel.channels;
    const int64_t length = kChannelsLast ? panel.channels : panel.positions;
    constexpr int64_t lanes = kLanes<A>;
    for (int64_t row = 0; row < rows; ++row) {
        const auto row_parameters = make(kChannelsLast ? 0 : row, lesser(lanes, length));
        auto step = [&](int64_t i, int64_t n) {
            if constexpr (kChannelsLast)
                body(make(i, n), row * length + i, n);
            else
                body(row_parameters, row * length + i, n);
        };
        if (length < lanes) {
            step(0, length);
            continue;
        }
        int64_t i = 0;
        for (; i + lanes <= length; i += lanes) step(i, lanes);
        if (i < length) step(length - lanes, lanes);
    }
}

// sums[c] += the sum over the panel's positions of term(parameters, offset, n), one pass. term may be called
// twice for the same element, as in walk().
template <bool kChannelsLast, class A, class Make, class Term>
inline void accumulate(const Panel& panel, Make make, Term term, double* sums) {
    constexpr int64_t lanes = kLanes<A>;
    const int64_t channels = panel.channels, positions = panel.positions;
    if constexpr (!kChannelsLast) {
        for (int64_t c = 0; c < channels; ++c) {
            const auto parameters = make(c, lanes);
            const int64_t row = c * positions;
            double total = 0;
            int64_t i = 0;
            while (i + lanes <= positions) {
                const int64_t end = lesser(positions, i + 4 * kBlock * lanes);
                Vec<A> a{}, b{}, c4{}, d{};
                for (; i + 4 * lanes <= end; i += 4 * lanes) {
                    a += term(parameters, row + i, lanes);
                    b += term(parameters, row + i + lanes, lanes);
                    c4 += term(parameters, row + i + 2 * lanes, lanes);
                    d += term(parameters, row + i + 3 * lanes, lanes);
                }
                for (; i + lanes <= end; i += lanes) a += term(parameters, row + i, lanes);
                total += sum_of<A>((a + b) + (c4 + d));
            }
            if (i < positions) {  // the last vector ends with the row; lanes already summed count as zero
                const bool overlaps = positions >= lanes;
                const Vec<A> last =
                    overlaps ? term(parameters, row + positions - lanes, lanes) : term(parameters, row, positions);
                const Mask<A> summed = lanes_below<A>(lanes - (positions - i));
                total +=
                    sum_of<A>(overlaps ? (summed ? Vec<A>{} : last) : (lanes_below<A>(positions) ? last : Vec<A>{}));
            }
            sums[c] += total;
        }
    } else {
        Buffer<A> buffer((channels + lanes - 1) / lanes * lanes);
        for (int64_t first = 0; first < positions; first += kBlock) {
            const int64_t end = lesser(positions, first + kBlock);
            buffer.fill(A(0));
            int64_t p = first;
            for (; p + 4 <= end; p += 4) {  // four rows a trip: the buffer is read and written once for all four
                auto step = [&](int64_t c, int64_t n) {
                    const auto parameters = make(c, n);
                    const int64_t at = p * channels + c;
                    const Vec<A> four =
                        (term(parameters, at, n) + term(parameters, at + channels, n)) +
                        (term(parameters, at + 2 * channels, n) + term(parameters, at + 3 * channels, n));
                    store(load(&buffer[c]) + four, &buffer[c]);
                };
                int64_t c = 0;
                for (; c + lanes <= channels; c += lanes) step(c, lanes);
                if (c < channels) step(c, channels - c);
            }
            for (; p < end; ++p) {
                auto step = [&](int64_t c, int64_t n) {
                    store(load(&buffer[c]) + term(make(c, n), p * channels + c, n), &buffer[c]);
                };
                int64_t c = 0;
                for (; c + lanes <= channels; c += lanes) step(c, lanes);
                if (c < channels) step(c, channels - c);
            }
            for (int64_t c = 0; c < channels; ++c) sums[c] += buffer[c];
        }
    }
}

// One running maximum a lane: the value (NaN once seen), and its first position or its multiplicity.
template <class A>
struct RunningMax {
    Vec<A> value = splat<A>(-kInfinity<A>);
    Mask<A> tag{};
    __attribute__((always_inline)) void update(Vec<A> u, Mask<A> position, Mask<A> in_use, bool even) {
        const Mask<A> larger = ~(u <= value) & (value == value) & in_use;  // NaN is larger, and stays
        if (even) {
            const Mask<A> equal = (u == value) & in_use;
            tag = larger ? Mask<A>{} + 1 : (equal ? tag + 1 : tag);
        } else {
            tag = larger ? position : tag;
        }
        value = larger ? u : value;
    }
    // Lane by lane the maximum of both, from elements that have nothing in common.
    RunningMax with(const RunningMax& other, bool even) const {
        const Mask<A> larger = ~(other.value <= value) & (value == value);
        const Mask<A> smaller = ~(value <= other.value) & (other.value == other.value);
        const Mask<A> tied = even ? tag + other.tag : (other.tag < tag ? other.tag : tag);
        return {larger ? other.value : value, larger ? other.tag : (smaller ? tag : tied)};
    }
    // Half of the lanes of every group of kWidth in a, then in b: the first halves or the second.
    template <int64_t kWidth, bool kSecond>
    static RunningMax halves(const RunningMax& a, const RunningMax& b) {
        return {half_groups<kWidth, kSecond>(a.value, b.value), half_groups<kWidth, kSecond>(a.tag, b.tag)};
    }
    // The maximum of every group of kWidth lanes, in the group's first lane.
    template <int64_t kWidth>
    RunningMax in_groups(bool even) const {
        if constexpr (kWidth == 1)
            return *this;
        else
            return with({rotated<kWidth / 2>(value), rotated<kWidth / 2>(tag)}, even)
                .template in_groups<kWidth / 2>(even);
    }
};

// The maximum over the lanes of each of kCount running maxima: value[k], tag[k].
template <int kCount, class A, class Tag>
inline void finish(const RunningMax<A>* running, bool even, A* value, Tag* tag) {
    constexpr int64_t lanes = kLanes<A>;
    if constexpr (kCount == 4 && lanes >= 4) {  // four vectors are folded into one, a quarter each
        auto fold = [&](const RunningMax<A>& a, const RunningMax<A>& b, auto width) {
            constexpr int64_t kWidth = decltype(width)::value;
            return RunningMax<A>::template halves<kWidth, false>(a, b).with(
                RunningMax<A>::template halves<kWidth, true>(a, b), even);
        };
        const auto all = fold(fold(running[0], running[1], Count<lanes>{}),
                              fold(running[2], running[3], Count<lanes>{}), Count<lanes / 2>{})
                             .template in_groups<lanes / 4>(even);
        for (int k = 0; k < 4; ++k) {
            value[k] = all.value[k * (lanes / 4)];
            tag[k] = static_cast<Tag>(all.tag[k * (lanes / 4)]);
        }
    } else {
        for (int k = 0; k < kCount; ++k) {
            const auto all = running[k].template in_groups<lanes>(even);
            value[k] = all.value[0];
            tag[k] = static_cast<Tag>(all.tag[0]);
        }
    }
}

// Rows of channels, four at a time.
template <class T, bool kPlain>
void pool_max_nchw(const T* x, const Panel& panel, const Prologue<Accumulator<T>>& prologue, bool even, double* sum,
                   Accumulator<T>* peak, int32_t* index) {
    using A = Accumulator<T>;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t positions = panel.positions;
    fours(0, panel.channels, [&](auto count, int64_t c) {
        constexpr int kRows = decltype(count)::value;
        PrologueVector<A, kPlain> u[kRows];
        for (int k = 0; k < kRows; ++k) u[k] = PrologueVector<A, kPlain>::template at<false>(prologue, c + k, lanes);
        RunningMax<A> running[kRows];
        double total[kRows] = {};
        for (int64_t first = 0, last; first < positions; first = last) {
            last = positions - first < (kBlock + 1) * lanes ? positions : first + kBlock * lanes;
            Vec<A> sums[kRows] = {};
            vectors<A>(first, last, [&](int64_t i, int64_t n, auto counted) {
                const Mask<A> position = counting_from<A>(i);
                for (int k = 0; k < kRows; ++k) {
                    const Vec<A> v = u[k](load_n(x + (c + k) * positions + i, n));
                    sums[k] += counted.of(v);
                    running[k].update(rounded_to<T>(v), position, counted.mask(), even);
                }
            });
            for (int k = 0; k < kRows; ++k) total[k] += sum_of<A>(sums[k]);
        }
        finish<kRows>(running, even, peak + c, index + c);
        if (sum)
            for (int k = 0; k < kRows; ++k) sum[c + k] += total[k];
    });
}

// Channels in vectors, four at a time; value and tag carry the running maxima from one block of positions to the
// next.
template <class T, bool kPlain, class Lane>
void pool_max_nhwc(const T* x, const Panel& panel, const Prologue<Accumulator<T>>& prologue, bool even,
                   Accumulator<T>* value, Lane* tag) {
    using A = Accumulator<T>;
    constexpr int64_t lanes = kLanes<A>;
    const auto all = lanes_below<A>(lanes);
    fours(0, (panel.channels + lanes - 1) / lanes, [&](auto count, int64_t block) {
        constexpr int kColumns = decltype(count)::value;
        const int64_t c = block * lanes, n = lesser(lanes, panel.channels - c - (kColumns - 1) * lanes);
        PrologueVector<A, kPlain> u[kColumns];
        RunningMax<A> running[kColumns];
        for (int k = 0; k < kColumns; ++k) {
            const int64_t column = c + k * lanes;
            u[k] = PrologueVector<A, kPlain>::template at<true>(prologue, column, k == kColumns - 1 ? n : lanes);
            running[k] = {load(value + column), load_bytes<Mask<A>>(tag + column)};
        }
        for (int64_t p = 0; p < panel.positions; ++p) {
            const Mask<A> position = Mask<A>{} + static_cast<Lane>(panel.first_position + p);
            for (int k = 0; k < kColumns; ++k) {
                const T* from = x + p * panel.channels + c + k * lanes;
                running[k].update(rounded_to<T>(u[k](load_n(from, k == kColumns - 1 ? n : lanes))), position, all,
                                  even);
            }
        }
        for (int k = 0; k < kColumns; ++k) {
            store(running[k].value, value + c + k * lanes);
            std::memcpy(tag + c + k * lanes, &running[k].tag, sizeof(running[k].tag));
        }
    });
}

// Both pools in one pass over memory: a cache block at a time, a channel (NCHW) or some positions.
template <class T, bool kChannelsLast, bool kPlain>
void pool_in(const T* x, const Panel& panel, const Prologue<Accumulator<T>>& prologue, bool even, double* sum,
             Accumulator<T>* peak, int32_t* index) {
    using A = Accumulator<T>;
    using Lane = std::remove_reference_t<decltype(Mask<A>{}[0])>;
    auto add_as = [&](auto kind, const Panel& part, const T* from, double* part_sum) {
        constexpr int kKind = decltype(kind)::value;
        accumulate<kChannelsLast, A>(
            part,
            [&](int64_t c, int64_t n) { return PrologueVector<A, kPlain>::template at<kChannelsLast>(prologue, c, n); },
            [&](const auto& u, int64_t at, int64_t n) { return u.template apply<kKind>(load_n(from + at, n)); },
            part_sum);
    };
    auto add = [&](const Panel& part, const T* from, double* part_sum) {
        if constexpr (kPlain)
            add_as(Count<kIdentity>{}, part, from, part_sum);
        else
            by_activation(prologue.activation, [&](auto kind) { add_as(kind, part, from, part_sum); });
    };
    if (!peak) return add(panel, x, sum);
    Panel part = panel;
    if constexpr (!kChannelsLast) {
        pool_max_nchw<T, kPlain>(x, panel, prologue, even, sum, peak, index);
    } else {
        const int64_t padded = (panel.channels + kLanes<A> - 1) / kLanes<A> * kLanes<A>;
        Buffer<A> value(padded);
        value.fill(-kInfinity<A>);
        Buffer<Lane> tag(padded);
        tag.fill(even ? 0 : static_cast<Lane>(panel.first_position));
        const int64_t step = greater(4, 16384 / greater(1, panel.channels));
        for (int64_t p = 0; p < panel.positions; p += step) {
            part.positions = lesser(step, panel.positions - p);
            part.first_position = panel.first_position + p;
            const T* from = x + p * panel.channels;
            if (sum) add(part, from, sum);
            pool_max_nhwc<T, kPlain>(from, part, prologue, even, &value[0], &tag[0]);
        }
        for (int64_t c = 0; c < panel.channels; ++c) {
            peak[c] = value[c];
            index[c] = static_cast<int32_t>(tag[c]);
        }
    }
}

template <class T>
void pool(const T* x, Panel panel, Prologue<Accumulator<T>> prologue, bool even, double* sum, Accumulator<T>* peak,
          int32_t* index) {
    const bool plain = prologue.identity();
    auto run = panel.channels_last ? (plain ? pool_in<T, true, true> : pool_in<T, true, false>)
                                   : (plain ? pool_in<T, false, true> : pool_in<T, false, false>);
    run(x, panel, prologue, even, sum, peak, index);
}

template <class A, bool kPlain>
struct ScaleVector {
    PrologueVector<A, kPlain> u;
    Vec<A> gate;
    template <bool kChannelsLast>
    static ScaleVector at(const Prologue<A>& prologue, const A* gate, int64_t channel, int64_t n) {
        return {PrologueVector<A, kPlain>::template at<kChannelsLast>(prologue, channel, n),
                channel_vector<kChannelsLast>(gate, channel, n)};
    }
};

// Calls run(Count<pre>, Count<post>) for the activations before and after a gate, where the usual ones are compiled by
// themselves: kNoPrologue is no affine and no activation, -1 asks for the activation at every vector.
constexpr int kNoPrologue = -2;
template <class A, class Run>
inline void by_end(const Prologue<A>& prologue, int post_activation, Run run) {
    const bool plain = prologue.identity();
    if (plain && post_activation == kIdentity)
        run(Count<kNoPrologue>{}, Count<kIdentity>{});
    else if (plain && post_activation == kRelu)
        run(Count<kNoPrologue>{}, Count<kRelu>{});
    else
        run(Count<-1>{}, Count<-1>{});
}
template <class A, class Run>
inline void by_ends(const Prologue<A>& prologue, int post_activation, Run run) {
    if (prologue.identity())
        by_end(prologue, post_activation, run);
    else if (post_activation == kIdentity)
        by_activation(prologue.activation, [&](auto pre) { run(pre, Count<kIdentity>{}); });
    else if (post_activation == kRelu && prologue.activation == kIdentity)
        run(Count<kIdentity>{}, Count<kRelu>{});
    else
        run(Count<-1>{}, Count<-1>{});
}

template <class T, bool kChannelsLast, int kPre, int kPost>
void scale_in(const T* x, const T* residual, const Panel& panel, const Prologue<Accumulator<T>>& prologue,
              const Accumulator<T>* gate, int activation, T* y) {
    using A = Accumulator<T>;
    constexpr bool kPlain = kPre == kNoPrologue;
    auto make = [&](int64_t c, int64_t n) {
        return ScaleVector<A, kPlain>::template at<kChannelsLast>(prologue, gate, c, n);
    };
    auto walk_with = [&](auto has_residual) {
        walk<kChannelsLast, A>(panel, make, [&](const ScaleVector<A, kPlain>& v, int64_t at, int64_t n) {
            Vec<A> out = v.u.template apply<kPre>(load_n(x + at, n)) * v.gate;
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
void scale(const T* x, const T* residual, Panel panel, Prologue<Accumulator<T>> prologue, const Accumulator<T>* gate,
           int activation, T* y) {
    by_ends(prologue, activation, [&](auto pre, auto post) {
        constexpr int kPre = decltype(pre)::value, kPost = decltype(post)::value;
        auto run = panel.channels_last ? scale_in<T, true, kPre, kPost> : scale_in<T, false, kPre, kPost>;
        run(x, residual, panel, prologue, gate, activation, y);
    });
}

template <class T, bool kChannelsLast, int kPre, int kPost>
void dot_in(const T* grad, const T* x, const T* y, const T* residual, const Panel& panel,
            const Prologue<Accumulator<T>>& prologue, const Accumulator<T>* gate, int activation, T* grad_residual,
            double* dot) {
    using A = Accumulator<T>;
    constexpr bool kPlain = kPre == kNoPrologue;
    accumulate<kChannelsLast, A>(
        panel,
        [&](int64_t c, int64_t n) { return ScaleVector<A, kPlain>::template at<kChannelsLast>(prologue, gate, c, n); },
        [&](const ScaleVector<A, kPlain>& v, int64_t at, int64_t n) {
            const Vec<A> u = v.u.template apply<kPre>(load_n(x + at, n));
            Vec<A> d = load_n(grad + at, n);
            if constexpr (kPost != kIdentity) {
                Vec<A> out = y ? load_n(y + at, n) : u * v.gate;
                if (!y && residual) out += load_n(residual + at, n);
                d *= activate_grad<A>(out, kPost < 0 ? activation : kPost);
                store_n(d, grad_residual + at, n);
            }
            return d * u;
        },
        dot);
}

template <class T>
void dot(const T* grad, const T* x, const T* y, const T* residual, Panel panel, Prologue<Accumulator<T>> prologue,
         const Accumulator<T>* gate, int activation, T* grad_residual, double* out) {
    by_ends(prologue, activation, [&](auto pre, auto post) {
        constexpr int kPre = decltype(pre)::value, kPost = decltype(post)::value;
        auto run = panel.channels_last ? dot_in<T, true, kPre, kPost> : dot_in<T, false, kPre, kPost>;
        run(grad, x, y, residual, panel, prologue, gate, activation, grad_residual, out);
    });
}

template <class A, bool kPlain>
struct SpreadVector {
    PrologueVector<A, kPlain> u;
    Vec<A> gate, mean, peak_value, peak;
};

template <class T, bool kChannelsLast, bool kPlain>
void spread_in(const T* grad, const T* x, const Panel& panel, const Prologue<Accumulator<T>>& prologue,
               const Accumulator<T>* gate, const Accumulator<T>* mean, const PeakGrad<Accumulator<T>>& peak_grad,
               T* grad_x, double* grad_weight, double* grad_bias) {
    using A = Accumulator<T>;
    const bool even = peak_grad.value && peak_grad.peak;
    auto make = [&](int64_t c, int64_t n) {
        SpreadVector<A, kPlain> v;
        v.u = PrologueVector<A, kPlain>::template at<kChannelsLast>(prologue, c, n);
        v.gate = gate ? channel_vector<kChannelsLast>(gate, c, n) : Vec<A>{};
        v.mean = mean ? channel_vector<kChannelsLast>(mean, c, n) : Vec<A>{};
        if constexpr (!kPlain) {
            if (even) {
                v.peak_value = channel_vector<kChannelsLast>(peak_grad.value, c, n);
                v.peak = channel_vector<kChannelsLast>(peak_grad.peak, c, n);
            }
        }
        return v;
    };
    // Gradient of what the prologue's activation took: d(loss)/d(x * weight + bias).
    auto grad_before = [&](const SpreadVector<A, kPlain>& v, int64_t at, int64_t n, Vec<A>& x_at) {
        Vec<A> d = v.mean;
        if (grad) d += load_n(grad + at, n) * v.gate;
        if constexpr (!kPlain) {
            x_at = load_n(x + at, n);
            if (even) d += (rounded_to<T>(v.u(x_at)) == v.peak) ? v.peak_value : Vec<A>{};
            if (v.u.activation != kIdentity) d *= activate_grad<A>(v.u.before(x_at), v.u.activation);
        }
        return d;
    };
    if (kPlain || !grad_weight) {
        walk<kChannelsLast, A>(panel, make, [&](const SpreadVector<A, kPlain>& v, int64_t at, int64_t n) {
            Vec<A> x_at;
            Vec<A> d = grad_before(v, at, n, x_at);
            store_n(kPlain ? d : d * v.u.weight, grad_x + at, n);
        });
        return;
    }
    // With an affine: one walk writes grad_x and sums d (for the bias); the dot with x reads the block again
    // while it is in cache, a channel (NCHW) or a few positions (channels_last) at a time.
    const int64_t step = kChannelsLast ? greater(1, 4096 / greater(1, panel.channels)) : 1;
    const int64_t outer = kChannelsLast ? panel.positions : panel.channels;
    for (int64_t first = 0; first < outer; first += step) {
        Panel part = panel;
        (kChannelsLast ? part.positions : part.channels) = lesser(step, outer - first);
        const int64_t start = first * (kChannelsLast ? panel.channels : panel.positions);
        const int64_t channel = kChannelsLast ? 0 : first;
        auto make_part = [&](int64_t c, int64_t n) { return make(c + channel, n); };
        accumulate<kChannelsLast, A>(
            part, make_part,
            [&](const SpreadVector<A, kPlain>& v, int64_t at, int64_t n) {
                Vec<A> x_at;
                Vec<A> d = grad_before(v, at + start, n, x_at);
                store_n(d * v.u.weight, grad_x + at + start, n);
                return d;
            },
            grad_bias + channel);
        accumulate<kChannelsLast, A>(
            part, make_part,
            [&](const SpreadVector<A, kPlain>& v, int64_t at, int64_t n) {
                Vec<A> x_at;
                return grad_before(v, at + start, n, x_at) * x_at;
            },
            grad_weight + channel);
    }
}

template <class T>
void spread(const T* grad, const T* x, Panel panel, Prologue<Accumulator<T>> prologue, const Accumulator<T>* gate,
            const Accumulator<T>* mean, PeakGrad<Accumulator<T>> peak_grad, T* grad_x, double* grad_weight,
            double* grad_bias) {
    using A = Accumulator<T>;
    const bool plain = prologue.identity() && !(peak_grad.value && peak_grad.peak);
    auto run = panel.channels_last ? (plain ? spread_in<T, true, true> : spread_in<T, true, false>)
                                   : (plain ? spread_in<T, false, true> : spread_in<T, false, false>);
    run(grad, x, panel, prologue, gate, mean, peak_grad, grad_x, grad_weight, grad_bias);
    if (!peak_grad.value || peak_grad.peak) return;
    for (int64_t c = 0; c < panel.channels; ++c) {  // "first": one position a channel is written again
        const int64_t p = peak_grad.index[c] - panel.first_position;
        if (p < 0 || p >= panel.positions) continue;
        const int64_t at = panel.channels_last ? p * panel.channels + c : c * panel.positions + p;
        const auto u = PrologueVector<A, false>::template at<false>(prologue, c, 1);
        const Vec<A> x_at = load_n(x + at, 1);
        const Vec<A> slope = activate_grad<A>(u.before(x_at), prologue.activation);
        const Vec<A> share = splat<A>(peak_grad.value[c]) * slope;
        Vec<A> d = mean ? splat<A>(mean[c]) : Vec<A>{};
        if (grad) d += load_n(grad + at, 1) * splat<A>(gate[c]);
        store_n((d * slope + share) * u.weight, grad_x + at, 1);
        if (grad_weight) {
            grad_weight[c] += share[0] * x_at[0];
            grad_bias[c] += share[0];
        }
    }
}

template <class A, class F>
inline void map_values(int64_t n, A* out, F f) {
    constexpr int64_t lanes = kLanes<A>;
    int64_t i = 0;
    for (; i + lanes <= n; i += lanes) store_n(f(i, lanes), out + i, lanes);
    if (i < n) store_n(f(i, n - i), out + i, n - i);
}

#include "attention.inl"
#include "lines.inl"
#include "norm.inl"
#include "select.inl"
#include "simam.inl"
#include "space.inl"

#include "axes.inl"  // needs what space.inl has
#include "context.inl"
#include "mix.inl"

template <class A>
void activate_values(const A* in, int64_t n, int activation, A* out) {
    map_values<A>(n, out, [&](int64_t i, int64_t k) { return activate<A>(load_n(in + i, k), activation); });
}
template <class A>
void activate_grad_values(const A* in, const A* at, int64_t n, int activation, A* out) {
    map_values<A>(n, out, [&](int64_t i, int64_t k) {
        return load_n(in + i, k) * activate_grad<A>(load_n(at + i, k), activation);
    });
}

// Four rows by kSamples: a load of a weight serves all of them. Rows beyond `count` repeat the last one.
template <class A, int kSamples>
inline void dense_tile(const A* const* w, int64_t count, int64_t columns, const A* bias, const A* in, int64_t in_stride,
                       A* out, int64_t out_stride) {
    constexpr int64_t lanes = kLanes<A>;
    constexpr int kRows = 4;
    Vec<A> sums[kSamples][kRows] = {};
    auto add = [&](int64_t i, int64_t n) {
        Vec<A> row[kRows];
        for (int k = 0; k < kRows; ++k) row[k] = load_n(w[k] + i, n);
        for (int s = 0; s < kSamples; ++s) {
            const Vec<A> v = load_n(in + s * in_stride + i, n);
            for (int k = 0; k < kRows; ++k) sums[s][k] += row[k] * v;
        }
    };
    int64_t i = 0;
    for (; i + lanes <= columns; i += lanes) add(i, lanes);
    if (i < columns) add(i, columns - i);
    for (int s = 0; s < kSamples; ++s)
        for (int64_t k = 0; k < count; ++k) out[s * out_stride + k] = sum_of<A>(sums[s][k]) + (bias ? bias[k] : A(0));
}

template <class A>
void dense_forward(const A* weight, const A* bias, int64_t rows, int64_t columns, int64_t samples, const A* in,
                   int64_t in_stride, A* out, int64_t out_stride) {
    constexpr int64_t kRows = 4;
    for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t count = lesser(kRows, rows - r);
        const A* w[kRows];
        for (int64_t k = 0; k < kRows; ++k) w[k] = weight + (r + lesser(k, count - 1)) * columns;
        int64_t s = 0;
        auto tile = [&](auto number) {
            dense_tile<A, decltype(number)::value>(w, count, columns, bias ? bias + r : nullptr, in + s * in_stride,
                                                   in_stride, out + s * out_stride + r, out_stride);
            s += decltype(number)::value;
        };
        while (s + 2 <= samples) tile(Count<2>{});
        if (s < samples) tile(Count<1>{});
    }
}

template <class A>
void dense_transposed(const A* weight, int64_t rows, int64_t columns, int64_t samples, const A* in, int64_t in_stride,
                      A* out, int64_t out_stride) {
    constexpr int64_t kRows = 4;  // four rows at a time: out is read and written once for all of them
    for (int64_t s = 0; s < samples; ++s)
        for (int64_t i = 0; i < columns; ++i) out[s * out_stride + i] = A(0);
    for (int64_t r = 0; r < rows; r += kRows) {
        const int64_t count = lesser(kRows, rows - r);
        for (int64_t s = 0; s < samples; ++s) {
            A* o = out + s * out_stride;
            const A* w[kRows];
            Vec<A> factor[kRows];
            for (int64_t k = 0; k < kRows; ++k) {
                w[k] = weight + (r + lesser(k, count - 1)) * columns;
                factor[k] = splat<A>(k < count ? in[s * in_stride + r + k] : A(0));
            }
            if (count == kRows)
                map_values<A>(columns, o, [&](int64_t i, int64_t n) {
                    return load_n(o + i, n) + ((factor[0] * load_n(w[0] + i, n) + factor[1] * load_n(w[1] + i, n)) +
                                               (factor[2] * load_n(w[2] + i, n) + factor[3] * load_n(w[3] + i, n)));
                });
            else
                for (int64_t k = 0; k < count; ++k)
                    map_values<A>(columns, o, [&](int64_t i, int64_t n) {
                        return load_n(o + i, n) + factor[k] * load_n(w[k] + i, n);
                    });
        }
    }
}

// kRows rows by kColumns vectors of grad_weight in registers: every load serves several products.
template <class A, int kRows, int kColumns>
inline void weight_grad_tile(const A* grad, int64_t grad_stride, const A* in, int64_t in_stride, int64_t samples,
                             int64_t columns, int64_t n, A* out) {
    constexpr int64_t lanes = kLanes<A>;
    Vec<A> total[kRows][kColumns] = {};
    for (int64_t s = 0; s < samples; ++s) {
        const A* g = grad + s * grad_stride;
        const A* v = in + s * in_stride;
        for (int j = 0; j < kColumns; ++j) {
            const Vec<A> x = load_n(v + j * lanes, n);
            for (int k = 0; k < kRows; ++k) total[k][j] += g[k] * x;
        }
    }
    for (int k = 0; k < kRows; ++k)
        for (int j = 0; j < kColumns; ++j) store_n(total[k][j], out + k * columns + j * lanes, n);
}

template <class A>
void dense_weight_grad(const A* grad, int64_t grad_stride, const A* in, int64_t in_stride, int64_t samples,
                       int64_t first, int64_t last, int64_t columns, A* grad_weight) {
    constexpr int64_t lanes = kLanes<A>;
    for (int64_t i = 0; i < columns;) {  // a column block of `in` stays in cache for all rows
        const bool wide = i + 2 * lanes <= columns;
        const int64_t n = lesser(lanes, columns - i);
        for (int64_t r = first; r < last;) {
            A* out = grad_weight + r * columns + i;
            const int64_t rows = last - r;
            auto tile = wide ? (rows >= 4 ? weight_grad_tile<A, 4, 2> : weight_grad_tile<A, 1, 2>)
                             : (rows >= 4 ? weight_grad_tile<A, 4, 1> : weight_grad_tile<A, 1, 1>);
            tile(grad + r, grad_stride, in + i, in_stride, samples, columns, n, out);
            r += rows >= 4 ? 4 : 1;
        }
        i += wide ? 2 * lanes : lanes;
    }
}

template <class T>
constexpr MapKernels<T> kMapKernels{pool<T>, scale<T>, dot<T>, spread<T>};
template <class T>
constexpr SpaceKernels<T> kSpaceKernels{pool_space<T>, scale_space<T>, dot_space<T>, weigh_space<T>, spread_space<T>};
template <class T>
constexpr MixKernels<T> kMixKernels{mix<T>, mix_grad<T>};
template <class T>
constexpr AxisKernels<T> kAxisKernels{pool_axes<T>, spread_axes<T>};
template <class T>
constexpr SelectKernels<T> kSelectKernels{pool_branches<T>, sum_branches<T>, dot_branches<T>, spread_branches<T>};
template <class T>
constexpr ContextKernels<T> kContextKernels{pool_context<T>, softmax_context<Accumulator<T>>, spread_context<T>};
template <class A>
constexpr TapKernels<A> kTapKernels{correlate_taps<A>, tap_grad<A>};
template <class A>
constexpr DenseKernels<A> kDenseKernels{activate_values<A>, activate_grad_values<A>, dense_forward<A>,
                                        dense_transposed<A>, dense_weight_grad<A>};

}  // namespace fused_attn::cpu::INSTRUCTION_SET

// The passes of a context pool: logits a position, and the mean of the map weighted by their softmax, taken online:
// tile by tile, relative to the largest logit so far.
// Included by kernels.inl, needs what space.inl has.

// Calls body(tile, first position, offset) for tiles of a panel that fit in cache, so that further sweeps over one find
// it there.
template <bool kChannelsLast, class Body>
inline void tiles(const Panel& panel, Body body) {
    constexpr int64_t kElements = kChannelsLast ? 1 << 14 : 1 << 17, kShortest = kChannelsLast ? 8 : 64;
    const int64_t step =
        lesser(1024, greater(kShortest, kElements / greater(1, panel.channels) / kShortest * kShortest));
    Panel tile = panel;
    for (int64_t first = 0; first < panel.positions; first += step) {
        tile.positions = lesser(step, panel.positions - first);
        body(tile, first, first * (kChannelsLast ? panel.channels : 1));
    }
}
struct Nothing {};
constexpr auto nothing = [](int64_t, int64_t) { return Nothing{}; };

// values[p] = the sum over the channels of (x - centre[c]) * factors[c]; centre null: of x * factors[c].
template <class T, bool kChannelsLast, bool kCentred>
inline void products(const T* x, const Panel& tile, const Accumulator<T>* factors, const Accumulator<T>* centre,
                     Accumulator<T>* values) {
    using A = Accumulator<T>;
    // Four rows at a time are short streams, which the processor does not see coming.
    constexpr int64_t kAhead = 8192 / sizeof(T);
    struct Channel {
        Vec<A> factor, centre;
    };
    reduce_space<kChannelsLast, true, 0, A>(
        tile,
        [=](int64_t c, int64_t n) {
            return Channel{numbers<!kChannelsLast>(factors, c, n),
                           kCentred ? numbers<!kChannelsLast>(centre, c, n) : Vec<A>{}};
        },
        nothing,
        [=](const Channel& channel, Nothing, int64_t at, int64_t n) {
            Terms<A> terms;
            if constexpr (kChannelsLast) __builtin_prefetch(x + at + kAhead);
            terms.position = (kCentred ? load_n(x + at, n) - channel.centre : load_n(x + at, n)) * channel.factor;
            return terms;
        },
        values, nullptr);
}

// What the exponents are taken relative to: the largest logit, or 0 where all are -infinity.
template <class A>
inline A base_of(A peak) {
    return peak == -kInfinity<A> ? A(0) : peak;
}

template <class T, bool kChannelsLast>
void pool_context_in(const T* x, const Panel& panel, const Accumulator<T>* weight, Accumulator<T> bias,
                     Accumulator<T>* logits, Context<Accumulator<T>>& context) {
    using A = Accumulator<T>;
    double* const sums = context.sums;
    A peak = -kInfinity<A>;
    double total = 0;
    for (int64_t c = 0; c < panel.channels; ++c) sums[c] = 0;
    tiles<kChannelsLast>(panel, [&](const Panel& tile, int64_t first, int64_t at) {
        const int64_t length = tile.positions;
        A* const here = logits + first;
        products<T, kChannelsLast, false>(x + at, tile, weight, nullptr, here);
        A larger = peak;
        for (int64_t p = 0; p < length; ++p) {
            here[p] += bias;
            if (here[p] > larger || here[p] != here[p]) larger = here[p];  // NaN stays
        }
        const A base = base_of(larger);
        if (first > 0 && !(larger == peak)) {
            const double share = std::exp(static_cast<double>(peak) - static_cast<double>(base));
            total *= share;
            for (int64_t c = 0; c < panel.channels; ++c) sums[c] *= share;
        }
        peak = larger;
        Buffer<A> powers(length + kLanes<A>);
        Vec<A> of_tile{};
        vectors<A>(0, length, [&](int64_t p, int64_t n, auto counted) {
            const Vec<A> power = exp(load_n(here + p, n) - splat<A>(base));
            store_n(power, &powers[p], n);
            of_tile += counted.of(power);
        });
        total += sum_of<A>(of_tile);
        const A* const factors = &powers[0];
        double* const to[1] = {sums};
        reduce_space<kChannelsLast, false, 1, A>(
            tile, nothing, [=](int64_t p, int64_t n) { return numbers<kChannelsLast>(factors, p, n); },
            [from = x + at](Nothing, Vec<A> power, int64_t offset, int64_t n) {
                Terms<A> terms;
                terms.channel[0] = load_n(from + offset, n) * power;
                return terms;
            },
            nullptr, to);
    });
    context.peak = peak;
    context.total = total;
}

template <class T>
void pool_context(const T* x, Panel panel, const Accumulator<T>* weight, Accumulator<T> bias, Accumulator<T>* logits,
                  Context<Accumulator<T>>& context) {
    auto run = panel.channels_last ? pool_context_in<T, true> : pool_context_in<T, false>;
    run(x, panel, weight, bias, logits, context);
}

template <class A>
void softmax_context(A* logits, int64_t n, A peak, A scale) {
    const Vec<A> base = splat<A>(base_of(peak)), factor = splat<A>(scale);
    map_values<A>(n, logits, [=](int64_t i, int64_t k) { return exp(load_n(logits + i, k) - base) * factor; });
}

// What is taken off x leaves all sums as they are, for the slopes of all positions add up to 0, and costs them no
// digits where one position is most of the context.
template <class T, bool kChannelsLast>
void spread_context_in(const T* grad, const Accumulator<T>* gate, const T* x, const Panel& panel,
                       const Accumulator<T>* factors, const Accumulator<T>* weight, const Accumulator<T>* shares,
                       const Accumulator<T>* context, T* grad_x, double* grad_weight) {
    using A = Accumulator<T>;
    struct Channel {
        Vec<A> factor, weight, gate;
    };
    struct Position {
        Vec<A> share, slope;
    };
    Buffer<A> slopes(panel.positions + kLanes<A>);
    tiles<kChannelsLast>(panel, [&](const Panel& tile, int64_t first, int64_t at) {
        A* const here = &slopes[first];
        products<T, kChannelsLast, true>(x + at, tile, factors, context, here);
        for (int64_t p = 0; p < tile.positions; ++p) here[p] *= shares[first + p];
        double* const to[1] = {grad_weight};
        reduce_space<kChannelsLast, false, 1, A>(
            tile, [=](int64_t c, int64_t n) { return numbers<!kChannelsLast>(context, c, n); },
            [=](int64_t p, int64_t n) { return numbers<kChannelsLast>(here, p, n); },
            [from = x + at](Vec<A> centre, Vec<A> slope, int64_t offset, int64_t n) {
                Terms<A> terms;
                terms.channel[0] = (load_n(from + offset, n) - centre) * slope;
                return terms;
            },
            nullptr, to);
    });
    // Of this x is no part, so that it goes through memory in its order.
    walk_space<kChannelsLast, A>(
        panel,
        [=](int64_t c, int64_t n) {
            return Channel{numbers<!kChannelsLast>(factors, c, n), numbers<!kChannelsLast>(weight, c, n),
                           gate ? numbers<!kChannelsLast>(gate, c, n) : splat<A>(1)};
        },
        [=, slope = &slopes[0]](int64_t p, int64_t n) {
            return Position{numbers<kChannelsLast>(shares, p, n), numbers<kChannelsLast>(slope, p, n)};
        },
        [=](const Channel& channel, const Position& here, int64_t at, int64_t n) {
            Vec<A> d = here.share * channel.factor + here.slope * channel.weight;
            if (grad) d += load_n(grad + at, n) * channel.gate;
            store_n(d, grad_x + at, n);
        });
}

template <class T>
void spread_context(const T* grad, const Accumulator<T>* gate, const T* x, Panel panel, const Accumulator<T>* factors,
                    const Accumulator<T>* weight, const Accumulator<T>* shares, const Accumulator<T>* context,
                    T* grad_x, double* grad_weight) {
    auto run = panel.channels_last ? spread_context_in<T, true> : spread_context_in<T, false>;
    run(grad, gate, x, panel, factors, weight, shares, context, grad_x, grad_weight);
}

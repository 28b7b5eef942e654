// The passes of SimAM: the moments of each channel, then x * sigmoid(c^2 q + 1/2) with c = x - mean, and its backward.
// Included by kernels.inl.

// What is taken off a channel: the mean in two parts, pivot and rest, so that the difference is exact to its last digit
// however large the mean is.
template <class A>
struct Centre {
    Vec<A> pivot, rest;
    template <bool kChannelsLast>
    static Centre at(const A* pivot, const A* rest, int64_t channel, int64_t n) {
        return {channel_vector<kChannelsLast>(pivot, channel, n), channel_vector<kChannelsLast>(rest, channel, n)};
    }
    Vec<A> from(Vec<A> x) const { return (x - pivot) - rest; }
};

template <class T, bool kChannelsLast>
void moments_in(const T* x, const Panel& panel, const Accumulator<T>* pivot, double* mean, double* squares) {
    using A = Accumulator<T>;
    const int64_t channels = panel.channels;
    // Part by part, small enough that the second sweep over one finds it in cache: a channel, or some positions.
    constexpr int64_t kPart = 8192;
    const int64_t whole = panel.positions, step = kChannelsLast ? greater(8, kPart / greater(1, channels)) : 1;
    Panel part = panel;
    part.channels = kChannelsLast ? channels : 1;
    Buffer<double> sums(2 * part.channels);
    Buffer<A> rest(part.channels);
    auto two_sweeps = [&](const T* from, const A* about) {
        sums.fill(0);
        accumulate<kChannelsLast, A>(
            part, [&](int64_t c, int64_t n) { return channel_vector<kChannelsLast>(about, c, n); },
            [&](Vec<A> middle, int64_t at, int64_t n) { return load_n(from + at, n) - middle; }, &sums[0]);
        for (int64_t c = 0; c < part.channels; ++c) {
            sums[c] /= static_cast<double>(part.positions);
            rest[c] = static_cast<A>(sums[c]);
        }
        accumulate<kChannelsLast, A>(
            part, [&](int64_t c, int64_t n) { return Centre<A>::template at<kChannelsLast>(about, &rest[0], c, n); },
            [&](const Centre<A>& centre, int64_t at, int64_t n) {
                const Vec<A> c = centre.from(load_n(from + at, n));
                return c * c;
            },
            &sums[part.channels]);
    };
    if constexpr (kChannelsLast) {
        for (int64_t p = 0; p < whole; p += step) {
            part.positions = lesser(step, whole - p);
            two_sweeps(x + p * channels, pivot);
            for (int64_t c = 0; c < channels; ++c) {
                if (p == 0) mean[c] = squares[c] = 0;
                join_moments(mean[c], squares[c], static_cast<double>(p), sums[c], sums[channels + c],
                             static_cast<double>(part.positions));
            }
        }
    } else {
        for (int64_t c = 0; c < channels; ++c) {
            two_sweeps(x + c * whole, pivot + c);
            mean[c] = sums[0], squares[c] = sums[1];
        }
    }
}

template <class A>
struct EnergyVector {
    Centre<A> centre;
    Vec<A> q, k, shift;
    template <bool kChannelsLast>
    static EnergyVector at(Energy<A> energy, int64_t channel, int64_t n) {
        EnergyVector v{Centre<A>::template at<kChannelsLast>(energy.pivot, energy.rest, channel, n),
                       channel_vector<kChannelsLast>(energy.q, channel, n), Vec<A>{}, Vec<A>{}};
        if (energy.k) {
            v.k = channel_vector<kChannelsLast>(energy.k, channel, n);
            v.shift = channel_vector<kChannelsLast>(energy.shift, channel, n);
        }
        return v;
    }
};

// sigmoid(t), and its derivative from e^-t: 1 - sigmoid(t) would cancel.
template <class A>
struct SigmoidGrad {
    Vec<A> value, slope;
    explicit SigmoidGrad(Vec<A> t) {
        const Vec<A> decay = exp(-t);
        value = splat<A>(1) / (splat<A>(1) + decay);
        slope = decay * value * value;
    }
};

template <class T, bool kChannelsLast>
void apply_in(const T* x, const Panel& panel, Energy<Accumulator<T>> energy, T* y) {
    using A = Accumulator<T>;
    walk<kChannelsLast, A>(
        panel, [=](int64_t c, int64_t n) { return EnergyVector<A>::template at<kChannelsLast>(energy, c, n); },
        [=](const EnergyVector<A>& v, int64_t at, int64_t n) {
            const Vec<A> here = load_n(x + at, n), c = v.centre.from(here);
            store_n(here * sigmoid<A>(c * c * v.q + splat<A>(A(0.5))), y + at, n);
        });
}

template <class T, bool kChannelsLast>
void energy_dots_in(const T* grad, const T* x, const Panel& panel, Energy<Accumulator<T>> energy, double* dot,
                    double* squares) {
    using A = Accumulator<T>;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t channels = panel.channels, positions = panel.positions;
    struct Terms {
        Vec<A> dot, squares;
    };
    auto terms = [=](const EnergyVector<A>& v, int64_t at, int64_t n) {
        const Vec<A> here = load_n(x + at, n), c = v.centre.from(here);
        const SigmoidGrad<A> s(c * c * v.q + splat<A>(A(0.5)));
        const Vec<A> hc = load_n(grad + at, n) * here * s.slope * c;
        return Terms{hc, hc * c};
    };
    if constexpr (!kChannelsLast) {
        for (int64_t c = 0; c < channels; ++c) {
            const auto v = EnergyVector<A>::template at<false>(energy, c, lanes);
            for (int64_t first = 0, last; first < positions; first = last) {
                last = positions - first < (kBlock + 1) * lanes ? positions : first + kBlock * lanes;
                Terms sums{};
                vectors<A>(first, last, [&](int64_t i, int64_t n, auto counted) {
                    const Terms t = terms(v, c * positions + i, n);
                    sums.dot += counted.of(t.dot), sums.squares += counted.of(t.squares);
                });
                dot[c] += sum_of<A>(sums.dot), squares[c] += sum_of<A>(sums.squares);
            }
        }
    } else {
        const int64_t padded = (channels + lanes - 1) / lanes * lanes;
        Buffer<A> sums(2 * padded);
        for (int64_t first = 0; first < positions; first += kBlock) {
            sums.fill(A(0));
            for (int64_t p = first; p < lesser(positions, first + kBlock); ++p)
                for (int64_t c = 0; c < channels; c += lanes) {
                    const int64_t n = lesser(lanes, channels - c);
                    const Terms t = terms(EnergyVector<A>::template at<true>(energy, c, n), p * channels + c, n);
                    store(load(&sums[c]) + t.dot, &sums[c]);
                    store(load(&sums[padded + c]) + t.squares, &sums[padded + c]);
                }
            for (int64_t c = 0; c < channels; ++c) dot[c] += sums[c], squares[c] += sums[padded + c];
        }
    }
}

template <class T, bool kChannelsLast>
void energy_spread_in(const T* grad, const T* x, const Panel& panel, Energy<Accumulator<T>> energy, T* grad_x) {
    using A = Accumulator<T>;
    walk<kChannelsLast, A>(
        panel, [=](int64_t c, int64_t n) { return EnergyVector<A>::template at<kChannelsLast>(energy, c, n); },
        [=](const EnergyVector<A>& v, int64_t at, int64_t n) {
            const Vec<A> here = load_n(x + at, n), c = v.centre.from(here), g = load_n(grad + at, n);
            const SigmoidGrad<A> s(c * c * v.q + splat<A>(A(0.5)));
            const Vec<A> h = g * here * s.slope;
            store_n(g * s.value + splat<A>(2) * c * (v.q * h - v.k) + v.shift, grad_x + at, n);
        });
}

template <class T>
void moments(const T* x, Panel panel, const Accumulator<T>* pivot, double* mean, double* squares) {
    (panel.channels_last ? moments_in<T, true> : moments_in<T, false>)(x, panel, pivot, mean, squares);
}
template <class T>
void apply_energy(const T* x, Panel panel, Energy<Accumulator<T>> energy, T* y) {
    (panel.channels_last ? apply_in<T, true> : apply_in<T, false>)(x, panel, energy, y);
}
template <class T>
void energy_dots(const T* grad, const T* x, Panel panel, Energy<Accumulator<T>> energy, double* dot, double* squares) {
    (panel.channels_last ? energy_dots_in<T, true> : energy_dots_in<T, false>)(grad, x, panel, energy, dot, squares);
}
template <class T>
void energy_spread(const T* grad, const T* x, Panel panel, Energy<Accumulator<T>> energy, T* grad_x) {
    (panel.channels_last ? energy_spread_in<T, true> : energy_spread_in<T, false>)(grad, x, panel, energy, grad_x);
}

template <class T>
constexpr SimamKernels<T> kSimamKernels{moments<T>, apply_energy<T>, energy_dots<T>, energy_spread<T>};

// The backward passes of a norm gate: u = activation(v), v = x * weight[c] + bias[c], times a gate. Included by
// kernels.inl.

template <class A>
struct NormVector {
    Vec<A> weight, bias, mean;
    template <bool kChannelsLast>
    static NormVector at(const Norm<A>& norm, int64_t channel, int64_t n) {
        return {channel_vector<kChannelsLast>(norm.weight, channel, n),
                channel_vector<kChannelsLast>(norm.bias, channel, n),
                channel_vector<kChannelsLast>(norm.mean, channel, n)};
    }
};

// u and its derivative; kActivation is the activation where it is known when this is compiled, else -1.
template <class A, int kActivation>
inline void activate_both(Vec<A> v, int activation, Vec<A>& u, Vec<A>& slope) {
    const int kind = kActivation < 0 ? activation : kActivation;
    if (kind == kSilu) {  // one exponential for both
        const Vec<A> one = splat<A>(1), s = sigmoid<A>(v);
        u = v * s;
        slope = s * (one + v * (one - s));
    } else {
        u = activate<A>(v, kind);
        slope = activate_grad<A>(v, kind);
    }
}

// The five sums that norm_dots takes at one vector, in their order.
template <class A>
struct NormTerms {
    Vec<A> terms[kNormSums] = {};
    template <class Lanes>
    void add(const NormTerms& other, Lanes counted) {
        for (int k = 0; k < kNormSums; ++k) terms[k] += counted.of(other.terms[k]);
    }
};

template <class T, bool kChannelsLast, int kActivation>
void norm_dots_in(const T* grad, const T* x, const T* y, const T* residual, const Panel& panel,
                  const Norm<Accumulator<T>>& norm, const Accumulator<T>* gate, int activation, int post_activation,
                  T* grad_residual, const NormSums& sums) {
    using A = Accumulator<T>;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t channels = panel.channels, positions = panel.positions;
    struct Parameters {
        NormVector<A> norm;
        Vec<A> gate;
    };
    auto make = [=](int64_t c, int64_t n) {
        return Parameters{NormVector<A>::template at<kChannelsLast>(norm, c, n),
                          y ? Vec<A>{} : channel_vector<kChannelsLast>(gate, c, n)};
    };
    auto terms = [=](const Parameters& p, int64_t at, int64_t n) {
        const Vec<A> here = load_n(x + at, n), c = here - p.norm.mean;
        Vec<A> u, slope, h = load_n(grad + at, n);
        activate_both<A, kActivation>(here * p.norm.weight + p.norm.bias, activation, u, slope);
        if (post_activation != kIdentity) {
            if (y) {
                h *= activate_grad<A>(load_n(y + at, n), kRelu);
            } else {
                Vec<A> out = u * p.gate;
                if (residual) out += load_n(residual + at, n);
                h *= activate_grad<A>(out, post_activation);
            }
            store_n(h, grad_residual + at, n);
        }
        if constexpr (kActivation == kIdentity)
            return NormTerms<A>{{h * u, h, h * c, Vec<A>{}, c}};
        else
            return NormTerms<A>{{h * u, h * slope, h * slope * c, slope, slope * c}};
    };
    if constexpr (!kChannelsLast) {
        for (int64_t c = 0; c < channels; ++c) {
            const auto parameters = make(c, lanes);
            for (int64_t first = 0, last; first < positions; first = last) {
                last = positions - first < (kBlock + 1) * lanes ? positions : first + kBlock * lanes;
                NormTerms<A> total;
                vectors<A>(first, last, [&](int64_t i, int64_t n, auto counted) {
                    total.add(terms(parameters, c * positions + i, n), counted);
                });
                for (int k = 0; k < kNormSums; ++k) sums.of[k][c] += sum_of<A>(total.terms[k]);
            }
        }
    } else {
        const int64_t padded = (channels + lanes - 1) / lanes * lanes;
        Buffer<A> buffer(kNormSums * padded);
        for (int64_t first = 0; first < positions; first += kBlock) {
            buffer.fill(A(0));
            fours(first, lesser(positions, first + kBlock), [&](auto count, int64_t p) {
                for (int64_t c = 0; c < channels; c += lanes) {  // the buffer is read and written once for all rows
                    const int64_t n = lesser(lanes, channels - c);
                    const auto parameters = make(c, n);
                    NormTerms<A> total;
                    for (int row = 0; row < decltype(count)::value; ++row)
                        total.add(terms(parameters, (p + row) * channels + c, n), AllLanes<A>{});
                    for (int k = 0; k < kNormSums; ++k) {
                        A* to = &buffer[k * padded + c];
                        store(load(to) + total.terms[k], to);
                    }
                }
            });
            for (int k = 0; k < kNormSums; ++k)
                for (int64_t c = 0; c < channels; ++c) sums.of[k][c] += buffer[k * padded + c];
        }
    }
    if constexpr (kActivation == kIdentity)
        for (int64_t c = 0; c < channels; ++c) sums.of[3][c] += static_cast<double>(positions);
}

template <class T, bool kChannelsLast, int kActivation>
void norm_spread_in(const T* grad, const T* x, const Panel& panel, const Norm<Accumulator<T>>& norm,
                    const NormFactors<Accumulator<T>>& factors, int activation, T* grad_x) {
    using A = Accumulator<T>;
    struct Parameters {
        NormVector<A> norm;
        Vec<A> gate, pooled, shift, slope;
    };
    walk<kChannelsLast, A>(
        panel,
        [=](int64_t c, int64_t n) {
            Parameters p{
                NormVector<A>::template at<kChannelsLast>(norm, c, n),
                channel_vector<kChannelsLast>(factors.gate, c, n), channel_vector<kChannelsLast>(factors.pooled, c, n),
                channel_vector<kChannelsLast>(factors.shift, c, n), channel_vector<kChannelsLast>(factors.slope, c, n)};
            if constexpr (kActivation == kIdentity) p.shift += p.pooled;
            return p;
        },
        [=](const Parameters& p, int64_t at, int64_t n) {
            const Vec<A> here = load_n(x + at, n), g = load_n(grad + at, n);
            const Vec<A> of_batch = p.shift + p.slope * (here - p.norm.mean);
            if constexpr (kActivation == kIdentity) {
                store_n(g * p.gate + of_batch, grad_x + at, n);
            } else {
                const int kind = kActivation < 0 ? activation : kActivation;
                const Vec<A> slope = activate_grad<A>(here * p.norm.weight + p.norm.bias, kind);
                store_n((g * p.gate + p.pooled) * slope + of_batch, grad_x + at, n);
            }
        });
}

// Calls body(Count<activation>) for those compiled by themselves, else with -1.
template <class Body>
inline void by_activation(int activation, Body body) {
    if (activation == kIdentity)
        body(Count<kIdentity>{});
    else if (activation == kRelu)
        body(Count<kRelu>{});
    else
        body(Count<-1>{});
}

template <class T>
void norm_dots(const T* grad, const T* x, const T* y, const T* residual, Panel panel, Norm<Accumulator<T>> norm,
               const Accumulator<T>* gate, int activation, int post_activation, T* grad_residual, NormSums sums) {
    by_activation(activation, [&](auto kind) {
        constexpr int kKind = decltype(kind)::value;
        (panel.channels_last ? norm_dots_in<T, true, kKind>
                             : norm_dots_in<T, false, kKind>)(grad, x, y, residual, panel, norm, gate, activation,
                                                              post_activation, grad_residual, sums);
    });
}
template <class T>
void norm_spread(const T* grad, const T* x, Panel panel, Norm<Accumulator<T>> norm, NormFactors<Accumulator<T>> factors,
                 int activation, T* grad_x) {
    by_activation(activation, [&](auto kind) {
        constexpr int kKind = decltype(kind)::value;
        (panel.channels_last ? norm_spread_in<T, true, kKind>
                             : norm_spread_in<T, false, kKind>)(grad, x, panel, norm, factors, activation, grad_x);
    });
}

template <class T>
constexpr NormKernels<T> kNormKernels{norm_dots<T>, norm_spread<T>};

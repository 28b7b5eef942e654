// The passes of a norm gate over its map but for the statistics: u = activation(v), v = x * weight[c] + bias[c], times
// a gate. Included by kernels.inl.

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

// The bits of n lanes from element i of a row on; what follows them may be anything.
inline unsigned load_bits(const uint8_t* row, int64_t i, int64_t n) {
    const int64_t byte = i >> 3, shift = i & 7;
    unsigned bits = row[byte] >> shift;
    for (int64_t k = 1; 8 * k < shift + n; ++k) bits |= static_cast<unsigned>(row[byte + k]) << (8 * k - shift);
    return bits;
}
// Sets them. Where vectors have fewer than eight lanes the row's bytes must have been zero. Those of eight or
// more write whole bytes; only a row's last may start within one, whose bits are set already, and ends with the row.
template <int64_t kWidth>
inline void store_bits(unsigned bits, uint8_t* row, int64_t i, int64_t n) {
    const int64_t byte = i >> 3, shift = i & 7;
    bits &= (1u << n) - 1;
    if (kWidth >= 8) {
        for (int64_t k = shift ? 1 : 0; 8 * k < shift + n; ++k)
            row[byte + k] = static_cast<uint8_t>(bits >> (8 * k - shift));
        return;
    }
    row[byte] |= static_cast<uint8_t>(bits << shift);
    if (shift + n > 8) row[byte + 1] |= static_cast<uint8_t>(bits >> (8 - shift));
}
// The largest number that T rounds to 0: bits are those of the y that is stored.
template <class T>
constexpr Accumulator<T> kRoundsToZero = 0;
template <>
inline constexpr float kRoundsToZero<Half> = 0x1p-25f;
template <>
inline constexpr float kRoundsToZero<BFloat16> = 0x1p-134f;

template <class T, bool kChannelsLast, int kActivation>
void norm_scale_in(const T* x, const T* residual, const Panel& panel, const Norm<Accumulator<T>>& norm,
                   const Accumulator<T>* gate, int activation, int post_activation, T* y, uint8_t* bits) {
    using A = Accumulator<T>;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t rows = kChannelsLast ? panel.positions : panel.channels;
    const int64_t length = kChannelsLast ? panel.channels : panel.positions;
    const int kind = kActivation < 0 ? activation : kActivation;
    struct Parameters {
        Vec<A> weight, bias, gate;
    };
    auto make = [=](int64_t c, int64_t n) {
        return Parameters{channel_vector<kChannelsLast>(norm.weight, c, n),
                          channel_vector<kChannelsLast>(norm.bias, c, n), channel_vector<kChannelsLast>(gate, c, n)};
    };
    for (int64_t row = 0; row < rows; ++row) {
        const Parameters of_row = make(kChannelsLast ? 0 : row, lesser(lanes, length));
        const int64_t start = row * length;
        uint8_t* row_bits = bits ? bits + row * row_bytes(length) : nullptr;
        auto sum = [&](int64_t i, int64_t n) {
            const Parameters p = kChannelsLast ? make(i, n) : of_row;
            const Vec<A> v = load_n(x + start + i, n) * p.weight + p.bias;
            const Vec<A> out = activate<A>(v, kind) * p.gate;
            return residual ? out + load_n(residual + start + i, n) : out;
        };
        auto put = [&](Vec<A> out, int64_t i, int64_t n) {
            if (row_bits) store_bits<lanes>(bits_of<A>(~(out <= splat<A>(kRoundsToZero<T>))), row_bits, i, n);
            if (post_activation == kRelu)
                out = activate<A>(out, kRelu);
            else if (post_activation != kIdentity)
                out = activate<A>(out, post_activation);
            store_n(out, y + start + i, n);
        };
        if (row_bits && lanes < 8)
            for (int64_t byte = 0; byte < row_bytes(length); ++byte) row_bits[byte] = 0;
        if (length < lanes) {
            put(sum(0, length), 0, length);
            continue;
        }
        // The last vector ends with the row and overlaps the one before: taken first, because y may be x or residual.
        const int64_t whole = length / lanes * lanes;
        const Vec<A> last = whole < length ? sum(length - lanes, lanes) : Vec<A>{};
        for (int64_t i = 0; i < whole; i += lanes) put(sum(i, lanes), i, lanes);
        if (whole < length) put(last, length - lanes, lanes);
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
void norm_dots_in(const T* grad, const T* x, const uint8_t* bits, const T* residual, const Panel& panel,
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
                          bits ? Vec<A>{} : channel_vector<kChannelsLast>(gate, c, n)};
    };
    const int64_t length = kChannelsLast ? channels : positions;
    auto terms = [=](const Parameters& p, int64_t row, int64_t i, int64_t n) {
        const int64_t at = row * length + i;
        const Vec<A> here = load_n(x + at, n), c = here - p.norm.mean;
        Vec<A> u, slope, h = load_n(grad + at, n);
        activate_both<A, kActivation>(here * p.norm.weight + p.norm.bias, activation, u, slope);
        if (post_activation != kIdentity) {
            if (bits) {
                h = mask_of<A>(load_bits(bits + row * row_bytes(length), i, n)) ? h : Vec<A>{};
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
                vectors<A>(first, last,
                           [&](int64_t i, int64_t n, auto counted) { total.add(terms(parameters, c, i, n), counted); });
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
                        total.add(terms(parameters, p + row, c, n), AllLanes<A>{});
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

template <class T>
void norm_scale(const T* x, const T* residual, Panel panel, Norm<Accumulator<T>> norm, const Accumulator<T>* gate,
                int activation, int post_activation, T* y, uint8_t* bits) {
    by_activation(activation, [&](auto kind) {
        constexpr int kKind = decltype(kind)::value;
        (panel.channels_last
             ? norm_scale_in<T, true, kKind>
             : norm_scale_in<T, false, kKind>)(x, residual, panel, norm, gate, activation, post_activation, y, bits);
    });
}
template <class T>
void norm_dots(const T* grad, const T* x, const uint8_t* bits, const T* residual, Panel panel,
               Norm<Accumulator<T>> norm, const Accumulator<T>* gate, int activation, int post_activation,
               T* grad_residual, NormSums sums) {
    by_activation(activation, [&](auto kind) {
        constexpr int kKind = decltype(kind)::value;
        (panel.channels_last ? norm_dots_in<T, true, kKind>
                             : norm_dots_in<T, false, kKind>)(grad, x, bits, residual, panel, norm, gate, activation,
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
constexpr NormKernels<T> kNormKernels{norm_scale<T>, norm_dots<T>, norm_spread<T>};

// The kernels of kernels.h for a selection of branches. A row is a channel of an NCHW panel or a position of a
// channels_last one, and rows of one map are `pitch` elements apart. The branches of a few rows are taken one after
// another, so that what they share (the gradient) comes from cache after the first; y alone takes all of them at once.
// Included by kernels.inl inside the namespace of one instruction set.

#define FUSED_ATTN_INLINE __attribute__((always_inline))

// The prologue of a branch: none, an affine with ReLU or no activation, or any.
enum BranchPrologue { kNone, kAffine, kAny };

template <class A, int kKind>
struct BranchVectors {
    FUSED_ATTN_INLINE Vec<A> apply(Vec<A> x) const { return x; }
};
template <class A>
struct BranchVectors<A, kAffine> {
    Vec<A> weight, bias, floor;  // u is not below the floor; without ReLU that is NaN, and nothing is
    FUSED_ATTN_INLINE Vec<A> apply(Vec<A> x) const {
        const Vec<A> before = x * weight + bias;
        return before < floor ? floor : before;
    }
    // The gradient of x * weight + bias from u's.
    FUSED_ATTN_INLINE Vec<A> grad_before(Vec<A> d, Vec<A> x) const { return x * weight + bias <= floor ? Vec<A>{} : d; }
};
template <class A>
struct BranchVectors<A, kAny> {
    Vec<A> weight, bias;
    int activation;
    FUSED_ATTN_INLINE Vec<A> apply(Vec<A> x) const { return activate<A>(x * weight + bias, activation); }
    FUSED_ATTN_INLINE Vec<A> grad_before(Vec<A> d, Vec<A> x) const {
        return d * activate_grad<A>(x * weight + bias, activation);
    }
};

// One branch of a panel, by value: what the loops read stays in registers.
template <class T, bool kChannelsLast, int kKind>
struct BranchReader {
    using A = Accumulator<T>;
    using Vectors = BranchVectors<A, kKind>;
    const T* data;
    int64_t pitch;
    Prologue<A> prologue;
    BranchReader() = default;
    BranchReader(const Branches<T>& branches, int64_t m)
        : data(branches.data[m]), pitch(branches.pitch[m]), prologue(branches.prologue.from(m * branches.apart)) {}
    FUSED_ATTN_INLINE void set(Vectors& v, int64_t c, int64_t n) const {
        if constexpr (kKind != kNone) {
            v.weight = splat<A>(1), v.bias = Vec<A>{};
            if (kKind == kAffine || prologue.weight) {
                v.weight = channel_vector<kChannelsLast>(prologue.weight, c, n);
                v.bias = channel_vector<kChannelsLast>(prologue.bias, c, n);
            }
        }
        if constexpr (kKind == kAffine)
            v.floor = splat<A>(prologue.activation == kRelu ? A(0) : static_cast<A>(__builtin_nan("")));
        if constexpr (kKind == kAny) v.activation = prologue.activation;
    }
    FUSED_ATTN_INLINE Vec<A> load(int64_t row, int64_t i, int64_t n) const { return load_n(data + row * pitch + i, n); }
};

// Stores around the cache: whether rows of `length`, `pitch` apart from `data` on, are whole aligned vectors.
template <class T>
inline bool can_stream(const T* data, int64_t length, int64_t pitch) {
    constexpr int64_t lanes = kLanes<Accumulator<T>>;
    return VECTOR_BYTES > 16 && length % lanes == 0 && pitch % lanes == 0 &&
           reinterpret_cast<uintptr_t>(data) % (lanes * sizeof(T)) == 0;
}
template <class T>
FUSED_ATTN_INLINE inline void put(Vec<Accumulator<T>> v, T* p, int64_t n, bool streamed) {
#if VECTOR_BYTES > 16
    if (streamed) {
        T lanes[kLanes<Accumulator<T>>];
        store(v, lanes);
        if constexpr (sizeof(lanes) == 16)
            _mm_stream_si128(reinterpret_cast<__m128i*>(p), load_bytes<__m128i>(lanes));
        else if constexpr (sizeof(lanes) == 32)
            _mm256_stream_si256(reinterpret_cast<__m256i*>(p), load_bytes<__m256i>(lanes));
#if VECTOR_BYTES == 64
        else
            _mm512_stream_si512(reinterpret_cast<__m512i*>(p), load_bytes<__m512i>(lanes));
#endif
        return;
    }
#endif
    store_n(v, p, n);
}
// Before other threads read what was streamed.
inline void finish_streams() {
#if VECTOR_BYTES > 16
    _mm_sfence();
#endif
}

template <class A, int kSums>
struct BranchTerms {
    Vec<A> of[kSums > 0 ? kSums : 1];
};

// Calls visit(vectors, row, i, n) of the Branch that branch(m) returns for the vectors of every branch's panel: element
// row * pitch + i; set(vectors, c, n) comes before, where channel c begins. The kSums terms that it returns are added
// up: sums[s][m * apart + c]. An element may be visited twice, as in walk().
template <bool kChannelsLast, int kSums, class A, class Branch>
inline void walk_branches(const Panel& panel, int64_t branches, Branch branch, double* const* sums, int64_t apart) {
    using Vectors = typename decltype(branch(0))::Vectors;
    constexpr int64_t lanes = kLanes<A>;
    const int64_t channels = panel.channels, positions = panel.positions;
    if constexpr (!kChannelsLast) {
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t first = 0, last; first < positions; first = last) {
                last = positions - first < (2 * kBlock + 1) * lanes ? positions : first + 2 * kBlock * lanes;
                for (int64_t m = 0; m < branches; ++m) {
                    const auto at = branch(m);
                    Vectors v;
                    at.set(v, c, lanes);
                    Vec<A> total[4][kSums + 1] = {};
                    auto step = [&](int to, int64_t i, int64_t n, auto counted) FUSED_ATTN_INLINE {
                        const auto terms = at.visit(v, c, i, n);
                        for (int s = 0; s < kSums; ++s) total[to][s] += counted.of(terms.of[s]);
                    };
                    int64_t i = first;
                    for (; i + 4 * lanes <= last; i += 4 * lanes) {
                        step(0, i, lanes, AllLanes<A>{});
                        step(1, i + lanes, lanes, AllLanes<A>{});
                        step(2, i + 2 * lanes, lanes, AllLanes<A>{});
                        step(3, i + 3 * lanes, lanes, AllLanes<A>{});
                    }
                    for (; i + lanes <= last; i += lanes) step(0, i, lanes, AllLanes<A>{});
                    if (i < last && last - first >= lanes)  // the last vector ends with the row
                        step(1, last - lanes, lanes, SomeLanes<A>{~lanes_below<A>(lanes - (last - i))});
                    else if (i < last)
                        step(1, first, last - first, SomeLanes<A>{lanes_below<A>(last - first)});
                    for (int s = 0; s < kSums; ++s)
                        sums[s][m * apart + c] += sum_of<A>((total[0][s] + total[1][s]) + (total[2][s] + total[3][s]));
                }
            }
    } else {
        const int64_t padded = (channels + lanes - 1) / lanes * lanes, all = branches * padded;
        Buffer<A> buffer(kSums * all + 1);
        A* const totals = &buffer[0];
        for (int64_t first = 0; first < positions; first += kBlock) {
            buffer.fill(A(0));
            const int64_t last = lesser(positions, first + kBlock);
            auto rows = [&](auto count, int64_t p) {
                constexpr int kRows = decltype(count)::value;
                for (int64_t m = 0; m < branches; ++m) {
                    const auto at = branch(m);
                    A* const to = totals + m * padded;
                    auto step = [&](int64_t c, int64_t n) FUSED_ATTN_INLINE {
                        Vectors v;
                        at.set(v, c, n);
                        BranchTerms<A, kSums> terms[kRows];
                        for (int r = 0; r < kRows; ++r) terms[r] = at.visit(v, p + r, c, n);
                        for (int s = 0; s < kSums; ++s) {
                            Vec<A> total = terms[0].of[s];
                            if constexpr (kRows == 4)
                                total = (total + terms[1].of[s]) + (terms[2].of[s] + terms[3].of[s]);
                            store(load(to + s * all + c) + total, to + s * all + c);
                        }
                    };
                    int64_t c = 0;
                    for (; c + lanes <= channels; c += lanes) step(c, lanes);
                    if (c < channels) step(c, channels - c);
                }
            };
            if constexpr (kSums > 0)
                fours(first, last, rows);  // the totals are read and written once for four rows
            else
                for (int64_t p = first; p < last; ++p) rows(Count<1>{}, p);
            for (int s = 0; s < kSums; ++s)
                for (int64_t m = 0; m < branches; ++m)
                    for (int64_t c = 0; c < channels; ++c) sums[s][m * apart + c] += totals[s * all + m * padded + c];
        }
    }
}

// Calls run(layout, kind) for the panel's layout and the branches' prologue.
template <class T, class Run>
inline void by_kind(const Branches<T>& branches, const Panel& panel, Run run) {
    const Prologue<Accumulator<T>>& prologue = branches.prologue;
    const bool affine = prologue.weight && (prologue.activation == kIdentity || prologue.activation == kRelu);
    auto with = [&](auto layout) {
        if (prologue.identity())
            run(layout, Count<kNone>{});
        else if (affine)
            run(layout, Count<kAffine>{});
        else
            run(layout, Count<kAny>{});
    };
    if (panel.channels_last)
        with(Count<true>{});
    else
        with(Count<false>{});
}

template <class T, bool kLast, int kKind>
struct PoolBranch : BranchReader<T, kLast, kKind> {
    using A = Accumulator<T>;
    PoolBranch(const Branches<T>& branches, int64_t m) : BranchReader<T, kLast, kKind>(branches, m) {}
    FUSED_ATTN_INLINE BranchTerms<A, 1> visit(const BranchVectors<A, kKind>& v, int64_t row, int64_t i,
                                              int64_t n) const {
        return {{v.apply(this->load(row, i, n))}};
    }
};

template <class T>
void pool_branches(Branches<T> branches, Panel panel, double* sum) {
    by_kind(branches, panel, [&](auto layout, auto kind) {
        constexpr bool kLast = decltype(layout)::value;
        walk_branches<kLast, 1, Accumulator<T>>(
            panel, branches.count, [&](int64_t m) { return PoolBranch<T, kLast, decltype(kind)::value>(branches, m); },
            &sum, 0);
    });
}

// All branches at once; kMost: room for that many, and where it is 2 there are 2.
template <class T, bool kLast, int kKind, int kMost>
struct SumBranches {
    using A = Accumulator<T>;
    struct Vectors {
        BranchVectors<A, kKind> prologue[kMost];
        Vec<A> weight[kMost];
    };
    BranchReader<T, kLast, kKind> u[kMost];
    int64_t several, apart, pitch;
    const A* weights;
    T* y;
    bool streamed;
    SumBranches(const Branches<T>& branches, const Panel& panel, const A* weights_in, bool past_cache, T* y_in)
        : several(branches.count),
          apart(branches.apart),
          pitch(kLast ? panel.channels : panel.positions),
          weights(weights_in),
          y(y_in),
          streamed(past_cache && can_stream(y, pitch, pitch)) {
        for (int64_t m = 0; m < count(); ++m) u[m] = BranchReader<T, kLast, kKind>(branches, m);
    }
    FUSED_ATTN_INLINE int64_t count() const { return kMost == 2 ? 2 : several; }
    FUSED_ATTN_INLINE void set(Vectors& v, int64_t c, int64_t n) const {
        for (int64_t m = 0; m == 0 || m < count(); ++m) {
            u[m].set(v.prologue[m], c, n);
            v.weight[m] = channel_vector<kLast>(weights + m * apart, c, n);
        }
    }
    FUSED_ATTN_INLINE BranchTerms<A, 0> visit(const Vectors& v, int64_t row, int64_t i, int64_t n) const {
        Vec<A> out = v.prologue[0].apply(u[0].load(row, i, n)) * v.weight[0];
        for (int64_t m = 1; m < count(); ++m) out += v.prologue[m].apply(u[m].load(row, i, n)) * v.weight[m];
        put(out, y + row * pitch + i, n, streamed);
        return {};
    }
};

template <class T>
void sum_branches(Branches<T> branches, Panel panel, const Accumulator<T>* weights, bool past_cache, T* y) {
    by_kind(branches, panel, [&](auto layout, auto kind) {
        constexpr bool kLast = decltype(layout)::value;
        constexpr int kKind = decltype(kind)::value;
        auto run = [&](auto most) {
            walk_branches<kLast, 0, Accumulator<T>>(
                panel, 1,
                [&](int64_t) {
                    return SumBranches<T, kLast, kKind, decltype(most)::value>(branches, panel, weights, past_cache, y);
                },
                nullptr, 0);
        };
        if constexpr (kKind != kAny)
            if (branches.count == 2) return run(Count<2>{});
        run(Count<kMostBranches>{});
    });
    if (past_cache) finish_streams();
}

template <class T, bool kLast, int kKind>
struct DotBranch : BranchReader<T, kLast, kKind> {
    using A = Accumulator<T>;
    const T* grad;
    int64_t grad_pitch;
    DotBranch(const Branches<T>& branches, int64_t m, const T* grad_in, const Panel& panel)
        : BranchReader<T, kLast, kKind>(branches, m),
          grad(grad_in),
          grad_pitch(kLast ? panel.channels : panel.positions) {}
    FUSED_ATTN_INLINE BranchTerms<A, 1> visit(const BranchVectors<A, kKind>& v, int64_t row, int64_t i,
                                              int64_t n) const {
        return {{load_n(grad + row * grad_pitch + i, n) * v.apply(this->load(row, i, n))}};
    }
};

template <class T>
void dot_branches(const T* grad, Branches<T> branches, Panel panel, double* dot) {
    by_kind(branches, panel, [&](auto layout, auto kind) {
        constexpr bool kLast = decltype(layout)::value;
        walk_branches<kLast, 1, Accumulator<T>>(
            panel, branches.count,
            [&](int64_t m) { return DotBranch<T, kLast, decltype(kind)::value>(branches, m, grad, panel); }, &dot,
            branches.apart);
    });
}

// kSums: 2 with the gradients of an affine, else 0.
template <class T, bool kLast, int kKind, int kSums>
struct SpreadBranch {
    using A = Accumulator<T>;
    struct Vectors {
        BranchVectors<A, kKind> prologue;
        Vec<A> weight, mean;
    };
    BranchReader<T, kLast, kKind> u;
    const T* grad;
    const A *weight, *mean;
    T* out;
    int64_t grad_pitch, out_pitch;
    bool streamed;
    FUSED_ATTN_INLINE void set(Vectors& v, int64_t c, int64_t n) const {
        u.set(v.prologue, c, n);
        v.weight = channel_vector<kLast>(weight, c, n);
        v.mean = channel_vector<kLast>(mean, c, n);
    }
    FUSED_ATTN_INLINE BranchTerms<A, kSums> visit(const Vectors& v, int64_t row, int64_t i, int64_t n) const {
        Vec<A> d = load_n(grad + row * grad_pitch + i, n) * v.weight + v.mean;
        BranchTerms<A, kSums> terms{};
        if constexpr (kKind != kNone) {
            const Vec<A> x = u.load(row, i, n);
            d = v.prologue.grad_before(d, x);
            if constexpr (kSums == 2) terms.of[0] = d, terms.of[1] = d * x;
            d *= v.prologue.weight;
        }
        put(d, out + row * out_pitch + i, n, streamed);
        return terms;
    }
};

template <class T>
void spread_branches(const T* grad, Branches<T> branches, Panel panel, const Accumulator<T>* weights,
                     const Accumulator<T>* mean, bool past_cache, BranchOutputs<T> grads, double* grad_weight,
                     double* grad_bias) {
    double* const sums[2] = {grad_bias, grad_weight};
    by_kind(branches, panel, [&](auto layout, auto kind) {
        constexpr bool kLast = decltype(layout)::value;
        constexpr int kKind = decltype(kind)::value;
        auto run = [&](auto count) {
            constexpr int kSums = decltype(count)::value;
            walk_branches<kLast, kSums, Accumulator<T>>(
                panel, branches.count,
                [&](int64_t m) {
                    const int64_t pitch = kLast ? panel.channels : panel.positions;
                    const bool streamed = past_cache && can_stream(grads.data[m], pitch, grads.pitch[m]);
                    return SpreadBranch<T, kLast, kKind, kSums>{
                        {branches, m},  grad,    weights + m * branches.apart, mean, grads.data[m], pitch,
                        grads.pitch[m], streamed};
                },
                sums, branches.apart);
        };
        if constexpr (kKind == kAny)
            if (!grad_weight) return run(Count<0>{});
        run(Count<kKind == kNone ? 0 : 2>{});
    });
    if (past_cache) finish_streams();
}

#undef FUSED_ATTN_INLINE

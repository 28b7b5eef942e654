// The kernels of kernels.h for a selection of branches. A row is a channel of an NCHW panel or a position of a
// channels_last one, and rows of one map are `pitch` elements apart. The branches of a few rows are taken one after
// another, so that what they share (the gradient) comes from cache after the first; y alone takes all of them at once.
// Included by kernels.inl inside the namespace of one instruction set.

template <class A, int kSums>
struct BranchTerms {
    Vec<A> of[kSums > 0 ? kSums : 1];
};

// Calls body(make(m, c, n), row, i, n) for the vectors of every branch's panel, which begin at row * pitch + i. The
// kSums terms that it returns are added up: sums[s][m * apart + c]. An element may be visited twice, as in walk().
template <bool kChannelsLast, int kSums, class A, class Make, class Body>
inline void walk_branches(const Panel& panel, int64_t branches, Make make, Body body, double* const* sums,
                          int64_t apart) {
    constexpr int64_t lanes = kLanes<A>;
    const int64_t channels = panel.channels, positions = panel.positions;
    if constexpr (!kChannelsLast) {
        for (int64_t c = 0; c < channels; ++c)
            for (int64_t first = 0, last; first < positions; first = last) {
                last = positions - first < (4 * kBlock + 1) * lanes ? positions : first + 4 * kBlock * lanes;
                for (int64_t m = 0; m < branches; ++m) {
                    const auto at = make(m, c, lanes);
                    BranchTerms<A, kSums> total[4] = {};
                    auto step = [&](int to, int64_t i, int64_t n, auto counted) {
                        const auto terms = body(at, c, i, n);
                        for (int s = 0; s < kSums; ++s) total[to].of[s] += counted.of(terms.of[s]);
                    };
                    int64_t i = first;
                    for (; i + 4 * lanes <= last; i += 4 * lanes) {
                        step(0, i, lanes, AllLanes<A>{});
                        step(1, i + lanes, lanes, AllLanes<A>{});
                        step(2, i + 2 * lanes, lanes, AllLanes<A>{});
                        step(3, i + 3 * lanes, lanes, AllLanes<A>{});
                    }
                    for (; i + lanes <= last; i += lanes) step(0, i, lanes, AllLanes<A>{});
                    if (i < last) {  // the last vector ends with the row
                        const bool overlaps = last - first >= lanes;
                        step(1, overlaps ? last - lanes : first, lesser(lanes, last - first),
                             SomeLanes<A>{overlaps ? ~lanes_below<A>(lanes - (last - i)) : lanes_below<A>(last - i)});
                    }
                    for (int s = 0; s < kSums; ++s)
                        sums[s][m * apart + c] +=
                            sum_of<A>((total[0].of[s] + total[1].of[s]) + (total[2].of[s] + total[3].of[s]));
                }
            }
    } else {
        const int64_t padded = (channels + lanes - 1) / lanes * lanes, row = branches * padded;
        Buffer<A> totals(kSums * row + 1);
        auto step = [&](auto count, int64_t p, int64_t m, int64_t c, int64_t n) {
            constexpr int kRows = decltype(count)::value;
            const auto at = make(m, c, n);
            BranchTerms<A, kSums> terms[kRows];
            for (int r = 0; r < kRows; ++r) terms[r] = body(at, p + r, c, n);
            for (int s = 0; s < kSums; ++s) {
                A* to = &totals[s * row + m * padded + c];
                Vec<A> total = terms[0].of[s];
                if constexpr (kRows == 4) total = (total + terms[1].of[s]) + (terms[2].of[s] + terms[3].of[s]);
                store(load(to) + total, to);
            }
        };
        for (int64_t first = 0; first < positions; first += kBlock) {
            totals.fill(A(0));
            fours(first, lesser(positions, first + kBlock), [&](auto count, int64_t p) {
                for (int64_t m = 0; m < branches; ++m) {
                    int64_t c = 0;
                    for (; c + lanes <= channels; c += lanes) step(count, p, m, c, lanes);
                    if (c < channels) step(count, p, m, c, channels - c);
                }
            });
            for (int s = 0; s < kSums; ++s)
                for (int64_t m = 0; m < branches; ++m)
                    for (int64_t c = 0; c < channels; ++c) sums[s][m * apart + c] += totals[s * row + m * padded + c];
        }
    }
}

// A branch at some channels.
template <class T, bool kPlain>
struct BranchVector {
    using A = Accumulator<T>;
    const T* data;
    int64_t pitch;
    PrologueVector<A, kPlain> prologue;
    template <bool kChannelsLast>
    static BranchVector at(const Branches<T>& branches, int64_t m, int64_t c, int64_t n) {
        return {
            branches.data[m], branches.pitch[m],
            PrologueVector<A, kPlain>::template at<kChannelsLast>(branches.prologue.from(m * branches.apart), c, n)};
    }
    Vec<A> raw(int64_t row, int64_t i, int64_t n) const { return load_n(data + row * pitch + i, n); }
    Vec<A> operator()(int64_t row, int64_t i, int64_t n) const { return prologue(raw(row, i, n)); }
};

template <class T, bool kChannelsLast, bool kPlain>
void pool_branches_in(const Branches<T>& branches, const Panel& panel, double* sum) {
    using A = Accumulator<T>;
    walk_branches<kChannelsLast, 1, A>(
        panel, branches.count,
        [&](int64_t m, int64_t c, int64_t n) {
            return BranchVector<T, kPlain>::template at<kChannelsLast>(branches, m, c, n);
        },
        [](const BranchVector<T, kPlain>& u, int64_t row, int64_t i, int64_t n) {
            return BranchTerms<A, 1>{{u(row, i, n)}};
        },
        &sum, 0);
}

template <class T>
void pool_branches(Branches<T> branches, Panel panel, double* sum) {
    const bool plain = branches.prologue.identity();
    auto run = panel.channels_last ? (plain ? pool_branches_in<T, true, true> : pool_branches_in<T, true, false>)
                                   : (plain ? pool_branches_in<T, false, true> : pool_branches_in<T, false, false>);
    run(branches, panel, sum);
}

// kMost: room for that many branches; of 2 there are 2.
template <class T, bool kChannelsLast, bool kPlain, int kMost>
void sum_branches_in(const Branches<T>& branches, const Panel& panel, const Accumulator<T>* weights, T* y) {
    using A = Accumulator<T>;
    struct All {
        BranchVector<T, kPlain> u[kMost];
        Vec<A> weight[kMost];
    };
    const int64_t count = kMost == 2 ? 2 : branches.count;
    const int64_t pitch = kChannelsLast ? panel.channels : panel.positions;
    walk_branches<kChannelsLast, 0, A>(
        panel, 1,
        [&](int64_t, int64_t c, int64_t n) {
            All all;
            for (int64_t m = 0; m < count; ++m) {
                all.u[m] = BranchVector<T, kPlain>::template at<kChannelsLast>(branches, m, c, n);
                all.weight[m] = channel_vector<kChannelsLast>(weights + m * branches.apart, c, n);
            }
            return all;
        },
        [=](const All& all, int64_t row, int64_t i, int64_t n) {
            Vec<A> out = all.u[0](row, i, n) * all.weight[0];
            for (int64_t m = 1; m < count; ++m) out += all.u[m](row, i, n) * all.weight[m];
            store_n(out, y + row * pitch + i, n);
            return BranchTerms<A, 0>{};
        },
        nullptr, 0);
}

template <class T, int kMost>
void sum_most(const Branches<T>& branches, const Panel& panel, const Accumulator<T>* weights, T* y) {
    const bool plain = branches.prologue.identity();
    auto run = panel.channels_last
                   ? (plain ? sum_branches_in<T, true, true, kMost> : sum_branches_in<T, true, false, kMost>)
                   : (plain ? sum_branches_in<T, false, true, kMost> : sum_branches_in<T, false, false, kMost>);
    run(branches, panel, weights, y);
}
template <class T>
void sum_branches(Branches<T> branches, Panel panel, const Accumulator<T>* weights, T* y) {
    (branches.count == 2 ? sum_most<T, 2> : sum_most<T, kMostBranches>)(branches, panel, weights, y);
}

template <class T, bool kChannelsLast, bool kPlain>
void dot_branches_in(const T* grad, const Branches<T>& branches, const Panel& panel, double* dot) {
    using A = Accumulator<T>;
    const int64_t pitch = kChannelsLast ? panel.channels : panel.positions;
    walk_branches<kChannelsLast, 1, A>(
        panel, branches.count,
        [&](int64_t m, int64_t c, int64_t n) {
            return BranchVector<T, kPlain>::template at<kChannelsLast>(branches, m, c, n);
        },
        [=](const BranchVector<T, kPlain>& u, int64_t row, int64_t i, int64_t n) {
            return BranchTerms<A, 1>{{load_n(grad + row * pitch + i, n) * u(row, i, n)}};
        },
        &dot, branches.apart);
}

template <class T>
void dot_branches(const T* grad, Branches<T> branches, Panel panel, double* dot) {
    const bool plain = branches.prologue.identity();
    auto run = panel.channels_last ? (plain ? dot_branches_in<T, true, true> : dot_branches_in<T, true, false>)
                                   : (plain ? dot_branches_in<T, false, true> : dot_branches_in<T, false, false>);
    run(grad, branches, panel, dot);
}

template <class T, bool kPlain>
struct BranchGradVector {
    BranchVector<T, kPlain> u;
    Vec<Accumulator<T>> weight, mean;
    T* out;
    int64_t pitch;
};

// kSums: 2 with the gradients of an affine, else 0.
template <class T, bool kChannelsLast, bool kPlain, int kSums>
void spread_branches_in(const T* grad, const Branches<T>& branches, const Panel& panel, const Accumulator<T>* weights,
                        const Accumulator<T>* mean, const BranchOutputs<T>& grads, double* grad_weight,
                        double* grad_bias) {
    using A = Accumulator<T>;
    double* const sums[2] = {grad_bias, grad_weight};
    const int64_t pitch = kChannelsLast ? panel.channels : panel.positions;
    walk_branches<kChannelsLast, kSums, A>(
        panel, branches.count,
        [&](int64_t m, int64_t c, int64_t n) {
            return BranchGradVector<T, kPlain>{BranchVector<T, kPlain>::template at<kChannelsLast>(branches, m, c, n),
                                               channel_vector<kChannelsLast>(weights + m * branches.apart, c, n),
                                               channel_vector<kChannelsLast>(mean, c, n), grads.data[m],
                                               grads.pitch[m]};
        },
        [=](const BranchGradVector<T, kPlain>& v, int64_t row, int64_t i, int64_t n) {
            Vec<A> d = load_n(grad + row * pitch + i, n) * v.weight + v.mean;
            BranchTerms<A, kSums> terms{};
            if constexpr (!kPlain) {
                const Vec<A> x = v.u.raw(row, i, n);
                if (v.u.prologue.activation != kIdentity)
                    d *= activate_grad<A>(v.u.prologue.before(x), v.u.prologue.activation);
                if constexpr (kSums == 2) terms.of[0] = d, terms.of[1] = d * x;
                d *= v.u.prologue.weight;
            }
            store_n(d, v.out + row * v.pitch + i, n);
            return terms;
        },
        sums, branches.apart);
}

template <class T>
void spread_branches(const T* grad, Branches<T> branches, Panel panel, const Accumulator<T>* weights,
                     const Accumulator<T>* mean, BranchOutputs<T> grads, double* grad_weight, double* grad_bias) {
    const bool plain = branches.prologue.identity();
    auto run = panel.channels_last ? (plain         ? spread_branches_in<T, true, true, 0>
                                      : grad_weight ? spread_branches_in<T, true, false, 2>
                                                    : spread_branches_in<T, true, false, 0>)
                                   : (plain         ? spread_branches_in<T, false, true, 0>
                                      : grad_weight ? spread_branches_in<T, false, false, 2>
                                                    : spread_branches_in<T, false, false, 0>);
    run(grad, branches, panel, weights, mean, grads, grad_weight, grad_bias);
}

// The products of attention between positions, and what stands between them. Included by kernels.inl.
//
// A matrix lies in panels: of every panel_width<A> columns the rows one after another, so that one step of a product
// loads two vectors and multiplies them with one number of each of kRowsATile rows.

template <class A>
constexpr int64_t kPanel = 2 * kLanes<A>;
constexpr int kRowsATile = 6;

template <class A, int kRows>
inline void product_tile(const Product<A>& p, const A* a, const A* b, A* c, const Vec<A>* factor) {
    constexpr int64_t lanes = kLanes<A>;
    Vec<A> sum[kRows][2] = {};
    if (p.adds)
        for (int i = 0; i < kRows; ++i)
            for (int j = 0; j < 2; ++j) sum[i][j] = load(c + i * kPanel<A> + j * lanes) * factor[j];
    for (int64_t k = 0; k < p.steps; ++k) {
        const Vec<A> first = load(b), second = load(b + lanes);
        for (int i = 0; i < kRows; ++i) {
            const Vec<A> x = splat(a[i * p.row]);
            sum[i][0] += x * first;
            sum[i][1] += x * second;
        }
        a += p.step;
        b += kPanel<A>;
    }
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < 2; ++j) store(sum[i][j], c + i * kPanel<A> + j * lanes);
}

// Rows outside, so that those of a stay in cache for all panels of b.
template <class A>
void product(const Product<A>& p) {
    for (int64_t r = 0; r < p.rows; r += kRowsATile) {
        const int64_t rows = lesser(kRowsATile, p.rows - r);
        auto tile = rows == 6   ? product_tile<A, 6>
                    : rows == 5 ? product_tile<A, 5>
                    : rows == 4 ? product_tile<A, 4>
                    : rows == 3 ? product_tile<A, 3>
                    : rows == 2 ? product_tile<A, 2>
                                : product_tile<A, 1>;
        for (int64_t panel = 0; panel < p.panels; ++panel) {
            Vec<A> factor[2] = {splat<A>(1), splat<A>(1)};
            if (p.factors)
                for (int j = 0; j < 2; ++j) factor[j] = load(p.factors + panel * kPanel<A> + j * kLanes<A>);
            tile(p, p.a + r * p.row, p.b + panel * p.b_panel, p.c + panel * p.c_panel + r * kPanel<A>, factor);
        }
    }
}

// Of numbers that stand `lane` apart along a panel's columns and `step` apart along its rows; lanes past the last are
// zero, and so are the panel's whole columns there.
template <class T>
void pack_panels(const T* from, int64_t lane, int64_t step, int64_t lanes, int64_t steps, Accumulator<T> factor,
                 Accumulator<T>* out) {
    using A = Accumulator<T>;
    constexpr int64_t width = kPanel<A>, vector = kLanes<A>;
    for (int64_t first = 0; first < lanes; first += width, out += width * steps) {
        const int64_t n = lesser(width, lanes - first);
        const T* at = from + first * lane;
        if (lane == 1) {
            for (int64_t k = 0; k < steps; ++k)
                for (int64_t j = 0; j < width; j += vector) {
                    const int64_t here = n - j;
                    const Vec<A> v = here >= vector ? load(at + k * step + j)
                                     : here > 0     ? load_tail(at + k * step + j, here)
                                                    : Vec<A>{};
                    store(v * factor, out + k * width + j);
                }
            continue;
        }
        for (int64_t i = 0; i < width; ++i)
            for (int64_t k = 0; k < steps; ++k)
                out[k * width + i] = i < n ? static_cast<A>(at[i * lane + k * step]) * factor : A(0);
    }
}

// rows of `length` numbers in a row into rows `pitch` apart.
template <class T>
void copy_rows(const T* from, int64_t stride, int64_t rows, int64_t length, Accumulator<T>* out, int64_t pitch) {
    using A = Accumulator<T>;
    for (int64_t r = 0; r < rows; ++r, from += stride, out += pitch)
        vectors<A>(0, length, [&](int64_t i, int64_t n, auto) { store_n(load_n(from + i, n), out + i, n); });
}

// One key block's scores of a panel of queries, (keys, width), into exp(score - peak), where peak, sum and the factor
// that what was summed before is multiplied by are kept per query.
template <class A>
void soften(A* scores, int64_t keys, A* peak, A* sum, A* factor) {
    for (int64_t j = 0; j < kPanel<A>; j += kLanes<A>) {
        const Vec<A> before = load(peak + j);
        Vec<A> most = before;
        for (int64_t k = 0; k < keys; ++k) {
            const Vec<A> s = load(scores + k * kPanel<A> + j);
            most = s > most ? s : most;
        }
        // Of scores that are all minus infinity, or of one that is infinite, the difference is NaN, as in softmax.
        const Vec<A> kept = exp(before - most);
        Vec<A> total = load(sum + j) * kept;
        for (int64_t k = 0; k < keys; ++k) {
            A* at = scores + k * kPanel<A> + j;
            const Vec<A> p = exp(load(at) - most);
            total += p;
            store(p, at);
        }
        store(most, peak + j);
        store(total, sum + j);
        store(kept, factor + j);
    }
}

// A panel of keys, (queries, width): scores into exp(score - peak of the query) * inverse. (Less the logarithm of the
// sum they would not add up to 1: that is rounded to its own size.)
template <class A>
void probabilities(A* scores, int64_t queries, const A* peak, const A* inverse) {
    for (int64_t q = 0; q < queries; ++q)
        for (int64_t j = 0; j < kPanel<A>; j += kLanes<A>) {
            A* at = scores + q * kPanel<A> + j;
            store(exp(load(at) - splat(peak[q])) * splat(inverse[q]), at);
        }
}

// The same panel's gradients of the probabilities into those of the scores: p (g - dot of the query).
template <class A>
void score_gradients(A* gradients, const A* p, int64_t queries, const A* dot) {
    for (int64_t q = 0; q < queries; ++q)
        for (int64_t j = 0; j < kPanel<A>; j += kLanes<A>) {
            A* at = gradients + q * kPanel<A> + j;
            store(load(p + q * kPanel<A> + j) * (load(at) - splat(dot[q])), at);
        }
}

// A panel times a number a lane, its rows `row` apart and its lanes `lane` apart in memory; the first `lanes` of them.
template <class T>
void write_panel(const Accumulator<T>* panel, const Accumulator<T>* factors, int64_t rows, int64_t lanes, T* out,
                 int64_t row, int64_t lane) {
    using A = Accumulator<T>;
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t j = 0; j < lanes; j += kLanes<A>) {
            const int64_t n = lesser(kLanes<A>, lanes - j);
            const Vec<A> v = load(panel + r * kPanel<A> + j) * load(factors + j);
            if (lane == 1) {
                store_n(v, out + r * row + j, n);
            } else {
                T numbers[kLanes<A>];
                store_n(v, numbers, kLanes<A>);
                for (int64_t i = 0; i < n; ++i) out[r * row + (j + i) * lane] = numbers[i];
            }
        }
}

template <class T>
constexpr AttentionKernels<T> kAttentionKernels{kPanel<Accumulator<T>>,
                                                product<Accumulator<T>>,
                                                pack_panels<T>,
                                                copy_rows<T>,
                                                soften<Accumulator<T>>,
                                                probabilities<Accumulator<T>>,
                                                score_gradients<Accumulator<T>>,
                                                write_panel<T>};

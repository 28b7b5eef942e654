// The products of attention between positions, and what stands between them. Included by kernels.inl.
//
// A product's step multiplies terms: a number of the accumulator's type, or in the same bytes two of bfloat16, one
// after another along the sum, which the processor multiplies and adds at once. A matrix lies in panels: of every
// kPanel<A> columns the rows one after another, so that one step loads a few vectors and multiplies them with one term
// of each of kRowsATile rows.

constexpr int64_t kVectorsAPanel = VECTOR_BYTES == 64 ? 4 : 2;  // of 32 registers, or 16
constexpr int kRowsATile = 6;
template <class A>
constexpr int64_t kPanel = kVectorsAPanel * kLanes<A>;

template <class A, int kNumbers>
struct Term {
    static Vec<A> all(const A* one) { return splat(*one); }
    static Vec<A> joined(const Vec<A>* numbers) { return numbers[0]; }
    static void part(Vec<A> terms, Vec<A>* numbers) { numbers[0] = terms; }
    static void add(Vec<A>& sum, Vec<A> a, Vec<A> b) { sum += a * b; }
};
#if defined(PAIRS_OF_BFLOAT16)
template <>
struct Term<float, 2> {
    static Vec<float> all(const float* one) {
        return (Vec<float>)(VectorOf<float>::bits{} + load_bytes<uint32_t>(one));
    }
    static Vec<float> joined(const Vec<float>* numbers) {  // rounds them
        const auto halves = _mm512_cvtne2ps_pbh((__m512)numbers[1], (__m512)numbers[0]);
        const __m512i ways = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22,
                                              6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
        return (Vec<float>)_mm512_permutexvar_epi16(ways, (__m512i)halves);
    }
    static void part(Vec<float> terms, Vec<float>* numbers) {
        using Bits = VectorOf<float>::bits;
        numbers[0] = (Vec<float>)((Bits)terms << 16);
        numbers[1] = (Vec<float>)((Bits)terms & 0xffff0000u);
    }
    static void add(Vec<float>& sum, Vec<float> a, Vec<float> b) {
        sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
    }
};
#endif

template <class A, int kNumbers, int kRows>
inline void product_tile(const Product<A>& p, const A* a, const A* b, A* c, const Vec<A>* factor) {
    constexpr int64_t lanes = kLanes<A>;
    Vec<A> sum[kRows][kVectorsAPanel] = {};
    if (p.adds)
        for (int i = 0; i < kRows; ++i)
            for (int j = 0; j < kVectorsAPanel; ++j) sum[i][j] = load(c + i * kPanel<A> + j * lanes) * factor[j];
    for (int64_t k = 0; k < p.steps; ++k) {
        Vec<A> terms[kVectorsAPanel];
        for (int j = 0; j < kVectorsAPanel; ++j) terms[j] = load(b + j * lanes);
        for (int i = 0; i < kRows; ++i) {
            const Vec<A> x = Term<A, kNumbers>::all(a + i * p.row);
            for (int j = 0; j < kVectorsAPanel; ++j) Term<A, kNumbers>::add(sum[i][j], x, terms[j]);
        }
        a += p.step;
        b += kPanel<A>;
    }
    const Vec<A> scale = splat(p.scale);
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectorsAPanel; ++j) store(sum[i][j] * scale, c + i * kPanel<A> + j * lanes);
}
template <class A, int kNumbers, int kRows = kRowsATile>
inline auto tile_of(int64_t rows) {
    if constexpr (kRows == 1)
        return product_tile<A, kNumbers, 1>;
    else
        return rows == kRows ? product_tile<A, kNumbers, kRows> : tile_of<A, kNumbers, kRows - 1>(rows);
}

// Rows outside, so that those of a stay in cache for all panels of b.
template <class A, int kNumbers>
void product(const Product<A>& p) {
    for (int64_t r = 0; r < p.rows; r += kRowsATile) {
        const auto tile = tile_of<A, kNumbers>(lesser(kRowsATile, p.rows - r));
        for (int64_t panel = 0; panel < p.panels; ++panel) {
            Vec<A> factor[kVectorsAPanel];
            for (int j = 0; j < kVectorsAPanel; ++j)
                factor[j] = p.factors ? load(p.factors + panel * kPanel<A> + j * kLanes<A>) : splat<A>(1);
            tile(p, p.a + r * p.row, p.b + panel * p.b_panel, p.c + panel * p.c_panel + r * kPanel<A>, factor);
        }
    }
}

// Of numbers that stand `lane` apart along a panel's columns and `step` apart along its rows; lanes past the last are
// zero, and so are the panel's whole columns there.
template <class T, int kNumbers>
void pack_panels(const T* from, int64_t lane, int64_t step, int64_t lanes, int64_t steps, Accumulator<T>* out) {
    using A = Accumulator<T>;
    constexpr int64_t width = kPanel<A>, vector = kLanes<A>;
    const int64_t terms = (steps + kNumbers - 1) / kNumbers;
    for (int64_t first = 0; first < lanes; first += width, out += width * terms) {
        const int64_t n = lesser(width, lanes - first);
        const T* at = from + first * lane;
        if (lane == 1) {
            for (int64_t t = 0; t < terms; ++t)
                for (int64_t j = 0; j < width; j += vector) {
                    const int64_t here = lesser(vector, n - j);
                    Vec<A> numbers[kNumbers] = {};
                    for (int64_t k = t * kNumbers, i = 0; here > 0 && i < kNumbers && k + i < steps; ++i)
                        numbers[i] = load_n(at + (k + i) * step + j, here);
                    store(Term<A, kNumbers>::joined(numbers), out + t * width + j);
                }
            continue;
        }
        for (int64_t i = 0; i < width; ++i)
            for (int64_t t = 0; t < terms; ++t) {
                if constexpr (kNumbers == 1) {
                    out[t * width + i] = i < n ? static_cast<A>(at[i * lane + t * step]) : A(0);
                } else {
                    T numbers[kNumbers] = {};
                    for (int64_t k = t * kNumbers, j = 0; i < n && j < kNumbers && k + j < steps; ++j)
                        numbers[j] = at[i * lane + (k + j) * step];
                    std::memcpy(&out[t * width + i], numbers, sizeof(A));
                }
            }
    }
}

// rows of `length` numbers in a row, `stride` apart, into rows of another type, `pitch` apart.
template <class From, class To>
void copy_rows(const From* from, int64_t stride, int64_t rows, int64_t length, To* out, int64_t pitch) {
    using A = Accumulator<To>;
    for (int64_t r = 0; r < rows; ++r, from += stride, out += pitch)
        vectors<A>(0, length, [&](int64_t i, int64_t n, auto) { store_n(load_n(from + i, n), out + i, n); });
}

// The terms of `rows` rows of numbers, `length` in a row and `stride` apart, into rows `pitch` apart: of numbers next
// to each other, or, `across`, of those below each other. What is missing from the last terms is zero.
template <class T, int kNumbers>
void read_terms(const T* from, int64_t stride, int64_t rows, int64_t length, bool across, Accumulator<T>* out,
                int64_t pitch) {
    using A = Accumulator<T>;
    if constexpr (kNumbers == 1) {
        copy_rows(from, stride, rows, length, out, pitch);
    } else if (across) {
        for (int64_t r = 0; r < rows; r += kNumbers, from += kNumbers * stride, out += pitch)
            vectors<A>(0, length, [&](int64_t i, int64_t n, auto) {
                Vec<A> numbers[kNumbers] = {};
                for (int64_t k = 0; k < lesser(kNumbers, rows - r); ++k) numbers[k] = load_n(from + k * stride + i, n);
                store_n(Term<A, kNumbers>::joined(numbers), out + i, n);
            });
    } else {
        for (int64_t r = 0; r < rows; ++r, from += stride, out += pitch) {
            out[length / kNumbers] = 0;
            std::memcpy(out, from, length * sizeof(T));
        }
    }
}

// One key block's scores of a panel of queries, (keys, width), into exp(score - peak), where peak, sum and the factor
// that what was summed before is multiplied by are kept per query. The sum is of the probabilities as they are in
// terms.
template <class A, int kNumbers>
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
        A* terms = scores + j;
        for (int64_t k = 0; k < keys; k += kNumbers, terms += kPanel<A>) {
            Vec<A> p[kNumbers] = {};
            for (int64_t i = 0; i < kNumbers && k + i < keys; ++i)
                p[i] = exp(load(scores + (k + i) * kPanel<A> + j) - most);
            const Vec<A> joined = Term<A, kNumbers>::joined(p);
            store(joined, terms);
            Term<A, kNumbers>::part(joined, p);
            for (const Vec<A>& one : p) total += one;
        }
        store(most, peak + j);
        store(total, sum + j);
        store(kept, factor + j);
    }
}

// A panel of keys, (queries, width): scores into exp(score - peak of the query) * inverse. (Less the logarithm of the
// sum they would not add up to 1: that is rounded to its own size.)
template <class A, int kNumbers>
void probabilities(A* scores, int64_t queries, const A* peak, const A* inverse) {
    A* terms = scores;
    for (int64_t q = 0; q < queries; q += kNumbers, terms += kPanel<A>)
        for (int64_t j = 0; j < kPanel<A>; j += kLanes<A>) {
            Vec<A> p[kNumbers] = {};
            for (int64_t i = 0; i < kNumbers && q + i < queries; ++i)
                p[i] = exp(load(scores + (q + i) * kPanel<A> + j) - splat(peak[q + i])) * splat(inverse[q + i]);
            store(Term<A, kNumbers>::joined(p), terms + j);
        }
}

// The same panel's gradients of the probabilities into those of the scores: p (g - dot of the query).
template <class A, int kNumbers>
void score_gradients(A* gradients, const A* p, int64_t queries, const A* dot) {
    A* terms = gradients;
    for (int64_t q = 0; q < queries; q += kNumbers, terms += kPanel<A>, p += kPanel<A>)
        for (int64_t j = 0; j < kPanel<A>; j += kLanes<A>) {
            Vec<A> slopes[kNumbers];
            Term<A, kNumbers>::part(load(p + j), slopes);
            for (int64_t i = 0; i < kNumbers; ++i)
                slopes[i] = q + i < queries
                                ? slopes[i] * (load(gradients + (q + i) * kPanel<A> + j) - splat(dot[q + i]))
                                : Vec<A>{};
            store(Term<A, kNumbers>::joined(slopes), terms + j);
        }
}

// A panel's terms along its columns, of terms along its rows: zero past the lanes. `room` is where they are put, if not
// in their place already.
template <class A, int kNumbers>
const A* turn_terms(const A* panel, int64_t rows, int64_t lanes, A* room) {
    if constexpr (kNumbers == 1) {
        return panel;
    } else {
        constexpr int64_t width = kPanel<A>, vector = kLanes<A>;
        for (int64_t r = 0; r < rows; r += kNumbers, panel += width)
            for (int64_t j = 0; j < width; j += vector) {
                Vec<A> numbers[kNumbers];
                Term<A, kNumbers>::part(load(panel + j), numbers);
                for (int64_t i = 0; i < kNumbers && r + i < rows; ++i) {
                    BFloat16 row[vector];
                    store(lanes_below<A>(lanes - j) ? numbers[i] : Vec<A>{}, row);
                    std::memcpy(room + ((r + i) * width + j) / kNumbers, row, sizeof(row));
                }
            }
        return room;
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

template <class T, int kNumbers = 1>
constexpr AttentionKernels<T> kAttentionKernels{kPanel<Accumulator<T>>,
                                                kNumbers,
                                                product<Accumulator<T>, kNumbers>,
                                                pack_panels<T, kNumbers>,
                                                copy_rows<T, Accumulator<T>>,
                                                read_terms<T, kNumbers>,
                                                soften<Accumulator<T>, kNumbers>,
                                                probabilities<Accumulator<T>, kNumbers>,
                                                score_gradients<Accumulator<T>, kNumbers>,
                                                turn_terms<Accumulator<T>, kNumbers>,
                                                write_panel<T>};

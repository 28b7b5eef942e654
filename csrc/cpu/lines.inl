// Products with rows of channels, as a channels_last map has them a position: for attention along the lines of a map.
// Included by kernels.inl.

// The rows of b have as many numbers as a vector behind them.
template <class A, int kRows, int kVectors>
inline void row_tile(const RowProduct<A>& p, const A* a, const A* b, A* c, const A* factors, int64_t last) {
    constexpr int64_t lanes = kLanes<A>;
    const auto numbers = [&](int j) { return j + 1 < kVectors ? lanes : last; };
    Vec<A> sum[kRows][kVectors] = {};
    if (p.adds)
        for (int i = 0; i < kRows; ++i) {
            const Vec<A> factor = splat<A>(factors ? factors[i] : 1);
            for (int j = 0; j < kVectors; ++j) sum[i][j] = load_n(c + i * p.c_row + j * lanes, numbers(j)) * factor;
        }
    for (int64_t k = 0; k < p.steps; ++k) {
        Vec<A> row[kVectors];
        for (int j = 0; j < kVectors; ++j) row[j] = load(b + j * lanes);
        for (int i = 0; i < kRows; ++i) {
            const Vec<A> x = splat(a[i * p.row]);
            for (int j = 0; j < kVectors; ++j) sum[i][j] += x * row[j];
        }
        a += p.step;
        b += p.b_row;
    }
    for (int i = 0; i < kRows; ++i)
        for (int j = 0; j < kVectors; ++j) store_n(sum[i][j], c + i * p.c_row + j * lanes, numbers(j));
}

// Columns outside, so that those of b stay in the first cache for all rows. Rows of c may be pages apart, where the
// processor itself fetches nothing ahead.
template <class A, int kVectors>
void row_tiles(const RowProduct<A>& p, int64_t column, int64_t last) {
    constexpr int64_t width = kPanel<A>;
    for (int64_t r = 0, n; r < p.rows; r += n) {
        n = lesser(4, lesser(p.rows, (r / width + 1) * width) - r);
        for (int64_t i = r + n; i < lesser(p.rows, r + n + 4); ++i) {
            __builtin_prefetch(p.c + i * p.c_row + column, 1);
            __builtin_prefetch(p.c + i * p.c_row + column + kVectors * kLanes<A> - 1, 1);
        }
        auto tile = n == 4   ? row_tile<A, 4, kVectors>
                    : n == 3 ? row_tile<A, 3, kVectors>
                    : n == 2 ? row_tile<A, 2, kVectors>
                             : row_tile<A, 1, kVectors>;
        tile(p, p.a + r / width * p.a_panel + r % width * p.row, p.b + column, p.c + r * p.c_row + column,
             p.factors ? p.factors + r : nullptr, last);
    }
}

template <class A>
void row_product(const RowProduct<A>& p) {
    constexpr int64_t lanes = kLanes<A>;
    const int64_t vectors = (p.columns + lanes - 1) / lanes;
    for (int64_t v = 0, n; v < vectors; v += n) {
        const int64_t left = vectors - v;
        n = left == 4 ? 2 : lesser(3, left);  // one vector alone does not fill the processor's pipelines
        const int64_t last = lesser(lanes, p.columns - (v + n - 1) * lanes);
        (n == 3 ? row_tiles<A, 3> : n == 2 ? row_tiles<A, 2> : row_tiles<A, 1>)(p, v * lanes, last);
    }
}

// Of pairs of rows, the first `pitch` apart and the others `stride`, the sums of products.
template <class T>
void row_dots(const Accumulator<T>* x, int64_t pitch, const T* y, int64_t stride, int64_t rows, int64_t length,
              Accumulator<T>* out) {
    using A = Accumulator<T>;
    for (int64_t r = 0; r < rows; ++r, x += pitch, y += stride) {
        Vec<A> sum{};
        vectors<A>(0, length,
                   [&](int64_t i, int64_t n, auto lanes) { sum += lanes.of(load_n(x + i, n) * load_n(y + i, n)); });
        out[r] = sum_of<A>(sum);
    }
}

template <class T>
constexpr LineKernels<T> kLineKernels{&kAttentionKernels<Accumulator<T>>, row_product<Accumulator<T>>, row_dots<T>,
                                      copy_rows<Accumulator<T>, T>};

// Vectors of the accumulator, their loads from and stores to every storage type, and the activations on them.
// Included by kernels.inl inside the namespace of one instruction set; VECTOR_BYTES is its register size.

template <class A>
constexpr A kInfinity = static_cast<A>(__builtin_inf());
inline int64_t lesser(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t greater(int64_t a, int64_t b) { return a > b ? a : b; }

template <class V>
class Buffer {
  public:
    explicit Buffer(int64_t n) : n_(n), data_(static_cast<V*>(std::malloc(n * sizeof(V)))) {}
    ~Buffer() { std::free(data_); }
    Buffer(const Buffer&) = delete;
    void fill(V value) {
        for (int64_t i = 0; i < n_; ++i) data_[i] = value;
    }
    V& operator[](int64_t i) { return data_[i]; }
    int64_t size() const { return n_; }

  private:
    int64_t n_;
    V* data_;
};

template <class A>
struct VectorOf;
template <>
struct VectorOf<float> {
    typedef float type __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t mask __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint32_t bits __attribute__((vector_size(VECTOR_BYTES)));
    typedef uint16_t half __attribute__((vector_size(VECTOR_BYTES / 2)));
};
template <>
struct VectorOf<double> {
    typedef double type __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t mask __attribute__((vector_size(VECTOR_BYTES)));
};
template <class A>
using Vec = typename VectorOf<A>::type;
template <class A>
using Mask = typename VectorOf<A>::mask;
template <class A>
constexpr int64_t kLanes = VECTOR_BYTES / sizeof(A);

template <class A>
inline Vec<A> splat(A value) {
    return value - Vec<A>{};
}
template <class V, class P>
inline V load_bytes(const P* p) {
    V v;
    std::memcpy(&v, p, sizeof(V));
    return v;
}

inline Vec<float> load(const float* p) { return load_bytes<Vec<float>>(p); }
inline Vec<double> load(const double* p) { return load_bytes<Vec<double>>(p); }
inline Vec<float> load(const BFloat16* p) {
    using V = VectorOf<float>;
    auto bits = __builtin_convertvector(load_bytes<V::half>(p), V::bits) << 16;
    return (V::type)bits;
}
inline Vec<float> load(const Half* p) {
#if VECTOR_BYTES == 32  // of kernels_avx2.cpp: g++ defines no __F16C__ after its pragma
    return (Vec<float>)_mm256_cvtph_ps(load_bytes<__m128i>(p));
#elif VECTOR_BYTES == 64
    return (Vec<float>)_mm512_cvtph_ps(load_bytes<__m256i>(p));
#else
    Vec<float> v;
    for (int64_t i = 0; i < kLanes<float>; ++i) v[i] = static_cast<float>(p[i]);
    return v;
#endif
}

inline void store(Vec<float> v, float* p) { std::memcpy(p, &v, sizeof(v)); }
inline void store(Vec<double> v, double* p) { std::memcpy(p, &v, sizeof(v)); }
inline void store(Vec<float> v, BFloat16* p) {  // to nearest, ties to even; NaN stays NaN
    using V = VectorOf<float>;
    auto bits = (V::bits)v;
    auto rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
    auto half = __builtin_convertvector((v == v) ? rounded : (V::bits{} + 0x7fc0), V::half);
    std::memcpy(p, &half, sizeof(half));
}
inline void store(Vec<float> v, Half* p) {
#if VECTOR_BYTES == 32
    auto half = _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(p, &half, sizeof(half));
#elif VECTOR_BYTES == 64
    auto half = _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    std::memcpy(p, &half, sizeof(half));
#else
    for (int64_t i = 0; i < kLanes<float>; ++i) p[i] = static_cast<Half>(v[i]);
#endif
}

// The first n lanes, the others zero: rows shorter than a vector take the same arithmetic as longer ones.
template <class T>
inline auto load_tail(const T* p, int64_t n) {
    T lanes[kLanes<Accumulator<T>>] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
}
template <class T>
inline void store_tail(Vec<Accumulator<T>> v, T* p, int64_t n) {
    T lanes[kLanes<Accumulator<T>>];
    store(v, lanes);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}
template <class T>
inline Vec<Accumulator<T>> rounded_to(Vec<Accumulator<T>> v) {
    if constexpr (sizeof(T) == sizeof(Accumulator<T>)) return v;
    T lanes[kLanes<Accumulator<T>>];
    store(v, lanes);
    return load(lanes);
}
template <class A>
inline Mask<A> lanes_below(int64_t n) {
    Mask<A> iota;
    for (int64_t i = 0; i < kLanes<A>; ++i) iota[i] = i;
    using Lane = std::remove_reference_t<decltype(iota[0])>;
    return iota < static_cast<Lane>(n);
}
template <class A>
inline Mask<A> counting_from(int64_t first) {
    Mask<A> iota;
    using Lane = std::remove_reference_t<decltype(iota[0])>;
    for (int64_t i = 0; i < kLanes<A>; ++i) iota[i] = static_cast<Lane>(i);
    return iota + static_cast<Lane>(first);
}

template <class T>
inline Vec<Accumulator<T>> load_n(const T* p, int64_t n) {
    return n == kLanes<Accumulator<T>> ? load(p) : load_tail(p, n);
}
template <class T>
inline void store_n(Vec<Accumulator<T>> v, T* p, int64_t n) {
    if (n == kLanes<Accumulator<T>>)
        store(v, p);
    else
        store_tail(v, p, n);
}

// The lanes of a vector that count: the last vector of a row ends with it and overlaps the one before.
template <class A>
struct AllLanes {
    Mask<A> mask() const { return lanes_below<A>(kLanes<A>); }
    Vec<A> of(Vec<A> v) const { return v; }
};
template <class A>
struct SomeLanes {
    Mask<A> fresh;
    Mask<A> mask() const { return fresh; }
    Vec<A> of(Vec<A> v) const { return fresh ? v : Vec<A>{}; }
};

// Calls step(i, n, lanes) for the vectors of first..last; n < kLanes only where the row is shorter than that.
template <class A, class Step>
inline void vectors(int64_t first, int64_t last, Step step) {
    constexpr int64_t lanes = kLanes<A>;
    int64_t i = first;
    for (; i + lanes <= last; i += lanes) step(i, lanes, AllLanes<A>{});
    if (i == last) return;
    if (last - first >= lanes)
        step(last - lanes, lanes, SomeLanes<A>{~lanes_below<A>(lanes - (last - i))});
    else
        step(first, last - first, SomeLanes<A>{lanes_below<A>(last - first)});
}

// One bit a lane, the first lane's lowest, and back.
template <class A>
inline unsigned bits_of(Mask<A> mask) {
#if VECTOR_BYTES == 32
    if constexpr (sizeof(A) == 4) return static_cast<unsigned>(_mm256_movemask_ps((__m256)mask));
#elif VECTOR_BYTES == 64
    if constexpr (sizeof(A) == 4) return _mm512_movepi32_mask((__m512i)mask);
#endif
    unsigned bits = 0;
    for (int64_t i = 0; i < kLanes<A>; ++i) bits |= static_cast<unsigned>(mask[i] & 1) << i;
    return bits;
}
template <class A>
inline Mask<A> mask_of(unsigned bits) {
    Mask<A> powers;
    using Lane = std::remove_reference_t<decltype(powers[0])>;
    for (int64_t i = 0; i < kLanes<A>; ++i) powers[i] = Lane(1) << i;
    return ((Mask<A>{} + static_cast<Lane>(bits)) & powers) != 0;
}

// Lanes of a and b by number, b's after a's; from(i) is what lane i takes.
template <class V, class From>
inline V shuffled(V a, V b, From from) {
    constexpr int64_t lanes = sizeof(V) / sizeof(a[0]);
#if defined(__clang__)
    V v;
    for (int64_t i = 0; i < lanes; ++i) v[i] = from(i) < lanes ? a[from(i)] : b[from(i) - lanes];
    return v;
#else
    decltype(a < b) numbers;
    for (int64_t i = 0; i < lanes; ++i) numbers[i] = from(i);
    return __builtin_shuffle(a, b, numbers);
#endif
}
template <int64_t kBy, class V>
inline V rotated(V v) {
    constexpr int64_t lanes = sizeof(V) / sizeof(v[0]);
    return shuffled(v, v, [](int64_t i) { return (i + kBy) % lanes; });
}
// Of every group of kWidth lanes in a, then in b, the first half or the second.
template <int64_t kWidth, bool kSecond, class V>
inline V half_groups(V a, V b) {
    constexpr int64_t half = kWidth / 2;
    return shuffled(a, b, [](int64_t i) { return i / half * kWidth + i % half + (kSecond ? half : 0); });
}

template <class A>
inline A sum_of(Vec<A> v) {  // 16-byte parts first, then their lanes as a tree
    typedef A Part __attribute__((vector_size(16)));
    Part parts[VECTOR_BYTES / 16], total{};
    std::memcpy(parts, &v, sizeof(v));
    for (const Part& part : parts) total += part;
    if constexpr (sizeof(A) == 8)
        return total[0] + total[1];
    else
        return (total[0] + total[2]) + (total[1] + total[3]);
}

template <class A, class F>
inline Vec<A> each(Vec<A> v, F f) {
    for (int64_t i = 0; i < kLanes<A>; ++i) v[i] = f(v[i]);
    return v;
}

inline Vec<double> exp(Vec<double> x) {
    return each<double>(x, [](double t) { return std::exp(t); });
}
// NaN stays NaN.
inline Vec<float> between(Vec<float> x, Vec<float> low, Vec<float> high) {
#if VECTOR_BYTES == 32
    return (Vec<float>)_mm256_min_ps((__m256)high, _mm256_max_ps((__m256)low, (__m256)x));
#elif VECTOR_BYTES == 64
    return (Vec<float>)_mm512_min_ps((__m512)high, _mm512_max_ps((__m512)low, (__m512)x));
#else
    x = x < low ? low : x;
    return x > high ? high : x;
#endif
}
// e^x / 2^n with n = x / ln2, rounded: e^r with |r| <= ln2 / 2, a degree-6 polynomial, within 2 ulp.
inline Vec<float> exp_remainder(Vec<float> x, Vec<float> n) {
    const Vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    Vec<float> p = splat(1.9875691e-4f);
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 0.5f;
    return p * (r * r) + (r + 1.f);
}
// x from -87 to 88. Of the sum with 1.5 * 2^23, which rounds, the low bits are n.
inline Vec<float> exp_within(Vec<float> x) {
    using V = VectorOf<float>;
    const auto magic = splat(12582912.f);
    const Vec<float> rounded = x * 1.44269504f + magic, n = rounded - magic;
    return exp_remainder(x, n) * (V::type)(((V::bits)rounded << 23) + 0x3f800000);
}
// 0 below -87 and infinite above 88.
inline Vec<float> exp(Vec<float> x) {
#if VECTOR_BYTES == 64  // scalef ends at 0 and at infinity by itself
    x = (Vec<float>)_mm512_min_ps(_mm512_set1_ps(200.f), _mm512_max_ps(_mm512_set1_ps(-200.f), (__m512)x));
    const auto n = (Vec<float>)_mm512_roundscale_ps((__m512)(x * 1.44269504f), _MM_FROUND_TO_NEAREST_INT);
    return (Vec<float>)_mm512_scalef_ps((__m512)exp_remainder(x, n), (__m512)n);
#else
    const auto low = splat(-87.f), high = splat(88.f);
    const Vec<float> power = exp_within(between(x, low, high));
    return x > high ? splat(kInfinity<float>) : (x < low ? Vec<float>{} : power);
#endif
}

template <class V>
inline V clamp(V x, V low, V high) {  // NaN stays NaN
    x = x < low ? low : x;
    return x > high ? high : x;
}
template <class A>
inline Vec<A> sigmoid(Vec<A> x) {
    if constexpr (sizeof(A) == 4) {  // what e^-x is below e^-87 does not show beside 1
        const Vec<A> low = splat<A>(-88),
                     s = splat<A>(1) / (splat<A>(1) + exp_within(between(-x, splat<A>(-87), -low)));
        return x < low ? Vec<A>{} : s;
    } else {
        return splat<A>(1) / (splat<A>(1) + exp(-x));
    }
}
constexpr double kInvSqrt2 = 0.70710678118654752440, kInvSqrt2Pi = 0.39894228040143267794;
constexpr double kSqrt2OverPi = 0.79788456080286535588, kGeluCubic = 0.044715;

template <class A>
inline Vec<A> activate(Vec<A> x, int activation) {
    const Vec<A> zero{}, three = splat<A>(3), six = splat<A>(6);
    switch (activation) {
        case kRelu:
            return x < zero ? zero : x;
        case kSilu:
            return x * sigmoid<A>(x);
        case kGelu:
            return each<A>(x, [](A t) { return t * A(0.5) * (1 + std::erf(t * A(kInvSqrt2))); });
        case kGeluTanh:
            return each<A>(
                x, [](A t) { return t * A(0.5) * (1 + std::tanh(A(kSqrt2OverPi) * (t + A(kGeluCubic) * t * t * t))); });
        case kHardSwish:
            return x * clamp(x + three, zero, six) / six;
        case kSigmoid:
            return sigmoid<A>(x);
        case kHardSigmoid:
            return clamp(x + three, zero, six) / six;
        case kTanh:
            return each<A>(x, [](A t) { return std::tanh(t); });
        case kLeakyRelu:
            return x > zero ? x : x * splat<A>(A(0.01));
        case kRelu6:
            return clamp(x, zero, six);
        default:
            return x;
    }
}

// The derivative where torch takes it: 0 at the kinks of relu, 1/6 * (x / 3 + 1/2) inside hard_swish, ...
template <class A>
inline Vec<A> activate_grad(Vec<A> x, int activation) {
    const Vec<A> zero{}, one = splat<A>(1), three = splat<A>(3), six = splat<A>(6);
    switch (activation) {
        case kRelu:
            return x <= zero ? zero : one;
        case kSilu: {
            const Vec<A> s = sigmoid<A>(x);
            return s * (one + x * (one - s));
        }
        case kGelu:
            return each<A>(x, [](A t) {
                return A(0.5) * (1 + std::erf(t * A(kInvSqrt2))) + t * A(kInvSqrt2Pi) * std::exp(t * t * A(-0.5));
            });
        case kGeluTanh:
            return each<A>(x, [](A t) {
                const A h = std::tanh(A(kSqrt2OverPi) * (t + A(kGeluCubic) * t * t * t));
                return A(0.5) * (1 + h) + A(0.5) * t * (1 - h * h) * A(kSqrt2OverPi) * (1 + 3 * A(kGeluCubic) * t * t);
            });
        case kHardSwish:
            return x <= -three ? zero : (x < three ? x / three + splat<A>(A(0.5)) : one);
        case kSigmoid: {
            const Vec<A> s = sigmoid<A>(x);
            return s * (one - s);
        }
        case kHardSigmoid:
            return ((x > -three) & (x < three)) ? splat<A>(A(1.f / 6.f)) : zero;  // a float constant in torch, too
        case kTanh:
            return each<A>(x, [](A t) {
                const A h = std::tanh(t);
                return 1 - h * h;
            });
        case kLeakyRelu:
            return x > zero ? one : splat<A>(A(0.01));
        case kRelu6:
            return ((x <= zero) | (x >= six)) ? zero : one;
        default:
            return one;
    }
}

// Resident squeeze -> excite -> scale: one sample lies spread over the shared memory of a thread-block
// cluster.
//
// Forward: x is read once, into shared memory; pooled, excited and scaled there; y is written once: 2 passes,
// and one more for a residual. Backward: x and grad are both resident: 3 passes; an epilogue reads y (ReLU)
// or the residual and writes grad_residual: 5. Everything else that crosses global memory has one value a
// channel.
//
// The slice of a block: NCHW, a run of whole channels, so that pools are local. channels_last, a run of whole
// rows (positions), so that sums over space meet through the cluster's shared memory. In both layouts a block
// owns `share` channels whose descriptor, logit and gate it computes; what others need of it they read after
// a cluster barrier. Sums are kept in Acc (float; double for double) and added in an order that depends on
// the cluster size alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <type_traits>

#include "activation.cuh"
#include "cluster.cuh"
#include "fit.h"
#include "io.cuh"
#include "reduce.cuh"

namespace fused_attn::cuda {

// n / divisor for n * divisor < 2^40, without a division.
struct Divider {
    uint32_t divisor = 1;
    uint64_t reciprocal = uint64_t(1) << 40;
    Divider() = default;
    explicit Divider(uint32_t d)
        : divisor(std::max(d, 1u)), reciprocal(((uint64_t(1) << 40) + divisor - 1) / divisor) {}
    __device__ __forceinline__ int quotient(int n) const {
        return static_cast<int>((static_cast<uint64_t>(static_cast<uint32_t>(n)) * reciprocal) >> 40);
    }
};

// What a launch is told. Maps are (B, C, spatial) or (B, spatial, C); state is (B, state_width) of Acc, its
// rows s (C), z2 (C), z1 (H), peak (C), or with both pools average (C), z2 (C), its z1 (H), maximum (C), its z1
// (H); scratch is for the gradients of the parameters.
struct Call {
    const char *x = nullptr, *residual = nullptr, *grad = nullptr, *y_saved = nullptr;
    char *y = nullptr, *grad_x = nullptr, *grad_residual = nullptr;
    void* state = nullptr;
    int32_t* index = nullptr;
    Small weight1, bias1, weight2, bias2, affine_weight, affine_bias;
    void *grad_z2 = nullptr, *grad_z1 = nullptr;  // (B, C), (B, H); with both pools (B, 2, H)
    void* tap_sums = nullptr;                     // (B * ranks, taps + 1): parts of the gradients of weight1 and bias1
    void *affine_weight_sums = nullptr,
         *affine_bias_sums = nullptr;  // (B, C), or (B, ranks, C) in channels_last
    int dtype = kFloat32, itemsize = 4;
    int channels = 0, spatial = 0, hidden = 0, taps = 0, layers = 0, layer = 0, state_width = 0;
    int pool = 0, ties = 0, activation = 0, gate = 0, pre_activation = 0, post_activation = 0;
    __device__ __forceinline__ bool both() const { return pool == kBoth; }
    __device__ __forceinline__ int branches() const { return pool == kBoth ? 2 : 1; }
    Carve carve;
    Divider channel_of;  // by spatial (NCHW) or channels (channels_last)
};
inline int state_width(const Call& call) {
    if (call.pool == kBoth) return 3 * call.channels + 2 * call.hidden;
    return 2 * call.channels + call.hidden + (call.pool != kAvg && call.ties == kEven ? call.channels : 0);
}

template <class Io, bool kChannelsLast>
struct Block {
    using Acc = typename Io::Acc;
    static constexpr int V = Io::kVector;

    const Call& call;
    char* const shared;
    const int rank, ranks, thread, threads;
    const int64_t sample;
    int first_channel, own;  // the channels owned
    int first_row, rows;     // the rows held
    int count, head;         // the slice's elements; elements of its first 16-byte block before it
    int64_t offset;          // bytes before the slice in its map
    char *x, *grad;          // the slices in shared memory

    __device__ __forceinline__ explicit Block(const Call& c)
        : call(c),
          shared(shared_memory()),
          rank(cluster_rank()),
          ranks(cluster_size()),
          thread(thread_rank()),
          threads(thread_count()),
          sample(block_index() / ranks) {
        first_channel = min(rank * call.carve.share, call.channels);
        own = min(call.carve.share, call.channels - first_channel);
        first_row = kChannelsLast ? min(rank * call.carve.rows, call.spatial) : 0;
        rows = kChannelsLast ? min(call.carve.rows, call.spatial - first_row) : call.spatial;
        count = kChannelsLast ? rows * call.channels : own * call.spatial;
        const int64_t before =
            kChannelsLast ? int64_t(first_row) * call.channels : int64_t(first_channel) * call.spatial;
        offset = (sample * call.channels * call.spatial + before) * call.itemsize;
        const int misaligned = static_cast<int>(offset % 16);
        head = misaligned / call.itemsize;
        x = shared + call.carve.x + misaligned;
        grad = shared + call.carve.grad + misaligned;
    }

    __device__ __forceinline__ Acc* at(uint32_t place) const { return reinterpret_cast<Acc*>(shared + place); }
    __device__ __forceinline__ Acc* state() const { return static_cast<Acc*>(call.state) + sample * call.state_width; }
    __device__ __forceinline__ int32_t* index() const { return call.index + sample * call.channels; }
    __device__ __forceinline__ uint64_t* barrier() const { return reinterpret_cast<uint64_t*>(shared); }
    __device__ __forceinline__ uint32_t bytes() const { return static_cast<uint32_t>(count) * call.itemsize; }
    // Tables are of all channels (channels_last) or of those owned.
    __device__ __forceinline__ int table_size() const { return kChannelsLast ? call.channels : own; }
    __device__ __forceinline__ int table_start() const { return kChannelsLast ? 0 : first_channel; }

    // Reads the slice of x, and of grad, once; the tables of affine parameters meanwhile.
    __device__ __forceinline__ void load(const char* x_map, const char* grad_map) const {
        if (thread == 0) {
            uint32_t ragged;
            copies_begin(barrier(), whole_blocks(x_map + offset, bytes(), ragged) * (grad_map ? 2 : 1));
        }
        load_slice(barrier(), x - offset % 16, x_map + offset, bytes());
        if (grad_map) load_slice(barrier(), grad - offset % 16, grad_map + offset, bytes());
        if (Io::kGeneral && call.affine_weight.data) {
#pragma unroll 1
            for (int c = thread; c < table_size(); c += threads) {
                at(call.carve.weight)[c] = value_at<Acc>(call.affine_weight, table_start() + c);
                at(call.carve.bias)[c] = value_at<Acc>(call.affine_bias, table_start() + c);
            }
        }
    }
    __device__ __forceinline__ void wait() const {
        block_barrier();
        copies_wait(barrier());
        block_barrier();
    }

    // The prologue of channel c (of the tables): before and after its activation.
    __device__ __forceinline__ Acc affine(Acc value, int c) const {
        if (Io::kGeneral && call.affine_weight.data) return value * at(call.carve.weight)[c] + at(call.carve.bias)[c];
        return value;
    }
    __device__ __forceinline__ Acc prologue(Acc value, int c) const {
        return Io::kGeneral ? activate(call.pre_activation, affine(value, c)) : value;
    }

    // One reduction over space for each channel, from shared memory. visit(part, channel of the tables, place
    // in the slice, position, x, grad) adds an element; finish(channel, part) gets the results, one thread
    // each: with kExchange those of the channels owned, over all blocks; else those of this slice's channels.
    // Only finish's results are ordered by a barrier that the caller adds.
    template <class Part, bool kGrad, bool kExchange, class Visit, class Finish>
    __device__ __forceinline__ void reduce(Visit visit, Finish finish) const {
        if constexpr (kChannelsLast) {
            const auto element = [&](Part& part, int row, int c, int i, Acc value, Acc grad_y, Acc) {
                visit(part, c, i, first_row + row, value, grad_y);
            };
            reduce_columns<Part, kGrad, kExchange>(
                {call.channels, rows, call.carve.piece, call.carve.groups, first_channel, own, call.carve.part},
                element, finish);
        } else {
            const auto element = [&](Part& part, int c, int position, int i, Acc value, Acc grad_y, Acc) {
                visit(part, c, i, position, value, grad_y);
            };
            reduce_rows<Part, kGrad>(own, call.spatial, nullptr, element, finish);
        }
    }
    // The slice as a matrix of `height` rows of `width` neighbours (positions of a channel in NCHW, channels of a
    // position in channels_last). visit(part, row, column, place in the slice, x, grad, weight of the column);
    // `weights` of the columns may be null.
    // One result a row: some lanes of a warp a row, by 16-byte blocks; those at its ends are shared with its
    // neighbours.
    template <class Part, bool kGrad, class Visit, class Finish>
    __device__ __forceinline__ void reduce_rows(int height, int width, const Acc* weights, Visit visit,
                                                Finish finish) const {
        int lanes = 1;
        while (lanes < 32 && lanes * V < width) lanes *= 2;
        const int a_warp = 32 / lanes, lane = thread % lanes;
#pragma unroll 1
        for (int first = thread / 32 * a_warp; first < height; first += threads / 32 * a_warp) {
            const int r = first + thread % 32 / lanes;
            Part part;
            if (r < height) {
                const int begin = r * width, end = begin + width;
#pragma unroll 1
                for (int i = begin - (begin + head) % V + lane * V; i < end; i += lanes * V) {
                    Acc values[V], grads[V] = {}, weight[V] = {};
                    Io::load(call.dtype, x, i, values);
                    if constexpr (kGrad) Io::load(call.dtype, grad, i, grads);
                    if (V == 1 || (i >= begin && i + V <= end)) {
                        if (weights) load_table<V>(weights, i - begin, width % V == 0, weight);
#pragma unroll
                        for (int e = 0; e < V; ++e)
                            visit(part, r, i + e - begin, i + e, values[e], grads[e], weight[e]);
                    } else {
#pragma unroll
                        for (int e = 0; e < V; ++e)
                            if (i + e >= begin && i + e < end)
                                visit(part, r, i + e - begin, i + e, values[e], grads[e],
                                      weights ? weights[i + e - begin] : Acc(0));
                    }
                }
            }
            merge_lanes(part, lanes);
            if (r < height && lane == 0) finish(r, part);
        }
    }
    // One result a column: threads (group g, `piece` neighbouring columns), rows g, g + groups, ... Partial results
    // lie at `parts`, of which a block owns columns first_own .. first_own + own over the cluster.
    struct Columns {
        int width, height, piece, groups, first_own, own;
        uint32_t parts;
    };
    template <class Part, bool kGrad, bool kExchange, class Visit, class Finish>
    __device__ __forceinline__ void reduce_columns(const Columns& m, Visit visit, Finish finish) const {
        Part* const parts = reinterpret_cast<Part*>(shared + m.parts);
        if (!Io::kGeneral && m.piece == 4) {
            reduce_pieces<Part, kGrad, Io::kGeneral ? 1 : 4>(m, parts, visit);
        } else {
            reduce_pieces<Part, kGrad, 1>(m, parts, visit);
        }
        merge_columns<Part, kExchange>(m, 1, [&](int, int c, const Part& part) { finish(c, part); });
    }
    // The partial results of `copies` such matrices side by side (a group's copies neighbours): finish(copy, column,
    // part), or without exchange finish(0, column of all copies, part).
    template <class Part, bool kExchange, class Finish>
    __device__ __forceinline__ void merge_columns(const Columns& m, int copies, Finish finish) const {
        Part* const parts = reinterpret_cast<Part*>(shared + m.parts);
        const int width = copies * m.width;
        block_barrier();
#pragma unroll 1
        for (int c = thread; c < width; c += threads) {
            Part part = parts[c];
#pragma unroll 1
            for (int g = 1; g < m.groups; ++g) part.merge(parts[g * width + c]);
            if constexpr (kExchange) {
                parts[c] = part;
            } else {
                finish(0, c, part);
            }
        }
        if constexpr (kExchange) {
            cluster_barrier();
#pragma unroll 1
            for (int copy = 0; copy < copies; ++copy) {
                Part* const own_parts = parts + copy * m.width + m.first_own;
#pragma unroll 1
                for (int c = thread; c < m.own; c += threads) {
                    Part part = *of_rank(&own_parts[c], 0);
#pragma unroll 1
                    for (int r = 1; r < ranks; ++r) part.merge(*of_rank(&own_parts[c], r));
                    finish(copy, c, part);
                }
            }
        }
    }
    template <class Part, bool kGrad, int N, class Visit>
    __device__ __forceinline__ void reduce_pieces(const Columns& m, Part* parts, Visit visit) const {
        const int columns = m.width / N;
#pragma unroll 1
        for (int item = thread; item < columns * m.groups; item += threads) {
            const int group = item / columns, c = item % columns * N;
            Part sums[N];
#pragma unroll 2
            for (int row = group; row < m.height; row += m.groups) {
                const int i = row * m.width + c;
                Acc values[N], grads[N] = {};
                Io::load(call.dtype, x, i, values);
                if constexpr (kGrad) Io::load(call.dtype, grad, i, grads);
#pragma unroll
                for (int e = 0; e < N; ++e) visit(sums[e], row, c + e, i + e, values[e], grads[e], Acc(0));
            }
#pragma unroll
            for (int e = 0; e < N; ++e) parts[group * m.width + c + e] = sums[e];
        }
    }
    // N values of a table from place c, 16 bytes at a time where c is a multiple of N.
    template <int N, class Value>
    static __device__ __forceinline__ void load_table(const Value* table, int c, bool aligned, Value (&values)[N]) {
        constexpr int kAtOnce = 16 / sizeof(Value);
        if constexpr (N % kAtOnce == 0) {
            if (aligned) {
#pragma unroll
                for (int e = 0; e < N; e += kAtOnce) {
                    const auto some = *reinterpret_cast<const Elements<Value, kAtOnce>*>(table + c + e);
#pragma unroll
                    for (int k = 0; k < kAtOnce; ++k) values[e + k] = some.at[k];
                }
                return;
            }
        }
#pragma unroll
        for (int e = 0; e < N; ++e) values[e] = table[c + e];
    }

    // The channels of the V elements at `i` of the slice (some may lie outside it), to look up tables.
    struct Lookup {
        const Block& block;
        int i, c, split;
        __device__ __forceinline__ Lookup(const Block& b, int place) : block(b), i(place) {
            const int inside = max(i, 0);
            const int q = b.call.channel_of.quotient(inside);
            c = kChannelsLast ? inside - q * b.call.channels : q;
            split = (q + 1) * b.call.spatial - i;
        }
        template <class Value>
        __device__ __forceinline__ void operator()(const Value* table, Value (&values)[V]) const {
            if (V == 1) {
                values[0] = table[c];
            } else if (kChannelsLast && block.call.channels % V == 0) {
                load_table<V>(table, c, true, values);
            } else if (!kChannelsLast && block.call.spatial >= V) {  // at most two channels
                const Value here = table[c], next = table[min(c + 1, block.own - 1)];
#pragma unroll
                for (int e = 0; e < V; ++e) values[e] = e < split ? here : next;
            } else {
#pragma unroll
                for (int e = 0; e < V; ++e) {
                    const int inside = min(max(i + e, 0), block.count - 1);
                    const int q = block.call.channel_of.quotient(inside);
                    values[e] = table[kChannelsLast ? inside - q * block.call.channels : q];
                }
            }
        }
    };
    template <class Body>
    __device__ __forceinline__ void each_vector(Body body) const {
        if constexpr (V == 1) {
#pragma unroll 1
            for (int i = thread; i < count; i += threads) body(i);
        } else {
            if (count == 0) return;  // a block without a slice, whose place may be misaligned
#pragma unroll 1
            for (int i = thread * V - head; i < count; i += threads * V) body(i);
        }
    }

    // finish(r, sum over i < columns of weight[r * stride + start + i] * vector[i]): neighbouring lanes share
    // a row, and have several rows at once, each 16 bytes a load where rows begin at such places.
    template <class Finish>
    __device__ __forceinline__ void product(const Small& weight, int rows_, int64_t stride, int64_t start, int columns,
                                            const Acc* vector, Finish finish) const {
        with_data(weight, [&](auto* w) {
            constexpr int N = 16 / sizeof(*w);
            if (columns >= N && in_blocks(w + start, stride * sizeof(*w))) {
                product_of<N>(w + start, rows_, stride, columns, vector, finish);
            } else {
                product_of<1>(w + start, rows_, stride, columns, vector, finish);
            }
        });
    }
    // Whether rows so many bytes apart, from `first` on, begin at 16-byte blocks.
    static __device__ __forceinline__ bool in_blocks(const void* first, int64_t apart) {
        return reinterpret_cast<uintptr_t>(first) % 16 == 0 && apart % 16 == 0;
    }
    template <int N, class T, class Finish>
    __device__ __forceinline__ void product_of(const T* weight, int rows_, int64_t stride, int columns,
                                               const Acc* vector, Finish finish) const {
        constexpr int kRows = 2;
        int lanes = 1;
        while (lanes < 32 && lanes * N < columns) lanes *= 2;
        const int a_warp = 32 / lanes, lane = thread % lanes, whole = columns / N * N;
        const bool aligned = reinterpret_cast<uintptr_t>(vector) % 16 == 0;
#pragma unroll 1
        for (int first = thread / 32 * a_warp * kRows; first < rows_; first += threads / 32 * a_warp * kRows) {
            const int r = first + thread % 32 / lanes;
            const T* row[kRows];
            Sum<Acc> total[kRows];
#pragma unroll
            for (int k = 0; k < kRows; ++k) row[k] = weight + min(r + k * a_warp, rows_ - 1) * stride;
#pragma unroll 1
            for (int i = lane * N; i < whole; i += lanes * N) {
                Elements<T, N> some[kRows];
#pragma unroll
                for (int k = 0; k < kRows; ++k) some[k] = *reinterpret_cast<const Elements<T, N>*>(row[k] + i);
                Acc values[N];
                load_table<N>(vector, i, aligned, values);
#pragma unroll
                for (int k = 0; k < kRows; ++k)
#pragma unroll
                    for (int e = 0; e < N; ++e) total[k].sum += static_cast<Acc>(widen(some[k].at[e])) * values[e];
            }
            const int i = whole + lane;
            if (N > 1 && i < columns) {  // fewer than the lanes there are, or those of one lane
#pragma unroll 1
                for (int j = i; j < columns; j += lanes)
#pragma unroll
                    for (int k = 0; k < kRows; ++k) total[k].sum += static_cast<Acc>(widen(row[k][j])) * vector[j];
            }
#pragma unroll
            for (int k = 0; k < kRows; ++k) merge_lanes(total[k], lanes);
#pragma unroll 1
            for (int k = lane; k < kRows; k += lanes) {  // all lanes have all sums
                Acc sum = total[0].sum;
#pragma unroll
                for (int other = 1; other < kRows; ++other) sum = k == other ? total[other].sum : sum;
                if (r + k * a_warp < rows_) finish(r + k * a_warp, sum);
            }
        }
    }
    // finish(i, sum over r < rows of weight[r * stride + start + i] * vector[r]). All threads of the block call it.
    template <class Finish>
    __device__ __forceinline__ void transposed_product(const Small& weight, int rows_, int64_t stride, int64_t start,
                                                       int columns, const Acc* vector, Finish finish) const {
        with_data(weight, [&](auto* w) {
            constexpr int N = 16 / sizeof(*w);
            if (columns % N == 0 && in_blocks(w + start, stride * sizeof(*w))) {
                transposed_product_of<N>(w + start, rows_, stride, columns, vector, finish);
            } else {
                transposed_product_of<1>(w + start, rows_, stride, columns, vector, finish);
            }
        });
    }
    // Of a warp's lanes kLanes share a row, of N neighbouring columns each; the others have other rows, and so have the
    // warps of a team, which share these columns.
    template <int N, class T, class Finish>
    __device__ __forceinline__ void transposed_product_of(const T* weight, int rows_, int64_t stride, int columns,
                                                          const Acc* vector, Finish finish) const {
        constexpr int kLanes = N > 1 ? 4 : 32, kWidth = kLanes * N, kAtOnce = 32 / kLanes;
        Acc* const fold = at(call.carve.fold);
        const int tiles = (columns + kWidth - 1) / kWidth, team = max(1, threads / 32 / max(tiles, 1));
        const int warp = thread / 32, member = warp % team, lane = thread % kLanes;
#pragma unroll 1
        for (int tile = warp / team; tile < tiles; tile += max(threads / 32 / team, 1)) {
            const int column = tile * kWidth + lane * N;
            Acc sums[N] = {};
            if (column < columns) {
#pragma unroll 4
                for (int r = member * kAtOnce + thread % 32 / kLanes; r < rows_; r += team * kAtOnce) {
                    const auto some = *reinterpret_cast<const Elements<T, N>*>(weight + r * stride + column);
#pragma unroll
                    for (int e = 0; e < N; ++e) sums[e] += static_cast<Acc>(widen(some.at[e])) * vector[r];
                }
            }
#pragma unroll
            for (int e = 0; e < N; ++e) {
#pragma unroll
                for (int mask = kLanes; mask < 32; mask *= 2) sums[e] += shuffle_xor(sums[e], mask);
            }
            if (column < columns && thread % 32 < kLanes) {
#pragma unroll
                for (int e = 0; e < N; ++e) {
                    if (team > 1) {
                        fold[member * tiles * kWidth + column + e] = sums[e];
                    } else {
                        finish(column + e, sums[e]);
                    }
                }
            }
        }
        block_barrier();
        if (team > 1) {
#pragma unroll 1
            for (int i = thread; i < columns; i += threads) {
                Acc sum = fold[i];
#pragma unroll 1
                for (int m = 1; m < team; ++m) sum += fold[m * tiles * kWidth + i];
                finish(i, sum);
            }
            block_barrier();
        }
    }
    // The sum over the cluster of exchange[i], in order.
    __device__ __forceinline__ Acc exchanged(int i) const {
        Acc* const mine = at(call.carve.exchange) + i;
        Acc sum = *of_rank(mine, 0);
#pragma unroll 1
        for (int r = 1; r < ranks; ++r) sum += *of_rank(mine, r);
        return sum;
    }
    // to[c], c over all channels, from the blocks that own them (their arrays at `place`).
    template <class Store>
    __device__ __forceinline__ void gather(uint32_t place, Store store) const {
#pragma unroll 1
        for (int c = thread; c < call.channels; c += threads) {
            const int owner = c / call.carve.share;
            store(c, *of_rank(at(place) + (c - owner * call.carve.share), owner));
        }
    }
    // Tap k of a convolution over channels: the channel that c reads, or -1.
    __device__ __forceinline__ int neighbour(int c, int distance) const {
        int other = c + distance;
        if (call.layer == kCircular) {
            other %= call.channels;
            return other < 0 ? other + call.channels : other;
        }
        return other >= 0 && other < call.channels ? other : -1;
    }

    __device__ __forceinline__ void set_gate(int c, Acc logit) const {
        state()[call.channels + first_channel + c] = logit;
        at(call.carve.result)[c] = activate(call.gate, logit);
    }

    // Gates of the channels owned, from the descriptors of the channels owned: one cluster barrier. A dense
    // layer is summed over the blocks' columns, so that descriptors need not travel. With both pools the
    // excitation is linear from the hidden activations on, so that the two meet there.
    __device__ __forceinline__ void excite() const {
        Acc* const descriptors = at(call.carve.own);
        if (call.both() && call.layers < 2) {
#pragma unroll 1
            for (int c = thread; c < own; c += threads) descriptors[c] += descriptors[call.carve.share + c];
            block_barrier();
        }
        if (call.layers == 0) {
#pragma unroll 1
            for (int c = thread; c < own; c += threads) set_gate(c, descriptors[c]);
        } else if (call.layer == kDense) {
            Acc* const exchange = at(call.carve.exchange);
            const int width = call.layers == 2 ? call.hidden : call.channels;
            const int branches = call.layers == 2 ? call.branches() : 1;
#pragma unroll 1
            for (int b = 0; b < branches; ++b)
                product(call.weight1, width, call.channels, first_channel, own, descriptors + b * call.carve.share,
                        [&](int r, Acc sum) { exchange[b * width + r] = sum; });
            cluster_barrier();
            if (call.layers == 2) {
                Acc* const hidden = at(call.carve.hidden);
#pragma unroll 1
                for (int h = thread; h < call.hidden; h += threads) {
                    Acc sum = 0;
#pragma unroll 1
                    for (int b = 0; b < branches; ++b) {
                        const Acc logit = exchanged(b * width + h) + bias(call.bias1, h);
                        if (rank == 0) hidden_logits(b)[h] = logit;
                        sum += activate(call.activation, logit);
                    }
                    hidden[h] = sum;
                }
                block_barrier();
                product(call.weight2, own, call.hidden, int64_t(first_channel) * call.hidden, call.hidden, hidden,
                        [&](int c, Acc sum) { set_gate(c, sum + biases(call.bias2, first_channel + c)); });
            } else {
#pragma unroll 1
                for (int c = thread; c < own; c += threads)
                    set_gate(c, exchanged(first_channel + c) + biases(call.bias1, first_channel + c));
            }
        } else {
            Acc* const everyone = at(call.carve.everyone);
            cluster_barrier();
            gather(call.carve.own, [&](int c, Acc value) { everyone[c] = value; });
            block_barrier();
#pragma unroll 1
            for (int c = thread; c < own; c += threads) {
                Acc sum = biases(call.bias1, 0);
                for (int k = 0; k < call.taps; ++k) {
                    const int other = neighbour(first_channel + c, k - call.taps / 2);
                    if (other >= 0) sum += value_at<Acc>(call.weight1, k) * everyone[other];
                }
                set_gate(c, sum);
            }
        }
    }
    __device__ __forceinline__ Acc bias(const Small& values, int i) const {
        return values.data ? value_at<Acc>(values, i) : Acc(0);
    }
    // The bias of the last layer, once for each pool.
    __device__ __forceinline__ Acc biases(const Small& values, int i) const {
        return static_cast<Acc>(call.branches()) * bias(values, i);
    }
    __device__ __forceinline__ Acc* hidden_logits(int branch) const {
        return state() + (branch ? 3 : 2) * call.channels + branch * call.hidden;
    }

    // Gradients of the descriptors owned (to `result`) from those of the gate's logits (in `own`): the
    // transposed.
    __device__ __forceinline__ void excite_backward() const {
        Acc *const grad_logits = at(call.carve.own), *const result = at(call.carve.result);
        if (call.layers == 0) {
#pragma unroll 1
            for (int c = thread; c < own; c += threads) result[c] = grad_logits[c];
        } else if (call.layer == kDense) {
            Acc* const exchange = at(call.carve.exchange);
            const int width = call.layers == 2 ? call.hidden : call.channels;
            transposed_product(call.layers == 2 ? call.weight2 : call.weight1, own, width,
                               int64_t(first_channel) * width, width, grad_logits,
                               [&](int i, Acc sum) { exchange[i] = sum; });
            cluster_barrier();
            if (call.layers == 2) {
                Acc* const hidden = at(call.carve.hidden);
#pragma unroll 1
                for (int i = thread; i < call.branches() * call.hidden; i += threads) {
                    const int branch = i >= call.hidden, h = i - branch * call.hidden;
                    hidden[i] = exchanged(h) * derivative(call.activation, hidden_logits(branch)[h]);
                    if (rank == 0)
                        static_cast<Acc*>(call.grad_z1)[sample * call.branches() * call.hidden + i] = hidden[i];
                }
                block_barrier();
#pragma unroll 1
                for (int b = 0; b < call.branches(); ++b)
                    transposed_product(call.weight1, call.hidden, call.channels, first_channel, own,
                                       hidden + b * call.hidden,
                                       [&](int c, Acc sum) { result[b * call.carve.share + c] = sum; });
                return;
            }
#pragma unroll 1
            for (int c = thread; c < own; c += threads) result[c] = exchanged(first_channel + c);
        } else {
            Acc* const everyone = at(call.carve.everyone);
            cluster_barrier();
            gather(call.carve.own, [&](int c, Acc value) { everyone[c] = value; });
            block_barrier();
#pragma unroll 1
            for (int c = thread; c < own; c += threads) {
                Acc sum = 0;
                for (int k = 0; k < call.taps; ++k) {
                    const int other = neighbour(first_channel + c, call.taps / 2 - k);
                    if (other >= 0) sum += value_at<Acc>(call.weight1, k) * everyone[other];
                }
                result[c] = sum;
            }
            sum_taps(grad_logits);
        }
        if (call.both())
#pragma unroll 1
            for (int c = thread; c < own; c += threads) result[call.carve.share + c] = result[c];
    }

    // This block's part of the gradients of a convolution's taps and bias: a tap a warp.
    __device__ __forceinline__ void sum_taps(const Acc* grad_logits) const {
        Acc* const sums = static_cast<Acc*>(call.tap_sums) + (sample * ranks + rank) * (call.taps + 1);
#pragma unroll 1
        for (int k = thread / 32; k <= call.taps; k += threads / 32) {
            Sum<Acc> part;
#pragma unroll 2
            for (int c = thread % 32; c < own; c += 32) {
                const int other = k < call.taps ? neighbour(first_channel + c, k - call.taps / 2) : -1;
                Acc descriptor = k < call.taps ? Acc(0) : static_cast<Acc>(call.branches());
                if (other >= 0) {
                    descriptor = state()[other];
                    if (call.both()) descriptor += state()[2 * call.channels + call.hidden + other];
                }
                part.sum += grad_logits[c] * descriptor;
            }
            merge_lanes(part, 32);
            if (thread % 32 == 0) sums[k] = part.sum;
        }
    }

    // Descriptors of the channels owned, to shared memory and to state; with a maximum its index and value
    // too.
    template <class Part>
    __device__ __forceinline__ void squeeze() const {
        constexpr bool kMaximum = !std::is_same_v<Part, Sum<Acc>>;
        reduce<Part, false, true>(
            [&](Part& part, int c, int, int position, Acc value, Acc) {
                const Acc u = prologue(value, c);
                if constexpr (kMaximum) {
                    constexpr bool kEven = std::is_same_v<Part, Peak<Acc, true>>;
                    const Acc stored = Io::kGeneral ? Io::rounded(call.dtype, u) : u;
                    part.merge(Part{u, stored, kEven ? (stored == stored) : position});
                } else {
                    part.sum += u;
                }
            },
            [&](int c, const Part& part) {
                const int channel = first_channel + c;
                Acc descriptor = part.sum / static_cast<Acc>(call.spatial);
                if constexpr (kMaximum) {
                    if (call.pool == kMax) descriptor = part.peak;
                    if (call.pool == kAvgMax) descriptor = Acc(0.5) * descriptor + Acc(0.5) * part.peak;
                    if (call.both()) at(call.carve.own)[call.carve.share + c] = part.peak;
                    index()[channel] = part.index;
                    if (call.ties == kEven || call.both())
                        state()[2 * call.channels + call.hidden + channel] = part.peak;
                }
                at(call.carve.own)[c] = descriptor;
                state()[channel] = descriptor;
            });
        block_barrier();
    }

    // The gates of the slice's channels, in the table `gate` after the next block barrier.
    __device__ __forceinline__ void gate_channels() const {
        if (call.pool == kAvg) {
            squeeze<Sum<Acc>>();
        } else if (call.ties == kEven) {
            squeeze<Peak<Acc, true>>();
        } else {
            squeeze<Peak<Acc, false>>();
        }
        excite();
        if (kChannelsLast) {
            cluster_barrier();
            gather(call.carve.result, [&](int c, Acc value) { at(call.carve.gate)[c] = value; });
        }
    }

    __device__ __forceinline__ void forward() const {
        load(call.x, nullptr);
        wait();
        gate_channels();
        const Acc* const gates = at(call.carve.gate);
        cluster_arrive();  // the last look into other blocks is behind us; none may leave before all have had
                           // it
        block_barrier();
        each_vector([&](int i) {
            const Lookup lookup(*this, i);
            Acc values[V], gate[V], residual[V] = {};
            if (call.residual) Io::read(call.dtype, call.residual + offset, i, count, residual);
            Io::load(call.dtype, x, i, values);
            lookup(gates, gate);
#pragma unroll
            for (int e = 0; e < V; ++e) values[e] = prologue(values[e], lookup.c) * gate[e] + residual[e];
            if (call.post_activation != kIdentity) {
#pragma unroll
                for (int e = 0; e < V; ++e)
                    values[e] = activate(Io::kGeneral ? call.post_activation : kRelu, values[e]);
            }
            if constexpr (Io::kGeneral) {
                Io::store(call.dtype, x, i, values);
            } else {
                Io::write(call.dtype, call.y + offset, i, count, values);
            }
        });
        if (Io::kGeneral) {
            block_barrier();
            store_slice(x - offset % 16, call.y + offset, bytes());
        }
        cluster_wait();
    }

    // Tables that only need what forward saved, while the copies run.
    __device__ __forceinline__ void prepare_backward() const {
#pragma unroll 1
        for (int c = thread; c < table_size(); c += threads) {
            const int channel = table_start() + c;
            at(call.carve.gate)[c] = activate(call.gate, state()[call.channels + channel]);
            if (call.pool == kAvg) continue;
            if (call.ties == kEven) {
                at(call.carve.top_at)[c] = state()[2 * call.channels + call.hidden + channel];
            } else {  // the maximum's place in this slice; negative or beyond it: in another block's
                const int position = index()[channel];
                at_places()[c] =
                    kChannelsLast ? (position - first_row) * call.channels + c : c * call.spatial + position;
            }
        }
    }
    __device__ __forceinline__ int* at_places() const { return reinterpret_cast<int*>(shared + call.carve.top_at); }

    // grad becomes the gradient before the epilogue, in shared memory and as grad_residual. Reads y or the
    // residual.
    __device__ __forceinline__ void epilogue_backward() const {
        each_vector([&](int i) {
            Acc grads[V], other[V] = {};
            Io::load(call.dtype, grad, i, grads);
            if (call.y_saved) {
                Io::read(call.dtype, call.y_saved + offset, i, count, other);
#pragma unroll
                for (int e = 0; e < V; ++e) grads[e] = other[e] <= 0 ? Acc(0) : grads[e];
            } else if (Io::kGeneral) {
                Acc values[V];
                const Lookup lookup(*this, i);
                if (call.residual) Io::read(call.dtype, call.residual + offset, i, count, other);
                Io::load(call.dtype, x, i, values);
                grads[0] *= derivative(call.post_activation,
                                       prologue(values[0], lookup.c) * at(call.carve.gate)[lookup.c] + other[0]);
            }
            Io::store(call.dtype, grad, i, grads);
            if constexpr (!Io::kGeneral) Io::write(call.dtype, call.grad_residual + offset, i, count, grads);
        });
        block_barrier();
        if (Io::kGeneral) store_slice(grad - offset % 16, call.grad_residual + offset, bytes());
    }

    // The gradient of an element of u that lies at place i of the slice, in channel c of the tables.
    __device__ __forceinline__ Acc grad_u(int c, int i, Acc u, Acc grad_y) const {
        Acc sum = grad_y * at(call.carve.gate)[c] + at(call.carve.mean)[c];
        if (call.pool != kAvg) {
            const bool hit =
                call.ties == kEven ? Io::rounded(call.dtype, u) == at(call.carve.top_at)[c] : i == at_places()[c];
            sum += top_share(hit, at(call.carve.top)[c]);
        }
        return sum;
    }
    // An even share is multiplied, as amax does: 0 / 0 for a NaN maximum. A single place is chosen.
    __device__ __forceinline__ Acc top_share(bool hit, Acc share) const {
        return call.ties == kEven ? (hit ? Acc(1) : Acc(0)) * share : hit ? share : Acc(0);
    }

    __device__ __forceinline__ void set_grad_gate(int c, Acc sum) const {
        const int channel = first_channel + c;
        const Acc g = sum * derivative(call.gate, state()[call.channels + channel]);
        at(call.carve.own)[c] = g;
        if (call.grad_z2) static_cast<Acc*>(call.grad_z2)[sample * call.channels + channel] = g;
    }
    // From the gradients of the gates owned to what the pools pass to each element, in the tables `mean` and `top`
    // after the next block barrier.
    __device__ __forceinline__ void gate_channels_backward() const {
        block_barrier();
        excite_backward();
        const Acc weight = call.pool == kAvgMax ? Acc(0.5) : Acc(1);
        const auto spread_mean = [&](int c, Acc g) {
            at(call.carve.mean)[c] = call.pool == kMax ? Acc(0) : weight * g / static_cast<Acc>(call.spatial);
        };
        const auto spread_top = [&](int c, Acc g) {
            at(call.carve.top)[c] =
                call.ties == kEven ? weight * g / static_cast<Acc>(index()[table_start() + c]) : weight * g;
        };
        const uint32_t top =
            call.carve.result + (call.both() ? call.carve.share * static_cast<uint32_t>(sizeof(Acc)) : 0u);
        if (kChannelsLast) {
            cluster_barrier();
            gather(call.carve.result, spread_mean);
            if (call.pool != kAvg) gather(top, spread_top);
        } else {
            block_barrier();
#pragma unroll 1
            for (int c = thread; c < own; c += threads) {
                spread_mean(c, at(call.carve.result)[c]);
                if (call.pool != kAvg) spread_top(c, at(top)[c]);
            }
        }
    }

    __device__ __forceinline__ void backward() const {
        load(call.x, call.grad);
        prepare_backward();
        wait();
        if (call.post_activation != kIdentity) epilogue_backward();
        reduce<Sum<Acc>, true, true>(
            [&](Sum<Acc>& part, int c, int, int, Acc value, Acc grad_y) { part.sum += grad_y * prologue(value, c); },
            [&](int c, const Sum<Acc>& part) { set_grad_gate(c, part.sum); });
        gate_channels_backward();
        cluster_arrive();  // as in forward
        block_barrier();
        if (Io::kGeneral && call.affine_weight.data) affine_backward();
        each_vector([&](int i) {
            const Lookup lookup(*this, i);
            Acc values[V], grads[V];
            Io::load(call.dtype, x, i, values);
            Io::load(call.dtype, grad, i, grads);
            if constexpr (Io::kGeneral) {
                const int c = lookup.c;
                const Acc before = affine(values[0], c), u = activate(call.pre_activation, before);
                values[0] = grad_u(c, i, u, grads[0]) * derivative(call.pre_activation, before);
                if (call.affine_weight.data) values[0] *= at(call.carve.weight)[c];
                Io::store(call.dtype, x, i, values);
            } else {
                Acc gate[V], mean[V];
                lookup(at(call.carve.gate), gate);
                lookup(at(call.carve.mean), mean);
#pragma unroll
                for (int e = 0; e < V; ++e) grads[e] = grads[e] * gate[e] + mean[e];
                if (call.pool != kAvg) {
                    Acc top[V];
                    lookup(at(call.carve.top), top);
                    if (call.ties == kEven) {
                        Acc peak[V];
                        lookup(at(call.carve.top_at), peak);
#pragma unroll
                        for (int e = 0; e < V; ++e) grads[e] += top_share(values[e] == peak[e], top[e]);
                    } else {
                        int place[V];
                        lookup(at_places(), place);
#pragma unroll
                        for (int e = 0; e < V; ++e) grads[e] += top_share(i + e == place[e], top[e]);
                    }
                }
                Io::write(call.dtype, call.grad_x + offset, i, count, grads);
            }
        });
        if (Io::kGeneral) {
            block_barrier();
            store_slice(x - offset % 16, call.grad_x + offset, bytes());
        }
        cluster_wait();
    }
    // Sums for the gradients of the affine parameters, from shared memory to this slice's row of scratch.
    __device__ __forceinline__ void affine_backward() const {
        reduce<TwoSums<Acc>, true, false>(
            [&](TwoSums<Acc>& part, int c, int i, int, Acc value, Acc grad_y) {
                const Acc before = affine(value, c), u = activate(call.pre_activation, before);
                const Acc g = grad_u(c, i, u, grad_y) * derivative(call.pre_activation, before);
                part.merge({g * value, g});
            },
            [&](int c, const TwoSums<Acc>& part) { set_affine_sums(c, part); });
        block_barrier();  // what follows overwrites x
    }
    __device__ __forceinline__ void set_affine_sums(int c, const TwoSums<Acc>& part) const {
        const int64_t row = kChannelsLast ? sample * ranks + rank : sample;
        const int64_t to = row * call.channels + table_start() + c;
        static_cast<Acc*>(call.affine_weight_sums)[to] = part.first;
        static_cast<Acc*>(call.affine_bias_sums)[to] = part.second;
    }
};

// Blocks of a multiprocessor that registers must suffice for. Before sm_90 the backward of two would have a stack.
template <class Io>
constexpr int kForwardBlocks = Io::kGeneral ? 1 : 2;
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <class Io>
constexpr int kBackwardBlocks = 1;
#else
template <class Io>
constexpr int kBackwardBlocks = kForwardBlocks<Io>;
#endif

template <class Io, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kForwardBlocks<Io>) channel_gate_kernel(const __grid_constant__ Call call) {
    Block<Io, kChannelsLast>(call).forward();
}
template <class Io, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, kBackwardBlocks<Io>)
    channel_gate_backward_kernel(const __grid_constant__ Call call) {
    Block<Io, kChannelsLast>(call).backward();
}

// One parameter's gradient: to[i, j] = sum over rows b, in order, of left[b, i] * activation(right[b, j]); the same of
// left2 and right2 is added where they are given. With groups > 1, of a grouped layer: columns i of a group of `left`
// meet the width_right columns j of the same group. Without `right` to[i] is the sum over rows of left[b, i]: threads
// of a block share the rows. left and right are rows of Acc with the given strides.
struct ParameterGrad {
    void* to = nullptr;
    int dtype = kFloat32;
    const void *left = nullptr, *right = nullptr;
    int64_t left_stride = 0, right_stride = 0, rows = 0;
    int width_left = 0, width_right = 1, activation = 0;
    const void *left2 = nullptr, *right2 = nullptr;
    int groups = 1;
};
struct ParameterGrads {
    static constexpr int kColumns = 32;  // of a block that only sums rows
    ParameterGrad of[8];
    int count = 0;

    // Blocks along x that serve the largest of them.
    int64_t blocks(int threads) const {
        int64_t most = 1;
        for (int i = 0; i < count; ++i) {
            const int64_t elements = int64_t(of[i].width_left) * of[i].width_right;
            const int a_block = of[i].right ? threads : kColumns;
            most = std::max(most, (elements + a_block - 1) / a_block);
        }
        return most;
    }
};

// The gradients of weight1, bias1, weight2, bias2, affine_weight, affine_bias (those wanted) after backward's
// kernel; target(which, grad) says where each goes.
template <class Target>
ParameterGrads parameter_grads(const Call& call, int64_t batch, int ranks, int64_t affine_rows, const bool (&wanted)[6],
                               Target target) {
    const bool two = call.layers == 2, both = call.pool == kBoth;
    const int64_t item = call.itemsize == 8 ? 8 : 4, width = call.state_width;
    const int channels = call.channels, hidden = call.hidden;
    const char* const state = static_cast<const char*>(call.state);
    const char* const z1 = state + 2 * channels * item;
    const char* const maximum = both ? z1 + hidden * item : nullptr;
    ParameterGrad all[6];
    all[0] = all[1] = {nullptr, 0, call.grad_z2, nullptr, channels, width, batch, channels};
    all[1].left2 = both ? call.grad_z2 : nullptr;
    if (two) {
        const char* const grad_z1 = static_cast<const char*>(call.grad_z1);
        all[0] = all[1] = {nullptr, 0, grad_z1, nullptr, (both ? 2 : 1) * hidden, width, batch, hidden};
        all[1].left2 = both ? grad_z1 + hidden * item : nullptr;
    }
    all[0].left2 = all[1].left2;
    all[0].right = state;
    all[0].right2 = maximum;
    all[0].width_right = channels;
    if (call.taps) {
        const char* const sums = static_cast<const char*>(call.tap_sums);
        all[0] = {nullptr, 0, sums, nullptr, call.taps + 1, 0, batch * ranks, call.taps};
        all[1] = {nullptr, 0, sums + call.taps * item, nullptr, call.taps + 1, 0, batch * ranks, 1};
    }
    all[2] = all[3] = {nullptr, 0, call.grad_z2, nullptr, channels, width, batch, channels};
    all[2].right = z1;
    all[2].right2 = both ? maximum + channels * item : nullptr;
    all[2].left2 = all[3].left2 = both ? call.grad_z2 : nullptr;
    all[2].width_right = hidden;
    all[2].activation = call.activation;
    all[4] = {nullptr, 0, call.affine_weight_sums, nullptr, channels, 0, affine_rows, channels};
    all[5] = {nullptr, 0, call.affine_bias_sums, nullptr, channels, 0, affine_rows, channels};
    ParameterGrads grads;
    for (int i = 0; i < 6; ++i) {
        if (!wanted[i]) continue;
        grads.of[grads.count] = all[i];
        target(i, grads.of[grads.count++]);
    }
    return grads;
}

// Reads state and scratch, writes the gradients of the parameters; grid (blocks, parameters).
template <class Acc>
__global__ void __launch_bounds__(256) parameter_grad_kernel(const __grid_constant__ ParameterGrads grads) {
    const ParameterGrad& g = grads.of[block_row()];
    const Acc *left = static_cast<const Acc*>(g.left), *right = static_cast<const Acc*>(g.right);
    const Acc *left2 = static_cast<const Acc*>(g.left2), *right2 = static_cast<const Acc*>(g.right2);
    const auto store = [&](int64_t i, Acc value) {
        const Small to{g.to, g.dtype};
        with_data(to, [&](auto* p) {
            using T = std::remove_const_t<Pointee<decltype(p)>>;
            if constexpr (std::is_same_v<T, double> || sizeof(Acc) == 4) {
                narrow(static_cast<std::conditional_t<std::is_same_v<T, double>, double, float>>(value),
                       static_cast<T*>(g.to)[i]);
            } else {
                narrow(static_cast<float>(value), static_cast<T*>(g.to)[i]);
            }
        });
    };
    if (right) {
        const int64_t i = block_index() * thread_count() + thread_rank();
        if (i >= int64_t(g.width_left) * g.width_right) return;
        const int64_t l = i / g.width_right;
        const int64_t r = i % g.width_right + l / (g.width_left / g.groups) * g.width_right;
        Acc sum = 0;
        left += l;
        right += r;
        if (left2) {
            left2 += l;
            right2 += r;
        }
#pragma unroll 4
        for (int64_t b = 0; b < g.rows; ++b) {
            sum += left[b * g.left_stride] * activate(g.activation, right[b * g.right_stride]);
            if (left2) sum += left2[b * g.left_stride] * activate(g.activation, right2[b * g.right_stride]);
        }
        store(i, sum);
        return;
    }
    constexpr int kColumns = ParameterGrads::kColumns;
    const int64_t column = block_index() * kColumns + thread_rank() % kColumns;
    const int teams = thread_count() / kColumns;
    if (block_index() * kColumns >= g.width_left) return;
    Acc* const fold = reinterpret_cast<Acc*>(shared_memory());
    Acc sum = 0;
    if (column < g.width_left) {
#pragma unroll 4
        for (int64_t b = thread_rank() / kColumns; b < g.rows; b += teams) {
            sum += left[b * g.left_stride + column];
            if (left2) sum += left2[b * g.left_stride + column];
        }
    }
    fold[thread_rank()] = sum;
    block_barrier();
    if (thread_rank() < kColumns && column < g.width_left) {
        for (int team = 1; team < teams; ++team) sum += fold[team * kColumns + thread_rank()];
        store(column, sum);
    }
}

}  // namespace fused_attn::cuda

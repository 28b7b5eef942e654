// Resident select: the M branch maps of one sample lie spread over the shared memory of a thread-block cluster, each
// as a map does in channel_gate.cuh.
//
// Forward: every branch is read once, into shared memory; the mean of their sum, the excitation and the choice among
// the branches stay on chip; y is written once: M + 1 passes. Backward: the branches and grad are resident, each read
// once; the M gradients are written once: 2M + 1 passes. Everything else that crosses global memory has a few values
// a channel.
//
// The image of a slice in shared memory is dense and aligned as y and grad are, whatever the branches' own pitch and
// alignment: a slice that is one such run is copied in bulk, rows of whole 16-byte pieces by pieces, others by
// elements.
#pragma once

#include "channel_gate.cuh"

namespace fused_attn::cuda {

// Branch maps in global memory: strides from sample to sample and, of channels_last, from position to position.
struct Branches {
    char* map[kMostPaths] = {};
    int64_t sample_stride[kMostPaths] = {}, pitch[kMostPaths] = {};
};

// What a launch is told beside the sample's Call, of which y and grad are dense maps, gate is a code of Selection, and
// state (B, C + H + M * C) has rows s (C), z1 (H), branch weights (M, C). Logits are rows (groups, M, C / groups).
struct SelectCall {
    Call sample;        // grad_z2: (B, M * C), as the logits; sums for the affine parameters: (.., M * C)
    Branches from, to;  // the branches, and their gradients
    int paths = 0, groups = 1;
    uint32_t tile = 0;
};
inline int state_width(const SelectCall& call) { return (call.paths + 1) * call.sample.channels + call.sample.hidden; }

template <class Io, bool kChannelsLast>
struct SelectBlock : Block<Io, kChannelsLast> {
    using Base = Block<Io, kChannelsLast>;
    using Acc = typename Base::Acc;
    using Lookup = typename Base::Lookup;
    using Base::at, Base::barrier, Base::bias, Base::bytes, Base::state, Base::table_size, Base::table_start;
    using Base::call, Base::shared, Base::rank, Base::ranks, Base::thread, Base::threads, Base::sample;
    using Base::first_channel, Base::first_row, Base::own, Base::rows;
    using Base::offset, Base::x, Base::grad, Base::head, Base::count;
    static constexpr int V = Base::V;

    const SelectCall& select;
    const int paths;

    __device__ __forceinline__ explicit SelectBlock(const SelectCall& s) : Base(s.sample), select(s), paths(s.paths) {}

    __device__ __forceinline__ char* image(int m) const { return x + m * select.tile; }
    // Branch m's of M tables, and of M arrays of the channels owned.
    __device__ __forceinline__ Acc* table(uint32_t place, int m) const {
        return at(place) + m * (kChannelsLast ? call.channels : call.carve.share);
    }
    __device__ __forceinline__ Acc* owned(uint32_t place, int m) const { return at(place) + m * call.carve.share; }
    __device__ __forceinline__ Acc* weights() const { return state() + call.channels + call.hidden; }
    // Channels and hidden values of a group; the first and the end of its channels among those owned.
    __device__ __forceinline__ int inner() const { return call.channels / select.groups; }
    __device__ __forceinline__ int width() const { return call.hidden / select.groups; }
    __device__ __forceinline__ int owned_from(int group) const {
        return min(max(group * inner() - first_channel, 0), own);
    }
    // The row of the logits, and of weight2, that is branch m of the i-th channel owned, in a group.
    __device__ __forceinline__ int64_t logit(int group, int m, int i) const {
        return (int64_t(group) * paths + m) * inner() + (first_channel + i - group * inner());
    }

    // A branch's slice in global memory, and how it lies there.
    enum Way { kRun, kPieces, kElements };
    struct Slice {
        char* map;
        int64_t gap;  // bytes from the end of a row to the next one
        Way way;
    };
    __device__ __forceinline__ Slice slice(const Branches& branches, int m) const {
        const int64_t pitch = branches.pitch[m];
        const int64_t before = kChannelsLast ? first_row * pitch : int64_t(first_channel) * call.spatial;
        Slice s;
        s.map = branches.map[m] + (sample * branches.sample_stride[m] + before) * call.itemsize;
        s.gap = kChannelsLast ? (pitch - call.channels) * call.itemsize : 0;
        const int misaligned = static_cast<int>(reinterpret_cast<uintptr_t>(s.map) % 16);
        const bool pieces = kChannelsLast && call.channels * call.itemsize % 16 == 0;
        s.way = misaligned == offset % 16 && s.gap == 0        ? kRun
                : pieces && misaligned == 0 && s.gap % 16 == 0 ? kPieces
                                                               : kElements;
        return s;
    }
    // Bytes that place i of a slice lies further than in a run.
    __device__ __forceinline__ int64_t gaps_before(const Slice& s, int i) const {
        return kChannelsLast ? call.channel_of.quotient(i) * s.gap : 0;
    }
    // Between a slice and its image, 16 or 2 bytes at a time.
    template <bool kLoad, class Unit>
    __device__ __forceinline__ void copy_units(const Slice& s, char* tile) const {
        const int shift = call.itemsize == 8 ? 3 : call.itemsize == 4 ? 2 : 1;
#pragma unroll 4
        for (uint32_t i = thread * sizeof(Unit); i < bytes(); i += threads * sizeof(Unit)) {
            Unit* const there = reinterpret_cast<Unit*>(s.map + gaps_before(s, static_cast<int>(i >> shift)) + i);
            Unit* const here = reinterpret_cast<Unit*>(tile + i);
            if constexpr (kLoad) {
                *here = read_map(there);
            } else {
                write_map(there, *here);
            }
        }
    }
    template <bool kLoad>
    __device__ __forceinline__ void copy(const Slice& s, char* tile) const {
        s.way == kPieces ? copy_units<kLoad, Words4>(s, tile) : copy_units<kLoad, uint16_t>(s, tile);
    }
    // Image m to its slice, unless a Typed kernel has written it by vectors.
    __device__ __forceinline__ void store(const Slice& s, char* tile) const {
        if (Io::kGeneral && s.way == kRun) return store_slice(tile - offset % 16, s.map, bytes());
        if (Io::kGeneral || s.way == kElements) copy<false>(s, tile);
    }

    // Reads the slices of the branches, and of grad, once; the tables of affine parameters meanwhile.
    __device__ __forceinline__ void load(const char* grad_map) const {
        uint32_t ragged;
        if (thread == 0) {
            uint32_t announced = grad_map ? whole_blocks(grad_map + offset, bytes(), ragged) : 0;
#pragma unroll 1
            for (int m = 0; m < paths; ++m) {
                const Slice s = slice(select.from, m);
                if (s.way == kRun) announced += whole_blocks(s.map, bytes(), ragged);
            }
            copies_begin(barrier(), announced);
        }
        if (grad_map) load_slice(barrier(), grad - offset % 16, grad_map + offset, bytes());
#pragma unroll 1
        for (int m = 0; m < paths; ++m) {
            const Slice s = slice(select.from, m);
            if (s.way == kRun) load_slice(barrier(), image(m) - offset % 16, s.map, bytes());
        }
#pragma unroll 1
        for (int m = 0; m < paths; ++m) {
            const Slice s = slice(select.from, m);
            if (s.way != kRun) copy<true>(s, image(m));
        }
        if (!call.affine_weight.data) return;
#pragma unroll 1
        for (int m = 0; m < paths; ++m) {
#pragma unroll 1
            for (int c = thread; c < table_size(); c += threads) {
                const int64_t from = int64_t(m) * call.channels + table_start() + c;
                table(call.carve.weight, m)[c] = value_at<Acc>(call.affine_weight, from);
                table(call.carve.bias, m)[c] = value_at<Acc>(call.affine_bias, from);
            }
        }
    }

    // The prologue: Typed kernels know no activation but ReLU.
    struct Affine {
        Acc weight = 1, bias = 0;
        __device__ __forceinline__ Acc operator()(Acc value) const { return value * weight + bias; }
    };
    __device__ __forceinline__ Affine affine_of(int m, int c) const {
        if (!call.affine_weight.data) return {};
        return {table(call.carve.weight, m)[c], table(call.carve.bias, m)[c]};
    }
    // Those of the V elements at a lookup's place.
    __device__ __forceinline__ void affine_of(const Lookup& lookup, int m, Affine (&affine)[V]) const {
        if (!call.affine_weight.data) return;
        Acc weight[V], bias_[V];
        lookup(table(call.carve.weight, m), weight);
        lookup(table(call.carve.bias, m), bias_);
#pragma unroll
        for (int e = 0; e < V; ++e) affine[e] = {weight[e], bias_[e]};
    }
    __device__ __forceinline__ bool has_prologue() const {
        return call.affine_weight.data || call.pre_activation != kIdentity;
    }
    __device__ __forceinline__ Acc activated(Acc before) const {
        if constexpr (Io::kGeneral) return activate(call.pre_activation, before);
        return call.pre_activation == kRelu && before <= 0 ? Acc(0) : before;
    }
    __device__ __forceinline__ Acc slope(Acc before) const {
        if constexpr (Io::kGeneral) return derivative(call.pre_activation, before);
        return call.pre_activation == kRelu && before <= 0 ? Acc(0) : Acc(1);
    }

    // Reductions over space, from shared memory. visit(part, branch, channel of the tables, its affine, value, grad)
    // adds an element; finish(branch, channel, part) gets the results, one thread each: with kExchange those of the
    // channels owned, over all blocks; else those of this slice's channels. Without kGrad channels_last has the sums
    // over all branches as branch 0. Only finish's results are ordered by a barrier that the caller adds.
    template <class Part, bool kGrad, bool kExchange, class Visit, class Finish>
    __device__ __forceinline__ void reduce(Visit visit, Finish finish) const {
        if constexpr (kChannelsLast) {
            const int copies = kGrad ? paths : 1;
            if (!Io::kGeneral && call.carve.piece == 4) {
                add_columns<Part, kGrad, Io::kGeneral ? 1 : 4>(copies, visit);
            } else {
                add_columns<Part, kGrad, 1>(copies, visit);
            }
            this->template merge_columns<Part, kExchange>(
                {call.channels, rows, call.carve.piece, call.carve.groups, first_channel, own, call.carve.part}, copies,
                finish);
        } else {
            add_rows<Part, kGrad>(visit, finish);
        }
    }
    // NCHW: some lanes of a warp a channel of a branch, by 16-byte blocks; those at its ends are shared with its
    // neighbours.
    template <class Part, bool kGrad, class Visit, class Finish>
    __device__ __forceinline__ void add_rows(Visit visit, Finish finish) const {
        int lanes = 1;
        while (lanes < 32 && lanes * V < call.spatial) lanes *= 2;
        const int a_warp = 32 / lanes, lane = thread % lanes, height = paths * own;
#pragma unroll 1
        for (int first = thread / 32 * a_warp; first < height; first += threads / 32 * a_warp) {
            const int r = first + thread % 32 / lanes, m = r / own, c = r - m * own;
            Part part;
            if (r < height) {
                const char* const tile = image(m);
                const Affine affine = affine_of(m, c);
                const int begin = c * call.spatial, end = begin + call.spatial;
#pragma unroll 1
                for (int i = begin - (begin + head) % V + lane * V; i < end; i += lanes * V) {
                    Acc values[V], grads[V] = {};
                    Io::load(call.dtype, tile, i, values);
                    if constexpr (kGrad) Io::load(call.dtype, grad, i, grads);
                    if (V == 1 || (i >= begin && i + V <= end)) {
#pragma unroll
                        for (int e = 0; e < V; ++e) visit(part, m, c, affine, values[e], grads[e]);
                    } else {
#pragma unroll
                        for (int e = 0; e < V; ++e)
                            if (i + e >= begin && i + e < end) visit(part, m, c, affine, values[e], grads[e]);
                    }
                }
            }
            merge_lanes(part, lanes);
            if (r < height && lane == 0) finish(m, c, part);
        }
    }
    // channels_last: threads (group g, branch or all of them, N neighbouring channels), rows g, g + groups, ...
    template <class Part, bool kGrad, int N, class Visit>
    __device__ __forceinline__ void add_columns(int copies, Visit visit) const {
        Part* const parts = reinterpret_cast<Part*>(shared + call.carve.part);
        const int columns = call.channels / N, groups = call.carve.groups;
#pragma unroll 1
        for (int item = thread; item < columns * copies * groups; item += threads) {
            const int run = item / columns, c = (item - run * columns) * N;
            const int group = run / copies, copy = run - group * copies;
            Part sums[N];
#pragma unroll 1
            for (int m = copy; m < (kGrad ? copy + 1 : paths); ++m) {
                const char* const tile = image(m);
                Affine affine[N];
#pragma unroll
                for (int e = 0; e < N; ++e) affine[e] = affine_of(m, c + e);
#pragma unroll 2
                for (int row = group; row < rows; row += groups) {
                    const int i = row * call.channels + c;
                    Acc values[N], grads[N] = {};
                    Io::load(call.dtype, tile, i, values);
                    if constexpr (kGrad) Io::load(call.dtype, grad, i, grads);
#pragma unroll
                    for (int e = 0; e < N; ++e) visit(sums[e], m, c + e, affine[e], values[e], grads[e]);
                }
            }
#pragma unroll
            for (int e = 0; e < N; ++e) parts[run * call.channels + c + e] = sums[e];
        }
    }

    // Descriptors of the channels owned, to shared memory and to state.
    __device__ __forceinline__ void squeeze() const {
        reduce<Sum<Acc>, false, true>(
            [&](Sum<Acc>& part, int, int, const Affine& affine, Acc value, Acc) {
                part.sum += activated(affine(value));
            },
            [&](int m, int c, const Sum<Acc>& part) { owned(call.carve.result, m)[c] = part.sum; });
        block_barrier();
#pragma unroll 1
        for (int c = thread; c < own; c += threads) {
            Acc sum = owned(call.carve.result, 0)[c];
#pragma unroll 1
            for (int m = 1; m < (kChannelsLast ? 1 : paths); ++m) sum += owned(call.carve.result, m)[c];
            at(call.carve.own)[c] = state()[first_channel + c] = sum / static_cast<Acc>(call.spatial);
        }
        block_barrier();
    }

    // Branch weights of the channels owned, to `result` and to state: one cluster barrier. The first layer is summed
    // over the blocks' columns.
    __device__ __forceinline__ void excite() const {
        Acc *const exchange = at(call.carve.exchange), *const hidden = at(call.carve.hidden);
#pragma unroll 1
        for (int g = 0; g < select.groups; ++g) {
            const int begin = owned_from(g), end = owned_from(g + 1), column = first_channel + begin - g * inner();
            this->product(call.weight1, width(), inner(), int64_t(g) * width() * inner() + column, end - begin,
                          at(call.carve.own) + begin, [&](int r, Acc sum) { exchange[g * width() + r] = sum; });
        }
        cluster_barrier();
#pragma unroll 1
        for (int h = thread; h < call.hidden; h += threads) {
            const Acc z1 = this->exchanged(h) + bias(call.bias1, h);
            if (rank == 0) state()[call.channels + h] = z1;
            hidden[h] = activate(call.activation, z1);
        }
        block_barrier();
#pragma unroll 1
        for (int g = 0; g < select.groups; ++g) {
            const int begin = owned_from(g), end = owned_from(g + 1);
#pragma unroll 1
            for (int m = 0; m < paths && begin < end; ++m) {
                const int64_t row = logit(g, m, begin);
                this->product(call.weight2, end - begin, width(), row * width(), width(), hidden + g * width(),
                              [&](int r, Acc sum) {
                                  owned(call.carve.result, m)[begin + r] =
                                      sum + bias(call.bias2, static_cast<int>(row + r));
                              });
            }
        }
        block_barrier();
#pragma unroll 1
        for (int c = thread; c < own; c += threads) choose(c);
    }
    // The logits of the c-th channel owned become its branch weights.
    __device__ __forceinline__ void choose(int c) const {
        Acc* const result = owned(call.carve.result, 0) + c;
        Acc scale = 1;
        if (call.gate == kSelectBySoftmax) {
            Acc peak = result[0], sum = 0;
#pragma unroll 1
            for (int m = 1; m < paths; ++m) peak = max(peak, result[m * call.carve.share]);
#pragma unroll 1
            for (int m = 0; m < paths; ++m)
                sum += result[m * call.carve.share] = exp(result[m * call.carve.share] - peak);
            scale = 1 / sum;
        }
#pragma unroll 1
        for (int m = 0; m < paths; ++m) {
            Acc& weight = result[m * call.carve.share];
            weight = call.gate == kSelectBySoftmax ? weight * scale : sigmoid(weight);
            weights()[m * call.channels + first_channel + c] = weight;
        }
    }

    __device__ __forceinline__ void forward() const {
        load(nullptr);
        this->wait();
        squeeze();
        excite();
        if (kChannelsLast) {
            cluster_barrier();
#pragma unroll 1
            for (int m = 0; m < paths; ++m)
                this->gather(call.carve.result + m * call.carve.share * static_cast<uint32_t>(sizeof(Acc)),
                             [&](int c, Acc value) { table(call.carve.gate, m)[c] = value; });
        }
        cluster_arrive();  // the last look into other blocks is behind us; none may leave before all have had it
        block_barrier();
        this->each_vector([&](int i) {
            const Lookup lookup(*this, i);
            Acc sums[V] = {};
#pragma unroll 1
            for (int m = 0; m < paths; ++m) {
                Acc values[V], gate[V];
                Affine affine[V];
                Io::load(call.dtype, image(m), i, values);
                affine_of(lookup, m, affine);
                lookup(table(call.carve.gate, m), gate);
#pragma unroll
                for (int e = 0; e < V; ++e) sums[e] += activated(affine[e](values[e])) * gate[e];
            }
            if constexpr (Io::kGeneral) {
                Io::store(call.dtype, x, i, sums);
            } else {
                Io::write(call.dtype, call.y + offset, i, count, sums);
            }
        });
        if (Io::kGeneral) {
            block_barrier();
            store_slice(x - offset % 16, call.y + offset, bytes());
        }
        cluster_wait();
    }

    // Gradients of the logits of the channels owned, from the dot products in `own`.
    __device__ __forceinline__ void choose_backward() const {
#pragma unroll 1
        for (int c = thread; c < own; c += threads) {
            Acc* const dots = at(call.carve.own) + c;
            const Acc* const weight = weights() + first_channel + c;
            const int group = (first_channel + c) / inner();
            Acc mean = 0;
            if (call.gate == kSelectBySoftmax)
#pragma unroll 1
                for (int m = 0; m < paths; ++m) mean += weight[m * call.channels] * dots[m * call.carve.share];
#pragma unroll 1
            for (int m = 0; m < paths; ++m) {
                const Acc a = weight[m * call.channels];
                Acc& g = dots[m * call.carve.share];
                g = a * (g - mean) * (call.gate == kSelectBySoftmax ? Acc(1) : 1 - a);
                static_cast<Acc*>(call.grad_z2)[sample * paths * call.channels + logit(group, m, c)] = g;
            }
        }
    }
    // Gradients of the descriptors owned, to `result`, from those of the logits owned.
    __device__ __forceinline__ void excite_backward() const {
        Acc *const exchange = at(call.carve.exchange), *const hidden = at(call.carve.hidden);
#pragma unroll 1
        for (int h = thread; h < call.hidden; h += threads) exchange[h] = 0;
        block_barrier();
#pragma unroll 1
        for (int g = 0; g < select.groups; ++g) {
            const int begin = owned_from(g), end = owned_from(g + 1);
#pragma unroll 1
            for (int m = 0; m < paths && begin < end; ++m)
                this->transposed_product(call.weight2, end - begin, width(), logit(g, m, begin) * width(), width(),
                                         owned(call.carve.own, m) + begin,
                                         [&](int i, Acc sum) { exchange[g * width() + i] += sum; });
        }
        cluster_barrier();
#pragma unroll 1
        for (int h = thread; h < call.hidden; h += threads) {
            hidden[h] = this->exchanged(h) * derivative(call.activation, state()[call.channels + h]);
            if (rank == 0) static_cast<Acc*>(call.grad_z1)[sample * call.hidden + h] = hidden[h];
        }
        block_barrier();
#pragma unroll 1
        for (int g = 0; g < select.groups; ++g) {
            const int begin = owned_from(g), end = owned_from(g + 1), column = first_channel + begin - g * inner();
            this->transposed_product(call.weight1, width(), inner(), int64_t(g) * width() * inner() + column,
                                     end - begin, hidden + g * width(),
                                     [&](int c, Acc sum) { at(call.carve.result)[begin + c] = sum; });
        }
    }

    __device__ __forceinline__ void backward() const {
        load(call.grad);
#pragma unroll 1
        for (int m = 0; m < paths; ++m)
#pragma unroll 1
            for (int c = thread; c < table_size(); c += threads)
                table(call.carve.gate, m)[c] = weights()[m * call.channels + table_start() + c];
        this->wait();
        reduce<Sum<Acc>, true, true>(
            [&](Sum<Acc>& part, int, int, const Affine& affine, Acc value, Acc grad_y) {
                part.sum += grad_y * activated(affine(value));
            },
            [&](int m, int c, const Sum<Acc>& part) { owned(call.carve.own, m)[c] = part.sum; });
        block_barrier();
        choose_backward();
        excite_backward();
        const auto spread = [&](int c, Acc g) { at(call.carve.mean)[c] = g / static_cast<Acc>(call.spatial); };
        if (kChannelsLast) {
            cluster_barrier();
            this->gather(call.carve.result, spread);
        } else {
            block_barrier();
#pragma unroll 1
            for (int c = thread; c < own; c += threads) spread(c, at(call.carve.result)[c]);
        }
        cluster_arrive();  // as in forward
        block_barrier();
        if (call.affine_weight.data) affine_backward();
#pragma unroll 1
        for (int m = 0; m < paths; ++m) write_gradient(m);
        cluster_wait();
    }
    // The gradient of branch m, by vectors where they lie so in global memory, else through the branch's image.
    __device__ __forceinline__ void write_gradient(int m) const {
        const Slice to = slice(select.to, m);
        this->each_vector([&](int i) {
            const Lookup lookup(*this, i);
            Acc grads[V], gate[V], mean[V];
            Io::load(call.dtype, grad, i, grads);
            lookup(table(call.carve.gate, m), gate);
            lookup(at(call.carve.mean), mean);
#pragma unroll
            for (int e = 0; e < V; ++e) grads[e] = grads[e] * gate[e] + mean[e];
            if (has_prologue()) {
                Acc values[V];
                Affine affine[V];
                Io::load(call.dtype, image(m), i, values);
                affine_of(lookup, m, affine);
#pragma unroll
                for (int e = 0; e < V; ++e) grads[e] *= slope(affine[e](values[e])) * affine[e].weight;
            }
            if constexpr (!Io::kGeneral) {
                if (to.way != kElements)
                    return Io::write(call.dtype, to.map + gaps_before(to, max(i, 0)), i, count, grads);
            }
            Io::store(call.dtype, image(m), i, grads);
        });
        block_barrier();
        store(to, image(m));
    }
    // Sums for the gradients of the affine parameters, from shared memory to this slice's row of scratch.
    __device__ __forceinline__ void affine_backward() const {
        const int64_t row = (kChannelsLast ? sample * ranks + rank : sample) * paths * call.channels + table_start();
        reduce<TwoSums<Acc>, true, false>(
            [&](TwoSums<Acc>& part, int m, int c, const Affine& affine, Acc value, Acc grad_y) {
                const Acc u = grad_y * table(call.carve.gate, m)[c] + at(call.carve.mean)[c];
                const Acc g = u * slope(affine(value));
                part.merge({g * value, g});
            },
            [&](int m, int c, const TwoSums<Acc>& part) {  // channels_last: c runs over the channels of all branches
                static_cast<Acc*>(call.affine_weight_sums)[row + m * call.channels + c] = part.first;
                static_cast<Acc*>(call.affine_bias_sums)[row + m * call.channels + c] = part.second;
            });
        block_barrier();  // what follows overwrites the branches
    }
};

template <class Io, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 1) select_kernel(const __grid_constant__ SelectCall call) {
    SelectBlock<Io, kChannelsLast>(call).forward();
}
template <class Io, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 1) select_backward_kernel(const __grid_constant__ SelectCall call) {
    SelectBlock<Io, kChannelsLast>(call).backward();
}

// The gradients of weight1, bias1, weight2, bias2, affine_weight, affine_bias (those wanted) after backward's kernel.
template <class Target>
ParameterGrads parameter_grads(const SelectCall& select, int64_t batch, int64_t affine_rows, const bool (&wanted)[6],
                               Target target) {
    const Call& call = select.sample;
    const int64_t item = call.itemsize == 8 ? 8 : 4, width = call.state_width;
    const int channels = call.channels, hidden = call.hidden, logits = select.paths * channels;
    const char* const state = static_cast<const char*>(call.state);
    ParameterGrad all[6];
    all[0] = all[1] = {nullptr, 0, call.grad_z1, nullptr, hidden, width, batch, hidden};
    all[0].right = state;
    all[0].width_right = channels / select.groups;
    all[2] = all[3] = {nullptr, 0, call.grad_z2, nullptr, logits, width, batch, logits};
    all[2].right = state + channels * item;
    all[2].width_right = hidden / select.groups;
    all[2].activation = call.activation;
    all[0].groups = all[2].groups = select.groups;
    all[4] = {nullptr, 0, call.affine_weight_sums, nullptr, logits, 0, affine_rows, logits};
    all[5] = {nullptr, 0, call.affine_bias_sums, nullptr, logits, 0, affine_rows, logits};
    ParameterGrads grads;
    for (int i = 0; i < 6; ++i) {
        if (!wanted[i]) continue;
        grads.of[grads.count] = all[i];
        target(i, grads.of[grads.count++]);
    }
    return grads;
}

}  // namespace fused_attn::cuda

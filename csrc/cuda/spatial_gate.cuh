// Resident spatial gate and CBAM: one sample lies spread over the shared memory of a thread-block cluster, as in
// channel_gate.cuh.
//
// Forward: x is read once, into shared memory; CBAM gates its channels there (pools over space, excitation); then it
// is pooled over its channels, the two maps of maxima and means are convolved to one, and gated; y is written once: 2
// passes, and one more for a residual. Backward: x and grad are both resident: 3 passes; an epilogue reads y (ReLU)
// or the residual and writes grad_residual: 5. Everything else that crosses global memory has a few values a
// position or a channel. What CBAM's channel gate hands to its spatial gate exists only in registers.
//
// A block owns `share` neighbouring positions, whose pools, logit and gate it computes. In channels_last they are the
// rows that it holds. In NCHW it holds some channels at all positions: partial pools over the channels meet through
// the cluster's shared memory where a position is owned, and its gate goes back the same way. The convolution needs
// a window of pools beyond the positions owned; what other blocks own of it is read from them (halo). Sums are kept
// in Acc and added in an order that depends on the cluster size alone.
#pragma once

#include "channel_gate.cuh"

namespace fused_attn::cuda {

// What a launch is told beside the sample's Call, whose gate and state are CBAM's channel gate.
struct SpaceCall {
    Call sample;
    Grid grid;
    SpaceCarve carve;
    Small weight, bias;        // (2, taps) in the caller's order of maximum and mean; (1)
    void* state = nullptr;     // (B, 3, P) of Acc: maximum, mean, logit
    int32_t* index = nullptr;  // (B, P): the maximum's channel, or how many equal it
    void* tap_sums = nullptr;  // (B * ranks, 2 * taps + 1) of Acc: parts of the gradients of weight and bias
    int mean_first = 0, ties = 0, gate = 0;
};

template <class Io, bool kChannelsLast>
struct SpaceBlock : Block<Io, kChannelsLast> {
    using Base = Block<Io, kChannelsLast>;
    using Acc = typename Base::Acc;
    using Base::at, Base::affine, Base::prologue, Base::table_start;
    using Base::call, Base::shared, Base::rank, Base::ranks, Base::thread, Base::threads, Base::sample;
    using Base::own, Base::rows, Base::first_row, Base::offset, Base::x, Base::grad, Base::count;
    static constexpr int N = Io::kGeneral ? 1 : 4;  // elements a step, where rows are aligned to so many

    const SpaceCall& space;
    const bool gated;         // CBAM: channels too
    int first_place, places;  // the positions owned

    __device__ __forceinline__ explicit SpaceBlock(const SpaceCall& s)
        : Base(s.sample), space(s), gated(s.sample.carve.gate != 0) {
        first_place = min(rank * space.carve.share, call.spatial);
        places = min(space.carve.share, call.spatial - first_place);
    }

    // The sample's rows of state and index.
    __device__ __forceinline__ Acc* maxima() const {
        return static_cast<Acc*>(space.state) + sample * 3 * call.spatial;
    }
    __device__ __forceinline__ Acc* means() const { return maxima() + call.spatial; }
    __device__ __forceinline__ Acc* logits() const { return maxima() + 2 * call.spatial; }
    __device__ __forceinline__ int32_t* tags() const { return space.index + sample * call.spatial; }
    __device__ __forceinline__ int* ints(uint32_t place) const { return reinterpret_cast<int*>(shared + place); }
    __device__ __forceinline__ Acc* window(int map) const { return at(space.carve.window) + map * space.carve.length; }

    // Value `position` of an array over all positions, of which every block has its own at `place`.
    __device__ __forceinline__ Acc of_owner(uint32_t place, int position) const {
        const int owner = position / space.carve.share;
        return *of_rank(at(place) + (position - owner * space.carve.share), owner);
    }

    // Tables that need no map, while the copies run: the convolution's, and empty windows.
    __device__ __forceinline__ void prepare(int maps) const {
        const int taps = space.grid.taps();
#pragma unroll 1
        for (int t = thread; t < 2 * taps; t += threads) {  // the caller's order to maximum, mean
            at(space.carve.weights)[t] = value_at<Acc>(space.weight, space.mean_first ? (t + taps) % (2 * taps) : t);
            if (t < taps) ints(space.carve.offsets)[t] = space.grid.offset(t);
        }
#pragma unroll 1
        for (int p = thread; p < places; p += threads)
            ints(space.carve.places)[p] = space.grid.place(first_place + p) - space.grid.place(first_place);
#pragma unroll 1
        for (int i = thread; i < maps * space.carve.length; i += threads) window(0)[i] = 0;
    }
    // value(map, position) to the windows' places around the positions owned.
    template <class Value>
    __device__ __forceinline__ void fill_windows(int maps, Value value) const {
        if (places == 0) return;
        const int begin = space.grid.place(first_place) - space.grid.shift(), halo = space.grid.halo();
        const int last = min(first_place + places + halo, call.spatial);
#pragma unroll 1
        for (int p = max(first_place - halo, 0) + thread; p < last; p += threads) {
            const int to = space.grid.place(p) - begin;
            if (to < 0 || to >= space.carve.length) continue;
            for (int m = 0; m < maps; ++m) window(m)[to] = value(m, p);
        }
    }
    // finish(place, the sum over the taps of visit(part, tap, place in the windows)) for the positions owned:
    // neighbouring lanes share a position.
    template <class Part, class Visit, class Finish>
    __device__ __forceinline__ void convolve(Visit visit, Finish finish) const {
        const int taps = space.grid.taps();
        int lanes = 1;
        while (lanes < 32 && 2 * lanes * space.carve.share <= threads) lanes *= 2;
        const int a_warp = 32 / lanes, lane = thread % lanes;
#pragma unroll 1
        for (int first = thread / 32 * a_warp; first < places; first += threads / 32 * a_warp) {
            const int p = first + thread % 32 / lanes;
            Part part;
            if (p < places) {
                const int from = ints(space.carve.places)[p];
#pragma unroll 4
                for (int t = lane; t < taps; t += lanes) visit(part, t, from);
            }
            merge_lanes(part, lanes);
            if (p < places && lane == 0) finish(p, part);
        }
    }

    // One reduction over channels for each position owned: visit(part, channel of the tables, x, grad, gate of the
    // channel), finish(place, part). One cluster barrier in NCHW.
    template <class Part, bool kGrad, class Visit, class Finish>
    __device__ __forceinline__ void reduce_channels(Visit visit, Finish finish) const {
        const Acc* const gates = gated ? at(call.carve.gate) : nullptr;
        if constexpr (kChannelsLast) {
            const auto element = [&](Part& part, int, int c, int, Acc value, Acc grad_y, Acc gate) {
                visit(part, c, value, grad_y, gated ? gate : Acc(1));
            };
            this->template reduce_rows<Part, kGrad>(rows, call.channels, gates, element, finish);
        } else {
            const auto element = [&](Part& part, int c, int, int, Acc value, Acc grad_y, Acc) {
                visit(part, c, value, grad_y, gated ? gates[c] : Acc(1));
            };
            this->template reduce_columns<Part, kGrad, true>(
                {call.spatial, own, space.carve.piece, space.carve.groups, first_place, places, space.carve.parts},
                element, finish);
        }
    }

    // What an element needs of its channel, or of its position: the gate, what the pools pass to it through the mean
    // and the maximum, and the maximum or where it is (of a channel: its place in the slice; of a position: its
    // channel of the tables).
    struct Axis {
        Acc gate = 1, mean = 0, top = 0, peak = 0;
        int index = 0;
    };
    __device__ __forceinline__ Axis channel_axis(int c) const {
        Axis axis;
        if (gated) {
            axis.gate = at(call.carve.gate)[c];
            axis.mean = at(call.carve.mean)[c];
            if (call.pool != kAvg) {
                axis.top = at(call.carve.top)[c];
                if (call.ties == kEven) {
                    axis.peak = at(call.carve.top_at)[c];
                } else {
                    axis.index = this->at_places()[c];
                }
            }
        }
        return axis;
    }
    // `p`: of the slice, that is of the positions owned in channels_last.
    __device__ __forceinline__ Axis place_axis(int p) const {
        Axis axis;
        if constexpr (kChannelsLast) {
            axis.gate = at(space.carve.gate)[p];
            axis.mean = at(space.carve.mean)[p];
            axis.top = at(space.carve.top)[p];
            if (space.ties == kEven) {
                axis.peak = at(space.carve.top_at)[p];
            } else {
                axis.index = ints(space.carve.top_at)[p];
            }
        } else {
            axis.gate = activate(space.gate, logits()[p]);
            axis.mean = of_owner(space.carve.mean, p);
            axis.top = of_owner(space.carve.top, p);
            if (space.ties == kEven) {
                axis.peak = maxima()[p];
            } else {
                axis.index = tags()[p] - table_start();
            }
        }
        return axis;
    }
    static __device__ __forceinline__ Acc share(int ties, bool hit, Acc top) {  // see Block::top_share
        return ties == kEven ? (hit ? Acc(1) : Acc(0)) * top : hit ? top : Acc(0);
    }
    // The gradient of u * gate of the channel.
    __device__ __forceinline__ Acc grad_gated(int c, const Axis& channel, const Axis& place, Acc u, Acc grad_y) const {
        const Acc v = Io::rounded(call.dtype, u * channel.gate);
        const bool hit = space.ties == kEven ? v == place.peak : c == place.index;
        return grad_y * place.gate + place.mean + share(space.ties, hit, place.top);
    }
    // The gradient of u, that lies at `i` of the slice.
    __device__ __forceinline__ Acc grad_of(int c, int i, const Axis& channel, const Axis& place, Acc u,
                                           Acc grad_y) const {
        Acc g = grad_gated(c, channel, place, u, grad_y);
        if (gated) {
            g = g * channel.gate + channel.mean;
            if (call.pool != kAvg) {
                const bool hit = call.ties == kEven ? Io::rounded(call.dtype, u) == channel.peak : i == channel.index;
                g += share(call.ties, hit, channel.top);
            }
        }
        return g;
    }

    // body(row, place in the slice, axis[W]) for all of the slice, W neighbours at a time: a thread keeps what load(e)
    // says of its columns (positions in NCHW, channels in channels_last) while all rows pass by.
    template <int W, class Load, class Body>
    __device__ __forceinline__ void walk(Load load, Body body) const {
        const int width = kChannelsLast ? call.channels : call.spatial, height = kChannelsLast ? rows : own;
        const int columns = width / W;
        if (columns == 0 || height == 0) return;
        const int groups = max(1, threads / columns);
#pragma unroll 1
        for (int item = thread; item < columns * groups; item += threads) {
            const int group = item / columns, c = item % columns * W;
            decltype(load(0)) axis[W];
#pragma unroll
            for (int e = 0; e < W; ++e) axis[e] = load(c + e);
#pragma unroll 1
            for (int row = group; row < height; row += groups) body(row, c, row * width + c, axis);
        }
    }
    // Rows of the slice, and so all its vectors, are aligned to N elements.
    __device__ __forceinline__ bool aligned() const {
        return N > 1 && (kChannelsLast ? call.channels : call.spatial) % N == 0;
    }
    // W results for place i: to global memory where rows are aligned, else to the slice's place of x.
    template <int W>
    __device__ __forceinline__ void emit(char* map, int i, const Acc (&values)[W]) const {
        if constexpr (W > 1) {
            Io::template write_some<W>(map + offset, i, values);
        } else {
            Io::store(call.dtype, x, i, values);
        }
    }
    __device__ __forceinline__ void emitted(char* map) const {
        if (aligned()) return;
        block_barrier();
        store_slice(x - offset % 16, map + offset, this->bytes());
    }

    template <int W>
    __device__ __forceinline__ void scale() const {
        const auto gate_of_place = [&](int p) {
            return kChannelsLast ? at(space.carve.gate)[p] : of_owner(space.carve.gate, p);
        };
        const auto gate_of_channel = [&](int c) { return gated ? at(call.carve.gate)[c] : Acc(1); };
        walk<W>([&](int column) { return kChannelsLast ? gate_of_channel(column) : gate_of_place(column); },
                [&](int row, int column, int i, const Acc(&gates)[W]) {
                    Acc values[W], residual[W] = {};
                    if (call.residual) Io::template read_some<W>(call.dtype, call.residual + offset, i, residual);
                    Io::load(call.dtype, x, i, values);
                    const Acc gate = kChannelsLast ? gate_of_place(row) : gate_of_channel(row);
#pragma unroll
                    for (int e = 0; e < W; ++e) {
                        const Acc u = prologue(values[e], kChannelsLast ? column + e : row);
                        values[e] = kChannelsLast ? u * gates[e] * gate : u * gate * gates[e];
                        values[e] += residual[e];
                        if (call.post_activation != kIdentity)
                            values[e] = activate(Io::kGeneral ? call.post_activation : kRelu, values[e]);
                    }
                    emit<W>(call.y, i, values);
                });
    }

    template <bool kEven_>
    __device__ __forceinline__ void pool() const {
        using Part = Peak<Acc, kEven_>;
        reduce_channels<Part, false>(
            [&](Part& part, int c, Acc value, Acc, Acc gate) {
                const Acc v = prologue(value, c) * gate;
                const Acc stored = Io::rounded(call.dtype, v);
                part.merge(Part{v, stored, kEven_ ? (stored == stored) : table_start() + c});
            },
            [&](int p, const Part& part) {
                Acc* const pooled = at(space.carve.pooled);
                const Acc mean = part.sum / static_cast<Acc>(call.channels);
                maxima()[first_place + p] = pooled[p] = part.peak;
                means()[first_place + p] = pooled[space.carve.share + p] = mean;
                tags()[first_place + p] = part.index;
            });
    }

    __device__ __forceinline__ void forward() const {
        this->load(call.x, nullptr);
        prepare(2);
        this->wait();
        if (gated) {
            this->gate_channels();
            block_barrier();
        }
        if (space.ties == kEven) {
            pool<true>();
        } else {
            pool<false>();
        }
        cluster_barrier();
        fill_windows(2, [&](int map, int p) {
            const int owner = p / space.carve.share;
            const Acc* const theirs = at(space.carve.pooled) + (p - owner * space.carve.share);
            return *of_rank(theirs + map * space.carve.share, owner);
        });
        if (kChannelsLast) cluster_arrive();  // the last look into other blocks; none may leave before all had it
        block_barrier();
        const Acc *const weights = at(space.carve.weights), bias = this->bias(space.bias, 0);
        const int taps = space.grid.taps();
        convolve<Sum<Acc>>(
            [&](Sum<Acc>& part, int t, int from) {
                const int i = from + ints(space.carve.offsets)[t];
                part.sum += weights[t] * window(0)[i] + weights[taps + t] * window(1)[i];
            },
            [&](int p, const Sum<Acc>& part) {
                const Acc logit = part.sum + bias;
                logits()[first_place + p] = logit;
                at(space.carve.gate)[p] = activate(space.gate, logit);
            });
        if (kChannelsLast) {
            block_barrier();
        } else {
            cluster_barrier();
        }
        if (aligned()) {
            scale<N>();
        } else {
            scale<1>();
        }
        if (!kChannelsLast) cluster_arrive();
        emitted(call.y);
        cluster_wait();
    }

    // grad becomes the gradient before an epilogue that is recomputed, in shared memory and as grad_residual.
    __device__ __forceinline__ void recomputed_epilogue_backward() const {
        const auto gate_of_place = [&](int p) {
            return kChannelsLast ? at(space.carve.gate)[p] : activate(space.gate, logits()[p]);
        };
        const auto gate_of_channel = [&](int c) { return gated ? at(call.carve.gate)[c] : Acc(1); };
        walk<1>([&](int column) { return kChannelsLast ? gate_of_channel(column) : gate_of_place(column); },
                [&](int row, int column, int i, const Acc(&gates)[1]) {
                    Acc values[1], grads[1], residual[1] = {};
                    if (call.residual) Io::template read_some<1>(call.dtype, call.residual + offset, i, residual);
                    Io::load(call.dtype, x, i, values);
                    Io::load(call.dtype, grad, i, grads);
                    const Acc u = prologue(values[0], kChannelsLast ? column : row);
                    const Acc gate = kChannelsLast ? gate_of_place(row) : gate_of_channel(row);
                    grads[0] *= derivative(call.post_activation, u * gates[0] * gate + residual[0]);
                    Io::store(call.dtype, grad, i, grads);
                });
        block_barrier();
        store_slice(grad - offset % 16, call.grad_residual + offset, this->bytes());
    }

    // One reduction over space for each channel: visit(part, channel of the tables, place in the slice, position's
    // axis, x, grad); finish as in Block::reduce. NCHW: the lanes of a warp hold positions, and all channels pass by.
    template <class Part, bool kExchange, class Visit, class Finish>
    __device__ __forceinline__ void reduce_space(Visit visit, Finish finish) const {
        if constexpr (kChannelsLast) {
            this->template reduce<Part, true, kExchange>(
                [&](Part& part, int c, int i, int position, Acc value, Acc grad_y) {
                    visit(part, c, i, place_axis(position - first_row), value, grad_y);
                },
                finish);
        } else {
            Part* const sums = reinterpret_cast<Part*>(shared + space.carve.team_sums);
            if (aligned()) {
                reduce_teams<Part, N>(sums, visit);
            } else {
                reduce_teams<Part, 1>(sums, visit);
            }
            block_barrier();
            const int teams = call.spatial == 0 ? 0 : space.carve.teams;
#pragma unroll 1
            for (int c = thread; c < own; c += threads) {
                Part part;
                for (int t = 0; t < teams; ++t) part.merge(sums[t * own + c]);
                finish(c, part);
            }
        }
    }
    template <class Part, int W, class Visit>
    __device__ __forceinline__ void reduce_teams(Part* sums, Visit visit) const {
        const int columns = call.spatial / W, teams = space.carve.teams;
        int lanes = 1;
        while (lanes < 32 && lanes < columns) lanes *= 2;
        const int groups = threads / lanes / teams, lane = thread % lanes;
        const int group = thread / lanes / teams, team = thread / lanes % teams;
        if (group >= groups) return;  // whole warps
        for (int first = team * lanes; first < columns; first += teams * lanes) {
            const bool inside = first + lane < columns;
            const int p = (first + lane) * W;
            Axis axis[W];
            if (inside) {
#pragma unroll
                for (int e = 0; e < W; ++e) axis[e] = place_axis(p + e);
            }
#pragma unroll 1
            for (int row = 0; row < own; row += groups) {
                const int c = row + group;
                Part part;
                if (inside && c < own) {
                    const int i = c * call.spatial + p;
                    Acc values[W], grads[W];
                    Io::load(call.dtype, x, i, values);
                    Io::load(call.dtype, grad, i, grads);
#pragma unroll
                    for (int e = 0; e < W; ++e) visit(part, c, i + e, axis[e], values[e], grads[e]);
                }
                merge_lanes(part, lanes);
                if (lane == 0 && c < own) {
                    Part& sum = sums[team * own + c];
                    if (first != team * lanes) part.merge(sum);
                    sum = part;
                }
            }
        }
    }

    // Back through the gate and the convolution: what the pools over channels pass on, for the positions owned; and
    // this block's part of the taps' gradients.
    __device__ __forceinline__ void gate_places_backward() const {
        reduce_channels<Sum<Acc>, true>([&](Sum<Acc>& part, int c, Acc value, Acc grad_y,
                                            Acc gate) { part.sum += grad_y * (prologue(value, c) * gate); },
                                        [&](int p, const Sum<Acc>& part) {
                                            at(space.carve.grad)[p] =
                                                part.sum * derivative(space.gate, logits()[first_place + p]);
                                        });
        cluster_barrier();
        fill_windows(3, [&](int map, int p) {
            return map == 0 ? maxima()[p] : map == 1 ? means()[p] : of_owner(space.carve.grad, p);
        });
        if (kChannelsLast && !gated) cluster_arrive();  // as in forward
        block_barrier();
        const Acc* const weights = at(space.carve.weights);
        const int* const offsets = ints(space.carve.offsets);
        const int taps = space.grid.taps(), reach = 2 * space.grid.shift();
        convolve<TwoSums<Acc>>(
            [&](TwoSums<Acc>& part, int t, int from) {
                const Acc g = window(2)[from + reach - offsets[t]];
                part.merge({weights[t] * g, weights[taps + t] * g});
            },
            [&](int p, const TwoSums<Acc>& part) {
                const int equal = tags()[first_place + p];
                at(space.carve.mean)[p] = part.second / static_cast<Acc>(call.channels);
                at(space.carve.top)[p] = space.ties == kEven ? part.first / static_cast<Acc>(equal) : part.first;
            });
        // A warp a tap, and one for the bias.
        Acc* const sums = static_cast<Acc*>(space.tap_sums) + (sample * ranks + rank) * (2 * taps + 1);
#pragma unroll 1
        for (int t = thread / 32; t <= taps; t += threads / 32) {
            TwoSums<Acc> part;
#pragma unroll 1
            for (int p = thread % 32; p < places; p += 32) {
                const int i = ints(space.carve.places)[p] + (t < taps ? offsets[t] : 0);
                const Acc g = at(space.carve.grad)[p];
                part.merge({t < taps ? g * window(0)[i] : g, g * window(1)[i]});
            }
            merge_lanes(part, 32);
            if (thread % 32 == 0) {
                sums[t == taps ? 2 * taps : space.mean_first ? taps + t : t] = part.first;
                if (t < taps) sums[space.mean_first ? t : taps + t] = part.second;
            }
        }
        if (kChannelsLast) {
            block_barrier();
        } else {
            cluster_barrier();
        }
    }

    template <int W>
    __device__ __forceinline__ void spread() const {
        walk<W>([&](int column) { return kChannelsLast ? channel_axis(column) : place_axis(column); },
                [&](int row, int column, int i, const Axis(&axis)[W]) {
                    Acc values[W], grads[W];
                    Io::load(call.dtype, x, i, values);
                    Io::load(call.dtype, grad, i, grads);
                    const Axis other = kChannelsLast ? place_axis(row) : channel_axis(row);
#pragma unroll
                    for (int e = 0; e < W; ++e) {
                        const Axis &channel = kChannelsLast ? axis[e] : other, &place = kChannelsLast ? other : axis[e];
                        const int c = kChannelsLast ? column + e : row;
                        const Acc before = affine(values[e], c), u = prologue(values[e], c);
                        values[e] = grad_of(c, i + e, channel, place, u, grads[e]);
                        if constexpr (Io::kGeneral) {
                            values[e] *= derivative(call.pre_activation, before);
                            if (call.affine_weight.data) values[e] *= at(call.carve.weight)[c];
                        }
                    }
                    emit<W>(call.grad_x, i, values);
                });
    }

    __device__ __forceinline__ void backward() const {
        this->load(call.x, call.grad);
        prepare(3);
        if (gated) this->prepare_backward();
        if constexpr (kChannelsLast) {
#pragma unroll 1
            for (int p = thread; p < places; p += threads) {
                at(space.carve.gate)[p] = activate(space.gate, logits()[first_place + p]);
                if (space.ties == kEven) {
                    at(space.carve.top_at)[p] = maxima()[first_place + p];
                } else {
                    ints(space.carve.top_at)[p] = tags()[first_place + p];
                }
            }
        }
        this->wait();
        if (call.y_saved) {
            this->epilogue_backward();
        } else if (Io::kGeneral && call.post_activation != kIdentity) {
            recomputed_epilogue_backward();
        }
        gate_places_backward();
        if (gated) {
            reduce_space<Sum<Acc>, true>(
                [&](Sum<Acc>& part, int c, int, const Axis& place, Acc value, Acc grad_y) {
                    Axis channel;
                    channel.gate = at(call.carve.gate)[c];
                    const Acc u = prologue(value, c);
                    part.sum += u * grad_gated(c, channel, place, u, grad_y);
                },
                [&](int c, const Sum<Acc>& part) { this->set_grad_gate(c, part.sum); });
            this->gate_channels_backward();
            if (kChannelsLast) cluster_arrive();  // as in forward
            block_barrier();
        }
        if (Io::kGeneral && call.affine_weight.data) {
            reduce_space<TwoSums<Acc>, false>(
                [&](TwoSums<Acc>& part, int c, int i, const Axis& place, Acc value, Acc grad_y) {
                    const Acc before = affine(value, c), u = activate(call.pre_activation, before);
                    const Acc g =
                        grad_of(c, i, channel_axis(c), place, u, grad_y) * derivative(call.pre_activation, before);
                    part.merge({g * value, g});
                },
                [&](int c, const TwoSums<Acc>& part) { this->set_affine_sums(c, part); });
            block_barrier();  // what follows overwrites x
        }
        if (aligned()) {
            spread<N>();
        } else {
            spread<1>();
        }
        if (!kChannelsLast) cluster_arrive();
        emitted(call.grad_x);
        cluster_wait();
    }
};

template <class Io, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 1) space_kernel(const __grid_constant__ SpaceCall call) {
    SpaceBlock<Io, kChannelsLast>(call).forward();
}
template <class Io, bool kChannelsLast>
__global__ void __launch_bounds__(kThreads, 1) space_backward_kernel(const __grid_constant__ SpaceCall call) {
    SpaceBlock<Io, kChannelsLast>(call).backward();
}

// The gradients of all parameters after backward's kernel, the spatial ones last: weight1, bias1, weight2, bias2,
// affine_weight, affine_bias, and the convolution's weight and bias.
template <class Target>
ParameterGrads parameter_grads(const SpaceCall& call, int64_t batch, int ranks, int64_t affine_rows,
                               const bool (&wanted)[8], Target target) {
    bool of_sample[6];
    std::copy_n(wanted, 6, of_sample);
    ParameterGrads grads = parameter_grads(call.sample, batch, ranks, affine_rows, of_sample, target);
    const int item = call.sample.itemsize == 8 ? 8 : 4, taps = 2 * call.grid.taps();
    for (int i = 6; i < 8; ++i) {
        if (!wanted[i]) continue;
        ParameterGrad& grad = grads.of[grads.count++];
        grad.left = static_cast<const char*>(call.tap_sums) + (i == 7 ? taps * item : 0);
        grad.left_stride = taps + 1;
        grad.rows = batch * ranks;
        grad.width_left = i == 7 ? 1 : taps;
        target(i, grad);
    }
    return grads;
}

}  // namespace fused_attn::cuda

// What decides whether a sample is resident: how a block's shared memory is laid out, and over how many blocks a sample
// is spread. Plain C++, so that it can be asked where nothing is compiled for a GPU (csrc/fit.cpp).
#pragma once

#include <algorithm>
#include <cstdint>

#include "../codes.h"

namespace fused_attn::cuda {

constexpr int kThreads = 512;

// Larger maps and kernels are never resident; below, the sizes of a sample are an int's.
constexpr int64_t kMostChannels = (1 << 22) - 1, kMostPositions = (1 << 30) - 1, kMostTaps = (1 << 15) - 1;

// What decides whether, and over how many blocks, a sample is resident.
struct Extent {
    int channels = 0, spatial = 0, hidden = 0, layers = 0, layer = 0;  // layers: 0, 1 or 2; hidden: only of 2
    int pool = 0, itemsize = 4;
    bool channels_last = false, affine = false, backward = false;
    bool general = false;  // see is_general
    int threads = kThreads;
    bool gated = true;  // false: for a block that gates positions only

    int acc() const { return itemsize == 8 ? 8 : 4; }
    int branches() const { return pool == kBoth ? 2 : 1; }
};
// Whether kernels take the elements one by one, through codes: of a gate, of select.
inline bool is_general(int itemsize, bool affine, int64_t pre_activation, int64_t post_activation) {
    return itemsize == 8 || affine || pre_activation != kIdentity ||
           (post_activation != kIdentity && post_activation != kRelu);
}
inline bool is_general_selection(int itemsize, int64_t pre_activation) {
    return itemsize == 8 || (pre_activation != kIdentity && pre_activation != kRelu);
}

// Where things lie in a block's shared memory (byte offsets; each a multiple of 16).
struct Carve {
    int share = 0, rows = 0;    // channels owned and rows held by a block
    int piece = 1, groups = 1;  // channels_last sums: neighbouring channels a thread, threads a channel
    uint32_t x = 0, grad = 0;   // the slices
    uint32_t part = 0;          // (groups, C) partial sums over rows; row 0 is read by the cluster
    // With both pools twice: of the averages, then of the maxima.
    uint32_t own = 0;             // (share) descriptors; backward: gradients of the gate's logits (once)
    uint32_t exchange = 0;        // (H or C) partial products of a dense layer, read by the cluster
    uint32_t hidden = 0;          // (H) hidden activations; backward: gradients of hidden logits
    uint32_t everyone = 0;        // (C) all blocks' `own`, for a convolution over channels (once: their sum)
    uint32_t result = 0;          // (share) gates (once); backward: gradients of descriptors
    uint32_t gate = 0, mean = 0;  // tables of the slice's channels: the gate; what each element's gradient
    uint32_t top = 0,
             top_at = 0;            //   gets through the mean; what the maximum gets and where (or which) it is
    uint32_t weight = 0, bias = 0;  //   affine parameters
    uint32_t fold = 0;              // (threads) partial sums of a transposed product; lies last
    uint32_t bytes = 0;
};

inline Carve carve(const Extent& e, int ranks) {
    Carve c;
    const int acc = e.acc();
    c.share = (e.channels + ranks - 1) / ranks;
    c.rows = (e.spatial + ranks - 1) / ranks;
    const int64_t elements = e.channels_last ? int64_t(c.rows) * e.channels : int64_t(c.share) * e.spatial;
    if (elements * e.itemsize > (1 << 20)) {  // beyond any shared memory
        c.bytes = 1u << 31;
        return c;
    }
    uint32_t at = 16;  // the copies' barrier
    const auto take = [&](int64_t bytes) {
        const uint32_t here = at;
        at += static_cast<uint32_t>((bytes + 15) / 16 * 16);
        return here;
    };
    const int64_t tile = elements * e.itemsize + 16;
    const int table = e.channels_last ? e.channels : c.share;
    const bool maximum = e.pool != kAvg;
    c.x = take(tile);
    if (e.backward) c.grad = take(tile);
    if (e.affine) {
        c.weight = take(table * acc);
        c.bias = take(table * acc);
    }
    if (e.channels_last && (e.gated || (e.affine && e.backward))) {
        c.piece = !e.general && e.channels % 4 == 0 ? 4 : 1;
        c.groups = std::max(1, e.threads / (e.channels / c.piece));
        const int sums = e.backward ? (e.affine ? 2 : 1) * acc : maximum ? (acc == 8 ? 24 : 12) : acc;
        c.part = take(int64_t(c.groups) * e.channels * sums);
    }
    if (!e.gated) {
        c.bytes = at;
        return c;
    }
    c.own = take(c.share * acc * e.branches());
    c.result = take(c.share * acc * e.branches());
    if (e.layers == 2) {
        c.exchange = take(e.hidden * acc * e.branches());
        c.hidden = take(e.hidden * acc * e.branches());
    } else if (e.layers == 1) {
        (e.layer == kDense ? c.exchange : c.everyone) = take(e.channels * acc);
    }
    c.gate = e.backward || e.channels_last ? take(table * acc) : c.result;
    if (e.backward) {
        c.mean = take(table * acc);
        if (maximum) {
            c.top = take(table * acc);
            c.top_at = take(table * acc);
        }
        if (e.layer == kDense && e.layers > 0) c.fold = take(e.threads * acc);
    }
    c.bytes = at;
    return c;
}

// ---- spatial_gate and cbam ----

// The spatial axes (leading ones of size 1 where there are fewer) and the kernel. In a window every row and plane is
// followed by as many zeros as the kernel reaches beyond it, so that a tap is the same offset everywhere.
struct Grid {
    int size[3] = {1, 1, 1}, kernel[3] = {1, 1, 1};

    constexpr int taps() const { return kernel[0] * kernel[1] * kernel[2]; }
    constexpr int row() const { return size[2] + kernel[2] - 1; }
    constexpr int plane() const { return row() * (size[1] + kernel[1] - 1); }
    // How far the kernel's centre is from its first tap, in a window; and how far it reaches in the map.
    constexpr int shift() const { return kernel[0] / 2 * plane() + kernel[1] / 2 * row() + kernel[2] / 2; }
    constexpr int halo() const { return (kernel[0] / 2 * size[1] + kernel[1] / 2) * size[2] + kernel[2] / 2; }
    constexpr int place(int position) const {
        const int line = position / size[2];
        return line / size[1] * plane() + line % size[1] * row() + position % size[2];
    }
    constexpr int offset(int tap) const {
        const int line = tap / kernel[2];
        return line / kernel[1] * plane() + line % kernel[1] * row() + tap % kernel[2];
    }
    // Places from the first tap of the first of `positions` neighbours to the last tap of the last, at most.
    int64_t window(int positions) const {
        const int64_t width = std::max(size[2], 1), area = std::max<int64_t>(width * size[1], 1);
        const int64_t lines = (positions + width - 1) / width, planes = (positions + area - 1) / area;
        const int64_t row = int64_t(size[2]) + kernel[2] - 1;  // of any map: those that fit have an int's
        const int64_t plane = row * (int64_t(size[1]) + kernel[1] - 1);
        const int64_t shift = kernel[0] / 2 * plane + kernel[1] / 2 * row + kernel[2] / 2;
        return positions + lines * (kernel[2] - 1) + planes * (kernel[1] - 1) * row + 2 * shift;
    }
};

struct SpaceExtent {
    Extent sample;  // `gated`: CBAM
    Grid grid;
};

// Where things lie in a block's shared memory, behind those of the sample's Carve.
struct SpaceCarve {
    Carve sample;
    int share = 0;              // positions owned
    int piece = 1, groups = 1;  // NCHW sums over channels: neighbouring positions a thread, threads a position
    int teams = 1;              // NCHW sums over space: warps that share a channel's positions
    int length = 0;             // places of a window
    uint32_t parts = 0;         // NCHW: (groups, P) partial pools, or sums, over channels; row 0 is read by the cluster
    uint32_t team_sums = 0;     // NCHW: (teams, channels owned)
    uint32_t pooled = 0;        // (2, share) maxima and means, read by the cluster
    uint32_t gate = 0;          // (share) gates; NCHW: read by the cluster
    uint32_t grad = 0;          // (share) gradients of the logits, read by the cluster
    uint32_t mean = 0, top = 0;  // (share) what the pools over channels pass to an element; NCHW: read by the cluster
    uint32_t top_at = 0;         // channels_last: (share) the maximum's channel, or the maximum
    uint32_t window = 0;         // maxima, means and (backward) gradients of the logits around the positions owned
    uint32_t weights = 0;        // (2, taps): of the maxima, of the means
    uint32_t offsets = 0;        // (taps) offsets in a window
    uint32_t places = 0;         // (share) places of the positions owned, from the first one's
    uint32_t bytes = 0;
};

inline SpaceCarve carve(const SpaceExtent& extent, int ranks) {
    const Extent& e = extent.sample;
    SpaceCarve c;
    c.sample = carve(e, ranks);
    c.share = c.sample.rows;
    const int acc = e.acc();
    const bool folds = c.sample.fold != 0;  // the last of the sample's arrays, in use when the windows no longer are
    int64_t at = folds ? c.sample.fold : c.sample.bytes;
    const auto take = [&](int64_t bytes) {
        const int64_t here = at;
        at = std::min(at + (bytes + 15) / 16 * 16, int64_t(1) << 31);
        return static_cast<uint32_t>(here);
    };
    if (!e.channels_last) {
        c.piece = !e.general && e.spatial % 4 == 0 ? 4 : 1;
        const int columns = std::max(1, e.spatial / c.piece);
        c.groups = std::max(1, e.threads / columns);
        c.parts = take(int64_t(c.groups) * e.spatial * (e.backward ? acc : acc == 8 ? 24 : 12));
        if (e.backward && (e.gated || e.affine)) {
            c.teams = std::min(e.threads / 32, (columns + 31) / 32);
            c.team_sums = take(int64_t(c.teams) * c.sample.share * acc * (e.affine ? 2 : 1));
        }
    }
    const int64_t own = int64_t(c.share) * acc, window = extent.grid.window(c.share), taps = extent.grid.taps();
    c.length = static_cast<int>(std::min(window, int64_t(1) << 30));
    c.gate = take(own);
    if (e.backward) {
        c.grad = take(own);
        c.mean = take(own);
        c.top = take(own);
        if (e.channels_last) c.top_at = take(own);
    } else {
        c.pooled = take(2 * own);
    }
    c.window = take(std::max<int64_t>((e.backward ? 3 : 2) * window, folds ? e.threads : 0) * acc);
    if (folds) c.sample.fold = c.window;
    c.weights = take(2 * taps * acc);
    c.offsets = take(taps * 4);
    c.places = take(int64_t(c.share) * 4);
    c.bytes = static_cast<uint32_t>(at);
    return c;
}

// ---- select ----

constexpr int kMostPaths = 8;

struct SelectExtent {
    Extent sample;  // `hidden`: of all groups
    int paths;
};

// Of the sample's Carve: x is branch 0's slice. part: (groups, C), backward (groups, M, C). own: (share) descriptors;
// backward (M, share) dot products, then gradients of logits. result: (M, share) sums, then logits, then branch
// weights; backward (share) gradients of descriptors. gate, weight, bias: M tables. exchange and hidden: (H).
struct SelectCarve {
    Carve sample;
    uint32_t tile = 0;  // from a branch's slice to the next one's
    uint32_t bytes = 0;
};

inline SelectCarve carve(const SelectExtent& extent, int ranks) {
    const Extent& e = extent.sample;
    SelectCarve s;
    Carve& c = s.sample;
    c.share = (e.channels + ranks - 1) / ranks;
    c.rows = (e.spatial + ranks - 1) / ranks;
    int64_t at = 16;  // the copies' barrier
    const auto take = [&](int64_t bytes) {
        const int64_t here = at;
        at = std::min(at + (bytes + 15) / 16 * 16, int64_t(1) << 31);
        return static_cast<uint32_t>(here);
    };
    const int64_t elements = e.channels_last ? int64_t(c.rows) * e.channels : int64_t(c.share) * e.spatial;
    const int64_t acc = e.acc(), table = (e.channels_last ? e.channels : c.share) * acc, own = c.share * acc;
    s.tile = static_cast<uint32_t>(std::min((elements * e.itemsize + 31) / 16 * 16, int64_t(1) << 24));
    c.x = take(int64_t(s.tile) * extent.paths);
    if (e.backward) c.grad = take(s.tile);
    if (e.affine) {
        c.weight = take(extent.paths * table);
        c.bias = take(extent.paths * table);
    }
    if (e.channels_last) {
        c.piece = !e.general && e.channels % 4 == 0 ? 4 : 1;
        const int64_t columns = int64_t(e.backward ? extent.paths : 1) * e.channels;
        c.groups = static_cast<int>(std::max<int64_t>(1, e.threads / (columns / c.piece)));
        c.part = take(c.groups * columns * (e.backward && e.affine ? 2 : 1) * acc);
    }
    c.own = take(own * (e.backward ? extent.paths : 1));
    c.result = take(own * (e.backward ? 1 : extent.paths));
    c.exchange = take(e.hidden * acc);
    c.hidden = take(e.hidden * acc);
    c.gate = e.backward || e.channels_last ? take(extent.paths * table) : c.result;
    if (e.backward) {
        c.mean = take(table);
        c.fold = take(e.threads * acc);
    }
    c.bytes = s.bytes = static_cast<uint32_t>(at);
    return s;
}

// ---- the cluster ----

// What a device gives a kernel: bytes of shared memory a block may have, blocks a cluster may have, whether the
// registers are enough for two blocks of a multiprocessor.
struct Limits {
    int64_t shared = 0;
    int cluster = 1;
    bool pairs = false;
};
constexpr int64_t kReserved = 1024;  // bytes that a further block of a multiprocessor takes for itself

// The smallest cluster whose shared memory holds a sample of so many bytes, with all else that a block needs
// bytes(ranks) a block; 0: none does, it must stream.
template <class Bytes>
int smallest_cluster(const Limits& limits, int64_t sample, Bytes bytes) {
    for (int ranks = 1; ranks <= limits.cluster; ranks *= 2)
        if (sample <= ranks * limits.shared && bytes(ranks) <= limits.shared) return ranks;
    return 0;
}
// The cluster of a launch for `batch` samples: more blocks than the smallest one has where two blocks then share a
// multiprocessor, so that one copies or stores its sample while the other one computes; and where there are few
// samples, while all of them run at once and keep a few KiB to work on.
template <class Bytes>
int cluster_for(const Limits& limits, int processors, int64_t batch, int64_t sample, Bytes bytes) {
    int ranks = smallest_cluster(limits, sample, bytes);
    const int most = std::min(8, limits.cluster);  // larger ones are seldom placed
    const auto in_pairs = [&](int blocks) { return 2 * bytes(blocks) + kReserved <= limits.shared; };
    for (int blocks = ranks; limits.pairs && ranks > 0 && blocks <= most && batch * blocks > processors; blocks *= 2) {
        if (in_pairs(blocks)) {
            ranks = blocks;
            break;
        }
    }
    while (ranks > 0 && 2 * ranks <= most && batch * 2 * ranks <= processors && sample / (2 * ranks) >= 8192 &&
           bytes(2 * ranks) <= limits.shared)
        ranks *= 2;
    return ranks;
}

}  // namespace fused_attn::cuda

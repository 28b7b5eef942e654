// Registers the question over how many blocks the resident CUDA kernels (csrc/cuda) spread a sample, for a device of
// given limits. It is answered in every build, without a device.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "cuda/fit.h"

namespace fused_attn::cuda {
namespace {

// The smallest clusters that hold a sample, forward and backward; 0: none does.
using Clusters = std::tuple<int64_t, int64_t>;

bool is_small(int64_t channels, int64_t positions) {
    return channels >= 1 && channels <= kMostChannels && positions >= 0 && positions <= kMostPositions;
}
Extent& sample_of(Extent& extent) { return extent; }
template <class Whole>
Extent& sample_of(Whole& extent) {
    return extent.sample;
}
template <class AnyExtent>
Clusters clusters_of(AnyExtent extent, int64_t shared, int64_t cluster) {
    Extent& sample = sample_of(extent);
    const int64_t bytes = int64_t(sample.channels) * sample.spatial * sample.itemsize;
    const auto smallest = [&](bool backward) {
        sample.backward = backward;
        return smallest_cluster({shared, static_cast<int>(cluster)}, bytes,
                                [&](int ranks) { return carve(extent, ranks).bytes; });
    };
    return {smallest(false), smallest(true)};
}

// layers: 0, 1 or 2; hidden only counts for two.
Clusters channel_gate(int64_t channels, int64_t spatial, int64_t itemsize, bool channels_last, int64_t layers,
                      int64_t hidden, int64_t layer, int64_t pool, bool affine, int64_t pre_activation,
                      int64_t post_activation, int64_t shared, int64_t cluster) {
    if (!is_small(channels, spatial)) return {0, 0};
    Extent extent;
    extent.channels = static_cast<int>(channels);
    extent.spatial = static_cast<int>(spatial);
    extent.itemsize = static_cast<int>(itemsize);
    extent.channels_last = channels_last;
    extent.layers = static_cast<int>(layers);
    extent.hidden = layers == 2 ? static_cast<int>(hidden) : 0;
    extent.layer = static_cast<int>(layer);
    extent.pool = static_cast<int>(pool);
    extent.affine = affine;
    extent.general = is_general(extent.itemsize, affine, pre_activation, post_activation);
    return clusters_of(extent, shared, cluster);
}

// The spatial axes and the kernel, leading ones first. gated: of cbam, whose channel gate the next four describe.
Clusters spatial_gate(int64_t channels, int64_t depth, int64_t height, int64_t width, int64_t kernel_depth,
                      int64_t kernel_height, int64_t kernel_width, int64_t itemsize, bool channels_last, bool gated,
                      int64_t layers, int64_t hidden, int64_t layer, int64_t pool, bool affine, int64_t pre_activation,
                      int64_t post_activation, int64_t shared, int64_t cluster) {
    for (const int64_t size : {depth, height, width})
        if (!is_small(channels, size)) return {0, 0};
    for (const int64_t size : {kernel_depth, kernel_height, kernel_width})
        if (size < 1 || size > kMostTaps) return {0, 0};
    // Products of two such sizes are an int64_t's.
    if (!is_small(channels, depth * height) || !is_small(channels, depth * height * width)) return {0, 0};
    if (kernel_depth * kernel_height * kernel_width > kMostTaps) return {0, 0};
    SpaceExtent extent;
    Extent& e = extent.sample;
    e.channels = static_cast<int>(channels);
    e.spatial = static_cast<int>(depth * height * width);
    e.itemsize = static_cast<int>(itemsize);
    e.channels_last = channels_last;
    e.gated = gated;
    e.layers = static_cast<int>(layers);
    e.hidden = layers == 2 ? static_cast<int>(hidden) : 0;
    e.layer = static_cast<int>(layer);
    e.pool = static_cast<int>(pool);
    e.affine = affine;
    e.general = is_general(e.itemsize, affine, pre_activation, post_activation);
    extent.grid = {{static_cast<int>(depth), static_cast<int>(height), static_cast<int>(width)},
                   {static_cast<int>(kernel_depth), static_cast<int>(kernel_height), static_cast<int>(kernel_width)}};
    return clusters_of(extent, shared, cluster);
}

// hidden: of all groups.
Clusters select(int64_t channels, int64_t spatial, int64_t itemsize, bool channels_last, int64_t paths, int64_t hidden,
                bool affine, int64_t pre_activation, int64_t shared, int64_t cluster) {
    if (!is_small(channels, spatial) || paths < 1 || paths > kMostPaths) return {0, 0};
    SelectExtent extent = {{}, static_cast<int>(paths)};
    Extent& e = extent.sample;
    e.channels = static_cast<int>(channels);
    e.spatial = static_cast<int>(spatial);
    e.itemsize = static_cast<int>(itemsize);
    e.channels_last = channels_last;
    e.hidden = static_cast<int>(hidden);
    e.affine = affine;
    e.general = is_general_selection(e.itemsize, pre_activation);
    return clusters_of(extent, shared, cluster);
}

}  // namespace
}  // namespace fused_attn::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fused_attn, m) {
    m.def(
        "resident_channel_gate(int channels, int spatial, int itemsize, bool channels_last, int layers, int hidden,"
        " int layer, int pool, bool affine, int pre_activation, int post_activation, int shared, int cluster)"
        " -> (int forward, int backward)");
    m.def(
        "resident_spatial_gate(int channels, int depth, int height, int width, int kernel_depth, int kernel_height,"
        " int kernel_width, int itemsize, bool channels_last, bool gated, int layers, int hidden, int layer, int pool,"
        " bool affine, int pre_activation, int post_activation, int shared, int cluster)"
        " -> (int forward, int backward)");
    m.def(
        "resident_select(int channels, int spatial, int itemsize, bool channels_last, int paths, int hidden,"
        " bool affine, int pre_activation, int shared, int cluster) -> (int forward, int backward)");
}
STABLE_TORCH_LIBRARY_IMPL(fused_attn, CompositeExplicitAutograd, m) {
    m.impl("resident_channel_gate", TORCH_BOX(&fused_attn::cuda::channel_gate));
    m.impl("resident_spatial_gate", TORCH_BOX(&fused_attn::cuda::spatial_gate));
    m.impl("resident_select", TORCH_BOX(&fused_attn::cuda::select));
}

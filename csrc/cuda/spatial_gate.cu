// Host side of the resident spatial gate: does the sample fit, which kernel, launch, register.
#include "space.h"

namespace fused_attn::cuda {
namespace {

Options options_of(const OptionalTensor& affine_weight, const OptionalTensor& affine_bias,
                   const OptionalTensor& residual, int64_t pre_activation, int64_t post_activation) {
    const OptionalTensor none;
    return {none, none, none, none, affine_weight,  affine_bias,    residual, kDense,
            kAvg, 0,    0,    0,    pre_activation, post_activation};
}

std::tuple<Tensor, Tensor, Tensor> spatial_gate(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                                                const OptionalTensor& affine_weight, const OptionalTensor& affine_bias,
                                                const OptionalTensor& residual, int64_t mean_first, int64_t ties,
                                                int64_t gate, int64_t pre_activation, int64_t post_activation) {
    const OnDevice device(x);
    return PreparedSpace<false>(x, options_of(affine_weight, affine_bias, residual, pre_activation, post_activation),
                                {weight, bias, mean_first, ties, gate}, false, device)
        .forward(device);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> spatial_gate_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& y, const Tensor& state, const Tensor& index,
    const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& affine_weight,
    const OptionalTensor& affine_bias, const OptionalTensor& residual, int64_t mean_first, int64_t ties, int64_t gate,
    int64_t pre_activation, int64_t post_activation) {
    const OnDevice device(x);
    const Options options = options_of(affine_weight, affine_bias, residual, pre_activation, post_activation);
    const SpaceOptions space = {weight, bias, mean_first, ties, gate};
    PreparedSpace<false> p(x, options, space, true, device);
    auto [grad_x, grad_residual, of] = p.backward(grad, y, state, index, options, space, device);
    return {grad_x, grad_residual, of[6], of[7], of[4], of[5]};
}

// As resident_cluster_size, for spatial_gate and (gated) cbam: the spatial axes and the kernel, leading ones first.
int64_t cluster_size_of(int64_t channels, int64_t depth, int64_t height, int64_t width, int64_t kernel_depth,
                        int64_t kernel_height, int64_t kernel_width, int64_t itemsize, bool channels_last, bool gated,
                        int64_t layers, int64_t hidden, int64_t layer, int64_t pool, bool affine, bool general,
                        bool backward, int64_t capability) {
    if (channels < 1 || channels >= (1 << 22) || depth * height * width >= (1 << 30)) return 0;
    SpaceExtent e;
    e.sample = {static_cast<int>(channels),
                static_cast<int>(depth * height * width),
                static_cast<int>(hidden),
                static_cast<int>(layers),
                static_cast<int>(layer),
                static_cast<int>(pool),
                static_cast<int>(itemsize),
                channels_last,
                affine,
                backward,
                general || affine || itemsize == 8};
    e.sample.gated = gated;
    e.grid = {{static_cast<int>(depth), static_cast<int>(height), static_cast<int>(width)},
              {static_cast<int>(kernel_depth), static_cast<int>(kernel_height), static_cast<int>(kernel_width)}};
    return resident_cluster_size(e, static_cast<int>(capability));
}

}  // namespace
}  // namespace fused_attn::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fused_attn, m) {
    m.def(
        "resident_space_cluster_size(int channels, int depth, int height, int width, int kernel_depth,"
        " int kernel_height, int kernel_width, int itemsize, bool channels_last, bool gated, int layers, int hidden,"
        " int layer, int pool, bool affine, bool general, bool backward, int capability) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fused_attn, CompositeExplicitAutograd, m) {
    m.impl("resident_space_cluster_size", TORCH_BOX(&fused_attn::cuda::cluster_size_of));
}
STABLE_TORCH_LIBRARY_IMPL(fused_attn, CUDA, m) {
    m.impl("spatial_gate.cuda", TORCH_BOX(&fused_attn::cuda::spatial_gate));
    m.impl("spatial_gate_backward.cuda", TORCH_BOX(&fused_attn::cuda::spatial_gate_backward));
}

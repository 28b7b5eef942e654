// Host side of the resident CBAM, whose kernels are those of the spatial gate with gated channels.
#include "space.h"

namespace fused_attn::cuda {
namespace {

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> cbam(
    const Tensor& x, const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& weight2,
    const OptionalTensor& bias2, const Tensor& spatial_weight, const OptionalTensor& spatial_bias,
    const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, const OptionalTensor& residual,
    int64_t layer, int64_t pool, int64_t channel_ties, int64_t activation, int64_t channel_gate, int64_t mean_first,
    int64_t spatial_ties, int64_t spatial_gate, int64_t pre_activation, int64_t post_activation) {
    const OnDevice device(x);
    PreparedSpace<true> p(x,
                          {weight1, bias1, weight2, bias2, affine_weight, affine_bias, residual, layer, pool,
                           channel_ties, activation, channel_gate, pre_activation, post_activation},
                          {spatial_weight, spatial_bias, mean_first, spatial_ties, spatial_gate}, false, device);
    Tensor channel_state = new_tensor(x, {p.batch, p.call.state_width}, p.acc);
    Tensor channel_index =
        pool == kAvg ? new_tensor(x, {0}, ScalarType::Int) : new_tensor(x, {p.batch, p.call.channels}, ScalarType::Int);
    p.call.state = channel_state.data_ptr();
    p.call.index = static_cast<int32_t*>(channel_index.data_ptr());
    auto [y, state, index] = p.forward(device);
    return {y, channel_state, channel_index, state, index};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& y, const Tensor& channel_state,
    const Tensor& channel_index, const Tensor& state, const Tensor& index, const OptionalTensor& weight1,
    const OptionalTensor& bias1, const OptionalTensor& weight2, const OptionalTensor& bias2,
    const Tensor& spatial_weight, const OptionalTensor& spatial_bias, const OptionalTensor& affine_weight,
    const OptionalTensor& affine_bias, const OptionalTensor& residual, int64_t layer, int64_t pool,
    int64_t channel_ties, int64_t activation, int64_t channel_gate, int64_t mean_first, int64_t spatial_ties,
    int64_t spatial_gate, int64_t pre_activation, int64_t post_activation) {
    const OnDevice device(x);
    const Options options = {weight1, bias1, weight2,      bias2,      affine_weight, affine_bias,    residual,
                             layer,   pool,  channel_ties, activation, channel_gate,  pre_activation, post_activation};
    const SpaceOptions space = {spatial_weight, spatial_bias, mean_first, spatial_ties, spatial_gate};
    PreparedSpace<true> p(x, options, space, true, device);
    p.call.state = p.contiguous(channel_state);
    p.call.index = static_cast<int32_t*>(p.contiguous(channel_index));
    auto [grad_x, grad_residual, of] = p.backward(grad, y, state, index, options, space, device);
    return {grad_x, grad_residual, of[0], of[1], of[2], of[3], of[6], of[7], of[4], of[5]};
}

}  // namespace
}  // namespace fused_attn::cuda

STABLE_TORCH_LIBRARY_IMPL(fused_attn, CUDA, m) {
    m.impl("cbam.cuda", TORCH_BOX(&fused_attn::cuda::cbam));
    m.impl("cbam_backward.cuda", TORCH_BOX(&fused_attn::cuda::cbam_backward));
}

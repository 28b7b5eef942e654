// Host side of the resident channel gate: does the sample fit, which kernel, launch, register.
#include "launch.h"

namespace fused_attn::cuda {
namespace {

template <class Io, bool kChannelsLast>
struct ForwardKernel {
    static constexpr auto kernel = channel_gate_kernel<Io, kChannelsLast>;
};
template <class Io, bool kChannelsLast>
struct BackwardKernel {
    static constexpr auto kernel = channel_gate_backward_kernel<Io, kChannelsLast>;
};

void choose(Prepared& p, const KernelLimits& limits) {
    p.choose_ranks(limits, [&](int ranks) { return carve(p.extent, ranks).bytes; });
    p.call.carve = carve(p.extent, p.ranks);
}

std::tuple<Tensor, Tensor, Tensor> channel_gate(const Tensor& x, const OptionalTensor& weight1,
                                                const OptionalTensor& bias1, const OptionalTensor& weight2,
                                                const OptionalTensor& bias2, const OptionalTensor& affine_weight,
                                                const OptionalTensor& affine_bias, const OptionalTensor& residual,
                                                int64_t layer, int64_t pool, int64_t ties, int64_t activation,
                                                int64_t gate, int64_t pre_activation, int64_t post_activation) {
    const OnDevice device(x.get_device_index());
    Prepared p(x,
               {weight1, bias1, weight2, bias2, affine_weight, affine_bias, residual, layer, pool, ties, activation,
                gate, pre_activation, post_activation},
               false);
    const auto kernel = kernel_for<ForwardKernel>(p);
    choose(p, device.limits(kernel));
    Tensor y = torch::stable::empty_like(p.x);
    Tensor state = new_tensor(x, {p.batch, p.call.state_width}, p.acc);
    Tensor index =
        pool == kAvg ? new_tensor(x, {0}, ScalarType::Int) : new_tensor(x, {p.batch, p.call.channels}, ScalarType::Int);
    p.call.y = static_cast<char*>(y.data_ptr());
    p.call.state = state.data_ptr();
    p.call.index = static_cast<int32_t*>(index.data_ptr());
    run(p, kernel, p.call, p.call.carve.bytes, device.stream());
    return {y, state, index};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> channel_gate_backward(
    const Tensor& grad_in, const Tensor& x, const OptionalTensor& y, const Tensor& state_in, const Tensor& index_in,
    const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& weight2,
    const OptionalTensor& bias2, const OptionalTensor& affine_weight, const OptionalTensor& affine_bias,
    const OptionalTensor& residual, int64_t layer, int64_t pool, int64_t ties, int64_t activation, int64_t gate,
    int64_t pre_activation, int64_t post_activation) {
    const OnDevice device(x.get_device_index());
    Prepared p(x,
               {weight1, bias1, weight2, bias2, affine_weight, affine_bias, residual, layer, pool, ties, activation,
                gate, pre_activation, post_activation},
               true);
    const auto kernel = kernel_for<BackwardKernel>(p);
    choose(p, device.limits(kernel));
    Call& call = p.call;
    call.state = p.contiguous(state_in);
    call.index = static_cast<int32_t*>(p.contiguous(index_in));
    Tensor grad_x = torch::stable::empty_like(p.x);
    Tensor grad_residual =
        post_activation == kIdentity ? new_tensor(x, {0}, x.scalar_type()) : torch::stable::empty_like(p.x);
    p.backward_tensors(grad_in, y, grad_x, grad_residual);
    const cudaStream_t stream = device.stream();
    run(p, kernel, call, call.carve.bytes, stream);

    const Tensor grads[6] = {gradient_like(weight1, x), gradient_like(bias1, x),         gradient_like(weight2, x),
                             gradient_like(bias2, x),   gradient_like(affine_weight, x), gradient_like(affine_bias, x)};
    const bool wanted[6] = {weight1.has_value(), bias1.has_value(),         weight2.has_value(),
                            bias2.has_value(),   affine_weight.has_value(), affine_bias.has_value()};
    const auto target = [&](int which, ParameterGrad& job) {
        job.to = grads[which].data_ptr();
        job.dtype = dtype_code(grads[which].scalar_type());
    };
    run_parameter_grads(p, parameter_grads(call, p.batch, p.ranks, p.affine_rows(), wanted, target), stream);
    return {grad_x, grad_residual, grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

// What a device gives every resident kernel (all have as many threads, and registers for one block that fills the
// shared memory): bytes of shared memory a block, blocks a cluster. Raises why they do not run there.
std::tuple<int64_t, int64_t> limits_of(int64_t index) {
    stream_of_torch();
    const OnDevice device(static_cast<int>(index));
    const KernelLimits limits = device.limits(BackwardKernel<Typed<float>, false>::kernel);
    return {limits.shared, limits.cluster};
}

}  // namespace
}  // namespace fused_attn::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fused_attn, m) { m.def("resident_limits(int device) -> (int shared, int cluster)"); }
STABLE_TORCH_LIBRARY_IMPL(fused_attn, CompositeExplicitAutograd, m) {
    m.impl("resident_limits", TORCH_BOX(&fused_attn::cuda::limits_of));
}
STABLE_TORCH_LIBRARY_IMPL(fused_attn, CUDA, m) {
    m.impl("channel_gate.cuda", TORCH_BOX(&fused_attn::cuda::channel_gate));
    m.impl("channel_gate_backward.cuda", TORCH_BOX(&fused_attn::cuda::channel_gate_backward));
}

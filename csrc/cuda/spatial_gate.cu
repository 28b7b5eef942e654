// Host side of the resident spatial gate and of CBAM, which is the same kernel with gated channels: does the sample
// fit, which kernel, launch, register.
#include "spatial_gate.cuh"

#include "launch.h"

namespace fused_attn::cuda {
namespace {

struct SpaceOptions {
    Tensor weight;
    OptionalTensor bias;
    int64_t mean_first, ties, gate;
};

// A SpaceCall and the tensors that keep its pointers alive; gated: of CBAM.
struct PreparedSpace : Prepared {
    SpaceCall space;
    SpaceExtent space_extent;

    PreparedSpace(const Tensor& x_in, const Options& options, const SpaceOptions& o, bool gated, bool backward,
                  const OnDevice& device)
        : Prepared(x_in, options, backward) {
        const int64_t rank = x.dim() - 2;
        STD_TORCH_CHECK(rank >= 1 && rank <= 3 && o.weight.dim() == rank + 2,
                        "fused_attn: expected one to three spatial axes, and a weight with as many");
        for (int64_t axis = 0; axis < rank; ++axis) {
            space.grid.size[3 - rank + axis] = static_cast<int>(x.size(2 + axis));
            space.grid.kernel[3 - rank + axis] = static_cast<int>(o.weight.size(2 + axis));
        }
        STD_TORCH_CHECK(o.weight.numel() / 2 <= kMostTaps, "fused_attn: kernel too large to be resident");
        extent.gated = gated;
        space_extent = {extent, space.grid};
        const KernelLimits limits =
            backward ? device.limits(kernel_for<Backward>(*this)) : device.limits(kernel_for<Forward>(*this));
        choose_ranks(limits, [&](int ranks) { return carve(space_extent, ranks).bytes; });
        space.carve = carve(space_extent, ranks);
        call.carve = space.carve.sample;
        space.weight = small(o.weight);
        space.bias = small(o.bias);
        space.mean_first = static_cast<int>(o.mean_first);
        space.ties = static_cast<int>(o.ties);
        space.gate = static_cast<int>(o.gate);
    }

    template <class Io, bool kChannelsLast>
    struct Forward {
        static constexpr auto kernel = space_kernel<Io, kChannelsLast>;
    };
    template <class Io, bool kChannelsLast>
    struct Backward {
        static constexpr auto kernel = space_backward_kernel<Io, kChannelsLast>;
    };

    // The sample's y, and (state, index) of its positions.
    std::tuple<Tensor, Tensor, Tensor> forward(const OnDevice& device) {
        Tensor y = torch::stable::empty_like(x);
        std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
        shape.erase(shape.begin() + 1);
        Tensor index = torch::stable::empty(shape, ScalarType::Int, std::nullopt, x.device());
        shape.insert(shape.begin() + 1, 3);
        Tensor state = torch::stable::empty(shape, acc, std::nullopt, x.device());
        call.y = static_cast<char*>(y.data_ptr());
        space.state = state.data_ptr();
        space.index = static_cast<int32_t*>(index.data_ptr());
        space.sample = call;
        run(*this, kernel_for<Forward>(*this), space, space.carve.bytes, device.stream());
        return {y, state, index};
    }

    // The gradients of x, the residual and the parameters: weight1, bias1, weight2, bias2, affine_weight, affine_bias,
    // weight, bias.
    struct Gradients {
        Tensor x, residual;
        std::vector<Tensor> parameters;
    };
    Gradients backward(const Tensor& grad, const OptionalTensor& y, const Tensor& state, const Tensor& index,
                       const Options& options, const SpaceOptions& o, const OnDevice& device) {
        Gradients out = {
            torch::stable::empty_like(x),
            call.post_activation == kIdentity ? new_tensor(x, {0}, x.scalar_type()) : torch::stable::empty_like(x),
            {}};
        backward_tensors(grad, y, out.x, out.residual);
        space.state = contiguous(state);
        space.index = static_cast<int32_t*>(contiguous(index));
        space.tap_sums = scratch(true, batch * ranks, 2 * space.grid.taps() + 1);
        space.sample = call;
        const cudaStream_t stream = device.stream();
        run(*this, kernel_for<Backward>(*this), space, space.carve.bytes, stream);

        bool wanted[8];
        for (const OptionalTensor& parameter :
             {options.weight1, options.bias1, options.weight2, options.bias2, options.affine_weight,
              options.affine_bias, OptionalTensor(o.weight), o.bias}) {
            wanted[out.parameters.size()] = parameter.has_value();
            out.parameters.push_back(gradient_like(parameter, x));
        }
        const auto target = [&](int which, ParameterGrad& job) {
            job.to = out.parameters[which].data_ptr();
            job.dtype = dtype_code(out.parameters[which].scalar_type());
        };
        run_parameter_grads(*this, parameter_grads(space, batch, ranks, affine_rows(), wanted, target), stream);
        return out;
    }
};

// A cluster holds one sample; statistics over all of them are the streaming kernels' (backends.py says so before).
void refuse(const OptionalTensor& norm_weight) {
    STD_TORCH_CHECK(!norm_weight, "fused_attn: statistics of the batch need all samples; use the triton backend");
}
Tensor no_statistics(const Prepared& p) { return new_tensor(p.x, {0}, p.acc); }

Options options_of(const OptionalTensor& affine_weight, const OptionalTensor& affine_bias,
                   const OptionalTensor& residual, int64_t pre_activation, int64_t post_activation) {
    const OptionalTensor none;
    return {none, none, none, none, affine_weight,  affine_bias,    residual, kDense,
            kAvg, 0,    0,    0,    pre_activation, post_activation};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> spatial_gate(const Tensor& x, const Tensor& weight,
                                                        const OptionalTensor& bias, const OptionalTensor& norm_weight,
                                                        const OptionalTensor&, const OptionalTensor& affine_weight,
                                                        const OptionalTensor& affine_bias,
                                                        const OptionalTensor& residual, double, int64_t mean_first,
                                                        int64_t ties, int64_t gate, int64_t pre_activation,
                                                        int64_t post_activation) {
    refuse(norm_weight);
    const OnDevice device(x.get_device_index());
    PreparedSpace p(x, options_of(affine_weight, affine_bias, residual, pre_activation, post_activation),
                    {weight, bias, mean_first, ties, gate}, false, false, device);
    auto [y, state, index] = p.forward(device);
    return {y, state, index, no_statistics(p)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> spatial_gate_backward(
    const Tensor& grad, const Tensor& x, const OptionalTensor& y, const Tensor& state, const Tensor& index,
    const Tensor&, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& norm_weight,
    const OptionalTensor& norm_bias, const OptionalTensor& affine_weight, const OptionalTensor& affine_bias,
    const OptionalTensor& residual, double, int64_t mean_first, int64_t ties, int64_t gate, int64_t pre_activation,
    int64_t post_activation) {
    refuse(norm_weight);
    const OnDevice device(x.get_device_index());
    const Options options = options_of(affine_weight, affine_bias, residual, pre_activation, post_activation);
    const SpaceOptions space = {weight, bias, mean_first, ties, gate};
    PreparedSpace p(x, options, space, false, true, device);
    auto [grad_x, grad_residual, of] = p.backward(grad, y, state, index, options, space, device);
    return {grad_x, grad_residual, of[6], of[7], gradient_like(norm_weight, x), gradient_like(norm_bias, x),
            of[4],  of[5]};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> cbam(
    const Tensor& x, const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& weight2,
    const OptionalTensor& bias2, const Tensor& spatial_weight, const OptionalTensor& spatial_bias,
    const OptionalTensor& norm_weight, const OptionalTensor&, const OptionalTensor& affine_weight,
    const OptionalTensor& affine_bias, const OptionalTensor& residual, double, int64_t layer, int64_t pool,
    int64_t channel_ties, int64_t activation, int64_t channel_gate, int64_t mean_first, int64_t spatial_ties,
    int64_t spatial_gate, int64_t pre_activation, int64_t post_activation) {
    refuse(norm_weight);
    const OnDevice device(x.get_device_index());
    PreparedSpace p(x,
                    {weight1, bias1, weight2, bias2, affine_weight, affine_bias, residual, layer, pool, channel_ties,
                     activation, channel_gate, pre_activation, post_activation},
                    {spatial_weight, spatial_bias, mean_first, spatial_ties, spatial_gate}, true, false, device);
    Tensor channel_state = new_tensor(x, {p.batch, p.call.state_width}, p.acc);
    Tensor channel_index =
        pool == kAvg ? new_tensor(x, {0}, ScalarType::Int) : new_tensor(x, {p.batch, p.call.channels}, ScalarType::Int);
    p.call.state = channel_state.data_ptr();
    p.call.index = static_cast<int32_t*>(channel_index.data_ptr());
    auto [y, state, index] = p.forward(device);
    return {y, channel_state, channel_index, state, index, no_statistics(p)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>
cbam_backward(const Tensor& grad, const Tensor& x, const OptionalTensor& y, const Tensor& channel_state,
              const Tensor& channel_index, const Tensor& state, const Tensor& index, const Tensor&,
              const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& weight2,
              const OptionalTensor& bias2, const Tensor& spatial_weight, const OptionalTensor& spatial_bias,
              const OptionalTensor& norm_weight, const OptionalTensor& norm_bias, const OptionalTensor& affine_weight,
              const OptionalTensor& affine_bias, const OptionalTensor& residual, double, int64_t layer, int64_t pool,
              int64_t channel_ties, int64_t activation, int64_t channel_gate, int64_t mean_first, int64_t spatial_ties,
              int64_t spatial_gate, int64_t pre_activation, int64_t post_activation) {
    refuse(norm_weight);
    const OnDevice device(x.get_device_index());
    const Options options = {weight1, bias1, weight2,      bias2,      affine_weight, affine_bias,    residual,
                             layer,   pool,  channel_ties, activation, channel_gate,  pre_activation, post_activation};
    const SpaceOptions space = {spatial_weight, spatial_bias, mean_first, spatial_ties, spatial_gate};
    PreparedSpace p(x, options, space, true, true, device);
    p.call.state = p.contiguous(channel_state);
    p.call.index = static_cast<int32_t*>(p.contiguous(channel_index));
    auto [grad_x, grad_residual, of] = p.backward(grad, y, state, index, options, space, device);
    return {grad_x,
            grad_residual,
            of[0],
            of[1],
            of[2],
            of[3],
            of[6],
            of[7],
            gradient_like(norm_weight, x),
            gradient_like(norm_bias, x),
            of[4],
            of[5]};
}

}  // namespace
}  // namespace fused_attn::cuda

STABLE_TORCH_LIBRARY_IMPL(fused_attn, CUDA, m) {
    m.impl("spatial_gate.cuda", TORCH_BOX(&fused_attn::cuda::spatial_gate));
    m.impl("spatial_gate_backward.cuda", TORCH_BOX(&fused_attn::cuda::spatial_gate_backward));
    m.impl("cbam.cuda", TORCH_BOX(&fused_attn::cuda::cbam));
    m.impl("cbam_backward.cuda", TORCH_BOX(&fused_attn::cuda::cbam_backward));
}

// Host side shared by the resident spatial gate and CBAM.
#pragma once

#include "launch.h"
#include "spatial_gate.cuh"

namespace fused_attn::cuda {
namespace {

struct SpaceOptions {
    Tensor weight;
    OptionalTensor bias;
    int64_t mean_first, ties, gate;
};

// A SpaceCall and the tensors that keep its pointers alive; kGated: of CBAM.
template <bool kGated>
struct PreparedSpace : Prepared {
    SpaceCall space;
    SpaceExtent space_extent;

    PreparedSpace(const Tensor& x_in, const Options& options, const SpaceOptions& o, bool backward,
                  const OnDevice& device)
        : Prepared(x_in, options, backward) {
        const int64_t rank = x.dim() - 2;
        STD_TORCH_CHECK(rank >= 1 && rank <= 3 && o.weight.dim() == rank + 2,
                        "fused_attn: expected one to three spatial axes, and a weight with as many");
        for (int64_t axis = 0; axis < rank; ++axis) {
            space.grid.size[3 - rank + axis] = static_cast<int>(x.size(2 + axis));
            space.grid.kernel[3 - rank + axis] = static_cast<int>(o.weight.size(2 + axis));
        }
        STD_TORCH_CHECK(o.weight.numel() < (1 << 16), "fused_attn: kernel too large to be resident");
        extent.gated = kGated;
        space_extent = {extent, space.grid};
        choose_ranks(device, [&](int ranks) { return carve(space_extent, ranks).bytes; });
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
        static constexpr auto kernel = space_kernel<Io, kChannelsLast, kGated>;
    };
    template <class Io, bool kChannelsLast>
    struct Backward {
        static constexpr auto kernel = space_backward_kernel<Io, kChannelsLast, kGated>;
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

}  // namespace
}  // namespace fused_attn::cuda

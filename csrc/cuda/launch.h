// Host side shared by the resident kernels: layouts, a call's arguments, launches. Only the stable ABI and the CUDA
// runtime (linked statically), so that it builds and loads beside a torch without CUDA.
#pragma once

#include <optional>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "channel_gate.cuh"
#include "device.h"

namespace fused_attn::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

int dtype_code(ScalarType type) {
    switch (type) {
        case ScalarType::Double:
            return kFloat64;
        case ScalarType::Float:
            return kFloat32;
        case ScalarType::Half:
            return kFloat16;
        case ScalarType::BFloat16:
            return kBFloat16;
        default:
            STD_TORCH_CHECK(false, "fused_attn: expected a float64, float32, float16 or bfloat16 tensor");
    }
}

bool is_channels_last(const Tensor& x) {
    int64_t expected = 1;
    const auto dense = [&](int64_t axis) {
        const bool as_expected = x.size(axis) == 1 || x.stride(axis) == expected;
        expected *= x.size(axis);
        return as_expected;
    };
    bool result = dense(1);
    for (int64_t axis = x.dim() - 1; axis > 1; --axis) result = result && dense(axis);
    return result && dense(0);
}
bool is_aligned(const Tensor& map) { return reinterpret_cast<uintptr_t>(map.data_ptr()) % 16 == 0; }

// x itself where it is NCHW or channels_last and starts at a 16-byte boundary, else one copy.
Tensor dense_map(const Tensor& x) {
    const Tensor dense = x.is_contiguous() || is_channels_last(x) ? x : torch::stable::contiguous(x);
    return is_aligned(dense) ? dense : torch::stable::clone(dense);
}
// `other` in the layout of x: itself where strides and alignment agree, else one copy.
Tensor in_layout_of(const Tensor& x, const Tensor& other) {
    bool same = is_aligned(other);
    for (int64_t axis = 0; axis < x.dim(); ++axis)
        same = same && (x.size(axis) == 1 || x.stride(axis) == other.stride(axis));
    if (same || x.numel() == 0) return other;
    Tensor copy = torch::stable::empty_like(x);
    torch::stable::copy_(copy, other);
    return copy;
}
Tensor new_tensor(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType type) {
    return torch::stable::empty({sizes.begin(), sizes.size()}, type, std::nullopt, like.device());
}
Tensor gradient_like(const OptionalTensor& parameter, const Tensor& x) {
    if (!parameter) return new_tensor(x, {0}, x.scalar_type());
    return torch::stable::empty(parameter->sizes(), parameter->scalar_type(), std::nullopt, x.device());
}

// A call's tensors and codes, as the operators' schemas have them.
struct Options {
    OptionalTensor weight1, bias1, weight2, bias2, affine_weight, affine_bias, residual;
    int64_t layer, pool, ties, activation, gate, pre_activation, post_activation;
};

// A Call and the tensors that keep its pointers alive.
struct Prepared {
    Call call;
    Extent extent;
    std::vector<Tensor> kept;
    Tensor x;
    int64_t batch;
    int ranks = 1;
    ScalarType acc;

    // Of maps like this one, which is NCHW or channels_last.
    explicit Prepared(const Tensor& dense) : x(dense) {
        int64_t spatial = 1;
        for (int64_t axis = 2; axis < x.dim(); ++axis) spatial *= x.size(axis);
        batch = x.size(0);
        STD_TORCH_CHECK(x.size(1) <= kMostChannels && spatial <= kMostPositions,
                        "fused_attn: map too large to be resident");
        acc = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
        call.dtype = dtype_code(x.scalar_type());
        call.itemsize = call.dtype == kFloat64 ? 8 : call.dtype == kFloat32 ? 4 : 2;
        call.channels = static_cast<int>(x.size(1));
        call.spatial = static_cast<int>(spatial);
        extent.channels = call.channels;
        extent.spatial = call.spatial;
        extent.itemsize = call.itemsize;
        extent.channels_last = !x.is_contiguous();
        call.channel_of = Divider(static_cast<uint32_t>(extent.channels_last ? call.channels : call.spatial));
    }
    Prepared(const Tensor& x_in, const Options& o, bool backward) : Prepared(dense_map(x_in)) {
        call.x = static_cast<const char*>(x.data_ptr());
        call.layers = o.weight2 ? 2 : o.weight1 ? 1 : 0;
        call.layer = static_cast<int>(o.layer);
        call.hidden = call.layers == 2 ? static_cast<int>(o.weight1->size(0)) : 0;
        call.taps = call.layers == 1 && o.layer != kDense ? static_cast<int>(o.weight1->numel()) : 0;
        call.pool = static_cast<int>(o.pool);
        call.ties = static_cast<int>(o.ties);
        call.activation = static_cast<int>(o.activation);
        call.gate = static_cast<int>(o.gate);
        call.pre_activation = static_cast<int>(o.pre_activation);
        call.post_activation = static_cast<int>(o.post_activation);
        call.state_width = state_width(call);
        call.weight1 = small(o.weight1);
        call.bias1 = small(o.bias1);
        call.weight2 = small(o.weight2);
        call.bias2 = small(o.bias2);
        call.affine_weight = small(o.affine_weight);
        call.affine_bias = small(o.affine_bias);
        if (o.residual) {
            kept.push_back(in_layout_of(x, *o.residual));
            call.residual = static_cast<const char*>(kept.back().data_ptr());
        }

        extent.hidden = call.hidden;
        extent.layers = call.layers;
        extent.layer = call.layer;
        extent.pool = call.pool;
        extent.affine = o.affine_weight.has_value();
        extent.backward = backward;
        extent.general = is_general(call.itemsize, extent.affine, o.pre_activation, o.post_activation);
    }

    // How many blocks a sample is spread over, with bytes(ranks) of shared memory a block.
    template <class Bytes>
    void choose_ranks(const KernelLimits& limits, Bytes bytes, int maps = 1) {
        const int64_t sample = int64_t(call.channels) * call.spatial * call.itemsize;
        ranks = cluster_for(limits, limits.processors, batch, sample, bytes);
        STD_TORCH_CHECK(ranks > 0, "fused_attn: a sample of ", maps > 1 ? std::to_string(maps) + " x " : "",
                        call.channels, " x ", call.spatial, " elements of ", call.itemsize,
                        " bytes does not fit the shared memory of a cluster (on this device at most ", limits.cluster,
                        limits.cluster > 1 ? " blocks" : " block", " of ", limits.shared / 1024,
                        " KiB); use the triton backend");
    }

    void* contiguous(const Tensor& t) {
        kept.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
        return kept.back().data_ptr();
    }
    const char* map(const Tensor& t) {
        kept.push_back(in_layout_of(x, t));
        return static_cast<const char*>(kept.back().data_ptr());
    }
    void* scratch(bool wanted, int64_t rows, int64_t columns) {
        if (!wanted) return nullptr;
        kept.push_back(new_tensor(x, {rows, columns}, acc));
        return kept.back().data_ptr();
    }
    // What backward reads, and scratch with one row a sample: gradients of the logits and sums for the affine
    // parameters.
    void backward_tensors(const Tensor& grad, const OptionalTensor& y, const Tensor& grad_x,
                          const Tensor& grad_residual) {
        STD_TORCH_CHECK(y || call.post_activation != kRelu, "fused_attn: backward through a relu needs y");
        call.grad = map(grad);
        if (y) call.y_saved = map(*y);
        call.grad_x = static_cast<char*>(grad_x.data_ptr());
        call.grad_residual = static_cast<char*>(grad_residual.data_ptr());
        call.grad_z2 = scratch(call.layers > 0, batch, call.channels);
        call.grad_z1 = scratch(call.layers == 2, batch, (call.pool == kBoth ? 2 : 1) * call.hidden);
        call.tap_sums = scratch(call.taps > 0, batch * ranks, call.taps + 1);
        call.affine_weight_sums = scratch(extent.affine, affine_rows(), call.channels);
        call.affine_bias_sums = scratch(extent.affine, affine_rows(), call.channels);
    }
    int64_t affine_rows() const { return batch * (extent.channels_last ? ranks : 1); }

    Small small(const OptionalTensor& tensor) {
        if (!tensor) return {};
        kept.push_back(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor));
        return {kept.back().data_ptr(), dtype_code(tensor->scalar_type())};
    }
};

// The kernel for a call's dtype and layout: Of<Io, kChannelsLast>::kernel.
template <template <class, bool> class Of>
auto kernel_for(const Prepared& p) {
    const bool last = p.extent.channels_last;
    if (p.call.dtype == kFloat64) return last ? Of<Untyped<double>, true>::kernel : Of<Untyped<double>, false>::kernel;
    if (p.extent.general) return last ? Of<Untyped<float>, true>::kernel : Of<Untyped<float>, false>::kernel;
    if (p.call.dtype == kFloat16) return last ? Of<Typed<Half>, true>::kernel : Of<Typed<Half>, false>::kernel;
    if (p.call.dtype == kBFloat16) return last ? Of<Typed<BFloat16>, true>::kernel : Of<Typed<BFloat16>, false>::kernel;
    return last ? Of<Typed<float>, true>::kernel : Of<Typed<float>, false>::kernel;
}

// The gradients of the parameters, by one small kernel.
void run_parameter_grads(const Prepared& p, const ParameterGrads& jobs, cudaStream_t stream) {
    if (jobs.count == 0) return;
    constexpr int kReduceThreads = 256;
    const dim3 grid(static_cast<unsigned>(jobs.blocks(kReduceThreads)), static_cast<unsigned>(jobs.count));
    const uint32_t bytes = kReduceThreads * (p.acc == ScalarType::Double ? 8 : 4);
    if (p.acc == ScalarType::Double) {
        launch(parameter_grad_kernel<double>, jobs, grid, kReduceThreads, 1, bytes, stream);
    } else {
        launch(parameter_grad_kernel<float>, jobs, grid, kReduceThreads, 1, bytes, stream);
    }
}

template <class Argument>
void run(const Prepared& p, void (*kernel)(Argument), const Argument& call, uint32_t bytes, cudaStream_t stream) {
    if (p.batch == 0) return;
    STD_TORCH_CHECK(p.batch * p.ranks < (int64_t(1) << 31), "fused_attn: batch too large for one launch");
    launch(kernel, call, dim3(static_cast<unsigned>(p.batch * p.ranks)), kThreads, p.ranks, bytes, stream);
}

}  // namespace
}  // namespace fused_attn::cuda

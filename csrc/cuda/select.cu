// Host side of resident select: how the branches lie, does the sample fit, which kernel, launch, register.
#include "select.cuh"

#include "launch.h"

namespace fused_attn::cuda {
namespace {

template <class Io, bool kChannelsLast>
struct ForwardKernel {
    static constexpr auto kernel = select_kernel<Io, kChannelsLast>;
};
template <class Io, bool kChannelsLast>
struct BackwardKernel {
    static constexpr auto kernel = select_backward_kernel<Io, kChannelsLast>;
};

// A branch (B, C, *spatial), as it lies in its tensor.
struct BranchView {
    char* data;
    std::vector<int64_t> sizes, strides;

    int64_t rank() const { return static_cast<int64_t>(sizes.size()); }
    int64_t numel() const {
        int64_t count = 1;
        for (const int64_t size : sizes) count *= size;
        return count;
    }
    // Whether each sample lies as (C, *spatial).
    bool is_nchw() const {
        int64_t expected = 1;
        for (int64_t axis = rank() - 1; axis > 0; --axis) {
            if (sizes[axis] != 1 && strides[axis] != expected) return false;
            expected *= sizes[axis];
        }
        return true;
    }
    // The distance of positions where each sample lies as (*spatial, C), positions C or more apart; else 0.
    int64_t pitch() const {
        const int64_t channels = sizes[1];
        if (channels != 1 && strides[1] != 1) return 0;
        int64_t found = 0, expected = 0;
        for (int64_t axis = rank() - 1; axis > 1; --axis) {
            if (sizes[axis] == 1) continue;
            if (found == 0) found = expected = strides[axis];
            if (strides[axis] != expected || found < channels) return 0;
            expected *= sizes[axis];
        }
        return found == 0 ? channels : found;
    }
};

std::vector<BranchView> views(const std::vector<Tensor>& tensors, int64_t paths) {
    std::vector<BranchView> found;
    const bool stacked = static_cast<int64_t>(tensors.size()) != paths;
    for (int64_t m = 0; m < paths; ++m) {
        const Tensor& t = tensors[stacked ? 0 : m];
        BranchView view = {static_cast<char*>(t.data_ptr()),
                           {t.sizes().begin(), t.sizes().end()},
                           {t.strides().begin(), t.strides().end()}};
        if (stacked) {
            view.data += m * view.strides[1] * static_cast<int64_t>(t.element_size());
            view.sizes.erase(view.sizes.begin() + 1);
            view.strides.erase(view.strides.begin() + 1);
        }
        found.push_back(std::move(view));
    }
    return found;
}
// The strides of a dense tensor that lies as its axes in the given order.
std::vector<int64_t> strides_in_order(const std::vector<int64_t>& sizes, const std::vector<int64_t>& order) {
    std::vector<int64_t> strides(sizes.size());
    int64_t stride = 1;
    for (size_t i = order.size(); i-- > 0;) {
        strides[order[i]] = stride;
        stride *= std::max<int64_t>(sizes[order[i]], 1);
    }
    return strides;
}
Tensor empty_in_order(const Tensor& like, const std::vector<int64_t>& sizes, const std::vector<int64_t>& order) {
    const std::vector<int64_t> strides = strides_in_order(sizes, order);
    int32_t dtype = 0, device = 0;
    AtenTensorHandle made = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_dtype(like.get(), &dtype) == 0 &&
                        aoti_torch_get_device_type(like.get(), &device) == 0 &&
                        aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(),
                                                 dtype, device, like.get_device_index(), &made) == 0,
                    "fused_attn: cannot allocate a map");
    return Tensor(made);
}

struct SelectOptions {
    Tensor weight1;
    OptionalTensor bias1;
    Tensor weight2;
    OptionalTensor bias2, affine_weight, affine_bias;
    int64_t paths, groups, activation, gate, pre_activation;
};

// The branches that a call reads, as they lie or as NCHW copies, and tensors in their kind of layout.
struct Inputs {
    std::vector<Tensor> tensors;
    std::vector<BranchView> branches;
    bool channels_last = false;

    Inputs(const std::vector<Tensor>& given, int64_t paths) : tensors(given) {
        STD_TORCH_CHECK(paths >= 1 && paths <= kMostPaths, "fused_attn: the kernels hold at most ", kMostPaths,
                        " branches; got ", paths, "; use the reference backend");
        STD_TORCH_CHECK(!given.empty() && (given.size() == 1 || static_cast<int64_t>(given.size()) == paths),
                        "fused_attn: expected one stacked tensor or as many branches as paths");
        branches = views(tensors, paths);
        for (const BranchView& branch : branches)
            STD_TORCH_CHECK(branch.sizes == branches[0].sizes && branch.rank() >= 3 && branch.rank() <= 5,
                            "fused_attn: expected branches of one shape, (B, C, *spatial)");
        const auto all = [&](auto which) { return std::all_of(branches.begin(), branches.end(), which); };
        if (branches[0].numel() == 0 || all([](const BranchView& branch) { return branch.is_nchw(); })) return;
        channels_last = all([](const BranchView& branch) { return branch.pitch() > 0; });
        if (channels_last) return;
        for (Tensor& tensor : tensors) tensor = torch::stable::contiguous(tensor);
        branches = views(tensors, paths);
    }
    // The axes of a map (B, C, *spatial), slowest first; the map; a gradient of any strides as such a map.
    std::vector<int64_t> order() const {
        std::vector<int64_t> axes = {0};
        for (int64_t axis = 2; axis < branches[0].rank(); ++axis) axes.push_back(axis);
        axes.insert(channels_last ? axes.end() : axes.begin() + 1, 1);
        return axes;
    }
    Tensor empty_map() const { return empty_in_order(tensors[0], branches[0].sizes, order()); }
    Tensor in_kind(const Tensor& grad) const {
        const std::vector<int64_t> strides = strides_in_order(branches[0].sizes, order());
        bool same = is_aligned(grad);
        for (int64_t axis = 0; axis < grad.dim(); ++axis)
            same = same && (grad.size(axis) == 1 || grad.stride(axis) == strides[axis]);
        if (same) return grad;
        Tensor copy = empty_map();
        torch::stable::copy_(copy, grad);
        return copy;
    }
    // As many tensors as were given.
    std::vector<Tensor> empty_gradients() const {
        std::vector<Tensor> gradients;
        if (tensors.size() == branches.size()) {
            for (size_t i = 0; i < tensors.size(); ++i) gradients.push_back(empty_map());
            return gradients;
        }
        const Tensor& stacked = tensors[0];
        std::vector<int64_t> axes = {0};
        for (const int64_t axis : order())
            if (axis > 0) axes.push_back(axis + 1);
        const bool pixels_shared = channels_last && stacked.stride(1) < branches[0].pitch();
        axes.insert(pixels_shared ? axes.end() - 1 : axes.begin() + 1, 1);
        gradients.push_back(empty_in_order(stacked, {stacked.sizes().begin(), stacked.sizes().end()}, axes));
        return gradients;
    }
    Branches maps(const std::vector<BranchView>& of) const {
        Branches maps;
        for (size_t m = 0; m < of.size(); ++m) {
            maps.map[m] = of[m].data;
            maps.sample_stride[m] = of[m].strides[0];
            maps.pitch[m] = channels_last ? of[m].pitch() : of[m].sizes[1];
        }
        return maps;
    }
};

struct PreparedSelect : Prepared {
    SelectCall select;
    SelectExtent select_extent;

    // `map`: y, or grad in y's layout.
    PreparedSelect(const Tensor& map, const Inputs& inputs, const SelectOptions& o, bool backward,
                   const OnDevice& device)
        : Prepared(map) {
        select.paths = static_cast<int>(o.paths);
        select.groups = static_cast<int>(o.groups);
        select.from = inputs.maps(inputs.branches);
        call.hidden = static_cast<int>(o.weight1.size(0));
        STD_TORCH_CHECK(o.groups >= 1 && call.channels % o.groups == 0 && call.hidden % o.groups == 0 &&
                            o.weight1.numel() == int64_t(call.hidden) * (call.channels / o.groups) &&
                            o.weight2.numel() == o.paths * call.channels * (call.hidden / o.groups),
                        "fused_attn: expected weights (H, C / groups) and (paths * C, H / groups)");
        call.activation = static_cast<int>(o.activation);
        call.gate = static_cast<int>(o.gate);
        call.pre_activation = static_cast<int>(o.pre_activation);
        call.weight1 = small(o.weight1);
        call.bias1 = small(o.bias1);
        call.weight2 = small(o.weight2);
        call.bias2 = small(o.bias2);
        call.affine_weight = small(o.affine_weight);
        call.affine_bias = small(o.affine_bias);
        select.sample = call;
        call.state_width = state_width(select);

        extent.hidden = call.hidden;
        extent.affine = o.affine_weight.has_value();
        extent.backward = backward;
        extent.channels_last = inputs.channels_last;  // what lies so may be NCHW too
        call.channel_of = Divider(static_cast<uint32_t>(inputs.channels_last ? call.channels : call.spatial));
        extent.general = is_general_selection(call.itemsize, o.pre_activation);
        select_extent = {extent, select.paths};
        const KernelLimits limits = backward ? device.limits(kernel_for<BackwardKernel>(*this))
                                             : device.limits(kernel_for<ForwardKernel>(*this));
        choose_ranks(limits, [&](int ranks) { return carve(select_extent, ranks).bytes; }, select.paths);
        const SelectCarve places = carve(select_extent, ranks);
        call.carve = places.sample;
        select.tile = places.tile;
    }
    template <template <class, bool> class Of>
    void run_kernel(cudaStream_t stream) {
        select.sample = call;
        run(*this, kernel_for<Of>(*this), select, call.carve.bytes, stream);
    }
};

std::tuple<Tensor, Tensor> select(const std::vector<Tensor>& branches, const Tensor& weight1,
                                  const OptionalTensor& bias1, const Tensor& weight2, const OptionalTensor& bias2,
                                  const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t paths,
                                  int64_t groups, int64_t activation, int64_t gate, int64_t pre_activation) {
    const Inputs inputs(branches, paths);
    const OnDevice device(branches[0].get_device_index());
    Tensor y = inputs.empty_map();
    PreparedSelect p(
        y, inputs,
        {weight1, bias1, weight2, bias2, affine_weight, affine_bias, paths, groups, activation, gate, pre_activation},
        false, device);
    Tensor state = new_tensor(y, {p.batch, p.call.state_width}, p.acc);
    p.call.y = static_cast<char*>(y.data_ptr());
    p.call.state = state.data_ptr();
    p.run_kernel<ForwardKernel>(device.stream());
    return {y, state};
}

std::tuple<std::vector<Tensor>, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> select_backward(
    const Tensor& grad_in, const std::vector<Tensor>& branches, const Tensor& state, const Tensor& weight1,
    const OptionalTensor& bias1, const Tensor& weight2, const OptionalTensor& bias2,
    const OptionalTensor& affine_weight, const OptionalTensor& affine_bias, int64_t paths, int64_t groups,
    int64_t activation, int64_t gate, int64_t pre_activation) {
    const Inputs inputs(branches, paths);
    const OnDevice device(branches[0].get_device_index());
    const Tensor grad = inputs.in_kind(grad_in);
    PreparedSelect p(
        grad, inputs,
        {weight1, bias1, weight2, bias2, affine_weight, affine_bias, paths, groups, activation, gate, pre_activation},
        true, device);
    const std::vector<Tensor> grads = inputs.empty_gradients();
    p.select.to = inputs.maps(views(grads, paths));
    p.call.grad = static_cast<const char*>(grad.data_ptr());
    p.call.state = p.contiguous(state);
    p.call.grad_z2 = p.scratch(true, p.batch, paths * p.call.channels);
    p.call.grad_z1 = p.scratch(true, p.batch, p.call.hidden);
    p.call.affine_weight_sums = p.scratch(p.extent.affine, p.affine_rows(), paths * p.call.channels);
    p.call.affine_bias_sums = p.scratch(p.extent.affine, p.affine_rows(), paths * p.call.channels);
    const cudaStream_t stream = device.stream();
    p.run_kernel<BackwardKernel>(stream);

    const OptionalTensor parameters[6] = {weight1, bias1, weight2, bias2, affine_weight, affine_bias};
    std::vector<Tensor> of;
    bool wanted[6];
    for (int i = 0; i < 6; ++i) {
        wanted[i] = parameters[i].has_value();
        of.push_back(gradient_like(parameters[i], grad));
    }
    const auto target = [&](int which, ParameterGrad& job) {
        job.to = of[which].data_ptr();
        job.dtype = dtype_code(of[which].scalar_type());
    };
    run_parameter_grads(p, parameter_grads(p.select, p.batch, p.affine_rows(), wanted, target), stream);
    return {grads, of[0], of[1], of[2], of[3], of[4], of[5]};
}

}  // namespace
}  // namespace fused_attn::cuda

STABLE_TORCH_LIBRARY_IMPL(fused_attn, CUDA, m) {
    m.impl("select.cuda", TORCH_BOX(&fused_attn::cuda::select));
    m.impl("select_backward.cuda", TORCH_BOX(&fused_attn::cuda::select_backward));
}

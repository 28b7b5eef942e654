// Host side of the resident channel gate: does the sample fit, which kernel, launch, register. Only the
// stable ABI and the CUDA runtime (linked statically), so that it builds and loads beside a torch without
// CUDA.
#include "channel_gate.cuh"

#include <cuda_runtime.h>

#include <optional>
#include <tuple>

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

// Absent where torch has no CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace fused_attn::cuda {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void check(cudaError_t code, const char* what) {
    STD_TORCH_CHECK(code == cudaSuccess, "fused_attn: ", what, ": ", cudaGetErrorString(code));
}

// Makes a device current, and the one before it on leaving.
class OnDevice {
  public:
    explicit OnDevice(const Tensor& x) : device_(x.get_device_index()) {
        check(cudaGetDevice(&before_), "cudaGetDevice");
        if (device_ != before_) check(cudaSetDevice(device_), "cudaSetDevice");
    }
    ~OnDevice() {
        if (device_ != before_) cudaSetDevice(before_);
    }
    int attribute(cudaDeviceAttr which) const {
        int value = 0;
        check(cudaDeviceGetAttribute(&value, which, device_), "cudaDeviceGetAttribute");
        return value;
    }
    int capability() const {
        return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
    }
    cudaStream_t stream() const {
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fused_attn: this torch has no CUDA");
        void* stream = nullptr;
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(device_, &stream) == 0, "fused_attn: no CUDA stream");
        return static_cast<cudaStream_t>(stream);
    }

  private:
    int device_, before_ = 0;
};

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
    int ranks;
    ScalarType acc;

    Prepared(const Tensor& x_in, const Options& o, bool backward, const OnDevice& device) : x(dense_map(x_in)) {
        int64_t spatial = 1;
        for (int64_t axis = 2; axis < x.dim(); ++axis) spatial *= x.size(axis);
        batch = x.size(0);
        STD_TORCH_CHECK(o.pool != kBoth, "fused_attn: there is no resident kernel for both pools");
        STD_TORCH_CHECK(x.size(1) < (1 << 22) && spatial < (1 << 30), "fused_attn: map too large to be resident");
        acc = x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;

        call.dtype = dtype_code(x.scalar_type());
        call.itemsize = call.dtype == kFloat64 ? 8 : call.dtype == kFloat32 ? 4 : 2;
        call.x = static_cast<const char*>(x.data_ptr());
        call.channels = static_cast<int>(x.size(1));
        call.spatial = static_cast<int>(spatial);
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
        call.state_width = 2 * call.channels + call.hidden + (o.pool != kAvg && o.ties == kEven ? call.channels : 0);
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

        const bool general = o.affine_weight || o.pre_activation != kIdentity || call.dtype == kFloat64 ||
                             (o.post_activation != kIdentity && o.post_activation != kRelu);
        extent = {call.channels,
                  call.spatial,
                  call.hidden,
                  call.layers,
                  call.layer,
                  call.pool,
                  call.itemsize,
                  !x.is_contiguous(),
                  o.affine_weight.has_value(),
                  backward,
                  general};
        const int capability = device.capability();
        ranks = resident_cluster_size(extent, capability);
        STD_TORCH_CHECK(ranks > 0, "fused_attn: a sample of ", call.channels, " x ", spatial, " elements of ",
                        call.itemsize, " bytes does not fit the shared memory of a cluster (compute capability ",
                        capability / 10, ".", capability % 10, ", at most ", cluster_limit(capability),
                        " blocks); use the triton backend");
        // Few samples: more blocks each, while all of them run at once and keep a few KiB to work on.
        const int64_t bytes = int64_t(call.channels) * call.spatial * call.itemsize;
        const int processors = device.attribute(cudaDevAttrMultiProcessorCount);
        while (2 * ranks <= std::min(8, cluster_limit(capability)) && batch * 2 * ranks <= processors &&
               bytes / (2 * ranks) >= 8192)
            ranks *= 2;
        call.carve = carve(extent, ranks);
        call.channel_of = Divider(static_cast<uint32_t>(extent.channels_last ? call.channels : call.spatial));
    }

    Small small(const OptionalTensor& tensor) {
        if (!tensor) return {};
        kept.push_back(tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor));
        return {kept.back().data_ptr(), dtype_code(tensor->scalar_type())};
    }
};

template <class Argument>
void launch(void (*kernel)(Argument), const Argument& argument, dim3 grid, int threads, int ranks, uint32_t bytes,
            cudaStream_t stream) {
    cudaLaunchConfig_t config = {};
    cudaLaunchAttribute cluster = {};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = bytes;
    config.stream = stream;
    if (bytes > 48 * 1024)
        check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
              "shared memory of a block");
    if (ranks > 1) {
        if (ranks > 8)
            check(cudaFuncSetAttribute(kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1), "cluster of 16");
        cluster.id = cudaLaunchAttributeClusterDimension;
        cluster.val.clusterDim = {static_cast<unsigned>(ranks), 1, 1};
        config.attrs = &cluster;
        config.numAttrs = 1;
    }
    check(cudaLaunchKernelEx(&config, kernel, argument), "launch of the channel gate");
    check(cudaGetLastError(), "launch of the channel gate");
}

using Kernel = void (*)(Call);

template <template <class, bool> class Of>
Kernel kernel_for(const Prepared& p) {
    const bool last = p.extent.channels_last;
    if (p.call.dtype == kFloat64) return last ? Of<Untyped<double>, true>::kernel : Of<Untyped<double>, false>::kernel;
    if (p.extent.general) return last ? Of<Untyped<float>, true>::kernel : Of<Untyped<float>, false>::kernel;
    if (p.call.dtype == kFloat16) return last ? Of<Typed<Half>, true>::kernel : Of<Typed<Half>, false>::kernel;
    if (p.call.dtype == kBFloat16) return last ? Of<Typed<BFloat16>, true>::kernel : Of<Typed<BFloat16>, false>::kernel;
    return last ? Of<Typed<float>, true>::kernel : Of<Typed<float>, false>::kernel;
}
template <class Io, bool kChannelsLast>
struct ForwardKernel {
    static constexpr Kernel kernel = channel_gate_kernel<Io, kChannelsLast>;
};
template <class Io, bool kChannelsLast>
struct BackwardKernel {
    static constexpr Kernel kernel = channel_gate_backward_kernel<Io, kChannelsLast>;
};

void run(const Prepared& p, Kernel kernel, cudaStream_t stream) {
    if (p.batch == 0) return;
    STD_TORCH_CHECK(p.batch * p.ranks < (int64_t(1) << 31), "fused_attn: batch too large for one launch");
    launch(kernel, p.call, dim3(static_cast<unsigned>(p.batch * p.ranks)), kThreads, p.ranks, p.call.carve.bytes,
           stream);
}

std::tuple<Tensor, Tensor, Tensor> channel_gate(const Tensor& x, const OptionalTensor& weight1,
                                                const OptionalTensor& bias1, const OptionalTensor& weight2,
                                                const OptionalTensor& bias2, const OptionalTensor& affine_weight,
                                                const OptionalTensor& affine_bias, const OptionalTensor& residual,
                                                int64_t layer, int64_t pool, int64_t ties, int64_t activation,
                                                int64_t gate, int64_t pre_activation, int64_t post_activation) {
    const OnDevice device(x);
    Prepared p(x,
               {weight1, bias1, weight2, bias2, affine_weight, affine_bias, residual, layer, pool, ties, activation,
                gate, pre_activation, post_activation},
               false, device);
    Tensor y = torch::stable::empty_like(p.x);
    Tensor state = new_tensor(x, {p.batch, p.call.state_width}, p.acc);
    Tensor index =
        pool == kAvg ? new_tensor(x, {0}, ScalarType::Int) : new_tensor(x, {p.batch, p.call.channels}, ScalarType::Int);
    p.call.y = static_cast<char*>(y.data_ptr());
    p.call.state = state.data_ptr();
    p.call.index = static_cast<int32_t*>(index.data_ptr());
    run(p, kernel_for<ForwardKernel>(p), device.stream());
    return {y, state, index};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> channel_gate_backward(
    const Tensor& grad_in, const Tensor& x, const OptionalTensor& y, const Tensor& state_in, const Tensor& index_in,
    const OptionalTensor& weight1, const OptionalTensor& bias1, const OptionalTensor& weight2,
    const OptionalTensor& bias2, const OptionalTensor& affine_weight, const OptionalTensor& affine_bias,
    const OptionalTensor& residual, int64_t layer, int64_t pool, int64_t ties, int64_t activation, int64_t gate,
    int64_t pre_activation, int64_t post_activation) {
    const OnDevice device(x);
    Prepared p(x,
               {weight1, bias1, weight2, bias2, affine_weight, affine_bias, residual, layer, pool, ties, activation,
                gate, pre_activation, post_activation},
               true, device);
    Call& call = p.call;
    const auto contiguous = [&](const Tensor& t) {
        p.kept.push_back(t.is_contiguous() ? t : torch::stable::contiguous(t));
        return p.kept.back().data_ptr();
    };
    const auto map = [&](const Tensor& t) {
        p.kept.push_back(in_layout_of(p.x, t));
        return static_cast<const char*>(p.kept.back().data_ptr());
    };
    call.grad = map(grad_in);
    if (y) call.y_saved = map(*y);
    call.state = contiguous(state_in);
    call.index = static_cast<int32_t*>(contiguous(index_in));
    STD_TORCH_CHECK(y || post_activation != kRelu, "fused_attn: backward through a relu needs y");

    Tensor grad_x = torch::stable::empty_like(p.x);
    Tensor grad_residual =
        post_activation == kIdentity ? new_tensor(x, {0}, x.scalar_type()) : torch::stable::empty_like(p.x);
    call.grad_x = static_cast<char*>(grad_x.data_ptr());
    call.grad_residual = static_cast<char*>(grad_residual.data_ptr());

    // Scratch, one row a sample: gradients of the logits and sums for the affine parameters.
    const int64_t channels = call.channels, hidden = call.hidden;
    const int64_t affine_rows = p.batch * (p.extent.channels_last ? p.ranks : 1);
    const auto scratch = [&](bool wanted, int64_t rows, int64_t columns) -> void* {
        if (!wanted) return nullptr;
        p.kept.push_back(new_tensor(x, {rows, columns}, p.acc));
        return p.kept.back().data_ptr();
    };
    call.grad_z2 = scratch(call.layers > 0, p.batch, channels);
    call.grad_z1 = scratch(call.layers == 2, p.batch, hidden);
    call.affine_weight_sums = scratch(affine_weight.has_value(), affine_rows, channels);
    call.affine_bias_sums = scratch(affine_weight.has_value(), affine_rows, channels);
    const cudaStream_t stream = device.stream();
    run(p, kernel_for<BackwardKernel>(p), stream);

    const Tensor grads[6] = {gradient_like(weight1, x), gradient_like(bias1, x),         gradient_like(weight2, x),
                             gradient_like(bias2, x),   gradient_like(affine_weight, x), gradient_like(affine_bias, x)};
    const bool wanted[6] = {weight1.has_value(), bias1.has_value(),         weight2.has_value(),
                            bias2.has_value(),   affine_weight.has_value(), affine_bias.has_value()};
    const ParameterGrads jobs = parameter_grads(call, p.batch, affine_rows, wanted, [&](int which, ParameterGrad& job) {
        job.to = grads[which].data_ptr();
        job.dtype = dtype_code(grads[which].scalar_type());
    });
    if (jobs.count > 0) {
        constexpr int kReduceThreads = 256;
        const dim3 grid(static_cast<unsigned>(jobs.blocks(kReduceThreads)), static_cast<unsigned>(jobs.count));
        const uint32_t bytes = kReduceThreads / 32 * 8;
        if (p.acc == ScalarType::Double) {
            launch(parameter_grad_kernel<double>, jobs, grid, kReduceThreads, 1, bytes, stream);
        } else {
            launch(parameter_grad_kernel<float>, jobs, grid, kReduceThreads, 1, bytes, stream);
        }
    }
    return {grad_x, grad_residual, grads[0], grads[1], grads[2], grads[3], grads[4], grads[5]};
}

// Blocks a sample is spread over at the least, 0 where it must stream: what a caller asks before it calls.
// layers and hidden as in the excitation (hidden only counts for two layers); general: a prologue, an
// epilogue other than ReLU.
int64_t cluster_size_of(int64_t channels, int64_t spatial, int64_t itemsize, bool channels_last, int64_t layers,
                        int64_t hidden, int64_t layer, int64_t pool, bool affine, bool general, bool backward,
                        int64_t capability) {
    if (channels < 1 || channels >= (1 << 22) || spatial >= (1 << 30)) return 0;
    const Extent extent = {static_cast<int>(channels),
                           static_cast<int>(spatial),
                           static_cast<int>(hidden),
                           static_cast<int>(layers),
                           static_cast<int>(layer),
                           static_cast<int>(pool),
                           static_cast<int>(itemsize),
                           channels_last,
                           affine,
                           backward,
                           general || affine || itemsize == 8};
    return resident_cluster_size(extent, static_cast<int>(capability));
}

}  // namespace
}  // namespace fused_attn::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(fused_attn, m) {
    m.def(
        "resident_cluster_size(int channels, int spatial, int itemsize, bool channels_last, int layers, int "
        "hidden,"
        " int layer, int pool, bool affine, bool general, bool backward, int capability) -> int");
}
STABLE_TORCH_LIBRARY_IMPL(fused_attn, CompositeExplicitAutograd, m) {
    m.impl("resident_cluster_size", TORCH_BOX(&fused_attn::cuda::cluster_size_of));
}
STABLE_TORCH_LIBRARY_IMPL(fused_attn, CUDA, m) {
    m.impl("channel_gate.cuda", TORCH_BOX(&fused_attn::cuda::channel_gate));
    m.impl("channel_gate_backward.cuda", TORCH_BOX(&fused_attn::cuda::channel_gate_backward));
}

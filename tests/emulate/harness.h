// What the emulated programs share. A program runs as `PROGRAM DIRECTORY`: DIRECTORY/case.txt has lines "name value"
// and "tensor name dtype count"; tensors lie in name.bin, results go to out_name.bin, traffic to stdout.
#pragma once

#include "../../csrc/cuda/channel_gate.cuh"

#include <fstream>
#include <map>

using namespace fused_attn;
using namespace fused_attn::cuda;

namespace {

struct Buffer {
    char* data = nullptr;
    size_t bytes = 0, item = 0;
    int dtype = 0;
};
std::map<std::string, int64_t> values;
std::map<std::string, Buffer> tensors;
std::string folder;

size_t itemsize(int dtype) { return dtype == kFloat64 ? 8 : dtype == kFloat32 ? 4 : 2; }
Buffer allocate(size_t count, int dtype, size_t item) {
    Buffer b{nullptr, count * item, item, dtype};
    void* p = nullptr;
    if (posix_memalign(&p, 16, std::max<size_t>(b.bytes, 1))) std::abort();
    b.data = static_cast<char*>(p);
    std::memset(b.data, 0xff, b.bytes);  // NaN
    return b;
}
char* data(const char* name) { return tensors.count(name) ? tensors[name].data : nullptr; }
Small small(const char* name) { return tensors.count(name) ? Small{data(name), tensors[name].dtype} : Small{}; }
char* output(const std::string& name, size_t count, int dtype, size_t item) {
    tensors["out_" + name] = allocate(count, dtype, item);
    return tensors["out_" + name].data;
}

void read_case(const char* path) {
    folder = path;
    std::ifstream file(folder + "/case.txt");
    for (std::string word, name; file >> word;) {
        if (word != "tensor") {
            file >> values[word];
            continue;
        }
        int dtype;
        size_t count;
        file >> name >> dtype >> count;
        Buffer b = allocate(count, dtype, itemsize(dtype));
        std::ifstream(folder + "/" + name + ".bin", std::ios::binary).read(b.data, b.bytes);
        tensors[name] = b;
    }
}
int value(const char* name) { return static_cast<int>(values.at(name)); }

// The block that gates channels: sizes, options, inputs, and outputs of forward.
Extent extent_of_case() {
    Extent extent = {value("channels"),
                     value("spatial"),
                     value("hidden"),
                     value("layers"),
                     value("layer"),
                     value("pool"),
                     static_cast<int>(itemsize(tensors["x"].dtype)),
                     value("channels_last") != 0,
                     tensors.count("affine_weight") != 0,
                     false,
                     value("general") != 0,
                     value("threads")};
    extent.gated = value("gated") != 0;
    return extent;
}
Call call_of_case(const Extent& extent) {
    const int batch = value("batch");
    const size_t acc = extent.acc(), elements = size_t(batch) * extent.channels * extent.spatial;
    const int acc_dtype = acc == 8 ? kFloat64 : kFloat32;
    Call call;
    call.x = data("x");
    call.residual = data("residual");
    call.weight1 = small("weight1");
    call.bias1 = small("bias1");
    call.weight2 = small("weight2");
    call.bias2 = small("bias2");
    call.affine_weight = small("affine_weight");
    call.affine_bias = small("affine_bias");
    call.dtype = tensors["x"].dtype;
    call.itemsize = extent.itemsize;
    call.channels = extent.channels;
    call.spatial = extent.spatial;
    call.hidden = extent.hidden;
    call.taps = value("taps");
    call.layers = extent.layers;
    call.layer = extent.layer;
    call.pool = extent.pool;
    call.ties = value("ties");
    call.activation = value("activation");
    call.gate = value("gate");
    call.pre_activation = value("pre_activation");
    call.post_activation = value("post_activation");
    call.state_width = state_width(call);
    call.channel_of = Divider(extent.channels_last ? extent.channels : extent.spatial);
    call.y = output("y", elements, call.dtype, extent.itemsize);
    call.grad_x = output("grad_x", elements, call.dtype, extent.itemsize);
    if (call.post_activation != kIdentity)
        call.grad_residual = output("grad_residual", elements, call.dtype, extent.itemsize);
    if (!extent.gated) return call;
    call.state = output("state", size_t(batch) * call.state_width, acc_dtype, acc);
    call.index = reinterpret_cast<int32_t*>(output("index", size_t(batch) * call.channels, 0, 4));
    return call;
}
// What backward reads and the scratch it writes; returns the rows of the affine parameters' sums.
int64_t prepare_backward(Call& call, const Extent& extent) {
    const int64_t batch = value("batch"), rows = batch * (extent.channels_last ? value("ranks") : 1);
    const size_t acc = extent.acc();
    const int acc_dtype = acc == 8 ? kFloat64 : kFloat32;
    call.grad = data("grad");
    if (call.post_activation == kRelu) {
        call.y_saved = call.y;
        call.residual = nullptr;
    }
    if (call.layers) call.grad_z2 = output("grad_z2", batch * call.channels, acc_dtype, acc);
    if (call.taps) call.tap_sums = output("channel_tap_sums", batch * value("ranks") * (call.taps + 1), acc_dtype, acc);
    if (call.layers == 2) call.grad_z1 = output("grad_z1", batch * extent.branches() * call.hidden, acc_dtype, acc);
    if (extent.affine) {
        call.affine_weight_sums = output("affine_weight_sums", rows * call.channels, acc_dtype, acc);
        call.affine_bias_sums = output("affine_bias_sums", rows * call.channels, acc_dtype, acc);
    }
    return rows;
}

void watch_maps() {
    auto& m = machine::machine();
    m.random.seed(static_cast<unsigned>(value("seed")));
    m.drop_cluster_barrier = value("drop");
    for (const char* name : {"x", "residual", "grad", "out_y", "out_grad_x", "out_grad_residual"})
        if (tensors.count(name)) m.maps.push_back({name, tensors[name].data, tensors[name].bytes});
}
// Calls body(Io) for the way in which a case's kernel sees elements.
template <class Body>
void with_io(const Extent& extent, int dtype, Body body) {
    if (dtype == kFloat64) return body(Untyped<double>());
    if (extent.general) return body(Untyped<float>());
    if (dtype == kFloat16) return body(Typed<Half>());
    if (dtype == kBFloat16) return body(Typed<BFloat16>());
    return body(Typed<float>());
}
// One launch, a cluster a sample, and its traffic.
void launch_and_count(const char* direction, const Extent& extent, uint32_t bytes, std::function<void()> kernel) {
    const int64_t batch = value("batch");
    auto& m = machine::machine();
    machine::launch(batch * value("ranks"), 1, value("ranks"), value("threads"), bytes, std::move(kernel));
    int64_t moved = 0;
    for (auto& map : m.maps) {
        std::printf("%s %s %lld %lld\n", direction, map.name.c_str(), static_cast<long long>(map.read),
                    static_cast<long long>(map.written));
        moved += map.read + map.written;
        map.read = map.written = 0;
    }
    const int64_t sample = int64_t(extent.channels) * extent.spatial * extent.itemsize;
    if (batch * sample) std::printf("passes %s %.6f\n", direction, double(moved) / (batch * sample));
}
void target(const char* name, ParameterGrad& grad) {
    const Buffer like = tensors[name];
    grad.to = output(std::string("grad_") + name, like.bytes / like.item, like.dtype, like.item);
    grad.dtype = like.dtype;
}
void launch_parameter_grads(const ParameterGrads& grads, const Extent& extent) {
    if (grads.count == 0) return;
    const int threads = value("threads");
    machine::launch(grads.blocks(threads), grads.count, 1, threads, threads * 8, [&] {
        extent.acc() == 8 ? parameter_grad_kernel<double>(grads) : parameter_grad_kernel<float>(grads);
    });
}
[[noreturn]] void write_results() {
    for (auto& [name, b] : tensors)
        if (name.rfind("out_", 0) == 0)
            std::ofstream(folder + "/" + name + ".bin", std::ios::binary).write(b.data, b.bytes);
    std::fflush(stdout);
    std::_Exit(0);  // buffers live to the end
}

const char* const kParameters[6] = {"weight1", "bias1", "weight2", "bias2", "affine_weight", "affine_bias"};

}  // namespace

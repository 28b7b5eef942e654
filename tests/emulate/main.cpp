// Runs the channel gate's kernels on the emulated machine: `emulate DIRECTORY`. DIRECTORY/case.txt has lines
// "name value" and "tensor name dtype count"; tensors lie in name.bin, results go to out_name.bin, traffic to
// stdout.
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

template <class Io>
void run(bool channels_last, bool backward, const Call& call) {
    if (channels_last) {
        backward ? channel_gate_backward_kernel<Io, true>(call) : channel_gate_kernel<Io, true>(call);
    } else {
        backward ? channel_gate_backward_kernel<Io, false>(call) : channel_gate_kernel<Io, false>(call);
    }
}

}  // namespace

int main(int, char** arguments) {
    folder = arguments[1];
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
    auto value = [](const char* name) { return static_cast<int>(values.at(name)); };

    const int batch = value("batch"), ranks = value("ranks"), threads = value("threads");
    Extent extent = {value("channels"),
                     value("spatial"),
                     value("hidden"),
                     value("layers"),
                     value("layer"),
                     value("pool"),
                     0,
                     value("channels_last") != 0,
                     tensors.count("affine_weight") != 0,
                     false,
                     value("general") != 0,
                     threads};
    extent.itemsize = static_cast<int>(itemsize(tensors["x"].dtype));
    const size_t acc = extent.acc();
    const int acc_dtype = acc == 8 ? kFloat64 : kFloat32;
    const size_t elements = size_t(batch) * extent.channels * extent.spatial;

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
    call.state_width = 2 * call.channels + call.hidden + (call.pool != kAvg && call.ties == kEven ? call.channels : 0);
    call.channel_of = Divider(extent.channels_last ? extent.channels : extent.spatial);
    call.y = output("y", elements, call.dtype, extent.itemsize);
    call.state = output("state", size_t(batch) * call.state_width, acc_dtype, acc);
    call.index = reinterpret_cast<int32_t*>(output("index", size_t(batch) * call.channels, 0, 4));
    call.grad_x = output("grad_x", elements, call.dtype, extent.itemsize);
    if (call.post_activation != kIdentity)
        call.grad_residual = output("grad_residual", elements, call.dtype, extent.itemsize);

    auto& m = machine::machine();
    m.random.seed(static_cast<unsigned>(value("seed")));
    m.drop_cluster_barrier = value("drop");
    for (const char* name : {"x", "residual", "grad", "out_y", "out_grad_x", "out_grad_residual"})
        if (tensors.count(name)) m.maps.push_back({name, tensors[name].data, tensors[name].bytes});

    auto launch = [&](bool backward) {
        extent.backward = backward;
        call.carve = carve(extent, ranks);
        machine::launch(int64_t(batch) * ranks, 1, ranks, threads, call.carve.bytes, [&] {
            if (call.dtype == kFloat64) return run<Untyped<double>>(extent.channels_last, backward, call);
            if (extent.general) return run<Untyped<float>>(extent.channels_last, backward, call);
            if (call.dtype == kFloat16) return run<Typed<Half>>(extent.channels_last, backward, call);
            if (call.dtype == kBFloat16) return run<Typed<BFloat16>>(extent.channels_last, backward, call);
            return run<Typed<float>>(extent.channels_last, backward, call);
        });
        int64_t moved = 0;
        for (auto& map : m.maps) {
            std::printf("%s %s %lld %lld\n", backward ? "backward" : "forward", map.name.c_str(),
                        static_cast<long long>(map.read), static_cast<long long>(map.written));
            moved += map.read + map.written;
            map.read = map.written = 0;
        }
        if (elements)
            std::printf("passes %s %.6f\n", backward ? "backward" : "forward",
                        double(moved) / (elements * extent.itemsize));
    };
    launch(false);

    call.grad = data("grad");
    if (call.post_activation == kRelu) {
        call.y_saved = call.y;
        call.residual = nullptr;
    }
    const int64_t affine_rows = int64_t(batch) * (extent.channels_last ? ranks : 1);
    if (call.layers) call.grad_z2 = output("grad_z2", size_t(batch) * call.channels, acc_dtype, acc);
    if (call.layers == 2) call.grad_z1 = output("grad_z1", size_t(batch) * call.hidden, acc_dtype, acc);
    if (extent.affine) {
        call.affine_weight_sums = output("affine_weight_sums", affine_rows * call.channels, acc_dtype, acc);
        call.affine_bias_sums = output("affine_bias_sums", affine_rows * call.channels, acc_dtype, acc);
    }
    launch(true);

    const char* names[6] = {"weight1", "bias1", "weight2", "bias2", "affine_weight", "affine_bias"};
    bool wanted[6];
    for (int i = 0; i < 6; ++i) wanted[i] = tensors.count(names[i]) != 0;
    const ParameterGrads grads = parameter_grads(call, batch, affine_rows, wanted, [&](int i, ParameterGrad& grad) {
        const Buffer& like = tensors[names[i]];
        grad.to = output(std::string("grad_") + names[i], like.bytes / like.item, like.dtype, like.item);
        grad.dtype = like.dtype;
    });
    if (grads.count) {
        machine::launch(grads.blocks(threads), grads.count, 1, threads, threads / 32 * 8,
                        [&] { acc == 8 ? parameter_grad_kernel<double>(grads) : parameter_grad_kernel<float>(grads); });
    }
    for (auto& [name, b] : tensors)
        if (name.rfind("out_", 0) == 0)
            std::ofstream(folder + "/" + name + ".bin", std::ios::binary).write(b.data, b.bytes);
    std::fflush(stdout);
    std::_Exit(0);  // buffers live to the end
}

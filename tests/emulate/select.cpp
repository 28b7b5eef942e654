// Runs select's kernels on the emulated machine.
#include "../../csrc/cuda/select.cuh"

#include "harness.h"

namespace {

// Branch m of the maps that lie `at` elements into tensor NAMEm, or stacked in tensor NAME0.
Branches branches(const std::string& name) {
    Branches maps;
    const bool stacked = value("stacked") != 0;
    for (int m = 0; m < value("paths"); ++m) {
        const std::string i = std::to_string(m);
        const Buffer& tensor = tensors[name + (stacked ? "0" : i)];
        maps.map[m] = tensor.data + values.at(name + "_at" + i) * tensor.item;
        maps.sample_stride[m] = values.at(name + "_stride" + i);
        maps.pitch[m] = values.at(name + "_pitch" + i);
    }
    return maps;
}

}  // namespace

int main(int, char** arguments) {
    read_case(arguments[1]);
    const int64_t batch = value("batch"), ranks = value("ranks");
    SelectExtent extent;
    Extent& e = extent.sample;
    extent.paths = value("paths");
    e.channels = value("channels");
    e.spatial = value("spatial");
    e.hidden = value("hidden");
    e.channels_last = value("channels_last") != 0;
    e.affine = tensors.count("affine_weight") != 0;
    e.general = value("general") != 0;
    e.threads = value("threads");
    e.itemsize = static_cast<int>(itemsize(tensors["grad"].dtype));
    const size_t acc = e.acc(), map = size_t(batch) * e.channels * e.spatial;
    const int acc_dtype = acc == 8 ? kFloat64 : kFloat32, logits = extent.paths * e.channels;

    SelectCall select;
    Call& call = select.sample;
    call.dtype = tensors["grad"].dtype;
    call.itemsize = e.itemsize;
    call.channels = e.channels;
    call.spatial = e.spatial;
    call.hidden = e.hidden;
    call.activation = value("activation");
    call.gate = value("gate");
    call.pre_activation = value("pre_activation");
    call.weight1 = small("weight1");
    call.bias1 = small("bias1");
    call.weight2 = small("weight2");
    call.bias2 = small("bias2");
    call.affine_weight = small("affine_weight");
    call.affine_bias = small("affine_bias");
    call.channel_of = Divider(e.channels_last ? e.channels : e.spatial);
    select.paths = extent.paths;
    select.groups = value("groups");
    call.state_width = state_width(select);
    call.y = output("y", map, call.dtype, e.itemsize);
    call.state = output("state", size_t(batch) * call.state_width, acc_dtype, acc);
    for (int m = 0; m < (value("stacked") ? 1 : extent.paths); ++m) {
        const Buffer& like = tensors["to" + std::to_string(m)];
        output("to" + std::to_string(m), like.bytes / like.item, like.dtype, like.item);
        tensors["to" + std::to_string(m)] = tensors["out_to" + std::to_string(m)];
    }
    select.from = branches("from");
    select.to = branches("to");
    watch_maps();
    for (const char* name : {"from", "out_to"})
        for (int m = 0; m < (value("stacked") ? 1 : extent.paths); ++m) {
            const Buffer& tensor = tensors[name + std::to_string(m)];
            machine::machine().maps.push_back({name + std::to_string(m), tensor.data, tensor.bytes});
        }

    const auto launch = [&](bool backward) {
        e.backward = backward;
        const SelectCarve places = carve(extent, static_cast<int>(ranks));
        call.carve = places.sample;
        select.tile = places.tile;
        launch_and_count(backward ? "backward" : "forward", e, places.bytes, [&] {
            with_io(e, call.dtype, [&](auto io) {
                using Io = decltype(io);
                if (e.channels_last) {
                    backward ? select_backward_kernel<Io, true>(select) : select_kernel<Io, true>(select);
                } else {
                    backward ? select_backward_kernel<Io, false>(select) : select_kernel<Io, false>(select);
                }
            });
        });
    };
    launch(false);
    const int64_t affine_rows = batch * (e.channels_last ? ranks : 1);
    call.grad = data("grad");
    call.grad_z2 = output("grad_z2", batch * logits, acc_dtype, acc);
    call.grad_z1 = output("grad_z1", batch * e.hidden, acc_dtype, acc);
    if (e.affine) {
        call.affine_weight_sums = output("affine_weight_sums", affine_rows * logits, acc_dtype, acc);
        call.affine_bias_sums = output("affine_bias_sums", affine_rows * logits, acc_dtype, acc);
    }
    launch(true);

    bool wanted[6];
    for (int i = 0; i < 6; ++i) wanted[i] = tensors.count(kParameters[i]) != 0;
    launch_parameter_grads(
        parameter_grads(select, batch, affine_rows, wanted, [](int i, ParameterGrad& g) { target(kParameters[i], g); }),
        e);
    write_results();
}

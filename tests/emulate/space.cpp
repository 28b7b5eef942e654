// Runs the kernels of spatial_gate and cbam on the emulated machine.
#include "../../csrc/cuda/spatial_gate.cuh"

#include "harness.h"

template <class Io, bool kChannelsLast>
void run(bool backward, const SpaceCall& call) {
    backward ? space_backward_kernel<Io, kChannelsLast>(call) : space_kernel<Io, kChannelsLast>(call);
}

int main(int, char** arguments) {
    read_case(arguments[1]);
    SpaceExtent extent;
    extent.sample = extent_of_case();
    extent.grid = {{value("depth"), value("height"), value("width")},
                   {value("kernel_depth"), value("kernel_height"), value("kernel_width")}};
    const int64_t batch = value("batch"), ranks = value("ranks"), taps = 2 * extent.grid.taps();
    const size_t acc = extent.sample.acc();
    const int acc_dtype = acc == 8 ? kFloat64 : kFloat32;
    SpaceCall call;
    call.sample = call_of_case(extent.sample);
    call.grid = extent.grid;
    call.weight = small("weight");
    call.bias = small("bias");
    call.mean_first = value("mean_first");
    call.ties = value("space_ties");
    call.gate = value("space_gate");
    call.state = output("space_state", size_t(batch) * 3 * call.sample.spatial, acc_dtype, acc);
    call.index = reinterpret_cast<int32_t*>(output("space_index", size_t(batch) * call.sample.spatial, 0, 4));
    watch_maps();
    const auto launch = [&](bool backward) {
        extent.sample.backward = backward;
        call.carve = carve(extent, static_cast<int>(ranks));
        call.sample.carve = call.carve.sample;
        launch_and_count(backward ? "backward" : "forward", extent.sample, call.carve.bytes, [&] {
            with_io(extent.sample, call.sample.dtype, [&](auto io) {
                using Io = decltype(io);
                extent.sample.channels_last ? run<Io, true>(backward, call) : run<Io, false>(backward, call);
            });
        });
    };
    launch(false);
    const int64_t affine_rows = prepare_backward(call.sample, extent.sample);
    call.tap_sums = output("tap_sums", size_t(batch) * ranks * (taps + 1), acc_dtype, acc);
    launch(true);

    const auto name = [](int i) { return i < 6 ? kParameters[i] : i == 6 ? "weight" : "bias"; };
    bool wanted[8];
    for (int i = 0; i < 8; ++i) wanted[i] = tensors.count(name(i)) != 0;
    launch_parameter_grads(parameter_grads(call, batch, static_cast<int>(ranks), affine_rows, wanted,
                                           [&](int i, ParameterGrad& grad) { target(name(i), grad); }),
                           extent.sample);
    write_results();
}

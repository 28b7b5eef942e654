// Runs the channel gate's kernels on the emulated machine.
#include "harness.h"

int main(int, char** arguments) {
    read_case(arguments[1]);
    Extent extent = extent_of_case();
    Call call = call_of_case(extent);
    watch_maps();
    const auto launch = [&](bool backward) {
        extent.backward = backward;
        call.carve = carve(extent, value("ranks"));
        launch_and_count(backward ? "backward" : "forward", extent, call.carve.bytes, [&] {
            with_io(extent, call.dtype, [&](auto io) {
                using Io = decltype(io);
                if (extent.channels_last) {
                    backward ? channel_gate_backward_kernel<Io, true>(call) : channel_gate_kernel<Io, true>(call);
                } else {
                    backward ? channel_gate_backward_kernel<Io, false>(call) : channel_gate_kernel<Io, false>(call);
                }
            });
        });
    };
    launch(false);
    const int64_t affine_rows = prepare_backward(call, extent);
    launch(true);

    bool wanted[6];
    for (int i = 0; i < 6; ++i) wanted[i] = tensors.count(kParameters[i]) != 0;
    launch_parameter_grads(parameter_grads(call, value("batch"), value("ranks"), affine_rows, wanted,
                                           [](int i, ParameterGrad& g) { target(kParameters[i], g); }),
                           extent);
    write_results();
}

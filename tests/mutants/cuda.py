"""Faults in the resident CUDA kernels, which the tests run in an emulator of blocks and clusters, in the host side of
their launches, which runs on a stand-in for the CUDA runtime, and in the answer to what they hold."""

from __future__ import annotations

from tests.mutants.mutant import Mutant

MUTANTS = [
    # ---- io: vectors and bulk copies ----
    Mutant(
        name="vector-store-before-the-slice",
        file="csrc/cuda/io.cuh",
        old="if (at >= 0 && at + kVector <= count) {\n            write_map(",
        new="if (at + kVector <= count) {\n            write_map(",
        tests="tests/emulate/test_channel_gate.py -k test_squeeze_excite",
    ),
    Mutant(
        name="first-half-word-of-the-tail-not-loaded",
        file="csrc/cuda/io.cuh",
        old="        const uint32_t at = 2 * i < head ? 2 * i : 2 * i + whole;\n"
        "        *reinterpret_cast<uint16_t*>(to + at) =",
        new="        const uint32_t at = 2 * i <= head ? 2 * i : 2 * i + whole;\n"
        "        *reinterpret_cast<uint16_t*>(to + at) =",
        tests="tests/emulate/test_spatial_gate.py -k test_shapes_and_kernels",
    ),
    # ---- reduce: maxima ----
    Mutant(
        name="nan-dropped-from-a-maximum",
        file="csrc/cuda/reduce.cuh",
        old="const bool greater = other.peak > peak || (other.peak != other.peak && peak == peak);",
        new="const bool greater = other.peak > peak;",
        tests="tests/emulate/test_channel_gate.py -k test_nan",
    ),
    Mutant(
        name="ties-in-the-order-of-merging",
        file="csrc/cuda/reduce.cuh",
        old="index = greater || (same && other.index < index) ? other.index : index;",
        new="index = greater ? other.index : index;",
        tests="tests/emulate/test_channel_gate.py -k test_maxima_and_ties",
    ),
    # ---- channel_gate ----
    Mutant(
        name="rows-of-the-last-block-not-summed",
        file="csrc/cuda/channel_gate.cuh",
        old="for (int r = 1; r < ranks; ++r) part.merge(*of_rank(&own_parts[c], r));",
        new="for (int r = 1; r < ranks - 1; ++r) part.merge(*of_rank(&own_parts[c], r));",
        tests="tests/emulate/test_channel_gate.py -k test_squeeze_excite",
    ),
    Mutant(
        name="owner-of-a-channel-by-proportion",
        file="csrc/cuda/channel_gate.cuh",
        old="const int owner = c / call.carve.share;",
        new="const int owner = c * ranks / call.channels;",
        tests="tests/emulate/test_channel_gate.py -k 'test_squeeze_excite or test_excitations'",
    ),
    Mutant(
        name="gradient-halved-with-both-pools",
        file="csrc/cuda/channel_gate.cuh",
        old="const Acc weight = call.pool == kAvgMax ? Acc(0.5) : Acc(1);",
        new="const Acc weight = call.pool >= kAvgMax ? Acc(0.5) : Acc(1);",
        tests="tests/emulate/test_channel_gate.py -k test_both_pools",
    ),
    Mutant(
        name="maxima-of-both-pools-not-in-the-state",
        file="csrc/cuda/channel_gate.cuh",
        old="                    if (call.ties == kEven || call.both())\n",
        new="                    if (call.ties == kEven)\n",
        tests="tests/emulate/test_cbam.py -k test_state_rows",
    ),
    Mutant(
        name="parameter-gradients-without-the-last-sample",
        file="csrc/cuda/channel_gate.cuh",
        old="for (int64_t b = 0; b < g.rows; ++b) {",
        new="for (int64_t b = 0; b < g.rows - 1; ++b) {",
        tests="tests/emulate/test_channel_gate.py -k test_squeeze_excite",
    ),
    # ---- spatial_gate, cbam ----
    Mutant(
        name="residual-not-in-the-slope-of-the-epilogue",
        file="csrc/cuda/spatial_gate.cuh",
        old="grads[0] *= derivative(call.post_activation, u * gates[0] * gate + residual[0]);",
        new="grads[0] *= derivative(call.post_activation, u * gates[0] * gate);",
        tests="tests/emulate/test_spatial_gate.py -k test_recomputed_epilogue",
    ),
    Mutant(
        name="cbam-arrives-at-the-cluster-barrier-too-early",
        file="csrc/cuda/spatial_gate.cuh",
        old="if (kChannelsLast && !gated) cluster_arrive();",
        new="if (kChannelsLast) cluster_arrive();",
        tests="tests/emulate/test_cbam.py -k test_shapes",
    ),
    Mutant(
        name="map-read-again-for-scaling",
        file="csrc/cuda/spatial_gate.cuh",
        old="call.residual + offset, i, residual);\n"
        "                    Io::load(call.dtype, x, i, values);\n"
        "                    const Acc gate =",
        new="call.residual + offset, i, residual);\n"
        "                    Io::template read_some<W>(call.dtype, call.x + offset, i, values);\n"
        "                    const Acc gate =",
        tests="tests/emulate/test_cbam.py -k test_residual_and_relu",
    ),
    Mutant(
        name="room-for-one-of-the-two-affine-sums",
        file="csrc/cuda/fit.h",
        old="c.team_sums = take(int64_t(c.teams) * c.sample.share * acc * (e.affine ? 2 : 1));",
        new="c.team_sums = take(int64_t(c.teams) * c.sample.share * acc);",
        tests="tests/emulate/test_cbam.py tests/emulate/test_spatial_gate.py -k test_prologue",
    ),
    # ---- select ----
    Mutant(
        name="block-barrier-before-the-cluster-sums",
        file="csrc/cuda/select.cuh",
        old="        cluster_barrier();\n"
        "#pragma unroll 1\n"
        "        for (int h = thread; h < call.hidden; h += threads) {\n"
        "            const Acc z1 =",
        new="        block_barrier();\n"
        "#pragma unroll 1\n"
        "        for (int h = thread; h < call.hidden; h += threads) {\n"
        "            const Acc z1 =",
        tests="tests/emulate/test_select.py -k test_two_branches",
    ),
    Mutant(
        name="no-room-for-a-misaligned-branch",
        file="csrc/cuda/fit.h",
        old="s.tile = static_cast<uint32_t>(std::min((elements * e.itemsize + 31) / 16 * 16, int64_t(1) << 24));",
        new="s.tile = static_cast<uint32_t>(std::min((elements * e.itemsize + 15) / 16 * 16, int64_t(1) << 24));",
        tests="tests/emulate/test_select.py -k 'test_two_branches or test_shapes'",
    ),
    Mutant(
        name="gaps-between-rows-taken-for-aligned",
        file="csrc/cuda/select.cuh",
        old=": pieces && misaligned == 0 && s.gap % 16 == 0 ? kPieces",
        new=": pieces && misaligned == 0 ? kPieces",
        tests="tests/emulate/test_select.py -k test_without_a_copy",
    ),
    # ---- device: the host side of a launch ----
    Mutant(
        name="stream-looked-for-in-the-library-alone",
        file="csrc/cuda/device.h",
        old='void* const library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);',
        new="void* const library = nullptr;",
        tests="tests/cuda/test_device.py -k test_torchs_stream_is_found_where_torch_keeps_it",
    ),
    Mutant(
        name="kernel-prepared-at-every-launch",
        file="csrc/cuda/device.h",
        old="    if (found != prepared.end()) return found->second;\n",
        new="",
        tests="tests/cuda/test_device.py -k test_a_kernel_is_prepared_once_a_device",
    ),
    Mutant(
        name="kernel-prepared-for-one-device-only",
        file="csrc/cuda/device.h",
        old="prepared.find({kernel, device})",
        new="prepared.lower_bound({kernel, 0})",
        tests="tests/cuda/test_device.py -k test_a_kernel_is_prepared_once_a_device",
    ),
    Mutant(
        name="cluster-without-a-place",
        file="csrc/cuda/device.h",
        old="== cudaSuccess) return count > 0;",
        new="== cudaSuccess) return true;",
        tests="tests/cuda/test_device.py -k test_no_larger_cluster_than_finds_a_place",
    ),
    Mutant(
        name="error-of-a-question-left-for-the-launch",
        file="csrc/cuda/device.h",
        old="    cudaGetLastError();  // the next launch is not to find it\n",
        new="",
        tests="tests/cuda/test_device.py -k test_no_larger_cluster_than_finds_a_place",
    ),
    Mutant(
        name="clusters-of-code-that-knows-none",
        file="csrc/cuda/device.h",
        old="if (built.ptxVersion >= 90 && attribute(",
        new="if (attribute(",
        tests="tests/cuda/test_device.py -k test_no_larger_cluster_than_finds_a_place",
    ),
    Mutant(
        name="driver-of-a-smaller-minor-version-refused",
        file="csrc/cuda/device.h",
        old="if (driver / 1000 >= runtime / 1000)",
        new="if (driver >= runtime)",
        tests="tests/cuda/test_device.py -k test_an_older_driver_is_named",
    ),
    Mutant(
        name="device-left-to-torchs-runtime",
        file="csrc/cuda/device.h",
        old='if (current != device_) check(cudaSetDevice(device_), "cudaSetDevice");',
        new="",
        tests="tests/cuda/test_device.py -k test_a_launch_is_on_the_device_of_its_maps",
    ),
    Mutant(
        name="device-set-past-torch",
        file="csrc/cuda/device.h",
        old="    torch::stable::accelerator::DeviceGuard guard_;\n",
        new="    struct Guard {\n"
        "        int before = 0;\n"
        "        explicit Guard(int) { cudaGetDevice(&before); }\n"
        "        ~Guard() { cudaSetDevice(before); }\n"
        "    } guard_;\n",
        tests="tests/cuda/test_device.py -k test_leaving_a_device_makes_no_context_elsewhere",
    ),
    # ---- fit: what the kernels hold ----
    Mutant(
        name="backward-asked-as-the-forward",
        file="csrc/fit.cpp",
        old="        sample.backward = backward;",
        new="        sample.backward = false;",
        tests="tests/ops/test_resident.py -k test_forward_alone_fits_in_float32",
    ),
    Mutant(
        name="answer-for-one-layout",
        file="fused_attn/ops/channel_gate.py",
        old="    last = lies_channels_last(x)",
        new="    last = False",
        tests="tests/ops/test_resident.py -k test_what_a_cluster_holds",
    ),
    Mutant(
        name="operator-called-by-itself-not-asked",
        file="fused_attn/ops/common.py",
        old="            rule.require(arguments)\n",
        new="            pass\n",
        tests="tests/ops/test_resident.py -k test_what_does_not_fit_in_the_backward_is_refused_before_the_forward",
    ),
    Mutant(
        name="open-sizes-asked",
        file="fused_attn/ops/resident.py",
        old="    if not all(type(size) is int for size in x.shape[1:]):\n        return\n",
        new="",
        tests="tests/ops/test_resident.py -k test_sizes_that_a_trace_leaves_open_are_not_asked",
    ),
    Mutant(
        name="refused-without-a-gradient",
        file="fused_attn/ops/resident.py",
        old="return self.forward > 0 and (self.backward > 0 or not needs_grad)",
        new="return self.forward > 0 and self.backward > 0",
        tests="tests/ops/test_resident.py -k test_the_answers_say_what_a_call_needs",
    ),
]

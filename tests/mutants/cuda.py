"""Faults in the resident CUDA kernels, which the tests run in an emulator of blocks and clusters."""

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
        file="csrc/cuda/spatial_gate.cuh",
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
        file="csrc/cuda/select.cuh",
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
]

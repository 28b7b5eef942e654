"""The Triton kernels compile for every architecture with no GPU: no spills, wide loads, few enough registers."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys

import pytest

REGISTERS = 65536  # of a multiprocessor: at least two programs must fit it
SHARED = 48 << 10  # what a program gets without asking for more
MAP_KERNELS = {
    *("_squeeze", "_squeeze_backward", "_scale", "_scale_backward", "_pool", "_gate", "_dot", "_spread"),
    *("_channel_pool", "_scale_space", "_dot_channels", "_spread_space", "_mixed_scale", "_mixed_scale_backward"),
    *("_norm_scale", "_norm_dots", "_norm_gradients"),
    *("_moments", "_simam", "_simam_dots", "_simam_spread"),
    *("_axis_pool", "_axis_spread", "_context", "_context_spread"),
    *("_cross", "_cross_dots", "_cross_backward"),
    *("_pool_branches", "_sum_branches", "_select", "_dot_branches", "_spread_branches", "_select_spread"),
    *("_excite_and_pool", "_scale_both", "_dot_channels_gated", "_dot_space", "_spread_both"),
}
SMALL_KERNELS = {
    *("_first_layer", "_second_layer", "_second_layer_backward", "_first_layer_backward"),
    *("_branch_weights", "_branch_weights_backward", "_mean_backward"),
    *("_finish", "_finish_moments", "_parameters", "_select_parameters", "_finish_pool"),
    *("_norm_coefficients", "_norm_running", "_norm_factors", "_join"),
    *("convolve", "logit_gradients", "convolve_backward", "convolution_parameters"),
}
KERNELS = MAP_KERNELS | SMALL_KERNELS
#: Those that read rows of 98 bytes as one run.
FLAT_KERNELS = {
    *("_squeeze", "_scale", "_scale_backward", "_pool", "_gate", "_dot", "_spread"),
    *("_pool_branches", "_sum_branches", "_dot_branches", "_spread_branches"),
}
#: Likewise in half precision.
FLAT_OF_HALVES = {"_norm_scale", "_norm_dots", "_norm_gradients"}
#: (capability, part of the kernels, parts)
PARTS = [(capability, part, parts) for capability, parts in ((90, 8), (80, 2), (100, 2)) for part in range(parts)]


@pytest.mark.slow  # 15 to 40 s each
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("variants", ["covering", pytest.param("all", marks=pytest.mark.long)])
@pytest.mark.parametrize(("capability", "part", "parts"), PARTS)
def test_every_kernel(capability, part, parts, variants):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    names = sorted(MAP_KERNELS)[part::parts] + sorted(SMALL_KERNELS)[part::parts]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.compile_ahead", str(capability), *names]
    command += ["--all"] * (variants == "all")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads(done.stdout)
    assert set(result["launched"]) == KERNELS
    found = result["compiled"]
    assert {f["kernel"] for f in found} == set(names)
    for f in found:
        # ptxas may give up three 8-byte values for one more program on a multiprocessor; more is a spill.
        assert f["STACK"] <= 24 and f["LOCAL"] == 0, f
        assert 2 * 32 * f["warps"] * f["REG"] <= REGISTERS, f
        assert f["shared"] <= SHARED or "float64" in f["dtype"], f
        print(f"sm_{capability} {f['kernel']} {f['case']}: {f['REG']} registers, {f['shared']} bytes shared")
    aligned = [f for f in found if "56, 56" in f["case"] and f["kernel"] in MAP_KERNELS]
    assert {f["kernel"] for f in aligned} == MAP_KERNELS & set(names)
    only_pools = ("_squeeze_backward", "_spread_space")  # where nothing but pools has a gradient they read no map
    flat = [f for f in found if "7, 7" in f["case"] and f["kernel"] in FLAT_KERNELS]
    flat += [f for f in found if "7, 7" in f["case"] and f["kernel"] in FLAT_OF_HALVES and "bfloat16" in f["dtype"]]
    narrow = [f for f in aligned + flat if not f["loads of 16 bytes"] and f["kernel"] not in only_pools]
    assert not narrow, "a load of a map is narrow"

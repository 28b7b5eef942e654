"""The host side of the Triton kernels, with a stand-in for the GPU: what is compiled and launched, how long it takes.

What a replayed call computes is in test_replay.py.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

#: Microseconds of Python a call, on the machine where `UNIT` is what `tests.kernels.host.work` takes.
BARS = {"channel_gate forward": 20, "channel_gate backward": 35, "cbam forward": 35, "cbam backward": 55}
UNIT = 16.0
SLACK = 2.0  # for what else runs on a machine


def host(part: str) -> Any:
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.host", part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)[part]


SHAPES = [(256, 3136), (1024, 196), (2048, 49), (64, 12544), (40, 221), (3, 1), (1, 7), (512, 2**27)]


@pytest.mark.parametrize(("channels", "space"), SHAPES)
def test_what_is_compiled_does_not_depend_on_the_batch(channels, space):
    """Nor do programs leave a channel or a position out, for any."""
    maps = pytest.importorskip("fused_attn.kernels.maps")
    for layout, size, sms, most in itertools.product((0, 1), (2, 4, 8), (4, 132), (1, 64)):
        found = set()
        for batch in range(257):
            plan = maps.plan(batch, channels, space, layout, size, sms, most_channels=most)
            for p in (plan, maps._plan_over_channels(plan, sms)):
                assert p.tiles * p.block_c <= p.block_k and p.n_cblk * p.tiles * p.block_c >= channels
                assert p.n_split * p.blocks * p.block_s >= space
                assert (p.n_cblk - 1) * p.tiles * p.block_c < channels
                found.add((p is plan, p.block_k, p.block_c, p.block_s, p.lane))
        assert len(found) == 2, found


@pytest.mark.parametrize("size", [2, 4, 8])
def test_flat_plans(size):
    """Every tile begins at a multiple of 16 bytes and holds its channels whole; no vector lies in three channels."""
    maps = pytest.importorskip("fused_attn.kernels.maps")
    found = 0
    for channels, space in itertools.product((6, 8, 24, 1000, 2048), range(1, 1000)):
        plan = maps.flat_plan(3, channels, space, size)
        if plan is None:
            continue
        vector, found = 16 // size, found + 1
        assert channels * space % vector == 0 and space >= vector
        assert plan.n_cblk == 1 or plan.block_c * space % vector == 0
        assert plan.block_c * space <= plan.block_s and plan.block_c <= plan.block_k
        assert plan.n_cblk * plan.block_c >= channels > (plan.n_cblk - 1) * plan.block_c
    assert found > 100


def test_strides_of_one_sample():
    """They may be any, and make no copy and no kernel of their own."""
    maps = pytest.importorskip("fused_attn.kernels.maps")
    x = torch.zeros(1, 8, 5, 4)
    grad = torch.zeros(7, 8, 5, 4)[3:4].as_strided((1, 8, 5, 4), (3, 20, 4, 1))
    assert maps.as_map(grad, x) is grad
    assert maps.gradient(grad, x) == (grad, {"stride_b": None, "stride_c": None, "stride_s": None})
    two = torch.zeros(2, 5, 4, 8).permute(0, 3, 1, 2)
    assert maps.gradient(two, torch.zeros(2, 8, 5, 4))[1] == {"stride_b": 160, "stride_c": 1, "stride_s": 8}


@pytest.mark.slow  # 20 s
def test_a_batch_never_seen_before_compiles_nothing():
    found = host("variants")
    for layout, kernels in found["seresnet50"].items():
        print(f"seresnet50, {layout}: {kernels[0]} kernels a training step")
        assert kernels[0] <= 40 and set(kernels) == {kernels[0]}, (layout, kernels)
    assert not found["new for another batch"]


def test_launches_of_a_call():
    """The same in the first call of a kind, in the one that is recorded, and in those that are replayed."""
    expected = {
        "channel_gate forward": {2},
        "channel_gate backward": {3},
        "cbam forward": {6},  # two of them the layers of its channel gate
        "cbam backward": {8},
    }
    for name, launches in host("launches").items():
        op, _, layout = name.rpartition(" ")
        if op == "heard":
            assert launches == [8, 0], "of a CBAM's backward"
        elif op == "replayed":
            assert launches == ["cbam", "cbam_backward", "channel_gate", "channel_gate_backward"], layout
        else:
            assert len(set(launches)) == 1 and launches[0] in expected[op], name


def test_time_of_a_call():
    for name, (took, unit) in host("times").items():
        print(f"{name}: {took} µs (a unit of work: {unit} µs)")
        op, _, way = name.partition(": ")
        if way == "operator":
            assert took <= SLACK * BARS[op] * max(unit / UNIT, 1.0), name


@pytest.mark.slow  # 10 s where nothing is cached
def test_kernels_that_are_compiled_are_launched():
    found = host("compiled")
    assert {"_pool", "_gate", "_dot", "_spread", "_parameters"} <= set(found)

"""The resident kernels of `spatial_gate` on the emulated machine, under sanitizers, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ..checks import random
from .cases import SpaceCase as Case
from .cases import build

TWO_AND_THREE = {"forward": 2, "backward": 3}
HALF = torch.bfloat16


@pytest.fixture(scope="session")
def emulate(tmp_path_factory) -> Path:
    return build("space.cpp", tmp_path_factory)


BOTH = pytest.mark.parametrize("layout", ["nchw", "channels_last"])


@BOTH
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_spatial_gate(emulate, tmp_path, layout, ranks, dtype):
    shape = {1: (2, 8, 7, 7), 2: (3, 9, 13, 17), 4: (2, 24, 8, 6), 8: (1, 20, 5, 3)}[ranks]
    assert Case(shape, dtype, layout, ranks, seed=ranks).check(emulate, tmp_path) == TWO_AND_THREE


@BOTH
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [
        ((2, 8, 1, 1), 7),
        ((1, 1, 13, 6), 3),
        ((3, 4, 8, 4), (5, 3)),
        ((1, 6, 3, 40), (1, 5)),
        ((2, 5, 11), 7),
        ((2, 4, 32), 3),
        ((1, 4, 3, 5, 2), 3),
        ((2, 3, 4, 6, 4), (3, 5, 7)),
    ],
)
@pytest.mark.parametrize(("dtype", "ranks"), [(torch.float16, 2), (torch.float64, 4)])
def test_shapes_and_kernels(emulate, tmp_path, layout, shape, kernel, dtype, ranks):
    assert Case(shape, dtype, layout, ranks, kernel=kernel).check(emulate, tmp_path) == TWO_AND_THREE


@BOTH
@pytest.mark.parametrize("order", [("max", "mean"), ("mean", "max")])
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_orders_and_ties(emulate, tmp_path, layout, order, ties, dtype):
    x = random(2, 12, 6, 6).mul(2).round()  # few values: every maximum is tied
    x[0, :, 3] = -1.0
    Case(x.shape, dtype, layout, 2, x=x, order=order, space_ties=ties, space_bias=False).check(emulate, tmp_path)


@BOTH
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("ranks", [1, 4])
def test_nan(emulate, tmp_path, layout, ties, ranks):
    x = random(2, 8, 5, 4)
    x[0, 2, 1, 3] = x[0, 5, 1, 3] = torch.nan
    x[1, :, 2, 2] = -torch.inf
    case = Case(x.shape, torch.float32, layout, ranks, x=x, space_ties=ties, kernel=1, space_gate="identity")
    found, _ = case.run(emulate, tmp_path)
    exact = case.exact()
    for name in ("y", "x"):
        assert torch.equal(found[name].isnan(), exact[name].isnan()), name
    assert case.space_index[0, 1, 3] == (2 if ties == "first" else 0)
    assert case.space_index[1, 2, 2] == (0 if ties == "first" else 8)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
@pytest.mark.parametrize(("ranks", "shape"), [(1, (2, 8, 6, 6)), (4, (2, 11, 6, 7))])
def test_residual_and_relu(emulate, tmp_path, layout, dtype, ranks, shape):
    case = Case(shape, dtype, layout, ranks, residual=True, post_activation="relu", kernel=3)
    assert case.check(emulate, tmp_path) == {"forward": 3, "backward": 5}


@BOTH
@pytest.mark.parametrize("post_activation", ["silu", "leaky_relu"])
def test_recomputed_epilogue(emulate, tmp_path, layout, post_activation):
    case = Case((2, 6, 5, 5), torch.float32, layout, 2, residual=True, post_activation=post_activation, kernel=3)
    assert case.check(emulate, tmp_path) == {"forward": 3, "backward": 5}


@BOTH
@pytest.mark.parametrize("pre_activation", ["identity", "relu", "hard_swish"])
@pytest.mark.parametrize(("dtype", "ties"), [(torch.float32, "first"), (torch.float64, "even"), (HALF, "first")])
@pytest.mark.parametrize("shape", [(2, 10, 5, 4), (1, 64, 2, 2)])  # more positions than channels, and fewer
def test_prologue(emulate, tmp_path, layout, shape, pre_activation, dtype, ties):
    case = Case(
        shape, dtype, layout, 2, affine=True, pre_activation=pre_activation, space_ties=ties, kernel=3,
        space_gate="hard_sigmoid",
    )  # fmt: skip
    assert case.check(emulate, tmp_path, floor=4e-6) == TWO_AND_THREE


@BOTH
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (2, 4, 0, 3), (2, 4, 3, 0)])
@pytest.mark.parametrize("gated", [False, True])
def test_empty(emulate, tmp_path, layout, shape, gated):
    case = Case(shape, torch.float32, layout, 2, gated=gated)
    case.map = lambda flat: flat
    found, _ = case.run(emulate, tmp_path)
    assert found["y"].numel() == found["x"].numel() == 0
    assert not found["weight"].any() and not found["bias"].any()


@BOTH
def test_float32_weights_of_a_half_map(emulate, tmp_path, layout):
    Case((2, 16, 4, 4), HALF, layout, 2, weights=torch.float32).check(emulate, tmp_path)


@BOTH
def test_state_rows(emulate, tmp_path, layout):
    case = Case((2, 6, 4, 3), torch.float64, layout, 2, order=("mean", "max"), kernel=3)
    case.run(emulate, tmp_path)
    t = case.tensors
    pooled = torch.stack([t["x"].amax(1), t["x"].mean(1)], 1)
    z = torch.nn.functional.conv2d(pooled.flip(1), t["weight"], t["bias"], padding=1)
    torch.testing.assert_close(case.space_state, torch.cat([pooled, z], 1))
    assert torch.equal(case.space_index, t["x"].argmax(1).int())

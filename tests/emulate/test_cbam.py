"""The resident kernels of `cbam` on the emulated machine, under sanitizers, against float64."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import pytest
import torch

from ..checks import random
from .cases import SpaceCase, build

pytestmark = pytest.mark.slow  # 22 s in all

TWO_AND_THREE = {"forward": 2, "backward": 3}
HALF = torch.bfloat16
Case = functools.partial(SpaceCase, gated=True, pool="both")
BOTH = pytest.mark.parametrize("layout", ["nchw", "channels_last"])


@pytest.fixture(scope="session")
def emulate(tmp_path_factory) -> Path:
    return build("space.cpp", tmp_path_factory)


@BOTH
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_cbam(emulate, tmp_path, layout, ranks, dtype):
    shape = {1: (2, 8, 7, 7), 2: (3, 9, 13, 6), 4: (2, 24, 8, 6), 8: (1, 20, 5, 3)}[ranks]
    assert Case(shape, dtype, layout, ranks, seed=ranks).check(emulate, tmp_path) == TWO_AND_THREE


@BOTH
@pytest.mark.parametrize(("shape", "ranks"), [((1, 64, 14, 14), 2), ((1, 24, 20, 26), 1), ((1, 96, 7, 7), 16)])
def test_as_many_threads_as_on_a_card(emulate, tmp_path, layout, shape, ranks):
    threads = 512 // max(1, ranks // 2)
    case = Case(shape, HALF, layout, ranks, threads, residual=True, post_activation="relu")
    assert case.check(emulate, tmp_path) == {"forward": 3, "backward": 5}


@BOTH
@pytest.mark.parametrize(
    ("layer", "layers", "taps"), [("dense", 2, 0), ("dense", 0, 0), ("dense", 1, 0), ("conv", 1, 3), ("circular", 1, 5)]
)
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "both"])
@pytest.mark.parametrize(("dtype", "ranks"), [(torch.float64, 1), (torch.float32, 4)])
def test_excitations_and_pools(emulate, tmp_path, layout, layer, layers, taps, pool, dtype, ranks):
    case = Case((2, 9, 6, 4), dtype, layout, ranks, layer=layer, layers=layers, taps=taps, pool=pool, kernel=3)
    assert case.check(emulate, tmp_path, floor=4e-6 if dtype == torch.float32 else 0.0) == TWO_AND_THREE


@BOTH
@pytest.mark.parametrize(
    ("shape", "kernel"),
    [((2, 8, 1, 1), 7), ((1, 1, 13, 6), 3), ((2, 5, 11), 7), ((1, 4, 3, 5, 2), 3), ((2, 40, 12, 12), 7)],
)
@pytest.mark.parametrize(("dtype", "ranks"), [(torch.float32, 2), (torch.float64, 4)])
def test_shapes(emulate, tmp_path, layout, shape, kernel, dtype, ranks):
    case = Case(shape, dtype, layout, ranks, kernel=kernel, order=("mean", "max"))
    assert case.check(emulate, tmp_path) == TWO_AND_THREE


@BOTH
@pytest.mark.parametrize(("ties", "space_ties"), list(itertools.product(["first", "even"], repeat=2)))
@pytest.mark.parametrize("pool", ["max", "both"])
def test_ties(emulate, tmp_path, layout, ties, space_ties, pool):
    """Few values tie over space; channels whose weights are equal have equal gates, so that they tie too."""
    x = random(2, 12, 6, 6).mul(2).round()
    x[:, 6:] = x[:, :6]
    case = Case(x.shape, torch.float64, layout, 2, x=x, pool=pool, ties=ties, space_ties=space_ties, kernel=3)
    for name, axis in (("weight1", 1), ("weight2", 0), ("bias2", 0)):
        first, second = case.tensors[name].chunk(2, axis)
        second.copy_(first)
    case.check(emulate, tmp_path)


@BOTH
@pytest.mark.parametrize("ties", ["first", "even"])
def test_nan(emulate, tmp_path, layout, ties):
    x = random(2, 8, 5, 4)
    x[0, 2, 1, 3] = x[0, 2, 4, 0] = torch.nan
    case = Case(x.shape, torch.float32, layout, 2, x=x, ties=ties, space_ties=ties, layers=0, pool="max", kernel=1)
    found, _ = case.run(emulate, tmp_path)
    exact = case.exact()
    for name in ("y", "x"):
        assert torch.equal(found[name].isnan(), exact[name].isnan()), name


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
@pytest.mark.parametrize(("dtype", "ties"), [(torch.float32, "first"), (torch.float64, "even")])
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("shape", [(2, 10, 5, 4), (1, 64, 2, 2)])  # more positions than channels, and fewer
def test_prologue(emulate, tmp_path, layout, shape, pre_activation, dtype, ties, ranks):
    case = Case(
        shape, dtype, layout, ranks, affine=True, pre_activation=pre_activation, space_ties=ties, ties=ties,
        kernel=3, gate="hard_sigmoid",
    )  # fmt: skip
    assert case.check(emulate, tmp_path, floor=4e-6) == TWO_AND_THREE


@BOTH
def test_float32_weights_of_a_half_map(emulate, tmp_path, layout):
    Case((2, 16, 4, 4), HALF, layout, 2, weights=torch.float32).check(emulate, tmp_path)


@BOTH
def test_state_rows(emulate, tmp_path, layout):
    case = Case((2, 6, 4, 3), torch.float64, layout, 2, kernel=3)
    case.run(emulate, tmp_path)
    t = case.tensors
    pools = t["x"].mean((2, 3)), t["x"].amax((2, 3))
    z1 = [s @ t["weight1"].T + t["bias1"] for s in pools]
    z2 = sum(z.relu() @ t["weight2"].T + t["bias2"] for z in z1)
    torch.testing.assert_close(case.state, torch.cat([pools[0], z2, z1[0], pools[1], z1[1]], 1))
    v = t["x"] * z2.sigmoid()[:, :, None, None]
    pooled = torch.stack([v.amax(1), v.mean(1)], 1)
    z = torch.nn.functional.conv2d(pooled, t["weight"], t["bias"], padding=1)
    torch.testing.assert_close(case.space_state, torch.cat([pooled, z], 1))
    assert torch.equal(case.space_index, v.argmax(1).int())

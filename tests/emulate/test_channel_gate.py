"""The resident kernels' source on the emulated machine, under AddressSanitizer and UBSan, against float64."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch

from fused_attn.codes import ACTIVATIONS

from ..checks import random
from .cases import Case, build


@pytest.fixture(scope="session")
def emulate(tmp_path_factory) -> Path:
    return build("channel_gate.cpp", tmp_path_factory)


BOTH = pytest.mark.parametrize("layout", ["nchw", "channels_last"])
HALF = torch.bfloat16


@BOTH
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_squeeze_excite(emulate, tmp_path, layout, ranks, dtype):
    shape = {1: (2, 8, 7, 7), 2: (3, 9, 13, 17), 4: (2, 72, 7, 7), 8: (1, 20, 5, 3)}[ranks]
    passes = Case(shape, dtype, layout, ranks, seed=ranks).check(emulate, tmp_path)
    assert passes == {"forward": 2, "backward": 3}


@BOTH
@pytest.mark.parametrize(
    "shape", [(2, 8, 1, 1), (1, 1, 13, 17), (1, 3, 1, 1), (2, 5, 11), (1, 4, 3, 5, 2), (3, 7, 1, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_shapes(emulate, tmp_path, layout, shape, dtype):
    passes = Case(shape, dtype, layout, ranks=2, pool="avgmax").check(emulate, tmp_path)
    assert passes == {"forward": 2, "backward": 3}


@BOTH
@pytest.mark.parametrize(
    ("layer", "layers", "taps"), [("dense", 0, 0), ("dense", 1, 0), ("conv", 1, 5), ("circular", 1, 11)]
)
@pytest.mark.parametrize(("ranks", "channels"), [(1, 8), (4, 9)])
def test_excitations(emulate, tmp_path, layout, layer, layers, taps, ranks, channels):
    case = Case((2, channels, 5, 6), HALF, layout, ranks, layer=layer, layers=layers, taps=taps, gate="hard_sigmoid")
    assert case.check(emulate, tmp_path) == {"forward": 2, "backward": 3}


@BOTH
@pytest.mark.parametrize(("channels", "hidden", "threads"), [(96, 40, 64), (96, 40, 256), (104, 24, 64)])
@pytest.mark.parametrize("weights", [torch.bfloat16, torch.float16, torch.float32])
def test_weights_by_16_bytes(emulate, tmp_path, layout, channels, hidden, threads, weights):
    """Rows that begin at such places, of which one block has all and the other one has not, and warps that share
    columns."""
    case = Case((2, channels, 2, 3), HALF, layout, 2, threads, hidden=hidden, weights=weights)
    assert case.check(emulate, tmp_path, floor=1e-6) == {"forward": 2, "backward": 3}


@BOTH
@pytest.mark.parametrize(("pool", "ties"), list(itertools.product(["max", "avgmax"], ["first", "even"])))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_maxima_and_ties(emulate, tmp_path, layout, pool, ties, dtype):
    x = random(2, 12, 6, 5).mul(2).round()  # few values: every maximum is tied
    x[0, 3] = -1.0
    Case(x.shape, dtype, layout, 2, x=x, pool=pool, ties=ties, bias=False).check(emulate, tmp_path)


@BOTH
@pytest.mark.parametrize(
    ("layer", "layers", "taps"), [("dense", 2, 0), ("dense", 0, 0), ("dense", 1, 0), ("conv", 1, 3), ("circular", 1, 5)]
)
@pytest.mark.parametrize(("ranks", "ties"), [(1, "even"), (4, "first")])
def test_both_pools(emulate, tmp_path, layout, layer, layers, taps, ranks, ties):
    case = Case(
        (2, 9, 5, 6), torch.float32, layout, ranks, layer=layer, layers=layers, taps=taps, ties=ties, pool="both"
    )
    assert case.check(emulate, tmp_path, floor=4e-6) == {"forward": 2, "backward": 3}  # the taps' sums cancel


@BOTH
@pytest.mark.parametrize("ties", ["first", "even"])
def test_nan(emulate, tmp_path, layout, ties):
    x = random(2, 8, 5, 4)
    x[0, 2, 1, 3] = x[0, 2, 4, 0] = torch.nan
    x[1, 4] = -torch.inf
    case = Case(x.shape, torch.float32, layout, 2, x=x, pool="max", ties=ties, layers=0)
    found, _ = case.run(emulate, tmp_path)
    assert torch.equal(found["y"].isnan(), case.exact()["y"].isnan())
    assert case.index[0, 2] == (7 if ties == "first" else 0)
    assert case.index[1, 4] == (0 if ties == "first" else 20)
    assert not found["x"][1, :4].isnan().any()


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 4])
def test_residual_and_relu(emulate, tmp_path, layout, dtype, ranks):
    case = Case((2, 11, 6, 7), dtype, layout, ranks, residual=True, post_activation="relu")
    assert case.check(emulate, tmp_path) == {"forward": 3, "backward": 5}


@BOTH
@pytest.mark.parametrize("post_activation", ["silu", "gelu", "leaky_relu"])
def test_recomputed_epilogue(emulate, tmp_path, layout, post_activation):
    case = Case((2, 6, 5, 5), torch.float32, layout, 2, residual=True, post_activation=post_activation)
    assert case.check(emulate, tmp_path) == {"forward": 3, "backward": 5}


@BOTH
@pytest.mark.parametrize("pre_activation", ["identity", "relu", "silu", "hard_swish"])
@pytest.mark.parametrize(("dtype", "pool"), [(torch.float32, "avgmax"), (torch.float64, "max"), (HALF, "avg")])
def test_prologue(emulate, tmp_path, layout, pre_activation, dtype, pool):
    case = Case((2, 10, 5, 4), dtype, layout, 2, affine=True, pre_activation=pre_activation, pool=pool)
    assert case.check(emulate, tmp_path) == {"forward": 2, "backward": 3}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(emulate, tmp_path, name):
    options = {
        "activation": name,
        "gate": name,
        "pre_activation": name,
        "post_activation": name,
        "residual": True,
    }
    floor = 1e-6 if name.startswith("hard") else 0.0  # torch keeps 1 / 6 in float32
    Case((2, 6, 3, 3), torch.float64, **options).check(emulate, tmp_path, floor=floor)


@BOTH
def test_float32_weights_of_a_half_map(emulate, tmp_path, layout):
    # Eager's few sums may be exact by chance: some units in the last place are allowed.
    Case((2, 16, 4, 4), HALF, layout, 2, weights=torch.float32).check(emulate, tmp_path, floor=1e-6)


@pytest.mark.parametrize("layout", ["nchw", "channels_last"])
def test_state_rows(emulate, tmp_path, layout):
    case = Case((2, 6, 4, 3), torch.float64, layout, 2, pool="max", ties="even")
    case.run(emulate, tmp_path)
    t, state = case.tensors, case.state
    s = t["x"].amax((2, 3))
    z1 = s @ t["weight1"].T + t["bias1"]
    z2 = z1.relu() @ t["weight2"].T + t["bias2"]
    torch.testing.assert_close(state, torch.cat([s, z2, z1, s], 1))

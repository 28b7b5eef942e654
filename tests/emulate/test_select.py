"""The resident kernels of `select` on the emulated machine, under sanitizers, against float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from .cases import SelectCase as Case
from .cases import build

pytestmark = pytest.mark.slow  # 20 s in all

HALF = torch.bfloat16
TWO = {"forward": 3, "backward": 5}
BOTH = pytest.mark.parametrize("layout", ["nchw", "channels_last"])


@pytest.fixture(scope="session")
def emulate(tmp_path_factory) -> Path:
    return build("select.cpp", tmp_path_factory)


@BOTH
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, HALF])
def test_two_branches(emulate, tmp_path, layout, ranks, dtype):
    shape = {1: (2, 8, 7, 7), 2: (3, 9, 13, 17), 4: (2, 72, 7, 7), 8: (1, 20, 5, 3)}[ranks]
    assert Case(shape, dtype, layout, ranks, seed=ranks).check(emulate, tmp_path) == TWO


@BOTH
@pytest.mark.parametrize("paths", [1, 3, 4, 8])
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_paths(emulate, tmp_path, layout, paths, gate):
    case = Case((2, 12, 5, 6), HALF, layout, 2, paths=paths, gate=gate)
    assert case.check(emulate, tmp_path) == {"forward": paths + 1, "backward": 2 * paths + 1}


@BOTH
@pytest.mark.parametrize(
    "shape", [(2, 8, 1, 1), (1, 1, 13, 17), (1, 3, 1, 1), (2, 5, 11), (1, 4, 3, 5, 2), (3, 7, 1, 2)]
)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_shapes(emulate, tmp_path, layout, shape, dtype):
    if layout == "channels_last" and (shape[1] == 1 or max(shape[2:]) == 1):
        layout = "nchw"  # the same memory
    assert Case(shape, dtype, layout, ranks=2).check(emulate, tmp_path) == TWO


@pytest.mark.parametrize(("layout", "lie"), [
    *(("nchw", lie) for lie in ("sliced", "stacked")),
    *(("channels_last", lie) for lie in ("sliced", "stacked")), ("pixels", "stacked"),
])  # fmt: skip
@pytest.mark.parametrize("channels", [8, 5])
@pytest.mark.parametrize("dtype", [torch.float32, HALF, torch.float64])
@pytest.mark.parametrize("ranks", [1, 2])
def test_without_a_copy(emulate, tmp_path, layout, lie, channels, dtype, ranks):
    """Rows apart, at odd places, one stacked tensor: as many passes, gradients in the branches' kind of layout."""
    assert Case((2, channels, 5, 7), dtype, layout, ranks, lie=lie).check(emulate, tmp_path) == TWO


@BOTH
@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize(("ranks", "paths"), [(1, 3), (2, 2), (8, 2)])
def test_groups(emulate, tmp_path, layout, groups, ranks, paths):
    """Groups that blocks share, blocks that hold several groups, and blocks without channels."""
    case = Case((2, 12, 3, 5), torch.float32, layout, ranks, groups=groups, hidden=8, paths=paths)
    assert case.check(emulate, tmp_path) == {"forward": paths + 1, "backward": 2 * paths + 1}


@pytest.mark.parametrize(("layout", "lie"), [("nchw", "apart"), ("channels_last", "apart"), ("pixels", "stacked")])
@pytest.mark.parametrize("pre_activation", ["identity", "relu", "silu", "hard_swish"])
@pytest.mark.parametrize(("dtype", "ranks"), [(torch.float32, 2), (torch.float64, 1), (HALF, 4)])
@pytest.mark.parametrize("affine", [True, False])
def test_prologue(emulate, tmp_path, layout, lie, pre_activation, dtype, ranks, affine):
    case = Case((2, 8, 5, 4), dtype, layout, ranks, lie=lie, affine=affine, pre_activation=pre_activation)
    assert case.check(emulate, tmp_path) == TWO


@BOTH
@pytest.mark.parametrize("activation", ["silu", "hard_swish", "tanh"])
def test_excitations(emulate, tmp_path, layout, activation):
    Case((2, 10, 5, 4), torch.float64, layout, 2, bias=False, activation=activation).check(emulate, tmp_path)


@BOTH
def test_float32_weights_of_a_half_map(emulate, tmp_path, layout):
    Case((2, 16, 4, 4), HALF, layout, 2, weights=torch.float32, affine=True).check(emulate, tmp_path)


@BOTH
@pytest.mark.parametrize(("shape", "ranks"), [((1, 64, 14, 14), 2), ((1, 24, 20, 26), 1), ((1, 96, 7, 7), 16)])
def test_as_many_threads_as_on_a_card(emulate, tmp_path, layout, shape, ranks):
    threads = 512 // max(1, ranks // 2)
    case = Case(shape, HALF, layout, ranks, threads, affine=True, pre_activation="relu", hidden=16)
    assert case.check(emulate, tmp_path) == TWO


@BOTH
@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_nan(emulate, tmp_path, layout, gate):
    case = Case((2, 6, 4, 5), torch.float32, layout, 2, gate=gate)
    case.branches[1][0, 2, 1, 3] = torch.nan
    case.branches[0][1, 4] = torch.inf
    found, _ = case.run(emulate, tmp_path)
    exact = case.exact()
    assert all(torch.equal(found[name].isnan(), exact[name].isnan()) for name in ("y", "branch0", "branch1"))


@BOTH
def test_large_logits(emulate, tmp_path, layout):
    case = Case((2, 6, 4, 5), torch.float32, layout, 2)
    case.tensors["bias2"] *= 300
    case.check(emulate, tmp_path)


@BOTH
@pytest.mark.parametrize("shape", [(0, 6, 4, 5), (2, 6, 0, 5)])
def test_empty(emulate, tmp_path, shape, layout):
    case = Case(shape, torch.float32, "nchw", 2)
    found, _ = case.run(emulate, tmp_path)
    assert found["y"].numel() == 0
    if shape[0] == 0:
        assert not any(found[name].any() for name in ("weight1", "bias1", "weight2", "bias2"))


@BOTH
@pytest.mark.parametrize("groups", [1, 2])
def test_state_rows(emulate, tmp_path, layout, groups):
    case = Case((2, 6, 4, 3), torch.float64, layout, 2, groups=groups)
    case.run(emulate, tmp_path)
    s = sum(case.branches).mean((2, 3))
    weights = case.state[:, 10:].view(2, 2, 6)
    torch.testing.assert_close(case.state[:, :6], s)
    if groups == 1:
        z1 = s @ case.tensors["weight1"].T + case.tensors["bias1"]
        torch.testing.assert_close(case.state[:, 6:10], z1)
        logits = z1.relu() @ case.tensors["weight2"].T + case.tensors["bias2"]
        torch.testing.assert_close(weights, logits.view(2, 2, 6).softmax(1))
    torch.testing.assert_close(weights.sum(1), torch.ones(2, 6, dtype=torch.float64))

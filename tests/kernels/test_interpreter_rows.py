"""Partial results of more programs than a kernel reads at once, by the tests of the operators.

A kernel reads the rows that the programs of the launch before left 8 to 32 at a time, which a GPU has more of than the
interpreter. So here it reads two at a time.
"""

from __future__ import annotations

import pytest
import torch

import fused_attn
from fused_attn import functional
from fused_attn.backends import unavailable
from tests.checks import LAYOUTS, in_layout, random
from tests.ops import test_axis_pool as of_axis_pool
from tests.ops import test_cbam as of_cbam
from tests.ops import test_norm_gate as of_norm_gate
from tests.ops import test_select as of_select
from tests.ops import test_simam as of_simam
from tests.ops import test_spatial_gate as of_spatial_gate
from tests.ops.test_channel_gate import check, excitation
from tests.ops.test_squeeze_scale import affine, check_channel_pool, check_squeeze

pytestmark = pytest.mark.slow  # 16 s in all

SPLIT = (1, 3, 40, 41)  # space among programs
MANY = (1, 300, 3, 2)  # channels among programs


@pytest.fixture(autouse=True)
def two_rows(monkeypatch):
    """The arguments of the launches that read rows."""
    reason = unavailable("triton", "channel_gate", "cpu")
    if reason is not None:
        pytest.skip(f"the interpreter is for machines without a GPU: {reason}")
    from fused_attn.kernels import maps

    launch, found = maps.launch, []

    def of_two_rows(kernel, on, programs, /, **given):
        if "BLOCK_ROWS" in given:
            found.append(given)
            given["BLOCK_ROWS"] = min(given["BLOCK_ROWS"], 2)
        launch(kernel, on, programs, **given)

    monkeypatch.setattr(maps, "launch", of_two_rows)
    with fused_attn.backend("triton"):
        yield found


def most(launches, name="n_split"):
    return max(given.get(name, 0) for given in launches)


def with_ties(shape, layout):
    return in_layout(random(*shape).mul(2).round().clamp(-2, 2), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("special", [None, float("nan"), -float("nan"), float("-inf")])
def test_squeeze(special, ties, layout, two_rows):
    x = with_ties(SPLIT, layout)
    if special is not None:
        x[0, 0, 39, 40] = x[0, 1, 0, 0] = x[0, 1, 20, 3] = special
        x[0, 2] = special
    check_squeeze(x, {}, pool="avgmax", ties=ties)
    assert most(two_rows) > 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
@pytest.mark.parametrize("pool", ["avg", "max", "both"])
@pytest.mark.parametrize("kind", ["se", "ese", "eca"])
def test_channel_gate(kind, pool, ties, layout, two_rows):
    """The prologue keeps its partial sums as well. No ReLU: it may make the one hidden number 0."""
    tensors, options = excitation(kind, 3, torch.float32)
    options |= {"pool": pool, "activation": "silu"}
    check(with_ties(SPLIT, layout), tensors, {**options, "ties": ties})
    check(in_layout(random(*SPLIT), layout), tensors | affine(3, torch.float32), options)
    assert most(two_rows) > 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_simam(layout, two_rows):
    of_simam.check(in_layout(random(*SPLIT), layout))
    assert most(two_rows) > 2
    of_simam.test_a_large_mean_costs_no_digits((1, 2, 40, 41), layout)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_gate(layout, two_rows):
    x = in_layout(random(*SPLIT), layout)
    of_norm_gate.check(of_norm_gate.inputs_of(x, residual=True), activation="silu", post_activation="relu")
    assert most(two_rows) > 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_select(layout, two_rows):
    inputs = of_select.maps(SPLIT, 2, "joined", layout)
    of_select.check(inputs | of_select.weights(3, 2) | of_select.affine_of(3, 2), form="joined")
    s = []
    functional.select_with(inputs["x"], lambda mean: s.append(mean) or torch.ones(1, 2, 3), paths=2)
    torch.testing.assert_close(s[0], inputs["x"].unflatten(1, (2, 3)).sum(1).mean((2, 3)))
    assert most(two_rows) > 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
def test_pools_over_channels(ties, layout, two_rows):
    x, tensors = with_ties(MANY, layout), of_spatial_gate.convolution(MANY, torch.float32)
    check_channel_pool(x, {}, ties=ties)
    of_spatial_gate.check(x, tensors, {"ties": ties})
    assert most(two_rows, "n_cblk") > 2
    tensors, options = of_cbam.weights("se", MANY, torch.float32)
    of_cbam.check(x, tensors, {**options, "pool": "both", "spatial_ties": ties, "channel_ties": ties})
    assert most(two_rows, "n_part") > 2


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("ties", ["first", "even"])
def test_axis_pool(ties, layout, two_rows, monkeypatch):
    from fused_attn.kernels import axis_pool

    for name, size in {"TILE": 64, "CHANNELS": 4, "CHANNELS_A_TILE": 4, "SIDE": 2}.items():
        monkeypatch.setattr(axis_pool, name, size)
    of_axis_pool.check(with_ties((1, 4, 9, 10), layout), maxima=True, channels=True, ties=ties)
    assert most(two_rows, "n_cblk") > 2

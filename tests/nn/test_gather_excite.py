"""Parameter-free gather-excite against timm's."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fused_attn import reference
from tests.checks import assert_same_block, random

timm_layers = pytest.importorskip("timm.layers", reason="timm is not installed")


def timm(**options):
    return timm_layers.GatherExcite(16, extra_params=False, use_mlp=False, **options)


PAIRS = {
    "global": (lambda: reference.GatherExcite(16), timm),
    "global, any channels": (lambda: reference.GatherExcite(), timm),
    "global, avgmax": (
        lambda: reference.GatherExcite(16, pool="avgmax", ties="even", gate="hard_sigmoid"),
        lambda: timm(add_maxpool=True, gate_layer="hard_sigmoid"),
    ),
    "extent 2": (lambda: reference.GatherExcite(16, extent=2), lambda: timm(extent=2)),
    "extent 4": (lambda: reference.GatherExcite(extent=4), lambda: timm(extent=4)),
    "extent 8": (lambda: reference.GatherExcite(extent=8), lambda: timm(extent=8)),
}


@pytest.mark.parametrize("shape", [(8, 8), (11, 6), (7, 7)])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", PAIRS)
def test_equals_timm(name, training, shape):
    ours, original = (build() for build in PAIRS[name])
    x = random(2, 16, *shape, dtype=torch.float64)
    if name == "global, avgmax":
        x = x.round()
    assert not ours.state_dict()
    assert_same_block(ours, original, x, training=training)


@pytest.mark.parametrize("pool", ["avg", "max", "avgmax"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_spatial_ranks(rank, pool):
    class Original(nn.Module):
        def forward(self, x):
            flat = x.flatten(2)
            pools = {"avg": flat.mean(2), "max": flat.max(2)[0]}
            pools["avgmax"] = (pools["avg"] + pools["max"]) / 2
            return (flat * pools[pool].sigmoid()[..., None]).reshape(x.shape)

    x = random(2, 16, *(6, 5, 4)[:rank], dtype=torch.float64)
    assert_same_block(reference.GatherExcite(pool=pool), Original(), x, training=True)


@pytest.mark.parametrize("extent", [0, 2])
def test_one_position(extent):
    x = random(1, 4, 1, 1)
    torch.testing.assert_close(reference.GatherExcite(extent=extent)(x), x * x.sigmoid())


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: reference.GatherExcite(0),
    "extent: expected 0 or an integer above 1; got 1": lambda: reference.GatherExcite(extent=1),
    "extent: expected 0 or an integer above 1; got 2.0": lambda: reference.GatherExcite(extent=2.0),
    "pool: expected 'avg' with an extent; got 'max'": lambda: reference.GatherExcite(extent=2, pool="max"),
    "pool: expected one of avg, max, avgmax; got 'both'": lambda: reference.GatherExcite(pool="both"),
    "ties: expected one of first, even; got 'last'": lambda: reference.GatherExcite(ties="last"),
    "x: expected 8 channels; got shape (2, 4, 5, 5)": lambda: reference.GatherExcite(8)(random(2, 4, 5, 5)),
    "x: expected (B, C, H, W) with an extent; got shape (2, 4, 5)": (
        lambda: reference.GatherExcite(extent=2)(random(2, 4, 5))
    ),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


@pytest.mark.parametrize("extent", [0, 2, 4])
def test_trains_under_deterministic_algorithms(extent):
    assert torch.are_deterministic_algorithms_enabled()
    x = random(2, 16, 9, 7).requires_grad_()
    reference.GatherExcite(extent=extent)(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()

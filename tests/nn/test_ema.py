"""Efficient multi-scale attention against its formula."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from tests.checks import (
    LAYOUTS,
    assert_equivalent,
    assert_same_block,
    checkpoint,
    checkpoint_shapes,
    in_layout,
    random,
    randomised,
    with_state_of,
)


class Original(nn.Module):
    """Group by group, with both softmaxes taken of pooled maps."""

    def __init__(self, channels, factor=32):
        super().__init__()
        self.factor, width = factor, channels // factor
        self.gn, self.conv1x1 = nn.InstanceNorm2d(width, affine=True), nn.Linear(width, width)
        self.conv3x3 = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return torch.cat([self.one(group) for group in x.chunk(self.factor, 1)], 1)

    def one(self, x):
        rows = self.conv1x1(x.mean(3).transpose(1, 2)).transpose(1, 2).sigmoid()
        columns = self.conv1x1(x.mean(2).transpose(1, 2)).transpose(1, 2).sigmoid()
        u = self.gn(torch.einsum("bchw,bch,bcw->bchw", x, rows, columns))
        v = self.conv3x3(x)
        cross = [F.softmax(a.flatten(2).mean(2), 1) for a in (u, v)]
        gate = torch.einsum("bc,bchw->bhw", cross[0], v) + torch.einsum("bc,bchw->bhw", cross[1], u)
        return x * torch.sigmoid(gate)[:, None]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", [fused_nn, reference], ids=["fused", "reference"])
@pytest.mark.parametrize(("channels", "factor"), [(64, 32), (32, 32), (24, 4), (6, 1)])
def test_equals_the_original(channels, factor, module, training):
    original = randomised(Original(channels, factor))
    block = with_state_of(module.EMA(channels, factor=factor).double(), original)
    x = random(2, channels, 6, 5, dtype=torch.float64)
    assert_same_block(block, original, x, training=training)


def test_keys_are_the_authors():
    block = fused_nn.EMA(64)
    block.load_state_dict(checkpoint("EMA"))
    assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == checkpoint_shapes("EMA")


def test_one_position():
    assert torch.isfinite(fused_nn.EMA(32)(random(2, 32, 1, 1))).all()


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.EMA(0),
    "factor: expected a positive integer; got 0": lambda: fused_nn.EMA(32, factor=0),
    "factor: expected a divisor of channels, 48; got 32": lambda: fused_nn.EMA(48),
    "factor: expected a divisor of channels, 16; got 32": lambda: fused_nn.EMA(16),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


def test_trains_under_deterministic_algorithms():
    assert torch.are_deterministic_algorithms_enabled()
    block = fused_nn.EMA(64)
    block(random(2, 64, 6, 5)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_as_good_as_the_reference(dtype, layout):
    fused = randomised(fused_nn.EMA(32, factor=8)).to(dtype)
    plain = reference.EMA(32, factor=8).to(dtype)
    plain.load_state_dict(fused.state_dict())
    x = in_layout(random(3, 32, 7, 9, dtype=dtype), layout)

    def call(block):
        return lambda x, **parameters: torch.func.functional_call(block, parameters, (x,))

    inputs = {"x": x, **{name: p.detach() for name, p in fused.named_parameters()}}
    assert_equivalent(call(fused), call(plain), inputs, [random(*x.shape, seed=1, dtype=dtype)])


def test_an_empty_batch():
    assert fused_nn.EMA(32)(random(0, 32, 5, 6)).shape == (0, 32, 5, 6)

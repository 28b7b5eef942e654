"""Coordinate attention against timm's and the authors' formula."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_same_block,
    checkpoint,
    checkpoint_shapes,
    in_layout,
    random,
    randomised,
    with_state_of,
)

timm_layers = pytest.importorskip("timm.layers", reason="timm is not installed")


class Original(nn.Module):
    """The two strips apart: what is shared is their convolution and the statistics of the norm."""

    def __init__(self, channels, width):
        super().__init__()
        self.shared, self.norm = nn.Linear(channels, width), nn.BatchNorm1d(width)
        self.rows, self.columns = nn.Linear(width, channels), nn.Linear(width, channels)

    def forward(self, x):
        strip = torch.cat([x.mean(3), x.mean(2)], 2).transpose(1, 2)  # (B, H + W, C)
        z = self.norm(self.shared(strip).transpose(1, 2)).transpose(1, 2)
        z = z * (z + 3).clamp(0, 6) / 6
        height = x.shape[2]
        rows = self.rows(z[:, :height]).sigmoid().transpose(1, 2)[..., None]
        columns = self.columns(z[:, height:]).sigmoid().transpose(1, 2)[:, :, None]
        return x * rows * columns


MODULES = {"fused": fused_nn, "reference": reference}
PAIRS = {
    "authors": (lambda m: m.CoordinateAttention(32), lambda: Original(32, 8)),
    "authors, wide": (lambda m: m.CoordinateAttention(48, reduction=4), lambda: Original(48, 12)),
    "timm": (
        lambda m: m.CoordinateAttention(32, hidden=8, bias=False),
        lambda: timm_layers.coord_attn.CoordAttn(32),
    ),
    "timm, options": (
        lambda m: m.CoordinateAttention(32, hidden=10, activation="silu", gate="hard_sigmoid"),
        lambda: timm_layers.coord_attn.CoordAttn(
            32, rd_channels=10, bias=True, act_layer=nn.SiLU, gate_layer="hard_sigmoid"
        ),
    ),
}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_the_original(name, module, training):
    ours, original = PAIRS[name]
    original = randomised(original())
    block = with_state_of(ours(MODULES[module]).double(), original)
    x = random(3, block.channels, 6, 9, dtype=torch.float64)
    assert_same_block(block, original, x, training=training)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_good_as_the_reference(training, dtype, layout):
    block = fused_nn.CoordinateAttention(16)
    original = reference.CoordinateAttention(16).double()
    original.load_state_dict(block.state_dict())
    assert_as_good_as_reference(original, block, in_layout(random(4, 16, 13, 17, dtype=dtype), layout), training)


@pytest.mark.slow  # Inductor: about 5 s
@pytest.mark.parametrize(("training", "backend"), [(True, "aot_eager"), (False, "inductor")])
def test_compiles_in_one_graph(training, backend):
    torch._dynamo.reset()
    block = fused_nn.CoordinateAttention(6).double().train(training)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend=backend)
    assert_same_block(compiled, block, random(2, 6, 5, 7), training=training)


@pytest.mark.parametrize(("source", "bias"), [("CoordAtt", True), ("timm.CoordAttn", False)])
def test_keys(source, bias):
    block = fused_nn.CoordinateAttention(64, bias=bias)
    block.load_state_dict(checkpoint(source))
    assert {k: tuple(v.shape) for k, v in block.state_dict().items()} == checkpoint_shapes(source)


def test_one_position():
    assert torch.isfinite(fused_nn.CoordinateAttention(32)(random(1, 32, 1, 1))).all()


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.CoordinateAttention(0),
    "hidden: expected a positive integer; got 0": lambda: fused_nn.CoordinateAttention(32, hidden=0),
    "reduction: expected a positive number; got 0": lambda: fused_nn.CoordinateAttention(32, reduction=0),
    "activation: expected one of ": lambda: fused_nn.CoordinateAttention(32, activation="mish"),
    "gate: expected one of ": lambda: fused_nn.CoordinateAttention(32, gate="softmax"),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_trains_under_deterministic_algorithms():
    assert torch.are_deterministic_algorithms_enabled()
    block = fused_nn.CoordinateAttention(32)
    block(random(2, 32, 6, 5)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())

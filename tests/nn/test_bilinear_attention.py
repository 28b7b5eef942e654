"""Bilinear attention against timm's and against the sums that it is made of."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fused_attn import nn as fused_nn
from fused_attn import reference
from fused_attn.nn.bilinear_attention import pool_blocks
from fused_attn.reference.bilinear_attention import mix_blocks
from tests.checks import (
    LAYOUTS,
    assert_as_good_as_reference,
    assert_equivalent,
    assert_same_block,
    in_layout,
    random,
    randomised,
    with_state_of,
)

non_local_attn = pytest.importorskip("timm.layers.non_local_attn", reason="timm is not installed")

MODULES = {"fused": fused_nn, "reference": reference}
PAIRS = {
    "transform": (
        lambda m: m.BilinearTransform(12, block_size=3),
        lambda: non_local_attn.BilinearAttnTransform(12, 3, 2),
        (12, 6, 9),
    ),
    "transform, one position a block": (
        lambda m: m.BilinearTransform(12, block_size=3, groups=4),
        lambda: non_local_attn.BilinearAttnTransform(12, 3, 4),
        (12, 3, 3),
    ),
    "attention": (
        lambda m: m.BilinearAttention(64),
        lambda: non_local_attn.BatNonLocalAttn(64),
        (64, 7, 14),
    ),
    "attention, options": (
        lambda m: m.BilinearAttention(12, block_size=2, groups=3, rd_channels=6, drop_rate=0),
        lambda: non_local_attn.BatNonLocalAttn(12, 2, 3, rd_channels=6, drop_rate=0),
        (12, 8, 4),
    ),
}


@pytest.fixture(autouse=True)
def one_op(monkeypatch):
    """A BatchNorm and what follows it, as in large maps: `test_normalised` has the choice."""
    monkeypatch.setattr("fused_attn.nn.normalised.pays", lambda *_: True)


def build(name, module):
    ours, original, shape = PAIRS[name]
    original = randomised(original())
    block = with_state_of(ours(module).double(), original)
    assert list(block.state_dict()) == list(original.state_dict())
    return block, original, random(3, *shape, dtype=torch.float64)


def assert_same(block, original, x, training):
    """As `assert_same_block`, with the same channels dropped."""

    class Seeded(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x):
            torch.manual_seed(3)
            return self.block(x)

    assert_same_block(Seeded(block), Seeded(original), x, training=training)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("name", PAIRS)
def test_equals_timms(name, module, training, layout):
    block, original, x = build(name, MODULES[module])
    assert_same(block, original, in_layout(x, layout), training)


@pytest.mark.parametrize("size", [(4, 4), (8, 12), (12, 4)], ids=str)
def test_mixing(size):
    x, p, q = random(2, 6, *size), random(2, 3, 4, 4, seed=1), random(2, 3, 4, 4, seed=2)

    def by_index(x, p, q):
        y = x.unflatten(3, (4, -1)).unflatten(2, (4, -1)).unflatten(1, (3, 2))
        return torch.einsum("bgij,bgcjalw,bglk->bgciakw", p, y, q).reshape(x.shape)

    grad = random(*size, 6, 2, seed=3).permute(3, 2, 0, 1)
    assert_equivalent(
        lambda x, p, q: mix_blocks(x, p, q), lambda x, p, q: by_index(x, p, q), {"x": x, "p": p, "q": q}, [grad]
    )


@pytest.mark.parametrize("values", ["distinct", "equal", "nan"])
def test_maxima_of_blocks(values):
    x = random(2, 3, 6, 9, dtype=torch.float64)
    if values == "equal":
        x = x.relu()
    if values == "nan":
        x[0, 1, 2, 4] = torch.nan
    grads = [random(2, 3, 3, 1, seed=1, dtype=torch.float64), random(2, 3, 1, 3, seed=2, dtype=torch.float64)]
    assert_equivalent(
        lambda x: pool_blocks(x, 3), lambda x: reference.bilinear_attention.pool_blocks(x, 3), {"x": x}, grads
    )


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_as_good_as_the_reference(training, dtype, layout):
    original = build("attention, options", reference)[0]
    block, _, x = build("attention, options", fused_nn)
    x = in_layout(x.to(dtype), layout)
    assert copy.deepcopy(block).to(dtype)(x).stride() == x.stride()
    assert_as_good_as_reference(original, block, x, training and dtype == torch.float32)


def test_drops_whole_channels():
    block, _, x = build("attention", fused_nn)
    dropped = (block.train()(x) == x).all(3).all(2)
    assert 0 < dropped.float().mean() < 0.6
    kept = block.eval()(x)
    assert not torch.equal(kept, x)


@pytest.mark.parametrize("name", ["transform", "attention"])
def test_odd_batches(name):
    block, original, x = build(name, fused_nn)
    assert_same(block, original, x[:1], True)
    for y in (x[:1], x.transpose(2, 3) if name == "transform" else x):
        assert_same(block, original, y, False)
    assert block.eval()(x[:0]).shape == x[:0].shape


def test_layers_that_somebody_put_in_run_themselves():
    block, original, x = build("attention", fused_nn)
    block.conv2["bn"] = nn.InstanceNorm2d(64)
    original.conv2.bn = nn.Sequential(nn.InstanceNorm2d(64), nn.ReLU())
    assert_same(block, original, x, True)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_compiles_in_one_graph(training):
    torch._dynamo.reset()
    block, _, x = build("attention, options", fused_nn)
    compiled = torch.compile(copy.deepcopy(block), fullgraph=True, backend="aot_eager")
    assert_same_block(compiled, block, x, training=training)


ERRORS = {
    "channels: expected a positive integer; got 0": lambda: fused_nn.BilinearAttention(0),
    "block_size: expected a positive integer; got 0": lambda: fused_nn.BilinearAttention(64, block_size=0),
    "groups: expected a divisor of channels, 16; got 3": lambda: fused_nn.BilinearAttention(64, groups=3),
    "rd_channels: expected a positive integer; got 0": lambda: fused_nn.BilinearAttention(64, rd_channels=0),
    "rd_divisor: expected a positive integer; got 0": lambda: fused_nn.BilinearAttention(64, rd_divisor=0),
    "drop_rate: expected a number of at least 0 and below 1; got 1": lambda: fused_nn.BilinearAttention(
        64, drop_rate=1
    ),
    "x: expected (B, 8, H, W) with H and W multiples of 7; got shape (1, 8, 7, 8)": lambda: fused_nn.BilinearTransform(
        8
    )(torch.zeros(1, 8, 7, 8)),
}


@pytest.mark.parametrize("message", ERRORS)
def test_errors(message):
    with pytest.raises(ValueError) as caught:
        ERRORS[message]()
    assert str(caught.value) == message


def test_trains_under_deterministic_algorithms():
    assert torch.are_deterministic_algorithms_enabled()
    block = fused_nn.BilinearAttention(64)
    block(random(2, 64, 7, 7)).square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in block.parameters())

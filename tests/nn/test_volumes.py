"""Blocks on volumes as MONAI's networks have them, in small: the fused form against the reference in both layouts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fused_attn.nn
from fused_attn import reference
from tests.checks import LAYOUTS, assert_as_good_as_reference, assert_same_block, in_layout, random, randomised

SHAPE = (1, 16, 8, 16, 16)

BLOCKS = {
    "BAM": lambda m: m.BAM(16, reduction=4, rank=3),
    "CBAM": lambda m: m.CBAM(16, reduction=4, kernel_size=3, rank=3),
    "CBAM timm": lambda m: m.CBAM(
        16, reduction=4, kernel_size=3, order=("mean", "max"), ties="even", batch_norm=False, rank=3
    ),
    "ChannelAttention": lambda m: m.ChannelAttention(16, reduction=4),
    "DoubleAttention": lambda m: m.DoubleAttention(16, rank=3),
    "ECA": lambda m: m.ECA(16),
    "EffectiveSE": lambda m: m.EffectiveSE(16),
    "GatherExcite": lambda m: m.GatherExcite(16, pool="avgmax"),
    "ResidualAttention": lambda m: m.ResidualAttention(
        16,
        trunk=nn.Conv3d(16, 16, 3, padding=1),
        mask=nn.Sequential(nn.Conv3d(16, 16, 1), nn.Sigmoid()),
    ),
    "SCSE": lambda m: m.SCSE(16, reduction=4),
    "SCSE max": lambda m: m.SCSE(16, reduction=4, combine="max"),
    "SimAM": lambda m: m.SimAM(16),
    "SpatialAttention": lambda m: m.SpatialAttention(kernel_size=3, rank=3),
    "SpatialTransformer": lambda m: m.SpatialTransformer(
        16, localization=nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten()), features=16, rank=3
    ),
    "SqueezeExcite": lambda m: m.SqueezeExcite(16, reduction=2),
}


def pair(name):
    original = randomised(BLOCKS[name](reference))
    block = BLOCKS[name](fused_attn.nn).double()
    block.load_state_dict(copy.deepcopy(original.state_dict()))
    return block, original


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_equals_the_reference(name, layout):
    block, original = pair(name)
    x = in_layout(random(*SHAPE, dtype=torch.float64), layout)
    if name != "ResidualAttention":  # whose result lies as its trunk's does
        assert block.eval()(x).stride() == x.stride()
    assert_same_block(block, original, x, training=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("GatherExcite", "SimAM")])
def test_as_good_as_the_reference(name, layout):
    """Odd sizes, in training. Samples that differ: a BatchNorm over the means of plain noise would amplify rounding."""
    block, original = pair(name)
    x = random(4, 16, 5, 9, 7) + random(4, 16, 1, 1, 1)
    assert_as_good_as_reference(original, block, in_layout(x, layout))

"""Blocks on volumes as MONAI's networks have them, in small: the fused form against the reference in both layouts."""

from __future__ import annotations

import copy
import inspect

import pytest
import torch
from torch import nn

import fused_attn.nn
from fused_attn import reference
from tests.checks import LAYOUTS, assert_as_good_as_reference, assert_same_block, in_layout, random, randomised
from tests.nn.test_every_block import BLOCKS as EVERY

SHAPE = (1, 16, 8, 16, 16)
#: Of a frame's rows and columns a stage of I3D has 14.
CLIP = (1, 16, 4, 14, 14)

BLOCKS = {
    "BAM": lambda m: m.BAM(16, reduction=4, rank=3),
    "CBAM": lambda m: m.CBAM(16, reduction=4, kernel_size=3, rank=3),
    "CBAM timm": lambda m: m.CBAM(
        16, reduction=4, kernel_size=3, order=("mean", "max"), ties="even", batch_norm=False, rank=3
    ),
    "ChannelAttention": lambda m: m.ChannelAttention(16, reduction=4),
    "ChannelSelfAttention": lambda m: m.ChannelSelfAttention(16),
    "DoubleAttention": lambda m: m.DoubleAttention(16, rank=3),
    "ECA": lambda m: m.ECA(16),
    "EffectiveSE": lambda m: m.EffectiveSE(16),
    "GatherExcite": lambda m: m.GatherExcite(16, pool="avgmax"),
    "GatedChannelTransformation": lambda m: m.GatedChannelTransformation(16),
    "GlobalContext": lambda m: m.GlobalContext(16, ratio=1 / 4),
    "GlobalContext scale": lambda m: m.GlobalContext(16, fuse="scale", ratio=1 / 4),
    "GlobalResponseNorm": lambda m: m.GlobalResponseNorm(16),
    "NonLocal": lambda m: m.NonLocal(16, rank=3),
    "NonLocal Gaussian": lambda m: m.NonLocal(16, mode="gaussian", rank=3),
    "NonLocal dot": lambda m: m.NonLocal(16, mode="dot", pool="after", rank=3),
    "NonLocal concatenation": lambda m: m.NonLocal(16, mode="concatenation", rank=3),
    "NonLocal mmcv": lambda m: m.NonLocal.preset("mmcv", 16, rank=3),
    "PositionAttention": lambda m: m.PositionAttention(16, rank=3),
    "ResidualAttention": lambda m: m.ResidualAttention(
        16,
        trunk=nn.Conv3d(16, 16, 3, padding=1),
        mask=nn.Sequential(nn.Conv3d(16, 16, 1), nn.Sigmoid()),
    ),
    "SCSE": lambda m: m.SCSE(16, reduction=4),
    "SCSE max": lambda m: m.SCSE(16, reduction=4, combine="max"),
    "SRM": lambda m: m.SRM(16),
    "SimAM": lambda m: m.SimAM(16),
    "SpatialAttention": lambda m: m.SpatialAttention(kernel_size=3, rank=3),
    "SpatialTransformer": lambda m: m.SpatialTransformer(
        16, localization=nn.Sequential(nn.AdaptiveAvgPool3d(1), nn.Flatten()), features=16, rank=3
    ),
    "SqueezeExcite": lambda m: m.SqueezeExcite(16, reduction=2),
}


def quadratic(name: str) -> bool:
    """Whether eager's matrix of pairs of positions would be most of the test."""
    return name.startswith(("NonLocal", "PositionAttention"))


def pair(name):
    original = randomised(BLOCKS[name](reference))
    block = BLOCKS[name](fused_attn.nn).double()
    block.load_state_dict(copy.deepcopy(original.state_dict()))
    return block, original


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", BLOCKS)
def test_equals_the_reference(name, layout):
    block, original = pair(name)
    x = in_layout(random(*(CLIP if quadratic(name) else SHAPE), dtype=torch.float64), layout)
    if name != "ResidualAttention":  # whose result lies as its trunk's does
        y = block.eval()(x)
        assert in_layout(y, layout).data_ptr() == y.data_ptr()  # it lies so
    assert_same_block(block, original, x, training=False)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in ("GatherExcite", "SimAM")])
def test_as_good_as_the_reference(name, layout):
    """Odd sizes, in training. Samples that differ: a BatchNorm over the means of plain noise would amplify rounding."""
    block, original = pair(name)
    x = random(4, 16, 5, 9, 7) + random(4, 16, 1, 1, 1)
    if name.startswith("NonLocal"):
        x = x / 2  # of logits far apart the softmax's gradient is rounded as `position_attention` says
    assert_as_good_as_reference(original, block, in_layout(x, layout))


@pytest.mark.parametrize(
    "name", sorted({n.partition(" ")[0] for n in BLOCKS} - {"ResidualAttention", "SpatialTransformer"})
)
def test_sequences(name):
    """What takes volumes takes (B, C, L): not a spatial transformer, a residual attention if its branches do."""
    names = inspect.signature(getattr(reference, name).__init__).parameters
    options = {k: v for k, v in {"rank": 1, "reduction": 4}.items() if k in names}
    original = randomised(getattr(reference, name)(16, **options))
    block = getattr(fused_attn.nn, name)(16, **options).double()
    block.load_state_dict(copy.deepcopy(original.state_dict()))
    assert_same_block(block, original, random(2, 16, 33, dtype=torch.float64), training=False)


#: That of two maps has its volumes in tests/nn/test_attention_gate.py.
ONE_MAP = [name for name in fused_attn.nn.__all__ if name != "AttentionGate"]


def blocks_with_a_form_for_volumes():
    """Those of `fused_attn.nn` that a map of three spatial axes passes, with `rank=3` where they take it."""
    for name in ONE_MAP:
        kind = getattr(fused_attn.nn, name)
        if "rank" in inspect.signature(kind.__init__).parameters:
            yield name
            continue
        try:
            EVERY[name](fused_attn.nn).eval()(random(1, 8, 4, 6, 5))
        except (ValueError, RuntimeError):
            continue
        yield name


def test_every_block_that_takes_volumes_is_here():
    assert {name.partition(" ")[0] for name in BLOCKS} == {*blocks_with_a_form_for_volumes(), "ResidualAttention"}


@pytest.mark.parametrize("name", sorted(set(ONE_MAP) - {name.partition(" ")[0] for name in BLOCKS}))
def test_the_others_say_so(name):
    with pytest.raises((ValueError, RuntimeError), match=r"^x: expected|Expected .* input to conv2d"):
        EVERY[name](fused_attn.nn).eval()(random(1, 8, 4, 6, 5))

"""Every host block against itself: fused and original, with the same weights, forward and every gradient."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.nn.utils.parametrizations import spectral_norm

from fused_attn import explain, fuse, reference, unfuse
from fused_attn import nn as fused_nn
from fused_attn.fusion import CbamGate, ChannelGate, OwnLayers, SpatialGate, SplitGate
from fused_attn.fusion.hosts.registry import recognise
from tests.checks import LAYOUTS, assert_equivalent, assert_same_block, in_layout, random
from tests.fusion import look_alikes
from tests.fusion.counting import FusedOperators
from tests.ops.test_cbam import separated

timm_layers = pytest.importorskip("timm.layers", reason="timm is not installed")
timm_non_local = pytest.importorskip("timm.layers.non_local_attn", reason="timm is not installed")
timm_cbam = pytest.importorskip("timm.layers.cbam", reason="timm is not installed")
split_attn = pytest.importorskip("timm.layers.split_attn", reason="timm is not installed")
efficientnet = pytest.importorskip("timm.models._efficientnet_blocks", reason="timm is not installed")
senet = pytest.importorskip("timm.models.senet", reason="timm is not installed")
hgnet = pytest.importorskip("timm.models.hgnet", reason="timm is not installed")
tv_misc = pytest.importorskip("torchvision.ops.misc", reason="torchvision is not installed")
monai_blocks = pytest.importorskip("monai.networks.blocks", reason="monai is not installed")

C = 32

#: name -> (block, spatial rank, whether it is one fused op or split around its own layers)
BLOCKS = {
    "timm SEModule": (lambda: timm_layers.SEModule(C), 2, ChannelGate),
    "timm SEModule, max": (lambda: timm_layers.SEModule(C, add_maxpool=True), 2, ChannelGate),
    "timm SEModule, no bias": (lambda: timm_layers.SEModule(C, bias=False, gate_layer="hard_sigmoid"), 2, ChannelGate),
    "timm SEModule, silu": (lambda: timm_layers.SEModule(C, act_layer=nn.SiLU, rd_ratio=0.25), 2, ChannelGate),
    "timm SEModule, norm": (lambda: timm_layers.SEModule(C, norm_layer=nn.BatchNorm2d), 2, SplitGate),
    "timm SEModule, mish": (lambda: timm_layers.SEModule(C, act_layer=nn.Mish), 2, SplitGate),
    "timm SEModule, another slope": (lambda: timm_layers.SEModule(C, act_layer=leaky_relu(0.2)), 2, SplitGate),
    "timm SEModule, grouped": (lambda: grouped(timm_layers.SEModule(C, rd_channels=8), "fc1"), 2, SplitGate),
    "timm SqueezeExcite": (lambda: efficientnet.SqueezeExcite(C), 2, ChannelGate),
    "timm SqueezeExcite, silu": (lambda: efficientnet.SqueezeExcite(C, act_layer=nn.SiLU), 2, ChannelGate),
    "timm SqueezeExcite, hard": (
        lambda: efficientnet.SqueezeExcite(C, gate_layer=nn.Hardsigmoid, force_act_layer=nn.ReLU),
        2,
        ChannelGate,
    ),
    "timm SqueezeExcite, prelu": (lambda: efficientnet.SqueezeExcite(C, act_layer=nn.PReLU), 2, SplitGate),
    "timm EffectiveSEModule": (lambda: timm_layers.EffectiveSEModule(C), 2, ChannelGate),
    "timm EffectiveSEModule, max": (lambda: timm_layers.EffectiveSEModule(C, add_maxpool=True), 2, ChannelGate),
    "timm EcaModule": (lambda: timm_layers.EcaModule(C), 2, ChannelGate),
    "timm EcaModule, k 5": (lambda: timm_layers.EcaModule(kernel_size=5), 2, ChannelGate),
    "timm EcaModule, mlp": (lambda: timm_layers.EcaModule(C, use_mlp=True), 2, SplitGate),
    "timm CecaModule": (lambda: timm_layers.CecaModule(C), 2, ChannelGate),
    "timm CecaModule, bias": (lambda: timm_layers.CecaModule(C, act_layer=nn.ReLU), 2, ChannelGate),
    "timm senet SEModule": (lambda: senet.SEModule(C, 4), 2, ChannelGate),
    "timm hgnet EseModule": (lambda: hgnet.EseModule(C), 2, ChannelGate),
    "timm GatherExcite": (lambda: gather_excite(), 2, ChannelGate),
    "timm GatherExcite, max": (lambda: gather_excite(add_maxpool=True, gate_layer="hard_sigmoid"), 2, ChannelGate),
    "timm GatherExcite, mlp": (lambda: with_mlp(gather_excite()), 2, ChannelGate),
    "timm CbamModule": (lambda: timm_cbam.CbamModule(C), 2, CbamGate),
    "timm CbamModule, options": (
        lambda: timm_cbam.CbamModule(C, 1 / 5, 0, 8, 3, nn.SiLU, "hard_sigmoid", mlp_bias=True),
        2,
        CbamGate,
    ),
    "timm LightCbamModule": (lambda: timm_cbam.LightCbamModule(C), 2, CbamGate),
    "timm LightCbamModule, options": (
        lambda: timm_cbam.LightCbamModule(C, 1 / 4, spatial_kernel_size=5, gate_layer="hard_sigmoid"),
        2,
        CbamGate,
    ),
    "timm CoordAttn": (lambda: coordinate_attention(), 2, OwnLayers),
    "timm EfficientLocalAttn": (lambda: timm_layers.coord_attn.EfficientLocalAttn(C), 2, OwnLayers),
    "timm EfficientLocalAttn, options": (
        lambda: timm_layers.coord_attn.EfficientLocalAttn(
            C, kernel_size=3, bias=True, norm_layer=nn.BatchNorm2d, gate_layer="hard_sigmoid", has_skip=True
        ),
        2,
        OwnLayers,
    ),
    "timm SimpleCoordAttn": (lambda: timm_layers.coord_attn.SimpleCoordAttn(C), 2, OwnLayers),
    "timm SimpleCoordAttn, options": (
        lambda: timm_layers.coord_attn.SimpleCoordAttn(C, bias=False, act_layer=nn.PReLU, has_skip=True),
        2,
        OwnLayers,
    ),
    "timm StripAttn": (lambda: timm_layers.coord_attn.StripAttn(C), 2, OwnLayers),
    "timm StripAttn, options": (
        lambda: timm_layers.coord_attn.StripAttn(C, kernel_size=5, bias=True, has_skip=True),
        2,
        OwnLayers,
    ),
    "timm StripAttn, no convolutions": (
        lambda: timm_layers.coord_attn.StripAttn(C, use_conv=False),
        2,
        OwnLayers,
    ),
    "timm CoordAttn, options": (
        lambda: coordinate_attention(bias=True, norm_layer=None, gate_layer="hard_sigmoid", has_skip=True),
        2,
        OwnLayers,
    ),
    "timm NonLocalAttn": (lambda: timm_layers.NonLocalAttn(C), 2, OwnLayers),
    "timm NonLocalAttn, no scale": (lambda: timm_layers.NonLocalAttn(C, use_scale=False), 2, OwnLayers),
    "timm GlobalContext": (lambda: timm_layers.GlobalContext(C), 2, OwnLayers),
    "timm GlobalContext, both": (
        lambda: timm_layers.GlobalContext(C, fuse_add=True, act_layer=nn.Mish, gate_layer="hard_sigmoid"),
        2,
        OwnLayers,
    ),
    "timm GlobalContext, add": (lambda: timm_layers.GlobalContext(C, fuse_add=True, fuse_scale=False), 2, OwnLayers),
    "timm GlobalContext, mean": (lambda: timm_layers.GlobalContext(C, use_attn=False), 2, OwnLayers),
    "timm BilinearAttnTransform": (lambda: timm_non_local.BilinearAttnTransform(C, 7, 2), 2, OwnLayers),
    "timm BilinearAttnTransform, options": (
        lambda: timm_non_local.BilinearAttnTransform(C, 7, 8, nn.SiLU, timm_layers.LayerNorm2d),
        2,
        OwnLayers,
    ),
    "timm BatNonLocalAttn": (lambda: timm_layers.BatNonLocalAttn(C, drop_rate=0.0), 2, OwnLayers),
    "timm BatNonLocalAttn, options": (
        lambda: timm_layers.BatNonLocalAttn(
            C, block_size=7, groups=4, rd_channels=16, drop_rate=0.0, act_layer=nn.Mish
        ),
        2,
        OwnLayers,
    ),
    "timm SelectiveKernel": (lambda: selective_kernel(C), 2, OwnLayers),
    "timm SelectiveKernel, options": (
        lambda: selective_kernel(C, kernel_size=[3, 5, 7], split_input=False, groups=4, act_layer=nn.SiLU),
        2,
        OwnLayers,
    ),
    "timm SelectiveKernel, mish": (lambda: selective_kernel(C, act_layer=nn.Mish), 2, OwnLayers),
    "timm SelectiveKernel, drop": (lambda: selective_kernel(C, drop_layer=Halving), 2, OwnLayers),
    "timm SelectiveKernel, excitation": (lambda: with_group_norm(selective_kernel(C)), 2, OwnLayers),
    "timm SplitAttn": (lambda: split_attn.SplitAttn(C, norm_layer=nn.BatchNorm2d), 2, OwnLayers),
    "timm SplitAttn, groups": (
        lambda: split_attn.SplitAttn(C, groups=2, radix=4, norm_layer=nn.BatchNorm2d, act_layer=nn.SiLU),
        2,
        OwnLayers,
    ),
    "timm SplitAttn, radix 1": (lambda: split_attn.SplitAttn(C, radix=1, groups=4), 2, OwnLayers),
    "timm SplitAttn, mish": (
        lambda: split_attn.SplitAttn(C, norm_layer=nn.BatchNorm2d, act_layer=nn.Mish),
        2,
        OwnLayers,
    ),
    "timm ChannelAttn": (lambda: timm_cbam.ChannelAttn(C, mlp_bias=True), 2, ChannelGate),
    "timm LightChannelAttn": (lambda: timm_cbam.LightChannelAttn(C, gate_layer="hard_sigmoid"), 2, ChannelGate),
    "timm SpatialAttn": (lambda: timm_cbam.SpatialAttn(3), 2, SpatialGate),
    "ultralytics ChannelAttention": (lambda: look_alikes.ChannelAttention(C), 2, ChannelGate),
    "ultralytics SpatialAttention": (lambda: look_alikes.SpatialAttention(), 2, SpatialGate),
    "ultralytics CBAM": (lambda: look_alikes.CBAM(C), 2, CbamGate),
    "ultralytics CBAM, k 3": (lambda: look_alikes.CBAM(C, 3), 2, CbamGate),
    "smp SCSEModule": (lambda: look_alikes.SCSEModule(C), 2, OwnLayers),
    "torchvision": (lambda: tv_misc.SqueezeExcitation(C, 8), 2, ChannelGate),
    "torchvision, EfficientNet": (
        lambda: tv_misc.SqueezeExcitation(C, 8, activation=functools.partial(nn.SiLU, inplace=True)),
        2,
        ChannelGate,
    ),
    "torchvision, MobileNetV3": (
        lambda: tv_misc.SqueezeExcitation(C, 8, scale_activation=nn.Hardsigmoid),
        2,
        ChannelGate,
    ),
    "torchvision, softplus": (lambda: tv_misc.SqueezeExcitation(C, 8, activation=nn.Softplus), 2, SplitGate),
    "monai, 1-D": (lambda: monai_blocks.ChannelSELayer(1, C), 1, ChannelGate),
    "monai, 2-D": (lambda: monai_blocks.ChannelSELayer(2, C, r=4), 2, ChannelGate),
    "monai, 3-D": (lambda: monai_blocks.ChannelSELayer(3, C), 3, ChannelGate),
    "monai, residual": (lambda: monai_blocks.ResidualSELayer(2, C), 2, ChannelGate),
    "monai, residual 3-D": (lambda: monai_blocks.ResidualSELayer(3, C), 3, ChannelGate),
    "monai, leaky relu": (lambda: monai_blocks.ChannelSELayer(2, C, acti_type_1="leakyrelu"), 2, ChannelGate),
    "monai, another slope": (
        lambda: monai_blocks.ChannelSELayer(2, C, acti_type_1=("leakyrelu", {"negative_slope": 0.2})),
        2,
        SplitGate,
    ),
    "monai, prelu": (lambda: monai_blocks.ChannelSELayer(2, C, acti_type_1="prelu"), 2, SplitGate),
    "reference SE": (lambda: reference.SqueezeExcite(C, pool="avgmax"), 2, ChannelGate),
    "reference ESE": (lambda: reference.EffectiveSE(C), 2, ChannelGate),
    "reference ECA": (lambda: reference.ECA(C, padding="circular"), 1, ChannelGate),
    "reference GatherExcite": (lambda: reference.GatherExcite(pool="max"), 3, ChannelGate),
    "reference ChannelAttention": (lambda: reference.ChannelAttention(C), 2, ChannelGate),
    "reference ChannelAttention, conv1d": (lambda: reference.ChannelAttention(C, layer="conv1d"), 3, ChannelGate),
    "reference SpatialAttention": (lambda: reference.SpatialAttention(order=("mean", "max")), 2, SpatialGate),
    "reference SpatialAttention, 1-D": (lambda: reference.SpatialAttention(batch_norm=False, rank=1), 1, SpatialGate),
    "reference CBAM": (lambda: reference.CBAM(C), 2, CbamGate),
    "reference CBAM, 3-D": (lambda: reference.CBAM(C, kernel_size=3, rank=3), 3, CbamGate),
    "reference CBAM, plain": (lambda: reference.CBAM(C, batch_norm=False, ties="even", bias=False), 2, CbamGate),
    "reference BAM": (lambda: reference.BAM(C), 2, OwnLayers),
    "reference SCSE": (lambda: reference.SCSE(C), 2, OwnLayers),
    "reference SCSE, max": (lambda: reference.SCSE(C, combine="max"), 3, OwnLayers),
    "reference SimAM": (lambda: reference.SimAM(), 2, OwnLayers),
    "reference SimAM, 3-D": (lambda: reference.SimAM(C, e_lambda=0.1), 3, OwnLayers),
    "reference CoordinateAttention": (lambda: reference.CoordinateAttention(C), 2, OwnLayers),
    "reference SKConv": (lambda: reference.SKConv(C, M=3), 2, OwnLayers),
    "reference SelectiveKernel": (lambda: reference.SelectiveKernel(C), 2, OwnLayers),
    "reference SplitAttention": (lambda: reference.SplitAttention(C, groups=2), 2, OwnLayers),
    "reference GlobalContext": (lambda: reference.GlobalContext(C, fuse="both"), 2, OwnLayers),
    "reference GlobalContext, scale": (lambda: reference.GlobalContext(C, fuse="scale"), 3, OwnLayers),
    "reference GlobalContext, mean": (lambda: reference.GlobalContext(C, fuse="scale", pooling="avg"), 3, OwnLayers),
    "reference TripletAttention": (lambda: reference.TripletAttention(), 2, OwnLayers),
    "reference TripletAttention, no spatial": (
        lambda: reference.TripletAttention(C, kernel_size=3, no_spatial=True, ties="even"),
        2,
        OwnLayers,
    ),
    "reference CrissCrossAttention": (lambda: reference.CrissCrossAttention(C), 2, OwnLayers),
    "reference EMA": (lambda: reference.EMA(C, factor=8), 2, OwnLayers),
    "reference NonLocal": (lambda: reference.NonLocal(C), 2, OwnLayers),
    "reference NonLocal, dot, 3-D": (lambda: reference.NonLocal(C, mode="dot", rank=3), 3, OwnLayers),
    "reference PositionAttention": (lambda: reference.PositionAttention(C), 2, OwnLayers),
    "reference SelfAttention2d": (lambda: reference.SelfAttention2d(C), 2, OwnLayers),
    "reference ChannelSelfAttention": (lambda: reference.ChannelSelfAttention(C), 2, OwnLayers),
    "reference ChannelSelfAttention, 1-D": (lambda: reference.ChannelSelfAttention(), 1, OwnLayers),
    "reference DualAttention": (lambda: reference.DualAttention(C, hidden=C), 2, OwnLayers),
    "reference DoubleAttention": (lambda: reference.DoubleAttention(C), 2, OwnLayers),
    "reference DoubleAttention, 3-D": (
        lambda: reference.DoubleAttention(C, distribute="positions", reconstruct=False, features=C, rank=3),
        3,
        OwnLayers,
    ),
    "reference ExternalAttention": (lambda: reference.ExternalAttention(C, memory=16), 2, OwnLayers),
    "reference GSoP": (lambda: reference.GSoP(C, reduced=8), 2, OwnLayers),
    "reference GSoP, max": (lambda: reference.GSoP(C, mode="max", reduced=8, stride=2), 2, OwnLayers),
    "reference BilinearAttention": (lambda: reference.BilinearAttention(C, drop_rate=0), 2, OwnLayers),
    "reference BilinearTransform": (lambda: reference.BilinearTransform(C, groups=4), 2, OwnLayers),
    "reference ResidualAttention": (lambda: reference.ResidualAttention(C, depth=1), 2, OwnLayers),
    "reference ResidualAttention, given": (lambda: residual_attention(), 2, OwnLayers),
    "reference SpatialTransformer": (lambda: spatial_transformer(), 2, OwnLayers),
    "reference CBAM, channel only": (lambda: reference.CBAM(C, no_spatial=True), 2, ChannelGate),
}


#: Modules whose reference runs as the class of the same name in `fused_attn.nn`.
AS_IN_NN = ["BAM", "CoordinateAttention", "CrissCrossAttention", "EMA", "SCSE", "SimAM", "TripletAttention"]
AS_IN_NN += ["SKConv", "SelectiveKernel", "SplitAttention"]
AS_IN_NN += ["ChannelSelfAttention", "DualAttention", "NonLocal", "PositionAttention", "SelfAttention2d"]
AS_IN_NN += ["GlobalContext", "BilinearAttention", "BilinearTransform", "DoubleAttention", "ExternalAttention", "GSoP"]
AS_IN_NN += ["ResidualAttention", "SpatialTransformer"]


def residual_attention():
    mask = nn.Sequential(nn.Conv2d(C, C, 3, padding=1), nn.Sigmoid())
    return reference.ResidualAttention(C, trunk=nn.Conv2d(C, C, 3, padding=1), mask=mask)


def spatial_transformer(module=reference):
    localization = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return module.SpatialTransformer(C, localization=localization, features=4 * C)


def selective_kernel(*args, **options):
    return timm_layers.SelectiveKernel(*args, **options)


class Halving(nn.Module):
    """In place of a layer that drops, but the same at every call."""

    def forward(self, x):
        return x / 2


def leaky_relu(slope):
    return functools.partial(nn.LeakyReLU, slope)


def grouped(block, path):
    """A 1x1 convolution at this path is one in groups."""
    layer = block.get_submodule(path)
    setattr(block, path, nn.Conv2d(layer.in_channels, layer.out_channels, 1, groups=4))
    return block


def with_group_norm(block):
    """An excitation that is not one of ours."""
    block.attn.bn = nn.GroupNorm(1, block.attn.bn.num_features)
    return block


def coordinate_attention(**options):
    module = pytest.importorskip("timm.layers.coord_attn", reason="this timm has no coordinate attention")
    return module.CoordAttn(C, **options)


def gather_excite(**options):
    return timm_layers.GatherExcite(C, extra_params=False, use_mlp=False, **options)


def with_mlp(block):
    """As the releases of timm have it in which use_mlp works."""
    block.mlp = timm_layers.ConvMlp(C, C // 16)
    return block


def randomised(name: str) -> nn.Module:
    """The block with every parameter and running statistic random: hosts start some at zero."""
    return with_random_values(BLOCKS[name][0]())


def with_random_values(block: nn.Module) -> nn.Module:
    with torch.no_grad():
        for i, parameter in enumerate(block.parameters()):
            parameter.copy_(random(*parameter.shape, seed=i, scale=parameter[0].numel() ** -0.5))
        for key, buffer in block.named_buffers():
            if key.endswith("running_mean"):
                buffer.normal_()
            if key.endswith("running_var"):
                buffer.uniform_(0.5, 2)
    return block


def functional_call(block: nn.Module):
    def function(x, **parameters):
        tensors = {k: b.clone().to(x.dtype if b.is_floating_point() else b.dtype) for k, b in block.named_buffers()}
        tensors |= {k.replace("/", "."): v for k, v in parameters.items()}
        return torch.func.functional_call(block, tensors, (x,))

    return function


#: With maxima behind a convolution, or a ReLU behind a sum: rounding decides between near-equal values, eager's too; or
#: with a LayerNorm of few values, which amplifies it.
DECIDED = [n for n in BLOCKS if any(p in n for p in ("Bilinear", "Bat", "External", "GSoP", "GlobalContext, scale"))]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", [name for name in BLOCKS if name not in DECIDED])
def test_same_function(name, dtype, layout, training):
    block = randomised(name).to(dtype).train(training)
    fused = fuse(copy.deepcopy(block))
    assert type(fused) is not type(block) and isinstance(fused, type(block))
    shape = (3, C, *(7, 9, 5)[: BLOCKS[name][1]])
    # In half precision only what has clear maxima: between near-equal ones eager and float64 choose differently.
    x = separated(shape, dtype) if dtype == torch.bfloat16 else random(*shape, dtype=dtype)
    if "select" in getattr(recognise(block), "functions", ()):
        # More samples, that differ: a BatchNorm over three means of plain noise would amplify rounding alone.
        shape = (8, C, 7, 9)
        x = (random(*shape) + random(8, C, 1, 1)).to(dtype)
    inputs = {"x": in_layout(x, layout)}
    inputs |= {k.replace(".", "/"): v.detach() for k, v in block.named_parameters()}
    grad = [random(*shape, seed=1, dtype=dtype)]
    assert_equivalent(functional_call(fused), functional_call(block), inputs, grad)


EQUAL_MAXIMA = ["timm SEModule, max", "timm EffectiveSEModule, max", "timm GatherExcite, max", "timm CbamModule"]
EQUAL_MAXIMA += ["timm LightCbamModule", "timm ChannelAttn", "timm LightChannelAttn", "timm SpatialAttn"]
EQUAL_MAXIMA += ["ultralytics SpatialAttention", "reference GatherExcite", "reference CBAM, plain"]


@pytest.mark.parametrize("name", EQUAL_MAXIMA)
def test_the_gradient_of_equal_maxima(name):
    """It goes to all of them or to the first, as the host's pool has it."""
    block = randomised(name)
    x = random(2, C, *(7, 9, 5)[: BLOCKS[name][1]], dtype=torch.float64).round()
    assert all((y == y.amax(2, True)).sum(2).max() > 1 for y in (x.flatten(2), x.flatten(2).mT))
    assert_same_block(fuse(copy.deepcopy(block), strict=True), block, x, training=False)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_branches_that_blur_run_as_they_are(training):
    block = with_random_values(selective_kernel(C, stride=2, aa_layer=nn.AvgPool2d))
    fused = fuse(copy.deepcopy(block), strict=True)
    assert type(fused) is not type(block)
    assert_same_block(fused, block, random(4, C, 8, 6), training=training)


@pytest.mark.parametrize("name", BLOCKS)
def test_recognised_as_expected(name):
    block = BLOCKS[name][0]()
    assert isinstance(recognise(block), BLOCKS[name][2])
    (row,) = explain(fuse(block))
    assert row.fused and row.served_by in ("cpu", "reference") and row.block and "\n" not in str(row.block)


@pytest.mark.parametrize("name", BLOCKS)
def test_nothing_it_owns_changes(name):
    block = BLOCKS[name][0]()
    block.register_forward_hook(lambda *_: None)
    before = {key: id(value) for key, value in block.__dict__.items()}
    tensors = {key: value.data_ptr() for key, value in block.state_dict().items()}
    cls = type(block)
    fuse(block)
    assert list(block.state_dict()) == list(tensors)
    assert {key: value.data_ptr() for key, value in block.state_dict().items()} == tensors
    unfuse(block)
    assert type(block) is cls
    assert {key: id(value) for key, value in block.__dict__.items()} == before


@pytest.fixture
def large_from_here(monkeypatch):
    """What a block of timm's does with large maps it does with all."""
    monkeypatch.setattr("fused_attn.fusion.hosts.timm._LARGE", 0)


@pytest.mark.usefixtures("large_from_here")
@pytest.mark.parametrize("training", [True, False, "dropout alone", "norms alone"])
@pytest.mark.parametrize("options", [{}, {"drop_rate": 0.5, "act_layer": nn.SiLU}, {"groups": 4, "drop_rate": 1.0}])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bilinear_attention_with_dropout(layout, options, training):
    """The same channels are dropped."""
    block = with_random_values(timm_layers.BatNonLocalAttn(C, rd_channels=16, **options)).double()
    block.train(training is True or training == "norms alone")
    block.dropout.train(training in (True, "dropout alone"))
    fused = fuse(copy.deepcopy(block), strict=True)
    x = in_layout(random(3, C, 14, 21, dtype=torch.float64), layout)
    results = []
    for module in (block, fused):
        torch.manual_seed(3)
        leaf = x.detach().requires_grad_()
        y = module(leaf)
        grads = torch.autograd.grad(y, [leaf, *module.parameters()], random(*y.shape, seed=1, dtype=torch.float64))
        results.append([y.detach(), *grads, *module.buffers()])
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("large_from_here")
def test_bilinear_attention_under_autocast():
    block = with_random_values(timm_layers.BatNonLocalAttn(C, drop_rate=0.0)).train()
    fused = fuse(copy.deepcopy(block), strict=True)
    x = random(3, C, 14, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = fused(x), block(x)
    assert y.dtype == expected.dtype == torch.float32
    assert (y - expected).norm() < 0.01 * expected.norm()


@pytest.mark.usefixtures("large_from_here")
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", DECIDED)
def test_same_function_over_several_maps(name, dtype, layout, training):
    """In float64; else mostly as good as eager over several maps, where eager is not exact."""
    block = randomised(name).to(dtype).train(training)
    ratios = []
    for seed in range(1 if dtype == torch.float64 else 8):
        x = in_layout(random(3, C, 14, 7, seed=seed, dtype=dtype), layout)
        grad = random(*x.shape, seed=seed + 1, dtype=dtype)
        found = []
        for module in (copy.deepcopy(block).double(), copy.deepcopy(block), fuse(copy.deepcopy(block), strict=True)):
            leaf = x.detach().to(next(module.parameters()).dtype).requires_grad_()
            y = module(leaf)
            assert y.dtype == leaf.dtype
            grads = torch.autograd.grad(y, [leaf, *module.parameters()], grad.to(y.dtype))
            found.append([v.double() for v in (y, *grads)])
        exact, eager, ours = found
        if dtype == torch.float64:
            torch.testing.assert_close(ours, exact, rtol=1e-9, atol=1e-9)
        for of_eager, of_ours, e in zip(eager, ours, exact, strict=True):
            rounding = torch.finfo(dtype).eps * max(e.norm(), 1e-3 * exact[0].norm())
            ratios.append(((of_ours - e).norm() / max((of_eager - e).norm(), rounding)).item())
    # timm's map goes on in NCHW, ours in the layout it came in, in which torch's statistics round more.
    assert dtype == torch.float64 or torch.tensor(ratios).median() < 3


@pytest.mark.parametrize("shape", [(2, C, 14, 15), (2, C, 6, 7), (2, 30, 7, 7), (C, 7, 7)])
def test_maps_that_bilinear_attention_does_not_take_are_the_hosts_error(shape):
    x = random(*shape)
    for block in (timm_layers.BatNonLocalAttn(C), timm_non_local.BilinearAttnTransform(C, 7, 2)):
        with pytest.raises((RuntimeError, AssertionError, ValueError)) as original:
            block(x)
        with pytest.raises(original.type) as ours:
            fuse(copy.deepcopy(block), strict=True)(x)
        assert str(ours.value) == str(original.value)


def test_a_hook_in_bilinear_attention_runs():
    x = random(2, C, 7, 14)
    for path in ("conv1", "ba", "ba.conv_p", "conv2.conv", "conv2", "conv2.bn", "dropout"):
        block = with_random_values(timm_layers.BatNonLocalAttn(C, drop_rate=0.0)).eval()
        block.get_submodule(path).register_forward_hook(lambda module, inputs, output: output + 1)
        fused = fuse(copy.deepcopy(block))
        torch.testing.assert_close(fused(x), block(x))
        runs = path not in ("conv2", "conv2.bn", "dropout")
        assert [row.fused for row in explain(fused)] == ([True] if runs else [False, True])


NORMS = {
    "timm SEModule, norm": "bn",
    "timm CbamModule": "spatial.conv.bn",
    "timm LightCbamModule": "spatial.conv.bn",
    "timm SpatialAttn": "conv.bn",
    "timm CoordAttn": "bn1",
    "timm NonLocalAttn": "norm",
    "timm BilinearAttnTransform": "conv1.bn",
    "timm BatNonLocalAttn": "conv2.bn",
    "timm SelectiveKernel": "paths.1.bn",
    "timm SplitAttn": "bn1",
    "timm SplitAttn, mish": "bn0",
    "reference SKConv": "fc1.1",
    "reference SelectiveKernel": "attn.bn",
    "reference SplitAttention": "bn0",
    "reference CoordinateAttention": "bn1",
    "reference TripletAttention": "hc.conv.bn",
    "reference BAM": "channel_att.gate_c.gate_c_bn_1",
    "reference NonLocal": "norm",
    "reference DualAttention": "conv51.1",
    "reference SpatialAttention": "conv.bn",
    "reference CBAM": "spatial.conv.bn",
    "reference ExternalAttention": "conv2.1",
    "reference GSoP": "bn_for_DR",
    "reference GSoP, max": "bn_for_DR_spatial",
    "reference BilinearTransform": "conv2.bn",
    "reference ResidualAttention": "first_residual_blocks.bn2",
}


@pytest.mark.parametrize("name", NORMS)
def test_running_statistics_move_as_they_did(name):
    block = randomised(name)
    fused = fuse(copy.deepcopy(block))
    x = random(4, C, 7, 7)
    block(x), fused(x)
    theirs, ours = block.get_submodule(NORMS[name]), fused.get_submodule(NORMS[name])
    torch.testing.assert_close(ours.running_mean, theirs.running_mean)
    torch.testing.assert_close(ours.running_var, theirs.running_var)
    assert ours.num_batches_tracked == theirs.num_batches_tracked == 1
    torch.testing.assert_close(fused.eval()(x), block.eval()(x))  # and are used


@pytest.mark.parametrize("name", [name for name in NORMS if name != "timm SEModule, norm"])
def test_frozen_statistics_in_a_model_that_trains(name):
    block = randomised(name).train()
    block.get_submodule(NORMS[name]).eval()
    fused = fuse(copy.deepcopy(block))
    x = random(4, C, 7, 7)
    torch.testing.assert_close(fused(x), block(x))
    assert torch.equal(fused.get_submodule(NORMS[name]).running_mean, block.get_submodule(NORMS[name]).running_mean)


class OtherAttention(timm_cbam.SpatialAttn):
    def forward(self, x):
        return -super().forward(x)


class LoRAConv(nn.Conv2d):
    """Has a weight that is not all that multiplies."""


def changed(path, **attributes):
    def change(block):
        for key, value in attributes.items():
            setattr(block.get_submodule(path), key, value)

    return change


#: name -> (block, what makes it another function, the reason it is left alone for)
REFUSED = {
    "part of a subclass": ("timm CbamModule", changed("", spatial=OtherAttention()), "its parts are not timm's"),
    "part with its own forward": (
        "timm CbamModule",
        changed("channel", forward=lambda x: x),
        "channel carries a hook or a forward of its own, which the fused block would skip",
    ),
    "another norm": ("timm CbamModule", changed("spatial.conv", bn=nn.GroupNorm(1, 1)), "its layers are not timm's"),
    "an activation in the norm": (
        "timm CbamModule",
        changed("spatial.conv.bn", act=nn.ReLU()),
        "its layers are not timm's",
    ),
    "a norm without weights": (
        "timm CbamModule",
        changed("spatial.conv", bn=nn.BatchNorm2d(1, affine=False)),
        "spatial.conv.bn has no weight",
    ),
    "an adapted convolution": (
        "timm LightCbamModule",
        changed("spatial.conv", conv=LoRAConv(1, 1, 7, padding=3, bias=False)),
        "its layers are not timm's",
    ),
    "an even kernel": (
        "timm LightCbamModule",
        changed("spatial.conv", conv=nn.Conv2d(1, 1, 4, padding="same")),
        "its layers are not timm's",
    ),
    "circular padding": (
        "timm CbamModule",
        changed("spatial.conv", conv=nn.Conv2d(2, 1, 3, padding=1, padding_mode="circular")),
        "its layers are not timm's",
    ),
    "dilation": (
        "timm CbamModule",
        changed("spatial.conv", conv=nn.Conv2d(2, 1, 3, padding=2, dilation=2)),
        "its layers are not timm's",
    ),
    "blur": ("timm CbamModule", changed("spatial.conv", aa=nn.AvgPool2d(3, 1, 1)), "it blurs its gate"),
    "another activation": (
        "timm CbamModule",
        changed("channel", act=nn.Mish()),
        "its activation or gate is not one we fuse",
    ),
    "another gate": (
        "timm LightCbamModule",
        changed("spatial", gate=nn.Softplus()),
        "its activation or gate is not one we fuse",
    ),
    "a maximum in ultralytics' pool": (
        "ultralytics CBAM",
        changed("channel_attention", pool=nn.AdaptiveMaxPool2d(1)),
        "its layers are not ultralytics'",
    ),
    "ultralytics' gate replaced": (
        "ultralytics SpatialAttention",
        changed("", act=nn.Softplus()),
        "its gate is not one we fuse",
    ),
    "ultralytics' convolution of another width": (
        "ultralytics ChannelAttention",
        changed("", fc=nn.Conv2d(C, 1, 1)),
        "its layers are not ultralytics'",
    ),
    "a part that is only named like ultralytics'": (
        "ultralytics CBAM",
        changed("", spatial_attention=reference.SpatialAttention()),
        "its parts are not ultralytics'",
    ),
    "timm's keys of another width": (
        "timm NonLocalAttn",
        changed("", p=nn.Conv2d(C, 4, 1)),
        "its layers are not timm's",
    ),
    "timm's values of a larger kernel": (
        "timm NonLocalAttn",
        changed("", g=nn.Conv2d(C, 8, 3, padding=1)),
        "its layers are not timm's",
    ),
    "timm's transform of a subclass": (
        "timm BatNonLocalAttn",
        changed("", ba=type("Other", (timm_non_local.BilinearAttnTransform,), {})(8, 7, 2)),
        "its parts are not timm's",
    ),
    "another dropout": ("timm BatNonLocalAttn", changed("", dropout=nn.Dropout(0.5)), "its parts are not timm's"),
    "blocks of a size that is no integer": (
        "timm BilinearAttnTransform",
        changed("", block_size=7.0),
        "its block_size or groups is no integer",
    ),
    "another gate of a sum of strips": (
        "timm SimpleCoordAttn",
        changed("", gate=nn.Hardsigmoid()),
        "its gate is no sigmoid, of a sum of one number a row and one a column",
    ),
    "strips of another width, of Linears": (
        "timm SimpleCoordAttn",
        changed("", fc_h=nn.Linear(8, 1)),
        "its layers are not timm's",
    ),
    "strips of another width, of convolutions": (
        "timm StripAttn",
        changed("", conv_w=nn.Conv2d(C, 1, 1)),
        "its layers are not timm's",
    ),
    "a context's mask of another width": (
        "timm GlobalContext",
        changed("", conv_attn=nn.Conv2d(C, 2, 1)),
        "its layers are not timm's",
    ),
    "a context's MLP of another width": (
        "timm GlobalContext, add",
        changed("mlp_add", fc2=nn.Conv2d(4, 1, 1)),
        "its layers are not timm's",
    ),
    "another transform of a context": (
        "timm GlobalContext",
        changed("", mlp_scale=nn.Sequential(nn.Conv2d(C, C, 1))),
        "its parts are not timm's",
    ),
    "another gate of a context": ("timm GlobalContext", changed("", gate=nn.Softmax(1)), "its gate is not one we fuse"),
    "a context's mask with its own forward": (
        "timm GlobalContext",
        changed("conv_attn", forward=lambda x: x),
        "conv_attn carries a hook or a forward of its own, which the fused block would skip",
    ),
    "another attention over branches": (
        "timm SelectiveKernel",
        changed("", attn=type("Other", (timm_layers.selective_kernel.SelectiveKernelAttn,), {})(C, 2, 8)),
        "its parts are not timm's",
    ),
    "another softmax over splits": ("timm SplitAttn", changed("", rsoftmax=nn.Softmax(1)), "its parts are not timm's"),
    "a branch whose norm has its own forward": (
        "timm SelectiveKernel",
        changed("paths.0.bn", forward=lambda x: x),
        "paths.0.bn carries a hook or a forward of its own, which the fused block would skip",
    ),
    "windows": ("timm GatherExcite", changed("", extent=2, gk=3, gs=2), "its pool is not global"),
    "a gathering convolution": (
        "timm GatherExcite",
        changed("", gather=nn.Conv2d(C, C, 5, groups=C)),
        "its pool is not global",
    ),
    "dropout": ("timm GatherExcite, mlp", changed("mlp.drop", p=0.5), "its layers are not timm's"),
    "another gate to excite": ("timm GatherExcite", changed("", gate=nn.Softplus()), "its gate is not one we fuse"),
    "own windows": ("reference GatherExcite", changed("", extent=2), "its pool is not global"),
    "own norm without weights": (
        "reference CBAM",
        changed("spatial.conv.bn", weight=None),
        "spatial.conv.bn has no weight",
    ),
    "own part of a subclass": (
        "reference CBAM",
        changed("", channel=type("OtherChannel", (reference.ChannelAttention,), {})(C)),
        "its parts are not plain ChannelAttention and SpatialAttention",
    ),
    "own epilogue": (
        "reference CBAM",
        changed("spatial", post_activation="relu"),
        "returns its gate alone or has an epilogue; use fused_attn.nn",
    ),
}


#: Which runs its own excitation, between a pool and a product that are fused.
EXCITED: dict[str, tuple] = {
    "an adapter beside ultralytics' layer": (
        "ultralytics ChannelAttention",
        changed("", lora=nn.Conv2d(C, C, 1)),
    ),
    "another depth of smp's cSE": (
        "smp SCSEModule",
        changed("", cSE=nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(C, C, 1), nn.Sigmoid())),
    ),
    "smp's gate of a position with more channels": (
        "smp SCSEModule",
        changed("", sSE=nn.Sequential(nn.Conv2d(C, C, 1), nn.Sigmoid())),
    ),
    "a layer in groups": (
        "timm senet SEModule",
        changed("", fc1=nn.Conv2d(C, 8, 1, groups=4)),
    ),
}


@pytest.mark.parametrize("name", EXCITED)
def test_another_excitation_is_run(name):
    base, change = EXCITED[name]
    block = randomised(base).eval()
    change(block)
    fused = fuse(copy.deepcopy(block), strict=True)
    assert explain(fused)[0].block.endswith("in its forward")
    x = random(2, C, 6, 5, dtype=next(block.parameters()).dtype)
    torch.testing.assert_close(fused(x), block(x))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_another_function_is_left_alone(name):
    base, change, reason = REFUSED[name]
    block = randomised(base)
    change(block)
    cls = type(block)
    rows = explain(fuse(block))
    assert type(block) is cls and not rows[0].fused
    assert rows[0].reason == reason


@pytest.mark.parametrize("path", ["channel", "channel.fc1", "spatial.conv", "spatial.conv.bn"])
def test_a_hook_on_a_part_of_cbam(path):
    block = randomised("timm CbamModule")
    block.get_submodule(path).register_forward_hook(lambda *_: None)
    row, *parts = explain(fuse(block))
    assert not row.fused and row.reason.startswith(f"{path} carries a hook")
    assert [(part.name, part.fused) for part in parts] == [
        (part, path == part or not path.startswith(part)) for part in ("channel", "spatial")
    ]


@pytest.mark.parametrize("name", ["timm CbamModule", "ultralytics CBAM"])
def test_the_parts_of_a_block_that_is_left_alone_are_fused(name):
    block = randomised(name)
    calls = []
    fused = fuse(copy.deepcopy(block))
    assert len(explain(fused)) == 1
    part = list(block.children())[1]
    part.register_forward_pre_hook(lambda *_: calls.append(1))
    fused = fuse(copy.deepcopy(block))
    assert [row.fused for row in explain(fused)] == [False, True, True]
    x = random(2, C, 7, 7)
    torch.testing.assert_close(fused(x), block(x))
    assert len(calls) == 2 and all(
        type(p) is not type(q) for p, q in zip(fused.children(), block.children(), strict=True)
    )
    assert fuse(fused) is fused and [row.fused for row in explain(fused)] == [False, True, True]
    assert list(map(type, unfuse(fused).modules())) == list(map(type, block.modules()))


def test_parts_of_a_block_are_no_blocks():
    model = nn.Sequential(reference.CBAM(C), fused_nn.CBAM(C), reference.ChannelAttention(C))
    for _ in range(2):
        assert [row.name for row in explain(model)] == ["0", "1", "2"]
        fuse(model, strict=True)
    assert type(model[0].channel) is reference.ChannelAttention
    assert [row.fused for row in explain(model)] == [True] * 3


@pytest.mark.parametrize("how", ["nn", "reference", "fused"])
@pytest.mark.parametrize("kind", AS_IN_NN)
def test_own_modules_are_one_row(kind, how):
    """Theirs alone: what they are made of is served with them, also where it is a block by itself."""
    module = fused_nn if how == "nn" else reference
    block = spatial_transformer(module) if kind == "SpatialTransformer" else getattr(module, kind)(C)
    if how == "fused":
        fuse(block, strict=True)
        assert isinstance(block, getattr(reference, kind)) and not isinstance(block, getattr(fused_nn, kind))
    (row,) = explain(block)
    assert row.block == kind and row.fused == (how != "reference")
    assert row.served_by in (("its own forward",) if how == "reference" else ("cpu", "reference"))


@pytest.mark.parametrize("kind", AS_IN_NN)
def test_own_modules_get_the_functions_of_nn(kind):
    """A subclass that changes nothing, too; the class itself keeps its own, and its instance has them back."""
    fused_form, plain = getattr(fused_nn, kind), getattr(reference, kind)
    names = [name for name, value in vars(fused_form).items() if isinstance(value, staticmethod)]
    assert names
    options = {"localization": nn.Flatten()} if kind == "SpatialTransformer" else {}
    for cls in (plain, type("Mine", (plain,), {})):
        block = fuse(cls(C, **options))
        assert all(getattr(block, name).__wrapped__ is getattr(fused_form, name) for name in names)
        copied = copy.deepcopy(block)
        assert all(getattr(copied, name).__wrapped__ is getattr(fused_form, name) for name in names)
        unfuse(block)
        assert type(block) is cls and all(getattr(block, name) is getattr(plain, name) for name in names)


def with_blocks_given(module: Any) -> dict[str, nn.Module]:
    """Modules around parts that are given, with a block in each."""

    def mask() -> nn.Module:
        return nn.Sequential(nn.Conv2d(C, C, 3, padding=1), tv_misc.SqueezeExcitation(C, 8), nn.Sigmoid())

    localization = nn.Sequential(tv_misc.SqueezeExcitation(C, 8), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    return {
        "mask.1": module.ResidualAttention(C, trunk=nn.Identity(), mask=mask()),
        "trunk_branches": module.ResidualAttention(C, trunk=tv_misc.SqueezeExcitation(C, 8), depth=0),
        "localization.0": module.SpatialTransformer(C, localization=localization, features=4 * C),
    }


@pytest.mark.parametrize("how", ["nn", "reference"])
def test_blocks_in_parts_that_are_given(how):
    """They are fused by themselves, whatever the module around them is, and stay so where that is changed."""
    x = random(2, C, 8, 6)
    for path, block in with_blocks_given(fused_nn if how == "nn" else reference).items():
        with_random_values(block).eval()
        expected = block(x)
        before = list(map(type, block.modules()))
        assert [row.fused for row in explain(block)] == [how == "nn", False]
        for _ in range(2):
            assert [(row.name, row.fused) for row in explain(fuse(block, strict=True))] == [
                ("(the model)", True),
                (path, True),
            ]
            assert type(block.get_submodule(path)) is not tv_misc.SqueezeExcitation
            torch.testing.assert_close(block(x), expected)
        block.forward = lambda x, original=block.forward: original(x) + 1
        torch.testing.assert_close(block(x), expected + 1)
        assert explain(block)[1].fused
        del block.forward
        assert list(map(type, unfuse(block).modules())) == before


def test_the_transform_in_bilinear_attention_is_served_with_it():
    """And is a block by itself where the attention around it runs as it is written."""
    block = reference.BilinearAttention(C)
    assert [row.name for row in explain(block)] == ["(the model)"]
    assert [row.fused for row in explain(fuse(block, strict=True))] == [True]
    assert block.ba._normalised is not reference.BilinearTransform._normalised
    block.conv2["bn"].register_forward_hook(lambda *_: None)
    assert [(row.name, row.fused) for row in explain(fuse(block))] == [("(the model)", False), ("ba", True)]
    assert [row.name for row in explain(fused_nn.BilinearAttention(C))] == ["(the model)"]


#: Layers that are read, or not run in eval: name -> (block, their paths).
READ = {
    "DoubleAttention": (reference.DoubleAttention, ("convA", "convB", "convV", "conv_reconstruct")),
    "ExternalAttention": (
        reference.ExternalAttention,
        ("conv1", "linear_0", "linear_1", "conv2", "conv2.0", "conv2.1"),
    ),
    "GSoP": (
        functools.partial(reference.GSoP, mode="avg", reduced=8),
        ("bn_for_DR", "conv_for_DR_spatial", "bn_for_DR_spatial"),
    ),
    "BilinearTransform": (reference.BilinearTransform, ("conv1.bn", "conv2.bn")),
    "BilinearAttention": (reference.BilinearAttention, ("conv1.bn", "conv2.bn")),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", READ)
def test_hooks_of_layers_that_are_read(kind, when, monkeypatch):
    """They run, in maps of every size, and change the result as they do in the block as it is written."""
    monkeypatch.setattr("fused_attn.nn.normalised.LARGE", 0)
    make, paths = READ[kind]
    x = random(2, C, 42, 35)
    for path in (path for path, layer in make(C).named_modules() if path and not isinstance(layer, nn.ModuleDict)):
        block = with_random_values(make(C)).eval()
        fused = fuse(copy.deepcopy(block)) if when == "after" else copy.deepcopy(block)
        for module in (block, fused):
            module.get_submodule(path).register_forward_hook(lambda module, inputs, output: output + 1)
        fuse(fused)
        torch.testing.assert_close(fused(x), block(x))
        assert explain(fused)[0].fused == (path not in paths), path


def test_branch_weights_alone_are_left_alone():
    block = timm_layers.SelectiveKernel(C)
    (row,) = explain(fuse(block.attn))
    assert not row.fused and row.reason.startswith("returns the weights of its branches alone")
    (row,) = explain(fuse(nn.Sequential(block), strict=True))  # in the block they are part of it
    assert row.fused and row.name == "0"


@pytest.mark.parametrize("name", ["timm SelectiveKernel", "timm SelectiveKernel, mish"])
def test_layers_that_run_keep_their_hooks(name):
    block = randomised(name).eval()
    runs = ["paths.0.conv"] if name == "timm SelectiveKernel" else ["paths.0", "paths.1.bn"]
    calls = []
    for path in runs:
        block.get_submodule(path).register_forward_hook(lambda *_: calls.append(1))
    fused = fuse(copy.deepcopy(block), strict=True)
    x = random(2, C, 7, 7)
    torch.testing.assert_close(fused(x), block(x))
    assert len(calls) == 2 * len(runs)


@pytest.mark.parametrize("name", ["timm SelectiveKernel", "timm SplitAttn"])
def test_one_sample_in_training_is_the_hosts_error(name):
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        fuse(randomised(name).train())(random(1, C, 5, 5))


@pytest.mark.parametrize("pool", ["before", "after"])
def test_layers_that_a_concatenation_only_reads_keep_their_hooks(pool):
    """A block with one of them runs as it is."""
    x = random(2, C, 6, 6)
    for path in ("theta", "phi", "g", "out"):
        block = with_random_values(reference.NonLocal(C, mode="concatenation", pool=pool)).eval()
        block.get_submodule(path).register_forward_hook(lambda module, inputs, output: output + 1)
        fused = fuse(copy.deepcopy(block))
        torch.testing.assert_close(fused(x), block(x))
        runs = path in ("g", "out") or (path == "phi" and pool == "after")
        assert explain(fused)[0].fused == runs


def test_options_of_a_part_changed_after_fusing_count():
    block = fuse(randomised("reference CBAM"))
    x = random(2, C, 5, 5)
    block.spatial.order = ("mean", "max")
    assert torch.equal(block(x), reference.CBAM.forward(block, x))
    assert explain(block)[0].reason == "changed since fuse: order"


def test_another_rank_goes_to_the_original():
    block = randomised("timm SEModule")
    fused = fuse(copy.deepcopy(block))
    x = random(2, C, 3, 4, 5)
    with pytest.raises(RuntimeError) as original:
        block(x)
    with pytest.raises(RuntimeError) as ours:
        fused(x)
    assert str(ours.value) == str(original.value)


def test_channels_last_excitation():
    block = timm_layers.squeeze_excite.SqueezeExciteCl(C)
    fused = fuse(copy.deepcopy(block))
    (row,) = explain(fused)
    assert row.fused and row.block.endswith("in its forward")
    x = random(2, 6, 5, C)
    torch.testing.assert_close(fused(x), block(x))
    assert fused(x).is_contiguous()


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("name", "pool"), [("torchvision, softplus", "avgpool"), ("monai, prelu", "avg_pool")])
def test_a_hook_on_the_pool_of_a_split_block_runs(name, pool, when):
    block = randomised(name)
    if when == "after":
        fuse(block)
    block.get_submodule(pool).register_forward_hook(lambda module, inputs, output: 5 * output)
    cls = type(block).__mro__[1] if when == "after" else type(block)
    fuse(block)
    x = random(2, C, 5, 5)
    assert torch.equal(block(x), cls.forward(block, x))
    assert not explain(block)[0].fused


def test_a_bias_set_after_fusing_counts():
    block = fuse(timm_layers.SEModule(C, bias=False))
    x = random(2, C, 5, 5)
    block.fc2.bias = nn.Parameter(torch.full((C,), 2.0))
    torch.testing.assert_close(block(x), timm_layers.SEModule.forward(block, x))


def test_a_map_given_by_keyword():
    block = tv_misc.SqueezeExcitation(C, 8)
    x = random(2, C, 5, 5)
    expected = tv_misc.SqueezeExcitation.forward(block, x)
    with FusedOperators() as ran:
        torch.testing.assert_close(fuse(block)(input=x), expected)
    assert ran.count


OWN_BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "SqueezeExcite": lambda: reference.SqueezeExcite(32),
    "EffectiveSE": lambda: reference.EffectiveSE(32),
    "ECA": lambda: reference.ECA(32),
    "CBAM": lambda: reference.CBAM(32),
    "BAM": lambda: reference.BAM(32),
    "CoordinateAttention": lambda: reference.CoordinateAttention(32),
    "CrissCrossAttention": lambda: reference.CrissCrossAttention(32),
    "EMA": lambda: reference.EMA(32),
    "DoubleAttention": lambda: reference.DoubleAttention(32),
    "ExternalAttention": lambda: reference.ExternalAttention(32),
    "GSoP": lambda: reference.GSoP(32, mode="avg", reduced=8),
    "ResidualAttention": lambda: reference.ResidualAttention(32, depth=1),
    "SCSE": lambda: reference.SCSE(32),
    "SKConv": lambda: reference.SKConv(32),
    "SelectiveKernel": lambda: reference.SelectiveKernel(32),
    "SplitAttention": lambda: reference.SplitAttention(32),
    "TripletAttention": lambda: reference.TripletAttention(),
}
PUT_IN: dict[str, Callable[[Any], nn.Module]] = {
    "in a Sequential": lambda layer: nn.Sequential(copy.deepcopy(layer)),
    "GroupNorm": lambda layer: nn.GroupNorm(1, getattr(layer, "num_features", getattr(layer, "out_channels", 1))),
    "Identity": lambda layer: nn.Identity(),
}


@pytest.mark.parametrize("name", ["SqueezeExcite", "EffectiveSE", "ECA", "CBAM"])
@pytest.mark.parametrize("how", ["None", "pruned", "a tensor"])
def test_a_weight_of_a_block_of_this_library(name, how):
    """Of every layer, before it is fused and after."""
    plain = with_random_values(OWN_BLOCKS[name]()).double()
    x = random(2, 32, 6, 5, dtype=torch.float64)

    def change(module: nn.Module, path: str) -> None:
        layer = module.get_submodule(path)
        if how == "pruned":
            prune.l1_unstructured(layer, "weight", amount=0.5)
        elif how == "None":
            layer.weight = None
        else:
            weight = layer.weight.detach() * 2
            del layer.weight
            layer.weight = weight

    for path, layer in plain.named_modules():
        if "weight" not in layer._parameters or list(layer.children()):
            continue
        original, before, after = copy.deepcopy(plain), copy.deepcopy(plain), fuse(copy.deepcopy(plain))
        for module in (original, before, after):
            change(module, path)
        for model in (fuse(before), after, copy.copy(after), fuse(after)):
            str(explain(model))
            try:
                expected = original(x)
            except Exception as error:
                with pytest.raises(type(error)):
                    model(x)
            else:
                torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9, msg=f"{path}: differs")


@pytest.mark.parametrize("what", PUT_IN)
@pytest.mark.parametrize("name", OWN_BLOCKS)
def test_another_layer_in_a_block_of_this_library(name, what):
    """Where its original raises it does too."""

    def run(module: nn.Module) -> list[Tensor] | None:
        x = random(2, 32, 6, 5, dtype=torch.float64).requires_grad_()
        try:
            y = module(x)
            return [y.detach(), *torch.autograd.grad(y.square().sum(), x)]
        except Exception:
            return None

    plain = with_random_values(OWN_BLOCKS[name]()).double()
    for path, layer in plain.named_modules():
        if not path or list(layer.children()):
            continue
        original = copy.deepcopy(plain)
        original.set_submodule(path, PUT_IN[what](layer).double())
        for training in (False, True):
            expected = run(original.train(training))
            actual = run(fuse(copy.deepcopy(original)))
            assert (actual is None) == (expected is None), path
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9, msg=lambda m, path=path: f"{path}: {m}")


@pytest.mark.parametrize("name", ["SqueezeExcite", "CBAM", "SKConv"])
def test_no_buffer_of_a_parametrisation_changes(name):
    """Spectral norm goes a step on when a weight is read in training."""
    block = getattr(reference, name)(C).train()
    for layer in [layer for layer in block.modules() if type(layer) in (nn.Linear, nn.Conv2d)]:
        spectral_norm(layer)
    before = copy.deepcopy(block.state_dict())
    explain(fuse(block))
    for key, value in unfuse(block).state_dict().items():
        assert torch.equal(value, before[key]), key
